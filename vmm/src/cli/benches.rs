//! What `vmm bench` asks for. Pure.

use super::options::{Command, UsageError, value};
use crate::bench::peer::Peer;
use crate::bench::{self, Benchmark, Output, api, density, faults, fork, reset, restore, snapshot};
use lexopt::Parser;
use std::ffi::OsString;

/// What the words after `bench` ask for.
pub fn parse(args: Vec<OsString>) -> Result<Command, UsageError> {
    const WHICH: UsageError = UsageError::Missing(
        "`bench` takes `all`, `api`, `density`, `faults`, `fork`, `reset`, `restore`, `snapshot`, or `report FILE`",
    );
    let Some((what, rest)) = args.split_first() else { return Err(WHICH) };
    match what.to_str() {
        Some("all") => parse_all(rest),
        Some("api") => one(rest, Benchmark::Api, api::Options::check, |options, name, parser| {
            match name {
                "calls" => options.calls = value(parser, "--calls", "a number")?,
                "starts" => options.starts = value(parser, "--starts", "a number")?,
                _ => return Ok(false),
            }
            Ok(true)
        }),
        Some("density") => one(rest, Benchmark::Density, density::Options::check, |options, name, parser| {
            match name {
                "n" => options.clones = value(parser, "--n", "a number")?,
                "memory" => options.memory_mib = value(parser, "--memory", "a number of MiB")?,
                _ => return Ok(false),
            }
            Ok(true)
        }),
        Some("faults") => one(rest, Benchmark::Faults, faults::Options::check, |options, name, parser| {
            match name {
                "pages" => options.pages = value(parser, "--pages", "a number")?,
                "n" => options.runs = value(parser, "--n", "a number")?,
                "peer-handler" => options.peer_handler = Some(parser.value()?.into()),
                _ => return Ok(false),
            }
            Ok(true)
        }),
        Some("fork") => one(rest, Benchmark::Fork, fork::Options::check, |options, name, parser| {
            runs(&mut options.runs, name, parser)
        }),
        Some("reset") => one(rest, Benchmark::Reset, reset::Options::check, |options, name, parser| {
            runs(&mut options.runs, name, parser)
        }),
        Some("restore") => one(rest, Benchmark::Restore, restore::Options::check, of_restore),
        Some("snapshot") => one(rest, Benchmark::Snapshot, snapshot::Options::check, |options, name, parser| {
            match name {
                "resident-mib" => options.resident_mib = value(parser, "--resident-mib", "a number of MiB")?,
                _ => return runs(&mut options.runs, name, parser),
            }
            Ok(true)
        }),
        Some("report") => parse_report(rest),
        Some("--help" | "-h") => Ok(Command::Help(bench::USAGE)),
        _ => Err(WHICH),
    }
}

/// Takes `--n`, where that is how often something is measured.
fn runs(runs: &mut u32, name: &str, parser: &mut Parser) -> Result<bool, UsageError> {
    if name == "n" {
        *runs = value(parser, "--n", "a number")?;
    }
    Ok(name == "n")
}

