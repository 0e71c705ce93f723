//! What a snapshot holds of a disk, to be read in place: the file of its clusters, and the map that says which they are.

use crate::clusters::{CLUSTER_BYTES, Cluster, Clusters, MapError};
use crate::dir::{Dir, FileError};
use crate::holes::Holes;
use crate::load::Snapshot;
use crate::manifest::{DriveDevice, HeldDisk};
use crate::stamp::Stamp;
use crate::{CHUNK_BYTES, file};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// Why what a snapshot holds of a disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// A file is absent, is no regular file, has the wrong length or cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// The map is not the one that the manifest describes.
    #[error("{path} is damaged or belongs to another snapshot: its digest does not match; copy it again")]
    MapDigest {
        /// The map.
        path: PathBuf,
    },
    /// The map cannot be decoded.
    #[error("{path} cannot be used: {source}; the snapshot was not written by this program")]
    Map {
        /// The map.
        path: PathBuf,
        /// What is wrong.
        source: MapError,
    },
    /// The clusters are not those that the snapshot was made with.
    #[error("{path} is damaged: its digest does not match; copy it again or create the snapshot anew")]
    Damaged {
        /// The file of clusters.
        path: PathBuf,
    },
    /// Somebody writes the clusters, or has done so while they were being checked.
    #[error(
        "{path} is being written; nothing may write to a snapshot: end who does, then check it (vmm snapshot verify)"
    )]
    Changed {
        /// The file of clusters.
        path: PathBuf,
    },
    /// The clusters cannot be read.
    #[error("cannot read {path} at offset {offset:#x}: {source}")]
    Read {
        /// The file of clusters.
        path: PathBuf,
        /// Where, in bytes.
        offset: u64,
        /// What the system said.
        source: io::Error,
    },
}

/// What a snapshot holds of a disk. The file has the right length and is locked: nobody who asks can write it. The map has its
/// digest.
#[derive(Debug)]
pub struct Held {
    /// Its clusters, each at its place. Open for reading.
    pub file: File,
    /// Which clusters are data or zero. Nothing else of the file means anything.
    pub clusters: Clusters,
}

impl Snapshot {
    /// Opens what the snapshot holds of a disk of its manifest, and makes sure that this is what the snapshot was made with,
    /// since it is read in place and nobody can check then. A matching stamp is enough; otherwise it is read and checked now,
    /// and stamped. `None` if nothing is held.
    pub fn open_trusted_disk(&self, drive: &DriveDevice) -> Result<Option<Held>, DiskError> {
        let (Some(saved), Some(held)) = (&drive.held, self.open_disk(drive)?) else { return Ok(None) };
        let now = stamp_of(self.open_dir(), saved, &held)?;
        if Stamp::read(self.open_dir(), &file::disk_stamp(&drive.drive_id)).as_ref() != Some(&now) {
            check_open(self.open_dir(), drive, saved, &held, &now)?;
        }
        Ok(Some(held))
    }

    /// Opens what the snapshot holds of a disk of its manifest; `None` if that is nothing. Its clusters are not looked at.
    pub fn open_disk(&self, drive: &DriveDevice) -> Result<Option<Held>, DiskError> {
        let held = drive.held.as_ref();
        held.map(|held| open(self.open_dir(), held, drive.size_bytes)).transpose()
    }
}

fn open(dir: &Dir, held: &HeldDisk, size: u64) -> Result<Held, DiskError> {
    let file = dir.open_sized(&held.file, size)?;
    let path = dir.join(&held.file);
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared) {
        // Where there are no locks nobody can be asked.
        Ok(()) | Err(Errno::OPNOTSUPP) => {}
        Err(Errno::WOULDBLOCK) => return Err(DiskError::Changed { path }),
        Err(e) => return Err(DiskError::Read { path, offset: 0, source: e.into() }),
    }
    let path = || dir.join(&held.map);
    let map = dir.read_digested(&held.map, held.map_bytes, &held.map_digest)?;
    let map = map.ok_or_else(|| DiskError::MapDigest { path: path() })?;
    let clusters = Clusters::decode(&map, size).map_err(|source| DiskError::Map { path: path(), source })?;
    Ok(Held { file, clusters })
}

/// Reads and checks all that a snapshot holds of a disk, and stamps it. Returns how many bytes were read.
pub(crate) fn check(snapshot: &Snapshot, drive: &DriveDevice) -> Result<u64, DiskError> {
    let (Some(saved), Some(held)) = (&drive.held, snapshot.open_disk(drive)?) else { return Ok(0) };
    let before = stamp_of(snapshot.open_dir(), saved, &held)?;
    check_open(snapshot.open_dir(), drive, saved, &held, &before)
}

fn stamp_of(dir: &Dir, saved: &HeldDisk, held: &Held) -> Result<Stamp, DiskError> {
    let unreadable = |source| DiskError::Read { path: dir.join(&saved.file), offset: 0, source };
    Stamp::of(&held.file, &saved.digest).map_err(unreadable)
}

fn check_open(dir: &Dir, drive: &DriveDevice, saved: &HeldDisk, held: &Held, before: &Stamp) -> Result<u64, DiskError> {
    let bytes = check_clusters(dir, drive, saved, held)?;
    match before.confirm(&held.file, dir, &file::disk_stamp(&drive.drive_id)) {
        Ok(true) => Ok(bytes),
        Ok(false) => Err(DiskError::Changed { path: dir.join(&saved.file) }),
        Err(source) => Err(DiskError::Read { path: dir.join(&saved.file), offset: 0, source }),
    }
}

/// Compares the clusters with their digest. Returns how many bytes those are.
pub(crate) fn check_clusters(dir: &Dir, drive: &DriveDevice, saved: &HeldDisk, held: &Held) -> Result<u64, DiskError> {
    let Held { file, clusters } = held;
    let path = || dir.join(&saved.file);
    let mut holes = Holes::of(file);
    let (mut hasher, mut bytes, mut buf) = (blake3::Hasher::new(), 0, vec![0; CHUNK_BYTES as usize]);
    for (run, _) in clusters.runs(0..clusters.count()).filter(|(_, state)| *state == Cluster::Data) {
        let (mut at, end) = (run.start * CLUSTER_BYTES, (run.end * CLUSTER_BYTES).min(drive.size_bytes));
        while at < end {
            let buf = &mut buf[..(end - at).min(CHUNK_BYTES) as usize];
            let unreadable = |source| DiskError::Read { path: path(), offset: at, source };
            // No cluster that counts as data is zero: what claims much and holds nothing is not read through.
            if holes.cover(at..at + buf.len() as u64).map_err(unreadable)? {
                return Err(DiskError::Damaged { path: path() });
            }
            file.read_exact_at(buf, at).map_err(unreadable)?;
            hasher.update(buf);
            at += buf.len() as u64;
            bytes += buf.len() as u64;
        }
    }
    if bytes != saved.data_bytes || hasher.finalize().to_hex().as_str() != saved.digest {
        return Err(DiskError::Damaged { path: path() });
    }
    Ok(bytes)
}
