//! What is asked of a guest before a snapshot of it: that it runs its hooks, and gives its free memory back.
//!
//! ```text
//!   request -> the guest's agent, on a thread -> its balloon, by the event loop's clock -> the snapshot
//! ```
//!
//! A hook that fails costs the snapshot: who asks for hooks relies on what they do. All else that a guest does, or fails to
//! do, costs it nothing but that its snapshot is larger.

use super::{Asker, Driver, RequestError, logged};
use crate::machine::requests::{NotNow, Phase};
use crate::machine::snapshot::{self, SnapshotError};
use crate::machine::trim::{Seen, Shortfall, Step, Trim};
use crate::notice::{Asked, Notice};
use crate::sandbox::{self, Kind};
use ::snapshot::create::CreateError;
use api_spec::agent::GuestKind;
use api_spec::client::AgentClient;
use api_spec::client::agent::AgentError;
use api_spec::snapshot::{SnapshotCreate, SnapshotState, SnapshotStatus, Trimmed};
use event_manager::EventOps;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};
use uffd_handler::text::one_line;

/// How long all hooks together may take.
const HOOKS_PATIENCE: Duration = Duration::from_secs(60);
/// How long a guest may take to write back to its disks and to let go of its caches.
const TRIM_PATIENCE: Duration = Duration::from_secs(30);
/// How often the balloon is looked at.
const LOOK: Duration = Duration::from_millis(10);
/// Most of what a guest says about a failure, in characters.
const MOST_SAID: usize = 200;

