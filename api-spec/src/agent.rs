//! The agent protocol: what the host says to the agent in a guest, and what it answers.
//!
//! A *frame* is an 8-byte header and a body:
//!
//! ```text
//!   0        4          6           8
//!   | length | version  | reserved  | body: `length` bytes ...
//!   | u32 LE | u16 LE   | u16 = 0   | postcard encoding of `Envelope<Request>` or `Envelope<Response>`
//! ```
//!
//! The same frames travel over vsock (the guest listens on [`AGENT_PORT`]) and, in the embedded guest, over COM1.
//! A guest that has become ready connects to the host's [`READY_PORT`] and sends one [`Response::Ready`]
//! with id 0; a guest without vsock sends it over COM1.
//!
//! What only an agent in a Linux guest can do is a second family of messages, [`linux`], which owns memory and so needs
//! the standard library. They travel in the same frames: a body that begins with [`Request::Linux`] goes on with a
//! `linux::Request`, and one that begins with [`Response::Linux`] with a `linux::Response`. A guest of another kind
//! reads as far as the variant and answers [`Refusal::NotHere`].
//!
//! postcard numbers enum variants in their order here, so **variants are only ever appended**; the tests below pin the
//! bytes. A change of meaning raises [`VERSION`].

#[cfg(feature = "std")]
pub mod linux;

use core::fmt;
use serde::{Deserialize, Serialize};

/// Version of the protocol, in every frame header. A peer that sees another one answers nothing and closes.
pub const VERSION: u16 = 1;
/// The vsock port on which the agent listens in the guest.
pub const AGENT_PORT: u32 = 5000;
/// The vsock port on the host (CID 2) to which a guest announces that it is ready.
pub const READY_PORT: u32 = 5001;
/// Length of a frame header, in bytes.
pub const HEADER_LEN: usize = 8;
/// Longest body, in bytes. A longer one is refused before anything is allocated.
pub const MAX_BODY: usize = 64 * 1024;

/// A numbered message; the answer carries the number of its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Envelope<T> {
    /// Chosen by whoever asks. 0 is an announcement that answers nothing.
    pub id: u32,
    /// The message.
    pub body: T,
}

/// How ready a guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Level {
    /// The agent answers; services may still be starting.
    Agent,
    /// The agent answers and everything that the guest is meant to start has started.
    Full,
    /// As `Full`, but something failed to start.
    Degraded,
}

/// Which guest is speaking.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GuestKind {
    /// The embedded guest that the vmm carries.
    Embedded,
    /// An agent in a Linux guest.
    Linux,
}

/// What a clone needs to become itself, told to it before anyone else may use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resumed {
    /// The clone's generation id.
    pub generation: [u8; 16],
    /// Wall-clock time of the host, nanoseconds since the Unix epoch.
    pub time_ns: u64,
    /// Fresh entropy from the host, to be mixed into the guest's random state.
    pub entropy: [u8; 32],
}

/// A choice of the embedded guest's work pages: `count` pages, `stride` pages apart, from page number `first`.
///
/// Work pages are the guest's RAM that it does not use itself, numbered from 0; [`Info::pages`] says how many there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pages {
    /// Number of the first page.
    pub first: u32,
    /// How many pages.
    pub count: u32,
    /// Distance between two chosen pages, in pages; at least 1.
    pub stride: u32,
}

impl Pages {
    /// `count` neighbouring pages from page `first`.
    pub const fn run(first: u32, count: u32) -> Self {
        Pages { first, count, stride: 1 }
    }

    /// Whether every chosen page is one of `available` pages.
    pub fn fits(&self, available: u32) -> bool {
        let (first, count, stride) = (self.first as u64, self.count as u64, self.stride as u64);
        stride > 0 && (count == 0 || first + (count - 1) * stride < available as u64)
    }

    /// The numbers of the chosen pages, in order.
    pub fn numbers(self) -> impl Iterator<Item = u32> {
        (0..self.count).map(move |i| self.first.wrapping_add(i.wrapping_mul(self.stride)))
    }
}

