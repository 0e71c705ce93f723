//! Log lines on standard error: one a record, with time and level; never guest data.

use log::{LevelFilter, Log, Metadata, Record};
use std::fmt::{Display, Write as _};
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

struct Stderr;

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record) {
        if self.enabled(record.metadata()) {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let line = format!("{}.{:06} {:5} {}", now.as_secs(), now.subsec_micros(), record.level(), record.args());
            // There is nowhere to report that standard error is gone.
            let _ = std::io::stderr().lock().write_all(one_line(&line).as_bytes());
        }
    }

    fn flush(&self) {}
}

/// Says why this process, an instance of `program`, fails, in one line, whatever names and messages of others are in it. Only the first call says
/// anything: whichever thread comes first, the reason is said once.
pub fn last_words(program: &str, reason: &dyn Display) {
    static SAID: AtomicBool = AtomicBool::new(false);
    if !SAID.swap(true, Ordering::SeqCst) {
        // There is nowhere to report that standard error is gone.
        let _ = std::io::stderr().lock().write_all(one_line(&format!("{program}: {reason}")).as_bytes());
    }
}

/// A text as one line: control characters are escaped.
fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len() + 1);
    for c in text.chars() {
        if c.is_control() {
            let _ = write!(line, "{}", c.escape_default());
        } else {
            line.push(c);
        }
    }
    line.push('\n');
    line
}

/// Starts logging records of `level` and above.
pub fn start(level: LevelFilter) {
    if log::set_logger(&Stderr).is_ok() {
        log::set_max_level(level);
    }
}

#[cfg(test)]
mod tests {
    use super::one_line;

    #[test]
    fn a_line_stays_one_line() {
        assert_eq!(one_line("a\nb\u{1b}[2J\u{9b}é"), "a\\nb\\u{1b}[2J\\u{9b}é\n");
    }
}
