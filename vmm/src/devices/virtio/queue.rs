//! The set-up of a split virtqueue, and when it may be used.

use snapshot::state::QueueState;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory as _, Permissions};

use super::super::GuestMemory;

/// Largest size of a queue that a device of ours offers.
pub const MAX_SIZE: u16 = 256;

/// Why a queue cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The size is not a power of two up to the largest one that the device offers.
    #[error("its size is {size}; it must be a power of two of at most {max}")]
    Size {
        /// The size.
        size: u16,
        /// The largest size that the device offers.
        max: u16,
    },
    /// A part of the queue is not aligned.
    #[error("its {part} at {addr:#x} is not aligned to {align} bytes")]
    Alignment {
        /// Which part.
        part: &'static str,
        /// Where it is.
        addr: u64,
        /// The alignment that it needs, in bytes.
        align: u64,
    },
    /// A part of the queue is not in guest memory.
    #[error("its {part} at {addr:#x} is not in guest memory")]
    Memory {
        /// Which part.
        part: &'static str,
        /// Where it is.
        addr: u64,
    },
    /// A saved queue offers another largest size than the device does.
    #[error("its largest size is {saved}; this device offers {offered}")]
    MaxSize {
        /// The largest size in the snapshot.
        saved: u16,
        /// The largest size that the device offers.
        offered: u16,
    },
    /// A saved queue has more entries in flight than it has entries.
    #[error("its indices {next_avail} (available) and {next_used} (used) are too far apart")]
    Indices {
        /// Index of the next available entry.
        next_avail: u16,
        /// Index of the next used entry.
        next_used: u16,
    },
    /// A saved queue disagrees with the saved features about event indices.
    #[error("it disagrees with the accepted features about event indices")]
    EventIdx,
}

/// A queue as the driver sets it up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueConfig {
    /// The largest size that the device offers.
    pub max_size: u16,
    /// The size that the driver has chosen.
    pub size: u16,
    /// Whether the driver has enabled the queue. Then it has passed [`QueueConfig::build`].
    pub ready: bool,
    /// Address of the descriptor table.
    pub desc_table: u64,
    /// Address of the available ring.
    pub avail_ring: u64,
    /// Address of the used ring.
    pub used_ring: u64,
}

impl QueueConfig {
    /// A queue that has not been set up.
    pub fn new(max_size: u16) -> Self {
        debug_assert!(max_size <= MAX_SIZE);
        QueueConfig { max_size, size: max_size, ready: false, desc_table: 0, avail_ring: 0, used_ring: 0 }
    }

    /// The queue, ready for use, if everything about it is in order. Looks at no guest memory.
    pub fn build(&self, mem: &GuestMemory, event_idx: bool) -> Result<Queue, QueueError> {
        let (size, max) = (self.size, self.max_size);
        if !size.is_power_of_two() || size > max {
            return Err(QueueError::Size { size, max });
        }
        // Lengths without and with the word for event indices, which is not there unless negotiated, differ by two
        // bytes; a driver always leaves room for it.
        let entries = u64::from(size);
        part("descriptor table", self.desc_table, 16, 16 * entries, mem)?;
        part("available ring", self.avail_ring, 2, 6 + 2 * entries, mem)?;
        part("used ring", self.used_ring, 4, 6 + 8 * entries, mem)?;

        let state = virtio_queue::QueueState {
            max_size: max,
            next_avail: 0,
            next_used: 0,
            event_idx_enabled: event_idx,
            size,
            ready: true,
            desc_table: self.desc_table,
            avail_ring: self.avail_ring,
            used_ring: self.used_ring,
        };
        Queue::try_from(state).map_err(|_| QueueError::Size { size, max })
    }

    /// The state to save, with the running values of `live` if the device uses the queue.
    pub fn save(&self, live: Option<&Queue>) -> QueueState {
        let QueueConfig { max_size, size, ready, desc_table, avail_ring, used_ring } = *self;
        QueueState {
            max_size,
            size,
            ready,
            desc_table,
            avail_ring,
            used_ring,
            next_avail: live.map_or(0, QueueT::next_avail),
            next_used: live.map_or(0, QueueT::next_used),
            event_idx_enabled: live.is_some_and(QueueT::event_idx_enabled),
        }
    }

