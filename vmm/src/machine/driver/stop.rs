//! How a VM is stopped: saved, shut down or ended.

use super::{Asker, Driver, Ending, IfItFails, RequestError, RunError, Save, told};
use crate::api::Response;
use crate::machine::saved;
use crate::notice::Notice;
use crate::sandbox::{self, Kind};
use api_spec::client::AgentClient;
use api_spec::saved::{SavedState, StopMode, Stopped, VmStopped};
use api_spec::snapshot::{SnapshotCreate, SnapshotState, SnapshotStatus};
use api_spec::vm::{VmPatch, VmState};
use event_manager::EventOps;
use std::path::PathBuf;
use std::time::Duration;

/// How long a guest has to switch itself off.
const LAST_CALL: Duration = Duration::from_secs(30);
/// How long its agent has to say that it does so.
const AGENT_PATIENCE: Duration = Duration::from_secs(5);

/// A guest that is being shut down.
#[derive(Debug)]
pub(super) struct Shutdown {
    /// Who is told.
    asker: Asker,
    /// Why it is not saved instead, if it was to be.
    reason: Option<String>,
}

/// What whoever waits at the end of the process is told of a guest that was to stop.
fn stopped(ending: &Result<Ending, RunError>, reason: Option<String>) -> VmStopped {
    let how = match ending {
        Ok(Ending::Saved) => Stopped::Saved,
        Ok(Ending::PowerOff | Ending::Reset) => Stopped::ShutDown,
        Ok(Ending::Signal | Ending::Stopped) | Err(_) => Stopped::Ended,
    };
    VmStopped { how, reason: reason.or_else(|| Some(ending.as_ref().err()?.to_string())) }
}

impl Driver {
    /// Ends the process, or has the guest saved if the configuration says so. Whoever insists is obeyed.
    pub(super) fn on_signal(&mut self, ops: &mut EventOps) {
        let saves = self.config.saved_state.as_ref().is_some_and(|saved| saved.save_on_stop);
        let is_stopping = self.save.is_some() || self.shutdown.is_some() || self.postponed.is_some();
        if !saves || is_stopping || self.machine.is_none() || self.ending.is_some() {
            return self.end(Ok(Ending::Signal));
        }
        // So that another one is noticed, by whoever looks.
        self.signals.take();
        if let Err(e) = self.stop(Some(StopMode::Save), Asker::Signal) {
            tracing::error!("the VM is not saved: {e}");
            self.end(Ok(Ending::Signal));
        }
        self.go_on_stopping(ops);
    }

    /// Stops the VM. What became of its guest, if that is known at once.
    pub(super) fn stop(&mut self, mode: Option<StopMode>, asker: Asker) -> Result<Option<VmStopped>, RequestError> {
        let place = self.config.saved_state.as_ref();
        let by_default =
            if place.is_some_and(|saved| saved.save_on_stop) { StopMode::Save } else { StopMode::Shutdown };
        match mode.unwrap_or(by_default) {
            StopMode::Force => Ok(Some(self.end_stopped(None))),
            StopMode::Shutdown => Ok(self.shut_down(asker, None)),
            StopMode::Save => {
                let SavedState { path, .. } = place.ok_or(RequestError::NoPlace)?.clone();
                if self.is_awaited() {
                    // Whoever stops the VM may not have the time that a guest takes for that.
                    self.cancel_preparation();
                    self.postponed = Some(asker);
                    return Ok(None);
                }
                match self.save_to_go_on(path, asker) {
                    Ok(()) => Ok(None),
                    Err(e) => Ok(self.shut_down(asker, Some(e.to_string()))),
                }
            }
        }
    }

    /// Stops the VM if that was to wait until a snapshot was complete.
    pub(super) fn go_on_stopping(&mut self, ops: &mut EventOps) {
        if self.is_awaited() || self.ending.is_some() {
            return;
        }
        let Some(asker) = self.postponed.take() else { return };
        let response = match self.stop(Some(StopMode::Save), asker) {
            Ok(stopped) => stopped.map(|stopped| Response::document(&stopped)),
            Err(e) => Some(Response::fault(400, &e.to_string())),
        };
        if let Some(response) = response {
            self.respond(asker, &response, ops);
        }
    }

    /// Has the guest stand still, and takes a snapshot from which the next start goes on.
    fn save_to_go_on(&mut self, path: PathBuf, asker: Asker) -> Result<(), RequestError> {
        self.patch_vm(VmPatch { state: VmState::Paused })?;
        saved::make_room(&path);
        self.save = Some(Save { if_it_fails: IfItFails::ShutDown });
        let asked = self.ask_for_snapshot(SnapshotCreate::of(path), asker);
        if asked.is_err() {
            self.save = None;
        }
        asked
    }

