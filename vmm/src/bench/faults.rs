//! What it costs a guest to touch a page that is not there yet: by case (who was there before, and how pages come), and by
//! pattern (how the pages lie).
//!
//! The guest is asked to touch many pages at once, and the clock of whoever asks runs meanwhile. The same request, made
//! again when all pages are there, is taken off. What remains, by page, is what the page faults cost.

use super::figure::{Figure, Unit, rounded};
use super::guest::{Guest, PATIENCE, Workplace, wait_for_listener};
use super::pattern::Pattern;
use super::{BenchError, io_error};
use crate::children::{Child, Children};
use api_spec::agent::{Pages, Request, Response, pattern};
use api_spec::snapshot::SnapshotCreate;
use api_spec::vm::MachineConfig;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How much longer a guest may take that touches pages, for each of them.
const PATIENCE_PER_PAGE: Duration = Duration::from_millis(5);
/// How often the cost of a request itself is measured.
const BASE_RUNS: u32 = 5;
/// What the pages hold.
const SEED: u64 = 0x0063_6f70_7069_6365;
/// Distance of scattered pages: each lies in a chunk of its own, which the page server reads and checks as a whole.
const STRIDE: u32 = 16;
/// Memory of the guest that is no work page, in MiB, generously.
const GUEST_OWN_MIB: u64 = 16;

/// What to measure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// How many pages are touched at once.
    pub pages: u32,
    /// How often everything is measured.
    pub runs: u32,
    /// Another page server, of Firecracker's protocol.
    pub peer_handler: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Options { pages: 2048, runs: 5, peer_handler: None }
    }
}

impl Options {
    /// Whether the values make sense.
    pub fn check(&self) -> Result<(), String> {
        match self {
            Options { pages: 0 | 8193.., .. } => Err(format!("--pages {}: must be 1 to 8192", self.pages)),
            Options { runs: 0 | 101.., .. } => Err(format!("--n {}: must be 1 to 100", self.runs)),
            _ => Ok(()),
        }
    }

    /// The work pages that a pattern chooses: no page is of both.
    fn pages_of(&self, pattern: Pattern) -> Pages {
        match pattern {
            Pattern::Scattered => Pages { first: 0, count: self.pages, stride: STRIDE },
            Pattern::Contiguous => Pages::run(self.pages * STRIDE, self.pages),
        }
    }

    /// All work pages that must hold something, so that none of them is cheaper than another.
    fn all_pages(&self) -> Pages {
        Pages::run(0, self.pages * (STRIDE + 1))
    }

    fn memory_mib(&self) -> u64 {
        u64::from(self.all_pages().count).div_ceil(256) + GUEST_OWN_MIB
    }

    fn patience(&self) -> Duration {
        PATIENCE + PATIENCE_PER_PAGE * self.all_pages().count
    }
}

/// Who touches pages, and how they come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Case {
    /// The first clone of all reads: the page server fills its store.
    First,
    /// Another one reads what is in the store.
    Later,
    /// Another one writes to what is in the store.
    LaterWrite,
    /// One reads what was got ready to be read, since earlier clones did so.
    ReplayRead,
    /// One writes to what was got ready to be written.
    ReplayWrite,
    /// In copy mode, the first clone of all reads.
    CopyFirst,
    /// In copy mode, another one reads the same.
    CopyLater,
    /// In copy mode, a clone reads what another program serves.
    Peer,
}

