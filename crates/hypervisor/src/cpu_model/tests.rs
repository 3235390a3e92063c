use proptest::prelude::*;

use super::features::words;
use super::*;
use crate::{Cpuid, CpuidEntry};

/// Leaf, subleaf, EAX, EBX, ECX, EDX.
type Row = (u32, u32, u32, u32, u32, u32);

/// A host that supports everything: every named bit and 46-bit addresses, with the XSAVE layout of real CPUs.
fn host(vendor: &[u8; 12]) -> Cpuid {
    let part = |at: usize| {
        u32::from_le_bytes([vendor[at], vendor[at + 1], vendor[at + 2], vendor[at + 3]])
    };
    let entry =
        |leaf, subleaf, eax, ebx, ecx, edx| CpuidEntry { leaf, subleaf, eax, ebx, ecx, edx };
    let mut host = Cpuid(vec![
        entry(0, None, 0x20, part(0), part(8), part(4)),
        entry(1, None, 0x000a_0671, 0x0102_0800, 0, 0),
        entry(0xa, None, 0x0730_0404, 0, 0, 0x603),
        entry(0xd, Some(0), 0x0006_02e7, 0xa80, 0x2b00, 0),
        entry(0xd, Some(1), 0, 0xa80, 0x1800, 0),
        entry(0xd, Some(2), 256, 576, 0, 0),
        entry(0xd, Some(5), 64, 1088, 0, 0),
        entry(0xd, Some(6), 512, 1152, 0, 0),
        entry(0xd, Some(7), 1024, 1664, 0, 0),
        entry(0xd, Some(9), 8, 2688, 0, 0),
        entry(0xd, Some(11), 16, 0, 1, 0),
        entry(0xd, Some(12), 24, 0, 1, 0),
        entry(0xd, Some(17), 64, 2752, 2, 0),
        entry(0xd, Some(18), 8192, 2816, 6, 0),
        entry(0x1d, Some(0), 1, 0, 0, 0),
        entry(0x8000_0000, None, 0x8000_0021, 0, 0, 0),
        entry(0x8000_0008, None, 0x0030_392e, 0, 0, 0),
        entry(0x8000_000a, None, 1, 8, 0, 0),
        entry(0x4000_0000, None, 0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d),
    ]);
    for feature in features() {
        let value = feature.word.of(&host) | feature.mask();
        feature.word.set(&mut host, value);
    }
    host
}

fn intel() -> Cpuid {
    let mut host = host(b"GenuineIntel");
    for (subleaf, eax, ebx, ecx) in [
        (0, 0xfc00_4121, 0x02c0_003f, 63),
        (1, 0xfc00_4122, 0x01c0_003f, 63),
        (2, 0xfc00_4143, 0x03c0_003f, 1023),
        (3, 0xfc1f_c163, 0x0280_003f, 36863),
    ] {
        host.set(CpuidEntry { leaf: 4, subleaf: Some(subleaf), eax, ebx, ecx, edx: 0 });
    }
    host
}

fn amd() -> Cpuid {
    host(b"AuthenticAMD")
}

fn answers(model: &str, host: &Cpuid, topology: Topology, index: u32) -> Cpuid {
    model.parse::<CpuModel>().unwrap().cpuid(host, &topology, index, None).unwrap().0
}

fn rows(cpuid: &Cpuid, leaf: u32) -> Vec<Row> {
    let row = |e: &CpuidEntry| (e.leaf, e.subleaf.unwrap_or(0), e.eax, e.ebx, e.ecx, e.edx);
    cpuid.0.iter().filter(|entry| entry.leaf == leaf).map(row).collect()
}

fn row(cpuid: &Cpuid, leaf: u32) -> Row {
    let rows = rows(cpuid, leaf);
    assert_eq!(rows.len(), 1, "leaf {leaf:#x}");
    rows[0]
}

fn has(cpuid: &Cpuid, name: &str) -> bool {
    find(name).iter().all(|feature| feature.is_in(cpuid))
}

fn missing(words: &str, host: &Cpuid) -> Vec<&'static str> {
    let model: CpuModel = words.parse().unwrap();
    model
        .cpuid(host, &Topology::flat(1), 0, None)
        .unwrap()
        .1
        .iter()
        .map(|feature| feature.name)
        .collect()
}

fn error(words: &str) -> String {
    words.parse::<CpuModel>().unwrap_err().to_string()
}

const SMT: Topology = Topology { cpus: 4, sockets: 1, dies: 1, cores: 2, threads: 2 };