/// What the host asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Answered with [`Response::Pong`] and the same token.
    Ping {
        /// Comes back unchanged.
        token: u64,
    },
    /// The guest is a fresh clone: take this identity. Answered with [`Response::Resumed`] once it is in force.
    Resumed(Resumed),
    /// Answered with [`Response::Info`].
    Info,
    /// The 16 bytes made at boot that exist only in guest RAM. Answered with [`Response::Nonce`].
    Nonce,
    /// Wait for `advance` more timer interrupts, one a millisecond, then tell how many there were since boot.
    /// Answered with [`Response::Ticks`].
    Ticks {
        /// How many interrupts to wait for; 0 answers at once.
        advance: u32,
    },
    /// 32 bytes of the guest's random generator. Answered with [`Response::Random`].
    Random,
    /// The generation id as it stands in the guest page that the vmm writes. Answered with [`Response::Generation`].
    Generation,
    /// Time as the guest sees it. Answered with [`Response::Time`].
    Time,
    /// Write every word of the chosen pages with [`pattern::word`]. Answered with [`Response::Done`].
    Fill {
        /// Which pages.
        pages: Pages,
        /// Which pattern.
        seed: u64,
    },
    /// Read one word of each chosen page. Answered with [`Response::Sum`]: their wrapping sum.
    Touch {
        /// Which pages.
        pages: Pages,
    },
    /// Write `value` to the first word of each chosen page. Answered with [`Response::Done`].
    Write {
        /// Which pages.
        pages: Pages,
        /// The word.
        value: u64,
    },
    /// [`pattern::Checksum`] over every word of the chosen pages. Answered with [`Response::Sum`].
    Checksum {
        /// Which pages.
        pages: Pages,
    },
    /// Compare every word of the chosen pages with [`pattern::word`]. Answered with [`Response::Mismatches`].
    Verify {
        /// Which pages.
        pages: Pages,
        /// Which pattern.
        seed: u64,
    },
    /// Run [`burn::Burn`] for so many steps on the vCPU that answers. Answered with [`Response::Burned`].
    Burn {
        /// Steps.
        steps: u64,
    },
    /// Set another vCPU to run [`burn::Burn`] until told to stop. Answered with [`Response::Done`].
    BurnStart {
        /// Number of the vCPU, from 1.
        vcpu: u8,
    },
    /// Stop that vCPU's burn. Answered with [`Response::Burned`].
    BurnStop {
        /// Number of the vCPU, from 1.
        vcpu: u8,
    },
    /// Reset the machine at once: through the i8042 controller, or by the kernel of a Linux guest. No answer.
    Reset,
    /// A `linux::Request` follows in the same body.
    Linux,
    /// Give the chosen pages back to the host, through the balloon. What they hold is lost; they may be used again at once.
    /// Answered with [`Response::Done`].
    GiveBack {
        /// Which pages.
        pages: Pages,
    },
    /// Write the chosen pages to the guest's first disk, each 4 KiB times its number from the disk's beginning. Answered with
    /// [`Response::Done`].
    DiskWrite {
        /// Which pages.
        pages: Pages,
    },
    /// Read the chosen pages from there. Answered with [`Response::Done`].
    DiskRead {
        /// Which pages.
        pages: Pages,
    },
}

/// Facts about a guest that do not change while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    /// Which guest.
    pub kind: GuestKind,
    /// vCPUs that the guest has brought up, itself included.
    pub vcpus: u8,
    /// Number of work pages (4 KiB each).
    pub pages: u32,
    /// Guest-physical address of work page 0, in bytes. The others follow it in order, those that would lie between 3 and
    /// 4 GiB and all after them 1 GiB further on.
    pub pages_base: u64,
}

/// What the guest answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Response {
    /// The guest has become ready (an announcement, id 0).
    Ready {
        /// How ready.
        level: Level,
        /// Which guest.
        kind: GuestKind,
    },
    /// Answer to a ping.
    Pong {
        /// The token of the ping.
        token: u64,
    },
    /// The new identity is in force.
    Resumed {
        /// The generation id that was taken.
        generation: [u8; 16],
    },
    /// Facts about the guest.
    Info(Info),
    /// The boot nonce.
    Nonce([u8; 16]),
    /// Timer interrupts since boot.
    Ticks {
        /// How many.
        count: u64,
    },
    /// Random bytes.
    Random([u8; 32]),
    /// The generation id in guest memory.
    Generation([u8; 16]),
    /// Time as the guest sees it.
    Time {
        /// Time-stamp counter, in its own ticks.
        tsc: u64,
        /// Wall clock, nanoseconds since the Unix epoch; 0 if nobody has told the guest yet.
        wall_ns: u64,
    },
    /// Done; nothing to report.
    Done,
    /// A sum or a checksum.
    Sum(u64),
    /// How many words were not as expected.
    Mismatches(u64),
    /// State of a burn.
    Burned(burn::Burn),
    /// The request was understood and refused.
    Refused(Refusal),
    /// A `linux::Response` follows in the same body.
    Linux,
}

