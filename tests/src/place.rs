//! A directory of its own for each test.

use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A directory, removed at the end. Its path is short, so that sockets fit.
#[derive(Debug)]
pub struct Place(TempDir);

impl Place {
    /// Makes one.
    #[allow(clippy::new_without_default, reason = "making a directory is no default")]
    pub fn new() -> Self {
        Place(tempfile::Builder::new().prefix("coppice-test-").tempdir().expect("a temporary directory can be made"))
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// A path in it.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path().join(name)
    }

    /// The names of what is in it, sorted.
    pub fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.path()).expect("the directory can be read");
        let mut names: Vec<_> =
            entries.map(|entry| entry.expect("it can be read on").file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}
