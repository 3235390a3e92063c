//! Runs the example `boot` as its users do, and looks at what it says and does.
//!
//! Every wait has an end ([`PATIENCE`]), and a program that a test leaves behind is killed.

#![allow(dead_code, reason = "each test file uses its own part")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed test panics")]

pub mod code;
pub mod pty;

use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The program under test. `cargo test` builds it beside the tests; `cargo test --test NAME` does not.
pub fn program() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let built = test.parent().and_then(Path::parent).unwrap().join("examples/boot");
    assert!(built.exists(), "{} is not built: cargo build --example boot", built.display());
    built
}

/// Fails, and says why, where no guest can run.
pub fn need_kvm() {
    if let Some(why) = keel_kvm::probe::Report::probe().why_not() {
        panic!("this test runs guests under KVM, which this host cannot do. {why}");
    }
}

/// A directory for the files of one test.
pub struct Files(TempDir);

impl Files {
    pub fn new() -> Self {
        Files(tempfile::tempdir().unwrap())
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A file with this content.
    pub fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        path
    }

    /// The image of one of the hand-made guests.
    pub fn guest(&self, name: &str) -> PathBuf {
        self.file(name, keel_guests::find(name).unwrap().image)
    }

    /// A kernel of a few instructions; `name` is the file's.
    pub fn code(&self, name: &str, code: &[u8]) -> PathBuf {
        self.file(name, &code::image(code))
    }

    /// The names of what is there.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(self.0.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }
}

/// A command line of `boot`.
pub struct Boot(Command);

/// `boot` with arguments separated by blanks.
pub fn boot(arguments: &str) -> Boot {
    let mut command = Command::new(program());
    command.args(arguments.split_whitespace()).stdin(Stdio::null());
    Boot(command)
}

impl Boot {
    /// One more argument.
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.0.arg(argument);
        self
    }

    /// One more option with its argument.
    pub fn with(self, option: &str, argument: impl AsRef<OsStr>) -> Self {
        self.arg(option).arg(argument)
    }

    /// The bare command, for other standard streams.
    pub fn command(self) -> Command {
        self.0
    }

    /// Starts it, with its output collected.
    pub fn start(mut self) -> Running {
        let mut child =
            self.0.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("boot starts");
        let stdout = Stream::of(child.stdout.take().unwrap());
        let stderr = Stream::of(child.stderr.take().unwrap());
        Running { process: Process(child), stdout, stderr }
    }

    /// Runs it to its end.
    pub fn run(self) -> Ended {
        self.start().end()
    }
}

/// A child that is killed if it is forgotten.
pub struct Process(pub Child);

