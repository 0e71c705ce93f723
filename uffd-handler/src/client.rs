//! The client's half of the handshake, for the vmm: from a socket path to a guest that is being served.
//!
//! ```text
//!   greet() -> Greeted { store }     map the store privately, register the ranges with a userfaultfd, then
//!   Greeted::attach() -> UnixStream  keep it open for the life of the guest; its end means that the server is gone
//!
//!   ask_for_copies() -> Promised     the same without a store: the server is going to copy into private memory
//!   Promised::attach() -> UnixStream
//!
//!   hand_over() -> UnixStream        copy mode as Firecracker has it: no answer; the server may close it and serve, so its
//!                                    end means something only where the server's process cannot be watched
//! ```

use crate::process::{peer_credentials, unread_by_peer};
use crate::socket::{Passed, receive};
use api_spec::client::unix;
use api_spec::handshake::{
    Attach, CopyRegion, HELLO_DEADLINE_MS, Hello, MAX_MESSAGE, Mode, REPLY_DEADLINE_MS, Region, Reply,
};
use rustix::net::RecvFlags;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};
use userfaultfd::Uffd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Why the page server does not serve this guest.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens there.
    #[error("cannot connect: {0}; is it running? `uffd-handler --socket PATH --snapshot SNAPSHOT` starts ours")]
    Connect(io::Error),
    /// It said no.
    #[error("refused: {0}")]
    Refused(String),
    /// It is somebody else's.
    #[error("it is of user {found}, and should be of user {expected}: a guest is handed to nobody else")]
    OtherUser {
        /// Whose it is.
        found: u32,
        /// Whose it should be, or root's.
        expected: u32,
    },
    /// It does not answer.
    #[error(
        "no answer to the {0} message in time; a Firecracker-style handler stays silent like this, since it speaks copy mode: `--uffd-mode copy`, or `backend_type` `Uffd` over the API"
    )]
    Silent(&'static str),
    /// It hung up.
    #[error("it closed the connection during the handshake")]
    Closed,
    /// It leaves the message of copy mode where it is.
    #[error(
        "it is there, but has not taken the userfaultfd within {REPLY_DEADLINE_MS} ms: it does not accept connections, or does not read from them"
    )]
    NotTaken,
    /// It answered something else.
    #[error("its answer makes no sense here: {0}")]
    Unexpected(String),
    /// The connection failed.
    #[error("the connection failed: {0}")]
    Socket(#[from] io::Error),
}

/// A client that has its store and is to register it.
#[derive(Debug)]
pub struct Greeted {
    stream: UnixStream,
    /// The page store: read-only, to be mapped privately, and not touched before it is registered.
    pub store: OwnedFd,
}

/// A client that has nothing yet but a server that will copy pages for it.
#[derive(Debug)]
pub struct Promised {
    stream: UnixStream,
}

/// Connects and asks for the store of an image.
pub fn greet(path: &Path, hello: &Hello) -> Result<Greeted, ClientError> {
    match ask(path, &Hello { mode: Mode::Shared, ..hello.clone() })? {
        (stream, Reply::Store { size, .. }, Some(store)) if size == hello.size => Ok(Greeted { stream, store }),
        (_, other, _) => Err(unexpected(other)),
    }
}

/// Connects and asks for copies of the pages of an image.
pub fn ask_for_copies(path: &Path, hello: &Hello) -> Result<Promised, ClientError> {
    match ask(path, &Hello { mode: Mode::Copy, ..hello.clone() })? {
        (stream, Reply::Image { size, .. }, None) if size == hello.size => Ok(Promised { stream }),
        (_, other, _) => Err(unexpected(other)),
    }
}

fn ask(path: &Path, hello: &Hello) -> Result<(UnixStream, Reply, Option<OwnedFd>), ClientError> {
    let patience = Duration::from_millis(REPLY_DEADLINE_MS);
    let stream = unix::connect(path, patience).map_err(ClientError::Connect)?;
    stream.set_write_timeout(Some(patience))?;
    (&stream).write_all(&line(hello)?).map_err(sending)?;
    let (reply, descriptor) = receive_reply(&stream, "hello", HELLO_DEADLINE_MS)?;
    Ok((stream, reply, descriptor))
}

impl Greeted {
    /// Hands over the userfaultfd with which the regions are registered. The caller keeps its own.
    pub fn attach(self, regions: Vec<Region>, uffd: &Uffd) -> Result<UnixStream, ClientError> {
        attach(self.stream, regions, uffd)
    }
}

impl Promised {
    /// See [`check_user`].
    pub fn check_user(&self, uid: u32) -> Result<(), ClientError> {
        check_user(&self.stream, uid)
    }

    /// Hands over the userfaultfd with which the regions are registered. The caller keeps its own.
    pub fn attach(self, regions: Vec<Region>, uffd: &Uffd) -> Result<UnixStream, ClientError> {
        attach(self.stream, regions, uffd)
    }
}

fn attach(stream: UnixStream, regions: Vec<Region>, uffd: &Uffd) -> Result<UnixStream, ClientError> {
    let line = line(&Attach { regions })?;
    let sent = stream.send_with_fd(&line[..], uffd.as_raw_fd());
    let sent = sent.map_err(|error| sending(io::Error::from_raw_os_error(error.errno())))?;
    (&stream).write_all(&line[sent..]).map_err(sending)?;
    match receive_reply(&stream, "attach", REPLY_DEADLINE_MS)? {
        (Reply::Serving, None) => Ok(stream),
        (other, _) => Err(unexpected(other)),
    }
}

