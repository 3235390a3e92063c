//! What Keel adds to an exit: a guest doing port writes, port reads, string I/O, and loads and stores to memory that is not there, on
//! `/dev/kvm`. Ours (a vCPU of `keel-kvm` on a board of `keel-device-model`) beside a bare loop of `KVM_RUN`.
//!
//! `cargo bench --bench exits`. Prints `name value unit` lines. Both loops run the very same vCPU, in small rounds that take turns, so that
//! neither the guest nor the noise of the machine can differ; what is printed is the median of the differences of neighbouring rounds, in
//! processor time of the thread. User-space instructions are counted as well, by single steps (`ptrace`): noise is no excuse there, and more
//! than `MOST_INSTRUCTIONS` end the program with an error.
#![allow(
    unsafe_code,
    reason = "the bare loop: KVM_RUN by ioctl(2), and the mapping of the vCPU's page"
)]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode, ExitStatus};
use std::ptr::{addr_of, null_mut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ioctls::{KVM_GET_REGS, KVM_RUN, KVM_SET_REGS};
use keel_device_model::testing::Requests;
use keel_device_model::{
    Board, BoardBus, Device, HostClock, Lent, Line, PortIo, Seat, SharedMmio, SharedPio,
    StateError, Surroundings,
};
use keel_guests::raw;
use keel_hypervisor::{CpuState, Exit, Interrupts, MemorySlot, Vcpu, Vm, Width};
use keel_kvm::{Kvm, KvmVm, VmConfig};
use keel_memory::{GuestRam, RamConfig};
use kvm_bindings::{KVM_EXIT_HLT, kvm_regs, kvm_run};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, raise};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};

#[allow(missing_docs, reason = "the macros make functions that are public, and take no comment")]
mod ioctls {
    use kvm_bindings::{KVMIO, kvm_regs};
    use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iow_nr};

    ioctl_io_nr!(KVM_RUN, KVMIO, 0x80);
    ioctl_ior_nr!(KVM_GET_REGS, KVMIO, 0x81, kvm_regs);
    ioctl_iow_nr!(KVM_SET_REGS, KVMIO, 0x82, kvm_regs);
}

const CODE: u64 = 0x1000;
const DATA: u64 = 0x2000;
/// RAM ends here.
const RAM: u64 = 0xc_0000;
const CLAIMED: u16 = 0x400;
const SEATED: u16 = 0x410;
const UNCLAIMED: u16 = 0x500;
const CLAIMED_GPA: u64 = 0xd_0000;
const UNCLAIMED_GPA: u64 = 0xe_0000;

/// Accesses a round: short, so that a disturbance hits few of them.
const COUNT: u64 = 128;
/// Pairs of rounds.
const PAIRS: usize = 600;
/// Nanoseconds at most.
const TARGET: f64 = 50.0;
/// 50 ns are 300 instructions at 3 GHz and 2 a cycle.
const MOST_INSTRUCTIONS: f64 = 300.0;

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// A device that keeps the last value.
#[derive(Default)]
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

/// The same in a seat, as a PC's devices are.
struct Seated(u32);

