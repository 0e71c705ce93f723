//! Each part of saved state, set to something that no reset gives, survives saving and loading into another VM.

use kvm_bindings::{KVM_CLOCK_REALTIME, KVM_MP_STATE_HALTED, KVM_VCPUEVENT_VALID_NMI_PENDING};
use kvm_ioctls::{Kvm, VmFd};
use snapshot::state::{ClockState, Msr, VcpuState, VmState};
use std::time::{SystemTime, UNIX_EPOCH};
use test_skip::skip;
use vmm::kvm::state::{Clock, VmStateError};
use vmm::kvm::{self, Vm};
use vmm::memory::GuestRam;
use vmm::vcpu::state::{self, OtherTsc, StateShape};

const MSR_TSC: u32 = 0x10;
const MSR_APIC_BASE: u32 = 0x1b;
const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_KERNEL_GS_BASE: u32 = 0xc000_0102;

/// A VM with one vCPU that has CPUID; `None` (reported as skipped) where there is no KVM.
fn machine() -> Option<(Kvm, GuestRam, Vm, StateShape)> {
    let kvm = match kvm::open() {
        Ok(kvm) => kvm,
        Err(e) => {
            skip(e);
            return None;
        }
    };
    let ram = GuestRam::fresh(16 << 20).unwrap();
    let vm = kvm::create(&kvm, &ram, 1).unwrap();
    vm.vcpus[0].set_cpuid2(&kvm::supported_cpuid(&kvm).unwrap()).unwrap();
    let shape = StateShape::of_host(&kvm, &vm.fd).unwrap();
    Some((kvm, ram, vm, shape))
}

/// What comes out when a vCPU whose saved state was changed by `change` is loaded into a fresh VM and saved again, and
/// what went in.
fn vcpu_round_trip(change: impl FnOnce(&mut VcpuState)) -> Option<(VcpuState, VcpuState)> {
    let (_kvm, _ram, vm, shape) = machine()?;
    let mut saved = state::save(&vm.vcpus[0], &shape).unwrap();
    change(&mut saved);
    let (_kvm, _ram, other, shape) = machine()?;
    state::load(&other.vcpus[0], &other.fd, &saved, None, true, OtherTsc::Refused).unwrap();
    Some((saved, state::save(&other.vcpus[0], &shape).unwrap()))
}

/// A vCPU that is known to hold some of it already is as any other afterwards.
#[test]
fn what_a_vcpu_holds_already_need_not_be_loaded() {
    type Change = fn(&mut VcpuState);
    let changes: [(&str, Change); 8] = [
        ("nothing", |_| ()),
        ("halted", |state| state.mp_state = kvm_bindings::KVM_MP_STATE_HALTED),
        ("debug registers", |state| state.debug_regs.db[1] = 0x1234),
        ("XCR0", |state| state.xcrs.iter_mut().filter(|xcr| xcr.xcr == 0).for_each(|xcr| xcr.value |= 3)),
        ("CPUID", |state| {
            state.cpuid.iter_mut().filter(|leaf| leaf.function == 0x8000_0002).for_each(|leaf| leaf.eax ^= 0x20);
        }),
        ("no leaf of CPUID for the name", |state| state.cpuid.retain(|leaf| leaf.function != 0x8000_0004)),
        ("OSXSAVE in CR4 and CPUID", |state| {
            state.sregs.cr4 |= 1 << 18;
            state.cpuid.iter_mut().filter(|leaf| leaf.function == 1).for_each(|leaf| leaf.ecx |= 1 << 27);
        }),
        ("OSXSAVE in CR4, XCR0 and the size in CPUID", |state| {
            state.sregs.cr4 |= 1 << 18;
            state.xcrs.iter_mut().filter(|xcr| xcr.xcr == 0).for_each(|xcr| xcr.value |= 7);
            state
                .cpuid
                .iter_mut()
                .filter(|leaf| (leaf.function, leaf.index) == (0xd, 0))
                .for_each(|leaf| leaf.ebx = 832);
        }),
    ];
    let Some((_kvm, _ram, vm, shape)) = machine() else { return };
    let saved = state::save(&vm.vcpus[0], &shape).unwrap();
    for (what, change) in changes {
        let mut wanted = saved.clone();
        change(&mut wanted);
        let loaded = [false, true].map(|knows| {
            let (_kvm, _ram, vm, shape) = machine().unwrap();
            let vcpu = &vm.vcpus[0];
            let held = knows.then(|| state::save(vcpu, &shape).unwrap());
            state::load(vcpu, &vm.fd, &wanted, held.as_ref(), true, OtherTsc::Refused).map_err(|e| e.to_string())?;
            let mut loaded = state::save(vcpu, &shape).unwrap();
            // These go on.
            loaded.msrs.retain(|msr| ![0x10, 0x6e0].contains(&msr.index));
            Ok::<_, String>(loaded)
        });
        let [without, with] = loaded;
        assert!(without == with, "{what}: {without:?} {with:?}");
        assert!(what != "nothing" || without.is_ok(), "{without:?}");
    }
}