impl Case {
    fn title(self) -> &'static str {
        match self {
            Case::First => "first clone",
            Case::Later => "later clone",
            Case::LaterWrite => "later clone, writing",
            Case::ReplayRead => "working set, replayed",
            Case::ReplayWrite => "working set, replayed, writing",
            Case::CopyFirst => "copy mode, first clone",
            Case::CopyLater => "copy mode, later clone",
            Case::Peer => "copy mode, other page server",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Case::First => "first",
            Case::Later => "later",
            Case::LaterWrite => "later-write",
            Case::ReplayRead => "replay-read",
            Case::ReplayWrite => "replay-write",
            Case::CopyFirst => "copy-first",
            Case::CopyLater => "copy-later",
            Case::Peer => "peer",
        }
    }

    fn is_copy(self) -> bool {
        matches!(self, Case::CopyFirst | Case::CopyLater | Case::Peer)
    }

    /// The working set that is replayed for it, if one is, once that is learnt.
    fn working_set(self) -> Option<&'static str> {
        match self {
            Case::ReplayRead => Some("read.json"),
            Case::ReplayWrite => Some("written.json"),
            _ => None,
        }
    }

    fn request(self, pages: Pages) -> Request {
        match self {
            Case::LaterWrite | Case::ReplayWrite => Request::Write { pages, value: SEED },
            _ => Request::Touch { pages },
        }
    }
}

const PATTERNS: [Pattern; 2] = [Pattern::Scattered, Pattern::Contiguous];
/// Whose medians are compared: the first of each pair, divided by the second.
const COMPARED: [(Case, Case); 7] = [
    (Case::Later, Case::First),
    (Case::LaterWrite, Case::First),
    (Case::ReplayRead, Case::First),
    (Case::ReplayWrite, Case::LaterWrite),
    (Case::CopyLater, Case::Later),
    (Case::Peer, Case::CopyFirst),
    (Case::Peer, Case::CopyLater),
];

/// What a page costs, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct PerPage {
    /// In the fastest run.
    pub min_us: f64,
    /// In half of the runs no more.
    pub p50_us: f64,
    /// In the slowest run.
    pub max_us: f64,
}

impl PerPage {
    /// From what so many pages cost in each run, of which there must be one at least.
    fn of(mut durations: Vec<Duration>, pages: u32) -> Self {
        durations.sort_unstable();
        let us = |at: usize| {
            let duration = durations.get(at).copied().unwrap_or_default();
            rounded(duration.as_secs_f64() * 1e6 / f64::from(pages.max(1)))
        };
        let last = durations.len().saturating_sub(1);
        PerPage { min_us: us(0), p50_us: us(last / 2), max_us: us(last) }
    }
}

/// One case with one pattern.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// Who touches pages, and how they come.
    pub case: Case,
    /// How they lie.
    pub pattern: Pattern,
    /// What a page costs.
    #[serde(flatten)]
    pub per_page: PerPage,
}

/// One case beside another.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ratio {
    /// Whose median.
    pub of: Case,
    /// By whose it is divided.
    pub to: Case,
    /// How pages lie.
    pub pattern: Pattern,
    /// The quotient.
    pub ratio: f64,
}

/// A case that could not be measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NotMeasured {
    /// Which.
    pub case: Case,
    /// Why not.
    pub reason: String,
}

/// What was found out.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// How many pages were touched at once.
    pub pages: u32,
    /// How often.
    pub runs: u32,
    /// Memory of the guest, in MiB.
    pub memory_mib: u64,
    /// What a page costs.
    pub faults: Vec<Row>,
    /// How that compares.
    pub ratios: Vec<Ratio>,
    /// What is not known.
    pub not_measured: Vec<NotMeasured>,
}

impl Report {
    fn new(options: &Options, found: Found) -> Self {
        let row = |((case, pattern), durations)| Row { case, pattern, per_page: PerPage::of(durations, options.pages) };
        let faults: Vec<Row> = found.durations.into_iter().map(row).collect();
        let ratios = ratios(&faults);
        let Options { pages, runs, .. } = *options;
        let not_measured = found.not_measured;
        Report { pages, runs, memory_mib: options.memory_mib(), faults, ratios, not_measured }
    }
}

