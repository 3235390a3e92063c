//! A vCPU's way through the board: the exit-handling path. It takes no lock and allocates nothing.

use std::sync::Arc;
use std::time::Instant;

use keel_hypervisor::{Bus, Width};

use crate::board::{Board, Table};
use crate::tally::{Access, Direction, Space, Spent, Tally};

/// One vCPU's [`Bus`] onto a [`Board`].
pub struct BoardBus {
    board: Board,
    table: Arc<Table>,
    /// The slot of the last memory-mapped access: guests poll and ring one device many times in a row.
    recent: usize,
    tally: Tally,
    /// By device and [kind](kind) of access, if times are kept.
    times: Option<Vec<[Spent; 4]>>,
}

impl BoardBus {
    pub(crate) fn new(board: Board) -> Self {
        let table = board.table();
        BoardBus { board, table, recent: 0, tally: Tally::default(), times: None }
    }

    /// Counts and times the accesses of each device from now on.
    pub fn keep_times(&mut self) {
        self.times.get_or_insert_default();
    }

    /// Takes what has been counted since the last call.
    pub fn take_tally(&mut self) -> Tally {
        let mut tally = std::mem::take(&mut self.tally);
        for (name, kinds) in self.table.names.iter().zip(self.times.iter_mut().flatten()) {
            for access in ACCESSES {
                let spent = std::mem::take(&mut kinds[kind(access)]);
                if spent.count > 0 {
                    tally.devices.insert((name.to_string(), access), spent);
                }
            }
        }
        tally
    }

    /// Sees to it that the table is the present one.
    #[inline]
    fn refresh(&mut self) {
        if self.table.generation != self.board.generation() {
            self.renew();
        }
    }

    #[cold]
    fn renew(&mut self) {
        self.table = self.board.table();
    }

    /// Makes an access and notes whose it was and how long it took.
    #[cold]
    fn timed<R>(&mut self, device: u16, access: Access, call: impl FnOnce() -> R) -> R {
        let begin = Instant::now();
        let result = call();
        let time = begin.elapsed();
        if let Some(times) = &mut self.times {
            let device = usize::from(device);
            if times.len() <= device {
                times.resize(device + 1, [Spent::default(); 4]);
            }
            times[device][kind(access)] += Spent { count: 1, time };
        }
        result
    }

    /// The index of the slot a memory-mapped access belongs to.
    #[inline]
    fn mmio_slot(&mut self, gpa: u64) -> Option<usize> {
        match self.table.mmio.get(self.recent) {
            Some(slot) if (slot.first..=slot.last).contains(&gpa) => Some(self.recent),
            _ => {
                self.recent = self.table.find_mmio(gpa)?;
                Some(self.recent)
            }
        }
    }

    /// An access that no device can take as it is. It is made in two halves, the lower addresses first; what nothing claims at all is
    /// counted, once.
    #[cold]
    fn odd_pio_read(&mut self, port: u16, width: Width) -> u32 {
        let claimed = (0..width.bytes() as u16)
            .any(|byte| self.table.port(port.wrapping_add(byte)).is_some());
        match width.half().filter(|_| claimed) {
            None => {
                self.tally.unclaimed((Space::Pio, Direction::Read), port.into(), 1);
                width.mask() as u32
            }
            Some(half) => {
                let low = self.pio_read(port, half);
                let high = self.pio_read(port.wrapping_add(half.bytes() as u16), half);
                low | high << (8 * half.bytes())
            }
        }
    }

    #[cold]
    fn odd_pio_write(&mut self, port: u16, width: Width, value: u32) {
        let claimed = (0..width.bytes() as u16)
            .any(|byte| self.table.port(port.wrapping_add(byte)).is_some());
        match width.half().filter(|_| claimed) {
            None => self.tally.unclaimed((Space::Pio, Direction::Write), port.into(), 1),
            Some(half) => {
                self.pio_write(port, half, value & half.mask() as u32);
                let high = value >> (8 * half.bytes()) & half.mask() as u32;
                self.pio_write(port.wrapping_add(half.bytes() as u16), half, high);
            }
        }
    }

