//! What the guest runs: a kernel, or the built-in guest.

use keel_loader::acpi::Platform;
use keel_loader::{Entry, Image, Linux};
use keel_memory::Memory;

use crate::config::Config;
use crate::failure::Failure;

/// A kernel with what belongs to it, to be loaded at every start of the machine.
pub struct Software {
    kernel: Image,
    initrd: Option<Image>,
    command_line: String,
    platform: Platform,
}

impl Software {
    /// Opens the files. `platform` is what the kernel is told of the hardware.
    pub fn open(config: &Config, platform: Platform) -> Result<Self, Failure> {
        let kernel = match &config.kernel {
            Some(path) => Image::open(path)?,
            None => Image::bytes("the built-in guest", keel_guests::demo()),
        };
        let initrd = config.initrd.as_deref().map(Image::open).transpose()?;
        Ok(Software { kernel, initrd, command_line: config.command_line.clone(), platform })
    }

    /// Puts it all into RAM. Returns where the first CPU begins.
    pub fn load(&mut self, memory: &Memory) -> Result<Entry, Failure> {
        let linux = Linux {
            kernel: &mut self.kernel,
            initrd: self.initrd.as_mut(),
            command_line: &self.command_line,
            acpi: &self.platform,
        };
        Ok(linux.load(memory)?)
    }
}
