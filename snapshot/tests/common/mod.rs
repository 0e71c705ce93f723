//! A small snapshot to try things on.
#![allow(dead_code, missing_docs, reason = "each test program uses its part of this")]

use proptest::prelude::*;
use snapshot::clusters::{CLUSTER_BYTES, Cluster, Clusters};
use snapshot::compat::HostFacts;
use snapshot::create::{Base, BytesSource, CreateError, Facts, LayerSource, Staging, Stored};
use snapshot::image::MemoryImage;
use snapshot::load;
use snapshot::manifest::{
    BalloonDevice, CacheType, Cpu, Devices, DiskImage, DriveDevice, EntropyDevice, Manifest, NetworkDevice, RateLimit,
    Readiness, TokenBucket, VsockDevice,
};
use snapshot::state::{
    DriveState, EntropyState, IrqchipState, MachineState, Msr, NetState, QueueState, VirtioMmioState, VsockState,
};
use snapshot::tools::Job;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

pub const PAGE: usize = 4096;
pub const CHUNK: usize = 65536;
pub static NEVER: AtomicBool = AtomicBool::new(false);

pub fn host() -> HostFacts {
    let cpu = Cpu { vendor: "AuthenticAMD".into(), family: 25, model: 1, stepping: 1, brand: "Some CPU".into() };
    HostFacts { arch: "x86_64".into(), cpu, kernel: "6.18.0".into() }
}

/// What the manifest is to say, once the disks are written.
pub fn facts(staging: &mut Staging) -> Facts {
    let mut root = drive("root", false);
    root.held = Some(staging.write_disk("root", &Disk::new(), &NEVER).unwrap());
    Facts {
        vmm_version: "0.1.0".into(),
        host: host(),
        devices: Devices {
            vsock: Some(VsockDevice { guest_cid: 3, uds_path: "run/v.sock".into() }),
            drives: vec![root, drive("data", true)],
            balloon: Some(BalloonDevice { stats_polling_interval_s: 1, ..BalloonDevice::default() }),
            network: vec![NetworkDevice {
                iface_id: "eth0".into(),
                host_dev_name: "tap0".into(),
                guest_mac: Some("06:00:ac:10:00:02".into()),
                rx_rate_limit: Some(rate_limit()),
                tx_rate_limit: Some(rate_limit()),
            }],
            entropy: Some(EntropyDevice { rate_limit: Some(rate_limit()) }),
        },
        readiness: Some(Readiness::Full),
        config: None,
    }
}

/// A disk over an image; what is held of one that can be written is set by [`facts`].
fn drive(drive_id: &str, is_read_only: bool) -> DriveDevice {
    let bucket = TokenBucket { size: 1 << 20, one_time_burst: 5, refill_ms: 100 };
    DriveDevice {
        drive_id: drive_id.into(),
        is_root_device: !is_read_only,
        is_read_only,
        partuuid: None,
        cache_type: CacheType::Writeback,
        rate_limit: is_read_only.then_some(RateLimit { bandwidth: Some(bucket), ops: None }),
        max_overlay_mib: (!is_read_only).then_some(64),
        size_bytes: Disk::SIZE,
        image: Some(DiskImage { path: "images/root.img".into(), modified_ns: Some(1_700_000_000_000_000_000) }),
        held: None,
    }
}

/// A layer of a disk, whose last cluster is short.
pub struct Disk {
    pub clusters: Clusters,
    pub bytes: Vec<u8>,
}

impl Disk {
    pub const SIZE: u64 = 40 * CLUSTER_BYTES - 512;

    pub fn new() -> Disk {
        let mut clusters = Clusters::new(Disk::SIZE);
        for (run, state) in [(2..20, Cluster::Data), (22..24, Cluster::Zero), (39..40, Cluster::Data)] {
            clusters.set(run, state);
        }
        let mut bytes: Vec<u8> = (0..Disk::SIZE).map(|i| (i / 509 + i % 7) as u8 | 1).collect();
        bytes[10 * PAGE..12 * PAGE].fill(0);
        Disk { clusters, bytes }
    }
}

impl LayerSource for Disk {
    fn size(&self) -> u64 {
        Disk::SIZE
    }

    fn clusters(&self) -> &Clusters {
        &self.clusters
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        buf.copy_from_slice(&self.bytes[offset as usize..][..buf.len()]);
        Ok(())
    }
}