    /// The set-up that was saved, and the queue itself if it was ready. Looks at no guest memory.
    pub fn restore(
        state: &QueueState,
        offered: u16,
        mem: &GuestMemory,
        event_idx: bool,
    ) -> Result<(Self, Option<Queue>), QueueError> {
        let QueueState {
            max_size,
            size,
            ready,
            desc_table,
            avail_ring,
            used_ring,
            next_avail,
            next_used,
            event_idx_enabled,
        } = *state;
        if max_size != offered {
            return Err(QueueError::MaxSize { saved: max_size, offered });
        }
        let config = QueueConfig { max_size, size, ready, desc_table, avail_ring, used_ring };
        if !ready {
            return Ok((config, None));
        }
        let mut queue = config.build(mem, event_idx)?;
        if next_avail.wrapping_sub(next_used) > size {
            return Err(QueueError::Indices { next_avail, next_used });
        }
        if event_idx_enabled && !event_idx {
            return Err(QueueError::EventIdx);
        }
        queue.set_next_avail(next_avail);
        queue.set_next_used(next_used);
        Ok((config, Some(queue)))
    }
}

/// Checks that a part of a queue is aligned and in guest memory.
fn part(part: &'static str, addr: u64, align: u64, len: u64, mem: &GuestMemory) -> Result<(), QueueError> {
    if !addr.is_multiple_of(align) {
        return Err(QueueError::Alignment { part, addr, align });
    }
    // Address 0 is what a driver leaves when it sets up nothing.
    if addr == 0 || !mem.check_range(GuestAddress(addr), len as usize, Permissions::ReadWrite) {
        return Err(QueueError::Memory { part, addr });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMORY: usize = 0x10000;

    fn mem() -> GuestMemory {
        crate::memory::from_zero(MEMORY)
    }

    fn good() -> QueueConfig {
        QueueConfig {
            size: 8,
            ready: true,
            desc_table: 0x1000,
            avail_ring: 0x2000,
            used_ring: 0x3000,
            ..QueueConfig::new(16)
        }
    }

    #[test]
    fn a_good_queue_is_built() {
        let queue = good().build(&mem(), true).unwrap();
        assert_eq!((queue.size(), queue.desc_table(), queue.used_ring()), (8, 0x1000, 0x3000));
        assert!(queue.ready() && queue.event_idx_enabled());
    }

    #[test]
    fn bad_sizes_are_refused() {
        for size in [0, 3, 32, u16::MAX] {
            let refused = QueueConfig { size, ..good() }.build(&mem(), false);
            assert_eq!(refused, Err(QueueError::Size { size, max: 16 }));
        }
    }

    #[test]
    fn bad_addresses_are_refused() {
        let refused = |config: QueueConfig| config.build(&mem(), false).unwrap_err();
        let end = MEMORY as u64;
        for addr in [0, end - 16, end, !15] {
            assert_eq!(
                refused(QueueConfig { desc_table: addr, ..good() }),
                QueueError::Memory { part: "descriptor table", addr }
            );
        }
        for addr in [0, end - 4, u64::MAX - 1] {
            assert_eq!(
                refused(QueueConfig { avail_ring: addr, ..good() }),
                QueueError::Memory { part: "available ring", addr }
            );
        }
        for addr in [0, end - 64, !3] {
            assert_eq!(
                refused(QueueConfig { used_ring: addr, ..good() }),
                QueueError::Memory { part: "used ring", addr }
            );
        }
        for (config, align) in [
            (QueueConfig { desc_table: 0x1008, ..good() }, 16),
            (QueueConfig { avail_ring: 0x2001, ..good() }, 2),
            (QueueConfig { used_ring: 0x3002, ..good() }, 4),
        ] {
            assert!(matches!(refused(config), QueueError::Alignment { align: a, .. } if a == align));
        }
    }

    #[test]
    fn saved_queues_are_checked_by_name() {
        let (mem, state) = (mem(), QueueState { next_avail: 5, next_used: 4, ..good().save(None) });
        let (config, queue) = QueueConfig::restore(&state, 16, &mem, false).unwrap();
        assert_eq!(config, good());
        assert_eq!(config.save(queue.as_ref()), state, "every field comes back");

        let refused = |state: QueueState| QueueConfig::restore(&state, 16, &mem, false).unwrap_err();
        assert_eq!(refused(QueueState { max_size: 32, ..state }), QueueError::MaxSize { saved: 32, offered: 16 });
        assert_eq!(refused(QueueState { size: 5, ..state }), QueueError::Size { size: 5, max: 16 });
        assert_eq!(
            refused(QueueState { next_avail: 20, ..state }),
            QueueError::Indices { next_avail: 20, next_used: 4 }
        );
        assert_eq!(refused(QueueState { event_idx_enabled: true, ..state }), QueueError::EventIdx);
        assert!(matches!(refused(QueueState { used_ring: 0, ..state }), QueueError::Memory { .. }));
    }
}