/// Reads options. `own` takes one by its name, and says whether there is one of that name; `words` takes whatever is no option. What is
/// done with figures is asked for alike everywhere. `None` if help is wanted.
fn read(
    args: &[OsString],
    mut own: impl FnMut(&str, &mut Parser) -> Result<bool, UsageError>,
    mut words: impl FnMut(OsString) -> Result<(), UsageError>,
) -> Result<Option<Output>, UsageError> {
    use lexopt::prelude::*;
    let (mut output, mut parser) = (Output::default(), Parser::from_args(args));
    while let Some(arg) = parser.next()? {
        match arg {
            Long("help") | Short('h') => return Ok(None),
            Long("json") => output.json = true,
            Long("gate") => output.gate = Some(parser.value()?.into()),
            Long("plot") => output.plot = Some(parser.value()?.into()),
            Long(name) => {
                let name = name.to_owned();
                if !own(&name, &mut parser)? {
                    return Err(Long(&name).unexpected().into());
                }
            }
            Value(word) => words(word)?,
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(Some(output))
}

fn no_words(word: OsString) -> Result<(), UsageError> {
    Err(lexopt::Arg::Value(word).unexpected().into())
}

/// One benchmark.
fn one<O: Default>(
    args: &[OsString],
    benchmark: fn(O) -> Benchmark,
    check: fn(&O) -> Result<(), String>,
    own: impl Fn(&mut O, &str, &mut Parser) -> Result<bool, UsageError>,
) -> Result<Command, UsageError> {
    let mut options = O::default();
    let output = read(args, |name, parser| own(&mut options, name, parser), no_words)?;
    let Some(output) = output else { return Ok(Command::Help(bench::USAGE)) };
    check(&options).map_err(choice)?;
    Ok(Command::Bench(bench::Request { benchmarks: vec![benchmark(options)], output }))
}

fn of_restore(options: &mut restore::Options, name: &str, parser: &mut Parser) -> Result<bool, UsageError> {
    use lexopt::ValueExt;
    use restore::{Backend, Shell};
    match name {
        "memory" => options.memory_mib = value(parser, "--memory", "a number of MiB")?,
        "vcpus" => options.vcpus = value(parser, "--vcpus", "a number")?,
        "working-set" => options.working_set = value(parser, "--working-set", "a number of pages")?,
        "write-fraction" => options.write_fraction = value(parser, "--write-fraction", "a number from 0 to 1")?,
        "concurrency" => options.concurrency = value(parser, "--concurrency", "a number")?,
        "cold" => options.cold = true,
        "peer" => Peer::add(&mut options.peers, &parser.value()?).map_err(choice)?,
        "backend" => match parser.value()?.string()?.as_str() {
            "file" => options.backend = Some(Backend::File),
            "shared" => options.backend = Some(Backend::Shared),
            "copy" => options.backend = Some(Backend::Copy),
            other => return Err(choice(format!("--backend {other}: must be `file`, `shared` or `copy`"))),
        },
        "shell" => match parser.value()?.string()?.as_str() {
            "none" => options.shell = Some(Shell::None),
            "warm" => options.shell = Some(Shell::Warm),
            other => return Err(choice(format!("--shell {other}: must be `warm` or `none`"))),
        },
        _ => return runs(&mut options.runs, name, parser),
    }
    Ok(true)
}

/// Every benchmark, as the published figures are made.
fn parse_all(args: &[OsString]) -> Result<Command, UsageError> {
    let (mut most, mut peers, mut peer_handler) = (None, Vec::new(), None);
    let own = |name: &str, parser: &mut Parser| {
        match name {
            "n" => most = Some(value(parser, "--n", "a number")?),
            "peer" => Peer::add(&mut peers, &parser.value()?).map_err(choice)?,
            "peer-handler" => peer_handler = Some(parser.value()?.into()),
            _ => return Ok(false),
        }
        Ok(true)
    };
    let Some(output) = read(args, own, no_words)? else { return Ok(Command::Help(bench::USAGE)) };
    if most == Some(0) {
        return Err(choice("--n 0: must be at least 1".into()));
    }
    let benchmarks = bench::all(most.unwrap_or(u32::MAX), peers, peer_handler);
    Ok(Command::Bench(bench::Request { benchmarks, output }))
}

/// Figures that were kept.
fn parse_report(args: &[OsString]) -> Result<Command, UsageError> {
    let mut path = None;
    let words = |word: OsString| match path.replace(word) {
        None => Ok(()),
        Some(_) => Err(choice("`bench report` takes one file".into())),
    };
    let Some(output) = read(args, |_, _| Ok(false), words)? else { return Ok(Command::Help(bench::USAGE)) };
    let path = path.ok_or(UsageError::Missing("`bench report` takes a file that `vmm bench --json` has printed"))?;
    Ok(Command::BenchReport(bench::Kept { path: path.into(), output }))
}

fn choice(what: String) -> UsageError {
    lexopt::Error::from(what).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use bench::{Kept, Request};

    fn parse(line: &str) -> Result<Command, UsageError> {
        super::parse(line.split_whitespace().skip(1).map(OsString::from).collect())
    }

    /// The benchmark that a line asks for, and nothing else.
    fn benchmark(line: &str) -> Benchmark {
        match parse(line).unwrap() {
            Command::Bench(Request { benchmarks, output }) if output == Output::default() => {
                let [benchmark] = &benchmarks[..] else { panic!("{benchmarks:?}") };
                benchmark.clone()
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn benchmarks_take_their_options() {
        let snapshot = |runs, resident_mib| Benchmark::Snapshot(snapshot::Options { runs, resident_mib });
        assert_eq!(benchmark("bench reset"), Benchmark::Reset(reset::Options { runs: 500 }));
        assert_eq!(benchmark("bench reset --n 3"), Benchmark::Reset(reset::Options { runs: 3 }));
        let density = density::Options { clones: 9, memory_mib: 64 };
        assert_eq!(benchmark("bench density --n 9 --memory 64"), Benchmark::Density(density));
        assert_eq!(benchmark("bench fork"), Benchmark::Fork(fork::Options { runs: 200 }));
        assert_eq!(benchmark("bench snapshot"), snapshot(10, 1024));
        assert_eq!(benchmark("bench snapshot --n 3 --resident-mib 16"), snapshot(3, 16));
        let api = api::Options { calls: 7, starts: 8 };
        assert_eq!(benchmark("bench api --calls 7 --starts 8"), Benchmark::Api(api));
        for help in ["bench --help", "bench -h", "bench snapshot --help", "bench all -h", "bench report --help"] {
            assert_eq!(parse(help).unwrap(), Command::Help(bench::USAGE), "{help}");
        }
    }

    #[test]
    fn what_is_done_with_figures_is_asked_for_alike() {
        let wanted = Output { json: true, gate: Some("g".into()), plot: Some("p".into()) };
        for what in ["all", "api", "density", "faults", "fork", "reset", "restore", "snapshot"] {
            let Command::Bench(Request { output, benchmarks }) =
                parse(&format!("bench {what} --json --gate g --plot p")).unwrap()
            else {
                panic!("{what}")
            };
            assert_eq!(output, wanted, "{what}");
            assert_eq!(benchmarks.len(), if what == "all" { 7 } else { 1 });
        }
        let kept = Kept { path: "f".into(), output: wanted };
        assert_eq!(parse("bench report f --json --gate g --plot p").unwrap(), Command::BenchReport(kept));
        for bad in ["report", "report a b", "report a --n 3", "all --n 0", "all x", "fork --json x", "fork --gate"] {
            assert!(parse(&format!("bench {bad}")).is_err(), "{bad}");
        }
    }

    #[test]
    fn all_can_be_made_short() {
        let Command::Bench(Request { benchmarks, .. }) = parse("bench all --n 2").unwrap() else { panic!() };
        for benchmark in benchmarks {
            let fits = match benchmark {
                Benchmark::Api(options) => options.check(),
                Benchmark::Density(options) => options.check(),
                Benchmark::Faults(options) => options.check(),
                Benchmark::Fork(options) => options.check(),
                Benchmark::Reset(options) => options.check(),
                Benchmark::Restore(options) => options.check(),
                Benchmark::Snapshot(options) => options.check(),
            };
            fits.unwrap();
        }
    }

    #[test]
    fn what_is_measured_of_restores_can_be_chosen() {
        use restore::{Backend, Options, Shell};
        assert_eq!(benchmark("bench restore"), Benchmark::Restore(Options::default()));
        let line = "bench restore --n 3 --memory 64 --vcpus 2 --backend shared --shell warm --working-set 9 \
                    --write-fraction 0.5 --concurrency 4 --cold --peer firecracker=/f";
        let wanted = Options {
            runs: 3,
            memory_mib: 64,
            vcpus: 2,
            backend: Some(Backend::Shared),
            shell: Some(Shell::Warm),
            working_set: 9,
            write_fraction: 0.5,
            concurrency: 4,
            cold: true,
            peers: vec![Peer::parse("firecracker=/f".as_ref()).unwrap()],
        };
        assert_eq!(benchmark(line), Benchmark::Restore(wanted));
        for bad in [
            "--n 0",
            "--memory 4",
            "--vcpus 0",
            "--vcpus 900",
            "--backend disk",
            "--shell cold",
            "--shell",
            "--working-set 30000",
            "--write-fraction 2",
            "--write-fraction nan",
            "--concurrency 0",
            "--peer",
            "--peer firecracker",
            "--peer xen=/x",
            "--peer firecracker=",
        ] {
            assert!(parse(&format!("bench restore {bad}")).is_err(), "{bad}");
        }
    }
}
