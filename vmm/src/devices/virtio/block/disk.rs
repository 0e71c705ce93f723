//! What lies behind a disk of the guest: an image on the host, or an overlay over one.

use super::overlay::{Folded, Overlay, OverlayMark, Stack};
use super::request::SECTOR;
use rustix::fs::{FallocateFlags, FlockOperation, Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use snapshot::FILE_TIME_GRANULARITY;
use snapshot::clusters::CLUSTER_BYTES;
use snapshot::disk::Held;
use snapshot::manifest::MAX_DISK_BYTES;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How many zeros are written at a time where the host cannot make them otherwise, in bytes.
const ZEROS: usize = 64 * 1024;

/// Why there is no disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The image cannot be opened.
    #[error("drive {id}: cannot open {path} for {access}: {source}")]
    Open {
        /// The disk.
        id: String,
        /// The image.
        path: PathBuf,
        /// What for.
        access: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The image is a directory, or the like.
    #[error("drive {id}: {path} is neither a regular file nor a block device")]
    Kind {
        /// The disk.
        id: String,
        /// The image.
        path: PathBuf,
    },
    /// A snapshot names a device of the host.
    #[error(
        "drive {id}: the snapshot names {path}, which is no regular file; if you trust it with that device, name it yourself (drive_overrides, --drive {id}={path})"
    )]
    Device {
        /// The disk.
        id: String,
        /// The image.
        path: PathBuf,
    },
    /// The image has no size that a disk can have.
    #[error("drive {id}: {path} has {size} bytes; a disk has a multiple of 512, at least one and at most 64 TiB")]
    Size {
        /// The disk.
        id: String,
        /// The image.
        path: PathBuf,
        /// Its size, in bytes.
        size: u64,
    },
    /// Somebody else has it.
    #[error(
        "drive {id}: {path} is in use by another VM, or by another drive of this one; any number may read an image, but who writes it must be alone: `overlay` lets VMs share it"
    )]
    InUse {
        /// The disk.
        id: String,
        /// The image.
        path: PathBuf,
    },
    /// It is not the one that the snapshot was taken over.
    #[error(
        "drive {id}: the image {path} was changed since the snapshot ({what}); bring the old one back, or name another path (drive_overrides, --drive)"
    )]
    Changed {
        /// The disk.
        id: String,
        /// The image.
        path: PathBuf,
        /// What differs.
        what: String,
    },
    /// An image that was handed on cannot be used.
    #[error("drive {id}: the image {path} that comes with the clone is of no use: {problem}")]
    HandedOn {
        /// The disk.
        id: String,
        /// The image.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// There is no room for the overlay.
    #[error("drive {id}: cannot make the overlay's file in {dir}: {source}; TMPDIR names another directory")]
    Scratch {
        /// The disk.
        id: String,
        /// The directory.
        dir: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// What is known of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageFacts {
    /// Its path.
    pub path: PathBuf,
    /// Its size, in bytes.
    pub size: u64,
    /// When it was last changed, in nanoseconds since the Unix epoch, unless it is a block device.
    pub modified_ns: Option<i64>,
}

/// An image of the host that is open and locked. Copies of this share the lock.
#[derive(Clone, Debug)]
pub struct Image {
    file: Arc<File>,
    facts: ImageFacts,
}

impl Image {
    /// Opens the image of the disk `id` and locks it: for any number of readers, or for one writer.
    pub fn open(id: &str, path: &Path, writable: bool) -> Result<Image, DiskError> {
        Image::open_if(id, path, writable, |kind| kind.is_file() || kind.is_block_device())
    }

    /// Opens an image that a snapshot names, for reading: a regular file, since opening a device may have an effect, and
    /// what it holds may be none of the snapshot's business.
    pub fn open_named(id: &str, path: &Path) -> Result<Image, DiskError> {
        Image::open_if(id, path, false, std::fs::FileType::is_file).map_err(|e| match e {
            DiskError::Kind { id, path } => DiskError::Device { id, path },
            other => other,
        })
    }

    fn open_if(
        id: &str,
        path: &Path,
        writable: bool,
        fits: impl Fn(&std::fs::FileType) -> bool,
    ) -> Result<Image, DiskError> {
        let (id, path) = (id.to_owned(), path.to_owned());
        let (access, flags) = if writable { ("writing", OFlags::RDWR) } else { ("reading", OFlags::RDONLY) };
        let failed = |source: io::Error| DiskError::Open { id: id.clone(), path: path.clone(), access, source };
        // What it is can be seen without opening it in earnest, which a device may take for a command.
        let place = rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
        let place = File::from(place.map_err(|e| failed(e.into()))?);
        if !fits(&place.metadata().map_err(failed)?.file_type()) {
            return Err(DiskError::Kind { id, path });
        }
        // The same file, whatever has become of its path.
        let again = format!("/proc/self/fd/{}", place.as_raw_fd());
        let opened = rustix::fs::open(again, flags | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty());
        let file = File::from(opened.map_err(|e| failed(e.into()))?);
        let lock =
            if writable { FlockOperation::NonBlockingLockExclusive } else { FlockOperation::NonBlockingLockShared };
        match rustix::fs::flock(&file, lock) {
            // Where there are no locks nobody can be asked.
            Ok(()) | Err(Errno::OPNOTSUPP) => {}
            Err(Errno::WOULDBLOCK) => return Err(DiskError::InUse { id, path }),
            Err(e) => return Err(failed(e.into())),
        }
        // Not before it is locked: until then whoever had it may have changed it.
        settle(&file).map_err(failed)?;
        let size = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|e| failed(e.into()))?;
        if size == 0 || !size.is_multiple_of(SECTOR) || size > MAX_DISK_BYTES {
            return Err(DiskError::Size { id, path, size });
        }
        let modified_ns = modified_ns(&file).map_err(failed)?;
        let path = std::path::absolute(&path).map_err(failed)?;
        Ok(Image { file: Arc::new(file), facts: ImageFacts { path, size, modified_ns } })
    }

    /// The image of the disk `id` that another vmm has opened for reading and locked, if it is what these facts say.
    pub fn handed_on(id: &str, file: File, facts: ImageFacts) -> Result<Image, DiskError> {
        let bad = |problem: String| DiskError::HandedOn { id: id.to_owned(), path: facts.path.clone(), problem };
        let failed = |e: io::Error| bad(e.to_string());
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(bad("it is neither a regular file nor a block device".into()));
        }
        let size = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|e| failed(e.into()))?;
        if size != facts.size {
            return Err(bad(format!("it has {size} bytes, and should have {}", facts.size)));
        }
        if modified_ns(&file).map_err(failed)? != facts.modified_ns {
            return Err(bad("somebody has written to it".into()));
        }
        Ok(Image { file: Arc::new(file), facts })
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// What was known of it when it was opened.
    pub fn facts(&self) -> &ImageFacts {
        &self.facts
    }

    /// Whether it is still as it was when it was opened, as far as its times tell.
    pub fn is_unchanged(&self) -> io::Result<bool> {
        Ok(modified_ns(&self.file)? == self.facts.modified_ns)
    }
}

