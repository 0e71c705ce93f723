//! HTTP as bytes, for tests of what a client of the API should not say.

use crate::PATIENCE;
use api_spec::client::unix;
use api_spec::error::ErrorBody;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Its status.
    pub status: u16,
    /// Its headers, names in lower case.
    pub headers: Vec<(String, String)>,
    /// Its body.
    pub body: String,
}

impl Answer {
    /// What a header says.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// The vmm's words, if it refuses in the way that is documented.
    pub fn fault(&self) -> Option<String> {
        let words = serde_json::from_str(&self.body).map(|ErrorBody { fault_message, .. }| fault_message).ok()?;
        (self.status >= 400 && self.header("content-type") == Some("application/json")).then_some(words)
    }
}

/// A connection to the API on which nothing takes longer than [`PATIENCE`].
#[track_caller]
pub fn connect(api: &Path) -> UnixStream {
    let stream = unix::connect(api, PATIENCE).expect("the API takes connections");
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket takes a timeout");
    stream.set_write_timeout(Some(PATIENCE)).expect("a socket takes a timeout");
    stream
}

/// Says something to the API and nothing more; what it answers until it closes the connection.
#[track_caller]
pub fn say(api: &Path, bytes: &[u8]) -> String {
    say_in_pieces(api, [bytes])
}

/// As [`say`], piece by piece.
#[track_caller]
pub fn say_in_pieces<'a>(api: &Path, pieces: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut stream = connect(api);
    // It may close before it has heard all.
    let _ = pieces.into_iter().try_for_each(|piece| stream.write_all(piece));
    let _ = stream.shutdown(Shutdown::Write);
    hear(&mut stream)
}

/// What the API says until it closes the connection.
#[track_caller]
pub fn hear(stream: &mut UnixStream) -> String {
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Ok(_) => {}
        Err(e) if e.kind() == ErrorKind::ConnectionReset => {}
        Err(e) => panic!("{e}: the API does not close the connection; it said {:?}", String::from_utf8_lossy(&answer)),
    }
    String::from_utf8(answer).expect("the API answers in UTF-8")
}

/// The next answer on a connection that stays open; none if it was closed instead.
#[track_caller]
pub fn next(stream: &mut UnixStream) -> Option<Answer> {
    let mut said = Vec::new();
    loop {
        let text = std::str::from_utf8(&said).expect("the API answers in UTF-8");
        if let Some((answer, rest)) = first(text) {
            assert_eq!(rest, "", "it says more than it was asked");
            return Some(answer);
        }
        let mut chunk = [0; 4096];
        match stream.read(&mut chunk) {
            Ok(0) => return None,
            Ok(n) => said.extend_from_slice(&chunk[..n]),
            Err(e) => panic!("{e}: the API does not answer; it said {:?}", String::from_utf8_lossy(&said)),
        }
    }
}

/// The status of the first answer.
pub fn status(answer: &str) -> u16 {
    answer.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok()).unwrap_or(0)
}

/// What was said, as answers; panics if it is anything else.
#[track_caller]
pub fn answers(said: &str) -> Vec<Answer> {
    let (mut answers, mut rest) = (Vec::new(), said);
    while !rest.is_empty() {
        let (answer, after) = first(rest).unwrap_or_else(|| panic!("this is no answer: {rest:?}"));
        answers.push(answer);
        rest = after;
    }
    answers
}

/// The answer at the start of what was said, and what comes after it.
fn first(said: &str) -> Option<(Answer, &str)> {
    let (head, rest) = said.split_once("\r\n\r\n")?;
    let mut lines = head.split("\r\n");
    let (status, reason) = lines.next()?.strip_prefix("HTTP/1.1 ")?.split_once(' ')?;
    let status = status.parse().ok().filter(|status| (200..600).contains(status) && !reason.is_empty())?;
    let header = |line: &str| line.split_once(": ").map(|(name, value)| (name.to_lowercase(), value.to_owned()));
    let mut answer = Answer { status, headers: lines.map(header).collect::<Option<_>>()?, body: String::new() };
    let length = match answer.header("content-length") {
        Some(length) => length.parse().ok()?,
        None if status == 204 => 0,
        None => return None,
    };
    let (body, rest) = rest.split_at_checked(length)?;
    answer.body = body.to_owned();
    Some((answer, rest))
}

/// A request as it is sent.
pub fn request(method: &str, path: &str, body: &[u8]) -> Vec<u8> {
    let head = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", body.len());
    [head.as_bytes(), body].concat()
}
