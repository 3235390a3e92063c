//! General, segment, control and debug registers, and extended control registers.
#![allow(unsafe_code, reason = "KVM_GET_SREGS2 and KVM_SET_SREGS2, which kvm-ioctls does not have")]

use std::collections::BTreeMap;

use keel_hypervisor::Result;
use keel_hypervisor::state::{
    Control, DebugRegisters, DescriptorTable, Registers, Segment, Segments,
};
use kvm_bindings::{
    KVM_SREGS2_FLAGS_PDPTRS_VALID, KVMIO, kvm_debugregs, kvm_dtable, kvm_regs, kvm_segment,
    kvm_sregs, kvm_sregs2, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{errno, ioctl_ior_nr, ioctl_iow_nr};

use super::{Context, bad, check, name};
use crate::error::Tried;

ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);

/// Every flag that is not reserved (SDM volume 1, figure 3-8).
pub(super) const RFLAGS: u64 = 0x3f_7fd7;
/// Every bit of EFER that some CPU has (APM volume 2, 3.1.7): SCE, LME, LMA, NXE to TCE, MCOMMIT to AIBRSE.
const EFER: u64 = 0x36_fd01;
const EFER_LMA: u64 = 1 << 10;
const CR0_PE: u64 = 1 << 0;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
/// The reserved bits of a present PDPTE: 1, 2, 5 to 8, and those above the widest physical address (SDM volume 3, table 4-8).
const PDPTE_RESERVED: u64 = 0xfff0_0000_0000_01e6;

/// Copies fields of the same name both ways.
macro_rules! same_fields {
    ($ours:ident, $theirs:ident: $($field:ident)*) => {
        fn to_kvm(from: &$ours) -> $theirs {
            $theirs { $($field: from.$field),* }
        }
        fn from_kvm(from: &$theirs) -> $ours {
            $ours { $($field: from.$field),* }
        }
    };
}

same_fields!(Registers, kvm_regs:
    rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags);

pub(super) fn save(fd: &VcpuFd, id: u32) -> Result<Registers> {
    Ok(from_kvm(&fd.get_regs().tried("KVM_GET_REGS", name(id))?))
}

pub(super) fn check_general(registers: &Registers) -> Result<()> {
    check(registers.rflags & !RFLAGS == 0, "RFLAGS", || {
        format!("{:#x} has reserved bits", registers.rflags)
    })
}

pub(super) fn load(fd: &VcpuFd, id: u32, registers: &Registers) -> Result<()> {
    Ok(fd.set_regs(&to_kvm(registers)).tried("KVM_SET_REGS", name(id))?)
}

fn segment_from(from: &kvm_segment) -> Segment {
    Segment {
        base: from.base,
        limit: from.limit,
        selector: from.selector,
        kind: from.type_,
        dpl: from.dpl,
        code_or_data: from.s != 0,
        present: from.present != 0,
        default_32: from.db != 0,
        long: from.l != 0,
        granular: from.g != 0,
        available: from.avl != 0,
        unusable: from.unusable != 0,
    }
}

fn segment_to(from: &Segment) -> kvm_segment {
    kvm_segment {
        base: from.base,
        limit: from.limit,
        selector: from.selector,
        type_: from.kind,
        present: from.present.into(),
        dpl: from.dpl,
        db: from.default_32.into(),
        s: from.code_or_data.into(),
        l: from.long.into(),
        g: from.granular.into(),
        avl: from.available.into(),
        unusable: from.unusable.into(),
        padding: 0,
    }
}

fn table_from(from: &kvm_dtable) -> DescriptorTable {
    DescriptorTable { base: from.base, limit: from.limit }
}

fn table_to(from: &DescriptorTable) -> kvm_dtable {
    kvm_dtable { base: from.base, limit: from.limit, padding: [0; 3] }
}

/// Carries what `kvm_sregs` and `kvm_sregs2` share from one to the other.
macro_rules! common {
    ($to:ident from $from:expr) => {{
        let from = $from;
        $to {
            cs: from.cs,
            ds: from.ds,
            es: from.es,
            fs: from.fs,
            gs: from.gs,
            ss: from.ss,
            tr: from.tr,
            ldt: from.ldt,
            gdt: from.gdt,
            idt: from.idt,
            cr0: from.cr0,
            cr2: from.cr2,
            cr3: from.cr3,
            cr4: from.cr4,
            cr8: from.cr8,
            efer: from.efer,
            apic_base: from.apic_base,
            ..Default::default()
        }
    }};
}

