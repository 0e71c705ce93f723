//! `vmm snapshot pack`, `unpack`, `flatten`, `diff`, `show` and `rm`: what is asked for (pure), and doing it.

use super::UsageError;
use serde::Serialize;
use snapshot::create::Cancel;
use snapshot::tools::diff::diff;
use snapshot::tools::remove::remove;
use snapshot::tools::show::show;
use snapshot::tools::store::{Form, flatten, pack, write_diff};
use snapshot::tools::{self, Job};
use std::cell::Cell;
use std::ffi::OsString;
use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use uffd_handler::process::Signals;

/// What `vmm snapshot --help` prints.
pub const USAGE: &str = "\
Checks, stores otherwise, compares, shows and removes snapshots. A snapshot is its directory or the snap.json in it.

Usage: vmm snapshot verify SNAPSHOT             check every byte
       vmm snapshot check SNAPSHOT              say whether it fits this host
       vmm snapshot pack SOURCE TARGET          write it once more, with its memory compressed
       vmm snapshot unpack SOURCE TARGET        write it once more, alone and uncompressed
       vmm snapshot flatten SOURCE TARGET       write it once more, so that it lies over no other one
       vmm snapshot diff A B                    say what differs in memory and state
       vmm snapshot diff --write PARENT CHILD TARGET
                                                write CHILD once more, as changes over PARENT
       vmm snapshot show SNAPSHOT               say what it is
       vmm snapshot rm SNAPSHOT                 remove it, unless others lie over it

Options:
  --packed               with flatten and diff --write: with its memory compressed
  --write                with diff: write a snapshot
  --max-bytes N          with what writes: refuse a snapshot whose files would hold more than N bytes
  --progress             tell on standard error how far it is, even if that is no terminal
  --json                 print one JSON document
  --help (-h)

What is written is whole or absent. An interrupted command (SIGINT, SIGTERM, SIGHUP) leaves nothing.
";

/// A command that is about snapshots that lie there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tool {
    /// What to do.
    pub verb: Verb,
    /// How many bytes a snapshot that is written may take.
    pub max_bytes: Option<u64>,
    /// Tell how far it is, wherever standard error leads.
    pub progress: bool,
    /// Print JSON.
    pub json: bool,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Store with the memory packed.
    Pack {
        /// The snapshot.
        source: PathBuf,
        /// Where to.
        target: PathBuf,
    },
    /// Store so that it stands alone.
    Flatten {
        /// The snapshot.
        source: PathBuf,
        /// Where to.
        target: PathBuf,
        /// With the memory packed.
        packed: bool,
    },
    /// Compare.
    Diff {
        /// One snapshot.
        a: PathBuf,
        /// The other.
        b: PathBuf,
    },
    /// Store as changes of another.
    WriteDiff {
        /// The other.
        parent: PathBuf,
        /// The snapshot.
        child: PathBuf,
        /// Where to.
        target: PathBuf,
        /// With the memory packed.
        packed: bool,
    },
    /// Show.
    Show(PathBuf),
    /// Remove.
    Remove(PathBuf),
}

