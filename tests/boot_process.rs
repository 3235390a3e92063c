//! `boot` as a process: files, sockets, threads, memory and the background.

#![allow(clippy::unwrap_used, reason = "a failed test panics")]

mod common;

use std::fs;
use std::io::Read;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::code::{ECHO, HALT, power_off, say};
use common::{Files, PATIENCE, Process, Stream, boot, is_alive, need_kvm, send, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

#[test]
fn threads_have_names() {
    need_kvm();
    let files = Files::new();
    let running = boot("-smp 3").with("-kernel", files.code("kernel", HALT)).start();
    // A thread takes its name once it runs.
    wait_until("the threads have their names", || {
        let threads = running.process.threads();
        ["CPU 0/KVM", "CPU 1/KVM", "CPU 2/KVM", "IO main", "boot"]
            .iter()
            .all(|name| threads.iter().filter(|thread| thread == name).count() == 1)
            .then_some(())
    });
    running.signal(Signal::SIGTERM);
    running.end().with_status(0);
}

#[test]
fn a_stopped_guest_starts_at_sigcont() {
    need_kvm();
    let files = Files::new();
    let kernel = files.code("kernel", &say("running\n", &power_off()));
    let mut running = boot("-S").with("-kernel", &kernel).start();
    running.process.wait_until_ready();
    std::thread::sleep(Duration::from_millis(100));
    assert!(running.process.is_running());
    assert_eq!(running.stdout.text(), "", "nothing runs yet");
    running.signal(Signal::SIGCONT);
    running.end().with_status(0).printing("running\n");
    // And one that is never started ends all the same.
    let running = boot("-S").with("-kernel", &kernel).start();
    running.process.wait_until_ready();
    running.signal(Signal::SIGTERM);
    assert_eq!(running.end().with_status(0).stdout, "");
}

#[test]
fn a_stop_of_the_process_is_none_of_the_guests() {
    need_kvm();
    let files = Files::new();
    let running = boot("").with("-kernel", files.code("kernel", ECHO)).start();
    running.stdout.wait_for(">");
    for _ in 0..3 {
        running.signal(Signal::SIGSTOP);
        running.signal(Signal::SIGCONT);
    }
    running.signal(Signal::SIGTERM);
    running.end().with_status(0);
}

#[test]
fn the_pid_file_is_there_while_boot_is() {
    need_kvm();
    let files = Files::new();
    let kernel = files.code("kernel", HALT);
    let pidfile = files.path("pid");
    for signal in [Signal::SIGTERM, Signal::SIGHUP] {
        let running = boot("").with("-kernel", &kernel).with("-pidfile", &pidfile).start();
        running.process.wait_until_ready();
        let written = fs::read_to_string(&pidfile).unwrap();
        assert_eq!(written, format!("{}\n", running.process.pid()));
        running.signal(signal);
        running.end().with_status(0);
        assert_eq!(files.names(), ["kernel"]);
    }
    // Nor does a mistake that is found later leave one.
    boot("-restore /no/such/file").with("-pidfile", &pidfile).run().with_status(1);
    assert_eq!(files.names(), ["kernel"]);
}

#[test]
fn daemonize_returns_when_the_guest_is_ready() {
    need_kvm();
    let files = Files::new();
    let pidfile = files.path("pid");
    let output = files.path("output");
    let code = say("hello\n", HALT);
    let caller = boot("-daemonize")
        .with("-kernel", files.code("kernel", &code))
        .with("-serial", format!("file:{}", output.display()))
        .with("-pidfile", &pidfile)
        .run()
        .with_status(0);
    let pid: i32 = fs::read_to_string(&pidfile).unwrap().trim().parse().unwrap();
    let pid = Pid::from_raw(pid);
    let _end = KillOnDrop(pid);
    assert!(caller.stderr.contains("background"), "{}", caller.stderr);
    assert!(is_alive(pid));
    // Its own session, and nothing open of the terminal's: the caller's pipes have ended above.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let session = stat.rsplit(')').next().unwrap().split_whitespace().nth(3).unwrap().to_owned();
    assert_eq!(session, pid.to_string());
    wait_until("the guest runs", || {
        (fs::read_to_string(&output).unwrap_or_default() == "hello\n").then_some(())
    });
    kill(pid, Signal::SIGTERM).unwrap();
    wait_until("it ends", || (!is_alive(pid)).then_some(()));
    assert_eq!(files.names(), ["kernel", "output"]);
    // What cannot start says so before it goes to the background.
    boot("-daemonize -serial null")
        .with("-kernel", files.file("text", b"no kernel at all"))
        .run()
        .with_status(1)
        .saying("looks like text");
}

struct KillOnDrop(Pid);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if is_alive(self.0) {
            let _ = kill(self.0, Signal::SIGKILL);
        }
    }
}

