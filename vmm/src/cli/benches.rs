//! What `vmm bench` asks for. Pure.

use super::options::{Command, UsageError, value};
use crate::bench;
use std::ffi::{OsStr, OsString};

/// What the words after `bench` ask for.
pub fn parse(args: Vec<OsString>) -> Result<Command, UsageError> {
    match args.split_first() {
        Some((what, rest)) if what == "density" => parse_density(rest.to_vec()),
        Some((what, rest)) if what == "faults" => parse_faults(rest.to_vec()),
        Some((what, rest)) if what == "fork" => parse_fork(rest.to_vec()),
        Some((what, rest)) if what == "reset" => parse_reset(rest.to_vec()),
        Some((what, rest)) if what == "restore" => parse_restore(rest.to_vec()),
        Some((what, rest)) if what == "snapshot" => parse_snapshot(rest.to_vec()),
        _ => parse_api(args),
    }
}

fn parse_density(args: Vec<OsString>) -> Result<Command, UsageError> {
    use lexopt::prelude::*;
    let mut options = bench::density::Options::default();
    let mut parser = lexopt::Parser::from_args(args);
    while let Some(arg) = parser.next()? {
        match arg {
            Long("n") => options.clones = value(&mut parser, "--n", "a number")?,
            Long("memory") => options.memory_mib = value(&mut parser, "--memory", "a number of MiB")?,
            Long("json") => options.json = true,
            Long("help") | Short('h') => return Ok(Command::Help(bench::USAGE)),
            other => return Err(other.unexpected().into()),
        }
    }
    options.check().map_err(lexopt::Error::from)?;
    Ok(Command::BenchDensity(options))
}

fn parse_faults(args: Vec<OsString>) -> Result<Command, UsageError> {
    use lexopt::prelude::*;
    let mut options = bench::faults::Options::default();
    let mut parser = lexopt::Parser::from_args(args);
    while let Some(arg) = parser.next()? {
        match arg {
            Long("pages") => options.pages = value(&mut parser, "--pages", "a number")?,
            Long("n") => options.runs = value(&mut parser, "--n", "a number")?,
            Long("peer-handler") => options.peer_handler = Some(parser.value()?.into()),
            Long("json") => options.json = true,
            Long("help") | Short('h') => return Ok(Command::Help(bench::USAGE)),
            other => return Err(other.unexpected().into()),
        }
    }
    options.check().map_err(lexopt::Error::from)?;
    Ok(Command::BenchFaults(options))
}

fn parse_fork(args: Vec<OsString>) -> Result<Command, UsageError> {
    use lexopt::prelude::*;
    let mut options = bench::fork::Options::default();
    let mut parser = lexopt::Parser::from_args(args);
    while let Some(arg) = parser.next()? {
        match arg {
            Long("n") => options.runs = value(&mut parser, "--n", "a number")?,
            Long("json") => options.json = true,
            Long("help") | Short('h') => return Ok(Command::Help(bench::USAGE)),
            other => return Err(other.unexpected().into()),
        }
    }
    options.check().map_err(lexopt::Error::from)?;
    Ok(Command::BenchFork(options))
}

fn parse_reset(args: Vec<OsString>) -> Result<Command, UsageError> {
    use lexopt::prelude::*;
    let mut options = bench::reset::Options::default();
    let mut parser = lexopt::Parser::from_args(args);
    while let Some(arg) = parser.next()? {
        match arg {
            Long("n") => options.runs = value(&mut parser, "--n", "a number")?,
            Long("json") => options.json = true,
            Long("help") | Short('h') => return Ok(Command::Help(bench::USAGE)),
            other => return Err(other.unexpected().into()),
        }
    }
    options.check().map_err(lexopt::Error::from)?;
    Ok(Command::BenchReset(options))
}

fn parse_restore(args: Vec<OsString>) -> Result<Command, UsageError> {
    use bench::restore::{Backend, Shell};
    use lexopt::prelude::*;
    let mut options = bench::restore::Options::default();
    let mut parser = lexopt::Parser::from_args(args);
    while let Some(arg) = parser.next()? {
        match arg {
            Long("n") => options.runs = value(&mut parser, "--n", "a number")?,
            Long("memory") => options.memory_mib = value(&mut parser, "--memory", "a number of MiB")?,
            Long("vcpus") => options.vcpus = value(&mut parser, "--vcpus", "a number")?,
            Long("backend") => match parser.value()?.string()?.as_str() {
                "file" => options.backend = Some(Backend::File),
                "shared" => options.backend = Some(Backend::Shared),
                other => return Err(choice(format!("--backend {other}: must be `file` or `shared`"))),
            },
            Long("shell") => match parser.value()?.string()?.as_str() {
                "none" => options.shell = Some(Shell::None),
                "warm" => options.shell = Some(Shell::Warm),
                other => return Err(choice(format!("--shell {other}: must be `warm` or `none`"))),
            },
            Long("json") => options.json = true,
            Long("help") | Short('h') => return Ok(Command::Help(bench::USAGE)),
            other => return Err(other.unexpected().into()),
        }
    }
    options.check().map_err(lexopt::Error::from)?;
    Ok(Command::BenchRestore(options))
}

