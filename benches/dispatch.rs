//! What it costs from a vCPU's access to the device's first line: time, instructions, allocations; and whether two vCPUs on two
//! devices slow each other down. Beside `vm-device`'s `IoManager` and a bus of `Mutex<BTreeMap<_, Arc<Mutex<_>>>>`, in the same run.
//!
//! `direct` is a bus that is nothing but one device, called the same way: what it takes is loop, call and device, and is taken off where
//! the way from the vCPU's call to the device's first line is meant.
//!
//! `cargo bench --bench dispatch`. Prints `name value unit` lines. Ends with an error if a target that noise can not excuse is missed:
//! instructions (counted by `valgrind --tool=callgrind`) and allocations.

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::BTreeMap;
use std::hint::black_box;
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant};

use keel_device_model::testing::Requests;
use keel_device_model::{
    Board, BoardBus, Device, HostClock, Lent, Line, MmioIo, PortIo, Seat, SharedMmio, SharedPio,
    StateError, Surroundings,
};
use keel_hypervisor::{Bus, Width};
use nix::time::{ClockId, clock_gettime};
use vm_device::bus::{MmioAddress, MmioAddressOffset, PioAddress, PioAddressOffset};
use vm_device::device_manager::{IoManager, MmioManager, PioManager};
use vm_device::resources::Resource;
use vm_device::{DeviceMmio, DevicePio};

/// Devices on every bus, as many as a small PC has; accesses go round them.
const DEVICES: u16 = 16;
const PORT: u16 = 0x400;
const PORTS: u16 = 8;
const GPA: u64 = 0xd000_0000;
const LEN: u64 = 0x1000;

/// Counts the allocations of the process.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

#[allow(unsafe_code, reason = "an allocator that counts can be had no other way")]
// SAFETY: all is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The same device for all buses that need no lock: it keeps the last value. Alone on its cache line.
#[derive(Default)]
#[repr(align(128))]
struct Latch(AtomicU64);

impl SharedPio for Latch {
    fn read(&self, _offset: u16, _width: Width) -> u32 {
        self.0.load(Ordering::Relaxed) as u32
    }
    fn write(&self, _offset: u16, _width: Width, value: u32) {
        self.0.store(value.into(), Ordering::Relaxed);
    }
}

impl SharedMmio for Latch {
    fn read(&self, _offset: u64, _width: Width) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
    fn write(&self, _offset: u64, _width: Width, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }
}

fn first_u32(data: &[u8]) -> u64 {
    data.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes)).into()
}

impl DevicePio for Latch {
    fn pio_read(&self, _base: PioAddress, _offset: PioAddressOffset, data: &mut [u8]) {
        data.copy_from_slice(&self.0.load(Ordering::Relaxed).to_le_bytes()[..data.len()]);
    }
    fn pio_write(&self, _base: PioAddress, _offset: PioAddressOffset, data: &[u8]) {
        self.0.store(first_u32(data), Ordering::Relaxed);
    }
}

impl DeviceMmio for Latch {
    fn mmio_read(&self, _base: MmioAddress, _offset: MmioAddressOffset, data: &mut [u8]) {
        data.copy_from_slice(&self.0.load(Ordering::Relaxed).to_le_bytes()[..data.len()]);
    }
    fn mmio_write(&self, _base: MmioAddress, _offset: MmioAddressOffset, data: &[u8]) {
        self.0.store(first_u32(data), Ordering::Relaxed);
    }
}

/// The same as a plain device, for a seat and for the locked peer.
#[derive(Default)]
struct Plain(u64);

