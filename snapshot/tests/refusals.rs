//! What is not as it was written is refused, by name.
#![allow(missing_docs)]

mod common;

use common::*;
use serde_json::{Value, json};
use snapshot::FileError;
use snapshot::load::{self, LoadError};
use std::fs::{self, File};
use std::path::Path;

fn refusal(sample: &Sample) -> String {
    load::open(&sample.dir).expect_err("must be refused").to_string()
}

const FILES: [&str; 4] = ["snap.json", "state.bin", "mem.bin", "mem.b3"];

#[test]
fn a_path_that_is_no_snapshot_is_refused() {
    let sample = Sample::new();
    let empty = sample.root.path().join("empty");
    fs::create_dir(&empty).unwrap();
    assert!(matches!(load::open(&empty), Err(LoadError::File(FileError::Missing { .. }))));
    for path in [sample.root.path().join("nothing"), sample.path("state.bin"), sample.path("snap.json/x")] {
        assert!(matches!(load::open(&path), Err(LoadError::NotASnapshot { .. })), "{path:?}");
    }
}

#[test]
fn a_missing_file_is_refused() {
    for name in FILES {
        let sample = Sample::new();
        fs::remove_file(sample.path(name)).unwrap();
        let message = refusal(&sample);
        assert!(message.contains(name) && message.contains("is missing"), "{message}");
    }
}

#[test]
fn a_socket_in_the_place_of_a_file_is_refused() {
    for name in FILES {
        let sample = Sample::new();
        fs::remove_file(sample.path(name)).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(sample.path(name)).unwrap();
        let message = refusal(&sample);
        assert!(message.contains(name) && message.contains("not a regular file"), "{message}");
    }
}

#[test]
fn a_file_cut_short_or_grown_is_refused() {
    for name in FILES {
        let sample = Sample::new();
        let whole = sample.bytes(name);
        for len in [0, 1, whole.len() / 2, whole.len() - 1] {
            sample.put(name, &whole[..len]);
            // The manifest's last byte is a line end, which it can do without.
            if !(name == "snap.json" && len == whole.len() - 1) {
                let message = refusal(&sample);
                assert!(message.contains(name), "{message}");
            }
        }
        let mut grown = whole.clone();
        grown.push(0);
        sample.put(name, &grown);
        assert!(refusal(&sample).contains(name));
    }
}

#[test]
fn anything_but_a_regular_file_is_refused() {
    for name in FILES {
        let sample = Sample::new();
        let elsewhere = sample.root.path().join("elsewhere");
        fs::rename(sample.path(name), &elsewhere).unwrap();
        std::os::unix::fs::symlink(&elsewhere, sample.path(name)).unwrap();
        assert!(refusal(&sample).contains("is not a regular file"), "{name} as a link");

        fs::remove_file(sample.path(name)).unwrap();
        fs::create_dir(sample.path(name)).unwrap();
        assert!(refusal(&sample).contains("is not a regular file"), "{name} as a directory");

        fs::remove_dir(sample.path(name)).unwrap();
        make_fifo(&sample.path(name));
        assert!(refusal(&sample).contains("is not a regular file"), "{name} as a FIFO");
    }
}

fn make_fifo(path: &Path) {
    let kind = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, path, kind, rustix::fs::Mode::RUSR, 0).unwrap();
}

#[test]
fn a_link_to_the_directory_is_followed() {
    let sample = Sample::new();
    let link = sample.root.path().join("current");
    std::os::unix::fs::symlink("snap", &link).unwrap();
    load::open(&link).unwrap();
}

#[test]
fn a_huge_manifest_is_refused_unread() {
    let sample = Sample::new();
    File::options().write(true).open(sample.path("snap.json")).unwrap().set_len(1 << 40).unwrap();
    assert!(matches!(load::open(&sample.dir), Err(LoadError::File(FileError::TooLong { .. }))));
}

