//! Character devices: what a serial port is connected to on the host.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::openpty;
use nix::sys::signal::SigSet;
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};

use crate::control::Control;
use crate::io_thread::ENDING;
use crate::log;
use crate::terminal::Raw;
use crate::words::Words;

/// A character device as the command line describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The terminal. `keys`: Ctrl-A commands are taken out of the input; `signals`: Ctrl-C ends the program.
    Stdio { keys: bool, signals: bool },
    /// A file that is written over.
    File(PathBuf),
    /// A pseudo-terminal.
    Pty,
    /// A Unix socket: waited at, or connected to.
    Unix { path: PathBuf, server: bool, wait: bool },
    /// Nothing.
    Null,
}

/// What `-serial` says: nothing there at all, a device of its own, or one that `-chardev` has defined.
pub fn parse_serial(text: &str, defined: &[(String, Kind)]) -> Result<Option<Kind>, String> {
    let (head, rest) = text.split_once(':').unwrap_or((text, ""));
    let kind = match (head, rest) {
        ("none", "") => return Ok(None),
        ("null", "") => Kind::Null,
        ("pty", "") => Kind::Pty,
        ("stdio", "") => Kind::Stdio { keys: false, signals: true },
        ("mon", "stdio") => Kind::Stdio { keys: true, signals: false },
        ("file", path) if !path.is_empty() => Kind::File(path.into()),
        ("unix", words) if !words.is_empty() => socket(&Words::parse_type(words, "path")?)?,
        ("chardev", id) => return find(id, defined).map(Some),
        _ => {
            return Err(format!(
                "'{text}' is none of stdio, mon:stdio, file:PATH, pty, unix:PATH[,server=on][,wait=off], null, none, chardev:ID"
            ));
        }
    };
    Ok(Some(kind))
}

/// The device that `-chardev` has defined as `id`.
pub fn find(id: &str, defined: &[(String, Kind)]) -> Result<Kind, String> {
    let found = defined.iter().find(|(known, _)| known == id).map(|(_, kind)| kind.clone());
    found.ok_or_else(|| format!("no -chardev has id={id}"))
}

/// What a `-chardev` says: its ID and what it is.
pub fn parse_chardev(words: &Words) -> Result<(String, Kind), String> {
    let id = words.get("id").ok_or("id=ID is missing")?.to_owned();
    let path = || words.get("path").map(PathBuf::from).ok_or("path=PATH is missing");
    let kind = match words.get("backend").unwrap_or_default() {
        "stdio" => {
            words.only(&["backend", "id", "mux", "signal"])?;
            let keys = words.switch("mux", false)?;
            Kind::Stdio { keys, signals: words.switch("signal", !keys)? }
        }
        "null" => {
            words.only(&["backend", "id"])?;
            Kind::Null
        }
        "pty" => {
            words.only(&["backend", "id"])?;
            Kind::Pty
        }
        "file" => {
            words.only(&["backend", "id", "path"])?;
            Kind::File(path()?)
        }
        "socket" => socket(words)?,
        other => return Err(format!("'{other}' is none of stdio, file, pty, socket, null")),
    };
    Ok((id, kind))
}

fn socket(words: &Words) -> Result<Kind, String> {
    words.only(&["backend", "id", "path", "server", "wait"])?;
    let path = words.get("path").ok_or("path=PATH is missing")?.into();
    let server = words.switch("server", false)?;
    // As in QEMU a server waits for its client before the guest runs, unless told not to.
    Ok(Kind::Unix { path, server, wait: words.switch("wait", true)? })
}

/// An open character device: where output goes and input comes from.
pub struct Chardev {
    pub output: Output,
    pub input: Option<Input>,
    /// Keeps the terminal in raw mode.
    pub raw: Option<Raw>,
    /// Ctrl-A commands are taken out of the input.
    pub keys: bool,
}

/// Where input comes from.
pub enum Input {
    /// A stream that is there from the start.
    Stream(File),
    /// A socket at which one client after another connects, the first perhaps already.
    Listener { listener: UnixListener, path: SocketPath, first: Option<File> },
}

