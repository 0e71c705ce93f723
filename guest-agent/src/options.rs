//! The command line. A first process gets words there that were meant for the kernel; it goes by the defaults.

use crate::address::Address;
use api_spec::agent::{AGENT_PORT, READY_PORT};
use std::path::PathBuf;
use std::time::Duration;

/// What `--help` prints.
pub const USAGE: &str = "\
The agent of a Linux guest. As the first process it also mounts, reaps, and runs start jobs.

usage: guest-agent [options]

  --listen ADDRESS        where to listen: vsock:PORT or unix:PATH (default vsock:5000)
  --announce ADDRESS      where to tell the host that the guest is ready (default vsock:5001)
  --hooks DIR             hooks, in pre-snapshot/ and resumed/ (default /etc/coppice/hooks.d)
  --hook-deadline-ms MS   how long each hook may take (default 10000)
  --jobs DIR              start jobs, where there is no systemd (default /etc/coppice/start.d)
  --job-deadline-ms MS    how long each start job may take (default 90000)
  --modules FILE          kernel modules that the first process loads, a path a line (default /etc/coppice/modules)
  --state DIR             what an agent that starts again needs to know (default /run/coppice)
  --root DIR              where etc/ and run/ of the guest are (default /)
  -h, --help              this text
";

/// What the command line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// Run.
    Run(Box<Options>),
    /// Print [`USAGE`].
    Help,
}

/// How to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Where to listen.
    pub listen: Address,
    /// Where to tell the host that the guest is ready.
    pub announce: Address,
    /// Hooks.
    pub hooks: PathBuf,
    /// How long each hook may take.
    pub hook_deadline: Duration,
    /// Start jobs.
    pub jobs: PathBuf,
    /// How long each start job may take.
    pub job_deadline: Duration,
    /// The list of kernel modules.
    pub modules: PathBuf,
    /// What an agent that starts again needs to know.
    pub state: PathBuf,
    /// Where the guest's files are.
    pub root: PathBuf,
    /// The first process is this program, and has started this one.
    pub under_init: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            listen: Address::Vsock(AGENT_PORT),
            announce: Address::Vsock(READY_PORT),
            hooks: "/etc/coppice/hooks.d".into(),
            hook_deadline: Duration::from_secs(10),
            jobs: "/etc/coppice/start.d".into(),
            job_deadline: Duration::from_secs(90),
            modules: "/etc/coppice/modules".into(),
            state: "/run/coppice".into(),
            root: "/".into(),
            under_init: false,
        }
    }
}

/// The option by which the first process tells the agent that it started who it is. Not for people.
pub const UNDER_INIT: &str = "--under-init";

impl Options {
    /// Reads the command line, without the program's name.
    pub fn parse(args: impl IntoIterator<Item = std::ffi::OsString>) -> Result<Parsed, lexopt::Error> {
        use lexopt::prelude::*;
        let mut options = Options::default();
        let mut parser = lexopt::Parser::from_args(args);
        while let Some(arg) = parser.next()? {
            match arg {
                Long("listen") => options.listen = parser.value()?.parse()?,
                Long("announce") => options.announce = parser.value()?.parse()?,
                Long("hooks") => options.hooks = parser.value()?.into(),
                Long("hook-deadline-ms") => options.hook_deadline = Duration::from_millis(parser.value()?.parse()?),
                Long("jobs") => options.jobs = parser.value()?.into(),
                Long("job-deadline-ms") => options.job_deadline = Duration::from_millis(parser.value()?.parse()?),
                Long("modules") => options.modules = parser.value()?.into(),
                Long("state") => options.state = parser.value()?.into(),
                Long("root") => options.root = parser.value()?.into(),
                Long("under-init") => options.under_init = true,
                Short('h') | Long("help") => return Ok(Parsed::Help),
                other => return Err(other.unexpected()),
            }
        }
        Ok(Parsed::Run(Box::new(options)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Parsed, lexopt::Error> {
        Options::parse(args.iter().map(Into::into))
    }

    #[test]
    fn options_are_read() {
        assert_eq!(parse(&[]).unwrap(), Parsed::Run(Box::default()));
        assert_eq!(parse(&["--help"]).unwrap(), Parsed::Help);
        let Parsed::Run(options) = parse(&["--listen", "unix:/a", "--hook-deadline-ms=5", UNDER_INIT]).unwrap() else {
            panic!("no run")
        };
        assert_eq!(options.listen, Address::Unix("/a".into()));
        assert_eq!((options.hook_deadline, options.under_init), (Duration::from_millis(5), true));
    }

    #[test]
    fn what_is_no_option_is_refused() {
        for args in [&["quiet"][..], &["--listen"], &["--listen", "tcp:1"], &["--hook-deadline-ms", "x"]] {
            assert!(parse(args).is_err(), "{args:?}");
        }
    }
}
