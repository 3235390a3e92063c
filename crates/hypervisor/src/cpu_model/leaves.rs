//! The answers of `CPUID` for one vCPU.
//!
//! Layouts are those of the Intel SDM volume 2, "CPUID", and the AMD APM volume 3, appendix E.

use super::resolve::Words;
use super::{Base, CpuModel, Feature, Topology, Vendor, caches};
use crate::{Cpuid, CpuidEntry, Error, Result};

/// The frequency of the local APIC's timer in KVM, in kHz: a nanosecond a tick.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// The width of physical addresses of a named model where nobody says another: 1 TiB, which all hosts have.
const PHYSICAL_BITS: u8 = 40;

/// Leaves that mean nothing without a feature, which goes with them.
const WITH_FEATURE: [(u32, &str); 7] = [
    (0x12, "sgx"),
    (0x14, "intel-pt"),
    (0x1c, "arch-lbr"),
    (0x1d, "amx-tile"),
    (0x1e, "amx-tile"),
    (0x24, "avx10"),
    (0x8000_000a, "svm"),
];

/// Leaves that describe performance counters.
const WITH_PMU: [u32; 3] = [0xa, 0x23, 0x8000_0022];

/// Extended state components of XCR0 and the features that use them (Intel SDM volume 1, 13.1).
const USER_STATE: [(u32, &str); 10] = [
    (2, "avx"),
    (3, "mpx"),
    (4, "mpx"),
    (5, "avx512f"),
    (6, "avx512f"),
    (7, "avx512f"),
    (9, "pku"),
    (17, "amx-tile"),
    (18, "amx-tile"),
    (19, "apx"),
];

/// Extended state components of IA32_XSS.
const SUPERVISOR_STATE: [(u32, &str); 6] =
    [(8, "intel-pt"), (11, "shstk"), (11, "ibt"), (12, "shstk"), (12, "ibt"), (15, "arch-lbr")];

/// The size of the x87 and SSE state with the XSAVE header, in bytes: all there is when XCR0 is as after reset.
const LEGACY_STATE: u32 = 576;

impl CpuModel {
    /// What `CPUID` answers on vCPU `index` of a machine, and the features of the model that are missing from it.
    ///
    /// `supported` is what the backend can offer, including what it needs interrupt controllers or a clock for
    /// (x2APIC, TSC deadline). `host` passes it through but for what depends on the machine; a named model is exactly
    /// its own features, as far as they are supported, with caches, brand, family, model and stepping that are the
    /// same on every host. The vendor is the host's if the model does not say `vendor=`: system calls and hypercalls
    /// differ between vendors, and not all of it can be emulated. `tsc_khz` is the frequency of the time-stamp counter to
    /// tell the guest.
    ///
    /// # Errors
    ///
    /// A topology that can not be, or whose APIC IDs need an x2APIC that is not offered; with `enforce`, any missing
    /// feature; `phys-bits` above the host's.
    pub fn cpuid(
        &self,
        supported: &Cpuid,
        topology: &Topology,
        index: u32,
        tsc_khz: Option<u32>,
    ) -> Result<(Cpuid, Vec<Feature>)> {
        topology.check()?;
        if index >= topology.cpus {
            return Err(Error::Topology {
                topology: *topology,
                why: format!("it has no vCPU {index}"),
            });
        }
        let vendor = self.vendor.unwrap_or_else(|| vendor_of(supported));
        let (words, missing) = self.resolve(supported, vendor);
        if self.enforce && !missing.is_empty() {
            return Err(Error::MissingCpuFeatures { model: self.name(), features: missing });
        }
        if topology.needs_x2apic() && !words.has_name("x2apic") {
            let why = format!("APIC ID {} needs the CPU feature x2apic", topology.max_apic_id());
            return Err(Error::Topology { topology: *topology, why });
        }

        let mut answers =
            Answers { out: Cpuid::default(), supported, words, topology, index, vendor };
        answers.copy(self);
        answers.identity(self);
        answers.sharing();
        answers.extended_state();
        answers.address_sizes(self)?;
        if !self.hide_hypervisor {
            answers.hypervisor(tsc_khz);
        }
        Ok((answers.finish(self), missing))
    }
}

struct Answers<'a> {
    out: Cpuid,
    supported: &'a Cpuid,
    words: Words,
    topology: &'a Topology,
    index: u32,
    vendor: Vendor,
}

