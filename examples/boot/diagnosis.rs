//! What a CPU that can not go on looks like.

use std::fmt::Write;

use keel_hypervisor::CpuState;
use keel_hypervisor::state::Segment;
use vm_memory::{Bytes, GuestAddress};

use crate::cpu;
use crate::machine::Machine;

/// How many bytes of code are shown.
const CODE: u64 = 16;

/// A CPU's registers and the bytes it is about to execute. The machine must be stopped.
pub fn cpu(machine: &Machine, index: usize) -> String {
    let Some(cpu) = machine.cpus.get(index) else { return String::new() };
    let mut cpu = cpu::lock(cpu);
    let state = match cpu.save() {
        Ok(state) => state,
        Err(error) => return format!("its registers can not be read: {error}"),
    };
    let linear = state.segments.cs.base.wrapping_add(state.registers.rip);
    let mut code = String::new();
    for offset in 0..CODE {
        let physical = cpu.translate(linear.wrapping_add(offset)).ok().flatten();
        match physical.map(|gpa| machine.ram.memory().read_obj::<u8>(GuestAddress(gpa))) {
            Some(Ok(byte)) => _ = write!(code, " {byte:02x}"),
            _ => code.push_str(" ??"),
        }
    }
    format!("{}CODE at {linear:016x}:{code}", registers(&state))
}

/// The registers in the layout that users of QEMU's monitor know.
pub fn registers(state: &CpuState) -> String {
    let r = &state.registers;
    let (s, c) = (&state.segments, &state.control);
    let mut text = String::new();
    let rows = [
        [("RAX", r.rax), ("RBX", r.rbx), ("RCX", r.rcx), ("RDX", r.rdx)],
        [("RSI", r.rsi), ("RDI", r.rdi), ("RBP", r.rbp), ("RSP", r.rsp)],
        [("R8 ", r.r8), ("R9 ", r.r9), ("R10", r.r10), ("R11", r.r11)],
        [("R12", r.r12), ("R13", r.r13), ("R14", r.r14), ("R15", r.r15)],
    ];
    for row in rows {
        let row: Vec<_> = row.iter().map(|(name, value)| format!("{name}={value:016x}")).collect();
        _ = writeln!(text, "{}", row.join(" "));
    }
    _ = writeln!(text, "RIP={:016x} RFL={:08x} CPL={}", r.rip, r.rflags, s.ss.dpl);
    let segments = [
        ("ES", &s.es),
        ("CS", &s.cs),
        ("SS", &s.ss),
        ("DS", &s.ds),
        ("FS", &s.fs),
        ("GS", &s.gs),
        ("LDT", &s.ldt),
        ("TR", &s.tr),
    ];
    for (name, Segment { selector, base, limit, .. }) in segments {
        _ = writeln!(text, "{name:<3}={selector:04x} {base:016x} {limit:08x}");
    }
    _ = writeln!(text, "GDT=     {:016x} {:08x}", s.gdt.base, s.gdt.limit);
    _ = writeln!(text, "IDT=     {:016x} {:08x}", s.idt.base, s.idt.limit);
    _ = writeln!(text, "CR0={:08x} CR2={:016x} CR3={:016x} CR4={:08x}", c.cr0, c.cr2, c.cr3, c.cr4);
    _ = writeln!(text, "EFER={:016x}", c.efer);
    text
}
