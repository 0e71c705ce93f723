//! HTTP/1.1 messages from and to bytes. Pure.

use super::Response;

/// Longest request line and headers together, in bytes.
pub const MAX_HEAD: usize = 8 * 1024;
/// Longest body, in bytes.
pub const MAX_BODY: usize = 50 * 1024;
const MAX_HEADERS: usize = 32;

/// A request as HTTP has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// `GET`, `PUT`, ...
    pub method: String,
    /// Path, as sent.
    pub path: String,
    /// What follows the path's `?`, as sent; empty if there is none.
    pub query: String,
    /// Body; empty if there is none.
    pub body: Vec<u8>,
    /// Whether the client wants the connection to stay open.
    pub keep_alive: bool,
}

/// What the bytes at hand amount to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// More bytes are needed. `expect_continue`: the client waits for leave to send its body.
    Partial {
        /// Whether to answer `100 Continue`.
        expect_continue: bool,
    },
    /// A request, and how many bytes it took.
    Complete(Message, usize),
    /// Not a request that is understood here: the status and the reason. The connection cannot go on.
    Bad(u16, String),
}

/// Parses the request at the start of `bytes`.
pub fn parse(bytes: &[u8]) -> Parsed {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let head = match request.parse(bytes) {
        Ok(httparse::Status::Complete(head)) if head <= MAX_HEAD => head,
        Ok(httparse::Status::Partial) if bytes.len() <= MAX_HEAD => return Parsed::Partial { expect_continue: false },
        Ok(_) | Err(httparse::Error::TooManyHeaders) => {
            return Parsed::Bad(
                431,
                format!("request line and headers may have {MAX_HEAD} bytes and {MAX_HEADERS} headers"),
            );
        }
        Err(e) => return Parsed::Bad(400, format!("not an HTTP/1.1 request: {e}")),
    };
    let framing = match Framing::of(&request) {
        Ok(framing) => framing,
        Err((status, reason)) => return Parsed::Bad(status, reason),
    };
    let end = head + framing.length;
    let Some(body) = bytes.get(head..end) else {
        return Parsed::Partial { expect_continue: framing.expect_continue && bytes.len() == head };
    };
    let target = request.path.unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let message = Message {
        method: request.method.unwrap_or_default().to_owned(),
        path: path.to_owned(),
        query: query.to_owned(),
        body: body.to_vec(),
        keep_alive: framing.keep_alive,
    };
    Parsed::Complete(message, end)
}

/// How a request's headers say that it is framed.
struct Framing {
    length: usize,
    keep_alive: bool,
    expect_continue: bool,
}

impl Framing {
    fn of(request: &httparse::Request<'_, '_>) -> Result<Self, (u16, String)> {
        let mut framing = Framing { length: 0, keep_alive: request.version == Some(1), expect_continue: false };
        let mut length_seen = false;
        for header in request.headers.iter() {
            let value = std::str::from_utf8(header.value).unwrap_or_default().trim();
            if header.name.eq_ignore_ascii_case("content-length") {
                let length = value.parse().ok().filter(|_| value.bytes().all(|b| b.is_ascii_digit()));
                let length: usize = length.ok_or_else(|| (400, format!("Content-Length `{value}` is no number")))?;
                if length_seen && length != framing.length {
                    return Err((400, "two different Content-Length headers".into()));
                }
                if length > MAX_BODY {
                    return Err((413, format!("a body of {length} bytes; the limit is {MAX_BODY}")));
                }
                (framing.length, length_seen) = (length, true);
            } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
                return Err((411, "Transfer-Encoding is not offered; send Content-Length".into()));
            } else if header.name.eq_ignore_ascii_case("connection") {
                framing.keep_alive &= !value.eq_ignore_ascii_case("close");
            } else if header.name.eq_ignore_ascii_case("expect") {
                framing.expect_continue = value.eq_ignore_ascii_case("100-continue");
            }
        }
        Ok(framing)
    }
}

/// Leave to send a body.
pub const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// An answer as bytes.
pub fn encode(response: &Response, keep_alive: bool) -> Vec<u8> {
    let reason = match response.status {
        200 => "OK",
        204 => "No Content",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        411 => "Length Required",
        413 => "Content Too Large",
        431 => "Request Header Fields Too Large",
        _ => "Internal Server Error",
    };
    let connection = if keep_alive { "keep-alive" } else { "close" };
    let mut bytes = format!("HTTP/1.1 {} {reason}\r\nServer: coppice\r\nConnection: {connection}\r\n", response.status)
        .into_bytes();
    if !response.body.is_empty() {
        let (kind, len) = (response.content_type, response.body.len());
        bytes.extend(format!("Content-Type: {kind}\r\nContent-Length: {len}\r\n").bytes());
    } else if response.status != 204 {
        bytes.extend(b"Content-Length: 0\r\n");
    }
    bytes.extend(b"\r\n");
    bytes.extend(&response.body);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn requests_arrive_in_any_number_of_pieces() {
        let bytes = b"PUT /vsock HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}GET / HTTP/1.1\r\n\r\n";
        let first = bytes.len() - 18;
        for cut in 0..first {
            assert!(matches!(parse(&bytes[..cut]), Parsed::Partial { .. }), "{cut}");
        }
        let Parsed::Complete(message, used) = parse(bytes) else { panic!() };
        assert_eq!((message.method.as_str(), message.path.as_str(), &message.body[..]), ("PUT", "/vsock", &b"{}"[..]));
        assert_eq!(used, first);
        assert!(matches!(parse(&bytes[used..]), Parsed::Complete(m, 18) if m.method == "GET" && m.keep_alive));
    }

    #[test]
    fn what_is_too_large_or_ambiguous_is_refused() {
        let head = |headers: &str| format!("PUT / HTTP/1.1\r\n{headers}\r\n\r\n").into_bytes();
        assert!(matches!(parse(&head("Content-Length: 99999999")), Parsed::Bad(413, _)));
        assert!(matches!(parse(&head("Content-Length: +5")), Parsed::Bad(400, _)));
        assert!(matches!(parse(&head("Content-Length: 1\r\nContent-Length: 2")), Parsed::Bad(400, _)));
        assert!(matches!(parse(&head("Transfer-Encoding: chunked")), Parsed::Bad(411, _)));
        assert!(matches!(parse(&vec![b'a'; MAX_HEAD + 1]), Parsed::Bad(431, _)));
        assert!(matches!(parse(b"\x00\x01"), Parsed::Bad(400, _)));
        assert_eq!(
            parse(&head("Content-Length: 3\r\nExpect: 100-continue")),
            Parsed::Partial { expect_continue: true }
        );
    }

    proptest! {
        #[test]
        fn no_bytes_make_parsing_panic(bytes in proptest::collection::vec(any::<u8>(), 0..500)) {
            let _ = parse(&bytes);
        }
    }
}
