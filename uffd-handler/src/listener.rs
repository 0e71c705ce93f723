//! A listening Unix socket that only its owner may connect to, and that goes away with the server.

use api_spec::client::unix;
use rustix::fs::Mode;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Longest path that a socket address holds, in bytes.
const MAX_PATH: usize = 107;

/// A socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The path does not fit into an address.
    #[error("socket path {path} has {len} bytes, {MAX_PATH} fit: choose a shorter one")]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Its length.
        len: usize,
    },
    /// No path at all, or one that no file can have.
    #[error("socket path {0:?} is empty or has a zero byte: choose another one")]
    Unusable(PathBuf),
    /// Somebody listens there.
    #[error("{0} is in use: stop the server that listens there, or choose another path")]
    InUse(PathBuf),
    /// Something else is there.
    #[error("{0} exists and is no socket: remove it, or choose another path")]
    NotASocket(PathBuf),
    /// A step failed.
    #[error("cannot {step} socket {path}: {}", snapshot::told(.source))]
    Failed {
        /// What was tried.
        step: &'static str,
        /// The path.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

/// Checks that a path fits into a socket address.
pub fn check_path(path: &Path) -> Result<(), ListenError> {
    match path.as_os_str().len() {
        len if len == 0 || path.as_os_str().as_bytes().contains(&0) => Err(ListenError::Unusable(path.into())),
        ..=MAX_PATH => Ok(()),
        len => Err(ListenError::TooLong { path: path.into(), len }),
    }
}

/// A listening socket and its file, which is removed on drop if it is still the one that was made.
#[derive(Debug)]
pub struct Listener {
    socket: UnixListener,
    path: PathBuf,
    identity: (u64, u64),
}

impl Listener {
    /// Listens at `path`, taking the place of a socket that nobody listens on any more.
    ///
    /// The umask, which belongs to the whole process, is changed for the moment of creation.
    pub fn bind(path: &Path) -> Result<Self, ListenError> {
        check_path(path)?;
        let failed = |step| move |source| ListenError::Failed { step, path: path.into(), source };
        clear_way(path)?;
        let umask = rustix::process::umask(Mode::RWXG | Mode::RWXO | Mode::XUSR);
        let bound = UnixListener::bind(path);
        rustix::process::umask(umask);
        let socket = bound.map_err(failed("bind"))?;
        socket.set_nonblocking(true).map_err(failed("configure"))?;
        let identity = identity(path).map_err(failed("look at"))?;
        files().push((path.into(), identity));
        Ok(Self { socket, path: path.into(), identity })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes one connection; `None` when nobody is waiting.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        loop {
            match self.socket.accept() {
                Ok((stream, _)) => return Ok(Some(stream)),
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(None),
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                    _ => return Err(error),
                },
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        files().retain(|(_, identity)| *identity != self.identity);
        remove(&self.path, self.identity);
    }
}

/// The files of all listeners of this process.
static FILES: Mutex<Vec<(PathBuf, (u64, u64))>> = Mutex::new(Vec::new());

fn files() -> MutexGuard<'static, Vec<(PathBuf, (u64, u64))>> {
    FILES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes the files of all listeners of this process, which is about to end without dropping them.
pub fn remove_all() {
    for (path, identity) in files().drain(..) {
        remove(&path, identity);
    }
}

/// Removes the file of a listener, if it is still the one that was made.
fn remove(path: &Path, made: (u64, u64)) {
    if identity(path).is_ok_and(|now| now == made) {
        let _ = fs::remove_file(path);
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|meta| (meta.dev(), meta.ino()))
}

/// Removes a socket that nobody listens on; refuses to touch anything else.
fn clear_way(path: &Path) -> Result<(), ListenError> {
    let failed = |step| move |source| ListenError::Failed { step, path: path.into(), source };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("look at")(error)),
        Ok(meta) if !meta.file_type().is_socket() => return Err(ListenError::NotASocket(path.into())),
        Ok(_) => {}
    }
    // Without waiting: somebody who listens but does not accept is somebody who listens.
    match unix::connect(path, Duration::ZERO) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(failed("remove the abandoned"))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() != io::ErrorKind::TimedOut => Err(failed("probe")(error)),
        _ => Err(ListenError::InUse(path.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mode_is_0600_and_the_file_goes_away() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = Listener::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_long_path_is_refused_before_anything_is_created() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x".repeat(108));
        assert!(matches!(Listener::bind(&path), Err(ListenError::TooLong { .. })));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_live_socket_and_a_file_are_refused_and_an_abandoned_socket_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        assert!(matches!(Listener::bind(&path), Err(ListenError::InUse(_))));
        drop(listener);
        assert!(path.exists());
        drop(Listener::bind(&path).unwrap());
        fs::write(&path, "mine").unwrap();
        assert!(matches!(Listener::bind(&path), Err(ListenError::NotASocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"mine");
    }

    #[test]
    fn a_file_that_replaced_the_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = Listener::bind(&path).unwrap();
        fs::rename(&path, dir.path().join("moved")).unwrap();
        fs::write(&path, "mine").unwrap();
        drop(listener);
        assert_eq!(fs::read(&path).unwrap(), b"mine");
    }
}
