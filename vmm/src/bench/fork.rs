//! How long a running guest stands still to be forked, and how soon its clones answer.
//!
//! The guest is a clone over a file, which has pages of its own: as many as it is told to write, and some more. It writes them anew before
//! each fork. Clones come into shells that were built ahead. The clock of a clone starts before the call, over a connection that is
//! open, and stops at a reply from inside its guest; of many at the last reply.

use super::BenchError;
use super::figure::{Figure, Spread};
use super::guest::{Channel, Guest, PATIENCE, Shell, Workplace};
use super::pattern::Case;
use super::phases::{self, Median, Phases};
use api_spec::agent::Request;
use api_spec::client::AgentClient;
use api_spec::client::rest::RestError;
use api_spec::fork::{ForkTarget, VmFork, VmForked};
use api_spec::snapshot::SnapshotCreate;
use api_spec::stats::TracedOperation;
use api_spec::vm::MachineConfig;
use serde::Serialize;
use std::fmt;
use std::time::{Duration, Instant};

/// How many clones come of one fork, where that is more than one.
const MANY: u32 = 16;
/// How often that is done, of all forks.
const MANY_SHARE: u32 = 10;
/// What the pages hold.
const SEED: u64 = 0x666f_726b_0000;

/// What to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// How many forks of each kind.
    pub runs: u32,
}

impl Default for Options {
    fn default() -> Self {
        Options { runs: 200 }
    }
}

impl Options {
    /// Whether the values make sense.
    pub fn check(&self) -> Result<(), String> {
        match self.runs {
            1..=10_000 => Ok(()),
            other => Err(format!("--n {other}: must be 1 to 10000")),
        }
    }
}

/// What was found out of one kind of fork.
#[derive(Clone, Debug, Serialize)]
struct Row {
    /// How many pages the guest is told to write, and where they lie.
    #[serde(flatten)]
    case: Case,
    /// Memory of the guest, in MiB.
    memory_mib: u64,
    /// Clones of each fork.
    clones: u32,
    /// How many forks.
    runs: u32,
    /// Pages that were copied for them, in half of the forks no more.
    copied_pages: u64,
    /// How long the guest stood still.
    pause: Spread,
    /// Until the call was answered.
    to_answer: Spread,
    /// Until the last clone has replied.
    to_reply: Spread,
    /// Median of each phase of the pause, in microseconds, in order.
    phases_us: Vec<Median>,
    /// The same of the load of a clone.
    load_us: Vec<Median>,
}

/// What was found out.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Forks.
    forks: Vec<Row>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, row) in self.forks.iter().enumerate() {
            let (between, clones) = (if number == 0 { "" } else { "\n" }, clones(row.clones));
            writeln!(
                f,
                "{between}{}; {} MiB; {clones}; {} pages copied; {} forks",
                row.case, row.memory_mib, row.copied_pages, row.runs
            )?;
            writeln!(f, "  {:<26} {}", "", Spread::heading())?;
            for (name, spread) in
                [("pause", row.pause), ("until answered", row.to_answer), ("until the last reply", row.to_reply)]
            {
                writeln!(f, "  {name:<26} {}", spread.columns())?;
            }
            for (what, phases) in [("pause", &row.phases_us), ("load", &row.load_us)] {
                writeln!(f, "  p50 of each phase of the {what}: {}", phases::line(phases))?;
            }
        }
        Ok(())
    }
}

fn clones(number: u32) -> String {
    if number == 1 { "1 clone".into() } else { format!("{number} clones") }
}

impl super::Report for Report {
    fn figures(&self) -> Vec<Figure> {
        let of_row = |row: &Row| {
            let (case, clones) = (row.case, clones(row.clones));
            let name = |what: &str| format!("fork.{}.{}.{what}", row.clones, case.name());
            let title = |what: &str| format!("{clones}, {case}: {what}");
            [
                Figure::spread(name("pause"), title("the guest stands still"), &row.pause).of_phases(&row.phases_us),
                Figure::spread(name("answer"), title("until the call is answered"), &row.to_answer),
                Figure::spread(name("reply"), title("until the last clone replies"), &row.to_reply)
                    .of_phases(&row.load_us),
            ]
        };
        self.forks.iter().flat_map(of_row).collect()
    }
}

/// One fork.
struct Sample {
    forked: VmForked,
    to_answer: Duration,
    to_reply: Duration,
    phases: Phases,
    load: Phases,
}

/// Measures.
pub fn run(options: &Options) -> Result<Report, BenchError> {
    let place = Workplace::new(PATIENCE)?;
    let mut forks = Vec::new();
    for case in Case::all() {
        forks.push(measure(case, 1, options.runs, &place)?);
    }
    if let Some(case) = Case::all().first() {
        forks.push(measure(*case, MANY, options.runs.div_ceil(MANY_SHARE), &place)?);
    }
    Ok(Report { forks })
}

