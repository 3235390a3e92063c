//! The tables as an operating system reads them, and as `iasl` does where it is installed.

use std::io::ErrorKind;
use std::process::Command;

use super::*;

const RAM_END: u64 = 128 << 20;

pub(crate) fn platform(cpus: u32) -> Platform {
    Platform {
        apic_ids: (0..cpus).collect(),
        io_apic: IoApic { id: 0, address: 0xfec0_0000, gsi_base: 0 },
        legacy_pic: true,
        legacy_timer: true,
        sci_irq: 9,
        pm1_event: 0x600,
        pm1_control: 0x604,
        pm_timer: 0x608,
        reset: Reset { port: 0xcf9, value: 0xf },
        s5_sleep_type: 5,
        serial: vec![Serial { port: 0x3f8, irq: 4 }, Serial { port: 0x2f8, irq: 3 }],
        rtc: true,
        pvpanic: Some(0x505),
        i8042: true,
        vga: false,
        aml: vec![],
    }
}

/// The tables as they are found in guest RAM.
struct Found(Tables);

impl Found {
    fn of(platform: &Platform) -> Found {
        Found(Tables::place(platform, RAM_END).unwrap())
    }

    fn at(&self, gpa: u64) -> &[u8] {
        let holds =
            |piece: &&(u64, Vec<u8>)| (piece.0..piece.0 + piece.1.len() as u64).contains(&gpa);
        let (base, bytes) = self.0.pieces.iter().find(holds).unwrap();
        &bytes[(gpa - base) as usize..]
    }

    /// A table with its checksum seen to be right.
    fn table(&self, gpa: u64, signature: &[u8; 4]) -> &[u8] {
        let bytes = self.at(gpa);
        let table = &bytes[..number(bytes, 4, 4) as usize];
        assert_eq!(&table[..4], signature);
        assert_eq!(sum(table), 0, "{}", String::from_utf8_lossy(signature));
        table
    }

    /// From the RSDP on: FADT, MADT, FACS, DSDT.
    fn all(&self) -> [&[u8]; 4] {
        let rsdp = self.at(BIOS);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!((sum(&rsdp[..20]), sum(&rsdp[..36])), (0, 0));
        let xsdt = self.table(number(rsdp, 24, 8), b"XSDT");
        assert_eq!(xsdt.len(), 36 + 2 * 8);
        let fadt = self.table(number(xsdt, 36, 8), b"FACP");
        let madt = self.table(number(xsdt, 44, 8), b"APIC");
        let facs = number(fadt, 36, 4);
        assert_eq!(facs % 64, 0);
        let dsdt = self.table(number(fadt, 40, 4), b"DSDT");
        [fadt, madt, &self.at(facs)[..64], dsdt]
    }
}

fn number(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len].iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
}

/// The structures of a MADT.
fn structures(madt: &[u8]) -> Vec<&[u8]> {
    let mut rest = &madt[44..];
    let mut all = Vec::new();
    while !rest.is_empty() {
        let (first, others) = rest.split_at(usize::from(rest[1]));
        all.push(first);
        rest = others;
    }
    all
}

#[test]
fn every_table_is_found_from_the_root_pointer() {
    let found = Found::of(&platform(2));
    let [fadt, _, facs, _] = found.all();
    assert_eq!(fadt.len(), 276);
    assert_eq!(&facs[..4], b"FACS");
    assert_eq!(found.0.ram_end, RAM_END, "all in the BIOS area");
}

#[test]
fn the_fadt_tells_the_registers() {
    let found = Found::of(&platform(2));
    let [fadt, ..] = found.all();
    assert_eq!(number(fadt, 46, 2), 9, "SCI_INT");
    assert_eq!(number(fadt, 48, 4), 0, "SMI_CMD");
    assert_eq!((number(fadt, 56, 4), fadt[88]), (0x600, 4), "PM1a_EVT");
    assert_eq!((number(fadt, 64, 4), fadt[89]), (0x604, 2), "PM1a_CNT");
    assert_eq!((number(fadt, 76, 4), fadt[91]), (0x608, 4), "PM_TMR");
    assert_eq!(fadt[108], 0x32, "CENTURY");
    assert_eq!(number(fadt, 109, 2), 0b111, "ISA devices, 8042, no VGA; a clock");
    let flags = number(fadt, 112, 4);
    assert_eq!(flags >> 20 & 1, 0, "not hardware-reduced");
    assert_eq!(flags >> 4 & 1, 0, "the power button is a fixed register");
    assert_eq!((flags >> 8 & 1, flags >> 10 & 1), (1, 1), "32-bit timer, reset register");
    assert_eq!(
        &fadt[116..129],
        &[1, 8, 0, 1, 0xf9, 0x0c, 0, 0, 0, 0, 0, 0, 0xf],
        "RESET_REG, RESET_VALUE"
    );
    // What is told twice is told alike.
    for (old, new) in [(56, 148), (64, 172), (76, 208)] {
        assert_eq!(fadt[new], 1, "a port");
        assert_eq!(number(fadt, old, 4), number(fadt, new + 4, 8));
    }
}

