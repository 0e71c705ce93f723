//! How soon a clone answers: from before it was asked for until its guest has replied to a request sent after that.
//!
//! | how | the clock starts | |
//! |---|---|---|
//! | no shell | before the process is started, `vmm --restore` | what anyone has who restores now and then |
//! | warm shell | before `PUT /snapshot/load` is sent, over a connection that is open | what a pool has that is filled ahead (`vmm --shell`) |
//! | another VMM | before its process is started, or before the same call, likewise | the same guest, its memory from the file |
//!
//! All clocks stop at a reply from inside the guest, over vsock. With a working set the request that is replied to is to touch so many
//! pages, which are got ready meanwhile, as clones before have taught. The cases take turns, so that whatever disturbs one disturbs the
//! others as well.

use super::compare::{self, Interval};
use super::figure::{Figure, Spread, Unit};
use super::guest::{self, Channel, Guest, PATIENCE, Workplace};
use super::peer::{Kind, Peer, Prepared, Process};
use super::phases::{self, Median, Phases};
use super::together::{Gate, Member, Together};
use super::{BenchError, io_error};
use crate::machine::config;
use crate::memory::layout;
use api_spec::agent::{Pages, Request, Response, pattern};
use api_spec::client::{AgentClient, RestClient};
use api_spec::snapshot::{MemBackend, MemBackendType, SnapshotCreate, SnapshotLoad};
use api_spec::stats::{TracedOperation, VmStats};
use api_spec::vm::MachineConfig;
use rustix::fs::{Advice, fadvise};
use serde::Serialize;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Memory of the guest that it needs itself, in MiB.
const GUEST_OWN_MIB: u64 = 16;
/// Greatest distance of scattered pages: one of each 64 KiB.
const STRIDE: u64 = 16;
/// What pages hold, and what is written to them.
const SEED: u64 = 0x7265_7374_6f72;
/// Most clones that are started at once.
const MOST_AT_ONCE: u32 = 64;

/// What to measure.
#[derive(Clone, Debug, PartialEq)]
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
    /// How many pages a guest touches at once, besides clones that touch none.
    pub working_set: u32,
    /// The share of these that it writes.
    pub write_fraction: f64,
    /// How many clones are asked for at once.
    pub concurrency: u32,
    /// Whether the snapshot's files are thrown out of the page cache each time.
    pub cold: bool,
    /// Other VMMs, each of another kind.
    pub peers: Vec<Peer>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            runs: 200,
            memory_mib: 128,
            vcpus: 1,
            backend: None,
            shell: None,
            working_set: 0,
            write_fraction: 1.0,
            concurrency: 1,
            cold: false,
            peers: Vec::new(),
        }
    }
}

impl Options {
    /// Whether the values make sense.
    pub fn check(&self) -> Result<(), String> {
        let Options { runs, memory_mib, vcpus, working_set, write_fraction, concurrency, .. } = *self;
        let most = (memory_mib.saturating_sub(GUEST_OWN_MIB) * 256).saturating_sub(1);
        match self {
            Options { runs: 0 | 10_001.., .. } => Err(format!("--n {runs}: must be 1 to 10000")),
            _ if !(1..=config::MAX_VCPUS).contains(&vcpus) => {
                Err(format!("--vcpus {vcpus}: must be 1 to {}", config::MAX_VCPUS))
            }
            _ if !(8..=layout::MAX_MIB).contains(&memory_mib) => {
                Err(format!("--memory {memory_mib}: must be 8 to {}", layout::MAX_MIB))
            }
            _ if u64::from(working_set) > most => {
                Err(format!("--working-set {working_set}: a guest of {memory_mib} MiB can touch {most} pages"))
            }
            _ if !(0.0..=1.0).contains(&write_fraction) => {
                Err(format!("--write-fraction {write_fraction}: must be 0 to 1"))
            }
            _ if !(1..=MOST_AT_ONCE).contains(&concurrency) => {
                Err(format!("--concurrency {concurrency}: must be 1 to {MOST_AT_ONCE}"))
            }
            _ => Ok(()),
        }
    }

