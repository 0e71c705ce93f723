//! What a snapshot holds of a disk, to be read in place: the file of its clusters, and the map that says which they are.

use crate::CHUNK_BYTES;
use crate::clusters::{CLUSTER_BYTES, Cluster, Clusters, MapError};
use crate::dir::{Dir, FileError};
use crate::load::Snapshot;
use crate::manifest::{DriveDevice, HeldDisk};
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

/// What a snapshot holds of a disk. The file has the right length and the map its digest; for the contents of the file see
/// [`verify`](crate::verify).
#[derive(Debug)]
pub struct Held {
    /// Its clusters, each at its place. Open for reading.
    pub file: File,
    /// Which clusters are data or zero. Nothing else of the file means anything.
    pub clusters: Clusters,
}

impl Snapshot {
    /// Opens what the snapshot holds of a disk of its manifest; `None` if that is nothing.
    pub fn open_disk(&self, drive: &DriveDevice) -> Result<Option<Held>, DiskError> {
        let held = drive.held.as_ref();
        held.map(|held| open(self.open_dir(), held, drive.size_bytes)).transpose()
    }
}

fn open(dir: &Dir, held: &HeldDisk, size: u64) -> Result<Held, DiskError> {
    let file = dir.open_sized(&held.file, size)?;
    let map = dir.read_sized(&held.map, held.map_bytes)?;
    let path = || dir.join(&held.map);
    if blake3::hash(&map).to_hex().as_str() != held.map_digest {
        return Err(DiskError::MapDigest { path: path() });
    }
    let clusters = Clusters::decode(&map, size).map_err(|source| DiskError::Map { path: path(), source })?;
    Ok(Held { file, clusters })
}

/// Reads and checks all that a snapshot holds of a disk. Returns how many bytes were read.
pub(crate) fn check(snapshot: &Snapshot, drive: &DriveDevice) -> Result<u64, DiskError> {
    let (Some(held), Some(Held { file, clusters })) = (&drive.held, snapshot.open_disk(drive)?) else { return Ok(0) };
    let path = || snapshot.open_dir().join(&held.file);
    let (mut hasher, mut bytes, mut buf) = (blake3::Hasher::new(), 0, vec![0; CHUNK_BYTES as usize]);
    for (run, _) in clusters.runs(0..clusters.count()).filter(|(_, state)| *state == Cluster::Data) {
        let (mut at, end) = (run.start * CLUSTER_BYTES, (run.end * CLUSTER_BYTES).min(drive.size_bytes));
        while at < end {
            let buf = &mut buf[..(end - at).min(CHUNK_BYTES) as usize];
            file.read_exact_at(buf, at).map_err(|source| DiskError::Read { path: path(), offset: at, source })?;
            hasher.update(buf);
            at += buf.len() as u64;
            bytes += buf.len() as u64;
        }
    }
    if bytes != held.data_bytes || hasher.finalize().to_hex().as_str() != held.digest {
        return Err(DiskError::Damaged { path: path() });
    }
    Ok(bytes)
}
