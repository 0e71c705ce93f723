//! The agent of a Linux guest; see the library.

#![forbid(unsafe_code)]

use guest_agent::address::Listener;
use guest_agent::options::{Options, Parsed, USAGE};
use guest_agent::serve::Agent;
use guest_agent::system::Linux;
use guest_agent::{init, say};
use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

/// How long to wait before trying again to listen while the kernel has no vsock yet: at first, and in the end.
const RETRY: Duration = Duration::from_millis(10);
const LONGEST_RETRY: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    if init::is_init() {
        // The kernel gives the first process every word of its command line that it does not know itself.
        return match Options::parse(args.iter().cloned()) {
            Ok(Parsed::Run(options)) => fail(init::run(&options, &args)),
            _ => fail(init::run(&Options::default(), &[])),
        };
    }
    match Options::parse(args) {
        Ok(Parsed::Run(options)) => run(*options),
        Ok(Parsed::Help) => {
            print!("{USAGE}");
            ExitCode::SUCCESS
        }
        Err(e) => {
            say(format_args!("{e}; see --help"));
            ExitCode::from(2)
        }
    }
}

fn run(options: Options) -> ExitCode {
    let system = Linux::new(&options.root, options.under_init);
    let agent = Agent::new(options, Box::new(system));
    let start = |name: &str, work: fn(&Agent)| {
        let agent = agent.clone();
        std::thread::Builder::new().name(name.into()).spawn(move || work(&agent)).map(drop)
    };
    // Start jobs and services need not wait for the host; the host, once told, must find the agent listening.
    let listener = match start("readiness", init::watch_readiness) {
        Ok(()) => listen(&agent),
        Err(e) => return fail(e),
    };
    if let Err(e) = start("announce", Agent::keep_announcing) {
        return fail(e);
    }
    agent.serve(&listener);
    ExitCode::SUCCESS
}

/// Listens, as soon as the kernel can: the module that brings vsock may still have to be loaded.
fn listen(agent: &Agent) -> Listener {
    let address = &agent.options().listen;
    let mut retry = RETRY;
    loop {
        match address.listen() {
            Ok(listener) => return listener,
            Err(e) => {
                if retry == RETRY {
                    say(format_args!("cannot listen at {address:?} yet: {e}"));
                }
                std::thread::sleep(retry);
                retry = (retry * 2).min(LONGEST_RETRY);
            }
        }
    }
}

fn fail(error: std::io::Error) -> ExitCode {
    say(error);
    ExitCode::FAILURE
}
