//! The lab's host: a machine in QEMU's software CPU with AMD-V emulated, in which `/dev/kvm` is real, and the commands run in
//! it. One boot serves any number of commands; dropping the [`Host`] ends it.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use keel_test_init::frame::{Frame, Kind, MAX_PAYLOAD, Start};
use rustix::io::FdFlags;
use rustix::process::Signal;

use super::packages::Package;
use super::{initrd, terminal};
use crate::workspace::lab;

/// The host boots in 3 to 10 s; a machine that is busy with a build may need several times that.
const BOOT: Duration = Duration::from_secs(120);

/// What the outer kernel writes when the emulation under it failed, and no one else is to blame.
const LAB_FAILURES: &[&str] = &[
    "soft lockup",
    "hard LOCKUP",
    "self-detected stall",
    "detected stalls on CPUs",
    "blocked for more than",
    "workqueue lockup",
    // The host's kernel itself crashed, which no program in it may cause.
    "Kernel panic",
    "BUG: ",
    "Oops",
];

/// How the host is made.
#[derive(Clone, Debug, clap::Args)]
pub struct HostOptions {
    /// The lab host's memory in MiB; only what is touched costs this machine memory
    #[arg(long, value_name = "MIB", default_value_t = 4096)]
    pub host_memory: u32,
    /// The lab host's CPUs
    ///
    /// With more than one, QEMU 10.0 now and then delivers an interrupt from another CPU in the moment after #VMEXIT in
    /// which AMD's global interrupt flag forbids it (about one boot of a guest in twenty): the guest or the lab's host then
    /// hangs or crashes, whatever the VMM. A guest's several CPUs run on one CPU of the host as well.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub host_cpus: u32,
    /// Show the lab host's own console too
    #[arg(long)]
    pub host_console: bool,
}

type Sessions = Arc<Mutex<HashMap<u32, Sender<Event>>>>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A running lab host.
pub struct Host {
    qemu: Child,
    channel: Arc<Mutex<UnixStream>>,
    sessions: Sessions,
    next: u32,
    console: Arc<Mutex<String>>,
}

/// What a command has said or done.
#[derive(Debug)]
pub enum Event {
    /// Bytes of standard output, or of the terminal.
    Output(Vec<u8>),
    /// Bytes of standard error.
    Error(Vec<u8>),
    /// It ended, with this status (128 and the number of the signal that ended it).
    Exit(i32),
}

/// What a command that ended wrote.
#[derive(Debug)]
pub struct Output {
    /// Its exit status, as [`Event::Exit`].
    pub status: i32,
    /// Both its outputs, in the order in which they arrived.
    pub text: String,
}

/// The folder that both sides see, here and as `/share` in the host.
pub fn share() -> PathBuf {
    lab().join("share")
}

impl Host {
    /// Boots a host and waits until it takes commands.
    pub fn boot(options: &HostOptions) -> Result<Self> {
        let begun = Instant::now();
        let share = share();
        fs::create_dir_all(share.join("bin"))
            .with_context(|| format!("make {}", share.display()))?;
        let (kernel, initrd) = (Package::Generic.kernel()?, initrd::host()?);
        let (ours, theirs) = UnixStream::pair().context("make the channel to the lab's host")?;
        rustix::io::fcntl_setfd(&theirs, FdFlags::empty()).context("hand the channel to QEMU")?;
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-name", "keel-lab", "-nodefaults", "-no-user-config", "-no-reboot"])
            .args(["-accel", "tcg,thread=multi", "-cpu", "EPYC,+svm,+npt"])
            .args(["-smp", &options.host_cpus.to_string(), "-m", &options.host_memory.to_string()])
            .args(["-display", "none", "-monitor", "none", "-serial", "stdio"])
            .args([
                "-device",
                "virtio-serial-pci",
                "-device",
                "virtserialport,chardev=agent,name=keel",
            ])
            .args(["-chardev", &format!("socket,id=agent,fd={}", theirs.as_raw_fd())])
            .args(["-device", "virtio-9p-pci,fsdev=share,mount_tag=share", "-fsdev"])
            .arg(format!(
                "local,id=share,security_model=none,path={}",
                share.display().to_string().replace(',', ",,")
            ))
            .arg("-kernel")
            .arg(kernel)
            .arg("-initrd")
            .arg(initrd)
            .args(["-append", "console=ttyS0 panic=-1 keel.role=host"])
            // A group of its own: Ctrl-C in the terminal is for us, and we end it.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut qemu = command.spawn().context("run qemu-system-x86_64")?;
        drop(theirs);
        terminal::end_with_us(&qemu);
        let console = Arc::new(Mutex::new(String::new()));
        let log = lab().join("console.log");
        let log = Arc::new(Mutex::new(
            File::create(&log).with_context(|| format!("write {}", log.display()))?,
        ));
        if let (Some(output), Some(error)) = (qemu.stdout.take(), qemu.stderr.take()) {
            follow(output, &console, &log, options.host_console);
            follow(error, &console, &log, true);
        }
        let mut reader = ours.try_clone().context("share the channel to the lab's host")?;
        let (ready, is_ready) = mpsc::channel();
        let sessions = Sessions::default();
        let table = sessions.clone();
        thread::spawn(move || {
            while let Ok(Some(frame)) = Frame::read_from(&mut reader) {
                dispatch(frame, &table, &ready);
            }
            // Whoever still waits for a command then learns that no answer will come.
            lock(&table).clear();
        });
        let host = Self { qemu, channel: Arc::new(Mutex::new(ours)), sessions, next: 1, console };
        if is_ready.recv_timeout(BOOT).is_err() {
            let console = lock(&host.console).clone();
            let last: Vec<_> = console.lines().rev().take(15).collect();
            let last: Vec<_> = last.into_iter().rev().collect();
            bail!("the lab's host did not come up; its last lines:\n{}", last.join("\n"));
        }
        println!("lab: host up after {:.1} s", begun.elapsed().as_secs_f64());
        Ok(host)
    }

