//! The command line.

use crate::huge::HugePages;
use crate::logging::{Level, Settings};
use crate::server::Limits;
use crate::tool::Tool;
use crate::top;
use sandbox::confinement::Confinement;
use sandbox::options::OptionError;
use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::time::Duration;

/// What `--help` prints.
pub const USAGE: &str = concat!(
    "\
Serves the memory of snapshots to microVMs, which share every page that they have not written.

Usage: uffd-handler --socket PATH --snapshot SNAPSHOT [--snapshot SNAPSHOT]... [options]
       uffd-handler top --metrics PATH [--interval SECONDS] [--once] [--json]
       uffd-handler ws show SNAPSHOT [--json]
       uffd-handler ws clear SNAPSHOT

  --socket PATH        Unix socket to serve on; created, mode 0600, removed at the end
  --snapshot SNAPSHOT  a snapshot directory, or the snap.json in it; or the URL of one, as
                       s3://BUCKET/PATH or https://HOST/PATH (see docs/remote-images.md)
  --cache-dir DIR      directory that keeps what comes from URLs; made if absent, mode 0700
  --cache-max-mib N    most that it may hold, in MiB (default 10240)
  --metrics PATH       Unix socket for HTTP: GET /metrics tells the counters to Prometheus, /metrics.json as JSON
  --copy-snapshot SNAPSHOT  one of the above: what a client of Firecracker's copy mode
                       gets if several have the size of its memory
  --max-sessions N     guests that are served at one time, at most (default 10000)
  --max-stores-mib M   what all page stores hold together when nobody gets a new one
                       any more (default: no bound)
  --keep-warm SECONDS  how long a page store is kept that nobody uses (default 600)
  --record CLONES      learn from the next so many clones of each local snapshot which pages
                       they use, and write that beside it; see `ws show`
  --huge-pages MODE    `collapse`: each 2 MiB of a page store become one huge page once all of it is
                       there, so that clones that come later map it at once; `never` (default)
  --ready-fd N         write one byte to descriptor N, and close it, when the socket listens
  --end-with-parent    end, as on SIGTERM, when the process that started this one ends
  --log-level LEVEL    off, error, warn, info, debug or trace (default `info`)
  --log-format FORMAT  `human` (default), or `json`: one object a line
  --log-file PATH      where the log goes, instead of standard error: a file, FIFO or terminal

",
    sandbox::confinement_usage!(),
    "
`top` shows what the page server does whose --metrics has this PATH, until Ctrl-C or the server's end:
  --interval SECONDS   time between two looks, 0.1 to 3600 (default 1)
  --once               show it once, after one interval
  --json               once, as a JSON document

`ws show` tells which pages clones of a snapshot use, as far as that was learnt (working-set.json); `ws clear` forgets
it.

  --help               print this
  --version            print the version

Ends with 0 on SIGTERM or SIGINT, 1 on failure, 2 on bad usage, 77 if userfaultfd is not possible here,
148 after a system call that it may not make.
"
);

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
    /// What the server may use.
    pub limits: Limits,
    /// Descriptor to write a byte to when the socket listens.
    pub ready_fd: Option<RawFd>,
    /// End when the parent process ends.
    pub end_with_parent: bool,
    /// What is taken away from the process.
    pub confinement: Confinement,
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
#[allow(clippy::large_enum_variant, reason = "there is one of it")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Serve.
    Serve(Options),
    /// Something else than serving.
    Tool(Tool),
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
    /// What is to be taken away from the process.
    #[error("{0}")]
    Confinement(#[from] OptionError),
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
    /// Who maps 2 MiB at once cannot tell what it has used of that.
    #[error(
        "--record with --huge-pages collapse: clones that map 2 MiB at once cannot tell which pages they use; record first, without"
    )]
    RecordHuge,
    /// Too often, or never.
    #[error("--interval {0}: must be 0.1 to 3600 seconds")]
    Interval(f64),
    /// There is nothing to say.
    #[error("`ws clear` has no --json")]
    NoJson,
    /// A bound of nothing, or one that no disk reaches.
    #[error("--cache-max-mib {0}: must be 1 to {max}, and needs --cache-dir", max = u64::MAX >> 20)]
    CacheMax(u64),
}

impl Command {
    /// Parses the arguments that follow the program's name (and the subcommand's, if it is one).
    pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Self, UsageError> {
        let mut args = args.into_iter().peekable();
        match args.peek().and_then(|arg| arg.to_str()) {
            Some("top") => Self::parse_top(args.skip(1)),
            Some("ws") => Self::parse_ws(args.skip(1)),
            _ => Self::parse_serve(args),
        }
    }

