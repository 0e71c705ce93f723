//! The server's half of the handshake, for one connection.
//!
//! ```text
//!   accepted --Hello--> hello --Store sent--> attach --Attach + userfaultfd--> (becomes a Session)
//!       |                 |                     |
//!       +-----------------+---------------------+--> refused: garbage, wrong descriptors, deadline, end of stream
//! ```
//!
//! This file turns bytes into requests and answers into bytes; what is granted is the server's business.

use crate::process::{Credentials, peer_credentials};
use crate::region::PAGE_SIZE;
use crate::socket::{Passed, receive};
use api_spec::handshake::{Attach, Hello, MAX_MESSAGE, REPLY_DEADLINE_MS, Region, Reply};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Why a handshake ended without a session. The text is what the client and the log are told.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The stream ended.
    #[error("the client closed the connection before it was served")]
    Closed,
    /// A message with no end.
    #[error("message longer than {MAX_MESSAGE} bytes")]
    TooLong,
    /// The first byte of a Firecracker-style handshake.
    #[error("copy mode (a JSON array with a userfaultfd) is not offered yet: use shared mode")]
    CopyMode,
    /// Not the JSON that belongs here.
    #[error("not a valid {0} message: {1}")]
    Malformed(&'static str, String),
    /// A second message before the answer to the first.
    #[error("bytes after the {0} message")]
    Excess(&'static str),
    /// A descriptor where none belongs, or more than one.
    #[error("{0}")]
    Descriptors(&'static str),
    /// Nothing came for too long.
    #[error("no complete {0} message within {REPLY_DEADLINE_MS} ms")]
    Deadline(&'static str),
    /// The socket failed.
    #[error("connection failed: {0}")]
    Socket(#[from] io::Error),
}

/// What a client asks for.
#[derive(Debug)]
pub enum Request {
    /// A store of this image.
    Hello(Hello),
    /// To be served on this userfaultfd (not yet proven to be one).
    Attach(Vec<Region>, OwnedFd),
}

/// Which message is awaited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Hello,
    Attach,
}

impl Stage {
    fn name(self) -> &'static str {
        match self {
            Stage::Hello => "hello",
            Stage::Attach => "attach",
        }
    }
}

/// One connection until it is served or refused.
#[derive(Debug)]
pub struct Handshake {
    stream: UnixStream,
    /// Who connected.
    pub peer: Credentials,
    stage: Stage,
    line: Vec<u8>,
    descriptor: Option<OwnedFd>,
    deadline: Instant,
}

impl Handshake {
    /// Begins with a connection that was just accepted.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let peer = peer_credentials(&stream)?;
        Ok(Self { stream, peer, stage: Stage::Hello, line: Vec::new(), descriptor: None, deadline: next_deadline() })
    }

    /// The connection, to be watched.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// The connection, for the session that follows.
    pub fn into_stream(self) -> UnixStream {
        self.stream
    }

    /// Fails if the awaited message is overdue.
    pub fn check_deadline(&self, now: Instant) -> Result<(), HandshakeError> {
        if now < self.deadline { Ok(()) } else { Err(HandshakeError::Deadline(self.stage.name())) }
    }

    /// Takes what has arrived; returns a request when one is complete, `None` when more must come.
    pub fn receive(&mut self) -> Result<Option<Request>, HandshakeError> {
        let mut bytes = [0; 4096];
        loop {
            let (count, passed) = match receive(&self.stream, &mut bytes) {
                Ok(received) => received,
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(None),
                    io::ErrorKind::Interrupted => continue,
                    _ => return Err(error.into()),
                },
            };
            match passed {
                Passed::None => {}
                Passed::One(descriptor) => self.keep_descriptor(descriptor)?,
                Passed::Many => return Err(HandshakeError::Descriptors("more than one descriptor")),
            }
            if count == 0 {
                return Err(HandshakeError::Closed);
            }
            if self.take_bytes(&bytes[..count])? {
                return self.finish_message().map(Some);
            }
        }
    }

    fn keep_descriptor(&mut self, descriptor: OwnedFd) -> Result<(), HandshakeError> {
        if self.stage == Stage::Hello {
            return Err(HandshakeError::Descriptors("a descriptor with the hello message"));
        }
        match self.descriptor.replace(descriptor) {
            None => Ok(()),
            Some(_) => Err(HandshakeError::Descriptors("more than one descriptor")),
        }
    }

    /// Adds bytes to the message; true when it is complete.
    fn take_bytes(&mut self, bytes: &[u8]) -> Result<bool, HandshakeError> {
        self.line.extend_from_slice(bytes);
        if self.stage == Stage::Hello && self.line[0] == b'[' {
            return Err(HandshakeError::CopyMode);
        }
        match self.line.iter().position(|&byte| byte == b'\n') {
            Some(end) if end >= MAX_MESSAGE => Err(HandshakeError::TooLong),
            Some(end) if end + 1 < self.line.len() => Err(HandshakeError::Excess(self.stage.name())),
            Some(_) => Ok(true),
            None if self.line.len() >= MAX_MESSAGE => Err(HandshakeError::TooLong),
            None => Ok(false),
        }
    }

    fn finish_message(&mut self) -> Result<Request, HandshakeError> {
        let line = std::mem::take(&mut self.line);
        let malformed = |error: serde_json::Error| HandshakeError::Malformed(self.stage.name(), error.to_string());
        match (self.stage, self.descriptor.take()) {
            (Stage::Hello, _) => serde_json::from_slice(&line).map(Request::Hello).map_err(malformed),
            (Stage::Attach, None) => Err(HandshakeError::Descriptors("no userfaultfd with the attach message")),
            (Stage::Attach, Some(uffd)) => {
                let Attach { regions } = serde_json::from_slice(&line).map_err(malformed)?;
                Ok(Request::Attach(regions, uffd))
            }
        }
    }

    /// Answers a hello with the store and awaits the attach message.
    pub fn send_store(&mut self, size: u64, store: BorrowedFd) -> Result<(), HandshakeError> {
        let line = encode(&Reply::Store { size, page_size: PAGE_SIZE });
        let sent = self
            .stream
            .send_with_fd(&line[..], store.as_raw_fd())
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        complete(sent, line.len())?;
        self.stage = Stage::Attach;
        self.deadline = next_deadline();
        Ok(())
    }

    /// Answers an attach message: faults are being served.
    pub fn send_serving(&mut self) -> Result<(), HandshakeError> {
        let line = encode(&Reply::Serving);
        complete((&self.stream).write(&line)?, line.len())
    }

    /// Tells the client that it will not be served, if it can be told at once.
    pub fn send_refusal(&mut self, reason: &str) {
        let _ = (&self.stream).write(&encode(&Reply::Refused { reason: reason.to_string() }));
    }
}

