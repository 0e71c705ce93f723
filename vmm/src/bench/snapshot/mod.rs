//! How long snapshots take, and what a guest notices of them: how long it stands still, and how much slower it writes
//! afterwards. And what it costs to restore from a chain of them, and to check one.
//!
//! Pauses are those that the vmm tells of. Each guest fills its memory with a pattern, and each snapshot that counts is
//! restored once, to see that the clone has all of that.

mod report;

pub use report::{Figure, Report, Restoring, Row, Verifying, Writing};

use super::guest::{Guest, PATIENCE, Taken, Workplace};
use super::{BenchError, io_error};
use api_spec::agent::burn::Burn;
use api_spec::agent::{Pages, Request, Response};
use api_spec::snapshot::{SnapshotCreate, SnapshotType};
use api_spec::vm::MachineConfig;
use serde::Serialize;
use snapshot::create::{FileSource, MemorySource};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How much longer a guest may take, and the disk, for each MiB in use.
const PATIENCE_PER_MIB: Duration = Duration::from_millis(50);
/// Memory of the guests, in MiB.
const SMALL_MIB: u64 = 128;
const LARGE_MIB: u64 = 2048;
/// Memory in use of those that have little in use, in MiB.
const USED_MIB: u64 = 8;
/// Most memory in use, in MiB: the guest needs some itself.
const MOST_MIB: u64 = LARGE_MIB - 64;
/// vCPUs of a guest all of whose vCPUs compute.
const BUSY: u8 = 4;
/// How much the first of them computes at a time, and how long after it has begun the snapshot is asked for.
const BURN: u64 = 100_000_000;
const A_MOMENT: Duration = Duration::from_millis(50);
/// How many pages clones write.
const WRITTEN: [u32; 2] = [64, 2048];
/// How many snapshots of changes lie over each other, and how many pages each of them has changed.
const CHAIN: u32 = 10;
const CHAIN_PAGES: u32 = 64;
/// What pages hold that a booted guest has filled, and those that a clone has.
const SEED: u64 = 0x0063_6f70_7069_6365;
const OTHER: u64 = 0x636c_6f6e_6500;
/// How much of a file is read at once, in bytes.
const BLOCK: usize = 1 << 20;

/// What to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// How often everything is measured.
    pub runs: u32,
    /// Memory in use of the guest that has much in use, in MiB.
    pub resident_mib: u64,
}

impl Default for Options {
    fn default() -> Self {
        Options { runs: 10, resident_mib: 1024 }
    }
}

impl Options {
    /// Whether the values make sense.
    pub fn check(&self) -> Result<(), String> {
        const LEAST: u64 = 2 * USED_MIB;
        if !(1..=100).contains(&self.runs) {
            return Err(format!("--n {}: must be 1 to 100", self.runs));
        }
        if !(LEAST..=MOST_MIB).contains(&self.resident_mib) {
            return Err(format!("--resident-mib {}: must be {LEAST} to {MOST_MIB}", self.resident_mib));
        }
        Ok(())
    }

    /// The guest that has much in use.
    fn resident(&self) -> Case {
        Case { used_mib: self.resident_mib, ..Case::booted(LARGE_MIB) }
    }

    /// Whatever is snapshotted and counts.
    fn cases(&self) -> Vec<Case> {
        let booted = [Case::booted(SMALL_MIB), Case::booted(LARGE_MIB), Case::busy(), self.resident()];
        booted.into_iter().chain([SMALL_MIB, LARGE_MIB].into_iter().flat_map(Case::clones)).collect()
    }

    fn patience(&self) -> Duration {
        PATIENCE + PATIENCE_PER_MIB * self.resident_mib as u32
    }
}

/// Which snapshot: of what kind of guest, and what of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Case {
    /// Which kind of guest.
    pub guest: Origin,
    /// Its memory, in MiB.
    pub memory_mib: u64,
    /// How much of that it has filled, in MiB.
    pub used_mib: u64,
    /// Its vCPUs. All of them compute if there is more than one.
    pub vcpus: u8,
    /// How many pages it has written since it was restored.
    pub written_pages: u32,
    /// The whole, or what has changed.
    pub snapshot_type: SnapshotType,
}