fn connect(path: &Path) -> UnixStream {
    let stream = wait_until("the socket is there", || UnixStream::connect(path).ok());
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

#[test]
fn a_socket_has_one_client_after_another() {
    need_kvm();
    let files = Files::new();
    let path = files.path("serial");
    let running = boot("")
        .with("-kernel", files.code("kernel", ECHO))
        .with("-serial", format!("unix:{},server=on,wait=off", path.display()))
        .start();
    for _ in 0..3 {
        let mut client = connect(&path);
        let output = Stream::of(client.try_clone().unwrap());
        send(&mut client, b"tea");
        output.wait_for("tea");
        // A second client at the same time is hung up on.
        assert_eq!(connect(&path).read(&mut [0; 5]).unwrap(), 0);
        send(&mut client, b"again");
        output.wait_for("teaagain");
        client.shutdown(Shutdown::Both).unwrap();
    }
    running.signal(Signal::SIGTERM);
    running.end().with_status(0);
    assert_eq!(files.names(), ["kernel"], "the socket is removed");
}

#[test]
fn a_socket_server_waits_for_its_client() {
    need_kvm();
    let files = Files::new();
    let path = files.path("serial");
    let mut running =
        boot("").with("-serial", format!("unix:{},server=on", path.display())).start();
    running.stderr.wait_for("waiting for a connection");
    assert!(running.process.is_running());
    let mut client = connect(&path);
    let mut text = String::new();
    client.read_to_string(&mut text).unwrap();
    assert!(text.contains("Hello from the Keel demo guest"), "{text}");
    assert!(text.contains("All is well"), "{text}");
    running.end().with_status(0);
    assert!(!path.exists());
    // Ended while it waits, it leaves nothing either.
    let running = boot("").with("-serial", format!("unix:{},server=on", path.display())).start();
    running.stderr.wait_for("waiting for a connection");
    running.signal(Signal::SIGTERM);
    running.end().with_status(0);
    assert_eq!(files.names(), [""; 0]);
}

#[test]
fn a_socket_that_is_left_over_is_replaced_and_one_in_use_is_not() {
    need_kvm();
    let files = Files::new();
    let path = files.path("serial");
    let serial = format!("unix:{},server=on,wait=off", path.display());
    drop(UnixListener::bind(&path).unwrap());
    boot("").with("-serial", &serial).run().with_status(0);
    let _other = UnixListener::bind(&path).unwrap();
    boot("").with("-serial", &serial).run().with_status(1).saying("serial0").saying("in use");
    assert!(path.exists(), "another program's socket stays");
    let client = format!("unix:{}", files.path("nobody").display());
    boot("").with("-serial", client).run().with_status(1).saying("nobody");
}

#[test]
fn a_client_socket() {
    need_kvm();
    let files = Files::new();
    let path = files.path("listener");
    let listener = UnixListener::bind(&path).unwrap();
    let running = boot("").with("-serial", format!("unix:{}", path.display())).start();
    let (stream, _) = listener.accept().unwrap();
    let mut output = Stream::of(stream);
    running.end().with_status(0);
    assert!(output.end().contains("All is well"));
}

#[test]
fn files_and_several_ports() {
    need_kvm();
    let files = Files::new();
    let (first, log) = (files.path("first"), files.path("log"));
    fs::write(&first, "an older and longer content".repeat(1000)).unwrap();
    let ended = boot("-serial null -d exits")
        .with("-serial", format!("file:{}", files.path("second").display()))
        .with("-D", &log)
        .run()
        .with_status(0);
    assert_eq!(ended.stdout, "");
    assert_eq!(fs::metadata(files.path("second")).unwrap().len(), 0);
    assert!(fs::read_to_string(&log).unwrap().starts_with("exit report"));
    boot("").with("-serial", format!("file:{}", first.display())).run().with_status(0);
    let text = fs::read_to_string(&first).unwrap();
    assert!(text.contains("All is well") && !text.contains("older"), "{text}");
    // A chardev by its ID; a comma in a name is doubled, as in QEMU.
    let comma = files.path("a,b");
    boot("-serial chardev:c")
        .with(
            "-chardev",
            format!("file,id=c,path={}", comma.display().to_string().replace(',', ",,")),
        )
        .run()
        .with_status(0);
    assert_eq!(fs::read_to_string(comma).unwrap().matches("All is well").count(), 1);
    // A debug console on standard output beside a silent serial port.
    boot("-serial null -chardev stdio,id=d -device isa-debugcon,chardev=d")
        .run()
        .with_status(0)
        .printing("Hello debug console");
}

#[test]
fn a_pseudo_terminal() {
    need_kvm();
    let files = Files::new();
    let running = boot("-serial pty").with("-kernel", files.code("kernel", ECHO)).start();
    running.stderr.wait_for("(label serial0)");
    let message = running.stderr.text();
    let name = message
        .lines()
        .find_map(|line| line.strip_prefix("char device redirected to ")?.split(' ').next())
        .unwrap_or_else(|| panic!("{message}"));
    let mut terminal = fs::OpenOptions::new().read(true).write(true).open(name).unwrap();
    let output = Stream::of(terminal.try_clone().unwrap());
    output.wait_for(">");
    send(&mut terminal, b"tea, please\n");
    output.wait_for("tea, please\n");
    running.signal(Signal::SIGTERM);
    running.end().with_status(0);
}

/// Starts the checksum guest and waits until it computes.
fn computing(files: &Files, machine: &str, pages: u64) -> (common::Running, PathBuf) {
    let progress = files.path("progress");
    let _ = fs::remove_file(&progress);
    let running = boot(machine)
        .with("-kernel", files.guest("checksum"))
        .with("-append", format!("pages={pages} ports=0 mmio=0"))
        .with("-chardev", format!("file,id=p,path={}", progress.display()))
        .with("-device", "isa-debugcon,iobase=0x5ec,chardev=p")
        .with("-device", "isa-debug-exit")
        .start();
    wait_until("the guest computes", || (length(&progress) > 0).then_some(()));
    (running, progress)
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |file| file.len())
}

