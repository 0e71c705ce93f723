//! A client of the vmm's REST API.

use super::unix;
use crate::error::ErrorBody;
use crate::fork::MAX_DISK_LAYERS;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longest answer that is taken if nobody says otherwise, in bytes.
const MAX_ANSWER: usize = 4 << 20;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum RestError {
    /// The connection could not be made. Nobody has heard of the call, unless it is a `GET` that was made once more.
    #[error("the vmm's API cannot be reached: {0}")]
    Connect(io::Error),
    /// The connection broke, or there was no answer in time. The call may have been heard.
    #[error("the vmm's API does not answer: {0}")]
    Io(#[from] io::Error),
    /// There cannot be such a call. Nothing was sent.
    #[error("no such call can be made: {0}")]
    Call(String),
    /// The vmm said no.
    #[error("{message}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// The vmm's words.
        message: String,
    },
    /// What came is no answer.
    #[error("the vmm's API gave an answer that is not understood: {0}")]
    Answer(String),
}

/// An answer as it came.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Response {
    /// HTTP status.
    pub status: u16,
    /// What kind of text the body is, if the server says.
    pub content_type: Option<String>,
    /// The body; empty if there is none.
    pub body: Vec<u8>,
}

impl Response {
    /// The body of an answer of success, or what the vmm says of why it is none.
    pub fn body(self) -> Result<Vec<u8>, RestError> {
        if (200..300).contains(&self.status) {
            return Ok(self.body);
        }
        let status = self.status;
        let message = serde_json::from_slice::<ErrorBody>(&self.body).map(|e| e.fault_message);
        Err(RestError::Refused { status, message: message.unwrap_or_else(|_| format!("status {status}")) })
    }

    /// The document that an answer of success has.
    pub fn document<T: DeserializeOwned>(self) -> Result<T, RestError> {
        serde_json::from_slice(&self.body()?).map_err(|e| RestError::Answer(e.to_string()))
    }
}

/// A connection to a vmm's API, for any call. [`VmClient`](super::VmClient) has a method for each.
#[derive(Debug)]
pub struct RestClient {
    path: PathBuf,
    /// Absent once it cannot be used any more; the next call makes another.
    stream: Option<UnixStream>,
    patience: Duration,
    max_answer: usize,
}

/// Why there is no answer.
struct Failure {
    error: RestError,
    /// The server closed the connection and had not answered at all.
    unanswered: bool,
}

impl From<RestError> for Failure {
    fn from(error: RestError) -> Self {
        Failure { error, unanswered: false }
    }
}

impl RestClient {
    /// Connects to the API at `path`. Each later call may take `patience`, all in all.
    pub fn connect(path: &Path, patience: Duration) -> Result<Self, RestError> {
        let stream = Some(unix::connect(path, patience).map_err(RestError::Connect)?);
        Ok(RestClient { path: path.to_owned(), stream, patience, max_answer: MAX_ANSWER })
    }

    /// Sets how long an answer may be, in bytes.
    pub fn set_max_answer(&mut self, bytes: usize) {
        self.max_answer = bytes;
    }

    /// Sets how long each later call may take.
    pub fn set_patience(&mut self, patience: Duration) {
        self.patience = patience;
    }

    /// `GET path`: a document.
    pub fn get<T: DeserializeOwned>(&mut self, path: &str) -> Result<T, RestError> {
        self.request("GET", path, &[])?.document()
    }

    /// `GET path`: the text of the answer, whatever it is.
    pub fn get_text(&mut self, path: &str) -> Result<String, RestError> {
        String::from_utf8(self.request("GET", path, &[])?.body()?).map_err(|e| RestError::Answer(e.to_string()))
    }

    /// `PUT path` with a document.
    pub fn put(&mut self, path: &str, document: &impl Serialize) -> Result<(), RestError> {
        self.send("PUT", path, document)
    }

    /// `PATCH path` with a document.
    pub fn patch(&mut self, path: &str, document: &impl Serialize) -> Result<(), RestError> {
        self.send("PATCH", path, document)
    }

    /// A call with a document that is answered with one.
    pub fn ask<T: DeserializeOwned>(
        &mut self,
        method: &str,
        path: &str,
        document: &impl Serialize,
    ) -> Result<T, RestError> {
        self.post(method, path, document)?.document()
    }

    fn send(&mut self, method: &str, path: &str, document: &impl Serialize) -> Result<(), RestError> {
        self.post(method, path, document)?.body().map(drop)
    }

    fn post(&mut self, method: &str, path: &str, document: &impl Serialize) -> Result<Response, RestError> {
        let body = json(document)?;
        self.request(method, path, &body)
    }

