//! Disks of the embedded guest, which has no driver for them: how they are opened, locked, shared, snapshotted and restored.
//! What a guest does with a disk is shown by Linux guests (`linux_block.rs`) and by the device's own tests.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::devices::{CacheType, Drive, DriveUpdate};
use api_spec::vm::VmConfig;
use snapshot::clusters::Cluster;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use tests::process::run_vmm;
use tests::vm::drive;
use tests::{Boot, Place, Restore, Vm, require};

const SIZE: u64 = 8 << 20;

/// An image with data in its middle, and its contents.
fn image(place: &Place, name: &str) -> (PathBuf, Vec<u8>) {
    let path = place.join(name);
    let file = File::create_new(&path).expect("a file can be made");
    file.set_len(SIZE).expect("it can have any size");
    let bytes: Vec<u8> = (0..100_000u32).map(|i| (i / 255) as u8 ^ i as u8).collect();
    file.write_all_at(&bytes, 1 << 20).expect("it can be written");
    (path.clone(), fs::read(path).expect("it can be read"))
}

fn overlay(path: &Path) -> Drive {
    Drive { overlay: true, ..drive("root", path) }
}

fn config(vm: &mut Vm) -> VmConfig {
    vm.api().get("/vm/config").expect("a configuration")
}

/// A snapshot of an embedded guest with this disk.
fn snapshot_with(place: &Place, drive: Drive) -> PathBuf {
    let (mut vm, _) = Boot::new(place).drive(drive).ready("original");
    let path = place.join("snapshot");
    vm.snapshot(&path);
    vm.stop();
    path
}

#[track_caller]
fn refuses(place: &Place, snapshot: &Path, arguments: &[&str], words: &[&str]) {
    let snapshot = snapshot.to_string_lossy();
    let vsock = place.join("refused.vsock").to_string_lossy().into_owned();
    let all = [&["--restore", &snapshot, "--vsock", &vsock], arguments].concat();
    let done = run_vmm(place, "refused", &all);
    assert_eq!(done.code(), 1, "{done:?}");
    for word in words {
        assert!(done.one_line().contains(word), "{word}: {}", done.stderr);
    }
}

#[test]
fn any_number_of_guests_share_an_image_through_overlays() {
    require!(Kvm);
    let place = Place::new();
    let (path, before) = image(&place, "shared.img");
    let (mut one, _) = Boot::new(&place).drive(overlay(&path)).ready("one");
    let (two, _) = Boot::new(&place).drive(overlay(&path)).ready("two");
    let sealed = Drive { is_read_only: true, ..drive("data", &path) };
    let (three, _) = Boot::new(&place).drive(sealed).ready("three");
    assert_eq!(config(&mut one).drives, [overlay(&path)]);

    let snapshot = place.join("snapshot");
    one.snapshot(&snapshot);
    one.snapshot(&place.join("again"));
    let clones = ["first", "second"].map(|name| Restore::new(&place, &snapshot).ready(name));
    for (mut clone, mut agent) in clones {
        agent.ticks(2);
        assert_eq!(config(&mut clone).drives, [overlay(&path)]);
        clone.stop();
    }
    // An idle overlay holds nothing.
    let manifest = snapshot::load::open(&snapshot).expect("it is a snapshot").manifest().clone();
    let held = manifest.devices.drives[0].held.as_ref().expect("it can be written");
    assert_eq!((held.data_bytes, held.map_bytes), (0, 0));
    for vm in [one, two, three] {
        vm.stop();
    }
    assert!(fs::read(&path).expect("it can be read") == before);
}

