//! `vmm list`: which machines are saved, by their configuration files. Looks, and changes nothing.

use super::{CliError, read_config};
use crate::machine::saved;
use api_spec::saved::SavedState;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// What there is of a machine's saved state.
#[derive(Debug, Serialize)]
pub struct Machine {
    /// Its configuration file.
    pub config: PathBuf,
    /// Where it is saved, if anywhere.
    pub path: Option<PathBuf>,
    /// Whether there is a saved state that the next start can open, to go on from.
    pub saved: bool,
    /// What that takes on disk, in bytes.
    pub saved_bytes: u64,
    /// Why the next start cannot go on from what is there, if something is.
    pub unusable: Option<String>,
    /// Whether it was saved with another configuration, as far as its guest can tell; `None` if nothing can be gone on from.
    pub config_drift: Option<bool>,
}

/// Looks at machines, in this order.
pub fn list(configs: &[PathBuf]) -> Result<Vec<Machine>, CliError> {
    configs.iter().map(|path| look(path)).collect()
}

fn look(path: &Path) -> Result<Machine, CliError> {
    let config = read_config(path)?;
    let place = config.saved_state.as_ref().map(|SavedState { path, .. }| path.clone());
    let (found, unusable) = match place.as_deref().map(|place| saved::look(place, &config)) {
        None => (None, None),
        Some(Ok(found)) => (found, None),
        Some(Err(reason)) => (None, Some(reason)),
    };
    Ok(Machine {
        config: path.to_owned(),
        path: place,
        saved: found.is_some(),
        saved_bytes: found.map_or(0, |found| found.bytes),
        unusable,
        config_drift: found.map(|found| found.drift),
    })
}