    /// What follows from a snapshot that is complete or has failed, as `status` says; and what whoever asked for it is told,
    /// unless that comes later.
    pub(super) fn concluded(&mut self, asker: Asker) -> Option<Response> {
        let is_complete = self.status.state == SnapshotState::Done;
        if !self.stops_with_it() {
            self.saved(is_complete);
            return Some(told(&self.status));
        }
        self.save = None;
        if is_complete {
            self.end(Ok(Ending::Saved));
            return Some(Response::document(&VmStopped { how: Stopped::Saved, reason: None }));
        }
        self.shut_down(asker, self.status.error.clone()).map(|stopped| Response::document(&stopped))
    }

    /// What whoever waits for a snapshot is told when the process ends, and the snapshot is as this says.
    pub(super) fn last_word(&self, status: &SnapshotStatus) -> Response {
        if !self.stops_with_it() {
            return told(status);
        }
        let how = if status.state == SnapshotState::Done { Stopped::Saved } else { Stopped::Ended };
        Response::document(&VmStopped { how, reason: status.error.clone() })
    }

    /// Says what is left of a save that was still going on when the process was to end.
    pub(super) fn tell_of_save(&self, status: &SnapshotStatus) {
        let Some(path) = status.snapshot_path.as_ref().filter(|_| self.stops_with_it()).map(|path| path.display())
        else {
            return;
        };
        match &status.error {
            None => tracing::info!("the VM was saved all the same: the next start goes on from {path}"),
            Some(error) => tracing::warn!(
                "the save of the VM is given up, since it is to end at once ({error}): nothing is left at {path}, and the next start boots"
            ),
        }
    }

    /// Whether the snapshot is one with which the VM stops, come what may.
    pub(super) fn stops_with_it(&self) -> bool {
        matches!(self.save, Some(Save { if_it_fails: IfItFails::ShutDown }))
    }

    /// Has the guest switch itself off, or ends it at once if it cannot be asked. `reason` says why it is not saved, if it
    /// was to be.
    fn shut_down(&mut self, asker: Asker, reason: Option<String>) -> Option<VmStopped> {
        if let Some(reason) = &reason {
            tracing::warn!("the VM could not be saved, and is shut down: {reason}");
        }
        match self.ask_to_power_off() {
            Ok(()) => {
                self.last_call.set(Some(LAST_CALL));
                self.shutdown = Some(Shutdown { asker, reason });
                None
            }
            Err(e) => {
                tracing::info!("the guest cannot be asked to switch itself off: {e}");
                Some(self.end_stopped(reason))
            }
        }
    }

    /// Asks the guest's agent, on a thread: the guest may take its time.
    fn ask_to_power_off(&mut self) -> Result<(), String> {
        let vsock = self.machine.as_ref().and_then(|machine| machine.plan().vsock.as_ref());
        let path = vsock.ok_or("it has no vsock device")?.uds_path.clone();
        // A guest that stands still hears nothing.
        self.patch_vm(VmPatch { state: VmState::Resumed }).map_err(|e| e.to_string())?;
        let notifier = self.notifier.clone();
        let ask = move || {
            let asked = AgentClient::connect(&path, AGENT_PATIENCE).and_then(|mut agent| agent.power_off());
            notifier.send(Notice::AskedToPowerOff(asked.map_err(|e| e.to_string())));
        };
        let thread = sandbox::spawn("shutdown", Kind::Peer, ask);
        thread.map(drop).map_err(|e| format!("no thread for it: {e}"))
    }

    pub(super) fn on_asked_to_power_off(&mut self, answer: Result<(), String>) {
        if let (Some(_), Err(e)) = (&self.shutdown, answer) {
            tracing::info!("the guest's agent does not switch it off: {e}");
            self.end(Ok(Ending::Stopped));
        }
    }

    /// The guest has had its time.
    pub(super) fn on_last_call(&mut self) {
        tracing::warn!("the guest has not switched itself off within {} s, and is ended", LAST_CALL.as_secs());
        self.end(Ok(Ending::Stopped));
    }

    fn end_stopped(&mut self, reason: Option<String>) -> VmStopped {
        self.end(Ok(Ending::Stopped));
        VmStopped { how: Stopped::Ended, reason }
    }

    /// Who waits for the VM to stop, and what they are told when the process ends.
    pub(super) fn last_words(&mut self, ending: &Result<Ending, RunError>) -> Option<(Asker, Response)> {
        let (asker, reason) = match self.shutdown.take() {
            Some(Shutdown { asker, reason }) => (asker, reason),
            None => {
                let asker = self.postponed.take()?;
                tracing::warn!(
                    "the VM is not saved, since it is to end at once, before the snapshot is complete that this waited for: the next start boots"
                );
                (asker, None)
            }
        };
        Some((asker, Response::document(&stopped(ending, reason))))
    }
}
