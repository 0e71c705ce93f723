//! VMs: how a test boots, restores, snapshots and commands them.

use crate::agent::Agent;
use crate::linux::{self, Linux};
use crate::page_server::PageServer;
use crate::place::Place;
use crate::process::{Finished, Process};
use crate::{PATIENCE, binaries, until};
use api_spec::agent::{Request, Response};
use api_spec::client::rest::RestError;
use api_spec::client::{AgentClient, RestClient, VmClient};
use api_spec::devices::{Balloon, Drive, Entropy, NetworkInterface};
use api_spec::mac::MacAddr;
use api_spec::saved::SavedState;
use api_spec::snapshot::{
    DriveOverride, MemBackend, MemBackendType, NetworkOverride, OnHandlerLoss, SnapshotCreate, SnapshotLoad,
    SnapshotState, SnapshotStatus, SnapshotType, VsockOverride,
};
use api_spec::stats::{PageServerState, PageServerStats};
use api_spec::vm::{BootSource, InstanceInfo, InstanceState, MachineConfig, VmConfig, Vsock};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A running vmm and its guest.
#[derive(Debug)]
pub struct Vm {
    /// The process.
    pub process: Process,
    /// Its name; its files are named after it.
    pub name: String,
    /// Unix socket of its vsock device.
    pub vsock: PathBuf,
    /// Unix socket of its API.
    pub api: PathBuf,
}

/// How to boot a guest.
#[derive(Clone, Debug)]
pub struct Boot<'a> {
    place: &'a Place,
    config: VmConfig,
    console: Option<String>,
    strict: bool,
}

impl<'a> Boot<'a> {
    /// The embedded guest with 1 vCPU and 32 MiB.
    pub fn new(place: &'a Place) -> Self {
        let boot_source = Some(BootSource { embedded_guest: true, ..Default::default() });
        let machine_config = MachineConfig { mem_size_mib: 32, ..Default::default() };
        Boot {
            place,
            config: VmConfig { boot_source, machine_config, ..Default::default() },
            console: None,
            strict: false,
        }
    }

    /// With so many vCPUs.
    pub fn vcpus(mut self, count: u8) -> Self {
        self.config.machine_config.vcpu_count = count;
        self
    }

    /// With so much memory.
    pub fn memory_mib(mut self, size: u64) -> Self {
        self.config.machine_config.mem_size_mib = size;
        self
    }

    /// With at most so much private memory.
    pub fn max_private_mib(mut self, limit: u64) -> Self {
        self.config.machine_config.max_private_mib = Some(limit);
        self
    }

    /// With a balloon.
    pub fn balloon(mut self, balloon: Balloon) -> Self {
        self.config.balloon = Some(balloon);
        self
    }

    /// With a kernel from a file, and a command line for it, instead of the embedded guest.
    pub fn kernel(mut self, path: &Path, command_line: &str) -> Self {
        let (kernel_image_path, boot_args) = (Some(path.to_owned()), Some(command_line.to_owned()));
        self.config.boot_source = Some(BootSource { kernel_image_path, boot_args, ..Default::default() });
        self
    }

    /// With a Linux kernel and its initial RAM disk, instead of the embedded guest, and words for its command line.
    pub fn linux(mut self, linux: &Linux, words: &str) -> Self {
        let (kernel_image_path, initrd_path) = (Some(linux.kernel.clone()), Some(linux.initrd.clone()));
        let boot_args = Some(format!("{} {words}", linux::COMMAND_LINE));
        self.config.boot_source = Some(BootSource { kernel_image_path, initrd_path, boot_args, ..Default::default() });
        self.memory_mib(linux::MEMORY_MIB)
    }

    /// With its console elsewhere than at standard output: the value of `--console`.
    pub fn console(mut self, place: &str) -> Self {
        self.console = Some(place.to_owned());
        self
    }

