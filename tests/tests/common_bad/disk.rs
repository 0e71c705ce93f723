//! Disks that are full, and places that cannot take a snapshot.

use super::{is_root, skip};
use api_spec::client::rest::RestError;
use api_spec::snapshot::SnapshotCreate;
use std::fs;
use std::path::Path;
use std::process::Command;
use tests::template::Facts;
use tests::{Agent, Boot, Place, Process, Vm, require};

/// The vmm refuses to take a snapshot into `target`, with these words, and its guest goes on.
#[track_caller]
fn refuses(vm: &mut Vm, agent: &mut Agent, facts: &Facts, target: &Path, words: &[&str]) {
    match vm.try_snapshot(target) {
        Err(RestError::Refused { status: 400, message }) => {
            assert!(words.iter().all(|word| message.contains(word)), "{target:?}: {message}");
        }
        other => panic!("{target:?}: {other:?}"),
    }
    facts.check(agent);
}

#[test]
fn a_place_that_cannot_take_a_snapshot_is_named_and_the_guest_goes_on() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) = Boot::new(&place).memory_mib(16).ready("guest");
    let facts = Facts::gather(&mut agent, 1);
    let before = place.names();
    fs::create_dir(place.join("taken")).expect("there is room");
    fs::write(place.join("file"), "mine").expect("there is room");
    std::os::unix::fs::symlink("nowhere", place.join("link")).expect("there is room");
    for (target, words) in [
        (place.join("taken"), ["taken exists already", "choose another name"]),
        (place.join("file"), ["file exists already", "choose another name"]),
        (place.join("link"), ["link exists already", "choose another name"]),
        (place.join("no/snapshot"), ["no that should hold the snapshot does not exist", "create it"]),
        (place.join("file/snapshot"), ["cannot write", "file"]),
        (place.join("x".repeat(201)), ["cannot be the name of a snapshot", "200 bytes"]),
        (place.join("x".repeat(5000)), ["cannot be the name of a snapshot", "200 bytes"]),
        (place.join("taken/.."), ["cannot be the name of a snapshot", ""]),
        ("".into(), ["snapshot_path", "the path is empty"]),
        ("/".into(), ["cannot be the name of a snapshot", ""]),
        ("..".into(), ["cannot be the name of a snapshot", ""]),
        (place.join("a\0b"), ["cannot write", ""]),
        ("/proc/self/snapshot".into(), ["/proc/self", ""]),
        ("/dev/null/snapshot".into(), ["/dev/null", ""]),
    ] {
        refuses(&mut vm, &mut agent, &facts, &target, &words);
    }
    for name in ["taken", "file", "link"] {
        let path = place.join(name);
        fs::remove_file(&path).or_else(|_| fs::remove_dir(&path)).expect("it is as it was");
    }
    assert_eq!(place.names(), before, "something was left behind");
    // Odd, but fine.
    for name in ["line\nbreak", "  ", "-", "ünï", &"x".repeat(200)] {
        let path = place.join(name);
        vm.snapshot(&path);
        let report = snapshot::verify::verify(&path).expect("it is whole");
        assert!(!report.to_string().is_empty());
    }
    facts.check(&mut agent);
    let done = vm.stop();
    super::no_panic(&done.stderr);
}

#[test]
fn a_relative_path_is_relative_to_where_the_vmm_was_started() {
    require!(Kvm);
    let place = Place::new();
    let config = place.join("vm.json");
    fs::write(&config, r#"{"boot-source": {"embedded_guest": true}, "machine-config": {"mem_size_mib": 16}}"#)
        .expect("there is room");
    let api = place.join("vm.api");
    let process = Process::start(&place, "vm", tests::binaries::vmm(), |vmm| {
        vmm.arg("--config").arg(&config).arg("--api-sock").arg(&api).current_dir(place.path());
    });
    let mut vm = Vm { process, name: "vm".into(), vsock: place.join("none"), api };
    vm.snapshot(Path::new("here"));
    vm.snapshot(Path::new("./there"));
    for name in ["here", "there"] {
        snapshot::verify::verify(&place.join(name)).expect("it is whole");
    }
    vm.stop();
}

#[test]
fn a_full_disk_is_named_and_the_guest_goes_on() {
    require!(Kvm);
    if !is_root() {
        skip!("only root can mount a small file system");
    }
    let place = Place::new();
    let small = place.join("small");
    fs::create_dir(&small).expect("there is room");
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=256k", "none"]).arg(&small).status();
    if !mounted.is_ok_and(|status| status.success()) {
        skip!("a small file system cannot be mounted here");
    }
    let unmount = Unmount(&small);
    let (mut vm, mut agent) = Boot::new(&place).memory_mib(16).ready("guest");
    let facts = Facts::gather(&mut agent, 1);
    for _ in 0..3 {
        refuses(&mut vm, &mut agent, &facts, &small.join("snapshot"), &["no space for", "mem.bin", "free space"]);
        assert_eq!(fs::read_dir(&small).expect("it is there").count(), 0, "something was left behind");
    }
    // Room for the memory, but not for all the rest.
    drop(unmount);
    for size_kib in [1088, 1152, 1216, 1280, 1344, 1408, 1600] {
        let option = format!("size={size_kib}k");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &option, "none"]).arg(&small).status();
        assert!(mounted.is_ok_and(|status| status.success()));
        let _unmount = Unmount(&small);
        match vm.try_snapshot(&small.join("snapshot")) {
            Ok(()) => drop(snapshot::verify::verify(&small.join("snapshot")).expect("it is whole")),
            Err(RestError::Refused { status: 400, message }) => {
                assert!(message.contains("no space for") && message.contains("small/"), "{message}");
                assert_eq!(fs::read_dir(&small).expect("it is there").count(), 0, "something was left behind");
            }
            other => panic!("{other:?}"),
        }
        facts.check(&mut agent);
    }
    vm.snapshot(&place.join("elsewhere"));
    snapshot::verify::verify(&place.join("elsewhere")).expect("it is whole");
    facts.check(&mut agent);
    let done = vm.stop();
    super::no_panic(&done.stderr);
}

