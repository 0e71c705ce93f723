//! The connection to the host's ready port: the agent says there how ready the guest is, and keeps it open, since a
//! restore resets it.

use crate::address::Address;
use api_spec::agent::{Envelope, GuestKind, Level, Response, encode};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown, send, shutdown};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The host's ready port.
#[derive(Debug)]
pub struct Host {
    address: Address,
    link: Mutex<Link>,
}

#[derive(Debug, Default)]
struct Link {
    socket: Option<Arc<OwnedFd>>,
    announced: Option<Level>,
    resets: u64,
}

impl Link {
    /// Takes note of what became of the connection.
    fn look(&mut self) {
        let Some(socket) = &self.socket else { return };
        let mut fds = [PollFd::new(socket, PollFlags::RDHUP)];
        let looked = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
        let seen = fds[0].revents();
        if looked.is_err() || seen.is_empty() {
            return;
        }
        // A host that closes in order does not mean anything by it.
        self.resets += u64::from(seen.contains(PollFlags::ERR));
        self.socket = None;
    }
}

impl Host {
    /// The ready port at `address`; nothing is connected yet.
    pub fn new(address: Address) -> Self {
        Host { address, link: Mutex::default() }
    }

    fn link(&self) -> MutexGuard<'_, Link> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How often the connection has been reset.
    pub fn resets(&self) -> u64 {
        let mut link = self.link();
        link.look();
        link.resets
    }

    /// Says how ready the guest is, over the connection that there is or a new one.
    pub fn announce(&self, level: Level) -> Result<(), Errno> {
        let mut link = self.link();
        link.look();
        let socket = match &link.socket {
            Some(socket) => Arc::clone(socket),
            None => Arc::new(self.address.connect()?),
        };
        let mut buf = [0; 64];
        let ready = Envelope { id: 0, body: Response::Ready { level, kind: GuestKind::Linux } };
        let frame = encode(&ready, &mut buf).map_err(|_| Errno::MSGSIZE)?;
        // A fresh or idle connection takes a dozen bytes at once, or is of no use.
        if send(&socket, frame, SendFlags::NOSIGNAL)? != frame.len() {
            link.socket = None;
            return Err(Errno::AGAIN);
        }
        (link.socket, link.announced) = (Some(socket), Some(level));
        Ok(())
    }

    /// What the host was last told; none if it has to be told again.
    pub fn announced(&self) -> Option<Level> {
        self.link().announced
    }

    /// Whether there is a connection.
    pub fn is_connected(&self) -> bool {
        let mut link = self.link();
        link.look();
        link.socket.is_some()
    }

    /// The host has to be told again, over a new connection.
    pub fn renew(&self) {
        let mut link = self.link();
        link.announced = None;
        if let Some(socket) = link.socket.take() {
            let _ = shutdown(&socket, Shutdown::Both);
        }
    }

    /// Waits until the connection breaks, in whatever way; returns at once if there is none.
    pub fn watch(&self) {
        let Some(socket) = self.link().socket.clone() else { return };
        let mut fds = [PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::RDHUP)];
        let _ = poll(&mut fds, None);
    }
}
