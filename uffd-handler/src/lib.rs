//! The page server: gives the memory of a snapshot to any number of guests, which share every page they have not written.
//!
//! For each image and user there is a *store*, a memfd that is empty at first. A guest maps it privately and registers
//! the mapping with userfaultfd. Touching a page that is not in the store raises an event; the server puts the page,
//! with its neighbours, into the store and wakes the guest. Every other guest then finds the page by an ordinary kernel
//! fault: no event, no copy.
//!
//! A client that wants copies has its pages copied into private memory instead, from a store that the server keeps for
//! itself. That is how Firecracker has it.
//!
//! Follow a fault: [`event_loop`] (waiting) -> [`server`] (who is that?) -> [`session`] (reads the event, with
//! [`events`]) -> [`region`] (which page?) -> [`faults`] (what is to be done?) -> [`store`] (is it there?) -> [`image`]
//! (are its bytes at hand?) -> [`source`] (reads and checks them) -> [`mmap`] (`UFFDIO_COPY`) -> back in [`session`]
//! (wakes the guest).
//!
//! Follow a chunk that has to be waited for: [`image`] (who waits?) -> [`fetch`] (a thread) -> [`source`] -> [`server`] ->
//! [`stores`] (every store that needs it) -> [`session`].
//!
//! Follow a client: [`listener`] -> [`handshake`] (bytes to requests) -> [`server`] ([`stores`] grants one; regions and
//! userfaultfd are checked) -> [`session`]. [`client`] is the other end of the same conversation.
//!
//! Follow a counter: [`server`] (gathers them) -> [`metrics`] (HTTP) -> [`prometheus`] (text), or [`top`] (for people).

pub mod ahead;
pub mod client;
pub mod event_loop;
pub mod events;
pub mod faults;
pub mod fetch;
pub mod handshake;
pub mod histogram;
pub mod huge;
pub mod image;
pub mod learning;
pub mod listener;
pub mod logging;
pub mod metrics;
pub mod mmap;
pub mod options;
pub mod page_set;
pub mod place;
pub mod process;
pub mod prometheus;
pub mod recorder;
pub mod region;
pub mod sandbox;
pub mod server;
pub mod session;
pub mod socket;
pub mod source;
pub mod store;
pub mod stores;
pub mod talk;
pub mod text;
pub mod timer;
pub mod token;
pub mod tool;
pub mod top;
pub mod uffd;
pub mod ws;

pub use options::{Command, Options, USAGE, UsageError};

use listener::{ListenError, Listener};
use process::Signals;
use server::Server;
use std::io;

/// Why the page server could not start, or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// There is no log.
    #[error(transparent)]
    Log(#[from] logging::LogError),
    /// What the process may do.
    #[error(transparent)]
    Confinement(#[from] ::sandbox::confinement::ConfinementError),
    /// Which system calls it may make.
    #[error(transparent)]
    Filter(#[from] ::sandbox::filter::FilterError),
    /// There is no userfaultfd to be had.
    #[error(transparent)]
    Uffd(#[from] uffd::UffdError),
    /// A snapshot cannot be served.
    #[error(transparent)]
    Open(#[from] source::open::OpenError),
    /// A socket cannot be made.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The parent cannot be told that the server is ready.
    #[error("cannot write to descriptor {0} given with --ready-fd: {1}")]
    Ready(i32, io::Error),
    /// Something that every process should be able to do.
    #[error("cannot set up the server: {0}")]
    Setup(io::Error),
    /// The event loop failed.
    #[error("the event loop failed: {0}")]
    Loop(#[from] event_manager::Error),
}

impl RunError {
    /// The exit code that belongs to this failure.
    pub fn exit_code(&self) -> u8 {
        match self {
            RunError::Uffd(e) if e.host_cannot() => 77,
            _ => 1,
        }
    }
}

/// Starts the log, and serves until SIGTERM or SIGINT. Must be called while the process has one thread: signals are blocked, the umask is
/// changed for a moment.
pub fn run(options: &Options) -> Result<(), RunError> {
    options.confinement.enter()?;
    logging::start(options.log.clone())?;
    drop(uffd::create_user_only()?);
    if options.end_with_parent {
        process::end_with_parent().map_err(RunError::Setup)?;
    }
    // Before images are opened: those that lie elsewhere start threads, which must not be struck by a signal.
    let signals = Signals::catch().map_err(RunError::Setup)?;
    if options.confinement.seccomp {
        sandbox::start(options.snapshots.iter().any(|snapshot| source::open::is_url(snapshot)))?;
    }
    let images = source::open::open_images(options)?;
    raise_descriptor_limit();
    let socket = Listener::bind(&options.socket)?;
    let metrics = options.metrics.as_deref().map(Listener::bind).transpose()?;
    let server =
        Server::new(images, socket, metrics, Some(signals), options.limits.clone()).map_err(RunError::Setup)?;
    for snapshot in &options.snapshots {
        tracing::info!("serving {} on {}", snapshot.display(), options.socket.display());
    }
    if let Some(number) = options.ready_fd {
        process::signal_ready(number).map_err(|error| RunError::Ready(number, error))?;
    }
    event_loop::run(server)?;
    tracing::info!("stopped");
    Ok(())
}

/// Lets this process open as many files as it may: a page server needs three for every guest and a vmm one for every
/// stream, and the usual limit of 1024 is soon reached. Failing is not fatal.
pub fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!("cannot raise the limit of open files: {error}");
    }
}
