//! What the program does besides serving: it looks at a server that runs, and at what clones of a snapshot use.

use crate::top::{self, TopError};
use crate::ws::{self, WsError};
use std::io::{self, Write};
use std::path::PathBuf;

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tool {
    /// Show what a page server does.
    Top(top::Options),
    /// Show which pages clones of a snapshot use.
    WsShow {
        /// The snapshot.
        snapshot: PathBuf,
        /// As a JSON document.
        json: bool,
    },
    /// Forget which pages clones of a snapshot use.
    WsClear {
        /// The snapshot.
        snapshot: PathBuf,
    },
}

/// Why it could not be done.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// The page server could not be looked at.
    #[error(transparent)]
    Top(#[from] TopError),
    /// The working set could not be looked at.
    #[error(transparent)]
    Ws(#[from] WsError),
    /// Nobody takes what there is to say.
    #[error("cannot write to standard output: {0}")]
    Stdout(io::Error),
}

/// Does it. Must be called while the process has one thread, since signals are blocked.
pub fn run(tool: &Tool) -> Result<(), ToolError> {
    match tool {
        Tool::Top(options) => Ok(top::run(options)?),
        Tool::WsShow { snapshot, json } => {
            let report = ws::show(snapshot)?;
            print(&if *json { to_json(&report)? } else { report.to_string() })
        }
        Tool::WsClear { snapshot } => {
            let done = if ws::clear(snapshot)? { "forgotten" } else { "there was nothing to forget" };
            print(&format!("{}: {done}\n", snapshot.display()))
        }
    }
}

fn to_json(document: &impl serde::Serialize) -> Result<String, ToolError> {
    let text = serde_json::to_string_pretty(document).map_err(|error| ToolError::Stdout(error.into()))?;
    Ok(text + "\n")
}

fn print(text: &str) -> Result<(), ToolError> {
    io::stdout().write_all(text.as_bytes()).map_err(ToolError::Stdout)
}
