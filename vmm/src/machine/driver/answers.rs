//! What each request does.

use super::{Asker, Driver, IfItFails, RequestError, Save, change_log};
use crate::api::server::Pending;
use crate::api::{Request, Response};
use crate::logging;
use crate::machine::Machine;
use crate::machine::config;
use crate::machine::phases::us_since;
use crate::machine::requests::{self, NotNow, Phase, Work};
use crate::machine::saved;
use crate::machine::snapshot;
use crate::memory::layout::MAX_MIB;
use crate::notice::Halt;
use api_spec::devices::{BalloonStatisticsUpdate, BalloonUpdate, DriveUpdate, NetworkUpdate};
use api_spec::error::ErrorBody;
use api_spec::logger::Logger;
use api_spec::reset::VmCheckpoint;
use api_spec::saved::{Saved, VmStop};
use api_spec::snapshot::{SnapshotCancel, SnapshotCreate, SnapshotState, SnapshotStatus};
use api_spec::vm::{
    Action, ActionType, InstanceInfo, InstanceState, MachinePatch, Version, VmConfig, VmPatch, VmSave, VmState,
};
use rustix::fs::{Access, access};
use std::io;
use std::path::Path;
use std::time::Instant;

/// What whoever asks for something at the very end is told.
pub(super) const ENDING: &str = "the vmm is ending, and what was asked for is not done";

impl Driver {
    /// Answers a request; `None` if the answer comes later.
    pub(super) fn answer(&mut self, request: Request, from: Pending) -> Option<Response> {
        let _span = logging::request_span(from.request).entered();
        if self.ending.is_some() {
            return Some(Response::fault(400, ENDING));
        }
        let work = match (&self.save, self.is_awaited()) {
            _ if self.shutdown.is_some() || self.postponed.is_some() => Work::Stopping,
            (Some(_), _) => Work::Saving,
            (None, true) => Work::Writing,
            (None, false) => Work::None,
        };
        let starts = matches!(request, Request::Action(Action { action_type: ActionType::InstanceStart }));
        let outcome = requests::may(&request, self.phase(), work)
            .map_err(RequestError::from)
            .and_then(|()| self.obey(request, from));
        match outcome {
            Ok(response) => response,
            Err(e) => {
                // Whoever starts a VM may have configured it in many steps, and over some time.
                let config = (starts && self.machine.is_none()).then(|| Box::new(self.config.clone()));
                Some(Response::refusal(400, &ErrorBody { fault_message: e.to_string(), config }))
            }
        }
    }

    /// Does what a legal request asks for.
    fn obey(&mut self, request: Request, from: Pending) -> Result<Option<Response>, RequestError> {
        let document = match request {
            Request::Info => Response::document(&self.info()),
            Request::Version => Response::document(&Version { firecracker_version: env!("CARGO_PKG_VERSION").into() }),
            Request::Config => Response::document(&self.config),
            Request::GetMachineConfig => Response::document(&self.config.machine_config),
            Request::SnapshotStatus => Response::document(&self.snapshot_status()),
            Request::GetBalloon => Response::document(self.config.balloon.as_ref().ok_or(RequestError::NoBalloon)?),
            Request::GetBalloonStatistics => {
                let statistics = self.machine.as_ref().and_then(Machine::balloon_statistics);
                Response::document(&statistics.ok_or(RequestError::NoBalloon)?)
            }
            Request::GetStats => return self.get_stats(from),
            Request::GetMemoryMap(query) => return self.get_memory_map(query, from),
            Request::GetMetrics => return self.get_metrics(from),
            Request::SnapshotCreate(create) => {
                return self.ask_for_snapshot(create, Asker::Client(from)).map(|()| None);
            }
            Request::CheckpointVm(VmCheckpoint {}) => Response::document(&self.checkpoint()?),
            Request::ForkVm(fork) => return self.fork(fork, from).map(|()| None),
            Request::ForkLoad(load) => return self.load_fork(&load, from).map(|()| Some(Response::done())),
            Request::ResetVm(reset) => Response::document(&self.reset(&reset)?),
            Request::SaveVm(save) => return self.save(save, Asker::Client(from)).map(|()| None),
            Request::StopVm(VmStop { mode }) => {
                let stopped = self.stop(mode, Asker::Client(from))?;
                return Ok(stopped.map(|stopped| Response::document(&stopped)));
            }
            change => return self.change(change).map(|()| Some(Response::done())),
        };
        Ok(Some(document))
    }

