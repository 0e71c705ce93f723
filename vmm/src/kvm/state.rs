//! Saving and loading what KVM keeps for the VM as a whole: interval timer, clock, interrupt controllers.
// UNSAFETY: the state of an interrupt controller is a C union, here only ever handled as its bytes.
#![allow(unsafe_code)]

use kvm_bindings::{
    KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_channel_state, kvm_pit_state2,
};
use kvm_ioctls::{Cap, VmFd};
use snapshot::state::{ClockState, IrqchipState, PitChannel, PitState, VmState};

const CONTROLLERS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];
/// Size of a controller's state, in bytes.
const CHIP_LEN: usize = 512;

/// Why the state of a VM could not be saved or loaded.
#[derive(Debug, thiserror::Error)]
pub enum VmStateError {
    /// KVM refused a step.
    #[error("KVM refused {step} of VM state: {source}")]
    Step {
        /// Which step.
        step: &'static str,
        /// What the kernel said.
        source: kvm_ioctls::Error,
    },
    /// The controllers are not those that every VM has.
    #[error(
        "the snapshot's interrupt controllers are {0:?}; a VM has one each of {CONTROLLERS:?}, {CHIP_LEN} bytes long"
    )]
    Controllers(Vec<(u32, usize)>),
    /// A clock that cannot catch up, since nobody knows when it stood still.
    #[error(
        "clock_realtime: the snapshot does not say when its clock was saved, since KVM on its host did not (its clock source was not the TSC, or its kernel older than 5.16); leave clock_realtime out"
    )]
    NoRealtime,
    /// A clock that cannot catch up here.
    #[error(
        "clock_realtime: KVM on this host cannot advance a clock by the time that has passed; Linux 5.16 and newer can"
    )]
    ClockRealtime,
}

/// How the guest's monotonic clock (kvmclock) goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// From where it stood.
    GoesOn,
    /// Advanced by the time that has passed since then, as the host's time of day has it.
    CatchesUp,
}

fn step(step: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VmStateError {
    move |source| VmStateError::Step { step, source }
}

/// Saves the state of a VM whose vCPUs stand still.
pub fn save(vm: &VmFd) -> Result<VmState, VmStateError> {
    let pit = save_pit(&vm.get_pit2().map_err(step("saving the interval timer"))?);
    let clock = save_clock(&vm.get_clock().map_err(step("saving the clock"))?);
    let irqchips = CONTROLLERS
        .iter()
        .map(|&chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).map_err(step("saving an interrupt controller"))?;
            // SAFETY: every variant of the union is plain integers within these 512 bytes, all of them initialized.
            let bytes = unsafe { chip.chip.dummy };
            Ok(IrqchipState { chip_id, chip: bytes.iter().map(|b| *b as u8).collect() })
        })
        .collect::<Result<_, _>>()?;
    Ok(VmState { pit, clock, irqchips })
}

/// Loads the state of a VM whose vCPUs have never run.
pub fn load(vm: &VmFd, state: &VmState, how: Clock) -> Result<(), VmStateError> {
    let VmState { pit, clock, irqchips } = state;
    let ids: Vec<_> = irqchips.iter().map(|chip| (chip.chip_id, chip.chip.len())).collect();
    if ids != CONTROLLERS.map(|id| (id, CHIP_LEN)) {
        return Err(VmStateError::Controllers(ids));
    }
    vm.set_pit2(&load_pit(pit)).map_err(step("loading the interval timer"))?;
    let clock = match how {
        Clock::GoesOn => load_clock(clock),
        Clock::CatchesUp => load_clock_to_catch_up(clock, vm.check_extension_int(Cap::AdjustClock))?,
    };
    vm.set_clock(&clock).map_err(step("loading the clock"))?;
    for IrqchipState { chip_id, chip } in irqchips {
        let mut to = kvm_irqchip { chip_id: *chip_id, ..Default::default() };
        // SAFETY: as in `save`; any bytes are valid for it.
        let bytes = unsafe { &mut to.chip.dummy };
        bytes.iter_mut().zip(chip).for_each(|(to, byte)| *to = *byte as _);
        vm.set_irqchip(&to).map_err(step("loading an interrupt controller"))?;
    }
    Ok(())
}

