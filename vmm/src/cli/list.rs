//! `vmm list`: which machines are saved, by their configuration files. Looks, and changes nothing.

use super::{CliError, read_config};
use crate::machine::saved::{self, Configuration};
use api_spec::saved::{Saved, SavedState};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// What there is of a machine's saved state.
#[derive(Debug, Serialize)]
pub struct Machine {
    /// Its configuration file.
    pub config: PathBuf,
    /// Where it is saved, if anywhere.
    pub path: Option<PathBuf>,
    /// Whether there is a saved state that the next start can go on from.
    pub saved: bool,
    /// What that takes on disk, in bytes.
    pub saved_bytes: u64,
    /// Whether it was saved with another configuration, as far as its guest can tell; `None` if that cannot be known.
    pub config_drift: Option<bool>,
}

/// Looks at machines, in this order.
pub fn list(configs: &[PathBuf]) -> Result<Vec<Machine>, CliError> {
    configs.iter().map(|path| look(path)).collect()
}

fn look(path: &Path) -> Result<Machine, CliError> {
    let config = read_config(path)?;
    let place = config.saved_state.as_ref().map(|SavedState { path, .. }| path.clone());
    let Saved { exists, bytes } = place.as_deref().map(saved::look).unwrap_or_default();
    let kept = place.as_ref().filter(|_| exists).and_then(|place| snapshot::load::open(place).ok());
    let kept = kept.and_then(|snapshot| snapshot.manifest().config.clone());
    let config_drift = kept.map(|digest| digest != Configuration::of(&config).digest());
    Ok(Machine { config: path.to_owned(), path: place, saved: exists, saved_bytes: bytes, config_drift })
}