    fn parse_ws(args: impl Iterator<Item = OsString>) -> Result<Self, UsageError> {
        use lexopt::prelude::*;
        let (mut words, mut json) = (Vec::new(), false);
        let mut parser = lexopt::Parser::from_args(args);
        while let Some(arg) = parser.next()? {
            match arg {
                Long("json") => json = true,
                Long("help") | Short('h') => return Ok(Command::Help),
                Value(word) if words.len() < 2 => words.push(word),
                other => return Err(other.unexpected().into()),
            }
        }
        let mut words = words.into_iter();
        let what = words.next().ok_or(UsageError::Missing("`show` or `clear`"))?;
        let snapshot = words.next().map(PathBuf::from).ok_or(UsageError::Missing("the snapshot"))?;
        Ok(Command::Tool(match what.to_str() {
            Some("show") => Tool::WsShow { snapshot, json },
            Some("clear") if !json => Tool::WsClear { snapshot },
            Some("clear") => return Err(UsageError::NoJson),
            _ => return Err(lexopt::Error::UnexpectedArgument(what).into()),
        }))
    }

    fn parse_top(args: impl Iterator<Item = OsString>) -> Result<Self, UsageError> {
        use lexopt::prelude::*;
        let (mut metrics, mut interval) = (None, None);
        let (mut is_once, mut json) = (false, false);
        let mut parser = lexopt::Parser::from_args(args);
        while let Some(arg) = parser.next()? {
            match arg {
                Long("metrics") => once(&mut metrics, "--metrics", parser.value()?.into())?,
                Long("interval") => once(&mut interval, "--interval", parser.value()?.parse()?)?,
                Long("once") => is_once = true,
                Long("json") => json = true,
                Long("help") | Short('h') => return Ok(Command::Help),
                other => return Err(other.unexpected().into()),
            }
        }
        let metrics = metrics.ok_or(UsageError::Missing("--metrics"))?;
        let interval = interval.unwrap_or(1.0);
        if !top::INTERVALS.contains(&interval) {
            return Err(UsageError::Interval(interval));
        }
        let interval = Duration::from_secs_f64(interval);
        Ok(Command::Tool(Tool::Top(top::Options { metrics, interval, once: is_once, json })))
    }

    fn parse_serve(args: impl Iterator<Item = OsString>) -> Result<Self, UsageError> {
        use lexopt::prelude::*;
        let (mut socket, mut snapshots, mut metrics, mut ready_fd) = (None, Vec::new(), None, None);
        let (mut copy, mut max_sessions, mut max_stores_mib, mut keep_warm) = (None, None, None, None);
        let (mut record, mut huge_pages) = (None, None);
        let (mut cache_dir, mut cache_max_mib) = (None, None);
        let mut end_with_parent = false;
        let mut confinement = Confinement::default();
        let mut log = Settings::new(Level::Info, "uffd-handler");
        let mut parser = lexopt::Parser::from_args(args);
        while let Some(arg) = parser.next()? {
            match arg {
                Long(name) if Confinement::knows(name) => {
                    let name = name.to_owned();
                    confinement.take(&name, &mut parser)?;
                }
                Long("socket") => once(&mut socket, "--socket", parser.value()?.into())?,
                Long("snapshot") => snapshots.push(parser.value()?.into()),
                Long("cache-dir") => once(&mut cache_dir, "--cache-dir", parser.value()?.into())?,
                Long("cache-max-mib") => once(&mut cache_max_mib, "--cache-max-mib", parser.value()?.parse()?)?,
                Long("metrics") => once(&mut metrics, "--metrics", parser.value()?.into())?,
                Long("copy-snapshot") => once(&mut copy, "--copy-snapshot", parser.value()?.into())?,
                Long("max-sessions") => once(&mut max_sessions, "--max-sessions", parser.value()?.parse()?)?,
                Long("max-stores-mib") => once(&mut max_stores_mib, "--max-stores-mib", parser.value()?.parse()?)?,
                Long("keep-warm") => once(&mut keep_warm, "--keep-warm", parser.value()?.parse()?)?,
                Long("record") => once(&mut record, "--record", parser.value()?.parse()?)?,
                Long("huge-pages") => once(&mut huge_pages, "--huge-pages", parser.value()?.parse()?)?,
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
        confinement.check()?;
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
            record: record.map_or(Ok(usual.record), |n| at_least_1("--record", n))?,
            huge_pages: huge_pages.unwrap_or(usual.huge_pages),
        };
        if limits.record > 0 && limits.huge_pages == HugePages::Collapse {
            return Err(UsageError::RecordHuge);
        }
        let cache = cache_settings(cache_dir, cache_max_mib)?;
        Ok(Command::Serve(Options {
            socket,
            snapshots,
            cache,
            metrics,
            limits,
            ready_fd,
            end_with_parent,
            confinement,
            log,
        }))
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
            snapshots: vec!["a".into(), "b/snap.json".into(), "s3://b/c".into()],
            cache: Some(CacheSettings { dir: "d".into(), max_bytes: 3 << 20 }),
            metrics: Some("m".into()),
            limits: Limits {
                max_sessions: 7,
                max_stores: Some(3 << 20),
                keep_warm: Duration::ZERO,
                copy_image: Some(1),
                record: 4,
                huge_pages: HugePages::Never,
            },
            ready_fd: Some(5),
            end_with_parent: false,
            confinement: Confinement { seccomp: false, ..Confinement::default() },
            log: Settings {
                format: Format::Json,
                path: Some("l".into()),
                ..Settings::new(Level::Debug, "uffd-handler")
            },
        };
        let line = "--socket s --snapshot a --snapshot=b/snap.json --snapshot s3://b/c --metrics m --ready-fd 5 \
            --cache-dir d --cache-max-mib 3 \
            --copy-snapshot b/snap.json --max-sessions 7 --max-stores-mib 3 --keep-warm 0 --record 4 --huge-pages never \
            --log-level debug --log-format json --log-file l --no-seccomp";
        assert_eq!(parse(line), Ok(Command::Serve(options)));
        assert_eq!(parse("--socket s --help"), Ok(Command::Help));
    }

