//! Bytes on disk: what a snapshot is, how it is written, whole or not at all, and how it is read and refused.
//!
//! - [`manifest`]: `snap.json`, the readable description that binds all the other files
//! - [`state`]: what is saved of a machine besides its memory, and `state.bin`
//! - [`create`]: write beside, sync, rename
//! - [`load`]: read and check everything but the memory; refuse what is not understood
//! - [`image`]: the memory image, checked chunk by chunk where it is served, or once before it is mapped
//! - [`packed`]: an image whose chunks are compressed, where each of them lies
//! - [`digests`]: which bytes are right, wherever they come from
//! - [`disk`], [`clusters`]: what a snapshot holds of a disk, and the map that says which clusters that is
//! - [`verify`]: check everything, the whole memory included
//! - [`working_set`]: which pages clones use, learnt afterwards; [`page_runs`] is how they are told
//! - [`compat`]: may a snapshot run on this host; [`cpu`]: what a guest may use of a CPU
//! - [`threads`]: work that is split over CPUs
//! - [`tools`]: packing, flattening, comparing, showing and removing snapshots
//!
//! docs/snapshot-format.md describes the same for users.

#![forbid(unsafe_code)]

mod chunk;
pub mod clusters;
pub mod compat;
pub mod cpu;
pub mod create;
pub mod digests;
mod dir;
pub mod disk;
mod holes;
pub mod image;
pub mod load;
pub mod manifest;
pub mod packed;
pub mod page_runs;
mod stamp;
pub mod state;
pub mod threads;
pub mod tools;
pub mod verify;
pub mod working_set;

pub use dir::{FileError, told};
pub use stamp::FILE_TIME_GRANULARITY;

/// The newest version of the format: the last that this crate reads. It writes the lowest that can say what is to be said.
pub const FORMAT_VERSION: u32 = 2;
/// The first version of the format that this crate reads.
pub const OLDEST_FORMAT_VERSION: u32 = 1;
/// Unit in which memory is laid out and left out when it is zero, in bytes.
pub const PAGE_BYTES: u64 = 4096;
/// Unit in which memory is digested, in bytes.
pub const CHUNK_BYTES: u64 = 64 * 1024;

/// Names of the files of a snapshot.
pub mod file {
    /// The manifest.
    pub const MANIFEST: &str = "snap.json";
    /// The state of vCPUs, VM and devices.
    pub const STATE: &str = "state.bin";
    /// The memory image.
    pub const MEMORY: &str = "mem.bin";
    /// The same, packed.
    pub const PACKED_MEMORY: &str = "mem.pack";
    /// Which pages the memory image holds, if it lies over that of another snapshot.
    pub const PAGE_MAP: &str = "mem.map";
    /// Digests of the memory image, one per chunk.
    pub const DIGESTS: &str = "mem.b3";
    /// A note that the memory image has not changed since it was checked. Advisory, local to the host.
    pub const STAMP: &str = "mem.stamp";

    /// Which pages clones use. Advisory, and learnt after the snapshot was made.
    pub const WORKING_SET: &str = "working-set.json";

    /// A note that the snapshot at this path, as seen from the directory that the note is in, lies over the one that is there. One
    /// for each place: two snapshots may be the same but for where they are.
    pub fn child(path: &[u8]) -> String {
        format!("{CHILD}{}", &blake3::hash(path).to_hex()[..16])
    }

    /// Of a saved state: the configuration of its machine, and whether it was used. Notes of whoever has saved it.
    pub const CONFIGURATION: &str = "config.json";
    /// See [`CONFIGURATION`].
    pub const SAVED_MARK: &str = "saved.mark";

    /// How the names of such notes begin.
    pub const CHILD: &str = "child-";

    /// What is held of the disk `drive_id`: its clusters, at their places.
    pub fn disk(drive_id: &str) -> String {
        format!("disk-{drive_id}.img")
    }

    /// Which clusters those are.
    pub fn disk_map(drive_id: &str) -> String {
        format!("disk-{drive_id}.map")
    }

    /// A note that those have not changed since they were checked. As that of the memory image.
    pub fn disk_stamp(drive_id: &str) -> String {
        format!("disk-{drive_id}.stamp")
    }
}

// The format is pinned. A change of any of these strands every stored snapshot: read
// docs/snapshot-versioning.md first.
const _: () = assert!(FORMAT_VERSION == 2 && PAGE_BYTES == 4096 && CHUNK_BYTES == 65536);
