//! The host's side: Unix sockets that stand for vsock ports, and the line with which a client says what it wants.
//!
//! A client connects to the device's socket, writes `CONNECT <port>\n` and reads `OK <host port>\n`; from there on it
//! talks to the guest's port. A guest that connects to the host's port P reaches whoever listens on `<socket>_P`.

use std::ffi::OsString;
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use uffd_handler::listener::{ListenError, Listener};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Longest first line of a client, in bytes.
const MAX_LINE: usize = 32;
/// How long a client may take for its first line.
pub const GREETING_TIME: Duration = Duration::from_secs(5);

/// The device's socket. Its file is removed when this is dropped.
#[derive(Debug)]
pub struct HostSocket(Listener);

impl HostSocket {
    /// Listens on `path`, which only our own user may connect to. A socket file that nobody listens on is replaced.
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        Listener::bind(path).map(HostSocket)
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// The next client that waits, if there is one.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        let client = self.0.accept()?;
        client.iter().try_for_each(|stream| stream.set_nonblocking(true))?;
        Ok(client)
    }

    /// Connects to whoever listens for the guest on `port` of the host. Does not wait.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = OsString::from(self.path());
        path.push(format!("_{port}"));
        dial(path.as_bytes())
    }
}

/// Connects without waiting: a listener whose queue is full refuses with [`ErrorKind::WouldBlock`].
fn dial(path: &[u8]) -> io::Result<UnixStream> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

impl AsRawFd for HostSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// A client that has not yet said what it wants.
#[derive(Debug)]
pub struct Greeting {
    stream: UnixStream,
    said: Vec<u8>,
    deadline: Instant,
}

/// What a client has said so far.
#[derive(Debug)]
pub enum Said {
    /// Not enough.
    Nothing,
    /// It wants this port of the guest; what follows is already for the guest.
    Connect {
        /// The port.
        port: u32,
        /// What followed the line.
        rest: Vec<u8>,
    },
    /// Nonsense, or it has left.
    Nonsense,
}

impl Greeting {
    /// A client that has just connected.
    pub fn new(stream: UnixStream) -> Self {
        Greeting { stream, said: Vec::new(), deadline: Instant::now() + GREETING_TIME }
    }

    /// Its socket.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Its socket, for the connection that it has become.
    pub fn into_stream(self) -> UnixStream {
        self.stream
    }

    /// Whether it has taken too long.
    pub fn is_late(&self, now: Instant) -> bool {
        now >= self.deadline
    }

    /// Reads what the client says.
    pub fn read(&mut self) -> Said {
        let mut data = [0; 4096];
        match (&self.stream).read(&mut data) {
            Ok(0) => Said::Nonsense,
            Ok(len) => self.hear(&data[..len]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Said::Nothing,
            Err(_) => Said::Nonsense,
        }
    }

    fn hear(&mut self, data: &[u8]) -> Said {
        self.said.extend(data);
        let end = self.said.iter().take(MAX_LINE).position(|byte| *byte == b'\n');
        match end {
            Some(end) => match parse_connect(&self.said[..end]) {
                Some(port) => Said::Connect { port, rest: self.said.split_off(end + 1) },
                None => Said::Nonsense,
            },
            None if self.said.len() >= MAX_LINE => Said::Nonsense,
            None => Said::Nothing,
        }
    }
}

/// The port that a line (without its end) asks for.
fn parse_connect(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let (verb, port, rest) = (words.next()?, words.next()?, words.next());
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    let known = verb.eq_ignore_ascii_case("CONNECT") && digits && rest.is_none();
    if known { port.parse().ok() } else { None }
}

/// The answer to a client whose request the guest has accepted.
pub fn accepted_line(host_port: u32) -> String {
    format!("OK {host_port}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixListener;
    use tempfile::tempdir;

    #[test]
    fn guests_reach_the_socket_of_their_port() {
        let dir = tempdir().unwrap();
        let listener = HostSocket::bind(&dir.path().join("v")).unwrap();
        assert!(listener.connect(7).is_err());
        let service = UnixListener::bind(dir.path().join("v_7")).unwrap();
        let mut stream = listener.connect(7).unwrap();
        stream.write_all(b"x").unwrap();
        let mut byte = [0];
        service.accept().unwrap().0.read_exact(&mut byte).unwrap();
        assert_eq!(&byte, b"x");
    }

    #[test]
    fn lines_are_parsed_strictly() {
        assert_eq!(parse_connect(b"CONNECT 5000"), Some(5000));
        assert_eq!(parse_connect(b"connect 4294967295\r"), Some(u32::MAX));
        for line in
            ["", "CONNECT", "CONNECT x", "CONNECT -1", "CONNECT +1", "CONNECT 4294967296", "HELLO 1", "CONNECT 1 2"]
        {
            assert_eq!(parse_connect(line.as_bytes()), None, "{line:?}");
        }
    }

    #[test]
    fn greetings_arrive_in_any_pieces_and_lose_nothing() {
        let said = b"CONNECT 80\nGET / and more";
        for cut in 0..=said.len() {
            let mut greeting = Greeting::new(UnixStream::pair().unwrap().0);
            let early = greeting.hear(&said[..cut]);
            let (port, rest) = match (early, greeting.said.len()) {
                (Said::Connect { port, mut rest }, _) => {
                    rest.extend(&said[cut..]);
                    (port, rest)
                }
                (Said::Nothing, _) => match greeting.hear(&said[cut..]) {
                    Said::Connect { port, rest } => (port, rest),
                    other => panic!("{other:?}"),
                },
                (other, _) => panic!("{other:?}"),
            };
            assert_eq!((port, rest.as_slice()), (80, b"GET / and more".as_slice()));
        }
    }

    #[test]
    fn a_first_line_without_end_is_nonsense() {
        let mut greeting = Greeting::new(UnixStream::pair().unwrap().0);
        assert!(matches!(greeting.hear(&[b' '; MAX_LINE]), Said::Nonsense));
        let mut greeting = Greeting::new(UnixStream::pair().unwrap().0);
        assert!(matches!(greeting.hear(b"CONNECT 1 and a very long tail that ends late\n"), Said::Nonsense));
    }
}
