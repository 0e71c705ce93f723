//! Snapshots as scripts for Firecracker name their files: state here, memory there.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::client::rest::RestError;
use api_spec::snapshot::{LoadHugePages, MemBackend, MemBackendType, SnapshotCreate, SnapshotLoad, VsockOverride};
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};
use tests::template::Facts;
use tests::{Boot, Place, Template, Vm, require, until};

/// Loads a snapshot into a process of its own, with what `change` adds to the request.
fn load(
    place: &Place,
    name: &str,
    snapshot: &Path,
    change: impl FnOnce(&mut SnapshotLoad),
) -> (Vm, Result<(), RestError>) {
    let mut vm = tests::vm::waiting(place, name);
    let mut request = SnapshotLoad {
        resume_vm: true,
        vsock_override: Some(VsockOverride { uds_path: vm.vsock.clone() }),
        ..SnapshotLoad::of(snapshot.to_owned())
    };
    change(&mut request);
    let answer = vm.api().put("/snapshot/load", &request);
    (vm, answer)
}

fn file(path: &Path) -> Option<MemBackend> {
    Some(MemBackend::of(MemBackendType::File, path.to_owned()))
}

#[track_caller]
fn refused(answer: Result<(), RestError>, words: &[&str]) {
    match answer {
        Err(RestError::Refused { status: 400, message }) => {
            assert!(words.iter().all(|word| message.contains(word)), "{words:?}: {message}");
        }
        other => panic!("should have been refused for {words:?}: {other:?}"),
    }
}

/// As their clients do it: pause, create, load in another process.
#[test]
fn a_snapshot_has_its_memory_where_a_script_expects_it() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) = Boot::new(&place).ready("original");
    let facts = Facts::gather(&mut agent, 1);
    let (state, memory) = (place.join("vmstate"), place.join("mem"));
    vm.pause();
    let request = SnapshotCreate { mem_file_path: Some(memory.clone()), ..SnapshotCreate::of(state.clone()) };
    vm.api().put("/snapshot/create", &request).expect("the snapshot is taken");
    vm.stop();
    let inode = |path: PathBuf| fs::metadata(path).expect("the file is there").ino();
    assert_eq!(inode(memory.clone()), inode(state.join("mem.bin")), "it is one file");
    snapshot::verify::verify(&state).expect("the snapshot is whole");

    let stamp = fs::read(state.join("mem.stamp")).expect("there is a stamp");
    let (mut by_backend, answer) = load(&place, "by-backend", &state, |load| {
        load.mem_backend = file(&memory);
        load.track_dirty_pages = true;
        load.huge_pages = LoadHugePages::None;
    });
    answer.expect("it is loaded");
    facts.check(&mut by_backend.agent());
    assert_eq!(fs::read(state.join("mem.stamp")).expect("there is a stamp"), stamp, "it was still good");
    let done = by_backend.stop();
    assert_eq!(done.stderr, "");

    // By the deprecated names, of which the log tells once.
    let (mut old, answer) = load(&place, "old", &state.join("snap.json"), |load| {
        load.mem_file_path = Some(memory.clone());
        load.enable_diff_snapshots = true;
    });
    answer.expect("it is loaded");
    facts.check(&mut old.agent());
    let done = old.stop();
    for field in ["`mem_file_path` is deprecated", "`enable_diff_snapshots` is deprecated"] {
        assert_eq!(done.stderr.matches(field).count(), 1, "{}", done.stderr);
    }

    // One name fewer: checked once more, and good.
    fs::remove_file(&memory).expect("it can be removed");
    let (mut own, answer) = load(&place, "own", &state, |_| {});
    answer.expect("it is loaded");
    facts.check(&mut own.agent());
    own.stop();
}