impl Device for Plain {
    type State = ();
    const KIND: &'static str = "plain";
    const VERSION: u32 = 1;
    fn reset(&mut self, _lent: &Lent<'_>) {}
    fn save(&self) {}
    fn restore(&mut self, _state: (), _lent: &Lent<'_>) -> Result<(), StateError> {
        Ok(())
    }
}

impl PortIo for Plain {
    fn pio_read(&mut self, _offset: u16, _width: Width, _lent: &Lent<'_>) -> u32 {
        self.0 as u32
    }
    fn pio_write(&mut self, _offset: u16, _width: Width, value: u32, _lent: &Lent<'_>) {
        self.0 = value.into();
    }
}

impl MmioIo for Plain {
    fn mmio_read(&mut self, _offset: u64, _width: Width, _lent: &Lent<'_>) -> u64 {
        self.0
    }
    fn mmio_write(&mut self, _offset: u64, _width: Width, value: u64, _lent: &Lent<'_>) {
        self.0 = value;
    }
}

/// A bus under measurement.
trait Subject: Send {
    fn pio_write(&mut self, port: u16, value: u32);
    fn mmio_write(&mut self, gpa: u64, value: u32);
}

impl Subject for BoardBus {
    #[inline(never)]
    fn pio_write(&mut self, port: u16, value: u32) {
        // As the KVM backend calls it: through the trait object it is lent.
        let bus: &mut dyn Bus = black_box(self);
        bus.pio_write(port, Width::Dword, value);
    }
    #[inline(never)]
    fn mmio_write(&mut self, gpa: u64, value: u32) {
        let bus: &mut dyn Bus = black_box(self);
        bus.mmio_write(gpa, Width::Dword, value.into());
    }
}

/// No bus: the device itself.
struct Direct(Latch);

impl Bus for Direct {
    fn pio_read(&mut self, _port: u16, width: Width) -> u32 {
        SharedPio::read(&self.0, 0, width)
    }
    fn pio_write(&mut self, _port: u16, width: Width, value: u32) {
        SharedPio::write(&self.0, 0, width, value);
    }
    fn mmio_read(&mut self, _gpa: u64, width: Width) -> u64 {
        SharedMmio::read(&self.0, 0, width)
    }
    fn mmio_write(&mut self, _gpa: u64, width: Width, value: u64) {
        SharedMmio::write(&self.0, 0, width, value);
    }
    fn end_of_interrupt(&mut self, _vector: u8) {}
}

impl Subject for Direct {
    #[inline(never)]
    fn pio_write(&mut self, port: u16, value: u32) {
        let bus: &mut dyn Bus = black_box(self);
        bus.pio_write(port, Width::Dword, value);
    }
    #[inline(never)]
    fn mmio_write(&mut self, gpa: u64, value: u32) {
        let bus: &mut dyn Bus = black_box(self);
        bus.mmio_write(gpa, Width::Dword, value.into());
    }
}

struct VmDevice(Arc<IoManager>);

impl Subject for VmDevice {
    #[inline(never)]
    fn pio_write(&mut self, port: u16, value: u32) {
        _ = black_box(self.0.pio_write(PioAddress(port), &value.to_le_bytes()));
    }
    #[inline(never)]
    fn mmio_write(&mut self, gpa: u64, value: u32) {
        _ = black_box(self.0.mmio_write(MmioAddress(gpa), &value.to_le_bytes()));
    }
}

/// The same behind the lock that a map needs to change while vCPUs run, as Keel's can: what rust-vmm's reference VMM does.
struct VmDeviceChangeable(Arc<Mutex<IoManager>>);

impl Subject for VmDeviceChangeable {
    #[inline(never)]
    fn pio_write(&mut self, port: u16, value: u32) {
        if let Ok(manager) = self.0.lock() {
            _ = black_box(manager.pio_write(PioAddress(port), &value.to_le_bytes()));
        }
    }
    #[inline(never)]
    fn mmio_write(&mut self, gpa: u64, value: u32) {
        if let Ok(manager) = self.0.lock() {
            _ = black_box(manager.mmio_write(MmioAddress(gpa), &value.to_le_bytes()));
        }
    }
}

trait AnyDevice: Send {
    fn write(&mut self, offset: u64, data: &[u8]);
}

impl AnyDevice for Plain {
    fn write(&mut self, _offset: u64, data: &[u8]) {
        self.0 = first_u32(data);
    }
}

type Tree = Arc<Mutex<BTreeMap<u64, (u64, Arc<Mutex<dyn AnyDevice>>)>>>;

/// The bus many VMMs have.
struct Locked {
    pio: Tree,
    mmio: Tree,
}

fn write_tree(tree: &Tree, address: u64, value: u32) {
    let found = {
        let Ok(tree) = tree.lock() else { return };
        let Some((base, (len, device))) = tree.range(..=address).next_back() else { return };
        if address - base >= *len {
            return;
        }
        (address - base, device.clone())
    };
    if let Ok(mut device) = found.1.lock() {
        device.write(found.0, &value.to_le_bytes());
    }
}

impl Subject for Locked {
    #[inline(never)]
    fn pio_write(&mut self, port: u16, value: u32) {
        write_tree(&self.pio, port.into(), value);
    }
    #[inline(never)]
    fn mmio_write(&mut self, gpa: u64, value: u32) {
        write_tree(&self.mmio, gpa, value);
    }
}

fn port(device: u16) -> u16 {
    PORT + device * PORTS
}

fn gpa(device: u16) -> u64 {
    GPA + u64::from(device) * LEN
}

const SUBJECTS: [&str; 6] =
    ["direct", "keel", "keel_seat", "vm_device", "vm_device_changeable", "mutex_btreemap"];

/// Makes two ways into one bus, as two vCPUs have them.
fn subject(name: &str) -> [Box<dyn Subject>; 2] {
    match name {
        "direct" => [Box::new(Direct(Latch::default())), Box::new(Direct(Latch::default()))],
        "keel" | "keel_seat" => {
            let board = Board::new();
            let surroundings = Surroundings {
                clock: Arc::new(HostClock::stopped_at(0)),
                machine: Arc::new(Requests::default()),
            };
            for device in 0..DEVICES {
                let (pio, mmio): (Arc<dyn SharedPio>, Arc<dyn SharedMmio>) = if name == "keel" {
                    (Arc::new(Latch::default()), Arc::new(Latch::default()))
                } else {
                    let seat = || Seat::new(Plain::default(), Line::unconnected(), &surroundings);
                    (seat(), seat())
                };
                let ports = port(device)..=port(device) + (PORTS - 1);
                let mapped = board.map_pio("latch", ports, Width::Dword, pio).and_then(|()| {
                    board.map_mmio(
                        "latch",
                        gpa(device)..=gpa(device) + (LEN - 1),
                        Width::Dword,
                        mmio,
                    )
                });
                assert_eq!(mapped, Ok(()));
            }
            [Box::new(board.bus()), Box::new(board.bus())]
        }
        "vm_device" | "vm_device_changeable" => {
            let mut manager = IoManager::new();
            for device in 0..DEVICES {
                let resource = Resource::PioAddressRange { base: port(device), size: PORTS };
                assert!(
                    manager.register_pio_resources(Arc::new(Latch::default()), &[resource]).is_ok()
                );
                let resource = Resource::MmioAddressRange { base: gpa(device), size: LEN };
                assert!(
                    manager
                        .register_mmio_resources(Arc::new(Latch::default()), &[resource])
                        .is_ok()
                );
            }
            if name == "vm_device_changeable" {
                let manager = Arc::new(Mutex::new(manager));
                return [
                    Box::new(VmDeviceChangeable(manager.clone())),
                    Box::new(VmDeviceChangeable(manager)),
                ];
            }
            let manager = Arc::new(manager);
            [Box::new(VmDevice(manager.clone())), Box::new(VmDevice(manager))]
        }
        _ => {
            let (pio, mmio) = (Tree::default(), Tree::default());
            for device in 0..DEVICES {
                let plain = || Arc::new(Mutex::new(Plain::default()));
                if let (Ok(mut pio), Ok(mut mmio)) = (pio.lock(), mmio.lock()) {
                    pio.insert(port(device).into(), (PORTS.into(), plain()));
                    mmio.insert(gpa(device), (LEN, plain()));
                }
            }
            let locked = || Locked { pio: pio.clone(), mmio: mmio.clone() };
            [Box::new(locked()), Box::new(locked())]
        }
    }
}

fn pio_round(subject: &mut dyn Subject, count: u64) {
    for n in 0..count {
        subject.pio_write(black_box(port(n as u16 % DEVICES)), n as u32);
    }
}

fn mmio_round(subject: &mut dyn Subject, count: u64) {
    for n in 0..count {
        subject.mmio_write(black_box(gpa(n as u16 % DEVICES)), n as u32);
    }
}

/// What an access by port and one to memory take on each bus, in nanoseconds. The buses take turns, and the shortest of many rounds counts:
/// what disturbs a round only makes it longer.
fn times(failed: &mut bool) -> [(f64, f64); SUBJECTS.len()] {
    const COUNT: u64 = 100_000;
    const ROUNDS: usize = 40;
    let mut subjects = SUBJECTS.map(subject);
    let mut best = [(Duration::MAX, Duration::MAX); SUBJECTS.len()];
    for round in 0..ROUNDS {
        for (([subject, _], name), best) in subjects.iter_mut().zip(SUBJECTS).zip(&mut best) {
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            let begin = Instant::now();
            pio_round(&mut **subject, COUNT);
            let pio = begin.elapsed();
            mmio_round(&mut **subject, COUNT);
            let mmio = begin.elapsed() - pio;
            *best = (best.0.min(pio), best.1.min(mmio));
            let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
            // In the first round tables are still made.
            if round == 1 {
                println!("{name}_allocations {allocations} per-{}-accesses", 2 * COUNT);
                *failed |= name.starts_with("keel") && allocations > 0;
            }
        }
    }
    let each = |time: Duration| time.as_nanos() as f64 / COUNT as f64;
    best.map(|(pio, mmio)| (each(pio), each(mmio)))
}

/// The processor time this thread has used: what another program takes from it does not count, waiting for a cache line does.
fn thread_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from).unwrap_or_default()
}

