//! Where a kernel or an initrd comes from.

use std::fmt;
use std::fs::{self, File, FileType};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

use keel_memory::Memory;
use vm_memory::{Bytes, GuestAddress};

use crate::{Error, Result};

/// A kernel or an initrd: a file, or bytes of this program.
///
/// Nothing of it is kept in this process: it is read straight into guest RAM, again at every reset.
pub struct Image {
    name: String,
    source: Source,
    len: u64,
}

enum Source {
    File(File),
    Bytes(&'static [u8]),
}

impl Image {
    /// Opens the file at `path`.
    ///
    /// # Errors
    ///
    /// [`Error::Open`], [`Error::NotAFile`], [`Error::Empty`].
    pub fn open(path: &Path) -> Result<Image> {
        let name = path.display().to_string();
        let failed = |source| Error::Open { name: name.clone(), source };
        // Looked at before it is opened: to open a pipe waits for its other end.
        regular(&name, fs::metadata(path).map_err(failed)?.file_type())?;
        let file = File::open(path).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        regular(&name, metadata.file_type())?;
        if metadata.len() == 0 {
            return Err(Error::Empty { name });
        }
        Ok(Image { name, source: Source::File(file), len: metadata.len() })
    }

    /// Bytes of this program, called `name` in messages.
    pub fn bytes(name: &str, bytes: &'static [u8]) -> Image {
        Image { name: name.to_owned(), source: Source::Bytes(bytes), len: bytes.len() as u64 }
    }

    /// What it is called in messages: the path it was opened by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Fills `buffer` from `offset`, as far as there is something, and gives how much that was.
    pub(crate) fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let mut done = 0;
        while done < buffer.len() {
            match self.read_some(offset.saturating_add(done as u64), &mut buffer[done..]) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    let len = buffer.len() as u64;
                    return Err(Error::Read { name: self.name.clone(), offset, len, source });
                }
            }
        }
        Ok(done)
    }

    fn read_some(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        match &self.source {
            Source::File(file) => file.read_at(buffer, offset),
            Source::Bytes(bytes) => {
                let rest = from(bytes, offset);
                let count = rest.len().min(buffer.len());
                buffer[..count].copy_from_slice(&rest[..count]);
                Ok(count)
            }
        }
    }

    /// Reads `len` bytes from `offset` into guest RAM at `gpa`.
    pub(crate) fn load(&mut self, offset: u64, len: u64, memory: &Memory, gpa: u64) -> Result<()> {
        let Image { name, source, .. } = self;
        let to = GuestAddress(gpa);
        let count = len as usize;
        match source {
            Source::File(file) => {
                file.seek(SeekFrom::Start(offset)).map_err(|source| Error::Read {
                    name: name.clone(),
                    offset,
                    len,
                    source,
                })?;
                memory.read_exact_volatile_from(to, file, count)
            }
            Source::Bytes(bytes) => {
                memory.read_exact_volatile_from(to, &mut from(bytes, offset), count)
            }
        }
        .map_err(|source| Error::ReadIntoRam {
            name: name.clone(),
            offset,
            len,
            gpa,
            source,
        })
    }
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image").field("name", &self.name).field("len", &self.len).finish()
    }
}

/// The bytes from `offset` on, none past the end.
fn from(bytes: &'static [u8], offset: u64) -> &'static [u8] {
    usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..)).unwrap_or_default()
}

fn regular(name: &str, kind: FileType) -> Result<()> {
    let what = if kind.is_file() {
        return Ok(());
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a pipe"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "a device"
    };
    Err(Error::NotAFile { name: name.to_owned(), what })
}
