//! Connections, and what becomes of each request.

use crate::address::Listener;
use crate::announce::Host;
use crate::exec::{self, Programs};
use crate::gate::{Gate, Signs};
use crate::options::Options;
use crate::stream::{Broken, Stream};
use crate::system::{Power, System, hex, replace};
use crate::{files, identity, readiness, say};
use api_spec::agent::linux::{AnyRequest, AnyResponse, Either, Failure, Identity, Part, Readiness, Request, Response};
use api_spec::agent::{GuestKind, Info, Level, Refusal, Request as Common, Response as CommonResponse};
use rustix::io::Errno;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Connections that may be open at a time; there is always room for one beside the programs that may run.
pub const MAX_CONNECTIONS: usize = exec::MAX_PROGRAMS + 8;
/// Stack of a connection's thread, in bytes.
const STACK: usize = 512 * 1024;
/// How long to wait before trying again what the host does not answer or the system has no room for.
const RETRY: Duration = Duration::from_millis(100);
const LONGEST_RETRY: Duration = Duration::from_secs(2);

/// The agent.
pub struct Agent {
    options: Options,
    system: Box<dyn System>,
    host: Host,
    programs: Arc<Programs>,
    gate: Mutex<Gate>,
    /// Held while the guest becomes itself: one host at a time may tell it who it is.
    becoming: Mutex<()>,
    state: Mutex<State>,
    /// There is news in the state.
    news: Condvar,
    connections: AtomicUsize,
}

/// What the host is told of.
struct State {
    readiness: Readiness,
    /// How often readiness has changed, or the guest has become itself.
    news: u64,
}

impl Agent {
    /// An agent for a guest that is itself, unless an agent before it in the same guest has left word of another
    /// generation.
    pub fn new(options: Options, system: Box<dyn System>) -> Arc<Self> {
        let host = Host::new(options.announce.clone());
        let left = std::fs::read_to_string(options.state.join("generation")).ok();
        let left = left.and_then(|text| crate::system::parse_id(&text));
        let now = system.generation();
        let agent = Agent {
            host,
            system,
            gate: Mutex::new(Gate::new(Signs { generation: now.map(|now| left.unwrap_or(now)), resets: 0 })),
            programs: Arc::default(),
            becoming: Mutex::default(),
            state: Mutex::new(State { readiness: readiness::starting(), news: 0 }),
            news: Condvar::new(),
            connections: AtomicUsize::new(0),
            options,
        };
        if left.is_none() {
            agent.leave_word(now);
        }
        Arc::new(agent)
    }

    /// Leaves word, for an agent that starts again, of the generation in which the guest is itself.
    fn leave_word(&self, generation: Option<[u8; 16]>) {
        let Some(generation) = generation else { return };
        let written = std::fs::create_dir_all(&self.options.state)
            .and_then(|()| replace(&self.options.state.join("generation"), hex(&generation).as_bytes()));
        if let Err(e) = written {
            say(format_args!("cannot leave word of the generation in {}: {e}", self.options.state.display()));
        }
    }

    /// How the agent was told to run.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Sets how ready the guest is.
    pub fn set_readiness(&self, readiness: Readiness) {
        if !readiness.failed.is_empty() {
            say(format_args!("failed to start: {}", readiness.failed.join(", ")));
        }
        let mut state = lock(&self.state);
        (state.readiness, state.news) = (readiness, state.news + 1);
        self.news.notify_all();
    }

    fn signs(&self) -> Signs {
        Signs { generation: self.system.generation(), resets: self.host.resets() }
    }

    fn is_restored(&self) -> bool {
        let signs = self.signs();
        lock(&self.gate).is_restored(signs)
    }