    #[test]
    fn top_has_options_of_its_own() {
        let top = |interval, once, json| {
            Ok(Command::Tool(Tool::Top(top::Options { metrics: "m".into(), interval, once, json })))
        };
        assert_eq!(parse("top --metrics m"), top(Duration::from_secs(1), false, false));
        assert_eq!(parse("top --metrics m --interval 0.5 --once --json"), top(Duration::from_millis(500), true, true));
        assert_eq!(parse("top --help"), Ok(Command::Help));
    }

    #[test]
    fn a_working_set_is_shown_or_cleared() {
        let snapshot = || PathBuf::from("s");
        assert_eq!(parse("ws show s --json"), Ok(Command::Tool(Tool::WsShow { snapshot: snapshot(), json: true })));
        assert_eq!(parse("ws clear s"), Ok(Command::Tool(Tool::WsClear { snapshot: snapshot() })));
    }

    #[test]
    fn huge_pages_are_asked_for() {
        let huge_pages = |line: &str| match parse(&format!("--socket s --snapshot a {line}")) {
            Ok(Command::Serve(options)) => options.limits.huge_pages,
            other => panic!("{line}: {other:?}"),
        };
        assert_eq!(huge_pages(""), HugePages::Never);
        assert_eq!(huge_pages("--huge-pages collapse"), HugePages::Collapse);
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
            ("--socket s --snapshot a --copy-snapshot b", "--copy-snapshot b: give the same"),
            ("--socket s --snapshot a --max-sessions 0", "--max-sessions: must be at least 1"),
            ("--socket s --snapshot a --max-stores-mib 18446744073709551615", "--max-stores-mib: must"),
            ("--socket s --snapshot a --keep-warm -1", "invalid"),
            ("--socket s --snapshot a --log-level loud", "a level is"),
            ("--socket s --snapshot a --log-format xml", "a format is"),
            ("--socket s --snapshot a --log-file l --log-file m", "twice"),
            ("--socket s --snapshot a --cache-max-mib 5", "needs --cache-dir"),
            ("--socket s --snapshot a --cache-dir d --cache-max-mib 0", "must be 1"),
            ("--socket s --snapshot a --cache-dir d --cache-max-mib 99999999999999", "must be 1"),
            ("--socket s --snapshot a --huge-pages 2M", "`2M`"),
            ("--socket s --snapshot a --huge-pages collapse --record 1", "record first"),
            ("--socket s --snapshot a more", "more"),
            ("--sockets s", "--sockets"),
            ("top", "--metrics is missing"),
            ("ws", "`show` or `clear` is missing"),
            ("ws show", "the snapshot is missing"),
            ("ws hide s", "hide"),
            ("ws show s more", "more"),
            ("ws clear s --json", "no --json"),
            ("top --metrics m --interval 0", "0.1 to 3600"),
            ("top --metrics m --interval nan", "0.1 to 3600"),
            ("top --metrics m --socket s", "--socket"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(part), "{line}: {error}");
        }
    }
}
