//! KVM's binary statistics (Linux `Documentation/virt/kvm/api.rst`, 4.133, `KVM_GET_STATS_FD`).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use keel_hypervisor::Statistic;

/// The most counters read of one file: a bound on what a kernel could make us allocate, far above the about 40 there are.
const MOST: u32 = 1024;

/// Reads all counters of a statistics file.
pub(crate) fn read(file: &File) -> io::Result<Vec<Statistic>> {
    // struct kvm_stats_header: flags, name_size, num_desc, id_offset, desc_offset, data_offset.
    let mut header = [0; 24];
    file.read_exact_at(&mut header, 0)?;
    let [_, name_size, count, _, descriptors, data] =
        std::array::from_fn(|field| u32_at(&header, 4 * field));
    if count > MOST || name_size > 256 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{count} statistics of {name_size}-byte names"),
        ));
    }
    // struct kvm_stats_desc: flags u32, exponent i16, size u16, offset u32, bucket_size u32, then the name.
    let stride = 16 + name_size as usize;
    let mut descriptor = vec![0; stride];
    (0..u64::from(count))
        .map(|index| {
            file.read_exact_at(&mut descriptor, u64::from(descriptors) + index * stride as u64)?;
            let size = usize::from(u16::from_le_bytes([descriptor[6], descriptor[7]]));
            let mut values = vec![0; 8 * size];
            file.read_exact_at(&mut values, u64::from(data) + u64::from(u32_at(&descriptor, 8)))?;
            let name = descriptor[16..].split(|byte| *byte == 0).next().unwrap_or_default();
            Ok(Statistic {
                name: String::from_utf8_lossy(name).into_owned(),
                values: values
                    .as_chunks()
                    .0
                    .iter()
                    .map(|bytes| u64::from_ne_bytes(*bytes))
                    .collect(),
            })
        })
        .collect()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..].first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes))
}