/// Asks the kernel to page out all RAM of a guest of `size` bytes in another process.
#[allow(unsafe_code, reason = "process_madvise is not in a safe wrapper")]
fn page_out(process: &Process, size: usize) -> std::io::Result<()> {
    use nix::libc;
    let maps = fs::read_to_string(format!("/proc/{}/maps", process.pid()))?;
    let ranges = maps.lines().filter_map(|line| {
        let (start, end) = line.split_whitespace().next()?.split_once('-')?;
        let start = usize::from_str_radix(start, 16).ok()?;
        Some((start, usize::from_str_radix(end, 16).ok()? - start))
    });
    let (start, len) =
        ranges.into_iter().find(|(_, len)| *len >= size).ok_or(std::io::ErrorKind::NotFound)?;
    // SAFETY: pidfd_open takes numbers only.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, process.pid().as_raw(), 0) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    let range = libc::iovec { iov_base: start as *mut libc::c_void, iov_len: len };
    // SAFETY: the range is one of the other process's; the kernel checks it, and paging out changes no contents.
    let done = unsafe {
        libc::syscall(
            libc::SYS_process_madvise,
            fd,
            &raw const range,
            1usize,
            libc::MADV_PAGEOUT,
            0,
        )
    };
    let error = std::io::Error::last_os_error();
    // SAFETY: the descriptor is ours.
    unsafe { libc::close(fd as i32) };
    if done < 0 { Err(error) } else { Ok(()) }
}

/// Swap for the time of a test, where there is none: a file of this many MiB.
struct Swap(Option<PathBuf>);

impl Swap {
    fn some(files: &Files) -> Option<Self> {
        if fs::read_to_string("/proc/swaps").unwrap().lines().count() > 1 {
            return Some(Swap(None));
        }
        let path = files.file("swap", &vec![0; 32 << 20]);
        let run = |program: &str| {
            let done = Command::new(program).arg(&path).output();
            done.is_ok_and(|output| output.status.success())
        };
        (run("mkswap") && run("swapon")).then(|| Swap(Some(path)))
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            let _ = Command::new("swapoff").arg(path).status();
        }
    }
}

#[test]
fn ram_can_be_paged_out_and_nothing_is_locked() {
    need_kvm();
    let files = Files::new();
    let Some(_swap) = Swap::some(&files) else {
        // Only where nothing can be swapped; said by name, for nothing else shows it.
        assert!(std::env::var_os("CI").is_none(), "in CI there must be swap");
        println!("not tried: there is no swap, and none could be made");
        return;
    };
    // 512 KiB of data, of which each iteration works through all.
    let (mut running, progress) = computing(&files, "-m 64 -machine mem-merge=off", 128);
    assert_eq!(running.process.status_kib("VmLck"), 0);
    let mut most = 0;
    for _ in 0..2 {
        let before = running.process.status_kib("VmRSS");
        // Mid-run, but not in the middle of a round that touches all of it again at once.
        if let Err(error) = page_out(&running.process, 64 << 20) {
            panic!("MADV_PAGEOUT on another process: {error}");
        }
        let swapped = running.process.status_kib("VmSwap");
        println!("{swapped} KiB swapped out of {before} KiB");
        most = most.max(swapped);
        let iterations = length(&progress);
        wait_until("the guest goes on", || (length(&progress) >= iterations + 2).then_some(()));
    }
    assert!(most > 400, "at most {most} KiB were swapped out");
    assert_eq!(running.process.status_kib("VmLck"), 0);
    assert_eq!(running.process.status_kib("VmPin"), 0);
    assert!(running.process.is_running(), "a check of the guest's failed");
    running.signal(Signal::SIGTERM);
    running.end().with_status(0);
    let bytes = fs::read(&progress).unwrap();
    assert!(bytes.iter().zip(1u8..).all(|(byte, number)| *byte == number), "{bytes:?}");
}
