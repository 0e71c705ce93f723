//! Writing a snapshot: beside its final place, synced, then renamed. It is whole or absent.
//!
//! ```text
//!   Staging::begin        .NAME.partial-PID-N/ is made beside the target and locked
//!        |
//!   write_memory,         mem.bin, chunk by chunk; may take long, may be cancelled
//!     write_changes       the same from what has changed of the memory of another snapshot: all of it, or what differs
//!     write_packed        mem.pack instead: the memory of another snapshot, each chunk once and compressed
//!   write_disk, ...       disk-ID.img and disk-ID.map, as often as there are disks to hold; the same
//!        |
//!   commit, commit_as     mem.b3, state.bin, snap.json; a second name for mem.bin, if one is wanted; stamps; sync;
//!                         rename to NAME; sync the parent
//! ```
//!
//! A [`Staging`] that is dropped before `commit` has succeeded removes what it has written. What a killed process left
//! behind is found by its lock being free, and removed by the next `begin` for the same target, the second name of its memory
//! file included: a note in the directory says where that is.

mod base;
mod disk;
mod link;
mod memory;
mod pack;
mod source;
mod staging;

pub use base::{Base, BaseError};
pub use disk::CopiedDisk;
pub use memory::{MemoryDigest, Stored};
pub use pack::Packing;
pub(crate) use source::next_data;
pub use source::{BytesSource, FileSource, LayerSource, MemorySource};
pub(crate) use staging::describe;
pub use staging::{Facts, Staging, clear_leftovers};

use crate::dir::told;
use crate::image::ImageError;
use crate::manifest::BadField;
use crate::state::StateError;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether what is being written is no longer wanted. It is asked before each piece.
pub trait Cancel {
    /// It is not.
    fn is_cancelled(&self) -> bool;

    /// Hears, before each piece of the memory, how much of it was written so far, in bytes. May wait, so that writing takes longer.
    fn progress(&self, _written: u64) {}
}

impl Cancel for AtomicBool {
    fn is_cancelled(&self) -> bool {
        self.load(Ordering::Relaxed)
    }
}

/// Why a snapshot was not created. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// Something is at the target already.
    #[error("{path} exists already; snapshots are never overwritten: remove it or choose another name")]
    Exists {
        /// The target.
        path: PathBuf,
    },
    /// The directory that should hold the snapshot is not there.
    #[error("the directory {path} that should hold the snapshot does not exist; create it first")]
    NoParent {
        /// The directory.
        path: PathBuf,
    },
    /// The target has no name of its own.
    #[error("{path} cannot be the name of a snapshot: it must end in a name of at most 200 bytes")]
    BadName {
        /// The target.
        path: PathBuf,
    },
    /// The file system is full, or a limit or quota is reached.
    #[error(
        "no space for {path}: the memory alone needs up to {needed_bytes} bytes; free space or choose another directory"
    )]
    NoSpace {
        /// Which file.
        path: PathBuf,
        /// What the memory image takes, in bytes, at most.
        needed_bytes: u64,
    },
    /// A file cannot be written.
    #[error("cannot write {path}: {}", told(.source))]
    Write {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file system is full, or a limit or quota is reached, by a disk.
    #[error("no space for {path}: the disk takes up to {needed_bytes} bytes; free space or choose another directory")]
    NoDiskSpace {
        /// Which file.
        path: PathBuf,
        /// What the disk takes, in bytes.
        needed_bytes: u64,
    },
    /// Something is where the memory file was to have its second name.
    #[error("mem_file_path {path} exists already; nothing is overwritten: remove it or choose another name")]
    LinkExists {
        /// The second name.
        path: PathBuf,
    },
    /// It is the name of the snapshot as well.
    #[error("mem_file_path {path} is also snapshot_path, which becomes a directory; choose another name")]
    LinkIsTarget {
        /// The second name.
        path: PathBuf,
    },
    /// The memory file cannot have that second name.
    #[error(
        "mem_file_path {path}: {source}; it becomes a second name (a hard link) of the snapshot's memory file, so it must be on the file system of snapshot_path, in a directory that exists; or leave it out"
    )]
    Link {
        /// The second name.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A disk cannot be read.
    #[error("cannot read the disk {drive_id} at offset {offset:#x}: {source}")]
    Disk {
        /// Which disk.
        drive_id: String,
        /// Where, in bytes.
        offset: u64,
        /// What the source said.
        source: io::Error,
    },
    /// The guest's memory cannot be read.
    #[error("cannot read the guest's memory at image offset {offset:#x}: {source}")]
    Source {
        /// Where, in bytes.
        offset: u64,
        /// What the source said.
        source: io::Error,
    },
    /// The memory that was to be written over cannot be read.
    #[error("the memory of the snapshot that this one lies over cannot be read: {0}")]
    Base(#[from] ImageError),
    /// The snapshot that this one was to lie over is being removed.
    #[error("{path} is being removed; nothing can lie over it any more")]
    BaseRemoved {
        /// Its directory.
        path: PathBuf,
    },
    /// Another snapshot is where the one was that this one was to lie over.
    #[error(
        "{path} is another snapshot than the one that this one lies over; put that one back, or write a full snapshot"
    )]
    BaseReplaced {
        /// Its directory.
        path: PathBuf,
    },
    /// The snapshot that this one was to lie over cannot be protected.
    #[error("cannot note in {path} that a snapshot lies over it: {source}; write a full snapshot instead")]
    Note {
        /// Its directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The snapshot would take more room than it may.
    #[error("{path} would take {needed_bytes} bytes or more, and may take {max_bytes}; nothing was kept: allow more")]
    OverLimit {
        /// The target.
        path: PathBuf,
        /// What it takes at least, in bytes: as far as it was written.
        needed_bytes: u64,
        /// What it may take, in bytes.
        max_bytes: u64,
    },
    /// The state cannot be saved.
    #[error("the state of the machine cannot be saved: {0}")]
    State(#[from] StateError),
    /// A value that no manifest can have.
    #[error("the snapshot cannot be described: {0}")]
    Manifest(#[from] BadField),
    /// Cancelled on request.
    #[error("cancelled; nothing was kept")]
    Cancelled,
}
