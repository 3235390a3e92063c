//! Whole kernels, made here, into guest RAM; files that are none; files that are hostile.

use std::fs;

use keel_hypervisor::state::CpuState;
use keel_memory::Memory;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use crate::acpi::tests::platform;
use crate::start::Start;
use crate::{Entry, Error, Image, Linux, Result, layout, map};

const MIB: u64 = 1 << 20;
const LOAD: u64 = 16 * MIB;
const PAYLOAD: usize = 0x4000;
const INIT_SIZE: u32 = 8 << 20;

fn memory(len: u64) -> Memory {
    Memory::from_ranges(&[(GuestAddress(0), len as usize)]).unwrap()
}

fn image(name: &str, bytes: &[u8]) -> Image {
    Image::bytes(name, bytes.to_vec())
}

fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

/// A bzImage of two setup sectors and a payload that counts its words.
fn bzimage() -> Vec<u8> {
    let mut file = vec![0; 3 * 512];
    file[0x1f1] = 2; // setup_sects
    put(&mut file, 0x1f4, &(PAYLOAD as u32 / 16).to_le_bytes()); // syssize
    put(&mut file, 0x1fe, &0xaa55_u16.to_le_bytes());
    put(&mut file, 0x200, &[0xeb, 0x66]); // jump: the header ends at 0x268
    put(&mut file, 0x202, b"HdrS");
    put(&mut file, 0x206, &0x020f_u16.to_le_bytes());
    file[0x211] = 1; // loadflags
    put(&mut file, 0x22c, &0x7fff_ffff_u32.to_le_bytes()); // initrd_addr_max
    put(&mut file, 0x230, &0x20_0000_u32.to_le_bytes()); // kernel_alignment
    put(&mut file, 0x236, &1_u16.to_le_bytes()); // xloadflags
    put(&mut file, 0x238, &2047_u32.to_le_bytes()); // cmdline_size
    put(&mut file, 0x258, &LOAD.to_le_bytes()); // pref_address
    put(&mut file, 0x260, &INIT_SIZE.to_le_bytes());
    put(&mut file, 0x268, &[0xcc; 16]); // code behind the header
    file.extend((0..PAYLOAD as u32 / 4).flat_map(u32::to_le_bytes));
    file
}

/// An ELF kernel of one segment with 0x1000 bytes in the file and 0x3000 in memory, and a segment of notes.
fn elf(pvh: Option<u32>) -> Vec<u8> {
    let mut file = vec![0; 0x1000];
    put(&mut file, 0, b"\x7fELF\x02\x01\x01");
    put(&mut file, 16, &2_u16.to_le_bytes()); // ET_EXEC
    put(&mut file, 18, &62_u16.to_le_bytes()); // x86-64
    put(&mut file, 24, &(LOAD + 0x10).to_le_bytes()); // e_entry
    put(&mut file, 32, &64_u64.to_le_bytes()); // e_phoff
    put(&mut file, 54, &56_u16.to_le_bytes()); // e_phentsize
    put(&mut file, 56, &2_u16.to_le_bytes()); // e_phnum
    let mut segment = |at: usize, kind: u32, fields: [u64; 5]| {
        put(&mut file, at, &kind.to_le_bytes());
        for (index, field) in fields.iter().enumerate() {
            put(&mut file, at + 8 + index * 8, &field.to_le_bytes());
        }
    };
    segment(64, 1, [0x1000, 0xffff_ffff_8100_0000, LOAD, 0x1000, 0x3000]);
    segment(120, 4, [0x200, 0, 0, 0x40, 0x40]);
    // Another owner's note first, with a name and a description that have to be rounded up.
    put(
        &mut file,
        0x200,
        &[3, 0, 0, 0, 5, 0, 0, 0, 18, 0, 0, 0, b'A', b'B', 0, 0, 1, 2, 3, 4, 5, 0, 0, 0],
    );
    if let Some(entry) = pvh {
        put(&mut file, 0x218, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0, b'X', b'e', b'n', 0]);
        put(&mut file, 0x228, &entry.to_le_bytes());
    }
    file.extend([0x5a; 0x1000]);
    file
}