    /// What figures depend on, but for how often they are measured.
    pub fn setting(&self) -> String {
        let Options { memory_mib, vcpus, working_set, write_fraction, concurrency, cold, .. } = self;
        let cold = if *cold { ", memory file not in the page cache" } else { "" };
        format!(
            "{memory_mib} MiB, {vcpus} vCPUs, {working_set} pages touched, {write_fraction} of them written, {concurrency} clones at \
             once{cold}"
        )
    }

    /// How many clones there are of each kind, which come so many at once.
    fn clones(&self) -> u32 {
        self.runs.next_multiple_of(self.concurrency)
    }

    fn touches(&self) -> Vec<Touch> {
        match self.working_set {
            0 => vec![Touch::Nothing],
            _ => vec![Touch::Nothing, Touch::Contiguous, Touch::Scattered],
        }
    }

    fn cases(&self) -> Vec<Case> {
        let backends = Backend::ALL.into_iter().filter(|one| self.backend.is_none_or(|backend| backend == *one));
        let shells = [Shell::None, Shell::Warm].into_iter();
        let shells = shells.filter(|one| self.shell.is_none_or(|shell| shell == *one));
        let mut vmms: Vec<(Vmm, Channel, Backend)> = backends.map(|one| (Vmm::Ours, Channel::Vsock, one)).collect();
        for kind in self.peers.iter().map(|peer| peer.kind) {
            // Ours is called in the same way.
            if !vmms.iter().any(|(vmm, channel, _)| (*vmm, *channel) == (Vmm::Ours, kind.channel())) {
                vmms.push((Vmm::Ours, kind.channel(), self.backend.unwrap_or(Backend::File)));
            }
            vmms.push((Vmm::Peer(kind), kind.channel(), Backend::File));
        }
        let mut cases = Vec::new();
        for (vmm, channel, backend) in vmms {
            for shell in shells.clone() {
                cases.extend(self.touches().into_iter().map(|touch| Case { vmm, channel, shell, backend, touch }));
            }
        }
        // A page server that copies gets nothing ready, and is not what a working set is for.
        cases.retain(|case| case.backend != Backend::Copy || case.touch == Touch::Nothing);
        cases
    }

    /// The pages that a guest touches.
    fn pages(&self, touch: Touch) -> Pages {
        let count = self.working_set;
        match touch {
            Touch::Nothing => Pages::run(0, 0),
            Touch::Contiguous => Pages::run(0, count),
            Touch::Scattered => {
                // One more than is touched, which is looked at in the end.
                let room = self.memory_mib.saturating_sub(GUEST_OWN_MIB) * 256 / u64::from(count + 1);
                Pages { first: 0, count, stride: room.clamp(1, STRIDE) as u32 }
            }
        }
    }

    /// What a guest is asked: to do as it is to do with its pages, or only to answer.
    fn requests(&self, touch: Touch) -> Vec<Request> {
        let all = self.pages(touch);
        let written = (f64::from(all.count) * self.write_fraction).round() as u32;
        let read = Pages { first: all.first + written * all.stride, count: all.count - written, ..all };
        match touch {
            Touch::Nothing => vec![Request::Ping { token: 0 }],
            _ => [
                (written > 0).then_some(Request::Write { pages: Pages { count: written, ..all }, value: SEED }),
                (read.count > 0).then_some(Request::Touch { pages: read }),
            ]
            .into_iter()
            .flatten()
            .collect(),
        }
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
    /// A page server that copies, as Firecracker's protocol has it.
    Copy,
}

impl Backend {
    const ALL: [Backend; 3] = [Backend::File, Backend::Shared, Backend::Copy];

    /// What a report calls it.
    pub fn title(self) -> &'static str {
        match self {
            Backend::File => "file",
            Backend::Shared => "page server",
            Backend::Copy => "page server that copies",
        }
    }

