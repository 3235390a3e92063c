//! The features of a CPU by the names users know, and the bit of `CPUID` each is.
//!
//! Bits are those of the Intel SDM volume 2, "CPUID", and the AMD APM volume 3, appendix E; the paravirtual ones
//! those of the Linux kernel's `Documentation/virt/kvm/x86/cpuid.rst`. Names are QEMU's.

use std::fmt;
use std::sync::LazyLock;

use Register::{Eax, Ebx, Ecx, Edx};

use crate::{Cpuid, CpuidEntry};

/// One of the four registers `CPUID` answers in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "the names are the architecture's own")]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A register of one answer of `CPUID`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Word {
    /// EAX on input.
    pub leaf: u32,
    /// ECX on input, for leaves in which it matters.
    pub subleaf: Option<u32>,
    /// The register on output.
    pub register: Register,
}

impl Word {
    const fn new(leaf: u32, register: Register) -> Self {
        Word { leaf, subleaf: None, register }
    }

    const fn sub(leaf: u32, subleaf: u32, register: Register) -> Self {
        Word { leaf, subleaf: Some(subleaf), register }
    }

    pub(super) fn is_ecx(self) -> bool {
        self.register == Ecx
    }

    /// The word's value in an answer: 0 where there is none.
    pub fn of(self, cpuid: &Cpuid) -> u32 {
        cpuid.get(self.leaf, self.subleaf.unwrap_or(0)).map_or(0, |entry| match self.register {
            Eax => entry.eax,
            Ebx => entry.ebx,
            Ecx => entry.ecx,
            Edx => entry.edx,
        })
    }

    /// Sets the word, adding an answer where there was none.
    pub(super) fn set(self, cpuid: &mut Cpuid, value: u32) {
        if cpuid.get(self.leaf, self.subleaf.unwrap_or(0)).is_none() {
            cpuid.set(CpuidEntry { leaf: self.leaf, subleaf: self.subleaf, ..Default::default() });
        }
        if let Some(entry) = cpuid.get_mut(self.leaf, self.subleaf.unwrap_or(0)) {
            *match self.register {
                Eax => &mut entry.eax,
                Ebx => &mut entry.ebx,
                Ecx => &mut entry.ecx,
                Edx => &mut entry.edx,
            } = value;
        }
    }
}

/// A named bit of `CPUID`. `Display` is its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Feature {
    /// The name used in messages and lists.
    pub name: &'static str,
    /// Where it is.
    pub word: Word,
    /// The bit of the word, 0 to 31.
    pub bit: u32,
}

impl Feature {
    /// The word with only this bit set.
    pub fn mask(self) -> u32 {
        1 << self.bit
    }

    /// Whether an answer has it.
    pub fn is_in(self, cpuid: &Cpuid) -> bool {
        self.word.of(cpuid) & self.mask() != 0
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// All features, word by word.
pub fn features() -> impl Iterator<Item = Feature> {
    names().map(|(feature, _)| feature)
}

/// The features of this name: none, one, or two (`kvmclock` is two bits).
///
/// Case, `-`, `_` and `.` make no difference: `sse4.2`, `sse4_2` and `SSE4-2` are the same.
pub fn find(name: &str) -> Vec<Feature> {
    let wanted = plain(name);
    names()
        .filter(|(_, names)| names.split('|').any(|name| plain(name) == wanted))
        .map(|(feature, _)| feature)
        .collect()
}

/// The features of exactly this name of ours, without the search through spellings.
pub(super) fn named(name: &str) -> impl Iterator<Item = Feature> {
    /// By name: a model looks hundreds of them up for every vCPU.
    static SORTED: LazyLock<Vec<Feature>> = LazyLock::new(|| {
        let mut sorted: Vec<Feature> = features().collect();
        sorted.sort_unstable_by_key(|feature| feature.name);
        sorted
    });
    let first = SORTED.partition_point(|feature| feature.name < name);
    SORTED[first..].iter().copied().take_while(move |feature| feature.name == name)
}

/// A name without what users write differently.
pub(super) fn plain(name: &str) -> String {
    name.chars().filter(|c| !matches!(c, '-' | '_' | '.')).map(|c| c.to_ascii_lowercase()).collect()
}

pub(super) fn words() -> impl Iterator<Item = Word> {
    WORDS.iter().map(|(word, _)| *word)
}

fn names() -> impl Iterator<Item = (Feature, &'static str)> {
    WORDS.iter().flat_map(|(word, bits)| {
        bits.iter().map(|(bit, names)| {
            let name = names.split_once('|').map_or(*names, |(first, _)| first);
            (Feature { name, word: *word, bit: *bit }, *names)
        })
    })
}

/// Per word, the bits that have a name; further names of one follow a `|`.
///
/// Not here, as nobody can ask for them: OSXSAVE and OSPKE, which mirror CR4 while the guest runs.
type Bits = &'static [(u32, &'static str)];

