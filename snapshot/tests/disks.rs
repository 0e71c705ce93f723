//! What a snapshot holds of disks.
#![allow(missing_docs)]

mod common;

use common::*;
use snapshot::clusters::{CLUSTER_BYTES, Cluster, Clusters};
use snapshot::create::{CreateError, Staging};
use snapshot::disk::DiskError;
use snapshot::load::LoadError;
use snapshot::verify::VerifyError;
use snapshot::{FileError, load, verify};
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::AtomicBool;

#[test]
fn layers_come_back_and_zeros_become_holes() {
    let sample = Sample::new();
    let snapshot = load::open(&sample.dir).unwrap();
    let [root, data] = &snapshot.manifest().devices.drives[..] else { panic!("there are two disks") };
    assert!(snapshot.open_disk(data).unwrap().is_none());
    let held = snapshot.open_disk(root).unwrap().unwrap();
    let disk = Disk::new();
    let runs: Vec<_> = held.clusters.runs(0..40).filter(|(_, state)| *state != Cluster::Absent).collect();
    let wanted = [
        (2..10, Cluster::Data),
        (10..12, Cluster::Zero),
        (12..20, Cluster::Data),
        (22..24, Cluster::Zero),
        (39..40, Cluster::Data),
    ];
    assert_eq!(runs, wanted);
    for (run, _) in wanted.into_iter().filter(|(_, state)| *state == Cluster::Data) {
        let (from, to) = (run.start * CLUSTER_BYTES, (run.end * CLUSTER_BYTES).min(Disk::SIZE));
        let mut bytes = vec![0; (to - from) as usize];
        held.file.read_exact_at(&mut bytes, from).unwrap();
        assert!(bytes == disk.bytes[from as usize..to as usize], "{run:?}");
    }
    let metadata = held.file.metadata().unwrap();
    assert_eq!((metadata.len(), metadata.mode() & 0o777), (Disk::SIZE, 0o400));
    let data_bytes = 17 * CLUSTER_BYTES - 512;
    assert_eq!(root.held.as_ref().unwrap().data_bytes, data_bytes);
    assert_eq!(verify::verify(&sample.dir).unwrap().disk_bytes, data_bytes);
}

#[test]
fn a_whole_disk_is_copied_with_its_holes() {
    let root = tempfile::tempdir().unwrap();
    let source = File::create_new(root.path().join("disk")).unwrap();
    source.set_len(3 << 20).unwrap();
    source.write_all_at(&[7; 5000], (1 << 20) + 100).unwrap();
    source.write_all_at(b"end", (3 << 20) - 3).unwrap();
    let source = File::open(root.path().join("disk")).unwrap();

    let mut staging = Staging::begin(&root.path().join("snap")).unwrap();
    let copied = staging.copy_disk("a", &source, 3 << 20, &NEVER).unwrap();
    // What is written from now on is not in the copy.
    File::options().write(true).open(root.path().join("disk")).unwrap().write_all_at(b"late", 0).unwrap();
    let held = staging.describe_disk(copied, &NEVER).unwrap();
    assert_eq!(held.data_bytes, 3 * CLUSTER_BYTES);

    let cancelled = AtomicBool::new(true);
    assert!(matches!(staging.copy_disk("b", &source, 3 << 20, &cancelled), Err(CreateError::Cancelled)));
    assert!(matches!(staging.write_disk("c", &Disk::new(), &cancelled), Err(CreateError::Cancelled)));
    drop(staging);
    let left: Vec<_> = std::fs::read_dir(root.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["disk"]);
}

