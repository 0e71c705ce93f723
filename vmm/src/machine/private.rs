//! Watches over a guest's private memory: looks at what the kernel counts, as often as the guest could reach its limit.
//!
//! That is done on a thread of its own, since the event loop may have to wait for something, such as a disk, while
//! the guest goes on. At the limit the thread stops the vCPUs, and tells the owner of the machine why.

use crate::devices::lock;
use crate::memory::limit;
use crate::notice::{Halt, Notice, Notifier};
use crate::sandbox::{self, Kind};
use crate::vcpu::Brake;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// What the kernel counts for this process.
const STATUS: &str = "/proc/self/status";
/// How much of that is read at a time, and at most, in bytes.
const PIECE: usize = 4096;
const MAX_STATUS: usize = 1 << 20;

/// The watch. It looks between [`PrivateWatch::start`] and [`PrivateWatch::stop`], if there is a limit.
#[derive(Debug)]
pub struct PrivateWatch {
    notifier: Notifier,
    shared: Arc<Shared>,
    has_thread: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    limit_mib: Option<u64>,
    brakes: Vec<Brake>,
    /// Opened once: the process may come to live where there is no /proc.
    status: Option<File>,
    /// The last look failed, and the log says so.
    blind: bool,
    looks: bool,
    ends: bool,
}

/// What a look has found.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    NoLimit,
    /// The guest cannot reach its limit for so long.
    Room(Duration),
    Reached(Halt),
}

impl PrivateWatch {
    /// A watch over nothing.
    pub fn new(notifier: Notifier) -> Self {
        PrivateWatch { notifier, shared: Arc::default(), has_thread: false }
    }

    /// Sets the limit, or takes it away. Fails, and changes nothing, where it could not be kept.
    pub fn set_limit(&mut self, limit_mib: Option<u64>) -> io::Result<()> {
        let mut state = lock(&self.shared.state);
        if limit_mib.is_some() && state.status.is_none() {
            let status = File::open(STATUS)?;
            private_bytes(&status)?;
            state.status = Some(status);
        }
        if limit_mib.is_some() && !self.has_thread {
            let (shared, notifier) = (self.shared.clone(), self.notifier.clone());
            sandbox::spawn("private", Kind::Memory, move || shared.watch(&notifier))?;
            self.has_thread = true;
        }
        state.limit_mib = limit_mib;
        Ok(())
    }

    /// What stops the guest.
    pub fn set_brakes(&mut self, brakes: Vec<Brake>) {
        lock(&self.shared.state).brakes = brakes;
    }

    /// Whether the guest has reached its limit.
    pub fn reached(&self) -> Option<Halt> {
        match lock(&self.shared.state).look() {
            Found::Reached(halt) => Some(halt),
            Found::NoLimit | Found::Room(_) => None,
        }
    }

    /// The guest runs: looks, until its limit is reached. Then its vCPUs are stopped, and [`Notice::Halt`] is sent once.
    pub fn start(&mut self) {
        lock(&self.shared.state).looks = true;
        self.shared.changed.notify_all();
    }

    /// The guest stands still, or is to: looks no more.
    pub fn stop(&mut self) {
        lock(&self.shared.state).looks = false;
    }
}

impl Drop for PrivateWatch {
    fn drop(&mut self) {
        lock(&self.shared.state).ends = true;
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn watch(&self, notifier: &Notifier) {
        let mut state = lock(&self.state);
        while !state.ends {
            let found = if state.looks { state.look() } else { Found::NoLimit };
            state = match found {
                Found::NoLimit => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Found::Room(time) => self.changed.wait_timeout(state, time).unwrap_or_else(PoisonError::into_inner).0,
                Found::Reached(halt) => {
                    state.looks = false;
                    state.brakes.iter().for_each(Brake::pull);
                    notifier.send(Notice::Halt(halt));
                    state
                }
            };
        }
    }
}

impl State {
    fn look(&mut self) -> Found {
        let (Some(limit_mib), Some(status)) = (self.limit_mib, &self.status) else { return Found::NoLimit };
        let used = private_bytes(status);
        match &used {
            Err(e) if !self.blind => {
                tracing::error!("cannot tell how much private memory the guest has: {STATUS}: {e}")
            }
            _ => {}
        }
        self.blind = used.is_err();
        let Ok(used) = used else { return Found::Room(limit::LONGEST) };
        match limit::next_look(used, limit_mib.saturating_mul(1 << 20), self.brakes.len() as u8) {
            Some(time) => Found::Room(time),
            None => Found::Reached(Halt::PrivateMemory { used_mib: used.div_ceil(1 << 20), limit_mib }),
        }
    }
}

fn private_bytes(status: &File) -> io::Result<u64> {
    // To its end: how long the lists are that come before what counts is up to the user, such as that of groups.
    let (mut text, mut len) = (Vec::new(), 0);
    loop {
        text.resize(len + PIECE, 0);
        let read = status.read_at(&mut text[len..], len as u64)?;
        len += read;
        if read == 0 || len > MAX_STATUS {
            break;
        }
    }
    let text = String::from_utf8_lossy(&text[..len]);
    limit::private_bytes(&text).ok_or_else(|| io::Error::other("the kernel does not say (RssAnon, VmSwap)"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::notice;
    use std::io::Write;

    #[test]
    fn a_limit_below_what_is_in_use_is_reached_and_one_above_is_not() {
        let (notifier, notices) = notice::channel().unwrap();
        let mut watch = PrivateWatch::new(notifier);
        assert_eq!(watch.reached(), None, "no limit");
        let mine = vec![1u8; 8 << 20];
        watch.set_limit(Some(4)).unwrap();
        let reached = watch.reached().unwrap();
        assert!(matches!(reached, Halt::PrivateMemory { used_mib: 8.., limit_mib: 4 }), "{reached}");
        watch.set_limit(Some(1 << 40)).unwrap();
        assert_eq!(watch.reached(), None);
        watch.set_limit(None).unwrap();
        assert_eq!(watch.reached(), None);
        assert_eq!(notices.take(), []);
        drop(mine);
    }

    #[test]
    fn the_owner_is_told_once_whatever_it_is_busy_with() {
        let (notifier, notices) = notice::channel().unwrap();
        let mut watch = PrivateWatch::new(notifier);
        let mine = vec![1u8; 8 << 20];
        for _ in 0..2 {
            watch.set_limit(Some(4)).unwrap();
            watch.start();
            let mut came = Vec::new();
            while came.is_empty() {
                std::thread::yield_now();
                came = notices.take();
            }
            let told = Notice::Halt(watch.reached().unwrap());
            assert_eq!((came.len(), std::mem::discriminant(&came[0])), (1, std::mem::discriminant(&told)));
        }
        watch.stop();
        drop(mine);
    }

    #[test]
    fn what_counts_may_come_after_long_lists() {
        let mut status = tempfile::tempfile().unwrap();
        write!(status, "Groups:\t{}\nRssAnon:\t 8 kB\nVmSwap:\t 4 kB\n", "1000000 ".repeat(10_000)).unwrap();
        assert_eq!(private_bytes(&status).unwrap(), 12 << 10);
    }
}
