//! Memory whose pages a page server provides.
//!
//! ```text
//!   shared mode   greet -> (the store) -> map it privately -> register with a userfaultfd -> attach -> (the server serves)
//!   copy mode     map anonymous memory -> register with a userfaultfd -> hand it over -> (a page comes: the server serves)
//! ```
//!
//! Every range is registered before its first access and stays registered: a hole of the store that is read through an
//! unregistered mapping would become a zero page for every clone, and a page of anonymous memory would be zeros for this one.
//!
//! Copy mode is Firecracker's protocol. In it the server never says anything. It has taken its job when it has read the one
//! message, and does it when the first page has come; it may close the connection at any time after that, so what tells of
//! its end is that of its process.

use super::layout::GENERATION_PAGE;
use super::{GuestRam, MemoryError, PAGE_SIZE};
use crate::sandbox::{self, Kind};
use api_spec::handshake::{Hello, Mode as PageMode, Region, VERSION};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_get_seals, fstat, memfd_create};
use rustix::io::{DupFlags, dup3, fcntl_dupfd_cloexec};
use snapshot::manifest::MemoryRegion;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};
use uffd_handler::client::{self, ClientError};
use uffd_handler::process::{Signals, living_peer, peer_credentials};
use userfaultfd::{FeatureFlags, Uffd};
use vm_memory::{Bytes, GuestAddress};

/// Why a page server could not be used.
#[derive(Debug, thiserror::Error)]
pub enum UffdError {
    /// The conversation with it failed.
    #[error("page server at {path}: {source}")]
    Server {
        /// Its socket.
        path: PathBuf,
        /// What went wrong.
        source: ClientError,
    },
    /// Its store does not fit the snapshot.
    #[error(
        "page server at {path}: its store has {found} bytes and the snapshot's memory {expected}; it serves something else under this name"
    )]
    StoreSize {
        /// Its socket.
        path: PathBuf,
        /// Size of the store.
        found: u64,
        /// Size of the image.
        expected: u64,
    },
    /// Its store could become shorter under the guest, and end the vmm with SIGBUS.
    #[error(
        "page server at {path}: its store is not sealed against changes of its size; use our page server (`uffd-handler`)"
    )]
    StoreNotSealed {
        /// Its socket.
        path: PathBuf,
    },
    /// No userfaultfd.
    #[error(transparent)]
    Create(#[from] uffd_handler::uffd::UffdError),
    /// It could not get the number that it needs.
    #[error("cannot renumber a userfaultfd: {0}")]
    Renumber(io::Error),
    /// A range could not be registered.
    #[error("cannot register guest RAM with userfaultfd: {0}; faults on shared memory need Linux 4.11 or newer")]
    Register(userfaultfd::Error),
    /// Copy mode: it has taken the userfaultfd, and no page comes of that.
    #[error(
        "page server at {path}: it has taken the userfaultfd but has not delivered the first page within {waited_s} s{}; does it serve this snapshot's memory, and in copy mode?",
        if *.closed { " and has closed the connection" } else { "" }
    )]
    NoPage {
        /// Its socket.
        path: PathBuf,
        /// How long that was waited for, in seconds.
        waited_s: u64,
        /// It has closed the connection, which it may.
        closed: bool,
    },
    /// Copy mode: it is gone before it has shown that it serves.
    #[error(
        "the page server at {path} is gone: it ended before it had delivered the first page; restore again once it runs"
    )]
    Gone {
        /// Its socket.
        path: PathBuf,
    },
    /// Copy mode: this process was asked to end before that.
    #[error("the vmm is ending, and the snapshot is not loaded")]
    Ending,
    /// Copy mode: the first page cannot be read.
    #[error("cannot read the first page of guest RAM: {0}")]
    FirstPage(io::Error),
    /// No memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// A page server that has taken this guest on, and the vmm's own descriptor of the userfaultfd, which keeps untouched memory
