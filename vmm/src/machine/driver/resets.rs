//! How a VM is reset, and to what.

use super::{Driver, RequestError, RunError};
use crate::machine::phases::Phases;
use crate::machine::requests::NotNow;
use crate::machine::reset::{self, ResetError, Undone};
use api_spec::reset::{VmCheckpointed, VmReset, VmResetDone};
use api_spec::stats::TracedOperation;
use api_spec::vm::{VmPatch, VmState};

impl Driver {
    /// Remembers what the VM is.
    pub(super) fn checkpoint(&mut self) -> Result<VmCheckpointed, RequestError> {
        // The end of a snapshot is to fold layers.
        let may_fold = self.job.is_none();
        let machine = self.machine.as_mut().ok_or(NotNow::NotStarted)?;
        Ok(reset::checkpoint(machine, may_fold)?)
    }

    /// Makes the VM what it was, and lets it run if it is to.
    pub(super) fn reset(&mut self, request: &VmReset) -> Result<VmResetDone, RequestError> {
        let mut phases = Phases::of(TracedOperation::Reset);
        // It would undo what the guest has done for its snapshot.
        if self.preparation.is_some() {
            return Err(NotNow::Preparing.into());
        }
        let machine = self.machine.as_mut().ok_or(NotNow::NotStarted)?;
        let outcome = reset::reset(machine, request, &mut phases);
        // A guest that was not touched goes on standing still for whatever it does.
        let is_refused = matches!(outcome, Err(ResetError::NoCheckpoint | ResetError::Vcpu(_) | ResetError::Device(_)));
        if !is_refused && !machine.is_running() {
            // It stands still, whatever else may have had it do so.
            self.private.stop();
            self.keep_halted();
        }
        let Undone { pages, fresh, dropped } = match outcome {
            Ok(done) => done,
            // Nobody is to use a VM that was reset in part.
            Err(e @ ResetError::Broken(_)) => {
                self.end(Err(RunError::Refused(e.to_string())));
                return Err(e.into());
            }
            Err(e) => return Err(e.into()),
        };
        if request.resume {
            self.patch_vm(VmPatch { state: VmState::Resumed })?;
        }
        phases.end("resume");
        let trace = phases.trace();
        self.keep_trace(phases);
        Ok(VmResetDone { dirty_pages: pages, fresh_pages: fresh, dropped_pages: dropped, trace })
    }
}