    /// Keeps the host told how ready the guest is. A clone says nothing before it is itself. Never returns.
    pub fn keep_announcing(&self) {
        let mut retry = RETRY;
        loop {
            let (level, seen) = {
                let state = lock(&self.state);
                (state.readiness.level, state.news)
            };
            if self.is_restored() {
                self.wait_for_news(seen, LONGEST_RETRY);
            } else if self.host.announced() == Some(level) {
                // As long as the level may change there is news to wait for; after that only the connection changes.
                if level != Level::Agent && self.host.is_connected() {
                    self.host.watch();
                } else {
                    self.wait_for_news(seen, LONGEST_RETRY);
                }
            } else if self.host.announce(level).is_ok() {
                retry = RETRY;
            } else {
                self.wait_for_news(seen, retry);
                retry = (retry * 2).min(LONGEST_RETRY);
            }
        }
    }

    fn wait_for_news(&self, seen: u64, at_most: Duration) {
        let _ = self.news.wait_timeout_while(lock(&self.state), at_most, |state| state.news == seen);
    }

    /// Serves whoever connects. Never returns.
    pub fn serve(self: &Arc<Self>, listener: &Listener) {
        loop {
            match listener.accept() {
                Ok(socket) => self.begin(Stream::new(socket)),
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(e) => {
                    say(format_args!("cannot accept a connection: {e}"));
                    std::thread::sleep(RETRY);
                }
            }
        }
    }