/// Waits, for 20 ms at most, until a change from now on leaves another time than the last one did.
fn settle(file: &File) -> io::Result<()> {
    let metadata = file.metadata()?;
    if let Ok(age) = metadata.modified()?.elapsed()
        && metadata.is_file()
    {
        std::thread::sleep(FILE_TIME_GRANULARITY.saturating_sub(age));
    }
    Ok(())
}

fn modified_ns(file: &File) -> io::Result<Option<i64>> {
    let metadata = file.metadata()?;
    let ns = || metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec());
    Ok(metadata.is_file().then(ns))
}

/// A disk.
#[derive(Debug)]
pub struct Disk {
    size: u64,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// The image itself.
    Raw { image: Image, writable: bool },
    /// What is written goes elsewhere. Without an image all of the disk is in the overlay's layers.
    Overlay { image: Option<Image>, overlay: Overlay },
}

/// What a snapshot needs of a disk, gathered while the guest stands still.
#[derive(Debug)]
pub enum Frozen {
    /// Nothing but the facts on its image.
    Image(ImageFacts),
    /// Layers that do not change, over an image if it has facts.
    Layers(Option<ImageFacts>, Stack),
    /// The guest writes this file: it must be copied before the guest goes on. The facts are those of now.
    Writable(ImageFacts, Arc<File>),
}