fn ratios(rows: &[Row]) -> Vec<Ratio> {
    let median = |case, pattern| {
        let row = rows.iter().find(|row| (row.case, row.pattern) == (case, pattern))?;
        Some(row.per_page.p50_us).filter(|us| *us > 0.0)
    };
    let compare = |((of, to), pattern)| {
        let ratio = rounded(median(of, pattern)? / median(to, pattern)?);
        Some(Ratio { of, to, pattern, ratio })
    };
    COMPARED.iter().flat_map(|pair| PATTERNS.map(|pattern| (*pair, pattern))).filter_map(compare).collect()
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "guest {} MiB; {} pages at once, {} times\n", self.memory_mib, self.pages, self.runs)?;
        writeln!(f, "{:<30} {:^29}  {:^29}", "", "one page of each 64 KiB", "neighbouring pages")?;
        write!(f, "{:<30}", "us a page")?;
        for _ in PATTERNS {
            write!(f, " {:>9} {:>9} {:>9} ", "min", "p50", "max")?;
        }
        writeln!(f)?;
        let mut case = None;
        for Row { case: this, per_page: PerPage { min_us, p50_us, max_us }, .. } in &self.faults {
            if case.replace(*this) != Some(*this) {
                write!(f, "{:<30}", this.title())?;
                write!(f, " {min_us:>9.2} {p50_us:>9.2} {max_us:>9.2} ")?;
            } else {
                writeln!(f, " {min_us:>9.2} {p50_us:>9.2} {max_us:>9.2}")?;
            }
        }
        writeln!(f)?;
        for Ratio { of, to, pattern, ratio } in &self.ratios {
            writeln!(f, "{}: {ratio:.3} times {} ({})", of.title(), to.title(), pattern.title())?;
        }
        for NotMeasured { case, reason } in &self.not_measured {
            writeln!(f, "{}: not measured: {reason}", case.title())?;
        }
        Ok(())
    }
}

impl super::Report for Report {
    fn figures(&self) -> Vec<Figure> {
        let of_row = |Row { case, pattern, per_page }: &Row| {
            let title = format!("{}, {}: a page", case.title(), pattern.title());
            Figure {
                count: self.runs as usize,
                quantiles: vec![per_page.min_us, per_page.p50_us, per_page.max_us],
                ..Figure::value(format!("faults.{}.{}", case.name(), pattern.name()), title, Unit::Us, per_page.p50_us)
            }
        };
        let of_ratio = |Ratio { of, to, pattern, ratio }: &Ratio| {
            let name = format!("faults.{}-to-{}.{}", of.name(), to.name(), pattern.name());
            let title = format!("{}, beside {}, {}", of.title(), to.title(), pattern.title());
            Figure::value(name, title, Unit::Times, *ratio)
        };
        self.faults.iter().map(of_row).chain(self.ratios.iter().map(of_ratio)).collect()
    }
}

/// What was found out so far.
#[derive(Default)]
struct Found {
    durations: BTreeMap<(Case, Pattern), Vec<Duration>>,
    not_measured: Vec<NotMeasured>,
}

/// Measures.
pub fn run(options: &Options) -> Result<Report, BenchError> {
    let bench = Bench { options, place: Workplace::new(options.patience())? };
    bench.snapshot()?;
    let mut found = Found::default();
    for _ in 0..options.runs {
        bench.run_once(&mut found)?;
    }
    Ok(Report::new(options, found))
}

struct Bench<'a> {
    options: &'a Options,
    place: Workplace,
}

