//! This machine's terminal, handed through to a command in the lab; and a clean end when we are told to stop.

use std::io::{IsTerminal, Read, Write, stderr, stdin, stdout};
use std::process::Child;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGWINCH};
use signal_hook::iterator::Signals;

use super::host::{Event, Host};

/// What must be undone when a signal ends us.
#[derive(Default)]
struct Undo {
    children: Vec<Pid>,
    terminal: Option<Termios>,
}

static UNDO: Mutex<Undo> = Mutex::new(Undo { children: Vec::new(), terminal: None });
static WATCHED: OnceLock<()> = OnceLock::new();

fn undo() -> std::sync::MutexGuard<'static, Undo> {
    UNDO.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From now on SIGINT, SIGTERM and SIGHUP end `child` before they end us. If we are killed without warning, the lab's host
/// notices that its channel is closed and powers itself off.
pub fn end_with_us(child: &Child) {
    undo().children.push(Pid::from_child(child));
    WATCHED.get_or_init(|| {
        let Ok(mut signals) = Signals::new([SIGHUP, SIGINT, SIGTERM]) else { return };
        thread::spawn(move || {
            if let Some(signal) = signals.forever().next() {
                let mut undo = undo();
                for child in undo.children.drain(..) {
                    let _ = kill_process(child, Signal::KILL);
                }
                if let Some(before) = undo.terminal.take() {
                    let _ = tcsetattr(stdin(), OptionalActions::Now, &before);
                }
                std::process::exit(128 + signal);
            }
        });
    });
}

/// `child` has been waited for: its number may soon be another's.
pub fn has_ended(child: &Child) {
    let ended = Pid::from_child(child);
    undo().children.retain(|pid| *pid != ended);
}

/// The terminal in raw mode until dropped.
struct Raw;

impl Raw {
    fn enter() -> Result<Self> {
        let before = tcgetattr(stdin()).context("read the terminal's settings")?;
        let mut raw = before.clone();
        raw.make_raw();
        undo().terminal = Some(before);
        tcsetattr(stdin(), OptionalActions::Now, &raw).context("put the terminal into raw mode")?;
        Ok(Self)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = undo().terminal.take() {
            let _ = tcsetattr(stdin(), OptionalActions::Now, &before);
        }
    }
}

/// Runs a command line in the host with our terminal (or, where there is none, our three streams) and gives its exit
/// status. There is no time limit: the user is the judge.
pub fn run(host: &mut Host, command: &str) -> Result<i32> {
    let interactive = stdin().is_terminal() && stdout().is_terminal();
    let size =
        || tcgetwinsize(stdin()).map_or((24, 80), |size| (size.ws_row.max(1), size.ws_col.max(1)));
    let mut session = host.start(command, interactive.then(size))?;
    let raw = if interactive { Some(Raw::enter()?) } else { None };
    let sender = session.sender();
    if interactive {
        let (sender, mut signals) =
            (sender.clone(), Signals::new([SIGWINCH]).context("watch the terminal's size")?);
        thread::spawn(move || {
            for _ in signals.forever() {
                let (rows, columns) = size();
                let _ = sender.resize(rows, columns);
            }
        });
    }
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        loop {
            match stdin().read(&mut buffer) {
                Ok(length @ 1..) if sender.input(&buffer[..length]).is_ok() => {}
                _ => break,
            }
        }
        let _ = sender.end_of_input();
    });
    let status = loop {
        // Nothing may come for hours, so a deadline passing is no error here; the host's end is told apart from it.
        let begun = Instant::now();
        match session.event(begun + Duration::from_secs(3600)) {
            Ok(Event::Output(bytes)) => {
                stdout()
                    .write_all(&bytes)
                    .and_then(|()| stdout().flush())
                    .context("write the command's output")?;
            }
            Ok(Event::Error(bytes)) => {
                stderr().write_all(&bytes).context("write the command's errors")?
            }
            Ok(Event::Exit(status)) => break status,
            Err(_) if begun.elapsed() >= Duration::from_secs(3600) => {}
            Err(error) => return Err(error),
        }
    };
    drop(raw);
    Ok(status)
}
