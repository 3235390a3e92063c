//! An initrd in guest RAM.

use keel_memory::Memory;
use keel_memory::layout::{HOLE_START, PAGE_SIZE, Range};

use crate::image::Image;
use crate::kernel::Kernel;
use crate::layout::HIGH;
use crate::{Error, Result};

/// Reads `initrd` into the RAM below `ram_end`, as high as `kernel` can use it: out of the way of what the kernel unpacks
/// at its own place. Gives where it is.
///
/// # Errors
///
/// [`Error::Empty`], [`Error::InitrdTooBig`], [`Error::Read`], [`Error::ReadIntoRam`].
pub fn load(initrd: &mut Image, kernel: &Kernel, memory: &Memory, ram_end: u64) -> Result<Range> {
    let len = initrd.len();
    if len == 0 {
        return Err(Error::Empty { name: initrd.name().to_owned() });
    }
    let from = kernel.end.max(HIGH);
    let to = kernel.initrd_limit.min(ram_end);
    let address = to.checked_sub(len).map(|address| address & !(PAGE_SIZE - 1));
    let Some(address) = address.filter(|address| *address >= from) else {
        let more_ram_helps = from.saturating_add(len) <= kernel.initrd_limit.min(HOLE_START);
        return Err(Error::InitrdTooBig {
            name: initrd.name().to_owned(),
            len,
            from,
            to,
            more_ram_helps,
        });
    };
    initrd.load(0, len, memory, address)?;
    Ok(Range { start: address, len })
}
