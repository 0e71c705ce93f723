//! CPUID as a guest sees it: what the host supports, made this vCPU's own.

use vmm_sys_util::fam;

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// Leaf 1, ECX: the local APIC timer has a deadline mode.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: there is a hypervisor.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: the package may hold several logical processors.
const HTT: u32 = 1 << 28;

/// Leaf 0x8000_0001, ECX: the logical processors of a package are cores (AMD).
const CMP_LEGACY: u32 = 1 << 1;
/// Leaf 1, ECX, and leaf 0x8000_0001, ECX: the guest may run guests of its own. Their state is not saved, so it may not.
const VMX: u32 = 1 << 5;
const SVM: u32 = 1 << 2;
/// The leaves that describe the topology level by level.
const TOPOLOGY: [u32; 2] = [0xb, 0x1f];
/// AMD's own such leaf, which repeats them with the kinds of cores that a host has. A guest does without.
const AMD_TOPOLOGY: u32 = 0x8000_0026;
/// Leaves 4 and 0x8000_001d, EAX: type of the cache (0: there is no such one), its level, and two counts, less one each,
/// of which the second is reserved on AMD.
const CACHE_TYPE: u32 = 0x1f;
const CACHE_LEVEL_SHIFT: u32 = 5;
const CACHE_SHARED_SHIFT: u32 = 14;
const CACHE_SHARED: u32 = 0xfff << CACHE_SHARED_SHIFT;
const CACHE_CORES_SHIFT: u32 = 26;
const CACHE_CORES: u32 = 0x3f << CACHE_CORES_SHIFT;

/// The leaves for vCPU number `vcpu` of `count`: its APIC id, and a topology of one package with `count` cores of one thread,
/// which share the third level of cache and none before.
pub fn for_vcpu(supported: &CpuId, vcpu: u8, count: u8, tsc_deadline: bool) -> Result<CpuId, fam::Error> {
    let has = |leaf| supported.as_slice().iter().any(|entry| entry.function == leaf);
    let mut entries: Vec<_> = supported.as_slice().iter().filter(|entry| !describes_host(entry)).copied().collect();
    for entry in &mut entries {
        adjust(entry, vcpu, count, tsc_deadline);
    }
    // KVM gives these as far as the host's own topology goes, which is not the guest's.
    let leaves = TOPOLOGY.into_iter().filter(|leaf| has(*leaf));
    entries.extend(leaves.flat_map(|leaf| (0..3).map(move |level| topology(leaf, level, vcpu, count))));
    CpuId::from_entries(&entries)
}

/// Whether a processor says that AMD made it, or Hygon, whose are the same.
pub fn is_amd(cpuid: &CpuId) -> bool {
    let vendor = cpuid.as_slice().iter().find(|entry| entry.function == 0).map(|e| [e.ebx, e.edx, e.ecx]);
    let name =
        |text: &[u8; 12]| [0, 4, 8].map(|at| u32::from_le_bytes([text[at], text[at + 1], text[at + 2], text[at + 3]]));
    [b"AuthenticAMD", b"HygonGenuine"].into_iter().any(|text| vendor == Some(name(text)))
}

/// Whether a leaf is the host's topology through and through.
fn describes_host(entry: &kvm_cpuid_entry2) -> bool {
    TOPOLOGY.contains(&entry.function) || entry.function == AMD_TOPOLOGY
}

/// Bits of an APIC id that tell the cores of a package with `count` of them apart.
fn id_bits(count: u8) -> u32 {
    u32::from(count).next_power_of_two().trailing_zeros()
}

