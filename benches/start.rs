//! What it costs to start: processor time from exec to the guest's first instruction, and memory beyond the guest's own.
//!
//! `cargo bench --bench start`. Prints `name value unit` lines. The guest's first instruction ends it (`isa-debug-exit`), so that the
//! processor time of the whole process, user and system, is that of the start (and of the end, which is little). `boot` takes turns with a
//! bare process that makes the same VM with nothing around it (this program, executed anew) and with QEMU's `microvm` where it is installed and can
//! run here. Time is noisy, so only memory, and a guest that does not run, end the program with an error.
#![allow(unsafe_code, reason = "wait4(2), and the bare VM")]

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use kvm_bindings::{kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

const ROUNDS: usize = 60;
const RAM_MIB: u64 = 128;
/// `isa-debug-exit` here, and in QEMU's words.
const EXIT_PORT: u16 = 0x501;
/// What is written there, and what the process then ends with: unlike any error of its own.
const EXIT_VALUE: u8 = 42;
const EXIT_STATUS: i32 = (EXIT_VALUE as i32) << 1 | 1;
const TARGET_MS: f64 = 3.0;
const TARGET_MIB: f64 = 3.0;

/// `mov al, EXIT_VALUE; mov dx, EXIT_PORT; out dx, al; 1: pause; jmp 1b`, in real mode.
const END_16: [u8; 10] =
    [0xb0, EXIT_VALUE, 0xba, EXIT_PORT as u8, (EXIT_PORT >> 8) as u8, 0xee, 0xf3, 0x90, 0xeb, 0xfc];
/// The same in 64-bit mode.
const END_64: [u8; 11] = [
    0xb0,
    EXIT_VALUE,
    0x66,
    0xba,
    EXIT_PORT as u8,
    (EXIT_PORT >> 8) as u8,
    0xee,
    0xf3,
    0x90,
    0xeb,
    0xfc,
];

/// The least of a bzImage (Linux, Documentation/arch/x86/boot.rst) whose 64-bit entry, and 16-bit entry for QEMU, is `code`.
fn kernel(entry_64: &[u8]) -> Vec<u8> {
    const SETUP: usize = 2 * 512;
    let mut file = vec![0; SETUP + 4096];
    let mut put =
        |offset: usize, bytes: &[u8]| file[offset..offset + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]); // setup_sects
    put(0x1f4, &(4096u32 / 16).to_le_bytes()); // syssize
    put(0x1fe, &0xaa55u16.to_le_bytes()); // boot_flag
    put(0x200, &[0xeb, 0x6a]); // jump to 0x26c: the header's end
    put(0x202, b"HdrS");
    put(0x206, &0x020fu16.to_le_bytes()); // version
    put(0x211, &[1]); // loadflags: LOADED_HIGH
    put(0x214, &0x10_0000u32.to_le_bytes()); // code32_start
    put(0x22c, &0x7fff_ffffu32.to_le_bytes()); // initrd_addr_max
    put(0x230, &0x20_0000u32.to_le_bytes()); // kernel_alignment
    put(0x234, &[1]); // relocatable_kernel
    put(0x236, &3u16.to_le_bytes()); // xloadflags: KERNEL_64, above 4 GiB
    put(0x238, &2047u32.to_le_bytes()); // cmdline_size
    put(0x258, &0x100_0000u64.to_le_bytes()); // pref_address
    put(0x260, &0x2000u32.to_le_bytes()); // init_size
    put(0x26c, &END_16);
    put(SETUP + 0x200, entry_64);
    file
}

/// The same VM and the same instruction, with nothing around.
fn bare() -> Result<()> {
    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    vm.create_irq_chip()?;
    vm.create_pit2(kvm_pit_config::default())?;
    let ram = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), (RAM_MIB << 20) as usize)])?;
    let region = kvm_userspace_memory_region {
        memory_size: RAM_MIB << 20,
        userspace_addr: ram.get_host_address(GuestAddress(0))? as u64,
        ..Default::default()
    };
    // SAFETY: mapped until the end of the process.
    unsafe { vm.set_user_memory_region(region) }?;
    ram.write_slice(&END_16, GuestAddress(0x1000))?;
    let mut vcpu = vm.create_vcpu(0)?;
    let mut system = vcpu.get_sregs()?;
    (system.cs.selector, system.cs.base) = (0, 0);
    vcpu.set_sregs(&system)?;
    let mut registers = vcpu.get_regs()?;
    registers.rip = 0x1000;
    vcpu.set_regs(&registers)?;
    match vcpu.run()? {
        VcpuExit::IoOut(EXIT_PORT, _) => std::process::exit(EXIT_STATUS),
        other => Err(format!("the bare guest: {other:?}").into()),
    }
}

/// Waits for a process to end: its status and the processor time it has used.
fn wait(child: &Child) -> io::Result<(i32, Duration)> {
    let (mut status, mut usage) = (0, std::mem::MaybeUninit::<libc::rusage>::zeroed());
    // SAFETY: both are written by the kernel.
    let waited = unsafe { libc::wait4(child.id() as i32, &mut status, 0, usage.as_mut_ptr()) };
    if waited < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: written, and all zeroes would be valid too.
    let usage = unsafe { usage.assume_init() };
    let time = |time: libc::timeval| {
        Duration::from_secs(time.tv_sec as u64) + Duration::from_micros(time.tv_usec as u64)
    };
    Ok((libc::WEXITSTATUS(status), time(usage.ru_utime) + time(usage.ru_stime)))
}

fn quiet(command: &mut Command) -> &mut Command {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null())
}

