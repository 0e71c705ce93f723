//! The threads that talk to object stores, behind calls that wait.

use std::io;
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};

/// Threads that see to connections.
const WORKERS: usize = 2;
/// Threads for what blocks: looking up host names.
const BLOCKING: usize = 4;

/// The deadline has passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no answer within {} s", .0.as_secs())]
pub struct Late(pub Duration);

/// A few threads, started with it.
#[derive(Debug)]
pub struct Runner(Option<Runtime>);

impl Runner {
    /// Starts the threads. They inherit which signals are blocked.
    pub fn start() -> io::Result<Runner> {
        // Whoever runs this process may have chosen already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut builder = Builder::new_multi_thread();
        builder.worker_threads(WORKERS).max_blocking_threads(BLOCKING).thread_name("remote").enable_io().enable_time();
        builder.build().map(|runtime| Runner(Some(runtime)))
    }

    /// Waits for `work`, but no longer than this. Not to be called from one of these threads.
    pub fn wait<T>(&self, deadline: Duration, work: impl Future<Output = T>) -> Result<T, Late> {
        let Some(runtime) = &self.0 else { return Err(Late(Duration::ZERO)) };
        runtime.block_on(async { tokio::time::timeout(deadline, work).await.map_err(|_| Late(deadline)) })
    }
}

impl Drop for Runner {
    /// Waits for none of them: one may hang in a lookup.
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}
