//! The command line.

use crate::logging::{Level, Settings};
use crate::server::Limits;
use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

/// What `--help` prints.
pub const USAGE: &str = "\
Serves the memory of snapshots to microVMs, which share every page that they have not written.

Usage: uffd-handler --socket PATH --snapshot SNAPSHOT [--snapshot SNAPSHOT]... [options]

  --socket PATH        Unix socket to serve on; created, mode 0600, removed at the end
  --snapshot SNAPSHOT  a snapshot directory, or the snap.json in it
  --metrics PATH       Unix socket that gives the counters, as JSON, to whoever connects
  --copy-snapshot SNAPSHOT  one of the above: what a client of Firecracker's copy mode
                       gets if several have the size of its memory
  --max-sessions N     guests that are served at one time, at most (default 10000)
  --max-stores-mib M   what all page stores hold together when nobody gets a new one
                       any more (default: no bound)
  --keep-warm SECONDS  how long a page store is kept that nobody uses (default 600)
  --ready-fd N         write one byte to descriptor N, and close it, when the socket listens
  --end-with-parent    end, as on SIGTERM, when the process that started this one ends
  --log-level LEVEL    off, error, warn, info, debug or trace (default `info`)
  --log-format FORMAT  `human` (default), or `json`: one object a line
  --log-file PATH      where the log goes, instead of standard error: a file, FIFO or terminal
  --help               print this
  --version            print the version

Ends with 0 on SIGTERM or SIGINT, 1 on failure, 2 on bad usage, 77 if userfaultfd is not possible here.
";

/// What to serve, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Socket to serve on.
    pub socket: PathBuf,
    /// Snapshots to serve: directories, or `snap.json` files.
    pub snapshots: Vec<PathBuf>,
    /// Socket for the counters.
    pub metrics: Option<PathBuf>,
    /// What the server may use.
    pub limits: Limits,
    /// Descriptor to write a byte to when the socket listens.
    pub ready_fd: Option<RawFd>,
    /// End when the parent process ends.
    pub end_with_parent: bool,
    /// What to log.
    pub log: Settings,
}

/// What a command line asks for.
#[allow(clippy::large_enum_variant, reason = "there is one of it")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Serve.
    Serve(Options),
    /// Print [`USAGE`].
    Help,
    /// Print the version.
    Version,
}

