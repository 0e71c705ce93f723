//! The demonstration: boots a guest, snapshots it, starts the page server, restores clones, talks to each of them, and
//! checks everything that it claims. It drives ordinary `vmm` processes from outside, as any service would.

mod report;
mod smaps;

use crate::children::{Child, ChildError, Children};
use crate::machine::config;
use crate::memory::layout;
use api_spec::agent::pattern::Checksum;
use api_spec::agent::{Pages, Request, Response, Resumed};
use api_spec::client::agent::AgentError;
use api_spec::client::rest::RestError;
use api_spec::client::{AgentClient, RestClient, metrics};
use api_spec::page_server::Metrics;
use api_spec::snapshot::{SnapshotCreate, SnapshotStatus};
use api_spec::vm::{BootSource, MachineConfig, VmConfig, Vsock};
use report::{CloneReport, Report};
use std::collections::HashSet;
use std::hash::Hash;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use uffd_handler::listener::check_path;
use uffd_handler::process::Signals;

/// What `vmm demo --help` prints.
pub const USAGE: &str = "\
Boots the embedded guest on KVM, snapshots it, starts the page server, restores clones from the snapshot through
userfaultfd, talks to each of them, and prints what happened.

Usage: vmm demo [options]

  --clones N         how many clones, 1 to 10000 (default 20)
  --memory MIB       guest memory, 8 or more (default 128)
  --working-set MIB  memory that the guest fills at boot and every clone reads (default 8)
  --vcpus N          1 to 8 (default 1)
  --dir DIR          where to work; what is made there is kept (default: a temporary directory, removed at the end)
  --no-reseed        do not give clones an identity of their own: shows that the checks can fail
  --json             print one JSON document instead of a table

Ends with 0 if every check held, 1 if one did not or a signal came, 2 on bad usage, and 77 if this host cannot run microVMs.
";

/// What to demonstrate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DemoOptions {
    /// Number of clones.
    pub clones: u32,
    /// Guest memory, in MiB.
    pub memory_mib: u64,
    /// Memory that the guest fills at boot and every clone reads, in MiB.
    pub working_set_mib: u64,
    /// vCPUs.
    pub vcpus: u8,
    /// Where to work.
    pub dir: Option<PathBuf>,
    /// Whether clones get an identity of their own.
    pub reseed: bool,
    /// Print JSON.
    pub json: bool,
}

impl Default for DemoOptions {
    fn default() -> Self {
        DemoOptions { clones: 20, memory_mib: 128, working_set_mib: 8, vcpus: 1, dir: None, reseed: true, json: false }
    }
}

/// Memory of the guest that is no work page, in MiB, generously.
const GUEST_OWN_MIB: u64 = 4;
/// Least guest memory, in MiB.
const LEAST_MIB: u64 = 8;
const MAX_CLONES: u32 = 10_000;

impl DemoOptions {
    /// Whether the values make sense together.
    pub fn check(&self) -> Result<(), String> {
        if !(1..=MAX_CLONES).contains(&self.clones) {
            return Err(format!("--clones {}: must be 1 to {MAX_CLONES}", self.clones));
        }
        if !(1..=config::MAX_VCPUS).contains(&self.vcpus) {
            return Err(format!("--vcpus {}: must be 1 to {}", self.vcpus, config::MAX_VCPUS));
        }
        if !(LEAST_MIB..=layout::MAX_MIB).contains(&self.memory_mib) {
            return Err(format!("--memory {}: must be {LEAST_MIB} to {}", self.memory_mib, layout::MAX_MIB));
        }
        // The embedded guest uses what lies below the hole for devices.
        let most = self.memory_mib.min(layout::HOLE_START >> 20) - GUEST_OWN_MIB;
        if !(1..=most).contains(&self.working_set_mib) {
            let (working_set, memory) = (self.working_set_mib, self.memory_mib);
            return Err(format!("--working-set {working_set}: must be 1 to {most} with --memory {memory}"));
        }
        Ok(())
    }

    /// How long a guest may take to answer: a large working set takes its time, most of all where its pages come one by
    /// one.
    fn patience(&self) -> Duration {
        PATIENCE + Duration::from_millis(50 * self.working_set_mib)
    }

    fn machine(&self) -> MachineConfig {
        MachineConfig { vcpu_count: self.vcpus, mem_size_mib: self.memory_mib, ..Default::default() }
    }

