//! What a command line asks for. Pure.

use super::benches;
use super::ctl::{self, Ctl};
use super::snapshots;
use crate::bench;
use crate::demo::DemoOptions;
use crate::logging::{Level, Settings};
use crate::machine::config::check_id;
use crate::stats::process::ProcessStart;
use api_spec::devices::Serial;
use api_spec::mac::MacError;
use api_spec::snapshot::{
    AllowedMismatch, DriveOverride, MemBackend, MemBackendType, NetworkOverride, OnHandlerLoss, SnapshotLoad,
    VsockOverride,
};
use sandbox::confinement::Confinement;
use sandbox::options::OptionError;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// What `--help` prints.
pub const USAGE: &str = concat!(
    "\
Boots, snapshots and restores one microVM.

Usage: vmm --config FILE [options]            boot what the file describes
       vmm --restore SNAPSHOT [options]       restore a snapshot (its directory or its snap.json)
       vmm --api-sock PATH [options]          wait for instructions over HTTP
       vmm --shell FILE --api-sock PATH [options]
                                              build all of a machine but what a snapshot brings, and wait for one to load
       vmm ctl COMMAND [options]              command a vmm over its API; see `vmm ctl --help`
       vmm demo [options]                     boot, snapshot, and restore clones; see `vmm demo --help`
       vmm bench all [options]                measure everything on this host; see `vmm bench --help`
       vmm bench api [options]                measure the REST API
       vmm bench density [options]            measure many clones at once
       vmm bench faults [options]             measure page faults of clones
       vmm bench fork [options]               measure forks
       vmm bench reset [options]              measure resets
       vmm bench restore [options]            measure how soon clones answer
       vmm bench snapshot [options]           measure snapshots
       vmm bench report FILE [--json]         show figures that were kept
       vmm list CONFIG... [--json]            say which machines are saved, by their configuration files
       vmm doctor [--json]                    say what this host can do, with remedies
       vmm guest export FILE                  write the embedded guest's kernel, for other VMMs to boot
       vmm snapshot verify SNAPSHOT [--json]  check every byte of a snapshot
       vmm snapshot check SNAPSHOT [--json]   say whether a snapshot fits this host, without loading it
       vmm snapshot pack SOURCE TARGET [--json]
                                              write a snapshot once more, compressed; see `vmm snapshot --help`
       vmm snapshot unpack SOURCE TARGET [--json]
                                              write it uncompressed
       vmm snapshot flatten SOURCE TARGET [--json]
                                              write it so that it lies over no other one
       vmm snapshot diff A B [--json]         say what differs between two, or write it (--write)
       vmm snapshot show SNAPSHOT [--json]    say what a snapshot is
       vmm snapshot rm SNAPSHOT [--json]      remove a snapshot that no other one lies over
       vmm uffd-handler [options]             run the page server; see `vmm uffd-handler --help`

Options:
  --config FILE          the machine, as JSON
  --restore SNAPSHOT     the snapshot to restore
  --shell FILE           CPUs, memory and devices of the machine that a snapshot is to be loaded into, as JSON
  --uffd PATH            with --restore: take memory from the page server that listens there
  --on-handler-loss WHAT with --uffd: what becomes of the guest if that page server dies or hangs: `failover` (default),
                         `reattach`, `pause` or `kill`
  --uffd-mode MODE       with --uffd: `shared` (default), or `copy` for a page server of Firecracker's protocol
  --vsock PATH           with --restore: the Unix socket of the vsock device, instead of the snapshot's own
  --drive ID=PATH        with --restore: the image of the disk ID is at PATH; once for each disk
  --tap IFACE=DEV[,MAC]  with --restore: the tap device, and the MAC address, of a network interface, instead of the
                         snapshot's own; once for each interface
  --paused               with --restore: leave the vCPUs standing still
  --max-private-mib N    with --restore: pause the guest when it has N MiB of private memory
  --no-replay            with --restore: do not get pages ready that earlier clones have used (working-set.json)
  --allow-mismatch WHAT  with --restore: restore though the host differs in `vendor`, `cpu_features`, `xsave` or `tsc_khz`; once
                         for each. The guest may fail at any time
  --same-generation      with --restore: keep the generation id, so that the guest takes itself for the original (tests)
  --strict               with --config: fail, instead of booting, if there is a saved state that cannot be used
  --trace-phases         log what boots, loads, forks and resets spend their time on (at level `info`, which is the default then)
  --console PLACE        where the guest's COM1 leads: `stdio` (default), `pty`, or a file that output is appended to
  --api-sock PATH        Unix socket of the REST API; created, mode 0600, removed at the end
  --id NAME              the VM's name in the API (default `anonymous-instance`)
  --end-with-parent      end, as on SIGTERM, when the process that started this one ends
  --log-level LEVEL      off, error, warn, info, debug or trace (default `warn`)
  --log-file PATH        where the log goes: a file that lines are appended to, or a FIFO (default: standard error)
  --log-format FORMAT    `human` (default), or `json`: an object a line
  --help (-h), --version (-V)

",
    sandbox::confinement_usage!(),
    "
Options by which Firecracker's clients start it:
  --config-file FILE     as --config, but a guest that resets its machine ends the vmm with 0, as there
  --no-api               with --config or --config-file: no API, whatever --api-sock says
  --level LEVEL, --log-path PATH
                         as --log-level and --log-file
  --show-level           lines of the log tell their level; they do anyway
  --show-log-origin      lines of the log tell the place in the source that they come from
  --module PATH          log only what comes from this module, such as `vmm::api`
  --metrics-path PATH    where counters are written, as by `PUT /metrics`
  --boot-timer           log the time until the guest writes 123 to address 0xc0000000 (at level `info`, which is the
                         default then)
  --http-api-max-payload-size N
                         longest body that the API takes, in bytes (default 51200)
  --start-time-us N, --start-time-cpu-us N, --parent-cpu-time-us N
                         when and at what cost this process was started, for the counters
  --snapshot-version     print the version of the snapshot format
  --describe-snapshot SNAPSHOT
                         print the version of a snapshot's format
--seccomp-filter, --metadata, --mmds-size-limit and --enable-pci are about what is not offered, and refused.

Ends with 0 when the guest has powered its machine off, or on SIGTERM, SIGINT or SIGHUP, 1 on failure, 2 on bad usage, 3
when the guest's kernel has panicked and said so (pvpanic), 4 when the guest has reset its machine (a reboot; 0 if it was
started over the API or by --config-file), 77 if this host cannot run microVMs, and
148 after a system call that it may not make.
"
);