#[test]
fn intel_topology_of_two_cores_with_two_threads() {
    for model in ["host", "x86-64-v2"] {
        let cpuid = answers(model, &intel(), SMT, 3);
        let (.., ebx, _, edx) = row(&cpuid, 1);
        assert_eq!(ebx, 0x0304_0800);
        assert_eq!(edx >> 28 & 1, 1, "HTT");
        assert_eq!(
            rows(&cpuid, 0xb),
            [(0xb, 0, 1, 2, 0x100, 3), (0xb, 1, 2, 4, 0x201, 3), (0xb, 2, 0, 0, 2, 3)]
        );
        assert_eq!(
            rows(&cpuid, 0x1f),
            [(0x1f, 0, 1, 2, 0x100, 3), (0x1f, 1, 2, 4, 0x201, 3), (0x1f, 2, 0, 0, 2, 3)]
        );
        let caches: Vec<u32> = rows(&cpuid, 4).iter().map(|row| row.2).collect();
        assert_eq!(caches, [0x0400_4121, 0x0400_4122, 0x0400_4143, 0x0400_c163]);
        assert_eq!(row(&cpuid, 0x8000_0008).4, 0);
        assert!(!has(&cpuid, "cmp-legacy"));
        assert!(rows(&cpuid, 0x8000_001d).is_empty());
        assert!(rows(&cpuid, 0x8000_001e).is_empty());
    }
}

#[test]
fn amd_topology_of_two_cores_with_two_threads() {
    for model in ["host", "x86-64-v2"] {
        let cpuid = answers(model, &amd(), SMT, 3);
        let (.., ebx, _, edx) = row(&cpuid, 1);
        assert_eq!(ebx, 0x0304_0800);
        assert_eq!(edx >> 28 & 1, 1, "HTT");
        assert!(has(&cpuid, "cmp-legacy"));
        assert!(has(&cpuid, "topoext"));
        assert_eq!(row(&cpuid, 0x8000_0008).4, 0x2003);
        assert_eq!(row(&cpuid, 0x8000_001e), (0x8000_001e, 0, 3, 0x101, 0, 0));
        let caches: Vec<u32> = rows(&cpuid, 0x8000_001d).iter().map(|row| row.2).collect();
        assert_eq!(caches, [0x4121, 0x4122, 0x4143, 0xc163]);
        // 32 KiB of 8 ways; 1 MiB of 16; 32 half MiB of 16: lines of 64 bytes.
        assert_eq!(row(&cpuid, 0x8000_0005), (0x8000_0005, 0, 0, 0, 0x2008_0140, 0x2008_0140));
        assert_eq!(row(&cpuid, 0x8000_0006), (0x8000_0006, 0, 0, 0, 0x0400_8140, 0x0080_8140));
        assert_eq!(
            rows(&cpuid, 0xb),
            [(0xb, 0, 1, 2, 0x100, 3), (0xb, 1, 2, 4, 0x201, 3), (0xb, 2, 0, 0, 2, 3)]
        );
        assert!(rows(&cpuid, 0x1f).is_empty());
        assert!(rows(&cpuid, 4).is_empty());
        let last = row(&cpuid, 0x8000_0000).2;
        assert_eq!(last, if model == "host" { 0x8000_0021 } else { 0x8000_001e });
    }
}

#[test]
fn dies_and_counts_that_are_no_power_of_two() {
    // APIC ID: socket at bit 4, die at bit 3, core at bit 1, thread at bit 0.
    let topology = Topology { cpus: 24, sockets: 2, dies: 2, cores: 3, threads: 2 };
    // Socket 1, die 1, core 2, thread 1.
    let cpuid = answers("x86-64-v1", &intel(), topology, 23);
    let id = 1 << 4 | 1 << 3 | 2 << 1 | 1;
    assert_eq!(row(&cpuid, 1).3, id << 24 | 16 << 16 | 0x800);
    assert_eq!(
        rows(&cpuid, 0xb),
        [(0xb, 0, 1, 2, 0x100, id), (0xb, 1, 4, 12, 0x201, id), (0xb, 2, 0, 0, 2, id)]
    );
    assert_eq!(
        rows(&cpuid, 0x1f),
        [
            (0x1f, 0, 1, 2, 0x100, id),
            (0x1f, 1, 3, 6, 0x201, id),
            (0x1f, 2, 4, 12, 0x502, id),
            (0x1f, 3, 0, 0, 3, id)
        ]
    );
    // The last level is a die's: 8 addressable threads; 8 addressable cores a package.
    assert_eq!(rows(&cpuid, 4)[3].2, 0x163 | 7 << 14 | 7 << 26);

    let cpuid = answers("x86-64-v1", &amd(), topology, 23);
    assert_eq!(row(&cpuid, 1).3, id << 24 | 12 << 16 | 0x800);
    assert_eq!(row(&cpuid, 0x8000_0008).4, 0x400b);
    assert_eq!(row(&cpuid, 0x8000_001e), (0x8000_001e, 0, id, 0x105, 0x103, 0));
}