#[test]
fn a_copy_of_the_memory_will_do_and_a_damaged_one_will_not() {
    require!(Kvm);
    let (template, place) = (Template::shared(), Place::new());
    let copy = place.join("copy");
    fs::copy(template.snapshot.join("mem.bin"), &copy).expect("there is room for a copy");
    let (mut vm, answer) = load(&place, "copied", &template.snapshot, |load| load.mem_backend = file(&copy));
    answer.expect("it is loaded");
    template.facts.check(&mut vm.agent());
    let name = copy.to_str().expect("the path is text");
    assert!(tests::procfs::mappings(vm.pid()).iter().any(|mapping| mapping.name == name), "that one is mapped");
    vm.stop();

    fs::set_permissions(&copy, fs::Permissions::from_mode(0o600)).expect("the copy is ours");
    let bytes = fs::File::options().write(true).open(&copy).expect("it can be written");
    bytes.write_all_at(b"not what was there", 3 << 16).expect("it can be written");
    let fifo = place.join("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RUSR).expect("a FIFO can be made");
    let short = place.join("short");
    fs::write(&short, b"short").expect("a file can be made");
    let (mut vm, answer) = load(&place, "bad", &template.snapshot, |load| load.mem_backend = file(&copy));
    refused(answer, &[name, "chunk at offset 0x30000"]);
    let mut again = |backend: Option<MemBackend>, path: Option<&Path>, words: &[&str]| {
        let load = SnapshotLoad {
            mem_backend: backend,
            mem_file_path: path.map(Path::to_owned),
            vsock_override: Some(VsockOverride { uds_path: place.join("bad.vsock") }),
            ..SnapshotLoad::of(template.snapshot.clone())
        };
        refused(vm.api().put("/snapshot/load", &load), words);
    };
    again(None, Some(&copy), &[name, "0x30000"]);
    again(file(&short), None, &["short has 5 bytes"]);
    for path in [&fifo, Path::new("/dev/zero"), place.path()] {
        again(file(path), None, &["not a regular file"]);
    }
    again(None, Some(&place.join("none")), &["none", "No such file"]);
    again(
        file(&copy),
        Some(&copy),
        &["too many fields: either `mem_backend` or `mem_file_path` exclusively is required"],
    );
    // Nothing was left behind, and the process takes a load that is right.
    assert!(!vm.vsock.exists());
    let load = SnapshotLoad {
        vsock_override: Some(VsockOverride { uds_path: vm.vsock.clone() }),
        resume_vm: true,
        ..SnapshotLoad::of(template.snapshot.clone())
    };
    vm.api().put("/snapshot/load", &load).expect("it is loaded");
    template.facts.check(&mut vm.agent());
    vm.stop();
}

#[test]
fn page_sizes_that_are_not_offered_are_refused_by_name() {
    require!(Kvm);
    let (template, place) = (Template::shared(), Place::new());
    for (huge_pages, name) in
        [(LoadHugePages::TwoMib, "huge_pages: `2M`"), (LoadHugePages::Transparent, "`Transparent`")]
    {
        let (vm, answer) = load(&place, "huge", &template.snapshot, |load| load.huge_pages = huge_pages);
        refused(answer, &[name, "is not offered"]);
        vm.stop();
    }
}

/// A clock that catches up needs what the snapshot's host knew; where it did not, that is said.
#[test]
fn the_clock_catches_up_or_the_load_says_why_not() {
    require!(Kvm);
    let (template, place) = (Template::shared(), Place::new());
    let saved = snapshot::load::open(&template.snapshot).expect("the snapshot can be opened");
    let has_realtime = saved.state().vm.clock.flags & 4 != 0;
    let (mut vm, answer) = load(&place, "clock", &template.snapshot, |load| load.clock_realtime = true);
    println!("the snapshot's clock has a time of day: {has_realtime}");
    match answer {
        Ok(()) => {
            assert!(has_realtime);
            template.facts.check(&mut vm.agent());
        }
        other => refused(other, &["clock_realtime: "]),
    }
    vm.stop();
}

/// How far the guest's clock is behind the host's time of day tells whether it stood still with the guest.
#[test]
fn a_clock_that_catches_up_is_where_it_would_be_and_any_other_where_it_stood() {
    require!(Kvm);
    /// How long the guest stands still, in nanoseconds, at least.
    const STILL: u64 = 2_000_000_000;
    let place = Place::new();
    let (mut vm, _agent) = Boot::new(&place).ready("original");
    let first = place.join("first");
    vm.snapshot(&first);
    vm.stop();
    let clock = |path: &Path| snapshot::load::open(path).expect("the snapshot can be opened").state().vm.clock;
    let has_realtime = |path: &Path| clock(path).flags & 4 != 0;
    let behind = |path: &Path| clock(path).realtime - clock(path).clock;
    if !has_realtime(&first) {
        return test_skip::skip("the clock that KVM keeps for guests has no time of day on this host");
    }
    until("the guest has stood still for a while", || {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is after 1970");
        now.as_nanos() as u64 > clock(&first).realtime + STILL
    });
    let [caught_up, went_on] = [true, false].map(|clock_realtime| {
        let name = if clock_realtime { "caught-up" } else { "went-on" };
        let (mut vm, answer) = load(&place, name, &first, |load| {
            (load.clock_realtime, load.new_generation, load.resume_vm) = (clock_realtime, false, false);
        });
        answer.expect("it is loaded");
        let path = place.join(format!("{name}.snap"));
        vm.snapshot(&path);
        vm.stop();
        assert!(has_realtime(&path), "the host has not changed");
        behind(&path).saturating_sub(behind(&first))
    });
    println!("behind by {caught_up} ns, having caught up, and by {went_on} ns");
    assert!(went_on >= STILL && caught_up < STILL / 2, "{caught_up}, {went_on}");
}

/// Whatever stands in the way of the second name, there is no snapshot, and the guest goes on.
#[test]
fn a_second_name_that_cannot_be_had_leaves_nothing() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) = Boot::new(&place).ready("original");
    let facts = Facts::gather(&mut agent, 1);
    let there = place.join("there");
    fs::write(&there, b"mine").expect("a file can be made");
    let path = place.join("snap");
    let before = place.names();
    let elsewhere = Path::new("/dev/shm/coppice-test-elsewhere");
    let device = |path: &Path| fs::metadata(path).map(|metadata| metadata.dev()).ok();
    let is_elsewhere = device(Path::new("/dev/shm")).is_some_and(|other| device(place.path()) != Some(other));
    let cases = [
        (there.clone(), "exists already"),
        (place.join("none/mem"), "No such file"),
        (path.clone(), "is also snapshot_path"),
        (elsewhere.to_owned(), "file system"),
    ];
    for (memory, word) in cases.into_iter().take(if is_elsewhere { 4 } else { 3 }) {
        let request = SnapshotCreate { mem_file_path: Some(memory), ..SnapshotCreate::of(path.clone()) };
        refused(vm.api().put("/snapshot/create", &request), &["mem_file_path", word]);
        assert_eq!(place.names(), before);
    }
    assert!(!elsewhere.exists());
    assert_eq!(fs::read(&there).expect("it is there"), b"mine");
    facts.check(&mut agent);
    vm.snapshot(&path);
    vm.stop();
}