/// from ever reading as zeros, and by which the vmm can serve faults itself ([`super::stand_in`]).
///
/// A fault may be waited for by the kernel itself, on the guest's behalf; closing the VM then waits until the fault is
/// answered, and no signal ends that wait. If the vmm is killed, the kernel closes its descriptors in the order of their
/// numbers. So the userfaultfd has a lower number than the VM (a dead server must not leave the fault open for ever), and
/// the connection a higher one (a living server answers as long as it is open, and nothing else may: a fault that is
/// merely let go puts a zero page into the store of all clones).
#[derive(Debug)]
pub struct Service {
    /// Where the server listens.
    pub path: PathBuf,
    /// What was said, and what is.
    pub connection: UnixStream,
    /// How pages come.
    pub mode: Mode,
    /// What faults are raised on.
    pub uffd: Arc<Uffd>,
    /// The ranges that are registered.
    pub ranges: Vec<Region>,
    /// The user whose server it is.
    pub uid: u32,
}

/// How pages come from a server.
#[derive(Debug)]
pub enum Mode {
    /// Through the store.
    Shared,
    /// By copies of our own page server.
    Copied,
    /// By copies of a server of Firecracker's protocol. With what becomes readable at the end of the server's process. Without that
    /// the end of the connection has to do: the process that listens cannot be told from here, or has left the serving to another.
    Foreign(Option<OwnedFd>),
}

/// Lowest number of the connection's descriptor: above those of the VM and its vCPUs.
const CONNECTION_FD_MIN: i32 = 128;
/// How long the first page may take in copy mode: the server may copy all of the memory before it looks at a fault.
const FIRST_PAGE: Duration = Duration::from_secs(60);
/// And once the server has closed the connection, which is what one does that wants nothing of copy mode.
const FIRST_PAGE_CLOSED: Duration = Duration::from_secs(5);
/// How long to wait, after the server's end, for a signal to this process: whoever ends everything at once may have ended the
/// server first.
pub const ALL_AT_ONCE: Duration = Duration::from_millis(20);

impl Service {
    fn new(path: &Path, connection: UnixStream, mode: Mode, uffd: Arc<Uffd>, ranges: Vec<Region>) -> io::Result<Self> {
        let connection = fcntl_dupfd_cloexec(&connection, CONNECTION_FD_MIN)?.into();
        let connection: UnixStream = connection;
        let uid = peer_credentials(&connection)?.uid;
        Ok(Service { path: path.to_owned(), connection, mode, uffd, ranges, uid })
    }

    /// Waits until the server has shown that it serves: in copy mode, until it has delivered a page. In shared mode it has
    /// said so. The wait ends if the server does, or if one of `signals` comes.
    ///
    /// If that fails, the memory can no longer be used.
    pub fn wait_until_it_serves(&self, ram: &GuestRam, signals: &Signals) -> Result<(), UffdError> {
        if !matches!(self.mode, Mode::Foreign(_)) {
            return Ok(());
        }
        let outcome = self.wait_for_first_page(ram, signals);
        if outcome.is_err() {
            let_go(&self.uffd, ram);
        }
        outcome
    }

    /// The page that is waited for is one that a restore touches anyway. It is the kernel that reads it: in a thread which
    /// that holds up, since no wait for a page ends by itself, and which outlives the loss of the memory.
    fn wait_for_first_page(&self, ram: &GuestRam, signals: &Signals) -> Result<(), UffdError> {
        let sign = self.mode.sign(&self.connection).map_err(UffdError::FirstPage)?;
        let (memory, (sender, came)) = (ram.memory().clone(), mpsc::channel());
        let reader = move || {
            let read =
                memfd_create("coppice-first-page", MemfdFlags::CLOEXEC).map_err(io::Error::from).and_then(|fd| {
                    let read = memory.write_volatile_to(GuestAddress(GENERATION_PAGE), &mut File::from(fd), 8);
                    read.map(drop).map_err(io::Error::other)
                });
            let _ = sender.send(read); // Nobody waits any more if it took too long.
        };
        sandbox::spawn("first-page", Kind::Memory, reader).map_err(UffdError::FirstPage)?;
        let (began, mut closed_at) = (Instant::now(), None);
        loop {
            match came.recv_timeout(Duration::from_millis(20)) {
                Ok(read) => return read.map_err(UffdError::FirstPage),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(UffdError::FirstPage(io::Error::other("the thread that reads it panicked")));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            let gone = sign.has_come();
            if gone {
                std::thread::sleep(ALL_AT_ONCE);
            }
            if signals.have_come() {
                return Err(UffdError::Ending);
            }
            if gone {
                return Err(UffdError::Gone { path: self.path.clone() });
            }
            if closed_at.is_none() && has_hung_up(&self.connection) {
                closed_at = Some(Instant::now());
            }
            let late = closed_at.is_some_and(|at| at.elapsed() >= FIRST_PAGE_CLOSED) || began.elapsed() >= FIRST_PAGE;
            if late {
                let (path, waited_s) = (self.path.clone(), began.elapsed().as_secs());
                return Err(UffdError::NoPage { path, waited_s, closed: closed_at.is_some() });
            }
        }
    }
}

/// Lets go of everybody who still waits for a page of `ram`, so that the VM can be closed whatever the server does.
/// Nobody runs or accesses the memory any more: what is behind it is taken away first.
pub fn let_go(uffd: &Uffd, ram: &GuestRam) {
    super::cut_off(ram.memory());
    for (region, addr) in ram.mappings() {
        if let Err(e) = uffd.wake(addr.cast(), region.size_bytes as usize) {
            tracing::warn!("cannot wake those who wait for pages: {e}");
        }
    }
}

/// What tells that a page server is gone.
#[derive(Debug)]
pub struct Sign {
    fd: OwnedFd,
    /// Any of these, or a hang-up, is the sign.
    events: PollFlags,
}

impl Sign {
    /// What to poll for it.
    pub fn poll_fd(&self) -> PollFd<'_> {
        PollFd::from_borrowed_fd(self.fd.as_fd(), self.events)
    }

