//! The side that becomes a clone.

use crate::devices::virtio::block::disk::Disk;
use crate::devices::virtio::block::request::SECTOR;
use crate::kvm::state::Clock;
use crate::machine::Machine;
use crate::machine::backend::{Backend, BackendError};
use crate::machine::config::{self, ConfigError, DevicePlan, MAX_VCPUS};
use crate::machine::disks::{self, RestoreDisksError};
use crate::machine::phases::Phases;
use crate::machine::restore::{HowToLoad, Loadable, RestoreError, lease, load_state, loaded, override_host_side, show};
use crate::machine::shell::{Misfit, Shape, Shell};
use crate::machine::wiring::Outside;
use crate::memory::image::LayError;
use crate::memory::layer::{Layer, is_sealed};
use crate::memory::{PAGE_SIZE, layout};
use crate::notice::Notifier;
use crate::vcpu::state::OtherTsc;
use ::snapshot::clusters::{CLUSTER_BYTES, Clusters, MapError};
use ::snapshot::disk::Held;
use ::snapshot::load;
use ::snapshot::manifest::MAX_DISK_BYTES;
use ::snapshot::state::{self, MachineState, StateError};
use api_spec::client::rest::MAX_DESCRIPTORS;
use api_spec::fork::{ForkDrive, ForkLayer, ForkLoad, ForkServed, MAX_DISK_LAYERS};
use rustix::fs::{OFlags, fcntl_get_seals, fcntl_getfl};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::Arc;
use uffd_handler::process::Signals;

/// Longest state that is taken, in bytes.
const MAX_STATE: u64 = 64 << 20;

/// Why a clone that another vmm offers is not taken.
#[derive(Debug, thiserror::Error)]
pub enum ForkLoadError {
    /// It speaks of something else.
    #[error("the VM is forked by vmm {theirs} and this is vmm {}; use one version for both", env!("CARGO_PKG_VERSION"))]
    Version {
        /// The other's version.
        theirs: String,
    },
    /// It is of a machine that this program does not build.
    #[error("the VM that is forked has {vcpus} vCPUs and {bytes} bytes of memory; this program runs no such machine")]
    Shape {
        /// Number of vCPUs.
        vcpus: u8,
        /// Guest memory, in bytes.
        bytes: u64,
    },
    /// Too few descriptors, or too many.
    #[error(
        "the call is made by a vmm whose VM is forked (PUT /vm/fork), with {expected} descriptors; {found} came with this one"
    )]
    Descriptors {
        /// How many belong to it.
        expected: usize,
        /// How many came.
        found: usize,
    },
    /// A file is not what it should be.
    #[error("descriptor {number} is of no use: {problem}")]
    Descriptor {
        /// Which one.
        number: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// What a page server serves the VM is there no more.
    #[error("{} is another snapshot by now than the VM that is forked was restored from; it cannot be forked any more", .0.display())]
    OtherSnapshot(PathBuf),
    /// The parent's socket is not to be had.
    #[error(
        "this vmm has no shell with a vsock device: say in `into`, by `vsock_override`, where that of the clone is to listen"
    )]
    NoSocket,
    /// The state.
    #[error("the state of the VM that is forked: {0}")]
    State(#[from] StateError),
    /// It is of another machine.
    #[error("the state of the VM that is forked is of {0} vCPUs")]
    Vcpus(usize),
    /// The map of a layer.
    #[error("the map of the layer in descriptor {number}: {source}")]
    Map {
        /// Which one.
        number: usize,
        /// What is wrong with it.
        source: MapError,
    },
    /// Disks that cannot be configured.
    #[error("the disks of the VM that is forked cannot be built: {0}")]
    Drives(ConfigError),
    /// A disk that cannot be.
    #[error("drive {id} of the VM that is forked cannot be built: {problem}")]
    Drive {
        /// Which one.
        id: String,
        /// What is wrong with it.
        problem: String,
    },
}

/// A clone that another vmm offers, found right.
#[derive(Debug)]
pub struct Offered {
    shape: Shape,
    state: MachineState,
    /// The uppermost first.
    layers: Vec<Layer>,
    lowest: Option<File>,
    disks: Vec<Disk>,
    load: ForkLoad,
}