/// How to run a VM.
#[derive(Clone, Debug, PartialEq)]
pub struct RunOptions {
    /// Name in the API.
    pub id: String,
    /// Socket of the API.
    pub api_sock: Option<PathBuf>,
    /// What to boot.
    pub config: Option<PathBuf>,
    /// What to restore.
    pub restore: Option<LoadOptions>,
    /// What to build a shell like.
    pub shell: Option<PathBuf>,
    /// Where the guest's console leads.
    pub console: Option<Serial>,
    /// No API, whatever is said of its socket.
    pub no_api: bool,
    /// Longest body that the API takes, in bytes, if that was said.
    pub max_body: Option<usize>,
    /// What to log, how and where.
    pub log: Settings,
    /// Where counters are written.
    pub metrics_path: Option<PathBuf>,
    /// Tell how long the guest took to boot.
    pub boot_timer: bool,
    /// Fail if there is a saved state that cannot be used.
    pub strict: bool,
    /// What whoever started this process says of that.
    pub process_start: ProcessStart,
    /// A reset of the guest's machine is an end like any other.
    pub reset_is_done: bool,
    /// End when the parent process ends.
    pub end_with_parent: bool,
    /// What is taken away from the process.
    pub confinement: Confinement,
}

/// What to restore.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// The snapshot.
    pub snapshot: PathBuf,
    /// The page server's socket.
    pub uffd: Option<PathBuf>,
    /// The page server speaks Firecracker's protocol.
    pub copy: bool,
    /// What becomes of the guest if the page server dies or hangs.
    pub on_handler_loss: Option<OnHandlerLoss>,
    /// Other places of disk images.
    pub drives: Vec<DriveOverride>,
    /// The vsock device's socket.
    pub vsock: Option<PathBuf>,
    /// Tap devices of network interfaces.
    pub taps: Vec<NetworkOverride>,
    /// Leave vCPUs standing still.
    pub paused: bool,
    /// Keep the generation id.
    pub same_generation: bool,
    /// Most private memory, in MiB.
    pub max_private_mib: Option<u64>,
    /// Make nothing of the snapshot's working set.
    pub no_replay: bool,
    /// In what the host may differ.
    pub allow_mismatch: Vec<AllowedMismatch>,
}

