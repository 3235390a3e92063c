//! What is wrong with a host, and what to do about it.

use std::fmt;

use kvm_bindings::KVM_API_VERSION;

use super::{Device, Node, Report, Use};

/// Why virtual machines can not be run, and what to do. `Display` is one paragraph.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advice {
    /// What is wrong: a sentence without its full stop.
    pub problem: String,
    /// What to do, the likeliest first: sentences without their full stops.
    pub steps: Vec<String>,
}

impl std::error::Error for Advice {}

impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.", self.problem)?;
        self.steps.iter().try_for_each(|step| write!(f, " {step}."))
    }
}

impl Advice {
    fn new<const N: usize>(problem: impl Into<String>, steps: [&str; N]) -> Advice {
        Advice { problem: problem.into(), steps: steps.map(str::to_owned).to_vec() }
    }

    /// What is wrong with the host of this report, if anything.
    pub(super) fn on(report: &Report) -> Option<Advice> {
        match &report.device {
            Device::Absent if report.host.modules.is_empty() || report.host.needs_module() => {
                Some(no_module(report))
            }
            Device::Absent => Some(no_node(report)),
            Device::Closed { errno: libc::EACCES | libc::EPERM, node } => {
                Some(denied(report, node.as_ref()))
            }
            Device::Closed { errno: libc::ENODEV | libc::ENXIO, .. } => Some(no_module(report)),
            Device::Closed { errno, .. } => Some(failed("opening /dev/kvm", *errno)),
            Device::Foreign => Some(Advice::new(
                "/dev/kvm is there but is not KVM's device",
                ["Remove it and make it anew as root: mknod /dev/kvm c 10 232"],
            )),
            Device::Open { api_version, .. } if *api_version != KVM_API_VERSION as i32 => {
                Some(Advice::new(
                    format!(
                        "this kernel's KVM speaks version {api_version} of its interface, not {KVM_API_VERSION}"
                    ),
                    ["Use a kernel of Linux 4.11 or later"],
                ))
            }
            Device::Open { no_vm: Some(errno), .. } => {
                Some(failed("creating a virtual machine (KVM_CREATE_VM)", *errno))
            }
            Device::Open { capabilities, .. } => {
                let missing: Vec<&str> = capabilities
                    .iter()
                    .filter(|capability| {
                        capability.importance == Use::Needed && !capability.is_there()
                    })
                    .map(|capability| capability.name)
                    .collect();
                (!missing.is_empty()).then(|| {
                    Advice::new(
                        format!(
                            "this kernel's KVM lacks what every machine here needs: {}",
                            missing.join(", ")
                        ),
                        ["Use a kernel of Linux 4.11 or later, built for PCs (x86-64)"],
                    )
                })
            }
        }
    }
}

impl super::Host {
    /// Whether the CPU could virtualize if only its module were there.
    fn needs_module(&self) -> bool {
        self.module().is_some_and(|module| !self.is_loaded(&module.replace('-', "_")))
    }
}

/// The kernel has no KVM at the moment.
fn no_module(report: &Report) -> Advice {
    let host = &report.host;
    if let Some(module) = host.module() {
        let load = format!("As root: modprobe {module}");
        let mut advice = Advice::new(
            format!("the CPU can virtualize, but the kernel module {module} is not loaded"),
            [
                load.as_str(),
                "If that says \"Operation not supported\", virtualization is switched off in the BIOS: enable Intel VT-x or \
                 AMD SVM there",
            ],
        );
        if host.in_container {
            advice.steps.insert(
                0,
                "This is a container: do it on its host, then start it with --device /dev/kvm"
                    .into(),
            );
        }
        return advice;
    }
    if host.is_guest {
        return Advice::new(
            "this host is itself a virtual machine, and its CPU shows neither Intel VT-x nor AMD-V",
            [
                "Have nested virtualization switched on for it: a CPU model that passes vmx or svm on (QEMU: -cpu host), and on its \
                 own host the parameter nested=1 of kvm-intel or kvm-amd",
                "In a cloud, choose a kind of machine that offers nested virtualization, or bare metal",
            ],
        );
    }
    let (name, setting) = match host.vendor.as_str() {
        "GenuineIntel" => {
            ("Intel VT-x", "Enable VT-x (Intel Virtualization Technology) in the BIOS")
        }
        "AuthenticAMD" | "HygonGenuine" => ("AMD-V", "Enable SVM (AMD-V) in the BIOS"),
        _ => ("hardware virtualization", "Enable virtualization (VT-x or SVM) in the BIOS"),
    };
    Advice::new(
        format!("the CPU shows no {name}: it is switched off in the BIOS, or this CPU has none"),
        [setting, "Switch the machine off and on again: a warm reboot may not be enough"],
    )
}

/// The kernel has KVM, but here is no way to it.
fn no_node(report: &Report) -> Advice {
    if report.host.in_container {
        return Advice::new(
            "the kernel has KVM, but this container was not given /dev/kvm",
            ["Start the container with --device /dev/kvm"],
        );
    }
    Advice::new(
        "the kernel has KVM, but there is no /dev/kvm",
        ["Make it as root: mknod /dev/kvm c 10 232 (udev or devtmpfs usually does)"],
    )
}

fn denied(report: &Report, node: Option<&Node>) -> Advice {
    let mut advice = match node {
        Some(node) if node.is_open_to_group() => Advice::new(
            format!("/dev/kvm may not be opened by this user ({node})"),
            ["Join its group, then log in anew: sudo usermod -aG kvm $USER"],
        ),
        Some(node) => Advice::new(
            format!("/dev/kvm may not be opened by this user ({node})"),
            [
                "As root, give it to a group of its own: chgrp kvm /dev/kvm && chmod 660 /dev/kvm",
                "Join that group, then log in anew: sudo usermod -aG kvm $USER",
            ],
        ),
        None => Advice::new(
            "/dev/kvm may not be opened by this user",
            ["Join the group kvm, then log in anew: sudo usermod -aG kvm $USER"],
        ),
    };
    if report.host.in_container {
        advice.steps.push("In a container, also start it with --device /dev/kvm".into());
    }
    advice
}

/// An error whose meaning depends on its number only.
fn failed(what: &str, errno: i32) -> Advice {
    let reason = std::io::Error::from_raw_os_error(errno);
    let step = match errno {
        libc::EBUSY => {
            "Another hypervisor has the CPU's virtualization to itself: stop its machines (VirtualBox, VMware), and \
             unload its modules"
        }
        libc::EMFILE | libc::ENFILE => "Too many files are open: raise the limit (ulimit -n)",
        libc::ENOMEM => "The host is out of memory: free some",
        libc::EOPNOTSUPP | libc::EIO => {
            "The kernel could not switch virtualization on: look into dmesg, and enable Intel VT-x or AMD SVM in the BIOS"
        }
        _ => "Look into dmesg for what the kernel says about kvm",
    };
    Advice::new(format!("{what} failed: {reason}"), [step])
}
