//! What is mapped where, and the table that vCPUs dispatch by.

use std::ops::{RangeInclusive, Sub};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use keel_hypervisor::Width;

use crate::bus::BoardBus;
use crate::{EndOfInterrupt, SharedMmio, SharedPio};

/// Where devices are mapped, for all vCPUs of a machine.
///
/// Cheap to clone: clones are the same board. The map may change at any time from any thread, a vCPU in the middle of an access
/// included; every access after the change goes by the new map.
#[derive(Clone, Default)]
pub struct Board(Arc<Shared>);

#[derive(Default)]
struct Shared {
    /// Counts the changes of the map. A vCPU's bus compares it with that of its table: the one load dispatch costs.
    generation: AtomicU64,
    map: Mutex<Map>,
}

#[derive(Default)]
struct Map {
    /// Both sorted by first address, and without overlaps.
    pio: Vec<PioSlot>,
    mmio: Vec<MmioSlot>,
    end_of_interrupt: Vec<Arc<dyn EndOfInterrupt>>,
    names: Vec<Arc<str>>,
    /// The table made from all this, if nothing has changed since.
    table: Option<Arc<Table>>,
}

/// Why something can not be mapped or unmapped.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// Two devices would answer.
    #[error("{name} can not be mapped at {first:#x} to {last:#x}: {other} is there")]
    Overlap {
        /// The device to be mapped.
        name: String,
        /// Its first port or guest physical address.
        first: u64,
        /// Its last.
        last: u64,
        /// The one mapped already.
        other: String,
    },
    /// A range that ends before it begins.
    #[error("{name} can not be mapped at an empty range")]
    Empty {
        /// The device.
        name: String,
    },
    /// The table of ports has no number left for another range.
    #[error("{name} can not be mapped: there are 65535 ranges of ports, the most a board has")]
    Full {
        /// The device.
        name: String,
    },
    /// Nothing is mapped there.
    #[error("nothing is mapped from {0:#x} on")]
    Nothing(u64),
}

/// One mapped range.
pub(crate) struct Slot<A, Io: ?Sized> {
    pub first: A,
    pub last: A,
    pub widest: Width,
    /// The index of its name.
    pub device: u16,
    pub io: Arc<Io>,
}

pub(crate) type PioSlot = Slot<u16, dyn SharedPio>;
pub(crate) type MmioSlot = Slot<u64, dyn SharedMmio>;

impl<A: Copy, Io: ?Sized> Clone for Slot<A, Io> {
    fn clone(&self) -> Self {
        Slot { io: self.io.clone(), ..*self }
    }
}

impl<A: Copy + Ord + Into<u64> + Sub<Output = A>, Io: ?Sized> Slot<A, Io> {
    /// Whether an address is the device's.
    #[inline]
    pub fn covers(&self, at: A) -> bool {
        self.first <= at && at <= self.last
    }

    /// The offset of an access that the device can take as it is: no wider than it wants, and not over its end. Only for an address
    /// that is the device's.
    #[inline]
    pub fn offset(&self, at: A, width: Width) -> Option<A> {
        let after: u64 = (self.last - at).into();
        (width <= self.widest && width.bytes() - 1 <= after).then(|| at - self.first)
    }
}

/// The map as vCPUs use it: never changed, only replaced.
pub(crate) struct Table {
    pub generation: u64,
    /// For each port the index of its slot plus one, or zero. Allocated zeroed, so that the host backs only what is in use.
    ports: Box<[u16; 1 << 16]>,
    pio: Vec<PioSlot>,
    mmio: Vec<MmioSlot>,
    pub end_of_interrupt: Vec<Arc<dyn EndOfInterrupt>>,
    pub names: Vec<Arc<str>>,
}

impl Table {
    /// The slot a port belongs to.
    pub fn port(&self, port: u16) -> Option<&PioSlot> {
        // Zero wraps to an index no slot has, so that one check serves for both.
        self.pio.get(usize::from(self.ports[usize::from(port)]).wrapping_sub(1))
    }

    /// The slot an address belongs to.
    pub fn mmio(&self, gpa: u64) -> Option<&MmioSlot> {
        let index = self.mmio.partition_point(|slot| slot.first <= gpa).checked_sub(1)?;
        self.mmio.get(index).filter(|slot| slot.covers(gpa))
    }
}

impl Board {
    /// A board with nothing on it.
    pub fn new() -> Self {
        Board::default()
    }

    /// Maps a range of ports. Accesses wider than `widest` reach the device as several.
    pub fn map_pio(
        &self,
        name: &str,
        ports: RangeInclusive<u16>,
        widest: Width,
        io: Arc<dyn SharedPio>,
    ) -> Result<(), MapError> {
        self.change(|map| {
            if map.pio.len() == usize::from(u16::MAX) {
                return Err(MapError::Full { name: name.to_owned() });
            }
            let device = map.name(name);
            insert(
                &mut map.pio,
                &map.names,
                Slot { first: *ports.start(), last: *ports.end(), widest, device, io },
            )
        })
    }

    /// Maps a range of guest physical addresses. Accesses wider than `widest` reach the device as several.
    pub fn map_mmio(
        &self,
        name: &str,
        gpas: RangeInclusive<u64>,
        widest: Width,
        io: Arc<dyn SharedMmio>,
    ) -> Result<(), MapError> {
        self.change(|map| {
            let device = map.name(name);
            insert(
                &mut map.mmio,
                &map.names,
                Slot { first: *gpas.start(), last: *gpas.end(), widest, device, io },
            )
        })
    }

