//! The agent: runs commands in the lab host for `xtask`, over a virtio-serial port named `keel`.
//!
//! It ends when `xtask` closes its side of the port, and the host then powers off: no lab outlives the run it is for.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use keel_test_init::frame::{Frame, Kind, Start};
use rustix::process::{Pid, Signal, kill_process_group};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::system::Result;

/// A command that has ended may have left others that hold its output open: after this they are not waited for.
const LAST_OUTPUT: Duration = Duration::from_millis(300);

/// Where the answers go.
type Port = Arc<Mutex<File>>;

/// What the agent keeps of a running command.
struct Session {
    group: Pid,
    input: Sender<Vec<u8>>,
    terminal: Option<Arc<OwnedFd>>,
}

type Sessions = Arc<Mutex<HashMap<u32, Session>>>;

/// Serves until the port is closed.
pub fn run() -> Result<()> {
    let path = find_port()?;
    let said =
        |error: &dyn std::fmt::Display| format!("the agent's port {}: {error}", path.display());
    let mut reader =
        File::options().read(true).write(true).open(&path).map_err(|error| said(&error))?;
    let port: Port = Arc::new(Mutex::new(reader.try_clone().map_err(|error| said(&error))?));
    let sessions = Sessions::default();
    // Writing waits for the other side to be there; reading would give end of file before it is.
    send(&port, 0, Kind::Ready, Vec::new());
    while let Some(frame) = Frame::read_from(&mut reader).map_err(|error| said(&error))? {
        serve(frame, &port, &sessions);
    }
    Ok(())
}

/// The port's device: the one whose name in sysfs is `keel`. Its appearance is waited for, as probing takes its time.
fn find_port() -> Result<PathBuf> {
    let deadline = Instant::now() + Duration::from_secs(30);
    while Instant::now() < deadline {
        for entry in fs::read_dir("/sys/class/virtio-ports").into_iter().flatten().flatten() {
            if fs::read_to_string(entry.path().join("name")).is_ok_and(|name| name.trim() == "keel")
            {
                return Ok(PathBuf::from("/dev").join(entry.file_name()));
            }
        }
        thread::sleep(Duration::from_millis(20));
    }
    Err("there is no virtio-serial port named keel".into())
}

fn send(port: &Port, session: u32, kind: Kind, payload: Vec<u8>) {
    let mut port = port.lock().unwrap_or_else(PoisonError::into_inner);
    // If the other side is gone the reader meets end of file and ends the agent: there is no one to tell.
    if let Err(error) = Frame::new(session, kind, payload).write_to(&mut *port) {
        println!("agent: session {session}: write: {error}");
    }
}