    /// With a place where it is saved, by default or not when it is stopped.
    pub fn saved_state(mut self, path: &Path, save_on_stop: bool) -> Self {
        self.config.saved_state = Some(SavedState { path: path.to_owned(), save_on_stop, strict: false });
        self
    }

    /// With `--strict`.
    pub fn strict(mut self) -> Self {
        self.strict = true;
        self
    }

    /// With whatever else of a configuration.
    pub fn configured(mut self, change: impl FnOnce(&mut VmConfig)) -> Self {
        change(&mut self.config);
        self
    }

    /// With a disk more.
    pub fn drive(mut self, drive: Drive) -> Self {
        self.config.drives.push(drive);
        self
    }

    /// With a network interface on this tap device.
    pub fn network(mut self, iface_id: &str, device: &str, mac: Option<MacAddr>) -> Self {
        self.config.network_interfaces.push(NetworkInterface {
            iface_id: iface_id.to_owned(),
            host_dev_name: device.to_owned(),
            guest_mac: mac,
            rx_rate_limiter: None,
            tx_rate_limiter: None,
            mtu: None,
        });
        self
    }

    /// With a source of entropy.
    pub fn entropy(mut self) -> Self {
        self.config.entropy = Some(Entropy::default());
        self
    }

    /// Starts the vmm, with a configuration file.
    pub fn start(mut self, name: &str) -> Vm {
        let (vsock, api) = sockets(self.place, name);
        self.config.vsock = Some(Vsock { guest_cid: 3, uds_path: vsock.clone(), vsock_id: None });
        let config = self.place.join(format!("{name}.json"));
        let text = serde_json::to_vec_pretty(&self.config).expect("a configuration has a JSON form");
        std::fs::write(&config, text).expect("a file can be made in the test's directory");
        let process = Process::start(self.place, name, binaries::vmm(), |vmm| {
            vmm.arg("--config").arg(&config).arg("--api-sock").arg(&api);
            vmm.args(self.console.iter().flat_map(|place| ["--console", place]))
                .args(self.strict.then_some("--strict"));
        });
        Vm { process, name: name.to_owned(), vsock, api }
    }

    /// Starts the vmm and waits for its guest's agent.
    pub fn ready(self, name: &str) -> (Vm, Agent) {
        let mut vm = self.start(name);
        let agent = vm.agent();
        (vm, agent)
    }
}

/// A balloon that holds so much of its guest's memory, and does nothing else.
pub fn balloon(amount_mib: u64) -> Balloon {
    Balloon {
        amount_mib,
        deflate_on_oom: false,
        stats_polling_interval_s: 0,
        free_page_reporting: false,
        free_page_hinting: false,
    }
}

/// A disk of this name over an image.
pub fn drive(drive_id: &str, path: &Path) -> Drive {
    Drive {
        drive_id: drive_id.to_owned(),
        path_on_host: path.to_owned(),
        is_root_device: false,
        is_read_only: false,
        partuuid: None,
        cache_type: Default::default(),
        io_engine: Default::default(),
        rate_limiter: None,
        overlay: false,
        max_overlay_mib: None,
        socket: None,
    }
}

/// A vmm that waits for instructions.
pub fn waiting(place: &Place, name: &str) -> Vm {
    waiting_with(place, name, |_| {})
}

/// A vmm that waits for instructions, started with what `arguments` adds.
pub fn waiting_with(place: &Place, name: &str, arguments: impl FnOnce(&mut std::process::Command)) -> Vm {
    let (vsock, api) = sockets(place, name);
    let process = Process::start(place, name, binaries::vmm(), |vmm| {
        vmm.arg("--api-sock").arg(&api);
        arguments(vmm);
    });
    Vm { process, name: name.to_owned(), vsock, api }
}