#[test]
fn one_vcpu_has_no_neighbours() {
    let cpuid = answers("host", &intel(), Topology::flat(1), 0);
    let (.., ebx, _, edx) = row(&cpuid, 1);
    assert_eq!((ebx, edx >> 28 & 1), (0x0001_0800, 0));
    assert_eq!(
        rows(&cpuid, 0xb),
        [(0xb, 0, 0, 1, 0x100, 0), (0xb, 1, 0, 1, 0x201, 0), (0xb, 2, 0, 0, 2, 0)]
    );
    assert!(!has(&answers("host", &amd(), Topology::flat(1), 0), "cmp-legacy"));
}

#[test]
fn high_apic_ids_need_an_x2apic() {
    let topology = Topology { cpus: 255, sockets: 85, dies: 1, cores: 1, threads: 3 };
    let cpuid = answers("x86-64-v1", &intel(), topology, 254);
    assert_eq!(rows(&cpuid, 0xb)[0].5, 338);
    assert_eq!(row(&cpuid, 1).3 >> 24, 338 & 0xff);
    let model: CpuModel = "x86-64-v1,-x2apic".parse().unwrap();
    let error = model.cpuid(&intel(), &topology, 0, None).unwrap_err().to_string();
    assert!(error.ends_with("APIC ID 338 needs the CPU feature x2apic"), "{error}");
}

#[test]
fn a_vcpu_that_is_not_there_is_refused() {
    let error = CpuModel::default().cpuid(&intel(), &SMT, 4, None).unwrap_err().to_string();
    assert!(error.ends_with("it has no vCPU 4"), "{error}");
}

#[test]
fn levels_are_those_of_the_psabi() {
    let first_without = |level: &str| {
        let cpuid = answers(level, &intel(), Topology::flat(1), 0);
        // One feature each level has and the one below has not, and one nobody has.
        ["sse2", "cx16", "avx2", "avx512vl", "sha-ni"]
            .into_iter()
            .position(|name| !has(&cpuid, name))
    };
    assert_eq!(first_without("x86-64-v1"), Some(1));
    assert_eq!(first_without("x86-64-v2"), Some(2));
    assert_eq!(first_without("x86-64-v3"), Some(3));
    assert_eq!(first_without("x86-64-v4"), Some(4));

    let v3 = answers("x86-64-v3", &intel(), Topology::flat(1), 0);
    // SSE3, SSSE3, FMA, CX16, SSE4.1, SSE4.2, x2APIC, MOVBE, POPCNT, TSC deadline, XSAVE, AVX, F16C, hypervisor.
    assert_eq!(row(&v3, 1).4, 0xb5f8_3201);
    // BMI1, AVX2, BMI2.
    assert_eq!(rows(&v3, 7), [(7, 0, 0, 0x128, 0, 0)]);
    // LAHF, LZCNT; SYSCALL, NX, LM.
    assert_eq!(row(&v3, 0x8000_0001), (0x8000_0001, 0, 0, 0, 0x21, 0x2010_0800));
    // x87, SSE and AVX: 576 bytes and 256 after them.
    assert_eq!(rows(&v3, 0xd), [(0xd, 0, 7, 576, 832, 0), (0xd, 2, 256, 576, 0, 0)]);
    assert_eq!(row(&v3, 0x8000_0008).2, 0x3028);
    assert!(rows(&v3, 0xa).is_empty());
    assert!(rows(&v3, 0x8000_000a).is_empty());
}

