//! What the threads of a vmm may do: each kind makes the system calls of its table ([`tables`]), and no others.
//!
//! The programs that the tables become are made when the vmm is built; see `build.rs`.

pub mod tables;

use sandbox::Instruction;
use sandbox::filter::{self, FilterError};
use std::io;
use std::thread::JoinHandle;

include!(concat!(env!("OUT_DIR"), "/filters.rs"));

/// Threads that do the same kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Runs the guest.
    Vcpu,
    /// Devices: queues in guest memory, disks, taps, sockets of vsock.
    Devices,
    /// Reads or writes the console.
    Stream,
    /// Writes a snapshot.
    Writer,
    /// Looks at the guest's memory, or touches it.
    Memory,
    /// Talks to a page server, or to the guest's agent.
    Peer,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 6] = [Kind::Vcpu, Kind::Devices, Kind::Stream, Kind::Writer, Kind::Memory, Kind::Peer];

    fn program(self) -> &'static [Instruction] {
        match self {
            Kind::Vcpu => &VCPU,
            Kind::Devices => &DEVICES,
            Kind::Stream => &STREAM,
            Kind::Writer => &WRITER,
            Kind::Memory => &MEMORY,
            Kind::Peer => &PEER,
        }
    }
}

/// From now on this process makes the system calls of a vmm. To be called before it has other threads.
pub fn start() -> Result<(), FilterError> {
    filter::start(&PROCESS)
}

/// Starts a thread of a name and a kind.
pub fn spawn<T: Send + 'static>(
    name: &str,
    kind: Kind,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        confine(kind);
        work()
    })
}

/// What a thread of this kind does first. One that cannot be given its filter makes the calls of the whole process: that is a
/// filter too, and nothing that a guest, a client or a file can bring about.
pub fn confine(kind: Kind) {
    if let Err(e) = filter::narrow(kind.program()) {
        tracing::warn!("a thread may do more than it needs: {e}");
    }
}
