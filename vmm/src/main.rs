//! `vmm`: one microVM, and the tools around it. `main` prints, [`vmm::cli::run`] decides.

use std::process::ExitCode;
use vmm::cli::{self, BAD_USAGE, Command};
use vmm::logging::last_words;

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let help = Command::help_for(&args);
    let command = match Command::parse(args) {
        Ok(command) => command,
        Err(error) => {
            last_words(&format_args!("{error}; see {help}"));
            return exit(BAD_USAGE);
        }
    };
    match cli::run(command) {
        Ok(code) => exit(code),
        Err(error) => {
            last_words(&error);
            exit(error.exit_code())
        }
    }
}

fn exit(code: i32) -> ExitCode {
    ExitCode::from(code as u8)
}