impl Process {
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.0.id() as i32)
    }

    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        wait_until("boot ends", || self.0.try_wait().unwrap())
    }

    pub fn is_running(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }

    /// The names of its threads, sorted.
    pub fn threads(&self) -> Vec<String> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        let mut names: Vec<_> = tasks
            .filter_map(|task| fs::read_to_string(task.unwrap().path().join("comm")).ok())
            .map(|name| name.trim().to_owned())
            .collect();
        names.sort();
        names
    }

    /// Waits until it has all its threads, and so takes signals.
    pub fn wait_until_ready(&self) {
        wait_until("boot is ready", || {
            self.threads().iter().any(|name| name == "IO main").then_some(())
        });
    }

    /// What /proc says of it under `name` in `status`, in KiB.
    pub fn status_kib(&self, name: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let line = line.unwrap_or_else(|| panic!("no {name} in {status}"));
        line.trim().trim_end_matches("kB").trim().parse().unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `boot` at work.
pub struct Running {
    pub process: Process,
    pub stdout: Stream,
    pub stderr: Stream,
}

impl Running {
    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Waits for its end.
    pub fn end(mut self) -> Ended {
        let begin = Instant::now();
        let status = self.process.wait();
        Ended {
            status,
            stdout: self.stdout.end(),
            stderr: self.stderr.end(),
            waited: begin.elapsed(),
        }
    }
}

/// What became of it.
pub struct Ended {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
    /// How long it was waited for.
    pub waited: Duration,
}

impl Ended {
    /// Fails unless it ended with this status, and never in a panic.
    #[track_caller]
    pub fn with_status(self, expected: i32) -> Self {
        assert!(
            self.status.code() == Some(expected) && !self.stderr.contains("panicked at"),
            "status {expected} was expected, not {}\n--- stdout\n{}\n--- stderr\n{}",
            self.status,
            self.stdout,
            self.stderr
        );
        self
    }

    /// Fails unless standard error has these words.
    #[track_caller]
    pub fn saying(self, words: &str) -> Self {
        assert!(self.stderr.contains(words), "no {words:?} in\n{}", self.stderr);
        self
    }

    /// Fails unless standard output has these words.
    #[track_caller]
    pub fn printing(self, words: &str) -> Self {
        assert!(self.stdout.contains(words), "no {words:?} in\n{}", self.stdout);
        self
    }
}

/// What comes out of a stream, collected by a thread.
pub struct Stream {
    collected: Arc<(Mutex<Vec<u8>>, Condvar)>,
    reader: Option<JoinHandle<()>>,
}

impl Stream {
    pub fn of(mut from: impl Read + Send + 'static) -> Self {
        let collected = Arc::new((Mutex::new(Vec::new()), Condvar::new()));
        let reader = thread::spawn({
            let collected = collected.clone();
            move || {
                let mut buffer = [0; 4096];
                // The end of a pseudo-terminal is an error.
                while let Ok(count @ 1..) = from.read(&mut buffer) {
                    collected.0.lock().unwrap().extend_from_slice(&buffer[..count]);
                    collected.1.notify_all();
                }
            }
        });
        Stream { collected, reader: Some(reader) }
    }

    /// What has come so far.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.collected.0.lock().unwrap()).into_owned()
    }

    /// Waits until this text has come.
    #[track_caller]
    pub fn wait_for(&self, text: &str) {
        let lacking = |bytes: &mut Vec<u8>| !String::from_utf8_lossy(bytes).contains(text);
        let guard = self.collected.0.lock().unwrap();
        let (bytes, timeout) =
            self.collected.1.wait_timeout_while(guard, PATIENCE, lacking).unwrap();
        assert!(
            !timeout.timed_out(),
            "{text:?} has not come in {PATIENCE:?}, only:\n{}",
            String::from_utf8_lossy(&bytes)
        );
    }

    /// All of it, once whoever writes has ended.
    pub fn end(&mut self) -> String {
        if let Some(reader) = self.reader.take() {
            wait_until("the stream ends", || reader.is_finished().then_some(()));
            reader.join().unwrap();
        }
        self.text()
    }
}

/// Waits until there is a result.
#[track_caller]
pub fn wait_until<T>(what: &str, mut result: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(result) = result() {
            return result;
        }
        assert!(begin.elapsed() < PATIENCE, "in vain for {PATIENCE:?}: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Whether a process is there, and not only its remains.
pub fn is_alive(pid: Pid) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().unwrap_or_default().starts_with(" Z"))
}

/// Random numbers that a printed seed repeats: SplitMix64.
pub struct Random(u64);

impl Random {
    /// From `KEEL_SEED`, or the time; the seed is printed.
    pub fn seeded() -> Self {
        let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let seed = std::env::var("KEEL_SEED")
            .map_or(time.as_nanos() as u64, |seed| seed.parse().expect("KEEL_SEED is a number"));
        println!("KEEL_SEED={seed}");
        Random(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// A number under `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// Writes to a stream that may have been closed.
pub fn send(to: &mut impl Write, bytes: &[u8]) {
    to.write_all(bytes).and_then(|()| to.flush()).expect("boot reads");
}
