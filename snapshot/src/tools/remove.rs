//! Removing a snapshot that no other one lies over.
//!
//! The manifest goes first, so that a removal that is killed leaves nothing that loads; the next one removes the rest. Clones that
//! run keep the files that they have open.

use super::children::{ChildrenError, Kin, children, names, notes};
use crate::dir::{Dir, Lock};
use crate::file;
use crate::load::{self, LoadError};
use rustix::fs::{AtFlags, statat};
use serde::Serialize;
use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// A snapshot that was removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Removed {
    /// Where it was.
    pub path: PathBuf,
    /// Space that its files took, in bytes. Clones that run may still hold some of it.
    pub disk_bytes: u64,
}

impl fmt::Display for Removed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} is removed, which took {} KiB", self.path.display(), self.disk_bytes / 1024)
    }
}

/// Why a snapshot was not removed.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    /// There is none.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Something is in the directory that belongs to no snapshot.
    #[error("{path} belongs to no snapshot; nothing was removed: move it away, or check the path")]
    Foreign {
        /// What is there.
        path: PathBuf,
    },
    /// Other snapshots need it.
    #[error(
        "snapshots lie over {path}, {count} of them, such as {child}; remove those first, or flatten them (vmm snapshot flatten)"
    )]
    HasChildren {
        /// The snapshot.
        path: PathBuf,
        /// One that lies over it.
        child: PathBuf,
        /// How many do.
        count: usize,
    },
    /// It is not known whether other snapshots need it.
    #[error(transparent)]
    Children(#[from] ChildrenError),
    /// Somebody else removes it, or writes a snapshot that lies over it.
    #[error(
        "{path} is in use: by a clone or a page server (also of a snapshot that lies over it), by whoever writes a snapshot over it, or by another removal; end those, then try again"
    )]
    Busy {
        /// The snapshot.
        path: PathBuf,
    },
    /// The system refused.
    #[error("cannot remove {path}: {source}; what is left of the snapshot does not load: remove it again")]
    Remove {
        /// What.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The system refused, and all of it is still there.
    #[error("cannot remove {path}: {source}")]
    Untouched {
        /// What.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Removes the snapshot at `path`, or what a removal that was killed has left of one.
pub fn remove(path: &Path) -> Result<Removed, RemoveError> {
    let untouched = |source| RemoveError::Untouched { path: path.to_owned(), source };
    // Of a link, what it leads to. So the directory has a name of its own.
    let path = load::open_dir(path)?.path().canonicalize().map_err(untouched)?;
    let (Some(above), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(LoadError::NotASnapshot { path }.into());
    };
    let above = Dir::open(above).map_err(untouched)?;
    let dir = load::open_dir(&path)?;
    lock(&dir, &above, name)?;

    let names = names(&dir).map_err(untouched)?;
    if !names.iter().any(|name| name == file::MANIFEST.as_bytes()) && !is_leftover(&names) {
        return Err(LoadError::NotASnapshot { path }.into());
    }
    if let Some(foreign) = names.iter().find(|name| !is_ours(&dir, name)) {
        return Err(RemoveError::Foreign { path: path.join(OsStr::from_bytes(foreign)) });
    }
    let kin = Kin::read(&dir).map_err(ChildrenError::from)?;
    let digest = kin.as_ref().map(|kin| kin.digest.as_str());
    let over = children(&dir, digest)?;
    if let Some(child) = over.first() {
        return Err(RemoveError::HasChildren { path, child: child.clone(), count: over.len() });
    }
    let disk_bytes = names.iter().map(|name| disk_bytes(&dir, name)).sum();
    remove_files(&dir, &above, name, &names, kin.as_ref())?;
    Ok(Removed { path, disk_bytes })
}

/// Locks the directory against others that would remove it, or write a snapshot over it.
fn lock(dir: &Dir, above: &Dir, name: &OsStr) -> Result<(), RemoveError> {
    let path = || dir.path().to_owned();
    if !dir.lock(Lock::Exclusive).map_err(|e| RemoveError::Untouched { path: path(), source: e.into() })? {
        return Err(RemoveError::Busy { path: path() });
    }
    // Whoever had the lock before may have removed it.
    if dir.is_named(above, name) { Ok(()) } else { Err(LoadError::NotASnapshot { path: path() }.into()) }
}

/// Whether these are the names of what a removal that was killed has left: files of a snapshot, its manifest excepted, or none.
fn is_leftover(names: &[Vec<u8>]) -> bool {
    let has = |wanted: &str| names.iter().any(|name| name == wanted.as_bytes());
    let is_of_ours = names.is_empty() || has(file::STATE);
    is_of_ours && names.iter().all(|name| is_name_of_ours(name))
}

fn is_ours(dir: &Dir, name: &[u8]) -> bool {
    is_name_of_ours(name)
        && statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::Directory)
}

/// Whether a file of a snapshot, or a note in one, can have this name.
fn is_name_of_ours(name: &[u8]) -> bool {
    const KNOWN: [&str; 11] = [
        file::MANIFEST,
        file::STATE,
        file::MEMORY,
        file::PACKED_MEMORY,
        file::PAGE_MAP,
        file::DIGESTS,
        file::STAMP,
        file::WORKING_SET,
        file::CONFIGURATION,
        file::SAVED_MARK,
        "mem.link",
    ];
    // A note that was being replaced when its writer was killed is `.NAME.PID-N`.
    let name = name.strip_prefix(b".").map_or(name, before_last_dot);
    let is_of_disk = |end: &str| name.starts_with(b"disk-") && name.ends_with(end.as_bytes());
    let is_disk = [".img", ".map", ".stamp"].into_iter().any(is_of_disk);
    KNOWN.iter().any(|known| known.as_bytes() == name) || is_disk || name.starts_with(file::CHILD.as_bytes())
}

fn before_last_dot(name: &[u8]) -> &[u8] {
    name.iter().rposition(|b| *b == b'.').map_or(name, |at| &name[..at])
}

fn disk_bytes(dir: &Dir, name: &[u8]) -> u64 {
    statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).map_or(0, |stat| stat.st_blocks as u64 * 512)
}