impl Device for Seated {
    type State = ();
    const KIND: &'static str = "seated";
    const VERSION: u32 = 1;
    fn reset(&mut self, _lent: &Lent<'_>) {}
    fn save(&self) {}
    fn restore(&mut self, _state: (), _lent: &Lent<'_>) -> Result<(), StateError> {
        Ok(())
    }
}

impl PortIo for Seated {
    fn pio_read(&mut self, _offset: u16, _width: Width, _lent: &Lent<'_>) -> u32 {
        self.0
    }
    fn pio_write(&mut self, _offset: u16, _width: Width, value: u32, _lent: &Lent<'_>) {
        self.0 = value;
    }
}

/// What the guest does.
struct Kind {
    name: &'static str,
    code: fn() -> &'static [u8],
    port: u16,
    /// Base of the segment that loads and stores go through; zero for RAM.
    segment: u64,
    /// Units of a string.
    units: u64,
}

const KINDS: [Kind; 12] = [
    Kind { name: "port_write", code: raw::port_out, port: CLAIMED, segment: 0, units: 0 },
    Kind { name: "port_write_seat", code: raw::port_out, port: SEATED, segment: 0, units: 0 },
    Kind {
        name: "port_write_unclaimed",
        code: raw::port_out,
        port: UNCLAIMED,
        segment: 0,
        units: 0,
    },
    Kind { name: "port_read", code: raw::port_in, port: CLAIMED, segment: 0, units: 0 },
    Kind { name: "port_read_unclaimed", code: raw::port_in, port: UNCLAIMED, segment: 0, units: 0 },
    Kind { name: "string_out_8_bytes", code: raw::string_out, port: CLAIMED, segment: 0, units: 8 },
    Kind {
        name: "string_in_4_words",
        code: raw::string_in_words,
        port: CLAIMED,
        segment: 0,
        units: 4,
    },
    Kind {
        name: "string_in_256_words",
        code: raw::string_in_words,
        port: CLAIMED,
        segment: 0,
        units: 256,
    },
    Kind { name: "mmio_store", code: raw::mmio_store, port: 0, segment: CLAIMED_GPA, units: 0 },
    Kind {
        name: "mmio_store_unclaimed",
        code: raw::mmio_store,
        port: 0,
        segment: UNCLAIMED_GPA,
        units: 0,
    },
    Kind { name: "mmio_load", code: raw::mmio_load, port: 0, segment: CLAIMED_GPA, units: 0 },
    Kind {
        name: "mmio_load_unclaimed",
        code: raw::mmio_load,
        port: 0,
        segment: UNCLAIMED_GPA,
        units: 0,
    },
];

/// One guest, and the two ways to run it.
struct Guest {
    _vm: KvmVm,
    vcpu: Box<dyn Vcpu>,
    bus: BoardBus,
    /// The same vCPU's file, and its page.
    bare: File,
    page: *mut kvm_run,
    start: kvm_regs,
}

impl Guest {
    fn new(kind: &Kind) -> Result<Self> {
        // `HLT` comes out: the end of a round.
        let vm = Kvm::open()?
            .create_vm(VmConfig { interrupts: Interrupts::User, ..VmConfig::default() })?;
        let ram = GuestRam::new(&RamConfig::new(RAM))?;
        for (index, region) in (0..).zip(ram.regions()) {
            vm.map(MemorySlot {
                index,
                region: region.clone(),
                read_only: false,
                log_dirty: false,
            })?;
        }
        ram.memory().write_slice((kind.code)(), GuestAddress(CODE))?;
        let vcpu = vm.create_vcpu(0)?;
        let bare = duplicate_vcpu()?;
        let len = std::mem::size_of::<kvm_run>();
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping where the kernel likes.
        let page =
            unsafe { libc::mmap(null_mut(), len, access, libc::MAP_SHARED, bare.as_raw_fd(), 0) };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error().into());
        }
        let mut guest = Guest {
            _vm: vm,
            vcpu,
            bus: board()?.bus(),
            bare,
            page: page.cast(),
            start: kvm_regs::default(),
        };
        let mut settled = guest.vcpu.settle(&mut guest.bus)?;
        let mut state: CpuState = settled.save()?;
        (state.segments.cs.selector, state.segments.cs.base) = (0, 0);
        (state.segments.ds.base, state.segments.es.base) = (kind.segment, kind.segment);
        settled.load(&state)?;
        // SAFETY: the kernel writes the registers.
        check(unsafe { ioctl_with_mut_ref(&guest.bare, KVM_GET_REGS(), &mut guest.start) })?;
        let start = &mut guest.start;
        (start.rip, start.rsp, start.rflags) = (CODE, 0x8000, 2);
        (start.rax, start.rdx, start.rbx) = (0x55, kind.port.into(), kind.units);
        (start.rsi, start.rdi) = if kind.segment == 0 { (DATA, DATA) } else { (0, 0) };
        guest.count(COUNT);
        Ok(guest)
    }

    fn count(&mut self, count: u64) {
        (self.start.rcx, self.start.rbp) = (count, count);
    }

    fn rewind(&mut self) -> Result<()> {
        // SAFETY: the kernel reads the registers.
        Ok(check(unsafe { ioctl_with_ref(&self.bare, KVM_SET_REGS(), &self.start) })?)
    }

    #[inline(never)]
    fn ours(&mut self) -> Result<()> {
        match self.vcpu.run(&mut self.bus)? {
            Exit::Halted => Ok(()),
            other => Err(format!("the guest ended with {other:?}").into()),
        }
    }

    /// Returns the number of exits.
    #[inline(never)]
    fn bare(&mut self) -> Result<u64> {
        let fd = self.bare.as_raw_fd();
        let mut exits = 0;
        loop {
            // SAFETY: the argument must be zero; what it changes is the guest's memory and the page, which nothing borrows.
            if unsafe { libc::ioctl(fd, KVM_RUN() as _, 0) } != 0 {
                return Err(io::Error::last_os_error().into());
            }
            // SAFETY: in the mapping; any value is good.
            if unsafe { addr_of!((*self.page).exit_reason).read_volatile() } == KVM_EXIT_HLT {
                return Ok(exits);
            }
            exits += 1;
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and used by nobody else.
        unsafe { libc::munmap(self.page.cast(), std::mem::size_of::<kvm_run>()) };
    }
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Another descriptor of the vCPU that was just made: the crates, rightly, do not show theirs.
fn duplicate_vcpu() -> Result<File> {
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let entry = entry?;
        let Ok(target) = std::fs::read_link(entry.path()) else { continue };
        if target.to_string_lossy().starts_with("anon_inode:kvm-vcpu") {
            let fd: i32 = entry.file_name().to_string_lossy().parse()?;
            // SAFETY: makes a new descriptor or fails.
            let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) };
            check(copy)?;
            // SAFETY: just made, and nobody else's.
            return Ok(unsafe { File::from_raw_fd(copy) });
        }
    }
    Err("this process has no vCPU".into())
}

