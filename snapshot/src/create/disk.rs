//! Writing what a snapshot holds of a disk.
//!
//! A stack of layers is written by [`Staging::write_disk`], which may take long and needs no guest to stand still: layers
//! do not change. A file that a guest writes to is first copied by [`Staging::copy_disk`] while the guest stands still,
//! and read through by [`Staging::describe_disk`] when it goes on.

use super::staging::Staging;
use super::{Cancel, CreateError, LayerSource, next_data};
use crate::chunk::is_zero;
use crate::clusters::{CLUSTER_BYTES, Cluster, Clusters};
use crate::disk::{Held, check_clusters};
use crate::load::Snapshot;
use crate::manifest::{DriveDevice, HeldDisk};
use crate::{CHUNK_BYTES, file};
use rustix::fs::Mode;
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// How much is copied at a time, in bytes.
const PIECE: u64 = 16 << 20;

/// A disk that was copied whole.
#[derive(Debug)]
pub struct CopiedDisk {
    drive_id: String,
    file: File,
    size: u64,
}

impl Staging {
    /// Writes what `source` holds of the disk `drive_id`. `cancel` is looked at now and then. Nothing is synced yet.
    pub fn write_disk(
        &mut self,
        drive_id: &str,
        source: &dyn LayerSource,
        cancel: &dyn Cancel,
    ) -> Result<HeldDisk, CreateError> {
        let (file, size) = (self.create_disk(drive_id, source.size())?, source.size());
        let mut digest = Digest::new(size);
        let unreadable = |offset, source| CreateError::Disk { drive_id: drive_id.to_owned(), offset, source };
        let mut buf = vec![0; CHUNK_BYTES as usize];
        for (run, state) in source.clusters().runs(0..source.clusters().count()) {
            match state {
                Cluster::Absent => {}
                Cluster::Zero => digest.clusters.set(run, Cluster::Zero),
                Cluster::Data => pieces(run, size, |offset, len| {
                    stop_if(cancel)?;
                    let buf = &mut buf[..len];
                    source.read(offset, buf).map_err(|e| unreadable(offset, e))?;
                    digest.each_run(offset, buf, Cluster::Zero, |at, data| {
                        file.write_all_at(data, at).map_err(|e| self.disk_error(drive_id, source.clusters().data(), e))
                    })
                })?,
            }
        }
        self.end_disk(drive_id, file, digest)
    }

    /// Copies a whole disk, by sharing its blocks if the file system can. `source` must not be written meanwhile.
    pub fn copy_disk(
        &mut self,
        drive_id: &str,
        source: &File,
        size: u64,
        cancel: &dyn Cancel,
    ) -> Result<CopiedDisk, CreateError> {
        let file = self.create_disk(drive_id, size)?;
        let copied = match rustix::fs::ioctl_ficlone(&file, source) {
            Ok(()) => file.set_len(size).map_err(CopyFault::Write),
            Err(_) => copy(source, &file, size, cancel),
        };
        match copied {
            Ok(()) => Ok(CopiedDisk { drive_id: drive_id.to_owned(), file, size }),
            Err(CopyFault::Cancelled) => Err(CreateError::Cancelled),
            Err(CopyFault::Read(offset, source)) => {
                Err(CreateError::Disk { drive_id: drive_id.to_owned(), offset, source })
            }
            Err(CopyFault::Write(e)) => Err(self.disk_error(drive_id, size.div_ceil(CLUSTER_BYTES), e)),
        }
    }