impl Disk {
    /// None: there is nothing to be read.
    pub fn absent() -> io::Result<Disk> {
        let file = rustix::fs::memfd_create("coppice-absent", rustix::fs::MemfdFlags::CLOEXEC)?;
        let facts = ImageFacts { path: PathBuf::new(), size: 0, modified_ns: None };
        Ok(Disk::raw(Image { file: Arc::new(file.into()), facts }, false))
    }

    /// The image itself.
    pub fn raw(image: Image, writable: bool) -> Disk {
        Disk { size: image.facts.size, kind: Kind::Raw { image, writable } }
    }

    /// An overlay for the disk `id`, of `size` bytes, over what others have written, the oldest first, over `image`.
    pub fn overlay(
        id: &str,
        size: u64,
        image: Option<Image>,
        held: impl IntoIterator<Item = Held>,
    ) -> Result<Disk, DiskError> {
        let dir = scratch_dir();
        let failed = |source| DiskError::Scratch { id: id.to_owned(), dir: dir.clone(), source };
        let base = image.as_ref().map(|image| image.file.clone());
        let overlay = Overlay::new(size, base, held, dir.clone()).map_err(failed)?;
        Ok(Disk { size, kind: Kind::Overlay { image, overlay } })
    }

    /// Its size, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether the guest cannot write it.
    pub fn is_read_only(&self) -> bool {
        matches!(self.kind, Kind::Raw { writable: false, .. })
    }

    /// How many bytes of this VM's own the overlay holds.
    pub fn private_bytes(&self) -> u64 {
        match &self.kind {
            Kind::Raw { .. } => 0,
            Kind::Overlay { overlay, .. } => overlay.private_clusters() * CLUSTER_BYTES,
        }
    }

    /// How many bytes more the overlay will hold once these are written.
    pub fn growth(&self, offset: u64, len: u64) -> u64 {
        match &self.kind {
            Kind::Raw { .. } => 0,
            Kind::Overlay { overlay, .. } => overlay.growth(offset, len) * CLUSTER_BYTES,
        }
    }

    /// The same, once these are made zero: parts of clusters at both ends are written.
    pub fn zero_growth(&self, offset: u64, len: u64) -> u64 {
        let end = offset + len;
        let (first, last) = (offset.next_multiple_of(CLUSTER_BYTES).min(end), end - end % CLUSTER_BYTES);
        match last {
            _ if first >= end => self.growth(offset, len),
            _ if end == self.size => self.growth(offset, first - offset),
            _ => self.growth(offset, first - offset) + self.growth(last, end - last),
        }
    }