#[test]
fn a_raw_disk_is_copied_and_its_clones_leave_it_alone() {
    require!(Kvm);
    let place = Place::new();
    let (path, before) = image(&place, "raw.img");
    let raw = Drive { cache_type: CacheType::Writeback, ..drive("root", &path) };
    let dir = snapshot_with(&place, raw);
    let snapshot = snapshot::load::open(&dir).expect("it is a snapshot");
    let saved = &snapshot.manifest().devices.drives[0];
    assert_eq!((saved.size_bytes, &saved.image), (SIZE, &None));
    let held = snapshot.open_disk(saved).expect("it is whole").expect("all of it is held");
    assert_eq!(held.clusters.get(1 << 8), Cluster::Data);
    assert!(fs::read(dir.join("disk-root.img")).expect("it is there") == before);
    assert!(held.file.metadata().expect("it is open").blocks() * 512 < SIZE / 4, "holes stay holes");
    assert_eq!(run_vmm(&place, "verify", &["snapshot", "verify", &dir.to_string_lossy()]).code(), 0);

    // The image is no longer needed, nor touched.
    fs::remove_file(&path).expect("it can be removed");
    let (mut clone, _) = Restore::new(&place, &dir).ready("clone");
    let own = &config(&mut clone).drives[0];
    assert!(own.overlay && own.path_on_host == dir.join("disk-root.img"), "{own:?}");
    let second = place.join("second");
    clone.snapshot(&second);
    assert!(fs::read(second.join("disk-root.img")).expect("it is there") == before, "a clone's snapshot is whole too");
    clone.stop();
    fs::remove_dir_all(&dir).expect("it can be removed");
    Restore::new(&place, &second).by_api().ready("grandchild").0.stop();
    refuses(&place, &second, &["--drive", "root=/dev/null"], &["drive root is in the snapshot"]);
}

#[test]
fn an_image_that_is_not_the_snapshots_is_refused() {
    require!(Kvm);
    let place = Place::new();
    let (path, _) = image(&place, "base.img");
    let modified = fs::metadata(&path).expect("it is there").modified().expect("a time");
    let dir = snapshot_with(&place, overlay(&path));
    let touch = |path: &Path, time: SystemTime| {
        File::options().write(true).open(path).expect("it opens").set_modified(time).expect("a time can be set");
    };
    touch(&path, modified + Duration::from_nanos(1_000_000));
    refuses(&place, &dir, &[], &["drive root", "base.img was changed since the snapshot"]);
    let moved = place.join("moved.img");
    fs::rename(&path, &moved).expect("it can be moved");
    refuses(&place, &dir, &[], &["cannot open", "base.img"]);
    let there = format!("root={}", moved.display());
    refuses(&place, &dir, &["--drive", &there], &["moved.img was changed since the snapshot"]);
    touch(&moved, modified);
    refuses(&place, &dir, &["--drive", &there, "--drive", &there], &["given twice"]);
    refuses(&place, &dir, &["--drive", "other=/x"], &["no drive \"other\""]);
    for by_api in [false, true] {
        let restore = Restore::new(&place, &dir).drive("root", &moved);
        let restore = if by_api { restore.by_api() } else { restore };
        let (mut clone, _) = restore.ready("clone");
        assert_eq!(config(&mut clone).drives[0].path_on_host, moved);
        clone.stop();
    }
    File::options().write(true).open(&moved).expect("it opens").set_len(SIZE + 512).expect("a size can be set");
    refuses(&place, &dir, &["--drive", &there], &["moved.img was changed since the snapshot", "bytes and had"]);
}

#[test]
fn a_snapshot_cannot_name_a_device_of_the_host() {
    require!(Kvm);
    let place = Place::new();
    let (path, _) = image(&place, "base.img");
    let dir = snapshot_with(&place, overlay(&path));
    let manifest = fs::read_to_string(dir.join("snap.json")).expect("it is there");
    for device in ["/dev/null", "/dev", "/dev/tty"] {
        let mut document: serde_json::Value = serde_json::from_str(&manifest).expect("it is JSON");
        document["devices"]["drives"][0]["image"] = serde_json::json!({ "path": device, "modified_ns": null });
        let sealed = snapshot::manifest::reseal(document.to_string().as_bytes()).expect("it is a manifest");
        fs::write(dir.join("snap.json"), sealed).expect("it can be written");
        refuses(&place, &dir, &[], &["drive root", device, "no regular file", "--drive root="]);
    }
}