    /// Makes a call and gives its answer back, a refusal too. The path, with its query, is sent as it is.
    ///
    /// A server may close a connection that was silent for a while. A `GET` that meets one is sent once more, over
    /// another; a call that changes something never is, since nobody can tell whether it was heard.
    pub fn request(&mut self, method: &str, path: &str, body: &[u8]) -> Result<Response, RestError> {
        if let Some(odd) = path.chars().find(|c| !c.is_ascii_graphic()) {
            return Err(RestError::Call(format!("{odd:?} cannot be in its path")));
        }
        let deadline = Instant::now() + self.patience;
        let mut head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n");
        if !body.is_empty() {
            head += &format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len());
        }
        let request = [head.as_bytes(), b"\r\n", body].concat();
        let was_open = self.stream.is_some();
        match self.exchange(&request, deadline) {
            Err(failure) if failure.unanswered && was_open && method == "GET" => self.exchange(&request, deadline),
            outcome => outcome,
        }
        .map_err(|failure| failure.error)
    }

    /// Sends a request and receives its answer. A connection that failed, and one that the server closes, is not used again:
    /// an answer that comes late would pass for that of a later call.
    fn exchange(&mut self, request: &[u8], deadline: Instant) -> Result<Response, Failure> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => unix::connect(&self.path, left(deadline)).map_err(RestError::Connect)?,
        };
        unix::limit(&stream, deadline).map_err(RestError::from)?;
        // A server that refuses a request may do so, and close, before it has read it all.
        let sent = match stream.write_all(request) {
            Err(e) if !is_gone(&e) => return Err(RestError::from(in_time(e)).into()),
            sent => sent.is_ok(),
        };
        let (response, stays_open) = receive(&mut stream, deadline, self.max_answer)?;
        if stays_open && sent {
            self.stream = Some(stream);
        }
        Ok(response)
    }
}

/// How long a connection may take, and how long is looked for an answer after the deadline: it may have come while another was waited for.
const CONNECTION: Duration = Duration::from_millis(200);
const LAST_LOOK: Duration = Duration::from_millis(10);

/// Most descriptors that go with a call: the state of a VM that is forked, six layers of its memory and what they lie over, and the
/// layers and the image of each of 18 disks. The kernel passes no more than 253.
pub const MAX_DESCRIPTORS: usize = 8 + 18 * (MAX_DISK_LAYERS + 1);

/// A call that was made over a connection of its own, with descriptors, and is not answered yet.
#[derive(Debug)]
pub struct PassingCall {
    stream: UnixStream,
    deadline: Instant,
}

impl PassingCall {
    /// Calls `PUT path` with a document and descriptors, up to [`MAX_DESCRIPTORS`]. That takes no time worth speaking of, or fails; the
    /// answer is due at the deadline.
    pub fn put(
        api: &Path,
        deadline: Instant,
        path: &str,
        document: &impl Serialize,
        descriptors: &[BorrowedFd],
    ) -> Result<Self, RestError> {
        let mut stream = unix::connect(api, CONNECTION.min(left(deadline))).map_err(RestError::Connect)?;
        unix::limit(&stream, Instant::now() + CONNECTION)?;
        let body = json(document)?;
        let request = [put_head(path, body.len()).as_bytes(), &body].concat();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(RestError::Call(format!("it has more than {MAX_DESCRIPTORS} descriptors")));
        }
        let sent = sendmsg(&stream, &[IoSlice::new(&request)], &mut control, SendFlags::NOSIGNAL)
            .map_err(|e| in_time(e.into()))?;
        stream.write_all(&request[sent..]).map_err(in_time)?;
        Ok(PassingCall { stream, deadline })
    }

    /// Waits for the answer.
    pub fn answer(mut self) -> Result<Response, RestError> {
        let deadline = self.deadline.max(Instant::now() + LAST_LOOK);
        let (response, _) = receive(&mut self.stream, deadline, MAX_ANSWER).map_err(|failure| failure.error)?;
        Ok(response)
    }
}

fn json(document: &impl Serialize) -> Result<Vec<u8>, RestError> {
    serde_json::to_vec(document).map_err(|e| RestError::Call(e.to_string()))
}

