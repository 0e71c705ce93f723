//! Where the memory of a restored guest comes from: what a request says of it (pure), and bringing it about.

use crate::logging::warn_once;
use crate::memory::GuestRam;
use crate::memory::image::LayError;
use crate::memory::uffd::{self, Service, UffdError};
use api_spec::snapshot::{LoadHugePages, MemBackend, MemBackendType, SnapshotLoad};
use snapshot::image::{ImageError, ensure_same, ensure_trusted};
use snapshot::load::Snapshot;
use std::os::fd::OwnedFd;
use std::path::Path;

/// Why memory cannot come from where a request says.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// It says so in two ways. The text is the one that existing clients know.
    #[error("too many fields: either `mem_backend` or `mem_file_path` exclusively is required")]
    TooManyFields,
    /// Nobody can be lost where nobody serves.
    #[error("mem_backend.on_handler_loss: memory from a file has no page server that could be lost; leave it out")]
    NoHandler,
    /// Pages that this program does not use.
    #[error(
        "huge_pages: `{0}` is not offered: guest memory has pages of 4 KiB, of which a clone copies those that it writes; use \
         `Snapshot` or `None`, or leave it out. To have what clones only read mapped by the 2 MiB, start the page server with \
         --huge-pages collapse"
    )]
    HugePages(&'static str),
    /// The memory file.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The page server.
    #[error(transparent)]
    Uffd(#[from] UffdError),
    /// Guest memory.
    #[error(transparent)]
    Lay(#[from] LayError),
}

/// Where memory comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend<'a> {
    /// The snapshot's own memory file.
    Own,
    /// A file that is to hold the same.
    File(&'a Path),
    /// The page server that listens here, whose store is shared.
    Shared(&'a Path),
    /// The page server that listens here, which copies.
    Copy(&'a Path),
}

impl<'a> Backend<'a> {
    /// What a request says. Says in the log, once, what is deprecated of it.
    pub fn of(request: &'a SnapshotLoad) -> Result<Self, BackendError> {
        if request.mem_file_path.is_some() {
            warn_once("mem_file_path", "`mem_file_path` is deprecated: use `mem_backend` with `backend_type` `File`");
        }
        if request.enable_diff_snapshots {
            warn_once("enable_diff_snapshots", "`enable_diff_snapshots` is deprecated: use `track_dirty_pages`");
        }
        match request.huge_pages {
            LoadHugePages::Snapshot | LoadHugePages::None => {}
            LoadHugePages::Transparent => return Err(BackendError::HugePages("Transparent")),
            LoadHugePages::TwoMib => return Err(BackendError::HugePages("2M")),
        }
        match (&request.mem_backend, &request.mem_file_path) {
            (Some(_), Some(_)) => Err(BackendError::TooManyFields),
            (Some(MemBackend { backend_type: MemBackendType::File, on_handler_loss: Some(_), .. }), None) => {
                Err(BackendError::NoHandler)
            }
            (Some(MemBackend { backend_path, backend_type, .. }), None) => Ok(match backend_type {
                MemBackendType::File => Backend::File(backend_path),
                MemBackendType::UffdShared => Backend::Shared(backend_path),
                MemBackendType::Uffd => Backend::Copy(backend_path),
            }),
            (None, Some(path)) => Ok(Backend::File(path)),
            (None, None) => Ok(Backend::Own),
        }
    }

    /// Whether a page server provides it.
    pub fn is_served(&self) -> bool {
        matches!(self, Backend::Shared(_) | Backend::Copy(_))
    }

    /// Whether clones share what they have not written.
    pub fn shares(&self) -> bool {
        !matches!(self, Backend::Copy(_))
    }

    /// Shows the memory of a snapshot in `ram`, for which addresses are reserved. Nothing has touched it yet. If it is served,
    /// the userfaultfd takes the number of `low`.
    pub fn show(self, snapshot: &Snapshot, ram: &mut GuestRam, low: OwnedFd) -> Result<Option<Service>, BackendError> {
        let root = &snapshot.manifest().memory.root;
        let trusted = match self {
            Backend::Own => ensure_trusted(snapshot)?,
            Backend::File(path) => ensure_same(snapshot, path)?,
            Backend::Shared(path) => return Ok(Some(uffd::connect(path, root, ram, low)?)),
            Backend::Copy(path) => return Ok(Some(uffd::connect_in_copy_mode(path, ram, low)?)),
        };
        ram.show_trusted(trusted.memory)?;
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(backend: Option<MemBackendType>, file: Option<&str>) -> SnapshotLoad {
        SnapshotLoad {
            mem_backend: backend.map(|backend_type| MemBackend::of(backend_type, "b".into())),
            mem_file_path: file.map(Into::into),
            ..SnapshotLoad::of("s".into())
        }
    }

    #[test]
    fn a_request_says_where_memory_comes_from_in_one_way_or_not_at_all() {
        let (b, f) = (Path::new("b"), Path::new("f"));
        for (backend, file, expected) in [
            (None, None, Backend::Own),
            (None, Some("f"), Backend::File(f)),
            (Some(MemBackendType::File), None, Backend::File(b)),
            (Some(MemBackendType::Uffd), None, Backend::Copy(b)),
            (Some(MemBackendType::UffdShared), None, Backend::Shared(b)),
        ] {
            assert_eq!(Backend::of(&request(backend, file)).unwrap(), expected);
        }
        let refused = Backend::of(&request(Some(MemBackendType::File), Some("f"))).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "too many fields: either `mem_backend` or `mem_file_path` exclusively is required"
        );
    }

    #[test]
    fn page_sizes_that_are_not_offered_are_refused_by_name() {
        let with = |huge_pages| SnapshotLoad { huge_pages, ..request(None, None) };
        for fine in [LoadHugePages::Snapshot, LoadHugePages::None] {
            Backend::of(&with(fine)).unwrap();
        }
        for (bad, name) in [(LoadHugePages::Transparent, "`Transparent`"), (LoadHugePages::TwoMib, "`2M`")] {
            let refused = Backend::of(&with(bad)).unwrap_err().to_string();
            assert!(refused.starts_with(&format!("huge_pages: {name} is not offered")), "{refused}");
        }
    }
}