pub fn rate_limit() -> RateLimit {
    let bucket = |size| Some(TokenBucket { size, one_time_burst: 9, refill_ms: 100 });
    RateLimit { bandwidth: bucket(65536), ops: bucket(32) }
}

/// A state in which no two neighbouring values are equal by accident.
pub fn state(vcpus: usize) -> MachineState {
    let mut state = MachineState::blank(vcpus);
    for (i, vcpu) in state.vcpus.iter_mut().enumerate() {
        vcpu.regs.rip = 0xffff_ffff_8100_0000 + i as u64;
        vcpu.regs.rflags = 0x202;
        vcpu.sregs.cs.selector = 0x10;
        vcpu.xsave = (0..4096u32).map(|n| (n * 7 + i as u32) as u8).collect();
        vcpu.lapic = (0..1024u32).map(|n| (n * 13) as u8).collect();
        vcpu.msrs = (0..60).map(|n| Msr { index: 0xc000_0080 + n, data: u64::from(n) << 40 }).collect();
        vcpu.tsc_khz = 2_450_000;
    }
    state.vm.clock.realtime = 1_700_000_000_000_000_000;
    state.vm.irqchips = (0..3).map(|chip_id| IrqchipState { chip_id, chip: vec![chip_id as u8; 512] }).collect();
    let queue = QueueState { max_size: 256, size: 128, ready: true, desc_table: 0x10_0000, ..QueueState::default() };
    let transport = VirtioMmioState { status: 0xf, queues: vec![queue; 3], ..VirtioMmioState::default() };
    let drive = |drive_id: &str, pending| DriveState {
        drive_id: drive_id.into(),
        transport: VirtioMmioState { queues: vec![queue], ..transport.clone() },
        pending,
    };
    state.devices.drives = vec![drive("root", true), drive("data", false)];
    let one_queue = VirtioMmioState { queues: vec![queue], ..transport.clone() };
    let two_queues = VirtioMmioState { queues: vec![queue; 2], ..transport.clone() };
    let mac = Some([6, 0, 172, 16, 0, 2]);
    state.devices.network = vec![NetState { iface_id: "eth0".into(), mac, transport: two_queues }];
    state.devices.entropy = Some(EntropyState { transport: one_queue, pending: true });
    state.devices.vsock = Some(VsockState { guest_cid: 3, transport, needs_reset: true });
    state
}

/// 4 chunks and 2 pages: data, a chunk with a zero page inside, zero, data in one page only, a short last chunk.
pub fn memory() -> Vec<u8> {
    let mut memory = vec![0; 4 * CHUNK + 2 * PAGE];
    let mut fill = |from: usize, to: usize| (from..to).for_each(|i| memory[i] = (i / 251 + i % 251) as u8 | 1);
    fill(0, CHUNK);
    fill(CHUNK, CHUNK + 3 * PAGE);
    fill(CHUNK + 4 * PAGE, CHUNK + 5 * PAGE);
    fill(3 * CHUNK + 15 * PAGE, 4 * CHUNK + PAGE);
    memory
}

/// Memory in which chunks occur twice, some that cannot be compressed, and a zero one.
pub fn varied_memory() -> Vec<u8> {
    let mut memory = vec![0; 12 * CHUNK + PAGE];
    let mut fill = |chunk: usize, byte: &dyn Fn(usize) -> u8| {
        let end = ((chunk + 1) * CHUNK).min(memory.len());
        memory[chunk * CHUNK..end].iter_mut().enumerate().for_each(|(at, b)| *b = byte(at));
    };
    for chunk in [0, 3, 7] {
        fill(chunk, &|at| (at / 64) as u8 | 1);
    }
    for chunk in [1, 9] {
        fill(chunk, &|at| noise(chunk * CHUNK + at));
    }
    for chunk in [2, 5, 6, 8, 10, 12] {
        fill(chunk, &|at| (at / 100 + chunk) as u8 | 1);
    }
    memory
}

/// A byte that looks like noise.
fn noise(at: usize) -> u8 {
    let mut x = (at as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (x >> 32) as u8
}

/// How a tool is run in most tests.
pub fn job() -> Job<'static> {
    Job { cancel: &NEVER, progress: &|_, _| {}, max_bytes: None }
}

