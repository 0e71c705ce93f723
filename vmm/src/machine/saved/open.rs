//! Opening a saved state as a start does: what can be said against it before a machine is made of it.

use super::going_on::{GoingOnError, plan};
use super::seen::{self, Configuration, ConfigurationError};
use super::store;
use api_spec::vm::VmConfig;
use rustix::fs::OFlags;
use snapshot::load::{LoadError, Snapshot};
use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Why a saved state cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The snapshot.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// No snapshot of a machine that was to go on.
    #[error("its manifest names no configuration: it was not written by a save on stop")]
    NoConfiguration,
    /// The copy of the configuration cannot be read.
    #[error("cannot read {}: {_0}", seen::FILE)]
    Read(io::Error),
    /// It is not the one.
    #[error(transparent)]
    Configuration(#[from] ConfigurationError),
    /// The configuration of today does not allow it.
    #[error(transparent)]
    GoingOn(#[from] GoingOnError),
}

/// The snapshot that a saved state is, and what its guest can tell of the configuration that it was saved with.
pub fn open(path: &Path) -> Result<(Snapshot, Configuration), OpenError> {
    let snapshot = snapshot::load::open(path)?;
    let digest = snapshot.manifest().config.as_ref().ok_or(OpenError::NoConfiguration)?;
    let origin = Configuration::read(&read_configuration(path).map_err(OpenError::Read)?, digest)?;
    Ok((snapshot, origin))
}

/// A saved state that the next start can open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Looked {
    /// What it takes on disk, in bytes.
    pub bytes: u64,
    /// It was saved with another configuration than this one, as far as its guest can tell.
    pub drift: bool,
}

/// What the next start with this configuration finds at `path`: `None` if nothing is there, or why it could not go on from what is.
/// Whether its memory is right, and the host takes it, only a start can tell. Changes nothing.
pub fn look(path: &Path, config: &VmConfig) -> Result<Option<Looked>, String> {
    let Some(bytes) = store::look(path)? else { return Ok(None) };
    let told = |e: OpenError| format!("{}: {e}", path.display());
    let (snapshot, origin) = open(path).map_err(told)?;
    plan(path, &snapshot.manifest().devices, false, &origin, config).map_err(|e| told(e.into()))?;
    Ok(Some(Looked { bytes, drift: origin.digest() != Configuration::of(config).digest() }))
}

/// The copy of the configuration in a saved state.
fn read_configuration(path: &Path) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    // Not through a link, and without waiting for whoever would write a FIFO.
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path.join(seen::FILE))?;
    file.take(seen::MAX_BYTES).read_to_end(&mut text)?;
    Ok(text)
}
