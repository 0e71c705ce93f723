//! Huge pages: what a store holds without gaps is moved into pages of 2 MiB, on a thread that has the time.
//!
//! ```text
//!   Store::fill --a block of 2 MiB is complete--> Store --tick--> Joiner --queue--> thread: MADV_COLLAPSE, one by one
//! ```
//!
//! Only complete blocks are, so that a page is still there or not for itself, and the store holds as many pages after it as
//! before. Nobody waits for the thread, and a block that the kernel does not take is left as it is, for good: a guest never
//! knows. It is done a tick later, and so not while the guests that have just been woken look for the pages.

use crate::mmap::Block;
use std::io;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};

/// Whether stores are moved into huge pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HugePages {
    /// They are not.
    #[default]
    Never,
    /// Each block is, once all of it is there.
    Collapse,
}

/// What was neither.
#[derive(Debug, thiserror::Error)]
#[error("`{0}`: it is `never` or `collapse`")]
pub struct NotHugePages(String);

impl FromStr for HugePages {
    type Err = NotHugePages;

    fn from_str(text: &str) -> Result<Self, NotHugePages> {
        match text {
            "never" => Ok(HugePages::Never),
            "collapse" => Ok(HugePages::Collapse),
            _ => Err(NotHugePages(text.to_string())),
        }
    }
}

/// How often that was done, and how often the kernel did not.
#[derive(Debug, Default)]
struct Counters {
    collapsed: AtomicU64,
    failed: AtomicU64,
}

/// The event loop's side of the thread.
#[derive(Debug)]
pub struct Joiner {
    blocks: mpsc::Sender<Block>,
    counters: Arc<Counters>,
}

impl Joiner {
    /// Starts the thread. It ends when this is dropped, and is not waited for.
    pub fn start() -> io::Result<Self> {
        let (sender, blocks) = mpsc::channel();
        let counters = Arc::new(Counters::default());
        let shared = counters.clone();
        std::thread::Builder::new().name("huge-pages".into()).spawn(move || work(&blocks, &shared))?;
        Ok(Self { blocks: sender, counters })
    }

    /// Has a block collapsed. Each comes once in the life of its store, which bounds how many wait.
    pub fn want(&self, block: Block) {
        let _ = self.blocks.send(block); // Without the thread it stays as it is.
    }

    /// Blocks that are huge pages now, or have been, and those that the kernel did not take.
    pub fn counts(&self) -> (u64, u64) {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (get(&self.counters.collapsed), get(&self.counters.failed))
    }
}

/// What the thread does until there is nobody any more to tell it.
fn work(blocks: &mpsc::Receiver<Block>, counters: &Counters) {
    crate::sandbox::confine(crate::sandbox::Kind::Memory);
    let mut said = false;
    for block in blocks {
        match block.collapse() {
            None => {}
            Some(Ok(())) => drop(counters.collapsed.fetch_add(1, Ordering::Relaxed)),
            Some(Err(error)) => {
                counters.failed.fetch_add(1, Ordering::Relaxed);
                if !std::mem::replace(&mut said, true) {
                    tracing::warn!(
                        "huge pages: {error}: {}; that part of a store stays in pages of 4 KiB",
                        why(&error)
                    );
                }
            }
        }
    }
}

/// What is missing if the kernel answers that.
fn why(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EAGAIN) => "pages were in use".into(),
        Some(libc::ENOMEM) => "the host has no 2 MiB of memory in one piece".into(),
        Some(libc::EBUSY) => "the memory cgroup of the page server is full".into(),
        _ => Settings::read().obstacle().unwrap_or("it needs Linux 6.1 or newer").into(),
    }
}

/// Settings of the host that forbid huge pages in stores, as far as they can be read.
#[derive(Debug, Default)]
pub struct Settings {
    /// `transparent_hugepage/shmem_enabled`.
    shmem: Option<String>,
    /// `transparent_hugepage/hugepages-2048kB/shmem_enabled`, from Linux 6.11 on.
    shmem_2m: Option<String>,
    /// `/proc/self/status`.
    status: Option<String>,
}

impl Settings {
    /// As they are now, for this process.
    pub fn read() -> Self {
        let thp = |name: &str| std::fs::read_to_string(format!("/sys/kernel/mm/transparent_hugepage/{name}")).ok();
        let status = std::fs::read_to_string("/proc/self/status").ok();
        Self { shmem: thp("shmem_enabled"), shmem_2m: thp("hugepages-2048kB/shmem_enabled"), status }
    }

    /// What must change, to judge by these settings.
    pub fn obstacle(&self) -> Option<&'static str> {
        let has = |text: &Option<String>, part: &str| text.as_ref().is_some_and(|text| text.contains(part));
        if self.shmem.is_none() {
            Some("the kernel has no transparent huge pages for shared memory")
        } else if has(&self.shmem, "[deny]") {
            Some("/sys/kernel/mm/transparent_hugepage/shmem_enabled says `deny`: any other value will do")
        } else if self.shmem_2m.is_some() && !has(&self.shmem_2m, "[inherit]") && !has(&self.shmem_2m, "[always]") {
            Some("/sys/kernel/mm/transparent_hugepage/hugepages-2048kB/shmem_enabled must be `inherit`")
        } else if has(&self.status, "THP_enabled:\t0") {
            Some("whoever started this process has switched huge pages off for it (PR_SET_THP_DISABLE)")
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let settings = |shmem: &str, shmem_2m: &str, status: &str| Settings {
            shmem: Some(shmem.into()),
            shmem_2m: Some(shmem_2m.into()),
            status: Some(status.into()),
        };
        let on = "THP_enabled:\t1\n";
        for (settings, part) in [
            (Settings::default(), "no transparent huge pages"),
            (settings("always never [deny] force\n", "[inherit] never\n", on), "says `deny`"),
            (settings("always [never] deny force\n", "inherit [never]\n", on), "must be `inherit`"),
            (settings("always [never] deny force\n", "[inherit] never\n", "THP_enabled:\t0\n"), "PR_SET_THP_DISABLE"),
        ] {
            let obstacle = settings.obstacle().unwrap_or_default();
            assert!(obstacle.contains(part), "{settings:?}: {obstacle}");
        }
        assert_eq!(settings("always [never] deny force\n", "[inherit] never\n", on).obstacle(), None);
        assert!(why(&io::Error::from_raw_os_error(libc::ENOMEM)).contains("in one piece"));
    }

    #[test]
    fn it_is_never_or_collapse() {
        assert_eq!("collapse".parse::<HugePages>().unwrap(), HugePages::Collapse);
        assert_eq!("never".parse::<HugePages>().unwrap(), HugePages::Never);
        assert!("2M".parse::<HugePages>().unwrap_err().to_string().contains("`2M`"));
    }
}
