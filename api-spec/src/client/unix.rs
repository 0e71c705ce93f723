//! Unix stream sockets with deadlines.

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect as connect_socket, socket_with};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long to wait before asking again a listener whose queue is full.
const RETRY: Duration = Duration::from_micros(500);
/// Longest path of a Unix socket, in bytes.
const MAX_PATH: usize = 107;

/// Connects to a Unix socket. Unlike [`UnixStream::connect`] this does not wait for ever for a listener that does not
/// accept. The stream that is returned blocks.
pub fn connect(path: &Path, patience: Duration) -> io::Result<UnixStream> {
    if path.as_os_str().len() > MAX_PATH {
        let too_long = format!("the path is longer than the {MAX_PATH} bytes that a Unix socket may have");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, too_long));
    }
    let address = SocketAddrUnix::new(path)?;
    let deadline = Instant::now() + patience;
    let socket =
        socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
    loop {
        match connect_socket(&socket, &address) {
            Ok(()) => break,
            Err(Errno::AGAIN) if Instant::now() < deadline => std::thread::sleep(RETRY),
            Err(Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Limits each further read and write to what is left until `deadline`.
pub fn limit(stream: &UnixStream, deadline: Instant) -> io::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    stream.set_read_timeout(Some(left))?;
    stream.set_write_timeout(Some(left))
}
