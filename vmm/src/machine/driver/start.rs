//! How a VM comes about: booted, restored from a snapshot, or gone on with where it was saved.

use super::{Driver, RequestError};
use crate::console::{Input, Pty};
use crate::host;
use crate::machine::Machine;
use crate::machine::boot::boot;
use crate::machine::config::{self, BootPlan};
use crate::machine::phases::Phases;
use crate::machine::record;
use crate::machine::restore::{self, Loadable, RestoreError};
use crate::machine::saved::{self, Configuration, Found, GoingOn, GoingOnError, OpenError, State, Then};
use crate::machine::shell::Shell;
use crate::memory::program;
use api_spec::saved::{SavedState, StartMode, Started};
use api_spec::snapshot::SnapshotLoad;
use api_spec::stats::TracedOperation;
use api_spec::vm::VmConfig;
use snapshot::create::clear_leftovers;
use std::io;

/// Bit of the state of KVM's clock: it says when it was read, by the host's time of day.
const CLOCK_HAS_TIME_OF_DAY: u32 = kvm_bindings::KVM_CLOCK_REALTIME;

/// Why a machine does not go on from its saved state.
#[derive(Debug, thiserror::Error)]
enum CannotGoOn {
    /// It cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The configuration of today does not allow it.
    #[error(transparent)]
    GoingOn(#[from] GoingOnError),
    /// It cannot be restored.
    #[error("{0}")]
    Restore(String),
    /// It could be used twice.
    #[error("it cannot be marked as used, and a saved state is used once: {0}")]
    Mark(io::Error),
}

impl Driver {
    /// Starts what is configured: where it was saved, if it was.
    pub(super) fn start_configured(&mut self) -> Result<(), RequestError> {
        let plan = config::plan(&self.config)?;
        let Some(SavedState { path, strict, save_on_stop: _ }) = self.config.saved_state.clone() else {
            return self.boot(&plan, || ());
        };
        if !path.parent().is_some_and(|above| above.as_os_str().is_empty() || above.is_dir()) {
            return Err(RequestError::NoParent(path));
        }
        clear_leftovers(&path);
        let (reason, then) = match saved::find(&path) {
            Found::Nothing => (None, Then::Leave),
            Found::Unusable { reason, then } => (Some(reason), then),
            Found::Fresh(state) => match self.go_on(&state) {
                Ok(()) => {
                    state.remove();
                    return Ok(());
                }
                Err(e) => (Some(format!("{}: {e}", path.display())), Then::SetAside(Some(state))),
            },
        };
        if let (Some(reason), true) = (&reason, strict) {
            return Err(RequestError::Strict(reason.clone()));
        }
        let origin = Configuration::of(&self.config);
        // Not before it is certain that it boots, and not after its guest has run, which a later start must not undo.
        self.boot(&plan, || then.apply(&path))?;
        if let Some(reason) = &reason {
            tracing::warn!("the VM was booted, since its saved state cannot be used. {reason}");
        }
        self.origin = Some(origin);
        self.started = Some(Started { mode: StartMode::Cold, reason, drift: false });
        Ok(())
    }

    /// Goes on where the machine was saved.
    fn go_on(&mut self, state: &State) -> Result<(), CannotGoOn> {
        let (snapshot, origin) = saved::open(state.path())?;
        let manifest = snapshot.manifest();
        let has_clock = snapshot.state().vm.clock.flags & CLOCK_HAS_TIME_OF_DAY != 0;
        let GoingOn { load, in_place } =
            saved::plan(state.path(), &manifest.devices, has_clock, &origin, &self.config)?;
        let drift = origin.digest() != Configuration::of(&self.config).digest();
        let configured = self.config.clone();
        self.restore(&load, &in_place, |machine| {
            bound(machine, &configured);
            // It is about to be removed.
            machine.forget_snapshots();
            // What fails from here on costs the saved state.
            state.mark_as_used().map_err(CannotGoOn::Mark)
        })?;
        self.config.boot_source = origin.config().boot_source.clone();
        self.readiness = manifest.readiness.map(record::readiness_of);
        tracing::info!(drift, "the VM goes on from its saved state {}", state.path().display());
        if drift {
            tracing::warn!(
                "the VM was saved with another configuration, and goes on with that until it is booted again"
            );
        }
        self.origin = Some(origin);
        self.started = Some(Started { mode: StartMode::Restored, reason: None, drift });
        Ok(())
    }

