//! Freezing: the RAM of a booted guest becomes an immutable image, and the guest goes on with a private view of it.
//!
//! ```text
//!   before    guest --shared-->  memory file
//!   freeze    guest --private->  memory file (sealed: nobody can begin to write it)      old mapping set aside
//!   later     guest --private->  memory file (sealed: nobody can write it)               old mapping gone
//! ```
//!
//! Nothing is copied and nothing is torn down while the guest stands still.

use super::discard::Discarded;
use super::{Backing, GuestRam, mmap};
use crate::devices::lock;
use rustix::fs::{SealFlags, fcntl_add_seals};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::time::{Duration, Instant};
use vm_memory::GuestMemoryBackend;

/// Why memory could not be frozen.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// A mapping could not be replaced. The guest goes on.
    #[error("cannot replace the mapping of guest RAM by a private one: {0}")]
    Remap(io::Error),
    /// The file could not be sealed.
    #[error("cannot seal the memory file: {0}")]
    Seal(io::Error),
}

/// An image that was frozen a moment ago. [`Frozen::finish`] does the part that may take long.
#[derive(Debug)]
pub struct Frozen {
    file: File,
    aside: Vec<mmap::Aside>,
}

/// How long to wait for the last writer's mapping to go before the image counts as writable, which would be a defect.
const SEAL_DEADLINE: Duration = Duration::from_secs(5);

impl GuestRam {
    /// Freezes the memory of a guest that was booted here; `None` if the guest is a private view already.
    ///
    /// All vCPUs must stand still and no other thread may access guest memory.
    pub fn freeze(&mut self) -> Result<Option<Frozen>, FreezeError> {
        // Once one region is private its writes no longer reach the file, so whatever fails from there on, this guest is
        // a view, whose next snapshot is copied.
        let mut backing = lock(&self.backing);
        // Nothing is anonymous yet: what a guest on a file of its own discards is a hole of that file.
        let file = match std::mem::replace(&mut *backing, Backing::Image(Discarded::default())) {
            Backing::Own(file) => file,
            view => {
                *backing = view;
                return Ok(None);
            }
        };
        let mut aside = Vec::with_capacity(self.regions.len());
        for (region, mapped) in self.regions.iter().zip(self.memory.iter()) {
            match mmap::make_private(mapped.mapping(), &file, region.offset) {
                Ok(old) => aside.push(old),
                Err(e) => {
                    *backing = match aside.is_empty() {
                        true => Backing::Own(file),
                        false => Backing::Image(Discarded::of_mixed()),
                    };
                    return Err(FreezeError::Remap(e));
                }
            }
        }
        fcntl_add_seals(&file, SealFlags::FUTURE_WRITE | SealFlags::GROW | SealFlags::SHRINK)
            .map_err(|e| FreezeError::Seal(e.into()))?;
        Ok(Some(Frozen { file, aside }))
    }
}

impl Frozen {
    /// Drops the old mappings and seals the file against every write. Takes milliseconds per GiB: not for a thread that
    /// the guest waits for.
    pub fn finish(self) -> Result<File, FreezeError> {
        let Frozen { file, aside } = self;
        drop(aside);
        let deadline = Instant::now() + SEAL_DEADLINE;
        loop {
            match fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::SEAL) {
                Ok(()) => return Ok(file),
                // A page that is pinned for a moment (by KVM or a system call) counts as a writer.
                Err(Errno::BUSY) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
                Err(e) => return Err(FreezeError::Seal(e.into())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn a_frozen_image_keeps_its_bytes_and_the_guest_goes_on() {
        let mut ram = GuestRam::fresh(16 << 20).unwrap();
        let memory = ram.memory().clone();
        memory.write_slice(b"before", GuestAddress(0x5000)).unwrap();
        let frozen = ram.freeze().unwrap().expect("was booted here");
        memory.write_slice(b"after!", GuestAddress(0x5000)).unwrap();
        let file = frozen.finish().unwrap();

        let (mut image, mut view) = ([0; 6], [0; 6]);
        file.read_exact_at(&mut image, 0x5000).unwrap();
        memory.read_slice(&mut view, GuestAddress(0x5000)).unwrap();
        assert_eq!((&image, &view), (b"before", b"after!"));
        assert!(file.write_at(b"x", 0).is_err(), "the image is sealed");
        assert!(ram.freeze().unwrap().is_none(), "a private view has nothing to freeze");
    }
}
