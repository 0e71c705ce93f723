//! Guest memory: a private view over an immutable image, or, for a guest that was booted here, the image in the making.
//!
//! - [`layout`]: which guest-physical addresses are RAM (pure)
//! - [`limit`]: how much of it may be the guest's own (pure)
//! - [`freeze`]: turns the RAM of a booted guest into an immutable image without copying it
//! - [`changes`]: what a guest has made of its image
//! - [`image`]: the first view of an image that is not one raw file
//! - [`uffd`]: memory whose pages a page server provides: a view of its store, or anonymous memory that it copies pages into
//! - [`replay`]: gets pages ready that earlier clones have needed
//! - [`stand_in`]: serving page faults without a page server
//! - [`orphan`]: the store of a page server that is gone
//! - [`discard`]: pages that the guest gives back; [`ranges`] records which (pure), `pagemap` knows which were written since
//! - [`kinds`]: which pages are loaded, and which of them are shared
//! - [`lost`]: memory that is gone
//! - [`rollback`]: brings it back to what it was at a checkpoint; [`written`] logs what devices write, in sets of pages as
//!   [`bits`] (pure)
//! - `region`: a region of it as vm-memory sees it; `mmap`: the system calls that make and change mappings

pub mod bits;
pub mod changes;
pub mod discard;
pub mod freeze;
pub mod image;
pub mod kinds;
pub mod layout;
pub mod limit;
pub mod lost;
mod mmap;
pub mod orphan;
pub mod pagemap;
pub mod ranges;
pub mod region;
pub mod replay;
pub mod rollback;
pub mod stand_in;
pub mod uffd;
pub mod written;

use discard::Discarded;
use region::RamRegion;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use snapshot::manifest::MemoryRegion;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex};
use userfaultfd::Uffd;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionCollection, GuestRegionCollectionError,
};

/// Size of a page, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// Guest memory as devices see it.
pub type GuestMemory = GuestRegionCollection<RamRegion>;

