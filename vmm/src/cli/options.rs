//! What a command line asks for. Pure.

use super::ctl::{self, Ctl};
use crate::demo::DemoOptions;
use crate::logging::Level;
use api_spec::devices::Serial;
use api_spec::mac::MacError;
use api_spec::snapshot::{DriveOverride, MemBackend, MemBackendType, NetworkOverride, SnapshotLoad, VsockOverride};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// What `--help` prints.
pub const USAGE: &str = "\
Boots, snapshots and restores one microVM.

Usage: vmm --config FILE [options]            boot what the file describes
       vmm --restore SNAPSHOT [options]       restore a snapshot (its directory or its snap.json)
       vmm --api-sock PATH [options]          wait for instructions over HTTP
       vmm ctl COMMAND [options]              command a vmm over its API; see `vmm ctl --help`
       vmm demo [options]                     boot, snapshot, and restore clones; see `vmm demo --help`
       vmm doctor [--json]                    say what this host can do, with remedies
       vmm guest export FILE                  write the embedded guest's kernel, for other VMMs to boot
       vmm snapshot verify SNAPSHOT [--json]  check every byte of a snapshot
       vmm uffd-handler [options]             run the page server; see `vmm uffd-handler --help`

Options:
  --config FILE          the machine, as JSON (`--config-file` means the same)
  --restore SNAPSHOT     the snapshot to restore
  --uffd PATH            with --restore: take memory from the page server that listens there
  --uffd-mode MODE       with --uffd: `shared` (default); `copy` is not offered yet
  --vsock PATH           with --restore: the Unix socket of the vsock device, instead of the snapshot's own
  --drive ID=PATH        with --restore: the image of the disk ID is at PATH; once for each disk
  --tap IFACE=DEV[,MAC]  with --restore: the tap device, and the MAC address, of a network interface, instead of the
                         snapshot's own; once for each interface
  --paused               with --restore: leave the vCPUs standing still
  --max-private-mib N    with --restore: pause the guest when it has N MiB of private memory
  --same-generation      with --restore: keep the generation id, so that the guest takes itself for the original (tests)
  --console PLACE        where the guest's COM1 leads: `stdio` (default), `pty`, or a file that output is appended to
  --api-sock PATH        Unix socket of the REST API; created, mode 0600, removed at the end
  --id NAME              the VM's name in the API (default `anonymous-instance`)
  --end-with-parent      end, as on SIGTERM, when the process that started this one ends
  --log-level LEVEL      off, error, warn, info, debug or trace (default `warn`); the log goes to standard error
  --help (-h), --version (-V)

Ends with 0 when the guest has powered its machine off, or on SIGTERM, SIGINT or SIGHUP, 1 on failure, 2 on bad usage, 3
when the guest's kernel has panicked and said so (pvpanic), 4 when the guest has reset its machine (a reboot), and 77 if
this host cannot run microVMs.
";

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
    /// Where the guest's console leads.
    pub console: Option<Serial>,
    /// What to log.
    pub log_level: Level,
    /// End when the parent process ends.
    pub end_with_parent: bool,
}

/// What to restore.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// The snapshot.
    pub snapshot: PathBuf,
    /// The page server's socket.
    pub uffd: Option<PathBuf>,
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
}

