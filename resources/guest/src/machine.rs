//! The machine as the agent sees it.

use crate::loader::Boot;
use crate::virtio::{Balloon, Disk};
use crate::{hw, smp, stub};
use api_spec::agent::burn::Burn;
use api_spec::agent::pattern::WORDS;
use api_spec::agent::{GuestKind, Info, Pages, Refusal};
use core::ptr::{with_exposed_provenance, with_exposed_provenance_mut};
use embedded_guest::agent::{Machine, Transfer};
use embedded_guest::ram::{DIRECTORY_SPAN, HIGH, WorkPages};

/// This machine.
pub struct Hardware {
    info: Info,
    pages: WorkPages,
    generation: Option<u64>,
    cpus: smp::Cpus,
    balloon: Option<Balloon>,
    disk: Option<Disk>,
}

impl Hardware {
    /// The machine that the loader describes, with all its CPUs up.
    #[cold]
    pub fn new(boot: &Boot) -> Self {
        const MAPPED: u64 = 1 << 32;
        map_high(&boot.pages);
        let cpus = smp::Cpus::bring_up(boot.cmdline.vcpus.unwrap_or(1));
        let info = Info {
            kind: GuestKind::Embedded,
            vcpus: cpus.count(),
            pages: boot.pages.count(),
            pages_base: boot.pages.base,
        };
        let generation = boot.cmdline.generation.filter(|&address| address <= MAPPED - 16);
        Hardware { info, pages: boot.pages, generation, cpus, balloon: Balloon::find(boot), disk: Disk::find(boot) }
    }
}

/// Maps the work pages above the hole for ring 3, as the stub maps everything below: in 2 MiB pages, accessed and dirty
/// already. Nothing has to be flushed, as nothing was mapped there.
#[cold]
fn map_high(pages: &WorkPages) {
    const LARGE: u64 = 2 << 20;
    const TABLE: u64 = 0x67;
    const LARGE_PAGE: u64 = 0xe7;
    let write = |table: u64, index: u64, entry: u64| {
        let place = with_exposed_provenance_mut::<u64>((table + 8 * index) as usize);
        // SAFETY: an entry of a table of 512; either of the stub's, which is not in use, or of a page that is nobody's.
        unsafe { place.write_volatile(entry) };
    };
    for number in 0..pages.directory_count() {
        let (directory, start) = (pages.directories + 4096 * number, HIGH + DIRECTORY_SPAN * number);
        for index in 0..DIRECTORY_SPAN / LARGE {
            write(directory, index, (start + LARGE * index) | LARGE_PAGE);
        }
        write(stub::page_directory_pointers_table(), start / DIRECTORY_SPAN, directory | TABLE);
    }
}

impl Machine for Hardware {
    fn info(&self) -> Info {
        self.info
    }

    fn page(&mut self, number: u32) -> &mut [u64; WORDS] {
        assert!(number < self.info.pages);
        let address = self.pages.address(number);
        // SAFETY: work pages are RAM that nothing else in this program refers to; the borrow of `self` makes this the
        // only reference to one.
        unsafe { &mut *with_exposed_provenance_mut(address as usize) }
    }

    fn generation(&self) -> [u8; 16] {
        // SAFETY: the command line says that the vmm writes its generation id there; it does so while the vCPUs stand.
        self.generation
            .map_or([0; 16], |address| unsafe { with_exposed_provenance::<[u8; 16]>(address as usize).read_volatile() })
    }

    fn tsc(&self) -> u64 {
        hw::tsc()
    }

    fn burn(&mut self, steps: u64) -> Burn {
        smp::burn_steps(steps)
    }

    fn burn_start(&mut self, vcpu: u8) -> Result<(), Refusal> {
        self.cpus.burn_start(vcpu)
    }

    fn burn_stop(&mut self, vcpu: u8) -> Result<Burn, Refusal> {
        self.cpus.burn_stop(vcpu)
    }

    fn give_back(&mut self, pages: Pages) -> Result<(), Refusal> {
        let balloon = self.balloon.as_mut().ok_or(Refusal::NotHere)?;
        if balloon.give(pages.numbers().map(|number| self.pages.address(number))) {
            Ok(())
        } else {
            self.balloon = None;
            Err(Refusal::NotHere)
        }
    }

    fn disk(&mut self, transfer: Transfer, pages: Pages) -> Result<(), Refusal> {
        let disk = self.disk.as_mut().ok_or(Refusal::NotHere)?;
        for number in pages.numbers() {
            if !disk.transfer(transfer, self.pages.address(number), number) {
                return Err(Refusal::NotHere);
            }
        }
        Ok(())
    }

    fn reset(&mut self) {
        hw::reset()
    }
}
