//! The rules of a virtio device's status register (virtio 1.2, sections 2.1 and 3.1.1).
//!
//! ```text
//!   0 ──> ACKNOWLEDGE ──> DRIVER ──> FEATURES_OK ──> DRIVER_OK      each step adds its bit
//!   ^         any write of 0 resets; FAILED may be added anywhere
//!   └───────────────────────────────────────────────────────────
//! ```
//!
//! `DEVICE_NEEDS_RESET` is the device's own bit: it is shown to the driver and ignored when written.

/// The driver has found the device.
pub const ACKNOWLEDGE: u32 = 1;
/// The driver knows how to drive it.
pub const DRIVER: u32 = 2;
/// The driver is ready.
pub const DRIVER_OK: u32 = 4;
/// Both sides agree on the features.
pub const FEATURES_OK: u32 = 8;
/// The device has failed.
pub const NEEDS_RESET: u32 = 64;
/// The driver has given up.
pub const FAILED: u32 = 128;

/// How far a driver can be: the bits (without `FAILED`) after each step.
const STEPS: [u32; 5] = [
    0,
    ACKNOWLEDGE,
    ACKNOWLEDGE | DRIVER,
    ACKNOWLEDGE | DRIVER | FEATURES_OK,
    ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK,
];

/// How far the driver has come; never holds `DEVICE_NEEDS_RESET`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Status(u32);

/// What a write to the register asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Start again from nothing.
    Reset,
    /// Go on to this status.
    To(Status),
}

/// A write that the rules do not allow. The device ignores it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the driver wrote status {written:#x} when it was {now:#x}; the device ignores it")]
pub struct IllegalStep {
    now: u32,
    written: u32,
}

impl Status {
    /// The status with these bits, if the rules know it.
    pub fn from_bits(bits: u32) -> Option<Self> {
        STEPS.contains(&(bits & !FAILED)).then_some(Status(bits))
    }

    /// The bits.
    pub fn bits(self) -> u32 {
        self.0
    }

    /// What happens when the driver writes `written` and the features that it has chosen are `acceptable` or not.
    pub fn write(self, written: u32, acceptable: bool) -> Result<Step, IllegalStep> {
        let illegal = IllegalStep { now: self.0, written };
        let written = written & !NEEDS_RESET;
        if written == 0 {
            return Ok(Step::Reset);
        }
        let next = Status::from_bits(written).ok_or(illegal)?;
        let lost = self.0 & !written;
        let skips_features = next.has(DRIVER_OK) && !self.has(FEATURES_OK);
        if lost != 0 || skips_features {
            return Err(illegal);
        }
        // Refusing features means that the bit does not stick.
        let refused = !self.has(FEATURES_OK) && !acceptable;
        Ok(Step::To(if refused { Status(written & !FEATURES_OK) } else { next }))
    }

    /// Whether all of `bits` are set.
    pub fn has(self, bits: u32) -> bool {
        self.0 & bits == bits
    }

    /// Whether the driver may choose features now.
    pub fn choosing_features(self) -> bool {
        self.0 == ACKNOWLEDGE | DRIVER
    }

    /// Whether the driver may set up queues now.
    pub fn setting_up_queues(self) -> bool {
        self.0 == ACKNOWLEDGE | DRIVER | FEATURES_OK
    }

    /// Whether the driver drives the device.
    pub fn running(self) -> bool {
        self.has(DRIVER_OK) && !self.has(FAILED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn to(bits: u32) -> Result<Step, IllegalStep> {
        Ok(Step::To(Status(bits)))
    }

    #[test]
    fn the_sequence_of_the_specification_is_legal() {
        let mut now = Status::default();
        for bits in &STEPS[1..] {
            assert_eq!(now.write(*bits, true), to(*bits));
            now = Status(*bits);
        }
        assert!(now.running());
        assert_eq!(now.write(0, true), Ok(Step::Reset));
        assert_eq!(now.write(0xf | FAILED, true), to(0xf | FAILED));
        assert!(!Status(0xf | FAILED).running());
    }

    #[test]
    fn early_steps_may_be_taken_together() {
        assert_eq!(Status(0).write(3, true), to(3));
    }

    #[test]
    fn refused_features_do_not_stick() {
        assert_eq!(Status(3).write(0xb, false), to(3));
        assert_eq!(Status(0xb).write(0xf, false), to(0xf), "they were accepted before");
    }

    #[test]
    fn steps_backwards_out_of_order_or_unknown_are_refused() {
        for (now, written) in [(3, 1), (0xf, 0xb), (3, 7), (0, 2), (0, 0xf), (3, 0xf), (3, 0x13), (0xf | FAILED, 0xf)] {
            assert_eq!(Status(now).write(written, true), Err(IllegalStep { now, written }), "{now:#x} -> {written:#x}");
        }
    }

    #[test]
    fn the_devices_own_bit_is_ignored() {
        assert_eq!(Status(0xf).write(0xf | NEEDS_RESET | FAILED, true), to(0xf | FAILED));
        assert_eq!(Status(0xf).write(NEEDS_RESET, true), Ok(Step::Reset));
    }

    proptest! {
        #[test]
        fn any_writes_lead_only_to_known_states(writes in proptest::collection::vec((any::<u32>(), any::<bool>()), 0..50)) {
            let mut now = Status::default();
            for (written, acceptable) in writes {
                // Mostly bits that mean something.
                match now.write(written & 0xcf, acceptable) {
                    Ok(Step::Reset) => now = Status::default(),
                    Ok(Step::To(next)) => {
                        prop_assert_eq!(now.0 & !next.0, 0, "bits are only added");
                        now = next;
                    }
                    Err(_) => {}
                }
                prop_assert!(Status::from_bits(now.0).is_some());
            }
        }
    }
}