fn remove_files(dir: &Dir, above: &Dir, name: &OsStr, names: &[Vec<u8>], kin: Option<&Kin>) -> Result<(), RemoveError> {
    let failed = |what: &[u8], source| RemoveError::Remove { path: dir.path().join(OsStr::from_bytes(what)), source };
    let remove = |name: &[u8]| match dir.remove_file(OsStr::from_bytes(name)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    };
    let manifest = file::MANIFEST.as_bytes();
    let first = remove(manifest).and_then(|()| dir.sync());
    first.map_err(|source| RemoveError::Untouched { path: dir.join(file::MANIFEST), source })?;
    if let Some(kin) = kin {
        forget_child(dir, kin);
    }
    // What tells a leftover from a stranger's directory goes last.
    let (last, others): (Vec<_>, Vec<_>) = names.iter().partition(|name| *name == file::STATE.as_bytes());
    for name in others.into_iter().chain(last) {
        remove(name).map_err(|e| failed(name, e))?;
    }
    match above.remove_dir(name) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(failed(b"", e)),
        _ => above.sync().map_err(|e| failed(b"", e)),
    }
}

/// Removes the notes in the parent that this snapshot lies over it. One that stays means nothing.
fn forget_child(dir: &Dir, kin: &Kin) {
    let Some(parent) = kin.parent(dir) else { return };
    for note in notes(&parent).unwrap_or_default() {
        if note.child.is_some_and(|child| child.is_same(dir)) {
            let _ = parent.remove_file(&note.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_a_snapshot_are_told_from_others() {
        for name in ["snap.json", "mem.pack", "disk-a.img", "disk-a.stamp", "child-0123", ".mem.stamp.12-3", "mem.link"]
        {
            assert!(is_name_of_ours(name.as_bytes()), "{name}");
        }
        for name in ["", ".", ".bashrc", "mem.bin.bak", "disk-a", "notes", ".snap", "..mem.stamp.1-2", "x.img"] {
            assert!(!is_name_of_ours(name.as_bytes()), "{name}");
        }
    }
}