/// A vmm with a shell of so many vCPUs and so much memory, with a vsock device, and whatever else a configuration says.
pub fn shell(place: &Place, name: &str, vcpus: u8, memory_mib: u64, more: Value) -> Vm {
    let mut config = json!({
        "machine-config": { "vcpu_count": vcpus, "mem_size_mib": memory_mib },
        "vsock": { "guest_cid": 3, "uds_path": sockets(place, name).0 },
    });
    let fields = more.as_object().expect("more is an object").clone();
    config.as_object_mut().expect("it is an object").extend(fields);
    let path = place.join(format!("{name}.json"));
    std::fs::write(&path, config.to_string()).expect("a file can be made in the test's directory");
    waiting_with(place, name, |vmm| {
        vmm.arg("--shell").arg(&path);
    })
}

/// How to restore a guest: from its memory file, running, by the command line, unless told otherwise.
#[derive(Clone, Debug)]
pub struct Restore<'a> {
    place: &'a Place,
    snapshot: PathBuf,
    page_server: Option<MemBackend>,
    paused: bool,
    same_generation: bool,
    no_replay: bool,
    max_private_mib: Option<u64>,
    recorded_vsock: Option<PathBuf>,
    drives: Vec<DriveOverride>,
    taps: Vec<NetworkOverride>,
    by_api: bool,
    console: Option<String>,
}

impl<'a> Restore<'a> {
    /// A guest from the snapshot in this directory.
    pub fn new(place: &'a Place, snapshot: &Path) -> Self {
        Restore {
            place,
            snapshot: snapshot.to_owned(),
            page_server: None,
            paused: false,
            same_generation: false,
            no_replay: false,
            max_private_mib: None,
            recorded_vsock: None,
            drives: Vec::new(),
            taps: Vec::new(),
            by_api: false,
            console: None,
        }
    }

    /// Its memory comes from a page server.
    pub fn uffd(self, server: &PageServer) -> Self {
        self.uffd_at(&server.socket)
    }

    /// Its memory comes from the page server at this socket.
    pub fn uffd_at(mut self, socket: &Path) -> Self {
        self.page_server = Some(MemBackend::of(MemBackendType::UffdShared, socket.to_owned()));
        self
    }

    /// Its memory is copied by the page server at this socket.
    pub fn copied_from(mut self, socket: &Path) -> Self {
        self.page_server = Some(MemBackend::of(MemBackendType::Uffd, socket.to_owned()));
        self
    }

    /// What becomes of it if its page server dies or hangs.
    pub fn on_handler_loss(mut self, what: OnHandlerLoss) -> Self {
        self.page_server.as_mut().expect("its memory comes from a page server").on_handler_loss = Some(what);
        self
    }

    /// Nothing is got ready of what earlier clones have used.
    pub fn no_replay(mut self) -> Self {
        self.no_replay = true;
        self
    }

    /// Its vCPUs are left standing still.
    pub fn paused(mut self) -> Self {
        self.paused = true;
        self
    }

    /// It keeps the generation id.
    pub fn same_generation(mut self) -> Self {
        self.same_generation = true;
        self
    }

    /// It may have so much private memory.
    pub fn max_private_mib(mut self, limit: u64) -> Self {
        self.max_private_mib = Some(limit);
        self
    }

    /// Its vsock device is where the snapshot says, at `path`, instead of at a socket of its own.
    pub fn recorded_vsock(mut self, path: &Path) -> Self {
        self.recorded_vsock = Some(path.to_owned());
        self
    }

    /// With its console elsewhere than at standard output: the value of `--console`.
    pub fn console(mut self, place: &str) -> Self {
        self.console = Some(place.to_owned());
        self
    }

    /// The image of this disk is at `path`.
    pub fn drive(mut self, drive_id: &str, path: &Path) -> Self {
        self.drives.push(DriveOverride { drive_id: drive_id.to_owned(), path_on_host: path.to_owned() });
        self
    }

    /// A network interface has another tap device, and another MAC address if one is given.
    pub fn tap(mut self, iface_id: &str, device: &str, mac: Option<MacAddr>) -> Self {
        self.taps.push(NetworkOverride {
            iface_id: iface_id.to_owned(),
            host_dev_name: device.to_owned(),
            guest_mac: mac,
        });
        self
    }

