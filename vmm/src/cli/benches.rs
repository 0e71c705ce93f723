//! What `vmm bench` asks for. Pure.

use super::options::{Command, UsageError, value};
use crate::bench;
use lexopt::Parser;
use std::ffi::{OsStr, OsString};

/// What the words after `bench` ask for.
pub fn parse(args: Vec<OsString>) -> Result<Command, UsageError> {
    match args.split_first() {
        Some((what, rest)) if what == "density" => parse_density(rest),
        Some((what, rest)) if what == "faults" => parse_faults(rest),
        Some((what, rest)) if what == "fork" => parse_fork(rest),
        Some((what, rest)) if what == "reset" => parse_reset(rest),
        Some((what, rest)) if what == "restore" => parse_restore(rest),
        Some((what, rest)) if what == "snapshot" => parse_snapshot(rest),
        _ => parse_api(args),
    }
}

/// Reads the options of a benchmark. `own` takes one by its name, and says whether there is one of that name.
fn read<O: Default>(
    args: &[OsString],
    command: fn(O) -> Command,
    check: fn(&O) -> Result<(), String>,
    own: impl Fn(&mut O, &str, &mut Parser) -> Result<bool, UsageError>,
) -> Result<Command, UsageError> {
    use lexopt::prelude::*;
    let (mut options, mut parser) = (O::default(), Parser::from_args(args));
    while let Some(arg) = parser.next()? {
        match arg {
            Long("help") | Short('h') => return Ok(Command::Help(bench::USAGE)),
            Long(name) => {
                let name = name.to_owned();
                if !own(&mut options, &name, &mut parser)? {
                    return Err(Long(&name).unexpected().into());
                }
            }
            other => return Err(other.unexpected().into()),
        }
    }
    check(&options).map_err(lexopt::Error::from)?;
    Ok(command(options))
}

fn parse_density(args: &[OsString]) -> Result<Command, UsageError> {
    use bench::density::Options;
    read(args, Command::BenchDensity, Options::check, |options, name, parser| {
        match name {
            "n" => options.clones = value(parser, "--n", "a number")?,
            "memory" => options.memory_mib = value(parser, "--memory", "a number of MiB")?,
            "json" => options.json = true,
            _ => return Ok(false),
        }
        Ok(true)
    })
}

fn parse_faults(args: &[OsString]) -> Result<Command, UsageError> {
    use bench::faults::Options;
    read(args, Command::BenchFaults, Options::check, |options, name, parser| {
        match name {
            "pages" => options.pages = value(parser, "--pages", "a number")?,
            "n" => options.runs = value(parser, "--n", "a number")?,
            "peer-handler" => options.peer_handler = Some(parser.value()?.into()),
            "json" => options.json = true,
            _ => return Ok(false),
        }
        Ok(true)
    })
}

fn parse_fork(args: &[OsString]) -> Result<Command, UsageError> {
    use bench::fork::Options;
    read(args, Command::BenchFork, Options::check, |options, name, parser| {
        match name {
            "n" => options.runs = value(parser, "--n", "a number")?,
            "json" => options.json = true,
            _ => return Ok(false),
        }
        Ok(true)
    })
}

fn parse_reset(args: &[OsString]) -> Result<Command, UsageError> {
    use bench::reset::Options;
    read(args, Command::BenchReset, Options::check, |options, name, parser| {
        match name {
            "n" => options.runs = value(parser, "--n", "a number")?,
            "json" => options.json = true,
            _ => return Ok(false),
        }
        Ok(true)
    })
}

fn parse_restore(args: &[OsString]) -> Result<Command, UsageError> {
    use bench::restore::{Backend, Options, Shell};
    use lexopt::ValueExt;
    read(args, Command::BenchRestore, Options::check, |options, name, parser| {
        match name {
            "n" => options.runs = value(parser, "--n", "a number")?,
            "memory" => options.memory_mib = value(parser, "--memory", "a number of MiB")?,
            "vcpus" => options.vcpus = value(parser, "--vcpus", "a number")?,
            "backend" => match parser.value()?.string()?.as_str() {
                "file" => options.backend = Some(Backend::File),
                "shared" => options.backend = Some(Backend::Shared),
                other => return Err(choice(format!("--backend {other}: must be `file` or `shared`"))),
            },
            "shell" => match parser.value()?.string()?.as_str() {
                "none" => options.shell = Some(Shell::None),
                "warm" => options.shell = Some(Shell::Warm),
                other => return Err(choice(format!("--shell {other}: must be `warm` or `none`"))),
            },
            "json" => options.json = true,
            _ => return Ok(false),
        }
        Ok(true)
    })
}

fn choice(what: String) -> UsageError {
    lexopt::Error::from(what).into()
}

fn parse_snapshot(args: &[OsString]) -> Result<Command, UsageError> {
    use bench::snapshot::Options;
    read(args, Command::BenchSnapshot, Options::check, |options, name, parser| {
        match name {
            "n" => options.runs = value(parser, "--n", "a number")?,
            "resident-mib" => options.resident_mib = value(parser, "--resident-mib", "a number of MiB")?,
            "json" => options.json = true,
            _ => return Ok(false),
        }
        Ok(true)
    })
}

fn parse_api(args: Vec<OsString>) -> Result<Command, UsageError> {
    use lexopt::prelude::*;
    let (mut options, mut what) = (bench::api::Options::default(), None);
    let mut parser = Parser::from_args(args);
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