fn get_sregs2(fd: &VcpuFd) -> std::result::Result<kvm_sregs2, kvm_ioctls::Error> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: the kernel fills in this structure, of the size the number was made from, and nothing more; any bit pattern is valid in it.
    match unsafe { ioctl_with_mut_ref(fd, KVM_GET_SREGS2(), &mut sregs) } {
        0 => Ok(sregs),
        _ => Err(errno::Error::last()),
    }
}

fn set_sregs2(fd: &VcpuFd, sregs: &kvm_sregs2) -> std::result::Result<(), kvm_ioctls::Error> {
    // SAFETY: the kernel only reads this structure, of the size the number was made from.
    match unsafe { ioctl_with_ref(fd, KVM_SET_SREGS2(), sregs) } {
        0 => Ok(()),
        _ => Err(errno::Error::last()),
    }
}

pub(super) fn save_special(fd: &VcpuFd, id: u32, cx: &Context) -> Result<(Segments, Control)> {
    let sregs: kvm_sregs2 = if cx.sregs2 {
        get_sregs2(fd).tried("KVM_GET_SREGS2", name(id))?
    } else {
        common!(kvm_sregs2 from fd.get_sregs().tried("KVM_GET_SREGS", name(id))?)
    };
    let segments = Segments {
        cs: segment_from(&sregs.cs),
        ds: segment_from(&sregs.ds),
        es: segment_from(&sregs.es),
        fs: segment_from(&sregs.fs),
        gs: segment_from(&sregs.gs),
        ss: segment_from(&sregs.ss),
        tr: segment_from(&sregs.tr),
        ldt: segment_from(&sregs.ldt),
        gdt: table_from(&sregs.gdt),
        idt: table_from(&sregs.idt),
    };
    let control = Control {
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        cr8: sregs.cr8,
        efer: sregs.efer,
        apic_base: sregs.apic_base,
        pdptrs: (sregs.flags & u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0)
            .then_some(sregs.pdptrs),
    };
    Ok((segments, control))
}

pub(super) fn check_special(segments: &Segments, control: &Control) -> Result<()> {
    let Segments { cs, ds, es, fs, gs, ss, tr, ldt, gdt: _, idt: _ } = segments;
    for (what, segment) in [
        ("CS", cs),
        ("DS", ds),
        ("ES", es),
        ("FS", fs),
        ("GS", gs),
        ("SS", ss),
        ("TR", tr),
        ("LDTR", ldt),
    ] {
        check(segment.kind < 16, what, || {
            format!("descriptor type {} does not fit 4 bits", segment.kind)
        })?;
        check(segment.dpl < 4, what, || format!("there is no privilege level {}", segment.dpl))?;
    }
    // The kernel takes any EFER and drops a bad CR8 without a word; the control registers proper it checks.
    check(control.efer & !EFER == 0, "EFER", || format!("{:#x} has reserved bits", control.efer))?;
    check(control.cr8 < 16, "CR8", || format!("{:#x} does not fit 4 bits", control.cr8))?;
    if let Some(entries) = control.pdptrs {
        let pae =
            control.cr0 & CR0_PG != 0 && control.cr4 & CR4_PAE != 0 && control.efer & EFER_LMA == 0;
        check(pae, "PDPTEs", || "the CPU is not in PAE paging".into())?;
        for entry in entries {
            let ok = entry & 1 == 0 || entry & PDPTE_RESERVED == 0;
            check(ok, "PDPTEs", || format!("{entry:#x} has reserved bits"))?;
        }
    }
    Ok(())
}