fn board() -> Result<Board> {
    let board = Board::new();
    let latch = Arc::new(Latch::default());
    let surroundings = Surroundings {
        clock: Arc::new(HostClock::stopped_at(0)),
        machine: Arc::new(Requests::default()),
    };
    let seat = Seat::new(Seated(0), Line::unconnected(), &surroundings);
    board.map_pio("latch", CLAIMED..=CLAIMED + 7, Width::Dword, latch.clone())?;
    board.map_pio("seated", SEATED..=SEATED + 7, Width::Dword, seat)?;
    board.map_mmio("latch", CLAIMED_GPA..=CLAIMED_GPA + 0xfff, Width::Qword, latch)?;
    Ok(board)
}

/// The processor time this thread has used, in the kernel and out of it.
fn thread_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from).unwrap_or_default()
}

/// Value at a part of a sorted list.
fn quantile(sorted: &[f64], part: f64) -> f64 {
    let index = (part * (sorted.len().saturating_sub(1)) as f64).round() as usize;
    sorted.get(index).copied().unwrap_or(f64::NAN)
}

fn measure(kind: &Kind) -> Result<f64> {
    let mut guest = Guest::new(kind)?;
    guest.rewind()?;
    let exits = guest.bare()? as f64;
    let ours = |guest: &mut Guest| -> Result<f64> {
        guest.rewind()?;
        let begin = thread_time();
        guest.ours()?;
        Ok((thread_time() - begin).as_nanos() as f64 / exits)
    };
    let bare = |guest: &mut Guest| -> Result<f64> {
        guest.rewind()?;
        let begin = thread_time();
        guest.bare()?;
        Ok((thread_time() - begin).as_nanos() as f64 / exits)
    };
    let (mut times, mut bare_times, mut differences) = (Vec::new(), Vec::new(), Vec::new());
    for pair in 0..PAIRS {
        // Who goes first takes turns too.
        let (ours, bare) = if pair % 2 == 0 {
            let ours = ours(&mut guest)?;
            (ours, bare(&mut guest)?)
        } else {
            let bare = bare(&mut guest)?;
            (ours(&mut guest)?, bare)
        };
        times.push(ours);
        bare_times.push(bare);
        differences.push(ours - bare);
    }
    for list in [&mut times, &mut bare_times, &mut differences] {
        list.sort_by(f64::total_cmp);
    }
    let name = kind.name;
    println!("{name}_bare {:.0} ns", quantile(&bare_times, 0.5));
    println!("{name}_keel {:.0} ns", quantile(&times, 0.5));
    if kind.units > 0 {
        println!("{name}_units_an_exit {:.1} units", (COUNT * kind.units) as f64 / exits);
    }
    let added = quantile(&differences, 0.5);
    // Three standard errors of the median, from the middle half.
    let spread = 3.0 * 1.25 * (quantile(&differences, 0.75) - quantile(&differences, 0.25)) / 1.35;
    println!("{name}_added {added:.0} ns");
    println!("{name}_added_uncertainty {:.0} ns", spread / (PAIRS as f64).sqrt());
    println!("{name}_added_at_best {:.0} ns", times[0] - bare_times[0]);
    Ok(added)
}

