//! The page server as a program of its own.

use log::{LevelFilter, Log, Metadata, Record};
use std::io::Write;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};
use uffd_handler::{Command, USAGE};

fn main() -> ExitCode {
    let command = match Command::parse(std::env::args_os().skip(1)) {
        Ok(command) => command,
        Err(error) => {
            eprintln!("uffd-handler: {error}; see uffd-handler --help");
            return ExitCode::from(2);
        }
    };
    match command {
        Command::Help => print!("{USAGE}"),
        Command::Version => println!("uffd-handler {}", env!("CARGO_PKG_VERSION")),
        Command::Serve(options) => {
            if log::set_logger(&StderrLog).is_ok() {
                log::set_max_level(LevelFilter::Info);
            }
            if let Err(error) = uffd_handler::run(&options) {
                eprintln!("uffd-handler: {error}");
                return ExitCode::from(error.exit_code());
            }
        }
    }
    ExitCode::SUCCESS
}

/// One line per record on stderr: seconds since the epoch, level, text.
struct StderrLog;

impl Log for StderrLog {
    fn enabled(&self, _: &Metadata) -> bool {
        true
    }

    fn log(&self, record: &Record) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let line = format!("{}.{:06} {} {}\n", now.as_secs(), now.subsec_micros(), record.level(), record.args());
        // Nobody is left to tell if stderr is closed.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }

    fn flush(&self) {}
}
