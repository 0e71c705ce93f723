//! Watches over a guest's private memory, from the event loop: a timer, and a look at what the kernel counts.

use crate::memory::limit;
use crate::notice::Halt;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;
use vmm_sys_util::timerfd::TimerFd;

/// What the kernel counts for this process.
const STATUS: &str = "/proc/self/status";
/// When to look again if that cannot be read, or the guest cannot be paused, which may be for a moment.
const AGAIN: Duration = limit::SHORTEST;

/// The watch. It looks while a guest with a limit runs.
#[derive(Debug)]
pub struct PrivateWatch {
    timer: TimerFd,
    limit_mib: Option<u64>,
    vcpus: u8,
    /// Opened once: the process may come to live where there is no /proc.
    status: Option<File>,
}

impl PrivateWatch {
    /// A watch over nothing.
    pub fn new() -> io::Result<Self> {
        Ok(PrivateWatch { timer: TimerFd::new()?, limit_mib: None, vcpus: 1, status: None })
    }

    /// What to wait for; then [`PrivateWatch::look`].
    pub fn source(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Sets the limit, or takes it away. Fails, and changes nothing, where it could not be kept.
    pub fn set_limit(&mut self, limit_mib: Option<u64>) -> io::Result<()> {
        if limit_mib.is_some() && self.status.is_none() {
            let status = File::open(STATUS)?;
            private_bytes(&status)?;
            self.status = Some(status);
        }
        self.limit_mib = limit_mib;
        Ok(())
    }

    /// How many vCPUs can fill memory.
    pub fn set_vcpus(&mut self, vcpus: u8) {
        self.vcpus = vcpus;
    }

    /// Whether the guest has reached its limit; otherwise it is looked at again in time. For a guest that runs or is to run.
    pub fn look(&mut self) -> Option<Halt> {
        let (Some(limit_mib), Some(status)) = (self.limit_mib, &self.status) else {
            self.stop();
            return None;
        };
        let (wait, halt) = match private_bytes(status) {
            Ok(used) => match limit::next_look(used, limit_mib.saturating_mul(1 << 20), self.vcpus) {
                Some(wait) => (wait, None),
                // Until it does stand still.
                None => (AGAIN, Some(Halt::PrivateMemory { used_mib: used.div_ceil(1 << 20), limit_mib })),
            },
            Err(e) => {
                log::error!("cannot tell how much private memory the guest has: {STATUS}: {e}");
                (AGAIN, None)
            }
        };
        // Setting it anew also takes note of its having fired.
        if let Err(e) = self.timer.reset(wait, None) {
            log::error!("cannot watch over the guest's private memory: {e}");
        }
        halt
    }

    /// The guest stands still: looks no more until [`PrivateWatch::look`] is called.
    pub fn stop(&mut self) {
        if let Err(e) = self.timer.clear() {
            log::error!("cannot stop a timer: {e}");
        }
    }
}

fn private_bytes(status: &File) -> io::Result<u64> {
    let mut text = [0; 4096];
    let len = status.read_at(&mut text, 0)?;
    let text = String::from_utf8_lossy(&text[..len]);
    limit::private_bytes(&text).ok_or_else(|| io::Error::other("the kernel does not say (RssAnon, VmSwap)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_below_what_is_in_use_is_reached_and_one_above_is_not() {
        let mut watch = PrivateWatch::new().unwrap();
        assert_eq!(watch.look(), None, "no limit");
        let mine = vec![1u8; 8 << 20];
        watch.set_limit(Some(4)).unwrap();
        let reached = watch.look().unwrap();
        assert!(matches!(reached, Halt::PrivateMemory { used_mib: 8.., limit_mib: 4 }), "{reached}");
        watch.set_limit(Some(1 << 40)).unwrap();
        assert_eq!(watch.look(), None);
        watch.set_limit(None).unwrap();
        assert_eq!(watch.look(), None);
        drop(mine);
    }
}