    /// Reads a copied disk through and describes it.
    pub fn describe_disk(&mut self, copied: CopiedDisk, cancel: &dyn Cancel) -> Result<HeldDisk, CreateError> {
        let CopiedDisk { drive_id, file, size } = copied;
        let mut digest = Digest::new(size);
        let unreadable = |offset, source| CreateError::Disk { drive_id: drive_id.clone(), offset, source };
        let (mut at, mut buf) = (0, vec![0; CHUNK_BYTES as usize]);
        while let Some(data) = next_data(&file, at, size).map_err(|e| unreadable(at, e))? {
            let run = data.start.max(at) / CLUSTER_BYTES..data.end.div_ceil(CLUSTER_BYTES);
            at = (run.end * CLUSTER_BYTES).min(size);
            pieces(run, size, |offset, len| {
                stop_if(cancel)?;
                let buf = &mut buf[..len];
                file.read_exact_at(buf, offset).map_err(|e| unreadable(offset, e))?;
                // There is nothing below a whole disk: what is zero need not be noted.
                digest.each_run(offset, buf, Cluster::Absent, |_, _| Ok(()))
            })?;
        }
        self.end_disk(&drive_id, file, digest)
    }

    /// Copies what another snapshot holds of a disk, as it is. `source` must be what [`Snapshot::open_trusted_disk`] has opened.
    pub fn copy_held(
        &mut self,
        snapshot: &Snapshot,
        drive: &DriveDevice,
        source: &Held,
        cancel: &dyn Cancel,
    ) -> Result<(), CreateError> {
        let (DriveDevice { drive_id, size_bytes, .. }, Some(held)) = (drive, &drive.held) else { return Ok(()) };
        self.take(held.data_bytes + held.map_bytes)?;
        let unreadable = |source| CreateError::Disk { drive_id: drive_id.clone(), offset: 0, source };
        let map = snapshot.open_dir().read_sized(&held.map, held.map_bytes);
        let map = map.map_err(|e| unreadable(io::Error::other(e)))?;
        let CopiedDisk { file, .. } = self.copy_disk(drive_id, &source.file, *size_bytes, cancel)?;
        let failed = |e| self.disk_error(drive_id, source.clusters.data(), e);
        // It is stamped as right.
        let copy = Held { file: file.try_clone().map_err(failed)?, clusters: source.clusters.clone() };
        check_clusters(self.dir(), drive, held, &copy).map_err(|e| unreadable(io::Error::other(e)))?;
        rustix::fs::fchmod(&file, Mode::RUSR).map_err(|e| failed(e.into()))?;
        self.dir().write_file(&held.map, &map).map_err(failed)?;
        self.sync_later(held.file.clone(), file);
        Ok(())
    }

    fn create_disk(&self, drive_id: &str, size: u64) -> Result<File, CreateError> {
        let name = file::disk(drive_id);
        let made = self.dir().create_file_to_read(&name).and_then(|file| file.set_len(size).map(|()| file));
        made.map_err(|e| self.disk_error(drive_id, 0, e))
    }

    fn end_disk(&mut self, drive_id: &str, file: File, digest: Digest) -> Result<HeldDisk, CreateError> {
        let failed = |e| self.disk_error(drive_id, digest.clusters.data(), e);
        // Complete: from here on nobody writes it, and the mode says so.
        rustix::fs::fchmod(&file, Mode::RUSR).map_err(|e| failed(e.into()))?;
        let map = digest.clusters.encode();
        self.dir().write_file(&file::disk_map(drive_id), &map).map_err(failed)?;
        let held = HeldDisk {
            file: file::disk(drive_id),
            data_bytes: digest.bytes,
            digest: digest.hasher.finalize().to_hex().to_string(),
            map: file::disk_map(drive_id),
            map_bytes: map.len() as u64,
            map_digest: blake3::hash(&map).to_hex().to_string(),
        };
        self.take(held.data_bytes + held.map_bytes)?;
        self.sync_later(held.file.clone(), file);
        Ok(held)
    }

    fn disk_error(&self, drive_id: &str, clusters: u64, source: io::Error) -> CreateError {
        let path = self.dir().join(&file::disk(drive_id));
        match Errno::from_io_error(&source) {
            Some(Errno::NOSPC | Errno::DQUOT | Errno::FBIG) => {
                CreateError::NoDiskSpace { path, needed_bytes: clusters * CLUSTER_BYTES }
            }
            _ => CreateError::Write { path, source },
        }
    }
}

