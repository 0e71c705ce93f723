//! What the vmm and the page server have taken away from themselves, as the kernel tells it.

#![allow(missing_docs, reason = "tests are named for what they show")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use tests::user::{UID, User};
use tests::vm::waiting_with;
use tests::{Boot, PageServer, Place, Process, Restore, Template, binaries, procfs, require, until};

/// How the kernel shows that the calls of a thread are filtered.
const FILTERED: &str = "2";

/// The threads of a process that are ours, by their names, and what the kernel says of each.
fn threads(pid: u32) -> BTreeMap<String, String> {
    let entries = fs::read_dir(format!("/proc/{pid}/task")).expect("the process is there to be looked at");
    let tasks = entries.filter_map(|entry| {
        let path = entry.ok()?.path();
        let name = fs::read_to_string(path.join("comm")).ok()?.trim().to_owned();
        Some((name, fs::read_to_string(path.join("status")).ok()?))
    });
    // KVM has a thread of the kernel's own in each process that has a VM.
    tasks.filter(|(name, _)| !name.starts_with("kvm-")).collect()
}

fn field(status: &str, name: &str) -> String {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("the kernel does not tell {name}")).split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Checks that all threads of a process are filtered, or none, and that it has given up gaining privileges. Returns their names.
#[track_caller]
fn check(pid: u32, seccomp: &str) -> Vec<String> {
    let threads = threads(pid);
    assert!(!threads.is_empty());
    for (name, status) in &threads {
        assert_eq!((field(status, "Seccomp"), field(status, "NoNewPrivs")), (seccomp.into(), "1".into()), "{name}");
    }
    threads.into_keys().collect()
}

#[test]
fn all_threads_are_filtered() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (Template::shared(), Place::new());
    let server = PageServer::start(&place, &template.snapshot);
    let (vm, mut agent) = Restore::new(&place, &template.snapshot).uffd(&server).max_private_mib(1000).ready("clone");
    template.facts.check(&mut agent);
    let names = check(vm.pid(), FILTERED);
    for name in ["vcpu0", "keeper", "private"] {
        assert!(names.iter().any(|thread| thread == name), "{name}: {names:?}");
    }
    check(server.process.pid(), FILTERED);
    // The narrower ones have two filters: that of the process, and their own.
    let filters = |name: &str| field(&threads(vm.pid())[name], "Seccomp_filters");
    assert_eq!((filters("vmm").as_str(), filters("vcpu0").as_str(), filters("keeper").as_str()), ("1", "2", "2"));
    vm.stop();
}

#[test]
fn filters_can_be_left_out() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (Template::shared(), Place::new());
    let server = PageServer::start_with(&place, &template.snapshot, &["--no-seccomp"]);
    check(server.process.pid(), "0");
    let vm = waiting_with(&place, "waiting", |vmm| {
        vmm.arg("--no-seccomp");
    });
    until("it listens", || vm.api.exists());
    check(vm.pid(), "0");
    vm.stop();
}

/// The limits of a process, soft and hard, by the kernel's names.
fn limit(pid: u32, name: &str) -> Vec<String> {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).expect("the process is there to be looked at");
    let line = limits.lines().find_map(|line| line.strip_prefix(name)).expect("the kernel tells that limit");
    line.split_whitespace().take(2).map(str::to_owned).collect()
}

#[test]
fn limits_are_lowered_and_never_raised() {
    let place = Place::new();
    let vm = waiting_with(&place, "low", |vmm| {
        vmm.args(["--rlimit-nofile", "200", "--rlimit-fsize", "5000000"]);
    });
    until("it listens", || vm.api.exists());
    assert_eq!(limit(vm.pid(), "Max open files"), ["200", "200"]);
    assert_eq!(limit(vm.pid(), "Max file size"), ["5000000", "5000000"]);
    assert_eq!(limit(vm.pid(), "Max core file size"), ["0", "0"]);
    vm.stop();
    let api = place.join("lower.api");
    let process = Process::start(&place, "lower", Path::new("sh"), |sh| {
        sh.args(["-c", "ulimit -n 100; exec \"$@\"", "sh"]).arg(binaries::vmm());
        sh.args(["--rlimit-nofile", "200", "--api-sock"]).arg(&api);
    });
    until("it listens", || api.exists());
    assert_eq!(limit(process.pid(), "Max open files"), ["100", "100"], "it was lower before");
    process.stop();
}