    /// Whether it has come.
    pub fn has_come(&self) -> bool {
        poll_now(&self.fd, self.events)
    }
}

impl Mode {
    /// What tells that the server is gone.
    pub fn sign(&self, connection: &UnixStream) -> io::Result<Sign> {
        Ok(match self {
            Mode::Foreign(Some(process)) => Sign { fd: process.try_clone()?, events: PollFlags::IN },
            // What it may say means nothing.
            _ => Sign { fd: connection.try_clone()?.into(), events: PollFlags::empty() },
        })
    }

    /// How pages are to come from the next server.
    pub fn again(&self) -> Mode {
        match self {
            Mode::Foreign(_) => Mode::Foreign(None),
            Mode::Shared | Mode::Copied => Mode::Copied,
        }
    }

    /// Whether the server answers pings.
    pub fn speaks(&self) -> bool {
        !matches!(self, Mode::Foreign(_))
    }
}

/// Has the page server at `path` serve a guest that one of user `uid` has served before, by copies.
pub fn enlist(
    path: &Path,
    uid: u32,
    image: &str,
    mode: Mode,
    ranges: &[Region],
    uffd: &Arc<Uffd>,
) -> Result<Service, UffdError> {
    // Whoever gets a userfaultfd has the guest in his hands.
    let failed = |source| UffdError::Server { path: path.to_owned(), source };
    let (connection, mode) = match mode {
        Mode::Foreign(_) => {
            let connection = client::hand_over(path, Some(uid), ranges, uffd).map_err(failed)?;
            let process = living_peer(&connection);
            (connection, Mode::Foreign(process))
        }
        Mode::Shared | Mode::Copied => {
            let size = ranges.iter().map(|range| range.size).sum();
            let hello = Hello { version: VERSION, image: image.to_owned(), size, mode: PageMode::Copy };
            let promised = client::ask_for_copies(path, &hello).map_err(failed)?;
            promised.check_user(uid).map_err(failed)?;
            (promised.attach(ranges.to_vec(), uffd).map_err(failed)?, Mode::Copied)
        }
    };
    Service::new(path, connection, mode, uffd.clone(), ranges.to_vec()).map_err(|e| failed(e.into()))
}

/// Wakes all who wait for a page in these ranges: they look again at what is there, and fault once more if need be.
pub fn wake_all(uffd: &Uffd, ranges: &[Region]) -> Result<(), userfaultfd::Error> {
    ranges.iter().try_for_each(|range| uffd.wake(range.base_host_virt_addr as *mut _, range.size as usize))
}

/// Whether the other end of a connection is closed.
pub fn has_hung_up(connection: &UnixStream) -> bool {
    // That is told unasked.
    poll_now(connection, PollFlags::empty())
}

fn poll_now(fd: &impl AsFd, events: PollFlags) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::from_borrowed_fd(fd.as_fd(), events)], Some(&now)).is_ok_and(|ready| ready > 0)
}

