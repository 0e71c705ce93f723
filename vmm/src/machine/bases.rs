//! The snapshots that a guest's memory is known to be that of, but for the pages that it has changed since it has an image.
//!
//! A page that is not the guest's own by now was not so earlier either. So what has changed since the guest has its image is all
//! that can differ from any snapshot that was taken of it since, or from the one that it was loaded from.

use snapshot::create::{Base, BaseError};
use snapshot::load::Snapshot;
use std::path::{Path, PathBuf};

/// How many are remembered: the first, which need not have any below it, and the newest.
const KEPT: usize = 4;

/// Why no snapshot can be written over one of them.
#[derive(Debug, thiserror::Error)]
pub enum NoBase {
    /// It cannot be opened, or has too many below it.
    #[error(transparent)]
    Base(#[from] BaseError),
    /// Another is in its place.
    #[error("{0} is another snapshot by now")]
    Other(PathBuf),
}

/// One of them.
#[derive(Clone, Debug)]
struct Known {
    dir: PathBuf,
    /// The digest of its manifest.
    digest: String,
}

/// The snapshots that are known, the newest last.
#[derive(Clone, Debug, Default)]
pub struct Bases(Vec<Known>);

impl Bases {
    /// Of a guest that was loaded from `snapshot`.
    pub fn of(snapshot: &Snapshot) -> Bases {
        let mut bases = Bases::default();
        bases.add(snapshot.dir(), snapshot.manifest().digest.clone());
        bases
    }

    /// A snapshot was taken, whose manifest has this digest.
    pub fn add(&mut self, dir: &Path, digest: String) {
        let dir = std::path::absolute(dir).unwrap_or_else(|_| dir.to_owned());
        self.0.push(Known { dir, digest });
        if self.0.len() > KEPT {
            self.0.remove(1);
        }
    }

    /// The newest that can be used, if one was ever known: as a parent, if one is wanted.
    pub fn open(&self, as_parent: bool) -> Result<Option<Base>, NoBase> {
        let mut newest = None;
        for known in self.0.iter().rev() {
            match known.open(as_parent) {
                Ok(base) => return Ok(Some(base)),
                Err(e) => newest = newest.or(Some(e)),
            }
        }
        newest.map_or(Ok(None), Err)
    }
}

impl Known {
    fn open(&self, as_parent: bool) -> Result<Base, NoBase> {
        let snapshot = snapshot::load::open(&self.dir).map_err(BaseError::from)?;
        if snapshot.manifest().digest != self.digest {
            return Err(NoBase::Other(self.dir.clone()));
        }
        let base = Base::open(&snapshot)?;
        if as_parent {
            base.can_be_parent()?;
        }
        Ok(base)
    }
}
