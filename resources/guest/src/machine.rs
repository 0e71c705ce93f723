//! The machine as the agent sees it.

use crate::loader::Boot;
use crate::virtio::Balloon;
use crate::{hw, smp};
use api_spec::agent::burn::Burn;
use api_spec::agent::pattern::WORDS;
use api_spec::agent::{GuestKind, Info, Pages, Refusal};
use core::ptr::{with_exposed_provenance, with_exposed_provenance_mut};
use embedded_guest::agent::Machine;

/// This machine.
pub struct Hardware {
    info: Info,
    generation: Option<u64>,
    cpus: smp::Cpus,
    balloon: Option<Balloon>,
}

impl Hardware {
    /// The machine that the loader describes, with all its CPUs up.
    #[cold]
    pub fn new(boot: &Boot) -> Self {
        const MAPPED: u64 = 1 << 32;
        let cpus = smp::Cpus::bring_up(boot.cmdline.vcpus.unwrap_or(1));
        let info = Info {
            kind: GuestKind::Embedded,
            vcpus: cpus.count(),
            pages: boot.pages.count,
            pages_base: boot.pages.base,
        };
        let generation = boot.cmdline.generation.filter(|&address| address <= MAPPED - 16);
        Hardware { info, generation, cpus, balloon: Balloon::find(boot) }
    }
}

impl Machine for Hardware {
    fn info(&self) -> Info {
        self.info
    }

    fn page(&mut self, number: u32) -> &mut [u64; WORDS] {
        assert!(number < self.info.pages);
        let address = self.info.pages_base + 4096 * u64::from(number);
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
        let base = self.info.pages_base;
        if balloon.give(pages.numbers().map(|number| base + 4096 * u64::from(number))) {
            Ok(())
        } else {
            self.balloon = None;
            Err(Refusal::NotHere)
        }
    }

    fn reset(&mut self) {
        hw::reset()
    }
}