impl LoadOptions {
    /// The request that means the same over the API.
    pub fn request(&self) -> SnapshotLoad {
        let backend_type = if self.copy { MemBackendType::Uffd } else { MemBackendType::UffdShared };
        let on_handler_loss = self.on_handler_loss;
        let uffd = |path: &PathBuf| MemBackend { on_handler_loss, ..MemBackend::of(backend_type, path.clone()) };
        SnapshotLoad {
            mem_backend: self.uffd.as_ref().map(uffd),
            resume_vm: !self.paused,
            drive_overrides: self.drives.clone(),
            vsock_override: self.vsock.as_ref().map(|path| VsockOverride { uds_path: path.clone() }),
            network_overrides: self.taps.clone(),
            new_generation: !self.same_generation,
            max_private_mib: self.max_private_mib,
            replay_working_set: !self.no_replay,
            allow_mismatch: self.allow_mismatch.clone(),
            ..SnapshotLoad::of(self.snapshot.clone())
        }
    }
}

/// What a command line asks for.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Print this text.
    Help(&'static str),
    /// Print the version.
    Version,
    /// Run a VM.
    Run(Box<RunOptions>),
    /// Command a vmm over its API.
    Ctl(Box<Ctl>),
    /// Run the demonstration.
    Demo(DemoOptions),
    /// Measure.
    Bench(bench::Request),
    /// Show what was measured before.
    BenchReport(bench::Kept),
    /// Print the version of the snapshot format.
    SnapshotVersion,
    /// Print the version of a snapshot's format.
    DescribeSnapshot(PathBuf),
    /// Examine the host.
    Doctor {
        /// Print JSON.
        json: bool,
    },
    /// Tell which machines are saved.
    List {
        /// Their configuration files.
        configs: Vec<PathBuf>,
        /// Print JSON.
        json: bool,
    },
    /// Write the embedded guest to a file.
    GuestExport(PathBuf),
    /// Run the page server.
    PageServer(Box<uffd_handler::Options>),
    /// Look at a page server, or at what belongs to one.
    PageServerTool(uffd_handler::tool::Tool),
    /// Compare a snapshot with this host.
    Check {
        /// The snapshot.
        path: PathBuf,
        /// Print JSON.
        json: bool,
    },
    /// Store a snapshot otherwise, compare two, show one, remove one.
    SnapshotTool(snapshots::Tool),
    /// Check a snapshot.
    Verify {
        /// The snapshot.
        path: PathBuf,
        /// Print JSON.
        json: bool,
    },
}

