//! Saving and loading a vCPU's registers, in the order that KVM needs.
//!
//! | step | why there |
//! |---|---|
//! | save: MP state first | reading it may process a pending INIT or SIPI, which changes everything else |
//! | save: events last | reading the others may queue none, but lose none either |
//! | load: CPUID first | MSRs and XCR0 are checked against it |
//! | load: special registers before the local APIC | they hold the APIC base and mode |
//! | load: local APIC before MSRs | writing its registers clears a deadline timer |
//! | load: TSC before TSC_DEADLINE | the deadline is armed against the TSC of that moment |
//! | load: events after general registers | setting those drops pending exceptions |
// UNSAFETY: KVM_GET_XSAVE2 and KVM_SET_XSAVE write and read as many bytes as the host's features need.
#![allow(unsafe_code)]

use crate::arch::msrs::{HARDWARE_CONFIGURATION, MISC_ENABLE, MTRR_DEF_TYPE, TSC_AT_P0};
use kvm_bindings::{
    CpuId, Msrs, Xsave, kvm_cpuid_entry2, kvm_debugregs, kvm_dtable, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcr, kvm_xcrs, kvm_xsave2,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use snapshot::compat::same_tsc;
use snapshot::state::{
    CpuidEntry, DebugRegs, DescriptorTable, ExceptionEvent, InterruptEvent, Msr, NmiEvent, Regs, Segment, SmiEvent,
    Sregs, VcpuEvents, VcpuState, Xcr,
};
use std::ops::RangeInclusive;

pub(super) const MSR_TSC: u32 = 0x10;
pub(super) const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// MSRs of Hyper-V, which no guest of ours is offered. KVM lists them all the same, and makes up values for some that other
/// hosts refuse to take.
const HYPER_V: RangeInclusive<u32> = 0x4000_0000..=0x4000_01ff;
/// Global enables of performance counters, Intel's and AMD's. From Linux 6.9 on they are set after a reset.
const PERF_GLOBAL_CTRL: u32 = 0x38f;
const PERF_CNTR_GLOBAL_CTL: u32 = 0xc000_0301;
/// Whether the host polls for a while before a halted vCPU sleeps; set after a reset.
const KVM_POLL_CONTROL: u32 = 0x4b56_4d05;
/// MSRs that KVM keeps for a guest and, on some kernels or all, does not list.
const UNLISTED: [RangeInclusive<u32>; 6] = [
    // Memory types: eight pairs for variable ranges, the fixed ranges, what holds elsewhere.
    0x200..=0x20f,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    0x2ff..=0x2ff,
    // AMD's hardware configuration.
    0xc001_0015..=0xc001_0015,
];
/// Size of the XSAVE area before dynamically enabled features, in bytes.
const XSAVE_BASE: usize = 4096;

/// Why a vCPU could not be saved or loaded.
#[derive(Debug, thiserror::Error)]
pub enum VcpuStateError {
    /// KVM refused a step.
    #[error("KVM refused {step} of vCPU state: {source}")]
    Step {
        /// Which step.
        step: &'static str,
        /// What the kernel said.
        source: kvm_ioctls::Error,
    },
    /// KVM wrote only some MSRs.
    #[error("KVM refused MSR {index:#x} with value {data:#x}; the snapshot needs a host that has it")]
    Msr {
        /// Number of the MSR.
        index: u32,
        /// The value.
        data: u64,
    },
    /// Time would run at another speed.
    #[error(
        "the guest's time-stamp counter runs at {guest} kHz, this host's at {host} kHz, and this host cannot scale it; restore on a host of the same frequency, or allow the mismatch `tsc_khz`"
    )]
    TscKhz {
        /// Frequency in the snapshot, in kHz.
        guest: u32,
        /// Frequency of this host, in kHz.
        host: u32,
    },
    /// A part has a size that does not belong there.
    #[error("the snapshot's {what} has {found} bytes or entries; this host takes {expected}")]
    Size {
        /// Which part.
        what: &'static str,
        /// What the snapshot has.
        found: usize,
        /// What the host takes.
        expected: usize,
    },
}

