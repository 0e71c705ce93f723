//! Looks after a vmm whose memory a page server provides: its event loop itself may be waiting for a page.
//!
//! No guest reads wrong bytes meanwhile: the vmm holds its own descriptor of the userfaultfd, so pages that were not
//! delivered stay unreadable; and before the process ends, and that descriptor with it, guest memory is taken away, so
//! that a fault which is let go by that cannot put a page of zeros into a store that other clones still use.

use crate::cli::FAILED;
use crate::machine::driver::RunError;
use crate::memory::uffd::PageServer;
use crate::memory::{self, GuestRam};
use crate::notice::{Notice, Notifier};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use std::io;
use std::time::Duration;
use uffd_handler::process::Signals;

/// How long the event loop has to end the process in good order.
const LAST_ORDERS: Duration = Duration::from_millis(500);

/// Watches, on a thread of its own, for the end of the page server and for signals that ask this process to end. The
/// event loop is told; if it does not end the process, the thread does.
pub fn watch(server: &PageServer, ram: &GuestRam, signals: Signals, notifier: Notifier) -> io::Result<()> {
    let memory = ram.memory().clone();
    let path = server.path().to_owned();
    let connection = server.connection()?;
    std::thread::Builder::new().name("guard".into()).spawn(move || {
        let (mut server_gone, mut asked_to_end) = (false, false);
        while !server_gone && !asked_to_end {
            // The server says nothing more; whatever makes the connection readable is its end.
            let mut events = [PollFd::new(&connection, PollFlags::IN), PollFd::new(&signals, PollFlags::IN)];
            match poll(&mut events, None) {
                Ok(_) => [server_gone, asked_to_end] = events.map(|event| !event.revents().is_empty()),
                Err(Errno::INTR) => {}
                Err(_) => return,
            }
        }
        if server_gone {
            notifier.send(Notice::PageServerGone(path.clone()));
        }
        std::thread::sleep(LAST_ORDERS);
        let reason = if server_gone { RunError::PageServerGone(path) } else { RunError::Stuck(path) };
        eprintln!("vmm: {reason}");
        memory::cut_off(&memory);
        std::process::exit(FAILED);
    })?;
    Ok(())
}
