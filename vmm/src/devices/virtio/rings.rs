//! The queues of a device in use: chains in, used buffers and interrupts out.
//!
//! A device takes chains with [`Rings::next`], gives each back with [`Rings::used`], and ends each turn with
//! [`Rings::interrupt`]: one interrupt at most, since all queues of a device on this transport share one.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::super::GuestMemory;
use super::chain::ChainError;
use super::interrupt::Interrupt;

/// Why a driver's queues cannot be used any further.
#[derive(Debug, thiserror::Error)]
pub enum QueueBroken {
    /// The queue itself.
    #[error("queue {0}: {1}")]
    Ring(usize, virtio_queue::Error),
    /// A chain in it.
    #[error("queue {0}: {1}")]
    Chain(usize, ChainError),
}

/// What a device has while a driver drives it.
#[derive(Debug)]
pub struct Rings {
    mem: GuestMemory,
    queues: Vec<Queue>,
    interrupt: Arc<Interrupt>,
    /// Queues in which buffers were used since the driver was last interrupted.
    used: Vec<bool>,
    /// At which index of each queue the driver has been asked to tell of news, with event indices.
    asked: Vec<Option<u16>>,
}

impl Rings {
    /// Queues that a transport has checked: the arguments of [`activate`](super::VirtioDevice::activate).
    pub fn new(mem: GuestMemory, queues: Vec<Queue>, interrupt: Arc<Interrupt>) -> Self {
        let (used, asked) = (vec![false; queues.len()], vec![None; queues.len()]);
        Rings { mem, queues, interrupt, used, asked }
    }

    /// The vCPUs are about to run for the first time after a restore: raises again what may have been lost. All chains
    /// had been taken from the queues `drained` when they were saved, which ends with asking for more, so that the driver
    /// is not asked again.
    pub fn resume(&mut self, drained: &[usize]) {
        self.interrupt.raise_again();
        for &index in drained {
            self.asked[index] = Some(self.queues[index].next_avail());
        }
    }

    /// Guest memory.
    pub fn mem(&self) -> &GuestMemory {
        &self.mem
    }

    /// The queues, in order.
    pub fn queues(&self) -> &[Queue] {
        &self.queues
    }

    /// Marks the device as failed until its driver resets it, with one log line.
    pub fn fail(&self, device: &str, reason: &dyn std::fmt::Display) {
        self.interrupt.fail(device, reason);
    }

    /// Takes the next chain of a queue: its head, which is to be given to [`Rings::used`], and what `load` makes of it.
    /// Without one, `None`, and the driver is asked to tell of the next.
    pub fn next<T>(
        &mut self,
        index: usize,
        load: impl FnOnce(DescriptorChain<&GuestMemory>) -> Result<T, ChainError>,
    ) -> Result<Option<(u16, T)>, QueueBroken> {
        loop {
            let mut chains = self.queues[index].iter(&self.mem).map_err(|error| QueueBroken::Ring(index, error))?;
            if let Some(chain) = chains.next() {
                let head = chain.head_index();
                return load(chain).map(|loaded| Some((head, loaded))).map_err(|e| QueueBroken::Chain(index, e));
            }
            if !self.ask_for_news(index)? {
                return Ok(None);
            }
        }
    }

    /// Puts the chain that was taken last back, to be taken again later.
    pub fn put_back(&mut self, index: usize) {
        self.queues[index].go_to_previous_position();
    }

    /// Asks the driver to tell of the next chain in a queue. The result is whether one has come in the meantime.
    pub fn ask_for_news(&mut self, index: usize) -> Result<bool, QueueBroken> {
        let queue = &mut self.queues[index];
        // Without event indices the driver always tells; and what it has been asked needs no second write.
        let next = Some(queue.next_avail());
        if !queue.event_idx_enabled() || self.asked[index] == next {
            return Ok(false);
        }
        self.asked[index] = next;
        queue.enable_notification(&self.mem).map_err(|error| QueueBroken::Ring(index, error))
    }

    /// Gives a chain back to the driver, with the number of bytes that were written into it.
    pub fn used(&mut self, index: usize, head: u16, len: u32) -> Result<(), QueueBroken> {
        self.used[index] = true;
        self.queues[index].add_used(&self.mem, head, len).map_err(|error| QueueBroken::Ring(index, error))
    }

    /// The driver's index of the next chain that it will make available.
    pub fn avail_index(&self, index: usize) -> Result<u16, QueueBroken> {
        let avail = self.queues[index].avail_idx(&self.mem, Ordering::Acquire);
        avail.map(|avail| avail.0).map_err(|error| QueueBroken::Ring(index, error))
    }

    /// Interrupts the driver if it wants to hear of what was used.
    pub fn interrupt(&mut self) -> Result<(), QueueBroken> {
        let mut wanted = false;
        for index in 0..self.queues.len() {
            wanted |= self.wants_interrupt(index)?;
        }
        if wanted {
            self.interrupt.used_buffers();
        }
        Ok(())
    }

    fn wants_interrupt(&mut self, index: usize) -> Result<bool, QueueBroken> {
        if !std::mem::take(&mut self.used[index]) {
            return Ok(false);
        }
        let queue = &mut self.queues[index];
        if queue.event_idx_enabled() {
            return queue.needs_notification(&self.mem).map_err(|error| QueueBroken::Ring(index, error));
        }
        fence(Ordering::SeqCst); // The used index is written before the flags are read.
        let flags = self.mem.load::<u16>(GuestAddress(queue.avail_ring()), Ordering::Relaxed);
        let memory = |error| QueueBroken::Ring(index, virtio_queue::Error::GuestMemory(error));
        Ok(u32::from(u16::from_le(flags.map_err(memory)?)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }
}
