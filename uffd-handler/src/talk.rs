//! What a served client says: pings, and what it was asked for, each on a line. No I/O.

use api_spec::handshake::{MAX_MESSAGE, Word};
use std::collections::VecDeque;

/// Bytes that a client may have sent beyond what was answered.
const MOST_UNANSWERED: usize = MAX_MESSAGE + 4096;

/// Why a client is not listened to any longer.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum TalkError {
    /// Something else.
    #[error("a served client may send nothing but ping and used messages: {0}")]
    NoWord(String),
    /// Words without end, or a line without one.
    #[error("it has sent more than {MOST_UNANSWERED} bytes that were not answered")]
    TooMuch,
}

/// The words of one client that were not answered yet.
#[derive(Debug, Default)]
pub struct Talk {
    bytes: VecDeque<u8>,
}

impl Talk {
    /// Takes what the client has sent.
    pub fn hear(&mut self, bytes: &[u8]) -> Result<(), TalkError> {
        if self.bytes.len() + bytes.len() > MOST_UNANSWERED {
            return Err(TalkError::TooMuch);
        }
        self.bytes.extend(bytes);
        Ok(())
    }

    /// Whether there is a line to be [taken](Self::take).
    pub fn has_line(&self) -> bool {
        self.bytes.contains(&b'\n')
    }

    /// The next word, which is to be answered; `None` until it is complete.
    pub fn take(&mut self) -> Result<Option<Word>, TalkError> {
        let Some(end) = self.bytes.iter().position(|&byte| byte == b'\n') else { return Ok(None) };
        let line: Vec<u8> = self.bytes.drain(..=end).collect();
        serde_json::from_slice(&line).map(Some).map_err(|error| TalkError::NoWord(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use api_spec::handshake::Ping;
    use proptest::prelude::*;

    #[test]
    fn what_is_no_word_is_named() {
        for (bytes, part) in
            [(&b"\n"[..], "EOF"), (b"{\"ping\":-1}\n", "did not match"), (b"{\"pong\":1}\n", "did not match")]
        {
            let mut talk = Talk::default();
            talk.hear(bytes).unwrap();
            let error = talk.take().unwrap_err().to_string();
            assert!(error.contains("ping and used messages") && error.contains(part), "{error}");
        }
    }

    #[test]
    fn who_says_too_much_is_not_heard() {
        let mut talk = Talk::default();
        talk.hear(&[b' '; MOST_UNANSWERED]).unwrap();
        assert_eq!(talk.hear(b" "), Err(TalkError::TooMuch));
    }

    proptest! {
        #[test]
        fn pings_come_whole_and_in_order_however_they_are_cut(
            numbers in prop::collection::vec(any::<u64>(), 0..20), cuts in prop::collection::vec(1..40usize, 0..60)
        ) {
            let bytes: String = numbers.iter().map(|ping| format!("{{\"ping\":{ping}}}\n")).collect();
            let (mut talk, mut left, mut taken) = (Talk::default(), bytes.as_bytes(), Vec::new());
            for cut in cuts.into_iter().chain([usize::MAX]) {
                let (now, later) = left.split_at(cut.min(left.len()));
                talk.hear(now).unwrap();
                left = later;
                while let Some(Word::Ping(Ping { ping })) = talk.take().unwrap() {
                    taken.push(ping);
                }
            }
            prop_assert_eq!(taken, numbers);
        }

        #[test]
        fn any_bytes_are_heard_without_panic(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..90), 0..20)) {
            let mut talk = Talk::default();
            for piece in pieces {
                let _ = talk.hear(&piece);
                let _ = talk.take();
            }
        }
    }
}
