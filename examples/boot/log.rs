//! What is told: messages on standard error, the log there or in the file of `-D`.

use std::fs::File;
use std::io::{Write, stderr};
use std::sync::{Mutex, PoisonError};

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

/// Prints on standard error, which may be a terminal or a pipe that has gone: no reason for a panic, as `eprint!` has it.
pub fn print(text: &str) {
    let _ = stderr().write_all(text.as_bytes());
}