pub(super) fn load_special(
    fd: &VcpuFd,
    id: u32,
    cx: &Context,
    segments: &Segments,
    control: &Control,
) -> Result<()> {
    let sregs = kvm_sregs2 {
        cs: segment_to(&segments.cs),
        ds: segment_to(&segments.ds),
        es: segment_to(&segments.es),
        fs: segment_to(&segments.fs),
        gs: segment_to(&segments.gs),
        ss: segment_to(&segments.ss),
        tr: segment_to(&segments.tr),
        ldt: segment_to(&segments.ldt),
        gdt: table_to(&segments.gdt),
        idt: table_to(&segments.idt),
        cr0: control.cr0,
        cr2: control.cr2,
        cr3: control.cr3,
        cr4: control.cr4,
        cr8: control.cr8,
        efer: control.efer,
        apic_base: control.apic_base,
        flags: if control.pdptrs.is_some() { KVM_SREGS2_FLAGS_PDPTRS_VALID.into() } else { 0 },
        pdptrs: control.pdptrs.unwrap_or_default(),
    };
    if cx.sregs2 {
        set_sregs2(fd, &sregs).tried("KVM_SET_SREGS2", name(id))?;
    } else {
        // The older call makes the kernel read the PDPTEs from guest memory, as a CPU does when CR3 is written.
        let sregs: kvm_sregs = common!(kvm_sregs from sregs);
        fd.set_sregs(&sregs).tried("KVM_SET_SREGS", name(id))?;
    }
    // A kernel without hardware virtualization behind it may not be able to run every mode, and leaves paging off without a word.
    let (_, now) = save_special(fd, id, cx)?;
    let mode = |control: &Control| {
        (control.cr0 & (CR0_PE | CR0_PG), control.cr4 & CR4_PAE, control.efer & EFER_LMA)
    };
    check(mode(&now) == mode(control), "CPU mode", || {
        format!(
            "this host's KVM does not run it: CR0 {:#x}, CR4 {:#x}, EFER {:#x} became {:#x}, {:#x}, {:#x}",
            control.cr0, control.cr4, control.efer, now.cr0, now.cr4, now.efer
        )
    })
}

pub(super) fn save_debug(fd: &VcpuFd, id: u32, cx: &Context) -> Result<DebugRegisters> {
    if !cx.debug_registers {
        return Err(keel_hypervisor::Error::Unsupported("KVM_CAP_DEBUGREGS"));
    }
    let from = fd.get_debug_regs().tried("KVM_GET_DEBUGREGS", name(id))?;
    let [dr0, dr1, dr2, dr3] = from.db;
    Ok(DebugRegisters { dr0, dr1, dr2, dr3, dr6: from.dr6, dr7: from.dr7 })
}

pub(super) fn check_debug(debug: &DebugRegisters) -> Result<()> {
    for (what, value) in [("DR6", debug.dr6), ("DR7", debug.dr7)] {
        check(u32::try_from(value).is_ok(), what, || format!("{value:#x} has bits above bit 31"))?;
    }
    Ok(())
}

pub(super) fn load_debug(fd: &VcpuFd, id: u32, debug: &DebugRegisters) -> Result<()> {
    let DebugRegisters { dr0, dr1, dr2, dr3, dr6, dr7 } = *debug;
    let debug = kvm_debugregs { db: [dr0, dr1, dr2, dr3], dr6, dr7, ..Default::default() };
    Ok(fd.set_debug_regs(&debug).tried("KVM_SET_DEBUGREGS", name(id))?)
}

pub(super) fn save_xcrs(fd: &VcpuFd, id: u32, cx: &Context) -> Result<BTreeMap<u32, u64>> {
    // The capability says what the kernel can do; on a processor without XSAVE it has nothing to give.
    if !cx.xcrs {
        return Ok(BTreeMap::new());
    }
    let from = fd.get_xcrs().tried("KVM_GET_XCRS", name(id))?;
    Ok(from.xcrs.iter().take(from.nr_xcrs as usize).map(|one| (one.xcr, one.value)).collect())
}

pub(super) fn check_xcrs(xcrs: &BTreeMap<u32, u64>) -> Result<()> {
    // The kernel ignores every other one.
    match xcrs.keys().find(|index| **index != 0) {
        Some(index) => Err(bad("XCRs", format!("KVM has no XCR{index}, only XCR0"))),
        None => Ok(()),
    }
}

pub(super) fn load_xcrs(
    fd: &VcpuFd,
    id: u32,
    cx: &Context,
    xcrs: &BTreeMap<u32, u64>,
) -> Result<()> {
    /// XCR0 after reset: x87 only.
    const RESET: u64 = 1;
    let value = xcrs.get(&0).copied().unwrap_or(RESET);
    if !cx.xcrs {
        return check(value == RESET, "XCR0", || "this host's processor has no XSAVE".into());
    }
    let mut to = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    to.xcrs[0].value = value;
    Ok(fd.set_xcrs(&to).tried("KVM_SET_XCRS", name(id))?)
}
