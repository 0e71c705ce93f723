//! The metrics socket's clients: each asks once over HTTP, and gets its answer at its own pace.
//!
//! `GET /metrics` is text for Prometheus, `GET /metrics.json` the whole document. The event loop never waits for a client:
//! it calls [`Reader::advance`] when there is something to read or room to write.

use crate::prometheus;
use api_spec::error::ErrorBody;
use api_spec::page_server::Metrics;
use api_spec::prometheus::CONTENT_TYPE;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How long a client may take, from its connecting to the last byte of its answer.
const READER_DEADLINE: Duration = Duration::from_secs(2);
/// Clients that are waited for at one time; more are turned away.
pub const MAX_READERS: usize = 16;
/// Longest request, in bytes.
const MAX_HEAD: usize = 8 * 1024;
const MAX_HEADERS: usize = 64;

/// What a client is waited for next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// More of its request.
    Read,
    /// Room for more of its answer.
    Write,
    /// Nothing: it has its answer, or has left.
    Done,
}

/// One who reads the counters.
#[derive(Debug)]
pub struct Reader {
    stream: UnixStream,
    request: Vec<u8>,
    /// Once the request is complete; and how much of it is sent.
    answer: Option<(Vec<u8>, usize)>,
    deadline: Instant,
}

impl Reader {
    /// One who has just connected.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, request: Vec::new(), answer: None, deadline: Instant::now() + READER_DEADLINE })
    }

    /// The connection, to be watched for what [`Reader::advance`] says.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Whether the client has taken too long.
    pub fn is_overdue(&self, now: Instant) -> bool {
        now >= self.deadline
    }

    /// Goes on as far as that is possible at once. The counters are asked for when there is a request to answer.
    pub fn advance(&mut self, metrics: impl FnOnce() -> Metrics) -> Next {
        match self.try_advance(metrics) {
            Ok(()) => Next::Done,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => match self.answer {
                None => Next::Read,
                Some(_) => Next::Write,
            },
            Err(_) => Next::Done,
        }
    }

    fn try_advance(&mut self, metrics: impl FnOnce() -> Metrics) -> io::Result<()> {
        if self.answer.is_none() {
            self.answer = Some((self.receive()?.encode(metrics), 0));
        }
        let Some((answer, sent)) = &mut self.answer else { return Ok(()) };
        while *sent < answer.len() {
            match self.stream.write(&answer[*sent..]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => *sent += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Reads until the request is known.
    fn receive(&mut self) -> io::Result<Request> {
        let mut bytes = [0; 1024];
        loop {
            if let Some(request) = parse(&self.request) {
                return Ok(request);
            }
            match self.stream.read(&mut bytes) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.request.extend_from_slice(&bytes[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// What a client wants, and whether it wants to see it (`GET`) or only what comes before (`HEAD`).
#[derive(Clone, Debug, PartialEq, Eq)]
enum Request {
    Text { body: bool },
    Document { body: bool },
    Refused(Refusal),
}

/// Why a client gets no counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum Refusal {
    #[error("not an HTTP/1.1 request; `curl --unix-socket PATH http://localhost/metrics` makes one")]
    NotHttp,
    #[error("the request line and the headers may have {MAX_HEAD} bytes and {MAX_HEADERS} headers")]
    TooLong,
    #[error("there is `/metrics`, and `/metrics.json`")]
    Path,
    #[error("counters can be read (GET, HEAD) and nothing else")]
    Method,
}

impl Refusal {
    fn status(self) -> &'static str {
        match self {
            Refusal::NotHttp => "400 Bad Request",
            Refusal::Path => "404 Not Found",
            // HTTP wants the methods named that are allowed.
            Refusal::Method => "405 Method Not Allowed\r\nAllow: GET, HEAD",
            Refusal::TooLong => "431 Request Header Fields Too Large",
        }
    }
}

/// The request that these bytes are, once that is certain. What follows its head is not looked at.
fn parse(bytes: &[u8]) -> Option<Request> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(&bytes[..bytes.len().min(MAX_HEAD)]) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) if bytes.len() < MAX_HEAD => return None,
        Ok(_) | Err(httparse::Error::TooManyHeaders) => return Some(Request::Refused(Refusal::TooLong)),
        Err(_) => return Some(Request::Refused(Refusal::NotHttp)),
    }
    let target = request.path.unwrap_or_default();
    let path = target.split_once('?').map_or(target, |(path, _)| path);
    let method = request.method.unwrap_or_default();
    let body = method == "GET";
    Some(match path {
        "/metrics" | "/metrics.json" if !body && method != "HEAD" => Request::Refused(Refusal::Method),
        "/metrics" => Request::Text { body },
        "/metrics.json" => Request::Document { body },
        _ => Request::Refused(Refusal::Path),
    })
}

impl Request {
    /// The whole answer, as HTTP has it.
    fn encode(&self, metrics: impl FnOnce() -> Metrics) -> Vec<u8> {
        const JSON: &str = "application/json";
        match self {
            Request::Text { body } => answer("200 OK", CONTENT_TYPE, prometheus::render(&metrics()).as_bytes(), *body),
            Request::Document { body } => answer("200 OK", JSON, &json(&metrics()), *body),
            Request::Refused(refusal) => {
                let document = ErrorBody { fault_message: refusal.to_string(), config: None };
                answer(refusal.status(), JSON, &json(&document), true)
            }
        }
    }
}

fn json(document: &impl serde::Serialize) -> Vec<u8> {
    // Our own documents have string keys and no failing serializers.
    let mut text = serde_json::to_vec(document).unwrap_or_default();
    text.push(b'\n');
    text
}

fn answer(status: &str, content_type: &str, body: &[u8], with_body: bool) -> Vec<u8> {
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    );
    [head.as_bytes(), if with_body { body } else { &[] }].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use api_spec::page_server::SessionMetrics;
    use proptest::prelude::*;
    use std::net::Shutdown;

    const GET: &[u8] = b"GET /metrics.json HTTP/1.1\r\n\r\n";

    fn pair() -> (Reader, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        (Reader::new(near).unwrap(), far)
    }

    /// What one who sends these bytes is answered.
    fn ask(bytes: &[u8]) -> String {
        let (mut reader, mut far) = pair();
        far.write_all(bytes).unwrap();
        assert_eq!(reader.advance(Metrics::default), Next::Done);
        drop(reader);
        let mut answer = Vec::new();
        // The reset that unread bytes cause comes after all that was sent.
        let _ = far.read_to_end(&mut answer);
        String::from_utf8(answer).unwrap()
    }

    #[test]
    fn each_request_has_its_answer() {
        for (request, status, part) in [
            ("GET /metrics", 200, "# TYPE coppice_page_server_faults_total counter"),
            ("GET /metrics?module=x", 200, "version=0.0.4"),
            ("HEAD /metrics", 200, "Connection: close"),
            ("GET /metrics.json", 200, "\"sessions_total\":0"),
            ("GET /", 404, "/metrics.json"),
            ("POST /nothing", 404, "/metrics"),
            ("PUT /metrics", 405, "Allow: GET, HEAD\r\n"),
            ("GET", 400, "curl --unix-socket"),
        ] {
            let answer = ask(format!("{request} HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes());
            assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")) && answer.contains(part), "{request}: {answer}");
            let (head, body) = answer.split_once("\r\n\r\n").unwrap();
            let length = head.split("Content-Length: ").nth(1).and_then(|rest| rest.lines().next()).unwrap();
            let expected = if request.starts_with("HEAD") { "0" } else { length };
            assert_eq!(body.len().to_string(), expected, "{request}");
        }
    }

    #[test]
    fn a_head_has_an_end() {
        for long in [
            [GET[..28].to_vec(), b"X: y\r\n".repeat(MAX_HEADERS + 1)].concat(),
            [b"GET /", &[b'x'; MAX_HEAD][..]].concat(),
        ] {
            assert!(ask(&long).starts_with("HTTP/1.1 431 "));
        }
    }

    #[test]
    fn a_slow_client_is_answered_when_it_has_asked_and_gets_all_of_it_in_pieces() {
        let (mut reader, mut far) = pair();
        let metrics = || Metrics { sessions: vec![SessionMetrics::default(); 20_000], ..Metrics::default() };
        for byte in GET {
            assert_eq!(reader.advance(|| panic!("nothing was asked for")), Next::Read);
            far.write_all(&[*byte]).unwrap();
        }
        assert_eq!(reader.advance(metrics), Next::Write, "two megabytes fit into a socket's buffer");
        let drain = std::thread::spawn(move || {
            let mut all = Vec::new();
            far.read_to_end(&mut all).map(|_| all)
        });
        while reader.advance(|| panic!("it was asked for before")) == Next::Write {
            std::thread::yield_now();
        }
        drop(reader);
        let all = drain.join().unwrap().unwrap();
        let body = all.windows(4).position(|four| four == b"\r\n\r\n").unwrap() + 4;
        assert_eq!(serde_json::from_slice::<Metrics>(&all[body..]).unwrap(), metrics());
    }

    #[test]
    fn a_client_that_leaves_is_done_with_and_one_that_has_asked_may_say_so() {
        let (mut reader, far) = pair();
        drop(far);
        assert_eq!(reader.advance(Metrics::default), Next::Done);
        let (mut reader, mut far) = pair();
        far.write_all(GET).unwrap();
        far.shutdown(Shutdown::Write).unwrap();
        assert_eq!(reader.advance(Metrics::default), Next::Done);
        drop(reader);
        let mut answer = String::new();
        far.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 "));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_request_or_none_and_more_of_them_change_nothing(bytes: Vec<u8>, more: Vec<u8>) {
            if let Some(request) = parse(&bytes) {
                prop_assert_eq!(parse(&[bytes, more].concat()), Some(request));
            }
        }
    }
}
