//! How the vCPUs of a machine are arranged, and which local APIC IDs that gives them.

use crate::{Error, Result};

/// The most vCPUs a machine can have.
pub const MAX_CPUS: u32 = 255;

/// The arrangement of vCPUs: `-smp cpus,sockets=…,dies=…,cores=…,threads=…`.
///
/// vCPU 0 is the first thread of the first core; threads count up first, sockets last. Fewer vCPUs than places is allowed:
/// the last places are then empty.
///
/// ```
/// use keel_hypervisor::cpu_model::Topology;
/// let topology = Topology { cpus: 6, sockets: 1, dies: 1, cores: 3, threads: 2 };
/// // Three cores take two bits, so a second socket would begin at 8 and not at 6.
/// assert_eq!((0..6).map(|cpu| topology.apic_id(cpu)).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Topology {
    /// vCPUs there are, 1 to [`MAX_CPUS`].
    pub cpus: u32,
    /// Packages of the machine.
    pub sockets: u32,
    /// Dies of a package. Each has a last-level cache of its own.
    pub dies: u32,
    /// Cores of a die.
    pub cores: u32,
    /// Threads of a core.
    pub threads: u32,
}

/// A place in a [`Topology`], each number from 0 within the next larger unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// The package in the machine.
    pub socket: u32,
    /// The die in the package.
    pub die: u32,
    /// The core in the die.
    pub core: u32,
    /// The thread in the core.
    pub thread: u32,
}

/// The arrangement of one vCPU: a machine with nothing to arrange.
impl Default for Topology {
    fn default() -> Self {
        Topology::flat(1)
    }
}

impl Topology {
    /// One socket of single-threaded cores: what `-smp cpus` alone means.
    pub const fn flat(cpus: u32) -> Self {
        Topology { cpus, sockets: 1, dies: 1, cores: cpus, threads: 1 }
    }

    /// Refuses what is no arrangement: zeros, more vCPUs than places, more than [`MAX_CPUS`].
    pub fn check(&self) -> Result<()> {
        let Topology { cpus, sockets, dies, cores, threads } = *self;
        let why = if cpus == 0 || sockets == 0 || dies == 0 || cores == 0 || threads == 0 {
            "every number must be at least 1".to_owned()
        } else if cpus > MAX_CPUS {
            format!("the most vCPUs a machine can have is {MAX_CPUS}")
        } else if [sockets, dies, cores, threads].iter().any(|count| *count > MAX_CPUS) {
            format!("no number can be more than {MAX_CPUS}")
        } else if u64::from(sockets) * u64::from(dies) * u64::from(cores) * u64::from(threads)
            < u64::from(cpus)
        {
            format!("it has room for {} vCPUs only", sockets * dies * cores * threads)
        } else {
            return Ok(());
        };
        Err(Error::Topology { topology: *self, why })
    }

    /// Where the vCPU of this number is.
    pub fn place(&self, index: u32) -> Place {
        let threads = self.threads.max(1);
        let cores = self.cores.max(1);
        let dies = self.dies.max(1);
        Place {
            thread: index % threads,
            core: index / threads % cores,
            die: index / threads / cores % dies,
            socket: index / threads / cores / dies,
        }
    }

    /// The local APIC ID of the vCPU of this number: its [`Place`] in bit fields, each just wide enough
    /// (Intel SDM volume 3, 10.9.1, "Hierarchical Mapping of Shared Resources").
    ///
    /// IDs are sparse where a count is no power of two. One above 254 can only be an x2APIC ID.
    pub fn apic_id(&self, index: u32) -> u32 {
        let place = self.place(index);
        place.socket << self.package_bits()
            | place.die << self.die_bits()
            | place.core << self.core_bits()
            | place.thread
    }

    /// The largest local APIC ID of any vCPU.
    pub fn max_apic_id(&self) -> u32 {
        self.apic_id(self.cpus.saturating_sub(1))
    }

