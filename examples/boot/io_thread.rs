//! The thread that waits for the host: keys and sockets, signals, timers, and what the machine is asked for.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use keel_device_model::{Alarm, Clock, HostClock, Nanos, Seat};
use keel_devices::serial::Serial;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::chardev::{Input, Output, SocketPath, read_ready};
use crate::control::{Control, Event};
use crate::keys::{Key, Keys};
use crate::log;
use crate::run::Supervisor;
use crate::terminal::Raw;

/// The signals that end a guest.
pub const ENDING: [Signal; 3] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];
/// The signals that end, save or start a guest.
const SIGNALS: [Signal; 5] =
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGCONT];

/// Everything the thread waits for. Built before it starts; threads started later inherit the blocked signals.
pub struct IoThread {
    events: EventManager<Box<dyn MutEventSubscriber + Send>>,
    raw: Option<Raw>,
}

impl IoThread {
    pub fn new() -> io::Result<Self> {
        let events = EventManager::new().map_err(io::Error::other)?;
        Ok(IoThread { events, raw: None })
    }

    /// Blocks the signals this program acts on, in this thread and those it starts, and waits for them here.
    pub fn watch_signals(&mut self, control: &Arc<Control>) -> io::Result<()> {
        let mut mask = SigSet::empty();
        SIGNALS.into_iter().for_each(|signal| mask.add(signal));
        mask.thread_block()?;
        let fd = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        self.events.add_subscriber(Box::new(Signals { fd, control: control.clone() }));
        Ok(())
    }

    /// Gives a serial port its input.
    pub fn watch_serial(
        &mut self,
        serial: &Arc<Seat<Serial>>,
        input: Input,
        output: Output,
        keys: bool,
        control: &Arc<Control>,
    ) -> io::Result<()> {
        let room = EventFd::new(EFD_NONBLOCK)?;
        let ring = room.try_clone()?;
        serial.with(|serial, _| {
            serial.on_room(Box::new(move || {
                // Fails only if it has been written 2^64 - 2 times and not been read.
                let _ = ring.write(1);
            }));
        });
        let (stream, listener) = match input {
            Input::Stream(file) => (Some(file), None),
            Input::Listener { listener, path, first } => {
                (first, Some((File::from(OwnedFd::from(listener)), path)))
            }
        };
        self.events.add_subscriber(Box::new(SerialInput {
            serial: serial.clone(),
            output,
            stream,
            listener,
            room,
            waiting: Vec::new(),
            keys: keys.then(Keys::default),
            control: control.clone(),
        }));
        Ok(())
    }

    /// Calls `expire` when the timer rings.
    pub fn watch_alarm(&mut self, timer: Arc<Timer>, expire: Box<dyn Fn() + Send>) {
        self.events.add_subscriber(Box::new(Ringing { timer, expire }));
    }

    /// Keeps the terminal in raw mode as long as this thread runs.
    pub fn keep(&mut self, raw: Raw) {
        self.raw = Some(raw);
    }

    /// Gives the machine's events to the supervisor.
    pub fn watch_machine(&mut self, supervisor: Supervisor) {
        self.events.add_subscriber(Box::new(supervisor));
    }

    /// Waits and acts, until the machine is to end.
    pub fn run(mut self, control: &Control) -> io::Result<()> {
        while !control.ending() {
            self.events.run().map_err(io::Error::other)?;
        }
        Ok(())
    }
}

struct Signals {
    fd: SignalFd,
    control: Arc<Control>,
}

impl MutEventSubscriber for Signals {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, &self.fd, EventSet::IN);
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        while let Ok(Some(info)) = self.fd.read_signal() {
            self.control.post(match Signal::try_from(info.ssi_signo as i32) {
                Ok(Signal::SIGUSR1) => Event::Save,
                Ok(Signal::SIGCONT) => Event::Start,
                Ok(signal) => Event::Quit(signal.as_str()),
                Err(_) => continue,
            });
        }
    }
}

/// A serial port's input: a stream, or the clients of a socket, one after the other.
struct SerialInput {
    serial: Arc<Seat<Serial>>,
    output: Output,
    stream: Option<File>,
    listener: Option<(File, SocketPath)>,
    /// Written when the port has room again.
    room: EventFd,
    /// What has been read and the port had no room for. While there is some, nothing more is read.
    waiting: Vec<u8>,
    keys: Option<Keys>,
    control: Arc<Control>,
}