/// Runs it to its end. Returns milliseconds of the processor, and of the clock.
fn round(command: &mut Command) -> Result<(f64, f64)> {
    let begin = Instant::now();
    let (status, time) = wait(&quiet(command).spawn()?)?;
    if status != EXIT_STATUS {
        return Err(format!("{command:?} ended with status {status}, not {EXIT_STATUS}").into());
    }
    Ok((time.as_secs_f64() * 1e3, begin.elapsed().as_secs_f64() * 1e3))
}

/// `boot` as the profile of this program builds it.
fn build_boot() -> Result<PathBuf> {
    let cargo = std::env::var_os("CARGO").ok_or("run this with `cargo bench --bench start`")?;
    let built = Command::new(cargo)
        .args(["build", "--quiet", "--release", "--example", "boot"])
        .status()?;
    let this = std::env::current_exe()?;
    let boot = this.ancestors().nth(2).map(|profile| profile.join("examples/boot"));
    boot.filter(|boot| built.success() && boot.exists()).ok_or("`boot` could not be built".into())
}

fn boot_command(boot: &Path, kernel: &Path) -> Command {
    let mut command = Command::new(boot);
    command.arg("-kernel").arg(kernel).args([
        "-m",
        &RAM_MIB.to_string(),
        "-smp",
        "1",
        "-serial",
        "null",
    ]);
    command.args(["-device", "isa-debug-exit"]);
    command
}

fn qemu_command(kernel: &Path) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args([
        "-M",
        "microvm",
        "-accel",
        "kvm",
        "-m",
        &RAM_MIB.to_string(),
        "-smp",
        "1",
        "-nodefaults",
    ]);
    command
        .args(["-display", "none", "-device", "isa-debug-exit,iobase=0x501,iosize=4", "-kernel"])
        .arg(kernel);
    command
}

/// Whether the command ends as it should within a few seconds.
fn works(command: &mut Command) -> Result<()> {
    let mut child = quiet(command).spawn()?;
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(10) {
        if let Some(status) = child.try_wait()? {
            return match status.code() {
                Some(EXIT_STATUS) => Ok(()),
                _ => Err(format!("it ended with {status}").into()),
            };
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    child.kill()?;
    child.wait()?;
    Err("its guest had not come to its first instruction after 10 s".into())
}

/// Resident memory of a process but for the guest's RAM: all of it, and what is not of files that other processes share. In KiB.
fn resident(pid: u32) -> Result<(u64, u64)> {
    let (mut all, mut own) = (0, 0);
    let mut is_ram = false;
    for line in fs::read_to_string(format!("/proc/{pid}/smaps"))?.lines() {
        let mut words = line.split_whitespace();
        let (Some(key), Some(value)) = (words.next(), words.next()) else { continue };
        let Ok(kib) = value.parse::<u64>() else { continue };
        match key {
            "Size:" => is_ram = kib == RAM_MIB << 10,
            "Rss:" if !is_ram => all += kib,
            "Private_Dirty:" | "Shared_Dirty:" if !is_ram => own += kib,
            _ => {}
        }
    }
    Ok((all, own))
}

/// The same while a guest runs.
fn resident_while_running(command: &mut Command) -> Result<(u64, u64)> {
    let mut child = quiet(command).spawn()?;
    // Long enough for all threads to have come to their loops.
    std::thread::sleep(Duration::from_millis(500));
    let resident = resident(child.id());
    child.kill()?;
    child.wait()?;
    resident
}

fn run() -> Result<bool> {
    let this = std::env::current_exe()?;
    let files = tempfile::tempdir()?;
    let end = files.path().join("end");
    fs::write(&end, kernel(&END_64))?;
    let spin = files.path().join("spin");
    fs::write(&spin, kernel(keel_guests::raw::spin()))?;
    let boot = build_boot()?;

    let mut subjects = vec![("bare", {
        let mut command = Command::new(this);
        command.arg("--bare").arg0("bare");
        command
    })];
    subjects.push(("boot", boot_command(&boot, &end)));
    match works(&mut qemu_command(&end)) {
        Ok(()) => subjects.push(("qemu_microvm", qemu_command(&end))),
        Err(error) => println!("qemu_microvm can not be measured here: {error}"),
    }
    let mut times = vec![(Vec::new(), Vec::new()); subjects.len()];
    for _ in 0..ROUNDS {
        for ((_, command), times) in subjects.iter_mut().zip(&mut times) {
            let (processor, clock) = round(command)?;
            times.0.push(processor);
            times.1.push(clock);
        }
    }
    for ((name, _), times) in subjects.iter().zip(&mut times) {
        for list in [&mut times.0, &mut times.1] {
            list.sort_by(f64::total_cmp);
        }
        println!("{name}_start_processor_time {:.2} ms", times.0[ROUNDS / 2]);
        println!("{name}_start_processor_time_at_best {:.2} ms", times.0[0]);
        println!("{name}_start_to_end_clock_time {:.2} ms", times.1[ROUNDS / 2]);
        if *name == "boot" && times.0[ROUNDS / 2] > TARGET_MS {
            eprintln!("start: {:.2} ms are more than {TARGET_MS} ms (noise?)", times.0[ROUNDS / 2]);
        }
    }

    let (all, own) = resident_while_running(&mut boot_command(&boot, &spin))?;
    let mib = all as f64 / 1024.0;
    println!("boot_memory_beyond_guest {mib:.2} MiB");
    println!("boot_memory_beyond_guest_written {:.2} MiB", own as f64 / 1024.0);
    if mib > TARGET_MIB {
        eprintln!("start: {mib:.2} MiB beyond the guest's RAM are more than {TARGET_MIB} MiB");
    }
    Ok(mib <= TARGET_MIB)
}

fn main() -> ExitCode {
    let result = if std::env::args().nth(1).as_deref() == Some("--bare") {
        bare().map(|()| true)
    } else {
        run()
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("start: {error}");
            ExitCode::from(2)
        }
    }
}