    /// Reads the bytes at `offset` until `buf` is full.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        match &self.kind {
            Kind::Raw { image, .. } => image.file.read_exact_at(buf, offset),
            Kind::Overlay { overlay, .. } => overlay.read(offset, buf),
        }
    }

    /// Writes `data` at `offset`.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        match &mut self.kind {
            Kind::Raw { image, .. } => image.file.write_all_at(data, offset),
            Kind::Overlay { overlay, .. } => overlay.write(offset, data),
        }
    }

    /// Has on the host's disk what was written. An overlay ends with its VM, so it has nothing to keep.
    pub fn flush(&self) -> io::Result<()> {
        match &self.kind {
            Kind::Raw { image, writable: true } => image.file.sync_data(),
            _ => Ok(()),
        }
    }

    /// Gives space back that the guest no longer needs, as far as that can be done.
    pub fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        match &mut self.kind {
            Kind::Raw { image, .. } => match punch(&image.file, offset, len) {
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
                other => other.map_err(io::Error::from),
            },
            Kind::Overlay { overlay, .. } => {
                overlay.discard(offset, len);
                Ok(())
            }
        }
    }

    /// Makes bytes zero; with `unmap` their space may be given back.
    pub fn zero(&mut self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let Kind::Raw { image, .. } = &mut self.kind else {
            let Kind::Overlay { overlay, .. } = &mut self.kind else { return Ok(()) };
            return overlay.zero(offset, len);
        };
        let done = match unmap {
            true => punch(&image.file, offset, len),
            false if len == 0 => Ok(()),
            false => rustix::fs::fallocate(&*image.file, FallocateFlags::ZERO_RANGE, offset, len),
        };
        match done {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => write_zeros(&image.file, offset, len),
            other => other.map_err(io::Error::from),
        }
    }

    /// What a snapshot needs. The guest must stand still.
    pub fn freeze(&mut self) -> io::Result<Frozen> {
        Ok(match &mut self.kind {
            Kind::Raw { image, writable: true } => {
                let facts = ImageFacts { modified_ns: modified_ns(&image.file)?, ..image.facts.clone() };
                Frozen::Writable(facts, image.file.clone())
            }
            Kind::Raw { image, writable: false } => Frozen::Image(unchanged(image)?.facts.clone()),
            Kind::Overlay { image, overlay } => {
                let image = image.as_ref().map(unchanged).transpose()?;
                Frozen::Layers(image.map(|image| image.facts.clone()), overlay.freeze()?)
            }
        })
    }

    /// Has nobody write any more what is there, for clones to read it. Returns the image, if there is one; the layers are the
    /// [frozen](Disk::frozen_layers) ones. The guest must stand still.
    pub fn share(&mut self) -> io::Result<Option<Image>> {
        match &mut self.kind {
            Kind::Raw { writable: true, .. } => {
                Err(io::Error::other("the guest writes its image itself; give it an overlay (`overlay`)"))
            }
            Kind::Raw { image, writable: false } => Ok(Some(unchanged(image)?.clone())),
            Kind::Overlay { image, overlay } => {
                let image = image.as_ref().map(unchanged).transpose()?;
                overlay.share()?;
                Ok(image.cloned())
            }
        }
    }

    /// Remembers what the disk is now, in place of what was remembered before; nothing of a disk that cannot be written. For
    /// `may_fold` see [`Overlay::mark`].
    pub fn mark(&mut self, may_fold: bool) -> io::Result<Option<OverlayMark>> {
        match &mut self.kind {
            Kind::Raw { writable: false, .. } => Ok(None),
            Kind::Raw { writable: true, .. } => Err(io::Error::other(
                "the guest writes its image itself, which cannot be undone; give it an overlay (`overlay`)",
            )),
            Kind::Overlay { overlay, .. } => overlay.mark(may_fold).map(Some),
        }
    }

    /// Nobody comes back to what was remembered.
    pub fn unmark(&mut self) {
        if let Kind::Overlay { overlay, .. } = &mut self.kind {
            overlay.unmark();
        }
    }

    /// Brings the disk back to what was remembered.
    pub fn rewind(&mut self, mark: &OverlayMark) -> io::Result<()> {
        match &mut self.kind {
            Kind::Raw { .. } => Ok(()),
            Kind::Overlay { overlay, .. } => overlay.rewind(mark),
        }
    }

    /// The layers below the one that is written; `None` for a disk without layers.
    pub fn frozen_layers(&self) -> Option<Stack> {
        match &self.kind {
            Kind::Raw { .. } => None,
            Kind::Overlay { overlay, .. } => Some(overlay.frozen()),
        }
    }

    /// Takes over the result of [`Stack::fold`] or [`Stack::merge`].
    pub fn adopt(&mut self, folded: &Folded) {
        if let Kind::Overlay { overlay, .. } = &mut self.kind {
            overlay.adopt(folded);
        }
    }
}

/// An image that is as it was when it was opened.
fn unchanged(image: &Image) -> io::Result<&Image> {
    match image.is_unchanged()? {
        true => Ok(image),
        false => Err(io::Error::other(format!(
            "somebody has written to its image {} while it was in use",
            image.facts.path.display()
        ))),
    }
}

/// Where overlays are kept: TMPDIR, or /var/tmp, since /tmp is often in memory.
fn scratch_dir() -> PathBuf {
    match std::env::var_os("TMPDIR") {
        Some(dir) if !dir.is_empty() => dir.into(),
        _ => "/var/tmp".into(),
    }
}

/// Makes a hole. A block device takes that for a range of zeros.
fn punch(file: &File, offset: u64, len: u64) -> Result<(), Errno> {
    // The kernel takes no empty range.
    if len == 0 {
        return Ok(());
    }
    rustix::fs::fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)
}

