//! What is written comes back.
#![allow(missing_docs)]

mod common;

use common::*;
use proptest::prelude::*;
use snapshot::image::{Basis, MemoryImage, TrustedMemory, ensure_trusted};
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
}
