//! Benchmarks: what anyone can measure on a machine of their own. They drive ordinary `vmm` processes from outside, and
//! give each figure beside one of the same machine and run that it can be judged by.
//!
//! ```text
//!   api, density, ... --> Report --> figures --> Sheet --> table, JSON
//!                                                  |
//!                         gate <-------------------+-----> charts, Markdown (also of a sheet that was kept)
//! ```

pub mod api;
mod charts;
mod compare;
mod conditions;
pub mod density;
pub mod faults;
mod figure;
pub mod fork;
pub mod gate;
mod guest;
mod markdown;
mod pattern;
pub mod peer;
mod phases;
pub mod reset;
pub mod restore;
pub mod sheet;
pub mod snapshot;
mod together;

use self::conditions::Watch;
use self::figure::{Figure, Series};
use self::gate::{Gate, Verdict};
use self::peer::Peer;
use self::sheet::{Sheet, SheetError};
use crate::children::ChildError;
use crate::host;
use api_spec::client::agent::AgentError;
use api_spec::client::rest::RestError;
use serde::Serialize;
use serde_json::Map;
use std::fmt::{self, Write};
use std::io;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// What `vmm bench --help` prints.
pub const USAGE: &str = "\
Measures, on this machine, and prints what it found. Leave the machine alone meanwhile.

Usage: vmm bench api [options]       how long calls of the REST API take, and how soon it can be called
       vmm bench density [options]   what many clones cost that are alive at once
       vmm bench faults [options]    what it costs a guest to touch a page that is not there yet
       vmm bench fork [options]      how long a guest stands still to be forked, and how soon its clones answer
       vmm bench reset [options]     how long it takes to reset a guest, by how much it has written
       vmm bench restore [options]   how soon a clone answers that was asked for
       vmm bench snapshot [options]  how long guests stand still for snapshots, and what else these cost
       vmm bench all [options]       all of them, as the published figures are made; some minutes
       vmm bench report FILE [options]
                                     figures that were kept (`--json`), as Markdown

  --json                  print one JSON document instead of a table
  --gate FILE             compare with the figures in FILE, which `--json` has printed, and with the budgets in it; fail if
                          any is worse
  --plot DIR              draw charts into DIR, as SVG and PNG

Of all but `api` and `report`:
  --n N                   how often to measure everything, 1 to 100 (default 5 for `faults`, 10 for `snapshot`); of `reset`
                          each kind of reset, 1 to 1000000 (default 500); of `fork` and `restore` how many of each kind, 1
                          to 10000 (default 200); of `density` how many clones are alive at once, 1 to 10000 (default
                          200); of `all` at most so often (with 1000 clones for `density`)

Of `api`:
  --calls N               how many calls on one connection, 1 to 1000000 (default 5000)
  --starts N              how many processes to start, 1 to 1000 (default 20)

Of `density` and `restore`:
  --memory MIB            guest memory (default 128)

Of `restore`:
  --vcpus N               1 to 8 (default 1)
  --backend WHICH         only `file`, only `shared`, a page server whose store clones share, or only `copy`, one that copies
  --shell WHICH           only `warm`, into a process that was built ahead, or only `none`, by `vmm --restore`
  --working-set PAGES     measure also clones whose guests touch so many pages at once, which are got ready for them
  --write-fraction F      the share of these that they write, 0 to 1 (default 1)
  --concurrency N         how many clones are asked for at once, 1 to 64 (default 1)
  --cold                  with memory from the file, throw that out of the page cache each time; a page server keeps it

Of `all` and `restore`:
  --peer firecracker=PROGRAM, --peer qemu=PROGRAM
                          measure another VMM as well, with the same guest, memory from the file; both can be named. QEMU's
                          guest is called over COM1, and so are clones of ours beside it

Of `all` and `faults`:
  --peer-handler PROGRAM  measure another page server of Firecracker's protocol as well; it is started with the path of
                          its socket and that of the memory file

Of `faults`:
  --pages N               how many pages to touch at once, 1 to 8192 (default 2048)

Of `snapshot`:
  --resident-mib N        memory in use of the guest that has much in use, 16 to 1984 (default 1024); as much is written
                          to the temporary directory (TMPDIR)

Ends with 0, 1 on failure, 2 on bad usage, and 77 if this host cannot run microVMs.
";