fn load(
    kernel: &[u8],
    initrd: Option<&[u8]>,
    command_line: &str,
    memory: &Memory,
) -> Result<Entry> {
    let mut kernel = image("kernel", kernel);
    let mut initrd = initrd.map(|bytes| image("initrd", bytes));
    Linux { kernel: &mut kernel, initrd: initrd.as_mut(), command_line, acpi: &platform(1) }
        .load(memory)
}

fn word<T: vm_memory::ByteValued>(memory: &Memory, gpa: u64) -> T {
    memory.read_obj(GuestAddress(gpa)).unwrap()
}

fn bytes(memory: &Memory, gpa: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
    bytes
}

#[test]
fn a_bzimage_with_initrd_and_command_line() {
    let memory = memory(64 * MIB);
    let initrd = vec![0x77; 5000];
    let entry = load(&bzimage(), Some(&initrd), "console=ttyS0", &memory).unwrap();
    assert_eq!(entry, Entry::Long { rip: LOAD + 0x200 });
    assert_eq!(bytes(&memory, LOAD, PAYLOAD), bzimage()[3 * 512..]);

    let mut state = CpuState::default();
    entry.apply(&mut state);
    let params = state.registers.rsi;
    assert_eq!(word::<u64>(&memory, params + 0x70), layout::BIOS, "acpi_rsdp_addr");
    assert_eq!(word::<u8>(&memory, params + 0x210), 0xff, "type_of_loader");
    assert_eq!(bytes(&memory, params + 0x202, 4), b"HdrS");
    assert_eq!(bytes(&memory, params + 0x268, 16), [0; 16], "nothing but the header is copied");
    let command_line = word::<u32>(&memory, params + 0x228);
    assert_eq!(bytes(&memory, command_line.into(), 14), b"console=ttyS0\0");
    let address = u64::from(word::<u32>(&memory, params + 0x218));
    assert_eq!(address, 64 * MIB - 0x2000, "as high as it fits, on a page");
    assert_eq!(word::<u32>(&memory, params + 0x21c), 5000);
    assert_eq!(bytes(&memory, address, 5000), initrd);
    assert_eq!(bytes(&memory, layout::BIOS, 8), b"RSD PTR ");

    let count = word::<u8>(&memory, params + 0x1e8);
    let map: Vec<(u64, u64, u32)> = (0..u64::from(count))
        .map(|index| params + 0x2d0 + index * 20)
        .map(|at| (word(&memory, at), word(&memory, at + 8), word(&memory, at + 16)))
        .collect();
    assert_eq!(
        map,
        [
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0x400, 2),
            (0xe_0000, 0x2_0000, 2),
            (MIB, 63 * MIB, 1),
            (0xfffb_c000, 0x4_4000, 2),
        ]
    );
}

#[test]
fn loading_again_gives_the_same_whatever_the_guest_did() {
    let memory = memory(64 * MIB);
    let (mut kernel, mut initrd) = (image("kernel", &elf(None)), image("initrd", &[9; 100]));
    let mut load = || {
        Linux {
            kernel: &mut kernel,
            initrd: Some(&mut initrd),
            command_line: "x",
            acpi: &platform(2),
        }
        .load(&memory)
        .unwrap()
    };
    let first = load();
    let low = bytes(&memory, 0, 0x30000);
    let segment = bytes(&memory, LOAD, 0x3000);
    memory.write_slice(&vec![0xee; 0x30000 - 0x500], GuestAddress(0x500)).unwrap();
    memory.write_slice(&vec![0xee; 0x3000], GuestAddress(LOAD)).unwrap();
    assert_eq!(load(), first);
    assert_eq!(bytes(&memory, LOAD, 0x3000), segment, "zeros too");
    for (gpa, len) in [
        (layout::GDT, 48),
        (layout::BOOT_PARAMS, 0x1000),
        (layout::PAGE_TABLES, 0x6000),
        (layout::COMMAND_LINE, 2),
    ] {
        assert_eq!(bytes(&memory, gpa, len), low[gpa as usize..gpa as usize + len]);
    }
}

