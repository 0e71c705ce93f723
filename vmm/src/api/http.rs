//! HTTP/1.1 messages from and to bytes. Pure.

use super::Response;
use super::chunked::Chunks;
use std::io::Write;

/// Longest request line and headers together, in bytes.
pub const MAX_HEAD: usize = 8 * 1024;
const MAX_HEADERS: usize = 64;

/// What a client may send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Longest body, in bytes.
    pub max_body: usize,
}

impl Default for Limits {
    /// Firecracker's.
    fn default() -> Self {
        Limits { max_body: 51_200 }
    }
}

/// A request as HTTP has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// `GET`, `PUT`, ...
    pub method: String,
    /// Path, with its percent escapes resolved.
    pub path: String,
    /// What comes after the path's `?`, as sent.
    pub query: Option<String>,
    /// Body; empty if there is none.
    pub body: Vec<u8>,
    /// Whether the client wants the connection to stay open.
    pub keep_alive: bool,
}

/// The status and the reason of a refusal.
pub type Refusal = (u16, String);

/// What the bytes at hand amount to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// More bytes are needed. `expect_continue`: the client waits for leave to send its body; said once.
    Partial {
        /// Whether to answer `100 Continue`.
        expect_continue: bool,
    },
    /// A request.
    Complete(Message),
    /// Not a request that is understood here: the status and the reason. The connection cannot go on.
    Bad(u16, String),
}

/// What one client has sent, as requests.
#[derive(Debug)]
pub struct Parser {
    limits: Limits,
    received: Vec<u8>,
    /// How many of the received bytes have been used.
    used: usize,
    /// A request of which only the body is missing. Keeping it means that a body in small pieces costs no more than one
    /// in large ones. A head is parsed anew with each piece, so that garbage is refused at once: there is little of it.
    begun: Option<Begun>,
}

#[derive(Debug)]
struct Begun {
    message: Message,
    body: Body,
    expect_continue: bool,
}

#[derive(Debug)]
enum Body {
    Sized(usize),
    Chunked(Chunks),
}

impl Parser {
    /// How much memory is kept while there is nothing to hold in it.
    const KEPT: usize = 8 * 1024;

    /// A client that has sent nothing yet.
    pub fn new(limits: Limits) -> Self {
        Parser { limits, received: Vec::new(), used: 0, begun: None }
    }

    /// Takes what has come.
    pub fn push(&mut self, bytes: &[u8]) {
        self.received.drain(..self.used);
        self.used = 0;
        self.received.extend_from_slice(bytes);
    }

    /// Whether it should be given more before it is asked for requests.
    pub fn has_room(&self) -> bool {
        self.received.len() - self.used <= MAX_HEAD.saturating_add(self.limits.max_body)
    }

    /// Whether no part of a request is at hand.
    pub fn is_empty(&self) -> bool {
        self.begun.is_none() && self.used == self.received.len()
    }

    /// The next request, if it is complete.
    pub fn parse(&mut self) -> Parsed {
        let parsed = self.advance().unwrap_or_else(|(status, reason)| Parsed::Bad(status, reason));
        if self.is_empty() {
            self.used = 0;
            self.received.clear();
            self.received.shrink_to(Self::KEPT);
        }
        parsed
    }

    fn advance(&mut self) -> Result<Parsed, Refusal> {
        let mut begun = match self.begun.take() {
            Some(begun) => begun,
            None => match self.head()? {
                Some(begun) => begun,
                None => return Ok(Parsed::Partial { expect_continue: false }),
            },
        };
        let rest = &self.received[self.used..];
        let untouched = rest.is_empty();
        let complete = match &mut begun.body {
            Body::Sized(length) if *length <= rest.len() => {
                begun.message.body = rest[..*length].to_vec();
                self.used += *length;
                true
            }
            Body::Sized(_) => false,
            Body::Chunked(chunks) => {
                let (used, complete) = chunks.take(rest)?;
                self.used += used;
                complete
            }
        };
        if complete {
            let mut message = begun.message;
            if let Body::Chunked(chunks) = begun.body {
                message.body = chunks.into_body();
            }
            return Ok(Parsed::Complete(message));
        }
        // Who sends its body does not wait for leave.
        let expect_continue = std::mem::take(&mut begun.expect_continue) && untouched;
        self.begun = Some(begun);
        Ok(Parsed::Partial { expect_continue })
    }

