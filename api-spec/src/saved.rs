//! REST documents of a VM that is saved when it is stopped, and goes on when it is started.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Where a VM is saved when it is stopped. A start goes on from what is there, once; what is there cannot be used twice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SavedState {
    /// The directory that a save makes. The one above it must exist, and its name may have 200 bytes.
    #[serde(deserialize_with = "crate::path::one")]
    #[schemars(length(min = 1))]
    pub path: PathBuf,
    /// Save the VM when it is stopped and nobody says how: by SIGTERM, SIGINT or SIGHUP, or by `PUT /vm/stop` without a
    /// mode.
    #[serde(default)]
    pub save_on_stop: bool,
    /// Refuse to start if there is a saved state that cannot be used, instead of booting.
    #[serde(default)]
    pub strict: bool,
}

/// Body of `PUT /vm/stop`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmStop {
    /// What becomes of the guest. When absent, `save` if the configuration says `save_on_stop`, else `shutdown`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<StopMode>,
}

/// What becomes of a guest that is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StopMode {
    /// It is saved where the configuration says, and goes on with the next start. If that fails, it is shut down.
    Save,
    /// Its agent is asked to switch it off, and it ends after 30 seconds at the latest; at once if it has no such agent.
    Shutdown,
    /// It ends at once.
    Force,
}

/// Body of the answer to `PUT /vm/stop`. The vmm ends after it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmStopped {
    /// What became of the guest.
    pub how: Stopped,
    /// Why it is not as was asked for, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// What became of a guest that was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Stopped {
    /// It was saved, and goes on with the next start.
    Saved,
    /// It has switched itself off, or reset its machine.
    ShutDown,
    /// It was ended.
    Ended,
}

/// How a VM that has a place for its saved state was started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Started {
    /// How.
    pub mode: StartMode,
    /// Why it was booted although something lies where its saved state would be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The VM was saved with another configuration than the present one, as far as its guest can tell the difference, and
    /// goes on with that.
    pub drift: bool,
}

/// How a VM was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StartMode {
    /// It goes on from its saved state.
    Restored,
    /// It was booted.
    Cold,
}

/// What there is of a VM's saved state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Saved {
    /// Whether there is one that the next start can go on from. One that was used does not count.
    pub exists: bool,
    /// What it takes on disk, in bytes.
    pub bytes: u64,
}
