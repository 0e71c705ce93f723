//! A directory that keeps what was fetched, for later and for other servers of this host.
//!
//! Each image has one sparse file, named by its root digest, in which every chunk has its place. There is no list of what is
//! there: a chunk is there if its bytes have the right digest, so that nothing that happens to the file (a crash, a bad disk, two
//! servers that write at once) can make it wrong, and nothing need be synced. A hole reads as zeros, which are never kept.
//!
//! Servers that use a file hold a shared lock on it; one that is locked by nobody may be removed for want of room.

use super::room::{self, Entry};
use crate::options::CacheSettings;
use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, Timespec, Timestamps, UTIME_NOW};
use rustix::io::{Errno, ReadWriteFlags};
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// What the name of each file ends with, after the root digest.
const SUFFIX: &str = ".mem";
/// Bytes in the blocks in which `stat` counts.
const STAT_BLOCK: u64 = 512;
/// Attempts at a file that others remove at the same moment.
const OPEN_ATTEMPTS: u32 = 10;
/// How long a cache that is full is left alone.
const FULL_FOR: Duration = Duration::from_secs(60);

/// Why a directory cannot be the cache.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// It cannot be made or opened.
    #[error("cannot use {path} as a cache: {source}; name another directory with --cache-dir, or leave that out")]
    Open {
        /// The directory, or a file in it.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Others might write there.
    #[error(
        "cannot use {0} as a cache: it must belong to the user of the page server, and nobody else may write there (`chmod 700`)"
    )]
    NotOwn(PathBuf),
    /// A file of the cache is none.
    #[error("cannot use {0} in the cache: it is not a plain file of the user of the page server; remove it")]
    NotPlain(PathBuf),
}

/// The directory.
#[derive(Debug)]
pub struct DiskCache {
    dir: OwnedFd,
    path: PathBuf,
    most: u64,
    room: Mutex<Room>,
}

/// What may still be written.
#[derive(Debug, Default)]
struct Room {
    granted: u64,
    full_since: Option<Instant>,
    /// Writing failed: nothing more is written.
    closed: bool,
}

impl DiskCache {
    /// Opens the directory, and makes it if it is not there.
    pub fn open(settings: &CacheSettings) -> Result<DiskCache, CacheError> {
        let path = &settings.dir;
        let failed = |error: Errno| CacheError::Open { path: path.clone(), source: error.into() };
        match rustix::fs::mkdir(path, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(failed(error)),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = rustix::fs::open(path, flags, Mode::empty()).map_err(failed)?;
        let stat = rustix::fs::fstat(&dir).map_err(failed)?;
        if !is_own(stat.st_uid) || stat.st_mode & 0o022 != 0 {
            return Err(CacheError::NotOwn(path.clone()));
        }
        rustix::fs::accessat(&dir, ".", rustix::fs::Access::WRITE_OK, AtFlags::EACCESS).map_err(failed)?;
        Ok(DiskCache { dir, path: path.clone(), most: settings.max_bytes, room: Mutex::default() })
    }

    /// The file of an image; `root` is 64 hexadecimal digits.
    pub fn image(self: &Arc<Self>, root: &str, size: u64) -> Result<CachedImage, CacheError> {
        let name = format!("{root}{SUFFIX}");
        let failed = |source: io::Error| CacheError::Open { path: self.path.join(&name), source };
        for _ in 0..OPEN_ATTEMPTS {
            let file = self.open_file(&name).map_err(failed)?;
            let metadata = file.metadata().map_err(failed)?;
            if !metadata.is_file() || !is_own(metadata.uid()) {
                return Err(CacheError::NotPlain(self.path.join(&name)));
            }
            let locked = rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared);
            // Somebody removes it, or has just done so: there is, or will be, another one.
            if locked.is_err() || file.metadata().map_err(failed)?.nlink() == 0 {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            if metadata.len() != size {
                file.set_len(size).map_err(failed)?;
            }
            touch(&file);
            return Ok(CachedImage { cache: self.clone(), file });
        }
        Err(failed(io::ErrorKind::ResourceBusy.into()))
    }

    fn open_file(&self, name: &str) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        Ok(File::from(rustix::fs::openat(&self.dir, name, flags, Mode::RUSR | Mode::WUSR)?))
    }

    /// Whether so many bytes may be written now.
    fn reserve(&self, bytes: u64) -> bool {
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        if room.closed || room.full_since.is_some_and(|since| since.elapsed() < FULL_FOR) {
            return false;
        }
        if room.granted < bytes {
            room.granted = room::make_room(self.most, self.entries(), |name| self.remove_unused(name));
        }
        if room.granted < bytes {
            if room.full_since.is_none() {
                tracing::warn!("the cache {} is full: what it does not hold is not kept", self.path.display());
            }
            room.full_since = Some(Instant::now());
            return false;
        }
        room.granted -= bytes;
        true
    }

