//! The command line: what it asks for, and doing it. `main` prints, [`run`] decides.

mod benches;
pub mod ctl;
mod list;
mod options;
pub mod snapshots;

pub use options::{Command, LoadOptions, RunOptions, USAGE, UsageError};

use crate::bench;
use crate::demo::{self, DemoError};
use crate::doctor;
use crate::host;
use crate::loader::{EMBEDDED_GUEST, LoadError};
use crate::logging;
use crate::machine::backend::BackendError;
use crate::machine::boot::BootError;
use crate::machine::driver::{self, Ending, RunError, Setup, Start};
use crate::machine::restore::{self, RestoreError};
use crate::machine::shell::ShellError;
use crate::memory::uffd::UffdError;
use crate::vcpu::GuestEnd;
use api_spec::logger::MetricsSink;
use api_spec::strict::{self, DocumentError};
use api_spec::vm::VmConfig;
use sandbox::confinement::ConfinementError;
use sandbox::filter::FilterError;
use snapshot::compat::Report;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// Exit code: done.
pub const DONE: i32 = 0;
/// Exit code: failed.
pub const FAILED: i32 = 1;
/// Exit code: bad usage.
pub const BAD_USAGE: i32 = 2;
/// Exit code: the guest's kernel panicked.
pub const GUEST_PANICKED: i32 = 3;
/// Exit code: the guest reset its machine, as for a reboot. Whoever wants it to boot again starts the vmm again.
pub const GUEST_RESET: i32 = 4;
/// Exit code: not possible on this host.
pub const HOST_CANNOT: i32 = 77;