/// Why a guest refuses a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// The request is of another kind of guest.
    NotHere,
    /// The pages are not all work pages of this guest.
    NoSuchPages,
    /// No such vCPU, or it does not run.
    NoSuchVcpu,
    /// That vCPU is already burning, or is not.
    WrongState,
    /// The guest is a clone that has not been told yet who it is ([`Request::Resumed`]).
    NotResumed,
    /// The guest does as much at a time as it may, or this connection still does something else.
    Busy,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Refusal::NotHere => "this guest does not offer that request",
            Refusal::NoSuchPages => "the pages are not all work pages of this guest",
            Refusal::NoSuchVcpu => "the guest has no such vCPU",
            Refusal::WrongState => "that vCPU is already burning, or is not",
            Refusal::NotResumed => "the guest is a clone that has not been told yet who it is",
            Refusal::Busy => "the guest does as much at a time as it may",
        })
    }
}

/// Why bytes are not a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameError {
    /// The header names another version of the protocol.
    Version(u16),
    /// The reserved half-word is not zero.
    Reserved(u16),
    /// The body is longer than [`MAX_BODY`], or than the buffer given for it.
    TooLong(usize),
    /// The body is no message of this version.
    Body,
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FrameError::Version(v) => write!(f, "agent frame of protocol version {v}; this side speaks {VERSION}"),
            FrameError::Reserved(v) => write!(f, "agent frame with reserved bits {v:#x} set; they must be zero"),
            FrameError::TooLong(n) => write!(f, "agent frame body of {n} bytes; the limit is {MAX_BODY}"),
            FrameError::Body => f.write_str("agent frame body that is no message of this protocol version"),
        }
    }
}

impl core::error::Error for FrameError {}

/// Encodes a message as a frame into `buf` and returns the frame.
pub fn encode<'b, T: Serialize>(message: &Envelope<T>, buf: &'b mut [u8]) -> Result<&'b [u8], FrameError> {
    let room = buf.len();
    let (header, body) = buf.split_at_mut_checked(HEADER_LEN).ok_or(FrameError::TooLong(HEADER_LEN))?;
    let len = postcard::to_slice(message, body).map_err(|_| FrameError::TooLong(room))?.len();
    if len > MAX_BODY {
        return Err(FrameError::TooLong(len));
    }
    header[0..4].copy_from_slice(&(len as u32).to_le_bytes());
    header[4..6].copy_from_slice(&VERSION.to_le_bytes());
    header[6..8].fill(0);
    Ok(&buf[..HEADER_LEN + len])
}

/// Checks a frame header and returns the length of the body that follows, in bytes.
pub fn body_len(header: &[u8; HEADER_LEN]) -> Result<usize, FrameError> {
    let [l0, l1, l2, l3, v0, v1, r0, r1] = *header;
    let (len, version, reserved) =
        (u32::from_le_bytes([l0, l1, l2, l3]), u16::from_le_bytes([v0, v1]), u16::from_le_bytes([r0, r1]));
    if version != VERSION {
        return Err(FrameError::Version(version));
    }
    if reserved != 0 {
        return Err(FrameError::Reserved(reserved));
    }
    let len = len as usize;
    if len > MAX_BODY { Err(FrameError::TooLong(len)) } else { Ok(len) }
}

/// Decodes the body of a frame. Bytes left over are an error.
pub fn decode<'b, T: Deserialize<'b>>(body: &'b [u8]) -> Result<Envelope<T>, FrameError> {
    match split(body)? {
        (message, []) => Ok(message),
        _ => Err(FrameError::Body),
    }
}