    /// Takes a request line and headers, if they are complete.
    fn head(&mut self) -> Result<Option<Begun>, Refusal> {
        // Empty lines before a request are some clients' way to end the last one's body.
        while let [b'\n', ..] | [b'\r', b'\n', ..] = &self.received[self.used..] {
            self.used += if self.received[self.used] == b'\n' { 1 } else { 2 };
        }
        let rest = &self.received[self.used..];
        let window = &rest[..rest.len().min(MAX_HEAD)];
        let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
        let mut request = httparse::Request::new(&mut headers);
        let length = match request.parse(window) {
            Ok(httparse::Status::Complete(length)) => length,
            Ok(httparse::Status::Partial) if rest.len() < MAX_HEAD => return Ok(None),
            Ok(_) | Err(httparse::Error::TooManyHeaders) => {
                let reason =
                    format!("the request line and the headers may have {MAX_HEAD} bytes and {MAX_HEADERS} headers");
                return Err((431, reason));
            }
            Err(e) => return Err((400, format!("not an HTTP/1.1 request: {e}"))),
        };
        let framing = Framing::of(&request, self.limits)?;
        let (path, query) = target(request.path.unwrap_or_default())?;
        let method = request.method.unwrap_or_default().to_owned();
        self.used += length;
        Ok(Some(Begun {
            message: Message { method, path, query, body: Vec::new(), keep_alive: framing.keep_alive },
            body: framing.body,
            expect_continue: framing.expect_continue,
        }))
    }
}

/// How a request's headers say that it is framed. A `Host` is not asked for: there is one server at a socket, and small
/// scripts, which HTTP would have us refuse, leave it out.
struct Framing {
    body: Body,
    keep_alive: bool,
    expect_continue: bool,
}

impl Framing {
    fn of(request: &httparse::Request<'_, '_>, limits: Limits) -> Result<Self, Refusal> {
        let new = request.version == Some(1);
        let (mut length, mut codings) = (None, None);
        let (mut close, mut keep, mut expect_continue) = (false, false, false);
        for header in request.headers.iter() {
            // What is no text is no value that is known here.
            let value = std::str::from_utf8(header.value).unwrap_or("?").trim_matches([' ', '\t']);
            let mut words = value.split(',').map(|word| word.trim_matches([' ', '\t'])).filter(|word| !word.is_empty());
            if header.name.eq_ignore_ascii_case("content-length") {
                let number = content_length(value, limits)?;
                if length.replace(number).is_some_and(|other| other != number) {
                    return Err((400, "two different Content-Length headers".into()));
                }
            } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
                let count = codings.get_or_insert(0_usize);
                for word in words {
                    if !word.eq_ignore_ascii_case("chunked") {
                        return Err((501, format!("Transfer-Encoding `{word}` is not offered; `chunked` is")));
                    }
                    *count += 1;
                }
            } else if header.name.eq_ignore_ascii_case("connection") {
                close |= words.clone().any(|word| word.eq_ignore_ascii_case("close"));
                keep |= words.any(|word| word.eq_ignore_ascii_case("keep-alive"));
            } else if header.name.eq_ignore_ascii_case("expect") {
                if !value.eq_ignore_ascii_case("100-continue") {
                    return Err((417, format!("Expect `{value}` cannot be met; `100-continue` can")));
                }
                // HTTP/1.0 knows no answer that is not the last.
                expect_continue = new;
            }
        }
        // Where two programs that read the same bytes might see different requests, neither reading is right.
        let body = match (length, codings) {
            (length, None) => Body::Sized(length.unwrap_or(0)),
            (Some(_), Some(_)) => return Err((400, "both Content-Length and Transfer-Encoding".into())),
            (None, Some(1)) if new => Body::Chunked(Chunks::new(limits.max_body)),
            (None, Some(1)) => return Err((400, "HTTP/1.0 has no Transfer-Encoding".into())),
            (None, Some(count)) => return Err((400, format!("Transfer-Encoding names {count} codings, not one"))),
        };
        Ok(Framing { body, keep_alive: !close && (new || keep), expect_continue })
    }
}