pub(super) fn step(step: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VcpuStateError {
    move |source| VcpuStateError::Step { step, source }
}

/// What becomes of a guest whose time-stamp counter this host cannot give it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OtherTsc {
    /// It is not loaded.
    Refused,
    /// It gets this host's.
    Allowed,
}

/// What a host keeps for each vCPU, asked once per process.
#[derive(Clone, Debug)]
pub struct StateShape {
    /// MSRs to save, in the order in which they are to be loaded.
    msrs: Vec<u32>,
    /// Size of the XSAVE area, in bytes.
    xsave: usize,
}

impl StateShape {
    /// Asks the host.
    pub fn of_host(kvm: &Kvm, vm: &VmFd) -> Result<Self, VcpuStateError> {
        let list = kvm.get_msr_index_list().map_err(step("the list of MSRs"))?;
        Ok(StateShape { msrs: load_order(&with_unlisted(list.as_slice())), xsave: xsave_size(vm) })
    }
}

/// Size of the XSAVE area on this host, in bytes.
pub fn xsave_size(vm: &VmFd) -> usize {
    usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0).max(XSAVE_BASE)
}

/// The listed MSRs but for Hyper-V's, and those that are not listed, once each.
fn with_unlisted(listed: &[u32]) -> Vec<u32> {
    let unlisted = UNLISTED.into_iter().flatten().filter(|index| !listed.contains(index));
    listed.iter().copied().filter(|index| !HYPER_V.contains(index)).chain(unlisted).collect()
}

/// MSRs in an order in which they can be loaded.
fn load_order(msrs: &[u32]) -> Vec<u32> {
    let (deadline, mut rest): (Vec<u32>, Vec<u32>) = msrs.iter().partition(|&&index| index == MSR_TSC_DEADLINE);
    rest.extend(deadline);
    rest
}

/// Saves a vCPU that stands still with no I/O half done.
pub fn save(vcpu: &VcpuFd, shape: &StateShape) -> Result<VcpuState, VcpuStateError> {
    let mp_state = vcpu.get_mp_state().map_err(step("saving the run state"))?.mp_state;
    let regs = save_regs(&vcpu.get_regs().map_err(step("saving general registers"))?);
    let sregs = save_sregs(&vcpu.get_sregs().map_err(step("saving special registers"))?);
    let xsave = save_xsave(vcpu, shape.xsave)?;
    let xcrs = save_xcrs(&vcpu.get_xcrs().map_err(step("saving extended control registers"))?);
    let debug_regs = save_debug_regs(&vcpu.get_debug_regs().map_err(step("saving debug registers"))?);
    let lapic = vcpu.get_lapic().map_err(step("saving the local APIC"))?.regs.iter().map(|b| *b as u8).collect();
    let msrs = save_msrs(vcpu, &shape.msrs)?;
    let tsc_khz = vcpu.get_tsc_khz().unwrap_or(0);
    let cpuid = vcpu.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES).map_err(step("saving CPUID"))?;
    let cpuid = cpuid.as_slice().iter().map(save_cpuid).collect();
    let events = save_events(&vcpu.get_vcpu_events().map_err(step("saving pending events"))?);
    Ok(VcpuState { mp_state, regs, sregs, xsave, xcrs, debug_regs, lapic, msrs, events, cpuid, tsc_khz })
}

