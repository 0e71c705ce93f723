//! How a VM is forked, and becomes a fork of another.

use super::{Asker, Driver, RequestError};
use crate::api::Response;
use crate::api::server::Pending;
use crate::machine::fork;
use crate::machine::phases::Phases;
use crate::machine::requests::NotNow;
use api_spec::fork::{ForkLoad, VmFork, VmForked};
use api_spec::stats::TracedOperation;
use event_manager::EventOps;

impl Driver {
    /// Has other vmms become clones of the VM. The answer comes when they are.
    pub(super) fn fork(&mut self, request: VmFork, from: Pending) -> Result<(), RequestError> {
        if self.forking.is_some() {
            return Err(RequestError::Forking);
        }
        let machine = self.machine.as_mut().ok_or(NotNow::NotStarted)?;
        let mut phases = Phases::of(TracedOperation::Fork);
        let forked = fork::fork(machine, &request, &mut phases)?;
        self.keep_trace(phases);
        forked.give(request.into, self.notifier.clone())?;
        self.forking = Some(from);
        Ok(())
    }

    /// The clones are there, as far as they are.
    pub(super) fn on_forked(&mut self, forked: Result<VmForked, String>, ops: &mut EventOps) {
        let Some(from) = self.forking.take() else { return };
        let response = match forked {
            Ok(forked) => {
                let VmForked { pause_us, total_us, copied_pages, ref clones } = forked;
                let mut errors = clones.iter().filter_map(|clone| clone.error.as_deref());
                let (first, failed) = (errors.clone().next(), errors.by_ref().count());
                tracing::info!(pause_us, total_us, copied_pages, clones = clones.len(), failed, "the VM was forked");
                match first {
                    Some(error) if failed == clones.len() => {
                        Response::fault(400, &format!("no clone came about: {error}"))
                    }
                    _ => Response::document(&forked),
                }
            }
            Err(reason) => Response::fault(400, &reason),
        };
        self.respond(Asker::Client(from), &response, ops);
    }

    /// Becomes a clone of a VM that another vmm forks.
    pub(super) fn load_fork(&mut self, load: &ForkLoad, from: Pending) -> Result<(), RequestError> {
        let mut phases = Phases::of(TracedOperation::Load);
        let descriptors = self.api.as_mut().map(|api| api.take_descriptors(from)).unwrap_or_default();
        let offered = fork::open(load, descriptors)?;
        phases.end("check");
        self.bring_in(offered, load.resume_vm, phases, |_| Ok(()))
    }
}
