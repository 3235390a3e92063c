//! The process among others: its PID file, and going to the background.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::unistd::{dup2_stderr, dup2_stdout, setsid};

use crate::failure::Failure;
use crate::run::Outcome;

/// A file with the process number, removed at the end.
pub struct PidFile(PathBuf);

impl PidFile {
    pub fn write(path: &Path) -> Result<Self, Failure> {
        fs::write(path, format!("{}\n", std::process::id()))
            .map_err(|error| Failure::io(&format!("write {}", path.display()), error))?;
        Ok(PidFile(path.into()))
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Tells the program in the background from the one that was called: a VM belongs to the process that made it, so the program is started again
/// rather than forked.
const BACKGROUND: &str = "KEEL_BOOT_BACKGROUND";
const READY: &[u8] = b"ready";

/// Whether this is the program in the background.
pub fn is_background() -> bool {
    std::env::var_os(BACKGROUND).is_some()
}

/// Starts this program again in the background, and waits until its guest is ready to run.
pub fn to_background() -> Result<Outcome, Failure> {
    let failed = |error| Failure::io("go to the background", error);
    let mut child = Command::new("/proc/self/exe")
        .args(std::env::args_os().skip(1))
        .env(BACKGROUND, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let mut said = Vec::new();
    if let Some(pipe) = &mut child.stdout {
        pipe.take(READY.len() as u64).read_to_end(&mut said).map_err(failed)?;
    }
    if said == READY {
        return Ok(Outcome::Quit("-daemonize: the guest runs in the background"));
    }
    // It has said why on standard error.
    let status = child.wait().map_err(failed)?;
    std::process::exit(status.code().unwrap_or(1))
}

/// In the background: leaves the terminal and says that the guest is ready.
pub fn ready() -> Result<(), Failure> {
    let failed = |error: io::Error| Failure::io("go to the background", error);
    setsid().map_err(|error| failed(error.into()))?;
    io::stdout().write_all(READY).and_then(|()| io::stdout().flush()).map_err(failed)?;
    let null = fs::OpenOptions::new().read(true).write(true).open("/dev/null").map_err(failed)?;
    dup2_stdout(null.as_fd()).map_err(|error| failed(error.into()))?;
    dup2_stderr(null.as_fd()).map_err(|error| failed(error.into()))
}