    /// Whether some vCPU has an ID that only an x2APIC can have: 255 is the broadcast ID of an xAPIC.
    pub fn needs_x2apic(&self) -> bool {
        self.max_apic_id() > 254
    }

    /// The threads of one package.
    pub(super) fn threads_per_package(&self) -> u32 {
        self.dies * self.cores * self.threads
    }

    /// The low bits of an APIC ID in which the threads of one core differ.
    pub(super) fn core_bits(&self) -> u32 {
        bits(self.threads)
    }

    /// The low bits in which the threads of one die differ.
    pub(super) fn die_bits(&self) -> u32 {
        self.core_bits() + bits(self.cores)
    }

    /// The low bits in which the threads of one package differ.
    pub(super) fn package_bits(&self) -> u32 {
        self.die_bits() + bits(self.dies)
    }
}

/// How many bits it takes to number `count` things: the logarithm, rounded up.
fn bits(count: u32) -> u32 {
    u32::BITS - count.saturating_sub(1).leading_zeros()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ids_are_bit_fields() {
        let smt = Topology { cpus: 4, sockets: 1, dies: 1, cores: 2, threads: 2 };
        assert_eq!((0..4).map(|i| smt.apic_id(i)).collect::<Vec<_>>(), [0, 1, 2, 3]);

        let sparse = Topology { cpus: 12, sockets: 2, dies: 1, cores: 3, threads: 2 };
        assert_eq!(
            (0..12).map(|i| sparse.apic_id(i)).collect::<Vec<_>>(),
            [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]
        );
        assert_eq!(sparse.place(7), Place { socket: 1, die: 0, core: 0, thread: 1 });

        let dies = Topology { cpus: 8, sockets: 2, dies: 2, cores: 2, threads: 1 };
        assert_eq!((0..8).map(|i| dies.apic_id(i)).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn many_vcpus_fit_or_need_an_x2apic() {
        let flat = Topology::flat(255);
        assert_eq!((flat.max_apic_id(), flat.needs_x2apic()), (254, false));
        let sparse = Topology { cpus: 255, sockets: 85, dies: 1, cores: 1, threads: 3 };
        assert_eq!((sparse.max_apic_id(), sparse.needs_x2apic()), (84 * 4 + 2, true));
        sparse.check().unwrap();
    }

    #[test]
    fn impossible_arrangements_are_refused() {
        let message = |topology: Topology| topology.check().unwrap_err().to_string();
        assert_eq!(
            message(Topology { cpus: 5, sockets: 1, dies: 1, cores: 2, threads: 2 }),
            "5 vCPUs in 1 socket of 1 die of 2 cores of 2 threads is impossible: it has room for 4 vCPUs only"
        );
        assert!(message(Topology::flat(256)).ends_with("the most vCPUs a machine can have is 255"));
        assert!(message(Topology::flat(0)).ends_with("every number must be at least 1"));
        let huge = Topology {
            cpus: 1,
            sockets: u32::MAX,
            dies: u32::MAX,
            cores: u32::MAX,
            threads: u32::MAX,
        };
        assert!(message(huge).ends_with("no number can be more than 255"));
    }

    proptest! {
        #[test]
        fn ids_are_unique_and_ascending(sockets in 1u32..9, dies in 1u32..4, cores in 1u32..9, threads in 1u32..4) {
            let topology = Topology { cpus: (sockets * dies * cores * threads).min(MAX_CPUS), sockets, dies, cores, threads };
            topology.check().unwrap();
            let ids: Vec<u32> = (0..topology.cpus).map(|i| topology.apic_id(i)).collect();
            prop_assert!(ids.is_sorted());
            prop_assert_eq!(ids.iter().collect::<BTreeSet<_>>().len(), ids.len());
            prop_assert_eq!(ids.last().copied(), Some(topology.max_apic_id()));
            for (index, id) in (0..).zip(ids) {
                prop_assert_eq!(id >> topology.package_bits(), topology.place(index).socket);
            }
        }
    }
}
