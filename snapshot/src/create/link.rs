//! A second name for the memory file, outside of the snapshot, for whoever looks for it there: a hard link.

use super::CreateError;
use crate::dir::Dir;
use crate::file;
use rustix::fs::{AtFlags, CWD, linkat, statat, unlinkat};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Made and removed when a link is planned.
const PROBE: &str = "probe";
/// Where a link is that was made while the snapshot is not complete: for whoever removes what a killed process has left.
const NOTE: &str = "mem.link";
/// Longest such note, in bytes: no path is longer.
const MAX_NOTE: u64 = 4096;

/// A link that is to be made, or was: dropping it removes it again, until it is kept.
#[derive(Debug)]
pub(super) struct Link {
    /// The directory that it goes into.
    parent: Dir,
    name: OsString,
    path: PathBuf,
    made: bool,
}

impl Link {
    /// Plans a link at `path` to a file of `staging`, which is a directory of its name in its parent. What would stand in the
    /// way then does so now.
    pub(super) fn plan(path: &Path, staging: &Dir) -> Result<Link, CreateError> {
        let failed = |source| CreateError::Link { path: path.to_owned(), source };
        let name = path.file_name().ok_or_else(|| failed(Errno::ISDIR.into()))?.to_owned();
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let parent = Dir::open(parent).map_err(failed)?;
        let link = Link { parent, name, path: path.to_owned(), made: false };
        match statat(&link.parent, &link.name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => {}
            Err(e) => return Err(failed(e.into())),
            Ok(_) => return Err(CreateError::LinkExists { path: path.to_owned() }),
        }
        link.probe(staging).map_err(failed)?;
        Ok(link)
    }

    /// Whether a link from there to here can be made at all: only making one tells.
    fn probe(&self, staging: &Dir) -> std::io::Result<()> {
        drop(staging.create_file(PROBE)?);
        // Unlike any other: that of the staging directory, which is locked, and more.
        let mut name = staging.path().file_name().unwrap_or(OsStr::new(".coppice")).to_owned();
        name.push(".probe");
        let made = linkat(staging, PROBE, &self.parent, &name, AtFlags::empty());
        if made.is_ok() {
            let _ = unlinkat(&self.parent, &name, AtFlags::empty());
        }
        let removed = staging.remove_file(PROBE);
        made?;
        removed
    }

    /// Whether it is the entry of this name in this directory.
    pub(super) fn is(&self, parent: &Dir, name: &[u8]) -> bool {
        self.name.as_bytes() == name && parent.is_same(&self.parent)
    }

    /// Where it is, for messages.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes it, so that it survives a power cut.
    pub(super) fn make(&mut self, staging: &Dir) -> Result<(), CreateError> {
        let noted = std::path::absolute(&self.path)
            .and_then(|path| staging.write_file(NOTE, path.as_os_str().as_bytes()))
            .and_then(|()| staging.sync());
        noted.map_err(|source| CreateError::Write { path: staging.join(NOTE), source })?;
        match linkat(staging, file::MEMORY, &self.parent, &self.name, AtFlags::empty()) {
            Ok(()) => self.made = true,
            Err(Errno::EXIST) => return Err(CreateError::LinkExists { path: self.path.clone() }),
            Err(e) => return Err(CreateError::Link { path: self.path.clone(), source: e.into() }),
        }
        self.parent.sync().map_err(|source| CreateError::Link { path: self.path.clone(), source })
    }

    /// The snapshot is complete. A note that stays in it for want of a moment more means nothing there.
    pub(super) fn keep(mut self, snapshot: &Dir) {
        self.made = false;
        let _ = snapshot.remove_file(NOTE);
    }

    /// Removes the link of a snapshot that was not completed, if it is still what was made: a name of that memory file.
    pub(super) fn remove_leftover(staging: &Dir) {
        // A note of another user is not to be acted on.
        if !rustix::fs::fstat(staging).is_ok_and(|stat| stat.st_uid == rustix::process::geteuid().as_raw()) {
            return;
        }
        let Ok(note) = staging.read(NOTE, MAX_NOTE) else { return };
        let path = Path::new(OsStr::from_bytes(&note));
        let file = |dir: BorrowedFd<'_>, path: &Path| {
            statat(dir, path, AtFlags::SYMLINK_NOFOLLOW).map(|stat| (stat.st_dev, stat.st_ino)).ok()
        };
        let memory = file(staging.as_fd(), Path::new(file::MEMORY));
        if path.is_absolute() && memory.is_some() && file(CWD, path) == memory {
            let _ = unlinkat(CWD, path, AtFlags::empty());
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if self.made {
            let _ = unlinkat(&self.parent, &self.name, AtFlags::empty());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_link_that_a_killed_process_has_left_is_removed_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let (staging, path) = (root.path().join("staging"), root.path().join("mem"));
        fs::create_dir(&staging).unwrap();
        fs::write(staging.join(file::MEMORY), b"memory").unwrap();
        let staging = Dir::open(&staging).unwrap();
        let leave = || {
            let _ = staging.remove_file(NOTE);
            let mut link = Link::plan(&path, &staging).unwrap();
            link.make(&staging).unwrap();
            std::mem::forget(link);
            assert!(path.exists());
        };
        leave();
        Link::remove_leftover(&staging);
        assert!(!path.exists());

        // Somebody has put another file there since.
        leave();
        fs::remove_file(&path).unwrap();
        fs::write(&path, b"mine").unwrap();
        Link::remove_leftover(&staging);
        assert_eq!(fs::read(&path).unwrap(), b"mine");
        fs::remove_file(&path).unwrap();

        // It was completed.
        let mut link = Link::plan(&path, &staging).unwrap();
        staging.remove_file(NOTE).unwrap();
        link.make(&staging).unwrap();
        link.keep(&staging);
        Link::remove_leftover(&staging);
        assert_eq!(fs::read(&path).unwrap(), b"memory");
        assert!(staging.read(NOTE, MAX_NOTE).is_err());
    }
}
