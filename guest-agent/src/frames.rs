//! Requests out of a stream of bytes, however they are cut.

use api_spec::agent::linux::{AnyRequest, decode_request};
use api_spec::agent::{Envelope, FrameError, HEADER_LEN, MAX_BODY, body_len};

/// The longest frame, in bytes.
pub const MAX_FRAME: usize = HEADER_LEN + MAX_BODY;

/// Bytes that have come and are not yet requests. Never holds more than [`MAX_FRAME`].
#[derive(Debug, Default)]
pub struct Inbox {
    bytes: Vec<u8>,
}

impl Inbox {
    /// How many bytes it can take now.
    pub fn room(&self) -> usize {
        MAX_FRAME - self.bytes.len()
    }

    /// Whether a frame has begun.
    pub fn has_begun(&self) -> bool {
        !self.bytes.is_empty()
    }

    /// Takes in bytes, at most [`room`](Self::room).
    pub fn add(&mut self, bytes: &[u8]) {
        debug_assert!(bytes.len() <= self.room());
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole request. After an error the stream is of no further use.
    pub fn next_request(&mut self) -> Result<Option<Envelope<AnyRequest>>, FrameError> {
        let Some((header, rest)) = self.bytes.split_first_chunk::<HEADER_LEN>() else { return Ok(None) };
        let len = body_len(header)?;
        let Some(body) = rest.get(..len) else { return Ok(None) };
        let request = decode_request(body)?;
        self.bytes.drain(..HEADER_LEN + len);
        Ok(Some(request))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use api_spec::agent::linux::{CHUNK, Either, Request as Linux, encode_request};
    use api_spec::agent::{Request, VERSION};
    use proptest::prelude::*;

    fn requests() -> Vec<AnyRequest> {
        vec![
            Either::Common(Request::Ping { token: 1 << 40 }),
            Either::Linux(Linux::Data(vec![7; 300])),
            Either::Linux(Linux::Readiness),
        ]
    }

    #[test]
    fn requests_arrive_in_any_pieces() {
        let frames = requests().iter().flat_map(|request| encode_request(4, request).unwrap()).collect::<Vec<_>>();
        for piece in 1..frames.len() {
            let mut inbox = Inbox::default();
            let mut heard = Vec::new();
            for bytes in frames.chunks(piece) {
                inbox.add(bytes);
                while let Some(request) = inbox.next_request().unwrap() {
                    heard.push(request.body);
                }
            }
            assert_eq!(heard, requests());
            assert!(!inbox.has_begun());
        }
    }

    #[test]
    fn the_longest_request_fits() {
        let frame = encode_request(u32::MAX, &Either::Linux(Linux::Data(vec![1; CHUNK]))).unwrap();
        let mut inbox = Inbox::default();
        assert!(frame.len() <= inbox.room());
        inbox.add(&frame);
        assert!(inbox.next_request().unwrap().is_some());
    }

    #[test]
    fn what_is_no_frame_is_an_error_as_soon_as_its_header_is_there() {
        let next = |bytes: &[u8]| {
            let mut inbox = Inbox::default();
            inbox.add(bytes);
            inbox.next_request()
        };
        let version = VERSION as u8;
        assert_eq!(next(&[0, 0, 0, 0, 9, 0, 0, 0]), Err(FrameError::Version(9)));
        assert_eq!(next(&[0, 0, 0, 0, version, 0, 1, 0]), Err(FrameError::Reserved(1)));
        assert_eq!(next(&[1, 0, 1, 0, version, 0, 0, 0]), Err(FrameError::TooLong(MAX_BODY + 1)));
        assert_eq!(next(&[2, 0, 0, 0, version, 0, 0, 0, 1, 99]), Err(FrameError::Body));
        assert!(next(b"GET / HTTP/1.1\r\n").is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic_or_grow(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..64), 0..40)) {
            let mut inbox = Inbox::default();
            for piece in pieces {
                inbox.add(&piece);
                loop {
                    match inbox.next_request() {
                        Ok(Some(_)) => {}
                        Ok(None) => break,
                        Err(_) => return Ok(()),
                    }
                }
                prop_assert!(inbox.bytes.len() <= MAX_FRAME);
            }
        }
    }
}