#[test]
fn a_disk_that_is_written_is_locked() {
    require!(Kvm);
    let place = Place::new();
    let (path, _) = image(&place, "one.img");
    let (vm, _) = Boot::new(&place).drive(drive("root", &path)).ready("writer");
    for (name, other) in [
        ("write", drive("root", &path)),
        ("overlay", overlay(&path)),
        ("read", Drive { is_read_only: true, ..drive("root", &path) }),
    ] {
        let done = Boot::new(&place).drive(other).start(name).process.finish();
        assert_eq!(done.code(), 1, "{done:?}");
        assert!(done.one_line().contains("one.img is in use by another VM"), "{}", done.stderr);
    }
    vm.stop();
    let (reader, _) = Boot::new(&place).drive(overlay(&path)).ready("reader");
    let done = Boot::new(&place).drive(drive("root", &path)).start("writer-again").process.finish();
    assert!(done.one_line().contains("one.img is in use by another VM"), "{}", done.stderr);
    reader.stop();
}

#[test]
fn the_bound_of_an_overlay_is_raised_over_the_api() {
    require!(Kvm);
    let place = Place::new();
    let (path, _) = image(&place, "base.img");
    let sealed = Drive { is_read_only: true, ..drive("sealed", &path) };
    let root = Drive { max_overlay_mib: Some(1), ..overlay(&path) };
    let (mut vm, _) = Boot::new(&place).drive(root).drive(sealed).ready("vm");
    let update = |max_overlay_mib: Option<u64>, path_on_host| DriveUpdate {
        drive_id: "root".into(),
        path_on_host,
        max_overlay_mib: max_overlay_mib.map(Some),
        rate_limiter: None,
    };
    let mut patch =
        |id: &str, update: &DriveUpdate| vm.api().patch(&format!("/drives/{id}"), update).map_err(|e| e.to_string());
    patch("root", &update(Some(64), None)).expect("it can be raised");
    for (id, update, word) in [
        ("root", update(None, Some(path.clone())), "path_on_host cannot be changed"),
        ("root", update(None, None), "nothing to change"),
        ("root", update(Some(0), None), "at least 1"),
        ("data", update(Some(64), None), "drive_id is \"root\" in the body"),
        ("data", DriveUpdate { drive_id: "data".into(), ..update(Some(64), None) }, "there is no data"),
        ("sealed", DriveUpdate { drive_id: "sealed".into(), ..update(Some(64), None) }, "is_read_only"),
    ] {
        let refused = patch(id, &update).expect_err("it is refused");
        assert!(refused.contains(word), "{word}: {refused}");
    }
    assert_eq!(config(&mut vm).drives[0].max_overlay_mib, Some(64));
    let dir = place.join("snapshot");
    vm.snapshot(&dir);
    vm.stop();
    let (mut clone, _) = Restore::new(&place, &dir).ready("clone");
    assert_eq!(config(&mut clone).drives[0].max_overlay_mib, Some(64), "clones have the same bound");
    clone.stop();
}

#[test]
fn disks_are_configured_over_the_api() {
    require!(Kvm);
    let place = Place::new();
    let (path, _) = image(&place, "base.img");
    let mut vm = tests::vm::waiting(&place, "vm");
    let mut api = vm.api();
    let put = |api: &mut api_spec::client::RestClient, path: &str, body: serde_json::Value| {
        api.put(path, &body).map_err(|e| e.to_string())
    };
    put(&mut api, "/boot-source", serde_json::json!({ "embedded_guest": true })).expect("it is taken");
    let disk = |id: &str| serde_json::json!({ "drive_id": id, "path_on_host": path, "is_read_only": true });
    put(&mut api, "/drives/a", disk("a")).expect("it is taken");
    put(&mut api, "/drives/b", disk("b")).expect("it is taken");
    let mut root = disk("a");
    root["is_root_device"] = true.into();
    put(&mut api, "/drives/a", root).expect("it takes the place of the first");
    assert!(
        put(&mut api, "/drives/b", disk("a")).expect_err("it is refused").contains("drive_id is \"a\" in the body")
    );
    let mut engine = disk("c");
    engine["io_engine"] = "Async".into();
    assert!(put(&mut api, "/drives/c", engine).expect_err("it is refused").contains("Async"));
    let ids = |vm: &mut Vm| config(vm).drives.into_iter().map(|drive| drive.drive_id).collect::<Vec<_>>();
    assert_eq!(ids(&mut vm), ["a", "b"]);
    put(&mut api, "/actions", serde_json::json!({ "action_type": "InstanceStart" })).expect("it boots");
    assert!(put(&mut api, "/drives/d", disk("d")).expect_err("it is refused").contains("started already"));
    vm.stop();
}
