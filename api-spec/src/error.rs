//! The error document of the REST API.

use serde::{Deserialize, Serialize};

/// Body of every answer with status 400 and above.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What failed, where, and what to do, in one line.
    pub fault_message: String,
}