/// Loads a vCPU that has never run. vCPUs are loaded in order of their numbers, `first` first. `held` is what was saved of it before,
/// if it was: what it holds already is not loaded, where each call takes longer than to compare.
pub fn load(
    vcpu: &VcpuFd,
    vm: &VmFd,
    state: &VcpuState,
    held: Option<&VcpuState>,
    first: bool,
    other_tsc: OtherTsc,
) -> Result<(), VcpuStateError> {
    let VcpuState { mp_state, regs, sregs, xsave, xcrs, debug_regs, lapic, msrs, events, cpuid, tsc_khz } = state;
    // With another CPUID all may be another.
    let held = held.filter(|held| is_same_cpuid(&held.cpuid, cpuid));
    if held.is_none() {
        let cpuid: Vec<_> = cpuid.iter().map(load_cpuid).collect();
        let expected = kvm_bindings::KVM_MAX_CPUID_ENTRIES;
        let too_many = |_| VcpuStateError::Size { what: "CPUID", found: cpuid.len(), expected };
        vcpu.set_cpuid2(&CpuId::from_entries(&cpuid).map_err(too_many)?).map_err(step("loading CPUID"))?;
    }
    let host_khz = held.map_or_else(|| vcpu.get_tsc_khz().unwrap_or(0), |held| held.tsc_khz);
    match load_tsc_khz(vcpu, vm, *tsc_khz, host_khz) {
        Err(e @ VcpuStateError::TscKhz { .. }) if other_tsc == OtherTsc::Allowed => {
            if first {
                tracing::warn!("{e}; it is restored all the same");
            }
        }
        other => other?,
    }
    if held.is_none_or(|held| held.mp_state != *mp_state) {
        vcpu.set_mp_state(kvm_mp_state { mp_state: *mp_state }).map_err(step("loading the run state"))?;
    }
    vcpu.set_regs(&load_regs(regs)).map_err(step("loading general registers"))?;
    vcpu.set_sregs(&load_sregs(sregs)).map_err(step("loading special registers"))?;
    load_xsave(vcpu, xsave_size(vm), xsave)?;
    // A host without XSAVE has none, and refuses even to set none.
    if !xcrs.is_empty() && held.is_none_or(|held| held.xcrs != *xcrs) {
        vcpu.set_xcrs(&load_xcrs(xcrs)?).map_err(step("loading extended control registers"))?;
    }
    if held.is_none_or(|held| held.debug_regs != *debug_regs) {
        vcpu.set_debug_regs(&load_debug_regs(debug_regs)).map_err(step("loading debug registers"))?;
    }
    vcpu.set_lapic(&load_lapic(lapic)?).map_err(step("loading the local APIC"))?;
    load_msrs(vcpu, msrs, first.then(|| far_tsc(msrs, *tsc_khz)))?;
    vcpu.set_vcpu_events(&load_events(events)).map_err(step("loading pending events"))
}

/// Whether a vCPU that has the first of these tables can keep it in place of the second: they differ in nothing but what KVM derives
/// from registers, and does when those are loaded (`kvm_update_cpuid_runtime`).
fn is_same_cpuid(held: &[CpuidEntry], wanted: &[CpuidEntry]) -> bool {
    let settled = |entries: &[CpuidEntry]| entries.iter().map(without_derived).collect::<Vec<_>>();
    settled(held) == settled(wanted)
}

/// A leaf without the bits that follow registers: CR4, the APIC base, XCR0 and XSS.
fn without_derived(entry: &CpuidEntry) -> CpuidEntry {
    const OSXSAVE: u32 = 1 << 27;
    const APIC: u32 = 1 << 9;
    const OSPKE: u32 = 1 << 4;
    let CpuidEntry { ecx, edx, .. } = *entry;
    match (entry.function, entry.index) {
        (1, _) => CpuidEntry { ecx: ecx & !OSXSAVE, edx: edx & !APIC, ..*entry },
        (7, 0) => CpuidEntry { ecx: ecx & !OSPKE, ..*entry },
        // The size of the XSAVE area with what is switched on.
        (0xd, 0 | 1) => CpuidEntry { ebx: 0, ..*entry },
        _ => *entry,
    }
}

/// Tells the guest's paravirtual clock that time has passed while it stood still, so that its watchdogs stay calm.
/// A guest that does not use that clock refuses, which is fine.
pub fn note_pause(vcpu: &VcpuFd) {
    let _ = vcpu.kvmclock_ctrl();
}

/// A guest keeps its TSC frequency. On a host whose own differs and that cannot scale, time in the guest would run at
/// another speed, so that is refused.
fn load_tsc_khz(vcpu: &VcpuFd, vm: &VmFd, guest: u32, host: u32) -> Result<(), VcpuStateError> {
    if same_tsc(guest, host) {
        return Ok(());
    }
    if !vm.check_extension(Cap::TscControl) {
        return Err(VcpuStateError::TscKhz { guest, host });
    }
    vcpu.set_tsc_khz(guest).map_err(step("loading the frequency of the time-stamp counter"))
}

