//! A writer that never blocks whoever writes to it.
//!
//! A guest writes to its serial port on a vCPU thread, and what reads our standard output may be a pipe that nobody
//! empties. [`Output`] hands the bytes to a thread of its own and, when that one has fallen too far behind, refuses
//! them. A guest that writes nothing costs neither the thread nor the memory.

use std::io::{self, Write};
use std::mem;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use super::lock;
use crate::sandbox::{self, Kind};

/// How many bytes may wait to be written.
const BACKLOG: usize = 64 * 1024;
/// How long dropping an [`Output`] waits for the last bytes to be written.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A writer that never blocks: bytes beyond a backlog of 64 KiB are refused with [`io::ErrorKind::WouldBlock`].
///
/// Dropping it waits up to a second for the backlog to be written.
pub struct Output {
    shared: Arc<Shared>,
    has_thread: bool,
}

#[derive(Default)]
struct Shared {
    backlog: Mutex<Backlog>,
    changed: Condvar,
}

#[derive(Default)]
struct Backlog {
    waiting: Vec<u8>,
    /// The thread is writing bytes that it has taken.
    busy: bool,
    /// Nobody will add bytes any more.
    closed: bool,
    /// Until there is a thread: what it will write to.
    inner: Option<Box<dyn Write + Send>>,
}

impl Output {
    /// Will write to `inner`, on a thread that the first byte starts.
    pub fn new(inner: Box<dyn Write + Send>) -> Self {
        let backlog = Backlog { inner: Some(inner), ..Backlog::default() };
        Output { shared: Arc::new(Shared { backlog: Mutex::new(backlog), ..Shared::default() }), has_thread: false }
    }
}

/// Writes what arrives until nobody can add any more. Errors lose bytes, never the thread: the reader may come back.
fn copy(shared: &Shared) {
    let mut backlog = lock(&shared.backlog);
    let Some(mut inner) = backlog.inner.take() else { return };
    loop {
        let bytes = mem::take(&mut backlog.waiting);
        backlog.busy = !bytes.is_empty();
        if backlog.busy {
            drop(backlog);
            let _ = inner.write_all(&bytes).and_then(|()| inner.flush());
            backlog = lock(&shared.backlog);
            continue;
        }
        shared.changed.notify_all();
        if backlog.closed {
            return;
        }
        backlog = shared.changed.wait(backlog).unwrap_or_else(std::sync::PoisonError::into_inner);
    }
}

impl Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if !self.has_thread {
            // Refused until there can be a thread: the next byte tries again.
            let shared = self.shared.clone();
            sandbox::spawn("output", Kind::Stream, move || copy(&shared))?;
            self.has_thread = true;
        }
        let mut backlog = lock(&self.shared.backlog);
        let taken = data.len().min(BACKLOG - backlog.waiting.len());
        if taken == 0 && !data.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        backlog.waiting.extend_from_slice(&data[..taken]);
        drop(backlog);
        self.shared.changed.notify_all();
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        let mut backlog = lock(&self.shared.backlog);
        backlog.closed = true;
        self.shared.changed.notify_all();
        let written = |backlog: &mut Backlog| backlog.busy || !backlog.waiting.is_empty();
        let wait = self.shared.changed.wait_timeout_while(backlog, LAST_WORDS, written);
        if wait.is_ok_and(|(_, waited)| waited.timed_out()) {
            tracing::warn!("serial output is lost: whoever reads it has not done so for {LAST_WORDS:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, channel};
    use std::sync::{Arc, Mutex};

    /// Appends to a vector that the test also holds.
    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
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
        let shared = Sink::default();
        let mut output = Output::new(Box::new(shared.clone()));
        let text: Vec<u8> = (0..20_000u32).map(|n| n as u8).collect();
        output.write_all(&text).unwrap();
        drop(output);
        assert_eq!(*shared.0.lock().unwrap(), text);
    }

    #[test]
    fn a_blocked_reader_costs_bytes_and_never_blocks() {
        let (release, blocked) = channel();
        let mut output = Output::new(Box::new(Blocked(blocked)));
        let mut refused = None;
        for _ in 0..=2 * BACKLOG {
            if let Err(error) = output.write(b"x") {
                refused = Some(error.kind());
                break;
            }
        }
        assert_eq!(refused, Some(io::ErrorKind::WouldBlock));
        drop(release);
    }
}