#[test]
fn a_vmlinux_is_entered_in_64_bit_mode() {
    let memory = memory(32 * MIB);
    assert_eq!(load(&elf(None), None, "", &memory).unwrap(), Entry::Long { rip: LOAD + 0x10 });
    assert_eq!(bytes(&memory, LOAD, 0x1000), [0x5a; 0x1000]);
    assert_eq!(bytes(&memory, LOAD + 0x1000, 0x2000), [0; 0x2000]);
    assert_eq!(bytes(&memory, layout::BOOT_PARAMS + 0x202, 4), b"HdrS");
}

#[test]
fn a_pvh_kernel_gets_start_info() {
    let memory = memory(32 * MIB);
    let entry = load(&elf(Some(LOAD as u32 + 0x40)), Some(&[1; 4096]), "a b", &memory).unwrap();
    assert_eq!(entry, Entry::Protected { eip: LOAD as u32 + 0x40 });
    let mut state = CpuState::default();
    entry.apply(&mut state);
    let info = state.registers.rbx;
    assert_eq!(word::<u32>(&memory, info), 0x336e_c578);
    assert_eq!(word::<u32>(&memory, info + 4), 1, "version");
    assert_eq!(word::<u32>(&memory, info + 12), 1, "modules");
    let module = word::<u64>(&memory, info + 16);
    assert_eq!(word::<u64>(&memory, module), 32 * MIB - 4096);
    assert_eq!(word::<u64>(&memory, module + 8), 4096);
    assert_eq!(bytes(&memory, word(&memory, info + 24), 4), b"a b\0");
    assert_eq!(word::<u64>(&memory, info + 32), layout::BIOS, "RSDP");
    let (map, count) = (word::<u64>(&memory, info + 40), word::<u32>(&memory, info + 48));
    assert_eq!(count, 5);
    assert_eq!(word::<u64>(&memory, map + 3 * 24), MIB);
    assert_eq!(word::<u64>(&memory, map + 3 * 24 + 8), 31 * MIB);
    assert_eq!(word::<u32>(&memory, map + 3 * 24 + 16), 1);
}

#[test]
fn a_position_independent_pvh_kernel_runs_where_it_is_linked() {
    let kernel = changed(elf(Some(LOAD as u32 + 0x40)), 16, &[3]);
    let entry = load(&kernel, None, "", &memory(32 * MIB)).unwrap();
    assert_eq!(entry, Entry::Protected { eip: LOAD as u32 + 0x40 });
}

#[test]
fn what_would_reach_too_far_is_not_written() {
    let memory = memory(MIB);
    let range = map::Range { start: 0, end: 1, kind: map::Kind::Ram };
    let map = vec![range; map::MAX_ENTRIES + 1];
    let long = "x".repeat(layout::COMMAND_LINE_SIZE);
    let start = |command_line, map| Start { command_line, initrd: None, map, rsdp: layout::BIOS };
    for (start, refused) in [
        (start("", &map[..]), true),
        (start(&long, &map[..1]), true),
        (start("a\0", &map[..1]), true),
        (start(&long[1..], &map[1..]), false),
    ] {
        assert_eq!(start.write_linux(&memory, Default::default()).is_err(), refused);
        assert_eq!(start.write_pvh(&memory).is_err(), refused);
    }
}

/// A kernel with bytes changed.
fn changed(mut file: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
    put(&mut file, at, bytes);
    file
}

fn refused(kernel: &[u8], ram: u64) -> Error {
    load(kernel, None, "", &memory(ram)).unwrap_err()
}

