//! Memory images that lie in an object store or behind a web server.
//!
//! Follow a chunk: `image` (zero? kept near?) -> `span` (how much to fetch) -> `flights` (is somebody at it already?) ->
//! `store` (fetches within a deadline, on the threads of `runner`, over connections of `bounded`) -> back in `image` (checks every chunk) -> `memory` and
//! `disk` (keep what was right; `room` bounds that). `location` understands URLs, `settings` the environment.

mod bounded;
mod disk;
mod flights;
mod image;
mod location;
mod memory;
mod plain;
mod room;
mod runner;
mod settings;
mod span;
mod store;
mod tally;

pub use disk::{CacheError, DiskCache};
pub use image::{RemoteError, RemoteImage};
pub use location::{Location, LocationError};
pub use runner::Runner;
pub use settings::Settings;
pub use store::{CONNECT_DEADLINE, REQUEST_DEADLINE, Store, StoreError};

use crate::options::CacheSettings;
use std::io;
use std::sync::Arc;

/// Why remote images cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The URL is none.
    #[error("snapshot {0}")]
    Location(#[from] LocationError),
    /// The image cannot be opened.
    #[error("snapshot {0}")]
    Image(#[from] RemoteError),
    /// The cache directory.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// No threads.
    #[error("cannot start the threads that talk to object stores: {0}")]
    Threads(io::Error),
}

/// What all remote images of a server share.
pub struct Opener {
    settings: Settings,
    runner: Arc<Runner>,
    cache: Option<Arc<DiskCache>>,
}

impl Opener {
    /// Starts the threads and opens the cache directory, if there is to be one.
    pub fn new(settings: Settings, cache: Option<&CacheSettings>) -> Result<Opener, OpenError> {
        let cache = cache.map(DiskCache::open).transpose()?.map(Arc::new);
        let runner = Arc::new(Runner::start().map_err(OpenError::Threads)?);
        Ok(Opener { settings, runner, cache })
    }

    /// Opens the image of the snapshot at `url`.
    pub fn open(&self, url: &str) -> Result<RemoteImage, OpenError> {
        let location = Location::parse(url)?;
        let store = Store::new(location, self.settings.clone(), self.runner.clone()).map_err(RemoteError::Store)?;
        Ok(RemoteImage::open(store, self.cache.as_ref())?)
    }
}
