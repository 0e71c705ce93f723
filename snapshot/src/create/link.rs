//! A second name for the memory file, outside of the snapshot, for whoever looks for it there: a hard link.

use super::CreateError;
use crate::dir::Dir;
use crate::file;
use rustix::fs::{AtFlags, linkat, statat, unlinkat};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Made and removed when a link is planned.
const PROBE: &str = "probe";

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
        let id = |dir: &Dir| rustix::fs::fstat(dir).map(|stat| (stat.st_dev, stat.st_ino)).ok();
        self.name.as_bytes() == name && id(parent).is_some() && id(parent) == id(&self.parent)
    }

    /// Where it is, for messages.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes it, so that it survives a power cut.
    pub(super) fn make(&mut self, staging: &Dir) -> Result<(), CreateError> {
        match linkat(staging, file::MEMORY, &self.parent, &self.name, AtFlags::empty()) {
            Ok(()) => self.made = true,
            Err(Errno::EXIST) => return Err(CreateError::LinkExists { path: self.path.clone() }),
            Err(e) => return Err(CreateError::Link { path: self.path.clone(), source: e.into() }),
        }
        self.parent.sync().map_err(|source| CreateError::Link { path: self.path.clone(), source })
    }

    /// The snapshot is complete.
    pub(super) fn keep(mut self) {
        self.made = false;
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if self.made {
            let _ = unlinkat(&self.parent, &self.name, AtFlags::empty());
        }
    }
}