fn vm_round_trip(change: impl FnOnce(&VmFd, &mut VmState)) -> Option<(VmState, VmState)> {
    let (_kvm, _ram, vm, _) = machine()?;
    let mut saved = kvm::state::save(&vm.fd).unwrap();
    change(&vm.fd, &mut saved);
    let (_kvm, _ram, other, _) = machine()?;
    kvm::state::load(&other.fd, &saved, Clock::GoesOn).unwrap();
    Some((saved, kvm::state::save(&other.fd).unwrap()))
}

fn msr(state: &VcpuState, index: u32) -> u64 {
    state.msrs.iter().find(|msr| msr.index == index).unwrap_or_else(|| panic!("MSR {index:#x} is not saved")).data
}

fn set_msr(state: &mut VcpuState, index: u32, data: u64) {
    *state.msrs.iter_mut().find(|msr| msr.index == index).unwrap() = Msr { index, data };
}

#[test]
fn general_registers() {
    let change = |state: &mut VcpuState| {
        let regs = &mut state.regs;
        (regs.rax, regs.rbx, regs.rcx, regs.rdx) = (1, 2, 3, 4);
        (regs.rsi, regs.rdi, regs.rsp, regs.rbp) = (5, 6, 7, 8);
        (regs.r8, regs.r9, regs.r10, regs.r11) = (9, 10, 11, 12);
        (regs.r12, regs.r13, regs.r14, regs.r15) = (13, 14, 15, 16);
        (regs.rip, regs.rflags) = (0x1234, 0x246);
    };
    let Some((put, got)) = vcpu_round_trip(change) else { return };
    assert_eq!(got.regs, put.regs);
}

#[test]
fn special_registers() {
    let change = |state: &mut VcpuState| {
        let sregs = &mut state.sregs;
        (sregs.gdt.base, sregs.gdt.limit) = (0x1000, 0x2f);
        (sregs.idt.base, sregs.idt.limit) = (0x2000, 0xfff);
        (sregs.cr2, sregs.cr3) = (0xdead_b000, 0x7000);
        (sregs.fs.base, sregs.gs.base) = (0x11_0000, 0x22_0000);
        sregs.tr.base = 0x33_0000;
    };
    let Some((put, got)) = vcpu_round_trip(change) else { return };
    assert_eq!(got.sregs, put.sregs);
}

#[test]
fn vector_registers_and_their_control() {
    /// Where XMM0 lies in the XSAVE area, and where the header says which parts are in use.
    const XMM0: usize = 160;
    const XSTATE_BV: usize = 512;
    let change = |state: &mut VcpuState| {
        state.xsave[XMM0..XMM0 + 16].copy_from_slice(b"sixteen bytes...");
        state.xsave[XSTATE_BV] |= 3;
        state.xcrs[0].value = 3;
    };
    let Some((put, got)) = vcpu_round_trip(change) else { return };
    assert_eq!(got.xsave[XMM0..XMM0 + 16], put.xsave[XMM0..XMM0 + 16]);
    assert_eq!(got.xsave.len(), put.xsave.len());
    assert_eq!(got.xcrs, put.xcrs);
}