/// Where a guest has come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// It has booted, and this is its first snapshot: the one that freezes its memory.
    Booted,
    /// It was restored, from the memory file.
    Clone,
}

impl Case {
    /// Of a guest that has done no more than boot and fill some memory.
    const fn booted(memory_mib: u64) -> Self {
        Case {
            guest: Origin::Booted,
            memory_mib,
            used_mib: USED_MIB,
            vcpus: 1,
            written_pages: 0,
            snapshot_type: SnapshotType::Full,
        }
    }

    const fn busy() -> Self {
        Case { vcpus: BUSY, ..Case::booted(SMALL_MIB) }
    }

    /// Of clones with so much memory.
    fn clones(memory_mib: u64) -> impl Iterator<Item = Case> {
        let clone = Case { guest: Origin::Clone, ..Case::booted(memory_mib) };
        WRITTEN.into_iter().flat_map(move |written_pages| {
            [SnapshotType::Full, SnapshotType::Diff].map(|snapshot_type| Case { written_pages, snapshot_type, ..clone })
        })
    }

    fn machine(&self) -> MachineConfig {
        MachineConfig { vcpu_count: self.vcpus, mem_size_mib: self.memory_mib, ..Default::default() }
    }

    /// The pages that the guest has filled.
    fn used(&self) -> Pages {
        Pages::run(0, (self.used_mib << 8) as u32)
    }

    /// Those of them that it has written as a clone, and the others.
    fn contents(&self) -> [(Pages, u64); 2] {
        let written = self.written_pages;
        [(Pages::run(0, written), OTHER), (Pages::run(written, self.used().count - written), SEED)]
    }

    fn create(&self, path: PathBuf) -> SnapshotCreate {
        SnapshotCreate { snapshot_type: self.snapshot_type, ..SnapshotCreate::of(path) }
    }
}

/// What was found out so far.
#[derive(Default)]
struct Found {
    snapshots: Vec<(Case, Taken)>,
    writes: Vec<Writes>,
    restores: Vec<Restores>,
    checks: Vec<Checks>,
}

/// How long a guest took to write all that it uses.
struct Writes {
    memory_mib: u64,
    before: Duration,
    after: Duration,
}

/// How long it took from the start of a process to a clone's first reply.
struct Restores {
    chain: Duration,
    whole: Duration,
}

/// How long it took to check so many bytes, and only to read them.
struct Checks {
    bytes: u64,
    verify: Duration,
    read: Duration,
}

/// Measures.
pub fn run(options: &Options) -> Result<Report, BenchError> {
    let bench = Bench { options, place: Workplace::new(options.patience())? };
    let mut found = Found::default();
    for _ in 0..options.runs {
        bench.run_once(&mut found)?;
    }
    Ok(Report::new(options, &found))
}

struct Bench<'a> {
    options: &'a Options,
    place: Workplace,
}