    /// What programs call it.
    pub fn name(self) -> &'static str {
        match self {
            Backend::File => "file",
            Backend::Shared => "shared",
            Backend::Copy => "copy",
        }
    }
}

/// What a snapshot is loaded into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Shell {
    /// Nothing is there yet.
    None,
    /// A shell that was built ahead; of another VMM a process that waits for the call.
    Warm,
}

impl Shell {
    fn name(self) -> &'static str {
        match self {
            Shell::None => "none",
            Shell::Warm => "warm",
        }
    }
}

/// What a guest does first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Touch {
    /// It answers.
    Nothing,
    /// It touches pages beside each other.
    Contiguous,
    /// It touches pages with others between them.
    Scattered,
}

impl Touch {
    fn name(self) -> &'static str {
        match self {
            Touch::Nothing => "reply",
            Touch::Contiguous => "contiguous",
            Touch::Scattered => "scattered",
        }
    }
}

/// Whose a clone is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Vmm {
    /// Ours.
    Ours,
    /// Another's.
    Peer(Kind),
}

/// One way to get a clone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct Case {
    vmm: Vmm,
    channel: Channel,
    shell: Shell,
    backend: Backend,
    touch: Touch,
}

impl Case {
    fn name(&self) -> String {
        let Case { vmm, channel, shell, backend, touch } = self;
        let whose = match (vmm, channel) {
            (Vmm::Peer(kind), _) => format!("{}.", kind.name()),
            (Vmm::Ours, Channel::Serial) => "serial.".to_owned(),
            (Vmm::Ours, Channel::Vsock) => String::new(),
        };
        format!("restore.{whose}{}.{}.{}", shell.name(), backend.name(), touch.name())
    }

    /// Whether it can be told what touching memory adds.
    fn tells_what_is_added(&self) -> bool {
        self.touch != Touch::Nothing && !matches!(self.vmm, Vmm::Peer(kind) if kind.loads_all())
    }

    /// Whether both differ in what VMM it is, and in nothing that matters.
    fn is_like(&self, other: &Case) -> bool {
        (self.channel, self.shell, self.touch) == (other.channel, other.shell, other.touch)
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
    #[serde(skip)]
    title: String,
    /// Until the reply.
    to_reply: Spread,
    /// Until the call that loads the snapshot was answered, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    to_answer: Option<Spread>,
    /// Median of each phase of the load inside the vmm, in microseconds, in order.
    phases_us: Vec<Median>,
}

/// One way beside another.
#[derive(Clone, Debug, Serialize)]
struct Compared {
    #[serde(skip)]
    name: String,
    /// What is compared.
    what: String,
    /// Of medians.
    ratio: Interval,
}

/// What was found out.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Guest memory, in MiB.
    memory_mib: u64,
    /// vCPUs.
    vcpus: u8,
    /// Clones of each kind.
    runs: u32,
    /// How many were asked for at once.
    concurrency: u32,
    /// Whether the snapshot's files were thrown out of the page cache each time.
    cold: bool,
    /// Pages of the working set.
    working_set: u32,
    /// How much of that was written.
    write_fraction: f64,
    /// Every way.
    cases: Vec<Measured>,
    /// What a working set adds to the median, in microseconds.
    added_us: Vec<(String, String, f64)>,
    /// The other VMMs, and what they say of their versions.
    peers: Vec<(Kind, String)>,
    /// Beside other VMMs.
    compared: Vec<Compared>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { memory_mib, vcpus, runs, concurrency, cold, cases, .. } = self;
        let cold = if *cold { ", memory file not in the page cache" } else { "" };
        let plural = if *vcpus == 1 { "" } else { "s" };
        writeln!(
            f,
            "{memory_mib} MiB, {vcpus} vCPU{plural}, {runs} clones of each kind, {concurrency} at once{cold}\n"
        )?;
        writeln!(f, "{:<68} {}", "until the first reply", Spread::heading())?;
        for Measured { title, to_reply, .. } in cases {
            writeln!(f, "{title:<68} {}", to_reply.columns())?;
        }
        for Measured { title, to_answer, .. } in cases {
            let Some(spread) = to_answer else { continue };
            let what = format!("  {title}: until answered");
            writeln!(f, "{what:<68} {}", spread.columns())?;
        }
        for (_, what, us) in &self.added_us {
            writeln!(f, "{what:<68} {:>9} {us:>9.1}", "")?;
        }
        for Compared { what, ratio, .. } in &self.compared {
            writeln!(f, "{what}: {ratio}")?;
        }
        for Measured { title, phases_us, .. } in cases.iter().filter(|measured| !measured.phases_us.is_empty()) {
            let total: f64 = phases_us.iter().map(|(_, us)| us).sum();
            writeln!(f, "\n{title}: {total:.0} us within the vmm, p50 of each phase\n  {}", phases::line(phases_us))?;
        }
        Ok(())
    }
}

