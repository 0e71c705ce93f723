//! Which snapshots lie over one: those that a note in it tells of, and those beside it that say so themselves.

use crate::dir::{Dir, FileError};
use crate::{file, manifest};
use serde::Deserialize;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Longest note, in bytes: no path is longer.
const MAX_NOTE: u64 = 4096;

/// Why it is not known which snapshots lie over one.
#[derive(Debug, thiserror::Error)]
pub enum ChildrenError {
    /// A directory cannot be listed.
    #[error("cannot list {path}: {source}")]
    List {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A note, or a manifest that may name the snapshot, cannot be read.
    #[error("cannot tell whether another snapshot lies over this one: {0}")]
    Unreadable(#[from] FileError),
}

/// What matters here of a manifest, in whatever version.
#[derive(Deserialize)]
pub(super) struct Kin {
    pub(super) digest: String,
    memory: KinMemory,
}

#[derive(Deserialize)]
struct KinMemory {
    #[serde(default)]
    parent: Option<KinParent>,
}

#[derive(Deserialize)]
struct KinParent {
    path: String,
    digest: String,
}

impl Kin {
    /// What the manifest in a directory says; `None` if there is none that could be loaded.
    pub(super) fn read(dir: &Dir) -> Result<Option<Kin>, FileError> {
        match dir.read(file::MANIFEST, manifest::MAX_BYTES) {
            Ok(json) => Ok(serde_json::from_slice(&json).ok()),
            Err(FileError::Read { path, source }) => Err(FileError::Read { path, source }),
            Err(_) => Ok(None),
        }
    }

    /// The directory of the snapshot that the one in `dir` says it lies over, if it is there.
    pub(super) fn parent(&self, dir: &Dir) -> Option<Dir> {
        Dir::open(&dir.path().join(&self.memory.parent.as_ref()?.path)).ok()
    }

    fn parent_digest(&self) -> Option<&str> {
        self.memory.parent.as_ref().map(|parent| parent.digest.as_str())
    }
}

/// Names of all that is in a directory.
pub(super) fn names(dir: &Dir) -> io::Result<Vec<Vec<u8>>> {
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(dir)? {
        let name = entry?.file_name().to_bytes().to_owned();
        if name != b"." && name != b".." {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// The snapshots that lie over the one in `dir`, whose manifest has this digest if that is known.
pub(super) fn children(dir: &Dir, digest: Option<&str>) -> Result<Vec<PathBuf>, ChildrenError> {
    let mut children: Vec<PathBuf> = Vec::new();
    let mut candidates: Vec<Dir> = notes(dir)?.into_iter().filter_map(|note| note.child).collect();
    // They have been moved or renamed with the path to this one still right.
    let above = dir.path().join("..");
    if let Ok(beside) = Dir::open(&above) {
        let place = dir.path().parent().unwrap_or(Path::new("/"));
        candidates
            .extend(list(&beside)?.iter().filter_map(|name| Dir::open(&place.join(OsStr::from_bytes(name))).ok()));
    }
    for candidate in candidates {
        if is_child(&candidate, dir, digest)? {
            let path = candidate.path();
            let path = path.canonicalize().unwrap_or(path.to_owned());
            if !children.contains(&path) {
                children.push(path);
            }
        }
    }
    Ok(children)
}

fn list(dir: &Dir) -> Result<Vec<Vec<u8>>, ChildrenError> {
    names(dir).map_err(|source| ChildrenError::List { path: dir.path().to_owned(), source })
}

/// A note that another snapshot lies over the one that it is in.
pub(super) struct Note {
    pub(super) name: String,
    /// The directory of that other one. What is not there, or is no directory, is no snapshot.
    pub(super) child: Option<Dir>,
}

/// The notes in a directory.
pub(super) fn notes(dir: &Dir) -> Result<Vec<Note>, ChildrenError> {
    let mut notes = Vec::new();
    for name in list(dir)?.into_iter().filter(|name| name.starts_with(file::CHILD.as_bytes())) {
        // One whose name is no text is none of ours.
        let Ok(name) = String::from_utf8(name) else { continue };
        let path = dir.read(&name, MAX_NOTE)?;
        let child = Dir::open(&dir.path().join(OsStr::from_bytes(&path))).ok();
        notes.push(Note { name, child });
    }
    Ok(notes)
}

fn is_child(candidate: &Dir, dir: &Dir, digest: Option<&str>) -> Result<bool, ChildrenError> {
    let Some(kin) = Kin::read(candidate)? else { return Ok(false) };
    let fits = digest.is_none_or(|digest| kin.parent_digest() == Some(digest));
    Ok(fits && kin.parent(candidate).is_some_and(|parent| parent.is_same(dir)))
}
