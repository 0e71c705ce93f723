//! What the threads of a page server may do: each kind makes the system calls of its table ([`tables`]), and no others.
//!
//! The programs that the tables become are made when the page server is built; see `build.rs`.

pub mod tables;

use sandbox::filter::{self, FilterError};

include!(concat!(env!("OUT_DIR"), "/filters.rs"));

/// Threads that do the same kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Rearranges memory, or gives it back.
    Memory,
    /// Writes files.
    Writer,
}

/// From now on this process makes the system calls of a page server; with `remote`, of one that connects to other hosts. To be
/// called before it has other threads.
pub fn start(remote: bool) -> Result<(), FilterError> {
    filter::start(if remote { &REMOTE_PROCESS } else { &PROCESS })
}

/// What a thread of this kind does first. One that cannot be given its filter makes the calls of the whole process.
pub fn confine(kind: Kind) {
    let program: &[sandbox::Instruction] = match kind {
        Kind::Memory => &MEMORY,
        Kind::Writer => &WRITER,
    };
    if let Err(error) = filter::narrow(program) {
        tracing::warn!("a thread may do more than it needs: {error}");
    }
}
