//! The snapshot whose memory a guest began with, for the snapshots that are taken of that guest.

use crate::image::{ImageError, MemoryImage};
use crate::load::{LoadError, MAX_LEVELS, Snapshot};
use crate::manifest::{MemoryRegion, Parent};
use std::io;
use std::path::{Component, Path, PathBuf};

/// Why nothing can be written over a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    /// It cannot be opened.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Its memory cannot.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// It is a saved state.
    #[error("{path} is the saved state of a machine, which is removed when the machine goes on; write a full snapshot")]
    Saved {
        /// Its directory.
        path: PathBuf,
    },
    /// It lies over too many others.
    #[error(
        "{path} lies over {below} other snapshots, and a chain has at most {MAX_LEVELS}; flatten it (vmm snapshot flatten), or write a full snapshot"
    )]
    TooDeep {
        /// Its directory.
        path: PathBuf,
        /// How many.
        below: usize,
    },
}

/// A snapshot that others can be written over: its memory, and how they refer to it.
#[derive(Debug)]
pub struct Base {
    dir: PathBuf,
    root: String,
    digest: String,
    levels: usize,
    is_saved: bool,
    pub(super) regions: Vec<MemoryRegion>,
    pub(super) image: MemoryImage,
}

impl Base {
    /// Opens the memory of a snapshot, which must lie on this host.
    pub fn open(snapshot: &Snapshot) -> Result<Base, BaseError> {
        let image = MemoryImage::open(snapshot)?;
        let manifest = snapshot.manifest();
        Ok(Base {
            dir: snapshot.dir().to_owned(),
            root: manifest.memory.root.clone(),
            digest: manifest.digest.clone(),
            levels: 1 + snapshot.below()?.len(),
            is_saved: manifest.config.is_some(),
            regions: manifest.memory.regions.clone(),
            image,
        })
    }

    /// The snapshot that another lies over.
    pub fn parent_of(child: &Snapshot) -> Result<Option<Base>, BaseError> {
        let (Some(parent), Some(path)) = (&child.manifest().memory.parent, child.parent_dir()) else { return Ok(None) };
        let base = Base::open(&crate::load::open(&path)?)?;
        if base.digest != parent.digest {
            let child = child.dir().join(crate::file::MANIFEST);
            return Err(LoadError::OtherParent { path, child }.into());
        }
        Ok(Some(base))
    }

    /// The memory.
    pub fn image(&self) -> &MemoryImage {
        &self.image
    }

    /// Whether a snapshot that holds only what differs can lie over it.
    pub fn can_be_parent(&self) -> Result<(), BaseError> {
        if self.is_saved {
            return Err(BaseError::Saved { path: self.dir.clone() });
        }
        if self.levels < MAX_LEVELS {
            return Ok(());
        }
        Err(BaseError::TooDeep { path: self.dir.clone(), below: self.levels - 1 })
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What a snapshot that will be the directory `child` says of it.
    pub(super) fn as_parent_of(&self, child: &Path) -> io::Result<Parent> {
        let path = relative(child, &self.dir)?;
        let path = path.to_str().ok_or_else(|| io::Error::other("its path is not UTF-8"))?.to_owned();
        Ok(Parent { path, root: self.root.clone(), digest: self.digest.clone() })
    }
}

/// The path of the directory `to` as seen from the directory `from`. Of both only the directory above need exist.
pub(super) fn relative(from: &Path, to: &Path) -> io::Result<PathBuf> {
    Ok(between(&place(from)?, &place(to)?))
}

/// Where a directory is, or will be, without links on the way.
fn place(dir: &Path) -> io::Result<PathBuf> {
    if let Ok(there) = dir.canonicalize() {
        return Ok(there);
    }
    let above = match dir.parent() {
        Some(above) if !above.as_os_str().is_empty() => above,
        _ => Path::new("."),
    };
    Ok(above.canonicalize()?.join(dir.file_name().unwrap_or_default()))
}

/// The path of `to` as seen from `from`; both are absolute and plain.
fn between(from: &Path, to: &Path) -> PathBuf {
    let shared = from.components().zip(to.components()).take_while(|(a, b)| a == b).count();
    let up = from.components().skip(shared).map(|_| Component::ParentDir);
    up.chain(to.components().skip(shared)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_directory_is_seen_from_another() {
        for (from, to, seen) in [
            ("/a/child", "/a/base", "../base"),
            ("/a/b/child", "/a/base", "../../base"),
            ("/a/child", "/a/b/base", "../b/base"),
            ("/a/child", "/c/base", "../../c/base"),
            ("/child", "/base", "../base"),
        ] {
            assert_eq!(between(Path::new(from), Path::new(to)), Path::new(seen), "{from} {to}");
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("x/base")).unwrap();
        let base = dir.path().join("x/../x/base");
        assert_eq!(relative(&dir.path().join("child"), &base).unwrap(), Path::new("../x/base"));
        assert!(relative(&dir.path().join("none/child"), &base).is_err());
    }
}