/// Why a command about snapshots failed.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// One that writes a snapshot.
    #[error(transparent)]
    Store(#[from] tools::store::StoreError),
    /// A comparison.
    #[error(transparent)]
    Diff(#[from] tools::diff::DiffError),
    /// A look.
    #[error(transparent)]
    Show(#[from] tools::show::ShowError),
    /// A removal.
    #[error(transparent)]
    Remove(#[from] tools::remove::RemoveError),
    /// Signals cannot be caught.
    #[error("cannot block signals: {0}")]
    Signals(io::Error),
}

/// Whether this is the name of one of these commands.
pub(super) fn is_verb(word: &str) -> bool {
    ["pack", "unpack", "flatten", "diff", "show", "rm"].contains(&word)
}

/// Parses the arguments that follow `snapshot`; `None` if help is asked for.
pub(super) fn parse(args: Vec<OsString>) -> Result<Option<Tool>, UsageError> {
    use lexopt::prelude::*;
    let (mut json, mut progress, mut packed, mut write, mut max_bytes) = (false, false, false, false, None);
    let mut words: Vec<OsString> = Vec::new();
    let mut parser = lexopt::Parser::from_args(args);
    while let Some(arg) = parser.next()? {
        match arg {
            Long("json") => json = true,
            Long("progress") => progress = true,
            Long("packed") => packed = true,
            Long("write") => write = true,
            Long("max-bytes") => max_bytes = Some(super::options::value(&mut parser, "--max-bytes", "a number")?),
            Long("help") | Short('h') => return Ok(None),
            Value(word) if words.len() < 4 => words.push(word),
            other => return Err(other.unexpected().into()),
        }
    }
    let verb = verb(&words, write, packed)?;
    let writes = !matches!(verb, Verb::Diff { .. } | Verb::Show(_) | Verb::Remove(_));
    if max_bytes.is_some() && !writes {
        return Err(UsageError::Needs("--max-bytes", "a command that writes a snapshot"));
    }
    if packed && !matches!(verb, Verb::Flatten { .. } | Verb::WriteDiff { .. }) {
        return Err(UsageError::Needs("--packed", "`flatten` and `diff --write`"));
    }
    if write && !matches!(verb, Verb::WriteDiff { .. }) {
        return Err(UsageError::Needs("--write", "`diff`"));
    }
    Ok(Some(Tool { verb, max_bytes, progress, json }))
}

fn verb(words: &[OsString], write: bool, packed: bool) -> Result<Verb, UsageError> {
    let name = words.first().and_then(|word| word.to_str()).unwrap_or_default();
    let paths: Vec<PathBuf> = words.iter().skip(1).map(PathBuf::from).collect();
    match (name, &paths[..]) {
        ("pack", [source, target]) => Ok(Verb::Pack { source: source.clone(), target: target.clone() }),
        ("unpack", [source, target]) if !packed => {
            Ok(Verb::Flatten { source: source.clone(), target: target.clone(), packed: false })
        }
        ("flatten", [source, target]) => Ok(Verb::Flatten { source: source.clone(), target: target.clone(), packed }),
        ("diff", [a, b]) if !write => Ok(Verb::Diff { a: a.clone(), b: b.clone() }),
        ("diff", [parent, child, target]) if write => {
            Ok(Verb::WriteDiff { parent: parent.clone(), child: child.clone(), target: target.clone(), packed })
        }
        ("show", [path]) => Ok(Verb::Show(path.clone())),
        ("rm", [path]) => Ok(Verb::Remove(path.clone())),
        ("pack", _) => Err(UsageError::Missing("`snapshot pack` takes SOURCE TARGET")),
        ("unpack", _) => Err(UsageError::Missing("`snapshot unpack` takes SOURCE TARGET, and no --packed")),
        ("flatten", _) => Err(UsageError::Missing("`snapshot flatten` takes SOURCE TARGET [--packed]")),
        ("diff", _) => Err(UsageError::Missing("`snapshot diff` takes A B, or --write PARENT CHILD TARGET")),
        ("show", _) => Err(UsageError::Missing("`snapshot show` takes SNAPSHOT")),
        _ => Err(UsageError::Missing("`snapshot rm` takes SNAPSHOT")),
    }
}

/// Does what is asked for, and returns what is to be printed.
pub(super) fn run(tool: &Tool) -> Result<String, ToolError> {
    let json = tool.json;
    match &tool.verb {
        Verb::Show(path) => Ok(text(json, &show(path)?)),
        Verb::Remove(path) => Ok(text(json, &remove(path)?)),
        Verb::Diff { a, b } => long(tool, |job| Ok(text(json, &diff(a, b, job)?))),
        Verb::Pack { source, target } => long(tool, |job| Ok(text(json, &pack(source, target, job)?))),
        Verb::Flatten { source, target, packed } => {
            long(tool, |job| Ok(text(json, &flatten(source, target, form(*packed), job)?)))
        }
        Verb::WriteDiff { parent, child, target, packed } => {
            long(tool, |job| Ok(text(json, &write_diff(parent, child, target, form(*packed), job)?)))
        }
    }
}

fn text(json: bool, report: &(impl Serialize + Display)) -> String {
    if json { super::to_json(report) } else { report.to_string() }
}

fn form(packed: bool) -> Form {
    if packed { Form::Packed } else { Form::Raw }
}

/// Does what takes long: a signal ends it in good order, and standard error tells how far it is.
fn long(tool: &Tool, work: impl FnOnce(&Job<'_>) -> Result<String, ToolError>) -> Result<String, ToolError> {
    let interrupt = Interrupt(Signals::catch().map_err(ToolError::Signals)?);
    let meter = Meter { is_terminal: io::stderr().is_terminal(), wanted: tool.progress, told: Cell::default() };
    let progress = |done, total| meter.tell(done, total);
    let done = work(&Job { cancel: &interrupt, progress: &progress, max_bytes: tool.max_bytes });
    meter.end();
    done
}

/// Signals that ask the process to end.
struct Interrupt(Signals);

impl Cancel for Interrupt {
    fn is_cancelled(&self) -> bool {
        self.0.have_come()
    }
}

/// Tells on standard error how far something is: in place on a terminal, elsewhere a line for each tenth.
struct Meter {
    is_terminal: bool,
    wanted: bool,
    /// What was told last, in hundredths.
    told: Cell<Option<u64>>,
}

impl Meter {
    fn tell(&self, done: u64, total: u64) {
        let step = if self.is_terminal { 1 } else { 10 };
        let part = hundredths(done, total) / step * step;
        if (self.is_terminal || self.wanted) && self.told.replace(Some(part)) != Some(part) {
            let (before, after) = if self.is_terminal { ("\r", "") } else { ("", "\n") };
            // Whoever does not want to know it does not hinder the work.
            let _ = write!(io::stderr(), "{before}{part:3} % of {} MiB{after}", total >> 20);
        }
    }

    /// Clears the line.
    fn end(&self) {
        if self.is_terminal && self.told.get().is_some() {
            let _ = write!(io::stderr(), "\r{:40}\r", "");
        }
    }
}

/// How much of it is done, in hundredths.
fn hundredths(done: u64, total: u64) -> u64 {
    (u128::from(done.min(total)) * 100).checked_div(total.into()).map_or(100, |part| part as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_line(line: &str) -> Result<Option<Tool>, UsageError> {
        parse(line.split_whitespace().map(OsString::from).collect())
    }

    #[test]
    fn commands_say_what_is_wanted() {
        let tool = |verb| Tool { verb, max_bytes: None, progress: false, json: false };
        let (source, target) = (PathBuf::from("a"), PathBuf::from("b"));
        let pack = Verb::Pack { source: source.clone(), target: target.clone() };
        assert_eq!(parse_line("pack a b").unwrap(), Some(tool(pack.clone())));
        let full = Tool { max_bytes: Some(5), progress: true, json: true, ..tool(pack) };
        assert_eq!(parse_line("pack --json a b --max-bytes 5 --progress").unwrap(), Some(full));
        for (line, packed) in [("unpack a b", false), ("flatten a b", false), ("flatten --packed a b", true)] {
            let flatten = Verb::Flatten { source: source.clone(), target: target.clone(), packed };
            assert_eq!(parse_line(line).unwrap(), Some(tool(flatten)), "{line}");
        }
        let (a, b) = (source.clone(), target.clone());
        assert_eq!(parse_line("diff a b").unwrap(), Some(tool(Verb::Diff { a, b })));
        let changes = Verb::WriteDiff { parent: source.clone(), child: target, target: "c".into(), packed: true };
        assert_eq!(parse_line("diff --write --packed a b c").unwrap(), Some(tool(changes)));
        assert_eq!(parse_line("show a").unwrap(), Some(tool(Verb::Show(source.clone()))));
        assert_eq!(parse_line("rm a").unwrap(), Some(tool(Verb::Remove(source))));
        assert_eq!(parse_line("rm --help").unwrap(), None);
    }

    #[test]
    fn commands_that_ask_for_nothing_sensible_are_refused() {
        for line in [
            "pack",
            "pack a",
            "pack a b c",
            "pack a b --packed",
            "pack a b --max-bytes some",
            "pack a b --write",
            "unpack a b --packed",
            "flatten a",
            "diff a",
            "diff a b c",
            "diff a b --packed",
            "diff a b --max-bytes 5",
            "diff --write a b",
            "show",
            "show a b",
            "show a --max-bytes 5",
            "rm",
            "rm a b",
            "rm a --force",
            "rm a b c d e",
        ] {
            assert!(parse_line(line).is_err(), "{line}");
        }
    }

    #[test]
    fn how_far_it_is_is_told_in_hundredths() {
        for (done, total, told) in
            [(0, 0, 100), (0, 7, 0), (3, 7, 42), (7, 7, 100), (9, 7, 100), (u64::MAX, u64::MAX, 100)]
        {
            assert_eq!(hundredths(done, total), told);
        }
    }
}
