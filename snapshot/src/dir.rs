//! Files of one directory, reached through its descriptor: a directory that is renamed or replaced while it is being
//! read or written cannot mix two snapshots.

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, RawDir, SeekFrom};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// What the system said, and what can be done about it where that is not plain.
pub fn told(source: &io::Error) -> String {
    match Errno::from_io_error(source) {
        Some(Errno::MFILE) => {
            format!("{source}; this process may open no more: raise its limit (ulimit -n, or LimitNOFILE= of its unit)")
        }
        Some(Errno::NFILE) => format!("{source}; the host may open no more: raise its limit (sysctl fs.file-max)"),
        _ => source.to_string(),
    }
}

/// Why a file of a snapshot cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file is not there.
    #[error(
        "{path} is missing: the snapshot is incomplete; copy the whole directory again or create the snapshot anew"
    )]
    Missing {
        /// Which file.
        path: PathBuf,
    },
    /// It is a link, a directory, a socket, a device or the like.
    #[error("{path} is not a regular file; links are not followed inside a snapshot: put the file itself there")]
    NotRegular {
        /// Which file.
        path: PathBuf,
    },
    /// The system refused.
    #[error("cannot read {path}: {}", told(.source))]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It is longer than any such file can be.
    #[error("{path} has {found} bytes, more than the {limit} that such a file can have: it belongs to no snapshot")]
    TooLong {
        /// Which file.
        path: PathBuf,
        /// Its length, in bytes.
        found: u64,
        /// The longest accepted, in bytes.
        limit: u64,
    },
    /// Its length is not the one that the manifest implies.
    #[error(
        "{path} has {found} bytes and should have {expected}: it was cut short or replaced; copy the snapshot again"
    )]
    WrongSize {
        /// Which file.
        path: PathBuf,
        /// Its length, in bytes.
        found: u64,
        /// The length that it should have, in bytes.
        expected: u64,
    },
}

/// How a directory is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lock {
    /// Others may have it locked in the same way.
    Shared,
    /// Nobody else has it locked.
    Exclusive,
}

/// An open directory.
#[derive(Debug)]
pub(crate) struct Dir {
    fd: OwnedFd,
    path: PathBuf,
}

