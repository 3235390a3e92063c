//! CPU models: what a guest's `CPUID` answers, decided from words a user wrote and from what the backend supports.
//!
//! Nothing here asks the host: a backend says what it supports as a [`Cpuid`](crate::Cpuid), so the same models serve KVM
//! and a CPU in software.
//!
//! ```
//! use keel_hypervisor::cpu_model::{CpuModel, Topology};
//! # fn main() -> keel_hypervisor::Result<()> {
//! # let supported = keel_hypervisor::Cpuid::default();
//! let model: CpuModel = "x86-64-v3,+rdrand,-avx2".parse()?;
//! let topology = Topology { cpus: 4, sockets: 1, dies: 1, cores: 2, threads: 2 };
//! let (cpuid, missing) = model.cpuid(&supported, &topology, 0, None)?;
//! for feature in missing {
//!     eprintln!("the host does not support the requested feature {feature}");
//! }
//! # let _ = cpuid;
//! # Ok(())
//! # }
//! ```
//!
//! # Modules
//!
//! | file | subject |
//! |---|---|
//! | `mod` | [`CpuModel`] and the words it is parsed from |
//! | `features` | [`Feature`]: names and bits |
//! | `resolve` | which features a model offers on a host, and which it misses |
//! | `leaves` | the answers of `CPUID` for one vCPU |
//! | `caches` | the caches a named model has |
//! | `topology` | [`Topology`]: places and APIC IDs |

mod caches;
mod features;
mod leaves;
mod resolve;
#[cfg(test)]
mod tests;
mod topology;

use std::fmt::Write as _;
use std::str::FromStr;

pub use features::{Feature, Register, Word, features, find};
pub use topology::{MAX_CPUS, Place, Topology};

use crate::{Error, Result};

/// A CPU model with what was added to it and taken from it. Parsed from the words of `-cpu`; the default is `host`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuModel {
    base: Base,
    /// Features asked for or refused by name, in the order they were written: the last word counts.
    changes: Vec<(Feature, bool)>,
    enforce: bool,
    pmu: bool,
    hide_hypervisor: bool,
    vendor: Option<Vendor>,
    physical_bits: Option<u8>,
}

/// What a model starts from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Base {
    /// All the backend supports.
    #[default]
    Host,
    /// A level of the x86-64 psABI, 1 to 4.
    Level(u8),
}

/// Whose CPU it is: leaves and topology differ in their layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Vendor {
    Intel,
    Amd,
}

const MODELS: [(&str, Base, &str); 6] = [
    ("host", Base::Host, "all that this host and its hypervisor offer (the default)"),
    ("max", Base::Host, "the same"),
    ("x86-64-v1", Base::Level(1), "the x86-64 baseline: SSE2"),
    ("x86-64-v2", Base::Level(2), "and SSE4.2, SSSE3, POPCNT, CMPXCHG16B (about 2009)"),
    ("x86-64-v3", Base::Level(3), "and AVX2, BMI2, FMA, F16C, LZCNT, MOVBE (about 2015)"),
    ("x86-64-v4", Base::Level(4), "and AVX-512 F, BW, CD, DQ, VL"),
];

/// Options that are no feature, as `-cpu help` shows them.
const OPTIONS: [(&str, &str); 6] = [
    ("enforce", "refuse to start where the host lacks a feature of the model"),
    ("check", "warn about it (always on)"),
    ("pmu", "give the guest the host's performance counters (off by default)"),
    ("kvm", "show the guest the hypervisor's own leaves (on by default)"),
    ("vendor", "GenuineIntel or AuthenticAMD, instead of the host's"),
    ("phys-bits", "width of physical addresses, 36 to 52"),
];

const SWITCH: &str = "on or off";

