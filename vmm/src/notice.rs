//! What threads and devices tell the owner of the machine.

use crate::vcpu::GuestEnd;
use api_spec::agent::Level;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Something that the owner of the machine wants to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The guest cannot go on, or does not want to.
    End(GuestEnd),
    /// The guest has powered its machine off.
    PowerOff,
    /// The agent has announced itself.
    Ready(Level),
    /// The page server that listened here is gone.
    PageServerGone(PathBuf),
    /// The background part of a snapshot is over.
    SnapshotWritten,
}

/// Sends notices from any thread.
#[derive(Clone, Debug)]
pub struct Notifier {
    sender: mpsc::Sender<Notice>,
    event: Arc<EventFd>,
}

impl Notifier {
    /// Sends a notice and wakes the owner.
    pub fn send(&self, notice: Notice) {
        // Nobody listens any more only when the process is ending.
        let _ = self.sender.send(notice);
        let _ = self.event.write(1);
    }
}

/// Receives notices.
#[derive(Debug)]
pub struct Notices {
    receiver: mpsc::Receiver<Notice>,
    event: Arc<EventFd>,
}

impl Notices {
    /// What to watch for input.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// All notices that have arrived.
    pub fn take(&self) -> Vec<Notice> {
        let _ = self.event.read();
        self.receiver.try_iter().collect()
    }
}

/// A connected pair.
pub fn channel() -> io::Result<(Notifier, Notices)> {
    let (sender, receiver) = mpsc::channel();
    let event = Arc::new(EventFd::new(EFD_NONBLOCK)?);
    Ok((Notifier { sender, event: event.clone() }, Notices { receiver, event }))
}