/// Longest configuration file, in bytes.
const MAX_CONFIG: u64 = 1 << 20;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// A configuration file that cannot be read.
    #[error("cannot read the configuration {path}: {source}")]
    ReadConfig {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A configuration file that is larger than any.
    #[error("the configuration {0} has more than {MAX_CONFIG} bytes")]
    LongConfig(PathBuf),
    /// A configuration file that is none.
    #[error("the configuration {path} is not what it should be: {source}; docs/operations.md lists its fields")]
    BadConfig {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        source: DocumentError,
    },
    /// A snapshot that cannot be read.
    #[error(transparent)]
    Snapshot(#[from] snapshot::load::LoadError),
    /// The log.
    #[error(transparent)]
    Log(#[from] logging::LogError),
    /// What the process may do.
    #[error(transparent)]
    Confinement(#[from] ConfinementError),
    /// Which system calls it may make.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// The VM.
    #[error(transparent)]
    Run(#[from] RunError),
    /// The page server.
    #[error(transparent)]
    PageServer(#[from] uffd_handler::RunError),
    /// A look at the page server.
    #[error(transparent)]
    PageServerTool(#[from] uffd_handler::tool::ToolError),
    /// A command for a vmm.
    #[error(transparent)]
    Ctl(#[from] ctl::CtlError),
    /// The demonstration.
    #[error(transparent)]
    Demo(#[from] DemoError),
    /// A benchmark.
    #[error(transparent)]
    Bench(#[from] bench::BenchError),
    /// A snapshot that is not in order.
    #[error(transparent)]
    Verify(#[from] snapshot::verify::VerifyError),
    /// A command about snapshots that lie there.
    #[error(transparent)]
    SnapshotTool(#[from] snapshots::ToolError),
    /// A file that cannot be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Standard output that cannot be written.
    #[error("cannot write to standard output: {0}")]
    Stdout(io::Error),
}

impl CliError {
    /// The exit code that belongs to this failure.
    pub fn exit_code(&self) -> i32 {
        match self {
            CliError::Run(
                RunError::Boot(BootError::Kvm(e)) | RunError::Restore(RestoreError::Shell(ShellError::Kvm(e))),
            ) if e.host_cannot() => HOST_CANNOT,
            CliError::Run(RunError::Boot(BootError::Load(LoadError::Ring0Emulated(_)))) => HOST_CANNOT,
            CliError::Run(RunError::Restore(RestoreError::Backend(BackendError::Uffd(UffdError::Create(e)))))
                if e.host_cannot() =>
            {
                HOST_CANNOT
            }
            CliError::Run(RunError::Guest(GuestEnd::Panic)) => GUEST_PANICKED,
            CliError::PageServer(e) => e.exit_code().into(),
            CliError::Ctl(ctl::CtlError::NoSocket) => BAD_USAGE,
            CliError::Demo(e) if e.host_cannot() => HOST_CANNOT,
            CliError::Bench(e) if e.host_cannot() => HOST_CANNOT,
            _ => FAILED,
        }
    }
}

/// Does what a command line asks for, and returns the exit code of a command that did not fail.
pub fn run(command: Command) -> Result<i32, CliError> {
    // Without it a full disk is still reported, only a limit on file sizes is not.
    let _ = uffd_handler::process::survive_file_size_limit();
    match command {
        Command::Help(text) => print(text),
        Command::Version => print(&format!("vmm {}\n", env!("CARGO_PKG_VERSION"))),
        Command::Run(options) => run_vm(*options),
        Command::Ctl(ctl) => print(&ctl::run(&ctl)?),
        Command::Demo(options) => Ok(demo::run(&options).map(|()| DONE)?),
        Command::Bench(request) => print_figures(bench::run(&request)?, request.output.json),
        Command::BenchReport(kept) => print_figures(bench::show(&kept)?, true),
        Command::Doctor { json } => {
            let report = doctor::run();
            print_report(&report, json)?;
            Ok(report.exit_code().into())
        }
        Command::List { configs, json } => {
            let machines = list::list(&configs)?;
            print(&if json { to_json(&machines) } else { ctl::rows(&serde_json::json!(machines)) })
        }
        Command::GuestExport(path) => {
            let write = |source| CliError::Write { path: path.clone(), source };
            export_guest(&path).map_err(write)?;
            Ok(DONE)
        }
        Command::PageServer(options) => Ok(uffd_handler::run(&options).map(|()| DONE)?),
        Command::PageServerTool(tool) => Ok(uffd_handler::tool::run(&tool).map(|()| DONE)?),
        Command::SnapshotVersion => print(&format!("v{}\n", snapshot::FORMAT_VERSION)),
        Command::DescribeSnapshot(path) => {
            let snapshot = snapshot::load::open(&path)?;
            print(&format!("v{}\n", snapshot.manifest().format_version))
        }
        Command::Check { path, json } => {
            let snapshot = snapshot::load::open_without_memory(&path)?;
            restore::check_machine(snapshot.manifest()).map_err(RunError::from)?;
            let report = Report::of(&snapshot, &host::to_compare_closely());
            print_report(&report, json)?;
            Ok(if report.is_usable() { DONE } else { FAILED })
        }
        Command::SnapshotTool(tool) => print(&snapshots::run(&tool)?),
        Command::Verify { path, json } => {
            let report = snapshot::verify::verify(&path)?;
            print_report(&report, json)
        }
    }
}

/// Writes the embedded guest whole, or leaves no file.
fn export_guest(path: &Path) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(EMBEDDED_GUEST).inspect_err(|_| {
        if file.metadata().is_ok_and(|metadata| metadata.is_file()) {
            let _ = fs::remove_file(path);
        }
    })
}

/// A document of this program.
pub fn to_json(document: &impl serde::Serialize) -> String {
    // Our own documents have string keys and no failing serializers.
    serde_json::to_string_pretty(document).map_or_else(|e| format!("{{\"error\":\"{e}\"}}\n"), |text| text + "\n")
}

/// Prints what was found out: for people, or as one document.
fn print_report(report: &(impl serde::Serialize + std::fmt::Display), json: bool) -> Result<i32, CliError> {
    print(&if json { to_json(report) } else { report.to_string() })
}

/// Prints figures, and then what a gate says of them: beside a document, so that that stays one.
fn print_figures(printed: bench::Printed, is_document: bool) -> Result<i32, CliError> {
    print(&printed.text)?;
    match &printed.verdict {
        Some(verdict) if is_document => eprint!("{verdict}"),
        Some(verdict) => print(&verdict.to_string()).map(drop)?,
        None => {}
    }
    printed.check()?;
    Ok(DONE)
}

fn print(text: &str) -> Result<i32, CliError> {
    io::stdout().write_all(text.as_bytes()).map_err(CliError::Stdout)?;
    Ok(DONE)
}

fn run_vm(options: RunOptions) -> Result<i32, CliError> {
    let RunOptions {
        id,
        api_sock,
        config,
        restore,
        shell,
        console,
        no_api,
        max_body,
        log,
        metrics_path,
        boot_timer,
        strict,
        process_start,
        reset_is_done,
        end_with_parent,
        confinement,
    } = options;
    confinement.enter()?;
    logging::start(log)?;
    if end_with_parent {
        uffd_handler::process::end_with_parent().map_err(RunError::Setup)?;
    }
    let start = match (config, restore, shell) {
        (Some(path), ..) => Start::Boot(Box::new(read_config(&path)?)),
        (None, Some(load), _) => Start::Restore(load.request()),
        (None, None, Some(path)) => Start::Shell(Box::new(read_config(&path)?)),
        (None, None, None) => Start::Api,
    };
    let metrics = metrics_path.map(|metrics_path| MetricsSink { metrics_path, ..Default::default() });
    let api = api_sock.filter(|_| !no_api);
    let setup = Setup { id, api, max_body, console, metrics, boot_timer, strict, process_start };
    if confinement.seccomp {
        crate::sandbox::start()?;
    }
    Ok(match driver::run(setup, start)? {
        Ending::PowerOff | Ending::Signal | Ending::Stopped | Ending::Saved => DONE,
        Ending::Reset if reset_is_done => DONE,
        Ending::Reset => GUEST_RESET,
    })
}

fn read_config(path: &Path) -> Result<VmConfig, CliError> {
    let read = |source| CliError::ReadConfig { path: path.to_owned(), source };
    let mut text = Vec::new();
    File::open(path).map_err(read)?.take(MAX_CONFIG + 1).read_to_end(&mut text).map_err(read)?;
    if text.len() as u64 > MAX_CONFIG {
        return Err(CliError::LongConfig(path.to_owned()));
    }
    strict::from_slice(&text).map_err(|source| CliError::BadConfig { path: path.to_owned(), source })
}