fn next_deadline() -> Instant {
    Instant::now() + Duration::from_millis(REPLY_DEADLINE_MS)
}

fn encode(reply: &Reply) -> Vec<u8> {
    let mut line = serde_json::to_vec(reply).unwrap_or_default();
    line.push(b'\n');
    line
}

/// Answers are short and the socket's buffer was empty: a part of one means a peer that plays tricks with it.
fn complete(sent: usize, len: usize) -> Result<(), HandshakeError> {
    if sent == len { Ok(()) } else { Err(io::Error::from(io::ErrorKind::WriteZero).into()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use api_spec::handshake::Mode;

    fn pair() -> (Handshake, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        (Handshake::new(near).unwrap(), far)
    }

    fn refusal(bytes: &[u8]) -> String {
        let (mut handshake, mut far) = pair();
        far.write_all(bytes).unwrap();
        handshake.receive().unwrap_err().to_string()
    }

    #[test]
    fn hello_may_come_in_pieces() {
        let (mut handshake, mut far) = pair();
        far.write_all(br#"{"version":1,"ima"#).unwrap();
        assert!(handshake.receive().unwrap().is_none());
        far.write_all(b"ge\":\"ab\",\"size\":4096}\n").unwrap();
        match handshake.receive().unwrap() {
            Some(Request::Hello(hello)) => {
                assert_eq!(hello, Hello { version: 1, image: "ab".into(), size: 4096, mode: Mode::Shared })
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn garbage_array_excess_and_endless_lines_refused() {
        assert!(refusal(b"GET / HTTP/1.1\r\n").contains("not a valid hello"));
        assert!(refusal(b"[{\"base_host_virt_addr\":").contains("copy mode"));
        assert!(refusal(b"{}\n{}\n").contains("bytes after"));
        assert!(refusal(&vec![b' '; MAX_MESSAGE]).contains("longer than"));
        assert!(refusal(b"{\"version\":1,\"image\":\"\",\"size\":1,\"more\":2}\n").contains("unknown field"));
    }

    #[test]
    fn descriptor_with_hello_refused() {
        let (mut handshake, far) = pair();
        far.send_with_fd(&b"{\"version\":1,\"image\":\"\",\"size\":1}\n"[..], 0).unwrap();
        assert!(handshake.receive().unwrap_err().to_string().contains("descriptor with the hello"));
    }

    #[test]
    fn end_of_stream_is_noticed() {
        let (mut handshake, far) = pair();
        drop(far);
        assert!(matches!(handshake.receive(), Err(HandshakeError::Closed)));
    }

    #[test]
    fn an_overdue_message_is_named() {
        let (handshake, _far) = pair();
        assert!(handshake.check_deadline(Instant::now()).is_ok());
        let late = Instant::now() + Duration::from_millis(REPLY_DEADLINE_MS + 1);
        assert!(handshake.check_deadline(late).unwrap_err().to_string().contains("hello"));
    }
}
