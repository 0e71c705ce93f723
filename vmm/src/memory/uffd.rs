//! A view whose pages a page server provides.
//!
//! ```text
//!   greet -> (the store) -> map it privately -> register with a userfaultfd -> attach -> (the server serves)
//! ```
//!
//! Every range is registered before its first access and stays registered: a hole of the store that is read through an
//! unregistered mapping would become a zero page for every clone.

use super::{GuestRam, MemoryError, PAGE_SIZE};
use api_spec::handshake::{Hello, Region, VERSION};
use rustix::fs::{SealFlags, fcntl_get_seals, fstat};
use rustix::io::fcntl_dupfd_cloexec;
use snapshot::manifest::MemoryRegion;
use std::fs::File;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use uffd_handler::client::{self, ClientError};
use userfaultfd::Uffd;

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
    /// A range could not be registered.
    #[error("cannot register guest RAM with userfaultfd: {0}; faults on shared memory need Linux 4.11 or newer")]
    Register(userfaultfd::Error),
    /// No memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// A page server that serves this guest, and the vmm's own descriptor of the userfaultfd, which keeps untouched memory
/// from ever reading as zeros. Both live as long as the guest.
///
/// A fault may be waited for by the kernel itself, on the guest's behalf; closing the VM then waits until the fault is
/// answered, and no signal ends that wait. If the vmm is killed, the kernel closes its descriptors in the order of their
/// numbers. So the userfaultfd has a lower number than the VM (a dead server must not leave the fault open for ever), and
/// the connection a higher one (a living server answers as long as it is open, and nothing else may: a fault that is
/// merely let go puts a zero page into the store of all clones).
#[derive(Debug)]
pub struct PageServer {
    path: PathBuf,
    connection: UnixStream,
    /// This guest needs the server no more.
    released: Arc<AtomicBool>,
    uffd: Uffd,
}

/// Lowest number of the connection's descriptor: above those of the VM and its vCPUs.
const CONNECTION_FD_MIN: i32 = 128;

impl PageServer {
    /// Where the server listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What a thread needs to notice that the server is gone.
    pub fn watch(&self) -> io::Result<Watch> {
        let (path, released) = (self.path.clone(), self.released.clone());
        Ok(Watch { path, connection: self.connection.try_clone()?, released })
    }

    /// Lets go of everybody who still waits for a page of `ram`, so that the VM can be closed whatever the server does.
    /// Nobody runs or accesses the memory any more: what is behind it is taken away first.
    pub fn let_go(&self, ram: &GuestRam) {
        super::cut_off(ram.memory());
        for (region, addr) in ram.mappings() {
            if let Err(e) = self.uffd.wake(addr.cast(), region.size_bytes as usize) {
                tracing::warn!("cannot wake those who wait for pages: {e}");
            }
        }
    }
}

impl Drop for PageServer {
    fn drop(&mut self) {
        self.released.store(true, Ordering::SeqCst);
        // A watch holds the connection too.
        let _ = self.connection.shutdown(Shutdown::Both);
    }
}

/// An eye on a page server.
#[derive(Debug)]
pub struct Watch {
    /// Where the server listens.
    pub path: PathBuf,
    /// Becomes readable when the server is gone, or not needed any more: the server says nothing more.
    pub connection: UnixStream,
    released: Arc<AtomicBool>,
}

impl Watch {
    /// Whether the server is not needed any more.
    pub fn is_released(&self) -> bool {
        self.released.load(Ordering::SeqCst)
    }
}

/// Asks the page server at `path` for the image with this root digest and maps its store as guest RAM.
///
/// When this returns, the server has said that it serves.
pub fn connect(path: &Path, image: &str, regions: Vec<MemoryRegion>) -> Result<(GuestRam, PageServer), UffdError> {
    let failed = |source| UffdError::Server { path: path.to_owned(), source };
    let size = regions.iter().map(|r| r.size_bytes).sum();
    let hello = Hello { version: VERSION, image: image.to_owned(), size };
    // Made first: see `PageServer` about its number.
    let uffd = uffd_handler::uffd::create()?;
    let greeted = client::greet(path, &hello).map_err(failed)?;
    let store = File::from(greeted.store.try_clone().map_err(|e| failed(e.into()))?);
    check_size(path, &store, size)?;

    let ram = GuestRam::private_view(&store, regions)?;
    for (region, addr) in ram.mappings() {
        uffd.register(addr.cast(), region.size_bytes as usize).map_err(UffdError::Register)?;
    }

    let ranges = ram.mappings().map(|(region, addr)| describe(region, addr)).collect();
    let connection = greeted.attach(ranges, &uffd).map_err(failed)?;
    let connection =
        fcntl_dupfd_cloexec(&connection, CONNECTION_FD_MIN).map_err(|e| failed(io::Error::from(e).into()))?;
    Ok((ram, PageServer { path: path.to_owned(), connection: connection.into(), released: Arc::default(), uffd }))
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
