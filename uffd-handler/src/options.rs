//! The command line.

use crate::logging::{Level, Settings};
use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;

/// What `--help` prints.
pub const USAGE: &str = "\
Serves the memory of snapshots to microVMs, which share every page that they have not written.

Usage: uffd-handler --socket PATH --snapshot SNAPSHOT [--snapshot SNAPSHOT]... [options]

  --socket PATH        Unix socket to serve on; created, mode 0600, removed at the end
  --snapshot SNAPSHOT  a snapshot directory, or the snap.json in it; or the URL of one, as
                       s3://BUCKET/PATH or https://HOST/PATH (see docs/remote-images.md)
  --cache-dir DIR      directory that keeps what comes from URLs; made if absent, mode 0700
  --cache-max-mib N    most that it may hold, in MiB (default 10240)
  --metrics PATH       Unix socket that gives the counters, as JSON, to whoever connects
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
    /// Snapshots to serve: directories, `snap.json` files, or URLs.
    pub snapshots: Vec<PathBuf>,
    /// Where to keep what comes from URLs.
    pub cache: Option<CacheSettings>,
    /// Socket for the counters.
    pub metrics: Option<PathBuf>,
    /// Descriptor to write a byte to when the socket listens.
    pub ready_fd: Option<RawFd>,
    /// End when the parent process ends.
    pub end_with_parent: bool,
    /// What to log.
    pub log: Settings,
}

/// A directory that keeps what was fetched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheSettings {
    /// The directory.
    pub dir: PathBuf,
    /// Most that it may hold, in bytes.
    pub max_bytes: u64,
}

/// Most that a cache directory may hold unless told otherwise, in MiB.
const CACHE_MAX_MIB: u64 = 10_240;

/// What a command line asks for.
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
    /// A standard stream, or no descriptor at all.
    #[error("--ready-fd {0}: must be 3 or more")]
    ReadyFd(RawFd),
    /// A bound of nothing, or one that no disk reaches.
    #[error("--cache-max-mib {0}: must be 1 to {max}, and needs --cache-dir", max = u64::MAX >> 20)]
    CacheMax(u64),
}

impl Command {
    /// Parses the arguments that follow the program's name (and the subcommand's, if it is one).
    pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Self, UsageError> {
        use lexopt::prelude::*;
        let (mut socket, mut snapshots, mut metrics, mut ready_fd) = (None, Vec::new(), None, None);
        let (mut cache_dir, mut cache_max_mib) = (None, None);
        let mut end_with_parent = false;
        let mut log = Settings::new(Level::Info, "uffd-handler");
        let mut parser = lexopt::Parser::from_args(args);
        while let Some(arg) = parser.next()? {
            match arg {
                Long("socket") => once(&mut socket, "--socket", parser.value()?.into())?,
                Long("snapshot") => snapshots.push(parser.value()?.into()),
                Long("cache-dir") => once(&mut cache_dir, "--cache-dir", parser.value()?.into())?,
                Long("cache-max-mib") => once(&mut cache_max_mib, "--cache-max-mib", parser.value()?.parse()?)?,
                Long("metrics") => once(&mut metrics, "--metrics", parser.value()?.into())?,
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
        let cache = cache_settings(cache_dir, cache_max_mib)?;
        Ok(Command::Serve(Options { socket, snapshots, cache, metrics, ready_fd, end_with_parent, log }))
    }
}

fn cache_settings(dir: Option<PathBuf>, max_mib: Option<u64>) -> Result<Option<CacheSettings>, UsageError> {
    let max_bytes = match max_mib.unwrap_or(CACHE_MAX_MIB) {
        mib if (1..=u64::MAX >> 20).contains(&mib) => mib << 20,
        mib => return Err(UsageError::CacheMax(mib)),
    };
    match (dir, max_mib) {
        (Some(dir), _) => Ok(Some(CacheSettings { dir, max_bytes })),
        (None, Some(mib)) => Err(UsageError::CacheMax(mib)),
        (None, None) => Ok(None),
    }
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
            snapshots: vec!["a".into(), "b/snap.json".into(), "s3://b/c".into()],
            cache: Some(CacheSettings { dir: "d".into(), max_bytes: 3 << 20 }),
            metrics: Some("m".into()),
            ready_fd: Some(5),
            end_with_parent: false,
            log: Settings {
                format: Format::Json,
                path: Some("l".into()),
                ..Settings::new(Level::Debug, "uffd-handler")
            },
        };
        let line = "--socket s --snapshot a --snapshot=b/snap.json --snapshot s3://b/c --metrics m --ready-fd 5 \
            --cache-dir d --cache-max-mib 3 \
            --log-level debug --log-format json --log-file l";
        assert_eq!(parse(line), Ok(Command::Serve(options)));
        assert_eq!(parse("--socket s --help"), Ok(Command::Help));
    }

    #[test]
    fn a_cache_has_a_bound() {
        let cache = |line: &str| match parse(&format!("--socket s --snapshot a {line}")) {
            Ok(Command::Serve(options)) => options.cache.map(|cache| cache.max_bytes),
            other => panic!("{line}: {other:?}"),
        };
        assert_eq!((cache(""), cache("--cache-dir d")), (None, Some(10 << 30)));
    }

    #[test]
    fn bad_usage_is_named() {
        for (line, part) in [
            ("--snapshot a", "--socket is missing"),
            ("--socket s", "--snapshot is missing"),
            ("--socket s --socket t --snapshot a", "twice"),
            ("--socket s --snapshot a --ready-fd 1", "3 or more"),
            ("--socket s --snapshot a --ready-fd x", "invalid"),
            ("--socket s --snapshot a --log-level loud", "a level is"),
            ("--socket s --snapshot a --log-format xml", "a format is"),
            ("--socket s --snapshot a --log-file l --log-file m", "twice"),
            ("--socket s --snapshot a --cache-max-mib 5", "needs --cache-dir"),
            ("--socket s --snapshot a --cache-dir d --cache-max-mib 0", "must be 1"),
            ("--socket s --snapshot a --cache-dir d --cache-max-mib 99999999999999", "must be 1"),
            ("--socket s --snapshot a more", "more"),
            ("--sockets s", "--sockets"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(part), "{line}: {error}");
        }
    }
}
