//! Memory that is packed, and unpacked again.
#![allow(missing_docs)]

mod common;

use common::*;
use proptest::prelude::*;
use snapshot::create::Stored;
use snapshot::image::{Basis, ImageError, MemoryImage, TrustedMemory, ensure_trusted};
use snapshot::load;
use snapshot::page_runs::PageRuns;
use snapshot::tools::store::{Form, flatten, pack, write_diff};
use snapshot::verify::{VerifyError, verify};
use snapshot::working_set::{Used, WorkingSet};
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

/// Asserts that two snapshots are of one machine at one instant, disks included, in other files.
fn assert_same(a: &Path, b: &Path) {
    let [left, right] = [a, b].map(|dir| load::open(dir).unwrap().manifest().clone());
    assert_eq!(left.memory.root, right.memory.root);
    assert_eq!((left.created_unix_ms, &left.devices), (right.created_unix_ms, &right.devices));
    for name in ["state.bin", "mem.b3", "disk-root.map", "disk-root.img"] {
        assert!(fs::read(a.join(name)).unwrap() == fs::read(b.join(name)).unwrap(), "{name}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn any_memory_and_any_chain_is_packed_and_unpacked(
        mut memory in any_memory(),
        steps in prop::collection::vec(prop::collection::vec((any::<prop::sample::Index>(), 0u8..3), 0..12), 0..3),
    ) {
        let sample = Sample::of(&memory, &state(1));
        let (root, pages) = (sample.root.path(), memory.len() / PAGE);
        let mut top = sample.dir.clone();
        for (level, changed) in steps.iter().enumerate() {
            let changed: Vec<_> = changed.iter().map(|(page, fill)| (page.index(pages), *fill)).collect();
            for (page, fill) in &changed {
                memory[page * PAGE..][..PAGE].fill(*fill);
            }
            let changes = Changes::new(memory.clone(), changed.iter().map(|(page, _)| *page));
            let next = root.join(format!("level-{level}"));
            create_over(&top, &next, &changes, Stored::Changes).unwrap();
            top = next;
        }
        let packed = root.join("packed");
        let written = pack(&top, &packed, &job()).unwrap();
        prop_assert_eq!((written.format_version, written.parent.is_some()), (2, !steps.is_empty()));
        let length = fs::metadata(packed.join("mem.pack")).unwrap().len();
        prop_assert_eq!(written.image_bytes, length);
        // Over each other in any order: packed over raw, raw over packed, packed over packed.
        let (over, packed_over) = (root.join("over"), root.join("packed-over"));
        write_diff(&packed, &sample.dir, &over, Form::Raw, &job()).unwrap();
        prop_assert!(read_all(&image(&over)) == read_all(&image(&sample.dir)));
        write_diff(&over, &top, &packed_over, Form::Packed, &job()).unwrap();
        let alone = root.join("alone");
        flatten(&packed_over, &alone, Form::Packed, &job()).unwrap();
        for dir in [&packed, &packed_over, &alone] {
            assert_same(&top, dir);
            prop_assert!(read_all(&image(dir)) == memory);
            verify(dir).unwrap();
            let trust = ensure_trusted(&load::open(dir).unwrap()).unwrap();
            prop_assert!(matches!((trust.memory, trust.basis), (TrustedMemory::Image(_), Basis::WhenRead)));
            let raw = root.join("raw");
            let written = flatten(dir, &raw, Form::Raw, &job()).unwrap();
            prop_assert_eq!((written.format_version, written.parent), (1, None));
            prop_assert!(fs::read(raw.join("mem.bin")).unwrap() == memory);
            assert_same(&top, &raw);
            fs::remove_dir_all(raw).unwrap();
        }
    }
}

#[test]
fn equal_chunks_are_stored_once_and_zero_ones_not_at_all() {
    let sample = Sample::of(&varied_memory(), &state(1));
    let packed = sample.root.path().join("packed");
    pack(&sample.dir, &packed, &job()).unwrap();
    assert!(read_all(&image(&packed)) == varied_memory());
    let (table, length) = (64 + 13 * 16, fs::metadata(packed.join("mem.pack")).unwrap().len());
    // Two chunks that cannot be compressed, and little for the others.
    assert!((2 * CHUNK as u64..2 * CHUNK as u64 + 20_000).contains(&(length - table)), "{length}");
    let entries = entries(&packed);
    assert_eq!(entries[0], entries[3]);
    assert_eq!(entries[0], entries[7]);
    assert_eq!(entries[4], (0, 0, 0));
    assert_eq!([1, 9].map(|chunk| (entries[chunk].1, entries[chunk].2)), [(0, 2); 2], "as they are");
    assert!([0, 2, 5, 12].iter().all(|chunk| entries[*chunk].2 == 3 && entries[*chunk].1 > 0));
}

/// Offset, length and kind of each entry of the table.
fn entries(dir: &Path) -> Vec<(u64, u32, u8)> {
    let bytes = fs::read(dir.join("mem.pack")).unwrap();
    let count = u64::from_le_bytes(bytes[24..32].try_into().unwrap()) as usize;
    let entry = |at: usize| {
        let bytes = &bytes[64 + at * 16..][..16];
        let (offset, stored) = (bytes[..8].try_into().unwrap(), bytes[8..12].try_into().unwrap());
        (u64::from_le_bytes(offset), u32::from_le_bytes(stored), bytes[12])
    };
    (0..count).map(entry).collect()
}

#[test]
fn what_clones_use_comes_first_and_is_carried_along() {
    let sample = Sample::of(&varied_memory(), &state(1));
    let snapshot = load::open(&sample.dir).unwrap();
    let mut set = WorkingSet::of(&snapshot);
    // Chunk 8, chunk 7 (which is chunk 0 as well), the zero one, and the last.
    let used = Used { read: PageRuns::of_pages([8 * 16 + 3, 7 * 16, 4 * 16]), written: PageRuns::of_pages([12 * 16]) };
    set.merge(&used);
    set.save(&snapshot).unwrap();
    let packed = sample.root.path().join("packed");
    assert!(pack(&sample.dir, &packed, &job()).unwrap().working_set);
    let carried = WorkingSet::load(&load::open(&packed).unwrap()).unwrap().unwrap();
    assert_eq!((carried.read(), carried.written(), carried.clones), (set.read(), set.written(), 1));
    let entries = entries(&packed);
    let mut order: Vec<(u64, usize)> =
        entries.iter().enumerate().filter(|(_, entry)| entry.2 > 1).map(|(chunk, entry)| (entry.0, chunk)).collect();
    order.sort_unstable();
    order.dedup_by_key(|(offset, _)| *offset);
    let first: Vec<usize> = order.iter().map(|(_, chunk)| *chunk).collect();
    assert_eq!(first, [0, 8, 12, 1, 2, 5, 6, 9, 10], "0 is the first name of chunk 7");
    assert_eq!(order[0].0, 64 + 13 * 16, "right behind the table");
    assert_eq!(image(&packed).hot_bytes(), order[3].0 - order[0].0);
    // It is carried further, and one that is damaged is not.
    assert!(flatten(&packed, &sample.root.path().join("raw"), Form::Raw, &job()).unwrap().working_set);
    sample.put("working-set.json", b"{}");
    let written = pack(&sample.dir, &sample.root.path().join("plain"), &job()).unwrap();
    assert!(!written.working_set);
}

#[test]
fn packing_gives_the_same_bytes_each_time() {
    let sample = Sample::of(&varied_memory(), &state(1));
    let [a, b] = ["a", "b"].map(|name| sample.root.path().join(name));
    pack(&sample.dir, &a, &job()).unwrap();
    pack(&sample.dir, &b, &job()).unwrap();
    for name in names(&a).iter().filter(|name| !name.ends_with(".stamp")) {
        assert!(fs::read(a.join(name)).unwrap() == fs::read(b.join(name)).unwrap(), "{name}");
    }
}

#[test]
fn memory_that_is_hardly_in_use_is_a_tenth_as_long_at_most() {
    let mut memory = vec![0; 128 << 20];
    // 8 MiB of which half looks like noise.
    let used = varied_memory();
    for (piece, to) in memory.chunks_mut(16 << 20).enumerate() {
        to[..CHUNK].copy_from_slice(&used[..CHUNK]);
        for (at, byte) in to[CHUNK..1 << 20].iter_mut().enumerate() {
            *byte = if at % 2 == 0 { used[CHUNK + at % CHUNK] ^ piece as u8 } else { (at / 4096) as u8 };
        }
    }
    let sample = Sample::of(&memory, &state(1));
    let packed = sample.root.path().join("packed");
    let written = pack(&sample.dir, &packed, &job()).unwrap();
    assert!(written.image_bytes * 10 <= memory.len() as u64, "{}", written.image_bytes);
    assert!(written.image_bytes < 8 << 20, "{}", written.image_bytes);
    assert_eq!(written.root, sample.manifest.memory.root);
}

/// Writes a byte of a file, whatever its mode.
fn write_byte(path: &Path, at: u64, change: impl Fn(u8) -> u8) {
    fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[change(byte[0])], at).unwrap();
}

