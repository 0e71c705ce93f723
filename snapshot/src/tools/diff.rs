//! What differs between two snapshots.

use super::Job;
use super::store::{CompareFault, compare};
use crate::image::{ImageError, MemoryImage, differing_pages};
use crate::load::{self, LoadError};
use crate::page_runs::PageRuns;
use crate::state::MachineState;
use serde::Serialize;
use std::fmt;
use std::path::{Path, PathBuf};

/// Runs that are shown to people.
const SHOWN_RUNS: usize = 20;

/// What differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// One snapshot.
    pub a: PathBuf,
    /// The other.
    pub b: PathBuf,
    /// Memory of each, in bytes.
    pub memory_bytes: u64,
    /// Chunks of memory in which they differ.
    pub chunks: u64,
    /// Pages.
    pub pages: u64,
    /// Bytes.
    pub bytes: u64,
    /// Those pages, as runs: first page, number of pages.
    pub runs: PageRuns,
    /// Parts of the state in which they differ.
    pub state: Vec<String>,
}

impl Difference {
    /// Whether there is none.
    pub fn is_none(&self) -> bool {
        self.chunks == 0 && self.state.is_empty()
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Difference { a, b, memory_bytes, chunks, pages, bytes, runs, state } = self;
        if self.is_none() {
            return writeln!(f, "{} and {} are the same machine at the same instant", a.display(), b.display());
        }
        writeln!(f, "{} and {} differ", a.display(), b.display())?;
        writeln!(f, "  memory   {bytes} bytes, in {pages} pages, in {chunks} chunks of {} MiB", memory_bytes >> 20)?;
        for run in runs.runs().iter().take(SHOWN_RUNS) {
            writeln!(f, "           pages {:#x} to {:#x} ({})", run.start, run.end - 1, run.end - run.start)?;
        }
        if let Some(more) = runs.runs().len().checked_sub(SHOWN_RUNS).filter(|more| *more > 0) {
            writeln!(f, "           and {more} runs more (--json has all)")?;
        }
        let same = ["none of it".to_owned()];
        writeln!(f, "  state    {}", if state.is_empty() { &same } else { &state[..] }.join(", "))
    }
}

/// Why two snapshots were not compared.
#[derive(Debug, thiserror::Error)]
pub enum DiffError {
    /// One cannot be read.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The memory of one cannot.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// Their machines have other memory.
    #[error("{a} has {a_bytes} bytes of memory and {b} has {b_bytes}: they are of different machines")]
    OtherSize {
        /// One snapshot.
        a: PathBuf,
        /// Its memory, in bytes.
        a_bytes: u64,
        /// The other.
        b: PathBuf,
        /// Its memory, in bytes.
        b_bytes: u64,
    },
    /// Cancelled on request.
    #[error("cancelled")]
    Cancelled,
}

impl From<CompareFault> for DiffError {
    fn from(fault: CompareFault) -> Self {
        match fault {
            CompareFault::Cancelled => DiffError::Cancelled,
            CompareFault::Image(error) => error.into(),
        }
    }
}

/// Compares memory and state of two snapshots, however they are stored.
pub fn diff(a: &Path, b: &Path, job: &Job<'_>) -> Result<Difference, DiffError> {
    let (left, right) = (load::open(a)?, load::open(b)?);
    let (a_bytes, b_bytes) = (left.manifest().memory.size_bytes, right.manifest().memory.size_bytes);
    let (a, b) = (left.dir().to_owned(), right.dir().to_owned());
    if a_bytes != b_bytes {
        return Err(DiffError::OtherSize { a, a_bytes, b, b_bytes });
    }
    let (mut chunks, mut bytes, mut pages) = (0, 0, Vec::new());
    let (left_image, right_image) = (MemoryImage::open(&left)?, MemoryImage::open(&right)?);
    compare(&left_image, &right_image, job.cancel, job.progress, |index, left, right| {
        chunks += 1;
        bytes += left.iter().zip(right).filter(|(left, right)| left != right).count() as u64;
        pages.extend(differing_pages(index, left, right).map(|(page, _)| page));
    })?;
    let runs = PageRuns::of_pages(pages);
    let state = state_differences(left.state(), right.state());
    Ok(Difference { a, b, memory_bytes: a_bytes, chunks, pages: runs.pages(), bytes, runs, state })
}

/// The parts in which two states differ.
fn state_differences(a: &MachineState, b: &MachineState) -> Vec<String> {
    let vcpus = (0..a.vcpus.len().max(b.vcpus.len())).filter(|number| a.vcpus.get(*number) != b.vcpus.get(*number));
    let vcpus = vcpus.map(|number| format!("vcpu {number}"));
    let others = [
        ("vm clock", a.vm.clock != b.vm.clock),
        ("vm timer", a.vm.pit != b.vm.pit),
        ("vm interrupt controllers", a.vm.irqchips != b.vm.irqchips),
        ("serial port", a.devices.serial != b.devices.serial),
        ("vsock", a.devices.vsock != b.devices.vsock),
        ("drives", a.devices.drives != b.devices.drives),
        ("network", a.devices.network != b.devices.network),
        ("entropy", a.devices.entropy != b.devices.entropy),
        ("balloon", a.devices.balloon != b.devices.balloon),
    ];
    vcpus.chain(others.into_iter().filter(|(_, differs)| *differs).map(|(name, _)| name.to_owned())).collect()
}
