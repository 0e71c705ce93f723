//! `vmm doctor`: what this host offers, what it lacks, what that means here and what to do about it.
//!
//! Where it can be done cheaply a thing is tried rather than looked up: a VM is made and run, a userfaultfd is
//! registered, a memfd is sealed. Nothing on the host is changed, and a probe that cannot be made is a warning.

mod cgroup;
mod kvm;
mod probe_vm;
mod system;
mod userfaultfd;

use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;
use std::path::Path;

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Worth knowing.
    Info,
    /// Something is slower, or not offered, on this host.
    Warn,
    /// Coppice cannot run on this host.
    Fail,
}

/// One check and its outcome.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// What was checked: a fixed name.
    pub name: String,
    /// How it came out.
    pub status: Status,
    /// What was found, and what it means.
    pub found: String,
    /// What to do about it. Every warning and failure has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Check {
    fn new(name: &str, status: Status, found: impl Into<String>, remedy: Option<String>) -> Check {
        Check { name: name.to_owned(), status, found: found.into(), remedy }
    }

    fn ok(name: &str, found: impl Into<String>) -> Check {
        Check::new(name, Status::Ok, found, None)
    }

    fn info(name: &str, found: impl Into<String>) -> Check {
        Check::new(name, Status::Info, found, None)
    }

    fn warn(name: &str, found: impl Into<String>, remedy: impl Into<String>) -> Check {
        Check::new(name, Status::Warn, found, Some(remedy.into()))
    }

    fn fail(name: &str, found: impl Into<String>, remedy: impl Into<String>) -> Check {
        Check::new(name, Status::Fail, found, Some(remedy.into()))
    }
}

/// What was found on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Whether VMs can run here.
    pub can_run: bool,
    /// Whether the page server, and with it the demonstration, can be used here.
    pub can_serve_pages: bool,
    /// The checks, in the order in which they were made.
    pub checks: Vec<Check>,
}

/// Examines this host. Takes about a tenth of a second.
pub fn run() -> Report {
    let mut checks = kvm::checks();
    checks.extend(userfaultfd::checks());
    checks.extend(system::checks());
    Report::of(checks)
}

impl Report {
    fn of(checks: Vec<Check>) -> Self {
        let bad = |check: &Check| matches!(check.status, Status::Warn | Status::Fail);
        let can_run = checks.iter().all(|check| check.status != Status::Fail);
        let can_serve_pages =
            can_run && !checks.iter().any(|check| check.name.starts_with("userfaultfd.") && bad(check));
        Report { can_run, can_serve_pages, checks }
    }

    /// How many checks came out so.
    pub fn count(&self, status: Status) -> usize {
        self.checks.iter().filter(|check| check.status == status).count()
    }

    /// The exit code of `vmm doctor`: 77 if Coppice cannot run on this host, else 0.
    pub fn exit_code(&self) -> u8 {
        if self.can_run { 0 } else { 77 }
    }
}

/// Cuts a text into lines of at most `room` characters, between words.
pub(crate) fn wrap(text: &str, room: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        let line = lines.last_mut().filter(|line| line.is_empty() || line.len() + 1 + word.len() <= room);
        match line {
            Some(line) if line.is_empty() => line.push_str(word),
            Some(line) => {
                line.push(' ');
                line.push_str(word);
            }
            None => lines.push(word.to_owned()),
        }
    }
    lines
}

/// Longest line of the table, in characters, where its texts can be cut.
const LINE: usize = 100;

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
        for Check { name, status, found, remedy } in &self.checks {
            let word = match status {
                Status::Ok => "ok",
                Status::Info => "info",
                Status::Warn => "WARN",
                Status::Fail => "FAIL",
            };
            let room = LINE.saturating_sub(4 + 2 + width + 2);
            for (number, line) in wrap(found, room).into_iter().enumerate() {
                let (word, name) = if number == 0 { (word, name.as_str()) } else { ("", "") };
                writeln!(f, "{word:<4}  {name:<width$}  {line}")?;
            }
            let remedy = remedy.iter().flat_map(|remedy| wrap(remedy, room - 3));
            for (number, line) in remedy.enumerate() {
                let arrow = if number == 0 { "->" } else { "" };
                writeln!(f, "{:<4}  {:<width$}  {arrow:<2} {line}", "", "")?;
            }
        }
        match (self.count(Status::Fail), self.count(Status::Warn)) {
            (0, 0) => writeln!(f, "\nThis host can run Coppice."),
            (0, _) if !self.can_serve_pages => {
                writeln!(
                    f,
                    "\nThis host can run VMs, but neither the page server nor the demonstration: see WARN above."
                )
            }
            (0, _) => writeln!(f, "\nThis host can run Coppice, within the limits marked WARN above."),
            _ => writeln!(f, "\nThis host cannot run Coppice: see FAIL above."),
        }
    }
}

