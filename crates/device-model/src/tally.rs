//! What one vCPU's accesses were, and how long they took.

use std::collections::BTreeMap;
use std::time::Duration;

/// Ports or memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Space {
    /// Port I/O.
    Pio,
    /// Memory-mapped I/O.
    Mmio,
}

/// To or from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// The guest reads.
    Read,
    /// The guest writes.
    Write,
}

/// A kind of access.
pub type Access = (Space, Direction);

/// How often something happened and how long it took in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spent {
    /// How often.
    pub count: u64,
    /// How long. Zero where times were not taken.
    pub time: Duration,
}

impl std::ops::AddAssign for Spent {
    fn add_assign(&mut self, other: Self) {
        self.count += other.count;
        self.time += other.time;
    }
}

/// What one vCPU's accesses were; tallies of several can be [merged](Tally::merge).
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// By device and kind of access. Empty unless the bus was told to [keep times](crate::BoardBus::keep_times).
    pub devices: BTreeMap<(String, Access), Spent>,
    /// Accesses that nothing claimed, by address: always counted.
    pub unclaimed: BTreeMap<(Access, u64), u64>,
    /// Unclaimed accesses at still other addresses: only [`Tally::MOST_ADDRESSES`] are told apart, for a hostile guest can make up any number.
    pub unclaimed_elsewhere: u64,
}

impl Tally {
    /// How many addresses of unclaimed accesses are told apart.
    pub const MOST_ADDRESSES: usize = 64;

    /// Counts an unclaimed access.
    pub(crate) fn unclaimed(&mut self, access: Access, address: u64, count: u64) {
        if let Some(counted) = self.unclaimed.get_mut(&(access, address)) {
            *counted += count;
        } else if self.unclaimed.len() < Self::MOST_ADDRESSES {
            self.unclaimed.insert((access, address), count);
        } else {
            self.unclaimed_elsewhere += count;
        }
    }

    /// Adds another vCPU's.
    pub fn merge(&mut self, other: Tally) {
        for (key, spent) in other.devices {
            *self.devices.entry(key).or_default() += spent;
        }
        for ((access, address), count) in other.unclaimed {
            self.unclaimed(access, address, count);
        }
        self.unclaimed_elsewhere += other.unclaimed_elsewhere;
    }
}