/// Why a guest cannot be asked to prepare for a snapshot. Nothing was done.
#[derive(Debug, thiserror::Error)]
pub enum Unprepared {
    /// It would not hear.
    #[error("{0}: the VM is paused, and its guest can do nothing; resume it (`PATCH /vm`), or leave `{0}` out")]
    Paused(&'static str),
    /// There is nothing to give memory back through.
    #[error(
        "trim: the VM has no balloon, through which a guest gives memory back: one can be configured before it is started (`PUT /balloon`)"
    )]
    NoBalloon,
    /// It would give nothing back.
    #[error(
        "trim: while the VM has a checkpoint it keeps all of its image, whatever its guest gives back; leave `trim` out"
    )]
    Checkpoint,
    /// There is no way to the agent.
    #[error(
        "{0}: the VM has no vsock device, over which its guest's agent is asked: one can be configured before it is started (`PUT /vsock`)"
    )]
    NoVsock(&'static str),
    /// There is no agent.
    #[error(
        "{0}: the guest has no agent that has said that it is there; `guest-agent` must run in it, and a clone be told who it is"
    )]
    NoAgent(&'static str),
    /// There is an agent that cannot do it.
    #[error("{0}: the embedded guest has neither hooks nor caches; only the agent of a Linux guest can be asked")]
    Embedded(&'static str),
    /// One that was given up still waits for the agent.
    #[error("{0}: the guest's agent is still busy with a snapshot that was given up; ask again in a minute")]
    Busy(&'static str),
    /// No thread.
    #[error("cannot start the thread that asks the guest's agent: {0}")]
    Thread(io::Error),
}

/// A snapshot whose guest prepares for it.
#[derive(Debug)]
pub(super) struct Preparation {
    create: SnapshotCreate,
    asker: Asker,
    began: Instant,
    /// What the guest had given back before, in bytes.
    given_back: u64,
    /// The snapshot was given up.
    is_cancelled: bool,
    /// Once the agent has answered.
    trim: Option<Trim>,
}

/// Asks the agent at the other end of the vsock device, within these bounds of time.
fn ask(vsock: &Path, create: &SnapshotCreate) -> Asked {
    fn one<T>(
        vsock: &Path,
        patience: Duration,
        ask: fn(&mut AgentClient) -> Result<T, AgentError>,
    ) -> Result<T, String> {
        let answer = AgentClient::connect(vsock, patience).and_then(|mut agent| ask(&mut agent));
        // What a guest says may be long, and anything.
        answer.map_err(|e| one_line(&e.to_string()).chars().take(MOST_SAID).collect())
    }
    let hooks = if create.run_hooks { one(vsock, HOOKS_PATIENCE, AgentClient::pre_snapshot) } else { Ok(()) };
    let trims = create.trim && hooks.is_ok();
    let free_mib = if trims { one(vsock, TRIM_PATIENCE, AgentClient::trim).map(|kib| kib >> 10) } else { Ok(0) };
    Asked { hooks, free_mib }
}

impl Driver {
    /// Has the guest prepare for a snapshot that is then taken.
    pub(super) fn prepare(&mut self, create: SnapshotCreate, asker: Asker) -> Result<(), RequestError> {
        let option = if create.run_hooks { "run_hooks" } else { "trim" };
        let machine = self.machine.as_ref().ok_or(NotNow::NotStarted)?;
        if !machine.is_running() {
            return Err(Unprepared::Paused(option).into());
        }
        if create.trim && machine.plan().balloon.is_none() {
            return Err(Unprepared::NoBalloon.into());
        }
        if create.trim && machine.has_checkpoint() {
            return Err(Unprepared::Checkpoint.into());
        }
        let vsock = machine.plan().vsock.as_ref().ok_or(Unprepared::NoVsock(option))?.uds_path.clone();
        match self.agent {
            None => return Err(Unprepared::NoAgent(option).into()),
            Some(GuestKind::Embedded) => return Err(Unprepared::Embedded(option).into()),
            Some(GuestKind::Linux) => {}
        }
        if self.agent_is_busy {
            return Err(Unprepared::Busy(option).into());
        }
        snapshot::check(&create)?;
        let given_back = machine.given_back();

        let (notifier, asked) = (self.notifier.clone(), create.clone());
        // On a thread: the guest may take its time.
        let thread = sandbox::spawn("prepare", Kind::Peer, move || {
            notifier.send(Notice::AskedToPrepare(ask(&vsock, &asked)));
        });
        thread.map_err(Unprepared::Thread)?;
        self.agent_is_busy = true;
        self.status =
            SnapshotStatus { state: SnapshotState::Preparing, ..SnapshotStatus::writing(create.snapshot_path.clone()) };
        let began = Instant::now();
        self.preparation = Some(Preparation { create, asker, began, given_back, is_cancelled: false, trim: None });
        Ok(())
    }

    /// The agent has answered, or will not.
    pub(super) fn on_asked_to_prepare(&mut self, asked: Asked, ops: &mut EventOps) {
        self.agent_is_busy = false;
        let Some(preparation) = self.preparation.as_ref().filter(|preparation| !preparation.is_cancelled) else {
            return;
        };
        let Asked { hooks, free_mib } = asked;
        if let Err(e) = hooks {
            return self.fail_to_prepare(RequestError::Hooks(e), ops);
        }
        if !preparation.create.trim {
            return self.take_prepared(None, ops);
        }
        let begun = free_mib.map_err(Shortfall::Agent).and_then(|free_mib| {
            let machine = self.machine.as_ref();
            let memory_mib = machine.map_or(0, |machine| machine.memory_bytes() >> 20);
            Trim::begin(memory_mib, free_mib, self.look_at_balloon())
        });
        match (begun, &mut self.preparation) {
            (Ok((trim, amount_mib)), Some(preparation)) => {
                preparation.trim = Some(trim);
                self.machine.iter().for_each(|machine| machine.ask_for_balloon(amount_mib));
                self.look.set(Some(LOOK));
            }
            (begun, _) => self.take_prepared(begun.err(), ops),
        }
    }

    fn look_at_balloon(&self) -> Seen {
        let actual = self.machine.as_ref().and_then(|machine| machine.balloon_statistics());
        Seen {
            at: Instant::now(),
            actual_pages: actual.map_or(0, |balloon| balloon.actual_pages),
            home_mib: self.config.balloon.map_or(0, |balloon| balloon.amount_mib),
            is_running: self.phase() == Phase::Running,
        }
    }

    /// It is time to look at the balloon again, or the snapshot was given up.
    pub(super) fn on_look(&mut self, ops: &mut EventOps) {
        let seen = self.look_at_balloon();
        self.look.set(None);
        let Some(preparation) = &mut self.preparation else { return };
        if preparation.is_cancelled {
            let cancelled = SnapshotError::Create(CreateError::Cancelled);
            return self.fail_to_prepare(cancelled.into(), ops);
        }
        let Some(trim) = &mut preparation.trim else { return };
        let step = trim.next(seen);
        match (step, &self.machine) {
            (Step::Wait, _) => self.look.set(Some(LOOK)),
            (Step::Resize(amount_mib), Some(machine)) => {
                machine.ask_for_balloon(amount_mib);
                self.look.set(Some(LOOK));
            }
            (Step::Over, _) | (Step::Resize(_), None) => {
                let shortfall = preparation.trim.take().and_then(Trim::into_shortfall);
                self.take_prepared(shortfall, ops);
            }
        }
    }

    /// Somebody has resized the balloon.
    pub(super) fn balloon_was_resized(&mut self) {
        let seen = self.look_at_balloon();
        if let Some(trim) = self.preparation.as_mut().and_then(|preparation| preparation.trim.as_mut()) {
            trim.was_resized(seen);
        }
    }

    /// Gives the snapshot up that is being prepared. False if there is none.
    pub(super) fn cancel_preparation(&mut self) -> bool {
        let Some(preparation) = &mut self.preparation else { return false };
        preparation.is_cancelled = true;
        self.look.set(Some(Duration::ZERO));
        true
    }

    /// The guest has done what it was asked for, as far as it has: takes the snapshot.
    fn take_prepared(&mut self, shortfall: Option<Shortfall>, ops: &mut EventOps) {
        let Some(preparation) = self.preparation.take() else { return };
        let Preparation { create, asker, began, given_back, .. } = preparation;
        if create.trim {
            let now = self.machine.as_ref().map_or(0, |machine| machine.given_back());
            let trimmed = Trimmed {
                given_back_bytes: now.saturating_sub(given_back),
                took_us: began.elapsed().as_micros() as u64,
                shortfall: shortfall.map(|shortfall| shortfall.to_string()),
            };
            logged(asker, || {
                let Trimmed { given_back_bytes, took_us, .. } = trimmed;
                tracing::info!(given_back_bytes, took_us, "the guest was trimmed for a snapshot");
                if let Some(shortfall) = &trimmed.shortfall {
                    tracing::warn!("the guest could not be trimmed as far as it should: {shortfall}");
                }
            });
            self.trimmed = Some(trimmed);
        }
        if let Err(e) = self.create_snapshot(&create, asker) {
            self.snapshot_has_failed(&e, asker, ops);
        }
    }

    /// There will be no snapshot.
    fn fail_to_prepare(&mut self, error: RequestError, ops: &mut EventOps) {
        let Some(Preparation { asker, trim, .. }) = self.preparation.take() else { return };
        if let (Some(_), Some(machine)) = (trim, &self.machine) {
            machine.ask_for_balloon(self.config.balloon.map_or(0, |balloon| balloon.amount_mib));
        }
        logged(asker, || tracing::info!("a snapshot failed: {error}"));
        self.snapshot_has_failed(&error, asker, ops);
    }
}
