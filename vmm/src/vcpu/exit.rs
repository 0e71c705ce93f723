//! Why a guest ended, in words. Pure, but for looking at which KVM this is.

use std::fmt;
use std::path::Path;

/// Why a guest cannot go on, or does not want to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestEnd {
    /// The guest reset the machine through the keyboard controller.
    Reset,
    /// The guest's kernel said that it has panicked.
    Panic,
    /// A vCPU met a fault while handling a fault while handling a fault.
    TripleFault {
        /// Number of the vCPU.
        vcpu: u8,
    },
    /// KVM could not emulate an instruction.
    Emulation {
        /// Number of the vCPU.
        vcpu: u8,
        /// Where the instruction is.
        rip: u64,
        /// Its first bytes, as far as KVM tells.
        bytes: Vec<u8>,
        /// Whether this host's KVM emulates all of ring 0.
        ring0_emulated: bool,
    },
    /// Something that a vCPU should never do.
    Unexpected {
        /// Number of the vCPU.
        vcpu: u8,
        /// What it was.
        what: String,
    },
}

impl fmt::Display for GuestEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GuestEnd::Reset => f.write_str("the guest reset its machine"),
            GuestEnd::Panic => f.write_str("the guest's kernel panicked; its console says why"),
            GuestEnd::TripleFault { vcpu } => {
                write!(f, "vCPU {vcpu} of the guest triple-faulted; its console says what it did last")
            }
            GuestEnd::Emulation { vcpu, rip, bytes, ring0_emulated } => {
                write!(
                    f,
                    "KVM cannot emulate the guest's instruction {} at {rip:#x} on vCPU {vcpu}",
                    Instruction(bytes)
                )?;
                if *ring0_emulated {
                    f.write_str(
                        "; this host's KVM has no hardware virtualization and emulates the guest kernel's instructions, \
                         of which it lacks some, so a stock kernel cannot run here: use a host with AMD-V or VT-x, or the \
                         embedded guest (`vmm doctor` says more)",
                    )?;
                }
                Ok(())
            }
            GuestEnd::Unexpected { vcpu, what } => write!(f, "vCPU {vcpu} of the guest stopped: {what}"),
        }
    }
}

/// An instruction by name, if it is one of those that are known to be missing from KVM's emulator, and its bytes.
struct Instruction<'b>(&'b [u8]);

impl fmt::Display for Instruction<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(name) = name(self.0) {
            write!(f, "`{name}` ")?;
        }
        if self.0.is_empty() {
            return f.write_str("(bytes not told)");
        }
        f.write_str("(")?;
        for (i, byte) in self.0.iter().enumerate() {
            write!(f, "{}{byte:02x}", if i > 0 { " " } else { "" })?;
        }
        f.write_str(")")
    }
}

/// Names the instruction at the start of `bytes`, if it is one that KVM's emulator lacks and kernels use.
fn name(bytes: &[u8]) -> Option<&'static str> {
    let is_prefix = |b: &u8| matches!(b, 0x66 | 0xf0 | 0xf2 | 0xf3 | 0x2e | 0x36 | 0x3e | 0x26 | 0x64 | 0x65);
    let start = bytes.iter().position(|b| !is_prefix(b))?;
    let rest = &bytes[start..];
    let (wide, rest) = match rest {
        [rex @ 0x40..=0x4f, rest @ ..] => (rex & 8 != 0, rest),
        rest => (false, rest),
    };
    let reg = |modrm: u8| (modrm >> 3) & 7;
    match *rest {
        [0xcc, ..] => Some("int3"),
        [0x0f, 0xc7, modrm, ..] => match (reg(modrm), wide) {
            (1, true) => Some("cmpxchg16b"),
            (3, _) => Some("xrstors"),
            (5, _) => Some("xsaves"),
            (4, _) => Some("xsavec"),
            _ => None,
        },
        [0x0f, 0xae, modrm, ..] if modrm < 0xc0 => match reg(modrm) {
            4 => Some("xsave"),
            5 => Some("xrstor"),
            6 => Some("xsaveopt"),
            _ => None,
        },
        _ => None,
    }
}

/// Whether this host's KVM emulates all ring-0 guest instructions because it has no hardware virtualization.
pub fn ring0_is_emulated() -> bool {
    Path::new("/sys/module/kvm_pvm").exists()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_gaps_of_the_emulator_are_named() {
        assert_eq!(name(&[0xf0, 0x48, 0x0f, 0xc7, 0x0e]), Some("cmpxchg16b"), "lock cmpxchg16b [rsi]");
        assert_eq!(name(&[0x65, 0x48, 0x0f, 0xc7, 0x0e, 0xff]), Some("cmpxchg16b"));
        assert_eq!(name(&[0x48, 0x0f, 0xc7, 0x1f]), Some("xrstors"));
        assert_eq!(name(&[0x48, 0x0f, 0xae, 0x2f]), Some("xrstor"));
        assert_eq!(name(&[0xcc]), Some("int3"));
        assert_eq!(name(&[0x0f, 0xc7, 0x0e]), None, "cmpxchg8b is emulated");
        assert_eq!(name(&[0x0f, 0xae, 0xe8]), None, "lfence");
        assert_eq!(name(&[0x66]), None);
        assert_eq!(name(&[]), None);
    }

    #[test]
    fn an_emulated_kernel_gets_the_reason_and_the_remedy() {
        let end = GuestEnd::Emulation { vcpu: 0, rip: 0xffff_ffff_8100_0000, bytes: vec![0xcc], ring0_emulated: true };
        let text = end.to_string();
        assert!(text.contains("`int3` (cc)") && text.contains("emulates the guest kernel's"), "{text}");
        assert!(!text.contains('\n'));
    }
}