/// Looks at a file of the kernel's and judges its contents, white space at the ends cut off.
///
/// A file that is absent means `absent`; one that cannot be read is a warning.
fn look(name: &str, path: &str, absent: &str, judge: impl FnOnce(&str) -> Check) -> Check {
    match std::fs::read_to_string(path) {
        Ok(text) => judge(text.trim()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Check::info(name, absent),
        Err(e) => Check::warn(name, format!("cannot read {path}: {e}"), format!("run as a user that may read {path}")),
    }
}

/// Contents of a file of the kernel's, or nothing.
fn read_or_empty(path: impl AsRef<Path>) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        Report::of(vec![
            Check::ok("a", "fine"),
            Check::warn("longer.name", "slow", "do this"),
            Check::info("c", "to know"),
        ])
    }

    #[test]
    fn only_failures_make_a_host_impossible() {
        let mut checks = report().checks;
        assert_eq!(Report::of(checks.clone()).exit_code(), 0);
        checks.push(Check::warn("userfaultfd.kernel_faults", "none", "get one"));
        let report = Report::of(checks.clone());
        assert_eq!((report.exit_code(), report.can_serve_pages), (0, false));
        checks.push(Check::fail("d", "none", "get one"));
        assert_eq!(Report::of(checks).exit_code(), 77);
    }

    #[test]
    fn long_texts_are_cut_between_words() {
        assert_eq!(wrap("one two three", 7), ["one two", "three"]);
        assert_eq!(wrap("endlessword x", 4), ["endlessword", "x"]);
        assert_eq!(wrap("", 4), [""]);
    }

    #[test]
    fn people_read_a_table() {
        let text = report().to_string();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "ok    a            fine");
        assert_eq!(lines[1], "WARN  longer.name  slow");
        assert_eq!(lines[2], "                   -> do this");
        assert_eq!(lines[3], "info  c            to know");
        assert_eq!(lines[5], "This host can run Coppice, within the limits marked WARN above.");
    }

    #[test]
    fn programs_read_json() {
        let json: serde_json::Value = serde_json::from_str(&serde_json::to_string(&report()).unwrap()).unwrap();
        assert_eq!(json["checks"][1]["status"], "warn");
        assert_eq!(json["checks"][1]["remedy"], "do this");
        assert_eq!(json["checks"][0].get("remedy"), None);
        assert_eq!(serde_json::from_value::<Report>(json).unwrap(), report());
    }

    #[test]
    fn a_file_that_cannot_be_read_is_a_warning_at_most() {
        let judge = |text: &str| Check::ok("x", text);
        assert_eq!(look("x", "/proc/nowhere", "not there", judge), Check::info("x", "not there"));
        assert_eq!(look("x", "/proc", "not there", judge).status, Status::Warn);
    }

    #[test]
    fn any_host_gets_a_whole_report() {
        let report = run();
        for check in &report.checks {
            let wants_remedy = matches!(check.status, Status::Warn | Status::Fail);
            assert!(!wants_remedy || check.remedy.is_some(), "{check:?}");
            let texts = [&check.found, check.remedy.as_ref().unwrap_or(&check.found)];
            assert!(texts.iter().all(|text| !text.is_empty() && !text.contains('\n')), "{check:?}");
        }
        let mut names: Vec<&str> = report.checks.iter().map(|check| check.name.as_str()).collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all, "a name is used twice");
        for name in ["kvm.device", "userfaultfd.kernel_faults", "kernel.version", "memory.free"] {
            assert!(names.contains(&name), "{name}");
        }
    }
}