impl super::Report for Report {
    fn figures(&self) -> Vec<Figure> {
        let of_case = |measured: &Measured| {
            let Measured { case, title, to_reply, to_answer, phases_us } = measured;
            let reply = Figure::spread(case.name(), format!("{title}: until the reply"), to_reply).of_phases(phases_us);
            let answer = to_answer.as_ref().map(|spread| {
                Figure::spread(format!("{}-answered", case.name()), format!("{title}: until answered"), spread)
            });
            [Some(reply), answer].into_iter().flatten()
        };
        let added = self.added_us.iter().map(|(name, what, us)| Figure::value(name, what, Unit::Us, *us));
        let compared = self.compared.iter().map(|Compared { name, what, ratio }| Figure {
            count: self.runs as usize,
            interval: Some((ratio.low, ratio.high)),
            ..Figure::value(name, what, Unit::Times, ratio.ratio)
        });
        self.cases.iter().flat_map(of_case).chain(added).chain(compared).collect()
    }
}

/// Measures.
pub fn run(options: &Options) -> Result<Report, BenchError> {
    let mut bench = Bench { place: Workplace::new(PATIENCE)?, options: options.clone(), peers: Vec::new() };
    bench.write_snapshots()?;
    for peer in &options.peers {
        let fill = |agent: &mut AgentClient| bench.fill(|request| agent.call(request).map_err(BenchError::Agent));
        let prepared = peer.prepare(&bench.place, bench.machine(), fill)?;
        bench.peers.push(prepared);
    }
    let cases = options.cases();
    let _servers = bench.start_servers(&cases)?;
    // The first clones of each kind find nothing in any cache.
    for case in &cases {
        bench.measure_at_once(*case)?;
    }
    let mut samples: Vec<Vec<Sample>> = cases.iter().map(|_| Vec::new()).collect();
    for _ in 0..options.clones() / options.concurrency {
        for (case, samples) in cases.iter().zip(&mut samples) {
            samples.extend(bench.measure_at_once(*case)?);
        }
    }
    Ok(bench.report(&cases, &samples))
}

struct Bench {
    place: Workplace,
    options: Options,
    peers: Vec<Prepared>,
}

