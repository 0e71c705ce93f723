//! What the tests of bad input share, and these tests, by where the input comes from.

mod cli;
mod config;
mod disk;
mod fit;
mod guest;
mod host;
mod page_server;
mod rest;
mod signals;
mod snapshot;
mod vsock;

use std::path::Path;
use std::process::Command;
pub use tests::Random;
use tests::process::Finished;
pub use tests::procfs::rss_kib;
use tests::{Place, Process, binaries};

/// Failed.
pub const FAILED: i32 = 1;
/// Exit code: the guest reset its machine.
pub const RESET: i32 = 4;
/// Bad usage.
pub const BAD_USAGE: i32 = 2;
/// Not possible on this host.
pub const HOST_CANNOT: i32 = 77;

/// Runs the vmm and expects that it refuses: with this exit code, with one line that has all of these words, and with
/// nothing left behind in `place`. Returns the line.
#[track_caller]
pub fn refused(place: &Place, name: &str, code: i32, words: &[&str], arguments: impl FnOnce(&mut Command)) -> String {
    refused_by(place, name, binaries::vmm(), code, words, arguments)
}

/// As [`refused`], but of a program that becomes the vmm.
#[track_caller]
pub fn refused_by(
    place: &Place,
    name: &str,
    program: &Path,
    code: i32,
    words: &[&str],
    arguments: impl FnOnce(&mut Command),
) -> String {
    let before = names(place, name);
    let done = Process::start(place, name, program, arguments).finish();
    assert_eq!(names(place, name), before, "{name}: something was left behind");
    refusal(name, &done, code, words)
}

/// Expects that a vmm has refused. Returns the line that says so.
#[track_caller]
pub fn refusal(name: &str, done: &Finished, code: i32, words: &[&str]) -> String {
    assert_eq!(done.status.code(), Some(code), "{name}: {done:?}");
    let line = done.one_line().to_owned();
    assert!(line.starts_with("vmm: ") && line.len() > 20, "{name}: {line}");
    assert!(!line.chars().any(char::is_control), "{name}: {line:?}");
    for word in ["panicked", "RUST_BACKTRACE", "Some(", "Os {"] {
        assert!(!line.contains(word), "{name}: {line}");
    }
    for word in words {
        assert!(line.contains(word), "{name}: `{word}` is not in: {line}");
    }
    line
}

/// What is in `place` besides what the process `name` has said.
fn names(place: &Place, name: &str) -> Vec<String> {
    let said = [format!("{name}.out"), format!("{name}.log")];
    place.names().into_iter().filter(|other| !said.contains(other)).collect()
}

/// Whether nobody has panicked, going by what was logged.
#[track_caller]
pub fn no_panic(log: &str) {
    assert!(!log.contains("panicked"), "{log}");
}

/// Whether these tests run as root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Returns from a test, and says so, because of this reason.
macro_rules! skip {
    ($reason:expr) => {{
        fn here() {}
        let name = std::any::type_name_of_val(&here);
        tests::skip_test(name.strip_suffix("::here").unwrap_or(name), $reason);
        return;
    }};
}
pub(crate) use skip;
