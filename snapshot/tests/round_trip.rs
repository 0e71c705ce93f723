//! What is written comes back.
#![allow(missing_docs)]

mod common;

use common::*;
use proptest::prelude::*;
use serde_json::json;
use snapshot::compat::{self, Field, Host, HostTsc, Report};
use snapshot::cpu::GuestCpu;
use snapshot::create::Facts;
use snapshot::image::{Basis, MemoryImage, TrustedMemory, ensure_trusted};
use snapshot::manifest::{Devices, MemoryRegion};
use snapshot::state::CpuidEntry;
use snapshot::{load, verify};
use std::os::unix::fs::FileExt;

#[test]
fn everything_comes_back() {
    let sample = Sample::of(&memory(), &state(4));
    for path in [sample.dir.clone(), sample.path("snap.json")] {
        let snapshot = load::open(&path).unwrap();
        assert_eq!(*snapshot.manifest(), sample.manifest);
        assert_eq!(*snapshot.state(), state(4));
        assert_eq!(snapshot.dir(), sample.dir);
        let image = MemoryImage::open(&snapshot).unwrap();
        assert_eq!(image.root(), sample.manifest.memory.root);
        assert_eq!(read_all(&image), memory());
        let zero: Vec<bool> = (0..5).map(|i| image.chunk_is_zero(i)).collect();
        assert_eq!(zero, [false, false, true, false, false]);
        assert_eq!(snapshot.into_state(), state(4));
    }
    let report = verify::verify(&sample.dir).unwrap();
    assert_eq!((report.chunks, report.zero_chunks, report.vcpus), (5, 1, 4));
}

#[test]
fn a_rehearsal_reads_what_a_snapshot_would_say() {
    let regions = vec![MemoryRegion { guest_addr: 0, size_bytes: 1 << 20, offset: 0 }];
    let facts =
        Facts { vmm_version: "0.1.0".into(), host: host(), devices: Devices::default(), readiness: None, config: None };
    let mut machine = state(2);
    machine.devices.drives.clear();
    let (manifest, read) = load::rehearse(facts, regions.clone(), &machine).unwrap();
    assert_eq!((manifest.memory.regions, manifest.host_kernel), (regions, host().kernel));
    assert_eq!(read, machine);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_memory_comes_back(memory in any_memory()) {
        let sample = Sample::of(&memory, &state(1));
        let snapshot = load::open(&sample.dir).unwrap();
        prop_assert_eq!(read_all(&MemoryImage::open(&snapshot).unwrap()), memory.clone());
        prop_assert!(std::fs::read(sample.path("mem.bin")).unwrap() == memory);
        verify::verify(&sample.dir).unwrap();
    }
}

#[test]
fn a_new_snapshot_is_trusted_by_its_stamp() {
    let sample = Sample::new();
    let trust = ensure_trusted(&load::open(&sample.dir).unwrap()).unwrap();
    assert_eq!(trust.basis, Basis::Stamp);
    let mut first = [0; 16];
    let TrustedMemory::Files(files) = trust.memory else { panic!("it is not packed") };
    files[0].file.read_exact_at(&mut first, 0).unwrap();
    assert_eq!(files.len(), 1);
    assert_eq!(first, memory()[..16]);
}

/// A snapshot of format version 1 as it was once written (by the example `write_golden`). It must load as long as
/// version 1 is read.
#[test]
fn an_old_snapshot_still_loads() {
    let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1");
    let snapshot = load::open(&golden).unwrap();
    assert_eq!(*snapshot.state(), state(2));
    assert_eq!(read_all(&MemoryImage::open(&snapshot).unwrap()), memory());
    // Of its CPU it says no more than the vendor.
    assert_eq!((snapshot.manifest().format_version, &snapshot.manifest().guest_cpu), (1, &None));
    let like = Host { facts: host(), page_bytes: 4096, cpuid: Vec::new(), tsc: HostTsc::default() };
    assert!(Report::of(&snapshot, &like).fits);
    let mut other = like.clone();
    other.facts.cpu.vendor = "GenuineIntel".into();
    let mismatch = compat::check(snapshot.manifest(), snapshot.state(), &other, &[]).unwrap_err();
    assert_eq!(mismatch.0.field, Field::Vendor);
}

/// Of a guest that has a CPU, its manifest tells of it. One that has none is written as ever.
#[test]
fn the_cpu_of_a_guest_is_in_its_manifest() {
    assert_eq!(Sample::new().manifest.format_version, 1);
    let mut state = state(2);
    let leaf = CpuidEntry { function: 7, ebx: 1 << 5 | 1 << 16, ..CpuidEntry::default() };
    state.vcpus[0].cpuid = vec![leaf];
    let sample = Sample::of(&memory(), &state);
    let manifest = load::open(&sample.dir).unwrap().manifest().clone();
    let features = ["avx2", "avx512f"].map(str::to_owned).to_vec();
    assert_eq!(manifest.guest_cpu, Some(GuestCpu { features, xsave_bytes: 576, tsc_khz: 2_450_000 }));
    assert_eq!(manifest.format_version, 2);
    // Tools may know more names, and may leave it out; but nobody may claim what is not so.
    sample.forge(|doc| doc["guest_cpu"]["features"] = json!(["avx2", "quantum"]));
    load::open(&sample.dir).unwrap();
    for (field, value, expected) in [
        ("features", json!(["avx", "avx2"]), "guest_cpu.features has avx, which"),
        ("features", json!(["avx2", "avx"]), "`guest_cpu.features` must be"),
        ("features", json!(["a\nb"]), "`guest_cpu.features` must be"),
        ("xsave_bytes", json!(600), "guest_cpu.xsave_bytes is 600, not 576"),
        ("tsc_khz", json!(1), "guest_cpu.tsc_khz is 1, not 2450000"),
        ("model", json!(1), "unknown field `model`"),
    ] {
        let sample = Sample::of(&memory(), &state);
        sample.forge(|doc| doc["guest_cpu"][field] = value.clone());
        let message = load::open(&sample.dir).expect_err(field).to_string();
        assert!(message.contains(expected) && !message.contains('\n'), "{field}: {message}");
    }
    let sample = Sample::of(&memory(), &state);
    sample.forge(|doc| doc["format_version"] = json!(1));
    let message = load::open(&sample.dir).unwrap_err().to_string();
    assert!(message.contains("there are fields of version 2"), "{message}");
}