    /// The work pages that the guest fills and every clone reads.
    fn working_set(&self) -> Pages {
        Pages::run(0, (self.working_set_mib << 8) as u32)
    }
}

/// Why the demonstration failed.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// A file, a process, a terminal.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Sockets would not fit.
    #[error("{0} is too long a path for the sockets that are made in it; name a shorter one with --dir, or set TMPDIR")]
    LongDirectory(PathBuf),
    /// A process ended that should not have, or did not start.
    #[error(transparent)]
    Child(#[from] ChildError),
    /// A guest.
    #[error("{name}: {source}")]
    Agent {
        /// Which guest.
        name: String,
        /// What went wrong.
        source: AgentError,
    },
    /// A guest said something else.
    #[error("{name}: the agent answered {answer:?}, which is no answer to what was asked")]
    Answer {
        /// Which guest.
        name: String,
        /// What it said.
        answer: Response,
    },
    /// The API of a vmm.
    #[error("{what}: {source}")]
    Api {
        /// What was being done.
        what: &'static str,
        /// What went wrong.
        source: RestError,
    },
    /// The snapshot.
    #[error(transparent)]
    Verify(#[from] snapshot::verify::VerifyError),
    /// A signal.
    #[error("interrupted by a signal; every process of the demonstration has ended, start it again to see it")]
    Interrupted,
    /// Checks that did not hold.
    #[error("{0} of {1} checks did not hold; the report names them")]
    Checks(usize, usize),
}

impl DemoError {
    /// Whether this host cannot run microVMs at all.
    pub fn host_cannot(&self) -> bool {
        matches!(self, DemoError::Child(e) if e.host_cannot())
    }
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> DemoError {
    let what = what.into();
    move |source| DemoError::Io { what, source }
}

/// How long anything may take that takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(20);
/// The pattern that the guest fills its working set with.
const SEED: u64 = 0xc0_991c_e000;
/// How many pages each clone writes.
const OWN_PAGES: u32 = 16;

/// A guest that answers.
struct Guest {
    name: String,
    child: Child,
    agent: AgentClient,
}

impl Guest {
    fn ask(&mut self, request: Request) -> Result<Response, DemoError> {
        self.agent.call(request).map_err(|source| DemoError::Agent { name: self.name.clone(), source })
    }

    fn answer(&self, answer: Response) -> DemoError {
        DemoError::Answer { name: self.name.clone(), answer }
    }

    fn nonce(&mut self) -> Result<[u8; 16], DemoError> {
        match self.ask(Request::Nonce)? {
            Response::Nonce(nonce) => Ok(nonce),
            other => Err(self.answer(other)),
        }
    }

    fn ticks(&mut self, advance: u32) -> Result<u64, DemoError> {
        match self.ask(Request::Ticks { advance })? {
            Response::Ticks { count } => Ok(count),
            other => Err(self.answer(other)),
        }
    }

    fn random(&mut self) -> Result<[u8; 32], DemoError> {
        match self.ask(Request::Random)? {
            Response::Random(bytes) => Ok(bytes),
            other => Err(self.answer(other)),
        }
    }

    fn generation(&mut self) -> Result<[u8; 16], DemoError> {
        match self.ask(Request::Generation)? {
            Response::Generation(id) => Ok(id),
            other => Err(self.answer(other)),
        }
    }

    fn sum(&mut self, request: Request) -> Result<u64, DemoError> {
        match self.ask(request)? {
            Response::Sum(sum) => Ok(sum),
            other => Err(self.answer(other)),
        }
    }

    fn mismatches(&mut self, pages: Pages) -> Result<u64, DemoError> {
        match self.ask(Request::Verify { pages, seed: SEED })? {
            Response::Mismatches(words) => Ok(words),
            other => Err(self.answer(other)),
        }
    }

    fn done(&mut self, request: Request) -> Result<(), DemoError> {
        match self.ask(request)? {
            Response::Done => Ok(()),
            other => Err(self.answer(other)),
        }
    }
}

/// What the demonstration learns from the guest before it is snapshotted.
struct Template {
    nonce: [u8; 16],
    ticks: u64,
}

/// What a clone has said, to be compared with the others.
struct Seen {
    random: [u8; 32],
    generation: [u8; 16],
}

/// Runs the demonstration and prints its report.
pub fn run(options: &DemoOptions) -> Result<(), DemoError> {
    // A signal is looked for at each step, so that children, sockets and files are cleared away.
    let signals = Signals::catch().map_err(io_error("cannot block signals"))?;
    let workplace = Workplace::new(options.dir.as_deref())?;
    let demo = Demo { options, workplace: &workplace, children: Children::new()?, signals };
    // What fails after a signal fails because of it.
    let report = demo.run();
    clear_progress();
    let report = report.map_err(|e| if demo.signals.have_come() { DemoError::Interrupted } else { e })?;
    let text = if options.json { report.to_json() } else { report.to_string() };
    io::stdout().write_all(text.as_bytes()).map_err(io_error("cannot write to standard output"))?;
    match report.checks_failed {
        0 => Ok(()),
        failed => Err(DemoError::Checks(failed, report.checks)),
    }
}

/// The directory in which everything happens.
struct Workplace {
    path: PathBuf,
    _temporary: Option<tempfile::TempDir>,
}

/// The longest name of a socket in the directory.
const LONGEST_SOCKET: &str = "9999.vsock.";

impl Workplace {
    fn new(dir: Option<&Path>) -> Result<Self, DemoError> {
        let above = dir.map_or_else(std::env::temp_dir, Path::to_owned);
        let below = if dir.is_some() { "" } else { "coppice-XXXXXX" };
        check_path(&above.join(below).join(LONGEST_SOCKET)).map_err(|_| DemoError::LongDirectory(above))?;
        match dir {
            Some(dir) => {
                std::fs::create_dir_all(dir).map_err(io_error(format!("cannot create {}", dir.display())))?;
                Ok(Workplace { path: dir.to_owned(), _temporary: None })
            }
            None => {
                let temporary = tempfile::Builder::new().prefix("coppice-").tempdir();
                let temporary = temporary.map_err(io_error("cannot create a temporary directory"))?;
                Ok(Workplace { path: temporary.path().to_owned(), _temporary: Some(temporary) })
            }
        }
    }

    fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }
}

struct Demo<'a> {
    options: &'a DemoOptions,
    workplace: &'a Workplace,
    children: Children,
    signals: Signals,
}