/// How much more two threads get done than one, each on a device of its own: 2 is perfect.
fn scaling(name: &str) -> f64 {
    const COUNT: u64 = 2_000_000;
    let work = |mut subject: Box<dyn Subject>, device: u16, barrier: Arc<Barrier>| {
        move || {
            barrier.wait();
            let begin = thread_time();
            for n in 0..COUNT {
                subject.pio_write(black_box(port(device)), n as u32);
            }
            thread_time() - begin
        }
    };
    let alone = || {
        let [first, _] = subject(name);
        work(first, 0, Arc::new(Barrier::new(1)))()
    };
    let together = || {
        let [first, second] = subject(name);
        let barrier = Arc::new(Barrier::new(2));
        let other = std::thread::spawn(work(second, 1, barrier.clone()));
        let mine = work(first, 0, barrier)();
        mine.max(other.join().unwrap_or_default())
    };
    let best = |round: &dyn Fn() -> Duration| {
        (0..5).map(|_| round()).min().unwrap_or_default().as_secs_f64()
    };
    2.0 * best(&alone) / best(&together)
}

/// Instructions an access takes, its loop and its device included: counted over two lengths, so that all else cancels out.
fn instructions(name: &str, kind: &str) -> Option<f64> {
    const SHORT: u64 = 1_000;
    const LONG: u64 = 11_000;
    let count = |accesses: u64| -> Option<u64> {
        let output = Command::new("valgrind")
            .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
            .arg(std::env::current_exe().ok()?)
            .args(["--accesses", name, kind, &accesses.to_string()])
            .stdin(Stdio::null())
            .output()
            .ok()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        said.lines().find_map(|line| line.split_once("Collected : ")?.1.trim().parse().ok())
    };
    Some((count(LONG)? as f64 - count(SHORT)? as f64) / (LONG - SHORT) as f64)
}

