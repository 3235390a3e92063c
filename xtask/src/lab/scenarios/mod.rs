//! The tests that need the lab: each a scenario over one booted host that they share.
//!
//! - [`machine`]: how a guest is described and started under ours or under QEMU
//! - [`boots`]: kernels, memory sizes, CPUs; reboot
//! - [`ends`]: every way a guest or the user ends it, told apart
//! - [`state`]: save, kill and restore; paging
//! - [`timing`]: exec to init beside QEMU

mod boots;
mod ends;
mod machine;
mod state;
mod timing;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::host::{Host, HostOptions};
use super::packages::Package;
use super::share;
use crate::tally::Tally;
use machine::{Files, Vmm};

/// Which scenarios, and how.
#[derive(Clone, Debug, clap::Args)]
pub struct ScenarioOptions {
    /// Only the tests whose name contains this (may be given more than once)
    #[arg(long, value_name = "NAME")]
    pub only: Vec<String>,
    /// More rounds where a test has rounds
    #[arg(long)]
    pub long: bool,
    /// Every test this many times: what fails now and then shows itself
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub repeat: u32,
    /// The VMM under test; QEMU's two show whether a failure is ours or the lab's
    #[arg(long, value_enum, default_value_t = Vmm::Boot)]
    pub vmm: Vmm,
}

impl Default for ScenarioOptions {
    fn default() -> Self {
        Self { only: Vec::new(), long: false, repeat: 1, vmm: Vmm::Boot }
    }
}

/// What a scenario works with.
pub struct Lab {
    host: Host,
    files: Files,
    vmm: Vmm,
    long: bool,
    /// What each kernel reports as errors under QEMU, once asked.
    usual_errors: HashMap<Package, Vec<String>>,
}

impl Lab {
    fn open(host: &HostOptions, options: &ScenarioOptions) -> Result<Self> {
        Ok(Self {
            files: Files::prepare()?,
            host: Host::boot(host)?,
            vmm: options.vmm,
            long: options.long,
            usual_errors: HashMap::new(),
        })
    }
}

/// One test.
struct Scenario {
    name: &'static str,
    shows: &'static str,
    /// Whether it is about what only our VMM has.
    ours_only: bool,
    /// Gives a detail for the test's line.
    run: fn(&mut Lab) -> Result<String>,
}

fn all() -> impl Iterator<Item = &'static Scenario> {
    [boots::SCENARIOS, ends::SCENARIOS, state::SCENARIOS, timing::SCENARIOS].into_iter().flatten()
}

/// Prints every scenario's name and what it shows.
pub fn list() {
    all().for_each(|scenario| println!("{:<28} {}", scenario.name, scenario.shows));
}

/// Runs the scenarios that the options choose.
pub fn run(host_options: &HostOptions, options: &ScenarioOptions) -> Result<Tally> {
    let mut tally = Tally::new(std::env::var_os("CI").is_some());
    let chosen: Vec<_> = all()
        .filter(|scenario| options.vmm == Vmm::Boot || !scenario.ours_only)
        .filter(|scenario| {
            options.only.is_empty() || options.only.iter().any(|part| scenario.name.contains(part))
        })
        .flat_map(|scenario| std::iter::repeat_n(scenario, options.repeat as usize))
        .collect();
    if chosen.is_empty() {
        bail!("no lab test has such a name: `cargo xtask lab test --list` names them");
    }
    let begun = Instant::now();
    if options.vmm == Vmm::Boot {
        share::boot()?;
    }
    share::qemu()?;
    println!("lab: programs ready after {:.1} s", begun.elapsed().as_secs_f64());
    let mut lab = Lab::open(host_options, options)?;
    let mut retries = 0;
    for scenario in chosen {
        let mut console = lab.host.console_length();
        let mut begun = Instant::now();
        let mut result = attempt(scenario, &mut lab);
        if result.is_err() {
            // Only the outer kernel's own words make it the lab's failure, and then it may be tried once more.
            let failure = lab.host.lab_failure(console);
            if let Some(words) = &failure {
                retries += 1;
                println!("lab: {} is retried: the lab itself failed: {words}", scenario.name);
            }
            if failure.is_some() || lab.host.run("true", Duration::from_secs(30)).is_err() {
                drop(lab);
                lab = Lab::open(host_options, options)?;
            }
            if failure.is_some() {
                console = lab.host.console_length();
                begun = Instant::now();
                result = attempt(scenario, &mut lab);
                if let Some(words) =
                    result.is_err().then(|| lab.host.lab_failure(console)).flatten()
                {
                    println!("lab: and the lab failed again: {words}");
                }
            }
        }
        match result {
            Ok(detail) => tally.pass(scenario.name, begun.elapsed(), &detail),
            Err(error) => tally.fail(scenario.name, begun.elapsed(), &format!("{error:#}")),
        }
    }
    println!("lab: {retries} retried for the lab's own failures");
    Ok(tally)
}

/// The processes of either VMM: QEMU runs as its loader's child name.
const VMMS: &str = "boot ld-linux-x86-64.so.2";

/// One run of a scenario, after which no VMM and no file of one may be left.
fn attempt(scenario: &Scenario, lab: &mut Lab) -> Result<String> {
    let limit = Duration::from_secs(30);
    let result = (scenario.run)(lab);
    let left = lab.host.run(&format!("pidof {VMMS}; ls -A /tmp"), limit)?.text;
    if left.is_empty() {
        return result;
    }
    // What each thread was doing says whose failure it was.
    let threads = format!(
        "for t in $(pidof {VMMS} | tr ' ' '\n' | sed 's,.*,/proc/&/task/*,'); do echo \"$(cat $t/comm): $(cut -d' ' -f3,14,15 $t/stat) \
         $(cat $t/wchan) $(cat $t/syscall)\"; done; killall -9 {VMMS}; rm -rf /tmp/*"
    );
    let threads = lab.host.run(&threads, limit)?.text;
    match result {
        Ok(_) => bail!("processes or files are left: {}", left.replace('\n', " ")),
        Err(error) => {
            println!(
                "lab: threads of the VMM (state, ticks in user and kernel, where it waits):\n{}",
                threads.trim_end()
            );
            Err(error)
        }
    }
}