    #[cold]
    fn odd_mmio_read(&mut self, gpa: u64, width: Width) -> u64 {
        let claimed =
            (0..width.bytes()).any(|byte| self.table.find_mmio(gpa.wrapping_add(byte)).is_some());
        match width.half().filter(|_| claimed) {
            None => {
                self.tally.unclaimed((Space::Mmio, Direction::Read), gpa, 1);
                width.mask()
            }
            Some(half) => {
                let low = self.mmio_read(gpa, half);
                let high = self.mmio_read(gpa.wrapping_add(half.bytes()), half);
                low | high << (8 * half.bytes())
            }
        }
    }

    #[cold]
    fn odd_mmio_write(&mut self, gpa: u64, width: Width, value: u64) {
        let claimed =
            (0..width.bytes()).any(|byte| self.table.find_mmio(gpa.wrapping_add(byte)).is_some());
        match width.half().filter(|_| claimed) {
            None => self.tally.unclaimed((Space::Mmio, Direction::Write), gpa, 1),
            Some(half) => {
                self.mmio_write(gpa, half, value & half.mask());
                let high = value >> (8 * half.bytes()) & half.mask();
                self.mmio_write(gpa.wrapping_add(half.bytes()), half, high);
            }
        }
    }
}

const ACCESSES: [Access; 4] = [
    (Space::Pio, Direction::Read),
    (Space::Pio, Direction::Write),
    (Space::Mmio, Direction::Read),
    (Space::Mmio, Direction::Write),
];

/// The index of a kind of access in [`ACCESSES`].
fn kind((space, direction): Access) -> usize {
    2 * usize::from(space == Space::Mmio) + usize::from(direction == Direction::Write)
}

impl Bus for BoardBus {
    #[inline]
    fn pio_read(&mut self, port: u16, width: Width) -> u32 {
        self.refresh();
        let slot = self.table.port(port);
        let Some((slot, offset)) =
            slot.and_then(|slot| Some((slot, slot.offset(port.into(), width)?)))
        else {
            return self.odd_pio_read(port, width);
        };
        let value = if self.times.is_none() {
            slot.io.read(offset as u16, width)
        } else {
            let (device, io) = (slot.device, slot.io.clone());
            self.timed(device, ACCESSES[0], || io.read(offset as u16, width))
        };
        value & width.mask() as u32
    }

    #[inline]
    fn pio_write(&mut self, port: u16, width: Width, value: u32) {
        self.refresh();
        let slot = self.table.port(port);
        let Some((slot, offset)) =
            slot.and_then(|slot| Some((slot, slot.offset(port.into(), width)?)))
        else {
            return self.odd_pio_write(port, width, value);
        };
        if self.times.is_none() {
            slot.io.write(offset as u16, width, value);
        } else {
            let (device, io) = (slot.device, slot.io.clone());
            self.timed(device, ACCESSES[1], || io.write(offset as u16, width, value));
        }
    }

    #[inline]
    fn mmio_read(&mut self, gpa: u64, width: Width) -> u64 {
        self.refresh();
        let slot = self.mmio_slot(gpa).map(|index| &self.table.mmio[index]);
        let Some((slot, offset)) = slot.and_then(|slot| Some((slot, slot.offset(gpa, width)?)))
        else {
            return self.odd_mmio_read(gpa, width);
        };
        let value = if self.times.is_none() {
            slot.io.read(offset, width)
        } else {
            let (device, io) = (slot.device, slot.io.clone());
            self.timed(device, ACCESSES[2], || io.read(offset, width))
        };
        value & width.mask()
    }

    #[inline]
    fn mmio_write(&mut self, gpa: u64, width: Width, value: u64) {
        self.refresh();
        let slot = self.mmio_slot(gpa).map(|index| &self.table.mmio[index]);
        let Some((slot, offset)) = slot.and_then(|slot| Some((slot, slot.offset(gpa, width)?)))
        else {
            return self.odd_mmio_write(gpa, width, value);
        };
        if self.times.is_none() {
            slot.io.write(offset, width, value);
        } else {
            let (device, io) = (slot.device, slot.io.clone());
            self.timed(device, ACCESSES[3], || io.write(offset, width, value));
        }
    }

    fn end_of_interrupt(&mut self, vector: u8) {
        self.refresh();
        self.table.end_of_interrupt.iter().for_each(|sink| sink.end_of_interrupt(vector));
    }
}
