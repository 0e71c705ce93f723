//! The one owner of the VM, on the event loop's thread: requests, notices, signals and the page server's fate all end up
//! here, one at a time. `answers` is what each request does; `counters`, what is told of what the VM has done; `start`, how a
//! VM comes about; `forks`, how others become clones of it; `prepare`, what is asked of its guest before a snapshot; `resets`, how
//! it is reset; `stop`, how it is saved or shut down.

mod answers;
mod counters;
mod forks;
mod prepare;
mod resets;
mod start;
mod stop;

use super::Machine;
use super::backend::BackendError;
use super::boot::BootError;
use super::config::{self, ConfigError};
use super::device_thread::Subscriber;
use super::fork::give::{ForkError, Giver};
use super::phases::Phases;
use super::private::PrivateWatch;
use super::requests::{NotNow, Phase};
use super::reset::{CheckpointError, ResetError};
use super::restore::RestoreError;
use super::saved::Configuration;
use super::shell::Shell;
use super::snapshot::{Job, SnapshotError};
use super::wiring::Outside;
use crate::api::http::Limits;
use crate::api::server::{Pending, Server};
use crate::api::{Request, Response};
use crate::console::{Console, ConsoleError, Input, Pty};
use crate::devices::alarm::Alarm;
use crate::devices::lock;
use crate::logging::{self, LogError};
use crate::memory::kinds::StartError;
use crate::memory::lost;
use crate::memory::uffd::UffdError;
use crate::notice::{self, Halt, Notice, Notices, Notifier, PageServerWord};
use crate::stats::process::{self, ProcessStart};
use crate::stats::scan::Scanner;
use crate::stats::sink::{Metrics, MetricsError};
use crate::vcpu::{GuestEnd, VcpuError};
use api_spec::agent::{GuestKind, Level};
use api_spec::devices::Serial;
use api_spec::logger::{LogFormat, LogLevel, Logger, MetricsSink};
use api_spec::operations::Operation;
use api_spec::saved::Started;
use api_spec::snapshot::{SnapshotCreate, SnapshotLoad, SnapshotState, SnapshotStatus, Trimmed};
use api_spec::stats::Latencies;
use api_spec::vm::{Readiness, VmConfig};
use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use prepare::{Preparation, Unprepared};
use snapshot::create::CreateError;
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use stop::Shutdown;
use uffd_handler::listener::ListenError;
use uffd_handler::process::Signals;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// How long the event loop waits for the vCPUs of a guest that has reached a limit, which takes them microseconds unless one
/// waits for a page; and when it tries again.
const HALT_PATIENCE: Duration = Duration::from_millis(100);
const HALT_AGAIN: Duration = Duration::from_secs(1);

/// How long clients have, at the end of the process, to take their answers.
const LAST_ANSWERS: Duration = Duration::from_millis(200);

/// Why a vmm ended, when nothing went wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest reset its machine.
    Reset,
    /// The guest powered its machine off.
    PowerOff,
    /// The process was asked to end.
    Signal,
    /// The VM was stopped on request, whatever its guest did.
    Stopped,
    /// The guest was saved, and is to go on some other time.
    Saved,
}

/// Why a vmm failed.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Something of the event loop itself.
    #[error("the event loop failed: {0}")]
    Loop(String),
    /// No event descriptor, signal descriptor or thread.
    #[error("cannot set up the vmm: {}", snapshot::told(.0))]
    Setup(#[from] io::Error),
    /// The API's socket.
    #[error(transparent)]
    Api(#[from] ListenError),
    /// The guest's memory is gone.
    #[error("{}", lost::UNREACHABLE)]
    Lost,
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The console.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// The log.
    #[error(transparent)]
    Log(#[from] LogError),
    /// Boot.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Restore.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// Where counters are written.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// Something else that was asked for.
    #[error("{0}")]
    Refused(String),
    /// The guest.
    #[error("{0}")]
    Guest(GuestEnd),
    /// The page server.
    #[error(
        "the page server at {path} {reason}, and the guest ends with it: its untouched pages are lost; restore the guest again once the server runs"
    )]
    PageServer {
        /// Its socket.
        path: PathBuf,
        /// What it is, or does.
        reason: String,
    },
    /// Neither it nor signals can be watched for.
    #[error("cannot watch the page server any longer: {0}; is the host out of memory, or of open files?")]
    Guard(io::Error),
}

