//! May this be done now? Pure: threads and sockets ask here.

use crate::api::Request;
use api_spec::vm::VmState;

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
}

/// Whether `request` is legal in `phase`. `writing`: a snapshot is being written in the background.
pub fn may(request: &Request, phase: Phase, writing: bool) -> Result<(), NotNow> {
    let refuse_if = |condition, reason| if condition { Err(reason) } else { Ok(()) };
    let started = !matches!(phase, Phase::NotStarted { .. });
    match request {
        Request::Info
        | Request::Version
        | Request::Config
        | Request::GetMachineConfig
        | Request::GetBalloon
        | Request::SnapshotStatus => Ok(()),
        Request::PutMachineConfig(_)
        | Request::PutBootSource(_)
        | Request::PutVsock(_)
        | Request::PutDrive(_)
        | Request::PutSerial(_)
        | Request::PutNetworkInterface(_)
        | Request::PutEntropy(_)
        | Request::PutBalloon(_)
        | Request::Action(_) => refuse_if(started, NotNow::Started),
        Request::SnapshotLoad(_) => {
            refuse_if(started, NotNow::Started)?;
            refuse_if(phase == Phase::NotStarted { configured: true }, NotNow::Configured)
        }
        Request::PatchVm(_)
        | Request::PatchMachineConfig(_)
        | Request::PatchDrive(_)
        | Request::PatchBalloon(_)
        | Request::GetBalloonStatistics
        | Request::PatchBalloonStatistics(_) => refuse_if(!started, NotNow::NotStarted),
        Request::SnapshotCreate(_) => {
            refuse_if(!started, NotNow::NotStarted)?;
            refuse_if(writing, NotNow::Writing)
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
    use api_spec::devices::{BalloonStatisticsUpdate, BalloonUpdate};
    use api_spec::snapshot::SnapshotCreate;
    use api_spec::vm::{Action, ActionType, BootSource, MachineConfig, MachinePatch, VmPatch, Vsock};
    use proptest::prelude::*;

    fn create() -> Request {
        let snapshot_path = "s".into();
        Request::SnapshotCreate(SnapshotCreate {
            snapshot_path,
            snapshot_type: Default::default(),
            mem_file_path: None,
        })
    }

    fn requests() -> impl Strategy<Value = Request> {
        prop::sample::select(vec![
            Request::Info,
            Request::Version,
            Request::Config,
            Request::GetMachineConfig,
            Request::SnapshotStatus,
            Request::PutMachineConfig(MachineConfig::default()),
            Request::PutBootSource(BootSource::default()),
            Request::PutVsock(Vsock { guest_cid: 3, uds_path: "v".into() }),
            Request::PutSerial(Default::default()),
            Request::PutDrive(serde_json::from_str(r#"{"drive_id":"a","path_on_host":"d"}"#).unwrap()),
            Request::PatchDrive(serde_json::from_str(r#"{"drive_id":"a","max_overlay_mib":5}"#).unwrap()),
            Request::PutNetworkInterface(serde_json::from_str(r#"{"iface_id":"e","host_dev_name":"t"}"#).unwrap()),
            Request::PutEntropy(Default::default()),
            Request::PutBalloon(serde_json::from_str(r#"{"amount_mib":1}"#).unwrap()),
            Request::GetBalloon,
            Request::PatchBalloon(BalloonUpdate { amount_mib: 1 }),
            Request::GetBalloonStatistics,
            Request::PatchBalloonStatistics(BalloonStatisticsUpdate { stats_polling_interval_s: 1 }),
            Request::Action(Action { action_type: ActionType::InstanceStart }),
            Request::PatchVm(VmPatch { state: VmState::Paused }),
            Request::PatchVm(VmPatch { state: VmState::Resumed }),
            Request::PatchMachineConfig(MachinePatch { max_private_mib: None }),
            create(),
            Request::SnapshotLoad(serde_json::from_str(r#"{"snapshot_path":"s"}"#).unwrap()),
        ])
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
            | Request::PutBalloon(_) => Phase::NotStarted { configured: true },
            Request::Action(_) | Request::PatchVm(VmPatch { state: VmState::Resumed }) => Phase::Running,
            Request::SnapshotLoad(_) | Request::PatchVm(VmPatch { state: VmState::Paused }) => Phase::Paused,
            _ => phase,
        }
    }

    fn started(phase: Phase) -> bool {
        !matches!(phase, Phase::NotStarted { .. })
    }

    proptest! {
        #[test]
        fn a_vm_starts_once_and_never_becomes_unstarted(steps in prop::collection::vec((requests(), any::<bool>()), 0..40)) {
            let mut phase = Phase::NotStarted { configured: false };
            let mut starts = 0;
            for (request, writing) in steps {
                let before = phase;
                if may(&request, phase, writing).is_ok() {
                    phase = after(&request, phase);
                }
                prop_assert!(!started(before) || started(phase));
                starts += u32::from(!started(before) && started(phase));
            }
            prop_assert!(starts <= 1);
        }

        #[test]
        fn a_snapshot_is_taken_of_a_vm_and_one_at_a_time(phase in phases(), writing: bool) {
            prop_assert_eq!(may(&create(), phase, writing).is_ok(), !writing && started(phase));
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
