//! Which features a model offers on a given host, and which it would have but can not.

use std::collections::{BTreeMap, BTreeSet};

use super::features::{Feature, Word, features, named, words};
use super::{Base, CpuModel, Vendor};
use crate::Cpuid;

/// Features a host model offers only when asked to, though the backend supports them.
///
/// SGX needs an enclave page cache that no machine here has. An invariant TSC ties the guest to hosts of the same
/// frequency: a guest that must be able to move uses the paravirtual clock.
const HOST_WITHOUT: [&str; 3] = ["sgx", "sgxlc", "invtsc"];

/// The features that stand for performance counters: only with `pmu=on`.
const PMU: [&str; 8] =
    ["pdcm", "ds", "dtes64", "ds-cpl", "arch-lbr", "perfctr-core", "perfctr-nb", "perfmon-v2"];

/// What each level of the psABI adds (System V ABI, AMD64 supplement, table 3.1).
///
/// The first level's list goes on with what the ABI leaves to the system and every x86-64 kernel expects.
#[rustfmt::skip]
const LEVELS: [&[&str]; 4] = [
    &["cmov", "cx8", "fpu", "fxsr", "mmx", "syscall", "sse", "sse2", "lm",
      "vme", "de", "pse", "tsc", "msr", "pae", "mce", "apic", "sep", "mtrr", "pge", "mca", "pat", "pse36", "clflush",
      "nx"],
    &["cx16", "lahf-lm", "popcnt", "pni", "sse4.1", "sse4.2", "ssse3"],
    &["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"],
    &["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"],
];

/// What a named model takes along where the backend has it, and does not miss where it has not: how a guest works
/// well with the hypervisor, rather than what its programs may use.
const PLATFORM: [&str; 12] = [
    "hypervisor",
    "x2apic",
    "tsc-deadline",
    "arat",
    "kvmclock",
    "kvmclock-stable-bit",
    "kvm-nopiodelay",
    "kvm-asyncpf",
    "kvm-asyncpf-int",
    "kvm-steal-time",
    "kvm-pv-eoi",
    "kvm-msi-ext-dest-id",
];

/// Features that tell the guest something and need nothing of the host, whether the backend lists them or not.
const DATA: [&str; 2] = ["hypervisor", "kvm-hint-dedicated"];

/// Features that are nothing without another one (Intel SDM volume 1, 13.2 and 14; volume 2, "CPUID").
#[rustfmt::skip]
const NEEDS: &[(&str, &[&str])] = &[
    ("xsave", &["xsaveopt", "xsavec", "xgetbv1", "xsaves", "xfd", "avx", "mpx", "pku", "amx-tile", "apx"]),
    ("avx", &["avx2", "f16c", "fma", "xop", "fma4", "vaes", "vpclmulqdq"]),
    ("avx2", &["avx512f", "avx-vnni", "avx-ifma", "avx-vnni-int8", "avx-vnni-int16", "avx-ne-convert", "avx10",
               "sha512", "sm3", "sm4"]),
    ("avx512f", &["avx512dq", "avx512ifma", "avx512pf", "avx512er", "avx512cd", "avx512bw", "avx512vl", "avx512vbmi",
                  "avx512vbmi2", "avx512vnni", "avx512bitalg", "avx512-vpopcntdq", "avx512-4vnniw", "avx512-4fmaps",
                  "avx512-vp2intersect", "avx512-bf16", "avx512-fp16"]),
    ("amx-tile", &["amx-bf16", "amx-int8", "amx-fp16", "amx-complex"]),
    ("svm", &["npt", "lbrv", "svm-lock", "nrip-save", "tsc-scale", "vmcb-clean", "flushbyasid", "decodeassists",
              "pause-filter", "pfthreshold", "avic", "v-vmsave-vmload", "vgif", "vnmi", "svme-addr-chk"]),
];

/// Bits that mirror the guest's CR4 while it runs (OSXSAVE and OSPKE): never part of a model.
const DYNAMIC: [(u32, u32); 2] = [(1, 1 << 27), (7, 1 << 4)];

/// The values of all words that hold features.
#[derive(Clone, Debug, Default)]
pub(super) struct Words(BTreeMap<Word, u32>);