/// The head of a call with a document, to its end.
fn put_head(path: &str, length: usize) -> String {
    format!(
        "PUT {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    )
}

fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

/// Whether the other side has closed the connection.
fn is_gone(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

/// The error in words that fit: the kernel says that a call would block where the time that was given has passed.
fn in_time(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock { io::ErrorKind::TimedOut.into() } else { error }
}

/// Receives an answer, and whether the connection stays open after it.
fn receive(stream: &mut UnixStream, deadline: Instant, max: usize) -> Result<(Response, bool), Failure> {
    let mut bytes = Vec::new();
    loop {
        if let Some(answer) = parse(&bytes)? {
            return Ok(answer);
        }
        if bytes.len() > max {
            return Err(RestError::Answer(format!("more than {max} bytes")).into());
        }
        unix::limit(stream, deadline).map_err(RestError::from)?;
        let mut chunk = [0; 4096];
        let read = stream.read(&mut chunk).and_then(|len| match len {
            0 => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it closed the connection before it had answered")),
            len => Ok(len),
        });
        match read {
            Ok(len) => bytes.extend_from_slice(&chunk[..len]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => {
                let unanswered = bytes.is_empty() && is_gone(&e);
                return Err(Failure { error: in_time(e).into(), unanswered });
            }
        }
    }
}

/// The answer at the start of `bytes`, if it is complete, and whether the connection stays open after it.
fn parse(bytes: &[u8]) -> Result<Option<(Response, bool)>, RestError> {
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut response = httparse::Response::new(&mut headers);
    let head = match response.parse(bytes) {
        Ok(httparse::Status::Complete(head)) => head,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(e) => return Err(RestError::Answer(e.to_string())),
    };
    let status = response.code.unwrap_or_default();
    let header = |name: &str| {
        let header = response.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name))?;
        Some(std::str::from_utf8(header.value).ok()?.trim())
    };
    let length = match header("content-length").map(str::parse) {
        Some(Ok(length)) => length,
        Some(Err(_)) => return Err(RestError::Answer("its Content-Length is no number".into())),
        None => 0,
    };
    let stays_open = !header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
    let content_type = header("content-type").map(str::to_owned);
    let body = bytes.get(head..head.saturating_add(length));
    Ok(body.map(|body| (Response { status, content_type, body: body.to_vec() }, stays_open)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::thread;

    const PATIENCE: Duration = Duration::from_secs(30);
    const DONE: &[u8] = b"HTTP/1.1 204 No Content\r\n\r\n";

    #[test]
    fn answers_are_taken_when_they_are_whole() {
        let bytes = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}";
        assert!(parse(&bytes[..bytes.len() - 1]).unwrap().is_none());
        let document = Response { status: 200, content_type: Some("text/plain".into()), body: b"{}".to_vec() };
        assert_eq!(parse(bytes).unwrap().unwrap(), (document, true));
        let done = |stays_open| (Response { status: 204, ..Default::default() }, stays_open);
        assert_eq!(parse(DONE).unwrap().unwrap(), done(true));
        let closing = b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n";
        assert_eq!(parse(closing).unwrap().unwrap(), done(false));
        assert!(parse(b"SMTP\r\n").is_err());
        assert!(parse(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n").is_err());
    }

    /// A server that hears a call on each connection and says this.
    fn server(answers: &'static [&'static [u8]]) -> (tempfile::TempDir, RestClient, thread::JoinHandle<usize>) {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let server = thread::spawn(move || {
            let mut heard = 0;
            for answer in answers {
                let (mut stream, _) = listener.accept().unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                let mut request = [0; 4096];
                heard += usize::from(stream.read(&mut request).unwrap_or(0) > 0);
                stream.write_all(answer).unwrap();
            }
            heard
        });
        let client = RestClient::connect(&path, PATIENCE).unwrap();
        (place, client, server)
    }

    #[test]
    fn a_question_is_asked_again_when_the_connection_was_closed() {
        let (_place, mut client, server) = server(&[b"", b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n7", DONE]);
        assert_eq!(client.get::<u8>("/").unwrap(), 7);
        // That connection was closed as well. A change may have been heard, and is not sent again by itself.
        assert!(matches!(client.put("/x", &1), Err(RestError::Io(_))));
        client.put("/x", &1).unwrap();
        assert_eq!(server.join().unwrap(), 3);
    }

    #[test]
    fn an_answer_that_was_cut_short_is_none() {
        let (_place, mut client, server) = server(&[b"HTTP/1.1 2"]);
        assert!(matches!(client.get::<u8>("/"), Err(RestError::Io(e)) if e.to_string().contains("closed")));
        assert_eq!(server.join().unwrap(), 1);
        assert!(matches!(client.get::<u8>("/"), Err(RestError::Connect(_))), "nobody listens any more");
    }

    #[test]
    fn a_path_cannot_say_more_than_a_path() {
        let (_place, mut client, server) = server(&[DONE]);
        assert!(client.put("/drives/a HTTP/1.1\r\n", &1).is_err());
        assert!(client.put("/drives/a", &1).is_ok());
        assert_eq!(server.join().unwrap(), 1);
    }
}