#[test]
fn every_flipped_byte_of_the_manifest_is_noticed() {
    let sample = Sample::new();
    let good = sample.bytes("snap.json");
    let path = sample.path("snap.json");
    for at in 0..good.len() {
        for mask in [0x01, 0x10, 0x20, 0x80, 0xff] {
            let mut bad = good.clone();
            bad[at] ^= mask;
            fs::write(&path, &bad).unwrap();
            match load::open(&sample.dir) {
                Err(_) => {}
                // White space may turn into other white space.
                Ok(snapshot) => assert_eq!(*snapshot.manifest(), sample.manifest, "byte {at} ^ {mask:#x}"),
            }
        }
    }
}

#[test]
fn every_flipped_byte_of_the_state_is_noticed() {
    let sample = Sample::new();
    let good = sample.bytes("state.bin");
    let path = sample.path("state.bin");
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        fs::write(&path, &bad).unwrap();
        assert!(matches!(load::open(&sample.dir), Err(LoadError::StateDigest { .. })), "byte {at}");
        // Without the manifest's word, too.
        assert!(snapshot::state::decode(&bad).is_err(), "byte {at}");
    }
}

#[test]
fn another_format_version_is_named_whatever_else_it_holds() {
    let sample = Sample::new();
    for found in [0, 3, u64::MAX] {
        sample.put("snap.json", json!({ "format_version": found, "layers": [] }).to_string().as_bytes());
        match load::open(&sample.dir) {
            Err(LoadError::UnsupportedVersion { found: named, .. }) => assert_eq!(named, found),
            other => panic!("{other:?}"),
        }
    }
    for not_a_version in [json!({}), json!({ "format_version": "1" }), json!({ "format_version": -1 }), json!([])] {
        sample.put("snap.json", not_a_version.to_string().as_bytes());
        assert!(matches!(load::open(&sample.dir), Err(LoadError::Manifest { .. })));
    }
}

/// All places in a document, as JSON pointers.
fn places(value: &Value, at: &str, out: &mut Vec<String>) {
    out.push(at.to_owned());
    match value {
        Value::Object(map) => map.iter().for_each(|(key, v)| places(v, &format!("{at}/{key}"), out)),
        Value::Array(list) => list.iter().enumerate().for_each(|(i, v)| places(v, &format!("{at}/{i}"), out)),
        _ => {}
    }
}

#[test]
fn an_absent_unknown_or_mistyped_field_is_refused() {
    let sample = Sample::new();
    let good: Value = serde_json::from_slice(&sample.bytes("snap.json")).unwrap();
    let mut all = Vec::new();
    places(&good, "", &mut all);
    assert!(all.len() > 30, "{all:?}");
    for place in &all {
        if good.pointer(place).is_some_and(Value::is_object) {
            sample.put("snap.json", &serde_json::to_vec(&good).unwrap());
            sample.forge(|doc| doc.pointer_mut(place).unwrap()["suprise"] = json!(1));
            assert!(refusal(&sample).contains("unknown field `suprise`"), "{place}");
        }
        // What is absent means the same as `null`.
        let may_be_absent = good.pointer(place).is_none_or(Value::is_null);
        let named = place.rsplit_once('/').filter(|(_, name)| !may_be_absent && name.parse::<u8>().is_err());
        if let Some((parent, name)) = named {
            let mut doc = good.clone();
            doc.pointer_mut(parent).unwrap().as_object_mut().unwrap().remove(name);
            sample.put("snap.json", &serde_json::to_vec(&doc).unwrap());
            refusal(&sample);
        }
        let mut doc = good.clone();
        *doc.pointer_mut(place).unwrap() = json!([[]]);
        sample.put("snap.json", &serde_json::to_vec(&doc).unwrap());
        refusal(&sample);
    }
}

#[test]
fn a_field_given_twice_is_refused() {
    let sample = Sample::new();
    let text = String::from_utf8(sample.bytes("snap.json")).unwrap();
    sample.put("snap.json", text.replacen('{', "{\"arch\": \"x86_64\",", 1).as_bytes());
    assert!(refusal(&sample).contains("duplicate field"));
}