#[rustfmt::skip]
const WORDS: &[(Word, Bits)] = &[
    (Word::new(1, Edx), &[
        (0, "fpu"), (1, "vme"), (2, "de"), (3, "pse"), (4, "tsc"), (5, "msr"), (6, "pae"), (7, "mce"), (8, "cx8"),
        (9, "apic"), (11, "sep"), (12, "mtrr"), (13, "pge"), (14, "mca"), (15, "cmov"), (16, "pat"), (17, "pse36"),
        (18, "pn"), (19, "clflush|clfsh"), (21, "ds|dts"), (22, "acpi"), (23, "mmx"), (24, "fxsr"), (25, "sse"),
        (26, "sse2"), (27, "ss"), (28, "ht|htt"), (29, "tm"), (31, "pbe"),
    ]),
    (Word::new(1, Ecx), &[
        (0, "pni|sse3"), (1, "pclmulqdq"), (2, "dtes64"), (3, "monitor"), (4, "ds-cpl"), (5, "vmx"), (6, "smx"),
        (7, "est"), (8, "tm2"), (9, "ssse3"), (10, "cid"), (12, "fma"), (13, "cx16"), (14, "xtpr"), (15, "pdcm"),
        (17, "pcid"), (18, "dca"), (19, "sse4.1"), (20, "sse4.2"), (21, "x2apic"), (22, "movbe"), (23, "popcnt"),
        (24, "tsc-deadline|tsc-deadline-timer"), (25, "aes"), (26, "xsave"), (28, "avx"), (29, "f16c"),
        (30, "rdrand"), (31, "hypervisor"),
    ]),
    (Word::new(6, Eax), &[(2, "arat")]),
    (Word::sub(7, 0, Ebx), &[
        (0, "fsgsbase"), (1, "tsc-adjust"), (2, "sgx"), (3, "bmi1"), (4, "hle"), (5, "avx2"),
        (6, "fdp-excptn-only"), (7, "smep"), (8, "bmi2"), (9, "erms"), (10, "invpcid"), (11, "rtm"),
        (13, "zero-fcs-fds"), (14, "mpx"), (16, "avx512f"), (17, "avx512dq"), (18, "rdseed"), (19, "adx"),
        (20, "smap"), (21, "avx512ifma"), (22, "pcommit"), (23, "clflushopt"), (24, "clwb"), (25, "intel-pt"),
        (26, "avx512pf"), (27, "avx512er"), (28, "avx512cd"), (29, "sha-ni"), (30, "avx512bw"), (31, "avx512vl"),
    ]),
    (Word::sub(7, 0, Ecx), &[
        (1, "avx512vbmi"), (2, "umip"), (3, "pku"), (5, "waitpkg"), (6, "avx512vbmi2"), (7, "shstk"), (8, "gfni"),
        (9, "vaes"), (10, "vpclmulqdq"), (11, "avx512vnni"), (12, "avx512bitalg"), (14, "avx512-vpopcntdq"),
        (16, "la57"), (22, "rdpid"), (24, "bus-lock-detect"), (25, "cldemote"), (27, "movdiri"), (28, "movdir64b"),
        (29, "enqcmd"), (30, "sgxlc"), (31, "pks"),
    ]),
    (Word::sub(7, 0, Edx), &[
        (2, "avx512-4vnniw"), (3, "avx512-4fmaps"), (4, "fsrm"), (5, "uintr"), (8, "avx512-vp2intersect"),
        (9, "srbds-ctrl"), (10, "md-clear"), (11, "rtm-always-abort"), (14, "serialize"), (15, "hybrid"),
        (16, "tsx-ldtrk"), (18, "pconfig"), (19, "arch-lbr"), (20, "ibt"), (22, "amx-bf16"), (23, "avx512-fp16"),
        (24, "amx-tile"), (25, "amx-int8"), (26, "spec-ctrl"), (27, "stibp"), (28, "flush-l1d"),
        (29, "arch-capabilities"), (30, "core-capability"), (31, "ssbd"),
    ]),
    (Word::sub(7, 1, Eax), &[
        (0, "sha512"), (1, "sm3"), (2, "sm4"), (4, "avx-vnni"), (5, "avx512-bf16"), (7, "cmpccxadd"), (10, "fzrm"),
        (11, "fsrs"), (12, "fsrc"), (17, "fred"), (18, "lkgs"), (19, "wrmsrns"), (21, "amx-fp16"), (23, "avx-ifma"),
        (26, "lam"),
    ]),
    (Word::sub(7, 1, Edx), &[
        (4, "avx-vnni-int8"), (5, "avx-ne-convert"), (8, "amx-complex"), (10, "avx-vnni-int16"),
        (14, "prefetchiti"), (19, "avx10"), (21, "apx"),
    ]),
    (Word::sub(7, 2, Edx), &[
        (0, "intel-psfd"), (1, "ipred-ctrl"), (2, "rrsba-ctrl"), (3, "ddpd-u"), (4, "bhi-ctrl"), (5, "mcdt-no"),
    ]),
    (Word::sub(0xd, 1, Eax), &[(0, "xsaveopt"), (1, "xsavec"), (2, "xgetbv1"), (3, "xsaves"), (4, "xfd")]),
    (Word::new(0x8000_0001, Edx), &[
        (11, "syscall"), (20, "nx|xd"), (22, "mmxext"), (25, "fxsr-opt"), (26, "pdpe1gb"), (27, "rdtscp"),
        (29, "lm|i64"), (30, "3dnowext"), (31, "3dnow"),
    ]),
    (Word::new(0x8000_0001, Ecx), &[
        (0, "lahf-lm"), (1, "cmp-legacy"), (2, "svm"), (3, "extapic"), (4, "cr8legacy"), (5, "abm|lzcnt"),
        (6, "sse4a"), (7, "misalignsse"), (8, "3dnowprefetch"), (9, "osvw"), (10, "ibs"), (11, "xop"),
        (12, "skinit"), (13, "wdt"), (15, "lwp"), (16, "fma4"), (17, "tce"), (19, "nodeid-msr"), (21, "tbm"),
        (22, "topoext"), (23, "perfctr-core"), (24, "perfctr-nb"),
    ]),
    (Word::new(0x8000_0007, Ebx), &[(0, "overflow-recov"), (1, "succor")]),
    (Word::new(0x8000_0007, Edx), &[(8, "invtsc|nonstop-tsc")]),
    (Word::new(0x8000_0008, Ebx), &[
        (0, "clzero"), (2, "xsaveerptr"), (9, "wbnoinvd"), (12, "ibpb"), (14, "ibrs"), (15, "amd-stibp"),
        (17, "stibp-always-on"), (24, "amd-ssbd"), (25, "virt-ssbd"), (26, "amd-no-ssb"), (28, "amd-psfd"),
        (29, "btc-no"),
    ]),
    (Word::new(0x8000_000a, Edx), &[
        (0, "npt"), (1, "lbrv"), (2, "svm-lock"), (3, "nrip-save"), (4, "tsc-scale"), (5, "vmcb-clean"),
        (6, "flushbyasid"), (7, "decodeassists"), (10, "pause-filter"), (12, "pfthreshold"), (13, "avic"),
        (15, "v-vmsave-vmload"), (16, "vgif"), (25, "vnmi"), (28, "svme-addr-chk"),
    ]),
    (Word::new(0x8000_0021, Eax), &[
        (0, "no-nested-data-bp"), (1, "fs-gs-base-ns"), (2, "lfence-always-serializing"), (6, "null-sel-clr-base"),
        (8, "auto-ibrs"), (24, "eraps"), (27, "sbpb"), (28, "ibpb-brtype"), (29, "srso-no"),
        (30, "srso-user-kernel-no"),
    ]),
    (Word::new(0x8000_0022, Eax), &[(0, "perfmon-v2")]),
    (Word::new(0x4000_0001, Eax), &[
        // Two interfaces of the same clock: a guest picks the second where it knows it.
        (0, "kvmclock"), (1, "kvm-nopiodelay"), (2, "kvm-mmu"), (3, "kvmclock"), (4, "kvm-asyncpf"),
        (5, "kvm-steal-time"), (6, "kvm-pv-eoi"), (7, "kvm-pv-unhalt"), (9, "kvm-pv-tlb-flush"),
        (10, "kvm-asyncpf-vmexit"), (11, "kvm-pv-ipi"), (12, "kvm-poll-control"), (13, "kvm-pv-sched-yield"),
        (14, "kvm-asyncpf-int"), (15, "kvm-msi-ext-dest-id"), (16, "kvm-hc-map-gpa-range"),
        (17, "kvm-migration-control"), (24, "kvmclock-stable-bit"),
    ]),
    (Word::new(0x4000_0001, Edx), &[(0, "kvm-hint-dedicated")]),
];

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn names_are_found_however_they_are_written() {
        for name in ["sse4.2", "sse4_2", "SSE4-2", "sse42"] {
            let found = find(name);
            assert_eq!(found.len(), 1, "{name}");
            assert_eq!(
                (found[0].name, found[0].word, found[0].bit),
                ("sse4.2", Word::new(1, Ecx), 20)
            );
        }
        assert_eq!(find("lzcnt"), find("abm"));
        assert_eq!(find("kvmclock").len(), 2);
        assert_eq!(find("avx512_bitalg")[0].bit, 12);
        assert!(find("osxsave").is_empty());
        assert!(find("").is_empty());
    }

    #[test]
    fn no_bit_and_no_name_stands_twice() {
        let mut bits = HashMap::new();
        let mut owners: HashMap<String, &str> = HashMap::new();
        for (feature, all) in names() {
            assert!(feature.bit < 32);
            assert_eq!(bits.insert((feature.word, feature.bit), feature.name), None, "{feature}");
            for name in all.split('|') {
                let owner = *owners.entry(plain(name)).or_insert(feature.name);
                assert_eq!(owner, feature.name, "{name} is the name of two features");
            }
        }
    }
}