#[test]
fn every_changed_byte_of_the_index_is_noticed() {
    let sample = Sample::of(&varied_memory(), &state(1));
    let packed = sample.root.path().join("packed");
    pack(&sample.dir, &packed, &job()).unwrap();
    let path = packed.join("mem.pack");
    for at in 0..64 + 13 * 16 {
        for mask in [1, 0x80] {
            write_byte(&path, at, |byte| byte ^ mask);
            let snapshot = load::open(&packed).unwrap();
            let refused = MemoryImage::open(&snapshot).unwrap_err();
            assert!(matches!(refused, ImageError::IndexDigest { .. }), "{at}: {refused}");
            assert!(verify(&packed).is_err() && ensure_trusted(&snapshot).is_err(), "{at}");
            write_byte(&path, at, |byte| byte ^ mask);
        }
    }
    verify(&packed).unwrap();
}

#[test]
fn a_flipped_bit_anywhere_is_found() {
    let sample = Sample::of(&varied_memory(), &state(1));
    let root = sample.root.path();
    let mut memory = varied_memory();
    memory[5 * PAGE..6 * PAGE].fill(9);
    let changes = Changes::new(memory.clone(), [5]);
    create_over(&sample.dir, &root.join("changes"), &changes, Stored::Changes).unwrap();
    pack(&sample.dir, &root.join("packed"), &job()).unwrap();
    let mut seed = 7u64;
    let mut random = |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    for dir in ["packed", "changes"].map(|name| root.join(name)) {
        let whole = load::open(&dir).unwrap().manifest().clone();
        for name in names(&dir).iter().filter(|name| !name.ends_with(".stamp")) {
            let path = dir.join(name);
            let len = fs::metadata(&path).unwrap().len();
            let mut harmless = 0;
            for _ in 0..200 {
                let (at, bit) = match name.as_str() {
                    // Nothing else of a disk's file means anything, nor of that of changes.
                    "disk-root.img" => (2 * 4096 + random(8 * 4096), random(8)),
                    "mem.bin" => (5 * 4096 + random(4096), random(8)),
                    _ => (random(len), random(8)),
                };
                write_byte(&path, at, |byte| byte ^ 1 << bit);
                if verify(&dir).is_ok() {
                    // White space of the manifest: what is read is the same.
                    harmless += 1;
                    let snapshot = load::open(&dir).unwrap();
                    assert_eq!(*snapshot.manifest(), whole, "{path:?} {at:#x}.{bit}");
                    assert!(name == "snap.json", "{path:?} {at:#x}.{bit}");
                }
                write_byte(&path, at, |byte| byte ^ 1 << bit);
            }
            assert!(harmless <= 60, "{name}: {harmless}");
        }
        verify(&dir).unwrap();
    }
}