    /// By `PUT /snapshot/load` instead of `--restore`.
    pub fn by_api(mut self) -> Self {
        self.by_api = true;
        self
    }

    /// Starts the vmm and restores the guest.
    pub fn start(self, name: &str) -> Vm {
        let (own_vsock, api) = sockets(self.place, name);
        let vsock = self.recorded_vsock.clone().unwrap_or_else(|| own_vsock.clone());
        if self.by_api { self.load(name, vsock, api) } else { self.command(name, vsock, api) }
    }

    fn command(self, name: &str, vsock: PathBuf, api: PathBuf) -> Vm {
        let process = Process::start(self.place, name, binaries::vmm(), |vmm| {
            vmm.arg("--restore").arg(self.snapshot.join("snap.json")).arg("--api-sock").arg(&api);
            if let Some(MemBackend { backend_path, backend_type, on_handler_loss }) = &self.page_server {
                if let Some(what) = on_handler_loss {
                    let word = serde_json::to_value(what).expect("a policy has a JSON form");
                    vmm.args(["--on-handler-loss", word.as_str().expect("a word")]);
                }
                vmm.arg("--uffd").arg(backend_path);
                vmm.args(
                    (*backend_type == MemBackendType::Uffd).then_some(["--uffd-mode", "copy"]).into_iter().flatten(),
                );
            }
            for DriveOverride { drive_id, path_on_host } in &self.drives {
                vmm.arg("--drive").arg(format!("{drive_id}={}", path_on_host.display()));
            }
            for NetworkOverride { iface_id, host_dev_name, guest_mac } in &self.taps {
                let mac = guest_mac.map(|mac| format!(",{mac}")).unwrap_or_default();
                vmm.arg("--tap").arg(format!("{iface_id}={host_dev_name}{mac}"));
            }
            if self.recorded_vsock.is_none() {
                vmm.arg("--vsock").arg(&vsock);
            }
            vmm.args(self.console.iter().flat_map(|place| ["--console", place]));
            if let Some(limit) = self.max_private_mib {
                vmm.arg("--max-private-mib").arg(limit.to_string());
            }
            vmm.args(self.paused.then_some("--paused")).args(self.same_generation.then_some("--same-generation"));
            vmm.args(self.no_replay.then_some("--no-replay"));
        });
        Vm { process, name: name.to_owned(), vsock, api }
    }

    fn load(self, name: &str, vsock: PathBuf, api: PathBuf) -> Vm {
        let process = Process::start(self.place, name, binaries::vmm(), |vmm| {
            vmm.arg("--api-sock").arg(&api);
        });
        let mut vm = Vm { process, name: name.to_owned(), vsock, api };
        let document = SnapshotLoad {
            mem_backend: self.page_server,
            resume_vm: !self.paused,
            drive_overrides: self.drives,
            vsock_override: self.recorded_vsock.is_none().then(|| VsockOverride { uds_path: vm.vsock.clone() }),
            network_overrides: self.taps,
            new_generation: !self.same_generation,
            max_private_mib: self.max_private_mib,
            replay_working_set: !self.no_replay,
            ..SnapshotLoad::of(self.snapshot)
        };
        vm.client().snapshot_load(&document).unwrap_or_else(|e| panic!("{name}: cannot load the snapshot: {e}"));
        vm
    }

    /// Restores the guest and waits for its agent.
    pub fn ready(self, name: &str) -> (Vm, Agent) {
        let mut vm = self.start(name);
        let agent = vm.agent();
        (vm, agent)
    }
}

fn sockets(place: &Place, name: &str) -> (PathBuf, PathBuf) {
    (place.join(format!("{name}.vsock")), place.join(format!("{name}.api")))
}