#[test]
fn debug_registers() {
    let change = |state: &mut VcpuState| {
        state.debug_regs.db = [0x1000, 0x2000, 0x3000, 0x4000];
        state.debug_regs.dr7 = 0x400 | 1;
    };
    let Some((put, got)) = vcpu_round_trip(change) else { return };
    assert_eq!(got.debug_regs, put.debug_regs);
}

#[test]
fn local_apic() {
    /// Spurious-interrupt vector, task priority, and processor priority, which follows from it.
    const SPURIOUS: usize = 0xf0;
    const PRIORITY: usize = 0x80;
    const EFFECTIVE: usize = 0xa0;
    let change = |state: &mut VcpuState| {
        state.lapic[SPURIOUS..SPURIOUS + 4].copy_from_slice(&0x1ffu32.to_le_bytes());
        state.lapic[PRIORITY] = 0x30;
        state.lapic[EFFECTIVE] = 0x30;
    };
    let Some((put, got)) = vcpu_round_trip(change) else { return };
    assert_eq!(got.lapic, put.lapic);
}

#[test]
fn model_specific_registers() {
    let change = |state: &mut VcpuState| {
        set_msr(state, MSR_STAR, 0x0023_0010_0000_0000);
        set_msr(state, MSR_LSTAR, 0xffff_ffff_8100_0000);
        set_msr(state, MSR_KERNEL_GS_BASE, 0xffff_8880_0000_0000);
    };
    let Some((put, got)) = vcpu_round_trip(change) else { return };
    for index in [MSR_STAR, MSR_LSTAR, MSR_KERNEL_GS_BASE] {
        assert_eq!(msr(&got, index), msr(&put, index), "{index:#x}");
    }
    let rest = |state: &VcpuState| {
        // The clocks run on; everything else is as it was.
        state
            .msrs
            .iter()
            .filter(|msr| ![MSR_TSC, MSR_APIC_BASE, 0x6e0].contains(&msr.index))
            .copied()
            .collect::<Vec<_>>()
    };
    assert_eq!(rest(&got), rest(&put));
}

/// Memory types: KVM lists none of their registers.
#[test]
fn memory_types() {
    const MTRRS: [(u32, u64); 4] =
        [(0x2ff, 0xc06), (0x200, 0xe000_0000), (0x201, 0xf_e000_0800), (0x26f, 0x0606_0606_0606_0606)];
    let change = |state: &mut VcpuState| MTRRS.into_iter().for_each(|(index, data)| set_msr(state, index, data));
    let Some((_, got)) = vcpu_round_trip(change) else { return };
    for (index, data) in MTRRS {
        assert_eq!(msr(&got, index), data, "{index:#x}");
    }
}

/// What firmware leaves is there for a kernel to find, on every vCPU; the pins are the boot processor's.
#[test]
fn what_firmware_sets_up_is_saved() {
    let Some((_kvm, _ram, vm, shape)) = machine() else { return };
    let pins = |state: &VcpuState| (state.lapic[0x351] & 7, state.lapic[0x361] & 7);
    vmm::arch::msrs::set_up(&vm.vcpus[0], false).unwrap();
    let other = state::save(&vm.vcpus[0], &shape).unwrap();
    assert_eq!((msr(&other, 0x2ff), msr(&other, 0x1a0) & 1), (0x806, 1));
    vmm::arch::msrs::set_up(&vm.vcpus[0], true).unwrap();
    let first = state::save(&vm.vcpus[0], &shape).unwrap();
    assert_eq!(pins(&first), (7, 4));
    assert_ne!(pins(&other).1, 4);
}

