//! Snapshots that lie over others.
#![allow(missing_docs)]

mod common;

use common::*;
use proptest::prelude::*;
use snapshot::clusters::{Cluster, Clusters};
use snapshot::compat::{Host, HostTsc, MemoryPlace, Report};
use snapshot::create::{Base, BaseError, CreateError, Staging, Stored};
use snapshot::image::{Basis, ImageError, MemoryImage, TrustedMemory, ensure_trusted};
use snapshot::load::{self, LoadError, MAX_LEVELS};
use snapshot::manifest::Manifest;
use snapshot::verify::{VerifyError, verify};
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

/// Writes a snapshot of a memory in which some pages have changed; `said` more pages are said to have.
fn next(dir: &Path, from: &str, to: &str, memory: &mut [u8], changed: &[(usize, u8)], said: &[usize]) -> Manifest {
    for (page, fill) in changed {
        memory[page * PAGE..][..PAGE].fill(*fill);
    }
    let pages = changed.iter().map(|(page, _)| *page).chain(said.iter().copied());
    create_over(&dir.join(from), &dir.join(to), &Changes::new(memory.to_vec(), pages), Stored::Changes).unwrap()
}

/// What the kernel would show of the files of a chain.
fn mapped(dir: &Path) -> Vec<u8> {
    let trust = ensure_trusted(&load::open(dir).unwrap()).unwrap();
    let TrustedMemory::Files(files) = trust.memory else { panic!("nothing is packed") };
    let mut memory = Vec::new();
    for layer in files.iter().rev() {
        let len = layer.file.metadata().unwrap().len() as usize;
        memory.resize(len, 0);
        match &layer.pages {
            None => layer.file.read_exact_at(&mut memory, 0).unwrap(),
            Some(pages) => {
                for (run, state) in pages.runs(0..pages.count()) {
                    let bytes = &mut memory[run.start as usize * PAGE..run.end as usize * PAGE];
                    match state {
                        snapshot::clusters::Cluster::Absent => {}
                        snapshot::clusters::Cluster::Zero => bytes.fill(0),
                        snapshot::clusters::Cluster::Data => {
                            layer.file.read_exact_at(bytes, run.start * PAGE as u64).unwrap();
                        }
                    }
                }
            }
        }
    }
    memory
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_chain_is_what_was_written(
        mut memory in any_memory(),
        steps in prop::collection::vec(
            (prop::collection::vec((any::<prop::sample::Index>(), 0u8..3), 0..12), prop::collection::vec(any::<prop::sample::Index>(), 0..6)),
            1..5,
        ),
    ) {
        let root = tempfile::tempdir().unwrap();
        let pages = memory.len() / PAGE;
        create_at(&root.path().join("0"), &memory, &state(1)).unwrap();
        for (level, (changed, said)) in steps.iter().enumerate() {
            let changed: Vec<_> = changed.iter().map(|(page, fill)| (page.index(pages), *fill)).collect();
            let said: Vec<_> = said.iter().map(|page| page.index(pages)).collect();
            let manifest = next(root.path(), &level.to_string(), &(level + 1).to_string(), &mut memory, &changed, &said);
            let dir = root.path().join((level + 1).to_string());
            prop_assert_eq!(manifest.format_version, 2);
            prop_assert!(read_all(&image(&dir)) == memory);
            prop_assert!(mapped(&dir) == memory);
            let held = fs::metadata(dir.join("mem.bin")).unwrap();
            prop_assert_eq!(held.len(), memory.len() as u64);
            // The root names the memory, however it is stored.
            let alone = root.path().join(format!("alone-{level}"));
            prop_assert_eq!(create_at(&alone, &memory, &state(1)).unwrap().memory.root, manifest.memory.root.clone());
            let whole = root.path().join(format!("whole-{level}"));
            let changes = Changes::new(memory.clone(), 0..0);
            let flat = create_over(&dir, &whole, &changes, Stored::Whole).unwrap();
            prop_assert_eq!((flat.format_version, &flat.memory.root), (1, &manifest.memory.root));
            prop_assert!(fs::read(whole.join("mem.bin")).unwrap() == memory);
        }
        let report = verify(&root.path().join(steps.len().to_string())).unwrap();
        prop_assert_eq!(report.levels, steps.len() as u64 + 1);
    }
}

