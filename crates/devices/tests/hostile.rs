//! Millions of random accesses to a PC with all devices of this crate, as a hostile guest makes them: no panic, no growth.
//!
//! A million here; `KEEL_LONG=1` makes it the ten million of the crate's promise.
#![allow(unsafe_code, reason = "a global allocator that counts")]
#![allow(clippy::unwrap_used, reason = "helpers of tests fail as tests do")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::Instant;

use keel_device_model::testing::ManualClock;
use keel_device_model::{
    Board, Clock, Device, Line, LineSink, Machine, Request, Roster, Seat, SharedPio, Surroundings,
    Tally,
};
use keel_devices::{
    MsiSink, Shifted, acpi_pm, debug_console, debug_exit, i8042, ioapic, msi_test, port61, pvpanic,
    reset_register, rtc, serial,
};
use keel_hypervisor::{Bus, Msi, Width};

/// Bytes that are allocated.
static HELD: AtomicI64 = AtomicI64::new(0);

struct Counting;

// SAFETY: every call is handed on as it is to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HELD.fetch_add(layout.size() as i64, Ordering::Relaxed);
        // SAFETY: the caller keeps the promises of `alloc`.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size() as i64, Ordering::Relaxed);
        // SAFETY: the caller keeps the promises of `dealloc`, and `at` came from the system's allocator.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// xorshift64*: enough chance for this, the same each time, and next to no time of its own.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }
    fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}

/// Counts what comes out of the machine, and keeps none of it.
#[derive(Default)]
struct Outside {
    requests: AtomicU64,
    messages: AtomicU64,
    characters: AtomicU64,
    edges: AtomicU64,
    routes: AtomicU64,
    /// A writer that fails now and then.
    full: AtomicBool,
}

impl Machine for Outside {
    fn request(&self, _request: Request) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }
}

struct To(Arc<Outside>);

impl MsiSink for To {
    fn send(&self, _msi: Msi) {
        self.0.messages.fetch_add(1, Ordering::Relaxed);
    }
}

impl LineSink for To {
    fn set(&self, _high: bool) {
        self.0.edges.fetch_add(1, Ordering::Relaxed);
    }
}

