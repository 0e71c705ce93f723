//! Comparing, showing and removing snapshots, and what becomes of tools that are killed, compete or have too little room.
#![allow(missing_docs)]

mod common;

use common::*;
use snapshot::create::{CreateError, Stored};
use snapshot::load::{self, LoadError};
use snapshot::page_runs::PageRuns;
use snapshot::tools::Job;
use snapshot::tools::diff::{DiffError, diff};
use snapshot::tools::remove::remove as try_to_remove;
use snapshot::tools::remove::{RemoveError, Removed};
use snapshot::tools::show::show;
use snapshot::tools::store::{Form, StoreError, Written, flatten, pack, write_diff};
use snapshot::verify::verify;
use snapshot::working_set::{Used, WorkingSet};
use std::cell::RefCell;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A snapshot, one that lies over it, and one that lies over that.
fn chain() -> Sample {
    let sample = Sample::new();
    let (root, mut memory) = (sample.root.path(), memory());
    for (from, to, page) in [("snap", "middle", 1), ("middle", "top", 33)] {
        memory[page * PAGE..][..PAGE].fill(7);
        let changes = Changes::new(memory.clone(), [page]);
        create_over(&root.join(from), &root.join(to), &changes, Stored::Changes).unwrap();
    }
    sample
}

/// Removes a snapshot that nobody uses. A process that another test is about to start has what this one had open, locks
/// included, until it becomes another program.
fn remove(path: &Path) -> Result<Removed, RemoveError> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match try_to_remove(path) {
            Err(RemoveError::Busy { .. }) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
            done => return done,
        }
    }
}

#[test]
fn what_differs_is_told_by_pages_and_by_parts_of_the_state() {
    let sample = chain();
    let root = sample.root.path();
    let same = diff(&sample.dir, &sample.dir, &job()).unwrap();
    assert!(same.is_none() && same.to_string().contains("the same machine"), "{same}");
    let difference = diff(&sample.dir, &root.join("top"), &job()).unwrap();
    assert_eq!((difference.chunks, difference.pages, difference.runs.runs()), (2, 2, &[1..2, 33..34][..]));
    let bytes = memory()[PAGE..2 * PAGE].iter().filter(|byte| **byte != 7).count() + PAGE;
    assert_eq!((difference.bytes, difference.state.len()), (bytes as u64, 0));
    assert!(difference.to_string().contains("pages 0x21 to 0x21 (1)"), "{difference}");

    let mut other = state(2);
    other.vm.clock.realtime += 1;
    other.devices.drives[0].pending = false;
    create_at(&root.join("other"), &memory(), &other).unwrap();
    let difference = diff(&sample.dir, &root.join("other"), &job()).unwrap();
    assert_eq!((difference.chunks, difference.pages, difference.bytes), (0, 0, 0));
    assert_eq!(difference.state, ["vcpu 1", "vm clock", "drives"]);

    create_at(&root.join("small"), &memory()[PAGE..], &state(1)).unwrap();
    let refused = diff(&sample.dir, &root.join("small"), &job()).unwrap_err();
    assert!(matches!(refused, DiffError::OtherSize { .. }), "{refused}");
}

#[test]
fn changes_are_stored_over_what_they_are_changes_of_only() {
    let sample = chain();
    let root = sample.root.path();
    create_at(&root.join("small"), &memory()[PAGE..], &state(1)).unwrap();
    let refused = write_diff(&sample.dir, &root.join("small"), &root.join("x"), Form::Raw, &job()).unwrap_err();
    assert!(matches!(refused, StoreError::OtherLayout { .. }), "{refused}");
    write_diff(&sample.dir, &root.join("top"), &root.join("short"), Form::Raw, &job()).unwrap();
    assert_eq!(verify(&root.join("short")).unwrap().levels, 2);
    assert!(read_all(&image(&root.join("short"))) == read_all(&image(&root.join("top"))));
    // Only the two pages are there.
    let map = fs::read(root.join("short/mem.map")).unwrap();
    let bits: u32 = map[8..8 + 512].iter().map(|byte| byte.count_ones()).sum();
    assert_eq!(bits, 2);
}

