//! The complete state of a vCPU and of a VM, in terms of the architecture and of no backend.
//!
//! Names and layouts are those of the Intel SDM (volume 3) and the AMD APM (volume 2). Everything here can be
//! written and read by serde; nothing here has been validated: a backend refuses what no CPU can be in.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// Everything one vCPU is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CpuState {
    /// General registers, instruction pointer and flags.
    pub registers: Registers,
    /// Segment and descriptor-table registers.
    pub segments: Segments,
    /// Control registers.
    pub control: Control,
    /// Debug registers.
    pub debug: DebugRegisters,
    /// Model-specific registers by index, those of the architecture.
    pub msrs: BTreeMap<u32, u64>,
    /// x87, SSE and all further extended state.
    pub xsave: XsaveArea,
    /// Extended control registers by index (XCR0 and what may come).
    pub xcrs: BTreeMap<u32, u64>,
    /// The local APIC, where the backend has it.
    pub lapic: Option<LapicState>,
    /// Whether and how the vCPU runs.
    pub activity: Activity,
    /// Exceptions and interrupts on their way.
    pub events: Events,
    /// The frequency of the time-stamp counter in kHz; its value is MSR 0x10.
    pub tsc_khz: Option<u32>,
    /// Whether the hypervisor is to ask for an interrupt window (interrupt controllers in user space).
    pub interrupt_window: bool,
    /// What one backend alone knows, by the backend's name.
    pub private: BTreeMap<String, Private>,
}

/// State only one backend has a meaning for: paravirtual MSRs, nested virtualization.
#[derive(Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Private {
    /// MSRs of the hypervisor itself, by index.
    pub msrs: BTreeMap<u32, u64>,
    /// Opaque blocks by name.
    pub blocks: BTreeMap<String, Bytes>,
}

impl fmt::Debug for Private {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Private")
            .field("msrs", &self.msrs)
            .field("blocks", &self.blocks.keys().collect::<Vec<_>>())
            .finish()
    }
}

/// Bytes that serde writes as one hexadecimal string and `Debug` shows the length of: they may hold guest secrets.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Bytes(pub Vec<u8>);

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{} bytes]", self.0.len())
    }
}

impl Serialize for Bytes {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let text: String = self
            .0
            .iter()
            .flat_map(|byte| [byte >> 4, byte & 15])
            .map(|digit| char::from(DIGITS[usize::from(digit)]))
            .collect();
        serializer.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        let text = String::deserialize(deserializer)?;
        let digits: Option<Vec<u8>> =
            text.chars().map(|c| c.to_digit(16).map(|digit| digit as u8)).collect();
        match digits {
            Some(digits) if digits.len() % 2 == 0 => {
                Ok(Bytes(digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect()))
            }
            _ => Err(D::Error::custom("expected an even number of hexadecimal digits")),
        }
    }
}

/// General registers, instruction pointer and flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names are the architecture's own")]
pub struct Registers {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes, the granularity bit already applied.
    pub limit: u32,
    /// The visible selector.
    pub selector: u16,
    /// Descriptor type, 4 bits (SDM volume 3, 3.4.5.1).
    pub kind: u8,
    /// Descriptor privilege level, 0 to 3.
    pub dpl: u8,
    /// Code or data (true), or system (false): the S bit.
    pub code_or_data: bool,
    /// The P bit.
    pub present: bool,
    /// The D/B bit.
    pub default_32: bool,
    /// The L bit.
    pub long: bool,
    /// The G bit.
    pub granular: bool,
    /// The AVL bit.
    pub available: bool,
    /// The register holds no usable segment (VMX).
    pub unusable: bool,
}

/// A descriptor-table register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes: the offset of the last byte.
    pub limit: u16,
}

/// Segment and descriptor-table registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names are the architecture's own")]
pub struct Segments {
    pub cs: Segment,
    pub ds: Segment,
    pub es: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ss: Segment,
    pub tr: Segment,
    pub ldt: Segment,
    pub gdt: DescriptorTable,
    pub idt: DescriptorTable,
}

/// Control registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names are the architecture's own")]
pub struct Control {
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
    pub apic_base: u64,
    /// The page-directory-pointer-table entries the CPU holds in PAE paging, where the backend gives them.
    pub pdptrs: Option<[u64; 4]>,
}

/// Debug registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names are the architecture's own")]
pub struct DebugRegisters {
    pub dr0: u64,
    pub dr1: u64,
    pub dr2: u64,
    pub dr3: u64,
    pub dr6: u64,
    pub dr7: u64,
}

/// The XSAVE area in the standard (not compacted) format (SDM volume 1, 13.4). `Debug` shows its size only.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct XsaveArea(pub Bytes);

/// The registers of a local APIC, 32 bits each, at their offset divided by 16 (SDM volume 3, table 11-1).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LapicState {
    /// 64 registers: ID at 2, version at 3, TPR at 8, …
    pub registers: Vec<u32>,
}