#[test]
fn what_has_not_changed_is_not_stored() {
    let sample = Sample::new();
    let mut memory = memory();
    let root = sample.root.path();
    // A page that is as it was, one in a hole, one that became zero, one that became another, and the last.
    let last = memory.len() / PAGE - 1;
    let changed = [(33, 7), (1, 0), (2, 9), (last, 5)];
    next(root, "snap", "child", &mut memory, &changed, &[0, 3, 40]);
    let trust = ensure_trusted(&load::open(&root.join("child")).unwrap()).unwrap();
    assert_eq!(trust.basis, Basis::Stamp, "nothing is read to restore it");
    let TrustedMemory::Files(files) = trust.memory else { panic!("nothing is packed") };
    let pages = files[0].pages.as_ref().unwrap();
    let held: Vec<u64> =
        (0..pages.count()).filter(|page| pages.get(*page) != snapshot::clusters::Cluster::Absent).collect();
    assert_eq!((held, pages.data()), (vec![1, 2, 33, last as u64], 3));
}

#[test]
fn a_chain_moves_as_a_whole_and_is_refused_without_its_parts() {
    let sample = Sample::new();
    let (root, mut memory) = (sample.root.path(), memory());
    next(root, "snap", "middle", &mut memory, &[(0, 1)], &[]);
    next(root, "middle", "top", &mut memory, &[(1, 2)], &[]);
    let elsewhere = root.join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    for name in ["snap", "middle", "top"] {
        fs::rename(root.join(name), elsewhere.join(name)).unwrap();
    }
    assert!(read_all(&image(&elsewhere.join("top"))) == memory);
    // One in the middle is gone.
    fs::rename(elsewhere.join("middle"), elsewhere.join("away")).unwrap();
    let refused = load::open(&elsewhere.join("top")).unwrap_err();
    assert!(matches!(&refused, LoadError::Parent { .. }), "{refused}");
    assert!(refused.to_string().contains("middle"), "{refused}");
    // Another is in its place.
    create_at(&elsewhere.join("middle"), &memory, &state(1)).unwrap();
    let refused = load::open(&elsewhere.join("top")).unwrap_err();
    assert!(matches!(&refused, LoadError::OtherParent { .. }), "{refused}");
    // One has lost its memory.
    fs::remove_dir_all(elsewhere.join("middle")).unwrap();
    fs::rename(elsewhere.join("away"), elsewhere.join("middle")).unwrap();
    fs::remove_file(elsewhere.join("snap/mem.bin")).unwrap();
    let refused = load::open(&elsewhere.join("top")).unwrap_err().to_string();
    assert!(refused.contains("mem.bin") && refused.contains("missing"), "{refused}");
}

/// Flips a bit of a file.
fn flip(path: &Path, at: u64) {
    // The kernel's clock for files may tick as slowly as every 10 ms.
    std::thread::sleep(std::time::Duration::from_millis(25));
    fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
}

#[test]
fn damage_is_found_in_every_level_and_named() {
    for (level, at) in [("snap", CHUNK as u64 + 7), ("middle", 5), ("top", PAGE as u64 + 5)] {
        let sample = Sample::new();
        let (root, mut memory) = (sample.root.path(), memory());
        next(root, "snap", "middle", &mut memory, &[(0, 1)], &[]);
        next(root, "middle", "top", &mut memory, &[(1, 2)], &[]);
        flip(&root.join(level).join("mem.bin"), at);
        let damaged = verify(&root.join("top")).unwrap_err();
        let message = damaged.to_string();
        assert!(matches!(damaged, VerifyError::Damaged { damaged: 1.., .. }), "{message}");
        assert!(message.contains(&format!("{level}/mem.bin")), "{message}");
        let refused = ensure_trusted(&load::open(&root.join("top")).unwrap()).unwrap_err();
        assert!(matches!(refused, ImageError::Damaged { .. }), "{refused}");
        let mut buf = vec![0; CHUNK];
        assert!(image(&root.join("top")).read_chunk(at / CHUNK as u64, &mut buf).is_err());
    }
    // What no level above it shows is damaged only for those that show it.
    let sample = Sample::new();
    let (root, mut memory) = (sample.root.path(), memory());
    next(root, "snap", "top", &mut memory, &[(0, 1)], &[]);
    flip(&root.join("snap/mem.bin"), 5);
    assert!(read_all(&image(&root.join("top"))) == memory);
    assert!(verify(&root.join("top")).is_err());
}

