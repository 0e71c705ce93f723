//! The page server as a program of its own.

use std::process::ExitCode;
use uffd_handler::logging::last_words;
use uffd_handler::{Command, USAGE};

const NAME: &str = "uffd-handler";

fn main() -> ExitCode {
    let command = match Command::parse(std::env::args_os().skip(1)) {
        Ok(command) => command,
        Err(error) => {
            last_words(NAME, &format_args!("{error}; see {NAME} --help"));
            return ExitCode::from(2);
        }
    };
    match command {
        Command::Help => print!("{USAGE}"),
        Command::Version => println!("uffd-handler {}", env!("CARGO_PKG_VERSION")),
        Command::Serve(options) => {
            if let Err(error) = uffd_handler::run(&options) {
                last_words(NAME, &error);
                return ExitCode::from(error.exit_code());
            }
        }
        Command::Tool(tool) => {
            if let Err(error) = uffd_handler::tool::run(&tool) {
                last_words(NAME, &error);
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}
