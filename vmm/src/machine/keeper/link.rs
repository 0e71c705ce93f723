//! The connection to a page server that serves: pings go out, and what is said comes in as events.

use super::plan::Event;
use crate::memory::uffd::{Mode, Service, Sign};
use api_spec::handshake::{MAX_MESSAGE, Ping, Reply};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

/// The connection.
#[derive(Debug)]
pub struct Link {
    connection: UnixStream,
    /// Comes when the server is gone.
    pub sign: Sign,
    speaks: bool,
    /// The guest maps what the server gave.
    has_store: bool,
    /// The beginning of a line.
    heard: Vec<u8>,
}

impl Link {
    /// To a server that serves.
    pub fn new(service: &Service) -> io::Result<Self> {
        let connection = service.connection.try_clone()?;
        connection.set_nonblocking(true)?;
        Ok(Link {
            sign: service.mode.sign(&connection)?,
            connection,
            speaks: service.mode.speaks(),
            has_store: matches!(service.mode, Mode::Shared),
            heard: Vec::new(),
        })
    }

    /// What to watch for what the server says, if that means anything.
    pub fn lines(&self) -> Option<BorrowedFd<'_>> {
        self.speaks.then(|| self.connection.as_fd())
    }

    /// Asks whether the server is alive. If that cannot be sent there is no answer either.
    pub fn ping(&mut self, ping: u64) {
        if let Ok(mut line) = serde_json::to_vec(&Ping { ping }) {
            line.push(b'\n');
            let _ = self.connection.write(&line);
        }
    }

    /// Takes in what the server has said.
    pub fn hear(&mut self) -> Vec<Event> {
        let (mut events, mut bytes) = (Vec::new(), [0; 1024]);
        loop {
            match self.connection.read(&mut bytes) {
                Ok(0) => break events.push(Event::Gone),
                Ok(count) => self.heard.extend_from_slice(&bytes[..count]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => break events.push(Event::Gone),
            }
            while let Some(end) = self.heard.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.heard.drain(..=end).collect();
                events.push(self.meaning(&line));
            }
            if self.heard.len() > MAX_MESSAGE || events.contains(&Event::Gone) {
                break events.push(Event::Gone);
            }
        }
        events
    }

    fn meaning(&self, line: &[u8]) -> Event {
        match serde_json::from_slice(line) {
            Ok(Reply::Pong { ping, waiting, away }) => Event::Pong { ping, waiting, away },
            Ok(Reply::Refused { reason }) if self.has_store => Event::Refused(reason),
            // One that talks nonsense, or refuses a guest that has nothing of it, is no page server any more.
            _ => Event::Gone,
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // The service holds the connection too.
        let _ = self.connection.shutdown(Shutdown::Both);
    }
}