    /// Starts a command line of the host's shell, in `/share`; with a terminal of the given rows and columns, or with
    /// pipes.
    pub fn start(&mut self, command: &str, terminal: Option<(u16, u16)>) -> Result<Session> {
        let id = self.next;
        self.next += 1;
        let (sender, events) = mpsc::channel();
        lock(&self.sessions).insert(id, sender);
        let session = Session {
            id,
            channel: self.channel.clone(),
            events,
            text: String::new(),
            errors: String::new(),
            matched: 0,
            status: None,
            console: self.console.clone(),
        };
        session.send(Kind::Start, &Start { terminal, command: command.into() }.encode())?;
        Ok(session)
    }

    /// Runs a command line to its end.
    ///
    /// # Errors
    /// If it has not ended after `timeout` (it is then killed) or the host is gone. An exit status other than 0 is none.
    pub fn run(&mut self, command: &str, timeout: Duration) -> Result<Output> {
        let mut session = self.start(command, None)?;
        let status = session.wait(timeout)?;
        Ok(Output { status, text: std::mem::take(&mut session.text) })
    }

    /// What of the outer kernel's messages shows that the lab itself failed since `from`, a length of the console.
    pub fn lab_failure(&self, from: usize) -> Option<String> {
        let console = lock(&self.console);
        let new = console.get(from..)?;
        new.lines()
            .find(|line| LAB_FAILURES.iter().any(|words| line.contains(words)))
            .map(str::to_owned)
    }

    /// How long the host's console has become, for [`lab_failure`](Self::lab_failure).
    pub fn console_length(&self) -> usize {
        lock(&self.console).len()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // QEMU holds nothing that must be kept.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        terminal::has_ended(&self.qemu);
        let _ = lock(&self.channel).shutdown(Shutdown::Both);
    }
}

fn follow(
    stream: impl std::io::Read + Send + 'static,
    console: &Arc<Mutex<String>>,
    log: &Arc<Mutex<File>>,
    show: bool,
) {
    let (console, log) = (console.clone(), log.clone());
    thread::spawn(move || {
        let mut lines = BufReader::new(stream);
        let mut line = Vec::new();
        while lines.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
            let text = String::from_utf8_lossy(&line).replace('\r', "");
            // QEMU says of each CPU what its software CPU lacks of the model, which is known.
            if show && !text.contains("TCG doesn't support requested feature") {
                eprint!("host: {text}");
            }
            let _ = lock(&log).write_all(text.as_bytes());
            lock(&console).push_str(&text);
            line.clear();
        }
    });
}

fn dispatch(frame: Frame, sessions: &Sessions, ready: &Sender<()>) {
    let event = match (frame.kind, frame.payload.as_slice()) {
        (Kind::Ready, _) => {
            let _ = ready.send(());
            return;
        }
        (Kind::Output, _) => Event::Output(frame.payload),
        (Kind::Error, _) => Event::Error(frame.payload),
        (Kind::Exit, &[a, b, c, d]) => Event::Exit(i32::from_le_bytes([a, b, c, d])),
        _ => return,
    };
    let mut table = lock(sessions);
    let ended = matches!(event, Event::Exit(_));
    if let Some(sender) = table.get(&frame.session) {
        let _ = sender.send(event);
    }
    if ended {
        table.remove(&frame.session);
    }
}

/// A command running in the host. Dropping it leaves the command running.
pub struct Session {
    id: u32,
    channel: Arc<Mutex<UnixStream>>,
    events: Receiver<Event>,
    text: String,
    errors: String,
    matched: usize,
    status: Option<i32>,
    console: Arc<Mutex<String>>,
}

