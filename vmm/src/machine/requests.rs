//! May this be done now? Pure: threads and sockets ask here.

use crate::api::Request;
use api_spec::saved::{StopMode, VmStop};
use api_spec::vm::{Action, ActionType, VmPatch, VmState};

/// Where a VM stands, as far as requests are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nothing was booted or loaded; `configured` once anything of a boot configuration was given.
    NotStarted {
        /// Whether a boot configuration was begun.
        configured: bool,
    },
    /// vCPUs stand still.
    Paused,
    /// vCPUs run.
    Running,
}

/// What is done in the background.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Nothing that a request could be in the way of.
    None,
    /// A snapshot is being written.
    Writing,
    /// A snapshot is being written, and the VM ends with it: what the guest did meanwhile would be lost.
    Saving,
    /// The guest is being shut down, or is to be saved after a snapshot that is still being written, and the VM ends with it.
    Stopping,
}

/// Why a request is not legal now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotNow {
    /// There is no VM yet.
    #[error("there is no VM yet: boot one (`PUT /actions` InstanceStart) or load a snapshot first")]
    NotStarted,
    /// There is one already.
    #[error("the VM was started already; this can only be done before")]
    Started,
    /// A snapshot is loaded instead of a boot configuration, not on top of one.
    #[error("a boot configuration was given already; load a snapshot into a fresh process")]
    Configured,
    /// One snapshot at a time.
    #[error("a snapshot is still being written; `GET /snapshot/status` says when it is done")]
    Writing,
    /// What a guest has done for a snapshot is to be in that.
    #[error("the guest prepares for a snapshot; wait for that, or give it up (`PUT /snapshot/cancel`)")]
    Preparing,
    /// There is no snapshot to give up.
    #[error("no snapshot is being written; `GET /snapshot/status` tells how the last one went")]
    NotWriting,
    /// A guest that is being saved stands still.
    #[error("the VM is being saved, and stands still until that has succeeded, which ends it, or failed")]
    Saving,
    /// A guest that is being stopped runs until that is over.
    #[error("the VM is being stopped already; `PUT /vm/stop` with the mode `force` ends it at once")]
    Stopping,
}

/// Whether `request` is legal in `phase`, while this is done in the background.
pub fn may(request: &Request, phase: Phase, work: Work) -> Result<(), NotNow> {
    let refuse_if = |condition, reason| if condition { Err(reason) } else { Ok(()) };
    let started = !matches!(phase, Phase::NotStarted { .. });
    let unless_ending = || match work {
        Work::Saving => Err(NotNow::Saving),
        Work::Stopping => Err(NotNow::Stopping),
        Work::None | Work::Writing => Ok(()),
    };
    match request {
        Request::Info
        | Request::Version
        | Request::Config
        | Request::GetMachineConfig
        | Request::GetBalloon
        | Request::SnapshotStatus
        | Request::GetMetrics
        | Request::PutLogger(_)
        | Request::PatchMachineConfig(_)
        | Request::Declined(_) => Ok(()),
        Request::Action(Action { action_type }) => match action_type {
            ActionType::InstanceStart => refuse_if(started, NotNow::Started),
            ActionType::FlushMetrics | ActionType::SendCtrlAltDel => Ok(()),
        },
        Request::PutMachineConfig(_)
        | Request::PutBootSource(_)
        | Request::PutVsock(_)
        | Request::PutDrive(_)
        | Request::PutSerial(_)
        | Request::PutNetworkInterface(_)
        | Request::PutEntropy(_)
        | Request::PutBalloon(_)
        | Request::PutSavedState(_)
        | Request::PutMetrics(_) => refuse_if(started, NotNow::Started),
        Request::SnapshotLoad(_) | Request::ForkLoad(_) => {
            refuse_if(started, NotNow::Started)?;
            refuse_if(phase == Phase::NotStarted { configured: true }, NotNow::Configured)
        }
        Request::PatchVm(VmPatch { state: VmState::Resumed }) => {
            refuse_if(!started, NotNow::NotStarted)?;
            unless_ending()
        }
        Request::PatchVm(VmPatch { state: VmState::Paused }) => {
            refuse_if(!started, NotNow::NotStarted)?;
            refuse_if(work == Work::Stopping, NotNow::Stopping)
        }
        Request::StopVm(VmStop { mode }) => {
            refuse_if(!started, NotNow::NotStarted)?;
            if *mode == Some(StopMode::Force) { Ok(()) } else { unless_ending() }
        }
        Request::GetStats
        | Request::PatchDrive(_)
        | Request::PatchNetworkInterface(_)
        | Request::GetMemoryMap(_)
        | Request::PatchBalloon(_)
        | Request::GetBalloonStatistics
        | Request::SnapshotCancel(_)
        | Request::PatchBalloonStatistics(_) => refuse_if(!started, NotNow::NotStarted),
        Request::ResetVm(_) | Request::ForkVm(_) => {
            refuse_if(!started, NotNow::NotStarted)?;
            unless_ending()
        }
        Request::SnapshotCreate(_) | Request::SaveVm(_) | Request::CheckpointVm(_) => {
            refuse_if(!started, NotNow::NotStarted)?;
            refuse_if(work == Work::Stopping, NotNow::Stopping)?;
            refuse_if(work != Work::None, NotNow::Writing)
        }
    }
}