#[test]
fn damage_is_found_and_named() {
    let sample = Sample::new();
    let open_root = |sample: &Sample| {
        let snapshot = load::open(&sample.dir).unwrap();
        snapshot.open_disk(&snapshot.manifest().devices.drives[0]).map(|_| ())
    };
    let good = sample.bytes("disk-root.img");
    let mut bad = good.clone();
    bad[5 * PAGE] ^= 1;
    sample.put("disk-root.img", &bad);
    open_root(&sample).unwrap();
    assert!(matches!(verify::verify(&sample.dir), Err(VerifyError::Disk(DiskError::Damaged { .. }))));
    sample.put("disk-root.img", &good[..100]);
    assert!(matches!(load::open(&sample.dir), Err(LoadError::File(FileError::WrongSize { .. }))));
    std::fs::remove_file(sample.path("disk-root.img")).unwrap();
    assert!(matches!(load::open(&sample.dir), Err(LoadError::File(FileError::Missing { .. }))));
    sample.put("disk-root.img", &good);

    let mut map = sample.bytes("disk-root.map");
    map[20] ^= 1;
    sample.put("disk-root.map", &map);
    assert!(matches!(open_root(&sample), Err(DiskError::MapDigest { .. })));
    let digest = blake3::hash(&[0; 1032]).to_hex().to_string();
    sample.put("disk-root.map", &[0; 1032]);
    sample.forge(|doc| doc["devices"]["drives"][0]["held"]["map_digest"] = digest.into());
    assert!(matches!(open_root(&sample), Err(DiskError::Map { .. })));
}

#[test]
fn a_disk_is_checked_once_before_it_is_trusted() {
    let sample = Sample::new();
    let open = || {
        let snapshot = load::open(&sample.dir).unwrap();
        snapshot.open_trusted_disk(&snapshot.manifest().devices.drives[0])
    };
    let stamp = sample.bytes("disk-root.stamp");
    open().unwrap().unwrap();
    // Damage that leaves no time: what makes the stamp useless is the file's identity.
    let good = sample.bytes("disk-root.img");
    let mut bad = good.clone();
    bad[5 * PAGE] ^= 1;
    sample.put("disk-root.img", &bad);
    assert!(matches!(open(), Err(DiskError::Damaged { .. })));
    sample.put("disk-root.img", &good);
    std::thread::sleep(std::time::Duration::from_millis(50)); // Too fresh a file is not stamped.
    open().unwrap().unwrap();
    assert_ne!(sample.bytes("disk-root.stamp"), stamp, "it was checked, and stamped anew");
    let writer = File::open(sample.path("disk-root.img")).unwrap();
    rustix::fs::flock(&writer, rustix::fs::FlockOperation::LockExclusive).unwrap();
    assert!(matches!(open(), Err(DiskError::Changed { .. })), "somebody may write it");
    drop(writer);
    let held = open().unwrap().unwrap();
    let writer = File::open(sample.path("disk-root.img")).unwrap();
    assert!(rustix::fs::flock(&writer, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err());
    drop(held);
}

#[test]
fn disks_that_the_state_does_not_have_are_refused() {
    let mut other = state(1);
    other.devices.drives.swap(0, 1);
    let sample = Sample::of(&memory(), &other);
    assert!(matches!(load::open(&sample.dir), Err(LoadError::Drives { .. })));
}

/// No cluster that is written is zero, so nobody reads through terabytes that a map claims and a file does not hold, even if the
/// digest is that of as many zeros.
#[test]
fn clusters_that_are_claimed_and_not_there_are_not_read() {
    const SIZE: u64 = 1 << 20;
    let sample = Sample::new();
    let image = sample.path("disk-root.img");
    std::fs::set_permissions(&image, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let file = File::options().write(true).open(&image).unwrap();
    file.set_len(0).unwrap();
    file.set_len(SIZE).unwrap();
    let mut map = Clusters::new(SIZE);
    map.set(0..map.count(), Cluster::Data);
    let map = map.encode();
    sample.put("disk-root.map", &map);
    sample.forge(|json| {
        let drive = &mut json["devices"]["drives"][0];
        drive["size_bytes"] = SIZE.into();
        drive["held"]["data_bytes"] = SIZE.into();
        drive["held"]["digest"] = blake3::hash(&vec![0; SIZE as usize]).to_hex().as_str().into();
        drive["held"]["map_bytes"] = map.len().into();
        drive["held"]["map_digest"] = blake3::hash(&map).to_hex().as_str().into();
    });
    match verify::verify(&sample.dir) {
        Err(VerifyError::Disk(DiskError::Damaged { path })) => assert_eq!(path, image),
        other => panic!("{other:?}"),
    }
}