    /// Does what a legal request asks for that has nothing to tell.
    fn change(&mut self, request: Request) -> Result<(), RequestError> {
        match request {
            Request::PutMachineConfig(machine) => {
                config::check_machine(&machine)?;
                self.configure(|config| config.machine_config = machine)
            }
            Request::PatchMachineConfig(patch) => self.patch_machine(patch),
            Request::PutBootSource(source) => {
                config::check_boot_source(&source)?;
                readable("boot-source.kernel_image_path", source.kernel_image_path.as_deref())?;
                readable("boot-source.initrd_path", source.initrd_path.as_deref())?;
                self.configure(|config| config.boot_source = Some(source))
            }
            Request::PutVsock(vsock) => {
                config::check_vsock(&vsock)?;
                self.configure(|config| config.vsock = Some(vsock))
            }
            Request::PutDrive(drive) => {
                let path = drive.path_on_host.clone();
                let drives = config::with_drive(&self.config.drives, drive)?;
                readable("drives.path_on_host", Some(&path))?;
                self.configure(|config| config.drives = drives)
            }
            Request::PutNetworkInterface(interface) => {
                let interfaces = config::with_interface(&self.config.network_interfaces, interface)?;
                self.configure(|config| config.network_interfaces = interfaces)
            }
            Request::PutEntropy(entropy) => {
                config::check_entropy(&entropy)?;
                self.configure(|config| config.entropy = Some(entropy))
            }
            Request::PutBalloon(balloon) => {
                // How much memory there is may be said later; starting checks again.
                config::check_balloon_config(&balloon, MAX_MIB)?;
                self.configure(|config| config.balloon = Some(balloon))
            }
            Request::PutSavedState(saved) => {
                config::check_saved_state(&saved)?;
                self.configure(|config| config.saved_state = Some(saved))
            }
            Request::PutSerial(serial) => {
                config::check_serial(Some(&serial))?;
                if self.shell.is_some() {
                    return Err(RequestError::ShellHasConsole);
                }
                // No part of what is booted: a snapshot can be loaded all the same.
                self.config.serial = Some(serial);
                Ok(())
            }
            Request::PutLogger(logger) => self.put_logger(logger),
            Request::PutMetrics(sink) => Ok(self.set_metrics(sink)?),
            Request::PatchDrive(update) => self.patch_drive(&update),
            Request::PatchNetworkInterface(update) => self.patch_network(&update),
            Request::PatchBalloon(update) => self.patch_balloon(update),
            Request::PatchBalloonStatistics(update) => self.patch_balloon_statistics(update),
            Request::Action(Action { action_type }) => match action_type {
                ActionType::InstanceStart => self.start_configured(),
                ActionType::FlushMetrics => Ok(self.flush_metrics()?),
                ActionType::SendCtrlAltDel => Err(RequestError::NoKeyboard),
            },
            Request::PatchVm(patch) => self.patch_vm(patch),
            Request::SnapshotLoad(load) => self.load(&load),
            Request::SnapshotCancel(SnapshotCancel {}) => self.cancel_snapshot(),
            Request::Declined(operation) => Err(RequestError::Declined(operation)),
            // Those that are answered with more than that they were done.
            Request::Info
            | Request::Version
            | Request::Config
            | Request::GetMachineConfig
            | Request::GetBalloon
            | Request::GetBalloonStatistics
            | Request::SnapshotStatus
            | Request::GetStats
            | Request::GetMemoryMap(_)
            | Request::GetMetrics
            | Request::SnapshotCreate(_)
            | Request::SaveVm(_)
            | Request::CheckpointVm(_)
            | Request::ForkVm(_)
            | Request::ForkLoad(_)
            | Request::ResetVm(_)
            | Request::StopVm(_) => Ok(()),
        }
    }

    /// Changes the configuration of a VM that is still to be booted, unless that leaves a device without a place.
    fn configure(&mut self, change: impl FnOnce(&mut VmConfig)) -> Result<(), RequestError> {
        let mut config = self.config.clone();
        change(&mut config);
        config::check_room(&config)?;
        self.config = config;
        self.configured = true;
        // No snapshot is loaded into it any more.
        self.shell = None;
        Ok(())
    }

    fn put_logger(&mut self, logger: Logger) -> Result<(), RequestError> {
        change_log(&logger)?;
        let Logger { log_path, level, show_level, show_log_origin, module, format } = logger;
        let known = self.config.logger.take().unwrap_or_default();
        self.config.logger = Some(Logger {
            log_path: log_path.or(known.log_path),
            level: level.or(known.level),
            show_level: show_level.or(known.show_level),
            show_log_origin: show_log_origin.or(known.show_log_origin),
            module: module.or(known.module),
            format: format.or(known.format),
        });
        Ok(())
    }