/// The guest's time-stamp counter goes on from where it stood, where this host can offset it: KVM without hardware
/// virtualization cannot, and its guests see the host's counter.
#[test]
fn time_stamp_counter() {
    const FAR: u64 = 1 << 50;
    let Some((put, got)) = vcpu_round_trip(|state| set_msr(state, MSR_TSC, FAR)) else { return };
    if vmm::vcpu::ring0_is_emulated() {
        return skip("this host's KVM has no TSC offset");
    }
    assert!(msr(&got, MSR_TSC) >= msr(&put, MSR_TSC));
}

#[test]
fn pending_events() {
    let change = |state: &mut VcpuState| {
        state.events.nmi.pending = 1;
        state.events.flags |= KVM_VCPUEVENT_VALID_NMI_PENDING;
    };
    let Some((put, got)) = vcpu_round_trip(change) else { return };
    assert_eq!(got.events.nmi, put.events.nmi);
}

#[test]
fn run_state() {
    let change = |state: &mut VcpuState| {
        state.mp_state = KVM_MP_STATE_HALTED;
        // At the reset vector KVM takes a halted boot vCPU for one that was just reset, and lets it run.
        (state.sregs.cs.selector, state.sregs.cs.base) = (0, 0);
    };
    let Some((put, got)) = vcpu_round_trip(change) else { return };
    assert_eq!(got.mp_state, put.mp_state);
}

#[test]
fn cpuid_and_time_stamp_frequency() {
    let change = |state: &mut VcpuState| {
        let leaf = state.cpuid.iter_mut().find(|leaf| leaf.function == 0x8000_0002).unwrap();
        leaf.eax = u32::from_le_bytes(*b"Copp");
    };
    let Some((put, got)) = vcpu_round_trip(change) else { return };
    assert_eq!(got.tsc_khz, put.tsc_khz);
    let brand = |state: &VcpuState| state.cpuid.iter().find(|leaf| leaf.function == 0x8000_0002).unwrap().eax;
    assert_eq!(brand(&got), brand(&put));
}

#[test]
fn a_refused_msr_is_named() {
    let Some((_kvm, _ram, vm, shape)) = machine() else { return };
    let mut saved = state::save(&vm.vcpus[0], &shape).unwrap();
    saved.msrs.push(Msr { index: 0x1234_5678, data: 1 });
    let refused = state::load(&vm.vcpus[0], &vm.fd, &saved, None, true, OtherTsc::Refused).unwrap_err().to_string();
    assert!(refused.contains("0x12345678"), "{refused}");
}

#[test]
fn an_unknown_msr_that_held_nothing_is_not_missed() {
    let Some((_kvm, _ram, vm, shape)) = machine() else { return };
    let mut saved = state::save(&vm.vcpus[0], &shape).unwrap();
    saved.msrs.insert(0, Msr { index: 0x1234_5678, data: 0 });
    set_msr(&mut saved, MSR_LSTAR, 0x1000);
    state::load(&vm.vcpus[0], &vm.fd, &saved, None, true, OtherTsc::Refused).unwrap();
    assert_eq!(msr(&state::save(&vm.vcpus[0], &shape).unwrap(), MSR_LSTAR), 0x1000, "those behind it are loaded");
}

#[test]
fn another_time_stamp_frequency_is_refused_where_it_cannot_be_had() {
    let Some((kvm, _ram, vm, shape)) = machine() else { return };
    if kvm.check_extension(kvm_ioctls::Cap::TscControl) {
        return skip("this host's KVM can scale the time-stamp counter");
    }
    let mut saved = state::save(&vm.vcpus[0], &shape).unwrap();
    saved.tsc_khz *= 2;
    let refused = state::load(&vm.vcpus[0], &vm.fd, &saved, None, true, OtherTsc::Refused).unwrap_err().to_string();
    assert!(refused.contains("kHz") && refused.contains("`tsc_khz`"), "{refused}");
    state::load(&vm.vcpus[0], &vm.fd, &saved, None, true, OtherTsc::Allowed).unwrap();
}