#[test]
fn a_named_model_is_somebody_of_its_own() {
    let text = |cpuid: &Cpuid| {
        let bytes: Vec<u8> = (0x8000_0002..=0x8000_0004)
            .filter_map(|leaf| cpuid.get(leaf, 0))
            .flat_map(|e| [e.eax, e.ebx, e.ecx, e.edx])
            .flat_map(u32::to_le_bytes)
            .collect();
        String::from_utf8(bytes).unwrap().trim_end_matches('\0').to_owned()
    };
    let cpuid = answers("x86-64-v2", &intel(), SMT, 0);
    assert_eq!(text(&cpuid), "Keel Virtual CPU (x86-64-v2)");
    assert_eq!(row(&cpuid, 0), (0, 0, 0x1f, 0x756e_6547, 0x6c65_746e, 0x4965_6e69));
    assert_eq!(row(&cpuid, 1).2, 0x000f_06f0);
    let cpuid = answers("x86-64-v2", &amd(), SMT, 0);
    assert_eq!(row(&cpuid, 0), (0, 0, 0xb, 0x6874_7541, 0x444d_4163, 0x6974_6e65));
    assert_eq!(row(&cpuid, 0x8000_0000).3, 0x6874_7541);
    assert_eq!((row(&cpuid, 1).2, row(&cpuid, 0x8000_0001).2), (0x0100_0f00, 0x0100_0f00));
    // AMD repeats leaf 1's bits.
    assert_eq!(row(&cpuid, 0x8000_0001).5 & 0x0183_f3ff, row(&cpuid, 1).5 & 0x0183_f3ff);
    assert_eq!(
        answers("x86-64-v2,vendor=AuthenticAMD", &intel(), SMT, 3),
        answers("x86-64-v2", &amd(), SMT, 3)
    );
}

#[test]
fn a_host_model_passes_on_what_is_supported() {
    let cpuid = answers("host", &intel(), Topology::flat(1), 0);
    assert_eq!(row(&cpuid, 1).2, 0x000a_0671);
    assert_eq!(row(&cpuid, 0x8000_0008).2, 0x0030_392e);
    for name in ["avx512f", "vmx", "kvm-pv-ipi", "kvmclock-stable-bit", "hypervisor", "amx-tile"] {
        assert!(has(&cpuid, name), "{name}");
    }
    for name in ["sgx", "pdcm", "invtsc", "kvm-hint-dedicated"] {
        assert!(!has(&cpuid, name), "{name}");
    }
    assert!(rows(&cpuid, 0xa).is_empty());
    assert_eq!(row(&answers("host,pmu=on", &intel(), SMT, 0), 0xa).2, 0x0730_0404);
    assert!(has(&answers("host,+invtsc", &intel(), SMT, 0), "invtsc"));
    assert!(has(&answers("host,+kvm-hint-dedicated", &intel(), SMT, 0), "kvm-hint-dedicated"));
    // 0xd: all of it, and 24-byte and 16-byte supervisor states.
    let sizes: Vec<_> = rows(&cpuid, 0xd).iter().map(|row| (row.1, row.2, row.4)).collect();
    assert_eq!(sizes[0], (0, 0x0006_02e7, 2816 + 8192));
    assert_eq!(sizes[1], (1, 0x1f, 0x1800));

    // Bits without a name pass too; those that mirror CR4 do not.
    let mut odd = intel();
    odd.get_mut(7, 0).unwrap().ecx |= 1 << 4 | 1 << 13;
    odd.get_mut(1, 0).unwrap().ecx |= 1 << 27;
    let cpuid = answers("host", &odd, SMT, 0);
    assert_eq!(rows(&cpuid, 7)[0].4 & (1 << 4 | 1 << 13), 1 << 13);
    assert_eq!(row(&cpuid, 1).4 >> 27 & 1, 0);
}

#[test]
fn what_is_nothing_without_a_feature_goes_with_it() {
    let cpuid = answers("host,-xsave", &intel(), SMT, 0);
    for name in [
        "xsave",
        "avx",
        "avx2",
        "fma",
        "avx512f",
        "avx512vnni",
        "amx-tile",
        "amx-bf16",
        "pku",
        "xsaves",
    ] {
        assert!(!has(&cpuid, name), "{name}");
    }
    assert!(rows(&cpuid, 0xd).is_empty());
    assert!(rows(&cpuid, 0x1d).is_empty());
    let cpuid = answers("host,-avx512f,-amx-tile,-xsaves", &intel(), SMT, 0);
    let components: Vec<_> = rows(&cpuid, 0xd).iter().map(|row| row.1).collect();
    assert_eq!(components, [0, 1, 2, 9]);
    assert_eq!(rows(&cpuid, 0xd)[0], (0xd, 0, 0x207, 576, 2696, 0));
    assert!(rows(&answers("host,-svm", &amd(), SMT, 0), 0x8000_000a).is_empty());
    assert_eq!(row(&answers("x86-64-v2,+svm,+npt", &amd(), SMT, 0), 0x8000_000a).5, 1);

    assert!(missing("x86-64-v3,-avx", &intel()).is_empty());
    assert_eq!(missing("x86-64-v1,+avx2", &intel()), ["avx2"]);
}