impl Bench<'_> {
    fn path(&self, name: &str) -> PathBuf {
        self.place.path(name)
    }

    /// Boots a guest, lets it fill its pages, and takes the snapshot that everything begins with.
    fn snapshot(&self) -> Result<(), BenchError> {
        let mem_size_mib = self.options.memory_mib();
        let mut parent = self.place.boot(MachineConfig { mem_size_mib, ..Default::default() })?;
        parent.fill(self.options.all_pages(), SEED)?;
        parent.api.snapshot(&SnapshotCreate::of(self.path("snap"))).map(drop)
    }

    /// All cases, each with a page server that nobody has asked for anything yet.
    fn run_once(&self, found: &mut Found) -> Result<(), BenchError> {
        self.measure_all(&[Case::First, Case::Later, Case::LaterWrite], found)?;
        for case in [Case::ReplayRead, Case::ReplayWrite] {
            self.measure_replay(case, found)?;
        }
        self.measure_all(&[Case::CopyFirst, Case::CopyLater], found)?;
        if self.options.peer_handler.is_some() {
            self.measure_all(&[Case::Peer], found)?;
        }
        Ok(())
    }

    /// A case with the working set of a clone that has done the same before. For other cases none is there.
    fn measure_replay(&self, case: Case, found: &mut Found) -> Result<(), BenchError> {
        let place = self.path("snap").join(snapshot::file::WORKING_SET);
        let kept = self.path(case.working_set().unwrap_or_default());
        let moved = |from: &Path, to: &Path| std::fs::rename(from, to).map_err(io_error("cannot move a working set"));
        if !kept.exists() {
            self.place.learn(&self.path("snap"), |clone| {
                PATTERNS
                    .iter()
                    .try_for_each(|pattern| clone.ask(case.request(self.options.pages_of(*pattern))).map(drop))
            })?;
            moved(&place, &kept)?;
        }
        moved(&kept, &place)?;
        let measured = self.measure_all(&[case], found);
        moved(&place, &kept)?;
        measured
    }

    /// Waits until a process has no more memory than it had a while ago: what is got ready for it is ready.
    fn wait_for_replay(&self, clone: &mut Child) -> Result<(), BenchError> {
        const A_WHILE: Duration = Duration::from_millis(100);
        let resident = |pid: u32| {
            let text = std::fs::read_to_string(format!("/proc/{pid}/statm"));
            text.map_err(io_error("cannot read /proc/PID/statm"))
        };
        let (deadline, mut before) = (Instant::now() + PATIENCE, String::new());
        loop {
            let now = resident(clone.pid())?;
            if now == before {
                return Ok(());
            }
            clone.check_alive()?;
            if Instant::now() > deadline {
                return Err(BenchError::Late("the working set of a clone is not ready", PATIENCE));
            }
            before = now;
            std::thread::sleep(A_WHILE);
        }
    }

    /// Cases that belong together: a clone each, one after the other, with the same page server.
    fn measure_all(&self, cases: &[Case], found: &mut Found) -> Result<(), BenchError> {
        if cases.iter().any(|case| found.not_measured.iter().any(|one| one.case == *case)) {
            return Ok(());
        }
        let socket = self.path("uffd.sock");
        let mut server = match (cases, &self.options.peer_handler) {
            ([Case::Peer], Some(program)) => self.start_peer(program, &socket)?,
            _ => self.place.start_page_server(&self.path("snap"), &socket, &[])?,
        };
        for &case in cases {
            let mut clone = match self.restore(case, &socket) {
                // Our page server may not offer copy mode. One that has failed has ended.
                Err(BenchError::Child(reason)) if case.is_copy() && case != Case::Peer && !reason.host_cannot() => {
                    server.check_alive()?;
                    let reason = reason.to_string();
                    let not_measured = |&case| NotMeasured { case, reason: reason.clone() };
                    found.not_measured.extend(cases.iter().map(not_measured));
                    return Ok(());
                }
                restored => restored?,
            };
            if case.working_set().is_some() {
                self.wait_for_replay(&mut clone.child)?;
            }
            for pattern in PATTERNS {
                let duration = self.measure(case, pattern, &mut clone)?;
                found.durations.entry((case, pattern)).or_default().push(duration);
            }
            clone.child.check_alive()?;
        }
        Ok(())
    }

    fn start_peer(&self, program: &Path, socket: &Path) -> Result<Child, BenchError> {
        let _ = std::fs::remove_file(socket);
        let mut server = Children::start_other("other page server", &self.path("peer.log"), program, |server| {
            server.arg(socket).arg(self.path("snap").join(snapshot::file::MEMORY));
        })?;
        wait_for_listener(&mut server, socket)?;
        Ok(server)
    }

    fn restore(&self, case: Case, socket: &Path) -> Result<Guest, BenchError> {
        self.place.restore(&self.path("snap"), |vmm| {
            vmm.arg("--uffd").arg(socket);
            if case.is_copy() {
                vmm.arg("--uffd-mode").arg("copy");
            }
        })
    }

    /// What it costs to touch pages that are not there yet, all together.
    fn measure(&self, case: Case, pattern: Pattern, clone: &mut Guest) -> Result<Duration, BenchError> {
        let pages = self.options.pages_of(pattern);
        let mut touch = || {
            let before = Instant::now();
            let response = clone.ask(case.request(pages))?;
            let elapsed = before.elapsed();
            check(case, pages, response).map(|()| elapsed)
        };
        let with_faults = touch()?;
        let base = (0..BASE_RUNS).map(|_| touch()).collect::<Result<Vec<_>, _>>()?;
        Ok(with_faults.saturating_sub(base.into_iter().min().unwrap_or_default()))
    }
}