fn measure(case: Case, clones: u32, runs: u32, place: &Workplace) -> Result<Row, BenchError> {
    let machine = MachineConfig { mem_size_mib: case.memory_mib(), ..Default::default() };
    let room = place.room()?;
    let snapshot = room.path().join("snap");
    drop(take_snapshot(place, machine.clone(), &snapshot)?);
    let mut guest = place.restore(&snapshot, |_| ())?;
    let mut samples = Vec::new();
    // The first finds nothing in any cache.
    for round in 0..=runs {
        place.go_on()?;
        guest.fill(case.written(), SEED + u64::from(round))?;
        let shells: Result<Vec<Shell>, _> =
            (0..clones).map(|number| place.shell(&format!("shell{number}"), machine.clone(), Channel::Vsock)).collect();
        let sample = fork(&guest, shells?, case, SEED + u64::from(round))?;
        if round > 0 {
            samples.push(sample);
        }
    }
    let spread = |of: &dyn Fn(&Sample) -> Duration| Spread::of(samples.iter().map(of).collect());
    let mut copied: Vec<u64> = samples.iter().map(|sample| sample.forked.copied_pages).collect();
    copied.sort_unstable();
    Ok(Row {
        case,
        memory_mib: case.memory_mib(),
        clones,
        runs,
        copied_pages: copied[copied.len() / 2],
        pause: spread(&|sample| Duration::from_micros(sample.forked.pause_us)),
        to_answer: spread(&|sample| sample.to_answer),
        to_reply: spread(&|sample| sample.to_reply),
        phases_us: phases::medians(samples.iter().map(|sample| &sample.phases)),
        load_us: phases::medians(samples.iter().map(|sample| &sample.load)),
    })
}

fn take_snapshot(place: &Workplace, machine: MachineConfig, path: &std::path::Path) -> Result<Guest, BenchError> {
    let guest = place.boot(machine)?;
    guest.api.snapshot(&SnapshotCreate::of(path.to_owned()))?;
    Ok(guest)
}

/// Forks a guest into these shells, which end with it.
fn fork(guest: &Guest, mut shells: Vec<Shell>, case: Case, seed: u64) -> Result<Sample, BenchError> {
    let failed = |what| move |source: RestError| BenchError::Api { what, source };
    let mut api = guest.api.client()?;
    let target =
        |shell: &Shell| ForkTarget { api_sock: shell.api.clone(), vsock_override: None, network_overrides: Vec::new() };
    let into = shells.iter().map(target).collect();
    let request = VmFork { into, count: None, resume_vm: true, new_generation: false };
    let before = Instant::now();
    let forked = api.fork(&request).map_err(failed("the guest is not forked"))?;
    let to_answer = before.elapsed();
    if let Some(error) = forked.clones.iter().find_map(|clone| clone.error.clone()) {
        return Err(failed("a clone is not there")(RestError::Answer(error)));
    }
    // All are asked before the first is waited for.
    let ask = |shell: &Shell| {
        let mut agent = shell.agent()?;
        let asked = agent.begin(Request::Ping { token: 0 })?;
        Ok((agent, asked))
    };
    let asked: Vec<_> = shells.iter().map(ask).collect::<Result<_, _>>().map_err(BenchError::Agent)?;
    let reply = |(mut agent, asked): (AgentClient, _)| agent.finish(asked).map(|_| agent);
    let mut agents: Vec<_> = asked.into_iter().map(reply).collect::<Result<_, _>>().map_err(BenchError::Agent)?;
    let to_reply = before.elapsed();
    for agent in &mut agents {
        let verify = Request::Verify { pages: case.written(), seed };
        if agent.call(verify).map_err(BenchError::Agent)? != api_spec::agent::Response::Mismatches(0) {
            return Err(BenchError::WrongPages("fork"));
        }
    }
    let stats = api.stats().map_err(failed("GET /vm/stats"))?;
    let first = shells.first_mut().ok_or(failed("no shell")(RestError::Answer("nobody was asked".into())))?;
    let loaded = first.client.get("/vm/stats").map_err(failed("GET /vm/stats"))?;
    Ok(Sample {
        forked,
        to_answer,
        to_reply,
        phases: phases::of(stats, TracedOperation::Fork),
        load: phases::of(loaded, TracedOperation::Load),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_have_bounds() {
        for (runs, is_fine) in [(0, false), (1, true), (10_000, true), (10_001, false)] {
            assert_eq!(Options { runs }.check().is_ok(), is_fine);
        }
    }
}
