//! A guest's time goes on at a restore from where it stood, on every vCPU, whenever in its life it was snapshotted.
//!
//! Runs in the reference machine as well (`tests/rig/run`): kernels before 6.8 take the value that is written to a
//! time-stamp counter for an attempt to synchronize vCPUs, and ignore it.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use snapshot::state::VcpuState;
use std::time::Instant;
use test_skip::skip;
use vmm::kvm::{self, Vm};
use vmm::memory::GuestRam;
use vmm::vcpu::state::{self, StateShape};

const MSR_TSC: u32 = 0x10;

/// A VM with two vCPUs that have CPUID; `None` (reported as skipped) where there is no KVM that offsets the counter.
fn machine() -> Option<(GuestRam, Vm, StateShape)> {
    let kvm = match kvm::open() {
        Ok(_) if vmm::vcpu::ring0_is_emulated() => {
            skip("this host's KVM has no TSC offset; tests/rig/run runs this test anywhere");
            return None;
        }
        Ok(kvm) => kvm,
        Err(e) => {
            skip(e);
            return None;
        }
    };
    let ram = GuestRam::fresh(16 << 20).unwrap();
    let vm = kvm::create(&kvm, &ram, 2).unwrap();
    for vcpu in &vm.vcpus {
        vcpu.set_cpuid2(&kvm::supported_cpuid(&kvm).unwrap()).unwrap();
    }
    let shape = StateShape::of_host(&kvm, &vm.fd).unwrap();
    Some((ram, vm, shape))
}

fn tsc(vcpu: &VcpuFd) -> u64 {
    let mut msrs = Msrs::from_entries(&[kvm_msr_entry { index: MSR_TSC, ..Default::default() }]).unwrap();
    assert_eq!(vcpu.get_msrs(&mut msrs).unwrap(), 1);
    msrs.as_slice()[0].data
}

/// The state of two vCPUs whose counters stood at `at`, the second one's read a little later.
fn saved(vm: &Vm, shape: &StateShape, at: u64) -> [VcpuState; 2] {
    [0, 1].map(|number| {
        let mut state = state::save(&vm.vcpus[number], shape).unwrap();
        state.msrs.iter_mut().find(|msr| msr.index == MSR_TSC).unwrap().data = at + 5_000 * number as u64;
        state
    })
}

/// Loads two vCPUs whose counters stood `age_ms` after their guest's start.
fn goes_on_from(age_ms: u64) {
    let Some((_ram, vm, shape)) = machine() else { return };
    let khz = u64::from(vm.vcpus[0].get_tsc_khz().unwrap());
    let at = age_ms * khz;
    let states = saved(&vm, &shape, at);
    let (_other_ram, other, _) = machine().unwrap();
    let before = Instant::now();
    for (number, vcpu) in other.vcpus.iter().enumerate() {
        state::load(vcpu, &other.fd, &states[number], None, number == 0, state::OtherTsc::Refused).unwrap();
    }
    let readings = [0, 1, 0, 1].map(|number| tsc(&other.vcpus[number]));
    let passed_ms = before.elapsed().as_millis() as u64;
    println!("{age_ms} ms after the start, {passed_ms} ms later: {:?}", readings.map(|tsc| tsc.wrapping_sub(at)));
    // It went on from where it stood, no vCPU's counter is ahead of the other's, and nothing was added but the time that
    // has passed, within what two clocks may differ.
    assert!(readings[0] >= at, "{age_ms} ms: it went back from {at} to {}", readings[0]);
    assert!(readings.is_sorted(), "{age_ms} ms: the vCPUs do not agree: {readings:?}");
    let most = at + (passed_ms + passed_ms / 10 + 500) * khz;
    assert!(readings[3] <= most, "{age_ms} ms: it went ahead from {at} to {}, beyond {most}", readings[3]);
}

#[test]
fn the_time_stamp_counter_goes_on_in_a_guests_first_second() {
    [0, 1, 20, 400, 900].into_iter().for_each(goes_on_from);
}

#[test]
fn the_time_stamp_counter_goes_on_later() {
    [1_100, 10_000, 11_000, 3_600_000, 100_000_000].into_iter().for_each(goes_on_from);
}