/// Why a benchmark failed.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A process.
    #[error(transparent)]
    Child(#[from] ChildError),
    /// The API of a vmm.
    #[error("{what}: {source}")]
    Api {
        /// What was being done.
        what: &'static str,
        /// What went wrong.
        source: RestError,
    },
    /// A file, a socket, a thread.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// Another VMM says no.
    #[error("{0}")]
    Refused(String),
    /// A process does not do what it should in time.
    #[error("{0} within {1:?}")]
    Late(&'static str, Duration),
    /// The agent in a guest.
    #[error("a guest does not answer as it should: {0}")]
    Agent(AgentError),
    /// A guest has other pages than it should.
    #[error("{0}: the guest has read other pages than were snapshotted; nothing that was measured means anything")]
    WrongPages(&'static str),
    /// A guest has computed something else than it should.
    #[error("{0}: the guest has not computed what it should; nothing that was measured means anything")]
    WrongResult(&'static str),
    /// A snapshot that is not in order.
    #[error(transparent)]
    Verify(#[from] ::snapshot::verify::VerifyError),
    /// A gate, or a document that was kept.
    #[error(transparent)]
    Sheet(#[from] SheetError),
    /// Charts.
    #[error("--plot: {0}")]
    Plot(#[from] plots::PlotError),
    /// It is worse than it has to be.
    #[error("--gate: {failed} of {compared} values are worse than they may be")]
    Gate {
        /// How many are.
        failed: usize,
        /// How many were compared.
        compared: usize,
    },
    /// Nothing was compared.
    #[error("--gate: the gate says nothing of what was measured here; check the names of its figures, and its host")]
    NothingToCompare,
    /// A signal.
    #[error("interrupted by a signal; every process of the benchmark has ended, start it again to see its figures")]
    Interrupted,
}

impl BenchError {
    /// Whether this host cannot run microVMs at all.
    pub fn host_cannot(&self) -> bool {
        matches!(self, BenchError::Child(e) if e.host_cannot())
    }
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> BenchError {
    move |source| BenchError::Io { what, source }
}

/// What a benchmark says of what it has found out: a table for people, a document, and figures.
trait Report: fmt::Display + Serialize {
    fn figures(&self) -> Vec<Figure>;

    fn series(&self) -> Vec<Series> {
        Vec::new()
    }
}

/// The names of all benchmarks.
const NAMES: [&str; 7] = ["api", "density", "faults", "fork", "reset", "restore", "snapshot"];

/// A benchmark, and what it is to measure.
#[derive(Clone, Debug, PartialEq)]
pub enum Benchmark {
    /// Calls of the API.
    Api(api::Options),
    /// Many clones at once.
    Density(density::Options),
    /// Page faults.
    Faults(faults::Options),
    /// Forks.
    Fork(fork::Options),
    /// Resets.
    Reset(reset::Options),
    /// Restores.
    Restore(restore::Options),
    /// Snapshots.
    Snapshot(snapshot::Options),
}

impl Benchmark {
    fn name(&self) -> &'static str {
        match self {
            Benchmark::Api(_) => "api",
            Benchmark::Density(_) => "density",
            Benchmark::Faults(_) => "faults",
            Benchmark::Fork(_) => "fork",
            Benchmark::Reset(_) => "reset",
            Benchmark::Restore(_) => "restore",
            Benchmark::Snapshot(_) => "snapshot",
        }
    }

    /// What its figures depend on, but for how often it is measured.
    fn setting(&self) -> String {
        match self {
            Benchmark::Api(_) | Benchmark::Fork(_) | Benchmark::Reset(_) => "always the same".into(),
            Benchmark::Density(density::Options { clones, memory_mib }) => {
                format!("{clones} clones of {memory_mib} MiB")
            }
            Benchmark::Faults(faults::Options { pages, .. }) => format!("{pages} pages at once"),
            Benchmark::Restore(options) => options.setting(),
            Benchmark::Snapshot(snapshot::Options { resident_mib, .. }) => format!("{resident_mib} MiB in use"),
        }
    }

    fn run(&self) -> Result<Box<dyn ErasedReport>, BenchError> {
        Ok(match self {
            Benchmark::Api(options) => Box::new(api::run(options)?),
            Benchmark::Density(options) => Box::new(density::run(options)?),
            Benchmark::Faults(options) => Box::new(faults::run(options)?),
            Benchmark::Fork(options) => Box::new(fork::run(options)?),
            Benchmark::Reset(options) => Box::new(reset::run(options)?),
            Benchmark::Restore(options) => Box::new(restore::run(options)?),
            Benchmark::Snapshot(options) => Box::new(snapshot::run(options)?),
        })
    }
}

/// Every benchmark as the published figures are made, or each with so many runs at most.
pub fn all(most: u32, peers: Vec<Peer>, peer_handler: Option<PathBuf>) -> Vec<Benchmark> {
    let api = api::Options::default();
    let (restore, fork, reset) = (restore::Options::default(), fork::Options::default(), reset::Options::default());
    let (faults, snapshot) = (faults::Options::default(), snapshot::Options::default());
    vec![
        Benchmark::Api(api::Options { calls: api.calls.min(most.saturating_mul(20)), starts: api.starts.min(most) }),
        Benchmark::Restore(restore::Options { runs: restore.runs.min(most), working_set: 2048, peers, ..restore }),
        Benchmark::Fork(fork::Options { runs: fork.runs.min(most) }),
        Benchmark::Reset(reset::Options { runs: reset.runs.min(most) }),
        Benchmark::Faults(faults::Options { runs: faults.runs.min(most), peer_handler, ..faults }),
        Benchmark::Snapshot(snapshot::Options { runs: snapshot.runs.min(most), ..snapshot }),
        Benchmark::Density(density::Options { clones: 1000.min(most), ..Default::default() }),
    ]
}

/// What is done with figures, whether they are new or were kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// Print JSON.
    pub json: bool,
    /// Compare with what this file says.
    pub gate: Option<PathBuf>,
    /// Draw charts into this directory.
    pub plot: Option<PathBuf>,
}

/// What to measure, and what to do with it.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// What to measure, one after the other.
    pub benchmarks: Vec<Benchmark>,
    /// What to do with it.
    pub output: Output,
}

/// Figures that were kept, and what to do with them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// The file.
    pub path: PathBuf,
    /// What to do with it.
    pub output: Output,
}

/// What is to be printed, and what then has to be said of the gate.
pub struct Printed {
    /// For standard output.
    pub text: String,
    /// What the gate says, if there is one.
    pub verdict: Option<Verdict>,
}

impl Printed {
    /// Whether everything is as good as it has to be.
    pub fn check(&self) -> Result<(), BenchError> {
        let Some(verdict) = &self.verdict else { return Ok(()) };
        match (verdict.compared.len(), verdict.failed()) {
            (0, _) => Err(BenchError::NothingToCompare),
            (_, 0) => Ok(()),
            (compared, failed) => Err(BenchError::Gate { failed, compared }),
        }
    }
}

/// Measures.
pub fn run(request: &Request) -> Result<Printed, BenchError> {
    let Request { benchmarks, output } = request;
    let finishing = Finishing::new(output)?;
    let (mut figures, mut series, mut reports, mut text) = (Vec::new(), Vec::new(), Map::new(), String::new());
    let watch = Watch::begin()?;
    for benchmark in benchmarks {
        let report = benchmark.run()?;
        if benchmarks.len() > 1 {
            let _ = writeln!(text, "\n{0}\n{1}", benchmark.name(), "=".repeat(benchmark.name().len())); // A String takes all.
        }
        let _ = write!(text, "\n{report}");
        // What is no number is not told at all, rather than as one.
        figures.extend(report.figures().into_iter().filter(|figure| figure.p50.is_finite()));
        series.extend(report.series());
        reports.insert(benchmark.name().into(), report.document());
    }
    let taken = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let sheet = Sheet {
        format: sheet::FORMAT,
        vmm_version: env!("CARGO_PKG_VERSION").into(),
        taken: uffd_handler::logging::timestamp(taken),
        host: host::summary(),
        conditions: watch.end()?,
        settings: benchmarks.iter().map(|benchmark| (benchmark.name().into(), benchmark.setting())).collect(),
        figures,
        series,
        reports,
    };
    let mut head = format!("host  {}\n      {}\n", sheet.host, sheet.conditions);
    for why in &sheet.conditions.noisy {
        let _ = writeln!(head, "NOISY: {why}: measure again when the machine is idle");
    }
    finishing.finish(&sheet, || head + &text)
}

/// Does with figures that were kept what can be done with new ones; without `--json` as Markdown.
pub fn show(kept: &Kept) -> Result<Printed, BenchError> {
    let finishing = Finishing::new(&kept.output)?;
    let sheet = Sheet::read(&kept.path)?;
    finishing.finish(&sheet, || markdown::page(&sheet, finishing.gate.as_ref()))
}

/// What is done in the end, looked at before hours go by.
struct Finishing<'a> {
    output: &'a Output,
    gate: Option<Gate>,
}

impl<'a> Finishing<'a> {
    fn new(output: &'a Output) -> Result<Self, BenchError> {
        let gate = output.gate.as_deref().map(Gate::read).transpose()?;
        if let Some(dir) = &output.plot {
            std::fs::create_dir_all(dir).map_err(io_error("--plot: cannot make the directory"))?;
        }
        Ok(Finishing { output, gate })
    }

    fn finish(&self, sheet: &Sheet, text: impl FnOnce() -> String) -> Result<Printed, BenchError> {
        if let Some(dir) = &self.output.plot {
            charts::write(sheet, dir)?;
        }
        let verdict = self.gate.as_ref().map(|gate| gate.compare(sheet));
        let text = if self.output.json { crate::cli::to_json(sheet) } else { text() };
        Ok(Printed { text, verdict })
    }
}

/// A report of whatever type.
trait ErasedReport: fmt::Display {
    fn figures(&self) -> Vec<Figure>;
    fn series(&self) -> Vec<Series>;
    fn document(&self) -> serde_json::Value;
}

impl<R: Report> ErasedReport for R {
    fn figures(&self) -> Vec<Figure> {
        Report::figures(self)
    }

    fn series(&self) -> Vec<Series> {
        Report::series(self)
    }

    fn document(&self) -> serde_json::Value {
        // Our own documents have string keys and no failing serializers.
        serde_json::to_value(self).unwrap_or_default()
    }
}
