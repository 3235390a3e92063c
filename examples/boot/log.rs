//! What is told: messages on standard error, the log there or in the file of `-D`.

use std::fs::File;
use std::io::{Write, stderr};
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};

use nix::poll::{PollFd, PollFlags, poll};

static FILE: Mutex<Option<File>> = Mutex::new(None);

/// From now on the log goes to a file.
pub fn to(file: File) {
    *FILE.lock().unwrap_or_else(PoisonError::into_inner) = Some(file);
}

/// Writes to the log.
pub fn write(text: &str) {
    match &mut *FILE.lock().unwrap_or_else(PoisonError::into_inner) {
        // A full disk must not end a guest.
        Some(file) => _ = file.write_all(text.as_bytes()),
        None => print(text),
    }
}

/// Tells the user something.
pub fn say(message: &str) {
    print(&format!("boot: {message}\n"));
}

/// Prints on standard error. If it has gone or nobody reads it, that is no reason to panic or to wait for ever, as `eprint!` would.
pub fn print(text: &str) {
    const PATIENCE_MS: u16 = 1000;
    let mut stderr = stderr();
    for line in text.split_inclusive('\n') {
        let room = poll(&mut [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)], PATIENCE_MS);
        if room == Ok(0) || stderr.write_all(line.as_bytes()).is_err() {
            return;
        }
    }
}