impl Write for To {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.full.load(Ordering::Relaxed) {
            return Err(std::io::ErrorKind::WouldBlock.into());
        }
        self.0.characters.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A PC as `boot` builds it, with every device it can have, the I/O APIC in user space.
struct Pc {
    board: Board,
    roster: Roster,
    surroundings: Surroundings,
    clock: Arc<ManualClock>,
    outside: Arc<Outside>,
    serials: Vec<Arc<Seat<serial::Serial>>>,
    pm: Arc<Seat<acpi_pm::AcpiPm>>,
    rtc: Arc<Seat<rtc::Rtc>>,
    ioapic: Arc<Seat<ioapic::IoApic>>,
    /// What is mapped, for a guest that aims.
    ports: Vec<(u16, u16)>,
}

impl Pc {
    fn new() -> Self {
        let clock = Arc::new(ManualClock::default());
        let outside = Arc::new(Outside::default());
        let surroundings = Surroundings { clock: clock.clone(), machine: outside.clone() };

        let told = outside.clone();
        let on_routes = Box::new(move |routes: Vec<_>| {
            assert!(routes.len() <= usize::from(ioapic::PINS));
            told.routes.fetch_add(1, Ordering::Relaxed);
        });
        let io_apic = ioapic::IoApic::new(Arc::new(To(outside.clone())), on_routes);
        let io_apic = Seat::new(io_apic, Line::unconnected(), &surroundings);
        let line = |gsi: u32| Line::new(ioapic::Pin::new(&io_apic, gsi as u8));
        let timer = Seat::new(rtc::Rtc::new(rtc_config()), line(rtc::IRQ), &surroundings);
        let pm = Seat::new(acpi_pm::AcpiPm::new(), line(acpi_pm::IRQ), &surroundings);
        let [com1, com3] = line(serial::COM1.irq).share();
        let [com2, com4] = line(serial::COM2.irq).share();
        let serials = [com1, com2, com3, com4].map(|line| {
            Seat::new(serial::Serial::new(Box::new(To(outside.clone()))), line, &surroundings)
        });

        let mut pc = Pc {
            board: Board::new(),
            roster: Roster::new(),
            surroundings,
            clock,
            outside,
            serials: serials.into(),
            pm: pm.clone(),
            rtc: timer.clone(),
            ioapic: io_apic.clone(),
            ports: Vec::new(),
        };
        pc.roster.add("ioapic", io_apic.clone());
        let registers = ioapic::BASE..=ioapic::BASE + (ioapic::SIZE - 1);
        pc.board.map_mmio("ioapic", registers, ioapic::WIDEST, io_apic.clone()).unwrap();
        pc.board.listen_end_of_interrupt(Arc::new(ioapic::Eoi(io_apic)));
        for (com, seat) in serial::COM_PORTS.iter().zip(pc.serials.clone()) {
            pc.roster.add("serial", seat.clone());
            pc.map(com.port, serial::PORTS, serial::WIDEST, seat);
        }
        pc.roster.add("rtc", timer.clone());
        pc.map(*rtc::PORTS.start(), 2, rtc::WIDEST, timer);
        pc.roster.add("acpi-pm", pm.clone());
        pc.map(acpi_pm::PORT, acpi_pm::PORTS, acpi_pm::WIDEST, pm);

        let outside = pc.outside.clone();
        let to = || Box::new(To(outside.clone()));
        let nowhere = Line::unconnected;
        let keyboard = pc.plug("i8042", i8042::I8042::new(), Line::new(To(outside.clone())));
        pc.map(i8042::DATA_PORT, 1, i8042::WIDEST, keyboard.clone());
        let command = Shifted::new(keyboard, i8042::COMMAND_PORT - i8042::DATA_PORT);
        pc.map(i8042::COMMAND_PORT, 1, i8042::WIDEST, command);
        let seat = pc.plug("port61", port61::Port61::new(), nowhere());
        pc.map(port61::PORT, 1, port61::WIDEST, seat);
        let seat = pc.plug("reset", reset_register::ResetRegister::new(), nowhere());
        pc.map(reset_register::PORT, 1, reset_register::WIDEST, seat);
        let seat = pc.plug("pvpanic", pvpanic::Pvpanic, nowhere());
        pc.map(pvpanic::PORT, 1, pvpanic::WIDEST, seat);
        let seat = pc.plug("exit", debug_exit::DebugExit, nowhere());
        pc.map(debug_exit::PORT, debug_exit::PORTS, debug_exit::WIDEST, seat);
        let seat = pc.plug("msi", msi_test::MsiTest::new(Arc::new(To(outside.clone()))), nowhere());
        pc.map(msi_test::PORT, msi_test::PORTS, msi_test::WIDEST, seat);
        for port in [debug_console::PORT, debug_console::FIRMWARE_PORT] {
            let seat = pc.plug("console", debug_console::DebugConsole::new(to()), nowhere());
            pc.map(port, 1, debug_console::WIDEST, seat);
        }
        pc
    }

    fn plug<D: Device + 'static>(&mut self, name: &str, device: D, line: Line) -> Arc<Seat<D>> {
        let seat = Seat::new(device, line, &self.surroundings);
        self.roster.add(name, seat.clone());
        seat
    }

    fn map(&mut self, first: u16, count: u16, widest: Width, io: Arc<dyn SharedPio>) {
        self.board.map_pio("device", first..=first + (count - 1), widest, io).unwrap();
        self.ports.push((first, count));
    }

    /// Lets time pass and calls the devices whose time has come.
    fn advance(&self, ns: u64) {
        self.clock.advance(ns);
        self.rtc.expire();
        self.pm.expire();
        let now = self.clock.now();
        for deadline in
            [self.rtc.with(|rtc, _| rtc.deadline()), self.pm.with(|pm, _| pm.deadline())]
        {
            assert!(deadline.is_none_or(|deadline| deadline > now), "would ring for ever");
        }
    }

    /// Something happens on the host's side.
    fn host(&self, random: &mut Random) {
        match random.below(8) {
            0..=2 => {
                let input: [u8; 40] = std::array::from_fn(|n| n as u8);
                let input = &input[..random.below(41) as usize];
                let seat = random.one(&[0, 1, 2, 3]);
                let taken = self.serials[seat].with(|serial, lent| serial.receive(input, lent));
                assert!(taken <= input.len());
            }
            3 => self.serials[0].with(|serial, lent| serial.receive_break(lent)),
            4 => self.pm.with(|pm, lent| pm.press_power_button(lent)),
            5 => {
                let (pin, high) = (random.below(24) as u8, random.below(2) == 0);
                self.ioapic.with(|ioapic, _| ioapic.set_pin(pin, high));
            }
            6 => self.outside.full.store(random.below(4) == 0, Ordering::Relaxed),
            _ => {
                // Up to some seconds, and now and then some weeks.
                let bits = if random.below(64) == 0 { 52 } else { random.below(33) };
                self.advance(random.next() & ((1 << bits) - 1));
            }
        }
    }
}