/// Whether bringing a VM that stands at `phase` to `wanted` changes anything. Asking for what is already so is fine.
pub fn changes(phase: Phase, wanted: VmState) -> bool {
    match wanted {
        VmState::Paused => phase == Phase::Running,
        VmState::Resumed => phase == Phase::Paused,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::http::Message;
    use crate::api::router;
    use api_spec::operations::{OPERATIONS, Operation, When};
    use api_spec::reset::VmReset;
    use api_spec::snapshot::SnapshotCreate;
    use proptest::prelude::*;

    fn create() -> Request {
        Request::SnapshotCreate(SnapshotCreate::of("s".into()))
    }

    /// Each call as its example says, and what else there is to say by it.
    fn calls() -> Vec<(Request, When)> {
        let route = |operation: &Operation, body: &str| {
            let path = operation.path.replace("{drive_id}", "root").replace("{iface_id}", "eth0");
            let message = Message { method: operation.method.into(), path, body: body.into(), ..Message::default() };
            (router::route(&message).unwrap(), operation.when)
        };
        let examples = OPERATIONS.iter().map(|operation| {
            let body = operation.body.as_ref().map_or("", |body| body.example);
            route(operation, body)
        });
        let commands = OPERATIONS.iter().flat_map(|operation| {
            operation.commands.iter().filter_map(move |command| Some(route(operation, command.body?)))
        });
        examples.chain(commands).collect()
    }

    fn requests() -> impl Strategy<Value = Request> {
        prop::sample::select(calls().into_iter().map(|(request, _)| request).collect::<Vec<_>>())
    }

    #[test]
    fn calls_are_taken_when_the_document_says_so() {
        let fresh = Phase::NotStarted { configured: false };
        for (request, when) in calls() {
            let taken = [fresh, Phase::NotStarted { configured: true }, Phase::Paused, Phase::Running]
                .map(|phase| may(&request, phase, Work::None).is_ok());
            let expected = match (when, &request) {
                (_, Request::Action(Action { action_type: ActionType::InstanceStart })) => [true, true, false, false],
                // What is not offered is told by name whenever it is asked for.
                (When::Always | When::Never, _) => [true; 4],
                (When::BeforeStart, _) => [true, true, false, false],
                (When::Fresh, _) => [true, false, false, false],
                (When::AfterStart, _) => [false, false, true, true],
            };
            assert_eq!(taken, expected, "{request:?}");
        }
    }

    fn works() -> impl Strategy<Value = Work> {
        prop::sample::select(vec![Work::None, Work::Writing, Work::Saving, Work::Stopping])
    }

    fn phases() -> impl Strategy<Value = Phase> {
        prop::sample::select(vec![
            Phase::NotStarted { configured: false },
            Phase::NotStarted { configured: true },
            Phase::Paused,
            Phase::Running,
        ])
    }

    /// What the machine is after a request that was allowed and succeeded.
    fn after(request: &Request, phase: Phase) -> Phase {
        match request {
            Request::PutMachineConfig(_)
            | Request::PutBootSource(_)
            | Request::PutVsock(_)
            | Request::PutDrive(_)
            | Request::PutNetworkInterface(_)
            | Request::PutEntropy(_)
            | Request::PutSavedState(_)
            | Request::PutBalloon(_) => Phase::NotStarted { configured: true },
            Request::Action(Action { action_type: ActionType::InstanceStart })
            | Request::PatchVm(VmPatch { state: VmState::Resumed }) => Phase::Running,
            Request::ResetVm(VmReset { resume: true, .. }) => Phase::Running,
            Request::SnapshotLoad(_) | Request::ResetVm(_) | Request::PatchVm(VmPatch { state: VmState::Paused }) => {
                Phase::Paused
            }
            _ => phase,
        }
    }

    fn started(phase: Phase) -> bool {
        !matches!(phase, Phase::NotStarted { .. })
    }

    proptest! {
        #[test]
        fn a_vm_starts_once_and_never_becomes_unstarted(steps in prop::collection::vec((requests(), works()), 0..40)) {
            let mut phase = Phase::NotStarted { configured: false };
            let mut starts = 0;
            for (request, work) in steps {
                let before = phase;
                if may(&request, phase, work).is_ok() {
                    phase = after(&request, phase);
                }
                prop_assert!(!started(before) || started(phase));
                starts += u32::from(!started(before) && started(phase));
            }
            prop_assert!(starts <= 1);
        }

        #[test]
        fn a_snapshot_is_taken_of_a_vm_and_one_at_a_time(phase in phases(), work in works()) {
            prop_assert_eq!(may(&create(), phase, work).is_ok(), work == Work::None && started(phase));
        }

        #[test]
        fn a_vm_that_is_being_saved_does_not_run(request in requests(), phase in phases()) {
            if may(&request, phase, Work::Saving).is_ok() && phase == Phase::Paused {
                prop_assert_eq!(after(&request, phase), Phase::Paused);
            }
        }

        #[test]
        fn a_vm_that_is_being_stopped_can_only_be_ended_at_once(phase in phases(), work in works()) {
            let stop = |mode| may(&Request::StopVm(VmStop { mode }), phase, work).is_ok();
            let is_free = matches!(work, Work::None | Work::Writing);
            for mode in [None, Some(StopMode::Save), Some(StopMode::Shutdown)] {
                prop_assert_eq!(stop(mode), started(phase) && is_free);
            }
            prop_assert_eq!(stop(Some(StopMode::Force)), started(phase));
        }

        #[test]
        fn changing_to_a_state_twice_changes_once(phase in phases(), state in prop::sample::select(vec![VmState::Paused, VmState::Resumed])) {
            if changes(phase, state) {
                let then = after(&Request::PatchVm(VmPatch { state }), phase);
                prop_assert!(!changes(then, state));
            }
        }
    }
}
