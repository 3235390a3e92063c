//! `cargo xtask lab`: the words of its command line, and what they do.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};

use super::host::{Host, HostOptions};
use super::scenarios::{self, ScenarioOptions};
use super::{packages, share, terminal};

/// `cargo xtask lab`
#[derive(Args)]
#[command(
    about = "Run things where stock Linux guests run: in a host with AMD-V, emulated in software",
    long_about = "Run things where stock Linux guests run: in a host with AMD-V, emulated in software.\n\n\
        The lab is a small host in QEMU's software CPU. Debian's own kernel runs in it, finds AMD-V, and gives a real \
        /dev/kvm to the programs run in it, so that no hardware virtualization and no privilege is needed here. The \
        packages it is made of (linux-image-amd64, linux-image-cloud-amd64, busybox-static) are fetched once with apt-get and \
        kept in target/lab; QEMU 10.0 or later is installed if need be and if you are root, else you are told how.",
    after_long_help = "EXAMPLES\n  A Debian kernel to a shell, in this terminal (leave with `exit`, or Ctrl-A x):\n    \
        cargo xtask lab -- boot -kernel debian -initrd busybox -append \"console=ttyS0\" -m 512 -smp 2 -nographic\n  \
        Your own kernel and initrd:\n    \
        cargo xtask lab -- boot -kernel VMLINUZ -initrd INITRD -append \"console=ttyS0\" -m 512 -nographic\n  \
        A shell in the lab's host, with `boot` and `qemu-system-x86_64` in PATH:\n    cargo xtask lab shell\n\n\
        FILES\n  target/lab/debs         the packages' files; one put there by hand is taken instead of fetched\n  \
        target/lab/share        seen by the host as /share\n  target/lab/console.log  the last host's console"
)]
pub struct Lab {
    #[command(flatten)]
    host: HostOptions,
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Fetch what the lab is made of, and nothing else
    Fetch,
    /// Run the example `boot` in the lab with this terminal, and exit with its status
    ///
    /// Every argument that names a file here is copied into the lab. Ready-made are: `-kernel debian` (linux-image-amd64),
    /// `-kernel debian-cloud` (linux-image-cloud-amd64), `-initrd test` (a static init that does what `keel.do=` in -append
    /// says: cpus, memory, clock, timers, rtc, wall, dmesg, ask, shell, checksum-loop, reboot, poweroff, halt, panic,
    /// triple-fault; for example `keel.do=cpus,memory,poweroff keel.memory=64M`) and `-initrd busybox` (the same with a
    /// busybox, and a shell if nothing says otherwise).
    #[command(disable_help_flag = true)]
    Boot {
        /// The options of `boot`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTIONS")]
        options: Vec<String>,
    },
    /// A shell in the lab's host
    Shell,
    /// Run a command line in the lab's host with this terminal, and exit with its status
    Run {
        /// The command and its arguments; those that name files here are copied into the lab
        #[arg(
            trailing_var_arg = true,
            allow_hyphen_values = true,
            required = true,
            value_name = "COMMAND"
        )]
        command: Vec<String>,
    },
    /// Run the tests that need the lab
    Test {
        #[command(flatten)]
        options: ScenarioOptions,
        /// Only list the tests' names and what each shows
        #[arg(long)]
        list: bool,
    },
}

impl Lab {
    /// Does it, and gives the exit status.
    pub fn run(self) -> Result<u8> {
        if let Action::Test { list: true, .. } = self.action {
            scenarios::list();
            return Ok(0);
        }
        let begun = Instant::now();
        let stage = |what: &str, begun: Instant| {
            // Not for what was there already.
            if begun.elapsed() > Duration::from_secs(1) {
                eprintln!("lab: {what} took {:.1} s", begun.elapsed().as_secs_f64());
            }
        };
        packages::fetch().context("fetch what the lab is made of")?;
        stage("fetching", begun);
        let begun = Instant::now();
        let line = match &self.action {
            Action::Fetch => return Ok(0),
            Action::Test { options, .. } => {
                let tally = scenarios::run(&self.host, options)?;
                tally.print();
                return Ok(u8::from(!tally.is_good()));
            }
            Action::Shell => {
                share::boot()?;
                share::qemu()?;
                "exec sh -i".to_owned()
            }
            Action::Boot { options } => {
                share::boot()?;
                command_line("boot", options)?
            }
            Action::Run { command } => {
                let (program, arguments) = command.split_first().context("no command given")?;
                match program.as_str() {
                    "boot" => share::boot()?,
                    "qemu-system-x86_64" => share::qemu()?,
                    _ => {}
                }
                let program = share::translate(std::slice::from_ref(program))?.concat();
                command_line(&program, arguments)?
            }
        };
        stage("building", begun);
        let status = terminal::run(&mut Host::boot(&self.host)?, &line)?;
        match u8::try_from(status) {
            Ok(status) => Ok(status),
            Err(_) => bail!("the command ended with the impossible status {status}"),
        }
    }
}

fn command_line(program: &str, arguments: &[String]) -> Result<String> {
    let words = share::translate(arguments)?;
    let words: Vec<_> = std::iter::once(program)
        .chain(words.iter().map(String::as_str))
        .map(share::quote)
        .collect();
    Ok(format!("exec {}", words.join(" ")))
}
