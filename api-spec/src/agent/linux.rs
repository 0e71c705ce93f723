//! What only an agent in a Linux guest can do: programs, files, an identity in full, readiness by name, power.
//!
//! These messages follow [`super::Request::Linux`] and [`super::Response::Linux`] in a body; see the parent's header.
//! A connection does one thing at a time. Three requests are conversations; all their frames carry the id of the first:
//!
//! ```text
//!   Exec   -> Started, then Data of the host (standard input; an empty one ends it) and Output of the guest, -> Exited
//!   Put    -> Done (go on), then Data of the host, an empty one ends the file                                -> Done
//!   Get    -> File, then Output of the guest                                                                 -> Done
//! ```
//!
//! Each of the arrows may be a [`Response::Failed`] instead, which ends the conversation. Data that comes when no
//! conversation is under way is dropped, since a program may end before it has read its input.

use super::{Envelope, FrameError, HEADER_LEN, MAX_BODY, Resumed};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::IpAddr;

/// Longest piece of a stream or a file in one message, in bytes.
pub const CHUNK: usize = 32 * 1024;

/// A program to run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// The program, looked for in the `PATH` of its environment, and its arguments.
    pub argv: Vec<String>,
    /// Variables besides `PATH`, `HOME`, `USER`, `LOGNAME` and `SHELL`, which the agent sets; these win.
    pub env: Vec<(String, String)>,
    /// Where to run it; `/` if none.
    pub cwd: Option<String>,
    /// As whom: `name`, `uid`, `name:group` or `uid:gid`, by the guest's own files; root if none.
    pub user: Option<String>,
    /// Whether the host will send standard input. Without, it is empty.
    pub stdin: bool,
    /// After so many milliseconds its process group is killed.
    pub deadline_ms: Option<u32>,
    /// It outlives the connection, and a snapshot: the conversation ends with [`Response::Started`], and all three
    /// streams are `/dev/null`. Without, its process group is killed when the connection breaks.
    pub detached: bool,
}

/// One network interface of a clone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name in the guest.
    pub name: String,
    /// Its MAC address from now on; unchanged if none.
    pub mac: Option<[u8; 6]>,
    /// Its addresses, which replace all that it has. If there are none, the link goes down and up and whoever manages
    /// it in the guest configures it.
    pub addresses: Vec<Address>,
    /// Default routes.
    pub gateways: Vec<IpAddr>,
}

/// An address with the length of its network's prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// The address.
    pub address: IpAddr,
    /// Bits of the network's prefix.
    pub prefix: u8,
}

/// Everything that a clone in a Linux guest needs to become itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// What every guest needs.
    pub resumed: Resumed,
    /// The host name; unchanged if none.
    pub hostname: Option<String>,
    /// The machine id; if none, one made from the generation id.
    pub machine_id: Option<[u8; 16]>,
    /// Network interfaces; those not named are left alone.
    pub interfaces: Vec<Interface>,
}

impl Identity {
    /// The identity of a clone of which only that is known.
    pub fn new(resumed: Resumed) -> Self {
        Identity { resumed, hostname: None, machine_id: None, interfaces: Vec::new() }
    }
}

/// What the host asks of a Linux guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Run a program. A conversation.
    Exec(Exec),
    /// A piece of standard input or of a file, at most [`CHUNK`] bytes; an empty one ends it. No answer of its own.
    Data(Vec<u8>),
    /// Send a signal to the process group of a running program, from any connection. Answered with [`Response::Done`].
    Signal {
        /// The program's number, from [`Response::Started`].
        exec: u32,
        /// The signal's number.
        signal: i32,
    },
    /// Write a file: whole or not at all. A conversation.
    Put {
        /// Absolute path.
        path: String,
        /// Permission bits.
        mode: u32,
        /// How many bytes will come.
        size: u64,
    },
    /// Read a regular file. A conversation.
    Get {
        /// Absolute path.
        path: String,
    },
    /// As [`super::Request::Resumed`], with more to be told. Answered with [`super::Response::Resumed`].
    Identity(Identity),
    /// Answered with [`Response::Readiness`].
    Readiness,
    /// A snapshot is about to be taken: run the hooks for that, then write back what the guest has not written to its
    /// disks. Answered with [`Response::Done`].
    PreSnapshot,
    /// Stop everything and switch the machine off. Answered with [`Response::Done`] before that.
    PowerOff,
    /// Stop everything and start the machine again. Answered with [`Response::Done`] before that.
    Reboot,
    /// Write back what the guest has not written to its disks, and let go of what it remembers of files. Answered with
    /// [`Response::Trimmed`].
    Trim,
}