impl Words {
    fn get(&self, word: Word) -> u32 {
        self.0.get(&word).copied().unwrap_or(0)
    }

    fn put(&mut self, feature: Feature, on: bool) {
        let value = self.0.entry(feature.word).or_default();
        *value = if on { *value | feature.mask() } else { *value & !feature.mask() };
    }

    fn put_all<'a>(&mut self, names: impl IntoIterator<Item = &'a &'a str>, on: bool) {
        for feature in names.into_iter().flat_map(|name| named(name)) {
            self.put(feature, on);
        }
    }

    fn has(&self, feature: Feature) -> bool {
        self.get(feature.word) & feature.mask() != 0
    }

    /// Whether a feature of this name is there, with all its bits.
    pub(super) fn has_name(&self, name: &str) -> bool {
        named(name).all(|feature| self.has(feature))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Word, u32)> {
        self.0.iter().map(|(word, value)| (*word, *value))
    }

    /// Takes out what is nothing without a feature that is not there.
    fn close(&mut self) {
        // Needs stand before what needs them, so one pass reaches all.
        for (need, dependents) in NEEDS {
            if !self.has_name(need) {
                self.put_all(*dependents, false);
            }
        }
    }
}

impl CpuModel {
    /// What this model offers where `supported` is supported, and what it should have offered but can not.
    pub(super) fn resolve(&self, supported: &Cpuid, vendor: Vendor) -> (Words, Vec<Feature>) {
        let mut available = Words(words().map(|word| (word, word.of(supported))).collect());
        for (leaf, bits) in DYNAMIC {
            for (_, value) in
                available.0.iter_mut().filter(|(word, _)| word.leaf == leaf && word.is_ecx())
            {
                *value &= !bits;
            }
        }
        available.put_all(&DATA, true);
        if vendor == Vendor::Amd {
            // How the topology is told, not something the hardware does: leaves 0x8000001d and 0x8000001e.
            available.put_all(&["topoext"], true);
        }

        let mut wanted = Words::default();
        let mut required = Words::default();
        match self.base {
            Base::Host => {
                wanted = available.clone();
                wanted.put_all(&HOST_WITHOUT, false);
                wanted.put_all(&["kvm-hint-dedicated"], false);
                if !self.pmu {
                    wanted.put_all(&PMU, false);
                }
            }
            Base::Level(level) => {
                for names in &LEVELS[..usize::from(level)] {
                    required.put_all(*names, true);
                }
                wanted.0.clone_from(&required.0);
                wanted.put_all(&PLATFORM, true);
                if vendor == Vendor::Amd {
                    wanted.put_all(&["topoext"], true);
                }
            }
        }
        for (feature, on) in &self.changes {
            wanted.put(*feature, *on);
        }
        // What goes with a feature that was refused is not missed, unless it was asked for itself.
        wanted.close();
        for (word, value) in &mut required.0 {
            *value &= wanted.get(*word);
        }
        for (feature, on) in &self.changes {
            required.put(*feature, *on);
        }

        let mut offered =
            Words(wanted.iter().map(|(word, value)| (word, value & available.get(word))).collect());
        if self.hide_hypervisor {
            for (_, value) in offered.0.iter_mut().filter(|(word, _)| word.leaf == 0x4000_0001) {
                *value = 0;
            }
        }
        offered.close();
        let mut missing: Vec<Feature> =
            features().filter(|feature| required.has(*feature) && !offered.has(*feature)).collect();
        let mut seen = BTreeSet::new();
        missing.retain(|feature| seen.insert(feature.name));
        (offered, missing)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_used_here_is_a_feature() {
        let needs =
            NEEDS.iter().flat_map(|(need, dependents)| std::iter::once(need).chain(*dependents));
        let lists = HOST_WITHOUT.iter().chain(&PMU).chain(&PLATFORM).chain(&DATA);
        for name in LEVELS.into_iter().flatten().chain(lists).chain(needs) {
            assert!(named(name).next().is_some(), "{name}");
        }
    }

    #[test]
    fn needs_come_before_what_needs_them() {
        for (at, (_, dependents)) in NEEDS.iter().enumerate() {
            for (need, _) in &NEEDS[..at] {
                assert!(!dependents.contains(need), "{need}");
            }
        }
    }
}