/// Whether and how a vCPU runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activity {
    /// Running.
    #[default]
    Runnable,
    /// An application processor before its INIT.
    Uninitialized,
    /// INIT received, waiting for a startup IPI.
    InitReceived,
    /// In `HLT`.
    Halted,
    /// A startup IPI received and not yet acted on.
    SipiReceived,
}

/// Exceptions and interrupts on their way into a vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Events {
    /// An exception being delivered or pending.
    pub exception: Option<Exception>,
    /// An external interrupt or software interrupt being delivered.
    pub interrupt: Option<Interrupt>,
    /// Interrupts are held off for one instruction: bit 0 by `STI`, bit 1 by `MOV SS`.
    pub shadow: u8,
    /// A non-maskable interrupt is being delivered.
    pub nmi_injected: bool,
    /// One is waiting.
    pub nmi_pending: bool,
    /// They are masked until `IRET`.
    pub nmi_masked: bool,
    /// The vector of a startup IPI received.
    pub sipi_vector: u32,
    /// In system-management mode.
    pub smm: bool,
    /// A system-management interrupt is waiting.
    pub smi_pending: bool,
    /// In SMM with NMIs masked on entry.
    pub smm_inside_nmi: bool,
    /// An INIT is latched while in SMM.
    pub latched_init: bool,
    /// A triple fault is waiting.
    pub triple_fault: bool,
}

/// An exception on its way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exception {
    /// The vector, 0 to 31.
    pub vector: u8,
    /// The error code, where this exception has one.
    pub error_code: Option<u32>,
    /// Pending (not yet being delivered): it can still become a VM exit of a nested guest.
    pub pending: bool,
    /// What will be written to CR2 (`#PF`) or DR6 (`#DB`) on delivery.
    pub payload: Option<u64>,
}

/// An interrupt being delivered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interrupt {
    /// The vector.
    pub vector: u8,
    /// By `INT n` rather than from outside.
    pub software: bool,
}

/// What a VM is besides its vCPUs, memory and user-space devices.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmState {
    /// The paravirtual clock, in nanoseconds since the VM was created.
    pub clock_ns: Option<u64>,
    /// The two 8259A PICs, master first, where the backend has them.
    pub pics: Option<[PicState; 2]>,
    /// The I/O APIC, where the backend has it.
    pub ioapic: Option<IoApicState>,
    /// The 8254 PIT, where the backend has it.
    pub pit: Option<PitState>,
}

/// An 8259A (Intel 8259A data sheet).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PicState {
    /// The inputs as last seen, for edge detection.
    pub last_irr: u8,
    /// Interrupt request register.
    pub irr: u8,
    /// Interrupt mask register.
    pub imr: u8,
    /// In-service register.
    pub isr: u8,
    /// The highest priority after rotation.
    pub priority_add: u8,
    /// The vector of input 0 (ICW2).
    pub irq_base: u8,
    /// The next read of the even port gives ISR instead of IRR.
    pub read_isr: bool,
    /// The next read is a poll.
    pub poll: bool,
    /// Special mask mode.
    pub special_mask: bool,
    /// How many of the initialization words have come.
    pub init_state: u8,
    /// Automatic end of interrupt.
    pub auto_eoi: bool,
    /// Rotate on automatic end of interrupt.
    pub rotate_on_auto_eoi: bool,
    /// Special fully nested mode.
    pub special_fully_nested_mode: bool,
    /// ICW4 is expected.
    pub init4: bool,
    /// Edge/level control register: a set bit is a level input.
    pub elcr: u8,
    /// Which bits of it can be written.
    pub elcr_mask: u8,
}

/// An I/O APIC (Intel 82093AA data sheet).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApicState {
    /// The guest physical address of its registers.
    pub base: u64,
    /// The register the window shows.
    pub select: u32,
    /// Its ID.
    pub id: u32,
    /// The inputs' requests, a bit a pin.
    pub irr: u32,
    /// The redirection table.
    pub redirection: [u64; 24],
}

/// An 8254 PIT (Intel 8254 data sheet) with the speaker gate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PitState {
    /// The three counters.
    pub channels: [PitChannel; 3],
    /// The backend's own flags (KVM: bit 0, HPET in legacy mode; bit 1, speaker data on).
    pub flags: u32,
}

/// One counter of a PIT.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PitChannel {
    /// The reload value, 1 to 65536.
    pub count: u32,
    /// The count latched by a read-back or latch command.
    pub latched_count: u16,
    /// How much of the latched count is still to be read.
    pub count_latched: u8,
    /// A status byte is latched.
    pub status_latched: bool,
    /// It.
    pub status: u8,
    /// Which byte the next read gives.
    pub read_state: u8,
    /// Which byte the next write sets.
    pub write_state: u8,
    /// The low byte while the high one is awaited.
    pub write_latch: u8,
    /// The access mode: 1 low byte, 2 high byte, 3 both.
    pub rw_mode: u8,
    /// The counting mode, 0 to 5.
    pub mode: u8,
    /// Counts in decimal.
    pub bcd: bool,
    /// The gate input.
    pub gate: bool,
    /// When the count was loaded, on the host's monotonic clock in nanoseconds.
    pub loaded_at_ns: i64,
}