/// A command line that asks for nothing sensible.
#[derive(Debug, thiserror::Error)]
pub enum UsageError {
    /// An option that is unknown, or lacks its value.
    #[error("{0}")]
    Syntax(#[from] lexopt::Error),
    /// A command for a vmm that is none.
    #[error("{0}")]
    Ctl(String),
    /// What is to be taken away from the process.
    #[error("{0}")]
    Confinement(#[from] OptionError),
    /// The page server's own options.
    #[error("{0}")]
    PageServer(#[from] uffd_handler::UsageError),
    /// Something is missing.
    #[error("{0}")]
    Missing(&'static str),
    /// Two things that exclude each other.
    #[error("{0} and {1} exclude each other")]
    Conflict(&'static str, &'static str),
    /// An option that makes sense with another only.
    #[error("{0} makes sense with {1} only")]
    Needs(&'static str, &'static str),
    /// Something that Firecracker has and this program does not.
    #[error("{0} is not offered: {1}")]
    NotOffered(&'static str, &'static str),
}

impl Command {
    /// Parses the arguments that follow the program's name.
    pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Self, UsageError> {
        let args: Vec<OsString> = args.into_iter().collect();
        let rest = args.get(1..).unwrap_or_default().to_vec();
        match args.first().and_then(|first| first.to_str()) {
            Some("ctl") => Ok(Command::Ctl(Box::new(ctl::parse(rest)?))),
            Some("demo") => parse_demo(rest),
            Some("bench") => benches::parse(rest),
            Some("doctor") => parse_doctor(rest),
            Some("list") => parse_list(rest),
            Some("guest") => parse_guest(rest),
            Some("snapshot") => parse_snapshot(rest),
            Some("uffd-handler") => parse_page_server(rest),
            Some("help") => Ok(Command::Help(USAGE)),
            _ => parse_run(args),
        }
    }

    /// The command whose `--help` says more about these arguments.
    pub fn help_for(args: &[OsString]) -> &'static str {
        match args.first().and_then(|first| first.to_str()) {
            Some("bench") => "vmm bench --help",
            Some("ctl") => "vmm ctl --help",
            Some("demo") => "vmm demo --help",
            Some("snapshot") => "vmm snapshot --help",
            Some("uffd-handler") => "vmm uffd-handler --help",
            _ => "vmm --help",
        }
    }
}

/// The VM's name unless it is given another.
const DEFAULT_ID: &str = "anonymous-instance";
const LEVELS: &str = "off, error, warn, info, debug or trace";
const MICROSECONDS: &str = "a number of microseconds";
const OWN_FILTERS: &str = "filters are part of this program; --no-seccomp does without";
const NO_METADATA: &str = "there is no metadata service; the guest's agent can be told what it needs";

fn parse_run(args: Vec<OsString>) -> Result<Command, UsageError> {
    use lexopt::prelude::*;
    let mut options = RunOptions {
        id: DEFAULT_ID.into(),
        api_sock: None,
        config: None,
        restore: None,
        shell: None,
        console: None,
        no_api: false,
        max_body: None,
        log: Settings::new(Level::Warn, DEFAULT_ID),
        metrics_path: None,
        boot_timer: false,
        strict: false,
        process_start: ProcessStart::default(),
        reset_is_done: false,
        end_with_parent: false,
        confinement: Confinement::default(),
    };
    let (mut level, mut trace_phases) = (None, false);
    let (mut snapshot, mut uffd, mut copy, mut on_handler_loss, mut vsock) = (None, None, None, None, None);
    let (mut drives, mut taps, mut allow_mismatch) = (Vec::new(), Vec::new(), Vec::new());
    let (mut paused, mut same_generation, mut max_private_mib, mut no_replay) = (false, false, None, false);
    let mut parser = lexopt::Parser::from_args(args);
    while let Some(arg) = parser.next()? {
        match arg {
            Long(name) if Confinement::knows(name) => {
                let name = name.to_owned();
                options.confinement.take(&name, &mut parser)?;
            }
            Long("config") => options.config = Some(parser.value()?.into()),
            Long("config-file") => {
                options.config = Some(parser.value()?.into());
                options.reset_is_done = true;
            }
            Long("shell") => options.shell = Some(parser.value()?.into()),
            Long("restore") => snapshot = Some(PathBuf::from(parser.value()?)),
            Long("uffd") => uffd = Some(PathBuf::from(parser.value()?)),
            Long("uffd-mode") => match parser.value()?.string()?.as_str() {
                "shared" => copy = Some(false),
                "copy" => copy = Some(true),
                other => {
                    return Err(lexopt::Error::from(format!("--uffd-mode {other}: must be `shared` or `copy`")).into());
                }
            },
            Long("on-handler-loss") => on_handler_loss = Some(handler_loss(&parser.value()?.string()?)?),
            Long("vsock") => vsock = Some(PathBuf::from(parser.value()?)),
            Long("drive") => drives.push(drive(parser.value()?)?),
            Long("tap") => taps.push(tap(&parser.value()?.string()?)?),
            Long("allow-mismatch") => allow_mismatch.push(allowed_mismatch(&parser.value()?.string()?)?),
            Long("paused") => paused = true,
            Long("same-generation") => same_generation = true,
            Long("no-replay") => no_replay = true,
            Long("max-private-mib") => {
                max_private_mib = Some(value(&mut parser, "--max-private-mib", "a number of MiB")?);
            }
            Long("api-sock") => options.api_sock = Some(parser.value()?.into()),
            Long("console") => options.console = Some(console(parser.value()?)),
            Long("no-api") => options.no_api = true,
            Long("http-api-max-payload-size") => {
                options.max_body = Some(value(&mut parser, "--http-api-max-payload-size", "a number of bytes")?);
            }
            Long("id") => {
                options.id = parser.value()?.string()?;
                check_id("--id", &options.id).map_err(|e| lexopt::Error::from(e.to_string()))?;
            }
            Long("end-with-parent") => options.end_with_parent = true,
            Long("log-level") => level = Some(value(&mut parser, "--log-level", LEVELS)?),
            Long("level") => level = Some(value(&mut parser, "--level", LEVELS)?),
            Long("log-file" | "log-path") => options.log.path = Some(parser.value()?.into()),
            Long("log-format") => options.log.format = value(&mut parser, "--log-format", "human or json")?,
            Long("show-level") => options.log.show_level = true,
            Long("show-log-origin") => options.log.show_origin = true,
            Long("module") => options.log.module = Some(parser.value()?.string()?),
            Long("metrics-path") => options.metrics_path = Some(parser.value()?.into()),
            Long("strict") => options.strict = true,
            Long("boot-timer") => options.boot_timer = true,
            Long("trace-phases") => trace_phases = true,
            Long("start-time-us") => {
                options.process_start.start_time_us = Some(value(&mut parser, "--start-time-us", MICROSECONDS)?);
            }
            Long("start-time-cpu-us") => {
                options.process_start.start_time_cpu_us =
                    Some(value(&mut parser, "--start-time-cpu-us", MICROSECONDS)?);
            }
            Long("parent-cpu-time-us") => {
                options.process_start.parent_cpu_time_us =
                    Some(value(&mut parser, "--parent-cpu-time-us", MICROSECONDS)?);
            }
            Long("seccomp-filter") => return Err(UsageError::NotOffered("--seccomp-filter", OWN_FILTERS)),
            Long("metadata") => return Err(UsageError::NotOffered("--metadata", NO_METADATA)),
            Long("mmds-size-limit") => return Err(UsageError::NotOffered("--mmds-size-limit", NO_METADATA)),
            Long("enable-pci") => {
                return Err(UsageError::NotOffered("--enable-pci", "devices are virtio-mmio; leave it out"));
            }
            Long("snapshot-version") => return Ok(Command::SnapshotVersion),
            Long("describe-snapshot") => return Ok(Command::DescribeSnapshot(parser.value()?.into())),
            Long("help") | Short('h') => return Ok(Command::Help(USAGE)),
            Long("version") | Short('V') => return Ok(Command::Version),
            other => return Err(other.unexpected().into()),
        }
    }
    options.confinement.check()?;
    options.log.level = level.unwrap_or(if options.boot_timer || trace_phases { Level::Info } else { Level::Warn });
    options.log.id = options.id.clone();
    let only_with_restore = [
        ("--uffd", uffd.is_some()),
        ("--vsock", vsock.is_some()),
        ("--drive", !drives.is_empty()),
        ("--tap", !taps.is_empty()),
        ("--allow-mismatch", !allow_mismatch.is_empty()),
        ("--paused", paused),
        ("--same-generation", same_generation),
        ("--no-replay", no_replay),
        ("--max-private-mib", max_private_mib.is_some()),
    ];
    if options.shell.is_some() {
        if options.config.is_some() {
            return Err(UsageError::Conflict("--config", "--shell"));
        }
        if snapshot.is_some() {
            return Err(UsageError::Conflict("--restore", "--shell"));
        }
        if options.api_sock.is_none() || options.no_api {
            return Err(UsageError::Needs("--shell", "--api-sock"));
        }
    }
    if copy.is_some() && uffd.is_none() {
        return Err(UsageError::Needs("--uffd-mode", "--uffd"));
    }
    if on_handler_loss.is_some() && uffd.is_none() {
        return Err(UsageError::Needs("--on-handler-loss", "--uffd"));
    }
    match (snapshot, &options.config) {
        (Some(_), Some(_)) => return Err(UsageError::Conflict("--config", "--restore")),
        (Some(snapshot), None) => {
            options.restore = Some(LoadOptions {
                snapshot,
                uffd,
                copy: copy == Some(true),
                on_handler_loss,
                drives,
                vsock,
                taps,
                paused,
                same_generation,
                max_private_mib,
                no_replay,
                allow_mismatch,
            });
        }
        (None, _) => {
            if let Some((option, _)) = only_with_restore.into_iter().find(|(_, given)| *given) {
                return Err(UsageError::Needs(option, "--restore"));
            }
        }
    }
    if options.strict && options.config.is_none() {
        return Err(UsageError::Needs("--strict", "--config or --config-file"));
    }
    if options.no_api && options.config.is_none() {
        return Err(UsageError::Needs("--no-api", "--config or --config-file"));
    }
    // Whoever starts a VM over the API knows Firecracker's exit codes.
    options.reset_is_done |= options.config.is_none() && options.restore.is_none();
    if options.config.is_none() && options.restore.is_none() && options.api_sock.is_none() {
        return Err(UsageError::Missing("one of --config, --restore and --api-sock must be given"));
    }
    Ok(Command::Run(Box::new(options)))
}

/// Where `--console` says that a console leads.
fn console(place: OsString) -> Serial {
    match place.to_str() {
        Some("stdio") => Serial::default(),
        Some("pty") => Serial { pty: true, ..Serial::default() },
        _ => Serial { serial_out_path: Some(place.into()), ..Serial::default() },
    }
}

/// The value of `--on-handler-loss`, which is that of the API's field.
fn handler_loss(text: &str) -> Result<OnHandlerLoss, lexopt::Error> {
    serde_json::from_value(text.into()).map_err(|_| {
        let wanted = "must be `failover`, `reattach`, `pause` or `kill`";
        lexopt::Error::from(format!("--on-handler-loss {text}: {wanted}"))
    })
}

/// The value of `--allow-mismatch`, which is one of those in the API's field.
fn allowed_mismatch(text: &str) -> Result<AllowedMismatch, lexopt::Error> {
    serde_json::from_value(text.into()).map_err(|_| {
        let wanted = "must be `vendor`, `cpu_features`, `xsave` or `tsc_khz`; nothing else can be allowed to differ";
        lexopt::Error::from(format!("--allow-mismatch {text}: {wanted}"))
    })
}

/// What `--drive ID=PATH` says.
fn drive(value: OsString) -> Result<DriveOverride, UsageError> {
    let bytes = value.as_bytes();
    let parts = bytes.iter().position(|b| *b == b'=').map(|at| (&bytes[..at], &bytes[at + 1..]));
    match parts.map(|(id, path)| (std::str::from_utf8(id), path)) {
        Some((Ok(id), path)) if !id.is_empty() && !path.is_empty() => {
            Ok(DriveOverride { drive_id: id.to_owned(), path_on_host: OsStr::from_bytes(path).into() })
        }
        _ => Err(lexopt::Error::from(format!("--drive {}: must be ID=PATH", value.to_string_lossy())).into()),
    }
}

/// The value of `--tap`.
fn tap(text: &str) -> Result<NetworkOverride, lexopt::Error> {
    let wrong = |why: String| lexopt::Error::from(format!("--tap {text}: {why}"));
    let (iface_id, rest) = text.split_once('=').ok_or_else(|| wrong("must be IFACE=DEV or IFACE=DEV,MAC".into()))?;
    let (device, mac) = rest.split_once(',').map_or((rest, None), |(device, mac)| (device, Some(mac)));
    let guest_mac = mac.map(str::parse).transpose().map_err(|e: MacError| wrong(e.to_string()))?;
    Ok(NetworkOverride { iface_id: iface_id.to_owned(), host_dev_name: device.to_owned(), guest_mac })
}

/// The value of an option, or an error that names both.
pub(super) fn value<T: std::str::FromStr>(
    parser: &mut lexopt::Parser,
    option: &str,
    wanted: &str,
) -> Result<T, UsageError> {
    let text = parser.value()?;
    let parsed = text.to_str().and_then(|text| text.parse().ok());
    let wrong = || lexopt::Error::from(format!("{option} {}: must be {wanted}", text.to_string_lossy()));
    Ok(parsed.ok_or_else(wrong)?)
}

fn parse_demo(args: Vec<OsString>) -> Result<Command, UsageError> {
    use lexopt::prelude::*;
    let mut options = DemoOptions::default();
    let mut parser = lexopt::Parser::from_args(args);
    while let Some(arg) = parser.next()? {
        match arg {
            Long("clones") => options.clones = value(&mut parser, "--clones", "a number")?,
            Long("memory") => options.memory_mib = value(&mut parser, "--memory", "a number of MiB")?,
            Long("working-set") => options.working_set_mib = value(&mut parser, "--working-set", "a number of MiB")?,
            Long("vcpus") => options.vcpus = value(&mut parser, "--vcpus", "a number")?,
            Long("dir") => options.dir = Some(parser.value()?.into()),
            Long("no-reseed") => options.reseed = false,
            Long("json") => options.json = true,
            Long("help") | Short('h') => return Ok(Command::Help(crate::demo::USAGE)),
            other => return Err(other.unexpected().into()),
        }
    }
    options.check().map_err(|e| lexopt::Error::from(e.to_string()))?;
    Ok(Command::Demo(options))
}

fn parse_doctor(args: Vec<OsString>) -> Result<Command, UsageError> {
    use lexopt::prelude::*;
    let mut json = false;
    let mut parser = lexopt::Parser::from_args(args);
    while let Some(arg) = parser.next()? {
        match arg {
            Long("json") => json = true,
            Long("help") | Short('h') => return Ok(Command::Help(USAGE)),
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(Command::Doctor { json })
}

fn parse_list(args: Vec<OsString>) -> Result<Command, UsageError> {
    use lexopt::prelude::*;
    let (mut configs, mut json) = (Vec::new(), false);
    let mut parser = lexopt::Parser::from_args(args);
    while let Some(arg) = parser.next()? {
        match arg {
            Long("json") => json = true,
            Long("help") | Short('h') => return Ok(Command::Help(USAGE)),
            Value(config) => configs.push(PathBuf::from(config)),
            other => return Err(other.unexpected().into()),
        }
    }
    match configs.is_empty() {
        true => Err(UsageError::Missing("`list` takes configuration files")),
        false => Ok(Command::List { configs, json }),
    }
}

fn parse_guest(args: Vec<OsString>) -> Result<Command, UsageError> {
    match verb_and_path(args)? {
        Some(Parsed { verb, path: Some(path), json: false }) if verb == "export" => Ok(Command::GuestExport(path)),
        Some(_) => Err(UsageError::Missing("`guest` takes `export FILE`")),
        None => Ok(Command::Help(USAGE)),
    }
}

fn parse_snapshot(args: Vec<OsString>) -> Result<Command, UsageError> {
    if args.first().and_then(|word| word.to_str()).is_some_and(snapshots::is_verb) {
        return Ok(snapshots::parse(args)?.map_or(Command::Help(snapshots::USAGE), Command::SnapshotTool));
    }
    match verb_and_path(args)? {
        Some(Parsed { verb, path: Some(path), json }) if verb == "verify" => Ok(Command::Verify { path, json }),
        Some(Parsed { verb, path: Some(path), json }) if verb == "check" => Ok(Command::Check { path, json }),
        Some(_) => Err(UsageError::Missing(
            "`snapshot` takes `verify SNAPSHOT [--json]`, `check SNAPSHOT [--json]`, `pack`, `unpack`, `flatten`, `diff`, `show` or `rm`",
        )),
        None => Ok(Command::Help(snapshots::USAGE)),
    }
}

/// The arguments of a subcommand that takes a verb and a path.
struct Parsed {
    verb: OsString,
    path: Option<PathBuf>,
    json: bool,
}

/// Parses them; `None` if help is asked for.
fn verb_and_path(args: Vec<OsString>) -> Result<Option<Parsed>, UsageError> {
    use lexopt::prelude::*;
    let (mut verb, mut path, mut json) = (None, None, false);
    let mut parser = lexopt::Parser::from_args(args);
    while let Some(arg) = parser.next()? {
        match arg {
            Long("json") => json = true,
            Long("help") | Short('h') => return Ok(None),
            Value(value) if verb.is_none() => verb = Some(value),
            Value(value) if path.is_none() => path = Some(PathBuf::from(value)),
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(Some(Parsed { verb: verb.unwrap_or_default(), path, json }))
}

fn parse_page_server(args: Vec<OsString>) -> Result<Command, UsageError> {
    Ok(match uffd_handler::Command::parse(args)? {
        uffd_handler::Command::Serve(options) => Command::PageServer(Box::new(options)),
        uffd_handler::Command::Tool(tool) => Command::PageServerTool(tool),
        uffd_handler::Command::Help => Command::Help(uffd_handler::USAGE),
        uffd_handler::Command::Version => Command::Version,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Command, UsageError> {
        Command::parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn the_restore_command_is_what_it_has_always_been() {
        let Ok(Command::Run(options)) = parse("--restore snap.json --uffd /run/uffd.sock") else { panic!() };
        let request = options.restore.unwrap().request();
        assert_eq!(request.snapshot_path, PathBuf::from("snap.json"));
        let backend = request.mem_backend.unwrap();
        assert_eq!((backend.backend_type, backend.backend_path), (MemBackendType::UffdShared, "/run/uffd.sock".into()));
        assert!(request.resume_vm && request.new_generation && request.drive_overrides.is_empty());
        for (mode, expected) in [("shared", MemBackendType::UffdShared), ("copy", MemBackendType::Uffd)] {
            let Ok(Command::Run(options)) = parse(&format!("--restore s --uffd u --uffd-mode {mode}")) else {
                panic!()
            };
            assert_eq!(options.restore.unwrap().request().mem_backend.unwrap().backend_type, expected);
        }
        let Ok(Command::Run(options)) = parse("--restore s --drive a=/b=c --drive d=e") else { panic!() };
        let drives = options.restore.unwrap().request().drive_overrides;
        let drive = |id: &str, path: &str| DriveOverride { drive_id: id.into(), path_on_host: path.into() };
        assert_eq!(drives, [drive("a", "/b=c"), drive("d", "e")]);
        let line = "--restore s --allow-mismatch vendor --allow-mismatch cpu_features";
        let Ok(Command::Run(options)) = parse(line) else { panic!() };
        let allowed = options.restore.unwrap().request().allow_mismatch;
        assert_eq!(allowed, [AllowedMismatch::Vendor, AllowedMismatch::CpuFeatures]);
        assert_eq!(parse("snapshot check s --json").unwrap(), Command::Check { path: "s".into(), json: true });
    }

    #[test]
    fn the_flags_of_existing_clients_are_taken() {
        let line = "--api-sock a --id vm-1 --level Warning --log-path l --show-level --show-log-origin --module vmm::api \
                    --metrics-path m --no-seccomp --boot-timer --http-api-max-payload-size 1000 --start-time-us 1 \
                    --start-time-cpu-us 2 --parent-cpu-time-us 3";
        let Ok(Command::Run(options)) = parse(line) else { panic!() };
        let log = Settings {
            path: Some("l".into()),
            show_origin: true,
            module: Some("vmm::api".into()),
            ..Settings::new(Level::Warn, "vm-1")
        };
        assert_eq!((options.log, options.metrics_path), (log, Some("m".into())));
        assert!(options.boot_timer && options.reset_is_done && options.max_body == Some(1000));
        assert_eq!(options.confinement, Confinement { seccomp: false, ..Confinement::default() });
        let start = ProcessStart { start_time_us: Some(1), start_time_cpu_us: Some(2), parent_cpu_time_us: Some(3) };
        assert_eq!(options.process_start, start);
        let Ok(Command::Run(options)) = parse("--config-file c --no-api --api-sock a --boot-timer") else { panic!() };
        assert!(options.no_api && options.reset_is_done);
        assert_eq!(options.log.level, Level::Info, "it is there to be seen");
        for ours in ["--config c", "--restore s --api-sock a"] {
            let Ok(Command::Run(options)) = parse(ours) else { panic!() };
            assert!(!options.reset_is_done, "{ours}");
        }
        assert_eq!(parse("--snapshot-version").unwrap(), Command::SnapshotVersion);
        assert_eq!(parse("--describe-snapshot s").unwrap(), Command::DescribeSnapshot("s".into()));
    }

    #[test]
    fn taps_are_named_interface_by_interface() {
        let line = "--restore s --tap eth0=tap1 --tap eth1=tap2,06:00:00:00:00:01";
        let Ok(Command::Run(options)) = parse(line) else { panic!() };
        let tap = |id: &str, tap: &str, guest_mac: Option<&str>| NetworkOverride {
            iface_id: id.into(),
            host_dev_name: tap.into(),
            guest_mac: guest_mac.map(|mac| mac.parse().unwrap()),
        };
        let expected = [tap("eth0", "tap1", None), tap("eth1", "tap2", Some("06:00:00:00:00:01"))];
        assert_eq!(options.restore.unwrap().request().network_overrides, expected);
    }

    #[test]
    fn options_that_do_not_belong_together_are_refused() {
        for line in [
            "",
            "--config a --restore b",
            "--config a --uffd b",
            "--api-sock a --paused",
            "--config a --max-private-mib 5",
            "--restore a --max-private-mib much",
            "--config a --drive b=c",
            "--restore a --drive b",
            "--restore a --drive =b",
            "--restore a --drive b=",
            "--restore a --uffd b --uffd-mode other",
            "--restore a --uffd b --on-handler-loss other",
            "--restore a --on-handler-loss kill",
            "--restore a --uffd-mode copy",
            "--nonsense",
            "--api-sock a --no-api",
            "--api-sock a --strict",
            "--restore a --strict",
            "--api-sock a --id a/b",
            "--api-sock a --level loud",
            "--api-sock a --log-format xml",
            "--api-sock a --http-api-max-payload-size -1",
            "--api-sock a --enable-pci",
            "--api-sock a --metadata m",
            "--api-sock a --mmds-size-limit 5",
            "--api-sock a --seccomp-filter f",
            "--api-sock a --start-time-us soon",
            "--api-sock a --uid 5",
            "--api-sock a --isolate everything",
            "--describe-snapshot",
            "--config a --tap eth0=tap1",
            "--restore a --tap eth0",
            "--restore a --tap eth0=tap1,",
            "--restore a --tap eth0=tap1,01:00:00:00:00:00",
            "list",
            "list --unknown c",
            "guest",
            "guest export",
            "guest export --json f",
            "guest export --unknown",
            "snapshot verify",
            "snapshot check",
            "snapshot check a b",
            "--config a --allow-mismatch vendor",
            "--restore a --allow-mismatch arch",
            "--restore a --allow-mismatch",
            "bench",
            "bench disks",
            "bench api --calls 0",
            "bench api --starts 1001",
            "bench reset --n 0",
            "bench faults --pages 0",
            "bench faults --n 101",
            "bench faults --calls 5",
            "bench faults api",
            "bench snapshot --n 0",
            "bench snapshot --n 101",
            "bench snapshot --resident-mib 15",
            "bench snapshot --resident-mib 2048",
            "bench snapshot --pages 5",
            "bench snapshot faults",
            "demo --clones 0",
            "demo --memory 1",
            "demo --memory 64 --working-set 64",
            "demo --working-set 18446744073709551615",
            "uffd-handler --socket s",
            "ctl",
            "ctl snapshot",
            "ctl --config a",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