fn main() -> ExitCode {
    let words: Vec<_> = std::env::args().collect();
    // As callgrind runs it: nothing but accesses.
    if let [_, flag, name, kind, count] = words.as_slice()
        && flag == "--accesses"
    {
        let [mut subject, _] = subject(name);
        let count = count.parse().unwrap_or(0);
        match kind.as_str() {
            "pio" => pio_round(&mut *subject, count),
            _ => mmio_round(&mut *subject, count),
        }
        return ExitCode::SUCCESS;
    }

    let mut failed = false;
    let times = times(&mut failed);
    let mut instructions_of = BTreeMap::new();
    for (name, (pio, mmio)) in SUBJECTS.into_iter().zip(&times) {
        println!("{name}_pio_write {pio:.2} ns");
        println!("{name}_mmio_write {mmio:.2} ns");
        println!("{name}_two_threads {:.2} times-one", scaling(name));
        for kind in ["pio", "mmio"] {
            match instructions(name, kind) {
                Some(count) => {
                    println!("{name}_{kind}_write_instructions {count:.1} instructions");
                    instructions_of.insert((name, kind), count);
                }
                None => println!(
                    "{name}_{kind}_write_instructions could not be counted: is valgrind installed?"
                ),
            }
        }
    }
    let net = |name: &str| {
        let of = |name| {
            SUBJECTS.iter().zip(&times).find(|of| *of.0 == name).map_or((0.0, 0.0), |of| *of.1)
        };
        let (direct, with) = (of("direct"), of(name));
        [("pio", with.0 - direct.0), ("mmio", with.1 - direct.1)]
    };
    for ((kind, ours), index) in net("keel").into_iter().zip(0..) {
        println!("keel_{kind}_to_device {ours:.2} ns");
        for peer in ["vm_device", "vm_device_changeable", "mutex_btreemap"] {
            println!("keel_faster_than_{peer}_{kind} {:.2} times", net(peer)[index].1 / ours);
        }
        if let (Some(with), Some(direct)) =
            (instructions_of.get(&("keel", kind)), instructions_of.get(&("direct", kind)))
        {
            let way = with - direct;
            println!("keel_{kind}_to_device_instructions {way:.1} instructions");
            failed |= way > 60.0;
        }
    }
    if failed {
        eprintln!("dispatch: more than 60 instructions or an allocation on the way to a device");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
