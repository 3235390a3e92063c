//! Every way in which it ends: by the guest, told apart in words and status; by the user, with a terminal that is usable
//! afterwards.

use anyhow::{Result, ensure};
use rustix::process::Signal;

use super::machine::{BOOT, Machine, STEP};
use super::{Lab, Scenario};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "panic-and-triple-fault",
        shows: "a kernel panic and a triple fault are told apart, by words and by exit status, from each other and from power-off",
        ours_only: true,
        run: told_apart,
    },
    Scenario {
        name: "terminal-ctrl-a-x",
        shows: "Ctrl-A x ends it, and the terminal's settings are those from before",
        ours_only: true,
        run: ctrl_a_x,
    },
    Scenario {
        name: "terminal-signals",
        shows: "SIGTERM and SIGINT end it with status 0 and restore the terminal; after kill -9 it starts again",
        ours_only: true,
        run: signals,
    },
];

fn told_apart(lab: &mut Lab) -> Result<String> {
    let mut statuses = Vec::new();
    for (word, name) in [("panic", "panic"), ("triple-fault", "triple fault")] {
        let mut machine = Machine::small(&format!("keel.do={word}"));
        machine.options = "-no-reboot".into();
        let mut guest = lab.boot(&machine)?;
        let status = guest.wait(STEP)?;
        // The guest's own words are on standard output.
        let words = guest.errors().to_lowercase().replace('-', " ");
        ensure!(words.contains(name), "the VMM did not say {name:?} but {:?}", guest.errors());
        ensure!(status != 0, "a {name} ended with status 0");
        statuses.push(status);
    }
    ensure!(
        statuses[0] != statuses[1],
        "a panic and a triple fault both end with status {}",
        statuses[0]
    );
    Ok(format!("status {} for a panic, {} for a triple fault", statuses[0], statuses[1]))
}

/// Runs the machine in a terminal, between two looks at the terminal's settings.
fn on_terminal(
    lab: &mut Lab,
    end: impl FnOnce(&mut Lab, &crate::lab::host::Session) -> Result<()>,
) -> Result<(i32, bool)> {
    let command = Machine::small("keel.do=ask").command(lab.vmm, &lab.files);
    let command = format!(
        "b=$(stty -g); ({command}); s=$?; a=$(stty -g); [ \"$a\" = \"$b\" ] && echo lab: terminal same; echo lab: status $s; exit $s"
    );
    let mut session = lab.host.start(&command, Some((24, 80)))?;
    session.expect("keel: ask", BOOT)?;
    end(lab, &session)?;
    let status = session.wait(STEP)?;
    let same = session.text().contains("lab: terminal same");
    Ok((status, same))
}

fn ctrl_a_x(lab: &mut Lab) -> Result<String> {
    let (status, same) = on_terminal(lab, |_, session| session.input(b"\x01x"))?;
    ensure!(status == 0, "Ctrl-A x ended with status {status}");
    ensure!(same, "Ctrl-A x left the terminal with other settings");
    Ok(String::new())
}

fn signals(lab: &mut Lab) -> Result<String> {
    for signal in ["TERM", "INT"] {
        let (status, same) = on_terminal(lab, |lab, _| {
            lab.shell(&format!("kill -{signal} $(pidof boot)")).map(drop)
        })?;
        ensure!(status == 0, "SIG{signal} ended with status {status}");
        ensure!(same, "SIG{signal} left the terminal with other settings");
    }
    let (status, _) = on_terminal(lab, |lab, _| lab.shell("kill -9 $(pidof boot)").map(drop))?;
    ensure!(status == 128 + Signal::KILL.as_raw(), "kill -9 ended with status {status}");
    let (status, same) = on_terminal(lab, |_, session| session.input(b"\x01x"))?;
    ensure!(status == 0 && same, "after kill -9, a second start ended with status {status}");
    Ok(String::new())
}
