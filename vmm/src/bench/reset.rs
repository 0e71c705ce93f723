//! How long a reset takes, by how much the guest has written: in all, in its parts, and for whoever asks for it.
//!
//! The guest writes the same pages after each reset, as one does that serves requests, and is seen to have all of its memory back in
//! the end.

use super::BenchError;
use super::figure::{Figure, Spread, Unit};
use super::guest::{Guest, PATIENCE, Workplace};
use super::pattern::Case;
use super::phases::{self, Median, Phases};
use api_spec::agent::{Pages, Request};
use api_spec::client::AgentClient;
use api_spec::client::rest::RestError;
use api_spec::reset::{VmCheckpoint, VmReset};
use api_spec::stats::PhaseTrace;
use api_spec::vm::MachineConfig;
use serde::Serialize;
use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

/// How many resets come before those that count: pages that are written for the first time cost more.
const WARM_UP: u32 = 20;
/// What the pages hold at the checkpoint.
const SEED: u64 = 0x7265_7365_7400;
const PAGE: usize = 4096;

/// What to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// How many resets of each kind.
    pub runs: u32,
}

impl Default for Options {
    fn default() -> Self {
        Options { runs: 500 }
    }
}

impl Options {
    /// Whether the values make sense.
    pub fn check(&self) -> Result<(), String> {
        match self.runs {
            1..=1_000_000 => Ok(()),
            other => Err(format!("--n {other}: must be 1 to 1000000")),
        }
    }
}

/// What was found out of one kind of reset.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Which.
    #[serde(flatten)]
    pub case: Case,
    /// Memory of the guest, in MiB.
    pub memory_mib: u64,
    /// How many pages were brought back, in half of the resets no more.
    pub dirty_pages: u64,
    /// As the vmm has it.
    pub total: Spread,
    /// Median of each phase of that, in microseconds, in order.
    pub phases_us: Vec<Median>,
    /// As whoever asks has it.
    pub call: Spread,
    /// Only to copy as many pages.
    pub copy: Spread,
}

/// What was found out.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// How many resets of each kind.
    pub runs: u32,
    /// `GET /` over the same kind of connection.
    pub get_info: Spread,
    /// Resets.
    pub resets: Vec<Row>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for row in &self.resets {
            writeln!(f, "{}; {} MiB; {} brought back", row.case, row.memory_mib, row.dirty_pages)?;
            writeln!(f, "  {:<26} {}", "", Spread::heading())?;
            for (name, spread) in
                [("inside the vmm", row.total), ("for whoever asks", row.call), ("a copy of as many pages", row.copy)]
            {
                writeln!(f, "  {name:<26} {}", spread.columns())?;
            }
            writeln!(f, "  p50 of each phase: {}\n", phases::line(&row.phases_us))?;
        }
        writeln!(f, "GET / takes {:.1} us ({} resets of each kind)", self.get_info.p50_us, self.runs)
    }
}

impl super::Report for Report {
    fn figures(&self) -> Vec<Figure> {
        let of_row = |row: &Row| {
            let name = |what: &str| format!("reset.{}.{what}", row.case.name());
            let title = |what: &str| format!("{}: {what}", row.case);
            let added = row.call.p50_us - row.total.p50_us;
            [
                Figure::spread(name("inside"), title("inside the vmm"), &row.total).of_phases(&row.phases_us),
                Figure::spread(name("client"), title("for whoever asks"), &row.call),
                Figure::value(name("added"), title("what the call adds"), Unit::Us, added),
            ]
        };
        self.resets.iter().flat_map(of_row).collect()
    }
}

/// Measures.
pub fn run(options: &Options) -> Result<Report, BenchError> {
    let place = Workplace::new(PATIENCE)?;
    let (mut resets, mut get_info) = (Vec::new(), Vec::new());
    for case in Case::all() {
        let config = MachineConfig { mem_size_mib: case.memory_mib(), ..Default::default() };
        let mut guest = place.boot(config)?;
        resets.push(measure(case, options.runs, &place, &mut guest, &mut get_info)?);
    }
    Ok(Report { runs: options.runs, get_info: Spread::of(get_info), resets })
}