/// Why a request was refused.
#[derive(Debug, thiserror::Error)]
enum RequestError {
    #[error(transparent)]
    NotNow(#[from] NotNow),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Console(#[from] ConsoleError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    #[error(transparent)]
    Unprepared(#[from] Unprepared),
    #[error("run_hooks: {0}; there is no snapshot")]
    Hooks(String),
    #[error(transparent)]
    Restore(#[from] RestoreError),
    #[error("{field}: cannot read {}: {source}", path.display())]
    Unreadable { field: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot set up the VM: {}", snapshot::told(.0))]
    Setup(io::Error),
    #[error("the VM has no balloon: one can be configured before it is started (`PUT /balloon`)")]
    NoBalloon,
    #[error("cannot keep a limit of private memory: {0}")]
    Limit(io::Error),
    #[error("logger.log_path: {0}")]
    Log(#[from] LogError),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error("guest memory cannot be looked at: {0}")]
    Scan(io::Error),
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    #[error(
        "the shell's console is open already: say where it leads with --console, or by `serial` in the file of --shell"
    )]
    ShellHasConsole,
    #[error("the guest cannot go on. {0}")]
    Halt(Halt),
    #[error(transparent)]
    Fork(#[from] ForkError),
    #[error("the VM is being forked; try again when that is done")]
    Forking,
    #[error("whoever forks its VM has given this clone up")]
    GivenUp,
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Reset(#[from] ResetError),
    #[error("the saved state cannot be used, and the start is strict. {0}")]
    Strict(String),
    #[error("--strict is about a saved state, and the configuration has no `saved-state`")]
    NothingStrict,
    #[error("saved-state.path is {}, and there is no directory to make it in; create that first", .0.display())]
    NoParent(PathBuf),
    #[error("there is no place to save the VM at: its configuration has no `saved-state`")]
    NoPlace,
    #[error("SendCtrlAltDel is not offered, as guests have no keyboard; ask the guest's agent to power it off")]
    NoKeyboard,
    #[error("{} {} is not offered: {}", .0.method, .0.path, .0.summary)]
    Declined(&'static Operation),
}

/// What the command line asks for first fails as a request would, and ends the process.
impl From<RequestError> for RunError {
    fn from(e: RequestError) -> Self {
        match e {
            RequestError::Config(e) => RunError::Config(e),
            RequestError::Console(e) => RunError::Console(e),
            RequestError::Boot(e) => RunError::Boot(e),
            RequestError::Restore(e) => RunError::Restore(e),
            RequestError::Setup(e) => RunError::Setup(e),
            other => RunError::Refused(other.to_string()),
        }
    }
}

/// What to do first.
#[derive(Clone, Debug, PartialEq)]
pub enum Start {
    /// Wait for the API.
    Api,
    /// Boot this.
    Boot(Box<VmConfig>),
    /// Restore this.
    Restore(SnapshotLoad),
    /// Build a shell like this, and wait for the API.
    Shell(Box<VmConfig>),
}

/// What a command line says of a vmm, whatever it starts.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    /// The VM's name.
    pub id: String,
    /// Where the API listens, if anywhere.
    pub api: Option<PathBuf>,
    /// Longest body that the API takes, in bytes, if that was said.
    pub max_body: Option<usize>,
    /// Where the guest's console leads, whatever a configuration says.
    pub console: Option<Serial>,
    /// Where counters are written, whatever a configuration says.
    pub metrics: Option<MetricsSink>,
    /// Tell how long a guest that is booted takes for it.
    pub boot_timer: bool,
    /// Refuse to start from a configuration whose saved state cannot be used.
    pub strict: bool,
    /// What whoever started this process says of that.
    pub process_start: ProcessStart,
}

/// Runs a vmm until it ends.
pub fn run(setup: Setup, start: Start) -> Result<Ending, RunError> {
    uffd_handler::raise_descriptor_limit();
    if let Err(e) = lost::announce() {
        tracing::warn!("if guest memory is lost, nobody will be told: {e}");
    }
    let mut manager = EventManager::<Subscriber>::new().map_err(loop_error)?;
    let driver = Arc::new(Mutex::new(Driver::new(&setup)?));
    manager.add_subscriber(driver.clone());
    lock(&driver).start(start, setup)?;
    loop {
        let ending = lock(&driver).take_ending();
        if let Some(ending) = ending {
            lock(&driver).take_leave(&ending);
            return ending;
        }
        manager.run().map_err(loop_error)?;
    }
}

fn loop_error(e: event_manager::Error) -> RunError {
    RunError::Loop(e.to_string())
}

/// Changes what is logged, how and where, as a request or a configuration says.
fn change_log(logger: &Logger) -> Result<(), LogError> {
    let Logger { log_path, level, show_level, show_log_origin, module, format } = logger.clone();
    logging::change(logging::Change {
        path: log_path,
        level: level.map(|level| match level {
            LogLevel::Off => logging::Level::Off,
            LogLevel::Error => logging::Level::Error,
            LogLevel::Warning => logging::Level::Warn,
            LogLevel::Info => logging::Level::Info,
            LogLevel::Debug => logging::Level::Debug,
            LogLevel::Trace => logging::Level::Trace,
        }),
        format: format.map(|format| match format {
            LogFormat::Human => logging::Format::Human,
            LogFormat::Json => logging::Format::Json,
        }),
        show_level,
        show_origin: show_log_origin,
        module,
    })
}

/// What whoever asked for a snapshot is told of it.
fn told(status: &SnapshotStatus) -> Response {
    status.error.as_ref().map_or_else(Response::done, |error| Response::fault(400, error))
}

/// Who is told what becomes of what they have asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asker {
    /// A client of the API.
    Client(Pending),
    /// Nobody: it was a signal.
    Signal,
}

/// Logs something as a part of what was asked for.
fn logged(asker: Asker, tell: impl FnOnce()) {
    match asker {
        Asker::Client(from) => logging::request_span(from.request).in_scope(tell),
        Asker::Signal => tell(),
    }
}

/// A snapshot after which the vmm ends.
#[derive(Clone, Copy, Debug)]
struct Save {
    if_it_fails: IfItFails,
}

/// What becomes of a guest that could not be saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum IfItFails {
    /// It goes on.
    GoOn,
    /// It stays paused, as it was.
    StayPaused,
    /// It is shut down: it was to stop.
    ShutDown,
}

/// The one owner of the VM.
struct Driver {
    id: String,
    boot_timer: bool,
    config: VmConfig,
    configured: bool,
    machine: Option<Machine>,
    /// What the next snapshot is loaded into, if it fits, and the console that goes with it.
    shell: Option<(Shell, (Input, Option<Pty>))>,
    readiness: Option<Readiness>,
    /// Which guest has said so, if one has.
    agent: Option<GuestKind>,
    /// It is being asked something for a snapshot.
    agent_is_busy: bool,
    /// The pseudo-terminal that is the guest's console.
    pty: Option<Pty>,
    /// Why the machine stands still, if nobody asked for it.
    halt: Option<Halt>,
    /// Why it is being brought to that, while a vCPU does not stand still yet; and when to try again.
    halting: Option<Halt>,
    /// That has been tried before, and the log says so.
    halt_is_late: bool,
    retry: Alarm,
    private: PrivateWatch,
    /// The snapshot that is being written.
    job: Option<Job>,
    /// Who waits for the clones of a fork.
    forking: Option<Pending>,
    /// What gives them to others, once the VM was forked.
    giver: Option<Giver>,
    /// How often the VM had been reset when it was begun.
    times_reset: u64,
    /// Who waits for it; nobody, once it is complete and only its layers are being folded.
    waiting: Option<Asker>,
    /// The snapshot before which the guest is asked to prepare for it.
    preparation: Option<Preparation>,
    /// When to look how far it is.
    look: Alarm,
    /// What the guest gave back for the last snapshot that was begun.
    trimmed: Option<Trimmed>,
    /// That is to be the end of the vmm.
    save: Option<Save>,
    /// The snapshot that is to be taken when that is over.
    next: Option<(SnapshotCreate, Asker)>,
    /// It was given up before its turn came.
    next_is_cancelled: bool,
    /// Who has asked for the VM to be saved and stopped, once nobody waits for a snapshot any more.
    postponed: Option<Asker>,
    /// The guest is being shut down.
    shutdown: Option<Shutdown>,
    /// Longest that this may take.
    last_call: Alarm,
    /// What the machine was started with, if it can be saved when it stops.
    origin: Option<Configuration>,
    /// How, if so.
    started: Option<Started>,
    status: SnapshotStatus,
    latencies: Latencies,
    /// The last operation of each kind.
    traces: Vec<Phases>,
    scanner: Scanner,
    /// Where counters are written.
    metrics: Metrics,
    api: Option<Server>,
    notifier: Notifier,
    notices: Notices,
    reset: EventFd,
    signals: Signals,
    ending: Option<Result<Ending, RunError>>,
}

impl Driver {
    fn new(setup: &Setup) -> Result<Self, RunError> {
        // The process began no later than now.
        process::started(setup.process_start);
        let signals = Signals::catch()?;
        let limits = setup.max_body.map_or(Limits::default(), |max_body| Limits { max_body });
        let api = setup.api.as_deref().map(|path| Server::listen(path, limits)).transpose()?;
        let (notifier, notices) = notice::channel()?;
        let reset = EventFd::new(EFD_NONBLOCK)?;
        Ok(Driver {
            id: setup.id.clone(),
            boot_timer: setup.boot_timer,
            config: VmConfig::default(),
            configured: false,
            machine: None,
            shell: None,
            readiness: None,
            agent: None,
            agent_is_busy: false,
            pty: None,
            halt: None,
            halting: None,
            halt_is_late: false,
            retry: Alarm::new()?,
            private: PrivateWatch::new(notifier.clone()),
            job: None,
            forking: None,
            giver: None,
            times_reset: 0,
            waiting: None,
            preparation: None,
            look: Alarm::new()?,
            trimmed: None,
            save: None,
            next: None,
            next_is_cancelled: false,
            postponed: None,
            shutdown: None,
            last_call: Alarm::new()?,
            origin: None,
            started: None,
            status: SnapshotStatus::default(),
            latencies: Latencies::default(),
            traces: Vec::new(),
            scanner: Scanner::new(notifier.clone()),
            metrics: Metrics::new()?,
            api,
            notifier,
            notices,
            reset,
            signals,
            ending: None,
        })
    }

    /// What the command line says stands above what a configuration says.
    fn start(&mut self, start: Start, setup: Setup) -> Result<(), RunError> {
        let Setup { console, metrics, strict, .. } = setup;
        self.config.serial = console.clone();
        metrics.map_or(Ok(()), |sink| self.set_metrics(sink))?;
        match start {
            Start::Api => Ok(()),
            Start::Boot(config) => {
                self.adopt_configuration(*config, console)?;
                if strict {
                    self.config.saved_state.as_mut().ok_or(RequestError::NothingStrict)?.strict = true;
                }
                Ok(self.start_configured()?)
            }
            Start::Shell(config) => {
                self.adopt_configuration(*config, console)?;
                Ok(self.build_shell()?)
            }
            Start::Restore(load) => match self.load(&load) {
                // It was given up for that.
                Err(RequestError::Restore(RestoreError::Backend(BackendError::Uffd(UffdError::Ending)))) => {
                    self.end(Ok(Ending::Signal));
                    Ok(())
                }
                loaded => Ok(loaded?),
            },
        }
    }

    /// Takes over a configuration file, above which the command line stands.
    fn adopt_configuration(&mut self, mut config: VmConfig, console: Option<Serial>) -> Result<(), RunError> {
        if let Some(logger) = &config.logger {
            change_log(logger)?;
        }
        let metrics = config.metrics.take().filter(|_| self.config.metrics.is_none());
        let serial = console.or(config.serial.take());
        self.config = VmConfig { serial, metrics: self.config.metrics.take(), ..config };
        Ok(metrics.map_or(Ok(()), |sink| self.set_metrics(sink))?)
    }

    /// The end, if it has come.
    fn take_ending(&mut self) -> Option<Result<Ending, RunError>> {
        self.ending.take()
    }

    fn end(&mut self, ending: Result<Ending, RunError>) {
        if self.ending.is_none() {
            self.flush_metrics_unasked();
            self.ending = Some(ending);
        }
    }

    /// Nobody is left without an answer when the process ends, and the machine is closed. A snapshot is given up, unless it was complete by then;
    /// whoever waits for it is told which.
    fn take_leave(&mut self, ending: &Result<Ending, RunError>) {
        let job = self.job.take().inspect(Job::cancel);
        let stopping = self.last_words(ending);
        let waiting = job.as_ref().zip(self.waiting.take()).map(|(job, asker)| {
            let (status, _) = job.status();
            self.tell_of_save(&status);
            (asker, self.last_word(&status))
        });
        if let Some(api) = &mut self.api {
            for (asker, response) in stopping.into_iter().chain(waiting) {
                if let Asker::Client(from) = asker {
                    api.answer_last(from, &response);
                }
            }
            api.refuse_pending(answers::ENDING);
            api.flush(LAST_ANSWERS);
        }
        // First whoever writes, who may still use its disks.
        drop(job);
        if let Some(machine) = self.machine.take() {
            machine.close();
        }
    }

    /// Whether somebody waits for a snapshot.
    fn is_awaited(&self) -> bool {
        self.waiting.is_some() || self.next.is_some() || self.preparation.is_some()
    }

    fn phase(&self) -> Phase {
        match &self.machine {
            None => Phase::NotStarted { configured: self.configured },
            Some(machine) if machine.is_running() => Phase::Running,
            Some(_) => Phase::Paused,
        }
    }

    /// What a machine needs from outside, and what its console still needs of it.
    fn outside(&self) -> Result<(Outside, Input, Option<Pty>), RequestError> {
        let place = config::check_serial(self.config.serial.as_ref())?;
        let (console, input, pty) = Console::open(&place)?.into_parts();
        let setup = RequestError::Setup;
        let (reset, signals) = (self.reset.try_clone().map_err(setup)?, self.signals.try_clone().map_err(setup)?);
        let (notifier, boot_timer) = (self.notifier.clone(), self.boot_timer);
        Ok((Outside { notifier, console, reset, signals, boot_timer }, input, pty))
    }

    fn adopt(&mut self, machine: Machine, (input, pty): (Input, Option<Pty>)) {
        self.shell = None;
        input.feed(&machine.devices().serial);
        if let Some(pty) = &pty {
            tracing::info!("the guest's console is {}", pty.path.display());
        }
        self.pty = pty;
        self.config.machine_config.vcpu_count = machine.vcpu_count();
        self.config.machine_config.mem_size_mib = machine.memory_bytes() >> 20;
        self.config.vsock = machine.plan().vsock.clone();
        self.config.drives = machine.plan().drives.clone();
        self.config.network_interfaces = machine.plan().network.clone();
        self.config.entropy = machine.plan().entropy;
        self.config.balloon = machine.plan().balloon;
        self.private.set_brakes(machine.brakes());
        self.machine = Some(machine);
        self.look_at_private_memory();
    }

    /// Looks at the private memory of a running guest, pauses it if that has reached its limit, and has it watched if not.
    fn look_at_private_memory(&mut self) {
        if self.phase() != Phase::Running || self.halting.is_some() {
            self.private.stop();
        } else if let Some(halt) = self.private.reached() {
            self.halt(halt);
        } else {
            self.private.start();
        }
    }

    fn on_api(&mut self, events: Events, ops: &mut EventOps) {
        let Some(api) = &mut self.api else { return };
        let requests = api.on_event(events, ops);
        self.answer_all(requests, ops);
    }

    fn answer_all(&mut self, requests: Vec<(Pending, Request)>, ops: &mut EventOps) {
        let mut queue = std::collections::VecDeque::from(requests);
        while let Some((from, request)) = queue.pop_front() {
            if let Some(response) = self.answer(request, from)
                && let Some(api) = &mut self.api
            {
                queue.extend(api.respond(from, &response, ops));
            }
        }
    }

    fn take_notices(&mut self, ops: &mut EventOps) {
        for notice in self.notices.take() {
            self.on_notice(notice, ops);
        }
    }

    fn on_notice(&mut self, notice: Notice, ops: &mut EventOps) {
        match notice {
            Notice::Ready(level, kind) => {
                self.agent = Some(kind);
                let readiness = match level {
                    Level::Agent => Readiness::Agent,
                    Level::Full => Readiness::Full,
                    Level::Degraded => Readiness::Degraded,
                };
                tracing::info!(readiness = format!("{readiness:?}").to_lowercase(), "the guest's agent is ready");
                self.readiness = Some(readiness);
            }
            Notice::PowerOff => {
                tracing::info!("the guest powered its machine off");
                self.end(Ok(Ending::PowerOff));
            }
            // A guest does not see that its memory is gone: it stumbles over that, in one way or another.
            Notice::End(_) if self.machine.as_ref().is_some_and(Machine::has_lost_memory) => {
                self.end(Err(RunError::Lost))
            }
            Notice::End(end) => self.end(Err(RunError::Guest(end))),
            Notice::DevicesFailed(reason) => self.end(Err(RunError::Loop(reason))),
            Notice::Halt(halt) => self.on_limit(halt),
            // Whoever ends everything at once ends the page server too.
            Notice::PageServer(session, word) => {
                let server = self.machine.as_ref().and_then(Machine::page_server);
                // Another session's was that of a snapshot which could not be loaded.
                if let Some(server) = server.filter(|server| server.session() == session) {
                    let path = server.path().to_owned();
                    self.on_page_server(path, word);
                }
            }
            Notice::SnapshotWritten => self.on_snapshot_written(ops),
            Notice::LayersFolded => self.on_layers_folded(ops),
            Notice::LayersMerged { merged, ends } => self.on_layers_merged(merged, ends),
            Notice::Forked(forked) => self.on_forked(forked, ops),
            Notice::AskedToPowerOff(answer) => self.on_asked_to_power_off(answer),
            Notice::AskedToPrepare(asked) => self.on_asked_to_prepare(asked, ops),
            Notice::Scanned(scanned) => self.on_scanned(scanned, ops),
        }
    }

    /// A running guest has met a limit, and the limit may have been raised since.
    fn on_limit(&mut self, halt: Halt) {
        let Some(machine) = self.machine.as_ref().filter(|machine| machine.is_running()) else { return };
        match &halt {
            Halt::PrivateMemory { .. } => self.look_at_private_memory(),
            Halt::Overlay { drive_id, limit_mib } => {
                if machine.max_overlay(drive_id).unwrap_or(0) == *limit_mib && machine.is_full(drive_id) {
                    self.halt(halt);
                }
            }
            Halt::PageServer { .. } => self.halt(halt),
        }
        // Whoever has met a limit that is no more goes on: vCPUs were stopped for it, or a disk waits.
        if let Some(machine) = self.machine.as_mut().filter(|machine| machine.is_running()) {
            machine.resume();
        }
    }

    fn on_page_server(&mut self, path: PathBuf, word: PageServerWord) {
        match word {
            PageServerWord::Pause(reason) => self.halt(Halt::PageServer { path, reason }),
            PageServerWord::Resume => self.end_halt(),
            // Whoever ends everything at once ends the page server too.
            PageServerWord::End(_) if self.signals.have_come() => self.end(Ok(Ending::Signal)),
            PageServerWord::End(reason) => self.end(Err(RunError::PageServer { path, reason })),
        }
    }

    /// Lets a guest go on that stands still, or is to, for want of a page server.
    fn end_halt(&mut self) {
        if self.forget_halt()
            && let Some(machine) = &mut self.machine
        {
            machine.resume();
            tracing::info!("the guest goes on: its page server serves it again");
            self.look_at_private_memory();
        }
    }

    /// Somebody wants a guest to stand still that does so, or is to, for want of a page server: it is not to go on by itself.
    fn keep_halted(&mut self) {
        self.forget_halt();
    }

    /// Forgets that the guest stands still, or is to, for want of a page server. False if it does not.
    fn forget_halt(&mut self) -> bool {
        let is_for_want = |halt: &mut Halt| matches!(halt, Halt::PageServer { .. });
        let late = self.halting.take_if(is_for_want).is_some();
        if late {
            self.halt_is_late = false;
            self.retry.set(None);
            self.machine.iter_mut().for_each(Machine::forget_halt);
        }
        self.halt.take_if(is_for_want).is_some() || late
    }

    /// Brings a running guest to a standstill that nobody asked for.
    fn halt(&mut self, halt: Halt) {
        if self.phase() == Phase::Running {
            self.private.stop();
            if self.halting.is_none() {
                self.halting = Some(halt);
                self.go_on_halting();
            }
        }
    }

    /// Waits a moment for the vCPUs to stand still, and if one does not, tries again later: the event loop has other work.
    fn go_on_halting(&mut self) {
        let (Some(machine), Some(halt)) = (&mut self.machine, self.halting.take()) else {
            return self.retry.set(None);
        };
        match machine.halt(HALT_PATIENCE) {
            Ok(()) => {
                self.retry.set(None);
                tracing::warn!("the guest is paused: {halt}");
                self.halt = Some(halt);
            }
            Err(e) => {
                if !self.halt_is_late {
                    tracing::error!("the guest is not paused yet ({e}), and should be: {halt}");
                }
                self.retry.set(Some(HALT_AGAIN));
                self.halting = Some(halt);
            }
        }
        self.halt_is_late = self.halting.is_some();
    }

    fn on_snapshot_written(&mut self, ops: &mut EventOps) {
        let (Some(job), Some(asker)) = (&self.job, self.waiting.take()) else { return };
        let (status, digest) = job.status();
        self.status = status;
        if let (Some(machine), Some(dir), Some(digest)) = (&mut self.machine, &self.status.snapshot_path, digest) {
            // Of a guest that was reset meanwhile it is no snapshot.
            if machine.times_reset() == self.times_reset {
                machine.remember_snapshot(dir, digest);
            }
        }
        if self.status.state == SnapshotState::Done {
            self.latencies.snapshot_pause_us = Some(self.status.pause_us);
            self.latencies.snapshot_total_us = Some(self.status.total_us);
        }
        logged(asker, || match &self.status.error {
            None => {
                let SnapshotStatus { pause_us, total_us, .. } = self.status;
                tracing::info!(pause_us, total_us, "a snapshot is complete");
            }
            // Whoever has asked is told; it may be no news, as when the vmm ends.
            Some(error) => tracing::info!("a snapshot failed: {error}"),
        });
        self.snapshot_is_over(asker, ops);
    }

    fn on_layers_folded(&mut self, ops: &mut EventOps) {
        let folded = self.job.take().map(Job::finish).unwrap_or_default();
        if let Some(machine) = &mut self.machine {
            machine.adopt_folded(folded);
        }
        let is_cancelled = std::mem::take(&mut self.next_is_cancelled);
        let Some((create, asker)) = self.next.take() else { return };
        let begun = match is_cancelled {
            false => self.ask_for_snapshot(create, asker),
            true => Err(RequestError::Snapshot(SnapshotError::Create(CreateError::Cancelled))),
        };
        if let Err(e) = begun {
            self.snapshot_has_failed(&e, asker, ops);
        }
    }

    /// There will be no snapshot, of which nothing was written.
    fn snapshot_has_failed(&mut self, error: &RequestError, asker: Asker, ops: &mut EventOps) {
        self.status.state = SnapshotState::Failed;
        self.status.error = Some(error.to_string());
        self.snapshot_is_over(asker, ops);
    }

    /// A snapshot is complete, or has failed, as `status` says.
    fn snapshot_is_over(&mut self, asker: Asker, ops: &mut EventOps) {
        // Before the answer, which may bring further requests.
        if let Some(response) = self.concluded(asker) {
            self.respond(asker, &response, ops);
        }
        self.go_on_stopping(ops);
    }

    /// Answers a request that was left waiting.
    fn respond(&mut self, asker: Asker, response: &Response, ops: &mut EventOps) {
        let (Some(api), Asker::Client(from)) = (&mut self.api, asker) else { return };
        let further = api.respond(from, response, ops);
        self.answer_all(further, ops);
    }
}

impl MutEventSubscriber for Driver {
    fn init(&mut self, ops: &mut EventOps) {
        let mut sources = vec![
            self.notices.event().as_raw_fd(),
            self.reset.as_raw_fd(),
            self.signals.as_raw_fd(),
            self.retry.as_raw_fd(),
            self.last_call.as_raw_fd(),
            self.look.as_raw_fd(),
            self.metrics.as_raw_fd(),
        ];
        sources.extend(self.api.iter().flat_map(Server::sources));
        for fd in sources {
            if let Err(e) = ops.add(Events::new_raw(fd, EventSet::IN)) {
                self.end(Err(RunError::Loop(e.to_string())));
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let fd = events.fd();
        if self.api.as_ref().is_some_and(|api| api.owns(fd)) {
            self.on_api(events, ops);
        } else if fd == self.reset.as_raw_fd() {
            // A kernel that panics says so before it resets the machine.
            self.take_notices(ops);
            tracing::info!("the guest reset its machine");
            self.end(Ok(Ending::Reset));
        } else if fd == self.signals.as_raw_fd() {
            self.on_signal(ops);
        } else if fd == self.last_call.as_raw_fd() {
            self.on_last_call();
        } else if fd == self.look.as_raw_fd() {
            self.on_look(ops);
        } else if fd == self.retry.as_raw_fd() {
            self.go_on_halting();
        } else if fd == self.metrics.as_raw_fd() {
            self.flush_metrics_unasked();
        } else {
            self.take_notices(ops);
        }
    }
}
