//! Where the log goes: standard error, or the file of `-D`.

use std::fs::File;
use std::io::Write;
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
        None => eprint!("{text}"),
    }
}