#[test]
fn what_cannot_be_taken_away_is_named() {
    let place = Place::new();
    let refused = |name: &str, arguments: &[&str], code: i32, part: &str| {
        let done = tests::process::run_vmm(&place, name, &[&["--api-sock", "a"], arguments].concat());
        assert_eq!(done.code(), code, "{done:?}");
        assert!(done.one_line().contains(part), "{part}: {}", done.stderr);
        let done = Process::start(&place, &format!("{name}-server"), binaries::uffd_handler(), |server| {
            server.args(["--socket", "s", "--snapshot", "none"]).args(arguments);
        })
        .finish();
        assert_eq!(done.code(), code, "{done:?}");
        assert!(done.one_line().contains(part), "{part}: {}", done.stderr);
    };
    refused("uid", &["--uid", "root"], 2, "--uid root: must be a number");
    refused("half", &["--uid", "5"], 2, "--uid and --gid go together");
    refused("files", &["--rlimit-nofile", "3"], 2, "--rlimit-nofile 3: must be a number, 16 or more");
    refused("size", &["--rlimit-fsize", "-1"], 2, "--rlimit-fsize -1: must be");
    refused("namespace", &["--isolate", "user"], 2, "--isolate user: must be");
    refused("pid", &["--isolate", "net,pid"], 2, "unshare --pid --fork");
    refused("cgroup", &["--cgroup", "/nonexistent"], 1, "--cgroup: cannot move into /nonexistent");
    let no_cgroup = place.path().to_str().expect("the path is text");
    refused("directory", &["--cgroup", no_cgroup], 1, "is it a cgroup of version 2");
}

#[test]
fn namespaces_of_the_host_are_left() {
    if !rustix::process::geteuid().is_root() {
        return test_skip::skip("only root can leave namespaces");
    }
    let place = Place::new();
    let vm = waiting_with(&place, "isolated", |vmm| {
        vmm.args(["--isolate", "mount,net", "--isolate", "ipc"]);
    });
    until("it listens", || vm.api.exists());
    let of = |pid: &str, kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).expect("the kernel tells it");
    for (kind, is_left) in [("mnt", true), ("net", true), ("ipc", true), ("uts", false), ("pid", false)] {
        assert_eq!(of(&vm.pid().to_string(), kind) != of("self", kind), is_left, "{kind}");
    }
    vm.stop();
}

/// As another user a guest is booted, snapshotted and cloned, with a page server that has become that user too.
#[test]
fn privileges_are_dropped_before_anything_is_opened() {
    require!(Kvm, Userfaultfd);
    if let Some(reason) = User::missing() {
        return test_skip::skip(reason);
    }
    let (template, place) = (Template::shared(), Place::new());
    let user = User { device: tests::user::Device::Open, has_ptrace: false };
    let snapshot = place.join("snapshot");
    fs::create_dir(&snapshot).expect("a directory can be made in the test's directory");
    for entry in fs::read_dir(&template.snapshot).expect("the snapshot is there") {
        let entry = entry.expect("it can be read on");
        fs::copy(entry.path(), snapshot.join(entry.file_name())).expect("it can be copied");
    }
    user.take(place.path());
    let id = UID.to_string();
    let identity = ["--uid", &id, "--gid", &id];
    let (socket, api, vsock) = (place.join("server.sock"), place.join("clone.api"), place.join("clone.vsock"));
    let server = user.start_as_root(&place, "server", binaries::uffd_handler(), |server| {
        server.arg("--socket").arg(&socket).arg("--snapshot").arg(&snapshot).args(identity);
    });
    until("the page server listens", || socket.exists());
    let process = user.start_as_root(&place, "clone", binaries::vmm(), |vmm| {
        vmm.arg("--restore").arg(&snapshot).arg("--uffd").arg(&socket).arg("--vsock").arg(&vsock);
        vmm.arg("--api-sock").arg(&api).args(identity);
    });
    let mut vm = tests::Vm { process, name: "clone".to_owned(), vsock, api };
    template.facts.check(&mut vm.agent());
    for pid in [vm.pid(), server.pid()] {
        for (name, status) in threads(pid) {
            assert_eq!(field(&status, "Uid"), [&*id; 4].join(" "), "{name}");
            assert_eq!(field(&status, "Gid"), [&*id; 4].join(" "), "{name}");
            assert_eq!(field(&status, "Groups"), "", "{name}");
            for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
                assert_eq!(u64::from_str_radix(&field(&status, set), 16), Ok(0), "{name} {set}");
            }
        }
        check(pid, FILTERED);
    }
    assert!(procfs::guest_ram(vm.pid()).rss_kib > 4 << 10, "its memory is the page server's store");
    // It looks at its own memory, in files of /proc that could belong to root.
    vm.client().stats().expect("the vmm tells what it uses");
    vm.snapshot(&place.join("second"));
    vm.stop();
    assert_eq!(server.stop().code(), 0);
}

#[test]
fn a_guest_that_is_booted_is_filtered_too() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, _agent) = Boot::new(&place).vcpus(2).ready("booted");
    vm.snapshot(&place.join("snapshot"));
    let names = check(vm.pid(), FILTERED);
    assert!(["vcpu0", "vcpu1"].iter().all(|name| names.iter().any(|thread| thread == name)), "{names:?}");
    vm.stop();
}