/// What is there before a clone is asked for.
enum Ready<'a> {
    /// Nothing but what it is going to be called.
    Name(String),
    /// A shell.
    Shell(guest::Shell),
    /// Nothing but what a process of another VMM is going to be called.
    PeerName(&'a Prepared, String),
    /// A process of another VMM that waits.
    Peer(&'a Prepared, Process),
}

impl Bench {
    fn machine(&self) -> MachineConfig {
        let Options { vcpus, memory_mib, .. } = self.options;
        MachineConfig { vcpu_count: vcpus, mem_size_mib: memory_mib, ..Default::default() }
    }

    /// The snapshot that clones come from which do this; each has a working set of its own.
    fn snapshot(&self, touch: Touch) -> PathBuf {
        self.place.path(&format!("snap-{}", touch.name()))
    }

    fn socket(&self, touch: Touch) -> PathBuf {
        self.place.path(&format!("uffd-{}.sock", touch.name()))
    }

    /// Has a guest fill every page that is going to be touched, since one that was never written would cost less, and the one after them.
    fn fill(&self, mut ask: impl FnMut(Request) -> Result<Response, BenchError>) -> Result<(), BenchError> {
        for touch in self.options.touches().into_iter().filter(|touch| *touch != Touch::Nothing) {
            let pages = self.options.pages(touch);
            ask(Request::Fill { pages: Pages { count: pages.count + 1, ..pages }, seed: SEED })?;
        }
        Ok(())
    }

    fn write_snapshots(&self) -> Result<(), BenchError> {
        let mut guest = self.place.boot(self.machine())?;
        self.fill(|request| guest.ask(request))?;
        for touch in self.options.touches() {
            guest.api.snapshot(&SnapshotCreate::of(self.snapshot(touch)))?;
        }
        drop(guest);
        for touch in self.options.touches().into_iter().filter(|touch| *touch != Touch::Nothing) {
            let requests = self.options.requests(touch);
            self.place.learn(&self.snapshot(touch), |clone| {
                requests.iter().try_for_each(|request| clone.ask(*request).map(drop))
            })?;
        }
        Ok(())
    }

    fn start_servers(&self, cases: &[Case]) -> Result<Vec<crate::children::Child>, BenchError> {
        let served = |touch| cases.iter().any(|case| case.touch == touch && case.backend != Backend::File);
        let touches = self.options.touches().into_iter().filter(|touch| served(*touch));
        touches.map(|touch| self.place.start_page_server(&self.snapshot(touch), &self.socket(touch), &[])).collect()
    }

    /// The other VMM whose clones these are, if they are.
    fn peer(&self, case: Case) -> Option<&Prepared> {
        self.peers.iter().find(|peer| case.vmm == Vmm::Peer(peer.kind))
    }

    /// So many at once as are to be.
    fn measure_at_once(&self, case: Case) -> Result<Vec<Sample>, BenchError> {
        self.place.go_on()?;
        if self.options.cold && case.backend == Backend::File {
            forget(&self.peer(case).map_or_else(|| self.snapshot(case.touch), |peer| peer.snapshot.clone()))?;
        }
        // Everything is there that is there before a clone is asked for, and stays until the last has replied.
        let mut ready = Vec::new();
        for number in 0..self.options.concurrency {
            ready.push(self.get_ready(case, number)?);
        }
        let all = Together::new(ready.len());
        if let [only] = &mut ready[..] {
            return Ok(vec![self.measure(case, only, &mut all.member())?]);
        }
        std::thread::scope(|scope| {
            let all = &all;
            let start = |ready| scope.spawn(move || self.measure(case, ready, &mut all.member()));
            let threads: Vec<_> = ready.iter_mut().map(start).collect();
            threads.into_iter().map(|one| one.join().unwrap_or_else(|e| std::panic::resume_unwind(e))).collect()
        })
    }

    fn get_ready(&self, case: Case, number: u32) -> Result<Ready<'_>, BenchError> {
        let peer = |peer| (peer, format!("clone{number}"));
        Ok(match (self.peer(case).map(peer), case.shell) {
            (None, Shell::None) => Ready::Name(format!("clone{number}")),
            (None, Shell::Warm) => {
                Ready::Shell(self.place.shell(&format!("shell{number}"), self.machine(), case.channel)?)
            }
            (Some((peer, name)), Shell::None) => Ready::PeerName(peer, name),
            (Some((peer, name)), Shell::Warm) => Ready::Peer(peer, peer.start(&self.place, &name)?),
        })
    }

    fn measure(&self, case: Case, ready: &mut Ready<'_>, all: &mut Member<'_>) -> Result<Sample, BenchError> {
        all.wait_at(Gate::Start);
        let before = Instant::now();
        match ready {
            Ready::Name(name) => self.measure_process(case, name, before, all),
            Ready::Shell(shell) => self.measure_shell(case, shell, before, all),
            Ready::PeerName(peer, name) => {
                let mut process = peer.restore(&self.place, name)?;
                self.measure_peer(case, &mut process, (before, None), all)
            }
            Ready::Peer(peer, process) => {
                process.load(peer)?;
                let to_answer = Some(before.elapsed());
                self.measure_peer(case, process, (before, to_answer), all)
            }
        }
    }

    fn ask(&self, case: Case, agent: &mut AgentClient) -> Result<(), BenchError> {
        for request in self.options.requests(case.touch) {
            agent.call(request).map_err(BenchError::Agent)?;
        }
        Ok(())
    }

    fn measure_process(
        &self,
        case: Case,
        name: &str,
        before: Instant,
        all: &mut Member<'_>,
    ) -> Result<Sample, BenchError> {
        let first = self.options.requests(case.touch);
        let snapshot = self.snapshot(case.touch);
        let mut guest = self.place.restore_and_ask((name, case.channel), &snapshot, &first, |vmm| {
            if case.backend != Backend::File {
                vmm.arg("--uffd").arg(self.socket(case.touch));
            }
            if case.backend == Backend::Copy {
                vmm.arg("--uffd-mode").arg("copy");
            }
        })?;
        let to_reply = before.elapsed();
        all.wait_at(Gate::Reply);
        self.check(case, |request| guest.ask(request))?;
        let Guest { child: _child, api, .. } = guest;
        let failed = |source| BenchError::Api { what: "cannot ask a clone", source };
        let mut client = RestClient::connect(api.path(), PATIENCE).map_err(failed)?;
        Ok(Sample { to_reply, to_answer: None, phases: load_phases(&mut client)? })
    }

    fn measure_shell(
        &self,
        case: Case,
        shell: &mut guest::Shell,
        before: Instant,
        all: &mut Member<'_>,
    ) -> Result<Sample, BenchError> {
        let failed = |source| BenchError::Api { what: "cannot load a snapshot into a shell", source };
        let backend_type = match case.backend {
            Backend::File => None,
            Backend::Shared => Some(MemBackendType::UffdShared),
            Backend::Copy => Some(MemBackendType::Uffd),
        };
        let load = SnapshotLoad {
            resume_vm: true,
            new_generation: false,
            mem_backend: backend_type.map(|backend_type| MemBackend::of(backend_type, self.socket(case.touch))),
            ..SnapshotLoad::of(self.snapshot(case.touch))
        };
        shell.client.put("/snapshot/load", &load).map_err(failed)?;
        let to_answer = Some(before.elapsed());
        let mut agent = shell.agent().map_err(BenchError::Agent)?;
        self.ask(case, &mut agent)?;
        let to_reply = before.elapsed();
        all.wait_at(Gate::Reply);
        self.check(case, |request| agent.call(request).map_err(BenchError::Agent))?;
        Ok(Sample { to_reply, to_answer, phases: load_phases(&mut shell.client)? })
    }

    fn measure_peer(
        &self,
        case: Case,
        process: &mut Process,
        (before, to_answer): (Instant, Option<Duration>),
        all: &mut Member<'_>,
    ) -> Result<Sample, BenchError> {
        let mut agent = process.agent()?;
        self.ask(case, &mut agent)?;
        let to_reply = before.elapsed();
        all.wait_at(Gate::Reply);
        self.check(case, |request| agent.call(request).map_err(BenchError::Agent))?;
        Ok(Sample { to_reply, to_answer, phases: Phases::new() })
    }

    /// Whether the guest has the pages that it is to have: what it has written, what it has read, and the one after them.
    fn check(
        &self,
        case: Case,
        mut ask: impl FnMut(Request) -> Result<Response, BenchError>,
    ) -> Result<(), BenchError> {
        let pages = self.options.pages(case.touch);
        if pages.count == 0 {
            return Ok(());
        }
        let word = |page| pattern::word(SEED, page, 0);
        let of_request = |request: Request| -> u64 {
            match request {
                Request::Write { pages, value } => value.wrapping_mul(u64::from(pages.count)),
                Request::Touch { pages } => pages.numbers().map(word).fold(0, u64::wrapping_add),
                _ => 0,
            }
        };
        let sum = self.options.requests(case.touch).into_iter().map(of_request).fold(0, u64::wrapping_add);
        let after = Pages::run(pages.first + pages.count * pages.stride, 1);
        let is_right = ask(Request::Touch { pages })? == Response::Sum(sum)
            && ask(Request::Verify { pages: after, seed: SEED })? == Response::Mismatches(0);
        if is_right { Ok(()) } else { Err(BenchError::WrongPages("restore")) }
    }

    fn title(&self, case: &Case) -> String {
        let Case { vmm, channel, shell, backend, touch } = case;
        let vmm = match (vmm, shell) {
            (Vmm::Ours, Shell::None) => "vmm --restore".to_owned(),
            (Vmm::Ours, Shell::Warm) => "load into a warm shell".to_owned(),
            (Vmm::Peer(kind), Shell::None) => format!("{}, from exec", kind.title()),
            (Vmm::Peer(kind), Shell::Warm) => format!("{}, load", kind.title()),
        };
        let channel = if *channel == Channel::Serial { ", over COM1" } else { "" };
        let pages = self.options.working_set;
        let touched = match touch {
            Touch::Nothing => String::new(),
            Touch::Contiguous => format!(", {pages} pages in a row"),
            Touch::Scattered => format!(", {pages} scattered pages"),
        };
        format!("{vmm}, {}{channel}{touched}", backend.title())
    }

    fn report(&self, cases: &[Case], samples: &[Vec<Sample>]) -> Report {
        let times = |case: &Case| -> Vec<Duration> {
            let found = cases.iter().zip(samples).find(|(one, _)| *one == case);
            found.map(|(_, samples)| samples.iter().map(|sample| sample.to_reply).collect()).unwrap_or_default()
        };
        let measured: Vec<Measured> =
            cases.iter().zip(samples).map(|(case, samples)| summary(*case, self.title(case), samples)).collect();
        let plain = |case: &Case| Case { touch: Touch::Nothing, ..*case };
        let added = cases.iter().filter(|case| case.tells_what_is_added()).map(|case| {
            let of = |case: &Case| Spread::of(times(case)).p50_us;
            let what = format!("{}: added", self.title(case));
            (format!("{}-added", case.name()), what, of(case) - of(&plain(case)))
        });
        let pairs = cases.iter().filter(|case| case.vmm == Vmm::Ours).flat_map(|ours| {
            cases.iter().filter(|theirs| theirs.is_like(ours)).filter_map(move |theirs| match theirs.vmm {
                Vmm::Peer(kind) => Some((ours, theirs, kind.title())),
                Vmm::Ours => None,
            })
        });
        let mut compared = Vec::new();
        for (ours, theirs, peer_name) in pairs {
            let what = format!("{}, beside {peer_name}", self.title(ours));
            let ratio = compare::medians(&times(ours), &times(theirs));
            compared.push(Compared { name: format!("{}-to-peer", ours.name()), what, ratio });
            if theirs.tells_what_is_added() {
                let what = format!("{}: added, beside {peer_name}", self.title(ours));
                let of = |case: &Case| (times(case), times(&plain(case)));
                let ratio = compare::added(&of(ours), &of(theirs));
                compared.push(Compared { name: format!("{}-added-to-peer", ours.name()), what, ratio });
            }
        }
        let Options { memory_mib, vcpus, concurrency, cold, working_set, write_fraction, .. } = self.options;
        Report {
            memory_mib,
            vcpus,
            runs: self.options.clones(),
            concurrency,
            cold,
            working_set,
            write_fraction,
            cases: measured,
            added_us: added.collect(),
            peers: self.peers.iter().map(|peer| (peer.kind, peer.version.clone())).collect(),
            compared,
        }
    }
}