/// Whether the server is of this user, or root's.
pub fn check_user(stream: &UnixStream, expected: u32) -> Result<(), ClientError> {
    match peer_credentials(stream)?.uid {
        found if found == expected || found == 0 => Ok(()),
        found => Err(ClientError::OtherUser { found, expected }),
    }
}

/// Copy mode: connects and hands over the userfaultfd with which the regions are registered, of which the caller keeps its
/// own. Returns when the server has taken them, which is all that it does: it never answers. With `uid`, it must be of that user,
/// or root's.
pub fn hand_over(path: &Path, uid: Option<u32>, regions: &[Region], uffd: &Uffd) -> Result<UnixStream, ClientError> {
    let patience = Duration::from_millis(REPLY_DEADLINE_MS);
    let deadline = Instant::now() + patience;
    let stream = unix::connect(path, patience).map_err(ClientError::Connect)?;
    uid.map_or(Ok(()), |uid| check_user(&stream, uid))?;
    stream.set_write_timeout(Some(patience))?;
    let regions: Vec<CopyRegion> = regions.iter().copied().map(CopyRegion::from).collect();
    let message = serde_json::to_vec(&regions).map_err(io::Error::from)?;
    let sent = stream.send_with_fd(&message[..], uffd.as_raw_fd());
    // A message as short as this goes as a whole, or not at all.
    sent.map_err(|error| sending(io::Error::from_raw_os_error(error.errno())))?;
    while !is_taken(&stream)? {
        if Instant::now() >= deadline {
            return Err(ClientError::NotTaken);
        }
        std::thread::sleep(LOOK_AGAIN);
    }
    Ok(stream)
}

/// How often to look whether a message was taken.
const LOOK_AGAIN: Duration = Duration::from_micros(100);

/// Whether the other end has read all that was sent to it. An end that was closed before it had is an error.
fn is_taken(stream: &UnixStream) -> Result<bool, ClientError> {
    // In this order: an end that closes leaves its error first, and then drops what it has not read.
    let unread = unread_by_peer(stream)?;
    match stream.take_error()? {
        Some(error) => Err(sending(error)),
        None => Ok(unread == 0),
    }
}

/// Why something could not be sent.
fn sending(error: io::Error) -> ClientError {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ClientError::Closed,
        _ => error.into(),
    }
}

fn unexpected(reply: Reply) -> ClientError {
    match reply {
        Reply::Refused { reason } => ClientError::Refused(reason),
        other => ClientError::Unexpected(format!("{other:?}")),
    }
}

fn line(message: &impl serde::Serialize) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(line)
}

/// How long the line is that waits to be read, with its end; or as much of it as has come, or fits. 0 when nothing more comes.
fn peek_line(stream: &UnixStream, bytes: &mut [u8]) -> io::Result<usize> {
    let (len, _) = rustix::net::recv(stream, &mut *bytes, RecvFlags::PEEK)?;
    Ok(bytes[..len].iter().position(|byte| *byte == b'\n').map_or(len, |end| end + 1))
}

/// Reads one answer, and the descriptor that came with it.
fn receive_reply(
    stream: &UnixStream,
    question: &'static str,
    deadline_ms: u64,
) -> Result<(Reply, Option<OwnedFd>), ClientError> {
    let deadline = Instant::now() + Duration::from_millis(deadline_ms);
    let (mut text, mut descriptor) = (Vec::new(), None);
    let mut bytes = [0; 4096];
    while text.last() != Some(&b'\n') {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ClientError::Silent(question));
        }
        if text.len() >= MAX_MESSAGE {
            return Err(ClientError::Unexpected(format!("a line longer than {MAX_MESSAGE} bytes")));
        }
        stream.set_read_timeout(Some(left))?;
        // No further than the line's end: what comes behind it is for whoever talks with the server from then on.
        match peek_line(stream, &mut bytes).and_then(|len| receive(stream, &mut bytes[..len])) {
            Ok((0, _)) => return Err(ClientError::Closed),
            Ok((count, passed)) => {
                text.extend_from_slice(&bytes[..count]);
                match passed {
                    Passed::One(one) if descriptor.is_none() => descriptor = Some(one),
                    Passed::None => {}
                    _ => return Err(ClientError::Unexpected("more than one descriptor".into())),
                }
            }
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => {}
                io::ErrorKind::ConnectionReset => return Err(ClientError::Closed),
                _ => return Err(error.into()),
            },
        }
    }
    let reply = serde_json::from_slice(&text).map_err(|error| ClientError::Unexpected(error.to_string()))?;
    Ok((reply, descriptor))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn what_comes_right_behind_an_answer_is_left_for_later() {
        let (near, far) = UnixStream::pair().unwrap();
        let behind = line(&Reply::Report).unwrap();
        let both = [line(&Reply::Serving).unwrap(), behind.clone()].concat();
        // In any two pieces, and the second also late.
        for cut in 1..both.len() {
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    (&far).write_all(&both[..cut]).unwrap();
                    std::thread::yield_now();
                    (&far).write_all(&both[cut..]).unwrap();
                });
                let (reply, descriptor) = receive_reply(&near, "attach", REPLY_DEADLINE_MS).unwrap();
                assert!(reply == Reply::Serving && descriptor.is_none(), "{cut}: {reply:?}");
            });
            let mut rest = vec![0; behind.len()];
            (&near).read_exact(&mut rest).unwrap();
            assert_eq!(rest, behind, "{cut}");
        }
        drop(far);
        assert!(matches!(receive_reply(&near, "attach", REPLY_DEADLINE_MS), Err(ClientError::Closed)));
    }
}