#[test]
fn what_is_wrong_with_a_kernel_is_said() {
    type Is = fn(&Error) -> bool;
    let cases: Vec<(&str, Vec<u8>, Is)> = vec![
        ("nothing", vec![], |error| matches!(error, Error::Empty { .. })),
        ("gzip", b"\x1f\x8b\x08\0".to_vec(), |error| {
            matches!(error, Error::NotAKernel { looks: "a gzip file", .. })
        }),
        ("zImage", changed(bzimage(), 0x211, &[0]), |error| {
            matches!(error, Error::Unsupported { .. })
        }),
        ("old", changed(bzimage(), 0x206, &[0xb, 2]), |error| {
            matches!(error, Error::Unsupported { .. })
        }),
        ("32-bit", changed(bzimage(), 0x236, &[0]), |error| {
            matches!(error, Error::Unsupported { .. })
        }),
        ("cut", bzimage()[..5000].to_vec(), |error| {
            matches!(error, Error::Truncated { have: 5000, .. })
        }),
        ("cut in its header", bzimage()[..0x210].to_vec(), |error| {
            matches!(error, Error::Truncated { need: 0x268, have: 0x210, .. })
        }),
        ("cut in its header's end", bzimage()[..0x250].to_vec(), |error| {
            matches!(error, Error::Truncated { have: 0x250, .. })
        }),
        ("cut before its header", changed(bzimage(), 0, b"MZ")[..0x205].to_vec(), |error| {
            matches!(error, Error::Truncated { have: 0x205, .. })
        }),
        ("no code", changed(bzimage(), 0x1f4, &[0x20, 0]), |error| {
            matches!(error, Error::Damaged { .. })
        }),
        ("payload", changed(bzimage(), 0x24c, &[0xff; 4]), |error| {
            matches!(error, Error::Damaged { .. })
        }),
        ("low", changed(bzimage(), 0x258, &[0; 8]), |error| matches!(error, Error::Damaged { .. })),
        ("high", changed(bzimage(), 0x258, &[0xff; 8]), |error| {
            matches!(error, Error::Damaged { .. })
        }),
        ("ELF32", changed(elf(None), 4, &[1]), |error| {
            matches!(error, Error::NotAKernel { looks: "an ELF file for a 32-bit machine", .. })
        }),
        ("Arm", changed(elf(None), 18, &[183]), |error| matches!(error, Error::NotAKernel { .. })),
        ("module", changed(elf(None), 16, &[1]), |error| matches!(error, Error::NotAKernel { .. })),
        ("program", changed(elf(None), 64 + 16, &[0; 8]), |error| {
            matches!(error, Error::NotAKernel { looks: "an ELF program", .. })
        }),
        ("cut ELF", elf(None)[..0x1800].to_vec(), |error| {
            matches!(error, Error::Truncated { need: 0x2000, have: 0x1800, .. })
        }),
        ("cut ELF header", elf(None)[..30].to_vec(), |error| {
            matches!(error, Error::Truncated { need: 64, have: 30, .. })
        }),
        ("ELF magic", elf(None)[..4].to_vec(), |error| {
            matches!(error, Error::Truncated { need: 64, have: 4, .. })
        }),
        ("ELF class", changed(elf(None), 4, &[3]), |error| {
            matches!(error, Error::NotAKernel { looks: "an ELF file of an unknown class", .. })
        }),
        ("library", changed(elf(None), 16, &[3]), |error| {
            matches!(error, Error::NotAKernel { looks: "an ELF library or program", .. })
        }),
        ("headers", changed(elf(None), 56, &[65]), |error| matches!(error, Error::Damaged { .. })),
        ("entry", changed(elf(None), 24, &[0; 8]), |error| matches!(error, Error::Damaged { .. })),
        ("PVH entry", elf(Some(0x1000)), |error| matches!(error, Error::Damaged { .. })),
        ("overlap", changed(elf(None), 120, &elf(None)[64..120]), |error| {
            matches!(error, Error::Damaged { .. })
        }),
    ];
    for (name, kernel, is) in cases {
        let error = refused(&kernel, 64 * MIB);
        assert!(is(&error), "{name}: {error}");
    }
}

#[test]
fn a_kernel_too_big_says_how_much_ram_it_wants() {
    for ram in [MIB, 2 * MIB, 16 * MIB, 23 * MIB] {
        let error = refused(&bzimage(), ram);
        assert!(matches!(error, Error::KernelTooBig { .. }));
        assert!(error.to_string().contains("give the guest at least 24 MiB (-m 24)"), "{error}");
    }
    load(&bzimage(), None, "", &memory(24 * MIB)).unwrap();
}