/// Decodes the message that a body begins with, and gives the rest: a message of another family, or nothing.
pub fn split<'b, T: Deserialize<'b>>(body: &'b [u8]) -> Result<(Envelope<T>, &'b [u8]), FrameError> {
    postcard::take_from_bytes(body).map_err(|_| FrameError::Body)
}

/// Contents of work pages that host and guest can both compute.
pub mod pattern {
    /// Words (64 bit) in a page.
    pub const WORDS: usize = 512;

    /// The word number `index` of page number `page` in the pattern `seed`. Never zero for all words of a page.
    pub const fn word(seed: u64, page: u32, index: usize) -> u64 {
        mix(seed ^ ((page as u64) << 16) ^ (index as u64))
    }

    /// The finalizer of SplitMix64: a bijection that spreads every input bit over the word.
    pub const fn mix(value: u64) -> u64 {
        let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A checksum over words in order: two inputs that differ in one word never agree.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Checksum(u64);

    impl Checksum {
        /// The checksum of no words.
        pub const fn new() -> Self {
            Checksum(0)
        }

        /// Takes in the next word.
        pub const fn add(self, word: u64) -> Self {
            Checksum((self.0 ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23))
        }

        /// The checksum so far.
        pub const fn value(self) -> u64 {
            self.0
        }

        /// The checksum of whole pages that hold the pattern `seed`.
        pub fn of_pattern(pages: super::Pages, seed: u64) -> Self {
            pages.numbers().fold(Self::new(), |sum, page| (0..WORDS).fold(sum, |s, i| s.add(word(seed, page, i))))
        }
    }
}

/// A computation whose state after any number of steps the host can predict, to prove that registers survive.
pub mod burn {
    use serde::{Deserialize, Serialize};

    const MULTIPLIER: u64 = 6_364_136_223_846_793_005;
    const INCREMENT: u64 = 1_442_695_040_888_963_407;

    /// Two linear congruential generators, one kept in general registers, one in vector registers.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
    pub struct Burn {
        /// Steps done.
        pub steps: u64,
        /// Kept in a general register.
        pub integer: u64,
        /// Kept in a vector register: incremented by 1.0 at each step below 2^53.
        pub float: u64,
    }

    impl Burn {
        /// The state before the first step.
        pub const fn new() -> Self {
            Burn { steps: 0, integer: 0, float: 0 }
        }

        /// One step of the integer generator.
        pub const fn next_integer(integer: u64) -> u64 {
            integer.wrapping_mul(MULTIPLIER).wrapping_add(INCREMENT)
        }

