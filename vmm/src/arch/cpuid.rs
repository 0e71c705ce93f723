//! CPUID as a guest sees it: what the host supports, made this vCPU's own.

use vmm_sys_util::fam;

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Leaf 1, ECX: the local APIC timer has a deadline mode.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: there is a hypervisor.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: the package may hold several logical processors.
const HTT: u32 = 1 << 28;

/// Leaf 1, ECX, and leaf 0x8000_0001, ECX: the guest may run guests of its own. Their state is not saved, so it may not.
const VMX: u32 = 1 << 5;
const SVM: u32 = 1 << 2;
/// The leaves that describe the topology level by level.
const TOPOLOGY: [u32; 2] = [0xb, 0x1f];

/// The leaves for vCPU number `vcpu` of `count`: its APIC id, and a topology of one package with `count` cores.
pub fn for_vcpu(supported: &CpuId, vcpu: u8, count: u8, tsc_deadline: bool) -> Result<CpuId, fam::Error> {
    let has = |leaf| supported.as_slice().iter().any(|entry| entry.function == leaf);
    let mut entries: Vec<_> =
        supported.as_slice().iter().filter(|entry| !TOPOLOGY.contains(&entry.function)).copied().collect();
    for entry in &mut entries {
        adjust(entry, vcpu, count, tsc_deadline);
    }
    // KVM gives these as far as the host's own topology goes, which is not the guest's.
    let leaves = TOPOLOGY.into_iter().filter(|leaf| has(*leaf));
    entries.extend(leaves.flat_map(|leaf| (0..3).map(move |level| topology(leaf, level, vcpu, count))));
    CpuId::from_entries(&entries)
}

/// Extended topology: level 0 is threads (one a core), level 1 is cores, level 2 ends the list.
fn topology(function: u32, level: u32, vcpu: u8, count: u8) -> kvm_cpuid_entry2 {
    let logical = u32::from(count);
    let (eax, ebx, ecx) = match level {
        0 => (0, 1, 0x100),
        1 => (logical.next_power_of_two().trailing_zeros(), logical, 0x201),
        end => (0, 0, end),
    };
    let flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
    kvm_cpuid_entry2 { function, index: level, flags, eax, ebx, ecx, edx: vcpu.into(), ..Default::default() }
}

fn adjust(entry: &mut kvm_cpuid_entry2, vcpu: u8, count: u8, tsc_deadline: bool) {
    let (id, logical) = (u32::from(vcpu), u32::from(count));
    match (entry.function, entry.index) {
        (0x1, _) => {
            entry.ebx = (entry.ebx & 0x0000_ffff) | (logical << 16) | (id << 24);
            entry.ecx |= HYPERVISOR | if tsc_deadline { TSC_DEADLINE } else { 0 };
            entry.ecx &= !VMX;
            entry.edx = if count > 1 { entry.edx | HTT } else { entry.edx & !HTT };
        }
        (0x8000_0001, _) => entry.ecx &= !SVM,
        // What the processor offers to guests of the guest.
        (0x8000_000a, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, ebx: 0x0000_1234, ..Default::default() }
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id_and_the_same_package() {
        // The host gives the first level only.
        let supported = CpuId::from_entries(&[leaf(1, 0), leaf(0xb, 0)]).unwrap();
        let cpuid = for_vcpu(&supported, 3, 4, true).unwrap();
        let [one, threads, cores, end] = cpuid.as_slice() else { panic!("{cpuid:?}") };
        assert_eq!(one.ebx, 0x0304_1234);
        assert_ne!(one.ecx & TSC_DEADLINE, 0);
        assert_eq!((threads.index, threads.ebx, threads.edx), (0, 1, 3));
        assert_eq!((cores.index, cores.eax, cores.ebx, cores.edx), (1, 2, 4, 3));
        assert_eq!((end.index, end.ebx, end.ecx), (2, 0, 2));
    }

    #[test]
    fn guests_are_offered_no_guests_of_their_own() {
        let mut all = [leaf(1, 0), leaf(0x8000_0001, 0), leaf(0x8000_000a, 0)];
        all.iter_mut().for_each(|leaf| leaf.ecx = u32::MAX);
        let cpuid = for_vcpu(&CpuId::from_entries(&all).unwrap(), 0, 1, true).unwrap();
        let [one, extended, svm] = cpuid.as_slice() else { panic!("{cpuid:?}") };
        assert_eq!((one.ecx & VMX, extended.ecx & SVM, svm.ecx), (0, 0, 0));
    }
}
