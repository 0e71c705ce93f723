//! REST documents of a VM that is reset, in place, to what it was at a checkpoint.

use crate::stats::PhaseTrace;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Body of `PUT /vm/checkpoint`: what the VM is now is remembered, in place of what was remembered before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmCheckpoint {}

/// Answer to `PUT /vm/checkpoint`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmCheckpointed {
    /// Pages of the guest's own, of which a copy is kept.
    pub private_pages: u64,
    /// How long the guest stood still, in microseconds.
    pub pause_us: u64,
    /// How long it took in all, in microseconds.
    pub total_us: u64,
}

/// Body of `PUT /vm/reset`: the VM becomes what it was at the checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmReset {
    /// Most pages that may have been written since. If there are more, the VM is left paused as it is, and the error begins with
    /// `replace`: a new clone costs less. No bound when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_dirty_pages: Option<u64>,
    /// Let the vCPUs run when it is done.
    #[serde(default = "yes")]
    pub resume: bool,
    /// Write a fresh generation id into the guest and tell it so, as when a snapshot is loaded: for guests that are to know that
    /// what they held for random may be known. Otherwise it is what it was, like all else.
    #[serde(default)]
    pub new_generation: bool,
}

fn yes() -> bool {
    true
}

impl Default for VmReset {
    fn default() -> Self {
        VmReset { max_dirty_pages: None, resume: true, new_generation: false }
    }
}

/// Answer to `PUT /vm/reset`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmResetDone {
    /// Pages that were brought back.
    pub dirty_pages: u64,
    /// Of those, pages of the image of which there was no copy yet.
    pub fresh_pages: u64,
    /// Other pages that were dropped, since they were not written for several resets.
    pub dropped_pages: u64,
    /// Where the time went, until the vCPUs ran again if they were to.
    pub trace: PhaseTrace,
}
