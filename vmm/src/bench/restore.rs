//! How soon a clone answers: from before it was asked for until its guest has replied to a request sent after that.
//!
//! | how | the clock starts | |
//! |---|---|---|
//! | no shell | before the process is started, `vmm --restore` | what anyone has who restores now and then |
//! | warm shell | before `PUT /snapshot/load` is sent, over a connection that is open | what a pool has that is filled ahead (`vmm --shell`) |
//!
//! Both clocks stop at a reply from inside the guest, over vsock. The cases take turns, so that whatever disturbs one
//! disturbs the others as well.

use super::guest::{Guest, PATIENCE, Workplace};
use super::phases::{self, Phases};
use super::{BenchError, Spread, host_line};
use crate::host::{self, Host};
use crate::machine::config;
use crate::memory::layout;
use api_spec::agent::Request;
use api_spec::client::{AgentClient, RestClient};
use api_spec::snapshot::{MemBackend, MemBackendType, SnapshotCreate, SnapshotLoad};
use api_spec::stats::{TracedOperation, VmStats};
use api_spec::vm::MachineConfig;
use serde::Serialize;
use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

/// What to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// How many clones of each kind.
    pub runs: u32,
    /// Guest memory, in MiB.
    pub memory_mib: u64,
    /// vCPUs.
    pub vcpus: u8,
    /// Only this backend.
    pub backend: Option<Backend>,
    /// Only with a shell, or only without.
    pub shell: Option<Shell>,
    /// Print JSON.
    pub json: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options { runs: 200, memory_mib: 128, vcpus: 1, backend: None, shell: None, json: false }
    }
}

impl Options {
    /// Whether the values make sense.
    pub fn check(&self) -> Result<(), String> {
        let Options { runs, memory_mib, vcpus, .. } = *self;
        match self {
            Options { runs: 0 | 10_001.., .. } => Err(format!("--n {runs}: must be 1 to 10000")),
            _ if !(1..=config::MAX_VCPUS).contains(&vcpus) => {
                Err(format!("--vcpus {vcpus}: must be 1 to {}", config::MAX_VCPUS))
            }
            _ if !(8..=layout::MAX_MIB).contains(&memory_mib) => {
                Err(format!("--memory {memory_mib}: must be 8 to {}", layout::MAX_MIB))
            }
            _ => Ok(()),
        }
    }

    fn cases(&self) -> Vec<Case> {
        let both = |backend| [Shell::None, Shell::Warm].map(|shell| Case { backend, shell });
        let all = [Backend::File, Backend::Shared].into_iter().flat_map(both);
        let wanted = |case: &Case| {
            self.backend.is_none_or(|backend| backend == case.backend)
                && self.shell.is_none_or(|shell| shell == case.shell)
        };
        all.filter(wanted).collect()
    }
}

/// Where memory comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Backend {
    /// The memory file of the snapshot.
    File,
    /// A page server, whose store clones share.
    Shared,
}

impl Backend {
    /// What a report calls it.
    pub fn name(self) -> &'static str {
        match self {
            Backend::File => "file",
            Backend::Shared => "page server",
        }
    }
}

/// What a snapshot is loaded into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Shell {
    /// Nothing is there yet.
    None,
    /// A shell that was built ahead.
    Warm,
}

/// One way to get a clone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct Case {
    backend: Backend,
    shell: Shell,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let backend = self.backend.name();
        let shell = match self.shell {
            Shell::None => "vmm --restore",
            Shell::Warm => "load into a warm shell",
        };
        write!(f, "{shell}, {backend}")
    }
}

/// One clone.
struct Sample {
    to_reply: Duration,
    /// Until the call that loads the snapshot was answered, where there is one.
    to_answer: Option<Duration>,
    /// What the vmm says that the load took, by phase.
    phases: Phases,
}

/// What was found out of one way.
#[derive(Clone, Debug, Serialize)]
struct Measured {
    #[serde(flatten)]
    case: Case,
    /// Until the reply.
    to_reply: Spread,
    /// Until the call that loads the snapshot was answered, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    to_answer: Option<Spread>,
    /// Median of each phase of the load inside the vmm, in microseconds, in order.
    phases_us: Vec<(String, f64)>,
}

/// What was found out.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// This host.
    host: Host,
    /// Guest memory, in MiB.
    memory_mib: u64,
    /// vCPUs.
    vcpus: u8,
    /// Clones of each kind.
    runs: u32,
    /// Every way.
    cases: Vec<Measured>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { host, memory_mib, vcpus, runs, cases } = self;
        writeln!(f, "{}\n{memory_mib} MiB, {vcpus} vCPUs, {runs} clones of each kind\n", host_line(host))?;
        writeln!(f, "{:<52} {:>9} {:>9} {:>9} {:>9}  us", "until the first reply", "min", "p50", "p99", "max")?;
        for Measured { case, to_reply: Spread { min_us, p50_us, p99_us, max_us }, .. } in cases {
            writeln!(f, "{:<52} {min_us:>9.1} {p50_us:>9.1} {p99_us:>9.1} {max_us:>9.1}", case.to_string())?;
        }
        for Measured { case, to_answer, .. } in cases {
            let Some(Spread { min_us, p50_us, p99_us, max_us }) = to_answer else { continue };
            let what = format!("  {case}: until answered");
            writeln!(f, "{what:<52} {min_us:>9.1} {p50_us:>9.1} {p99_us:>9.1} {max_us:>9.1}")?;
        }
        for Measured { case, phases_us, .. } in cases {
            let total: f64 = phases_us.iter().map(|(_, us)| us).sum();
            let phases: Vec<String> = phases_us.iter().map(|(name, us)| format!("{name} {us:.0}")).collect();
            writeln!(f, "\n{case}: {total:.0} us within the vmm, p50 of each phase\n  {}", phases.join(", "))?;
        }
        Ok(())
    }
}