/// Looks at what another vmm offers. Descriptors are checked: nobody can write a layer, and none is shorter than it has to be.
pub fn open(load: &ForkLoad, descriptors: Vec<OwnedFd>) -> Result<Offered, RestoreError> {
    let ForkLoad { vmm_version, vcpu_count: vcpus, memory_bytes, state_bytes, layers: told, .. } = load;
    if vmm_version != env!("CARGO_PKG_VERSION") {
        return Err(ForkLoadError::Version { theirs: vmm_version.clone() }.into());
    }
    let is_whole = memory_bytes % (1 << 20) == 0 && (1..=layout::MAX_MIB).contains(&(memory_bytes >> 20));
    if !is_whole || !(1..=MAX_VCPUS).contains(vcpus) {
        return Err(ForkLoadError::Shape { vcpus: *vcpus, bytes: *memory_bytes }.into());
    }
    let drives = load.drives.iter().map(|drive| drive.layer_map_bytes.len() + usize::from(drive.image.is_some()));
    // The state, the layers, what they lie over, and the disks.
    let expected = told.len() + 1 + usize::from(load.served.is_none()) + drives.sum::<usize>();
    let found = descriptors.len();
    if expected != found || found > MAX_DESCRIPTORS {
        return Err(ForkLoadError::Descriptors { expected, found }.into());
    }
    check_drives(&load.drives)?;
    let mut files = descriptors.into_iter().map(File::from).enumerate();
    let (_, bundle) = files.next().ok_or(ForkLoadError::Descriptors { expected, found })?;
    let mut bundle = Bundle::open(bundle, load)?;
    let state = state::decode(&bundle.next(*state_bytes)?).map_err(ForkLoadError::from)?;
    if state.vcpus.len() != usize::from(*vcpus) {
        return Err(ForkLoadError::Vcpus(state.vcpus.len()).into());
    }

    let mut layers = Vec::new();
    for (ForkLayer { map_bytes, packed }, (number, file)) in told.iter().zip(files.by_ref()) {
        let pages = bundle.map(number, *map_bytes, *memory_bytes)?;
        check_memory(number, &file, *packed)?;
        check_file(number, &file, if *packed { pages.data() * PAGE_SIZE } else { *memory_bytes })?;
        layers.push(Layer { file, pages, packed: *packed });
    }
    let lowest = if load.served.is_none() { files.next() } else { None };
    if let Some((number, file)) = &lowest {
        check_memory(*number, file, false)?;
        check_file(*number, file, *memory_bytes)?;
    }
    let lowest = lowest.map(|(_, file)| file);
    let disks = open_disks(&load.drives, &mut files, &mut bundle)?;

    let mut devices = DevicePlan {
        vsock: load.vsock.clone(),
        drives: load.drives.iter().map(|drive| drive.drive.clone()).collect(),
        network: load.network_interfaces.clone(),
        entropy: load.entropy,
        balloon: load.balloon,
    };
    override_host_side(&mut devices, load.vsock_override.as_ref(), &load.network_overrides)?;
    let shape = Shape { vcpus: *vcpus, memory_bytes: *memory_bytes, devices };
    Ok(Offered { shape, state, layers, lowest, disks, load: load.clone() })
}

/// Whether there can be such disks, whatever is in them. Pure.
fn check_drives(drives: &[ForkDrive]) -> Result<(), ForkLoadError> {
    // Before anything is made for any of them.
    let count = drives.len().try_into().unwrap_or(u32::MAX);
    if count > layout::MAX_VIRTIO {
        return Err(ForkLoadError::Drives(ConfigError::TooMany(count)));
    }
    let configured: Vec<_> = drives.iter().map(|drive| drive.drive.clone()).collect();
    config::check_drives(&configured).map_err(ForkLoadError::Drives)?;
    for ForkDrive { drive, size_bytes: size, image, layer_map_bytes: maps } in drives {
        let problem = if *size == 0 || !size.is_multiple_of(SECTOR) || *size > MAX_DISK_BYTES {
            format!("no disk has {size} bytes")
        } else if drive.is_read_only && (image.is_none() || !maps.is_empty()) {
            "what can only be read is an image, and nothing else".to_owned()
        } else if drive.is_read_only == drive.overlay {
            "what can be written has an overlay, and nothing else has".to_owned()
        } else if maps.len() > MAX_DISK_LAYERS {
            format!("it has {} layers, and {MAX_DISK_LAYERS} are the most", maps.len())
        } else {
            continue;
        };
        return Err(ForkLoadError::Drive { id: drive.drive_id.clone(), problem });
    }
    Ok(())
}

