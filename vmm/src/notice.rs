//! What threads and devices tell the owner of the machine.

use crate::devices::virtio::block::overlay::Folded;
use crate::stats::scan::Scanned;
use crate::vcpu::GuestEnd;
use api_spec::agent::{GuestKind, Level};
use api_spec::fork::VmForked;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Why a guest is brought to a standstill that nobody asked for. It can go on once the cause is gone.
///
/// The text is what `GET /` gives as `pause_reason`: the limit by its name, what was met, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Halt {
    /// Too much memory is the guest's own.
    #[error(
        "max_private_mib: {used_mib} MiB of private memory are in use, of {limit_mib} MiB; raise the limit (PATCH /machine-config), then resume"
    )]
    PrivateMemory {
        /// What is in use, in MiB, rounded up.
        used_mib: u64,
        /// The limit, in MiB.
        limit_mib: u64,
    },
    /// The overlay of a disk is full.
    #[error(
        "max_overlay_mib: the overlay of drive {drive_id} holds all of its {limit_mib} MiB; raise the limit (PATCH /drives/{drive_id}), then resume"
    )]
    Overlay {
        /// The disk.
        drive_id: String,
        /// The limit, in MiB.
        limit_mib: u64,
    },
    /// Nobody serves its pages.
    #[error("the page server at {} does not serve the guest: {reason}; the guest goes on when it does", path.display())]
    PageServer {
        /// Where the server is expected.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// What the keeper of a guest's memory has to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PageServerWord {
    /// Nobody serves the guest, for this reason: it is to stand still.
    Pause(String),
    /// Somebody does again.
    Resume,
    /// The guest is to end, since its page server is as this says.
    End(String),
}

/// What a guest's agent has said before a snapshot, or why it has not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Whether its hooks have done their work, if they were to run.
    pub hooks: Result<(), String>,
    /// How much memory is free, in MiB, if it was to let go of its caches.
    pub free_mib: Result<u64, String>,
}

/// Something that the owner of the machine wants to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The guest cannot go on, or does not want to.
    End(GuestEnd),
    /// The devices' thread has failed: they do not work any more.
    DevicesFailed(String),
    /// The guest has powered its machine off.
    PowerOff,
    /// The agent has announced itself.
    Ready(Level, GuestKind),
    /// The guest has reached a limit and is to stand still.
    Halt(Halt),
    /// Of the page server of this session: see [`Keeper::session`](crate::machine::keeper::Keeper::session).
    PageServer(u64, PageServerWord),
    /// A snapshot is complete, or has failed.
    SnapshotWritten,
    /// The background part of a snapshot is over: the disks' layers are folded, as far as that went.
    LayersFolded,
    /// Layers of disks are merged, as far as that went: each with the number of its disk.
    LayersMerged {
        /// What each disk is to take over.
        merged: Vec<(usize, Folded)>,
        /// This is the end of the copy that was under way, and not of one beside it.
        ends: bool,
    },
    /// The VM was forked: what became of the clones, or why there are none.
    Forked(Result<VmForked, String>),
    /// The guest's agent was asked to switch the guest off, and has said that it does so, or why it does not.
    AskedToPowerOff(Result<(), String>),
    /// The guest's agent was asked to prepare the guest for a snapshot.
    AskedToPrepare(Asked),
    /// Guest memory was looked at for somebody.
    Scanned(Scanned),
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
