//! The error document of the REST API.

use crate::vm::VmConfig;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Body of every answer with status 400 and above.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ErrorBody {
    /// What failed, where, and what to do, in one line.
    pub fault_message: String,
    /// When a VM could not be started: the whole configuration that it was to have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config: Option<Box<VmConfig>>,
}
