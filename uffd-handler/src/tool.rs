//! What the program does besides serving: it looks at a server that runs.

use crate::top::{self, TopError};

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tool {
    /// Show what a page server does.
    Top(top::Options),
}

/// Why it could not be done.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// The page server could not be looked at.
    #[error(transparent)]
    Top(#[from] TopError),
}

/// Does it. Must be called while the process has one thread, since signals are blocked.
pub fn run(tool: &Tool) -> Result<(), ToolError> {
    match tool {
        Tool::Top(options) => Ok(top::run(options)?),
    }
}
