//! A device whose ports do not lie side by side.

use std::sync::Arc;

use keel_device_model::SharedPio;
use keel_hypervisor::Width;

/// Maps a part of a device: an access at offset `n` of where this is mapped reaches the device at offset `by + n`.
///
/// The keyboard controller's ports are 0x60 and 0x64, with another device's between them.
pub struct Shifted {
    io: Arc<dyn SharedPio>,
    by: u16,
}

impl Shifted {
    /// The part of `io` that begins at offset `by`.
    pub fn new(io: Arc<dyn SharedPio>, by: u16) -> Arc<Self> {
        Arc::new(Shifted { io, by })
    }
}

impl SharedPio for Shifted {
    fn read(&self, offset: u16, width: Width) -> u32 {
        self.io.read(self.by.wrapping_add(offset), width)
    }

    fn write(&self, offset: u16, width: Width, value: u32) {
        self.io.write(self.by.wrapping_add(offset), width, value);
    }
}
