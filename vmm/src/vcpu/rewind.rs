//! Bringing a vCPU that has run back to the state that was saved of it, in place.
//!
//! It differs from [`state::load`], which loads a vCPU that has never run:
//!
//! - CPUID and the frequency of the time-stamp counter are what they were, and are left alone.
//! - Of the MSRs only those are written that have changed. One that tells KVM where to write something, such as the wall clock,
//!   would have it written again.
//! - Special registers may have to be loaded twice, the first time with another CR3. Only if one of the registers changes that
//!   page tables depend on does KVM forget translations, and the tables may have gone back though CR3 has not.
//!
//! What is to be loaded is made when it is saved, so that nothing is left to be done but the calls.

use super::state::{
    self, MSR_TSC, MSR_TSC_DEADLINE, VcpuStateError, far_tsc, is_ours, load_debug_regs, load_events, load_lapic,
    load_msr, load_regs, load_sregs, load_xcrs, load_xsave_area, msr_list, save_msrs, saved_tsc, set_all, set_xsave,
    step,
};
use kvm_bindings::{
    Xsave, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{VcpuFd, VmFd};
use snapshot::state::{Msr, VcpuState};

/// Bit of CR3 that is another one than it was: the lowest of the address.
const OTHER_TABLES: u64 = 1 << 12;

/// What KVM and the CPU know of the guest's page tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Translations {
    /// What they were before memory went back.
    Stale,
    /// Nothing, as soon as the guest runs again.
    Forgotten,
}

/// What a vCPU is to be brought back to.
pub struct VcpuMark {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Xsave,
    /// None on a host without XSAVE.
    xcrs: Option<kvm_xcrs>,
    debug_regs: kvm_debugregs,
    lapic: Box<kvm_lapic_state>,
    msrs: Vec<Msr>,
    indices: Vec<u32>,
    events: kvm_vcpu_events,
    tsc_khz: u32,
}

impl std::fmt::Debug for VcpuMark {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VcpuMark").field("rip", &self.regs.rip).finish_non_exhaustive()
    }
}

impl VcpuMark {
    /// What was saved of a vCPU of `vm`.
    pub fn of(vm: &VmFd, saved: &VcpuState) -> Result<Self, VcpuStateError> {
        let VcpuState { mp_state, regs, sregs, xsave, xcrs, debug_regs, lapic, msrs, events, cpuid: _, tsc_khz } =
            saved;
        let msrs: Vec<Msr> = msrs.iter().filter(|msr| is_ours(msr)).copied().collect();
        Ok(VcpuMark {
            mp_state: kvm_mp_state { mp_state: *mp_state },
            regs: load_regs(regs),
            sregs: load_sregs(sregs),
            xsave: load_xsave_area(state::xsave_size(vm), xsave)?,
            xcrs: if xcrs.is_empty() { None } else { Some(load_xcrs(xcrs)?) },
            debug_regs: load_debug_regs(debug_regs),
            lapic: Box::new(load_lapic(lapic)?),
            indices: msrs.iter().map(|msr| msr.index).collect(),
            msrs,
            events: load_events(events),
            tsc_khz: *tsc_khz,
        })
    }

    /// Brings a vCPU that stands still back. vCPUs are brought back in order of their numbers, `first` first.
    pub fn put_back(&self, vcpu: &VcpuFd, first: bool, translations: Translations) -> Result<(), VcpuStateError> {
        vcpu.set_mp_state(self.mp_state).map_err(step("loading the run state"))?;
        vcpu.set_regs(&self.regs).map_err(step("loading general registers"))?;
        if translations == Translations::Stale {
            let other = kvm_sregs { cr3: self.sregs.cr3 ^ OTHER_TABLES, ..self.sregs };
            vcpu.set_sregs(&other).map_err(step("loading special registers"))?;
        }
        vcpu.set_sregs(&self.sregs).map_err(step("loading special registers"))?;
        set_xsave(vcpu, &self.xsave)?;
        if let Some(xcrs) = &self.xcrs {
            vcpu.set_xcrs(xcrs).map_err(step("loading extended control registers"))?;
        }
        vcpu.set_debug_regs(&self.debug_regs).map_err(step("loading debug registers"))?;
        vcpu.set_lapic(&self.lapic).map_err(step("loading the local APIC"))?;
        let now = save_msrs(vcpu, &self.indices)?;
        let prime = first.then(|| far_tsc(&self.msrs, self.tsc_khz));
        let entries = prime.into_iter().chain(changed(&self.msrs, &now)).collect();
        set_all(entries, |rest| vcpu.set_msrs(&msr_list(rest)?).map_err(step("loading MSRs")))?;
        vcpu.set_vcpu_events(&self.events).map_err(step("loading pending events"))
    }
}

/// Those MSRs that are not what they were, in order; and those that count, or that set a timer, whatever they are.
fn changed<'a>(saved: &'a [Msr], now: &'a [Msr]) -> impl Iterator<Item = kvm_msr_entry> + 'a {
    let tsc = saved_tsc(saved);
    let moves = |index| matches!(index, MSR_TSC | MSR_TSC_DEADLINE);
    let is_same = move |at: usize, msr: &Msr| {
        let same = now.get(at).filter(|now| now.index == msr.index);
        same.or_else(|| now.iter().find(|now| now.index == msr.index)).is_some_and(|now| now.data == msr.data)
    };
    let to_load = saved.iter().enumerate().filter(move |(at, msr)| moves(msr.index) || !is_same(*at, msr));
    to_load.map(move |(_, msr)| load_msr(msr, tsc))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn msrs_are_loaded_that_have_changed_are_gone_or_move_by_themselves() {
        let msrs =
            |list: &[(u32, u64)]| -> Vec<Msr> { list.iter().map(|&(index, data)| Msr { index, data }).collect() };
        let saved = msrs(&[(0x11, 1), (MSR_TSC, 700), (0x174, 5), (0x175, 6), (0x176, 7), (MSR_TSC_DEADLINE, 0)]);
        let now = msrs(&[(0x11, 1), (MSR_TSC, 700), (0x175, 9), (0x176, 7), (MSR_TSC_DEADLINE, 0)]);
        let loaded: Vec<(u32, u64)> = changed(&saved, &now).map(|e| (e.index, e.data)).collect();
        // A deadline that has passed fires again: see `load_msr`.
        assert_eq!(loaded, [(MSR_TSC, 700), (0x174, 5), (0x175, 6), (MSR_TSC_DEADLINE, 700)]);
    }
}
