//! The server's half of the handshake, for one connection.
//!
//! ```text
//!   accepted --Hello--> hello --Store or Image sent--> attach --Attach + userfaultfd--> (becomes a Session)
//!    |  |                 |                              |
//!    |  +-----------------+------------------------------+--> refused: garbage, wrong descriptors, deadline, end of stream
//!    |                                    ^
//!    +--[--> array --array whole + userfaultfd--> (becomes a Session, without a word)
//! ```
//!
//! The last line is Firecracker's handshake: one JSON array with a userfaultfd, which may come in pieces, and no answer.
//!
//! This file turns bytes into requests and answers into bytes; what is granted is the server's business.

use crate::process::{Credentials, peer_credentials};
use crate::region::PAGE_SIZE;
use crate::socket::{Passed, receive};
use api_spec::handshake::{Attach, Hello, MAX_MESSAGE, REPLY_DEADLINE_MS, Region, Reply};
use serde::Deserialize;
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
    /// This image, in one mode or the other.
    Hello(Hello),
    /// To be served on this userfaultfd (not yet proven to be one).
    Attach(Vec<Region>, OwnedFd),
    /// To be served on this userfaultfd, in Firecracker's copy mode.
    Copy(Vec<Region>, OwnedFd),
}

/// What is wrong with an array that is whole and came alone.
const NO_DESCRIPTOR: &str = "no userfaultfd with the copy mode message";

/// Which message is awaited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Hello,
    Attach,
    /// The array of Firecracker's copy mode.
    Array,
}

/// One element of that array, as far as it matters here.
#[derive(Deserialize)]
#[serde(expecting = "a region")]
struct ArrayRegion {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: Option<u64>,
    /// The older name of `page_size`; the number is one of bytes all the same.
    page_size_kib: Option<u64>,
}

impl ArrayRegion {
    fn into_region(self) -> Result<Region, HandshakeError> {
        let Self { base_host_virt_addr, size, offset, page_size, page_size_kib } = self;
        let missing = || HandshakeError::Malformed(Stage::Array.name(), "missing field `page_size`".into());
        let page_size = page_size.or(page_size_kib).ok_or_else(missing)?;
        Ok(Region { base_host_virt_addr, size, offset, page_size })
    }
}

impl Stage {
    fn name(self) -> &'static str {
        match self {
            Stage::Hello => "hello",
            Stage::Attach => "attach",
            Stage::Array => "copy mode",
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
    /// The regions of an array that is whole, but for its descriptor.
    array: Option<Vec<Region>>,
    descriptor: Option<OwnedFd>,
    began: Instant,
    deadline: Instant,
}

impl Handshake {
    /// Begins with a connection that was just accepted.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let peer = peer_credentials(&stream)?;
        let (stage, began, deadline) = (Stage::Hello, Instant::now(), next_deadline());
        Ok(Self { stream, peer, stage, line: Vec::new(), array: None, descriptor: None, began, deadline })
    }

    /// When the client connected.
    pub fn began(&self) -> Instant {
        self.began
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
        match self.stage {
            _ if now < self.deadline => Ok(()),
            Stage::Array if self.array.is_some() => Err(HandshakeError::Descriptors(NO_DESCRIPTOR)),
            stage => Err(HandshakeError::Deadline(stage.name())),
        }
    }