/// Values that a forger with a right digest could try. Each must be refused with a message that names the field.
#[test]
fn a_value_that_no_snapshot_has_is_refused() {
    let (page, size) = (4096u64, memory().len() as u64);
    let cases = [
        ("/vmm_version", json!("1\n2"), "vmm_version"),
        ("/arch", json!("x".repeat(300)), "arch"),
        ("/cpu/vendor", json!("\u{1b}[31m"), "cpu.vendor"),
        ("/cpu/brand", json!("x".repeat(300)), "cpu.brand"),
        ("/host_kernel", json!("\r"), "host_kernel"),
        ("/machine/vcpus", json!(0), "machine.vcpus"),
        ("/devices/network/0/iface_id", json!("a/b"), "devices.network[0].iface_id"),
        ("/devices/network/0/host_dev_name", json!("a\nb"), "devices.network[0].host_dev_name"),
        ("/devices/network/0/tx_rate_limit/ops/size", json!(0), "devices.network[0].tx_rate_limit"),
        ("/devices/entropy/rate_limit/ops/refill_ms", json!(0), "devices.entropy.rate_limit"),
        ("/machine/vcpus", json!(65), "machine.vcpus"),
        ("/machine/vcpus", json!(2), "holds 1 vCPUs and the manifest says 2"),
        ("/machine/memory_bytes", json!(size + page), "machine.memory_bytes"),
        ("/memory/file", json!("../mem.bin"), "memory.file"),
        ("/memory/file", json!("/etc/passwd"), "memory.file"),
        ("/memory/file", json!(".."), "memory.file"),
        ("/memory/file", json!(""), "memory.file"),
        ("/memory/file", json!("a\u{0}b"), "memory.file"),
        ("/memory/file", json!("state.bin"), "different files"),
        ("/memory/digests", json!("disk-root.map"), "different files"),
        ("/memory/file", json!("other.bin"), "other.bin is missing"),
        ("/memory/size_bytes", json!(0), "memory"),
        ("/memory/size_bytes", json!(u64::MAX), "memory"),
        ("/memory/regions", json!([]), "memory.regions"),
        ("/memory/regions/0/guest_addr", json!(1), "regions[0].guest_addr"),
        ("/memory/regions/0/guest_addr", json!(u64::MAX - 4095), "regions[0].size_bytes"),
        ("/memory/regions/0/size_bytes", json!(page), "memory.regions"),
        ("/memory/regions/0/size_bytes", json!(size - 1), "regions[0].size_bytes"),
        ("/memory/regions/0/size_bytes", json!(0), "regions[0].size_bytes"),
        ("/memory/regions/0/offset", json!(page), "regions[0].offset"),
        ("/memory/chunk_bytes", json!(4096), "memory.chunk_bytes"),
        ("/memory/digests", json!("x/mem.b3"), "memory.digests"),
        ("/memory/root", json!("AB"), "memory.root"),
        ("/state/file", json!("a/../state.bin"), "state.file"),
        ("/state/size_bytes", json!(9 << 20), "state.size_bytes"),
        ("/state/size_bytes", json!(17), "should have 17"),
        ("/state/digest", json!("0".repeat(63)), "state.digest"),
        ("/state/digest", json!("0".repeat(64)), "belongs to another snapshot"),
        ("/devices/vsock/guest_cid", json!(2), "guest_cid"),
        ("/devices/vsock/guest_cid", json!(u32::MAX), "guest_cid"),
        ("/devices/vsock/uds_path", json!(""), "uds_path"),
        ("/devices/balloon/amount_mib", json!(1 << 20), "devices.balloon.amount_mib"),
        ("/devices/balloon/stats_polling_interval_s", json!(65536), "65536"),
        ("/devices/drives/0/drive_id", json!("a/b"), "drives[0].drive_id"),
        ("/devices/drives/0/drive_id", json!("data"), "held.file"),
        ("/devices/drives/1/drive_id", json!("root"), "drives[1].drive_id"),
        ("/devices/drives/1/drive_id", json!("other"), "other disks"),
        ("/devices/drives/0/partuuid", json!("a\nb"), "drives[0].partuuid"),
        ("/devices/drives/0/cache_type", json!("none"), "unknown variant"),
        ("/devices/drives/1/rate_limit/bandwidth/size", json!(0), "drives[1].rate_limit"),
        ("/devices/drives/0/size_bytes", json!(0), "drives[0].size_bytes"),
        ("/devices/drives/0/size_bytes", json!(1000), "drives[0].size_bytes"),
        ("/devices/drives/0/size_bytes", json!(u64::MAX - 511), "drives[0].size_bytes"),
        ("/devices/drives/0/size_bytes", json!(512 * 1000), "disk-root.img has"),
        ("/devices/drives/0/held", json!(null), "drives[0].held"),
        ("/devices/drives/0/is_read_only", json!(true), "drives[0].held"),
        ("/devices/drives/0/max_overlay_mib", json!(0), "drives[0].max_overlay_mib"),
        ("/devices/drives/1/max_overlay_mib", json!(5), "drives[1].max_overlay_mib"),
        ("/devices/drives/1/image", json!(null), "drives[1].image"),
        ("/devices/drives/0/image/path", json!(""), "drives[0].image.path"),
        ("/devices/drives/0/held/file", json!("mem.bin"), "held.file"),
        ("/devices/drives/0/held/map", json!("../disk-root.map"), "held.map"),
        ("/devices/drives/0/held/map_bytes", json!(1u64 << 40), "held.map_bytes"),
        ("/devices/drives/0/held/data_bytes", json!(1u64 << 40), "held.data_bytes"),
        ("/devices/drives/0/held/digest", json!("AB"), "held.digest"),
        ("/devices/drives/0/held/map_digest", json!(""), "held.map_digest"),
        ("/readiness", json!("nearly"), "unknown variant"),
    ];
    for (place, value, expected) in cases {
        let sample = Sample::new();
        sample.forge(|doc| *doc.pointer_mut(place).unwrap() = value.clone());
        let message = refusal(&sample);
        assert!(message.contains(expected), "{place} = {value}: {message}");
        assert!(!message.contains('\n'), "{place} = {value}: {message:?}");
    }
}

