//! Agent frames out of a stream of bytes.

use api_spec::agent::{self, Envelope, GuestKind, HEADER_LEN, Level, Request, Response};

/// Longest body that the guest takes, in bytes; requests are far shorter.
pub const MAX_BODY: usize = 1024;
/// Longest frame that the guest sends, in bytes.
pub const MAX_ANSWER: usize = 64;

/// What the guest says unasked, once.
pub const READY: Response = Response::Ready { level: Level::Full, kind: GuestKind::Embedded };

/// What a stream begins with.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// A whole frame of so many bytes.
    Frame(Envelope<Request>, usize),
    /// The beginning of a frame.
    More,
    /// No frame of this protocol version: the stream is of no further use.
    Broken,
}

/// Looks for a frame at the start of `bytes`.
pub fn next(bytes: &[u8]) -> Next {
    let Some((header, rest)) = bytes.split_first_chunk::<HEADER_LEN>() else { return Next::More };
    let body = match agent::body_len(header) {
        Ok(len) if len <= MAX_BODY => rest.get(..len),
        _ => return Next::Broken,
    };
    let Some(body) = body else { return Next::More };
    match agent::split::<Request>(body) {
        // What follows is for a guest of another kind; this one only has to say so.
        Ok((request, rest)) if rest.is_empty() || request.body == Request::Linux => {
            Next::Frame(request, HEADER_LEN + body.len())
        }
        _ => Next::Broken,
    }
}

/// An answer as a frame.
pub struct Answer {
    bytes: [u8; MAX_ANSWER],
    len: usize,
}

impl Answer {
    /// Encodes an answer to the request `id`.
    pub fn new(id: u32, response: Response) -> Self {
        let mut bytes = [0; MAX_ANSWER];
        // No response is longer than the buffer, as the test below shows.
        let len = agent::encode(&Envelope { id, body: response }, &mut bytes).map_or(0, <[u8]>::len);
        Answer { bytes, len }
    }

    /// The frame.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use api_spec::agent::{Info, burn::Burn};

    #[test]
    fn the_longest_answers_fit() {
        let burn = Burn { steps: u64::MAX, integer: u64::MAX, float: u64::MAX };
        let info = Info { kind: agent::GuestKind::Embedded, vcpus: 255, pages: u32::MAX, pages_base: u64::MAX };
        for response in [
            Response::Burned(burn),
            Response::Random([255; 32]),
            Response::Info(info),
            Response::Time { tsc: u64::MAX, wall_ns: u64::MAX },
        ] {
            assert!(Answer::new(u32::MAX, response).bytes().len() > HEADER_LEN, "{response:?}");
        }
    }

    #[test]
    fn frames_come_whole_or_not_at_all() {
        let mut buf = [0; 64];
        let request = Envelope { id: 9, body: Request::Ping { token: 1 << 40 } };
        let frame = agent::encode(&request, &mut buf).unwrap();
        for cut in 0..frame.len() {
            assert_eq!(next(&frame[..cut]), Next::More);
        }
        let two = [frame, frame].concat();
        assert_eq!(next(&two), Next::Frame(request, frame.len()));
    }

    #[test]
    fn a_request_for_another_kind_of_guest_is_one_frame() {
        let frame = [5, 0, 0, 0, 1, 0, 0, 0, 9, 17, 1, 2, 3];
        assert_eq!(next(&frame), Next::Frame(Envelope { id: 9, body: Request::Linux }, frame.len()));
    }

    #[test]
    fn what_is_no_frame_is_refused() {
        assert_eq!(next(&[0, 0, 0, 0, 2, 0, 0, 0]), Next::Broken, "another version");
        assert_eq!(next(&[1, 4, 0, 0, 1, 0, 0, 0]), Next::Broken, "longer than the guest takes");
        assert_eq!(next(&[2, 0, 0, 0, 1, 0, 0, 0, 1, 99]), Next::Broken, "no such request");
        assert_eq!(next(&[3, 0, 0, 0, 1, 0, 0, 0, 1, 16, 0]), Next::Broken, "a byte is left over");
    }
}