fn choice(what: String) -> UsageError {
    lexopt::Error::from(what).into()
}

fn parse_snapshot(args: Vec<OsString>) -> Result<Command, UsageError> {
    use lexopt::prelude::*;
    let mut options = bench::snapshot::Options::default();
    let mut parser = lexopt::Parser::from_args(args);
    while let Some(arg) = parser.next()? {
        match arg {
            Long("n") => options.runs = value(&mut parser, "--n", "a number")?,
            Long("resident-mib") => options.resident_mib = value(&mut parser, "--resident-mib", "a number of MiB")?,
            Long("json") => options.json = true,
            Long("help") | Short('h') => return Ok(Command::Help(bench::USAGE)),
            other => return Err(other.unexpected().into()),
        }
    }
    options.check().map_err(lexopt::Error::from)?;
    Ok(Command::BenchSnapshot(options))
}

fn parse_api(args: Vec<OsString>) -> Result<Command, UsageError> {
    use lexopt::prelude::*;
    let (mut options, mut what) = (bench::api::Options::default(), None);
    let mut parser = lexopt::Parser::from_args(args);
    while let Some(arg) = parser.next()? {
        match arg {
            Long("calls") => options.calls = value(&mut parser, "--calls", "a number")?,
            Long("starts") => options.starts = value(&mut parser, "--starts", "a number")?,
            Long("json") => options.json = true,
            Long("help") | Short('h') => return Ok(Command::Help(bench::USAGE)),
            Value(value) if what.is_none() => what = Some(value),
            other => return Err(other.unexpected().into()),
        }
    }
    if what.as_deref() != Some(OsStr::new("api")) {
        return Err(UsageError::Missing(
            "`bench` takes `api`, `density`, `faults`, `fork`, `reset`, `restore` or `snapshot`",
        ));
    }
    options.check().map_err(lexopt::Error::from)?;
    Ok(Command::BenchApi(options))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Command, UsageError> {
        super::parse(line.split_whitespace().skip(1).map(OsString::from).collect())
    }

    #[test]
    fn benchmarks_take_their_options() {
        let snapshot =
            |runs, resident_mib, json| Command::BenchSnapshot(bench::snapshot::Options { runs, resident_mib, json });
        let reset = |runs, json| Command::BenchReset(bench::reset::Options { runs, json });
        assert_eq!(parse("bench reset").unwrap(), reset(500, false));
        assert_eq!(parse("bench reset --n 3 --json").unwrap(), reset(3, true));
        let density = bench::density::Options { clones: 9, memory_mib: 64, json: true };
        assert_eq!(parse("bench density --n 9 --memory 64 --json").unwrap(), Command::BenchDensity(density));
        let fork = |runs, json| Command::BenchFork(bench::fork::Options { runs, json });
        assert_eq!(parse("bench fork").unwrap(), fork(200, false));
        assert_eq!(parse("bench fork --n 3 --json").unwrap(), fork(3, true));
        assert_eq!(parse("bench snapshot").unwrap(), snapshot(10, 1024, false));
        assert_eq!(parse("bench snapshot --n 3 --resident-mib 16 --json").unwrap(), snapshot(3, 16, true));
        assert_eq!(parse("bench snapshot --help").unwrap(), Command::Help(bench::USAGE));
    }

    #[test]
    fn what_is_measured_of_restores_can_be_chosen() {
        use bench::restore::{Backend, Options, Shell};
        let restore = |options| Command::BenchRestore(options);
        assert_eq!(parse("bench restore").unwrap(), restore(Options::default()));
        let line = "bench restore --n 3 --memory 64 --vcpus 2 --backend shared --shell warm --json";
        let (backend, shell) = (Some(Backend::Shared), Some(Shell::Warm));
        let wanted = Options { runs: 3, memory_mib: 64, vcpus: 2, backend, shell, json: true };
        assert_eq!(parse(line).unwrap(), restore(wanted));
        for bad in ["--n 0", "--memory 4", "--vcpus 0", "--vcpus 900", "--backend disk", "--shell cold", "--shell"] {
            assert!(parse(&format!("bench restore {bad}")).is_err(), "{bad}");
        }
    }
}