#[test]
fn the_madt_tells_cpus_and_interrupts() {
    let found = Found::of(&platform(2));
    let [_, madt, ..] = found.all();
    assert_eq!((number(madt, 36, 4), number(madt, 40, 4)), (0xfee0_0000, 1));
    let expected: [&[u8]; 6] = [
        &[0, 8, 0, 0, 1, 0, 0, 0],
        &[0, 8, 1, 1, 1, 0, 0, 0],
        &[1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0],
        &[2, 10, 0, 0, 2, 0, 0, 0, 0, 0],
        &[2, 10, 0, 9, 9, 0, 0, 0, 0xd, 0],
        &[4, 6, 0xff, 0, 0, 1],
    ];
    assert_eq!(structures(madt), expected);
}

#[test]
fn what_is_not_there_is_not_told() {
    let mut bare = platform(1);
    (bare.legacy_pic, bare.legacy_timer, bare.rtc, bare.i8042) = (false, false, false, false);
    (bare.pvpanic, bare.serial, bare.vga) = (None, vec![], true);
    let found = Found::of(&bare);
    let [fadt, madt, _, dsdt] = found.all();
    assert_eq!((fadt[108], number(fadt, 109, 2)), (0, 1 << 5));
    assert_eq!(number(madt, 40, 4), 0);
    assert_eq!(structures(madt).len(), 4, "CPU, I/O APIC, SCI, NMI");
    for name in [&b"PEVT"[..], b"RTC_", b"S000"] {
        assert!(!dsdt.windows(4).any(|window| window == name));
    }
}

#[test]
fn apic_ids_from_255_on_are_those_of_x2apics() {
    let mut many = platform(0);
    many.apic_ids = vec![0, 254, 255, 300];
    let found = Found::of(&many);
    let [fadt, madt, ..] = found.all();
    let kinds: Vec<_> = structures(madt).iter().map(|entry| entry[0]).collect();
    assert_eq!(kinds, [0, 0, 9, 9, 1, 2, 2, 4, 10]);
    assert_eq!(structures(madt)[3], [9, 16, 0, 0, 44, 1, 0, 0, 1, 0, 0, 0, 3, 0, 0, 0]);
    assert_eq!(number(fadt, 112, 4) >> 19 & 1, 1, "physical destinations only");
}

#[test]
fn tables_too_large_for_the_bios_area_take_the_end_of_ram() {
    let mut large = platform(1);
    large.aml = vec![vec![0xa3; 100_000]; 2]; // Noop
    let found = Found::of(&large);
    let [.., dsdt] = found.all();
    assert!(dsdt.len() > 200_000);
    assert_eq!(found.0.ram_end % PAGE_SIZE, 0);
    assert_eq!(found.0.pieces[1].0, found.0.ram_end);
    assert!(found.0.ram_end + (found.0.pieces[1].1.len() as u64) <= RAM_END);
    assert!(RAM_END - found.0.ram_end < 210_000);
}

#[test]
fn what_can_not_be_told_is_refused() {
    assert!(matches!(
        Tables::place(&platform(5000), RAM_END),
        Err(Error::Acpi { what: "CPUs", .. })
    ));
    let mut large = platform(1);
    large.aml = vec![vec![0xa3; 2 << 20]];
    assert!(matches!(Tables::place(&large, 2 << 20), Err(Error::Acpi { .. })));
    assert!(matches!(Tables::place(&large, 0), Err(Error::Acpi { .. })));
}

/// The disassembler of ACPICA, which is what Linux reads tables with, takes all of ours without a complaint, and what
/// it makes of the DSDT compiles again.
#[test]
fn iasl_reads_them() {
    match Command::new("iasl").arg("-v").output() {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            println!(
                "iasl_reads_them: NOT RUN, iasl is not installed (apt-get install acpica-tools)"
            );
            return;
        }
        other => assert!(other.unwrap().status.success()),
    }
    let directory = std::env::temp_dir().join(format!("keel-loader-iasl-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let mut large = platform(300);
    large.serial.extend([Serial { port: 0x3e8, irq: 4 }, Serial { port: 0x2e8, irq: 3 }]);
    let run = |arguments: &[&str]| {
        let output = Command::new("iasl").args(arguments).current_dir(&directory).output().unwrap();
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success(), "{said}");
        said
    };
    for (platform, name) in [(platform(1), "one"), (large, "many")] {
        let found = Found::of(&platform);
        for (table, kind) in found.all().into_iter().zip(["fadt", "madt", "facs", "dsdt"]) {
            let file = format!("{name}-{kind}.aml");
            std::fs::write(directory.join(&file), table).unwrap();
            let said = run(&["-d", &file]);
            for complaint in ["Error", "Warning", "Invalid", "ncorrect", "Could not"] {
                assert!(!said.contains(complaint), "{said}");
            }
        }
        let source = format!("{name}-dsdt.dsl");
        let said = run(&["-p", "again", &source]);
        assert!(said.contains("0 Errors, 0 Warnings"), "{said}");
        let text = std::fs::read_to_string(directory.join(source)).unwrap();
        for expected in [
            "\\_S5",
            "\"ACPI0007\"",
            "EisaId (\"PNP0501\")",
            "EisaId (\"PNP0B00\")",
            "\"QEMU0001\"",
            "0x03F8",
        ] {
            assert!(text.contains(expected), "{expected} in {text}");
        }
    }
    std::fs::remove_dir_all(&directory).unwrap();
}