fn save_clock(data: &kvm_clock_data) -> ClockState {
    let kvm_clock_data { clock, flags, pad0: _, realtime, host_tsc, pad: _ } = *data;
    ClockState { clock, flags, realtime, host_tsc }
}

/// The guest's monotonic clock goes on from where it stood: no flag, so that KVM adds nothing for the time in between.
fn load_clock(state: &ClockState) -> kvm_clock_data {
    let ClockState { clock, flags: _, realtime: _, host_tsc: _ } = *state;
    kvm_clock_data { clock, ..Default::default() }
}

/// The same, but KVM adds the time that has passed since `realtime`. `features` is what it can do with clocks.
fn load_clock_to_catch_up(state: &ClockState, features: i32) -> Result<kvm_clock_data, VmStateError> {
    if state.flags & KVM_CLOCK_REALTIME == 0 {
        return Err(VmStateError::NoRealtime);
    }
    // A kernel that only knows the capability by name gives 1.
    if features as u32 & KVM_CLOCK_REALTIME == 0 {
        return Err(VmStateError::ClockRealtime);
    }
    Ok(kvm_clock_data { flags: KVM_CLOCK_REALTIME, realtime: state.realtime, ..load_clock(state) })
}

fn save_pit(pit: &kvm_pit_state2) -> PitState {
    let kvm_pit_state2 { channels, flags, reserved: _ } = pit;
    PitState { channels: channels.each_ref().map(save_channel), flags: *flags }
}

fn load_pit(pit: &PitState) -> kvm_pit_state2 {
    let PitState { channels, flags } = pit;
    kvm_pit_state2 { channels: channels.each_ref().map(load_channel), flags: *flags, ..Default::default() }
}

fn save_channel(channel: &kvm_pit_channel_state) -> PitChannel {
    let kvm_pit_channel_state {
        count,
        latched_count,
        count_latched,
        status_latched,
        status,
        read_state,
        write_state,
        write_latch,
        rw_mode,
        mode,
        bcd,
        gate,
        count_load_time,
    } = *channel;
    PitChannel {
        count,
        latched_count,
        count_latched,
        status_latched,
        status,
        read_state,
        write_state,
        write_latch,
        rw_mode,
        mode,
        bcd,
        gate,
        count_load_time,
    }
}

fn load_channel(channel: &PitChannel) -> kvm_pit_channel_state {
    let PitChannel {
        count,
        latched_count,
        count_latched,
        status_latched,
        status,
        read_state,
        write_state,
        write_latch,
        rw_mode,
        mode,
        bcd,
        gate,
        count_load_time,
    } = *channel;
    kvm_pit_channel_state {
        count,
        latched_count,
        count_latched,
        status_latched,
        status,
        read_state,
        write_state,
        write_latch,
        rw_mode,
        mode,
        bcd,
        gate,
        count_load_time,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_catches_up_only_where_the_time_is_known_and_kvm_can() {
        let saved = ClockState { clock: 5, flags: KVM_CLOCK_REALTIME | 2, realtime: 7, host_tsc: 9 };
        let data = load_clock_to_catch_up(&saved, 14).unwrap();
        assert_eq!((data.clock, data.flags, data.realtime, data.host_tsc), (5, KVM_CLOCK_REALTIME, 7, 0));
        assert!(matches!(load_clock_to_catch_up(&saved, 1), Err(VmStateError::ClockRealtime)));
        let nameless = ClockState { flags: 2, ..saved };
        assert!(matches!(load_clock_to_catch_up(&nameless, 14), Err(VmStateError::NoRealtime)));
    }
}