/// The disks, of the files that come for them.
fn open_disks(
    drives: &[ForkDrive],
    files: &mut impl Iterator<Item = (usize, File)>,
    bundle: &mut Bundle,
) -> Result<Vec<Disk>, RestoreError> {
    let mut disks = Vec::with_capacity(drives.len());
    for told in drives {
        let mut layers = Vec::new();
        for (map_bytes, (number, file)) in told.layer_map_bytes.iter().zip(files.by_ref()) {
            let clusters = bundle.map(number, *map_bytes, told.size_bytes)?;
            check_file(number, &file, (clusters.end_of_data() * CLUSTER_BYTES).min(told.size_bytes))?;
            check_unwritable(number, &file)?;
            layers.push(Held { file, clusters });
        }
        let image = if told.image.is_some() { files.next() } else { None };
        if let Some((number, file)) = &image {
            check_unwritable(*number, file)?;
        }
        let disk = disks::handed_on(told, layers, image.map(|(_, file)| file));
        disks.push(disk.map_err(RestoreDisksError::from)?);
    }
    Ok(disks)
}

/// The file of the state and the maps, which are read one after the other.
struct Bundle {
    file: File,
    at: u64,
}

impl Bundle {
    /// Whether the file holds what it is said to, and nobody can change that.
    fn open(file: File, load: &ForkLoad) -> Result<Bundle, ForkLoadError> {
        let too_long = || ForkLoadError::Descriptor {
            number: 0,
            problem: "what it is said to hold is longer than it can be".into(),
        };
        let memory = load.layers.iter().map(|layer| (layer.map_bytes, load.memory_bytes));
        let disks = load.drives.iter().flat_map(|disk| disk.layer_map_bytes.iter().map(|map| (*map, disk.size_bytes)));
        let maps: Vec<(u64, u64)> = memory.chain(disks).collect();
        if load.state_bytes > MAX_STATE || maps.iter().any(|(map, size)| *map > Clusters::max_encoded(*size)) {
            return Err(too_long());
        }
        check_sealed(0, &file)?;
        check_file(0, &file, load.state_bytes + maps.iter().map(|(map, _)| map).sum::<u64>())?;
        Ok(Bundle { file, at: 0 })
    }

    fn next(&mut self, bytes: u64) -> Result<Vec<u8>, ForkLoadError> {
        let mut buf = vec![0; bytes as usize];
        let read = self.file.read_exact_at(&mut buf, self.at);
        read.map_err(|e| ForkLoadError::Descriptor { number: 0, problem: e.to_string() })?;
        self.at += bytes;
        Ok(buf)
    }

    /// The map of the layer in a descriptor.
    fn map(&mut self, number: usize, bytes: u64, size: u64) -> Result<Clusters, ForkLoadError> {
        Clusters::decode(&self.next(bytes)?, size).map_err(|source| ForkLoadError::Map { number, source })
    }
}

/// Gives a clone the host side of a shell that it did not fit, where nobody has said another: the parent's is in use.
fn take_host_side(plan: &mut DevicePlan, load: &ForkLoad, shell: DevicePlan) -> Result<(), ForkLoadError> {
    if let (Some(vsock), None) = (&mut plan.vsock, &load.vsock_override) {
        vsock.uds_path = shell.vsock.ok_or(ForkLoadError::NoSocket)?.uds_path;
    }
    let is_said = |id: &str| load.network_overrides.iter().any(|other| other.iface_id == *id);
    for interface in plan.network.iter_mut().filter(|interface| !is_said(&interface.iface_id)) {
        if let Some(own) = shell.network.iter().find(|own| own.iface_id == interface.iface_id) {
            interface.host_dev_name = own.host_dev_name.clone();
        }
    }
    Ok(())
}

/// Whether a descriptor is of a file that can be read and holds so much. Whether it is sealed is looked at first: the size stays then.
fn check_file(number: usize, file: &File, bytes: u64) -> Result<(), ForkLoadError> {
    match check_readable(number, file)? {
        size if size < bytes => Err(ForkLoadError::Descriptor {
            number,
            problem: format!("its file has {size} bytes, and should have {bytes}"),
        }),
        _ => Ok(()),
    }
}

