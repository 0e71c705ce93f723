//! Saved state of one vCPU.

use serde::{Deserialize, Serialize};

/// Saved state of one vCPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuState {
    /// `kvm_mp_state.mp_state`.
    pub mp_state: u32,
    /// General registers.
    pub regs: Regs,
    /// Segment, table, control and APIC base registers.
    pub sregs: Sregs,
    /// The XSAVE area, as long as this host's `KVM_CAP_XSAVE2` says (at least 4096 bytes).
    pub xsave: Vec<u8>,
    /// Extended control registers.
    pub xcrs: Vec<Xcr>,
    /// Debug registers.
    pub debug_regs: DebugRegs,
    /// The local APIC's register page, 1024 bytes.
    pub lapic: Vec<u8>,
    /// Model-specific registers, in the order in which they must be written.
    pub msrs: Vec<Msr>,
    /// Pending exceptions, interrupts, NMI and SMI.
    pub events: VcpuEvents,
    /// CPUID as the guest sees it.
    pub cpuid: Vec<CpuidEntry>,
    /// Frequency of the guest's time-stamp counter, in kHz; 0 if the host did not tell.
    pub tsc_khz: u32,
}

/// General registers, `kvm_regs`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "named as the architecture names them")]
pub struct Regs {
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

/// Special registers, `kvm_sregs`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "named as the architecture names them")]
pub struct Sregs {
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
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
    pub apic_base: u64,
    pub interrupt_bitmap: [u64; 4],
}

/// A segment register with its hidden part, `kvm_segment`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "named as the KVM API names them")]
pub struct Segment {
    pub base: u64,
    pub limit: u32,
    pub selector: u16,
    pub type_: u8,
    pub present: u8,
    pub dpl: u8,
    pub db: u8,
    pub s: u8,
    pub l: u8,
    pub g: u8,
    pub avl: u8,
    pub unusable: u8,
}

/// GDT or IDT register, `kvm_dtable`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescriptorTable {
    /// Linear address.
    pub base: u64,
    /// Limit, in bytes.
    pub limit: u16,
}

/// An extended control register, `kvm_xcr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Xcr {
    /// Number of the register.
    pub xcr: u32,
    /// Its value.
    pub value: u64,
}

/// Debug registers, `kvm_debugregs`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "named as the architecture names them")]
pub struct DebugRegs {
    pub db: [u64; 4],
    pub dr6: u64,
    pub dr7: u64,
    pub flags: u64,
}

/// A model-specific register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msr {
    /// Number of the register.
    pub index: u32,
    /// Its value.
    pub data: u64,
}

/// One CPUID leaf, `kvm_cpuid_entry2`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "named as the KVM API names them")]
pub struct CpuidEntry {
    pub function: u32,
    pub index: u32,
    pub flags: u32,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

/// Pending events, `kvm_vcpu_events`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuEvents {
    /// Exception.
    pub exception: ExceptionEvent,
    /// Interrupt.
    pub interrupt: InterruptEvent,
    /// Non-maskable interrupt.
    pub nmi: NmiEvent,
    /// System-management interrupt.
    pub smi: SmiEvent,
    /// Vector of a start-up IPI that was received.
    pub sipi_vector: u32,
    /// Which parts are valid.
    pub flags: u32,
    /// Whether a triple fault is pending.
    pub triple_fault: u8,
}

/// A pending exception.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "named as the KVM API names them")]
pub struct ExceptionEvent {
    pub injected: u8,
    pub nr: u8,
    pub has_error_code: u8,
    pub pending: u8,
    pub error_code: u32,
    pub has_payload: u8,
    pub payload: u64,
}

/// A pending interrupt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "named as the KVM API names them")]
pub struct InterruptEvent {
    pub injected: u8,
    pub nr: u8,
    pub soft: u8,
    pub shadow: u8,
}

/// A pending non-maskable interrupt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "named as the KVM API names them")]
pub struct NmiEvent {
    pub injected: u8,
    pub pending: u8,
    pub masked: u8,
}

/// A pending system-management interrupt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "named as the KVM API names them")]
pub struct SmiEvent {
    pub smm: u8,
    pub pending: u8,
    pub smm_inside_nmi: u8,
    pub latched_init: u8,
}