fn rtc_config() -> rtc::Config {
    rtc::Config { offset_s: 0, ram_below_4g: 1 << 30, ram_above_4g: 0 }
}

/// One access of the guest's: mostly aimed at a device or just beside it, sometimes at nothing.
fn access(bus: &mut impl Bus, ports: &[(u16, u16)], random: &mut Random) {
    let value = match random.below(4) {
        0 => random.next(),
        1 => random.below(256),
        2 => 1 << random.below(64),
        _ => 0,
    };
    match random.below(16) {
        0..=10 => {
            let port = if random.below(8) == 0 {
                random.next() as u16
            } else {
                let (first, count) = random.one(ports);
                first.wrapping_sub(2).wrapping_add(random.below(u64::from(count) + 4) as u16)
            };
            let width = random.one(&[Width::Byte, Width::Byte, Width::Word, Width::Dword]);
            if random.below(2) == 0 {
                let value = bus.pio_read(port, width);
                assert_eq!(u64::from(value) & !width.mask(), 0);
            } else {
                bus.pio_write(port, width, (value & width.mask()) as u32);
            }
        }
        11 => bus.end_of_interrupt(value as u8),
        _ => {
            let gpa = match random.below(8) {
                0 => random.next(),
                1 => (ioapic::BASE - 8) + random.below(ioapic::SIZE + 16),
                _ => ioapic::BASE + 0x10 * random.below(2),
            };
            let width =
                random.one(&[Width::Byte, Width::Dword, Width::Dword, Width::Qword, Width::Word]);
            if random.below(3) == 0 {
                let value = bus.mmio_read(gpa, width);
                assert_eq!(value & !width.mask(), 0);
            } else {
                bus.mmio_write(gpa, width, value & width.mask());
            }
        }
    }
}

#[test]
fn a_hostile_guest_neither_breaks_the_machine_nor_makes_it_grow() {
    let long = std::env::var_os("KEEL_LONG").is_some();
    let count: u64 = if long { 10_000_000 } else { 1_000_000 };
    let pc = Pc::new();
    let mut bus = pc.board.bus();
    let mut random = Random(0x6b65_656c_0000_0001);
    let begin = Instant::now();
    let (mut held, mut most) = (0, 0);
    for n in 1..=count {
        access(&mut bus, &pc.ports, &mut random);
        if random.below(32) == 0 {
            pc.host(&mut random);
        }
        if random.below(10_000) == 0 {
            pc.roster.reset();
        }
        if n.is_multiple_of(1000) {
            let now = HELD.load(Ordering::Relaxed);
            // The tally and the ports' buffers fill up in the beginning.
            if n == count / 10 {
                held = now;
            }
            if held != 0 {
                most = most.max(now - held);
            }
        }
        if n.is_multiple_of(count / 20) {
            // Whatever it did to the devices can be saved, and restored.
            let saved = pc.roster.save().unwrap();
            assert!(serde_json::to_vec(&saved).unwrap().len() < 32 * 1024);
            pc.roster.restore(&saved).unwrap();
            assert_eq!(pc.roster.save().unwrap(), saved);
        }
    }
    let took = begin.elapsed();
    let tally = bus.take_tally();
    assert_eq!(tally.unclaimed.len(), Tally::MOST_ADDRESSES);

    println!("accesses {count} accesses");
    println!("access {} ns", took.as_nanos() / u128::from(count));
    println!("growth {most} bytes");
    let Outside { requests, messages, characters, edges, routes, .. } = &*pc.outside;
    for (name, counter) in [
        ("requests", requests),
        ("messages", messages),
        ("characters", characters),
        ("edges", edges),
        ("routes", routes),
    ] {
        let counted = counter.load(Ordering::Relaxed);
        println!("{name} {counted} {name}");
        assert!(counted > 0, "the accesses reach no device's {name}: they test nothing");
    }
    assert!(most < 64 * 1024, "{most} bytes more than in the beginning");
}