/// A command line that asks for nothing sensible.
#[derive(Debug, thiserror::Error)]
pub enum UsageError {
    /// An option that is unknown, or lacks its value.
    #[error("{0}")]
    Syntax(#[from] lexopt::Error),
    /// An option that must be there.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// An option that makes sense once only.
    #[error("{0} was given twice")]
    Twice(&'static str),
    /// A snapshot that is not served.
    #[error("--copy-snapshot {0}: give the same with --snapshot")]
    CopySnapshot(PathBuf),
    /// A number that leaves nothing to do, or cannot be had.
    #[error("{0}: must be at least 1, and not beyond all memory")]
    Bound(&'static str),
    /// A standard stream, or no descriptor at all.
    #[error("--ready-fd {0}: must be 3 or more")]
    ReadyFd(RawFd),
}

impl Command {
    /// Parses the arguments that follow the program's name (and the subcommand's, if it is one).
    pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Self, UsageError> {
        use lexopt::prelude::*;
        let (mut socket, mut snapshots, mut metrics, mut ready_fd) = (None, Vec::new(), None, None);
        let (mut copy, mut max_sessions, mut max_stores_mib, mut keep_warm) = (None, None, None, None);
        let mut end_with_parent = false;
        let mut log = Settings::new(Level::Info, "uffd-handler");
        let mut parser = lexopt::Parser::from_args(args);
        while let Some(arg) = parser.next()? {
            match arg {
                Long("socket") => once(&mut socket, "--socket", parser.value()?.into())?,
                Long("snapshot") => snapshots.push(parser.value()?.into()),
                Long("metrics") => once(&mut metrics, "--metrics", parser.value()?.into())?,
                Long("copy-snapshot") => once(&mut copy, "--copy-snapshot", parser.value()?.into())?,
                Long("max-sessions") => once(&mut max_sessions, "--max-sessions", parser.value()?.parse()?)?,
                Long("max-stores-mib") => once(&mut max_stores_mib, "--max-stores-mib", parser.value()?.parse()?)?,
                Long("keep-warm") => once(&mut keep_warm, "--keep-warm", parser.value()?.parse()?)?,
                Long("ready-fd") => once(&mut ready_fd, "--ready-fd", parser.value()?.parse()?)?,
                Long("end-with-parent") => end_with_parent = true,
                Long("log-level") => log.level = parser.value()?.parse()?,
                Long("log-format") => log.format = parser.value()?.parse()?,
                Long("log-file") => once(&mut log.path, "--log-file", parser.value()?.into())?,
                Long("help") | Short('h') => return Ok(Command::Help),
                Long("version") => return Ok(Command::Version),
                other => return Err(other.unexpected().into()),
            }
        }
        if let Some(number) = ready_fd.filter(|&number| number < 3) {
            return Err(UsageError::ReadyFd(number));
        }
        if snapshots.is_empty() {
            return Err(UsageError::Missing("--snapshot"));
        }
        let socket = socket.ok_or(UsageError::Missing("--socket"))?;
        let usual = Limits::default();
        let limits = Limits {
            max_sessions: max_sessions.map_or(Ok(usual.max_sessions), |n| at_least_1("--max-sessions", n))?,
            max_stores: max_stores_mib.map(bytes).transpose()?,
            keep_warm: keep_warm.map_or(usual.keep_warm, |seconds: u32| Duration::from_secs(seconds.into())),
            copy_image: copy.map(|path| position(&snapshots, path)).transpose()?,
        };
        Ok(Command::Serve(Options { socket, snapshots, metrics, limits, ready_fd, end_with_parent, log }))
    }
}

/// Which of the snapshots that is.
fn position(snapshots: &[PathBuf], path: PathBuf) -> Result<usize, UsageError> {
    snapshots.iter().position(|snapshot| *snapshot == path).ok_or(UsageError::CopySnapshot(path))
}

fn at_least_1(name: &'static str, number: usize) -> Result<usize, UsageError> {
    if number > 0 { Ok(number) } else { Err(UsageError::Bound(name)) }
}

fn bytes(mib: u64) -> Result<u64, UsageError> {
    mib.checked_mul(1 << 20).filter(|&bytes| bytes > 0).ok_or(UsageError::Bound("--max-stores-mib"))
}

fn once<T>(slot: &mut Option<T>, name: &'static str, value: T) -> Result<(), UsageError> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(UsageError::Twice(name)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logging::Format;

    fn parse(line: &str) -> Result<Command, String> {
        Command::parse(line.split_whitespace().map(OsString::from)).map_err(|error| error.to_string())
    }

    #[test]
    fn all_options() {
        let options = Options {
            socket: "s".into(),
            snapshots: vec!["a".into(), "b/snap.json".into()],
            metrics: Some("m".into()),
            limits: Limits {
                max_sessions: 7,
                max_stores: Some(3 << 20),
                keep_warm: Duration::ZERO,
                copy_image: Some(1),
            },
            ready_fd: Some(5),
            end_with_parent: false,
            log: Settings {
                format: Format::Json,
                path: Some("l".into()),
                ..Settings::new(Level::Debug, "uffd-handler")
            },
        };
        let line = "--socket s --snapshot a --snapshot=b/snap.json --metrics m --ready-fd 5 \
            --copy-snapshot b/snap.json --max-sessions 7 --max-stores-mib 3 --keep-warm 0 \
            --log-level debug --log-format json --log-file l";
        assert_eq!(parse(line), Ok(Command::Serve(options)));
        assert_eq!(parse("--socket s --help"), Ok(Command::Help));
    }

    #[test]
    fn bad_usage_is_named() {
        for (line, part) in [
            ("--snapshot a", "--socket is missing"),
            ("--socket s", "--snapshot is missing"),
            ("--socket s --socket t --snapshot a", "twice"),
            ("--socket s --snapshot a --ready-fd 1", "3 or more"),
            ("--socket s --snapshot a --ready-fd x", "invalid"),
            ("--socket s --snapshot a --copy-snapshot b", "--copy-snapshot b: give the same"),
            ("--socket s --snapshot a --max-sessions 0", "--max-sessions: must be at least 1"),
            ("--socket s --snapshot a --max-stores-mib 18446744073709551615", "--max-stores-mib: must"),
            ("--socket s --snapshot a --keep-warm -1", "invalid"),
            ("--socket s --snapshot a --log-level loud", "a level is"),
            ("--socket s --snapshot a --log-format xml", "a format is"),
            ("--socket s --snapshot a --log-file l --log-file m", "twice"),
            ("--socket s --snapshot a more", "more"),
            ("--sockets s", "--sockets"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(part), "{line}: {error}");
        }
    }
}