fn measure(
    case: Case,
    runs: u32,
    place: &Workplace,
    guest: &mut Guest,
    get_info: &mut Vec<Duration>,
) -> Result<Row, BenchError> {
    let failed = |what| move |source: RestError| BenchError::Api { what, source };
    let (vsock, pages) = (place.path("guest.vsock"), case.written());
    guest.fill(pages, SEED)?;
    guest.hang_up();
    let mut api = guest.api.client()?;
    until_quiet(&mut api)?;
    api.checkpoint(&VmCheckpoint {}).map_err(failed("no checkpoint"))?;
    let (mut traces, mut calls, mut dirty): (Vec<PhaseTrace>, Vec<Duration>, Vec<u64>) = Default::default();
    for round in 0..WARM_UP + runs {
        place.go_on()?;
        let _agent = ask(&vsock, Request::Write { pages, value: round.into() })?;
        let before = Instant::now();
        let done = api.reset(&VmReset::default()).map_err(failed("the guest is not reset"))?;
        let call = before.elapsed();
        let before = Instant::now();
        api.info().map_err(failed("GET /"))?;
        if round >= WARM_UP {
            get_info.push(before.elapsed());
            calls.push(call);
            traces.push(done.trace);
            dirty.push(done.dirty_pages);
        }
    }
    guest.call_again(ask(&vsock, Request::Ping { token: 0 })?);
    if !guest.holds(pages, SEED)? {
        return Err(BenchError::WrongPages("guest that was reset"));
    }
    dirty.sort_unstable();
    let total = Spread::of(traces.iter().map(|trace| Duration::from_nanos(trace.total_ns)).collect());
    let phases: Vec<Phases> = traces.into_iter().map(phases::of_trace).collect();
    Ok(Row {
        case,
        memory_mib: case.memory_mib(),
        dirty_pages: dirty[dirty.len() / 2],
        total,
        phases_us: phases::medians(phases.iter()),
        call: Spread::of(calls),
        copy: copies(pages, runs),
    })
}

/// Asks the guest's agent over a stream of its own, which stays open as long as what is returned.
fn ask(vsock: &Path, request: Request) -> Result<AgentClient, BenchError> {
    let mut agent = AgentClient::connect(vsock, PATIENCE).map_err(BenchError::Agent)?;
    agent.call(request).map_err(BenchError::Agent)?;
    Ok(agent)
}

/// Waits until the guest has no stream that it would have to forget in each reset.
fn until_quiet(api: &mut api_spec::client::VmClient) -> Result<(), BenchError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let stats = api.stats().map_err(|source| BenchError::Api { what: "GET /vm/stats", source })?;
        if stats.vsock.is_none_or(|vsock| vsock.connections == 0) {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(BenchError::Late("the guest does not close its stream", PATIENCE));
        }
    }
}

/// How long it takes to copy these pages from one place to another.
fn copies(pages: Pages, runs: u32) -> Spread {
    let len = pages.numbers().last().map_or(0, |last| last as usize + 1) * PAGE;
    let (from, mut to) = (vec![1u8; len], vec![2u8; len]);
    let copy = |_| {
        let before = Instant::now();
        for page in pages.numbers() {
            let at = page as usize * PAGE..(page as usize + 1) * PAGE;
            to[at.clone()].copy_from_slice(&from[at]);
        }
        std::hint::black_box(&mut to);
        before.elapsed()
    };
    Spread::of((0..runs).map(copy).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_have_bounds() {
        for (runs, is_fine) in [(0, false), (1, true), (1_000_000, true), (1_000_001, false)] {
            assert_eq!(Options { runs }.check().is_ok(), is_fine);
        }
    }
}