/// Measures.
pub fn run(options: &Options) -> Result<Report, BenchError> {
    let bench = Bench { place: Workplace::new(PATIENCE)?, options: *options };
    bench.write_snapshot()?;
    let (cases, socket) = (options.cases(), bench.place.path("uffd.sock"));
    let server = match cases.iter().any(|case| case.backend == Backend::Shared) {
        true => Some(bench.place.start_page_server(&socket, &[])?),
        false => None,
    };
    // The first clone of each kind finds nothing in any cache.
    for case in &cases {
        bench.measure(*case, &socket)?;
    }
    let mut samples: Vec<Vec<Sample>> = cases.iter().map(|_| Vec::new()).collect();
    for _ in 0..options.runs {
        for (case, samples) in cases.iter().zip(&mut samples) {
            samples.push(bench.measure(*case, &socket)?);
        }
    }
    drop(server);
    let measured = cases.into_iter().zip(samples).map(|(case, samples)| summary(case, &samples)).collect();
    let Options { memory_mib, vcpus, runs, .. } = *options;
    Ok(Report { host: host::summary(), memory_mib, vcpus, runs, cases: measured })
}

fn summary(case: Case, samples: &[Sample]) -> Measured {
    let to_reply = Spread::of(samples.iter().map(|sample| sample.to_reply).collect());
    let answers: Vec<Duration> = samples.iter().filter_map(|sample| sample.to_answer).collect();
    let to_answer = (!answers.is_empty()).then(|| Spread::of(answers));
    Measured { case, to_reply, to_answer, phases_us: phases::medians(samples.iter().map(|sample| &sample.phases)) }
}

struct Bench {
    place: Workplace,
    options: Options,
}

impl Bench {
    fn machine(&self) -> MachineConfig {
        let Options { vcpus, memory_mib, .. } = self.options;
        MachineConfig { vcpu_count: vcpus, mem_size_mib: memory_mib, ..Default::default() }
    }

    fn write_snapshot(&self) -> Result<(), BenchError> {
        let guest = self.place.boot(self.machine())?;
        guest.api.snapshot(&SnapshotCreate::of(self.place.path("snap")))?;
        Ok(())
    }

    fn measure(&self, case: Case, socket: &Path) -> Result<Sample, BenchError> {
        match case.shell {
            Shell::None => self.measure_process(case.backend, socket),
            Shell::Warm => self.measure_shell(case.backend, socket),
        }
    }

    fn measure_process(&self, backend: Backend, socket: &Path) -> Result<Sample, BenchError> {
        let before = Instant::now();
        let Guest { child: _child, api, .. } = self.place.restore(&self.place.path("snap"), |vmm| {
            if backend == Backend::Shared {
                vmm.arg("--uffd").arg(socket);
            }
        })?;
        let to_reply = before.elapsed();
        let failed = |source| BenchError::Api { what: "cannot ask a clone", source };
        let mut client = RestClient::connect(api.path(), PATIENCE).map_err(failed)?;
        Ok(Sample { to_reply, to_answer: None, phases: load_phases(&mut client)? })
    }

    fn measure_shell(&self, backend: Backend, socket: &Path) -> Result<Sample, BenchError> {
        let mut shell = self.place.shell("shell", self.machine())?;
        let failed = |source| BenchError::Api { what: "cannot load a snapshot into a shell", source };
        let mem_backend =
            (backend == Backend::Shared).then(|| MemBackend::of(MemBackendType::UffdShared, socket.into()));
        let load = SnapshotLoad {
            resume_vm: true,
            new_generation: false,
            mem_backend,
            ..SnapshotLoad::of(self.place.path("snap"))
        };
        let before = Instant::now();
        shell.client.put("/snapshot/load", &load).map_err(failed)?;
        let to_answer = Some(before.elapsed());
        let mut agent = AgentClient::connect(&shell.vsock, PATIENCE).map_err(BenchError::Agent)?;
        agent.call(Request::Ping { token: 0 }).map_err(BenchError::Agent)?;
        let to_reply = before.elapsed();
        Ok(Sample { to_reply, to_answer, phases: load_phases(&mut shell.client)? })
    }
}

/// What the load spent its time on.
fn load_phases(client: &mut RestClient) -> Result<Phases, BenchError> {
    let failed = |source| BenchError::Api { what: "cannot ask a clone how it was loaded", source };
    let stats: VmStats = client.get("/vm/stats").map_err(failed)?;
    Ok(phases::of(stats, TracedOperation::Load))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_choose_among_the_ways() {
        let count = |backend, shell| Options { backend, shell, ..Options::default() }.cases().len();
        assert_eq!(count(None, None), 4);
        assert_eq!(count(Some(Backend::File), None), 2);
        assert_eq!(count(None, Some(Shell::Warm)), 2);
        assert_eq!(count(Some(Backend::Shared), Some(Shell::None)), 1);
    }

    #[test]
    fn a_phase_is_told_by_its_median() {
        let sample = |us| Sample {
            to_reply: Duration::from_micros(us),
            to_answer: None,
            phases: vec![("a".into(), Duration::from_micros(us)), ("b".into(), Duration::from_micros(2 * us))],
        };
        let samples: Vec<_> = [3, 1, 2].map(sample).into();
        let case = Case { backend: Backend::File, shell: Shell::None };
        assert_eq!(summary(case, &samples).phases_us, [("a".to_owned(), 2.0), ("b".to_owned(), 4.0)]);
    }
}