impl Bench<'_> {
    fn run_once(&self, found: &mut Found) -> Result<(), BenchError> {
        for memory_mib in [SMALL_MIB, LARGE_MIB] {
            let room = self.place.room()?;
            let template = room.path().join("template");
            self.measure_first(Case::booted(memory_mib), &template, found)?;
            for case in Case::clones(memory_mib) {
                self.measure_clone(case, &template, found)?;
            }
            if memory_mib == SMALL_MIB {
                self.measure_chain(&template, found)?;
            }
        }
        self.measure_busy(found)?;
        self.measure_resident(found)
    }

    /// The first snapshot of a guest, and what that guest notices of it when it writes.
    fn measure_first(&self, case: Case, snapshot: &Path, found: &mut Found) -> Result<(), BenchError> {
        let mut guest = self.boot(case)?;
        let before = timed(|| guest.fill(case.used(), SEED))?;
        let taken = guest.api.snapshot(&case.create(snapshot.to_owned()))?;
        let after = timed(|| guest.fill(case.used(), SEED))?;
        found.snapshots.push((case, taken));
        found.writes.push(Writes { memory_mib: case.memory_mib, before, after });
        drop(guest);
        self.restore(snapshot, &case.contents()).map(drop)
    }

    /// A snapshot of a clone that has written some pages.
    fn measure_clone(&self, case: Case, template: &Path, found: &mut Found) -> Result<(), BenchError> {
        let room = self.place.room()?;
        let snapshot = room.path().join("snapshot");
        let (mut clone, _) = self.restore(template, &Case::booted(case.memory_mib).contents())?;
        clone.fill(Pages::run(0, case.written_pages), OTHER)?;
        found.snapshots.push((case, clone.api.snapshot(&case.create(snapshot.clone()))?));
        drop(clone);
        self.restore(&snapshot, &case.contents()).map(drop)
    }

    /// Restores of a clone that was snapshotted again and again, and then as a whole.
    fn measure_chain(&self, template: &Path, found: &mut Found) -> Result<(), BenchError> {
        let room = self.place.room()?;
        let path = |name: &str| room.path().join(name);
        let case = Case::booted(SMALL_MIB);
        let (mut clone, _) = self.restore(template, &case.contents())?;
        let (mut contents, mut last) = (Vec::new(), template.to_owned());
        for level in 0..CHAIN {
            let (pages, seed) = (Pages::run(level * CHAIN_PAGES, CHAIN_PAGES), OTHER + u64::from(level));
            clone.fill(pages, seed)?;
            contents.push((pages, seed));
            last = path(&format!("level-{level}"));
            let changes = Case { snapshot_type: SnapshotType::Diff, ..case };
            clone.api.snapshot(&changes.create(last.clone()))?;
        }
        let changed = CHAIN * CHAIN_PAGES;
        contents.push((Pages::run(changed, case.used().count - changed), SEED));
        let whole = path("whole");
        clone.api.snapshot(&case.create(whole.clone()))?;
        drop(clone);
        // Both once beforehand, so that the files are in memory, and known to be right, when it counts.
        self.restore(&last, &contents)?;
        self.restore(&whole, &contents)?;
        let (_, chain) = self.restore(&last, &contents)?;
        let (_, whole) = self.restore(&whole, &contents)?;
        found.restores.push(Restores { chain, whole });
        Ok(())
    }

    /// The first snapshot of a guest whose vCPUs all compute.
    fn measure_busy(&self, found: &mut Found) -> Result<(), BenchError> {
        let (case, room) = (Case::busy(), self.place.room()?);
        let snapshot = room.path().join("snapshot");
        let mut guest = self.boot(case)?;
        for vcpu in 1..case.vcpus {
            guest.ask(Request::BurnStart { vcpu })?;
        }
        found.snapshots.push((case, snapshot_while_burning(&mut guest, case.create(snapshot.clone()))?));
        drop(guest);
        // The clone answers when its first vCPU has done what the guest's was doing.
        let (mut clone, _) = self.restore(&snapshot, &case.contents())?;
        for vcpu in 1..case.vcpus {
            check_burn(clone.ask(Request::BurnStop { vcpu })?, |burn| burn.steps > 0)?;
        }
        Ok(())
    }

    /// The first snapshot of a guest that uses much memory, and how fast that can be checked.
    fn measure_resident(&self, found: &mut Found) -> Result<(), BenchError> {
        let (case, room) = (self.options.resident(), self.place.room()?);
        let snapshot = room.path().join("snapshot");
        let guest = self.boot(case)?;
        found.snapshots.push((case, guest.api.snapshot(&case.create(snapshot.clone()))?));
        drop(guest);
        self.restore(&snapshot, &case.contents())?;
        let image = snapshot.join(snapshot::file::MEMORY);
        let read = timed(|| read_all(&image).map_err(io_error("cannot read the memory of a snapshot")))?;
        let mut bytes = 0;
        let verify = timed(|| {
            bytes = snapshot::verify::verify(&snapshot)?.checked_bytes;
            Ok(())
        })?;
        found.checks.push(Checks { bytes, verify, read });
        Ok(())
    }

    /// Boots a guest and has it fill what it is to use.
    fn boot(&self, case: Case) -> Result<Guest, BenchError> {
        let mut guest = self.place.boot(case.machine())?;
        guest.fill(case.used(), SEED)?;
        Ok(guest)
    }

    /// Restores a clone and sees that its memory holds what it should. Gives the time from the start of its process to its
    /// first reply as well.
    fn restore(&self, snapshot: &Path, contents: &[(Pages, u64)]) -> Result<(Guest, Duration), BenchError> {
        let before = Instant::now();
        let mut clone = self.place.restore(snapshot, |_| ())?;
        let restored = before.elapsed();
        for &(pages, seed) in contents {
            if !clone.holds(pages, seed)? {
                return Err(BenchError::WrongPages("clone"));
            }
        }
        Ok((clone, restored))
    }
}