pub(super) fn save_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>, VcpuStateError> {
    let mut saved = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let entries: Vec<_> = rest.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = msr_list(&entries)?;
        let count = vcpu.get_msrs(&mut msrs).map_err(step("saving MSRs"))?;
        saved.extend(msrs.as_slice()[..count].iter().map(|e| Msr { index: e.index, data: e.data }));
        // KVM stops at an MSR that it lists but that this CPU model lacks: such a one holds nothing.
        rest = rest.get(count + 1..).unwrap_or(&[]);
    }
    Ok(saved)
}

/// Loads MSRs, in order, after the `prime` of the time-stamp counter ([`far_tsc`]).
fn load_msrs(vcpu: &VcpuFd, saved: &[Msr], prime: Option<kvm_msr_entry>) -> Result<(), VcpuStateError> {
    let ours = saved.iter().filter(|msr| is_ours(msr)).map(|msr| load_msr(msr, saved_tsc(saved)));
    let entries = prime.into_iter().chain(ours).collect();
    set_all(entries, |rest| vcpu.set_msrs(&msr_list(rest)?).map_err(step("loading MSRs")))
}

/// Whether an MSR is to be loaded: snapshots may hold those of Hyper-V.
pub(super) fn is_ours(msr: &Msr) -> bool {
    !HYPER_V.contains(&msr.index)
}

/// Sets MSRs in order. `set` sets some, and says how many KVM took before one that it refuses.
pub(super) fn set_all(
    mut entries: Vec<kvm_msr_entry>,
    mut set: impl FnMut(&[kvm_msr_entry]) -> Result<usize, VcpuStateError>,
) -> Result<(), VcpuStateError> {
    let mut at = 0;
    while at < entries.len() {
        at += set(&entries[at..])?;
        let Some(&mut kvm_msr_entry { index, ref mut data, .. }) = entries.get_mut(at) else { break };
        match when_refused(index, *data) {
            Refused::Instead(other) => *data = other,
            Refused::Without => {
                tracing::warn!("this host's KVM does not take {data:#x} for MSR {index:#x}; the guest goes on without");
                at += 1;
            }
            Refused::Unmissed => at += 1,
            Refused::Fatal => return Err(VcpuStateError::Msr { index, data: *data }),
        }
    }
    Ok(())
}

/// What becomes of an MSR that KVM refuses.
#[derive(Debug, PartialEq, Eq)]
enum Refused {
    /// This value is tried in its place.
    Instead(u64),
    /// The guest can do without, if less well.
    Without,
    /// It held nothing.
    Unmissed,
    /// The guest cannot go on.
    Fatal,
}

fn when_refused(index: u32, data: u64) -> Refused {
    match index {
        // A register that this kernel does not know and that held nothing is not missed.
        _ if data == 0 => Refused::Unmissed,
        // Only a hint, which kernels before 6.8 do not take.
        HARDWARE_CONFIGURATION if data & TSC_AT_P0 != 0 => Refused::Instead(data & !TSC_AT_P0),
        // What the host makes up at a reset, or we set at boot wherever it can be: no guest needs to have used it. A
        // counter that is in use has a register of its own that says so, and is refused by that.
        HARDWARE_CONFIGURATION | MTRR_DEF_TYPE | MISC_ENABLE => Refused::Without,
        PERF_GLOBAL_CTRL | PERF_CNTR_GLOBAL_CTL | KVM_POLL_CONTROL => Refused::Without,
        _ => Refused::Fatal,
    }
}

pub(super) fn saved_tsc(saved: &[Msr]) -> u64 {
    saved.iter().find(|msr| msr.index == MSR_TSC).map_or(0, |msr| msr.data)
}

/// A write of the counter that is far away from what was saved.
///
/// Kernels before 6.8 take a first write of the TSC that is less than a second from where the counter stands for an
/// attempt to synchronize vCPUs, and ignore its value: a guest that was snapshotted in its first second would see time
/// go back. This write, before the real one of the first vCPU, makes them believe the real one. The other vCPUs' values lie
/// within a second of the first one's, and are synchronized with it as they should be.
pub(super) fn far_tsc(saved: &[Msr], tsc_khz: u32) -> kvm_msr_entry {
    let far = saved_tsc(saved).wrapping_add(u64::from(tsc_khz) * 1000 * 10);
    kvm_msr_entry { index: MSR_TSC, data: far, ..Default::default() }
}

