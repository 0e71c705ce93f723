//! The disks of a machine: opened before anything else is built, and brought into a snapshot.
//!
//! | disk of the original | in the snapshot | disk of a clone |
//! |---|---|---|
//! | read only | path, size and time of its image | the same image |
//! | overlay | those of its image; all layers as one | a fresh overlay over that layer over the image |
//! | raw | all of it | a fresh overlay over the snapshot's copy |
//!
//! So no clone writes anything that another can see.
//!
//! A fork goes the same way, but for what is not written: clones have what the original has open, read only. A raw disk is not forked.
//!
//! A machine that is saved, to go on where it was as the one that it was, is no clone. Its raw disks stay where they are: the
//! saved state holds size and time of the image and none of its contents, and the machine that goes on writes the image
//! again, if nobody else has since.

use super::config::{self, ConfigError};
use super::record;
use super::snapshot::SnapshotError;
use super::wiring::Devices;
use crate::devices::lock;
use crate::devices::virtio::block::disk::{Frozen, Image, ImageFacts};
use crate::devices::virtio::block::overlay::{Folded, Stack};
use crate::devices::virtio::block::{Disk, DiskError};
use api_spec::devices::{CacheType, Drive};
use api_spec::fork::{ForkDrive, ForkImage};
use api_spec::snapshot::{DriveOverride, SnapshotLoad};
use snapshot::clusters::Clusters;
use snapshot::create::{Cancel, CopiedDisk, CreateError, LayerSource, Staging};
use snapshot::disk::Held;
use snapshot::load::Snapshot;
use snapshot::manifest::{self, DiskImage, DriveDevice, HeldDisk};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Why the disks of a snapshot could not be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreDisksError {
    /// An image.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// What the snapshot holds.
    #[error(transparent)]
    Held(#[from] snapshot::disk::DiskError),
    /// A disk that cannot be configured.
    #[error("the snapshot's disks cannot be built: {0}")]
    Config(#[from] ConfigError),
    /// Another image for a disk that is not there.
    #[error("drive_overrides: the snapshot has no drive {0:?}")]
    NoDrive(String),
    /// The same disk twice.
    #[error("drive_overrides: drive {0:?} is given twice")]
    Twice(String),
    /// Another image for a disk that has none.
    #[error("drive_overrides: all of drive {0} is in the snapshot; it has no image to be found elsewhere")]
    Whole(String),
}

/// Opens the disks of a machine that is to boot.
pub fn open(drives: &[Drive]) -> Result<Vec<Disk>, DiskError> {
    drives.iter().map(open_one).collect()
}

fn open_one(drive: &Drive) -> Result<Disk, DiskError> {
    let id = &drive.drive_id;
    let raw_writable = !drive.is_read_only && !drive.overlay;
    let image = Image::open(id, &drive.path_on_host, raw_writable)?;
    match drive.overlay {
        true => Disk::overlay(id, image.facts().size, Some(image), None),
        false => Ok(Disk::raw(image, raw_writable)),
    }
}

/// Opens the disks of a snapshot for a clone, and says how they are configured. The disks `in_place` are no clone's: the guest
/// goes on writing their images.
pub fn restore(
    snapshot: &Snapshot,
    request: &SnapshotLoad,
    in_place: &[String],
) -> Result<(Vec<Drive>, Vec<Disk>), RestoreDisksError> {
    let saved = &snapshot.manifest().devices.drives;
    let overrides = &request.drive_overrides;
    for (i, DriveOverride { drive_id, .. }) in overrides.iter().enumerate() {
        if overrides[..i].iter().any(|other| other.drive_id == *drive_id) {
            return Err(RestoreDisksError::Twice(drive_id.clone()));
        }
        match saved.iter().find(|drive| drive.drive_id == *drive_id) {
            None => return Err(RestoreDisksError::NoDrive(drive_id.clone())),
            Some(DriveDevice { image: None, .. }) => return Err(RestoreDisksError::Whole(drive_id.clone())),
            Some(_) => {}
        }
    }
    let drives: Vec<Drive> = saved
        .iter()
        .map(|drive| {
            let other = overrides.iter().find(|other| other.drive_id == drive.drive_id);
            let overlay = !drive.is_read_only && !in_place.contains(&drive.drive_id);
            Drive { overlay, ..configured(drive, other.map(|other| other.path_on_host.as_path()), snapshot.dir()) }
        })
        .collect();
    config::check_drives(&drives)?;
    let disks = saved.iter().zip(&drives).map(|(saved, drive)| {
        let named_by_user = overrides.iter().any(|other| other.drive_id == drive.drive_id);
        restore_one(snapshot, saved, drive, named_by_user)
    });
    let disks = disks.collect::<Result<_, _>>()?;
    Ok((drives, disks))
}

/// How a disk of a clone is configured.
fn configured(saved: &DriveDevice, other_path: Option<&Path>, dir: &Path) -> Drive {
    let own = match (&saved.image, &saved.held) {
        (Some(image), _) => PathBuf::from(&image.path),
        (None, Some(held)) => dir.join(&held.file),
        (None, None) => dir.to_owned(), // The manifest's check lets no such disk pass.
    };
    Drive {
        drive_id: saved.drive_id.clone(),
        path_on_host: other_path.map_or(own, Path::to_owned),
        is_root_device: saved.is_root_device,
        is_read_only: saved.is_read_only,
        partuuid: saved.partuuid.clone(),
        cache_type: match saved.cache_type {
            manifest::CacheType::Unsafe => CacheType::Unsafe,
            manifest::CacheType::Writeback => CacheType::Writeback,
        },
        io_engine: Default::default(),
        rate_limiter: saved.rate_limit.map(record::rate_limiter),
        overlay: !saved.is_read_only,
        max_overlay_mib: saved.max_overlay_mib,
        socket: None,
    }
}

fn restore_one(
    snapshot: &Snapshot,
    saved: &DriveDevice,
    drive: &Drive,
    named_by_user: bool,
) -> Result<Disk, RestoreDisksError> {
    let writable = !drive.is_read_only && !drive.overlay;
    let same = |image| open_same(image, saved.size_bytes, drive, named_by_user, writable);
    let image = saved.image.as_ref().map(same).transpose()?;
    let held = snapshot.open_trusted_disk(saved)?;
    match image {
        Some(image) if saved.is_read_only || writable => Ok(Disk::raw(image, writable)),
        image => Ok(Disk::overlay(&saved.drive_id, saved.size_bytes, image, held)?),
    }
}

/// Opens an image that must be the one that a snapshot was taken over. A device must have been named by the user.
fn open_same(
    saved: &DiskImage,
    saved_size: u64,
    drive: &Drive,
    named_by_user: bool,
    writable: bool,
) -> Result<Image, DiskError> {
    let (id, path) = (&drive.drive_id, &drive.path_on_host);
    let image = if named_by_user { Image::open(id, path, writable) } else { Image::open_named(id, path) }?;
    let ImageFacts { path, size, modified_ns } = image.facts();
    let what = if *size != saved_size {
        format!("it has {size} bytes and had {saved_size}")
    } else if *modified_ns != saved.modified_ns {
        "it has another time of last change".to_owned()
    } else {
        return Ok(image);
    };
    Err(DiskError::Changed { id: drive.drive_id.clone(), path: path.clone(), what })
}

/// A disk as it is when the guest goes on.
pub struct Captured {
    /// What the manifest says of it, but for what is held.
    device: DriveDevice,
    contents: Contents,
}

enum Contents {
    /// An image that nobody writes.
    Image,
    /// Layers that do not change; still to be written.
    Layers(Stack),
    /// Copied already; still to be described.
    Copied(CopiedDisk),
    /// The image stays what it is, once it is on disk.
    InPlace(Arc<File>),
}

/// Nothing of a disk.
struct Nothing {
    size: u64,
    clusters: Clusters,
}

impl LayerSource for Nothing {
    fn size(&self) -> u64 {
        self.size
    }

    fn clusters(&self) -> &Clusters {
        &self.clusters
    }

    fn read(&self, _offset: u64, _buf: &mut [u8]) -> io::Result<()> {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

/// The layers of a disk that do not change.
#[derive(Clone, Debug)]
pub struct Layers {
    /// Number of the disk.
    pub number: usize,
    drive_id: String,
    /// The layers.
    pub stack: Stack,
}

/// The frozen layers of disks that have any.
pub fn layers(devices: &Devices) -> Vec<Layers> {
    let layers = devices.drives.iter().enumerate().map(|(number, slot)| {
        let block = lock(&slot.device);
        Some(Layers { number, drive_id: block.id().to_owned(), stack: block.frozen_layers()? })
    });
    layers.flatten().collect()
}

/// A disk whose image the guest writes itself, if there is one: clones cannot have it.
pub fn written_in_place(drives: &[Drive]) -> Option<&str> {
    drives.iter().find(|drive| !drive.is_read_only && !drive.overlay).map(|drive| drive.drive_id.as_str())
}

/// A disk as clones get it, but for its layers.
pub struct Shared {
    /// How it is configured, without the maps of its layers.
    pub told: ForkDrive,
    /// Its image, if it has one.
    pub image: Option<Image>,
}

/// Gathers what clones need of the disks of a guest that stands still, whose devices' state has been saved. [`layers`] tells the layers
/// then, which nobody writes any more. A failure names the disk.
pub fn share(devices: &Devices, drives: &[Drive]) -> Result<Vec<Shared>, (String, io::Error)> {
    let shared = drives.iter().zip(&devices.drives).map(|(drive, slot)| {
        let mut block = lock(&slot.device);
        let image = block.share().map_err(|source| (drive.drive_id.clone(), source))?;
        // Whoever is told of it may live in another directory.
        let path_on_host = match &image {
            Some(image) => image.facts().path.clone(),
            None => std::path::absolute(&drive.path_on_host).unwrap_or_else(|_| drive.path_on_host.clone()),
        };
        let told = ForkDrive {
            drive: Drive { path_on_host, ..drive.clone() },
            size_bytes: block.size(),
            image: image.as_ref().map(|image| ForkImage { modified_ns: image.facts().modified_ns }),
            layer_map_bytes: Vec::new(),
        };
        Ok(Shared { told, image })
    });
    shared.collect()
}

/// What has come of merging.
pub struct Merged {
    /// Layers for the devices to take over, each with the number of its disk.
    pub layers: Vec<(usize, Folded)>,
    /// The first disk for which something failed, and what.
    pub failed: Option<(String, io::Error)>,
}

/// Copies layers into fewer, until no disk has more than `most` or it is over; the oldest of each, as many as `kept` says, are left alone. A
/// failure keeps none of the other disks from it.
pub fn merge(
    layers: &mut [Layers],
    most: usize,
    kept: impl Fn(&Layers) -> usize,
    is_over: &dyn Fn() -> bool,
) -> Merged {
    let mut merged = Merged { layers: Vec::new(), failed: None };
    for layers in layers {
        let kept = kept(layers);
        let Layers { number, drive_id, stack } = layers;
        let (folded, result) = stack.merge(kept, most, is_over);
        merged.layers.extend(folded.into_iter().map(|folded| (*number, folded)));
        if let Err(e) = result {
            merged.failed.get_or_insert_with(|| (drive_id.clone(), e));
        }
    }
    merged
}

/// How many of the oldest layers of a disk are those that were taken before, or older than such.
pub fn known(layers: &Layers, taken: &[Layers]) -> usize {
    let of_it = taken.iter().find(|taken| taken.number == layers.number);
    of_it.map_or(0, |taken| layers.stack.known_to(&taken.stack))
}

/// Puts what was merged in its place.
pub fn adopt(layers: &mut [Layers], merged: &[(usize, Folded)]) {
    for (number, folded) in merged {
        for layers in layers.iter_mut().filter(|layers| layers.number == *number) {
            layers.stack.adopt(folded);
        }
    }
}

/// A disk of a clone, of the files that come with it: the layers, the uppermost first, and the image.
pub fn handed_on(told: &ForkDrive, mut layers: Vec<Held>, image: Option<File>) -> Result<Disk, DiskError> {
    let ForkDrive { drive, size_bytes, image: facts, layer_map_bytes: _ } = told;
    let image = image.map(|file| {
        let modified_ns = facts.and_then(|facts| facts.modified_ns);
        let facts = ImageFacts { path: drive.path_on_host.clone(), size: *size_bytes, modified_ns };
        Image::handed_on(&drive.drive_id, file, facts)
    });
    match image.transpose()? {
        Some(image) if drive.is_read_only => Ok(Disk::raw(image, false)),
        image => {
            layers.reverse();
            Disk::overlay(&drive.drive_id, *size_bytes, image, layers)
        }
    }
}

/// Gathers the disks of a guest that stands still, whose devices' state has been saved. Overlays are frozen; an image that
/// the guest writes itself is copied now, or stays `in_place`.
pub fn capture(
    devices: &Devices,
    drives: &[Drive],
    in_place: bool,
    staging: &mut Staging,
    cancel: &dyn Cancel,
) -> Result<Vec<Captured>, SnapshotError> {
    let mut captured = Vec::with_capacity(drives.len());
    for (drive, slot) in drives.iter().zip(&devices.drives) {
        let mut block = lock(&slot.device);
        let size = block.size();
        let unreadable = |source| SnapshotError::Disk { id: drive.drive_id.clone(), source };
        let (image, contents) = match block.freeze().map_err(unreadable)? {
            Frozen::Image(facts) => (Some(facts), Contents::Image),
            Frozen::Layers(facts, stack) => (facts, Contents::Layers(stack)),
            Frozen::Writable(facts, file) if in_place => (Some(facts), Contents::InPlace(file)),
            Frozen::Writable(_, file) => {
                (None, Contents::Copied(staging.copy_disk(&drive.drive_id, &file, size, cancel)?))
            }
        };
        let device = describe(drive, size, image).map_err(unreadable)?;
        captured.push(Captured { device, contents });
    }
    Ok(captured)
}

fn describe(drive: &Drive, size_bytes: u64, image: Option<ImageFacts>) -> io::Result<DriveDevice> {
    let image = image.map(|ImageFacts { path, size: _, modified_ns }| match path.into_os_string().into_string() {
        Ok(path) => Ok(DiskImage { path, modified_ns }),
        Err(path) => {
            let problem = format!("the path {} of its image is not UTF-8, so no manifest can name it", path.display());
            Err(io::Error::new(io::ErrorKind::InvalidFilename, problem))
        }
    });
    let Drive {
        drive_id,
        path_on_host: _,
        is_root_device,
        is_read_only,
        partuuid,
        cache_type,
        io_engine: _,
        rate_limiter,
        overlay: _,
        max_overlay_mib,
        socket: _,
    } = drive;
    Ok(DriveDevice {
        drive_id: drive_id.clone(),
        is_root_device: *is_root_device,
        is_read_only: *is_read_only,
        partuuid: partuuid.clone(),
        cache_type: match cache_type {
            CacheType::Unsafe => manifest::CacheType::Unsafe,
            CacheType::Writeback => manifest::CacheType::Writeback,
        },
        rate_limit: rate_limiter.map(record::rate_limit),
        max_overlay_mib: *max_overlay_mib,
        size_bytes,
        image: image.transpose()?,
        held: None,
    })
}

/// Writes what was gathered, while the guest goes on. Returns what the manifest says of the disks.
pub fn write(
    staging: &mut Staging,
    captured: Vec<Captured>,
    cancel: &AtomicBool,
) -> Result<Vec<DriveDevice>, CreateError> {
    let mut written = Vec::with_capacity(captured.len());
    for Captured { device, contents } in captured {
        let held: Option<HeldDisk> = match contents {
            Contents::Image => None,
            Contents::InPlace(file) => {
                let id = device.drive_id.clone();
                file.sync_all().map_err(|source| CreateError::Disk { drive_id: id, offset: 0, source })?;
                let size = device.size_bytes;
                let nothing = Nothing { size, clusters: Clusters::new(size) };
                Some(staging.write_disk(&device.drive_id, &nothing, cancel)?)
            }
            Contents::Copied(copied) => Some(staging.describe_disk(copied, cancel)?),
            Contents::Layers(stack) => Some(staging.write_disk(&device.drive_id, &stack.flattened(), cancel)?),
        };
        written.push(DriveDevice { held, ..device });
    }
    Ok(written)
}

/// Folds frozen layers, for the devices to take over: each with the number of its disk. A failure costs time when the disk
/// is read, and the next snapshot, whether it succeeds or not, tries again.
pub fn fold(layers: &[Layers], cancel: &AtomicBool) -> Vec<(usize, Folded)> {
    let mut folded = Vec::new();
    for Layers { number, drive_id, stack } in layers {
        match stack.fold(cancel) {
            Ok(result) => folded.extend(result.map(|result| (*number, result))),
            Err(e) => tracing::warn!("drive {drive_id}: the overlay's layers stay apart: {e}"),
        }
    }
    folded
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsString;
    use std::os::unix::ffi::OsStringExt;

    #[test]
    fn a_path_that_a_manifest_cannot_hold_is_refused() {
        let drive = serde_json::from_str(r#"{"drive_id":"a","path_on_host":"d"}"#).unwrap();
        let image = |path: &[u8]| {
            Some(ImageFacts { path: OsString::from_vec(path.to_vec()).into(), size: 512, modified_ns: None })
        };
        assert_eq!(describe(&drive, 512, image(b"/d")).unwrap().image.unwrap().path, "/d");
        assert!(describe(&drive, 512, image(b"/\xff")).unwrap_err().to_string().contains("UTF-8"));
    }
}