#[test]
fn a_damaged_map_is_refused() {
    let sample = Sample::new();
    let (root, mut memory) = (sample.root.path(), memory());
    next(root, "snap", "top", &mut memory, &[(0, 1)], &[]);
    for at in [0, 8, 100] {
        flip(&root.join("top/mem.map"), at);
        let snapshot = load::open(&root.join("top")).unwrap();
        assert!(matches!(MemoryImage::open(&snapshot), Err(ImageError::MapDigest { .. })));
        assert!(matches!(ensure_trusted(&snapshot), Err(ImageError::MapDigest { .. })));
        flip(&root.join("top/mem.map"), at);
    }
    File::options().write(true).open(root.join("top/mem.map")).unwrap().set_len(1).unwrap();
    assert!(load::open(&root.join("top")).unwrap_err().to_string().contains("mem.map"));
    fs::remove_file(root.join("top/mem.map")).unwrap();
    assert!(load::open(&root.join("top")).unwrap_err().to_string().contains("mem.map"));
}

#[test]
fn a_parent_knows_its_children() {
    let sample = Sample::new();
    let (root, mut memory) = (sample.root.path(), memory());
    next(root, "snap", "child", &mut memory, &[(0, 1)], &[]);
    let notes: Vec<String> = names(&sample.dir).into_iter().filter(|name| name.starts_with("child-")).collect();
    assert_eq!(notes.len(), 1);
    let note = fs::read_to_string(sample.path(&notes[0])).unwrap();
    assert_eq!(sample.dir.join(note).canonicalize().unwrap(), root.join("child").canonicalize().unwrap());
    // One that is being removed gets no more of them.
    let dir = File::open(&sample.dir).unwrap();
    rustix::fs::flock(&dir, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let changes = Changes::new(memory.clone(), [0]);
    let refused = create_over(&sample.dir, &root.join("late"), &changes, Stored::Changes).unwrap_err();
    assert!(matches!(refused, CreateError::BaseRemoved { .. }), "{refused}");
    create_over(&sample.dir, &root.join("alone"), &changes, Stored::Whole).unwrap();
    // And one that is gone.
    drop(dir);
    let base = Base::open(&load::open(&sample.dir).unwrap()).unwrap();
    let mut staging = Staging::begin(&root.join("later")).unwrap();
    let digest = staging.write_changes(&base, &changes, Stored::Changes, &NEVER).unwrap();
    fs::remove_file(sample.path("snap.json")).unwrap();
    let facts = facts(&mut staging);
    assert!(matches!(staging.commit(digest, facts, &state(1)), Err(CreateError::BaseRemoved { .. })));
    assert!(!root.join("later").exists());
}

#[test]
fn a_chain_has_an_end() {
    let root = tempfile::tempdir().unwrap();
    let mut memory = vec![1; 4 * PAGE];
    create_at(&root.path().join("0"), &memory, &state(1)).unwrap();
    for level in 1..MAX_LEVELS {
        next(root.path(), &(level - 1).to_string(), &level.to_string(), &mut memory, &[(level % 4, level as u8)], &[]);
    }
    let top = root.path().join((MAX_LEVELS - 1).to_string());
    assert!(read_all(&image(&top)) == memory);
    let base = Base::open(&load::open(&top).unwrap()).unwrap();
    assert!(matches!(base.can_be_parent(), Err(BaseError::TooDeep { .. })));
    // Written all the same, it is refused.
    next(root.path(), &(MAX_LEVELS - 1).to_string(), "beyond", &mut memory, &[(0, 7)], &[]);
    assert!(matches!(load::open(&root.path().join("beyond")), Err(LoadError::TooDeep { .. })));
}

#[test]
fn a_snapshot_that_is_in_use_is_known_to_be_so_with_all_that_it_lies_over() {
    use rustix::fs::{FlockOperation, flock};
    let sample = Sample::new();
    let (root, mut memory) = (sample.root.path(), memory());
    next(root, "snap", "top", &mut memory, &[(0, 1)], &[]);
    let dir = |name: &str| File::open(root.join(name)).unwrap();
    let is_free = |name: &str| flock(dir(name), FlockOperation::NonBlockingLockExclusive).is_ok();
    let snapshot = load::open(&root.join("top")).unwrap();
    assert!(is_free("top") && is_free("snap"));
    let lease = snapshot.lease().unwrap();
    let second = snapshot.lease().unwrap();
    assert!(!is_free("top") && !is_free("snap"));
    drop(lease);
    assert!(!is_free("snap"));
    drop(second);
    assert!(is_free("top") && is_free("snap"));
    let held = dir("snap");
    flock(&held, FlockOperation::NonBlockingLockExclusive).unwrap();
    assert!(matches!(snapshot.lease(), Err(LoadError::Removed { path }) if path.ends_with("snap")));
    let alone = snapshot.lease_alone().unwrap();
    assert!(!is_free("top"));
    drop(alone);
}

#[test]
fn a_whole_snapshot_over_a_damaged_one_is_not_written() {
    let sample = Sample::new();
    let (root, memory) = (sample.root.path(), memory());
    flip(&sample.path("mem.bin"), CHUNK as u64 + 7);
    let changes = Changes::new(memory.clone(), [0]);
    let refused = create_over(&sample.dir, &root.join("whole"), &changes, Stored::Whole).unwrap_err();
    assert!(matches!(refused, CreateError::Base(ImageError::Damaged { .. })), "{refused}");
    // What does not copy it does not mind, and says so when that is read.
    create_over(&sample.dir, &root.join("changes"), &changes, Stored::Changes).unwrap();
    assert!(ensure_trusted(&load::open(&root.join("changes")).unwrap()).is_err());
}

#[test]
fn a_parent_that_was_replaced_meanwhile_is_noticed() {
    let sample = Sample::new();
    let (root, memory) = (sample.root.path(), memory());
    let base = Base::open(&load::open(&sample.dir).unwrap()).unwrap();
    let mut staging = Staging::begin(&root.join("child")).unwrap();
    let digest = staging.write_changes(&base, &Changes::new(memory.clone(), [0]), Stored::Changes, &NEVER).unwrap();
    fs::rename(&sample.dir, root.join("away")).unwrap();
    create_at(&sample.dir, &memory, &state(2)).unwrap();
    let facts = facts(&mut staging);
    assert!(matches!(staging.commit(digest, facts, &state(1)), Err(CreateError::BaseReplaced { .. })));
    assert!(!root.join("child").exists() && names(&sample.dir).iter().all(|name| !name.starts_with("child-")));
}

/// As soon as it has its name it may be used.
#[test]
fn a_new_snapshot_is_not_taken_for_one_that_is_being_removed() {
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("new");
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            (0..20).for_each(|_| {
                create_at(&target, &memory(), &state(1)).unwrap();
                fs::remove_dir_all(&target).unwrap();
            })
        });
        while !writer.is_finished() {
            if let Ok(snapshot) = load::open(&target) {
                match snapshot.lease() {
                    Ok(_) | Err(LoadError::Open { .. }) => {}
                    Err(e) => panic!("{e}"),
                }
            }
        }
    });
}

