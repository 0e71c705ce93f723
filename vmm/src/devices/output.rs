//! A writer that never blocks whoever writes to it.
//!
//! A guest writes to its serial port on a vCPU thread, and what reads our standard output may be a pipe that nobody
//! empties. [`Output`] hands the bytes to a thread of its own and, when that one has fallen too far behind, drops them.

use std::io::{self, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, channel, sync_channel};
use std::thread;
use std::time::Duration;

/// How many bytes may wait to be written.
const BACKLOG: usize = 64 * 1024;
/// How long dropping an [`Output`] waits for the last bytes to be written.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A writer that never blocks: bytes beyond a backlog of 64 KiB are refused with [`io::ErrorKind::WouldBlock`].
///
/// Dropping it waits up to a second for the backlog to be written.
pub struct Output {
    bytes: Option<SyncSender<u8>>,
    finished: Receiver<()>,
}

impl Output {
    /// Starts the thread that writes to `inner`.
    pub fn new(inner: Box<dyn Write + Send>) -> io::Result<Self> {
        let (bytes, backlog) = sync_channel(BACKLOG);
        // The thread drops its end when it is done, and that is the whole message.
        let (alive, finished) = channel();
        thread::Builder::new().name("output".into()).spawn(move || {
            copy(&backlog, inner);
            drop(alive);
        })?;
        Ok(Output { bytes: Some(bytes), finished })
    }
}

/// Writes what arrives until nobody can send any more. Errors lose bytes, never the thread: the reader may come back.
fn copy(backlog: &Receiver<u8>, mut inner: Box<dyn Write + Send>) {
    let mut batch = Vec::new();
    while let Ok(first) = backlog.recv() {
        batch.clear();
        batch.push(first);
        batch.extend(backlog.try_iter().take(4095));
        let _ = inner.write_all(&batch).and_then(|()| inner.flush());
    }
}

impl Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let Some(sender) = &self.bytes else { return Err(io::ErrorKind::BrokenPipe.into()) };
        for (sent, byte) in data.iter().enumerate() {
            match sender.try_send(*byte) {
                Ok(()) => {}
                Err(_) if sent > 0 => return Ok(sent),
                Err(TrySendError::Full(_)) => return Err(io::ErrorKind::WouldBlock.into()),
                Err(TrySendError::Disconnected(_)) => return Err(io::ErrorKind::BrokenPipe.into()),
            }
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        self.bytes = None;
        if let Err(RecvTimeoutError::Timeout) = self.finished.recv_timeout(LAST_WORDS) {
            log::warn!("serial output is lost: whoever reads it has not done so for {LAST_WORDS:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    /// Appends to a vector that the test also holds.
    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(data);
            Ok(data.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// Blocks for as long as the test holds the other end.
    struct Blocked(Receiver<()>);

    impl Write for Blocked {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            Ok(data.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn everything_is_written_in_order_before_the_drop_returns() {
        let shared = Shared::default();
        let mut output = Output::new(Box::new(shared.clone())).unwrap();
        let text: Vec<u8> = (0..20_000u32).map(|n| n as u8).collect();
        output.write_all(&text).unwrap();
        drop(output);
        assert_eq!(*shared.0.lock().unwrap(), text);
    }

    #[test]
    fn a_blocked_reader_costs_bytes_and_never_blocks() {
        let (release, blocked) = channel();
        let mut output = Output::new(Box::new(Blocked(blocked))).unwrap();
        let mut refused = None;
        for _ in 0..=BACKLOG + 4096 {
            if let Err(error) = output.write(b"x") {
                refused = Some(error.kind());
                break;
            }
        }
        assert_eq!(refused, Some(io::ErrorKind::WouldBlock));
        drop(release);
    }
}