/// A deadline of zero means that the timer has fired and its interrupt may not have been delivered: the guest would sleep
/// for ever. A deadline in the past fires at once and costs nothing if nobody waits. A counter of zero would mean to KVM:
/// as on the other vCPUs.
pub(super) fn load_msr(msr: &Msr, tsc: u64) -> kvm_msr_entry {
    let data = match msr.index {
        MSR_TSC_DEADLINE if msr.data == 0 => tsc,
        MSR_TSC => msr.data.max(1),
        _ => msr.data,
    };
    kvm_msr_entry { index: msr.index, data, ..Default::default() }
}

pub(super) fn msr_list(entries: &[kvm_msr_entry]) -> Result<Msrs, VcpuStateError> {
    let expected = kvm_bindings::KVM_MAX_MSR_ENTRIES;
    Msrs::from_entries(entries).map_err(|_| VcpuStateError::Size {
        what: "list of MSRs",
        found: entries.len(),
        expected,
    })
}

fn save_xsave(vcpu: &VcpuFd, size: usize) -> Result<Vec<u8>, VcpuStateError> {
    let words = if size == XSAVE_BASE {
        vcpu.get_xsave().map_err(step("saving the FPU"))?.region.to_vec()
    } else {
        let mut area = xsave_area(size)?;
        // SAFETY: KVM writes as many bytes as KVM_CAP_XSAVE2 says; the area was made for `size`, which is that number.
        unsafe { vcpu.get_xsave2(&mut area) }.map_err(step("saving the FPU"))?;
        let fam = area.as_fam_struct_ref();
        fam.xsave.region.iter().chain(area.as_slice()).copied().collect()
    };
    Ok(words.into_iter().flat_map(u32::to_le_bytes).collect())
}

fn load_xsave(vcpu: &VcpuFd, size: usize, saved: &[u8]) -> Result<(), VcpuStateError> {
    set_xsave(vcpu, &load_xsave_area(size, saved)?)
}

/// What was saved of the FPU, as a host takes it whose area has this size: see [`xsave_size`].
pub(super) fn load_xsave_area(size: usize, saved: &[u8]) -> Result<Xsave, VcpuStateError> {
    // A guest from a host with fewer features fits into the larger area: what it lacks is zero there.
    if saved.len() < XSAVE_BASE || saved.len() > size || !saved.len().is_multiple_of(4) {
        return Err(VcpuStateError::Size { what: "FPU state", found: saved.len(), expected: size });
    }
    let mut words = saved.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let mut area = xsave_area(size)?;
    // SAFETY: only values of the fixed part are written; the length of the trailing array stays.
    let fixed = unsafe { area.as_mut_fam_struct() };
    fixed.xsave.region.iter_mut().zip(&mut words).for_each(|(to, word)| *to = word);
    area.as_mut_slice().iter_mut().zip(&mut words).for_each(|(to, word)| *to = word);
    Ok(area)
}

/// Loads the FPU from an area that [`load_xsave_area`] has made for the size that this host takes.
pub(super) fn set_xsave(vcpu: &VcpuFd, area: &Xsave) -> Result<(), VcpuStateError> {
    // SAFETY: KVM reads as many bytes as KVM_CAP_XSAVE2 says, and the area was made for exactly that many.
    unsafe { vcpu.set_xsave2(area) }.map_err(step("loading the FPU"))
}

fn xsave_area(size: usize) -> Result<Xsave, VcpuStateError> {
    let extra = (size - XSAVE_BASE).div_ceil(size_of::<u32>());
    debug_assert_eq!(size_of::<kvm_xsave2>() - size_of::<usize>(), XSAVE_BASE);
    Xsave::new(extra).map_err(|_| VcpuStateError::Size { what: "FPU state", found: size, expected: XSAVE_BASE })
}