/// Takes a snapshot while the guest's first vCPU computes, as the others do already.
fn snapshot_while_burning(guest: &mut Guest, create: SnapshotCreate) -> Result<Taken, BenchError> {
    let api = guest.api.clone();
    std::thread::scope(|scope| {
        let taking = std::thread::Builder::new().name("snapshot".into()).spawn_scoped(scope, move || {
            std::thread::sleep(A_MOMENT);
            api.snapshot(&create)
        });
        let taking = taking.map_err(io_error("cannot start a thread"))?;
        // Over and over, however long one takes: the vCPU must not be idle when the snapshot comes.
        while !taking.is_finished() {
            check_burn(guest.ask(Request::Burn { steps: BURN })?, |burn| burn.steps == BURN)?;
        }
        taking.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A guest that has computed something else than it should has measured nothing.
fn check_burn(response: Response, expected: impl FnOnce(&Burn) -> bool) -> Result<(), BenchError> {
    match response {
        Response::Burned(burn) if burn == Burn::after(burn.steps) && expected(&burn) => Ok(()),
        _ => Err(BenchError::WrongResult("busy guest")),
    }
}

fn timed(work: impl FnOnce() -> Result<(), BenchError>) -> Result<Duration, BenchError> {
    let before = Instant::now();
    work().map(|()| before.elapsed())
}

/// Reads a file, without its holes, and makes nothing of it.
fn read_all(path: &Path) -> io::Result<()> {
    let file = File::open(path)?;
    let mut source = FileSource::new(&file, Vec::new())?;
    let (mut block, mut at) = (vec![0; BLOCK], 0);
    while let Some(data) = source.next_data(at)? {
        let len = (data.end - data.start).min(BLOCK as u64);
        source.read(data.start, &mut block[..len as usize])?;
        at = data.start + len;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_bounds() {
        for (runs, resident_mib) in [(0, 1024), (101, 1024), (1, 15), (1, MOST_MIB + 1)] {
            assert!(Options { runs, resident_mib }.check().is_err(), "{runs} {resident_mib}");
        }
        for (runs, resident_mib) in [(1, 16), (100, MOST_MIB)] {
            assert_eq!(Options { runs, resident_mib }.check(), Ok(()));
        }
    }

    #[test]
    fn every_case_is_another_one_and_fits_its_guest() {
        let cases = Options::default().cases();
        assert_eq!(cases.len(), 4 + 2 * 2 * WRITTEN.len());
        for (number, case) in cases.iter().enumerate() {
            assert!(!cases[..number].contains(case), "{case:?}");
            assert!(case.used_mib < case.memory_mib);
            let [(written, _), (rest, _)] = case.contents();
            assert_eq!(
                written.numbers().chain(rest.numbers()).collect::<Vec<_>>(),
                Vec::from_iter(0..case.used().count)
            );
        }
        assert!(CHAIN * CHAIN_PAGES <= Case::booted(SMALL_MIB).used().count);
    }

    #[test]
    fn a_guest_that_computes_something_else_is_found_out() {
        let burn = Burn::after(7);
        assert!(check_burn(Response::Burned(burn), |burn| burn.steps == 7).is_ok());
        assert!(check_burn(Response::Burned(burn), |burn| burn.steps == 8).is_err());
        let other = Burn { integer: burn.integer ^ 1, ..burn };
        assert!(check_burn(Response::Burned(other), |_| true).is_err());
        assert!(check_burn(Response::Done, |_| true).is_err());
    }
}
