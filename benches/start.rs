//! What it costs to start: processor time from exec to the guest's first instructions, and memory beyond the guest's own.
//!
//! `cargo bench --bench start`. Prints `name value unit` lines. The guest's first instructions write a byte to COM1, which comes out of the
//! process; then it halts for good. The processor time the process has used when the byte arrives is that of its start. `boot` takes turns
//! with a bare process that makes the same VM with nothing around it (this program, executed anew) and with QEMU's `microvm` where it is installed
//! and can run here. Time is noisy, so only memory, and a guest that does not run, end the program with an error.
#![allow(unsafe_code, reason = "the bare VM's memory")]

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use kvm_bindings::{kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};
use nix::poll::{PollFd, PollFlags, poll};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

const ROUNDS: usize = 60;
const RAM_MIB: u64 = 128;
const COM1: u16 = 0x3f8;
/// What the guest says.
const WORD: u8 = b'K';
const TARGET_MS: f64 = 3.0;
const TARGET_MIB: f64 = 3.0;

/// `mov al, WORD; mov dx, COM1; out dx, al; cli; 1: hlt; jmp 1b`, in real mode.
const SAY_16: [u8; 10] =
    [0xb0, WORD, 0xba, COM1 as u8, (COM1 >> 8) as u8, 0xee, 0xfa, 0xf4, 0xeb, 0xfd];
/// The same in 64-bit mode.
const SAY_64: [u8; 11] =
    [0xb0, WORD, 0x66, 0xba, COM1 as u8, (COM1 >> 8) as u8, 0xee, 0xfa, 0xf4, 0xeb, 0xfd];

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
    put(0x26c, &SAY_16);
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
    ram.write_slice(&SAY_16, GuestAddress(0x1000))?;
    let mut vcpu = vm.create_vcpu(0)?;
    let mut system = vcpu.get_sregs()?;
    (system.cs.selector, system.cs.base) = (0, 0);
    vcpu.set_sregs(&system)?;
    let mut registers = vcpu.get_regs()?;
    registers.rip = 0x1000;
    vcpu.set_regs(&registers)?;
    match vcpu.run()? {
        VcpuExit::IoOut(COM1, data) => io::stdout().write_all(data)?,
        other => return Err(format!("the bare guest: {other:?}").into()),
    }
    io::stdout().flush()?;
    // As a halted guest.
    loop {
        std::thread::park();
    }
}

/// The processor time, user and system, that a process of ours has used.
fn processor_time(pid: u32) -> Result<Duration> {
    let clock = ClockId::pid_cpu_clock_id(Pid::from_raw(pid as i32))?;
    Ok(clock_gettime(clock)?.into())
}

/// A program that is started, measured and killed.
struct Running(Child);