#[test]
fn an_initrd_has_the_room_the_kernel_leaves() {
    let initrd = vec![1; MIB as usize];
    load(&bzimage(), Some(&initrd), "", &memory(25 * MIB)).unwrap();
    let error = load(&bzimage(), Some(&initrd), "", &memory(25 * MIB - 4096)).unwrap_err();
    assert!(matches!(error, Error::InitrdTooBig { more_ram_helps: true, .. }), "{error}");
    // What the kernel can reach ends before the RAM does: just enough, and a page too little.
    let reach = |end: u64| changed(bzimage(), 0x22c, &((end - 1) as u32).to_le_bytes());
    let memory = memory(64 * MIB);
    load(&reach(25 * MIB), Some(&initrd), "", &memory).unwrap();
    assert_eq!(word::<u32>(&memory, layout::BOOT_PARAMS + 0x218), 24 << 20);
    let error = load(&reach(25 * MIB - 1), Some(&initrd), "", &memory).unwrap_err();
    assert!(matches!(error, Error::InitrdTooBig { more_ram_helps: false, .. }), "{error}");
    assert!(
        matches!(load(&bzimage(), Some(&[]), "", &memory), Err(Error::Empty { name }) if name == "initrd")
    );
}

#[test]
fn a_command_line_has_the_kernels_limit() {
    let memory = memory(64 * MIB);
    load(&bzimage(), None, &"x".repeat(2047), &memory).unwrap();
    let error = load(&bzimage(), None, &"x".repeat(2048), &memory).unwrap_err();
    assert!(matches!(error, Error::CommandLineTooLong { len: 2048, limit: 2047, .. }));
    // However long the kernel says it may be, it must not reach what stands behind it.
    let boundless = changed(bzimage(), 0x238, &[0xff; 4]);
    load(&boundless, None, &"x".repeat(0xffff), &memory).unwrap();
    assert!(load(&boundless, None, &"x".repeat(0x10000), &memory).is_err());
    assert!(matches!(load(&bzimage(), None, "a\0b", &memory), Err(Error::CommandLineNul(1))));
}

#[test]
fn files_are_read_and_what_is_no_file_is_refused() {
    let directory = std::env::temp_dir().join(format!("keel-loader-{}", std::process::id()));
    fs::create_dir_all(&directory).unwrap();
    let path = directory.join("vmlinuz");
    fs::write(&path, bzimage()).unwrap();
    let mut kernel = Image::open(&path).unwrap();
    let memory = memory(64 * MIB);
    for _ in 0..2 {
        memory.write_slice(&[0; 64], GuestAddress(LOAD)).unwrap();
        Linux { kernel: &mut kernel, initrd: None, command_line: "", acpi: &platform(1) }
            .load(&memory)
            .unwrap();
        assert_eq!(bytes(&memory, LOAD, PAYLOAD), bzimage()[3 * 512..]);
    }
    // Cut short after it was opened.
    fs::write(&path, &bzimage()[..0x1000]).unwrap();
    let error = Linux { kernel: &mut kernel, initrd: None, command_line: "", acpi: &platform(1) }
        .load(&memory);
    assert!(matches!(error, Err(Error::ReadIntoRam { .. })), "{error:?}");

    fs::write(&path, b"").unwrap();
    assert!(matches!(Image::open(&path), Err(Error::Empty { .. })));
    assert!(matches!(Image::open(&directory), Err(Error::NotAFile { what: "a directory", .. })));
    assert!(matches!(
        Image::open("/dev/null".as_ref()),
        Err(Error::NotAFile { what: "a device", .. })
    ));
    assert!(matches!(Image::open(&directory.join("none")), Err(Error::Open { .. })));
    fs::remove_dir_all(&directory).unwrap();
}

/// Loads what may be anything, into RAM whose other bytes are seen to stay as they are.
fn survives(kernel: &[u8]) -> std::result::Result<(), TestCaseError> {
    let kernel = image("hostile", kernel);
    let memory = memory(26 * MIB);
    let guards = [0x100_u64, 0x3_0000, 0xa_0000, 0xd_fff8];
    for guard in guards {
        memory.write_obj(0x1122_3344_5566_7788_u64, GuestAddress(guard)).unwrap();
    }
    let mut kernel = kernel;
    let result =
        Linux { kernel: &mut kernel, initrd: None, command_line: "quiet", acpi: &platform(1) }
            .load(&memory);
    match result {
        Ok(Entry::Long { rip }) => prop_assert!((MIB..26 * MIB).contains(&rip)),
        Ok(Entry::Protected { eip }) => prop_assert!((MIB..26 * MIB).contains(&u64::from(eip))),
        Err(error) => prop_assert!(!error.to_string().is_empty()),
    }
    for guard in guards {
        prop_assert_eq!(word::<u64>(&memory, guard), 0x1122_3344_5566_7788);
    }
    Ok(())
}