fn content_length(value: &str, limits: Limits) -> Result<usize, Refusal> {
    let digits = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
    // One that no number holds is a number all the same.
    let length: usize = if digits {
        value.parse().unwrap_or(usize::MAX)
    } else {
        return Err((400, format!("Content-Length `{value}` is no number")));
    };
    if length > limits.max_body {
        return Err((413, format!("a body of {value} bytes; the limit is {}", limits.max_body)));
    }
    Ok(length)
}

/// The path and the query of a request's target. A whole URL stands for what comes after its host.
fn target(sent: &str) -> Result<(String, Option<String>), Refusal> {
    const SCHEME: &str = "http://";
    let url = sent.get(..SCHEME.len()).is_some_and(|start| start.eq_ignore_ascii_case(SCHEME));
    let local = if url {
        let rest = &sent[SCHEME.len()..];
        &rest[rest.find(['/', '?']).unwrap_or(rest.len())..]
    } else {
        sent
    };
    let (path, query) = match local.split_once('?') {
        Some((path, query)) => (path, Some(query.to_owned())),
        None => (local, None),
    };
    Ok((if url && path.is_empty() { "/".into() } else { unescape(path)? }, query))
}

/// Resolves percent escapes, once. That of a slash stays: it is no separator, and no name here has one.
fn unescape(path: &str) -> Result<String, Refusal> {
    let mut pieces = path.split('%');
    let mut bytes = pieces.next().unwrap_or_default().as_bytes().to_vec();
    for piece in pieces {
        let code = piece.get(..2).filter(|code| code.bytes().all(|byte| byte.is_ascii_hexdigit()));
        match code.and_then(|code| u8::from_str_radix(code, 16).ok()) {
            Some(b'/') => bytes.extend(b"%2F"),
            Some(byte) => bytes.push(byte),
            None => return Err((400, "a percent sign in the path is not followed by two hexadecimal digits".into())),
        }
        bytes.extend(&piece.as_bytes()[2..]);
    }
    String::from_utf8(bytes).map_err(|_| (400, "the percent escapes of the path make no UTF-8".into()))
}

/// Leave to send a body.
pub const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// How an answer is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// Number of the request.
    pub request: u64,
    /// Whether the connection stays open.
    pub keep_alive: bool,
    /// Whether the body is only described: the answer to `HEAD` never has one.
    pub without_body: bool,
}