/// Whether a descriptor is of a file that can be read; its size in bytes.
fn check_readable(number: usize, file: &File) -> Result<u64, ForkLoadError> {
    let bad = |problem: String| ForkLoadError::Descriptor { number, problem };
    let metadata = file.metadata().map_err(|e| bad(e.to_string()))?;
    if !metadata.is_file() {
        return Err(bad("it is of no regular file".into()));
    }
    let access = fcntl_getfl(file).map_err(|e| bad(e.to_string()))? & OFlags::RWMODE;
    if access == OFlags::WRONLY || access.contains(OFlags::PATH) {
        return Err(bad("it is not open for reading".into()));
    }
    Ok(metadata.len())
}

/// Whether nobody can change a file that is only in memory, as a layer that was packed always is. Files on a disk are those of snapshots.
fn check_memory(number: usize, file: &File, always: bool) -> Result<(), ForkLoadError> {
    let has_name = file.metadata().is_ok_and(|metadata| metadata.nlink() > 0);
    let is_on_disk = !always && (has_name || fcntl_get_seals(file).is_err());
    if is_on_disk { Ok(()) } else { check_sealed(number, file) }
}

/// Whether a file cannot be written through its descriptor: others read it, too.
fn check_unwritable(number: usize, file: &File) -> Result<(), ForkLoadError> {
    let bad = |problem: String| ForkLoadError::Descriptor { number, problem };
    let flags = fcntl_getfl(file).map_err(|e| bad(e.to_string()))?;
    match flags & OFlags::RWMODE {
        OFlags::RDONLY if !flags.contains(OFlags::PATH) => Ok(()),
        _ => Err(bad("a file of a disk has to be open for reading, and for nothing else".into())),
    }
}

fn check_sealed(number: usize, file: &File) -> Result<(), ForkLoadError> {
    check_readable(number, file)?;
    match fcntl_get_seals(file) {
        Ok(seals) if is_sealed(seals) => Ok(()),
        _ => Err(ForkLoadError::Descriptor {
            number,
            problem: "its file could still be written (it is not sealed)".into(),
        }),
    }
}

impl Loadable for Offered {
    fn fits(&self, shell: &Shell) -> Result<(), Misfit> {
        let ForkLoad { vsock_override, network_overrides, .. } = &self.load;
        shell.shape().fits(&self.shape, vsock_override.as_ref(), !network_overrides.is_empty())
    }

    fn shell(&mut self, former: Option<Shape>, outside: Outside, phases: &mut Phases) -> Result<Shell, RestoreError> {
        let former = former.map(|shape| shape.devices).unwrap_or_default();
        take_host_side(&mut self.shape.devices, &self.load, former)?;
        Ok(Shell::build(self.shape.clone(), outside, phases)?)
    }

