//! Looks after a vmm whose memory a page server provides, in either mode: its event loop itself may be waiting for a page.
//!
//! No guest reads wrong bytes meanwhile: the vmm holds its own descriptor of the userfaultfd, so pages that were not
//! delivered stay unreadable; and before the process ends, and that descriptor with it, guest memory is taken away, so
//! that a fault which is let go by that cannot put a page of zeros into a store that other clones still use.

use crate::cli::{DONE, FAILED};
use crate::logging::last_words;
use crate::machine::driver::RunError;
use crate::memory::uffd::Watch;
use crate::memory::{self, GuestRam};
use crate::notice::{Notice, Notifier};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use uffd_handler::listener::remove_all;
use uffd_handler::process::Signals;

/// How long the event loop has to end the process in good order after the page server is gone.
const LAST_ORDERS: Duration = Duration::from_millis(500);
/// How long to wait, after the page server's end, for a signal that was sent at the same time.
const ALL_AT_ONCE: Duration = Duration::from_millis(20);
/// How long it has after a signal; what it may have to wait for then is a disk.
const SIGNAL_ORDERS: Duration = Duration::from_secs(3);

/// Watches, on a thread of its own, for the end of the page server and for signals that ask this process to end. The
/// event loop sees to them; if it does not end the process, because it waits for a page that will not come, the thread
/// does.
///
/// `ending` is set at once, for whatever the event loop is in the midst of and can give up.
pub fn watch(
    server: Watch,
    ram: &GuestRam,
    signals: Signals,
    notifier: Notifier,
    ending: Arc<AtomicBool>,
) -> io::Result<()> {
    let memory = ram.memory().clone();
    std::thread::Builder::new().name("guard".into()).spawn(move || {
        let (gone, released, ends) = (&server.sign, &server.released, &signals);
        let mut sources =
            [gone.as_fd(), released.as_fd(), ends.as_fd()].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        while let Err(Errno::INTR) = poll(&mut sources, None) {}
        let [server_gone, ..] = sources.map(|source| !source.revents().is_empty());
        if server.is_released() {
            return;
        }
        ending.store(true, Ordering::Relaxed);
        let code = if server_gone {
            // Whoever ends everything at once may have ended the server first.
            std::thread::sleep(ALL_AT_ONCE);
            if server.is_released() {
                return;
            }
            notifier.send(Notice::PageServerGone(server.path.clone()));
            std::thread::sleep(LAST_ORDERS);
            if server.is_released() {
                return;
            }
            if signals.have_come() {
                DONE
            } else {
                last_words(&RunError::PageServerGone(server.path.clone()));
                FAILED
            }
        } else {
            std::thread::sleep(SIGNAL_ORDERS);
            DONE
        };
        remove_all();
        memory::cut_off(&memory);
        std::process::exit(code);
    })?;
    Ok(())
}
