//! A stopped guest as a file, and back.
//!
//! Keel's own and only until the migration stream is there (`-save`, `-restore`). The file: a line that names it, the length of a JSON
//! document and the document (CPUs, VM, devices), then records of RAM, each a frame number and its page, a record of frame 2^64 - 1 as
//! the end, and a CRC-32C of all that. Pages of zeroes are left out. Numbers are little-endian.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::Path;

use keel_device_model::{Clock, Nanos, Section};
use keel_hypervisor::{CpuState, VmState};
use keel_memory::layout::PAGE_SIZE;
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;
use vm_memory::{Bytes, GuestAddress};

use crate::cpu;
use crate::failure::Failure;
use crate::machine::Machine;

const MAGIC: &[u8] = b"keel snapshot 1\n";
/// The end of the pages.
const END: u64 = u64::MAX;
/// The longest JSON document that is read: some 100 KiB a CPU, of which there can be 255.
const MOST_JSON: u64 = 64 << 20;

/// Everything but RAM.
#[derive(Serialize, Deserialize)]
struct State {
    ram: u64,
    clock: Nanos,
    vm: VmState,
    cpus: Vec<CpuState>,
    devices: Vec<Section>,
}

/// Writes a stopped machine to a file, which has its name only once it is whole.
pub fn save(machine: &Machine, path: &Path) -> Result<(), Failure> {
    let mut cpus = Vec::with_capacity(machine.cpus.len());
    for cpu in &machine.cpus {
        cpus.push(cpu::lock(cpu).save()?);
    }
    let state = State {
        ram: machine.ram.size(),
        clock: machine.clock.now(),
        vm: machine.vm.save()?,
        cpus,
        devices: machine.devices.save()?,
    };
    write(machine, &state, path)
        .map_err(|error| Failure::io(&format!("write {}", path.display()), error))
}

fn write(machine: &Machine, state: &State, path: &Path) -> io::Result<()> {
    let directory =
        path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // A rename would put the snapshot in the place of a device.
    if path.symlink_metadata().is_ok_and(|there| !there.is_file()) {
        return Err(io::Error::other("it is there and no regular file"));
    }
    let file = NamedTempFile::new_in(directory)?;
    let mut out = Summed { inner: BufWriter::with_capacity(1 << 20, file), sum: 0 };
    out.write_all(MAGIC)?;
    let json = serde_json::to_vec(state)?;
    out.write_all(&(json.len() as u64).to_le_bytes())?;
    out.write_all(&json)?;
    machine.ram.for_each_page(|gfn, page| -> Result<(), PageError> {
        out.write_all(&gfn.to_le_bytes())?;
        Ok(out.write_all(page)?)
    })?;
    out.write_all(&END.to_le_bytes())?;
    let sum = out.sum;
    out.write_all(&sum.to_le_bytes())?;
    let file = out.inner.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    File::open(directory)?.sync_all()
}

/// Gives a machine that has never run the state in a file. On an error the machine must not be run.
pub fn restore(machine: &Machine, path: &Path) -> Result<(), Failure> {
    let name = path.display();
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::UnexpectedEof => {
            Failure::message(format!("{name} is cut short: it is no whole snapshot"))
        }
        _ => Failure::io(&format!("read {name}"), error),
    };
    let file = File::open(path).map_err(failed)?;
    let mut input = Summed { inner: BufReader::with_capacity(1 << 20, file), sum: 0 };
    let mut magic = [0; MAGIC.len()];
    input.read_exact(&mut magic).map_err(failed)?;
    if magic != MAGIC {
        return Err(Failure::message(format!("{name} is no snapshot of this version of Keel")));
    }
    let len = read_u64(&mut input).map_err(failed)?;
    if len > MOST_JSON {
        return Err(Failure::message(format!(
            "{name} is damaged: a state of {len} bytes can not be"
        )));
    }
    let mut json = vec![0; len as usize];
    input.read_exact(&mut json).map_err(failed)?;
    let state: State = serde_json::from_slice(&json)
        .map_err(|error| Failure::message(format!("{name} is damaged: {error}")))?;
    if state.ram != machine.ram.size() || state.cpus.len() != machine.cpus.len() {
        return Err(Failure::message(format!(
            "{name} is of a machine with {} MiB of RAM and {} CPUs, this one has {} and {}: start it with the same -m and -smp",
            state.ram >> 20,
            state.cpus.len(),
            machine.ram.size() >> 20,
            machine.cpus.len()
        )));
    }
    let mut page = [0; PAGE_SIZE as usize];
    loop {
        let gfn = read_u64(&mut input).map_err(failed)?;
        if gfn == END {
            break;
        }
        input.read_exact(&mut page).map_err(failed)?;
        if !machine.ram.contains(gfn) {
            return Err(Failure::message(format!(
                "{name} is damaged: page {gfn:#x} is not in RAM"
            )));
        }
        machine
            .ram
            .memory()
            .write_slice(&page, GuestAddress(gfn * PAGE_SIZE))
            .map_err(|error| Failure::message(format!("cannot write page {gfn:#x}: {error}")))?;
    }
    let sum = input.sum;
    let mut stored = [0; 4];
    input.read_exact(&mut stored).map_err(failed)?;
    if u32::from_le_bytes(stored) != sum {
        return Err(Failure::message(format!("{name} is damaged: its checksum is wrong")));
    }
    // The clock before the devices, which have deadlines; the VM before its CPUs; devices last, for they raise lines.
    machine.clock.set(state.clock);
    machine.vm.load(&state.vm)?;
    for (cpu, saved) in machine.cpus.iter().zip(&state.cpus) {
        cpu::lock(cpu).load(saved)?;
    }
    machine.devices.restore(&state.devices)?;
    Ok(())
}

fn read_u64(input: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 8];
    input.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// Sums up what passes through.
struct Summed<T> {
    inner: T,
    sum: u32,
}

impl<T: Write> Write for Summed<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.sum = crc32c::crc32c_append(self.sum, &bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl<T: Read> Read for Summed<T> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(bytes)?;
        self.sum = crc32c::crc32c_append(self.sum, &bytes[..read]);
        Ok(read)
    }
}

/// RAM could not be read, or the file not be written.
struct PageError(io::Error);

impl From<io::Error> for PageError {
    fn from(error: io::Error) -> Self {
        PageError(error)
    }
}

impl From<keel_memory::Error> for PageError {
    fn from(error: keel_memory::Error) -> Self {
        PageError(io::Error::other(error))
    }
}

impl From<PageError> for io::Error {
    fn from(error: PageError) -> Self {
        error.0
    }
}