    /// Nothing is written from now on.
    fn close(&self, error: &io::Error) {
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        if !std::mem::replace(&mut room.closed, true) {
            tracing::warn!("cannot write to the cache {}: {error}; nothing more is kept there", self.path.display());
        }
    }

    /// The files of all images. What cannot be looked at is not counted.
    fn entries(&self) -> Vec<Entry> {
        let Ok(dir) = rustix::fs::Dir::read_from(&self.dir) else { return Vec::new() };
        let entry = |entry: rustix::fs::DirEntry| {
            let name = entry.file_name().to_str().ok()?.to_owned();
            let stat =
                rustix::fs::statat(&self.dir, name.strip_suffix(SUFFIX).map(|_| &*name)?, AtFlags::SYMLINK_NOFOLLOW);
            let stat = stat.ok()?;
            let used = SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(stat.st_mtime).unwrap_or(0));
            Some(Entry { name, bytes: (stat.st_blocks as u64).saturating_mul(STAT_BLOCK), used })
        };
        dir.flatten().filter_map(entry).collect()
    }

    /// Removes a file unless a server uses it. Who has opened it meanwhile notices that it is gone.
    fn remove_unused(&self, name: &str) -> bool {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let Ok(file) = rustix::fs::openat(&self.dir, name, flags, Mode::empty()) else { return false };
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
            && rustix::fs::unlinkat(&self.dir, name, AtFlags::empty()).is_ok()
    }
}

fn is_own(uid: u32) -> bool {
    uid == rustix::process::geteuid().as_raw()
}

/// Notes that a file is used now. Failing makes it look older, no more.
fn touch(file: &File) {
    let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
    let _ = rustix::fs::futimens(file, &Timestamps { last_access: now, last_modification: now });
}

/// The file of one image, locked against removal.
#[derive(Debug)]
pub struct CachedImage {
    cache: Arc<DiskCache>,
    file: File,
}

impl CachedImage {
    /// Reads what is kept at an offset, or might be: it must be checked. False if there is nothing.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> bool {
        self.file.read_exact_at(bytes, offset).is_ok()
    }

    /// The same without waiting for the disk; false also if that would be needed.
    pub fn read_now(&self, offset: u64, bytes: &mut [u8]) -> bool {
        let len = bytes.len();
        let read = rustix::io::preadv2(&self.file, &mut [IoSliceMut::new(bytes)], offset, ReadWriteFlags::NOWAIT);
        read == Ok(len)
    }

    /// Keeps bytes, if there is room.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        if self.cache.reserve(bytes.len() as u64)
            && let Err(error) = self.file.write_all_at(bytes, offset)
        {
            self.cache.close(&error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: &str = "00ff";

    fn open(dir: &tempfile::TempDir, max_bytes: u64) -> Arc<DiskCache> {
        Arc::new(DiskCache::open(&CacheSettings { dir: dir.path().join("cache"), max_bytes }).unwrap())
    }

    #[test]
    fn a_cache_that_cannot_be_written_is_read_all_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(&dir, 1 << 30);
        cache.image(ROOT, 8192).unwrap().write(4096, &[7; 4096]);
        // Stands for a disk that is full: writing fails.
        let file = File::open(cache.path.join("00ff.mem")).unwrap();
        let image = CachedImage { cache: cache.clone(), file };
        image.write(0, &[8; 4096]);
        assert!(cache.room.lock().unwrap().closed);
        let mut bytes = [0; 4096];
        assert!(image.read(4096, &mut bytes) && bytes == [7; 4096]);
        assert!(image.read(0, &mut bytes) && bytes == [0; 4096]);
        assert!(!cache.reserve(1), "nothing more is written");
    }

    #[test]
    fn a_file_that_is_used_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, theirs) = (open(&dir, 1 << 30), open(&dir, 1 << 30));
        let image = ours.image(ROOT, 8192).unwrap();
        assert!(!theirs.remove_unused("00ff.mem"));
        drop(image);
        assert!(theirs.remove_unused("00ff.mem"));
        assert!(theirs.entries().is_empty());
        // It is made anew for whoever wants it then.
        ours.image(ROOT, 8192).unwrap().write(0, &[1; 4096]);
        assert_eq!(theirs.entries().len(), 1);
    }

    #[test]
    fn only_files_of_the_cache_are_counted() {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(&dir, 1 << 30);
        std::fs::write(cache.path.join("other"), [1; 8192]).unwrap();
        assert!(cache.entries().is_empty());
    }
}