impl Answers<'_> {
    /// What comes from the host as it is, and all words that hold features.
    fn copy(&mut self, model: &CpuModel) {
        for entry in &self.supported.0 {
            let gate = WITH_FEATURE.iter().find(|(leaf, _)| *leaf == entry.leaf);
            let taken = match entry.leaf {
                // Built below, told elsewhere (0x80000026: AMD levels), or the hypervisor's.
                0xb | 0x1f | 0x8000_001e | 0x8000_0026 | 0x4000_0000..=0x4fff_ffff => false,
                leaf if WITH_PMU.contains(&leaf) => model.pmu,
                _ => match gate {
                    Some((_, feature)) => self.words.has_name(feature),
                    None => model.base == Base::Host,
                },
            };
            if taken {
                self.out.set(*entry);
            }
        }
        for (word, value) in self.words.iter() {
            let hypervisor = word.leaf == 0x4000_0001;
            if !hypervisor
                && (value != 0 || self.out.get(word.leaf, word.subleaf.unwrap_or(0)).is_some())
            {
                word.set(&mut self.out, value);
            }
        }
        let last = self
            .out
            .0
            .iter()
            .filter(|entry| entry.leaf == 7 && !is_zero(entry))
            .map(|entry| entry.subleaf);
        let last = last.max().flatten().unwrap_or(0);
        self.entry(7, Some(0)).eax = last;
    }

    /// Vendor, signature and brand: who the CPU says it is.
    fn identity(&mut self, model: &CpuModel) {
        let id = self.topology.apic_id(self.index);
        let per_package = self.topology.threads_per_package();
        let (signature, addressable) = match self.vendor {
            // Numbers no real CPU has, so that no kernel applies the workarounds of one; the families are such that
            // the architectural rules of the vendor's current CPUs apply.
            Vendor::Intel => (signature(6, 0xff, 0), 1 << self.topology.package_bits()),
            Vendor::Amd => (signature(0x1f, 0, 0), per_package),
        };
        let named = model.base != Base::Host;
        let leaf1 = self.entry(1, None);
        if named {
            leaf1.eax = signature;
        }
        // CLFLUSH works on 8 quadwords.
        leaf1.ebx = (id & 0xff) << 24 | addressable.min(0xff) << 16 | 8 << 8;
        const HTT: u32 = 1 << 28;
        leaf1.edx = if per_package > 1 { leaf1.edx | HTT } else { leaf1.edx & !HTT };
        let (eax, edx) = (leaf1.eax, leaf1.edx);

        const CMP_LEGACY: u32 = 1 << 1;
        /// The bits of leaf 1's EDX that AMD repeats.
        const REPEATED: u32 = 0x0183_f3ff;
        let amd = self.vendor == Vendor::Amd;
        let extended = self.entry(0x8000_0001, None);
        extended.ecx &= !CMP_LEGACY;
        if amd {
            extended.eax = eax;
            extended.edx = extended.edx & !REPEATED | edx & REPEATED;
            if per_package > 1 {
                extended.ecx |= CMP_LEGACY;
            }
        }

        if named && !amd {
            // "See leaf 4."
            self.entry(2, None).eax = 0xff01;
        }
        if amd {
            self.out.remove(2);
        }
        if (0x8000_0002..=0x8000_0004).all(|leaf| self.out.get(leaf, 0).is_none_or(is_zero)) {
            let brand = match model.base {
                Base::Host => "Keel Virtual CPU".to_owned(),
                Base::Level(_) => format!("Keel Virtual CPU ({})", model.name()),
            };
            let mut bytes = [0; 48];
            bytes.iter_mut().zip(brand.bytes()).for_each(|(to, from)| *to = from);
            for (leaf, part) in (0x8000_0002..).zip(bytes.chunks_exact(16)) {
                let word = |at: usize| {
                    u32::from_le_bytes([part[at], part[at + 1], part[at + 2], part[at + 3]])
                };
                *self.entry(leaf, None) = CpuidEntry {
                    leaf,
                    subleaf: None,
                    eax: word(0),
                    ebx: word(4),
                    ecx: word(8),
                    edx: word(12),
                };
            }
        }
    }

    /// Who shares what: caches, and the levels of the topology.
    fn sharing(&mut self) {
        let topology = self.topology;
        caches::describe(&mut self.out, topology, self.vendor);

        // Kinds of level: 1 thread, 2 core, 5 die. Each tells the bits to shift an ID by to get the next level's.
        let thread = (1, topology.core_bits(), topology.threads);
        let core = (2, topology.die_bits(), topology.cores * topology.threads);
        let package = (topology.package_bits(), topology.threads_per_package());
        // Leaf 0xb has no dies: its cores are those of the package.
        self.levels(0xb, &[thread, (2, package.0, package.1)]);
        let host_has = self.supported.get(0, 0).is_some_and(|entry| entry.eax >= 0x1f);
        if self.vendor == Vendor::Intel && (topology.dies > 1 || host_has) {
            if topology.dies > 1 {
                self.levels(0x1f, &[thread, core, (5, package.0, package.1)]);
            } else {
                self.levels(0x1f, &[thread, core]);
            }
        }

        if self.vendor == Vendor::Amd && self.words.has_name("topoext") {
            let place = topology.place(self.index);
            let core = place.die * topology.cores + place.core;
            let node = place.socket * topology.dies + place.die;
            *self.entry(0x8000_001e, None) = CpuidEntry {
                leaf: 0x8000_001e,
                subleaf: None,
                eax: topology.apic_id(self.index),
                ebx: core & 0xff | ((topology.threads - 1) & 0xff) << 8,
                ecx: node & 0xff | (topology.dies - 1).min(7) << 8,
                edx: 0,
            };
        } else {
            self.out.remove(0x8000_001d);
            self.out.remove(0x8000_001e);
        }
    }

    /// One of the leaves that tell levels of the topology: per level its kind, the shift to the next and its threads.
    fn levels(&mut self, leaf: u32, levels: &[(u32, u32, u32)]) {
        let edx = self.topology.apic_id(self.index);
        let end = std::iter::once(&(0, 0, 0));
        for (subleaf, (kind, shift, threads)) in (0..).zip(levels.iter().chain(end)) {
            let ecx = subleaf | kind << 8;
            self.out.set(CpuidEntry {
                leaf,
                subleaf: Some(subleaf),
                eax: *shift,
                ebx: *threads,
                ecx,
                edx,
            });
        }
    }

    /// Leaf 0xd: the state components of the features offered, in the places the backend gives them.
    fn extended_state(&mut self) {
        self.out.remove(0xd);
        if !self.words.has_name("xsave") {
            return;
        }
        let offered = |(component, feature): &(u32, &str)| {
            self.words.has_name(feature).then_some(1u64 << component)
        };
        let wide = |low: u32, high: u32| u64::from(high) << 32 | u64::from(low);
        let main = self.supported.get(0xd, 0).copied().unwrap_or_default();
        let second = self.supported.get(0xd, 1).copied().unwrap_or_default();
        let x87_and_sse = 3;
        let user = USER_STATE.iter().filter_map(offered).fold(x87_and_sse, |all, bit| all | bit)
            & (wide(main.eax, main.edx) | x87_and_sse);
        let word =
            self.words.iter().find(|(word, _)| word.leaf == 0xd).map_or(0, |(_, value)| value);
        let supervisor = if self.words.has_name("xsaves") {
            SUPERVISOR_STATE.iter().filter_map(offered).fold(0, |all, bit| all | bit)
                & wide(second.ecx, second.edx)
        } else {
            0
        };

        let mut size = LEGACY_STATE;
        for component in (2..63).filter(|component| (user | supervisor) >> component & 1 != 0) {
            let Some(entry) = self.supported.get(0xd, component) else { continue };
            if user >> component & 1 != 0 {
                // Here EAX is the component's size and EBX its offset.
                size = size.max(entry.ebx.saturating_add(entry.eax));
            }
            self.out.set(*entry);
        }
        let entry = |subleaf, eax, ebx, ecx, edx| CpuidEntry {
            leaf: 0xd,
            subleaf: Some(subleaf),
            eax,
            ebx,
            ecx,
            edx,
        };
        // EBX is the size for what XCR0 enables. A CPU that runs keeps it up to date; this is it after reset.
        self.out.set(entry(0, user as u32, LEGACY_STATE, size, (user >> 32) as u32));
        let compacted = if word & 0b1010 != 0 { LEGACY_STATE } else { 0 };
        self.out.set(entry(1, word, compacted, supervisor as u32, (supervisor >> 32) as u32));
    }

    /// Leaf 0x80000008: widths of addresses, and AMD's count of threads.
    fn address_sizes(&mut self, model: &CpuModel) -> Result<()> {
        let host = self.supported.get(0x8000_0008, 0).map_or(0, |entry| entry.eax);
        let host_bits = match host as u8 {
            0 => 36,
            bits => bits,
        };
        let bits = match (model.physical_bits, model.base) {
            (Some(bits), _) if bits > host_bits => {
                let expected = "a width that the host has, or less";
                return Err(Error::CpuOption { option: format!("phys-bits={bits}"), expected });
            }
            (Some(bits), _) => bits,
            (None, Base::Host) => host_bits,
            (None, Base::Level(_)) => PHYSICAL_BITS.min(host_bits),
        };
        let linear = if self.words.has_name("la57") { 57 } else { 48 };
        // What nested paging adds beyond the guest's width, which only the host knows.
        let nested = if model.base == Base::Host && model.physical_bits.is_none() {
            host & 0x00ff_0000
        } else {
            0
        };
        let threads = self.topology.threads_per_package();
        let ecx = match self.vendor {
            Vendor::Intel => 0,
            Vendor::Amd => (threads - 1).min(0xff) | self.topology.package_bits().min(0xf) << 12,
        };
        let entry = self.entry(0x8000_0008, None);
        entry.eax = u32::from(bits) | linear << 8 | nested;
        entry.ecx = ecx;
        Ok(())
    }

    /// The hypervisor's own leaves, where the backend has any: signature, features, frequencies.
    fn hypervisor(&mut self, tsc_khz: Option<u32>) {
        let Some(signature) = self.supported.get(0x4000_0000, 0).copied() else { return };
        let mut last = 0x4000_0001;
        for (word, value) in self.words.iter().filter(|(word, _)| word.leaf == 0x4000_0001) {
            word.set(&mut self.out, value);
        }
        if let Some(khz) = tsc_khz {
            last = 0x4000_0010;
            *self.entry(last, None) =
                CpuidEntry { leaf: last, eax: khz, ebx: APIC_BUS_KHZ, ..CpuidEntry::default() };
        }
        self.out.set(CpuidEntry { eax: last, ..signature });
    }

    /// Takes answers out that are all zeros anyway, and sets what the last leaves are.
    fn finish(mut self, model: &CpuModel) -> Cpuid {
        self.out.0.retain(|entry| !is_zero(entry));
        let leaves = |extended: bool| {
            let range = if extended { 0x8000_0000..=0x8fff_ffffu32 } else { 0..=0x3fff_ffff };
            self.out
                .0
                .iter()
                .map(|entry| entry.leaf)
                .filter(|leaf| range.contains(leaf))
                .max()
                .unwrap_or(*range.start())
        };
        let (basic, extended) = (leaves(false), leaves(true).max(0x8000_0008));
        let name = match (model.vendor, self.supported.get(0, 0)) {
            (None, Some(host))
                if model.base == Base::Host && (host.ebx, host.edx, host.ecx) != (0, 0, 0) =>
            {
                [host.ebx, host.edx, host.ecx]
            }
            _ => name_of(self.vendor),
        };
        let entry = |leaf, eax, [ebx, edx, ecx]: [u32; 3]| CpuidEntry {
            leaf,
            subleaf: None,
            eax,
            ebx,
            ecx,
            edx,
        };
        self.out.set(entry(0, basic, name));
        // Intel answers nothing but the number here.
        let name = if self.vendor == Vendor::Amd { name } else { [0; 3] };
        self.out.set(entry(0x8000_0000, extended, name));
        self.out.0.sort_by_key(|entry| (entry.leaf, entry.subleaf));
        self.out
    }

    /// The answer of this leaf, added where there was none.
    fn entry(&mut self, leaf: u32, subleaf: Option<u32>) -> &mut CpuidEntry {
        let entries = &mut self.out.0;
        let at = entries.iter().position(|entry| entry.answers(leaf, subleaf.unwrap_or(0)));
        let at = at.unwrap_or_else(|| {
            entries.push(CpuidEntry { leaf, subleaf, ..CpuidEntry::default() });
            entries.len() - 1
        });
        &mut entries[at]
    }
}