pub(super) fn load_lapic(saved: &[u8]) -> Result<kvm_lapic_state, VcpuStateError> {
    let mut lapic = kvm_lapic_state::default();
    if saved.len() != lapic.regs.len() {
        let expected = lapic.regs.len();
        return Err(VcpuStateError::Size { what: "local APIC state", found: saved.len(), expected });
    }
    lapic.regs.iter_mut().zip(saved).for_each(|(to, byte)| *to = *byte as _);
    Ok(lapic)
}

fn save_xcrs(xcrs: &kvm_xcrs) -> Vec<Xcr> {
    let count = (xcrs.nr_xcrs as usize).min(xcrs.xcrs.len());
    xcrs.xcrs[..count].iter().map(|x| Xcr { xcr: x.xcr, value: x.value }).collect()
}

pub(super) fn load_xcrs(saved: &[Xcr]) -> Result<kvm_xcrs, VcpuStateError> {
    let mut xcrs = kvm_xcrs { nr_xcrs: saved.len() as u32, ..Default::default() };
    if saved.len() > xcrs.xcrs.len() {
        let expected = xcrs.xcrs.len();
        return Err(VcpuStateError::Size { what: "extended control registers", found: saved.len(), expected });
    }
    for (to, &Xcr { xcr, value }) in xcrs.xcrs.iter_mut().zip(saved) {
        *to = kvm_xcr { xcr, value, ..Default::default() };
    }
    Ok(xcrs)
}

fn save_cpuid(entry: &kvm_cpuid_entry2) -> CpuidEntry {
    let kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, padding: _ } = *entry;
    CpuidEntry { function, index, flags, eax, ebx, ecx, edx }
}

fn load_cpuid(entry: &CpuidEntry) -> kvm_cpuid_entry2 {
    let CpuidEntry { function, index, flags, eax, ebx, ecx, edx } = *entry;
    kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, padding: [0; 3] }
}

fn save_regs(regs: &kvm_regs) -> Regs {
    let kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags } = *regs;
    Regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
}

pub(super) fn load_regs(regs: &Regs) -> kvm_regs {
    let Regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags } = *regs;
    kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
}

fn save_sregs(sregs: &kvm_sregs) -> Sregs {
    let kvm_sregs {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr,
        ldt,
        gdt,
        idt,
        cr0,
        cr2,
        cr3,
        cr4,
        cr8,
        efer,
        apic_base,
        interrupt_bitmap,
    } = sregs;
    Sregs {
        cs: save_segment(cs),
        ds: save_segment(ds),
        es: save_segment(es),
        fs: save_segment(fs),
        gs: save_segment(gs),
        ss: save_segment(ss),
        tr: save_segment(tr),
        ldt: save_segment(ldt),
        gdt: save_table(gdt),
        idt: save_table(idt),
        cr0: *cr0,
        cr2: *cr2,
        cr3: *cr3,
        cr4: *cr4,
        cr8: *cr8,
        efer: *efer,
        apic_base: *apic_base,
        interrupt_bitmap: *interrupt_bitmap,
    }
}

pub(super) fn load_sregs(sregs: &Sregs) -> kvm_sregs {
    let Sregs { cs, ds, es, fs, gs, ss, tr, ldt, gdt, idt, cr0, cr2, cr3, cr4, cr8, efer, apic_base, interrupt_bitmap } =
        sregs;
    kvm_sregs {
        cs: load_segment(cs),
        ds: load_segment(ds),
        es: load_segment(es),
        fs: load_segment(fs),
        gs: load_segment(gs),
        ss: load_segment(ss),
        tr: load_segment(tr),
        ldt: load_segment(ldt),
        gdt: load_table(gdt),
        idt: load_table(idt),
        cr0: *cr0,
        cr2: *cr2,
        cr3: *cr3,
        cr4: *cr4,
        cr8: *cr8,
        efer: *efer,
        apic_base: *apic_base,
        interrupt_bitmap: *interrupt_bitmap,
    }
}

fn save_segment(segment: &kvm_segment) -> Segment {
    let kvm_segment { base, limit, selector, type_, present, dpl, db, s, l, g, avl, unusable, padding: _ } = *segment;
    Segment { base, limit, selector, type_, present, dpl, db, s, l, g, avl, unusable }
}

