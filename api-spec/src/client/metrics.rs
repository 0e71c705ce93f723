//! Reading the page server's metrics.

use super::rest::{RestClient, RestError};
use crate::page_server::Metrics;
use std::io;
use std::path::Path;
use std::time::Duration;

/// Longest answer that is taken, in bytes.
const MAX_ANSWER: usize = 64 << 20;

/// Reads the page server's counters from its metrics socket.
pub fn read(path: &Path, patience: Duration) -> io::Result<Metrics> {
    fetch(path, patience).map_err(|error| match error {
        RestError::Connect(error) | RestError::Io(error) => error,
        RestError::Answer(what) => {
            io::Error::new(io::ErrorKind::InvalidData, format!("its answer is not understood: {what}"))
        }
        refused => io::Error::other(refused),
    })
}

fn fetch(path: &Path, patience: Duration) -> Result<Metrics, RestError> {
    let mut client = RestClient::connect(path, patience)?;
    client.set_max_answer(MAX_ANSWER);
    client.get("/metrics.json")
}
