//! How a test says that this host cannot run it.
//!
//! The test runner knows no such thing and counts a test that returns early as passed. So a skipped test prints a line,
//! and appends `name: reason` to the file that the environment variable `COPPICE_SKIPS` names; `./test` counts those.

#![forbid(unsafe_code)]

use std::fmt::Display;
use std::fs::OpenOptions;
use std::io::Write;

/// Notes that the test on this thread is skipped. The caller then returns from it.
pub fn skip(reason: impl Display) {
    // The runner names each test's thread after the test.
    skip_test(std::thread::current().name().unwrap_or("a test"), reason);
}

/// Notes that a test is skipped, on another thread than its own.
pub fn skip_test(test: &str, reason: impl Display) {
    let line = format!("{test}: {}", reason.to_string().replace('\n', " "));
    println!("skipped {line}");
    if let Some(path) = std::env::var_os("COPPICE_SKIPS") {
        let file = OpenOptions::new().append(true).create(true).open(&path);
        file.and_then(|mut file| file.write_all(format!("{line}\n").as_bytes()))
            .unwrap_or_else(|e| panic!("cannot note in {} that a test was skipped: {e}", path.display()));
    }
}
