//! Learns which pages the clones of an image use, from the first of them. No I/O.
//!
//! ```text
//!   clone served for a while --asked--> tells, in messages --whole--> heard --enough clones--> the working set
//! ```
//!
//! What a clone tells is its own word, and only ever advice: pages that one clone alone claims to use are left out.

use api_spec::handshake::{MAX_USED_MESSAGES, MAX_USED_RUNS, Used as Message};
use snapshot::page_runs::PageRuns;
use snapshot::working_set::Used;
use std::ops::Range;

/// Why a client's answer is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TellError {
    /// Nobody has asked.
    #[error("it tells what it has used, and was not asked")]
    Unasked,
    /// Too long.
    #[error("it tells more than {MAX_USED_MESSAGES} messages of {MAX_USED_RUNS} runs of what it has used")]
    TooMuch,
    /// Pages that no image has.
    #[error("it tells of a run of pages that ends beyond the last number")]
    Overflow,
}

/// What one clone tells.
#[derive(Debug, Default)]
pub enum Telling {
    /// It was not asked.
    #[default]
    Unasked,
    /// It was, and has told so much so far, in so many messages.
    Asked(Vec<Range<u64>>, Vec<Range<u64>>, usize),
    /// It has told.
    Told,
}

impl Telling {
    /// The clone is asked. False if it was before.
    pub fn ask(&mut self) -> bool {
        let is_first = matches!(self, Telling::Unasked);
        if is_first {
            *self = Telling::Asked(Vec::new(), Vec::new(), 0);
        }
        is_first
    }

    /// Whether it was asked and has not told all yet.
    pub fn is_awaited(&self) -> bool {
        matches!(self, Telling::Asked(..))
    }

    /// It is waited for no longer. False if it was not.
    pub fn give_up(&mut self) -> bool {
        let was_awaited = self.is_awaited();
        if was_awaited {
            *self = Telling::Told;
        }
        was_awaited
    }

    /// Takes a message; returns what the clone has used once that is complete.
    pub fn hear(&mut self, message: Message) -> Result<Option<Used>, TellError> {
        let Telling::Asked(read, written, messages) = self else {
            // It may be late.
            return if matches!(self, Telling::Told) { Ok(None) } else { Err(TellError::Unasked) };
        };
        *messages += 1;
        if *messages > MAX_USED_MESSAGES || message.read.len() + message.written.len() > MAX_USED_RUNS {
            return Err(TellError::TooMuch);
        }
        for (runs, told) in [(&mut *read, message.read), (&mut *written, message.written)] {
            for (first, pages) in told {
                runs.push(first..first.checked_add(pages).ok_or(TellError::Overflow)?);
            }
        }
        if message.more {
            return Ok(None);
        }
        let used = Used { read: PageRuns::new(read.drain(..)), written: PageRuns::new(written.drain(..)) };
        *self = Telling::Told;
        Ok(Some(used))
    }
}

/// The clones of one image that are learnt from.
#[derive(Debug)]
pub struct Recorder {
    /// How many clones are still to be asked.
    to_ask: usize,
    /// How many are to be heard.
    enough: usize,
    heard: Vec<Used>,
}

impl Recorder {
    /// Learns from so many clones, at least 1.
    pub fn new(clones: usize) -> Self {
        Self { to_ask: clones, enough: clones, heard: Vec::with_capacity(clones.min(64)) }
    }

    /// Whether another clone is to be asked.
    pub fn wants_more(&self) -> bool {
        self.to_ask > 0
    }

    /// One is asked.
    pub fn asked(&mut self) {
        self.to_ask = self.to_ask.saturating_sub(1);
    }

    /// One that was asked has gone without an answer.
    pub fn went(&mut self) {
        self.to_ask += usize::from(self.to_ask + self.heard.len() < self.enough);
    }

    /// Hears of what a clone has used. Once all were heard it gives what they told, and how many of them must agree.
    pub fn hear(&mut self, used: Used) -> Option<(Vec<Used>, usize)> {
        self.heard.push(used);
        if self.heard.len() < self.enough {
            return None;
        }
        Some((std::mem::take(&mut self.heard), self.enough / 2 + 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(read: &[(u64, u64)], more: bool) -> Message {
        Message { read: read.to_vec(), written: Vec::new(), more }
    }

    #[test]
    fn only_who_was_asked_is_heard_and_once() {
        let mut telling = Telling::default();
        assert_eq!(telling.hear(message(&[], false)), Err(TellError::Unasked));
        assert!(telling.ask() && !telling.ask());
        assert_eq!(telling.hear(message(&[(5, 2)], true)), Ok(None));
        let used = telling.hear(message(&[(1, 1), (7, 1)], false)).unwrap().unwrap();
        assert_eq!(used.read, PageRuns::new([1..2, 5..8]));
        assert_eq!(telling.hear(message(&[], false)), Ok(None), "once");
        assert!(!telling.ask() && !telling.give_up());
        let mut telling = Telling::default();
        telling.ask();
        assert!(telling.give_up());
        assert_eq!(telling.hear(message(&[(5, 2)], false)), Ok(None), "too late");
    }

    #[test]
    fn who_tells_too_much_is_not_heard() {
        let long = Message { read: vec![(0, 1); MAX_USED_RUNS], written: vec![(0, 1)], more: true };
        let mut telling = Telling::default();
        telling.ask();
        assert_eq!(telling.hear(long), Err(TellError::TooMuch));
        let mut telling = Telling::default();
        telling.ask();
        (0..MAX_USED_MESSAGES).for_each(|_| assert_eq!(telling.hear(message(&[], true)), Ok(None)));
        assert_eq!(telling.hear(message(&[], false)), Err(TellError::TooMuch));
        let mut telling = Telling::default();
        telling.ask();
        assert_eq!(telling.hear(message(&[(u64::MAX, 2)], false)), Err(TellError::Overflow));
    }

    #[test]
    fn enough_are_asked_and_those_that_go_are_replaced() {
        let mut recorder = Recorder::new(2);
        recorder.asked();
        recorder.asked();
        assert!(!recorder.wants_more());
        recorder.went();
        assert!(recorder.wants_more());
        recorder.asked();
        assert_eq!(recorder.hear(Used::default()), None);
        assert_eq!(recorder.hear(Used::default()).unwrap(), (vec![Used::default(); 2], 2));
        assert!(!recorder.wants_more());
    }

    proptest! {
        #[test]
        fn no_more_are_asked_than_are_wanted(steps in prop::collection::vec(any::<bool>(), 0..100), clones in 1..8usize) {
            let (mut recorder, mut out, mut heard) = (Recorder::new(clones), 0, 0);
            for goes in steps {
                if recorder.wants_more() {
                    recorder.asked();
                    out += 1;
                } else if out > 0 && goes {
                    recorder.went();
                    out -= 1;
                } else if out > 0 {
                    recorder.hear(Used::default());
                    (out, heard) = (out - 1, heard + 1);
                }
                prop_assert!(out + heard <= clones);
            }
        }
    }
}