impl AsFd for Dir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Dir {
    pub(crate) fn open(path: &Path) -> io::Result<Dir> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Dir { fd: rustix::fs::open(path, flags, Mode::empty())?, path: path.to_owned() })
    }

    /// Opens a directory in this one; not through a link.
    pub(crate) fn open_dir(&self, name: impl AsRef<OsStr>) -> io::Result<Dir> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.fd, name.as_ref(), flags, Mode::empty())?;
        Ok(Dir { fd, path: self.path.join(name.as_ref()) })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Path of a file of this directory, for messages.
    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Whether there is anything of this name.
    pub(crate) fn has_file(&self, name: &str) -> bool {
        rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    /// Opens a regular file for reading and returns its length, in bytes.
    pub(crate) fn open_file(&self, name: &str) -> Result<(File, u64), FileError> {
        // NONBLOCK: opening a FIFO must not wait for a writer. It means nothing for regular files.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let read = |source: io::Error| match Errno::from_io_error(&source) {
            Some(Errno::NOENT) => FileError::Missing { path: self.join(name) },
            // A link; a socket, or a device that is not there.
            Some(Errno::LOOP | Errno::NXIO | Errno::NODEV) => FileError::NotRegular { path: self.join(name) },
            _ => FileError::Read { path: self.join(name), source },
        };
        let file = File::from(rustix::fs::openat(&self.fd, name, flags, Mode::empty()).map_err(|e| read(e.into()))?);
        let metadata = file.metadata().map_err(read)?;
        if !metadata.is_file() {
            return Err(FileError::NotRegular { path: self.join(name) });
        }
        Ok((file, metadata.len()))
    }

    /// Opens a regular file of a known length.
    pub(crate) fn open_sized(&self, name: &str, expected: u64) -> Result<File, FileError> {
        match self.open_file(name)? {
            (file, len) if len == expected => Ok(file),
            (_, found) => Err(FileError::WrongSize { path: self.join(name), found, expected }),
        }
    }

    /// Reads a whole file of at most `limit` bytes.
    pub(crate) fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>, FileError> {
        let (file, found) = self.open_file(name)?;
        if found > limit {
            return Err(FileError::TooLong { path: self.join(name), found, limit });
        }
        self.read_open(name, &file, found)
    }

    /// Reads a whole file whose length is known.
    pub(crate) fn read_sized(&self, name: &str, expected: u64) -> Result<Vec<u8>, FileError> {
        let file = self.open_sized(name, expected)?;
        self.read_open(name, &file, expected)
    }

    fn read_open(&self, name: &str, file: &File, expected: u64) -> Result<Vec<u8>, FileError> {
        let mut bytes = Vec::with_capacity(expected as usize);
        let mut bounded = file.take(expected);
        bounded.read_to_end(&mut bytes).map_err(|source| FileError::Read { path: self.join(name), source })?;
        if bytes.len() as u64 != expected {
            return Err(FileError::WrongSize { path: self.join(name), found: bytes.len() as u64, expected });
        }
        Ok(bytes)
    }

    /// Reads a whole file whose length and BLAKE3, in hex, are known; `None` if it has another digest.
    pub(crate) fn read_digested(&self, name: &str, expected: u64, digest: &str) -> Result<Option<Vec<u8>>, FileError> {
        let bytes = self.read_sized(name, expected)?;
        Ok((blake3::hash(&bytes).to_hex().as_str() == digest).then_some(bytes))
    }

    /// Creates a file that only its owner may read and write. It must not exist.
    pub(crate) fn create_file(&self, name: &str) -> io::Result<File> {
        self.create(name, OFlags::WRONLY)
    }

    /// The same, open for reading as well.
    pub(crate) fn create_file_to_read(&self, name: &str) -> io::Result<File> {
        self.create(name, OFlags::RDWR)
    }

    fn create(&self, name: &str, access: OFlags) -> io::Result<File> {
        let flags = access | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(File::from(rustix::fs::openat(&self.fd, name, flags, Mode::RUSR | Mode::WUSR)?))
    }

    /// Creates a file with these contents and syncs it.
    pub(crate) fn write_file(&self, name: &str, contents: &[u8]) -> io::Result<()> {
        let mut file = self.create_file(name)?;
        file.write_all(contents)?;
        file.sync_all()
    }

    /// Puts a file with these contents in the place of one of this name, or of none: whoever reads sees the old one or this,
    /// whole.
    pub(crate) fn replace_file(&self, name: &str, contents: &[u8]) -> io::Result<()> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let temporary = format!(".{name}.{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        // One that a killed process of this number has left.
        let _ = self.remove_file(&temporary);
        let written = self.write_file(&temporary, contents).and_then(|()| self.rename(&temporary, name));
        if written.is_err() {
            let _ = self.remove_file(&temporary);
        }
        written
    }

    pub(crate) fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(rustix::fs::renameat(&self.fd, from, &self.fd, to)?)
    }

    pub(crate) fn remove_file(&self, name: impl AsRef<OsStr>) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.fd, name.as_ref(), AtFlags::empty())?)
    }

    /// Removes an empty directory in this one.
    pub(crate) fn remove_dir(&self, name: impl AsRef<OsStr>) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.fd, name.as_ref(), AtFlags::REMOVEDIR)?)
    }

    /// Removes every file in this directory, as far as that goes.
    pub(crate) fn clear(&self) {
        // Through this descriptor, as there may be none left for another.
        let mut buf = Vec::with_capacity(4096);
        loop {
            let _ = rustix::fs::seek(&self.fd, SeekFrom::Start(0));
            let mut entries = RawDir::new(&self.fd, buf.spare_capacity_mut());
            let mut has_removed = false;
            while let Some(Ok(entry)) = entries.next() {
                has_removed |= rustix::fs::unlinkat(&self.fd, entry.file_name(), AtFlags::empty()).is_ok();
            }
            // Names may be passed over where others go meanwhile.
            if !has_removed {
                return;
            }
        }
    }

    /// Locks the directory as long as this value is open; false if somebody else has it locked so that it cannot be. Where there are
    /// no locks nobody can be asked, and it counts as locked.
    pub(crate) fn lock(&self, how: Lock) -> Result<bool, Errno> {
        let operation = match how {
            Lock::Shared => FlockOperation::NonBlockingLockShared,
            Lock::Exclusive => FlockOperation::NonBlockingLockExclusive,
        };
        match (rustix::fs::flock(&self.fd, operation), how) {
            // Some network file systems lock exclusively only what is open for writing, as no directory is.
            (Ok(()) | Err(Errno::OPNOTSUPP), _) | (Err(Errno::BADF), Lock::Exclusive) => Ok(true),
            (Err(Errno::WOULDBLOCK), _) => Ok(false),
            (Err(e), _) => Err(e),
        }
    }

    /// Whether two open directories are one.
    pub(crate) fn is_same(&self, other: &Dir) -> bool {
        let id = self.id();
        id.is_ok() && id == other.id()
    }

    /// Whether this is what has that name in another directory.
    pub(crate) fn is_named(&self, parent: &Dir, name: impl AsRef<OsStr>) -> bool {
        let there = rustix::fs::statat(&parent.fd, name.as_ref(), AtFlags::SYMLINK_NOFOLLOW);
        let id = self.id();
        id.is_ok() && id == there.map(|stat| (stat.st_dev, stat.st_ino))
    }

    fn id(&self) -> Result<(u64, u64), Errno> {
        rustix::fs::fstat(&self.fd).map(|stat| (stat.st_dev, stat.st_ino))
    }

    pub(crate) fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::fsync(&self.fd)?)
    }
}