/// The traced program: stops, runs `count` accesses, stops.
fn traced(who: &str, kind: &Kind, count: u64) -> Result<()> {
    ptrace::traceme()?;
    let mut guest = Guest::new(kind)?;
    // Once before, so that all is linked and every table made.
    guest.rewind()?;
    guest.ours()?;
    guest.count(count);
    guest.rewind()?;
    raise(Signal::SIGSTOP)?;
    match who {
        "ours" => guest.ours()?,
        _ => drop(guest.bare()?),
    }
    Ok(raise(Signal::SIGSTOP)?)
}

/// Counts the steps between the stops of the traced program.
fn steps(who: &str, kind: &Kind, count: u64) -> Result<u64> {
    let child = Command::new(std::env::current_exe()?)
        .args(["--traced", who, kind.name, &count.to_string()])
        .spawn()?;
    let pid = Pid::from_raw(child.id() as i32);
    let mut steps = 0;
    let mut begun = false;
    loop {
        match waitpid(pid, None)? {
            WaitStatus::Stopped(_, Signal::SIGSTOP) if begun => {
                ptrace::kill(pid)?;
                waitpid(pid, None)?;
                return Ok(steps);
            }
            WaitStatus::Stopped(_, Signal::SIGSTOP) => {
                begun = true;
                ptrace::step(pid, None)?;
            }
            WaitStatus::Stopped(_, Signal::SIGTRAP) if begun => {
                steps += 1;
                ptrace::step(pid, None)?;
            }
            WaitStatus::Stopped(_, signal) => ptrace::cont(pid, signal)?,
            WaitStatus::Exited(_, status) => {
                return Err(format!(
                    "the traced program ended: {}",
                    ExitStatus::from_raw(status << 8)
                )
                .into());
            }
            other => return Err(format!("the traced program: {other:?}").into()),
        }
    }
}

/// The user-space instructions an exit takes.
fn instructions(who: &str, kind: &Kind) -> Result<f64> {
    const SHORT: u64 = 8;
    const LONG: u64 = 40;
    let mut guest = Guest::new(kind)?;
    let mut exits = |count| -> Result<u64> {
        guest.count(count);
        guest.rewind()?;
        guest.bare()
    };
    let exits = exits(LONG)? - exits(SHORT)?;
    Ok((steps(who, kind, LONG)? as f64 - steps(who, kind, SHORT)? as f64) / exits as f64)
}

fn run() -> Result<bool> {
    let words: Vec<_> = std::env::args().collect();
    if let [_, flag, who, name, count] = words.as_slice()
        && flag == "--traced"
    {
        let kind = KINDS.iter().find(|kind| kind.name == name).ok_or("no such kind")?;
        traced(who, kind, count.parse()?)?;
        return Ok(true);
    }
    if let Err(error) = OpenOptions::new().read(true).write(true).open(keel_kvm::DEVICE) {
        return Err(format!("{} can not be opened: {error}", keel_kvm::DEVICE).into());
    }
    let mut good = true;
    for kind in &KINDS {
        let added = measure(kind)?;
        match (instructions("ours", kind), instructions("bare", kind)) {
            (Ok(ours), Ok(bare)) => {
                let name = kind.name;
                println!("{name}_added_instructions {:.0} instructions", ours - bare);
                // A string's units are calls of their own: time is said, and no limit set.
                good &= kind.units > 8 || ours - bare <= MOST_INSTRUCTIONS;
            }
            (Err(error), _) | (_, Err(error)) => {
                println!("{}_added_instructions could not be counted: {error}", kind.name)
            }
        }
        if added > TARGET && kind.units <= 8 {
            eprintln!("exits: {}: {added:.0} ns are more than {TARGET} ns (noise?)", kind.name);
        }
    }
    Ok(good)
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("exits: more than {MOST_INSTRUCTIONS} instructions on top of a bare exit");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("exits: {error}");
            ExitCode::FAILURE
        }
    }
}