    fn patch_machine(&mut self, patch: MachinePatch) -> Result<(), RequestError> {
        if self.machine.is_none() {
            let machine = config::with_machine(&self.config.machine_config, patch)?;
            return self.configure(|config| config.machine_config = machine);
        }
        if let Some(max_private_mib) = config::check_machine_update(patch)? {
            self.private.set_limit(max_private_mib).map_err(RequestError::Limit)?;
            self.config.machine_config.max_private_mib = max_private_mib;
            self.look_at_private_memory();
        }
        Ok(())
    }

    fn patch_drive(&mut self, update: &DriveUpdate) -> Result<(), RequestError> {
        let machine = self.machine.as_mut().ok_or(NotNow::NotStarted)?;
        let drive = config::with_drive_update(&machine.plan().drives, update)?;
        machine.set_drive_bounds(drive);
        self.config.drives = machine.plan().drives.clone();
        Ok(())
    }

    fn patch_network(&mut self, update: &NetworkUpdate) -> Result<(), RequestError> {
        let machine = self.machine.as_mut().ok_or(NotNow::NotStarted)?;
        let interface = config::with_network_update(&machine.plan().network, update)?;
        machine.set_network_bounds(interface);
        self.config.network_interfaces = machine.plan().network.clone();
        Ok(())
    }

    /// Takes a snapshot, once the guest is prepared for it if it is to be.
    pub(super) fn ask_for_snapshot(&mut self, create: SnapshotCreate, asker: Asker) -> Result<(), RequestError> {
        // A guest that was prepared would go on meanwhile.
        if self.job.is_some() {
            self.status = SnapshotStatus::writing(create.snapshot_path.clone());
            self.next = Some((create, asker));
            return Ok(());
        }
        let before = self.trimmed.take();
        let prepares = create.run_hooks || create.trim;
        let asked = if prepares { self.prepare(create, asker) } else { self.create_snapshot(&create, asker) };
        if asked.is_err() {
            self.trimmed = before;
        }
        asked
    }

    /// How the last snapshot went, or how far it is.
    fn snapshot_status(&self) -> SnapshotStatus {
        let memory_bytes = match (&self.job, self.status.state) {
            (Some(job), SnapshotState::Writing) if self.next.is_none() => job.written_bytes(),
            _ => self.status.memory_bytes,
        };
        SnapshotStatus { memory_bytes, trimmed: self.trimmed.clone(), ..self.status.clone() }
    }

    /// Has the snapshot that is being written given up, or the one that waits for its turn.
    fn cancel_snapshot(&mut self) -> Result<(), RequestError> {
        if self.cancel_preparation() {
            return Ok(());
        }
        match (&self.job, &self.waiting, &self.next) {
            (Some(job), Some(_), _) => job.cancel(),
            (_, None, Some(_)) => self.next_is_cancelled = true,
            _ => return Err(NotNow::NotWriting.into()),
        }
        Ok(())
    }

    /// Has the guest stand still, and takes a snapshot after which the vmm ends.
    fn save(&mut self, save: VmSave, asker: Asker) -> Result<(), RequestError> {
        let VmSave { snapshot_path } = save;
        // One that stands still for want of a page server would go on by itself.
        let was_running = self.phase() == Phase::Running || matches!(self.halt, Some(Halt::PageServer { .. }));
        self.patch_vm(VmPatch { state: VmState::Paused })?;
        self.save = Some(Save { if_it_fails: if was_running { IfItFails::GoOn } else { IfItFails::StayPaused } });
        let asked = self.ask_for_snapshot(SnapshotCreate::of(snapshot_path), asker);
        if asked.is_err() {
            self.saved(false);
        }
        asked
    }

    /// The snapshot after which the vmm was to end is complete, or has failed. Then the guest goes on.
    pub(super) fn saved(&mut self, complete: bool) {
        let Some(Save { if_it_fails }) = self.save.take() else { return };
        if complete {
            self.end(Ok(super::Ending::Saved));
        } else if if_it_fails == IfItFails::GoOn
            && let Err(e) = self.patch_vm(VmPatch { state: VmState::Resumed })
        {
            tracing::error!("the guest could not be saved, and does not go on: {e}");
            if let RequestError::Halt(halt) = e {
                self.halt = Some(halt);
            }
        }
    }

