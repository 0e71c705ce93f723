//! The client's half of the handshake, for the vmm: from a socket path to a guest that is being served.
//!
//! ```text
//!   greet() -> Greeted { store }    map the store privately, register the ranges with a userfaultfd, then
//!   Greeted::attach() -> UnixStream keep it open for the life of the guest; its end means that the server is gone
//! ```

use crate::socket::{Passed, receive};
use api_spec::client::unix;
use api_spec::handshake::{Attach, HELLO_DEADLINE_MS, Hello, MAX_MESSAGE, REPLY_DEADLINE_MS, Region, Reply};
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
    #[error("cannot connect: {0}; is it running? `uffd-handler --socket PATH --snapshot SNAPSHOT` starts one")]
    Connect(io::Error),
    /// It said no.
    #[error("refused: {0}")]
    Refused(String),
    /// It does not answer.
    #[error(
        "no answer to the {0} message in time; a Firecracker-style handler stays silent like this, since it speaks copy mode (--uffd-mode copy), which is not offered yet"
    )]
    Silent(&'static str),
    /// It hung up.
    #[error("it closed the connection during the handshake")]
    Closed,
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

/// Connects and asks for the store of an image.
pub fn greet(path: &Path, hello: &Hello) -> Result<Greeted, ClientError> {
    let patience = Duration::from_millis(REPLY_DEADLINE_MS);
    let stream = unix::connect(path, patience).map_err(ClientError::Connect)?;
    stream.set_write_timeout(Some(patience))?;
    (&stream).write_all(&line(hello)?).map_err(sending)?;
    match receive_reply(&stream, "hello", HELLO_DEADLINE_MS)? {
        (Reply::Store { size, .. }, Some(store)) if size == hello.size => Ok(Greeted { stream, store }),
        (other, _) => Err(unexpected(other)),
    }
}

impl Greeted {
    /// Hands over the userfaultfd with which the regions are registered. The caller keeps its own.
    pub fn attach(self, regions: Vec<Region>, uffd: &Uffd) -> Result<UnixStream, ClientError> {
        let line = line(&Attach { regions })?;
        let sent = self.stream.send_with_fd(&line[..], uffd.as_raw_fd());
        let sent = sent.map_err(|error| sending(io::Error::from_raw_os_error(error.errno())))?;
        (&self.stream).write_all(&line[sent..]).map_err(sending)?;
        match receive_reply(&self.stream, "attach", REPLY_DEADLINE_MS)? {
            (Reply::Serving, None) => Ok(self.stream),
            (other, _) => Err(unexpected(other)),
        }
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
        match receive(stream, &mut bytes) {
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