    /// Whether the client reads answers. In Firecracker's copy mode it does not.
    pub fn is_answered(&self) -> bool {
        self.stage != Stage::Array
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
            if count == 0 {
                return Err(HandshakeError::Closed);
            }
            if self.stage == Stage::Hello && self.line.is_empty() && bytes[0] == b'[' {
                self.stage = Stage::Array;
            }
            match passed {
                Passed::None => {}
                Passed::One(descriptor) => self.keep_descriptor(descriptor)?,
                Passed::Many => return Err(HandshakeError::Descriptors("more than one descriptor")),
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
        if self.stage == Stage::Array {
            self.array = self.parse_array()?;
            return Ok(self.array.is_some() && self.descriptor.is_some());
        }
        match self.line.iter().position(|&byte| byte == b'\n') {
            Some(end) if end >= MAX_MESSAGE => Err(HandshakeError::TooLong),
            Some(end) if end + 1 < self.line.len() => Err(HandshakeError::Excess(self.stage.name())),
            Some(_) => Ok(true),
            None if self.line.len() >= MAX_MESSAGE => Err(HandshakeError::TooLong),
            None => Ok(false),
        }
    }

    /// The regions of the array, if it is whole. Nothing but its being JSON says where it ends.
    fn parse_array(&self) -> Result<Option<Vec<Region>>, HandshakeError> {
        if self.line.len() > MAX_MESSAGE {
            return Err(HandshakeError::TooLong);
        }
        // So that not every piece is reason to read all of it again.
        if !self.line.trim_ascii_end().ends_with(b"]") {
            return Ok(None);
        }
        match serde_json::from_slice::<Vec<ArrayRegion>>(&self.line) {
            Ok(regions) => regions.into_iter().map(ArrayRegion::into_region).collect::<Result<_, _>>().map(Some),
            Err(error) if error.is_eof() => Ok(None),
            Err(error) => Err(self.malformed(&error)),
        }
    }

    fn malformed(&self, error: &serde_json::Error) -> HandshakeError {
        HandshakeError::Malformed(self.stage.name(), error.to_string())
    }

    fn finish_message(&mut self) -> Result<Request, HandshakeError> {
        let line = std::mem::take(&mut self.line);
        match (self.stage, self.descriptor.take()) {
            (Stage::Hello, _) => serde_json::from_slice(&line).map(Request::Hello).map_err(|e| self.malformed(&e)),
            (Stage::Attach, None) => Err(HandshakeError::Descriptors("no userfaultfd with the attach message")),
            (Stage::Attach, Some(uffd)) => {
                let Attach { regions } = serde_json::from_slice(&line).map_err(|e| self.malformed(&e))?;
                Ok(Request::Attach(regions, uffd))
            }
            (Stage::Array, None) => Err(HandshakeError::Descriptors(NO_DESCRIPTOR)),
            (Stage::Array, Some(uffd)) => Ok(Request::Copy(self.array.take().unwrap_or_default(), uffd)),
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
        self.await_attach();
        Ok(())
    }

    /// Answers a hello that asks for copies, and awaits the attach message.
    pub fn send_image(&mut self, size: u64) -> Result<(), HandshakeError> {
        self.send(&Reply::Image { size, page_size: PAGE_SIZE })?;
        self.await_attach();
        Ok(())
    }

    fn await_attach(&mut self) {
        self.stage = Stage::Attach;
        self.deadline = next_deadline();
    }

    /// Answers an attach message: faults are being served.
    pub fn send_serving(&mut self) -> Result<(), HandshakeError> {
        self.send(&Reply::Serving)
    }

    fn send(&self, reply: &Reply) -> Result<(), HandshakeError> {
        Ok(send(&self.stream, reply)?)
    }

    /// Tells the client that it will not be served, if it reads answers and can be told at once.
    pub fn send_refusal(&mut self, reason: &str) {
        if self.is_answered() {
            let _ = self.send(&Reply::Refused { reason: reason.to_string() });
        }
    }
}

/// Sends an answer. Fails if that would mean to wait.
pub fn send(mut stream: &UnixStream, reply: &Reply) -> io::Result<()> {
    let line = encode(reply);
    complete(stream.write(&line)?, line.len())
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
fn complete(sent: usize, len: usize) -> io::Result<()> {
    if sent == len { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use api_spec::handshake::Mode;
    use proptest::prelude::*;
    use std::io::Read;

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
        assert!(refusal(b"[{\"base_host_virt_addr\":7}]").contains("not a valid copy mode message: missing field"));
        assert!(refusal(&[b"[\"", &vec![b'x'; MAX_MESSAGE][..]].concat()).contains("longer than"));
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

    const ARRAY: &[u8] = b"[{\"base_host_virt_addr\":4096,\"size\":8192,\"offset\":0,\"page_size\":4096,\"x\":[]}]";

    #[test]
    fn an_array_is_whole_with_its_descriptor_wherever_it_is_cut() {
        let null = std::fs::File::open("/dev/null").unwrap();
        for cut in 1..ARRAY.len() {
            for with_first in [false, true] {
                let (mut handshake, far) = pair();
                let (first, second) = ARRAY.split_at(cut);
                for (bytes, passes) in [(first, with_first), (second, !with_first)] {
                    assert!(handshake.receive().unwrap().is_none());
                    let descriptors: &[i32] = if passes { &[null.as_raw_fd()] } else { &[] };
                    far.send_with_fds(&[bytes], descriptors).unwrap();
                }
                let Some(Request::Copy(regions, _)) = handshake.receive().unwrap() else { panic!("cut at {cut}") };
                assert_eq!(regions[0].size, 8192);
                assert!(!handshake.is_answered());
            }
        }
    }

    /// Bytes that are likely to get somewhere.
    fn pieces() -> impl Strategy<Value = Vec<(Vec<u8>, usize)>> {
        let hello = br#"{"version":2,"image":"ab","size":4096,"mode":"copy"}"#;
        let bytes = prop_oneof![
            prop::collection::vec(any::<u8>(), 1..40),
            prop::sample::subsequence(ARRAY.to_vec(), 1..ARRAY.len()),
            prop::sample::select(vec![ARRAY.to_vec(), hello.to_vec(), b"\n".to_vec(), b"[".to_vec(), b"]".to_vec()]),
            Just(vec![b' '; MAX_MESSAGE / 2]),
        ];
        prop::collection::vec((bytes, prop::sample::select(vec![0, 0, 0, 1, 1, 2, 9])), 0..8)
    }

    proptest! {
        #[test]
        fn any_bytes_and_descriptors_do_no_harm_and_none_is_kept(pieces in pieces()) {
            let (mut handshake, far) = pair();
            // Its end tells when the last descriptor of it is closed.
            let (kept, passed) = UnixStream::pair().unwrap();
            for (bytes, descriptors) in pieces {
                let descriptors = vec![passed.as_raw_fd(); descriptors];
                far.send_with_fds(&[&bytes[..]], &descriptors).unwrap();
                match handshake.receive() {
                    Ok(Some(Request::Hello(_))) => {
                        // As the server would do.
                        let _ = handshake.send_image(4096);
                    }
                    Ok(None) => {}
                    Ok(Some(_)) | Err(_) => break,
                }
            }
            drop((handshake, far, passed));
            kept.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            prop_assert_eq!((&kept).read(&mut [0; 8]).unwrap(), 0);
        }
    }
}