/// A guest that has found other pages than it should has measured nothing.
fn check(case: Case, pages: Pages, response: Response) -> Result<(), BenchError> {
    let words = pages.numbers().map(|page| pattern::word(SEED, page, 0));
    let expected = match case {
        Case::LaterWrite | Case::ReplayWrite => Response::Done,
        _ => Response::Sum(words.fold(0, u64::wrapping_add)),
    };
    if response == expected { Ok(()) } else { Err(BenchError::WrongPages(case.title())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_share_no_page_and_fit_the_guest() {
        let options = Options::default();
        let [scattered, contiguous] = PATTERNS.map(|pattern| options.pages_of(pattern));
        let all = options.all_pages();
        assert!(scattered.numbers().last() < contiguous.numbers().next());
        assert!(scattered.fits(all.count) && contiguous.fits(all.count));
        assert!(scattered.numbers().zip(scattered.numbers().skip(1)).all(|(a, b)| (b - a) * 4096 == 65536));
        assert!((options.memory_mib() - GUEST_OWN_MIB) << 8 >= u64::from(all.count));
        for (pages, runs) in [(0, 1), (8193, 1), (1, 0), (1, 101)] {
            assert!(Options { pages, runs, ..Options::default() }.check().is_err());
        }
        assert!(Options { pages: 8192, runs: 100, ..Options::default() }.check().is_ok());
    }

    fn row(case: Case, pattern: Pattern, us: &[u64]) -> Row {
        let durations = us.iter().map(|us| Duration::from_micros(*us)).collect();
        Row { case, pattern, per_page: PerPage::of(durations, 10) }
    }

    #[test]
    fn what_is_compared_are_medians_a_page() {
        let rows = [
            row(Case::First, Pattern::Scattered, &[500, 100, 400]),
            row(Case::First, Pattern::Contiguous, &[100]),
            row(Case::Later, Pattern::Scattered, &[1, 10, 100, 1000]),
            row(Case::Later, Pattern::Contiguous, &[0]),
        ];
        assert_eq!(rows[0].per_page, PerPage { min_us: 10.0, p50_us: 40.0, max_us: 50.0 });
        let expected = Ratio { of: Case::Later, to: Case::First, pattern: Pattern::Scattered, ratio: 0.025 };
        assert_eq!(ratios(&rows), [expected], "nothing is divided by zero, or guessed");
    }

    #[test]
    fn a_table_has_a_line_for_each_case() {
        let mut found = Found::default();
        for pattern in PATTERNS {
            found.durations.insert((Case::First, pattern), vec![Duration::from_millis(20)]);
            found.durations.insert((Case::Later, pattern), vec![Duration::from_millis(2)]);
        }
        found.not_measured.push(NotMeasured { case: Case::CopyFirst, reason: "no".into() });
        let report = Report::new(&Options { pages: 1000, ..Options::default() }, found);
        let text = report.to_string();
        for line in [
            "first clone                        20.00     20.00     20.00      20.00     20.00     20.00",
            "later clone: 0.100 times first clone (one of each 64 KiB)",
            "copy mode, first clone: not measured: no",
        ] {
            assert!(text.lines().any(|one| one == line), "{line}\n{text}");
        }
    }
}
