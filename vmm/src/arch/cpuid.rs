//! CPUID as a guest sees it: what the host supports, made this vCPU's own.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Leaf 1, ECX: the local APIC timer has a deadline mode.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: there is a hypervisor.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: the package may hold several logical processors.
const HTT: u32 = 1 << 28;

/// The leaves for vCPU number `vcpu` of `count`: its APIC id, and a topology of one package with `count` cores.
pub fn for_vcpu(supported: &CpuId, vcpu: u8, count: u8, tsc_deadline: bool) -> CpuId {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        adjust(entry, vcpu, count, tsc_deadline);
    }
    cpuid
}

fn adjust(entry: &mut kvm_cpuid_entry2, vcpu: u8, count: u8, tsc_deadline: bool) {
    let (id, logical) = (u32::from(vcpu), u32::from(count));
    match (entry.function, entry.index) {
        (0x1, _) => {
            entry.ebx = (entry.ebx & 0x0000_ffff) | (logical << 16) | (id << 24);
            entry.ecx |= HYPERVISOR | if tsc_deadline { TSC_DEADLINE } else { 0 };
            entry.edx = if count > 1 { entry.edx | HTT } else { entry.edx & !HTT };
        }
        // Extended topology: level 0 is threads (one a core), level 1 is cores.
        (0xb | 0x1f, level) => {
            let bits = logical.next_power_of_two().trailing_zeros();
            (entry.eax, entry.ebx, entry.ecx) = match level {
                0 => (0, 1, 0x100),
                1 => (bits, logical, 0x201),
                other => (0, 0, other),
            };
            entry.edx = id;
            entry.flags |= KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
        }
        // AMD: number of cores, and the extended APIC id.
        (0x8000_0008, _) => entry.ecx = (entry.ecx & !0xf0ff) | (logical - 1),
        (0x8000_001e, _) => {
            entry.eax = id;
            entry.ebx = id & 0xff;
            entry.ecx = 0;
        }
        _ => {}
    }
}

/// The vendor string in leaf 0, such as `AuthenticAMD`.
pub fn vendor(cpuid: &[kvm_cpuid_entry2]) -> Option<String> {
    let leaf = cpuid.iter().find(|entry| entry.function == 0)?;
    let bytes: Vec<u8> = [leaf.ebx, leaf.edx, leaf.ecx].into_iter().flat_map(u32::to_le_bytes).collect();
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, ebx: 0x0000_1234, ..Default::default() }
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id_and_the_same_package() {
        let supported = CpuId::from_entries(&[leaf(1, 0), leaf(0xb, 0), leaf(0xb, 1)]).unwrap();
        let cpuid = for_vcpu(&supported, 3, 4, true);
        let [one, threads, cores] = cpuid.as_slice() else { panic!() };
        assert_eq!(one.ebx, 0x0304_1234);
        assert_ne!(one.ecx & TSC_DEADLINE, 0);
        assert_eq!((threads.ebx, threads.edx), (1, 3));
        assert_eq!((cores.eax, cores.ebx, cores.edx), (2, 4, 3));
    }
}