impl Vm {
    /// Waits for the agent's first reply; panics at once if the vmm ends instead.
    pub fn agent(&mut self) -> Agent {
        // In slices, so that a process that fails at once is noticed at once.
        const SLICE: Duration = Duration::from_millis(200);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let slice = deadline.min(Instant::now() + SLICE);
            let token = u64::from(self.process.pid());
            match AgentClient::first_reply(&self.vsock, PATIENCE, slice, Request::Ping { token }) {
                Ok((client, answer)) => {
                    assert_eq!(answer, Response::Pong { token }, "{}", self.name);
                    return Agent::new(client);
                }
                Err(e) => {
                    self.process.check_alive();
                    assert!(Instant::now() < deadline, "{}: its agent does not answer: {e}", self.name);
                }
            }
        }
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// A connection to the API, once there is one, for calls of any form.
    pub fn api(&mut self) -> RestClient {
        self.connection(RestClient::connect)
    }

    /// A connection to the API, once there is one.
    pub fn client(&mut self) -> VmClient {
        self.connection(VmClient::connect)
    }

    fn connection<T>(&mut self, connect: fn(&Path, Duration) -> Result<T, RestError>) -> T {
        let mut client = None;
        until("the vmm's API takes connections", || {
            self.process.check_alive();
            client = connect(&self.api, PATIENCE).ok();
            client.is_some()
        });
        client.expect("just found")
    }

    /// `GET /`.
    pub fn info(&mut self) -> InstanceInfo {
        self.client().info().unwrap_or_else(|e| panic!("{}: GET /: {e}", self.name))
    }

    /// Where the VM stands.
    pub fn state(&mut self) -> InstanceState {
        self.info().state
    }

    /// How its page server has done, of which it must have one.
    pub fn page_server(&mut self) -> PageServerStats {
        let stats = self.client().stats().unwrap_or_else(|e| panic!("{}: GET /vm/stats: {e}", self.name));
        stats.page_server.expect("its memory comes from a page server")
    }

    /// Waits until its pages are served by whom this says.
    pub fn until_served(&mut self, state: PageServerState) -> PageServerStats {
        let mut last = PageServerStats::default();
        until(&format!("{}: {state:?}", self.name), || {
            last = self.page_server();
            last.state == state
        });
        last
    }

    /// Pauses it.
    pub fn pause(&mut self) {
        self.client().pause().unwrap_or_else(|e| panic!("{}: it is not paused: {e}", self.name));
    }

    /// Lets it run.
    pub fn resume(&mut self) {
        self.client().resume().unwrap_or_else(|e| panic!("{}: it does not go on: {e}", self.name));
    }

    /// Takes a snapshot into the directory `path` and waits until it is on disk.
    pub fn snapshot(&mut self, path: &Path) -> SnapshotStatus {
        self.try_snapshot(path).unwrap_or_else(|e| panic!("{}: cannot take a snapshot: {e}", self.name));
        let status = self.client().snapshot_status();
        let status = status.unwrap_or_else(|e| panic!("{}: GET /snapshot/status: {e}", self.name));
        assert_eq!((status.state, &status.error), (SnapshotState::Done, &None), "{}", self.name);
        status
    }

    /// Takes a snapshot of what has changed since the last one.
    pub fn snapshot_changes(&mut self, path: &Path) -> SnapshotStatus {
        let create = SnapshotCreate { snapshot_type: SnapshotType::Diff, ..SnapshotCreate::of(path.to_owned()) };
        self.client().snapshot_create(&create).unwrap_or_else(|e| panic!("{}: no diff: {e}", self.name));
        self.client().snapshot_status().unwrap_or_else(|e| panic!("{}: GET /snapshot/status: {e}", self.name))
    }

    /// As [`Vm::snapshot`], and gives the vmm's refusal back.
    pub fn try_snapshot(&mut self, path: &Path) -> Result<(), RestError> {
        self.client().snapshot_create(&SnapshotCreate::of(path.to_owned()))
    }

    /// Asks the vmm to end, waits until it has, and expects that it ended in good order.
    pub fn stop(self) -> Finished {
        let name = self.name;
        let done = self.process.stop();
        assert_eq!(done.status.code(), Some(0), "{name}: {}", done.stderr);
        done
    }
}
