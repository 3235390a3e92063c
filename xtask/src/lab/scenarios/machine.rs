//! A guest to be tested and the command line that starts it, under ours or under QEMU.

use std::time::Duration;

use anyhow::{Context, Result};

use super::Lab;
use crate::lab::host::Session;
use crate::lab::initrd::Guest as Initrd;
use crate::lab::packages::Package;
use crate::lab::share::{self, quote};

/// From start to the init's first line. It takes 6 to 15 s; a machine that compiles beside it takes several times that.
pub const BOOT: Duration = Duration::from_secs(150);
/// From one line of the init to the next.
pub const STEP: Duration = Duration::from_secs(60);

/// Which program runs the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Vmm {
    /// The example `boot`
    #[default]
    Boot,
    /// QEMU's machine `pc`
    Pc,
    /// QEMU's machine `microvm`
    Microvm,
}

impl Vmm {
    /// The name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Boot => "boot",
            Self::Pc => "qemu-pc",
            Self::Microvm => "qemu-microvm",
        }
    }

    fn command(self) -> &'static str {
        match self {
            Self::Boot => "boot",
            Self::Pc => "qemu-system-x86_64 -M pc -nodefaults -serial stdio -enable-kvm -cpu host",
            Self::Microvm => {
                "qemu-system-x86_64 -M microvm -nodefaults -serial stdio -enable-kvm -cpu host"
            }
        }
    }
}

/// Paths of the guests' files in the host.
pub struct Files {
    generic: (String, String),
    cloud: (String, String),
}

impl Files {
    /// Puts both kernels and their test initrds into the share.
    pub fn prepare() -> Result<Self> {
        let pair = |package| {
            anyhow::Ok((share::kernel(package)?, share::initrd(Initrd::Test, Some(package))?))
        };
        Ok(Self { generic: pair(Package::Generic)?, cloud: pair(Package::Cloud)? })
    }
}

/// A machine and what its guest is to do.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Which kernel.
    pub kernel: Package,
    /// `-smp`
    pub cpus: u32,
    /// `-m`
    pub memory: &'static str,
    /// More of the kernel command line: `keel.do=…`
    pub append: String,
    /// More options of the VMM.
    pub options: String,
}

impl Machine {
    /// The cloud kernel, one CPU and 128 MiB, doing `append`.
    pub fn small(append: &str) -> Self {
        Self {
            kernel: Package::Cloud,
            cpus: 1,
            memory: "128",
            append: append.into(),
            options: String::new(),
        }
    }

    /// The command line for the host's shell. `exec` makes the VMM the process that signals reach.
    pub fn command(&self, vmm: Vmm, files: &Files) -> String {
        let (kernel, initrd) =
            if self.kernel == Package::Cloud { &files.cloud } else { &files.generic };
        let console = if vmm == Vmm::Boot { "-nographic" } else { "-display none -no-reboot" };
        // A microvm has no ACPI reset or i8042 by which the kernel's first choices work.
        let reboot = if vmm == Vmm::Microvm { " reboot=t" } else { "" };
        format!(
            "exec {} -kernel {kernel} -initrd {initrd} -append {} -m {} -smp {} {console} {}",
            vmm.command(),
            quote(&format!("console=ttyS0 {}{reboot}", self.append)),
            self.memory,
            self.cpus,
            self.options,
        )
    }
}

impl Lab {
    /// Starts a machine under the VMM under test and waits for its init.
    pub fn boot(&mut self, machine: &Machine) -> Result<Session> {
        let mut session = self.host.start(&machine.command(self.vmm, &self.files), None)?;
        session.expect("keel: init", BOOT)?;
        Ok(session)
    }

    /// Runs a command line of the host that must succeed, and gives its output without the white space around it.
    pub fn shell(&mut self, command: &str) -> Result<String> {
        let output = self.host.run(command, STEP)?;
        anyhow::ensure!(
            output.status == 0,
            "`{command}` in the host: status {}: {}",
            output.status,
            output.text
        );
        Ok(output.text.trim().to_owned())
    }

    /// The process of the VMM under test, while one runs.
    pub fn vmm_pid(&mut self) -> Result<u32> {
        self.shell("pidof boot")?.parse().context("not one process named boot")
    }
}

/// The rest of the next line `keel: WHAT …`.
pub fn said(session: &mut Session, what: &str) -> Result<String> {
    let start = format!("keel: {what} ");
    let line = session.expect(&start, STEP)?;
    let value = line.split_once(&start).map(|(_, value)| value.trim()).unwrap_or_default();
    Ok(value.to_owned())
}
