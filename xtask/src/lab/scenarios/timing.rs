//! From exec to the stock kernel's init, ours beside QEMU's `pc` and `microvm` in the same host.

use std::time::Instant;

use anyhow::{Result, ensure};

use super::machine::{BOOT, Machine, STEP, Vmm};
use super::{Lab, Scenario};

pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "exec-to-init",
    shows: "128 MB, 1 CPU, same kernel and initrd: no later at the init than QEMU's pc and microvm (medians, interleaved)",
    ours_only: true,
    run: exec_to_init,
}];

/// Medians of so few rounds in an emulated machine differ by this much between equals.
const NOISE: f64 = 1.03;

fn exec_to_init(lab: &mut Lab) -> Result<String> {
    let vmms = [Vmm::Boot, Vmm::Pc, Vmm::Microvm];
    let mut times = [const { Vec::new() }; 3];
    for round in 0..if lab.long { 9 } else { 3 } {
        for offset in 0..vmms.len() {
            // Each goes first in turn.
            let which = (round + offset) % vmms.len();
            let command = Machine::small("keel.do=poweroff").command(vmms[which], &lab.files);
            let begun = Instant::now();
            let mut guest = lab.host.start(&command, None)?;
            guest.expect("keel: init", BOOT)?;
            times[which].push(begun.elapsed().as_secs_f64());
            guest.wait(STEP)?;
        }
    }
    let mut medians = [0.0; 3];
    for (which, times) in times.iter_mut().enumerate() {
        times.sort_by(f64::total_cmp);
        medians[which] = times[times.len() / 2];
        println!("exec_to_init_{} {:.2} s", vmms[which].name(), medians[which]);
    }
    let [ours, others @ ..] = medians;
    let best = others.into_iter().fold(f64::INFINITY, f64::min);
    ensure!(ours <= best * NOISE, "ours took {ours:.2} s, the faster of QEMU's {best:.2} s");
    Ok(format!("{ours:.2} s, QEMU pc {:.2} s, microvm {:.2} s", others[0], others[1]))
}
