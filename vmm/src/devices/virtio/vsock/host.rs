//! The host's side: Unix sockets that stand for vsock ports, and the line with which a client says what it wants.
//!
//! A client connects to the device's socket, writes `CONNECT <port>\n` and reads `OK <host port>\n`; from there on it
//! talks to the guest's port. A guest that connects to the host's port P reaches whoever listens on `<socket>_P`.

use std::ffi::OsString;
use std::fs::{self, Permissions};
use std::io::{self, ErrorKind, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Longest path that a Unix socket can have, in bytes.
const MAX_PATH: usize = 107;
/// Longest first line of a client, in bytes.
const MAX_LINE: usize = 32;
/// How long a client may take for its first line.
pub const GREETING_TIME: Duration = Duration::from_secs(5);

/// Why there is no listener.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The path does not fit into a socket address.
    #[error("vsock socket path {path:?} has {len} bytes; use one of at most {MAX_PATH}")]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Its length, in bytes.
        len: usize,
    },
    /// Another process listens there.
    #[error("vsock socket path {0:?} is in use by another process; use another path or end that process")]
    InUse(PathBuf),
    /// There is something that is no socket.
    #[error("vsock socket path {0:?} exists and is no socket; remove it or use another path")]
    NotASocket(PathBuf),
    /// The system refuses.
    #[error("vsock socket {path:?} cannot be made: {error}; check that its folder exists and can be written")]
    Io {
        /// The path.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
}

/// The device's socket. Its file is removed when this is dropped.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
    /// Device and inode of the file, so that only our own is ever removed.
    file: (u64, u64),
}

impl Listener {
    /// Listens on `path`, which only our own user may connect to (for the instant until its mode is set, whoever the
    /// process's umask lets; put it into a private folder where that matters). A socket file that nobody listens on is replaced.
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        let len = path.as_os_str().len();
        if len > MAX_PATH {
            return Err(ListenError::TooLong { path: path.into(), len });
        }
        let io = |error| ListenError::Io { path: path.into(), error };
        make_way(path)?;
        let socket = match UnixListener::bind(path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => return Err(ListenError::InUse(path.into())),
            bound => bound.map_err(io)?,
        };
        let prepare = || {
            fs::set_permissions(path, Permissions::from_mode(0o600))?;
            socket.set_nonblocking(true)?;
            let meta = fs::symlink_metadata(path)?;
            Ok((meta.dev(), meta.ino()))
        };
        match prepare() {
            Ok(file) => Ok(Listener { socket, path: path.into(), file }),
            Err(error) => {
                let _ = fs::remove_file(path);
                Err(io(error))
            }
        }
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The socket, to be watched.
    pub fn socket(&self) -> &UnixListener {
        &self.socket
    }

    /// The next client that waits, if there is one.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.socket.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(true)?;
                Ok(Some(stream))
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionAborted) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Connects to whoever listens for the guest on `port` of the host. Does not wait.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = OsString::from(&self.path);
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

impl Drop for Listener {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.file);
        if ours {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Removes a socket file that nobody listens on; anything else at `path` is left alone.
fn make_way(path: &Path) -> Result<(), ListenError> {
    let Ok(meta) = fs::symlink_metadata(path) else { return Ok(()) };
    if !meta.file_type().is_socket() {
        return Err(ListenError::NotASocket(path.into()));
    }
    let io = |error| ListenError::Io { path: path.into(), error };
    match dial(path.as_os_str().as_bytes()) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(io),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() != ErrorKind::WouldBlock => Err(io(error)),
        _ => Err(ListenError::InUse(path.into())),
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
    use tempfile::tempdir;

    #[test]
    fn the_socket_is_private_and_removed_at_the_end() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let listener = Listener::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_path_in_use_is_refused_and_left_alone() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let _other = Listener::bind(&path).unwrap();
        assert!(matches!(Listener::bind(&path), Err(ListenError::InUse(p)) if p == path));
        assert!(path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("v.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        Listener::bind(&path).unwrap();
    }

    #[test]
    fn a_file_is_never_replaced() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("precious");
        fs::write(&path, "data").unwrap();
        assert!(matches!(Listener::bind(&path), Err(ListenError::NotASocket(_))));
        assert_eq!(fs::read_to_string(&path).unwrap(), "data");
    }

    #[test]
    fn somebody_elses_file_is_not_removed_at_the_end() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let listener = Listener::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "data").unwrap();
        drop(listener);
        assert!(path.exists());
    }

    #[test]
    fn long_paths_and_missing_folders_are_refused() {
        let dir = tempdir().unwrap();
        let room = MAX_PATH - dir.path().as_os_str().len() - 1;
        Listener::bind(&dir.path().join("x".repeat(room))).unwrap();
        let refused = Listener::bind(&dir.path().join("x".repeat(room + 1)));
        assert!(matches!(refused, Err(ListenError::TooLong { len: 108, .. })));
        let refused = Listener::bind(&dir.path().join("no/such"));
        assert!(matches!(refused, Err(ListenError::Io { .. })));
    }

    #[test]
    fn guests_reach_the_socket_of_their_port() {
        let dir = tempdir().unwrap();
        let listener = Listener::bind(&dir.path().join("v")).unwrap();
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