/// What a Linux guest answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Response {
    /// Done; nothing to report.
    Done,
    /// The program runs.
    Started {
        /// Its number, for signals.
        exec: u32,
        /// Its process id in the guest.
        pid: u32,
    },
    /// A piece of a stream or of a file.
    Output {
        /// Which.
        stream: Stream,
        /// At most [`CHUNK`] bytes.
        data: Vec<u8>,
    },
    /// The program has ended, and everything that it wrote has been sent.
    Exited(Exit),
    /// The file that comes.
    File {
        /// Permission bits.
        mode: u32,
        /// Size in bytes as the file system has it: 0 for files that the kernel makes up.
        size: u64,
    },
    /// How ready the guest is.
    Readiness(Readiness),
    /// It could not be done.
    Failed(Failure),
    /// What could be let go of was.
    Trimmed {
        /// Memory that nothing uses now, in KiB.
        free_kib: u64,
    },
}

/// Where a piece of output comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// A file.
    File,
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// By itself, with this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// Killed, as its deadline had passed.
    Deadline,
}

/// How ready a guest is, by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Readiness {
    /// How ready.
    pub level: super::Level,
    /// Units or start jobs that failed.
    pub failed: Vec<String>,
}

/// What could not be done, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Which part.
    pub part: Part,
    /// One line for people.
    pub detail: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.part.name(), self.detail)
    }
}

/// A part of the agent that something can fail in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Part {
    /// Running a program.
    Exec,
    /// A file.
    File,
    /// The kernel's random state.
    Entropy,
    /// The wall clock.
    Clock,
    /// The host name.
    Hostname,
    /// The machine id.
    MachineId,
    /// A network interface.
    Network,
    /// A hook.
    Hook,
    /// Switching off or starting again.
    Power,
    /// The identity as a whole.
    Identity,
    /// The guest's memory.
    Memory,
}

impl Part {
    /// Its name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Part::Exec => "exec",
            Part::File => "file",
            Part::Entropy => "entropy",
            Part::Clock => "clock",
            Part::Hostname => "host name",
            Part::MachineId => "machine id",
            Part::Network => "network",
            Part::Hook => "hook",
            Part::Power => "power",
            Part::Identity => "identity",
            Part::Memory => "memory",
        }
    }
}

/// A message of either family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Either<Common, Linux> {
    /// One that every guest knows.
    Common(Common),
    /// One of a Linux guest.
    Linux(Linux),
}

/// What an agent in a Linux guest is asked.
pub type AnyRequest = Either<super::Request, Request>;
/// What an agent in a Linux guest answers.
pub type AnyResponse = Either<super::Response, Response>;

/// Encodes a request as a frame.
pub fn encode_request(id: u32, request: &AnyRequest) -> Result<Vec<u8>, FrameError> {
    match request {
        Either::Common(body) => frame(&Envelope { id, body }),
        Either::Linux(linux) => frame(&Envelope { id, body: (super::Request::Linux, linux) }),
    }
}

/// Encodes a response as a frame.
pub fn encode_response(id: u32, response: &AnyResponse) -> Result<Vec<u8>, FrameError> {
    match response {
        Either::Common(body) => frame(&Envelope { id, body }),
        Either::Linux(linux) => frame(&Envelope { id, body: (super::Response::Linux, linux) }),
    }
}