/// Each level is found from the one above it, however long all their names are together.
#[test]
fn a_chain_of_long_names_is_read() {
    let root = tempfile::tempdir().unwrap();
    let name = |level: usize| format!("{level:0>150}");
    let mut memory = vec![1; 4 * PAGE];
    create_at(&root.path().join(name(0)), &memory, &state(1)).unwrap();
    for level in 1..40 {
        next(root.path(), &name(level - 1), &name(level), &mut memory, &[(level % 4, level as u8)], &[]);
    }
    assert!(read_all(&image(&root.path().join(name(39)))) == memory);
}

/// A map may claim any number of pages that the file does not hold: they are zero, and nobody reads through terabytes to know that.
#[test]
fn pages_that_are_claimed_and_not_there_are_not_read() {
    let sample = Sample::of(&vec![0; 64 * CHUNK], &state(1));
    let root = sample.root.path();
    let mut memory = vec![0; 64 * CHUNK];
    next(root, "snap", "child", &mut memory, &[(40, 7)], &[]);
    let child = Sample { dir: root.join("child"), ..Sample::new() };
    let mut map = Clusters::new(memory.len() as u64);
    map.set(0..map.count(), Cluster::Data);
    let map = map.encode();
    child.put("mem.map", &map);
    child.forge(|json| {
        json["memory"]["map"]["bytes"] = map.len().into();
        json["memory"]["map"]["digest"] = blake3::hash(&map).to_hex().as_str().into();
    });
    assert_eq!(verify(&child.dir).unwrap().checked_bytes, CHUNK as u64, "the one chunk that is there");
    // A byte that should not be there is noticed, and one that should.
    for (page, fill) in [(5, 1), (40, 0)] {
        fs::set_permissions(child.path("mem.bin"), Permissions::from_mode(0o600)).unwrap();
        let file = File::options().write(true).open(child.path("mem.bin")).unwrap();
        file.write_all_at(&[fill; PAGE], page * PAGE as u64).unwrap();
        match verify(&child.dir) {
            Err(VerifyError::Damaged { damaged, first: ImageError::Damaged { offset, .. }, .. }) => {
                assert_eq!((damaged, offset), (1, page * PAGE as u64 / CHUNK as u64 * CHUNK as u64));
            }
            other => panic!("{other:?}"),
        }
        // As it was.
        file.set_len(0).unwrap();
        file.set_len(memory.len() as u64).unwrap();
        match verify(&child.dir) {
            Err(VerifyError::Damaged { damaged: 1, first: ImageError::Damaged { offset, .. }, .. }) => {
                assert_eq!(offset, 2 * CHUNK as u64, "a hole where there was data");
            }
            other => panic!("{other:?}"),
        }
        file.write_all_at(&[7; PAGE], 40 * PAGE as u64).unwrap();
        verify(&child.dir).unwrap();
    }
}