fn is_zero(entry: &CpuidEntry) -> bool {
    (entry.eax, entry.ebx, entry.ecx, entry.edx) == (0, 0, 0, 0)
}

/// The signature in leaf 1's EAX: family, model and stepping with their extensions.
const fn signature(family: u32, model: u32, stepping: u32) -> u32 {
    let (base, extended) = if family > 0xf { (0xf, family - 0xf) } else { (family, 0) };
    extended << 20 | (model >> 4) << 16 | base << 8 | (model & 0xf) << 4 | stepping
}

/// A vendor's name in the order EBX, EDX, ECX.
const fn name_of(vendor: Vendor) -> [u32; 3] {
    match vendor {
        Vendor::Intel => [
            u32::from_le_bytes(*b"Genu"),
            u32::from_le_bytes(*b"ineI"),
            u32::from_le_bytes(*b"ntel"),
        ],
        Vendor::Amd => [
            u32::from_le_bytes(*b"Auth"),
            u32::from_le_bytes(*b"enti"),
            u32::from_le_bytes(*b"cAMD"),
        ],
    }
}

/// Whose layout a backend's answers have: Hygon's CPUs are AMD's, everybody else's are taken as Intel's.
fn vendor_of(supported: &Cpuid) -> Vendor {
    let hygon =
        [u32::from_le_bytes(*b"Hygo"), u32::from_le_bytes(*b"nGen"), u32::from_le_bytes(*b"uine")];
    match supported.get(0, 0) {
        Some(entry)
            if [name_of(Vendor::Amd), hygon].contains(&[entry.ebx, entry.edx, entry.ecx]) =>
        {
            Vendor::Amd
        }
        _ => Vendor::Intel,
    }
}
