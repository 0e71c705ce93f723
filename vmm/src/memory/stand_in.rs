//! Serving a guest's page faults without a page server, from the snapshot's own memory image.
//!
//! A page that was never touched is read from the image, checked, and put into the guest's view by `UFFDIO_COPY`: as private
//! memory, since only the server can fill the store that guests share. Nobody else need be kept from serving meanwhile. A page is
//! put only where none is, and whoever puts it there puts the same bytes; what the guest has discarded is registered no more.

use super::PAGE_SIZE;
use super::uffd::wake_all;
use api_spec::handshake::Region;
use snapshot::image::{ImageError, MemoryImage};
use snapshot::load::Snapshot;
use std::io;
use std::sync::Arc;
use uffd_handler::ahead::Ahead;
use uffd_handler::events::{BATCH, EventReader};
use uffd_handler::faults::Outcome;
use uffd_handler::mmap::give_page;
use uffd_handler::region::{CHUNK_PAGES, CHUNK_SIZE, RegionError, Regions};
use userfaultfd::Uffd;

/// Chunks that are kept, in case that their other pages are wanted too: 1 MiB.
const RECENT: usize = 16;
/// Attempts at a copy that the kernel asks to repeat, before it counts as failed.
const COPY_ATTEMPTS: u32 = 1000;
/// Batches of events that are answered at a time.
const BATCHES_IN_A_TURN: usize = 16;

/// Why faults cannot be served here.
#[derive(Debug, thiserror::Error)]
pub enum StandInError {
    /// The image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The image is of another size than the guest's memory.
    #[error(transparent)]
    Regions(#[from] RegionError),
    /// The userfaultfd cannot be read.
    #[error("page faults cannot be read: {0}")]
    Read(io::Error),
    /// A page is not taken by the kernel, mostly for want of memory.
    #[error("the kernel does not take the page at {0:#x}: {1}; is the host out of memory?")]
    Copy(u64, io::Error),
    /// Nobody can be woken.
    #[error("who waits for a page cannot be woken: {0}")]
    Wake(userfaultfd::Error),
    /// A fault where there is no guest memory.
    #[error("a page fault at {0:#x}, where no guest memory is")]
    Outside(u64),
}

/// Serves one guest.
#[derive(Debug)]
pub struct StandIn {
    uffd: Arc<Uffd>,
    regions: Regions,
    ranges: Vec<Region>,
    image: MemoryImage,
    faults: EventReader,
    /// The chunks that were read last, each with its number.
    recent: Vec<(u64, Vec<u8>)>,
    next: usize,
    ahead: Ahead,
}

impl StandIn {
    /// Opens the image of `snapshot`, and wakes all who wait for pages in `ranges`: whoever served them until now may have read of
    /// their faults, and never answer.
    pub fn begin(snapshot: &Snapshot, uffd: Arc<Uffd>, ranges: &[Region]) -> Result<Self, StandInError> {
        let image = MemoryImage::open(snapshot)?;
        let regions = Regions::check(ranges.to_vec(), image.size())?;
        wake_all(&uffd, ranges).map_err(StandInError::Wake)?;
        Ok(StandIn {
            uffd,
            regions,
            ranges: ranges.to_vec(),
            image,
            faults: EventReader::new(),
            recent: Vec::new(),
            next: 0,
            ahead: Ahead::of_pages(),
        })
    }

    /// Begins once more, as [`StandIn::begin`] does.
    pub fn begin_again(&self) -> Result<(), StandInError> {
        wake_all(&self.uffd, &self.ranges).map_err(StandInError::Wake)
    }

    /// Whether these are the bytes of a page of the image. False if that cannot be told.
    pub fn is_right(&mut self, page: u64, bytes: io::Result<Vec<u8>>) -> bool {
        let start = (page % CHUNK_PAGES * PAGE_SIZE) as usize;
        let Ok(slot) = self.chunk(page / CHUNK_PAGES) else { return false };
        bytes.is_ok_and(|bytes| self.recent[slot].1[start..start + PAGE_SIZE as usize] == bytes[..])
    }

    /// Answers the faults that wait, without waiting for more; returns how many those were.
    pub fn serve(&mut self) -> Result<u64, StandInError> {
        let mut served = 0;
        for _ in 0..BATCHES_IN_A_TURN {
            let read = self.faults.read(&self.uffd).map_err(StandInError::Read)?;
            let addresses = self.faults.addresses().to_vec();
            for address in addresses {
                self.answer(address)?;
                served += 1;
            }
            if read < BATCH {
                break;
            }
        }
        Ok(served)
    }

    /// Puts a page of the image into the guest's view, unless something is there already, or it is registered no more. Tells the
    /// address if something is.
    pub fn provide(&mut self, page: u64) -> Result<Option<u64>, StandInError> {
        let offset = page * PAGE_SIZE;
        let within = |range: &&Region| (range.offset..range.offset + range.size).contains(&offset);
        let Some(range) = self.ranges.iter().find(within) else { return Ok(None) };
        let address = range.base_host_virt_addr + (offset - range.offset);
        // Where the guest has put something in its place nobody sees the store.
        Ok((self.put(address, page)? == Outcome::Present).then_some(address))
    }

    fn answer(&mut self, address: u64) -> Result<(), StandInError> {
        let fault = self.regions.locate(address).ok_or(StandInError::Outside(address))?;
        let place = address & !(PAGE_SIZE - 1);
        if self.put(place, fault.page)? != Outcome::Placed {
            // It is there already, or is no more to come: so whoever waits need not.
            self.uffd.wake(place as *mut _, PAGE_SIZE as usize).map_err(StandInError::Wake)?;
        }
        // Whatever becomes of those: they are asked for again if need be.
        for ahead in self.ahead.at(fault.page).skip(1) {
            if !fault.wake.contains(&(place + (ahead - fault.page) * PAGE_SIZE)) {
                break;
            }
            if !matches!(self.put(place + (ahead - fault.page) * PAGE_SIZE, ahead), Ok(Outcome::Placed)) {
                break;
            }
        }
        Ok(())
    }

    /// Puts a page of the image at an address, if that is to be done.
    fn put(&mut self, place: u64, page: u64) -> Result<Outcome, StandInError> {
        let slot = self.chunk(page / CHUNK_PAGES)?;
        let start = (page % CHUNK_PAGES * PAGE_SIZE) as usize;
        let bytes = &self.recent[slot].1[start..start + PAGE_SIZE as usize];
        for _ in 0..COPY_ATTEMPTS {
            match give_page(&self.uffd, place, bytes).map_err(|error| StandInError::Copy(place, error))? {
                // The mappings of this process change just now.
                Outcome::Again => {}
                outcome => return Ok(outcome),
            }
        }
        Err(StandInError::Copy(place, io::ErrorKind::WouldBlock.into()))
    }

    /// Has a chunk among the recent ones, and tells where.
    fn chunk(&mut self, number: u64) -> Result<usize, StandInError> {
        if let Some(slot) = self.recent.iter().position(|(recent, _)| *recent == number) {
            return Ok(slot);
        }
        let slot = self.next % RECENT;
        if slot == self.recent.len() {
            self.recent.push((number, vec![0; CHUNK_SIZE as usize]));
        }
        // Not found under any number unless the read succeeds.
        self.recent[slot].0 = u64::MAX;
        self.image.read_chunk(number, &mut self.recent[slot].1)?;
        self.recent[slot].0 = number;
        self.next = slot + 1;
        Ok(slot)
    }
}
