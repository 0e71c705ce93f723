//! What firmware would have left in a processor for a kernel to find: model-specific registers, and the two legacy pins of
//! the boot processor's local APIC.
//!
//! KVM resets a vCPU to what the processor's manual says, and a kernel on such a machine complains, or leaves features alone:
//! without memory types it gives up on page attributes, without fast strings on `rep movs`.

use super::cpuid;
use kvm_bindings::{Msrs, kvm_lapic_state, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

/// Memory types: on, and write-back where nothing else is said (Intel SDM, volume 3, 12.11.2.1). Devices are excepted by the
/// page tables of the kernel, as on any machine since there are page attributes.
pub const MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLED: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;
/// Miscellaneous features: fast strings (volume 4, `IA32_MISC_ENABLE`).
pub const MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1 << 0;
/// AMD's hardware configuration.
pub const HARDWARE_CONFIGURATION: u32 = 0xc001_0015;
/// A bit of it: the time-stamp counter counts at the frequency of the highest performance state.
pub const TSC_AT_P0: u64 = 1 << 24;

/// Offsets of the entries for the two legacy pins in the local APIC's page, and what they deliver: interrupts of the old
/// controller, and NMIs.
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const EXTERNAL: u32 = 7 << 8;
const NMI: u32 = 4 << 8;

/// The registers that firmware sets, and the bits that it sets in each.
fn boot_msrs(amd: bool) -> impl Iterator<Item = (u32, u64)> {
    let hardware = amd.then_some((HARDWARE_CONFIGURATION, TSC_AT_P0));
    [(MTRR_DEF_TYPE, MTRR_ENABLED | MTRR_WRITE_BACK), (MISC_ENABLE, FAST_STRINGS)].into_iter().chain(hardware)
}

/// Sets up a vCPU that has its CPUID and has never run. `first`: it is the one that boots; the others' pins are reset when
/// they are started.
pub fn set_up(vcpu: &VcpuFd, first: bool) -> Result<(), kvm_ioctls::Error> {
    let cpuid = vcpu.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES)?;
    for (index, bits) in boot_msrs(cpuid::is_amd(&cpuid)) {
        set_bits(vcpu, index, bits)?;
    }
    if first {
        let mut lapic = vcpu.get_lapic()?;
        set_pin(&mut lapic, LVT_LINT0, EXTERNAL);
        set_pin(&mut lapic, LVT_LINT1, NMI);
        vcpu.set_lapic(&lapic)?;
    }
    Ok(())
}

/// Sets bits of a register. One that this host's KVM does not have, or does not let be so, stays as it is: a kernel can do
/// without, if less well.
fn set_bits(vcpu: &VcpuFd, index: u32, bits: u64) -> Result<(), kvm_ioctls::Error> {
    let mut msrs = one(index, 0)?;
    if vcpu.get_msrs(&mut msrs)? == 1 {
        let data = msrs.as_slice()[0].data | bits;
        if vcpu.set_msrs(&one(index, data)?)? == 0 {
            tracing::debug!("KVM does not take {data:#x} for MSR {index:#x}");
        }
    }
    Ok(())
}

fn one(index: u32, data: u64) -> Result<Msrs, kvm_ioctls::Error> {
    Msrs::from_entries(&[kvm_msr_entry { index, data, ..Default::default() }])
        .map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))
}

fn set_pin(lapic: &mut kvm_lapic_state, offset: usize, entry: u32) {
    for (to, byte) in lapic.regs[offset..].iter_mut().zip(entry.to_le_bytes()) {
        *to = byte as _;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_is_four_bytes_of_the_page() {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs.fill(-1);
        set_pin(&mut lapic, LVT_LINT0, EXTERNAL);
        assert_eq!(lapic.regs[0x34f..0x355], [-1, 0, 7, 0, 0, -1]);
    }

    #[test]
    fn only_amd_has_a_hardware_configuration() {
        assert_eq!(boot_msrs(false).count() + 1, boot_msrs(true).count());
        assert!(boot_msrs(false).all(|(index, _)| index < 0xc000_0000));
    }
}