fn serve(frame: Frame, port: &Port, sessions: &Sessions) {
    let Frame { session: id, kind, payload } = frame;
    if kind == Kind::Start {
        if let Err(error) = start(id, &payload, port, sessions) {
            send(port, id, Kind::Error, format!("agent: {error}\n").into_bytes());
            send(port, id, Kind::Exit, 127i32.to_le_bytes().to_vec());
        }
        return;
    }
    let table = sessions.lock().unwrap_or_else(PoisonError::into_inner);
    // A frame that crossed the command's exit on its way is for no one.
    let Some(session) = table.get(&id) else { return };
    match (kind, payload.as_slice()) {
        (Kind::Input, _) => drop(session.input.send(payload)),
        (Kind::Signal, &[a, b, c, d]) => {
            if let Some(signal) = Signal::from_named_raw(i32::from_le_bytes([a, b, c, d])) {
                let _ = kill_process_group(session.group, signal);
            }
        }
        (Kind::Resize, &[r0, r1, c0, c1]) => {
            if let Some(terminal) = &session.terminal {
                let _ = tcsetwinsize(
                    terminal,
                    size(u16::from_le_bytes([r0, r1]), u16::from_le_bytes([c0, c1])),
                );
            }
        }
        _ => {}
    }
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

/// The ends of a new command's streams: where its input is written and its output read.
struct Streams {
    child: Child,
    input: Box<dyn Write + Send>,
    outputs: Vec<(Kind, Box<dyn Read + Send>)>,
    terminal: Option<Arc<OwnedFd>>,
}

fn start(id: u32, payload: &[u8], port: &Port, sessions: &Sessions) -> io::Result<()> {
    let start = Start::decode(payload).ok_or_else(|| io::Error::other("a start that is none"))?;
    let Streams { child, input, outputs, terminal } = match start.terminal {
        Some((rows, columns)) => on_terminal(&start.command, size(rows, columns))?,
        None => on_pipes(&start.command)?,
    };
    let group = Pid::from_child(&child);
    let (sender, receiver) = mpsc::channel();
    sessions
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .insert(id, Session { group, input: sender, terminal });
    thread::spawn(move || feed(input, receiver));
    let (done, all_done) = mpsc::channel();
    for (kind, output) in outputs {
        let (port, done) = (port.clone(), done.clone());
        thread::spawn(move || {
            forward(id, kind, output, &port);
            drop(done);
        });
    }
    drop(done);
    let (port, sessions) = (port.clone(), sessions.clone());
    thread::spawn(move || finish(id, child, all_done, &port, &sessions));
    Ok(())
}

fn shell(words: &[&str], command: &str) -> Command {
    let mut shell = Command::new("/bin/busybox");
    shell.args(words).args(["sh", "-c", command]).current_dir("/share");
    shell
        .env("PATH", "/share/bin:/bin:/sbin:/usr/bin:/usr/sbin")
        .env("HOME", "/root")
        .env("RUST_BACKTRACE", "1");
    shell
}

fn on_pipes(command: &str) -> io::Result<Streams> {
    let mut command = shell(&[], command);
    command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let gone = || io::Error::other("a pipe of the command is not there");
    let input = Box::new(child.stdin.take().ok_or_else(gone)?);
    let outputs: Vec<(Kind, Box<dyn Read + Send>)> = vec![
        (Kind::Output, Box::new(child.stdout.take().ok_or_else(gone)?)),
        (Kind::Error, Box::new(child.stderr.take().ok_or_else(gone)?)),
    ];
    Ok(Streams { child, input, outputs, terminal: None })
}

fn on_terminal(command: &str, size: Winsize) -> io::Result<Streams> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    tcsetwinsize(&master, size)?;
    let name = ptsname(&master, Vec::new())?;
    let name = name.to_str().map_err(io::Error::other)?;
    let slave = || File::options().read(true).write(true).open(name);
    // setsid -c makes the new session's leader of the same process and gives it the terminal, so that its group is its pid.
    let mut command = shell(&["setsid", "-c"], command);
    command.env("TERM", "linux").stdin(slave()?).stdout(slave()?).stderr(slave()?);
    let child = command.spawn()?;
    // Held by `command`, the slave would never be seen closed.
    drop(command);
    let master_file = || master.try_clone().map(File::from);
    let (input, output) = (Box::new(master_file()?), Box::new(master_file()?));
    Ok(Streams {
        child,
        input,
        outputs: vec![(Kind::Output, output)],
        terminal: Some(Arc::new(master)),
    })
}

fn feed(mut input: Box<dyn Write + Send>, from: Receiver<Vec<u8>>) {
    for bytes in from {
        if bytes.is_empty() || input.write_all(&bytes).is_err() {
            break;
        }
    }
}

fn forward(id: u32, kind: Kind, mut output: Box<dyn Read + Send>, port: &Port) {
    let mut buffer = [0; 16 << 10];
    loop {
        match output.read(&mut buffer) {
            Ok(length @ 1..) => send(port, id, kind, buffer[..length].to_vec()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // A terminal all of whose users are gone reads as an error, a pipe as end of file.
            Ok(_) => break,
            Err(error) => {
                println!("agent: session {id}: read: {error}");
                break;
            }
        }
    }
}

fn finish(id: u32, mut child: Child, outputs: Receiver<()>, port: &Port, sessions: &Sessions) {
    let status = match child.wait() {
        Ok(status) => status.code().or(status.signal().map(|signal| 128 + signal)).unwrap_or(127),
        Err(_) => 127,
    };
    // Nothing is ever sent: the channel closes when every forwarder is done.
    let _ = outputs.recv_timeout(LAST_OUTPUT);
    sessions.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
    send(port, id, Kind::Exit, status.to_le_bytes().to_vec());
}