    pub(super) fn create_snapshot(&mut self, create: &SnapshotCreate, asker: Asker) -> Result<(), RequestError> {
        let stops = self.stops_with_it();
        let machine = self.machine.as_mut().ok_or(NotNow::NotStarted)?;
        let saved = self.origin.as_ref().filter(|_| stops);
        let job = snapshot::create(machine, create, saved, self.readiness, self.notifier.clone(), &self.signals)?;
        self.times_reset = machine.times_reset();
        self.job = Some(job);
        self.waiting = Some(asker);
        self.status = SnapshotStatus::writing(create.snapshot_path.clone());
        Ok(())
    }

    pub(super) fn patch_vm(&mut self, patch: VmPatch) -> Result<(), RequestError> {
        // If a snapshot has brought it to a standstill meanwhile, this is the end of it.
        if self.halting.is_some() && self.phase() == Phase::Paused {
            self.go_on_halting();
        }
        let changes = requests::changes(self.phase(), patch.state);
        let machine = self.machine.as_mut().ok_or(NotNow::NotStarted)?;
        match patch.state {
            VmState::Paused if !changes => self.keep_halted(),
            _ if !changes => {}
            VmState::Paused => {
                let start = Instant::now();
                machine.pause()?;
                self.latencies.pause_us = Some(us_since(start));
                self.private.stop();
                self.keep_halted();
            }
            VmState::Resumed => {
                if let Some(halt) = self.private.reached().or_else(|| unserved(machine)) {
                    return Err(RequestError::Halt(halt));
                }
                let start = Instant::now();
                machine.resume();
                self.latencies.resume_us = Some(us_since(start));
                self.private.start();
                self.halt = None;
            }
        }
        Ok(())
    }

    fn patch_balloon(&mut self, update: BalloonUpdate) -> Result<(), RequestError> {
        let BalloonUpdate { amount_mib } = update;
        let machine = self.machine.as_mut().ok_or(NotNow::NotStarted)?;
        config::check_balloon(amount_mib, machine.memory_bytes() >> 20)?;
        if !machine.set_balloon(amount_mib) {
            return Err(RequestError::NoBalloon);
        }
        self.config.balloon = machine.plan().balloon;
        self.balloon_was_resized();
        Ok(())
    }

    fn patch_balloon_statistics(&mut self, update: BalloonStatisticsUpdate) -> Result<(), RequestError> {
        let BalloonStatisticsUpdate { stats_polling_interval_s } = update;
        let machine = self.machine.as_mut().ok_or(NotNow::NotStarted)?;
        let balloon = machine.plan().balloon.ok_or(RequestError::NoBalloon)?;
        config::check_interval(balloon.stats_polling_interval_s, stats_polling_interval_s)?;
        machine.set_balloon_interval(stats_polling_interval_s);
        self.config.balloon = machine.plan().balloon;
        Ok(())
    }

    pub(super) fn info(&self) -> InstanceInfo {
        InstanceInfo {
            id: self.id.clone(),
            state: match self.phase() {
                Phase::NotStarted { .. } => InstanceState::NotStarted,
                Phase::Paused => InstanceState::Paused,
                Phase::Running => InstanceState::Running,
            },
            vmm_version: env!("CARGO_PKG_VERSION").into(),
            app_name: "Coppice".into(),
            readiness: self.readiness,
            console: self.pty.as_ref().map(|pty| pty.path.clone()),
            pause_reason: self.halt.as_ref().or(self.halting.as_ref()).map(Halt::to_string),
            page_server: self.machine.as_ref().and_then(Machine::page_server).map(|server| server.stats().state),
            started: self.started.clone(),
            saved: self.config.saved_state.as_ref().map(|saved| self.saved_at(&saved.path)),
        }
    }

    fn saved_at(&self, path: &Path) -> Saved {
        let found = saved::look(path, &self.config).ok().flatten();
        Saved { exists: found.is_some(), bytes: found.map_or(0, |found| found.bytes) }
    }
}

/// Why a guest would not get far, if nobody serves its pages.
fn unserved(machine: &Machine) -> Option<Halt> {
    let server = machine.page_server()?;
    Some(Halt::PageServer { path: server.path().to_owned(), reason: server.unserved()? })
}

/// Looks whether there is something to read at a path, so that who names it is told at once. What is in it is looked at when
/// it is opened, at the start.
fn readable(field: &'static str, path: Option<&Path>) -> Result<(), RequestError> {
    let Some(path) = path else { return Ok(()) };
    let look = || -> io::Result<()> {
        access(path, Access::READ_OK)?;
        if std::fs::metadata(path)?.is_dir() { Err(io::ErrorKind::IsADirectory.into()) } else { Ok(()) }
    };
    look().map_err(|source| RequestError::Unreadable { field, path: path.to_owned(), source })
}
