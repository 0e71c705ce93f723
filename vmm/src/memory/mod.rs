//! Guest memory: a private view over an immutable image, or, for a guest that was booted here, the image in the making.
//!
//! - [`layout`]: which guest-physical addresses are RAM (pure)
//! - [`limit`]: how much of it may be the guest's own (pure)
//! - [`freeze`]: turns the RAM of a booted guest into an immutable image without copying it
//! - [`changes`]: what a guest has made of its image
//! - [`image`]: the first view of an image that is not one raw file
//! - [`layer`]: files that are mapped over an image
//! - [`uffd`]: memory whose pages a page server provides: a view of its store, or anonymous memory that it copies pages into
//! - [`replay`]: gets pages ready that earlier clones have needed
//! - [`stand_in`]: serving page faults without a page server
//! - [`orphan`]: the store of a page server that is gone
//! - [`discard`]: pages that the guest gives back; [`ranges`] records which (pure), `pagemap` knows which were written since
//! - [`kinds`]: which pages are loaded, and which of them are shared
//! - [`lost`]: memory that is gone; [`program`]: the memory that this program's own code is in
//! - [`rollback`]: brings it back to what it was at a checkpoint; [`written`] logs what devices write, in sets of pages as
//!   [`bits`] (pure)
//! - `region`: a region of it as vm-memory sees it; `mmap`: the system calls that make and change mappings

pub mod bits;
pub mod changes;
pub mod discard;
pub mod freeze;
pub mod image;
pub mod kinds;
pub mod layer;
pub mod layout;
pub mod limit;
pub mod lost;
mod mmap;
pub mod orphan;
pub mod pagemap;
pub mod program;
pub mod ranges;
pub mod region;
pub mod replay;
pub mod rollback;
pub mod stand_in;
pub mod uffd;
pub mod written;

use crate::devices::lock;
use discard::Discarded;
use layer::{Layer, Spare};
use mmap::Mapping;
use pagemap::Pagemap;
use region::RamRegion;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use snapshot::manifest::MemoryRegion;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, OnceLock};
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
    #[error("cannot create a memory file of {size} bytes for guest RAM: {}", snapshot::told(.source))]
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
    /// An image cannot be mapped where addresses are reserved for it.
    #[error("cannot map {size} bytes of an image as guest RAM: {source}; check the number of mappings and overcommit")]
    Show {
        /// How much.
        size: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// No descriptor.
    #[error("cannot keep the file that guest RAM shows: {0}; the limit on open files may be reached (ulimit -n)")]
    Keep(io::Error),
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
    /// The file that is mapped, if one is. Of an image of several files, the lowest.
    file: Option<Arc<File>>,
    /// What is mapped over that, if the image is of several files, the uppermost first: each, and where that ends in it, in bytes.
    above: Vec<(Layer, u64)>,
    /// Room for a copy of what the guest has changed.
    spare: Spare,
    /// What tells which pages the guest has of its own.
    pagemap: OnceLock<Pagemap>,
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
        let mapped = Arc::new(file.try_clone().map_err(|source| MemoryError::Create { size, source })?);
        let memory = share(&mapped, &regions)?;
        let backing = Arc::new(Mutex::new(Backing::Own(file)));
        Ok(GuestRam {
            memory,
            regions,
            file: Some(mapped),
            above: Vec::new(),
            spare: Spare::default(),
            pagemap: OnceLock::new(),
            backing,
        })
    }

    /// Addresses for RAM, and nothing behind them yet: whoever accesses them dies of it. A VM and its devices can be built
    /// around them before it is known which image they are to show.
    pub fn reserve(regions: Vec<MemoryRegion>) -> Result<Self, MemoryError> {
        let memory = place(&regions, |region, len| Mapping::reserve(len, region.offset))?;
        let backing = Arc::new(Mutex::new(Backing::Image(Discarded::default())));
        Ok(GuestRam {
            memory,
            regions,
            file: None,
            above: Vec::new(),
            spare: Spare::default(),
            pagemap: OnceLock::new(),
            backing,
        })
    }

    /// Shows an image where nothing was yet, as a private view: what the guest writes stays its own.
    pub fn show(&mut self, image: &File) -> Result<(), MemoryError> {
        for (region, mapped) in self.regions.iter().zip(self.memory.iter()) {
            mmap::map_over(mapped.mapping(), 0..region.size_bytes, image, region.offset)
                .map_err(|source| MemoryError::Show { size: region.size_bytes, source })?;
        }
        self.file = Some(Arc::new(image.try_clone().map_err(MemoryError::Keep)?));
        Ok(())
    }

    /// Makes what was reserved anonymous memory, to be registered with `uffd` before its first access, into which somebody
    /// copies an image: each page before the guest has it.
    pub fn have_copied(&mut self, uffd: Arc<Uffd>) -> Result<(), MemoryError> {
        for mapped in self.memory.iter() {
            mmap::open_up(mapped.mapping())
                .map_err(|source| MemoryError::Show { size: mapped.mapping().size() as u64, source })?;
        }
        *lock(&self.backing) = Backing::Image(Discarded::waking(uffd));
        Ok(())
    }

    /// A private view over an image.
    #[cfg(test)]
    pub fn private_view(image: &File, regions: Vec<MemoryRegion>) -> Result<Self, MemoryError> {
        let mut ram = GuestRam::reserve(regions)?;
        ram.show(image)?;
        Ok(ram)
    }

    /// Anonymous memory into which somebody copies an image.
    #[cfg(test)]
    pub fn copied_into(uffd: Arc<Uffd>, regions: Vec<MemoryRegion>) -> Result<Self, MemoryError> {
        let mut ram = GuestRam::reserve(regions)?;
        ram.have_copied(uffd)?;
        Ok(ram)
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

    /// The file that is mapped, if one is.
    pub fn store(&self) -> Option<Arc<File>> {
        self.file.clone()
    }

    /// Whether a file that is mapped is shorter than what is mapped of it.
    pub fn is_cut_short(&self) -> bool {
        let end = self.regions.iter().map(|region| region.offset + region.size_bytes).max().unwrap_or(0);
        let is_short = |file: &File, end: u64| file.metadata().is_ok_and(|metadata| metadata.len() < end);
        self.store().is_some_and(|file| is_short(&file, end))
            || self.above.iter().any(|(layer, end)| is_short(&layer.file, *end))
    }

    /// Each region with the address of its mapping in this process.
    pub fn mappings(&self) -> impl Iterator<Item = (MemoryRegion, *mut u8)> + '_ {
        self.regions.iter().copied().zip(self.memory.iter().map(|region| region.mapping().as_ptr()))
    }
}