/// The memory of a snapshot.
pub fn image(dir: &Path) -> MemoryImage {
    MemoryImage::open(&load::open(dir).unwrap()).unwrap()
}

/// Names of what is in a directory, in order.
pub fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// All of an image, chunk by chunk.
pub fn read_all(image: &MemoryImage) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut buf = vec![0xaa; CHUNK];
    for index in 0..image.chunks() {
        let len = image.read_chunk(index, &mut buf).unwrap();
        bytes.extend_from_slice(&buf[..len]);
    }
    bytes
}

/// Pages that have changed of a memory.
pub struct Changes {
    pub memory: Vec<u8>,
    pub pages: Clusters,
}

impl Changes {
    /// The memory as it is now, of which these pages may have changed.
    pub fn new(memory: Vec<u8>, pages: impl IntoIterator<Item = usize>) -> Changes {
        let mut map = Clusters::new(memory.len() as u64);
        for page in pages {
            let bytes = &memory[page * PAGE..][..PAGE];
            let state = if bytes.iter().all(|b| *b == 0) { Cluster::Zero } else { Cluster::Data };
            map.set(page as u64..page as u64 + 1, state);
        }
        Changes { memory, pages: map }
    }
}

impl LayerSource for Changes {
    fn size(&self) -> u64 {
        self.memory.len() as u64
    }

    fn clusters(&self) -> &Clusters {
        &self.pages
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        let bytes = &self.memory[offset as usize..][..buf.len()];
        for (page, bytes) in (offset / PAGE as u64..).zip(bytes.chunks(PAGE)) {
            let state = self.pages.get(page);
            assert!(state == Cluster::Data && bytes.iter().any(|b| *b != 0), "page {page} is not there to be read");
        }
        buf.copy_from_slice(bytes);
        Ok(())
    }
}

/// A snapshot at `target` of what has become of the memory of the one at `base`.
pub fn create_over(base: &Path, target: &Path, changes: &Changes, stored: Stored) -> Result<Manifest, CreateError> {
    let base = Base::open(&load::open(base).unwrap()).unwrap();
    let mut staging = Staging::begin(target)?;
    let digest = staging.write_changes(&base, changes, stored, &NEVER)?;
    let facts = facts(&mut staging);
    staging.commit(digest, facts, &state(1))
}

pub fn create_at(target: &Path, memory: &[u8], state: &MachineState) -> Result<Manifest, CreateError> {
    let mut staging = Staging::begin(target)?;
    let digest = staging.write_memory(&mut BytesSource::new(memory), &NEVER)?;
    let facts = facts(&mut staging);
    staging.commit(digest, facts, state)
}

/// A directory that goes away with the value, and a snapshot in it.
pub struct Sample {
    pub root: tempfile::TempDir,
    pub dir: PathBuf,
    pub manifest: Manifest,
}

impl Sample {
    pub fn new() -> Sample {
        Sample::of(&memory(), &state(1))
    }

    pub fn of(memory: &[u8], state: &MachineState) -> Sample {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("snap");
        let manifest = create_at(&dir, memory, state).unwrap();
        Sample { root, dir, manifest }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub fn bytes(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap()
    }

    /// Puts a file in the place of another, whatever its mode.
    pub fn put(&self, name: &str, bytes: &[u8]) {
        let _ = std::fs::remove_file(self.path(name));
        std::fs::write(self.path(name), bytes).unwrap();
    }

    /// Changes the manifest and sets its digest right, as somebody would who forges one.
    pub fn forge(&self, change: impl FnOnce(&mut serde_json::Value)) {
        let mut value: serde_json::Value = serde_json::from_slice(&self.bytes("snap.json")).unwrap();
        change(&mut value);
        let json = serde_json::to_vec(&value).unwrap();
        self.put("snap.json", &snapshot::manifest::reseal(&json).unwrap_or(json));
    }
}

/// Memory of pages that are zero or not, in runs.
pub fn any_memory() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec((any::<bool>(), 1usize..24, any::<u8>()), 1..12).prop_map(|runs| {
        let mut memory = Vec::new();
        for (data, pages, seed) in runs {
            let at = memory.len();
            memory.resize(at + pages * PAGE, 0);
            if data {
                memory[at..].iter_mut().enumerate().for_each(|(i, b)| *b = (i as u8) ^ seed);
            }
        }
        memory
    })
}