/// Bytes at places where there are headers, and where the file ends.
fn mutations() -> impl Strategy<Value = (Vec<(usize, Vec<u8>)>, Option<usize>)> {
    let interesting = prop_oneof![
        any::<u8>().prop_map(|byte| vec![byte]),
        any::<u32>().prop_map(|word| word.to_le_bytes().to_vec()),
        any::<u64>().prop_map(|word| word.to_le_bytes().to_vec()),
        Just(vec![0xff; 8]),
        Just(vec![0; 8]),
        (0..40 * MIB).prop_map(|word| word.to_le_bytes().to_vec()),
    ];
    let places = prop_oneof![0_usize..0x100, 0x1f0_usize..0x270];
    (prop::collection::vec((places, interesting), 0..6), prop::option::of(0_usize..0x2000))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn a_hostile_kernel_does_no_harm(which in 0..3, (changes, end) in mutations()) {
        let mut file = match which {
            0 => bzimage(),
            1 => elf(None),
            _ => elf(Some(LOAD as u32 + 0x40)),
        };
        for (at, bytes) in changes {
            put(&mut file, at, &bytes);
        }
        file.truncate(end.unwrap_or(file.len()));
        survives(&file)?;
    }

    #[test]
    fn noise_does_no_harm(magic in 0..3, noise in prop::collection::vec(any::<u8>(), 0x206..0x1000)) {
        let mut file = noise;
        match magic {
            0 => put(&mut file, 0x202, b"HdrS"),
            1 => put(&mut file, 0, b"\x7fELF\x02\x01"),
            _ => {}
        }
        survives(&file)?;
    }
}

/// Kernels of a distribution: `KEEL_KERNELS` names them, with a colon in between.
#[test]
fn kernels_of_a_distribution() {
    let Ok(kernels) = std::env::var("KEEL_KERNELS") else {
        println!("kernels_of_a_distribution: NOT RUN, KEEL_KERNELS names no kernels");
        return;
    };
    for path in kernels.split(':') {
        let mut kernel = Image::open(path.as_ref()).unwrap();
        let memory = memory(128 * MIB);
        let began = std::time::Instant::now();
        let entry = Linux {
            kernel: &mut kernel,
            initrd: Some(&mut image("initrd", &[0; 4096])),
            command_line: "console=ttyS0",
            acpi: &platform(2),
        }
        .load(&memory)
        .unwrap();
        let took = began.elapsed();
        let params = layout::BOOT_PARAMS;
        println!(
            "{path}: {entry:x?}, protocol {:#x}, init_size {} KiB, cmdline_size {}, initrd at {:#x}, e820 entries {}, RSDP {:#x}, {took:?}",
            word::<u16>(&memory, params + 0x206),
            word::<u32>(&memory, params + 0x260) >> 10,
            word::<u32>(&memory, params + 0x238),
            word::<u32>(&memory, params + 0x218),
            word::<u8>(&memory, params + 0x1e8),
            word::<u64>(&memory, params + 0x70),
        );
        let pref = word::<u64>(&memory, params + 0x258);
        assert_eq!(entry, Entry::Long { rip: pref + 0x200 });
        let file = fs::read(path).unwrap();
        let setup = (usize::from(file[0x1f1]) + 1) * 512;
        let size = word::<u32>(&memory, params + 0x1f4) as usize * 16;
        assert!(bytes(&memory, pref, size) == file[setup..setup + size]);
        assert_eq!(word::<u32>(&memory, params + 0x218), (128 << 20) - 4096);
        let small = self::memory(32 * MIB);
        let error =
            Linux { kernel: &mut kernel, initrd: None, command_line: "", acpi: &platform(1) }
                .load(&small);
        println!("with -m 32: {}", error.unwrap_err());
    }
}
