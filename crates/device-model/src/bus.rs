//! A vCPU's way through the board: the exit-handling path. It takes no lock and allocates nothing.

use std::sync::Arc;
use std::time::Instant;

use keel_hypervisor::{Bus, Width};

use crate::board::{Board, MmioSlot, PioSlot, Table};
use crate::tally::{Access, Direction, Space, Spent, Tally};

/// One vCPU's [`Bus`] onto a [`Board`].
pub struct BoardBus {
    board: Board,
    table: Arc<Table>,
    /// The number of the map's changes that `table` and what is remembered belong to.
    generation: u64,
    /// By [place](place) of an address, the slot that was last found for it: guests poll and ring the same few devices many times over.
    /// Kept here and not in the table, for an exit finds the processor's caches cold: each page of memory that is touched on the way to
    /// the device counts.
    mmio: [Option<MmioSlot>; PLACES],
    /// The same by [place](port_place) of a port.
    pio: [Option<PioSlot>; PLACES],
    tally: Tally,
    /// The last unclaimed access, and how often it came in a row: not yet in the tally.
    unclaimed: Option<(Access, u64)>,
    unclaimed_count: u64,
    /// By device and [kind](kind) of access, if times are kept.
    times: Option<Vec<[Spent; 4]>>,
}

impl BoardBus {
    pub(crate) fn new(board: Board) -> Self {
        let table = board.table();
        BoardBus {
            board,
            generation: table.generation,
            table,
            mmio: [const { None }; PLACES],
            pio: [const { None }; PLACES],
            tally: Tally::default(),
            unclaimed: None,
            unclaimed_count: 0,
            times: None,
        }
    }

    /// Counts and times the accesses of each device from now on.
    pub fn keep_times(&mut self) {
        self.times.get_or_insert_default();
    }

    /// Takes what has been counted since the last call.
    pub fn take_tally(&mut self) -> Tally {
        self.end_unclaimed();
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
        if self.generation != self.board.generation() {
            self.renew();
        }
    }

    #[cold]
    fn renew(&mut self) {
        self.table = self.board.table();
        self.generation = self.table.generation;
        self.mmio.fill(None);
        self.pio.fill(None);
    }

    /// Counts an access that nothing claims. Guests poll what is not there, so the same one over and over must be cheap.
    #[inline]
    fn unclaimed(&mut self, access: Access, address: u64) {
        if self.unclaimed != Some((access, address)) {
            self.end_unclaimed();
            self.unclaimed = Some((access, address));
        }
        self.unclaimed_count += 1;
    }

    #[cold]
    fn end_unclaimed(&mut self) {
        if let Some((access, address)) = self.unclaimed.take() {
            self.tally.unclaimed(access, address, std::mem::take(&mut self.unclaimed_count));
        }
    }

