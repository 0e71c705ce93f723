//! One connection: requests in, answers out. The socket does not block; every wait here has an end.

use crate::frames::Inbox;
use api_spec::agent::linux::{AnyRequest, AnyResponse, encode_response};
use api_spec::agent::{Envelope, FrameError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use std::time::{Duration, Instant};

/// How long the rest of a frame may take to come, and an answer to be taken.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Why a connection is of no further use.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// The peer has closed it.
    #[error("closed by the peer")]
    Closed,
    /// The socket has failed.
    #[error(transparent)]
    Socket(#[from] Errno),
    /// What came is no request.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The peer stopped in the middle of a frame, or takes nothing.
    #[error("the peer has stalled")]
    Stalled,
}

/// A connection.
#[derive(Debug)]
pub struct Stream {
    socket: OwnedFd,
    inbox: Inbox,
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Stream {
    /// Takes over a socket that does not block.
    pub fn new(socket: OwnedFd) -> Self {
        Stream { socket, inbox: Inbox::default() }
    }

    /// Waits for the next request: for ever, unless a frame has begun or `until` is given.
    pub fn receive(&mut self, until: Option<Instant>) -> Result<Envelope<AnyRequest>, Broken> {
        let mut begun = None;
        loop {
            if let Some(request) = self.inbox.next_request()? {
                return Ok(request);
            }
            if self.inbox.has_begun() && begun.is_none() {
                begun = Some(Instant::now() + PATIENCE);
            }
            let until = [begun, until].into_iter().flatten().min();
            if !wait(self.as_fd(), PollFlags::IN, until)? {
                return Err(Broken::Stalled);
            }
            self.fill()?;
        }
    }

    /// Takes in what has come, without waiting.
    pub fn fill(&mut self) -> Result<(), Broken> {
        let mut buf = [0; 16 * 1024];
        let room = self.inbox.room().min(buf.len());
        match recv(&self.socket, &mut buf[..room], RecvFlags::empty()) {
            Ok((0, _)) => Err(Broken::Closed),
            Ok((len, _)) => {
                self.inbox.add(&buf[..len]);
                Ok(())
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// The next request that is there whole.
    pub fn next_request(&mut self) -> Result<Option<Envelope<AnyRequest>>, FrameError> {
        self.inbox.next_request()
    }

    /// Sends an answer.
    pub fn send(&mut self, id: u32, response: &AnyResponse) -> Result<(), Broken> {
        let frame = encode_response(id, response)?;
        let mut rest = &frame[..];
        while !rest.is_empty() {
            let sent = self.push(rest)?;
            rest = &rest[sent..];
            if sent == 0 && !wait(self.as_fd(), PollFlags::OUT, Some(Instant::now() + PATIENCE))? {
                return Err(Broken::Stalled);
            }
        }
        Ok(())
    }

    /// Sends what the socket takes, without waiting; how much that was.
    pub fn push(&mut self, bytes: &[u8]) -> Result<usize, Broken> {
        match send(&self.socket, bytes, SendFlags::NOSIGNAL) {
            Ok(len) => Ok(len),
            Err(Errno::AGAIN | Errno::INTR) => Ok(0),
            Err(e) => Err(e.into()),
        }
    }

    /// Whether the peer is gone.
    pub fn is_broken(&self) -> bool {
        let mut fds = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_err() || !fds[0].revents().is_empty()
    }
}

/// Waits for one of `events` on a descriptor; false if `until` has passed.
pub fn wait(fd: BorrowedFd<'_>, events: PollFlags, until: Option<Instant>) -> Result<bool, Errno> {
    loop {
        match poll(&mut [PollFd::new(&fd, events)], timeout(until).as_ref()) {
            Ok(0) if until.is_some_and(|until| Instant::now() >= until) => return Ok(false),
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(e) => return Err(e),
        }
    }
}

/// What is left until then, for [`poll`].
pub fn timeout(until: Option<Instant>) -> Option<Timespec> {
    let left = until?.saturating_duration_since(Instant::now());
    // An absurdly distant moment is as good as a day; whoever waits looks at the clock again.
    let left = left.min(Duration::from_secs(24 * 60 * 60));
    Some(Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) })
}