/// Asks the page server at `path` for the image with this root digest and maps its store as guest RAM, for which addresses
/// are reserved. The userfaultfd takes the number of `low`.
///
/// When this returns, the server has said that it serves.
pub fn connect(path: &Path, image: &str, ram: &mut GuestRam, low: OwnedFd) -> Result<Service, UffdError> {
    let failed = |source| UffdError::Server { path: path.to_owned(), source };
    let size = ram.size();
    let hello = Hello { version: VERSION, image: image.to_owned(), size, mode: PageMode::Shared };
    let uffd = Arc::new(renumber(uffd_handler::uffd::create()?, low)?);
    let greeted = client::greet(path, &hello).map_err(failed)?;
    let store = File::from(greeted.store.try_clone().map_err(|e| failed(e.into()))?);
    check_size(path, &store, size)?;

    ram.show(&store)?;
    let ranges = register(&uffd, ram)?;
    let connection = greeted.attach(ranges.clone(), &uffd).map_err(failed)?;
    Service::new(path, connection, Mode::Shared, uffd, ranges).map_err(|e| failed(e.into()))
}

/// Has the page server at `path` copy pages into anonymous memory, for which addresses are reserved: which image, it knows
/// itself. The userfaultfd takes the number of `low`.
///
/// When this returns, it has taken the userfaultfd; see [`Service::wait_until_it_serves`].
pub fn connect_in_copy_mode(path: &Path, ram: &mut GuestRam, low: OwnedFd) -> Result<Service, UffdError> {
    let failed = |source| UffdError::Server { path: path.to_owned(), source };
    // Servers of this protocol rely on the feature, though no event comes here.
    let uffd = Arc::new(renumber(uffd_handler::uffd::create_with(FeatureFlags::EVENT_REMOVE)?, low)?);
    ram.have_copied(uffd.clone())?;
    let ranges = register(&uffd, ram)?;
    let connection = client::hand_over(path, None, &ranges, &uffd).map_err(failed)?;
    let mode = Mode::Foreign(living_peer(&connection));
    Service::new(path, connection, mode, uffd, ranges).map_err(|e| failed(e.into()))
}

/// Gives a userfaultfd the number of another descriptor, which is closed: see [`Service`] about its number.
fn renumber(uffd: Uffd, mut low: OwnedFd) -> Result<Uffd, UffdError> {
    let moved = dup3(uffd, &mut low, DupFlags::CLOEXEC).map_err(|e| UffdError::Renumber(e.into()));
    moved.and_then(|()| uffd_handler::uffd::adopt(low).map_err(|e| UffdError::Renumber(io::Error::other(e))))
}

/// Registers all of RAM, which nobody has accessed yet, and says where that is.
fn register(uffd: &Uffd, ram: &GuestRam) -> Result<Vec<Region>, UffdError> {
    ram.mappings()
        .map(|(region, addr)| {
            uffd.register(addr.cast(), region.size_bytes as usize).map_err(UffdError::Register)?;
            Ok(describe(region, addr))
        })
        .collect()
}

/// A store that is shorter than it says, or becomes so, would end the guest with SIGBUS.
fn check_size(path: &Path, store: &File, expected: u64) -> Result<(), UffdError> {
    let found = fstat(store).map_or(0, |stat| stat.st_size as u64);
    if found != expected {
        return Err(UffdError::StoreSize { path: path.to_owned(), found, expected });
    }
    if !fcntl_get_seals(store).is_ok_and(|seals| seals.contains(SealFlags::SHRINK)) {
        return Err(UffdError::StoreNotSealed { path: path.to_owned() });
    }
    Ok(())
}

fn describe(region: MemoryRegion, addr: *mut u8) -> Region {
    let MemoryRegion { size_bytes: size, offset, guest_addr: _ } = region;
    Region { base_host_virt_addr: addr as u64, size, offset, page_size: PAGE_SIZE }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// Where the server's process cannot be told, its connection is watched; what it says there means nothing in copy mode.
    #[test]
    fn a_server_that_says_something_in_copy_mode_is_not_gone() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let sign = Mode::Foreign(None).sign(&near).unwrap();
        assert!(!sign.has_come());
        far.write_all(b"ok").unwrap();
        assert!(!sign.has_come());
        drop(far);
        assert!(sign.has_come());
    }
}