    /// Makes an access, and notes whose it was and how long it took if that is kept.
    fn timed<R>(&mut self, device: u16, access: Access, call: impl FnOnce() -> R) -> R {
        if self.times.is_none() {
            return call();
        }
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

    /// The slot a port belongs to, if it is remembered.
    #[inline]
    fn recent_port(&self, port: u16) -> Option<&PioSlot> {
        self.pio[port_place(port)].as_ref().filter(|slot| slot.covers(port))
    }

    /// The slot a port belongs to; it is remembered.
    fn find_port(&mut self, port: u16) -> Option<&PioSlot> {
        let found = self.table.port(port)?;
        Some(self.pio[port_place(port)].insert(found.clone()))
    }

    /// The slot a memory-mapped access belongs to, if it is remembered.
    #[inline]
    fn recent_mmio(&self, gpa: u64) -> Option<&MmioSlot> {
        self.mmio[place(gpa)].as_ref().filter(|slot| slot.covers(gpa))
    }

    /// The slot a memory-mapped access belongs to; it is remembered.
    fn find_mmio(&mut self, gpa: u64) -> Option<&MmioSlot> {
        let found = self.table.mmio(gpa)?;
        Some(self.mmio[place(gpa)].insert(found.clone()))
    }

    /// An access that does not go straight to a device: one that is timed, that is odd, or whose slot is not remembered.
    #[cold]
    #[inline(never)]
    fn other_pio_read(&mut self, port: u16, width: Width) -> u32 {
        match self.find_port(port).and_then(|slot| Some((slot, slot.offset(port, width)?))) {
            Some((slot, offset)) => {
                let (device, io) = (slot.device, slot.io.clone());
                self.timed(device, ACCESSES[0], || io.read(offset, width)) & width.mask() as u32
            }
            None => self.odd_pio_read(port, width),
        }
    }

    #[cold]
    #[inline(never)]
    fn other_pio_write(&mut self, port: u16, width: Width, value: u32) {
        match self.find_port(port).and_then(|slot| Some((slot, slot.offset(port, width)?))) {
            Some((slot, offset)) => {
                let (device, io) = (slot.device, slot.io.clone());
                self.timed(device, ACCESSES[1], || io.write(offset, width, value));
            }
            None => self.odd_pio_write(port, width, value),
        }
    }

    #[cold]
    #[inline(never)]
    fn other_mmio_read(&mut self, gpa: u64, width: Width) -> u64 {
        match self.find_mmio(gpa).and_then(|slot| Some((slot, slot.offset(gpa, width)?))) {
            Some((slot, offset)) => {
                let (device, io) = (slot.device, slot.io.clone());
                self.timed(device, ACCESSES[2], || io.read(offset, width)) & width.mask()
            }
            None => self.odd_mmio_read(gpa, width),
        }
    }

    #[cold]
    #[inline(never)]
    fn other_mmio_write(&mut self, gpa: u64, width: Width, value: u64) {
        match self.find_mmio(gpa).and_then(|slot| Some((slot, slot.offset(gpa, width)?))) {
            Some((slot, offset)) => {
                let (device, io) = (slot.device, slot.io.clone());
                self.timed(device, ACCESSES[3], || io.write(offset, width, value));
            }
            None => self.odd_mmio_write(gpa, width, value),
        }
    }

    /// An access that no device can take as it is. It is made in two halves, the lower addresses first; what nothing claims at all is
    /// counted, once.
    #[cold]
    fn odd_pio_read(&mut self, port: u16, width: Width) -> u32 {
        let claimed = || {
            (0..width.bytes() as u16).any(|byte| self.table.port(port.wrapping_add(byte)).is_some())
        };
        match width.half().filter(|_| claimed()) {
            None => {
                self.unclaimed((Space::Pio, Direction::Read), port.into());
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
        let claimed = || {
            (0..width.bytes() as u16).any(|byte| self.table.port(port.wrapping_add(byte)).is_some())
        };
        match width.half().filter(|_| claimed()) {
            None => self.unclaimed((Space::Pio, Direction::Write), port.into()),
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
            || (0..width.bytes()).any(|byte| self.table.mmio(gpa.wrapping_add(byte)).is_some());
        match width.half().filter(|_| claimed()) {
            None => {
                self.unclaimed((Space::Mmio, Direction::Read), gpa);
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
            || (0..width.bytes()).any(|byte| self.table.mmio(gpa.wrapping_add(byte)).is_some());
        match width.half().filter(|_| claimed()) {
            None => self.unclaimed((Space::Mmio, Direction::Write), gpa),
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

const PLACES: usize = 32;

/// Where the slot of an address is remembered. Devices are at least a page apart, so neighbours do not collide.
#[inline]
fn place(gpa: u64) -> usize {
    (gpa >> 12) as usize % PLACES
}

/// The same for a port: those of one device, and the usual ones of a PC, are apart.
#[inline]
fn port_place(port: u16) -> usize {
    usize::from(port ^ port >> 5) % PLACES
}

/// The index of a kind of access in [`ACCESSES`].
fn kind((space, direction): Access) -> usize {
    2 * usize::from(space == Space::Mmio) + usize::from(direction == Direction::Write)
}

impl Bus for BoardBus {
    #[inline]
    fn pio_read(&mut self, port: u16, width: Width) -> u32 {
        self.refresh();
        if self.times.is_none()
            && let Some(slot) = self.recent_port(port)
            && let Some(offset) = slot.offset(port, width)
        {
            return slot.io.read(offset, width) & width.mask() as u32;
        }
        self.other_pio_read(port, width)
    }

    #[inline]
    fn pio_write(&mut self, port: u16, width: Width, value: u32) {
        self.refresh();
        if self.times.is_none()
            && let Some(slot) = self.recent_port(port)
            && let Some(offset) = slot.offset(port, width)
        {
            return slot.io.write(offset, width, value);
        }
        self.other_pio_write(port, width, value);
    }

    #[inline]
    fn mmio_read(&mut self, gpa: u64, width: Width) -> u64 {
        self.refresh();
        if self.times.is_none()
            && let Some(slot) = self.recent_mmio(gpa)
            && let Some(offset) = slot.offset(gpa, width)
        {
            return slot.io.read(offset, width) & width.mask();
        }
        self.other_mmio_read(gpa, width)
    }

    #[inline]
    fn mmio_write(&mut self, gpa: u64, width: Width, value: u64) {
        self.refresh();
        if self.times.is_none()
            && let Some(slot) = self.recent_mmio(gpa)
            && let Some(offset) = slot.offset(gpa, width)
        {
            return slot.io.write(offset, width, value);
        }
        self.other_mmio_write(gpa, width, value);
    }

    fn end_of_interrupt(&mut self, vector: u8) {
        self.refresh();
        self.table.end_of_interrupt.iter().for_each(|sink| sink.end_of_interrupt(vector));
    }
}