#[test]
fn a_snapshot_is_shown() {
    let sample = chain();
    let root = sample.root.path();
    let snapshot = load::open(&sample.dir).unwrap();
    let mut set = WorkingSet::of(&snapshot);
    set.merge(&Used { read: PageRuns::of_pages(0..3), written: PageRuns::of_pages([40]) });
    set.save(&snapshot).unwrap();
    pack(&sample.dir, &root.join("packed"), &job()).unwrap();

    let shown = show(&sample.dir).unwrap();
    assert_eq!((shown.format_version, shown.vcpus, shown.parent.clone()), (1, 1, None));
    assert_eq!(shown.children, [root.join("middle").canonicalize().unwrap()]);
    assert_eq!((shown.memory.chunks, shown.memory.zero_chunks, shown.memory.hot_bytes), (5, 1, 0));
    assert_eq!((shown.memory.levels.len(), shown.memory.levels[0].form), (1, "raw"));
    assert_eq!(shown.working_set.as_ref().map(|set| (set.clones, set.read_pages, set.written_pages)), Some((1, 3, 1)));
    assert_eq!(shown.disks.iter().map(|disk| disk.held_bytes.is_some()).collect::<Vec<_>>(), [true, false]);
    let text = shown.to_string();
    for part in ["1 vCPU,", "disk     root", "middle", &shown.digest, "read 3 pages"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let top = show(&root.join("top")).unwrap();
    assert_eq!(top.memory.levels.iter().map(|level| level.form).collect::<Vec<_>>(), ["changes", "changes", "raw"]);
    assert!(top.parent.unwrap().ends_with("../middle") && top.children.is_empty());
    let packed = show(&root.join("packed")).unwrap();
    assert_eq!(packed.memory.levels[0].form, "packed");
    assert!(packed.memory.hot_bytes > 0 && packed.memory.levels[0].file_bytes < 8192);
    assert!(matches!(show(root), Err(error) if error.to_string().contains("snap.json")));
}

#[test]
fn only_what_nobody_needs_is_removed() {
    let sample = chain();
    let root = sample.root.path();
    let needed = |name: &str| match remove(&root.join(name)).unwrap_err() {
        RemoveError::HasChildren { child, count, .. } => (child.file_name().unwrap().to_owned(), count),
        other => panic!("{other}"),
    };
    assert_eq!(needed("snap"), ("middle".into(), 1));
    assert_eq!(needed("middle"), ("top".into(), 1));
    // One that was renamed, or whose note is gone, says so itself.
    fs::rename(root.join("top"), root.join("renamed")).unwrap();
    assert_eq!(needed("middle"), ("renamed".into(), 1));
    for note in names(&root.join("middle")).iter().filter(|name| name.starts_with("child-")) {
        fs::remove_file(root.join("middle").join(note)).unwrap();
    }
    assert_eq!(needed("middle"), ("renamed".into(), 1));
    // One that lies elsewhere is known by its note.
    let elsewhere = root.join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    pack(&root.join("renamed"), &elsewhere.join("far"), &job()).unwrap();
    remove(&root.join("renamed")).unwrap();
    assert_eq!(needed("middle"), ("far".into(), 1));
    assert_eq!(verify(&elsewhere.join("far")).unwrap().levels, 3);

    let removed = remove(&elsewhere.join("far")).unwrap();
    assert!(removed.disk_bytes > 0 && names(&elsewhere).is_empty());
    assert!(names(&root.join("middle")).iter().all(|name| !name.starts_with("child-")));
    // By a link, and by the name of the manifest.
    std::os::unix::fs::symlink("middle", root.join("current")).unwrap();
    remove(&root.join("current")).unwrap();
    remove(&sample.path("snap.json")).unwrap();
    assert_eq!(names(root), ["current", "elsewhere"]);
    assert!(matches!(remove(&sample.dir), Err(RemoveError::Load(LoadError::NotASnapshot { .. }))));
}

#[test]
fn of_two_equal_children_each_counts() {
    let sample = chain();
    let root = sample.root.path();
    let elsewhere = root.join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let written = ["a", "b"].map(|name| {
        write_diff(&root.join("middle"), &root.join("top"), &elsewhere.join(name), Form::Packed, &job()).unwrap()
    });
    assert_eq!(written[0].digest, written[1].digest);
    remove(&root.join("top")).unwrap();
    for name in ["a", "b"] {
        assert!(matches!(remove(&root.join("middle")), Err(RemoveError::HasChildren { .. })), "{name}");
        remove(&elsewhere.join(name)).unwrap();
    }
    remove(&root.join("middle")).unwrap();
}

#[test]
fn a_copy_of_the_parent_is_not_the_parent() {
    let sample = chain();
    let root = sample.root.path();
    let copy = root.join("copy");
    fs::create_dir(&copy).unwrap();
    for name in names(&sample.dir) {
        fs::copy(sample.path(&name), copy.join(&name)).unwrap();
    }
    remove(&copy).unwrap();
    verify(&root.join("top")).unwrap();
    // Nor is a snapshot that takes the place of a child.
    remove(&root.join("top")).unwrap();
    fs::rename(root.join("middle"), root.join("elsewhere")).unwrap();
    fs::rename(root.join("elsewhere"), root.join("middle")).unwrap();
    fs::remove_dir_all(root.join("middle")).unwrap();
    create_at(&root.join("middle"), &memory(), &state(1)).unwrap();
    remove(&sample.dir).unwrap();
}

#[test]
fn what_is_no_snapshot_or_is_in_use_stays() {
    let sample = Sample::new();
    let (root, before) = (sample.root.path(), names(&sample.dir));
    assert!(matches!(remove(root), Err(RemoveError::Load(LoadError::NotASnapshot { .. }))));
    for path in [root.join("none"), sample.path("state.bin"), PathBuf::from("/")] {
        assert!(remove(&path).is_err(), "{path:?}");
    }
    fs::create_dir(sample.path("mem.map")).unwrap();
    assert!(matches!(remove(&sample.dir), Err(RemoveError::Foreign { .. })));
    fs::remove_dir(sample.path("mem.map")).unwrap();
    fs::write(sample.path("thesis.txt"), "mine").unwrap();
    match remove(&sample.dir) {
        Err(RemoveError::Foreign { path }) => assert!(path.ends_with("thesis.txt")),
        other => panic!("{other:?}"),
    }
    fs::remove_file(sample.path("thesis.txt")).unwrap();
    let dir = File::open(&sample.dir).unwrap();
    rustix::fs::flock(&dir, rustix::fs::FlockOperation::LockShared).unwrap();
    assert!(matches!(try_to_remove(&sample.dir), Err(RemoveError::Busy { .. })));
    assert_eq!(names(&sample.dir), before);
    drop(dir);
    // A clone that runs keeps what it has open.
    let snapshot = load::open(&sample.dir).unwrap();
    let image = snapshot::image::MemoryImage::open(&snapshot).unwrap();
    remove(&sample.dir).unwrap();
    assert!(read_all(&image) == memory());
}

#[test]
fn a_removal_that_was_killed_is_finished() {
    let sample = Sample::new();
    fs::remove_file(sample.path("snap.json")).unwrap();
    fs::remove_file(sample.path("mem.b3")).unwrap();
    assert!(load::open(&sample.dir).is_err() && verify(&sample.dir).is_err());
    remove(&sample.dir).unwrap();
    assert!(names(sample.root.path()).is_empty());
}

#[test]
fn nothing_is_kept_of_what_would_take_too_much_room() {
    let sample = Sample::of(&varied_memory(), &state(1));
    let (root, target) = (sample.root.path(), sample.root.path().join("x"));
    let make = |form: Form, max_bytes: u64| {
        let job = Job { max_bytes: Some(max_bytes), ..job() };
        flatten(&sample.dir, &target, form, &job)
    };
    for form in [Form::Raw, Form::Packed] {
        let mut max = 0;
        let written = loop {
            match make(form, max) {
                Ok(written) => break written,
                Err(StoreError::Create(CreateError::OverLimit { needed_bytes, max_bytes, .. })) => {
                    assert!(needed_bytes > max && max_bytes == max, "{needed_bytes} {max}");
                    assert_eq!(names(root), ["snap"]);
                    // Where it is said to be too little by this much, no less is enough.
                    max = needed_bytes;
                }
                Err(other) => panic!("{other}"),
            }
        };
        let files: u64 =
            names(&target).iter().filter(|name| !name.ends_with(".stamp")).map(|name| held(&target, name)).sum();
        assert_eq!(files, max, "{written:?}");
        remove(&target).unwrap();
    }
    let message = make(Form::Packed, 70_000).unwrap_err().to_string();
    assert!(message.contains("70000") && message.contains('x'), "{message}");
}

/// What a file of a snapshot holds, without holes and what means nothing.
fn held(dir: &Path, name: &str) -> u64 {
    let manifest = load::open(dir).unwrap().manifest().clone();
    match name {
        "disk-root.img" => manifest.devices.drives[0].held.as_ref().unwrap().data_bytes,
        "mem.bin" => {
            let memory = fs::read(dir.join(name)).unwrap();
            memory.chunks(PAGE).filter(|page| page.iter().any(|byte| *byte != 0)).count() as u64 * PAGE as u64
        }
        _ => fs::metadata(dir.join(name)).unwrap().len(),
    }
}

#[test]
fn of_two_writers_one_writes_and_the_other_is_told() {
    let sample = Sample::of(&varied_memory(), &state(1));
    let target = sample.root.path().join("x");
    for _ in 0..5 {
        let start = std::sync::Barrier::new(2);
        let write = |form| {
            start.wait();
            flatten(&sample.dir, &target, form, &job())
        };
        let results = std::thread::scope(|scope| {
            let other = scope.spawn(|| write(Form::Packed));
            [write(Form::Raw), other.join().unwrap()]
        });
        let refused: Vec<_> = results.iter().filter_map(|result| result.as_ref().err()).collect();
        assert!(matches!(refused[..], [StoreError::Create(CreateError::Exists { .. })]), "{results:?}");
        verify(&target).unwrap();
        assert_eq!(names(sample.root.path()), ["snap", "x"]);
        remove(&target).unwrap();
    }
}

#[test]
fn progress_comes_to_its_end_and_what_is_cancelled_leaves_nothing() {
    let sample = chain();
    let root = sample.root.path();
    type Operation = fn(&Path, &Job<'_>) -> Result<Written, StoreError>;
    let operations: [Operation; 4] = [
        |root, job| pack(&root.join("top"), &root.join("x"), job),
        |root, job| flatten(&root.join("top"), &root.join("x"), Form::Raw, job),
        |root, job| flatten(&root.join("top"), &root.join("x"), Form::Packed, job),
        |root, job| write_diff(&root.join("snap"), &root.join("top"), &root.join("x"), Form::Raw, job),
    ];
    for operation in operations {
        let seen = RefCell::new(Vec::new());
        operation(root, &Job { progress: &|done, total| seen.borrow_mut().push((done, total)), ..job() }).unwrap();
        let seen = seen.into_inner();
        assert!(seen.windows(2).all(|pair| pair[0].0 <= pair[1].0 && pair[0].1 == pair[1].1), "{seen:?}");
        assert!(seen.last().is_some_and(|(done, total)| done == total), "{seen:?}");
        remove(&root.join("x")).unwrap();

        let cancel = AtomicBool::new(true);
        let refused = operation(root, &Job { cancel: &cancel, ..job() }).unwrap_err();
        assert!(cancel.load(Ordering::Relaxed) && matches!(refused, StoreError::Create(CreateError::Cancelled)));
        assert_eq!(names(root), ["middle", "snap", "top"]);
    }
}

/// What a process that is to be killed does: `OPERATION DIR`.
const ORDER: &str = "SNAPSHOT_TEST_ORDER";
const VICTIM: &str = "the_process_that_is_killed";

/// No test of its own: other tests run it as a process.
#[test]
fn the_process_that_is_killed() {
    let Ok(order) = std::env::var(ORDER) else { return };
    let (operation, dir) = order.split_once(' ').unwrap();
    let [snap, top, target] = ["snap", "top", "x"].map(|name| Path::new(dir).join(name));
    match operation {
        "pack" => drop(pack(&top, &target, &job()).unwrap()),
        "flatten" => drop(flatten(&top, &target, Form::Raw, &job()).unwrap()),
        "diff" => drop(write_diff(&snap, &top, &target, Form::Raw, &job()).unwrap()),
        "rm" => drop(remove(&target).unwrap()),
        other => panic!("{other}"),
    }
}

fn start(operation: &str, dir: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", VICTIM, "--test-threads=1"]).env(ORDER, format!("{operation} {}", dir.display()));
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// A snapshot of some MiB, and one that differs from it, in a directory.
fn two_snapshots(dir: &Path) -> Vec<u8> {
    let mut memory: Vec<u8> = (0..6usize << 20).map(|at| (at / 331 + at % 257 * (at >> 14)) as u8).collect();
    create_at(&dir.join("snap"), &memory, &state(1)).unwrap();
    for page in (0..memory.len() / PAGE).step_by(3) {
        memory[page * PAGE..][..PAGE / 2].fill(page as u8);
    }
    create_at(&dir.join("top"), &memory, &state(1)).unwrap();
    memory
}

#[test]
fn a_tool_that_is_killed_at_any_moment_leaves_all_or_nothing() {
    let root = tempfile::tempdir().unwrap();
    let memory = two_snapshots(root.path());
    let target = root.path().join("x");
    let mut seed = 11u64;
    for operation in ["pack", "flatten", "diff"] {
        let begin = Instant::now();
        assert!(start(operation, root.path()).wait().unwrap().success(), "{operation}");
        let whole = begin.elapsed();
        let digest = load::open(&target).unwrap().manifest().digest.clone();
        let (mut old, mut new) = (0, 0);
        for _ in 0..40 {
            remove(&target).unwrap_or_else(|e| match e {
                RemoveError::Load(LoadError::NotASnapshot { path }) => {
                    snapshot::tools::remove::Removed { path, disk_bytes: 0 }
                }
                other => panic!("{other}"),
            });
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let mut child = start(operation, root.path());
            std::thread::sleep(whole.mul_f64((seed >> 40) as f64 / (1u64 << 24) as f64 * 1.1));
            child.kill().unwrap();
            child.wait().unwrap();
            if target.exists() {
                new += 1;
                let snapshot = load::open(&target).unwrap();
                assert_eq!(snapshot.manifest().digest, digest, "the same each time");
                assert!(read_all(&image(&target)) == memory);
                verify(&target).unwrap();
            } else {
                old += 1;
            }
        }
        assert_eq!(old + new, 40);
        // What is left is cleared away by the next, and neither of the two has come to harm.
        let _ = remove(&target);
        assert!(start(operation, root.path()).wait().unwrap().success(), "{operation}");
        assert_eq!(names(root.path()), ["snap", "top", "x"], "{operation}");
        ["snap", "top", "x"].iter().for_each(|name| drop(verify(&root.path().join(name)).unwrap()));
        remove(&target).unwrap();
        assert!(names(&root.path().join("snap")).iter().all(|name| !name.starts_with("child-")), "{operation}");
    }
}

#[test]
fn a_removal_that_is_killed_at_any_moment_leaves_a_snapshot_or_what_does_not_load() {
    let root = tempfile::tempdir().unwrap();
    two_snapshots(root.path());
    let target = root.path().join("x");
    pack(&root.path().join("top"), &target, &job()).unwrap();
    let begin = Instant::now();
    assert!(start("rm", root.path()).wait().unwrap().success());
    let whole = begin.elapsed() + Duration::from_millis(1);
    for step in 0..20 {
        if !target.exists() {
            pack(&root.path().join("top"), &target, &job()).unwrap();
        }
        let mut child = start("rm", root.path());
        std::thread::sleep(whole.mul_f64(f64::from(step) / 18.0));
        child.kill().unwrap();
        child.wait().unwrap();
        match load::open(&target) {
            Ok(_) => drop(verify(&target).unwrap()),
            Err(_) if target.exists() => drop(remove(&target).unwrap()),
            Err(_) => {}
        }
    }
}