    fn load(
        self,
        shell: Shell,
        notifier: &Notifier,
        signals: &Signals,
        phases: &mut Phases,
    ) -> Result<Machine, RestoreError> {
        let Offered { state, layers, lowest, load, shape, disks } = self;
        let (mut machine, held, low) = shell.open(shape.devices, disks);
        if let Some(served) = load.served {
            let ForkServed { snapshot_path, digest, mem_backend } = &served;
            let snapshot = Arc::new(load::open_without_memory(snapshot_path)?);
            if snapshot.manifest().digest != *digest {
                return Err(ForkLoadError::OtherSnapshot(snapshot_path.clone()).into());
            }
            let backend = Backend::Shared(&mem_backend.backend_path);
            let lease = lease(&snapshot, &backend)?;
            let policy = mem_backend.on_handler_loss.unwrap_or_default();
            show(&mut machine, low, &snapshot, (backend, policy, true), notifier, signals, phases)?;
            machine.lease = Some(lease);
            machine.served = Some(served);
        } else if let Some(lowest) = &lowest {
            machine.ram.show(lowest).map_err(LayError::from).map_err(BackendError::from)?;
            phases.end("memory");
        }
        let laid = machine.ram.show_above(layers);
        phases.end("layers");
        let new_generation = load.new_generation;
        let how = HowToLoad { other_tsc: OtherTsc::Refused, clock: Clock::GoesOn, new_generation };
        let laid = laid.map_err(|e| BackendError::from(e).into());
        let state_loaded = laid.and_then(|()| load_state(&machine, &state, &held, how, phases));
        machine.page_server.as_ref().map_or(Ok(()), loaded)?;
        state_loaded?;
        Ok(machine)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::block::disk::Image;
    use crate::memory::layer::SEALED;
    use ::snapshot::clusters::Cluster;
    use api_spec::devices::Drive;
    use api_spec::fork::ForkImage;
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

    fn memory_file(bytes: u64, seals: SealFlags) -> OwnedFd {
        let file = memfd_create("t", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&file, bytes).unwrap();
        fcntl_add_seals(&file, seals).unwrap();
        file
    }

    const SIZE: u64 = 8 << 20;

    fn load() -> ForkLoad {
        ForkLoad {
            vmm_version: env!("CARGO_PKG_VERSION").into(),
            vcpu_count: 1,
            memory_bytes: SIZE,
            vsock: None,
            drives: Vec::new(),
            network_interfaces: Vec::new(),
            entropy: None,
            balloon: None,
            served: None,
            max_private_mib: None,
            state_bytes: 100,
            layers: vec![ForkLayer { map_bytes: 0, packed: true }],
            resume_vm: true,
            new_generation: true,
            vsock_override: None,
            network_overrides: Vec::new(),
        }
    }

    /// Each tap is that of the shell, but for those that somebody has named.
    #[test]
    fn a_clone_has_the_taps_of_a_shell_but_for_those_that_are_named() {
        let plan = |taps: [&str; 2]| {
            let interface = |(id, tap)| serde_json::json!({ "iface_id": id, "host_dev_name": tap });
            let interfaces = serde_json::Value::from_iter(["a", "b"].into_iter().zip(taps).map(interface));
            DevicePlan { network: serde_json::from_value(interfaces).unwrap(), ..Default::default() }
        };
        let taps = |named: serde_json::Value| {
            let load = ForkLoad { network_overrides: serde_json::from_value(named).unwrap(), ..load() };
            let mut plan_of_clone = plan(["parent0", "parent1"]);
            override_host_side(&mut plan_of_clone, None, &load.network_overrides).unwrap();
            take_host_side(&mut plan_of_clone, &load, plan(["shell0", "shell1"])).unwrap();
            plan_of_clone.network.into_iter().map(|interface| interface.host_dev_name).collect::<Vec<_>>()
        };
        assert_eq!(taps(serde_json::json!([])), ["shell0", "shell1"]);
        assert_eq!(taps(serde_json::json!([{ "iface_id": "a", "host_dev_name": "named" }])), ["named", "shell1"]);
    }

    /// Each thing that can be wrong with an offer is told by its name, and none of it is used.
    #[test]
    fn an_offer_that_is_not_right_is_refused() {
        let load = load();
        let files = || vec![memory_file(100, SEALED), memory_file(SIZE, SEALED), memory_file(SIZE, SEALED)];
        let refused = |load: &ForkLoad, files: Vec<OwnedFd>| open(load, files).unwrap_err().to_string();
        let with = |change: fn(&mut ForkLoad)| {
            let mut load = load.clone();
            change(&mut load);
            refused(&load, files())
        };
        assert!(refused(&load, files()).starts_with("the state of the VM that is forked: "), "100 zeros are no state");
        assert!(with(|load| load.vmm_version = "0".into()).contains("vmm 0"));
        for shape in [
            with(|load| load.vcpu_count = 0),
            with(|load| load.memory_bytes += 1),
            with(|load| load.memory_bytes = u64::MAX << 20),
        ] {
            assert!(shape.contains("runs no such machine"), "{shape}");
        }
        assert!(with(|load| load.layers.clear()).contains("with 2 descriptors; 3 came"));
        assert!(
            with(|load| load.layers = vec![ForkLayer { map_bytes: 0, packed: true }; 300])
                .contains("with 302 descriptors")
        );
        assert!(with(|load| load.state_bytes = u64::MAX).contains("longer than it can be"));
        assert!(with(|load| load.layers[0].map_bytes = u64::MAX).contains("longer than it can be"));
        assert!(with(|load| load.state_bytes = 101).contains("should have 101"));
        assert!(refused(&load, Vec::new()).contains("0 came"));
        let mut socket = files();
        socket[0] = std::os::unix::net::UnixStream::pair().unwrap().0.into();
        assert!(refused(&load, socket).contains("no regular file"));
    }

    const DISK: u64 = 64 * CLUSTER_BYTES;

    /// A disk with an overlay over two layers over an image, and what comes for it.
    fn disk(dir: &tempfile::TempDir) -> (ForkDrive, Vec<Vec<u8>>, Vec<File>) {
        let file = |name: &str, bytes: u64| {
            let file = File::create(dir.path().join(name)).unwrap();
            file.set_len(bytes).unwrap();
            File::open(dir.path().join(name)).unwrap()
        };
        let maps = [0..3, 2..64].map(|run| {
            let mut clusters = Clusters::new(DISK);
            clusters.set(run, Cluster::Data);
            clusters.encode()
        });
        let files = vec![file("upper", 3 * CLUSTER_BYTES), file("lower", DISK), file("image", DISK)];
        let path = dir.path().join("image");
        let image = Image::open("data", &path, false).unwrap();
        let drive = serde_json::json!({ "drive_id": "data", "path_on_host": path, "overlay": true });
        let told = ForkDrive {
            drive: serde_json::from_value(drive).unwrap(),
            size_bytes: DISK,
            image: Some(ForkImage { modified_ns: image.facts().modified_ns }),
            layer_map_bytes: maps.iter().map(|map| map.len() as u64).collect(),
        };
        (told, maps.to_vec(), files)
    }

    /// Opens a disk as it comes.
    fn received(told: &ForkDrive, maps: &[Vec<u8>], files: Vec<File>) -> Result<Vec<Disk>, String> {
        let bundle = File::from(memfd_create("t", MemfdFlags::CLOEXEC).unwrap());
        bundle.write_all_at(&maps.concat(), 0).unwrap();
        let drives = [told.clone()];
        check_drives(&drives).map_err(|e| e.to_string())?;
        let mut files = files.into_iter().enumerate().map(|(number, file)| (number + 3, file));
        open_disks(&drives, &mut files, &mut Bundle { file: bundle, at: 0 }).map_err(|e| e.to_string())
    }

    #[test]
    fn a_disk_is_what_lies_over_its_image() {
        let dir = tempfile::tempdir().unwrap();
        let (told, maps, files) = disk(&dir);
        for (name, byte) in [("upper", 1), ("lower", 2)] {
            let file = File::options().write(true).open(dir.path().join(name)).unwrap();
            file.write_all_at(&vec![byte; file.metadata().unwrap().len() as usize], 0).unwrap();
        }
        let mut disks = received(&told, &maps, files).unwrap();
        let mut bytes = vec![0; DISK as usize];
        disks[0].read(0, &mut bytes).unwrap();
        let end = 3 * CLUSTER_BYTES as usize;
        assert!(bytes[..end].iter().all(|byte| *byte == 1) && bytes[end..].iter().all(|byte| *byte == 2));
        assert_eq!(disks[0].private_bytes(), 0, "nothing of it is its own");
        disks[0].write(0, &[3; 8192]).unwrap();
        assert_eq!(disks[0].private_bytes(), 8192);

        let (told, _, mut files) = disk(&dir);
        let drive = Drive { is_read_only: true, overlay: false, ..told.drive };
        let told = ForkDrive { drive, layer_map_bytes: Vec::new(), ..told };
        assert!(received(&told, &[], files.split_off(2)).unwrap()[0].is_read_only());
    }

    /// Each thing that can be wrong with a disk is told by its name.
    #[test]
    fn a_disk_that_is_not_right_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (good, maps, _) = disk(&dir);
        type Change<'a> = &'a dyn Fn(&mut ForkDrive, &mut Vec<Vec<u8>>, &mut Vec<File>);
        let refused = |change: Change, why: &str| {
            let (mut told, mut maps, mut files) = (good.clone(), maps.clone(), disk(&dir).2);
            change(&mut told, &mut maps, &mut files);
            let error = received(&told, &maps, files).unwrap_err();
            assert!(error.contains(why), "{why}: {error}");
        };
        let refused_as_told = |change: fn(&mut ForkDrive), why: &str| refused(&|told, _, _| change(told), why);
        refused_as_told(|told| told.drive.drive_id = "/".into(), "drive_id");
        refused_as_told(|told| told.drive.max_overlay_mib = Some(0), "max_overlay_mib must be at least 1");
        for size in [0, 513, u64::MAX - 511] {
            refused(&|told, _, _| told.size_bytes = size, "no disk has");
        }
        refused_as_told(|told| told.drive.overlay = false, "what can be written has an overlay");
        let read_only = |told: &mut ForkDrive| (told.drive.is_read_only, told.drive.overlay) = (true, false);
        refused(&|told, _, _| read_only(told), "what can only be read is an image");
        refused_as_told(|told| told.layer_map_bytes = vec![0; MAX_DISK_LAYERS + 1], "it has 9 layers");
        refused_as_told(
            |told| told.size_bytes -= CLUSTER_BYTES,
            "descriptor 4: its block 0 has clusters that no disk has",
        );
        refused(&|_, maps, _| maps[0][0] = 1, "descriptor 3: its block 1 is out of place");
        refused(&|told, _, _| told.layer_map_bytes[0] -= 1, "is not that of a map");
        let writable = |name: &str| File::options().read(true).write(true).open(dir.path().join(name)).unwrap();
        let only_writable = || File::options().write(true).open(dir.path().join("upper")).unwrap();
        refused(
            &|_, _, files| files[0] = writable("upper"),
            "descriptor 3 is of no use: a file of a disk has to be open for reading",
        );
        refused(&|_, _, files| files[1] = only_writable(), "descriptor 4 is of no use: it is not open for reading");
        refused(&|_, _, files| files[2] = writable("image"), "descriptor 5 is of no use");
        refused(&|_, _, files| files.swap(0, 1), "descriptor 4 is of no use: its file has 12288 bytes");
        refused(&|_, _, files| files[0] = File::open("/dev/null").unwrap(), "no regular file");
        refused(&|_, _, files| files[0] = File::open(dir.path()).unwrap(), "no regular file");
        refused(
            &|_, _, files| files[2] = File::open("/dev/null").unwrap(),
            "neither a regular file nor a block device",
        );
        refused(&|_, _, files| files[2] = File::open(dir.path().join("upper")).unwrap(), "it has 12288 bytes");
        refused_as_told(|told| told.image = Some(ForkImage { modified_ns: Some(1) }), "somebody has written to it");
        refused_as_told(|told| told.image = Some(ForkImage { modified_ns: None }), "somebody has written to it");
        let twice = [good.clone(), good.clone()];
        assert!(check_drives(&twice).unwrap_err().to_string().contains("two have the drive_id data"));
        let named = |number| {
            let mut told = good.clone();
            told.drive.drive_id = format!("data{number}");
            told
        };
        let many: Vec<_> = (0..=layout::MAX_VIRTIO).map(named).collect();
        assert!(check_drives(&many[1..]).is_ok());
        assert!(check_drives(&many).unwrap_err().to_string().contains("virtio devices are configured; there may be"));
    }