    /// Boots what is planned. `first` is done when nothing can fail any more, before the guest runs.
    fn boot(&mut self, plan: &BootPlan, first: impl FnOnce()) -> Result<(), RequestError> {
        let mut phases = Phases::of(TracedOperation::Boot);
        // What is booted may want the same sockets.
        self.shell = None;
        self.private.set_limit(self.config.machine_config.max_private_mib).map_err(RequestError::Limit)?;
        let (outside, input, pty) = self.outside()?;
        phases.end("console");
        let mut machine = boot(plan, outside, &mut phases)?;
        first();
        machine.resume();
        phases.end("resume");
        self.latencies.boot_us = Some(phases.total_us());
        self.keep_trace(phases);
        self.adopt(machine, (input, pty));
        tracing::info!("booted: {} vCPUs, {} MiB", plan.vcpus, plan.memory_bytes >> 20);
        Ok(())
    }

    /// Builds a shell of what is configured.
    pub(super) fn build_shell(&mut self) -> Result<(), RequestError> {
        let mut phases = Phases::of(TracedOperation::Shell);
        let shape = config::shape(&self.config)?;
        let (outside, input, pty) = self.outside()?;
        phases.end("console");
        let mut shell = Shell::build(shape, outside, &mut phases).map_err(RestoreError::from)?;
        // What a load will need, and this process can find out and have at hand before.
        host::to_compare();
        program::populate();
        shell.rehearse();
        self.shell = Some((shell, (input, pty)));
        phases.end("rehearsal");
        self.keep_trace(phases);
        Ok(())
    }

    /// The shell that is there, if the snapshot fits it. One that it does not fit is of no use any more.
    fn shell_for(&mut self, loadable: &impl Loadable) -> Option<(Shell, (Input, Option<Pty>))> {
        let (shell, console) = self.shell.take()?;
        match loadable.fits(&shell) {
            Ok(()) => Some((shell, console)),
            Err(misfit) => {
                tracing::warn!(
                    "the snapshot does not fit the shell, and is loaded without, which takes longer: {misfit}"
                );
                None
            }
        }
    }

    pub(super) fn load(&mut self, load: &SnapshotLoad) -> Result<(), RequestError> {
        self.restore(load, &[], |_| Ok(()))
    }

    /// Restores a machine that goes on writing the images of the disks `in_place`. `first` is done before the guest runs.
    fn restore<E: From<RequestError>>(
        &mut self,
        load: &SnapshotLoad,
        in_place: &[String],
        first: impl FnOnce(&mut Machine) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut phases = Phases::of(TracedOperation::Load);
        config::check_max_private(load.max_private_mib).map_err(RequestError::from)?;
        self.private.set_limit(load.max_private_mib).map_err(RequestError::Limit)?;
        let opened = restore::open(load, in_place, &mut phases).map_err(RequestError::from)?;
        self.bring_in(opened, load.resume_vm, phases, first)?;
        self.config.machine_config.max_private_mib = load.max_private_mib;
        Ok(())
    }

    /// Loads a machine into a shell, and has its guest run if it is to. `first` is done before that.
    pub(super) fn bring_in<L: Loadable, E: From<RequestError>>(
        &mut self,
        mut loadable: L,
        runs: bool,
        mut phases: Phases,
        first: impl FnOnce(&mut Machine) -> Result<(), E>,
    ) -> Result<(), E> {
        let former = self.shell.as_ref().map(|(shell, _)| shell.shape());
        let (shell, console) = match self.shell_for(&loadable) {
            Some(shell) => shell,
            None => {
                let (outside, input, pty) = self.outside()?;
                phases.end("console");
                (loadable.shell(former, outside, &mut phases).map_err(RequestError::from)?, (input, pty))
            }
        };
        let loaded = loadable.load(shell, &self.notifier, &self.signals, &mut phases);
        let mut machine = loaded.map_err(RequestError::from)?;
        first(&mut machine)?;
        if runs {
            machine.resume();
        }
        phases.end("resume");
        self.latencies.load_us = Some(phases.total_us());
        self.keep_trace(phases);
        self.adopt(machine, console);
        Ok(())
    }
}

impl From<RequestError> for CannotGoOn {
    fn from(e: RequestError) -> Self {
        CannotGoOn::Restore(e.to_string())
    }
}

/// Gives a machine's devices the bounds that are configured now for those of the same names.
fn bound(machine: &mut Machine, configured: &VmConfig) {
    for mut drive in machine.plan().drives.clone() {
        if let Some(now) = configured.drives.iter().find(|now| now.drive_id == drive.drive_id) {
            (drive.max_overlay_mib, drive.rate_limiter) = (now.max_overlay_mib, now.rate_limiter);
            machine.set_drive_bounds(drive);
        }
    }
    for mut interface in machine.plan().network.clone() {
        if let Some(now) = configured.network_interfaces.iter().find(|now| now.iface_id == interface.iface_id) {
            (interface.rx_rate_limiter, interface.tx_rate_limiter) = (now.rx_rate_limiter, now.tx_rate_limiter);
            machine.set_network_bounds(interface);
        }
    }
    if let Some(entropy) = configured.entropy {
        machine.set_entropy_bound(entropy);
    }
}