/// Throws the files of a directory out of the page cache, as far as the kernel can.
fn forget(dir: &Path) -> Result<(), BenchError> {
    let failed = |e: std::io::Error| io_error("cannot throw a snapshot out of the page cache")(e);
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if path.is_file() {
            let file = File::open(path).map_err(failed)?;
            file.sync_all().map_err(failed)?;
            fadvise(&file, 0, None, Advice::DontNeed).map_err(|e| failed(e.into()))?;
        }
    }
    Ok(())
}

fn summary(case: Case, title: String, samples: &[Sample]) -> Measured {
    let to_reply = Spread::of(samples.iter().map(|sample| sample.to_reply).collect());
    let answers: Vec<Duration> = samples.iter().filter_map(|sample| sample.to_answer).collect();
    let to_answer = (!answers.is_empty()).then(|| Spread::of(answers));
    let phases_us = phases::medians(samples.iter().map(|sample| &sample.phases));
    Measured { case, title, to_reply, to_answer, phases_us }
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

    fn options() -> Options {
        Options { working_set: 2048, ..Options::default() }
    }

    #[test]
    fn options_choose_among_the_ways() {
        let count = |options: Options| options.cases().len();
        let (file, shared) = (Some(Backend::File), Some(Backend::Shared));
        let warm = Some(Shell::Warm);
        assert_eq!(count(Options::default()), 6);
        assert_eq!(count(Options { backend: file, ..Options::default() }), 2);
        assert_eq!(count(Options { shell: warm, ..Options::default() }), 3);
        assert_eq!(count(Options { backend: shared, shell: warm, ..Options::default() }), 1);
        assert_eq!(count(Options { backend: file, ..options() }), 6);
        assert_eq!(count(Options { backend: Some(Backend::Copy), ..options() }), 2);
        let peer = |kind| Peer { kind, program: "p".into() };
        let (firecracker, qemu) = (peer(Kind::Firecracker), peer(Kind::Qemu));
        assert_eq!(count(Options { backend: file, peers: vec![firecracker.clone()], ..options() }), 12);
        // Ours is called over COM1 as well.
        assert_eq!(count(Options { backend: file, peers: vec![qemu.clone()], ..options() }), 18);
        let all = Options { peers: vec![firecracker, qemu], ..options() };
        let names: Vec<String> = all.cases().iter().map(Case::name).collect();
        assert!(names.iter().enumerate().all(|(number, name)| !names[..number].contains(name)), "{names:?}");
    }

    #[test]
    fn a_guest_is_asked_to_touch_each_page_once() {
        for write_fraction in [0.0, 0.3, 1.0] {
            let options = Options { write_fraction, ..options() };
            assert!(options.check().is_ok());
            for touch in [Touch::Contiguous, Touch::Scattered] {
                let pages = options.requests(touch).into_iter().flat_map(|request| match request {
                    Request::Write { pages, .. } | Request::Touch { pages } => pages.numbers().collect::<Vec<_>>(),
                    _ => Vec::new(),
                });
                assert!(pages.eq(options.pages(touch).numbers()), "{write_fraction} {touch:?}");
                assert!(options.pages(touch).fits((128 - GUEST_OWN_MIB as u32) * 256));
            }
        }
    }

    #[test]
    fn a_phase_is_told_by_its_median() {
        let sample = |us| Sample {
            to_reply: Duration::from_micros(us),
            to_answer: None,
            phases: vec![("a".into(), Duration::from_micros(us)), ("b".into(), Duration::from_micros(2 * us))],
        };
        let samples: Vec<_> = [3, 1, 2].map(sample).into();
        let case = Options::default().cases()[0];
        let measured = summary(case, String::new(), &samples);
        assert_eq!(measured.phases_us, [("a".to_owned(), 2.0), ("b".to_owned(), 4.0)]);
    }
}