/// Decodes the body of a request.
pub fn decode_request(body: &[u8]) -> Result<Envelope<AnyRequest>, FrameError> {
    match super::split(body)? {
        (Envelope { id, body: super::Request::Linux }, rest) => either(id, rest),
        (Envelope { id, body }, []) => Ok(Envelope { id, body: Either::Common(body) }),
        _ => Err(FrameError::Body),
    }
}

/// Decodes the body of a response.
pub fn decode_response(body: &[u8]) -> Result<Envelope<AnyResponse>, FrameError> {
    match super::split(body)? {
        (Envelope { id, body: super::Response::Linux }, rest) => either(id, rest),
        (Envelope { id, body }, []) => Ok(Envelope { id, body: Either::Common(body) }),
        _ => Err(FrameError::Body),
    }
}

fn either<'b, C, L: Deserialize<'b>>(id: u32, bytes: &'b [u8]) -> Result<Envelope<Either<C, L>>, FrameError> {
    match postcard::take_from_bytes(bytes) {
        Ok((linux, [])) => Ok(Envelope { id, body: Either::Linux(linux) }),
        _ => Err(FrameError::Body),
    }
}

fn frame<T: Serialize>(message: &Envelope<T>) -> Result<Vec<u8>, FrameError> {
    let mut bytes = vec![0; HEADER_LEN + MAX_BODY];
    let len = super::encode(message, &mut bytes)?.len();
    bytes.truncate(len);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::super::{Level, Request as Common, Response as CommonResponse, body_len, decode};
    use super::*;
    use proptest::prelude::*;

    fn body(frame: &[u8]) -> &[u8] {
        let (header, body) = frame.split_first_chunk::<HEADER_LEN>().unwrap();
        assert_eq!(body_len(header).unwrap(), body.len());
        body
    }

    #[test]
    fn messages_survive_the_wire() {
        let resumed = Resumed { generation: [1; 16], time_ns: 2, entropy: [3; 32] };
        let interface = Interface {
            name: "eth0".into(),
            mac: Some([2, 0, 0, 0, 0, 1]),
            addresses: vec![Address { address: "fd00::2".parse().unwrap(), prefix: 64 }],
            gateways: vec!["10.0.0.1".parse().unwrap()],
        };
        for request in [
            Either::Common(Common::Ping { token: 7 }),
            Either::Linux(Request::Exec(Exec { argv: vec!["sh".into()], deadline_ms: Some(5), ..Exec::default() })),
            Either::Linux(Request::Data(vec![1; CHUNK])),
            Either::Linux(Request::Identity(Identity { interfaces: vec![interface], ..Identity::new(resumed) })),
            Either::Linux(Request::Reboot),
        ] {
            let frame = encode_request(9, &request).unwrap();
            assert_eq!(decode_request(body(&frame)).unwrap(), Envelope { id: 9, body: request });
        }
        let readiness = Readiness { level: Level::Degraded, failed: vec!["ssh.service".into()] };
        for response in [
            Either::Common(CommonResponse::Done),
            Either::Linux(Response::Readiness(readiness)),
            Either::Linux(Response::Output { stream: Stream::Stderr, data: vec![2; CHUNK] }),
            Either::Linux(Response::Failed(Failure { part: Part::Hook, detail: "10-keys".into() })),
        ] {
            let frame = encode_response(9, &response).unwrap();
            assert_eq!(decode_response(body(&frame)).unwrap(), Envelope { id: 9, body: response });
        }
    }

    /// A failure here means old guests and new hosts no longer understand each other: append variants.
    #[test]
    fn the_bytes_of_version_1_are_pinned() {
        let request = |request| body(&encode_request(5, &Either::Linux(request)).unwrap()).to_vec();
        let exec = Exec {
            argv: vec!["a".into()],
            env: vec![("b".into(), "c".into())],
            cwd: Some("/".into()),
            user: None,
            stdin: true,
            deadline_ms: Some(300),
            detached: false,
        };
        let exec_bytes = [5, 17, 0, 1, 1, b'a', 1, 1, b'b', 1, b'c', 1, 1, b'/', 0, 1, 1, 0xac, 2, 0];
        assert_eq!(request(Request::Exec(exec)), exec_bytes);
        assert_eq!(request(Request::Data(vec![7])), [5, 17, 1, 1, 7]);
        assert_eq!(request(Request::Signal { exec: 1, signal: 15 }), [5, 17, 2, 1, 30]);
        assert_eq!(request(Request::Put { path: "/".into(), mode: 1, size: 2 }), [5, 17, 3, 1, b'/', 1, 2]);
        assert_eq!(request(Request::Get { path: "/".into() }), [5, 17, 4, 1, b'/']);
        let identity = Identity {
            resumed: Resumed { generation: [1; 16], time_ns: 2, entropy: [3; 32] },
            hostname: Some("h".into()),
            machine_id: None,
            interfaces: vec![Interface {
                name: "e".into(),
                mac: None,
                addresses: vec![Address { address: [10, 0, 0, 2].into(), prefix: 24 }],
                gateways: vec![],
            }],
        };
        let tail = [&[2][..], &[3; 32], &[1, 1, b'h', 0, 1, 1, b'e', 0, 1, 0, 10, 0, 0, 2, 24, 0]].concat();
        assert_eq!(request(Request::Identity(identity)), [&[5, 17, 5][..], &[1; 16], &tail].concat());
        assert_eq!(request(Request::Readiness), [5, 17, 6]);
        assert_eq!(request(Request::Reboot), [5, 17, 9]);
        assert_eq!(request(Request::Trim), [5, 17, 10]);
        let response = |response| body(&encode_response(5, &Either::Linux(response)).unwrap()).to_vec();
        assert_eq!(response(Response::Done), [5, 14, 0]);
        assert_eq!(response(Response::Started { exec: 1, pid: 2 }), [5, 14, 1, 1, 2]);
        assert_eq!(response(Response::Output { stream: Stream::Stderr, data: vec![9] }), [5, 14, 2, 1, 1, 9]);
        assert_eq!(response(Response::Exited(Exit::Deadline)), [5, 14, 3, 2]);
        assert_eq!(response(Response::File { mode: 1, size: 2 }), [5, 14, 4, 1, 2]);
        let readiness = Readiness { level: Level::Degraded, failed: vec!["u".into()] };
        assert_eq!(response(Response::Readiness(readiness)), [5, 14, 5, 2, 1, 1, b'u']);
        let failure = Failure { part: Part::Identity, detail: "d".into() };
        assert_eq!(response(Response::Failed(failure)), [5, 14, 6, 9, 1, b'd']);
        assert_eq!(response(Response::Trimmed { free_kib: 300 }), [5, 14, 7, 0xac, 2]);
        let failure = Failure { part: Part::Memory, detail: "d".into() };
        assert_eq!(response(Response::Failed(failure)), [5, 14, 6, 10, 1, b'd']);
    }

    #[test]
    fn the_common_requests_are_the_same_bytes_for_both_guests() {
        let frame = encode_request(3, &Either::Common(Common::Ping { token: 1 })).unwrap();
        assert_eq!(decode::<Common>(body(&frame)).unwrap(), Envelope { id: 3, body: Common::Ping { token: 1 } });
        assert_eq!(decode_request(&[3, 16, 0]), Err(FrameError::Body), "a byte is left over");
        assert_eq!(decode_request(&[3, 17]), Err(FrameError::Body), "nothing follows");
        assert_eq!(decode_request(&[3, 17, 11]), Err(FrameError::Body), "there is no such request");
        assert_eq!(decode_request(&[3, 17, 9, 0]), Err(FrameError::Body), "a byte is left over");
    }

    #[test]
    fn messages_that_are_too_long_are_refused() {
        let data = Either::Linux(Request::Data(vec![0; MAX_BODY]));
        assert!(matches!(encode_request(1, &data), Err(FrameError::TooLong(_))));
    }

    proptest! {
        #[test]
        fn no_bytes_make_decoding_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for first in [17, 14] {
                let bytes = [&[1, first][..], &bytes].concat();
                let _ = (decode_request(&bytes), decode_response(&bytes));
            }
        }
    }
}