/// Snapshots of format version 2 as they were once written (by the example `write_golden`). They must load as long as
/// version 2 is read.
#[test]
fn old_packed_snapshots_and_chains_still_load() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v2");
    let mut changed = memory();
    changed[PAGE..2 * PAGE].fill(7);
    changed[16 * PAGE..17 * PAGE].fill(0);
    changed[33 * PAGE..34 * PAGE].fill(3);
    for (name, version, expected) in
        [("base", 1, memory()), ("packed", 2, memory()), ("diff", 2, changed.clone()), ("packed-diff", 2, changed)]
    {
        let snapshot = load::open(&golden.join(name)).unwrap();
        assert_eq!((snapshot.manifest().format_version, snapshot.state()), (version, &state(1)), "{name}");
        assert!(read_all(&MemoryImage::open(&snapshot).unwrap()) == expected, "{name}");
    }
    let packed = load::open(&golden.join("packed")).unwrap();
    assert_eq!(WorkingSet::load(&packed).unwrap().unwrap().read().runs(), [0..2, 32..34]);
    assert!(MemoryImage::open(&packed).unwrap().hot_bytes() > 0);
}

#[test]
fn a_packed_image_that_claims_more_than_is_there_is_not_read_through() {
    let sample = Sample::of(&varied_memory(), &state(1));
    let packed = sample.root.path().join("packed");
    pack(&sample.dir, &packed, &job()).unwrap();
    verify(&packed).unwrap();
    let path = packed.join("mem.pack");
    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    let (data, end) = (snapshot::packed::index_bytes(varied_memory().len() as u64), file.metadata().unwrap().len());
    file.set_len(data).unwrap();
    file.set_len(end).unwrap();
    match verify(&packed) {
        Err(VerifyError::Damaged { first: ImageError::PackedHole { offset, .. }, .. }) => {
            // The block that the index ends in is there.
            assert!((data..data + CHUNK as u64).contains(&offset), "{offset}");
        }
        other => panic!("{other:?}"),
    }
}
