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
    /// The index of the next used buffer of each queue, as it was when interrupting the driver was last considered.
    told: Vec<u16>,
    /// At which index of each queue the driver has been asked to tell of news, with event indices.
    asked: Vec<Option<u16>>,
}

impl Rings {
    /// Queues that a transport has checked: the arguments of [`activate`](super::VirtioDevice::activate).
    pub fn new(mem: GuestMemory, queues: Vec<Queue>, interrupt: Arc<Interrupt>) -> Self {
        let (told, asked) = (queues.iter().map(QueueT::next_used).collect(), vec![None; queues.len()]);
        Rings { mem, queues, interrupt, told, asked }
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

    /// Whether the driver is going to tell of the next chain in a queue. If not, somebody has to look.
    pub fn will_tell(&self, index: usize) -> bool {
        let queue = &self.queues[index];
        !queue.event_idx_enabled() || self.asked[index] == Some(queue.next_avail())
    }

    /// Gives a chain back to the driver, with the number of bytes that were written into it.
    pub fn used(&mut self, index: usize, head: u16, len: u32) -> Result<(), QueueBroken> {
        self.queues[index].add_used(&self.mem, head, len).map_err(|error| QueueBroken::Ring(index, error))
    }

    /// As [`Rings::used`] for chains that belong together: the driver sees all of them or none.
    pub fn used_together(&mut self, index: usize, chains: &[(u16, u32)]) -> Result<(), QueueBroken> {
        let Some((&(last, len), others)) = chains.split_last() else { return Ok(()) };
        let queue = &mut self.queues[index];
        for &(head, len) in others {
            let next = queue.next_used();
            // Elements of eight bytes, a head and a length, follow the flags and the index (virtio 1.2, section 2.7.8).
            let at = queue.used_ring() + 4 + 8 * u64::from(next % queue.size());
            let element = u64::from(len) << 32 | u64::from(head);
            let memory = |error| QueueBroken::Ring(index, virtio_queue::Error::GuestMemory(error));
            self.mem.write_obj(element.to_le(), GuestAddress(at)).map_err(memory)?;
            queue.set_next_used(next.wrapping_add(1));
        }
        // Which moves the index that the driver reads, beyond all of them.
        self.used(index, last, len)
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
        let queue = &self.queues[index];
        let next = queue.next_used();
        let told = std::mem::replace(&mut self.told[index], next);
        if next == told {
            return Ok(false);
        }
        fence(Ordering::SeqCst); // The used index is written before the driver's wish is read.
        let read = |offset: u64| {
            let value = self.mem.load::<u16>(GuestAddress(queue.avail_ring() + offset), Ordering::Relaxed);
            value.map(u16::from_le).map_err(|e| QueueBroken::Ring(index, virtio_queue::Error::GuestMemory(e)))
        };
        if queue.event_idx_enabled() {
            // It wants to hear when the buffer at this index is used (virtio 1.2, section 2.7.7): behind the ring.
            let event = read(4 + 2 * u64::from(queue.size()))?;
            return Ok(next.wrapping_sub(event).wrapping_sub(1) < next.wrapping_sub(told));
        }
        Ok(u32::from(read(0)?) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }
}
