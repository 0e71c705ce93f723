//! A client of the vmm's REST API.

use super::unix;
use crate::error::ErrorBody;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// Longest answer that is taken, in bytes.
const MAX_ANSWER: usize = 4 << 20;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum RestError {
    /// The connection could not be made or broke.
    #[error("no connection to the vmm's API: {0}")]
    Io(#[from] io::Error),
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

/// A connection to a vmm's API.
#[derive(Debug)]
pub struct RestClient {
    stream: UnixStream,
    patience: Duration,
}

impl RestClient {
    /// Connects to the API at `path`. Each later call may take `patience`.
    pub fn connect(path: &Path, patience: Duration) -> Result<Self, RestError> {
        Ok(RestClient { stream: unix::connect(path, patience)?, patience })
    }

    /// `GET path`: a document.
    pub fn get<T: DeserializeOwned>(&mut self, path: &str) -> Result<T, RestError> {
        let body = self.call("GET", path, &[])?;
        serde_json::from_slice(&body).map_err(|e| RestError::Answer(e.to_string()))
    }

    /// `GET path`: the text of the answer, whatever it is.
    pub fn get_text(&mut self, path: &str) -> Result<String, RestError> {
        String::from_utf8(self.call("GET", path, &[])?).map_err(|e| RestError::Answer(e.to_string()))
    }

    /// `PUT path` with a document.
    pub fn put(&mut self, path: &str, document: &impl Serialize) -> Result<(), RestError> {
        self.send("PUT", path, document)
    }

    /// `PATCH path` with a document.
    pub fn patch(&mut self, path: &str, document: &impl Serialize) -> Result<(), RestError> {
        self.send("PATCH", path, document)
    }

    fn send(&mut self, method: &str, path: &str, document: &impl Serialize) -> Result<(), RestError> {
        let body = serde_json::to_vec(document).map_err(io::Error::from)?;
        self.call(method, path, &body).map(drop)
    }

    fn call(&mut self, method: &str, path: &str, body: &[u8]) -> Result<Vec<u8>, RestError> {
        let deadline = Instant::now() + self.patience;
        unix::limit(&self.stream, deadline)?;
        let mut request = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n").into_bytes();
        if !body.is_empty() {
            request.extend(format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len()).bytes());
        }
        request.extend(b"\r\n");
        request.extend(body);
        self.stream.write_all(&request)?;

        let (status, body) = self.receive(deadline)?;
        if status < 300 {
            return Ok(body);
        }
        let message = serde_json::from_slice::<ErrorBody>(&body).map(|e| e.fault_message);
        Err(RestError::Refused { status, message: message.unwrap_or_else(|_| format!("status {status}")) })
    }

    fn receive(&mut self, deadline: Instant) -> Result<(u16, Vec<u8>), RestError> {
        let mut bytes = Vec::new();
        loop {
            if let Some(answer) = parse(&bytes)? {
                return Ok(answer);
            }
            if bytes.len() > MAX_ANSWER {
                return Err(RestError::Answer(format!("more than {MAX_ANSWER} bytes")));
            }
            unix::limit(&self.stream, deadline)?;
            let mut chunk = [0; 4096];
            match self.stream.read(&mut chunk)? {
                0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                n => bytes.extend_from_slice(&chunk[..n]),
            }
        }
    }
}

/// The status and body at the start of `bytes`, if they are complete.
fn parse(bytes: &[u8]) -> Result<Option<(u16, Vec<u8>)>, RestError> {
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut response = httparse::Response::new(&mut headers);
    let head = match response.parse(bytes) {
        Ok(httparse::Status::Complete(head)) => head,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(e) => return Err(RestError::Answer(e.to_string())),
    };
    let status = response.code.unwrap_or_default();
    let length = response
        .headers
        .iter()
        .find(|header| header.name.eq_ignore_ascii_case("content-length"))
        .and_then(|header| std::str::from_utf8(header.value).ok()?.trim().parse::<usize>().ok())
        .unwrap_or(0);
    Ok(bytes.get(head..head.saturating_add(length)).map(|body| (status, body.to_vec())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_taken_when_they_are_whole() {
        let bytes = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}";
        assert!(parse(&bytes[..bytes.len() - 1]).unwrap().is_none());
        assert_eq!(parse(bytes).unwrap().unwrap(), (200, b"{}".to_vec()));
        assert_eq!(parse(b"HTTP/1.1 204 No Content\r\n\r\n").unwrap().unwrap(), (204, vec![]));
        assert!(parse(b"SMTP\r\n").is_err());
    }
}