fn load_segment(segment: &Segment) -> kvm_segment {
    let Segment { base, limit, selector, type_, present, dpl, db, s, l, g, avl, unusable } = *segment;
    kvm_segment { base, limit, selector, type_, present, dpl, db, s, l, g, avl, unusable, padding: 0 }
}

fn save_table(table: &kvm_dtable) -> DescriptorTable {
    let kvm_dtable { base, limit, padding: _ } = *table;
    DescriptorTable { base, limit }
}

fn load_table(table: &DescriptorTable) -> kvm_dtable {
    let DescriptorTable { base, limit } = *table;
    kvm_dtable { base, limit, padding: [0; 3] }
}

fn save_debug_regs(regs: &kvm_debugregs) -> DebugRegs {
    let kvm_debugregs { db, dr6, dr7, flags, reserved: _ } = *regs;
    DebugRegs { db, dr6, dr7, flags }
}

pub(super) fn load_debug_regs(regs: &DebugRegs) -> kvm_debugregs {
    let DebugRegs { db, dr6, dr7, flags } = *regs;
    kvm_debugregs { db, dr6, dr7, flags, reserved: [0; 9] }
}

fn save_events(events: &kvm_vcpu_events) -> VcpuEvents {
    let kvm_vcpu_events {
        exception,
        interrupt,
        nmi,
        sipi_vector,
        flags,
        smi,
        triple_fault,
        reserved: _,
        exception_has_payload,
        exception_payload,
    } = *events;
    VcpuEvents {
        exception: ExceptionEvent {
            injected: exception.injected,
            nr: exception.nr,
            has_error_code: exception.has_error_code,
            pending: exception.pending,
            error_code: exception.error_code,
            has_payload: exception_has_payload,
            payload: exception_payload,
        },
        interrupt: InterruptEvent {
            injected: interrupt.injected,
            nr: interrupt.nr,
            soft: interrupt.soft,
            shadow: interrupt.shadow,
        },
        nmi: NmiEvent { injected: nmi.injected, pending: nmi.pending, masked: nmi.masked },
        smi: SmiEvent {
            smm: smi.smm,
            pending: smi.pending,
            smm_inside_nmi: smi.smm_inside_nmi,
            latched_init: smi.latched_init,
        },
        sipi_vector,
        flags,
        triple_fault: triple_fault.pending,
    }
}

