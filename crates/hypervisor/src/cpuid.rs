//! What the `CPUID` instruction answers, as data.

use serde::{Deserialize, Serialize};

/// One answer of `CPUID` (Intel SDM volume 2, "CPUID").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidEntry {
    /// EAX on input.
    pub leaf: u32,
    /// ECX on input, for leaves in which it matters.
    pub subleaf: Option<u32>,
    /// EAX on output.
    pub eax: u32,
    /// EBX on output.
    pub ebx: u32,
    /// ECX on output.
    pub ecx: u32,
    /// EDX on output.
    pub edx: u32,
}

/// All that `CPUID` answers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpuid(pub Vec<CpuidEntry>);

impl Cpuid {
    /// The answer for a leaf and, where it matters, a subleaf.
    pub fn get(&self, leaf: u32, subleaf: u32) -> Option<&CpuidEntry> {
        self.0.iter().find(|entry| entry.answers(leaf, subleaf))
    }

    /// The same, to be changed.
    pub fn get_mut(&mut self, leaf: u32, subleaf: u32) -> Option<&mut CpuidEntry> {
        self.0.iter_mut().find(|entry| entry.answers(leaf, subleaf))
    }

    /// Puts an answer in, instead of the one that was there.
    pub fn set(&mut self, entry: CpuidEntry) {
        self.0.retain(|old| {
            old.leaf != entry.leaf || (old.subleaf != entry.subleaf && old.subleaf.is_some())
        });
        self.0.push(entry);
    }

    /// Takes all answers of a leaf out.
    pub fn remove(&mut self, leaf: u32) {
        self.0.retain(|entry| entry.leaf != leaf);
    }
}

impl CpuidEntry {
    pub(crate) fn answers(&self, leaf: u32, subleaf: u32) -> bool {
        self.leaf == leaf && self.subleaf.is_none_or(|own| own == subleaf)
    }
}
