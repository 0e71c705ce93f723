//! Looks after a vmm whose memory a page server provides, in either mode: its event loop itself may be waiting for a page.
//!
//! No guest reads wrong bytes meanwhile: the vmm holds its own descriptor of the userfaultfd, so pages that were not
//! delivered stay unreadable; and before the process ends, and that descriptor with it, guest memory is taken away, so
//! that a fault which is let go by that cannot put a page of zeros into a store that other clones still use.

use crate::cli::{DONE, FAILED};
use crate::logging::last_words;
use crate::machine::driver::RunError;
use crate::memory::uffd::{ALL_AT_ONCE, Watch};
use crate::memory::{self, GuestRam};
use crate::notice::{Notice, Notifier};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use uffd_handler::listener::remove_all;
use uffd_handler::process::Signals;

/// How long the event loop has to end the process in good order after the page server is gone.
const LAST_ORDERS: Duration = Duration::from_millis(500);
/// How long it has after a signal; what it may have to wait for then is a disk.
const SIGNAL_ORDERS: Duration = Duration::from_secs(3);
/// How often, and after how long, to try again if the kernel refuses to watch: it may have no memory for that just now.
const TRIES: u32 = 20;
const TRY_AGAIN: Duration = Duration::from_millis(10);

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
        let mut sources =
            [server.sign.poll_fd(), PollFd::new(&server.released, PollFlags::IN), PollFd::new(&signals, PollFlags::IN)];
        let watched = until_something_comes(|| poll(&mut sources, None));
        let [server_gone, ..] = sources.map(|source| !source.revents().is_empty());
        if server.is_released() {
            return;
        }
        ending.store(true, Ordering::Relaxed);
        let code = if let Err(e) = watched {
            // A guest that nobody watches could wait for ever.
            last_words(&RunError::Guard(e.into()));
            FAILED
        } else if server_gone {
            std::thread::sleep(ALL_AT_ONCE);
            if server.is_released() {
                return;
            }
            notifier.send(Notice::PageServerGone(server.session));
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

/// Polls until that succeeds, or has failed too often.
fn until_something_comes(mut poll: impl FnMut() -> Result<usize, Errno>) -> Result<(), Errno> {
    let mut failed = 0;
    loop {
        match poll() {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(e) if failed == TRIES => return Err(e),
            Err(_) => {
                failed += 1;
                std::thread::sleep(TRY_AGAIN);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_refuses_to_watch_is_asked_again_and_not_for_ever() {
        let mut answers = vec![Ok(1), Err(Errno::NOMEM), Err(Errno::INTR), Err(Errno::NOMEM)];
        assert_eq!(until_something_comes(|| answers.pop().expect("not asked once more")), Ok(()));
        assert_eq!(until_something_comes(|| Err(Errno::NOMEM)), Err(Errno::NOMEM));
        let mut interruptions = 10 * TRIES as usize;
        let busy = || {
            interruptions -= 1;
            if interruptions > 0 { Err(Errno::INTR) } else { Ok(1) }
        };
        assert_eq!(until_something_comes(busy), Ok(()));
    }
}
