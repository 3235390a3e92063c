//! `cargo xtask test`: everything that says whether the project is as it should be, one step after another.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::lab::host::HostOptions;
use crate::lab::packages;
use crate::lab::scenarios::{self, ScenarioOptions};
use crate::tally::Tally;
use crate::workspace::{cargo, output, run};
use crate::{arrows, docs};

/// `cargo xtask test`
#[derive(Args)]
#[command(
    about = "Run every test there is",
    long_about = "Run every test there is, one step after another:\n\n  \
        format     cargo fmt --check\n  \
        clippy     cargo clippy, every target, warnings are errors\n  \
        rustdoc    the documentation builds without a warning\n  \
        deny       licences, bans and sources of every dependency (cargo-deny)\n  \
        arrows     the crates depend on each other as docs/architecture.md draws it\n  \
        docs       what the documentation says programs print is what they print\n  \
        tests      unit, integration and documentation tests of every crate\n  \
        lab        stock Debian kernels boot, reboot, are saved and restored in the lab (`cargo xtask lab test --list`)\n\n\
        What cannot run here is named, with the reason, and counted as skipped; with CI set in the environment it is a failure. \
        The last line is `N passed, N failed, N skipped`, and the exit status is 0 if nothing failed. Each check of a step \
        counts as one, each test as one.",
    after_long_help = "EXAMPLES\n  Everything but the slow part:\n    cargo xtask test --no-lab\n  \
        One step, or the tests and lab tests of one name:\n    cargo xtask test --only clippy\n    \
        cargo xtask test --only save-kill-restore\n\n\
        NEEDS\n  For `deny`: cargo-deny (--install gets it). For `lab`: a Debian mirror the first time, see `cargo xtask lab --help`."
)]
pub struct Test {
    /// Leave the lab out
    #[arg(long)]
    no_lab: bool,
    /// Only the step of this name, or the lab tests whose name contains it
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Also what takes long: tests marked `ignore`, more rounds in the lab
    #[arg(long)]
    long: bool,
    /// Install what is missing (cargo-deny), as CI does
    #[arg(long)]
    install: bool,
    #[command(flatten)]
    host: HostOptions,
}

/// Why a step did not pass.
enum Trouble {
    Failed(anyhow::Error),
    CannotRun(String),
}

impl From<anyhow::Error> for Trouble {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(error)
    }
}

const STEPS: &[&str] = &["format", "clippy", "rustdoc", "deny", "arrows", "docs", "tests", "lab"];

impl Test {
    /// Does it, and gives the exit status.
    pub fn run(self) -> Result<u8> {
        let begun = Instant::now();
        let strict = std::env::var_os("CI").is_some();
        let mut tally = Tally::new(strict);
        // A name that is no step's is the lab tests' to know.
        let only_step = self.only.as_deref().filter(|name| STEPS.contains(name));
        let lab_names: Vec<_> = self.only.iter().filter(|_| only_step.is_none()).cloned().collect();
        for step in STEPS {
            let chosen = match &self.only {
                Some(_) if only_step.is_none() => *step == "lab",
                Some(name) => name == step,
                None => *step != "lab" || !self.no_lab,
            };
            if !chosen {
                continue;
            }
            println!("----  {step}");
            let begun = Instant::now();
            let result = match *step {
                "tests" => cargo_tests(self.long, &mut tally).map(|()| None),
                "lab" => self.lab(&lab_names, &mut tally).map(|()| None),
                step => check(step, strict || self.install).map(Some),
            };
            match result {
                Ok(None) => println!("      {step} took {:.0} s", begun.elapsed().as_secs_f64()),
                Ok(Some(detail)) => tally.pass(step, begun.elapsed(), &detail),
                Err(Trouble::Failed(error)) => {
                    tally.fail(step, begun.elapsed(), &format!("{error:#}"))
                }
                Err(Trouble::CannotRun(why)) => tally.skip(step, &why),
            }
        }
        if self.no_lab && self.only.is_none() {
            println!("lab: left out, as told by --no-lab");
        }
        println!("took {:.0} s", begun.elapsed().as_secs_f64());
        tally.print();
        Ok(u8::from(!tally.is_good()))
    }

    fn lab(&self, names: &[String], tally: &mut Tally) -> std::result::Result<(), Trouble> {
        // Only what is missing is a reason not to run; a host that does not boot is a failure.
        packages::fetch().map_err(|error| Trouble::CannotRun(format!("{error:#}")))?;
        let options =
            ScenarioOptions { only: names.to_vec(), long: self.long, ..ScenarioOptions::default() };
        tally.join(scenarios::run(&self.host, &options)?);
        Ok(())
    }
}