    #[test]
    fn a_layer_that_somebody_could_write_is_refused() {
        let file = |bytes, seals| File::from(memory_file(bytes, seals));
        assert!(check_sealed(1, &file(4096, SEALED)).is_ok());
        for fewer in [SealFlags::empty(), SealFlags::WRITE, SealFlags::SHRINK | SealFlags::GROW] {
            assert!(check_sealed(1, &file(4096, fewer)).unwrap_err().to_string().contains("not sealed"));
        }
        assert!(check_sealed(1, &tempfile::tempfile().unwrap()).is_err(), "a file on a disk");
        assert!(check_file(1, &file(4095, SEALED), 4096).unwrap_err().to_string().contains("4095 bytes"));
        let (in_memory, unsealed) = (file(4096, SEALED), file(4096, SealFlags::empty()));
        assert!(check_memory(1, &in_memory, false).is_ok() && check_memory(1, &in_memory, true).is_ok());
        assert!(check_memory(1, &unsealed, false).is_err());
        let named = tempfile::NamedTempFile::new().unwrap();
        assert!(check_memory(1, named.as_file(), false).is_ok() && check_memory(1, named.as_file(), true).is_err());
        let unreadable = std::fs::OpenOptions::new().write(true).open("/dev/null").unwrap();
        assert!(check_file(1, &unreadable, 0).is_err());
    }
}