#[test]
fn missing_features_are_told_or_refused() {
    let mut old = intel();
    old.get_mut(7, 0).unwrap().ebx &= !(1 << 5);
    old.get_mut(1, 0).unwrap().ecx &= !(1 << 21);
    old.get_mut(0x4000_0001, 0).unwrap().eax = 0;
    assert_eq!(missing("x86-64-v3", &old), ["avx2"]);
    assert!(missing("host", &old).is_empty());
    assert!(missing("x86-64-v2", &old).is_empty());
    assert_eq!(missing("x86-64-v2,+x2apic,+kvmclock", &old), ["x2apic", "kvmclock"]);
    assert_eq!(missing("host,+x2apic", &old), ["x2apic"]);
    let model: CpuModel = "x86-64-v3,enforce,+x2apic".parse().unwrap();
    assert_eq!(
        model.cpuid(&old, &SMT, 0, None).unwrap_err().to_string(),
        "the host does not support all of CPU model x86-64-v3: x2apic, avx2 are missing"
    );
}

#[test]
fn hypervisor_leaves_are_the_backends() {
    let model: CpuModel = "x86-64-v2".parse().unwrap();
    let (cpuid, _) = model.cpuid(&intel(), &SMT, 0, Some(2_600_000)).unwrap();
    assert_eq!(
        row(&cpuid, 0x4000_0000),
        (0x4000_0000, 0, 0x4000_0010, 0x4b4d_564b, 0x564b_4d56, 0x4d)
    );
    // Clock (both), no I/O delay, async page faults, steal time, EOI, async by interrupt, MSI IDs, stable clock.
    assert_eq!(row(&cpuid, 0x4000_0001), (0x4000_0001, 0, 0x0100_c07b, 0, 0, 0));
    assert_eq!(row(&cpuid, 0x4000_0010), (0x4000_0010, 0, 2_600_000, 1_000_000, 0, 0));

    let cpuid = answers("host,-kvmclock", &intel(), SMT, 0);
    assert_eq!(row(&cpuid, 0x4000_0000).2, 0x4000_0001);
    assert_eq!(row(&cpuid, 0x4000_0001).2 & 0b1001, 0);

    let cpuid = answers("host,kvm=off", &intel(), SMT, 0);
    assert!(cpuid.0.iter().all(|entry| entry.leaf >> 28 != 4));

    // A CPU in software has none of it, and then no frequency leaf stands alone.
    let mut bare = intel();
    bare.remove(0x4000_0000);
    bare.remove(0x4000_0001);
    let (cpuid, missing) = model.cpuid(&bare, &SMT, 0, Some(1)).unwrap();
    assert!(cpuid.0.iter().all(|entry| entry.leaf >> 28 != 4));
    assert!(missing.is_empty());
}

#[test]
fn address_widths() {
    assert_eq!(row(&answers("host,phys-bits=40,-la57", &intel(), SMT, 0), 0x8000_0008).2, 0x3028);
    let model: CpuModel = "host,phys-bits=52".parse().unwrap();
    assert_eq!(
        model.cpuid(&intel(), &SMT, 0, None).unwrap_err().to_string(),
        r#"CPU option "phys-bits=52" needs a width that the host has, or less"#
    );
}