    /// Unmaps the range of ports that begins at `first`.
    pub fn unmap_pio(&self, first: u16) -> Result<(), MapError> {
        self.change(|map| remove(&mut map.pio, first))
    }

    /// Unmaps the range of guest physical addresses that begins at `first`.
    pub fn unmap_mmio(&self, first: u64) -> Result<(), MapError> {
        self.change(|map| remove(&mut map.mmio, first))
    }

    /// From now on `sink` hears of the end of interrupts.
    pub fn listen_end_of_interrupt(&self, sink: Arc<dyn EndOfInterrupt>) {
        let listening: Result<(), std::convert::Infallible> = self.change(|map| {
            map.end_of_interrupt.push(sink);
            Ok(())
        });
        let Ok(()) = listening;
    }

    /// A way through the board for one vCPU.
    pub fn bus(&self) -> BoardBus {
        BoardBus::new(self.clone())
    }

    /// The number of changes so far.
    #[inline]
    pub(crate) fn generation(&self) -> u64 {
        self.0.generation.load(Ordering::Acquire)
    }

    /// The present table.
    pub(crate) fn table(&self) -> Arc<Table> {
        let mut map = self.lock();
        // Changes are made under the lock, so this is the generation of just this map.
        let generation = self.generation();
        if let Some(table) = &map.table {
            return table.clone();
        }
        let mut ports: Box<[u16; 1 << 16]> = vec![0; 1 << 16]
            .into_boxed_slice()
            .try_into()
            .unwrap_or_else(|_| unreachable!("65536 ports"));
        for (number, slot) in (1..=u16::MAX).zip(&map.pio) {
            ports[usize::from(slot.first)..=usize::from(slot.last)].fill(number);
        }
        let table = Arc::new(Table {
            generation,
            ports,
            pio: map.pio.clone(),
            mmio: map.mmio.clone(),
            end_of_interrupt: map.end_of_interrupt.clone(),
            names: map.names.clone(),
        });
        map.table = Some(table.clone());
        table
    }

    fn change<E>(&self, change: impl FnOnce(&mut Map) -> Result<(), E>) -> Result<(), E> {
        let mut map = self.lock();
        change(&mut map)?;
        map.table = None;
        self.0.generation.fetch_add(1, Ordering::Release);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Map> {
        self.0.map.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Map {
    /// The index of a name. There can be no more ranges than ports plus a few, so 16 bits do; past that names merge.
    fn name(&mut self, name: &str) -> u16 {
        let index = self.names.iter().position(|known| **known == *name).unwrap_or_else(|| {
            self.names.push(name.into());
            self.names.len() - 1
        });
        u16::try_from(index).unwrap_or(u16::MAX)
    }
}

fn insert<A: Copy + Ord + Into<u64>, Io: ?Sized>(
    slots: &mut Vec<Slot<A, Io>>,
    names: &[Arc<str>],
    new: Slot<A, Io>,
) -> Result<(), MapError> {
    let name =
        |device: u16| names.get(usize::from(device)).map_or(String::new(), |name| name.to_string());
    if new.first > new.last {
        return Err(MapError::Empty { name: name(new.device) });
    }
    let index = slots.partition_point(|slot| slot.last < new.first);
    if let Some(other) = slots.get(index).filter(|other| other.first <= new.last) {
        return Err(MapError::Overlap {
            name: name(new.device),
            first: new.first.into(),
            last: new.last.into(),
            other: name(other.device),
        });
    }
    slots.insert(index, new);
    Ok(())
}

fn remove<A: Copy + Ord + Into<u64>, Io: ?Sized>(
    slots: &mut Vec<Slot<A, Io>>,
    first: A,
) -> Result<(), MapError> {
    let index =
        slots.iter().position(|slot| slot.first == first).ok_or(MapError::Nothing(first.into()))?;
    slots.remove(index);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use keel_hypervisor::Bus;
    use std::sync::mpsc;
    use std::time::Duration;

    struct Nothing;

    impl SharedPio for Nothing {
        fn read(&self, _offset: u16, _width: Width) -> u32 {
            1
        }
        fn write(&self, _offset: u16, _width: Width, _value: u32) {}
    }

    impl SharedMmio for Nothing {
        fn read(&self, _offset: u64, _width: Width) -> u64 {
            1
        }
        fn write(&self, _offset: u64, _width: Width, _value: u64) {}
    }

    #[test]
    fn accesses_take_no_lock() {
        let board = Board::new();
        board.map_pio("pio", 0x10..=0x13, Width::Dword, Arc::new(Nothing)).unwrap();
        board.map_mmio("mmio", 0x10..=0x13, Width::Dword, Arc::new(Nothing)).unwrap();
        let mut bus = board.bus();
        // Whoever wanted the lock now would wait for ever.
        let guard = board.lock();
        let (done, is_done) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            bus.pio_write(0x10, Width::Dword, 0);
            bus.mmio_write(0x10, Width::Word, 0);
            bus.end_of_interrupt(7);
            let values = [
                bus.pio_read(0x10, Width::Byte).into(),
                bus.mmio_read(0x10, Width::Dword),
                bus.pio_read(0x13, Width::Dword).into(), // over the end
                bus.mmio_read(0x1000, Width::Qword),     // nobody's
            ];
            done.send(values).unwrap();
        });
        let values = is_done.recv_timeout(Duration::from_secs(10));
        drop(guard);
        thread.join().unwrap();
        assert_eq!(values, Ok([1, 1, 0xffff_ff01, u64::MAX]));
    }
}
