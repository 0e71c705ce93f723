//! What the operating system tells the server about itself and its peers: signals, credentials, inherited descriptors.

// UNSAFETY: signalfd, getsockopt and the adoption of an inherited descriptor have no safe form in the crates we use.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use vmm_sys_util::signal::{Error as SignalError, block_signal, create_sigset};

/// SIGTERM, SIGINT and SIGHUP, as something to poll instead of something that strikes.
#[derive(Debug)]
pub struct Signals(OwnedFd);

impl Signals {
    /// Blocks the signals in this thread and makes a descriptor that becomes readable when one is pending.
    ///
    /// Call it before other threads are started; those inherit the blocking.
    pub fn catch() -> io::Result<Self> {
        let wanted = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];
        wanted.into_iter().try_for_each(block)?;
        survive_file_size_limit()?;
        let set = create_sigset(&wanted).map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        // SAFETY: `set` is an initialized signal set that the call only reads; -1 asks for a new descriptor.
        owned(unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) }).map(Self)
    }

    /// Takes those that have come: the next one comes anew.
    pub fn take(&self) {
        let mut taken = [0; size_of::<libc::signalfd_siginfo>()];
        while rustix::io::read(&self.0, &mut taken).is_ok_and(|n| n > 0) {}
    }

    /// Whether one has come.
    pub fn have_come(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&now)).is_ok_and(|ready| ready > 0)
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Makes writing beyond the limit on file sizes (`ulimit -f`) an error, as any other, instead of the end of the process.
pub fn survive_file_size_limit() -> io::Result<()> {
    block(libc::SIGXFSZ)
}

fn block(signal: libc::c_int) -> io::Result<()> {
    match block_signal(signal) {
        // Whoever started us may have blocked it already.
        Ok(()) | Err(SignalError::SignalAlreadyBlocked(_)) => Ok(()),
        Err(error) => Err(io::Error::other(error.to_string())),
    }
}

impl Signals {
    /// A second descriptor of the same signals, for another thread to poll. Nobody need read them.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Arranges that this process gets SIGTERM when the thread that started it ends.
pub fn end_with_parent() -> io::Result<()> {
    Ok(rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))?)
}

/// Takes the descriptor that a call has returned, or the error that it left.
fn owned(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the callers pass what a system call has just created for this process, and nothing else has its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Who is at the other end of a Unix socket, as of its connecting.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Credentials {
    /// Process id; 0 if it is not visible from here.
    pub pid: u32,
    /// User id.
    pub uid: u32,
}

/// Asks the kernel who connected.
pub fn peer_credentials<S: AsFd>(socket: &S) -> io::Result<Credentials> {
    let cred: libc::ucred = socket_option(socket.as_fd(), libc::SO_PEERCRED)?;
    Ok(Credentials { pid: cred.pid as u32, uid: cred.uid })
}

/// A descriptor that becomes readable when the peer's process ends; `None` where the kernel has none (before 6.5).
pub fn peer_pidfd<S: AsFd>(socket: &S) -> Option<OwnedFd> {
    try_peer_pidfd(socket).ok()
}

fn try_peer_pidfd<S: AsFd>(socket: &S) -> io::Result<OwnedFd> {
    const SO_PEERPIDFD: libc::c_int = 77;
    let fd: libc::c_int = socket_option(socket.as_fd(), SO_PEERPIDFD)?;
    owned(fd)
}

/// As [`peer_pidfd`], by number where the kernel has no better way; `None` also if that process cannot be seen from here, or
/// has ended: another one may have taken its part since, and it tells nothing of that. A number may be that of a stranger by
/// then, so no other failure is met with it.
pub fn living_peer<S: AsFd>(socket: &S) -> Option<OwnedFd> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::process::{Pid, PidfdFlags, pidfd_open};
    let by_number = || {
        let pid = Pid::from_raw(peer_credentials(socket).ok()?.pid as i32)?;
        pidfd_open(pid, PidfdFlags::empty()).ok()
    };
    let peer = match try_peer_pidfd(socket) {
        Ok(peer) => peer,
        Err(e) if e.raw_os_error() == Some(libc::ENOPROTOOPT) => by_number()?,
        Err(_) => return None,
    };
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let lives = poll(&mut [PollFd::new(&peer, PollFlags::IN)], Some(&now)) == Ok(0);
    lives.then_some(peer)
}

/// How many bytes that were sent on a Unix socket the other end has not read yet, as the kernel reckons; 0 if it has all.
pub fn unread_by_peer<S: AsFd>(socket: &S) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: TIOCOUTQ writes one `int`, which `bytes` is.
    if unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::TIOCOUTQ, &mut bytes) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(usize::try_from(bytes).unwrap_or_default())
}

/// Plain data that `getsockopt` may fill with anything.
trait Plain: Copy {}
impl Plain for libc::ucred {}
impl Plain for libc::c_int {}

fn socket_option<T: Plain>(socket: BorrowedFd, name: libc::c_int) -> io::Result<T> {
    let mut value = MaybeUninit::<T>::zeroed();
    let mut len = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes, which `value` has.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, name, value.as_mut_ptr().cast(), &mut len) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was zeroed and then written over; `Plain` types are valid whatever their bytes are.
    Ok(unsafe { value.assume_init() })
}

/// Writes one byte to descriptor `number`, which the parent left open for us, and closes it.
pub fn signal_ready(number: RawFd) -> io::Result<()> {
    // SAFETY: only the number is looked at; the call fails on one that is not open.
    if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and the command line says that it was made for this purpose and is ours to close. Standard
    // streams, which others use, are refused with the options.
    let mut file = unsafe { File::from_raw_fd(number) };
    file.write_all(b"1")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn the_peer_of_a_pair_is_this_process() {
        let (near, _far) = UnixStream::pair().unwrap();
        let cred = peer_credentials(&near).unwrap();
        assert_eq!(cred, Credentials { pid: std::process::id(), uid: rustix::process::getuid().as_raw() });
        assert!(living_peer(&near).is_some());
    }

    #[test]
    fn what_the_other_end_has_read_is_known() {
        use std::io::Read;
        let (mut near, mut far) = UnixStream::pair().unwrap();
        assert_eq!(unread_by_peer(&near).unwrap(), 0);
        near.write_all(b"some bytes").unwrap();
        assert!(unread_by_peer(&near).unwrap() > 0);
        assert_eq!(far.read(&mut [0; 100]).unwrap(), 10);
        assert_eq!(unread_by_peer(&near).unwrap(), 0);
    }
}
