//! What a file that is no kernel looks like, and what would help.

use crate::Error;

/// How many bytes of a file [`not_a_kernel`] wants to see.
pub const ENOUGH: usize = 4096;

const DECOMPRESS: &str =
    "decompress it first, or give the bzImage (vmlinuz) that a distribution installs";
const DISK: &str = "it is for a disk option: give a kernel (vmlinuz) as the kernel";
const INITRD: &str = "give it as the initrd, and a kernel (vmlinuz) as the kernel";
const GIVE: &str = "give a bzImage (vmlinuz) or an ELF kernel (vmlinux) for 64-bit x86";

/// What files begin with at an offset, what they are, and what to do with one.
const MAGICS: &[(usize, &[u8], &str, &str)] = &[
    (0, b"\x1f\x8b", "a gzip file", DECOMPRESS),
    (0, b"BZh", "a bzip2 file", DECOMPRESS),
    (0, b"\xfd7zXZ\0", "an xz file", DECOMPRESS),
    (0, b"\x5d\0\0", "an LZMA file", DECOMPRESS),
    (0, b"\x89LZO", "an lzop file", DECOMPRESS),
    (0, b"\x02\x21\x4c\x18", "an LZ4 file", DECOMPRESS),
    (0, b"\x04\x22\x4d\x18", "an LZ4 file", DECOMPRESS),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard file", DECOMPRESS),
    (0, b"PK\x03\x04", "a ZIP file", DECOMPRESS),
    (0, b"070701", "a cpio archive (an initrd)", INITRD),
    (0, b"070702", "a cpio archive (an initrd)", INITRD),
    (0, b"070707", "a cpio archive (an initrd)", INITRD),
    (0, b"\xc7\x71", "a cpio archive (an initrd)", INITRD),
    (0, b"QFI\xfb", "a qcow disk image", DISK),
    (0, b"vhdxfile", "a VHDX disk image", DISK),
    (0, b"KDMV", "a VMDK disk image", DISK),
    (0, b"hsqs", "a squashfs file system", DISK),
    (0x438, b"\x53\xef", "an ext file system", DISK),
    (
        0,
        b"!<arch>\n",
        "a Debian package or an ar archive",
        "unpack it (dpkg-deb -x) and give its boot/vmlinuz-*",
    ),
    (0, b"\xed\xab\xee\xdb", "an RPM package", "unpack it and give its vmlinuz"),
    (257, b"ustar", "a tar archive", "unpack it first"),
    (0, b"ANDROID!", "an Android boot image", "unpack it and give the kernel in it"),
    (0, b"\x27\x05\x19\x56", "a U-Boot image", GIVE),
    (0, b"\xd0\x0d\xfe\xed", "a device tree or a U-Boot FIT image", GIVE),
    (0x38, b"ARM\x64", "a kernel for 64-bit Arm", GIVE),
    (0x38, b"RSC\x05", "a kernel for RISC-V", GIVE),
    (
        0,
        b"MZ",
        "an EFI program (PE)",
        "of a unified kernel image give the kernel in its section .linux (objcopy -O binary --only-section=.linux)",
    ),
    (0, b"#!", "a script", GIVE),
    (510, b"\x55\xaa", "a boot sector or a raw disk image", DISK),
];

/// The error for the file `name` that begins with `start`, up to [`ENOUGH`] bytes of it.
pub fn not_a_kernel(name: &str, start: &[u8]) -> Error {
    let (looks, help) = looks(start);
    Error::NotAKernel { name: name.to_owned(), looks, help }
}

fn looks(start: &[u8]) -> (&'static str, &'static str) {
    let known = MAGICS.iter().find(|(offset, magic, ..)| {
        start.get(*offset..).is_some_and(|rest| rest.starts_with(magic))
    });
    if let Some(&(_, _, looks, help)) = known {
        return (looks, help);
    }
    let printable = |byte: &u8| matches!(byte, b'\t' | b'\n' | b'\r' | 0x20..=0x7e | 0x80..);
    if start.iter().all(|byte| *byte == 0) {
        ("nothing but zeros", "copy or download it again")
    } else if start.iter().all(printable) {
        ("text", GIVE)
    } else {
        ("data of a kind not known here", GIVE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_known_file_is_called_by_its_name() {
        for (offset, magic, name, _) in MAGICS {
            let mut file = vec![0xff; ENOUGH];
            file[*offset..offset + magic.len()].copy_from_slice(magic);
            assert_eq!(looks(&file).0, *name);
            // Cut short inside what it is known by.
            assert_ne!(looks(&file[..offset + magic.len() - 1]).0, *name);
        }
    }

    #[test]
    fn the_rest_is_zeros_text_or_data() {
        assert_eq!(looks(&[0; 100]).0, "nothing but zeros");
        assert_eq!(looks("Grüße\n".as_bytes()).0, "text");
        assert_eq!(looks(&[1, 2, 3]).0, "data of a kind not known here");
    }
}
