//! A snapshot with known contents, and the one check that must hold after every step of a guest's life.

use crate::agent::Agent;
use crate::place::Place;
use crate::vm::{Boot, Vm};
use api_spec::agent::{Pages, Request, Response};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

/// The pattern of the working set.
pub const SEED: u64 = 0xc0_991c_e000;
/// Work pages behind the working set that checks write to.
const SCRATCH_PAGES: u32 = 4;

/// What kind of guest to make a template of.
#[derive(Clone, Copy, Debug)]
pub struct TemplateOptions {
    /// vCPUs.
    pub vcpus: u8,
    /// Guest memory, in MiB.
    pub memory_mib: u64,
    /// Memory with known contents, in MiB.
    pub working_set_mib: u32,
}

impl Default for TemplateOptions {
    fn default() -> Self {
        TemplateOptions { vcpus: 1, memory_mib: 32, working_set_mib: 4 }
    }
}

/// What is known of a guest and all its clones.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The boot nonce.
    pub nonce: [u8; 16],
    /// Timer interrupts that had been counted when these facts were gathered.
    pub ticks: u64,
    /// The pages that hold the pattern [`SEED`].
    pub working_set: Pages,
}

impl Facts {
    /// Fills the working set of a guest and gathers what is known of it.
    pub fn gather(agent: &mut Agent, working_set_mib: u32) -> Self {
        let working_set = Pages::run(0, working_set_mib << 8);
        agent.fill(working_set, SEED);
        Facts { nonce: agent.nonce(), ticks: agent.ticks(3), working_set }
    }

    /// First page behind those that belong to the working set and to [`Facts::check`].
    pub fn first_free_page(&self) -> u32 {
        self.working_set.count + SCRATCH_PAGES
    }

    /// The check that holds after boot, pause, resume, snapshot and restore, in the guest and in all its clones: it is
    /// the same boot, its timer goes on from where it was, its memory is whole, and it can write and read.
    #[track_caller]
    pub fn check(&self, agent: &mut Agent) {
        assert_eq!(agent.nonce(), self.nonce, "this is another boot");
        let before = agent.ticks(0);
        assert!(before >= self.ticks, "{before} ticks since boot, and there had been {}", self.ticks);
        let after = agent.ticks(2);
        assert!(after >= before + 2, "the timer stands still at {after}");
        assert_eq!(agent.mismatches(self.working_set, SEED), 0, "words of the working set are wrong");

        static NEXT: AtomicU64 = AtomicU64::new(1);
        let value = NEXT.fetch_add(1, Ordering::Relaxed);
        let scratch = Pages::run(self.working_set.count, SCRATCH_PAGES);
        agent.write(scratch, value);
        assert_eq!(agent.touch(scratch), value * u64::from(SCRATCH_PAGES), "what was written does not read back");
    }

    /// Has a guest check its working set piece by piece. After a quarter of it `end` is done, which takes away what serves
    /// its pages: it may fail to answer from then on, but not with a page that is wrong.
    pub fn check_until_the_end(&self, agent: &mut Agent, patience: Duration, end: impl FnOnce()) {
        let pages = self.working_set.count;
        let (mut end, mut verified) = (Some(end), 0);
        // Each request needs pages that were never touched; the end comes in the middle of it all.
        for first in (0..pages).step_by(16) {
            if first >= pages / 4
                && let Some(end) = end.take()
            {
                end();
            }
            match agent.try_ask_within(patience, Request::Verify { pages: Pages::run(first, 16), seed: SEED }) {
                Ok(answer) => assert_eq!(answer, Response::Mismatches(0), "pages from {first}"),
                Err(_) => break,
            }
            verified = first + 16;
        }
        assert!((pages / 4..pages).contains(&verified), "{verified} of {pages} pages were read");
    }
}

/// A snapshot of a guest that is gone, with what is known of it.
#[derive(Debug)]
pub struct Template {
    /// The directory that it lies in.
    pub place: Place,
    /// The snapshot.
    pub snapshot: PathBuf,
    /// The Unix socket of the vsock device of the guest that was snapshotted.
    pub recorded_vsock: PathBuf,
    /// What is known of its clones.
    pub facts: Facts,
}

impl Template {
    /// A snapshot of the same guest without its memory, for clones that get that from a page server: nothing can be written over it.
    pub fn without_memory(&self, place: &Place) -> PathBuf {
        let bare = place.join("without-memory");
        std::fs::create_dir(&bare).expect("a directory can be made in the test's directory");
        for name in ["snap.json", "state.bin"] {
            std::fs::copy(self.snapshot.join(name), bare.join(name)).expect("it can be copied");
        }
        bare
    }

    /// The template of the default options that the tests of one program share. It is made when the first of them asks
    /// for it, and removed when none of them has it any more.
    pub fn shared() -> Arc<Self> {
        static SHARED: Mutex<Weak<Template>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        shared.upgrade().unwrap_or_else(|| {
            let template = Arc::new(Template::make(TemplateOptions::default()));
            *shared = Arc::downgrade(&template);
            template
        })
    }

    /// Boots a guest, fills its working set, snapshots it and ends it.
    pub fn make(options: TemplateOptions) -> Self {
        let (template, _, parent) = Template::make_with_parent(options);
        parent.stop();
        template
    }

    /// As [`Template::make`], but the guest goes on.
    pub fn make_with_parent(options: TemplateOptions) -> (Self, Agent, Vm) {
        let place = Place::new();
        let TemplateOptions { vcpus, memory_mib, working_set_mib } = options;
        let (mut parent, mut agent) = Boot::new(&place).vcpus(vcpus).memory_mib(memory_mib).ready("parent");
        let facts = Facts::gather(&mut agent, working_set_mib);
        let snapshot = place.join("snapshot");
        parent.snapshot(&snapshot);
        let recorded_vsock = parent.vsock.clone();
        let mut agent = parent.agent();
        facts.check(&mut agent);
        (Template { place, snapshot, recorded_vsock, facts }, agent, parent)
    }
}