impl CpuModel {
    /// The model's name, without what was added and taken.
    pub fn name(&self) -> &'static str {
        MODELS.iter().find(|(_, base, _)| *base == self.base).map_or("host", |(name, ..)| name)
    }

    /// Whether [`cpuid`](CpuModel::cpuid) refuses a host that does not have all features.
    pub fn enforce(&self) -> bool {
        self.enforce
    }

    /// The text of `-cpu help`: models, options and features.
    pub fn help() -> String {
        let mut text = String::from("CPU models:\n");
        for (name, _, about) in MODELS {
            let _ = writeln!(text, "  {name:<12} {about}");
        }
        text.push_str("\nOptions (name=value; a switch alone is on):\n");
        for (name, about) in OPTIONS {
            let _ = writeln!(text, "  {name:<12} {about}");
        }
        text.push_str("\nFeatures (+name, -name, name=on, name=off):\n");
        let mut names: Vec<&str> = features().map(|feature| feature.name).collect();
        names.sort_unstable();
        names.dedup();
        let mut column = 0;
        for name in names {
            if column + 1 + name.len() > 78 {
                text.push('\n');
                column = 0;
            }
            let indent = if column == 0 { "  " } else { " " };
            text.push_str(indent);
            text.push_str(name);
            column += indent.len() + name.len();
        }
        text.push('\n');
        text
    }

    fn option(&mut self, word: &str) -> Result<()> {
        let (name, value) = match (word.strip_prefix('+'), word.strip_prefix('-')) {
            (Some(name), _) => (name, "on"),
            (_, Some(name)) => (name, "off"),
            _ => word.split_once('=').unwrap_or((word, "on")),
        };
        let wrong = |expected| Error::CpuOption { option: word.to_owned(), expected };
        let switch = || match value {
            "on" | "yes" | "true" => Ok(true),
            "off" | "no" | "false" => Ok(false),
            _ => Err(wrong(SWITCH)),
        };
        match name {
            "enforce" => self.enforce = switch()?,
            "check" => drop(switch()?),
            "pmu" => self.pmu = switch()?,
            "kvm" => self.hide_hypervisor = !switch()?,
            "vendor" => {
                self.vendor = Some(match value {
                    "GenuineIntel" => Vendor::Intel,
                    "AuthenticAMD" => Vendor::Amd,
                    _ => return Err(wrong("GenuineIntel or AuthenticAMD")),
                });
            }
            "phys-bits" => {
                let bits = value.parse().ok().filter(|bits| (36..=52).contains(bits));
                self.physical_bits = Some(bits.ok_or_else(|| wrong("a number from 36 to 52"))?);
            }
            _ => {
                let found = find(name);
                if found.is_empty() {
                    let known =
                        features().map(|feature| feature.name).chain(OPTIONS.map(|(name, _)| name));
                    return Err(Error::UnknownCpuFeature {
                        name: name.to_owned(),
                        nearest: nearest(name, known),
                    });
                }
                let on = switch()?;
                self.changes.extend(found.into_iter().map(|feature| (feature, on)));
            }
        }
        Ok(())
    }
}

impl FromStr for CpuModel {
    type Err = Error;

    fn from_str(words: &str) -> Result<Self> {
        let mut words = words.split(',');
        let name = words.next().unwrap_or_default();
        let Some((_, base, _)) = MODELS.iter().find(|(model, ..)| *model == name) else {
            let nearest = nearest(name, MODELS.iter().map(|(name, ..)| *name));
            return Err(Error::UnknownCpuModel { name: name.to_owned(), nearest });
        };
        let mut model = CpuModel { base: *base, ..CpuModel::default() };
        for word in words {
            model.option(word)?;
        }
        Ok(model)
    }
}

/// The known name that the fewest edits turn a mistyped one into, if that is not too many.
fn nearest(typed: &str, known: impl Iterator<Item = &'static str>) -> Option<&'static str> {
    let typed: String = features::plain(typed).chars().take(64).collect();
    known
        .map(|name| (strsim::levenshtein(&typed, &features::plain(name)), name))
        .min_by_key(|(distance, _)| *distance)
        .filter(|(distance, _)| *distance <= 1 + typed.chars().count() / 4)
        .map(|(_, name)| name)
}
