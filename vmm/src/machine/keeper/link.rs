//! The connection to a page server that serves: pings go out, and what is said comes in as events.

use super::plan::Event;
use crate::memory::uffd::{Mode, Service, Sign};
use api_spec::handshake::{MAX_MESSAGE, MAX_USED_MESSAGES, MAX_USED_RUNS, Ping, Reply, Used, Word};
use rustix::event::{PollFd, PollFlags};
use snapshot::page_runs::PageRuns;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use uffd_handler::text::one_line;

/// How many pieces of what the server says are taken in at a time.
const TURNS: u32 = 64;

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
    /// What is still to be sent.
    unsaid: Vec<u8>,
}

/// What the server has said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// Something that bears on whether it serves.
    Event(Event),
    /// It wants to know what the guest has used.
    Report,
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
            unsaid: Vec::new(),
        })
    }

    /// What to watch for what the server says, if that means anything, and for room.
    pub fn poll_fd(&self) -> Option<PollFd<'_>> {
        let room = if self.unsaid.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
        self.speaks.then(|| PollFd::new(&self.connection, PollFlags::IN | room))
    }

    /// Asks whether the server is alive.
    pub fn ping(&mut self, ping: u64) {
        self.say(&Word::Ping(Ping { ping }));
    }

    /// Tells what the guest has used.
    pub fn report(&mut self, read: &PageRuns, written: &PageRuns) {
        const RUNS: usize = MAX_USED_RUNS / 2;
        let most = RUNS * MAX_USED_MESSAGES;
        let [read, written] = [read, written].map(|runs| Vec::<(u64, u64)>::from(runs.clone().bounded(most)));
        let messages = read.len().max(written.len()).div_ceil(RUNS).max(1);
        let part =
            |runs: &[(u64, u64)], number: usize| runs.chunks(RUNS).nth(number).map(<[_]>::to_vec).unwrap_or_default();
        for number in 0..messages {
            let (read, written) = (part(&read, number), part(&written, number));
            self.say(&Word::Used(Used { read, written, more: number + 1 < messages }));
        }
    }

    fn say(&mut self, word: &Word) {
        if let Ok(line) = serde_json::to_vec(word) {
            self.unsaid.extend_from_slice(&line);
            self.unsaid.push(b'\n');
        }
        self.send();
    }

    /// Sends what there is room for. What cannot be sent has no answer: that is noticed.
    fn send(&mut self) {
        if let Ok(sent) = self.connection.write(&self.unsaid) {
            self.unsaid.drain(..sent);
        }
    }

    /// Takes in what the server has said.
    pub fn hear(&mut self) -> Vec<Heard> {
        if !self.unsaid.is_empty() {
            self.send();
        }
        let (mut events, mut bytes, mut turns) = (Vec::new(), [0; 1024], 0);
        let gone = Heard::Event(Event::Gone);
        loop {
            match self.connection.read(&mut bytes) {
                Ok(0) => break events.push(gone),
                Ok(count) => self.heard.extend_from_slice(&bytes[..count]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => break events.push(gone),
            }
            while let Some(end) = self.heard.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.heard.drain(..=end).collect();
                events.push(self.meaning(&line));
            }
            turns += 1;
            if turns == TURNS {
                break;
            }
            if self.heard.len() > MAX_MESSAGE || events.contains(&gone) {
                break events.push(gone);
            }
        }
        events
    }

    fn meaning(&self, line: &[u8]) -> Heard {
        Heard::Event(match serde_json::from_slice(line) {
            Ok(Reply::Report) => return Heard::Report,
            Ok(Reply::Pong { ping, waiting, away }) => {
                Event::Pong { ping, waiting, away: away.as_deref().map(one_line) }
            }
            Ok(Reply::Refused { reason }) if self.has_store => Event::Refused(reason),
            // One that talks nonsense, or refuses a guest that has nothing of it, is no page server any more.
            _ => Event::Gone,
        })
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // The service holds the connection too.
        let _ = self.connection.shutdown(Shutdown::Both);
    }
}