fn stop_if(cancel: &dyn Cancel) -> Result<(), CreateError> {
    if cancel.is_cancelled() { Err(CreateError::Cancelled) } else { Ok(()) }
}

/// Calls `act(offset, length)` for each piece, of at most a chunk, of a run of clusters of a disk of `size` bytes.
fn pieces(
    run: Range<u64>,
    size: u64,
    mut act: impl FnMut(u64, usize) -> Result<(), CreateError>,
) -> Result<(), CreateError> {
    let (mut at, end) = (run.start * CLUSTER_BYTES, (run.end * CLUSTER_BYTES).min(size));
    while at < end {
        let len = (end - at).min(CHUNK_BYTES);
        act(at, len as usize)?;
        at += len;
    }
    Ok(())
}

/// What is known of a disk as it is read in order.
struct Digest {
    clusters: Clusters,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl Digest {
    fn new(size: u64) -> Digest {
        Digest { clusters: Clusters::new(size), hasher: blake3::Hasher::new(), bytes: 0 }
    }

    /// Notes the clusters that begin at `offset`, and calls `keep` for runs of those that are not zero; the others are
    /// noted as `zero`.
    fn each_run(
        &mut self,
        offset: u64,
        bytes: &[u8],
        zero: Cluster,
        mut keep: impl FnMut(u64, &[u8]) -> Result<(), CreateError>,
    ) -> Result<(), CreateError> {
        let first = offset / CLUSTER_BYTES;
        let mut start = 0;
        for (i, cluster) in bytes.chunks(CLUSTER_BYTES as usize).enumerate() {
            let (at, number) = (i * CLUSTER_BYTES as usize, first + i as u64);
            if is_zero(cluster) {
                self.clusters.set(number..number + 1, zero);
                if at > start {
                    keep(offset + start as u64, &bytes[start..at])?;
                }
                start = at + cluster.len();
            } else {
                self.clusters.set(number..number + 1, Cluster::Data);
                self.hasher.update(cluster);
                self.bytes += cluster.len() as u64;
            }
        }
        if bytes.len() > start {
            keep(offset + start as u64, &bytes[start..])?;
        }
        Ok(())
    }
}

/// Why a copy stopped.
enum CopyFault {
    Cancelled,
    Read(u64, io::Error),
    Write(io::Error),
}

/// Copies what is data.
fn copy(from: &File, to: &File, size: u64, cancel: &dyn Cancel) -> Result<(), CopyFault> {
    let mut at = 0;
    while let Some(data) = next_data(from, at, size).map_err(|e| CopyFault::Read(at, e))? {
        let mut offset = data.start.max(at);
        at = data.end;
        while offset < data.end {
            if cancel.is_cancelled() {
                return Err(CopyFault::Cancelled);
            }
            offset += copy_piece(from, to, offset, (data.end - offset).min(PIECE))?;
        }
    }
    Ok(())
}

/// Copies up to `len` bytes within the kernel, or through a buffer where it cannot. Returns how many.
fn copy_piece(from: &File, to: &File, offset: u64, len: u64) -> Result<u64, CopyFault> {
    let (mut source, mut target) = (offset, offset);
    match rustix::fs::copy_file_range(from, Some(&mut source), to, Some(&mut target), len as usize) {
        Ok(copied) if copied > 0 => Ok(copied as u64),
        Err(e @ (Errno::NOSPC | Errno::DQUOT | Errno::FBIG)) => Err(CopyFault::Write(e.into())),
        // Between these files it cannot.
        _ => {
            let mut buf = vec![0; len.min(CHUNK_BYTES) as usize];
            from.read_exact_at(&mut buf, offset).map_err(|e| CopyFault::Read(offset, e))?;
            to.write_all_at(&buf, offset).map_err(CopyFault::Write)?;
            Ok(buf.len() as u64)
        }
    }
}