#[test]
fn words_that_are_wrong_are_named() {
    assert_eq!(
        error("x86-64-v5"),
        r#"there is no CPU model "x86-64-v5"; did you mean x86-64-v1? (-cpu help lists all)"#
    );
    assert_eq!(
        error("hots"),
        r#"there is no CPU model "hots"; did you mean host? (-cpu help lists all)"#
    );
    assert_eq!(
        error("Skylake-Server"),
        r#"there is no CPU model "Skylake-Server"; -cpu help lists all"#
    );
    assert_eq!(error(""), r#"there is no CPU model ""; -cpu help lists all"#);
    assert_eq!(
        error("host,+avx22"),
        r#"there is no CPU feature "avx22"; did you mean avx2? (-cpu help lists all)"#
    );
    assert_eq!(
        error("host,enforced"),
        r#"there is no CPU feature "enforced"; did you mean enforce? (-cpu help lists all)"#
    );
    assert_eq!(error("host,"), r#"there is no CPU feature ""; -cpu help lists all"#);
    assert_eq!(error("host,avx=maybe"), r#"CPU option "avx=maybe" needs on or off"#);
    assert_eq!(
        error("host,vendor=VIA"),
        r#"CPU option "vendor=VIA" needs GenuineIntel or AuthenticAMD"#
    );
    assert_eq!(
        error("host,phys-bits=99"),
        r#"CPU option "phys-bits=99" needs a number from 36 to 52"#
    );
}

#[test]
fn words_mean_what_qemus_do() {
    let parse = |words: &str| words.parse::<CpuModel>().unwrap();
    assert_eq!(parse("max"), CpuModel::default());
    assert_eq!(parse("host,+avx"), parse("host,avx=on"));
    assert_eq!(parse("host,avx"), parse("host,avx=on"));
    assert_eq!(parse("host,-sse4.2"), parse("host,sse4_2=off"));
    assert!(parse("host,enforce").enforce());
    assert!(!parse("host,enforce,enforce=off").enforce());
    // The last word counts.
    assert!(!has(&answers("host,+avx2,-avx2", &intel(), SMT, 0), "avx2"));
    assert!(has(&answers("host,-avx2,+avx2", &intel(), SMT, 0), "avx2"));
}

#[test]
fn help_names_everything() {
    let help = CpuModel::help();
    for name in
        features().map(|feature| feature.name).chain(["host", "x86-64-v4", "enforce", "pmu"])
    {
        assert!(help.split_whitespace().any(|word| word == name), "{name}");
    }
    assert!(help.lines().all(|line| line.len() <= 80));
}

proptest! {
    #[test]
    fn a_model_never_offers_what_is_not_supported(
        masks in prop::collection::vec(any::<u32>(), words().count()),
        level in 0usize..5,
        is_amd: bool,
        extra in "([+]|-)(avx2|vmx|svm|avx512f|kvmclock|sha-ni|xsave|x2apic)",
    ) {
        let mut host = if is_amd { amd() } else { intel() };
        for (word, mask) in words().zip(masks) {
            let value = word.of(&host) & mask;
            word.set(&mut host, value);
        }
        let name = ["host", "x86-64-v1", "x86-64-v2", "x86-64-v3", "x86-64-v4"][level];
        let model: CpuModel = format!("{name},{extra}").parse().unwrap();
        let (cpuid, missing) = model.cpuid(&host, &SMT, 1, None).unwrap();
        // What tells the topology, or the guest something, and needs nothing of the host.
        let free = ["ht", "cmp-legacy", "topoext", "hypervisor"];
        for feature in features().filter(|feature| !free.contains(&feature.name)) {
            prop_assert!(!feature.is_in(&cpuid) || feature.is_in(&host), "{feature} is not supported");
        }
        for feature in missing {
            prop_assert!(!find(feature.name).iter().all(|bit| bit.is_in(&cpuid)), "{feature} is not missing");
        }
        // Every answer once, in order, and none beyond what the first ones say.
        let places: Vec<_> = cpuid.0.iter().map(|entry| (entry.leaf, entry.subleaf)).collect();
        prop_assert!(places.is_sorted_by(|a, b| a < b));
        for (start, end) in [(0, 0x4000_0000), (0x4000_0000, 0x8000_0000), (0x8000_0000, u32::MAX)] {
            let last = places.iter().map(|place| place.0).filter(|leaf| (start..end).contains(leaf)).max();
            let said = cpuid.get(start, 0).map(|entry| entry.eax);
            prop_assert!(last.is_none_or(|last| said.is_some_and(|said| last <= said)));
        }
    }

    #[test]
    fn a_named_model_is_the_same_on_every_host_that_has_it(
        noise in prop::collection::vec(any::<u32>(), words().count()),
        level in 1usize..5,
    ) {
        let name = format!("x86-64-v{level}");
        let full = intel();
        let wanted = answers(&name, &full, SMT, 2);
        // A host that lacks only what the model does not have, and calls itself otherwise.
        let mut other = full.clone();
        for (word, noise) in words().zip(noise) {
            word.set(&mut other, word.of(&full) & noise | word.of(&wanted));
        }
        other.get_mut(1, 0).unwrap().eax = 0x0005_0654;
        other.remove(4);
        prop_assert_eq!(answers(&name, &other, SMT, 2), wanted);
    }
}