/// It is told where a snapshot is looked at whose parent is not there, or no longer what it was.
#[test]
fn a_check_tells_of_parents_that_cannot_be_used() {
    let sample = Sample::new();
    let root = sample.root.path();
    let mut memory = memory();
    next(root, "snap", "middle", &mut memory, &[(1, 9)], &[]);
    next(root, "middle", "child", &mut memory, &[(2, 9)], &[]);
    let report = |name: &str| {
        let snapshot = load::open_without_memory(&root.join(name)).unwrap();
        let like = Host { facts: host(), page_bytes: PAGE as u64, cpuid: vec![], tsc: HostTsc::default() };
        Report::of(&snapshot, &like)
    };
    let place = |name: &str| (report(name).memory, report(name).memory_fault);
    assert_eq!(place("child"), (MemoryPlace::Here, None));
    let unusable = |words: &[&str]| {
        let report = report("child");
        assert_eq!((report.memory, report.is_usable()), (MemoryPlace::Unusable, false));
        let fault = report.memory_fault.clone().unwrap();
        assert!(words.iter().all(|word| fault.contains(word)), "{fault}");
        assert!(report.to_string().contains(&fault));
    };
    let in_place_of = |path: &Path, act: &dyn Fn()| {
        let aside = root.join("aside");
        fs::rename(path, &aside).unwrap();
        act();
        let _ = fs::remove_dir_all(path);
        let _ = fs::remove_file(path);
        fs::rename(aside, path).unwrap();
    };
    in_place_of(&sample.dir, &|| unusable(&["middle", "its parent", "snap"]));
    in_place_of(&sample.dir, &|| {
        create_at(&sample.dir, &varied_memory(), &state(1)).unwrap();
        unusable(&["is not the snapshot"]);
    });
    in_place_of(&sample.path("mem.bin"), &|| unusable(&["mem.bin", "missing"]));
    in_place_of(&sample.path("mem.bin"), &|| {
        fs::write(sample.path("mem.bin"), "short").unwrap();
        unusable(&["mem.bin", "5 bytes"]);
    });
    in_place_of(&root.join("middle/mem.map"), &|| unusable(&["mem.map", "missing"]));
    in_place_of(&root.join("middle/mem.map"), &|| {
        let length = fs::metadata(root.join("aside")).unwrap().len();
        fs::write(root.join("middle/mem.map"), vec![1; length as usize]).unwrap();
        unusable(&["mem.map", "damaged"]);
    });
    in_place_of(&root.join("child/mem.b3"), &|| unusable(&["mem.b3", "missing"]));
    // Somebody else has all of it.
    in_place_of(&root.join("child/mem.bin"), &|| assert_eq!(place("child"), (MemoryPlace::Elsewhere, None)));
    assert_eq!(place("child"), (MemoryPlace::Here, None));
}
