//! `vmm ctl`: the REST API as commands.
//!
//! ```text
//!   table of calls --parse--> Call --> message --RestClient--> answer --output--> text
//! ```
//!
//! `rounds` is what one command makes of several calls. `fields`, `parse`, `completions` and `output` are pure. Nothing is judged here that the vmm judges: whatever a
//! command says is sent, and the vmm's own words are printed.

mod completions;
mod fields;
mod output;
mod parse;
mod rounds;

pub use output::rows;
pub use parse::{Call, Ctl, parse};

use crate::machine::config::ConfigError;
use api_spec::client::RestClient;
use api_spec::client::agent::AgentError;
use api_spec::client::rest::RestError;
use api_spec::operations::Answer;
use fields::Source;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The variable of the environment that names the socket.
pub const SOCKET_VARIABLE: &str = "COPPICE_API_SOCK";
/// Longest document that is read from a file, in bytes.
const MAX_DOCUMENT: u64 = 1 << 20;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CtlError {
    /// No socket was named.
    #[error("which vmm? Name the socket of its API with --api-sock PATH, or in the variable {SOCKET_VARIABLE}")]
    NoSocket,
    /// Nobody listens.
    #[error("cannot connect to {path}: {source}; {}", remedy(.source))]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The vmm said no.
    #[error("{call}: {message}")]
    Refused {
        /// Method and path.
        call: String,
        /// The vmm's words.
        message: String,
    },
    /// A name that cannot be part of a path.
    #[error("{call}: {source}")]
    Name {
        /// Method and path.
        call: String,
        /// What is wrong with it.
        source: ConfigError,
    },
    /// No answer in time.
    #[error("{call}: no answer within {seconds} s; the vmm may still do it. Ask what became of it, or give --timeout")]
    Late {
        /// Method and path.
        call: String,
        /// How long it was waited for.
        seconds: u64,
    },
    /// No answer, or none that is one.
    #[error("{call}: {source}")]
    NoAnswer {
        /// Method and path.
        call: String,
        /// What came of it.
        source: RestError,
    },
    /// There is no way to the guest's agent.
    #[error("the VM has no vsock device, over which its agent could be asked")]
    NoVsock,
    /// The guest's agent.
    #[error("the guest's agent at {path}: {source}")]
    Agent {
        /// The socket of the vsock device.
        path: PathBuf,
        /// What came of it.
        source: Box<AgentError>,
    },
    /// A document that cannot be read.
    #[error("cannot read {place}: {source}")]
    Read {
        /// Where it is.
        place: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A document that is none.
    #[error("{place} is not what it should be: {reason}")]
    Document {
        /// Where it is.
        place: String,
        /// What is wrong with it.
        reason: String,
    },
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::NotFound => "is a vmm running, with --api-sock naming this path?",
        ErrorKind::ConnectionRefused => "the vmm that made it is gone; start another",
        ErrorKind::PermissionDenied => "it is for the user alone as whom the vmm runs",
        ErrorKind::TimedOut => "a vmm is there, and takes no connection; try again, or see its log",
        _ => "name the socket of a vmm that runs with --api-sock",
    }
}

/// Does what a command line says; what is to be printed.
pub fn run(ctl: &Ctl) -> Result<String, CtlError> {
    let variable = || std::env::var_os(SOCKET_VARIABLE);
    match ctl {
        Ctl::Print(text) => Ok(text.clone()),
        Ctl::Call(call) => make(call, variable()),
        Ctl::Loop(rounds) => {
            let told = rounds.run(&socket(&rounds.api_sock, variable())?)?;
            Ok(output::document(&told, rounds.json))
        }
    }
}

/// The socket that a command line names, or else the environment.
fn socket(named: &Option<PathBuf>, variable: Option<OsString>) -> Result<PathBuf, CtlError> {
    let variable = variable.filter(|path| !path.is_empty()).map(PathBuf::from);
    named.clone().or(variable).ok_or(CtlError::NoSocket)
}

fn make(call: &Call, variable: Option<OsString>) -> Result<String, CtlError> {
    let socket = socket(&call.api_sock, variable)?;
    let (path, body) = call.message(read)?;
    let name = format!("{} {path}", call.operation.method);
    let is_text = matches!(call.operation.answer, Answer::Text(_));
    let answer = RestClient::connect(&socket, call.patience)
        .and_then(|mut client| client.request(call.operation.method, &path, &body)?.body())
        .map_err(failed(&name, &socket, call.patience))?;
    output::answer(&answer, is_text, call.json)
        .map_err(|e| CtlError::NoAnswer { call: name, source: RestError::Answer(e.to_string()) })
}

/// Why a call of the vmm at `socket` failed, in words for whoever gave the command.
fn failed(call: &str, socket: &Path, patience: Duration) -> impl FnOnce(RestError) -> CtlError {
    move |error| match error {
        RestError::Connect(source) => CtlError::Connect { path: socket.to_owned(), source },
        RestError::Io(e) if e.kind() == ErrorKind::TimedOut => {
            CtlError::Late { call: call.to_owned(), seconds: patience.as_secs() }
        }
        RestError::Refused { message, .. } => {
            // Some of the vmm's words name the call themselves.
            let own = call.split('?').next().unwrap_or_default();
            let message = message.strip_prefix(&format!("{own}: ")).map(str::to_owned).unwrap_or(message);
            CtlError::Refused { call: call.to_owned(), message }
        }
        source => CtlError::NoAnswer { call: call.to_owned(), source },
    }
}

/// The text that is at a place.
fn read(source: &Source) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    match source {
        Source::Here(value) => text = value.to_string().into_bytes(),
        Source::File(path) => drop(File::open(path)?.take(MAX_DOCUMENT + 1).read_to_end(&mut text)?),
        Source::Stdin => drop(io::stdin().take(MAX_DOCUMENT + 1).read_to_end(&mut text)?),
    }
    if text.len() as u64 > MAX_DOCUMENT {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("it has more than {MAX_DOCUMENT} bytes")));
    }
    Ok(text)
}