pub(super) fn load_events(events: &VcpuEvents) -> kvm_vcpu_events {
    let VcpuEvents { exception, interrupt, nmi, smi, sipi_vector, flags, triple_fault } = *events;
    let mut to = kvm_vcpu_events { sipi_vector, flags, ..Default::default() };
    let ExceptionEvent { injected, nr, has_error_code, pending, error_code, has_payload, payload } = exception;
    to.exception.injected = injected;
    to.exception.nr = nr;
    to.exception.has_error_code = has_error_code;
    to.exception.pending = pending;
    to.exception.error_code = error_code;
    to.exception_has_payload = has_payload;
    to.exception_payload = payload;
    let InterruptEvent { injected, nr, soft, shadow } = interrupt;
    to.interrupt.injected = injected;
    to.interrupt.nr = nr;
    to.interrupt.soft = soft;
    to.interrupt.shadow = shadow;
    let NmiEvent { injected, pending, masked } = nmi;
    to.nmi.injected = injected;
    to.nmi.pending = pending;
    to.nmi.masked = masked;
    let SmiEvent { smm, pending, smm_inside_nmi, latched_init } = smi;
    to.smi.smm = smm;
    to.smi.pending = pending;
    to.smi.smm_inside_nmi = smm_inside_nmi;
    to.smi.latched_init = latched_init;
    to.triple_fault.pending = triple_fault;
    to
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpuid_may_differ_in_what_follows_registers_and_in_nothing_else() {
        let leaf = |function, index| CpuidEntry { function, index, eax: !0, ebx: !0, ecx: !0, edx: !0, flags: 0 };
        let held = [leaf(1, 0), leaf(7, 0), leaf(7, 1), leaf(0xd, 0), leaf(0xd, 1), leaf(0xd, 2)];
        let derived = |number: usize, register: usize, bit: u32| match (number, register) {
            (0, 2) => bit == 27,
            (0, 3) => bit == 9,
            (1, 2) => bit == 4,
            (3 | 4, 1) => true,
            _ => false,
        };
        assert!(is_same_cpuid(&held, &held) && !is_same_cpuid(&held, &held[1..]) && !is_same_cpuid(&[], &held));
        for (number, register, bit) in (0..held.len()).flat_map(|n| (0..4 * 32).map(move |at| (n, at / 32, at % 32))) {
            let mut other = held;
            let CpuidEntry { eax, ebx, ecx, edx, .. } = &mut other[number];
            *[eax, ebx, ecx, edx][register] ^= 1 << bit;
            let same = is_same_cpuid(&held, &other);
            assert_eq!(same, derived(number, register, bit as u32), "leaf {number}, register {register}, bit {bit}");
        }
    }

    #[test]
    fn unlisted_msrs_are_saved_once_and_the_deadline_is_loaded_last() {
        let msrs = load_order(&with_unlisted(&[MSR_TSC_DEADLINE, 0x2ff, MSR_TSC]));
        assert_eq!((msrs.first(), msrs.last()), (Some(&0x2ff), Some(&MSR_TSC_DEADLINE)));
        let mut sorted = msrs.clone();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted.len(), msrs.len());
        for index in [0x200, 0x20f, 0x250, 0x259, 0x26f, 0xc001_0015] {
            assert!(msrs.contains(&index), "{index:#x}");
        }
    }

    #[test]
    fn registers_of_hyper_v_are_neither_saved_nor_loaded() {
        // As Linux 6.1 lists them, with others around.
        let hyper_v = [0x4000_0000, 0x4000_0001, 0x4000_0020, 0x4000_0022, 0x4000_0105, 0x4000_0118];
        let listed: Vec<u32> = [MSR_TSC, KVM_POLL_CONTROL].into_iter().chain(hyper_v).collect();
        let saved = with_unlisted(&listed);
        assert!(saved.contains(&MSR_TSC) && saved.contains(&KVM_POLL_CONTROL));
        assert!(hyper_v.iter().all(|index| !saved.contains(index)));
    }

    /// A host that has no MSR but those below 0x200, and HWCR without bit 24.
    fn old_host(taken: &mut Vec<(u32, u64)>, rest: &[kvm_msr_entry]) -> usize {
        let takes = |e: &&kvm_msr_entry| e.index < 0x200 || e.index == HARDWARE_CONFIGURATION && e.data == 1;
        let before = taken.len();
        taken.extend(rest.iter().take_while(takes).map(|e| (e.index, e.data)));
        taken.len() - before
    }

    #[test]
    fn what_a_guest_can_do_without_does_not_keep_it_from_an_older_host() {
        let entry = |(index, data)| kvm_msr_entry { index, data, ..Default::default() };
        let load = |msrs: &[(u32, u64)]| {
            let mut taken = Vec::new();
            let done = set_all(msrs.iter().copied().map(entry).collect(), |rest| Ok(old_host(&mut taken, rest)));
            (taken, done)
        };
        let (taken, done) = load(&[
            (MTRR_DEF_TYPE, 0xc06),
            (0x10, 5),
            (HARDWARE_CONFIGURATION, TSC_AT_P0 | 1),
            (PERF_GLOBAL_CTRL, 0xff),
            (PERF_CNTR_GLOBAL_CTL, 0x3f),
            (0x300, 0),
            (KVM_POLL_CONTROL, 1),
            (0x11, 6),
            (HARDWARE_CONFIGURATION, TSC_AT_P0),
        ]);
        assert_eq!(taken, [(0x10, 5), (HARDWARE_CONFIGURATION, 1), (0x11, 6)]);
        done.unwrap();
        let refused = load(&[(0x10, 5), (0x300, 1), (0x11, 6)]).1;
        assert!(matches!(refused, Err(VcpuStateError::Msr { index: 0x300, data: 1 })), "{refused:?}");
    }
}