/// Adds an answer to `bytes`.
pub fn encode(response: &Response, delivery: Delivery, bytes: &mut Vec<u8>) {
    let reason = match response.status {
        200 => "OK",
        204 => "No Content",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        413 => "Content Too Large",
        417 => "Expectation Failed",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        ..=499 => "Refused",
        _ => "Internal Server Error",
    };
    let connection = if delivery.keep_alive { "keep-alive" } else { "close" };
    bytes.reserve(256 + response.body.len());
    // Writing to memory does not fail.
    let _ = write!(
        bytes,
        "HTTP/1.1 {} {reason}\r\nServer: coppice\r\nConnection: {connection}\r\nX-Request-Id: {}\r\n",
        response.status, delivery.request
    );
    for (name, value) in &response.headers {
        let _ = write!(bytes, "{name}: {value}\r\n");
    }
    if !response.body.is_empty() {
        let _ = write!(bytes, "Content-Type: {}\r\n", response.content_type.as_str());
    }
    if response.status != 204 {
        let _ = write!(bytes, "Content-Length: {}\r\n", response.body.len());
    }
    bytes.extend(b"\r\n");
    if !delivery.without_body && response.status != 204 {
        bytes.extend(&response.body);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The first thing that these bytes are.
    fn parse(bytes: impl AsRef<[u8]>) -> Parsed {
        let mut parser = Parser::new(Limits::default());
        parser.push(bytes.as_ref());
        parser.parse()
    }

    /// All that these pieces are, up to what is no request; and whether a part of a request is left.
    fn parse_all<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (Vec<Message>, Option<u16>, bool) {
        let (mut parser, mut messages) = (Parser::new(Limits::default()), Vec::new());
        for piece in pieces {
            parser.push(piece);
            loop {
                match parser.parse() {
                    Parsed::Partial { .. } => break,
                    Parsed::Complete(message) => messages.push(message),
                    Parsed::Bad(status, _) => return (messages, Some(status), false),
                }
            }
        }
        let left = !parser.is_empty();
        (messages, None, left)
    }

    fn status(bytes: impl AsRef<[u8]>) -> u16 {
        match parse(bytes) {
            Parsed::Bad(status, reason) if !reason.is_empty() => status,
            other => panic!("{other:?}"),
        }
    }

    fn message(bytes: impl AsRef<[u8]>) -> Message {
        match parse(bytes) {
            Parsed::Complete(message) => message,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn requests_arrive_in_any_number_of_pieces() {
        let bytes = b"PUT /vsock HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}GET / HTTP/1.1\r\n\r\n";
        let first = bytes.len() - 18;
        for cut in 0..first {
            assert!(matches!(parse(&bytes[..cut]), Parsed::Partial { .. }), "{cut}");
        }
        let (messages, bad, left) = parse_all([&bytes[..]]);
        assert_eq!((bad, left), (None, false));
        let seen = |m: &Message| format!("{} {} {}", m.method, m.path, String::from_utf8_lossy(&m.body));
        assert_eq!(messages.iter().map(seen).collect::<Vec<_>>(), ["PUT /vsock {}", "GET / "]);
        assert_eq!(parse_all(bytes.chunks(1)), (messages, None, false));
    }

    #[test]
    fn what_is_too_large_or_ambiguous_is_refused() {
        let head = |headers: &str| format!("PUT / HTTP/1.1\r\n{headers}\r\n\r\n");
        let old = |headers: &str| format!("PUT / HTTP/1.0\r\n{headers}\r\n\r\n");
        for headers in [
            "Content-Length: +5",
            "Content-Length:",
            "Content-Length: 5, 5",
            "Content-Length: \u{a0}5",
            "Content-Length: 1\r\nContent-Length: 2",
            "Content-Length : 1",
            "X: a\r\n b",
            " X: a",
            "X: \0",
            "Content-Length: 3\r\nTransfer-Encoding: chunked",
            "Transfer-Encoding: chunked\r\nContent-Length: 3",
            "Transfer-Encoding: chunked, chunked",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
            "Transfer-Encoding:",
        ] {
            assert_eq!(status(head(headers)), 400, "{headers:?}");
        }
        for headers in
            ["Transfer-Encoding: gzip, chunked", "Transfer-Encoding: identity", "Transfer-Encoding: xchunked"]
        {
            assert_eq!(status(head(headers)), 501, "{headers}");
        }
        assert_eq!(status(old("Transfer-Encoding: chunked")), 400);
        assert_eq!(status(head("Content-Length: 51201")), 413);
        assert_eq!(status(head(&format!("Content-Length: {}", "9".repeat(40)))), 413);
        assert_eq!(status(head("Expect: 200-ok")), 417);
        assert_eq!(status(vec![b'a'; MAX_HEAD]), 431);
        assert_eq!(status(head("X: y\r\n".repeat(MAX_HEADERS + 1).trim_end())), 431);
        assert_eq!(status(b"\x00\x01"), 400);
        assert_eq!(status("GET / HTTP/2.0\r\n\r\n"), 400);
        assert_eq!(message(head("Content-Length: 0\r\nContent-Length: 0")).body, b"");
        let longest = format!("PUT / HTTP/1.1\r\nX: {}\r\n\r\n", "y".repeat(MAX_HEAD - 23));
        assert_eq!(longest.len(), MAX_HEAD);
        message(&longest);
        assert_eq!(status(longest.replace("X: ", "X: y")), 431);
    }

    #[test]
    fn leave_to_send_a_body_is_given_once_and_to_those_who_wait_for_it() {
        for framing in ["Content-Length: 3", "Transfer-Encoding: chunked"] {
            let head = format!("PUT / HTTP/1.1\r\n{framing}\r\nExpect: 100-Continue\r\n\r\n");
            let mut parser = Parser::new(Limits::default());
            parser.push(head.as_bytes());
            assert_eq!(parser.parse(), Parsed::Partial { expect_continue: true });
            assert_eq!(parser.parse(), Parsed::Partial { expect_continue: false });
            assert_eq!(parse(format!("{head}1")), Parsed::Partial { expect_continue: false });
            assert_ne!(parse(head.replace("1.1", "1.0")), Parsed::Partial { expect_continue: true });
        }
        assert_eq!(message("PUT / HTTP/1.1\r\nExpect: 100-continue\r\n\r\n").body, b"");
    }

    #[test]
    fn connections_stay_open_as_the_version_and_the_client_say() {
        let stays = |version: &str, headers: &str| message(format!("GET / HTTP/{version}\r\n{headers}\r\n")).keep_alive;
        assert!(stays("1.1", ""));
        assert!(!stays("1.1", "Connection: Close\r\n"));
        assert!(!stays("1.1", "Connection: upgrade , close\r\n"));
        assert!(!stays("1.1", "Connection: keep-alive\r\nconnection: close\r\n"));
        assert!(stays("1.1", "Connection: closer\r\n"));
        assert!(!stays("1.0", ""));
        assert!(stays("1.0", "Connection: x,Keep-Alive\r\n"));
        assert!(!stays("1.0", "Connection: keep-alive, close\r\n"));
    }

    #[test]
    fn a_target_is_a_path_and_a_query() {
        let target = |sent: &str| {
            let Message { path, query, .. } = message(format!("GET {sent} HTTP/1.1\r\n\r\n"));
            (path, query)
        };
        let is = |path: &str, query: Option<&str>| (path.to_owned(), query.map(str::to_owned));
        assert_eq!(target("/vm"), is("/vm", None));
        assert_eq!(target("/vm?a=%41?&b"), is("/vm", Some("a=%41?&b")));
        assert_eq!(target("/vm?"), is("/vm", Some("")));
        assert_eq!(target("http://localhost/vm/config"), is("/vm/config", None));
        assert_eq!(target("HTTP://localhost:80"), is("/", None));
        assert_eq!(target("http://localhost?x=/"), is("/", Some("x=/")));
        assert_eq!(target("/drives/%61%2db"), is("/drives/a-b", None));
        assert_eq!(target("/%e2%82%ac/%0a"), is("/\u{20ac}/\n", None));
        assert_eq!(target("/snapshot%2fcreate"), is("/snapshot%2Fcreate", None));
        assert_eq!(target("/%2541"), is("/%41", None), "once");
        assert_eq!(target("*"), is("*", None));
        for sent in ["/%", "/%4", "/%4/", "/%g0", "/%+1", "/%\u{20ac}", "/%ff", "/%c3%28"] {
            assert_eq!(status(format!("GET {sent} HTTP/1.1\r\n\r\n")), 400, "{sent}");
        }
    }

    #[test]
    fn answers_say_how_long_they_are() {
        let sent = |response: Response, without_body| {
            let mut bytes = Vec::new();
            encode(&response, Delivery { request: 7, keep_alive: true, without_body }, &mut bytes);
            String::from_utf8(bytes).unwrap()
        };
        let head = |status: &str| {
            format!("HTTP/1.1 {status}\r\nServer: coppice\r\nConnection: keep-alive\r\nX-Request-Id: 7\r\n")
        };
        assert_eq!(sent(Response::done(), false), head("204 No Content") + "\r\n");
        let text = "Content-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: 2\r\n\r\n";
        assert_eq!(sent(Response::text("a\n".into()), false), head("200 OK") + text + "a\n");
        assert_eq!(sent(Response::text("a\n".into()), true), head("200 OK") + text);
        assert_eq!(sent(Response::text(String::new()), false), head("200 OK") + "Content-Length: 0\r\n\r\n");
        let refused = sent(Response::fault(405, "no").with_header("Allow", "GET,\r\n PUT"), false);
        let rest =
            "Allow: GET, PUT\r\nContent-Type: application/json\r\nContent-Length: 22\r\n\r\n{\"fault_message\":\"no\"}";
        assert_eq!(refused, head("405 Method Not Allowed") + rest);
    }

    /// A request as it is sent, once with its length and once in chunks, and as it is understood.
    fn requests() -> impl Strategy<Value = (Vec<u8>, Vec<u8>, Message)> {
        let method = prop_oneof![Just("GET"), Just("PUT"), Just("PATCH"), Just("HEAD"), Just("BREW")];
        let body = proptest::collection::vec((any::<u8>(), 0_usize..9), 0..60);
        (method, "(/[a-z_.-]{0,8}){1,3}", proptest::option::of("[a-z=&?]{0,8}"), any::<[bool; 4]>(), body).prop_map(
            |(method, path, query, [close, expects, trailers, url], body)| {
                let host = if url { "http://vm" } else { "" };
                let tail = query.as_ref().map(|query| format!("?{query}")).unwrap_or_default();
                let mut head = format!("{method} {host}{path}{tail} HTTP/1.1\r\nHost: vm\r\n");
                head += if close { "Connection: close\r\n" } else { "" };
                head += if expects { "Expect: 100-continue\r\n" } else { "" };
                let (mut chunked, mut rest) = (Vec::new(), &body[..]);
                while let [(first, _), ..] = rest {
                    let (now, later) = rest.split_at((*first as usize % 9 + 1).min(rest.len()));
                    let extension = ["", ";x", " ; x=\"y\""][now.len() % 3];
                    chunked.extend(format!("{:x}{extension}\r\n", now.len()).bytes());
                    chunked.extend(now.iter().map(|(byte, _)| byte));
                    chunked.extend(b"\r\n");
                    rest = later;
                }
                chunked.extend(if trailers { &b"0\r\nX: y\r\n\r\n"[..] } else { b"0\r\n\r\n" });
                let body: Vec<u8> = body.into_iter().map(|(byte, _)| byte).collect();
                let sized = [format!("{head}Content-Length: {}\r\n\r\n", body.len()).as_bytes(), &body].concat();
                let chunked = [format!("{head}Transfer-Encoding: chunked\r\n\r\n").as_bytes(), &chunked].concat();
                let method = method.to_owned();
                (sized, chunked, Message { method, path, query, body, keep_alive: !close })
            },
        )
    }

    /// Cuts at all of these places, of which those beyond the end are no places.
    fn cut<'a>(bytes: &'a [u8], at: &[usize]) -> Vec<&'a [u8]> {
        let mut at: Vec<usize> = at.iter().map(|at| at % (bytes.len() + 1)).chain([0, bytes.len()]).collect();
        at.sort_unstable();
        at.windows(2).map(|ends| &bytes[ends[0]..ends[1]]).collect()
    }

    proptest! {
        #[test]
        fn any_pieces_of_any_requests_are_those_requests(
            requests in proptest::collection::vec((requests(), any::<bool>()), 1..6),
            at in proptest::collection::vec(any::<usize>(), 0..40),
        ) {
            let sent: Vec<u8> = requests.iter()
                .flat_map(|((sized, chunked, _), chunks)| if *chunks { chunked.clone() } else { sized.clone() })
                .collect();
            let meant: Vec<Message> = requests.into_iter().map(|((_, _, message), _)| message).collect();
            prop_assert_eq!(&parse_all([&sent[..]]).0, &meant);
            prop_assert_eq!(parse_all(sent.chunks(1)), (meant.clone(), None, false));
            prop_assert_eq!(parse_all(cut(&sent, &at)), (meant, None, false));
        }

        #[test]
        fn damaged_requests_are_the_same_in_any_pieces(
            requests in proptest::collection::vec(requests(), 1..4),
            damage in proptest::collection::vec((any::<usize>(), prop_oneof![any::<u8>(), Just(b'\n'), Just(b'0')]), 1..6),
            at in proptest::collection::vec(any::<usize>(), 0..10),
        ) {
            let mut sent: Vec<u8> = requests.into_iter().flat_map(|(sized, chunked, _)| [sized, chunked].concat()).collect();
            for (place, byte) in damage {
                let place = place % sent.len();
                sent[place] = byte;
            }
            let whole = parse_all([&sent[..]]);
            prop_assert_eq!(&parse_all(sent.chunks(1)), &whole);
            prop_assert_eq!(&parse_all(cut(&sent, &at)), &whole);
        }

        #[test]
        fn no_bytes_make_parsing_panic(bytes in proptest::collection::vec(any::<u8>(), 0..500)) {
            parse(&bytes);
            parse([b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", &bytes[..]].concat());
            parse([b"GET ", &bytes[..], b" HTTP/1.1\r\n\r\n"].concat());
        }
    }
}
