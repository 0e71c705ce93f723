//! The metrics socket's readers: each gets one JSON document and the end of the stream, at its own pace.

use api_spec::page_server::Metrics;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How long a reader may take.
const READER_DEADLINE: Duration = Duration::from_secs(2);
/// Readers that are waited for at one time; more are turned away.
pub const MAX_READERS: usize = 16;

/// One who reads the counters.
#[derive(Debug)]
pub struct Reader {
    stream: UnixStream,
    document: Vec<u8>,
    sent: usize,
    deadline: Instant,
}

impl Reader {
    /// Takes the counters as they are now, for the one who has just connected.
    pub fn new(stream: UnixStream, metrics: &Metrics) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let mut document = serde_json::to_vec(metrics)?;
        document.push(b'\n');
        Ok(Self { stream, document, sent: 0, deadline: Instant::now() + READER_DEADLINE })
    }

    /// The connection, to be watched for room.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Whether the reader has taken too long.
    pub fn is_overdue(&self, now: Instant) -> bool {
        now >= self.deadline
    }

    /// Sends what the connection has room for; true when nothing is left to send, or nobody to send it to.
    pub fn push(&mut self) -> bool {
        while self.sent < self.document.len() {
            match self.stream.write(&self.document[self.sent..]) {
                Ok(0) => return true,
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return error.kind() != io::ErrorKind::WouldBlock,
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use api_spec::page_server::SessionMetrics;
    use std::io::Read;

    #[test]
    fn a_slow_reader_gets_all_of_it_in_pieces() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let metrics = Metrics { sessions: vec![SessionMetrics::default(); 20_000], ..Metrics::default() };
        let mut reader = Reader::new(near, &metrics).unwrap();
        assert!(!reader.push(), "two megabytes fit into a socket's buffer");
        let drain = std::thread::spawn(move || {
            let mut all = Vec::new();
            far.read_to_end(&mut all).map(|_| all)
        });
        while !reader.push() {
            std::thread::yield_now();
        }
        drop(reader);
        let back: Metrics = serde_json::from_slice(&drain.join().unwrap().unwrap()).unwrap();
        assert_eq!(back, metrics);
    }

    #[test]
    fn a_reader_that_leaves_is_done_with() {
        let (near, far) = UnixStream::pair().unwrap();
        drop(far);
        assert!(Reader::new(near, &Metrics::default()).unwrap().push());
    }
}