/// Why guest memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// No memory file.
    #[error("cannot create a memory file of {size} bytes for guest RAM: {source}")]
    Create {
        /// Size asked for.
        size: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// No mapping.
    #[error("cannot map {size} bytes of guest RAM: {source}; check the address-space limit (ulimit -v) and overcommit")]
    Map {
        /// Size asked for.
        size: u64,
        /// What the kernel said.
        source: MmapRegionError,
    },
    /// The kernel refused advice about a mapping.
    #[error("cannot keep guest RAM out of core dumps and child processes: {0}")]
    Advise(io::Error),
    /// Regions do not fit together.
    #[error("guest RAM regions do not fit together: {0}")]
    Regions(#[from] GuestRegionCollectionError),
}

/// What lies under a guest's view of its memory.
#[derive(Debug)]
enum Backing {
    /// The guest was booted here and writes straight into this file, which becomes the image when it is frozen.
    Own(File),
    /// The guest has a private view over an immutable image, or a copy that is being made of one, but for what it has
    /// discarded.
    Image(Discarded),
}

/// The RAM of one guest.
#[derive(Debug)]
pub struct GuestRam {
    memory: GuestMemory,
    regions: Vec<MemoryRegion>,
    /// Whoever changes what is mapped holds the lock meanwhile.
    backing: Arc<Mutex<Backing>>,
}

impl GuestRam {
    /// Fresh RAM, all zero, for a guest that is going to boot.
    pub fn fresh(size: u64) -> Result<Self, MemoryError> {
        let create = |source: rustix::io::Errno| MemoryError::Create { size, source: source.into() };
        let fd = memfd_create("coppice-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).map_err(create)?;
        ftruncate(&fd, size).map_err(create)?;
        let file = File::from(fd);
        let regions = layout::ram_regions(size);
        let memory = map(Some(&file), &regions, libc::MAP_SHARED)?;
        Ok(GuestRam { memory, regions, backing: Arc::new(Mutex::new(Backing::Own(file))) })
    }

    /// A private view over an image: what the guest writes stays its own.
    pub fn private_view(image: &File, regions: Vec<MemoryRegion>) -> Result<Self, MemoryError> {
        let memory = map(Some(image), &regions, libc::MAP_PRIVATE)?;
        Ok(GuestRam { memory, regions, backing: Arc::new(Mutex::new(Backing::Image(Discarded::default()))) })
    }

    /// Anonymous memory, to be registered with `uffd` before its first access, into which somebody copies an image: each page
    /// before the guest has it.
    pub fn copied_into(uffd: Arc<Uffd>, regions: Vec<MemoryRegion>) -> Result<Self, MemoryError> {
        let memory = map(None, &regions, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)?;
        Ok(GuestRam { memory, regions, backing: Arc::new(Mutex::new(Backing::Image(Discarded::waking(uffd)))) })
    }

    /// The memory, for devices and loaders.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Where RAM lies in the guest and in the image, in order of guest address.
    pub fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    /// Size of RAM, in bytes.
    pub fn size(&self) -> u64 {
        self.regions.iter().map(|r| r.size_bytes).sum()
    }

    /// The file that is mapped privately, if one is.
    pub fn store(&self) -> Option<Arc<File>> {
        let region = self.memory.iter().next()?;
        region.file_offset().map(|place| place.arc().clone())
    }

    /// Whether the file that is mapped, if one is, is shorter than what is mapped of it. Of an image of several files, the lowest.
    pub fn is_cut_short(&self) -> bool {
        let end = self.regions.iter().map(|region| region.offset + region.size_bytes).max().unwrap_or(0);
        self.store().is_some_and(|file| file.metadata().is_ok_and(|metadata| metadata.len() < end))
    }

    /// Each region with the address of its mapping in this process.
    pub fn mappings(&self) -> impl Iterator<Item = (MemoryRegion, *mut u8)> + '_ {
        self.regions.iter().copied().zip(self.memory.iter().map(|region| region.mapping().as_ptr()))
    }
}

/// Takes away what lies behind guest memory: from now on every access to it fails. For the end of a guest.
pub fn cut_off(memory: &GuestMemory) {
    for region in memory.iter() {
        if let Err(e) = mmap::cut_off(region.mapping()) {
            tracing::warn!("cannot take guest memory away: {e}");
        }
    }
}

/// Memory from guest address 0 on, for tests of who uses it.
#[cfg(test)]
pub fn from_zero(size: usize) -> GuestMemory {
    GuestRam::fresh(size as u64).unwrap().memory().clone()
}

/// Maps `regions` of `file`, or of no file, reserving nothing and kept out of core dumps and child processes, each where
/// huge pages can be mapped of what is behind it.
fn map(file: Option<&File>, regions: &[MemoryRegion], sharing: i32) -> Result<GuestMemory, MemoryError> {
    let file = file.map(File::try_clone).transpose().map_err(|source| MemoryError::Create { size: 0, source })?;
    let file = file.map(Arc::new);
    let mapped = regions
        .iter()
        .map(|region| {
            let place = file.as_ref().map(|file| FileOffset::from_arc(file.clone(), region.offset));
            let mapping = mmap::Mapping::new(place, region.size_bytes as usize, sharing | libc::MAP_NORESERVE)
                .map_err(|source| MemoryError::Map { size: region.size_bytes, source })?;
            mmap::keep_private(mapping.region()).map_err(MemoryError::Advise)?;
            RamRegion::new(mapping, GuestAddress(region.guest_addr))
                .ok_or(MemoryError::Regions(GuestRegionCollectionError::MemoryRegionOverlap))
        })
        .collect::<Result<Vec<_>, _>>()?;
    debug_assert!(mapped.iter().zip(regions).all(|(m, r)| m.len() == r.size_bytes));
    Ok(GuestMemory::from_regions(mapped)?)
}