/// A step that is one check, and a detail of its passing.
fn check(step: &str, install: bool) -> std::result::Result<String, Trouble> {
    match step {
        "format" => run(cargo().args(["fmt", "--all", "--check"]))?,
        "clippy" => {
            run(cargo().args([
                "clippy",
                "--quiet",
                "--workspace",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ]))?;
        }
        "rustdoc" => {
            run(cargo()
                .args(["doc", "--quiet", "--workspace", "--no-deps"])
                .env("RUSTDOCFLAGS", "-D warnings"))?;
        }
        "deny" => deny(install)?,
        "arrows" => return Ok(arrows::check()?),
        "docs" => return Ok(docs::check()?),
        other => return Err(Trouble::CannotRun(format!("there is no step {other}"))),
    }
    Ok(String::new())
}

fn deny(install: bool) -> std::result::Result<(), Trouble> {
    if output(cargo().args(["deny", "--version"])).is_err() {
        if !install {
            return Err(Trouble::CannotRun(
                "cargo-deny is not installed: `cargo install cargo-deny --locked`, or --install here".into(),
            ));
        }
        run(cargo().args(["install", "cargo-deny", "--locked", "--quiet"]))?;
    }
    Ok(run(cargo().args(["deny", "--log-level", "error", "check", "licenses", "bans", "sources"]))?)
}

/// Every crate's tests. Cargo builds first, so that a test's time is the test's.
fn cargo_tests(long: bool, tally: &mut Tally) -> std::result::Result<(), Trouble> {
    // Examples have tests too; benchmarks are built by clippy and run by `cargo bench`.
    let kinds: [&[&str]; 2] = [&["--lib", "--bins", "--tests", "--examples"], &["--doc"]];
    // The tests of `boot` run the program itself, which `--examples` does not make: it makes the program's own tests.
    run(cargo().args(["build", "--quiet", "--examples"])).map_err(Trouble::Failed)?;
    let mut broken = None;
    for kind in kinds {
        let mut command = cargo();
        command.args(["test", "--quiet", "--workspace", "--no-fail-fast"]).args(kind);
        // One line a test: its name is what says which was left out and which failed.
        command.args(["--", "--format=pretty"]);
        if long {
            command.arg("--include-ignored").env("KEEL_LONG", "1");
        }
        if let Err(error) = count(&mut command, tally) {
            broken = Some(error);
        }
    }
    broken.map_or(Ok(()), |error| Err(Trouble::Failed(error)))
}

/// Runs `cargo test` and counts what its lines say.
fn count(command: &mut Command, tally: &mut Tally) -> Result<()> {
    let words = crate::workspace::words(command);
    let mut child =
        command.stdout(Stdio::piped()).spawn().with_context(|| format!("run {words}"))?;
    let lines = BufReader::new(child.stdout.take().context("cargo test has no output")?).lines();
    let mut counts = Counts::default();
    for line in lines {
        let line = line.context("read what cargo test says")?;
        if !counts.take(&line) {
            println!("{line}");
        }
    }
    let status = child.wait().with_context(|| format!("wait for {words}"))?;
    let named = !counts.failed.is_empty();
    println!("      {} tests passed", counts.passed);
    counts.failed.iter().for_each(|name| println!("FAIL  {name}"));
    tally.add(counts.passed, counts.failed, counts.skipped);
    // Nothing failed by name: it did not build, or a test ended the whole program.
    if !status.success() && !named {
        bail!("{words}: {status}");
    }
    Ok(())
}

/// What the lines of the test programs say.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    passed: u64,
    failed: Vec<String>,
    skipped: Vec<(String, String)>,
}

impl Counts {
    /// Counts a line `test NAME ... RESULT`; whether it was one that need not be shown.
    fn take(&mut self, line: &str) -> bool {
        if let Some((name, result)) =
            line.strip_prefix("test ").and_then(|line| line.rsplit_once(" ... "))
        {
            match result.split(',').next().unwrap_or_default().trim() {
                "ok" => self.passed += 1,
                "FAILED" => self.failed.push(name.to_owned()),
                "ignored" => {
                    let why = result
                        .split_once(", ")
                        .map_or("takes long: --long runs it", |(_, why)| why);
                    self.skipped.push((name.to_owned(), why.to_owned()));
                }
                _ => return false,
            }
            return true;
        }
        line.is_empty() || line.starts_with("running ") || line.starts_with("test result: ok")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_test_programs_are_counted() {
        let mut counts = Counts::default();
        let shown: Vec<_> = [
            "",
            "running 4 tests",
            "test a::works ... ok",
            "test a::panics - should panic ... ok",
            "test b ... FAILED",
            "test c ... ignored, needs two hosts",
            "test crates/x/src/lib.rs - (line 9) - compile ... ok",
            "test d ... ignored",
            "---- b stdout ----",
            "test result: FAILED. 3 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out",
        ]
        .into_iter()
        .filter(|line| !counts.take(line))
        .collect();
        assert_eq!(shown.len(), 2, "{shown:?}");
        let skipped = [("c", "needs two hosts"), ("d", "takes long: --long runs it")];
        let skipped = skipped.map(|(name, why)| (name.to_owned(), why.to_owned())).to_vec();
        assert_eq!(counts, Counts { passed: 3, failed: vec!["b".into()], skipped });
    }
}