impl Session {
    fn send(&self, kind: Kind, payload: &[u8]) -> Result<()> {
        let frame = Frame::new(self.id, kind, payload.to_vec());
        frame.write_to(&mut *lock(&self.channel)).context("write to the lab's host")
    }

    /// A second handle that can only send, for a thread of its own.
    pub fn sender(&self) -> SessionSender {
        SessionSender { id: self.id, channel: self.channel.clone() }
    }

    /// Types `bytes`.
    pub fn input(&self, bytes: &[u8]) -> Result<()> {
        self.sender().input(bytes)
    }

    /// Sends a signal to the command's process group.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.send(Kind::Signal, &signal.as_raw().to_le_bytes())
    }

    /// The next thing the command says.
    ///
    /// # Errors
    /// If nothing comes until `deadline`, or the host is gone.
    pub fn event(&mut self, deadline: Instant) -> Result<Event> {
        let left = deadline.saturating_duration_since(Instant::now());
        let event = self.events.recv_timeout(left).map_err(|error| match error {
            RecvTimeoutError::Timeout => anyhow!("timed out"),
            RecvTimeoutError::Disconnected => {
                let console = lock(&self.console);
                let last: Vec<_> = console.lines().rev().take(5).collect();
                anyhow!("the lab's host is gone; its last lines, last first:\n{}", last.join("\n"))
            }
        })?;
        match &event {
            Event::Output(bytes) => self.text.push_str(&String::from_utf8_lossy(bytes)),
            Event::Error(bytes) => {
                let text = String::from_utf8_lossy(bytes);
                self.text.push_str(&text);
                self.errors.push_str(&text);
            }
            Event::Exit(status) => self.status = Some(*status),
        }
        Ok(event)
    }

    /// Everything the command has written so far.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// What of it was on standard error.
    pub fn errors(&self) -> &str {
        &self.errors
    }

    /// Waits for the next whole line that contains `words` and gives it; the next call looks after it.
    ///
    /// # Errors
    /// If it does not come within `timeout` or the command ends: with what it last wrote.
    pub fn expect(&mut self, words: &str, timeout: Duration) -> Result<String> {
        let deadline = Instant::now() + timeout;
        loop {
            while let Some(length) = self.text[self.matched..].find('\n') {
                let line = self.text[self.matched..self.matched + length]
                    .trim_end_matches('\r')
                    .to_owned();
                self.matched += length + 1;
                if line.contains(words) {
                    return Ok(line);
                }
            }
            if let Some(status) = self.status {
                bail!(
                    "the command ended with status {status} before it wrote {words:?}; {}",
                    self.tail()
                );
            }
            if let Err(error) = self.event(deadline) {
                bail!("waiting for {words:?}: {error}; {}", self.tail());
            }
        }
    }

    /// Waits for the command to end and gives its status.
    ///
    /// # Errors
    /// If it has not ended within `timeout`: it is then killed.
    pub fn wait(&mut self, timeout: Duration) -> Result<i32> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.status {
                return Ok(status);
            }
            if let Err(error) = self.event(deadline) {
                let _ = self.signal(Signal::KILL);
                bail!("waiting for the command to end: {error}; {}", self.tail());
            }
        }
    }

    /// The command's last lines, for a message.
    pub fn tail(&self) -> String {
        let lines: Vec<_> = self.text.lines().rev().take(12).collect();
        let lines: Vec<_> =
            lines.into_iter().rev().map(|line| format!("    | {}", line.trim_end())).collect();
        if lines.is_empty() {
            "it wrote nothing".into()
        } else {
            format!("its last lines:\n{}", lines.join("\n"))
        }
    }
}

/// The sending half of a [`Session`].
#[derive(Clone)]
pub struct SessionSender {
    id: u32,
    channel: Arc<Mutex<UnixStream>>,
}

impl SessionSender {
    /// Types `bytes`.
    pub fn input(&self, bytes: &[u8]) -> Result<()> {
        for chunk in bytes.chunks(MAX_PAYLOAD) {
            let frame = Frame::new(self.id, Kind::Input, chunk.to_vec());
            frame.write_to(&mut *lock(&self.channel)).context("write to the lab's host")?;
        }
        Ok(())
    }

    /// Ends the command's input.
    pub fn end_of_input(&self) -> Result<()> {
        Frame::new(self.id, Kind::Input, Vec::new())
            .write_to(&mut *lock(&self.channel))
            .context("write to the lab's host")
    }

    /// Tells the terminal's new size.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        let payload = [rows.to_le_bytes(), columns.to_le_bytes()].concat();
        Frame::new(self.id, Kind::Resize, payload)
            .write_to(&mut *lock(&self.channel))
            .context("write to the lab's host")
    }
}