    fn begin(self: &Arc<Self>, mut stream: Stream) {
        let busy = Either::Common(CommonResponse::Refused(Refusal::Busy));
        if self.connections.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
            self.connections.fetch_sub(1, Ordering::Relaxed);
            // Nobody waits for a peer that does not read.
            let _ = api_spec::agent::linux::encode_response(0, &busy).map(|frame| stream.push(&frame));
            return;
        }
        let agent = Arc::clone(self);
        let thread = std::thread::Builder::new().name("connection".into()).stack_size(STACK).spawn(move || {
            match agent.converse(&mut stream) {
                Broken::Closed => {}
                broken => say(format_args!("a connection ends: {broken}")),
            }
            drop(stream);
            agent.connections.fetch_sub(1, Ordering::Relaxed);
        });
        if let Err(e) = thread {
            self.connections.fetch_sub(1, Ordering::Relaxed);
            say(format_args!("no thread for a connection: {e}"));
        }
    }

    /// Answers requests until the connection ends; why it did.
    fn converse(&self, stream: &mut Stream) -> Broken {
        loop {
            let done = stream.receive(None).and_then(|request| self.answer(stream, request.id, request.body));
            if let Err(broken) = done {
                return broken;
            }
        }
    }

    fn answer(&self, stream: &mut Stream, id: u32, request: AnyRequest) -> Result<(), Broken> {
        let signs = self.signs();
        if let Err(refusal) = lock(&self.gate).may(&request, signs) {
            return stream.send(id, &Either::Common(CommonResponse::Refused(refusal)));
        }
        match request {
            Either::Common(Common::Reset) => match self.system.reset() {
                Ok(()) => Ok(()),
                Err(e) => stream.send(id, &failed(Part::Power, e)),
            },
            Either::Common(Common::Resumed(resumed)) => self.resume(stream, id, &Identity::new(resumed)),
            Either::Common(request) => stream.send(id, &self.common(request)),
            Either::Linux(request) => match request {
                Request::Exec(exec) => exec::converse(stream, id, &exec, &self.programs),
                Request::Put { path, mode, size } => files::put(stream, id, &path, mode, size),
                Request::Get { path } => files::get(stream, id, &path),
                Request::Data(_) => Ok(()),
                Request::Signal { exec, signal } => stream.send(id, &self.programs.signal(exec, signal)),
                Request::Identity(identity) => self.resume(stream, id, &identity),
                Request::Readiness => {
                    let readiness = lock(&self.state).readiness.clone();
                    stream.send(id, &Either::Linux(Response::Readiness(readiness)))
                }
                Request::PreSnapshot => {
                    let prepared = self.prepare_snapshot();
                    stream.send(id, &Either::Linux(prepared.map_or_else(Response::Failed, |()| Response::Done)))
                }
                Request::Trim => {
                    let trimmed = self.trim();
                    let trimmed = trimmed.map_or_else(Response::Failed, |free_kib| Response::Trimmed { free_kib });
                    stream.send(id, &Either::Linux(trimmed))
                }
                Request::PowerOff => self.power(stream, id, Power::Off),
                Request::Reboot => self.power(stream, id, Power::Reboot),
            },
        }
    }

    /// Answers what every guest is asked.
    fn common(&self, request: Common) -> AnyResponse {
        let or = |result: io::Result<CommonResponse>| result.map_or_else(|e| failed(Part::Identity, e), Either::Common);
        Either::Common(match request {
            Common::Ping { token } => CommonResponse::Pong { token },
            Common::Info => {
                let (kind, vcpus) = (GuestKind::Linux, self.system.vcpus());
                CommonResponse::Info(Info { kind, vcpus, pages: 0, pages_base: 0 })
            }
            Common::Nonce => return or(self.system.boot_id().map(CommonResponse::Nonce)),
            Common::Random => return or(self.system.random().map(CommonResponse::Random)),
            Common::Generation => {
                let told = lock(&self.gate).told();
                CommonResponse::Generation(self.system.generation().or(told).unwrap_or_default())
            }
            Common::Time => {
                let (tsc, wall_ns) = self.system.time();
                CommonResponse::Time { tsc, wall_ns }
            }
            _ => CommonResponse::Refused(Refusal::NotHere),
        })
    }

    /// The guest becomes itself, and acknowledges that. Only then is it served to others.
    fn resume(&self, stream: &mut Stream, id: u32, identity: &Identity) -> Result<(), Broken> {
        let _alone = lock(&self.becoming);
        let before = self.signs();
        let taken = identity::take(&*self.system, identity, &self.options.hooks, self.options.hook_deadline);
        let answer = taken.and_then(|()| {
            let generation = identity.resumed.generation;
            // A clone made meanwhile has the same state but not this connection; it must be told by its own host.
            if !stream.is_broken() && lock(&self.gate).settle(generation, before, self.signs()) {
                self.leave_word(before.generation);
                self.host.renew();
                lock(&self.state).news += 1;
                self.news.notify_all();
                return Ok(CommonResponse::Resumed { generation });
            }
            Err(Failure { part: Part::Identity, detail: "the guest was restored again meanwhile".into() })
        });
        let answer = answer.map_or_else(|f| Either::Linux(Response::Failed(f)), Either::Common);
        stream.send(id, &answer)
    }

    fn prepare_snapshot(&self) -> Result<(), Failure> {
        identity::run_hooks(&self.options.hooks.join("pre-snapshot"), &[], self.options.hook_deadline)?;
        self.system.sync();
        Ok(())
    }

    /// Lets go of what the guest remembers of files; how much memory is free then, in KiB.
    fn trim(&self) -> Result<u64, Failure> {
        // Only what is on the disk is let go of.
        self.system.sync();
        let free = self.system.drop_caches().and_then(|()| self.system.free_kib());
        free.map_err(|e| Failure { part: Part::Memory, detail: e.to_string() })
    }

    fn power(&self, stream: &mut Stream, id: u32, power: Power) -> Result<(), Broken> {
        // The answer goes first: afterwards there may be nobody left to send it.
        stream.send(id, &Either::Linux(Response::Done))?;
        if let Err(e) = self.system.power(power) {
            say(format_args!("cannot {power:?}: {e}"));
        }
        Ok(())
    }
}

fn failed(part: Part, error: impl std::fmt::Display) -> AnyResponse {
    Either::Linux(Response::Failed(Failure { part, detail: error.to_string() }))
}

/// What a thread left behind that panicked is still whole: every change here is one assignment.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
