use std::fs;
use std::path::PathBuf;

use kvm_bindings::{KVM_CAP_MAX_VCPUS, KVM_CAP_NR_MEMSLOTS};

use super::*;

/// A directory that looks like a host's root, gone with the test.
struct Root(PathBuf);

impl Root {
    fn new(name: &str) -> Root {
        let path = std::env::temp_dir().join(format!("keel-probe-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Root(path)
    }

    fn file(self, path: &str, text: &str) -> Root {
        let path = self.0.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        self
    }

    fn cpu(self, vendor: &str, flags: &str) -> Root {
        let one = format!(
            "processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {flags} lm\nbugs\t\t: x\n\n"
        );
        self.file("proc/cpuinfo", &one.repeat(2))
    }

    fn module(self, name: &str) -> Root {
        self.file(&format!("sys/module/{name}/refcnt"), "0\n").file("sys/module/ext4/refcnt", "1\n")
    }

    fn report(&self) -> Report {
        Report::probe_at(&self.0)
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn opened(host: Host, value: i32) -> Report {
    let device =
        Device::Open { api_version: 12, no_vm: None, capabilities: capabilities::check(|_| value) };
    Report { host, device }
}

#[test]
fn a_host_is_read_from_its_files() {
    let root = Root::new("read")
        .cpu("GenuineIntel", "vmx hypervisor")
        .module("kvm")
        .module("kvm_intel")
        .module("kvmfr")
        .file("sys/module/kvm_intel/parameters/nested", "Y\n")
        .file(".dockerenv", "");
    let expected = Host {
        vendor: "GenuineIntel".into(),
        vmx: true,
        svm: false,
        is_guest: true,
        in_container: true,
        modules: vec!["kvm".into(), "kvm_intel".into()],
        nested: Some(true),
    };
    assert_eq!(root.report().host, expected);
    let text = root.report().to_string();
    assert!(text.starts_with("CPU            GenuineIntel: Intel VT-x (vmx)\n"), "{text}");
    assert!(text.contains("nested guests  yes\n"), "{text}");

    let root = Root::new("amd")
        .cpu("AuthenticAMD", "svm")
        .file("sys/module/kvm_amd/parameters/nested", "0");
    let host = root.report().host;
    assert_eq!((host.vmx, host.svm, host.is_guest, host.nested), (false, true, false, Some(false)));
    assert_eq!(Root::new("empty").report().host, Host::default());
}

#[test]
fn a_module_that_is_not_loaded() {
    let why = Root::new("m1").cpu("GenuineIntel", "vmx").report().why_not().unwrap();
    assert!(why.contains("modprobe kvm-intel") && why.contains("VT-x"), "{why}");
    // The general module alone is not enough.
    let why = Root::new("m2").cpu("AuthenticAMD", "svm").module("kvm").report().why_not().unwrap();
    assert!(why.contains("modprobe kvm-amd") && !why.contains("--device"), "{why}");
    let why = Root::new("m3")
        .cpu("AuthenticAMD", "svm")
        .file(".dockerenv", "")
        .report()
        .why_not()
        .unwrap();
    assert!(why.contains("on its host") && why.contains("modprobe kvm-amd"), "{why}");
}

#[test]
fn virtualization_that_is_switched_off() {
    let why = Root::new("b1").cpu("GenuineIntel", "sse").report().why_not().unwrap();
    assert!(
        why.contains("Enable VT-x") && why.contains("BIOS") && !why.contains("modprobe"),
        "{why}"
    );
    let why = Root::new("b2").cpu("AuthenticAMD", "sse").report().why_not().unwrap();
    assert!(why.contains("Enable SVM (AMD-V) in the BIOS"), "{why}");
    // In a virtual machine there is no BIOS to set.
    let why = Root::new("b3").cpu("GenuineIntel", "hypervisor").report().why_not().unwrap();
    assert!(why.contains("nested") && !why.contains("BIOS"), "{why}");
}

#[test]
fn a_device_that_is_not_there() {
    let loaded =
        |name| Root::new(name).cpu("GenuineIntel", "vmx").module("kvm").module("kvm_intel");
    let why = loaded("d1").report().why_not().unwrap();
    assert!(why.contains("mknod /dev/kvm c 10 232"), "{why}");
    let why = loaded("d2").file("run/.containerenv", "").report().why_not().unwrap();
    assert!(why.contains("--device /dev/kvm") && !why.contains("modprobe"), "{why}");
    // Without hardware, but with a KVM that does without.
    let why =
        Root::new("d3").cpu("GenuineIntel", "hypervisor").module("kvm").module("kvm_pvm").report();
    assert!(why.why_not().unwrap().contains("there is no /dev/kvm"));
}

#[test]
fn a_device_that_is_something_else() {
    let report = Root::new("f").cpu("GenuineIntel", "vmx").file("dev/kvm", "").report();
    assert_eq!(report.device, Device::Foreign);
    assert!(report.why_not().unwrap().contains("not KVM's device"));
    assert!(!report.is_emulated());
}

#[test]
fn errors_of_opening_are_told_apart() {
    let why = |errno, node, in_container| {
        let host = Host { vmx: true, in_container, ..Host::default() };
        Report { host, device: Device::Closed { errno, node } }.why_not().unwrap()
    };
    let node = |mode, gid| Some(Node { mode, uid: 0, gid });
    let text = why(libc::EACCES, node(0o660, 104), false);
    assert_eq!(
        text,
        "/dev/kvm may not be opened by this user (mode 0660, user 0, group 104). Join its group, then log in anew: \
         sudo usermod -aG kvm $USER."
    );
    assert!(why(libc::EACCES, node(0o600, 0), false).contains("chgrp kvm /dev/kvm"));
    assert!(why(libc::EPERM, None, true).contains("--device /dev/kvm"));
    assert!(why(libc::ENODEV, node(0o660, 104), false).contains("modprobe kvm-intel"));
    assert!(why(libc::EBUSY, None, false).contains("Another hypervisor"));
    assert!(why(libc::EMFILE, None, false).contains("ulimit -n"));
    assert!(why(libc::EINVAL, None, false).contains("Invalid argument"));
}

#[test]
fn a_kvm_that_can_not_is_told() {
    let host = || Host { vmx: true, ..Host::default() };
    assert_eq!(opened(host(), 1).usable(), Ok(()));
    let why = opened(host(), 0).why_not().unwrap();
    assert!(
        why.contains("KVM_CAP_USER_MEMORY, ") && !why.contains("KVM_CAP_READONLY_MEM"),
        "{why}"
    );

    let device = Device::Open { api_version: 11, no_vm: None, capabilities: vec![] };
    assert!(Report { host: host(), device }.why_not().unwrap().contains("version 11"));
    let device = Device::Open { api_version: 12, no_vm: Some(libc::EBUSY), capabilities: vec![] };
    assert!(Report { host: host(), device }.why_not().unwrap().contains("VirtualBox"));
}

#[test]
fn a_kvm_without_hardware_is_usable_with_caution() {
    let host =
        Host { is_guest: true, modules: vec!["kvm".into(), "kvm_pvm".into()], ..Host::default() };
    let report = opened(host, 1);
    assert_eq!(report.usable(), Ok(()));
    let caution = report.caution().unwrap();
    assert!(caution.contains("kvm_pvm") && caution.contains("stock Linux will not"), "{caution}");
    assert!(report.to_string().contains("Caution: /dev/kvm works here"));
    let host = Host { modules: vec!["kvm_amd".into()], ..Host::default() };
    assert_eq!(opened(host, 1).caution(), None);
}

#[test]
fn capabilities_are_listed_once_with_their_limits() {
    let all = capabilities::check(|number| number as i32);
    let mut numbers: Vec<u32> = all.iter().map(|capability| capability.number).collect();
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers.len(), all.len());
    let text = |value| {
        let all = capabilities::check(|_| value);
        let one = all.iter().find(|capability| capability.number == KVM_CAP_MAX_VCPUS).unwrap();
        one.to_string()
    };
    assert_eq!(
        text(1024),
        format!("yes  {:<36} optional  the most vCPUs of a machine (1024)", "KVM_CAP_MAX_VCPUS")
    );
    assert!(text(0).starts_with("no   KVM_CAP_MAX_VCPUS"));
    assert!(capabilities::check(|_| 0)[0].to_string().starts_with("NO   KVM_CAP_USER_MEMORY"));
}

/// On a host with KVM, the report agrees with what the device says; elsewhere it says why there is none.
#[test]
fn this_host_is_told_as_it_is() {
    let report = Report::probe();
    match &report.device {
        Device::Open { api_version, capabilities, .. } => {
            assert_eq!(*api_version, 12);
            let kvm = Kvm::new().unwrap();
            let found = capabilities
                .iter()
                .find(|capability| capability.number == KVM_CAP_NR_MEMSLOTS)
                .unwrap();
            assert_eq!(found.value as usize, kvm.get_nr_memslots());
        }
        _ => assert!(report.why_not().is_some()),
    }
}