/// Extended topology: level 0 is threads (one a core), level 1 is cores, level 2 ends the list.
fn topology(function: u32, level: u32, vcpu: u8, count: u8) -> kvm_cpuid_entry2 {
    let logical = u32::from(count);
    let (eax, ebx, ecx) = match level {
        0 => (0, 1, 0x100),
        1 => (id_bits(count), logical, 0x201),
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
        (0x4, _) => share_cache(entry, count, CACHE_CORES),
        (0x8000_001d, _) => share_cache(entry, count, 0),
        (0x8000_0001, _) => {
            entry.ecx &= !SVM;
            if count == 1 {
                entry.ecx &= !CMP_LEGACY;
            }
        }
        // What the processor offers to guests of the guest.
        (0x8000_000a, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        // AMD: number of cores, less one, and of the bits of an APIC id that tell them apart; the extended APIC id.
        (0x8000_0008, _) => entry.ecx = (entry.ecx & !0xf0ff) | (id_bits(count) << 12) | (logical - 1),
        (0x8000_001e, _) => {
            entry.eax = id;
            entry.ebx = id & 0xff;
            entry.ecx = 0;
        }
        _ => {}
    }
}

/// Who shares a cache: a core alone, or, from the third level on, all. Both counts are of APIC ids, used or not.
fn share_cache(entry: &mut kvm_cpuid_entry2, count: u8, cores_field: u32) {
    if entry.eax & CACHE_TYPE == 0 {
        return;
    }
    let ids = (1 << id_bits(count)) - 1;
    let shared = if (entry.eax >> CACHE_LEVEL_SHIFT) & 0b111 < 3 { 0 } else { ids };
    entry.eax &= !(CACHE_SHARED | cores_field);
    entry.eax |= shared << CACHE_SHARED_SHIFT | (ids << CACHE_CORES_SHIFT) & cores_field;
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

    /// What the leaves say about the topology is one thing, for any number of vCPUs: one package, APIC ids that differ in
    /// the bits that are said to tell cores apart, and caches whose shares cover all of these ids or one.
    #[test]
    fn every_count_of_vcpus_is_one_package_of_cores() {
        let cache = |function, level: u32| kvm_cpuid_entry2 {
            function,
            index: level,
            // As on a host with 64 cores of two threads.
            eax: 1 | (level << CACHE_LEVEL_SHIFT) | (127 << CACHE_SHARED_SHIFT) | (63 << CACHE_CORES_SHIFT),
            ..Default::default()
        };
        let mut supported = vec![leaf(1, 0), leaf(0xb, 0), leaf(0x1f, 0), leaf(AMD_TOPOLOGY, 0)];
        supported.extend([2, 3].map(|level| cache(4, level)));
        supported.extend([2, 3].map(|level| cache(0x8000_001d, level)));
        supported.extend([leaf(0x8000_0008, 0), leaf(0x8000_001e, 0)]);
        let supported = CpuId::from_entries(&supported).unwrap();
        for count in 1..=8u8 {
            for vcpu in 0..count {
                let cpuid = for_vcpu(&supported, vcpu, count, true).unwrap();
                let get = |function, index| {
                    let is = |e: &&kvm_cpuid_entry2| (e.function, e.index) == (function, index);
                    *cpuid.as_slice().iter().find(is).unwrap_or_else(|| panic!("{function:#x}.{index}"))
                };
                assert!(!cpuid.as_slice().iter().any(|e| e.function == AMD_TOPOLOGY));
                let bits = get(0xb, 1).eax;
                assert!(vcpu >> bits == 0 && u32::from(count) <= 1 << bits && bits <= 3, "{count}: {bits}");
                assert_eq!(get(0x1f, 1).eax, bits);
                assert_eq!((get(1, 0).ebx >> 24, get(0xb, 0).edx, get(0x8000_001e, 0).eax), {
                    let id = u32::from(vcpu);
                    (id, id, id)
                });
                assert_eq!(get(1, 0).edx & HTT != 0, count > 1);
                let amd = get(0x8000_0008, 0).ecx;
                assert_eq!((amd & 0xff, (amd >> 12) & 0xf), (u32::from(count) - 1, bits));
                let ids = (1 << bits) - 1;
                let counts = |e: kvm_cpuid_entry2| ((e.eax >> CACHE_SHARED_SHIFT) & 0xfff, e.eax >> CACHE_CORES_SHIFT);
                assert_eq!((counts(get(4, 2)), counts(get(4, 3))), ((0, ids), (ids, ids)));
                assert_eq!((counts(get(0x8000_001d, 2)).0, counts(get(0x8000_001d, 3)).0), (0, ids));
            }
        }
    }

    #[test]
    fn vendors_are_told_apart() {
        let [ebx, edx, ecx] = [*b"Auth", *b"enti", *b"cAMD"].map(u32::from_le_bytes);
        let amd = kvm_cpuid_entry2 { ebx, edx, ecx, ..Default::default() };
        assert!(is_amd(&CpuId::from_entries(&[amd]).unwrap()));
        assert!(!is_amd(&CpuId::from_entries(&[leaf(0, 0), leaf(1, 0)]).unwrap()));
        assert!(!is_amd(&CpuId::from_entries(&[]).unwrap()));
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