#[test]
fn regions_that_overlap_or_leave_gaps_are_refused() {
    let region = |guest_addr: u64, size_bytes: usize, offset: usize| json!({ "guest_addr": guest_addr, "size_bytes": size_bytes, "offset": offset });
    let size = memory().len();
    let half = 2 * CHUNK;
    for (second, good) in [
        (region(0x1_0000_0000, size - half, half), true),
        (region(half as u64 - 4096, size - half, half), false),
        (region(0x1_0000_0000, size - half, half + PAGE), false),
        (region(0x1_0000_0000, size - half, half - PAGE), false),
        (region(0x1_0000_0000, size - half + PAGE, half), false),
    ] {
        let sample = Sample::new();
        sample.forge(|doc| doc["memory"]["regions"] = json!([region(0, half, 0), second]));
        assert_eq!(load::open(&sample.dir).is_ok(), good, "{second}");
    }
}

#[test]
fn an_edit_without_the_digest_is_noticed() {
    let sample = Sample::new();
    let text = String::from_utf8(sample.bytes("snap.json")).unwrap();
    sample.put("snap.json", text.replace("Some CPU", "Some GPU").as_bytes());
    assert!(matches!(load::open(&sample.dir), Err(LoadError::ManifestDigest { .. })));
}

#[test]
fn layout_of_the_manifest_does_not_matter() {
    let sample = Sample::new();
    // serde_json::Value sorts the fields by name.
    let value: Value = serde_json::from_slice(&sample.bytes("snap.json")).unwrap();
    sample.put("snap.json", value.to_string().as_bytes());
    load::open(&sample.dir).unwrap();
}

#[test]
fn state_of_another_snapshot_is_refused() {
    let sample = Sample::new();
    let other = Sample::of(&memory(), &state(2));
    sample.put("state.bin", &other.bytes("state.bin"));
    assert!(refusal(&sample).contains("state.bin"));
    // With the digest of the intruder in the manifest, its number of vCPUs gives it away.
    let state = other.manifest.state.clone();
    sample.forge(|doc| doc["state"] = serde_json::to_value(&state).unwrap());
    assert!(matches!(load::open(&sample.dir), Err(LoadError::VcpuCount { found: 2, expected: 1, .. })));
}
