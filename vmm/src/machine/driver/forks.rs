//! How a VM is forked, and becomes a fork of another.

use super::{Asker, Driver, RequestError};
use crate::api::Response;
use crate::api::server::Pending;
use crate::devices::virtio::block::overlay::Folded;
use crate::machine::Machine;
use crate::machine::config;
use crate::machine::fork::give::{self, Giver};
use crate::machine::fork::receive;
use crate::machine::phases::Phases;
use crate::machine::requests::NotNow;
use crate::memory::uffd::has_hung_up;
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
        let limit = self.config.machine_config.max_private_mib;
        give::check(&request)?;
        let giver = match &self.giver {
            Some(giver) => giver,
            // Before the guest stands still.
            None => self.giver.insert(Giver::start(self.notifier.clone())?),
        };
        let mut phases = Phases::of(TracedOperation::Fork);
        give::fork(machine, request, limit, &self.signals, &mut phases, &self.notifier, giver)?;
        self.keep_trace(phases);
        self.forking = Some(from);
        Ok(())
    }

    /// The clones are there, as far as they are.
    pub(super) fn on_forked(&mut self, forked: Result<VmForked, String>, ops: &mut EventOps) {
        let Some(from) = self.forking.take() else { return };
        let response = match forked {
            Ok(forked) => {
                let VmForked { pause_us, total_us, copied_pages, ref clones } = forked;
                let errors: Vec<_> =
                    clones.iter().filter_map(|clone| Some((clone.api_sock.display(), clone.error.as_ref()?))).collect();
                let failed = errors.len();
                tracing::info!(pause_us, total_us, copied_pages, clones = clones.len(), failed, "the VM was forked");
                match errors.first() {
                    Some((api_sock, error)) if failed == clones.len() => {
                        let text = format!(
                            "no clone came about, of {failed}; the first was for the vmm at {api_sock}: {error}"
                        );
                        Response::fault(400, &text)
                    }
                    _ => Response::document(&forked),
                }
            }
            Err(reason) => Response::fault(400, &reason),
        };
        self.respond(Asker::Client(from), &response, ops);
        if let Some(machine) = &mut self.machine {
            machine.merge_layers(&self.notifier);
        }
    }

    /// Layers of disks are copied: there may have come more meanwhile.
    pub(super) fn on_layers_merged(&mut self, merged: Vec<(usize, Folded)>, ends: bool) {
        let Some(machine) = &mut self.machine else { return };
        let may_be_more = machine.adopt_merged(merged, ends);
        // A fork may be copying layers itself, and has them looked after when it is over.
        if may_be_more && self.forking.is_none() {
            machine.merge_layers(&self.notifier);
        }
    }

    /// Becomes a clone of a VM that another vmm forks.
    pub(super) fn load_fork(&mut self, load: &ForkLoad, from: Pending) -> Result<(), RequestError> {
        let mut phases = Phases::of(TracedOperation::Load);
        config::check_max_private(load.max_private_mib)?;
        let descriptors = self.api.as_mut().map(|api| api.take_descriptors(from)).unwrap_or_default();
        let client = self.api.as_ref().and_then(|api| api.client_of(from));
        let offered = receive::open(load, descriptors)?;
        phases.end("check");
        self.private.set_limit(load.max_private_mib).map_err(RequestError::Limit)?;
        // One that was given up, and may have been forked into another vmm since, is not to run here as well.
        let is_wanted = |_: &mut Machine| {
            if client.is_some_and(|client| !has_hung_up(&client)) { Ok(()) } else { Err(RequestError::GivenUp) }
        };
        self.bring_in(offered, load.resume_vm, phases, is_wanted)?;
        self.config.machine_config.max_private_mib = load.max_private_mib;
        Ok(())
    }
}