/// Takes away what lies behind guest memory: from now on every access to it fails. For the end of a guest.
pub fn cut_off(memory: &GuestMemory) {
    memory.iter().for_each(|region| mmap::cut_off(region.mapping()));
}

/// Puts zeros in the place of guest memory: from now on every access to it finds those, and waits for nobody. For a guest that
/// is not going to run.
pub fn blank(memory: &GuestMemory) {
    memory.iter().for_each(|region| mmap::blank(region.mapping()));
}

/// Memory from guest address 0 on, for tests of who uses it.
#[cfg(test)]
pub fn from_zero(size: usize) -> GuestMemory {
    GuestRam::fresh(size as u64).unwrap().memory().clone()
}

/// Maps regions of a file, for all who map it, kept out of core dumps and child processes.
fn share(file: &Arc<File>, regions: &[MemoryRegion]) -> Result<GuestMemory, MemoryError> {
    let memory = place(regions, |region, len| {
        let place = FileOffset::from_arc(file.clone(), region.offset);
        Mapping::new(place, len, libc::MAP_SHARED | libc::MAP_NORESERVE)
    })?;
    memory.iter().try_for_each(|region| mmap::keep_private(region.mapping())).map_err(MemoryError::Advise)?;
    Ok(memory)
}

/// Places regions: each where huge pages can be mapped of what is behind it.
fn place(
    regions: &[MemoryRegion],
    map: impl Fn(&MemoryRegion, usize) -> Result<Mapping, MmapRegionError>,
) -> Result<GuestMemory, MemoryError> {
    let mapped = regions
        .iter()
        .map(|region| {
            let mapping = map(region, region.size_bytes as usize)
                .map_err(|source| MemoryError::Map { size: region.size_bytes, source })?;
            RamRegion::new(mapping, GuestAddress(region.guest_addr))
                .ok_or(MemoryError::Regions(GuestRegionCollectionError::MemoryRegionOverlap))
        })
        .collect::<Result<Vec<_>, _>>()?;
    debug_assert!(mapped.iter().zip(regions).all(|(m, r)| m.len() == r.size_bytes));
    Ok(GuestMemory::from_regions(mapped)?)
}