impl Demo<'_> {
    fn run(&self) -> Result<Report, DemoError> {
        let started = Instant::now();
        progress("booting the guest");
        let (mut parent, boot) = self.boot()?;
        let template = self.prepare(&mut parent)?;

        self.go_on()?;
        progress("taking a snapshot");
        let snapshot = self.workplace.join("snapshot");
        let status = self.snapshot(&snapshot)?;
        let image_before = snapshot::verify::verify(&snapshot)?;

        self.go_on()?;
        progress("starting the page server");
        let (_server, metrics_path) = self.start_page_server(&snapshot)?;

        let (mut guests, mut reports, mut seen) = (Vec::new(), Vec::new(), Vec::new());
        for id in 0..self.options.clones {
            self.go_on()?;
            progress(&format!("restoring clone {} of {}", id + 1, self.options.clones));
            let (mut guest, restored) = self.restore(id, &snapshot)?;
            reports.push(self.examine(id, &mut guest, restored, &template, &mut seen)?);
            guests.push(guest);
        }

        self.go_on()?;
        progress("reading everything back");
        let metrics =
            metrics::read(&metrics_path, PATIENCE).map_err(io_error("cannot read the page server's metrics"))?;
        let parent_intact = parent.mismatches(self.options.working_set())? == 0;
        let image_digest_unchanged = snapshot::verify::verify(&snapshot)?.root == image_before.root;
        let (randoms, generations) = (counts(seen.iter().map(|s| s.random)), counts(seen.iter().map(|s| s.generation)));
        let others_intact = parent_intact && image_digest_unchanged;
        for ((report, guest), seen) in reports.iter_mut().zip(&mut guests).zip(&seen) {
            report.random_unique = randoms.is_unique(&seen.random);
            report.generation_unique = generations.is_unique(&seen.generation);
            report.isolated = others_intact && self.holds_only_its_own(report.id, guest)?;
            self.measure(report, guest, &metrics)?;
        }
        let total = started.elapsed();
        progress("ending the clones");
        guests.iter_mut().for_each(|guest| guest.child.ask_to_end());
        Ok(Report::new(self.options, boot, status, reports, image_digest_unchanged, &metrics, total))
    }

    /// Fails if a signal has come.
    fn go_on(&self) -> Result<(), DemoError> {
        if self.signals.have_come() { Err(DemoError::Interrupted) } else { Ok(()) }
    }

    fn boot(&self) -> Result<(Guest, Duration), DemoError> {
        let config_path = self.workplace.join("vm.json");
        let vsock = self.workplace.join("parent.vsock");
        let config = VmConfig {
            boot_source: Some(BootSource { embedded_guest: true, ..Default::default() }),
            machine_config: self.options.machine(),
            vsock: Some(Vsock { guest_cid: 3, uds_path: vsock.clone(), vsock_id: None }),
            ..Default::default()
        };
        let text =
            serde_json::to_vec_pretty(&config).map_err(|e| io_error("cannot write the configuration")(e.into()))?;
        std::fs::write(&config_path, text).map_err(io_error(format!("cannot write {}", config_path.display())))?;

        let started = Instant::now();
        let child = self.children.start("parent", &self.workplace.join("parent.log"), |vmm| {
            vmm.arg("--config").arg(&config_path).arg("--api-sock").arg(self.workplace.join("api.sock"));
        })?;
        let guest = self.first_reply("the guest", child, &vsock, Request::Ping { token: 0 })?;
        Ok((guest, started.elapsed()))
    }

    /// Gives the guest something that clones can be recognised by.
    fn prepare(&self, parent: &mut Guest) -> Result<Template, DemoError> {
        parent.done(Request::Fill { pages: self.options.working_set(), seed: SEED })?;
        let expected = Checksum::of_pattern(self.options.working_set(), SEED).value();
        let found = parent.sum(Request::Checksum { pages: self.options.working_set() })?;
        if found != expected {
            return Err(parent.answer(Response::Sum(found)));
        }
        let nonce = parent.nonce()?;
        let ticks = parent.ticks(3)?;
        Ok(Template { nonce, ticks })
    }

    fn snapshot(&self, path: &Path) -> Result<SnapshotStatus, DemoError> {
        let api = |what| move |source| DemoError::Api { what, source };
        let mut client =
            RestClient::connect(&self.workplace.join("api.sock"), PATIENCE).map_err(api("cannot reach the API"))?;
        let snapshot_path = path.to_owned();
        let create = SnapshotCreate::of(snapshot_path);
        client.put("/snapshot/create", &create).map_err(api("cannot take a snapshot"))?;
        client.get("/snapshot/status").map_err(api("cannot ask how the snapshot went"))
    }

    fn start_page_server(&self, snapshot: &Path) -> Result<(Child, PathBuf), DemoError> {
        let metrics = self.workplace.join("metrics.sock");
        let mut server = self.children.start("page server", &self.workplace.join("uffd.log"), |vmm| {
            vmm.arg("uffd-handler").arg("--socket").arg(self.uffd_socket()).arg("--snapshot").arg(snapshot);
            vmm.arg("--metrics").arg(&metrics);
        })?;
        let deadline = Instant::now() + PATIENCE;
        while metrics::read(&metrics, PATIENCE).is_err() {
            self.go_on()?;
            server.check_alive()?;
            if Instant::now() > deadline {
                return Err(io_error("the page server does not answer")(io::ErrorKind::TimedOut.into()));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok((server, metrics))
    }

    fn uffd_socket(&self) -> PathBuf {
        self.workplace.join("uffd.sock")
    }

    /// Restores a clone. The clock starts before its process does and stops at its agent's first reply.
    fn restore(&self, id: u32, snapshot: &Path) -> Result<(Guest, Duration), DemoError> {
        let vsock = self.workplace.join(format!("{id}.vsock"));
        let first =
            if self.options.reseed { Request::Resumed(identity()?) } else { Request::Ping { token: id.into() } };
        let name = format!("clone {id}");
        let started = Instant::now();
        let child = self.children.start(&name, &self.workplace.join(format!("{id}.log")), |vmm| {
            vmm.arg("--restore").arg(snapshot.join("snap.json")).arg("--uffd").arg(self.uffd_socket());
            vmm.arg("--vsock").arg(&vsock);
            if !self.options.reseed {
                vmm.arg("--same-generation");
            }
        })?;
        let guest = self.first_reply(&name, child, &vsock, first)?;
        Ok((guest, started.elapsed()))
    }

    /// Waits for a guest's first reply; if its process ends instead, says why.
    fn first_reply(&self, name: &str, mut child: Child, vsock: &Path, request: Request) -> Result<Guest, DemoError> {
        let times = (self.options.patience(), Instant::now() + PATIENCE);
        let failed = |source| DemoError::Agent { name: name.to_owned(), source };
        let agent = child.first_reply(vsock, times, request, || self.go_on(), failed)?;
        Ok(Guest { name: name.to_owned(), child, agent })
    }

    /// Asks a clone for everything that can be asked while it is alone, and lets it write.
    fn examine(
        &self,
        id: u32,
        guest: &mut Guest,
        restored: Duration,
        template: &Template,
        seen: &mut Vec<Seen>,
    ) -> Result<CloneReport, DemoError> {
        let nonce_ok = guest.nonce()? == template.nonce;
        let ticks_continue = guest.ticks(2)? == template.ticks + 2;
        seen.push(Seen { random: guest.random()?, generation: guest.generation()? });
        let working_set_ok = guest.mismatches(self.options.working_set())? == 0;
        guest.done(Request::Write { pages: own_pages(), value: own_value(id) })?;
        Ok(CloneReport {
            id,
            restore_to_reply_us: restored.as_micros() as u64,
            nonce_ok,
            ticks_continue,
            working_set_ok,
            ..Default::default()
        })
    }

    /// Whether a clone has what it wrote and, everywhere else, what was in the snapshot.
    fn holds_only_its_own(&self, id: u32, guest: &mut Guest) -> Result<bool, DemoError> {
        let sum = guest.sum(Request::Touch { pages: own_pages() })?;
        let all = self.options.working_set();
        let rest = Pages::run(OWN_PAGES, all.count - OWN_PAGES);
        Ok(sum == own_value(id).wrapping_mul(OWN_PAGES.into()) && guest.mismatches(rest)? == 0)
    }

    /// What a clone costs: its memory as the kernel counts it, its faults as the page server does.
    fn measure(&self, report: &mut CloneReport, guest: &Guest, metrics: &Metrics) -> Result<(), DemoError> {
        let pid = guest.child.pid();
        let memory = smaps::guest_ram(pid).map_err(io_error(format!("cannot read /proc/{pid}/smaps")))?;
        (report.private_kib, report.shared_kib) = (memory.anonymous_kib, memory.rss_kib - memory.anonymous_kib);
        report.pss_kib = memory.pss_kib;
        let session = metrics.sessions.iter().find(|session| session.pid == pid);
        report.uffd_events = session.map(|session| session.uffd_events);
        report.served = session.is_some();
        Ok(())
    }
}

fn own_pages() -> Pages {
    Pages::run(0, OWN_PAGES)
}

fn own_value(id: u32) -> u64 {
    0x1000_0000 + u64::from(id)
}

/// A fresh identity for a clone.
fn identity() -> Result<Resumed, DemoError> {
    let (mut generation, mut entropy) = ([0; 16], [0; 32]);
    for bytes in [&mut generation[..], &mut entropy[..]] {
        rustix::rand::getrandom(bytes, rustix::rand::GetRandomFlags::empty())
            .map_err(|e| io_error("cannot get random bytes")(e.into()))?;
    }
    let time_ns = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
    Ok(Resumed { generation, time_ns, entropy })
}

/// Which values occur once.
struct Counts<T> {
    once: HashSet<T>,
}

fn counts<T: Copy + Eq + Hash>(values: impl Iterator<Item = T>) -> Counts<T> {
    let (mut once, mut all) = (HashSet::new(), HashSet::new());
    for value in values {
        if all.insert(value) {
            once.insert(value);
        } else {
            once.remove(&value);
        }
    }
    Counts { once }
}

impl<T: Eq + Hash> Counts<T> {
    fn is_unique(&self, value: &T) -> bool {
        self.once.contains(value)
    }
}

fn progress(text: &str) {
    if io::stderr().is_terminal() {
        eprint!("\r\x1b[K{text} ...");
    }
}

fn clear_progress() {
    if io::stderr().is_terminal() {
        eprint!("\r\x1b[K");
    }
}