fn write_zeros(file: &File, mut offset: u64, len: u64) -> io::Result<()> {
    let (zeros, end) = ([0; ZEROS], offset + len);
    while offset < end {
        let piece = (end - offset).min(ZEROS as u64);
        file.write_all_at(&zeros[..piece as usize], offset)?;
        offset += piece;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::{TempDir, tempdir};

    fn image(dir: &TempDir, size: u64) -> PathBuf {
        let path = dir.path().join("disk.img");
        File::create(&path).unwrap().set_len(size).unwrap();
        path
    }

    #[test]
    fn what_is_no_disk_is_refused_by_name() {
        let dir = tempdir().unwrap();
        let refused = |path: &Path, writable| Image::open("a", path, writable).unwrap_err();
        assert!(matches!(refused(&dir.path().join("none"), false), DiskError::Open { .. }));
        for writable in [false, true] {
            assert!(matches!(refused(dir.path(), writable), DiskError::Kind { .. }));
            assert!(matches!(refused(Path::new("/dev/null"), writable), DiskError::Kind { .. }));
        }
        for named in [dir.path(), Path::new("/dev/null")] {
            assert!(matches!(Image::open_named("a", named), Err(DiskError::Device { .. })));
        }
        for size in [0, 511, 513, MAX_DISK_BYTES + 512] {
            // A file system may have no files as large as the last.
            let path = dir.path().join("odd");
            if File::create(&path).unwrap().set_len(size).is_ok() {
                assert!(matches!(refused(&path, true), DiskError::Size { size: named, .. } if named == size));
            }
        }
    }

    #[test]
    fn one_writes_or_many_read() {
        let dir = tempdir().unwrap();
        let path = image(&dir, 4096);
        let in_use = |writable| matches!(Image::open("a", &path, writable), Err(DiskError::InUse { .. }));
        let writer = Image::open("a", &path, true).unwrap();
        assert!(in_use(true) && in_use(false));
        drop(writer);
        let _readers = [Image::open("a", &path, false).unwrap(), Image::open("b", &path, false).unwrap()];
        assert!(in_use(true));
    }

    #[test]
    fn a_raw_disk_reads_what_was_written_and_zeroed() {
        let dir = tempdir().unwrap();
        let path = image(&dir, 64 * 1024);
        let mut disk = Disk::raw(Image::open("a", &path, true).unwrap(), true);
        disk.write(512, &[7; 60 * 1024]).unwrap();
        disk.zero(1024, 8192, true).unwrap();
        disk.zero(20 * 1024, 512, false).unwrap();
        disk.zero(0, 0, false).unwrap();
        disk.discard(0, 0).unwrap();
        write_zeros(&File::options().write(true).open(&path).unwrap(), 40 * 1024, 512).unwrap();
        disk.flush().unwrap();
        let mut bytes = vec![1; 64 * 1024];
        disk.read(0, &mut bytes).unwrap();
        let mut wanted = vec![0; 64 * 1024];
        wanted[512..512 + 60 * 1024].fill(7);
        for (at, len) in [(1024, 8192), (20 * 1024, 512), (40 * 1024, 512)] {
            wanted[at..at + len].fill(0);
        }
        assert!(bytes == wanted);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 64 * 1024);
        assert!(matches!(disk.freeze().unwrap(), Frozen::Writable(..)));
    }

    #[test]
    fn an_image_that_was_written_meanwhile_is_not_snapshotted() {
        let dir = tempdir().unwrap();
        let path = image(&dir, 4096);
        let mut disk = Disk::overlay("a", 4096, Some(Image::open("a", &path, false).unwrap()), None).unwrap();
        assert!(matches!(disk.freeze().unwrap(), Frozen::Layers(Some(_), _)));
        // At once, although the image had only just been made.
        File::options().write(true).open(&path).unwrap().write_all_at(b"x", 0).unwrap();
        assert!(disk.freeze().unwrap_err().to_string().contains("disk.img"));
    }

    #[test]
    fn growth_by_zeros_is_that_of_the_ends() {
        let mut disk = Disk::overlay("a", 10 * 4096 - 512, None, None).unwrap();
        for (offset, len) in
            [(0, 4096), (512, 512), (512, 4096), (4096 * 3 + 512, 4096 * 4), (8 * 4096, 2 * 4096 - 512)]
        {
            let expected = disk.private_bytes() + disk.zero_growth(offset, len);
            disk.zero(offset, len, true).unwrap();
            assert!(disk.private_bytes() <= expected, "{offset} {len}");
        }
    }
}
