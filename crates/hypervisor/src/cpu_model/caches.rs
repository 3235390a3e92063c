//! The caches of a vCPU: those a named model has, and how many threads share one.

use super::features::{Register, Word};
use super::{Topology, Vendor};
use crate::{Cpuid, CpuidEntry};

/// One cache, in the terms of Intel's leaf 4 and AMD's 0x8000001d.
struct Cache {
    /// 1 data, 2 instructions, 3 both.
    kind: u32,
    level: u32,
    ways: u32,
    sets: u32,
}

const LINE: u32 = 64;

/// What every named model has: 32 KiB of each first-level cache, 1 MiB, and 16 MiB a die.
const CACHES: [Cache; 4] = [
    Cache { kind: 1, level: 1, ways: 8, sets: 64 },
    Cache { kind: 2, level: 1, ways: 8, sets: 64 },
    Cache { kind: 3, level: 2, ways: 16, sets: 1024 },
    Cache { kind: 3, level: 3, ways: 16, sets: 16384 },
];

impl Cache {
    fn bytes(&self) -> u32 {
        self.ways * self.sets * LINE
    }

    fn entry(&self, leaf: u32, subleaf: u32) -> CpuidEntry {
        const SELF_INITIALIZING: u32 = 1 << 8;
        CpuidEntry {
            leaf,
            subleaf: Some(subleaf),
            eax: self.kind | self.level << 5 | SELF_INITIALIZING,
            ebx: (LINE - 1) | (self.ways - 1) << 22,
            ecx: self.sets - 1,
            edx: 0,
        }
    }
}

/// Makes the cache leaves right for a topology: those already there keep their sizes, absent ones get [`CACHES`].
pub(super) fn describe(out: &mut Cpuid, topology: &Topology, vendor: Vendor) {
    let (leaf, foreign) = match vendor {
        Vendor::Intel => (4, 0x8000_001d),
        Vendor::Amd => (0x8000_001d, 4),
    };
    out.remove(foreign);
    if out.get(leaf, 0).is_none_or(|entry| entry.eax & 0x1f == 0) {
        out.remove(leaf);
        for (subleaf, cache) in (0..).zip(&CACHES) {
            out.set(cache.entry(leaf, subleaf));
        }
        if vendor == Vendor::Amd {
            legacy(out);
        }
    }
    for entry in out.0.iter_mut().filter(|entry| entry.leaf == leaf && entry.eax & 0x1f != 0) {
        let level = entry.eax >> 5 & 7;
        let shared = if level >= 3 { topology.die_bits() } else { topology.core_bits() };
        // Bits 25 to 14: addressable IDs of the threads that share it, less one.
        entry.eax = entry.eax & 0x3fff | ((1u32 << shared) - 1).min(0xfff) << 14;
        if vendor == Vendor::Intel {
            // Bits 31 to 26: addressable IDs of the cores of the package, less one.
            let cores = 1u32 << (topology.package_bits() - topology.core_bits());
            entry.eax |= (cores - 1).min(0x3f) << 26;
        }
    }
}

/// AMD's leaves 0x80000005 and 0x80000006, whose associativity is a code (APM volume 3, E.4.4).
fn legacy(out: &mut Cpuid) {
    const SIXTEEN_WAYS: u32 = 8;
    let [data, code, second, third] = &CACHES;
    let first = |cache: &Cache| cache.bytes() >> 10 << 24 | cache.ways << 16 | 1 << 8 | LINE;
    Word { leaf: 0x8000_0005, subleaf: None, register: Register::Ecx }.set(out, first(data));
    Word { leaf: 0x8000_0005, subleaf: None, register: Register::Edx }.set(out, first(code));
    let tail = SIXTEEN_WAYS << 12 | 1 << 8 | LINE;
    Word { leaf: 0x8000_0006, subleaf: None, register: Register::Ecx }
        .set(out, second.bytes() >> 10 << 16 | tail);
    Word { leaf: 0x8000_0006, subleaf: None, register: Register::Edx }
        .set(out, third.bytes() >> 19 << 18 | tail);
}
