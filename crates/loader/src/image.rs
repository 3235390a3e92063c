//! Where a kernel or an initrd comes from.

use std::borrow::Cow;
use std::fmt;
use std::fs::{self, File, FileType};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

use keel_memory::Memory;
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryError, Permissions, ReadVolatile};

use crate::{Error, Result};

/// A kernel or an initrd: a file, or bytes.
///
/// Nothing of a file is kept in this process: it is read straight into guest RAM, again at every reset.
pub struct Image {
    name: String,
    source: Source,
    len: u64,
}

enum Source {
    File(File),
    Bytes(Cow<'static, [u8]>),
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

    /// Bytes of this program, or that it has made or received, called `name` in messages.
    pub fn bytes(name: &str, bytes: impl Into<Cow<'static, [u8]>>) -> Image {
        let bytes = bytes.into();
        let len = bytes.len() as u64;
        Image { name: name.to_owned(), source: Source::Bytes(bytes), len }
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

    /// Refuses a kernel that is shorter than its headers say, `need` bytes.
    pub(crate) fn has(&self, need: u64) -> Result<()> {
        if need > self.len {
            return Err(Error::Truncated { name: self.name.clone(), need, have: self.len });
        }
        Ok(())
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
        match source {
            Source::File(file) => {
                file.seek(SeekFrom::Start(offset)).map_err(|source| Error::Read {
                    name: name.clone(),
                    offset,
                    len,
                    source,
                })?;
                fill(memory, gpa, len, file)
            }
            Source::Bytes(bytes) => fill(memory, gpa, len, &mut from(bytes, offset)),
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

/// Fills `len` bytes of guest RAM from `gpa` on.
///
/// Region by region and each to its end, however little one read gives (Linux: at most 2 GiB): `vm-memory`'s own
/// `read_exact_volatile_from` reads once for each region.
fn fill(
    memory: &Memory,
    gpa: u64,
    len: u64,
    source: &mut impl ReadVolatile,
) -> std::result::Result<(), GuestMemoryError> {
    for slice in
        GuestMemory::get_slices(memory, GuestAddress(gpa), len as usize, Permissions::Write)?
    {
        source.read_exact_volatile(&mut slice?)?;
    }
    Ok(())
}

/// The bytes from `offset` on, none past the end.
fn from(bytes: &[u8], offset: u64) -> &[u8] {
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

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::bitmap::BitmapSlice;
    use vm_memory::{Bytes, VolatileMemoryError, VolatileSlice};

    /// Gives at most three bytes a read, and is interrupted in between.
    struct Halting<'a> {
        rest: &'a [u8],
        interrupted: bool,
    }

    impl ReadVolatile for Halting<'_> {
        fn read_volatile<B: BitmapSlice>(
            &mut self,
            buffer: &mut VolatileSlice<B>,
        ) -> std::result::Result<usize, VolatileMemoryError> {
            self.interrupted = !self.interrupted;
            if self.interrupted {
                return Err(VolatileMemoryError::IOError(io::ErrorKind::Interrupted.into()));
            }
            let count = self.rest.len().min(3).min(buffer.len());
            let (first, rest) = self.rest.split_at(count);
            self.rest = rest;
            buffer.copy_from(first);
            Ok(count)
        }
    }

    #[test]
    fn short_and_interrupted_reads_go_on_across_regions() {
        let memory =
            Memory::from_ranges(&[(GuestAddress(0), 4096), (GuestAddress(4096), 4096)]).unwrap();
        let bytes: Vec<u8> = (0..100).collect();
        fill(&memory, 4050, 100, &mut Halting { rest: &bytes, interrupted: false }).unwrap();
        let mut there = [0; 100];
        memory.read_slice(&mut there, GuestAddress(4050)).unwrap();
        assert_eq!(there[..], bytes);
        for (gpa, len) in [(0, 101), (8100, 100)] {
            let mut source = Halting { rest: &bytes, interrupted: false };
            assert!(fill(&memory, gpa, len, &mut source).is_err());
        }
    }
}
