//! Reading the page server's metrics.

use super::unix;
use crate::page_server::Metrics;
use std::io::{self, Read};
use std::path::Path;
use std::time::{Duration, Instant};

/// Longest document that is taken, in bytes.
const MAX_DOCUMENT: u64 = 64 << 20;

/// Reads the page server's counters from its metrics socket.
pub fn read(path: &Path, patience: Duration) -> io::Result<Metrics> {
    let deadline = Instant::now() + patience;
    let stream = unix::connect(path, patience)?;
    unix::limit(&stream, deadline)?;
    let mut document = Vec::new();
    stream.take(MAX_DOCUMENT).read_to_end(&mut document)?;
    Ok(serde_json::from_slice(&document)?)
}
