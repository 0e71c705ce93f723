//! What became ready, in the 32 bits that the event loop keeps with each descriptor.

/// What a ready descriptor is, as the 32 bits that the event loop keeps with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// Somebody connects to be served.
    Listener,
    /// Somebody connects to read the counters.
    Metrics,
    /// A signal is pending.
    Signals,
    /// A second has passed.
    Tick,
    /// The time has come for something that was put off.
    Alarm,
    /// A chunk has come that was waited for.
    Fetched,
    /// A client's connection.
    Socket(u32),
    /// A guest's userfaultfd.
    Uffd(u32),
    /// A guest's process: it has ended.
    Process(u32),
    /// A reader of the counters has sent something, or has room.
    Reader(u32),
}

impl Token {
    /// How many bits the number of a peer has.
    const ID_BITS: u32 = 28;
    /// Largest number of a peer.
    pub const ID_MASK: u32 = (1 << Self::ID_BITS) - 1;

    /// As the event loop keeps it.
    pub fn encode(self) -> u32 {
        let (kind, id) = match self {
            Token::Listener => (0, 0),
            Token::Metrics => (1, 0),
            Token::Signals => (2, 0),
            Token::Tick => (3, 0),
            Token::Alarm => (4, 0),
            Token::Fetched => (5, 0),
            Token::Socket(id) => (6, id),
            Token::Uffd(id) => (7, id),
            Token::Process(id) => (8, id),
            Token::Reader(id) => (9, id),
        };
        (kind << Self::ID_BITS) | id
    }

    /// As it was before [`Token::encode`].
    pub fn decode(data: u32) -> Option<Self> {
        let id = data & Self::ID_MASK;
        Some(match data >> Self::ID_BITS {
            0 => Token::Listener,
            1 => Token::Metrics,
            2 => Token::Signals,
            3 => Token::Tick,
            4 => Token::Alarm,
            5 => Token::Fetched,
            6 => Token::Socket(id),
            7 => Token::Uffd(id),
            8 => Token::Process(id),
            9 => Token::Reader(id),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_come_back_as_they_were() {
        let id = Token::ID_MASK;
        for token in [Token::Listener, Token::Metrics, Token::Signals, Token::Tick, Token::Alarm, Token::Fetched] {
            assert_eq!(Token::decode(token.encode()), Some(token));
        }
        for token in [Token::Socket(id), Token::Uffd(1), Token::Process(0), Token::Reader(id)] {
            assert_eq!(Token::decode(token.encode()), Some(token));
        }
    }
}