impl Running {
    /// Starts it and waits until its guest has said the word.
    fn new(command: &mut Command) -> Result<Self> {
        let child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let mut running = Running(child);
        let mut word = [0];
        let Some(pipe) = &mut running.0.stdout else { return Err("no pipe".into()) };
        let ready = {
            let mut polled = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
            poll(&mut polled, 10_000u16)?
        };
        if ready == 0 {
            return Err(format!("{command:?}: its guest has not spoken within 10 s").into());
        }
        pipe.read_exact(&mut word)
            .map_err(|error| format!("{command:?} ended before its guest spoke: {error}"))?;
        match word {
            [WORD] => Ok(running),
            other => Err(format!("{command:?} said {other:?}").into()),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Milliseconds of the processor, and of the clock, until the guest spoke.
fn round(command: &mut Command) -> Result<(f64, f64)> {
    let begin = Instant::now();
    let running = Running::new(command)?;
    let clock = begin.elapsed();
    Ok((processor_time(running.0.id())?.as_secs_f64() * 1e3, clock.as_secs_f64() * 1e3))
}

/// `boot` as `cargo run --release --example boot` has it, and linked statically, as it goes to the lab's hosts.
fn build_boot() -> Result<[PathBuf; 2]> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let cargo = std::env::var_os("CARGO").ok_or("run this with `cargo bench --bench start`")?;
    let build = || {
        let mut build = Command::new(&cargo);
        build.args(["build", "--quiet", "--release", "--example", "boot"]);
        build
    };
    let this = std::env::current_exe()?;
    let profile = this.ancestors().nth(2).ok_or("not in a target folder")?;
    let target = profile.with_file_name("static");
    // The same words as `xtask`'s, so that nothing is built twice.
    let statically = build()
        .args(["--target", TARGET, "--target-dir"])
        .arg(&target)
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("RUSTFLAGS", "-C target-feature=+crt-static -C strip=debuginfo")
        .status()?;
    if !(build().status()?.success() && statically.success()) {
        return Err("`boot` could not be built".into());
    }
    Ok([profile.join("examples/boot"), target.join(TARGET).join("release/examples/boot")])
}

fn boot_command(boot: &Path, kernel: &Path) -> Command {
    let mut command = Command::new(boot);
    command.arg("-kernel").arg(kernel).args([
        "-m",
        &RAM_MIB.to_string(),
        "-smp",
        "1",
        "-serial",
        "stdio",
    ]);
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
    command.args(["-display", "none", "-serial", "stdio", "-kernel"]).arg(kernel);
    command
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

/// The same while its guest runs.
fn resident_while_running(command: &mut Command) -> Result<(u64, u64)> {
    let running = Running::new(command)?;
    // Until all its threads have come to their loops.
    std::thread::sleep(Duration::from_millis(300));
    resident(running.0.id())
}

fn run() -> Result<bool> {
    let this = std::env::current_exe()?;
    let files = tempfile::tempdir()?;
    let say = files.path().join("say");
    fs::write(&say, kernel(&SAY_64))?;
    // The same, running on: it begins like the other, up to `out`.
    let spin = files.path().join("spin");
    let code: Vec<u8> = SAY_64[..7].iter().chain(keel_guests::raw::spin()).copied().collect();
    fs::write(&spin, kernel(&code))?;
    let [boot, boot_static] = build_boot()?;

    let mut subjects = vec![("bare", {
        let mut command = Command::new(this);
        command.arg("--bare").arg0("bare");
        command
    })];
    subjects.push(("boot", boot_command(&boot, &say)));
    subjects.push(("boot_static", boot_command(&boot_static, &say)));
    match Running::new(&mut qemu_command(&say)) {
        Ok(_) => subjects.push(("qemu_microvm", qemu_command(&say))),
        Err(error) => println!("qemu_microvm can not be measured here: {error}"),
    }
    let mut times = vec![(Vec::new(), Vec::new()); subjects.len()];
    for round_number in 0..ROUNDS {
        for ((name, command), times) in subjects.iter_mut().zip(&mut times) {
            // Its firmware takes a second or more where instructions are emulated.
            if *name == "qemu_microvm" && round_number % 6 != 0 {
                continue;
            }
            let (processor, clock) = round(command)?;
            times.0.push(processor);
            times.1.push(clock);
        }
    }
    for ((name, _), times) in subjects.iter().zip(&mut times) {
        for list in [&mut times.0, &mut times.1] {
            list.sort_by(f64::total_cmp);
        }
        println!("{name}_start_processor_time {:.2} ms", times.0[times.0.len() / 2]);
        println!("{name}_start_processor_time_at_best {:.2} ms", times.0[0]);
        println!("{name}_start_clock_time {:.2} ms", times.1[times.1.len() / 2]);
        if name.starts_with("boot") && times.0[times.0.len() / 2] > TARGET_MS {
            eprintln!(
                "start: {name}: {:.2} ms are more than {TARGET_MS} ms (noise?)",
                times.0[times.0.len() / 2]
            );
        }
    }

    let mut good = true;
    for (name, boot) in [("boot", boot), ("boot_static", boot_static)] {
        let (all, own) = resident_while_running(&mut boot_command(&boot, &spin))?;
        let mib = all as f64 / 1024.0;
        println!("{name}_memory_beyond_guest {mib:.2} MiB");
        println!("{name}_memory_beyond_guest_written {:.2} MiB", own as f64 / 1024.0);
        if mib > TARGET_MIB {
            eprintln!(
                "start: {name}: {mib:.2} MiB beyond the guest's RAM are more than {TARGET_MIB} MiB"
            );
            // Linked dynamically, half of it is the C library, of which any other process of the host has a part.
            good &= name == "boot" && own as f64 / 1024.0 <= TARGET_MIB;
        }
    }
    Ok(good)
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