impl LoadOptions {
    /// The request that means the same over the API.
    pub fn request(&self) -> SnapshotLoad {
        let uffd = |path: &PathBuf| MemBackend { backend_path: path.clone(), backend_type: MemBackendType::UffdShared };
        SnapshotLoad {
            mem_backend: self.uffd.as_ref().map(uffd),
            resume_vm: !self.paused,
            drive_overrides: self.drives.clone(),
            vsock_override: self.vsock.as_ref().map(|path| VsockOverride { uds_path: path.clone() }),
            network_overrides: self.taps.clone(),
            new_generation: !self.same_generation,
            max_private_mib: self.max_private_mib,
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
    Run(RunOptions),
    /// Command a vmm over its API.
    Ctl(Box<Ctl>),
    /// Run the demonstration.
    Demo(DemoOptions),
    /// Examine the host.
    Doctor {
        /// Print JSON.
        json: bool,
    },
    /// Write the embedded guest to a file.
    GuestExport(PathBuf),
    /// Run the page server.
    PageServer(uffd_handler::Options),
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
    /// A mode that this program does not have.
    #[error("--uffd-mode copy is not offered yet: use a page server of the shared protocol (`uffd-handler`)")]
    CopyMode,
}

impl Command {
    /// Parses the arguments that follow the program's name.
    pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Self, UsageError> {
        let args: Vec<OsString> = args.into_iter().collect();
        let rest = args.get(1..).unwrap_or_default().to_vec();
        match args.first().and_then(|first| first.to_str()) {
            Some("ctl") => Ok(Command::Ctl(Box::new(ctl::parse(rest)?))),
            Some("demo") => parse_demo(rest),
            Some("doctor") => parse_doctor(rest),
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
            Some("ctl") => "vmm ctl --help",
            Some("demo") => "vmm demo --help",
            Some("uffd-handler") => "vmm uffd-handler --help",
            _ => "vmm --help",
        }
    }
}

fn parse_run(args: Vec<OsString>) -> Result<Command, UsageError> {
    use lexopt::prelude::*;
    let mut options = RunOptions {
        id: "anonymous-instance".into(),
        api_sock: None,
        config: None,
        restore: None,
        console: None,
        log_level: Level::Warn,
        end_with_parent: false,
    };
    let (mut snapshot, mut uffd, mut vsock) = (None, None, None);
    let (mut drives, mut taps) = (Vec::new(), Vec::new());
    let (mut paused, mut same_generation, mut max_private_mib) = (false, false, None);
    let mut parser = lexopt::Parser::from_args(args);
    while let Some(arg) = parser.next()? {
        match arg {
            Long("config" | "config-file") => options.config = Some(parser.value()?.into()),
            Long("restore") => snapshot = Some(PathBuf::from(parser.value()?)),
            Long("uffd") => uffd = Some(PathBuf::from(parser.value()?)),
            Long("uffd-mode") => match parser.value()?.string()?.as_str() {
                "shared" => {}
                "copy" => return Err(UsageError::CopyMode),
                other => {
                    return Err(lexopt::Error::from(format!("--uffd-mode {other}: must be `shared` or `copy`")).into());
                }
            },
            Long("vsock") => vsock = Some(PathBuf::from(parser.value()?)),
            Long("drive") => drives.push(drive(parser.value()?)?),
            Long("tap") => taps.push(tap(&parser.value()?.string()?)?),
            Long("paused") => paused = true,
            Long("same-generation") => same_generation = true,
            Long("max-private-mib") => {
                max_private_mib = Some(value(&mut parser, "--max-private-mib", "a number of MiB")?);
            }
            Long("api-sock") => options.api_sock = Some(parser.value()?.into()),
            Long("console") => options.console = Some(console(parser.value()?)),
            Long("id") => options.id = parser.value()?.string()?,
            Long("end-with-parent") => options.end_with_parent = true,
            Long("log-level") => {
                options.log_level = value(&mut parser, "--log-level", "off, error, warn, info, debug or trace")?;
            }
            Long("help") | Short('h') => return Ok(Command::Help(USAGE)),
            Long("version") | Short('V') => return Ok(Command::Version),
            other => return Err(other.unexpected().into()),
        }
    }
    let only_with_restore = [
        ("--uffd", uffd.is_some()),
        ("--vsock", vsock.is_some()),
        ("--drive", !drives.is_empty()),
        ("--tap", !taps.is_empty()),
        ("--paused", paused),
        ("--same-generation", same_generation),
        ("--max-private-mib", max_private_mib.is_some()),
    ];
    match (snapshot, &options.config) {
        (Some(_), Some(_)) => return Err(UsageError::Conflict("--config", "--restore")),
        (Some(snapshot), None) => {
            options.restore =
                Some(LoadOptions { snapshot, uffd, drives, vsock, taps, paused, same_generation, max_private_mib });
        }
        (None, _) => {
            if let Some((option, _)) = only_with_restore.into_iter().find(|(_, given)| *given) {
                return Err(UsageError::Needs(option, "--restore"));
            }
        }
    }
    if options.config.is_none() && options.restore.is_none() && options.api_sock.is_none() {
        return Err(UsageError::Missing("one of --config, --restore and --api-sock must be given"));
    }
    Ok(Command::Run(options))
}

/// Where `--console` says that a console leads.
fn console(place: OsString) -> Serial {
    match place.to_str() {
        Some("stdio") => Serial::default(),
        Some("pty") => Serial { pty: true, ..Serial::default() },
        _ => Serial { serial_out_path: Some(place.into()), ..Serial::default() },
    }
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
fn value<T: std::str::FromStr>(parser: &mut lexopt::Parser, option: &str, wanted: &str) -> Result<T, UsageError> {
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

fn parse_guest(args: Vec<OsString>) -> Result<Command, UsageError> {
    match verb_and_path(args)? {
        Some(Parsed { verb, path: Some(path), json: false }) if verb == "export" => Ok(Command::GuestExport(path)),
        Some(_) => Err(UsageError::Missing("`guest` takes `export FILE`")),
        None => Ok(Command::Help(USAGE)),
    }
}

fn parse_snapshot(args: Vec<OsString>) -> Result<Command, UsageError> {
    match verb_and_path(args)? {
        Some(Parsed { verb, path: Some(path), json }) if verb == "verify" => Ok(Command::Verify { path, json }),
        Some(_) => Err(UsageError::Missing("`snapshot` takes `verify SNAPSHOT [--json]`")),
        None => Ok(Command::Help(USAGE)),
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
        uffd_handler::Command::Serve(options) => Command::PageServer(options),
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
        let Ok(Command::Run(options)) = parse("--restore s --drive a=/b=c --drive d=e") else { panic!() };
        let drives = options.restore.unwrap().request().drive_overrides;
        let drive = |id: &str, path: &str| DriveOverride { drive_id: id.into(), path_on_host: path.into() };
        assert_eq!(drives, [drive("a", "/b=c"), drive("d", "e")]);
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
            "--restore a --uffd b --uffd-mode copy",
            "--nonsense",
            "--config a --tap eth0=tap1",
            "--restore a --tap eth0",
            "--restore a --tap eth0=tap1,",
            "--restore a --tap eth0=tap1,01:00:00:00:00:00",
            "guest",
            "guest export",
            "guest export --json f",
            "guest export --unknown",
            "snapshot verify",
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
