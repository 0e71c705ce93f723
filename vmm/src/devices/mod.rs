//! The devices that the guest sees.
//!
//! | file | what it is |
//! |---|---|
//! | `bus.rs` | which device answers an address; one bus for ports, one for memory |
//! | `serial.rs` | the serial port COM1 |
//! | `output.rs` | a writer that never blocks whoever writes to it, for the serial port |
//! | `i8042.rs` | the keyboard controller, of which only the reset line exists |
//! | `power.rs` | the registers that power the machine off |
//! | `pvpanic.rs` | the port by which a kernel says that it has panicked |
//! | `boot_timer.rs` | tells how long a guest took to boot, on request |
//! | `rate.rs` | bounds of a device's traffic |
//! | `alarm.rs` | has a device take its turn after some time |
//! | `virtio/mod.rs` | what a virtio device is to its transport |
//! | `virtio/mmio.rs` | the virtio-mmio transport |
//! | `virtio/status.rs` | the rules of its status register |
//! | `virtio/queue.rs` | the set-up of a virtqueue, and when it may be used |
//! | `virtio/chain.rs` | descriptor chains as runs of guest memory |
//! | `virtio/interrupt.rs` | how a device interrupts the guest, and how it fails |
//! | `virtio/block/` | disks |
//! | `virtio/net/` | network interfaces |
//! | `virtio/rng/` | the source of entropy |
//! | `virtio/balloon/` | the memory balloon |
//! | `virtio/vsock/` | the socket device between guest and host |
//!
//! vCPU threads reach devices through a bus; everything else that a device does happens on the devices' thread.
//! Locks are taken in one order: transport, then device. A device never calls its transport.
//!
//! All writes to guest memory go through `vm-memory`, so a bitmap in [`GuestMemory`] sees every page that a device
//! has written.

pub mod alarm;
pub mod boot_timer;
pub mod bus;
pub mod i8042;
pub mod output;
pub mod power;
pub mod pvpanic;
pub mod rate;
pub mod serial;
pub mod virtio;

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::memory::GuestMemory;

/// Locks `mutex`. A thread that panicked while it held the lock does not take the other threads with it.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