#[test]
fn parts_of_another_size_are_refused() {
    let Some((_kvm, _ram, vm, shape)) = machine() else { return };
    let saved = state::save(&vm.vcpus[0], &shape).unwrap();
    let refused = |change: fn(&mut VcpuState)| {
        let mut state = saved.clone();
        change(&mut state);
        state::load(&vm.vcpus[0], &vm.fd, &state, None, true, OtherTsc::Refused).unwrap_err().to_string()
    };
    assert!(refused(|s| s.xsave.truncate(100)).contains("FPU state"));
    assert!(refused(|s| s.xsave.resize(1 << 20, 0)).contains("FPU state"));
    assert!(refused(|s| s.lapic.truncate(10)).contains("local APIC"));
    assert!(refused(|s| s.xcrs = vec![s.xcrs[0]; 17]).contains("extended control"));
    assert!(refused(|s| s.cpuid = vec![s.cpuid[0]; 257]).contains("CPUID"));
    assert!(refused(|s| s.msrs = vec![s.msrs[0]; 257]).contains("MSRs"));
}

#[test]
fn interval_timer() {
    let change = |_: &VmFd, state: &mut VmState| {
        state.pit.channels[0].count = 0x1234;
        state.pit.channels[0].mode = 2;
        state.pit.channels[0].gate = 1;
    };
    let Some((put, got)) = vm_round_trip(change) else { return };
    let facts = |state: &VmState| {
        let channel = &state.pit.channels[0];
        (channel.count, channel.mode, channel.gate, state.pit.flags)
    };
    assert_eq!(facts(&got), facts(&put));
}

#[test]
fn clock_goes_on_from_where_it_stood() {
    let change = |_: &VmFd, state: &mut VmState| state.clock.clock = 1 << 50;
    let Some((put, got)) = vm_round_trip(change) else { return };
    assert!(got.clock.clock >= put.clock.clock);
    assert!(got.clock.clock - put.clock.clock < 60_000_000_000, "nothing was added for the time in between");
}

/// The clock is the snapshot's, advanced by the time since then, on hosts that can.
#[test]
fn clock_catches_up_with_the_time_that_has_passed() {
    const SECOND: u64 = 1_000_000_000;
    let Some((_kvm, _ram, vm, _)) = machine() else { return };
    let mut saved = kvm::state::save(&vm.fd).unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    saved.clock = ClockState { clock: 1 << 50, realtime: now - 1000 * SECOND, flags: KVM_CLOCK_REALTIME, host_tsc: 0 };
    match kvm::state::load(&vm.fd, &saved, Clock::CatchesUp) {
        Ok(()) => {}
        Err(VmStateError::ClockRealtime) => return skip("this host's KVM cannot advance clocks; Linux 5.16 can"),
        Err(e) => panic!("{e}"),
    }
    let passed = kvm::state::save(&vm.fd).unwrap().clock.clock - (1 << 50);
    assert!((1000 * SECOND..1060 * SECOND).contains(&passed), "{passed} ns");
    saved.clock.flags = 0;
    let refused = kvm::state::load(&vm.fd, &saved, Clock::CatchesUp).unwrap_err().to_string();
    assert!(refused.starts_with("clock_realtime: "), "{refused}");
}

#[test]
fn interrupt_controllers() {
    let change = |vm: &VmFd, state: &mut VmState| {
        // A raised line shows in the PIC's and the IOAPIC's request registers.
        vm.set_irq_line(3, true).unwrap();
        *state = kvm::state::save(vm).unwrap();
    };
    let Some((put, got)) = vm_round_trip(change) else { return };
    assert_eq!(got.irqchips, put.irqchips);
    let Some((_kvm, _ram, vm, _)) = machine() else { return };
    assert_ne!(kvm::state::save(&vm.fd).unwrap().irqchips, put.irqchips, "the raised line is in the saved state");
}

#[test]
fn foreign_interrupt_controllers_are_refused() {
    let Some((_kvm, _ram, vm, _)) = machine() else { return };
    let mut saved = kvm::state::save(&vm.fd).unwrap();
    saved.irqchips[2].chip_id = 9;
    assert!(kvm::state::load(&vm.fd, &saved, Clock::GoesOn).is_err());
}