struct Unmount<'p>(&'p Path);

impl Drop for Unmount<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0).status();
    }
}

fn limit_file_size(vm: &Vm, size: &str) {
    let set = Command::new("prlimit").args(["--pid", &vm.pid().to_string(), &format!("--fsize={size}")]).status();
    assert!(set.is_ok_and(|status| status.success()), "a process of ours can be given a limit");
}

#[test]
fn a_limit_on_file_sizes_is_named_and_the_guest_goes_on() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) = Boot::new(&place).memory_mib(16).ready("guest");
    let facts = Facts::gather(&mut agent, 1);
    let before = place.names();
    limit_file_size(&vm, "65536:unlimited");
    refuses(&mut vm, &mut agent, &facts, &place.join("snapshot"), &["no space for", "mem.bin"]);
    assert_eq!(place.names(), before, "something was left behind");
    limit_file_size(&vm, "unlimited");
    vm.snapshot(&place.join("snapshot"));
    snapshot::verify::verify(&place.join("snapshot")).expect("it is whole");
    facts.check(&mut agent);
    vm.stop();
}

#[test]
fn a_limit_on_open_files_is_named_and_the_guest_goes_on() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) = Boot::new(&place).memory_mib(16).ready("guest");
    let facts = Facts::gather(&mut agent, 1);
    let (target, before) = (place.join("snapshot"), place.names());
    // Connected before there is a limit, so that it is the snapshot that lacks descriptors.
    let mut client = vm.client();
    client.config().expect("it tells");
    let limit = |most: u64| {
        let line = format!("--nofile={most}:1024");
        let set = Command::new("prlimit").args(["--pid", &vm.pid().to_string(), &line]).status();
        assert!(set.is_ok_and(|status| status.success()), "a process of ours can be given a limit");
    };
    let mut refused = 0;
    // What is open stays so.
    for most in 4.. {
        limit(most);
        match client.snapshot_create(&SnapshotCreate::of(target.clone())) {
            Ok(()) => break,
            Err(RestError::Refused { status: 400, message }) => {
                assert!(message.contains("open no more") && message.contains("ulimit -n"), "{message}");
                assert_eq!(place.names(), before, "something was left behind");
                refused += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(refused > 1, "{refused}");
    limit(1024);
    snapshot::verify::verify(&target).expect("it is whole");
    facts.check(&mut agent);
    vm.stop();
    // Nor does a clone come about without some, whichever of them is the one too many.
    for most in 4..=20 {
        super::refused_by(&place, "few", Path::new("prlimit"), super::FAILED, &["ulimit -n"], |vmm| {
            vmm.arg(format!("--nofile={most}")).arg(tests::binaries::vmm()).arg("--restore").arg(&target);
            vmm.arg("--api-sock").arg(place.join("api"));
        });
    }
}

#[test]
fn a_limit_on_file_sizes_that_guest_memory_does_not_fit_into_is_named() {
    require!(Kvm);
    let place = Place::new();
    let config = place.join("vm.json");
    fs::write(&config, r#"{"boot-source": {"embedded_guest": true}}"#).expect("there is room");
    super::refused_by(&place, "limited", Path::new("prlimit"), super::FAILED, &["memory file", "too large"], |vmm| {
        vmm.arg("--fsize=1000000").arg(tests::binaries::vmm()).arg("--config").arg(&config);
        vmm.arg("--api-sock").arg(place.join("api"));
    });
}