/// A socket's name in the file system, removed when the program ends.
pub struct SocketPath(PathBuf);

impl Drop for SocketPath {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Where a device's output goes. Clones write to the same place.
///
/// Output waits for a slow reader, as a slow line would, but it keeps nobody who wants the machine stopped waiting: what has no room then
/// is sent before the next output. With no reader it is dropped.
#[derive(Clone)]
pub struct Output {
    sink: Arc<Mutex<Sink>>,
    control: Arc<Control>,
}

struct Sink {
    to: Option<File>,
    unsent: Vec<u8>,
}

/// The most that waits for room while the machine is stopped and started over and over.
const MOST_UNSENT: usize = 64 << 10;

impl Output {
    fn new(to: Option<File>, control: &Arc<Control>) -> Self {
        let sink = Sink { to, unsent: Vec::new() };
        Output { sink: Arc::new(Mutex::new(sink)), control: control.clone() }
    }

    /// From now on output goes here.
    pub fn connect(&self, to: Option<File>) {
        let mut sink = self.sink.lock().unwrap_or_else(PoisonError::into_inner);
        *sink = Sink { to, unsent: Vec::new() };
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut sink = self.sink.lock().unwrap_or_else(PoisonError::into_inner);
        let Sink { to, unsent } = &mut *sink;
        let Some(file) = to else { return Ok(bytes.len()) };
        unsent.extend_from_slice(bytes);
        while !unsent.is_empty() {
            // A blocking write could not be called off.
            if !wait_for_room(file, &self.control)? {
                unsent.truncate(MOST_UNSENT);
                break;
            }
            match file.write(unsent) {
                Ok(written) => drop(unsent.drain(..written)),
                // A full pseudo-terminal has nobody who reads it.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => unsent.clear(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    *sink = Sink { to: None, unsent: Vec::new() };
                    return Err(error);
                }
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Waits until a file that may be slow takes more. False: it does not, and the machine is to stop or to end.
fn wait_for_room(file: &File, control: &Control) -> io::Result<bool> {
    let mut waiting = [
        PollFd::new(file.as_fd(), PollFlags::POLLOUT),
        PollFd::new(control.halted().as_fd(), PollFlags::POLLIN),
    ];
    loop {
        match poll(&mut waiting, PollTimeout::NONE) {
            Ok(_) => return Ok(waiting[0].revents().is_some_and(|events| !events.is_empty())),
            Err(nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Opens a character device. `label` says whose it is in messages.
pub fn open(kind: &Kind, label: &str, control: &Arc<Control>) -> Result<Chardev, String> {
    let device = |output: Option<File>, input| Chardev {
        output: Output::new(output, control),
        input,
        raw: None,
        keys: false,
    };
    let failed = |what: String| move |error: io::Error| format!("{label}: {what}: {error}");
    match kind {
        Kind::Null => Ok(device(None, None)),
        Kind::File(path) => {
            let file =
                File::create(path).map_err(failed(format!("cannot write {}", path.display())))?;
            Ok(device(Some(file), None))
        }
        Kind::Stdio { keys, signals } => {
            let raw = Raw::enter(*signals)
                .map_err(|error| format!("{label}: cannot set up the terminal: {error}"))?;
            let copy = |fd: io::Result<OwnedFd>| {
                fd.map(File::from).map_err(failed("cannot use the terminal".into()))
            };
            let output = copy(io::stdout().as_fd().try_clone_to_owned())?;
            let input = copy(io::stdin().as_fd().try_clone_to_owned())?;
            Ok(Chardev { raw, keys: *keys, ..device(Some(output), Some(Input::Stream(input))) })
        }
        Kind::Pty => {
            let opened = open_pty().map_err(failed("cannot open a pseudo-terminal".into()))?;
            let (master, name) = opened;
            log::print(&format!("char device redirected to {name} (label {label})\n"));
            let input = master.try_clone().map_err(failed(name))?;
            Ok(device(Some(master), Some(Input::Stream(input))))
        }
        Kind::Unix { path, server: false, .. } => {
            let stream = UnixStream::connect(path)
                .map_err(failed(format!("cannot connect to {}", path.display())))?;
            let output = stream.try_clone().map_err(failed(path.display().to_string()))?;
            Ok(device(
                Some(OwnedFd::from(output).into()),
                Some(Input::Stream(OwnedFd::from(stream).into())),
            ))
        }
        Kind::Unix { path, server: true, wait } => {
            let listener =
                listen(path).map_err(failed(format!("cannot listen at {}", path.display())))?;
            let path = SocketPath(path.clone());
            let failed = || failed(format!("cannot wait at {}", path.0.display()));
            let mut first = None;
            if *wait {
                log::say(&format!(
                    "waiting for a connection at {} (label {label})",
                    path.0.display()
                ));
                first = wait_for_client(&listener).map_err(failed())?;
            }
            listener.set_nonblocking(true).map_err(failed())?;
            let output = first.as_ref().map(File::try_clone).transpose().map_err(failed())?;
            Ok(device(output, Some(Input::Listener { listener, path, first })))
        }
    }
}

/// Listens at a path, in place of a socket that a program that is gone has left there.
fn listen(path: &PathBuf) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error)
            if error.kind() == io::ErrorKind::AddrInUse && UnixStream::connect(path).is_err() =>
        {
            std::fs::remove_file(path)?;
            UnixListener::bind(path)
        }
        result => result,
    }
}

/// Waits until a client is there, or a signal to end the program is: it stays pending, and ends the machine once that is built.
fn wait_for_client(listener: &UnixListener) -> io::Result<Option<File>> {
    let mut mask = SigSet::empty();
    ENDING.into_iter().for_each(|signal| mask.add(signal));
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    let mut waiting =
        [listener.as_fd(), signals.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
    poll(&mut waiting, PollTimeout::NONE)?;
    if waiting[1].any() == Some(true) {
        return Ok(None);
    }
    let (client, _) = listener.accept()?;
    Ok(Some(OwnedFd::from(client).into()))
}

fn open_pty() -> io::Result<(File, String)> {
    let pair = openpty(None, None)?;
    let mut mode = tcgetattr(&pair.slave)?;
    cfmakeraw(&mut mode);
    tcsetattr(&pair.slave, SetArg::TCSANOW, &mode)?;
    let name = std::fs::read_link(format!("/proc/self/fd/{}", pair.slave.as_raw_fd()))?;
    fcntl(&pair.master, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    // Held open for as long as the program runs: without a slave the master would report an end of file over and over.
    std::mem::forget(pair.slave);
    Ok((pair.master.into(), name.display().to_string()))
}

/// Reads what is there from an input that is ready; an empty result is its end.
pub fn read_ready(input: &mut File, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    match input.read(buffer) {
        Ok(count) => Ok(Some(count)),
        Err(error)
            if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Opens a file for the log or a debug console: appended to nothing, made if need be.
pub fn create(path: &PathBuf) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serial_words() {
        let defined = [("c".to_owned(), Kind::Pty)];
        let parse = |text| parse_serial(text, &defined);
        assert_eq!(parse("none"), Ok(None));
        assert_eq!(parse("file:/tmp/x"), Ok(Some(Kind::File("/tmp/x".into()))));
        assert_eq!(parse("chardev:c"), Ok(Some(Kind::Pty)));
        assert!(parse("chardev:d").unwrap_err().contains("id=d"));
        assert!(parse("stdoi").unwrap_err().contains("stdio"));
        assert_eq!(
            parse("unix:./s,server=on,wait=off"),
            Ok(Some(Kind::Unix { path: "./s".into(), server: true, wait: false }))
        );
        assert_eq!(parse("mon:stdio"), Ok(Some(Kind::Stdio { keys: true, signals: false })));
    }

    #[test]
    fn chardev_words() {
        let parse = |text| parse_chardev(&Words::parse_type(text, "backend").unwrap());
        assert_eq!(parse("file,id=f,path=x"), Ok(("f".into(), Kind::File("x".into()))));
        assert!(parse("file,id=f").unwrap_err().contains("path"));
        assert!(parse("file,path=x").unwrap_err().contains("id"));
        assert!(parse("flie,id=f,path=x").is_err());
    }
}
