//! A terminal for `boot`, and a look at its mode.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::process::Stdio;

use nix::pty::openpty;
use nix::sys::termios::{LocalFlags, OutputFlags, Termios, tcgetattr};

use super::{Boot, Process, Stream};

/// A pseudo-terminal.
pub struct Terminal {
    master: File,
    slave: OwnedFd,
}

impl Terminal {
    pub fn new() -> Self {
        let pair = openpty(None, None).unwrap();
        Terminal { master: pair.master.into(), slave: pair.slave }
    }

    /// Starts `boot` with this terminal as its standard streams.
    pub fn start(&self, boot: Boot) -> Process {
        let stream = || Stdio::from(self.slave.try_clone().unwrap());
        let child = boot.command().stdin(stream()).stdout(stream()).stderr(stream()).spawn();
        Process(child.expect("boot starts"))
    }

    /// What is printed from now on.
    pub fn output(&self) -> Stream {
        Stream::of(self.master.try_clone().unwrap())
    }

    /// Types.
    pub fn send(&self, keys: &[u8]) {
        (&self.master).write_all(keys).unwrap();
    }

    pub fn mode(&self) -> Termios {
        tcgetattr(&self.slave).unwrap()
    }

    /// Whether a shell's user would find it usable: lines, echo and Ctrl-C.
    pub fn is_sane(&self) -> bool {
        let mode = self.mode();
        mode.local_flags.contains(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG)
            && mode.output_flags.contains(OutputFlags::OPOST | OutputFlags::ONLCR)
    }
}