        /// The state after `steps` steps, in logarithmic time.
        pub const fn after(steps: u64) -> Self {
            // Compose the affine map x -> a x + c with itself by squaring.
            let (mut a, mut c) = (1u64, 0u64);
            let (mut step_a, mut step_c) = (MULTIPLIER, INCREMENT);
            let mut n = steps;
            while n > 0 {
                if n & 1 == 1 {
                    c = c.wrapping_mul(step_a).wrapping_add(step_c);
                    a = a.wrapping_mul(step_a);
                }
                step_c = step_c.wrapping_mul(step_a).wrapping_add(step_c);
                step_a = step_a.wrapping_mul(step_a);
                n >>= 1;
            }
            let _ = a; // the start is 0, so only the constant part remains
            Burn { steps, integer: c, float: (steps as f64).to_bits() }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn round_trip<T: Serialize + for<'d> Deserialize<'d> + PartialEq + fmt::Debug>(message: Envelope<T>) {
        let mut buf = [0u8; 256];
        let frame = encode(&message, &mut buf).unwrap();
        let header = frame[..HEADER_LEN].try_into().unwrap();
        assert_eq!(body_len(header).unwrap(), frame.len() - HEADER_LEN);
        assert_eq!(decode::<T>(&frame[HEADER_LEN..]).unwrap(), message);
    }

    #[test]
    fn messages_survive_the_wire() {
        let pages = Pages { first: 1, count: 2, stride: 3 };
        round_trip(Envelope { id: 7, body: Request::Fill { pages, seed: u64::MAX } });
        round_trip(Envelope {
            id: u32::MAX,
            body: Request::Resumed(Resumed { generation: [1; 16], time_ns: 2, entropy: [3; 32] }),
        });
        round_trip(Envelope { id: 0, body: Response::Ready { level: Level::Full, kind: GuestKind::Embedded } });
        round_trip(Envelope { id: 9, body: Response::Burned(burn::Burn::after(100)) });
    }

    /// The bytes of version 1. A failure here means old guests and new hosts no longer understand each other:
    /// append variants, or raise `VERSION`.
    #[test]
    fn the_bytes_of_version_1_are_pinned() {
        let bytes = |request| encode(&Envelope { id: 5, body: request }, &mut [0; 128]).unwrap().to_vec();
        assert_eq!(bytes(Request::Ping { token: 300 }), [4, 0, 0, 0, 1, 0, 0, 0, 5, 0, 0xac, 2]);
        assert_eq!(bytes(Request::Reset), [2, 0, 0, 0, 1, 0, 0, 0, 5, 16]);
        assert_eq!(bytes(Request::Linux), [2, 0, 0, 0, 1, 0, 0, 0, 5, 17]);
        let pages = Pages { first: 1, count: 2, stride: 3 };
        assert_eq!(bytes(Request::GiveBack { pages }), [5, 0, 0, 0, 1, 0, 0, 0, 5, 18, 1, 2, 3]);
        assert_eq!(bytes(Request::DiskWrite { pages }), [5, 0, 0, 0, 1, 0, 0, 0, 5, 19, 1, 2, 3]);
        assert_eq!(bytes(Request::DiskRead { pages }), [5, 0, 0, 0, 1, 0, 0, 0, 5, 20, 1, 2, 3]);
        let mut buf = [0; 64];
        let refused = Envelope { id: 1, body: Response::Refused(Refusal::WrongState) };
        assert_eq!(encode(&refused, &mut buf).unwrap()[HEADER_LEN..], [1, 13, 3]);
        let refused = Envelope { id: 1, body: Response::Refused(Refusal::Busy) };
        assert_eq!(encode(&refused, &mut buf).unwrap()[HEADER_LEN..], [1, 13, 5]);
        assert_eq!(encode(&Envelope { id: 1, body: Response::Linux }, &mut buf).unwrap()[HEADER_LEN..], [1, 14]);
    }

    #[test]
    fn bad_headers_are_refused() {
        assert_eq!(body_len(&[0, 0, 0, 0, 2, 0, 0, 0]), Err(FrameError::Version(2)));
        assert_eq!(body_len(&[0, 0, 0, 0, 1, 0, 1, 0]), Err(FrameError::Reserved(1)));
        assert_eq!(body_len(&[1, 0, 1, 0, 1, 0, 0, 0]), Err(FrameError::TooLong(MAX_BODY + 1)));
        assert_eq!(decode::<Request>(&[0, 2, 0]), Err(FrameError::Body), "a byte is left over");
        assert!(encode(&Envelope { id: 1, body: Request::Info }, &mut [0; 4]).is_err());
    }

    #[test]
    fn page_choices_stay_inside() {
        assert!(Pages::run(0, 10).fits(10));
        assert!(!Pages::run(1, 10).fits(10));
        assert!(!Pages { first: 0, count: 1, stride: 0 }.fits(10));
        assert!(!Pages { first: u32::MAX, count: u32::MAX, stride: u32::MAX }.fits(u32::MAX));
        assert!(Pages { first: 0, count: 4, stride: 3 }.fits(10));
        assert!(!Pages { first: 0, count: 4, stride: 3 }.fits(9));
    }

    proptest! {
        #[test]
        fn no_bytes_make_decoding_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode::<Request>(&bytes);
            let _ = decode::<Response>(&bytes);
        }

        #[test]
        fn burn_jumps_agree_with_steps(steps in 0u64..2000) {
            let stepped = (0..steps).fold(0, |x, _| burn::Burn::next_integer(x));
            prop_assert_eq!(burn::Burn::after(steps).integer, stepped);
        }

        #[test]
        fn a_changed_word_changes_the_checksum(words in proptest::collection::vec(any::<u64>(), 1..50), at: prop::sample::Index, to: u64) {
            let sum = |w: &[u64]| w.iter().fold(pattern::Checksum::new(), |s, x| s.add(*x));
            let mut other = words.clone();
            let i = at.index(other.len());
            other[i] = to;
            prop_assert_eq!(sum(&words) == sum(&other), words == other);
        }
    }
}