impl SerialInput {
    fn read(&mut self, ops: &mut EventOps<'_>) {
        let mut buffer = [0; 512];
        let Some(stream) = &mut self.stream else { return };
        match read_ready(stream, &mut buffer) {
            Ok(None) => {}
            Ok(Some(count)) if count > 0 => {
                match &mut self.keys {
                    None => self.waiting.extend_from_slice(&buffer[..count]),
                    Some(keys) => {
                        for key in keys.feed(&buffer[..count]) {
                            match key {
                                Key::Data(byte) => self.waiting.push(byte),
                                Key::Quit => self.control.post(Event::Quit("Ctrl-A x")),
                                Key::Break => {
                                    self.serial.with(|serial, lent| serial.receive_break(lent))
                                }
                                Key::Say(text) => log::print(text),
                            }
                        }
                    }
                }
                self.deliver(ops);
            }
            // The end of the stream, or an error that says the same.
            Ok(Some(_)) | Err(_) => self.disconnect(ops),
        }
    }

    /// Gives the port what it has room for; reads no further while some is left.
    fn deliver(&mut self, ops: &mut EventOps<'_>) {
        let taken = self.serial.with(|serial, lent| serial.receive(&self.waiting, lent));
        self.waiting.drain(..taken);
        if let Some(stream) = &self.stream {
            let wanted = if self.waiting.is_empty() { EventSet::IN } else { EventSet::empty() };
            // A stream that could not be waited for is not here.
            let _ = ops.modify(Events::new(stream, wanted));
        }
    }

    fn connect(&mut self, ops: &mut EventOps<'_>) {
        let Some((listener, _)) = &self.listener else { return };
        let listener = listener
            .try_clone()
            .map(|file| std::os::unix::net::UnixListener::from(OwnedFd::from(file)));
        let Ok((client, _)) = listener.and_then(|listener| listener.accept()) else { return };
        if self.stream.is_some() {
            // One client at a time: the next one is hung up on.
            return;
        }
        let Ok(output) = client.try_clone() else { return };
        let client = File::from(OwnedFd::from(client));
        watch(ops, &client, EventSet::IN);
        self.stream = Some(client);
        self.output.connect(Some(OwnedFd::from(output).into()));
    }

    fn disconnect(&mut self, ops: &mut EventOps<'_>) {
        if let Some(stream) = self.stream.take() {
            let _ = ops.remove(Events::empty(&stream));
        }
        if self.listener.is_some() {
            self.output.connect(None);
        }
    }
}

impl MutEventSubscriber for SerialInput {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, &self.room, EventSet::IN);
        if let Some(stream) = &self.stream {
            // A plain file or /dev/null can not be waited for; its input is read whole as the port takes it.
            if ops.add(Events::new(stream, EventSet::IN)).is_err() {
                self.stream = None;
            }
        }
        if let Some((listener, _)) = &self.listener {
            watch(ops, listener, EventSet::IN);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let fd = events.fd();
        if fd == self.room.as_raw_fd() {
            let _ = self.room.read();
            self.deliver(ops);
        } else if self.listener.as_ref().is_some_and(|(listener, _)| listener.as_raw_fd() == fd) {
            self.connect(ops);
        } else {
            self.read(ops);
        }
    }
}

/// A host timer that rings at virtual times.
pub struct Timer {
    fd: TimerFd,
    clock: Arc<HostClock>,
}

impl Timer {
    pub fn new(clock: Arc<HostClock>) -> io::Result<Arc<Self>> {
        let fd = TimerFd::new(
            ClockId::CLOCK_MONOTONIC,
            TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK,
        )?;
        Ok(Arc::new(Timer { fd, clock }))
    }
}

impl Alarm for Timer {
    fn arm(&self, deadline: Option<Nanos>) {
        let armed = match deadline {
            None => self.fd.unset(),
            Some(deadline) => {
                // Zero would disarm it.
                let wait = deadline.saturating_sub(self.clock.now()).max(1);
                let wait = TimeSpec::from_duration(std::time::Duration::from_nanos(wait));
                self.fd.set(Expiration::OneShot(wait), TimerSetTimeFlags::empty())
            }
        };
        // A valid timer takes every valid time.
        debug_assert!(armed.is_ok());
    }
}

struct Ringing {
    timer: Arc<Timer>,
    expire: Box<dyn Fn() + Send>,
}

impl MutEventSubscriber for Ringing {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, &TimerSource(&self.timer), EventSet::IN);
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        // A timer that has been set anew since has nothing to read, and would block.
        let _ = self.timer.fd.wait();
        (self.expire)();
    }
}

struct TimerSource<'a>(&'a Timer);

impl AsRawFd for TimerSource<'_> {
    fn as_raw_fd(&self) -> i32 {
        use std::os::fd::AsFd;
        self.0.fd.as_fd().as_raw_fd()
    }
}

/// Waits for a source that can be waited for, as eventfds, timers, sockets and signals can.
pub fn watch(ops: &mut EventOps<'_>, source: &impl AsRawFd, events: EventSet) {
    let added = ops.add(Events::new(source, events));
    debug_assert!(added.is_ok(), "{added:?}");
}
