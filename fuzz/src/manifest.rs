//! `snap.json`, as whoever restores reads it.
//!
//! An input that begins like a JSON document is one. Any other is a list of edits of a manifest that is right. Either is read as
//! it is, and with its digest set right, so that every check behind that is reached.

use crate::edit::edit;
use arbitrary::Unstructured;
use serde_json::Value;
use snapshot::cpu::GuestCpu;
use snapshot::digests::Digests;
use snapshot::load::{LoadError, check_manifest};
use snapshot::manifest::{
    BalloonDevice, CacheType, Cpu, Devices, DiskImage, DriveDevice, EntropyDevice, HeldDisk, Machine, Manifest, Memory,
    MemoryRegion, NetworkDevice, PageMap, Parent, RateLimit, Readiness, StateFile, TokenBucket, VsockDevice, reseal,
};
use snapshot::{CHUNK_BYTES, FORMAT_VERSION, PAGE_BYTES, file};
use std::collections::BTreeSet;
use std::path::{Component, Path};

/// Reads a manifest.
pub fn check(data: &[u8]) {
    let json = document(data, &whole());
    if let Ok(manifest) = read(&json) {
        return accepted(&manifest);
    }
    let Ok(sealed) = reseal(&json) else { return };
    match read(&sealed) {
        Ok(manifest) => accepted(&manifest),
        Err(LoadError::Field { .. } | LoadError::UnsupportedVersion { .. }) => {}
        Err(error) => panic!("a digest that was set right does not help: {error}"),
    }
}

/// The JSON that an input stands for: itself, or edits of `whole`.
pub(crate) fn document(data: &[u8], whole: &Value) -> Vec<u8> {
    if let Some(b'{' | b'[') = data.first() {
        return data.to_vec();
    }
    let mut edited = whole.clone();
    edit(&mut edited, &mut Unstructured::new(data));
    serde_json::to_vec(&edited).expect("a JSON document can be written")
}

fn read(json: &[u8]) -> Result<Manifest, LoadError> {
    check_manifest(Path::new("snap.json"), json)
}

/// What is accepted is what the rest of the program takes for granted, and comes back.
fn accepted(manifest: &Manifest) {
    assert_eq!(&read(&manifest.to_json()).expect("an accepted manifest is accepted again"), manifest);
    let Memory { file, size_bytes, regions, digests, .. } = &manifest.memory;
    let mut end = 0;
    for region in regions {
        assert_eq!(region.offset, end, "regions lie next to each other in the image");
        assert!(region.guest_addr.checked_add(region.size_bytes).is_some(), "a region ends in the address space");
        end += region.size_bytes;
    }
    assert_eq!((end, manifest.machine.memory_bytes), (*size_bytes, *size_bytes));
    assert!(regions.windows(2).all(|pair| pair[0].guest_addr + pair[0].size_bytes <= pair[1].guest_addr));
    assert!((manifest.chunks() - 1) * CHUNK_BYTES < *size_bytes && *size_bytes <= manifest.chunks() * CHUNK_BYTES);
    assert_eq!(Digests::table_bytes(&manifest.memory), manifest.chunks() * 32);
    let mut names = vec![file, digests, &manifest.state.file];
    names.extend(manifest.memory.map.as_ref().map(|map| &map.file));
    let held = manifest.devices.drives.iter().filter_map(|drive| drive.held.as_ref());
    names.extend(held.flat_map(|held| [&held.file, &held.map]));
    assert_eq!(BTreeSet::from_iter(&names).len(), names.len(), "two of the files are one");
    for name in names {
        let mut parts = Path::new(name).components();
        assert!(
            matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)),
            "{name:?} is no plain name"
        );
    }
}

/// A manifest with one of everything.
fn manifest() -> Manifest {
    let hex = "0123456789abcdef".repeat(4);
    let rate_limit = Some(RateLimit {
        bandwidth: Some(TokenBucket { size: 1 << 20, one_time_burst: 0, refill_ms: 100 }),
        ops: None,
    });
    let regions = vec![
        MemoryRegion { guest_addr: 0, size_bytes: 16 * PAGE_BYTES, offset: 0 },
        MemoryRegion { guest_addr: 1 << 32, size_bytes: 32 * PAGE_BYTES, offset: 16 * PAGE_BYTES },
    ];
    let root = DriveDevice {
        drive_id: "root".into(),
        is_root_device: true,
        is_read_only: false,
        partuuid: Some("0eaa91a0-01".into()),
        cache_type: CacheType::Writeback,
        rate_limit,
        max_overlay_mib: Some(64),
        size_bytes: 1 << 30,
        image: Some(DiskImage { path: "/images/root.img".into(), modified_ns: Some(1) }),
        held: Some(HeldDisk {
            file: file::disk("root"),
            data_bytes: 4096,
            digest: hex.clone(),
            map: file::disk_map("root"),
            map_bytes: 1032,
            map_digest: hex.clone(),
        }),
    };
    let data = DriveDevice {
        drive_id: "data".into(),
        is_root_device: false,
        is_read_only: true,
        partuuid: None,
        cache_type: CacheType::Unsafe,
        max_overlay_mib: None,
        held: None,
        ..root.clone()
    };
    let devices = Devices {
        vsock: Some(VsockDevice { guest_cid: 3, uds_path: "guest.vsock".into() }),
        drives: vec![root, data],
        network: vec![NetworkDevice {
            iface_id: "eth0".into(),
            host_dev_name: "tap0".into(),
            guest_mac: Some("06:00:ac:10:00:02".into()),
            rx_rate_limit: rate_limit,
            tx_rate_limit: None,
        }],
        entropy: Some(EntropyDevice { rate_limit }),
        balloon: Some(BalloonDevice::default()),
    };
    let memory = Memory {
        file: file::MEMORY.into(),
        size_bytes: 48 * PAGE_BYTES,
        regions,
        chunk_bytes: CHUNK_BYTES,
        digests: file::DIGESTS.into(),
        root: hex.clone(),
        packed: None,
        parent: Some(Parent { path: "../base".into(), root: hex.clone(), digest: hex.clone() }),
        map: Some(PageMap { file: file::PAGE_MAP.into(), bytes: 1032, digest: hex.clone() }),
    };
    let mut manifest = Manifest {
        format_version: FORMAT_VERSION,
        vmm_version: "0.1.0".into(),
        created_unix_ms: 1,
        arch: "x86_64".into(),
        cpu: Cpu { vendor: "AuthenticAMD".into(), family: 25, ..Cpu::default() },
        guest_cpu: Some(GuestCpu { features: vec!["avx2".into()], xsave_bytes: 832, tsc_khz: 2_450_000 }),
        host_kernel: "6.1.0".into(),
        machine: Machine { vcpus: 2, memory_bytes: memory.size_bytes },
        memory,
        state: StateFile { file: file::STATE.into(), size_bytes: 9000, digest: hex.clone() },
        devices,
        readiness: Some(Readiness::Full),
        config: Some(hex),
        digest: String::new(),
    };
    manifest.seal();
    manifest
}

fn whole() -> Value {
    serde_json::to_value(manifest()).expect("a manifest is a JSON document")
}

/// The manifest itself, one of a machine with nothing, and a few edits.
pub fn seeds() -> Vec<Vec<u8>> {
    let whole = manifest();
    let mut bare = Manifest { devices: Devices::default(), readiness: None, ..whole.clone() };
    bare.seal();
    vec![whole.to_json(), bare.to_json(), vec![0], vec![7, 0, 0, 3], (0..64).collect()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_accepted() {
        for seed in &seeds()[..2] {
            read(seed).unwrap();
        }
    }
}
