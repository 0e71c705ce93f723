//! The vmm and the page server under a user without privileges: what each needs, and what they say if they have not got it.

#![allow(missing_docs, reason = "tests are named for what they show")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use tests::user::{Device, UID, User};
use tests::{PageServer, Place, Process, Template, Vm, binaries, procfs, require};

/// With access to the device, and without privileges.
const WITH_DEVICE: User = User { device: Device::Open, has_ptrace: false };
/// Without access to the device, and with the one capability that stands in for it.
const WITH_CAPABILITY: User = User { device: Device::Closed, has_ptrace: true };
/// With neither.
const WITH_NOTHING: User = User { device: Device::Closed, has_ptrace: false };
/// CAP_SYS_PTRACE, as the kernel shows a set of capabilities.
const PTRACE: u64 = 1 << 19;

/// Returns from a test, and says so, unless programs can be run as another user here.
macro_rules! require_user {
    () => {
        if let Some(reason) = User::missing() {
            return test_skip::skip(reason);
        }
    };
}

/// Whether the kernel lets every user catch the kernel's faults, so that nobody needs anything.
fn everybody_may() -> bool {
    fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").is_ok_and(|value| value.trim() == "1")
}

/// A copy of the template's snapshot that belongs to the user, in a place that does too.
fn place_of(user: &User, template: &Template) -> (Place, PathBuf) {
    let place = Place::new();
    let copy = place.join("snapshot");
    fs::create_dir(&copy).expect("a directory can be made in the test's directory");
    for entry in fs::read_dir(&template.snapshot).expect("the snapshot is there") {
        let entry = entry.expect("it can be read on");
        fs::copy(entry.path(), copy.join(entry.file_name())).expect("it can be copied");
    }
    user.take(place.path());
    (place, copy)
}

fn restore(user: &User, place: &Place, snapshot: &Path, more: &[&str], name: &str) -> Vm {
    let (vsock, api) = (place.join(format!("{name}.vsock")), place.join(format!("{name}.api")));
    let process = user.start(place, name, binaries::vmm(), |vmm| {
        vmm.arg("--restore").arg(snapshot.join("snap.json")).args(more);
        vmm.arg("--vsock").arg(&vsock).arg("--api-sock").arg(&api);
    });
    Vm { process, name: name.to_owned(), vsock, api }
}

/// Checks that a program runs as the user, and has the capabilities that the user is said to have.
#[track_caller]
fn check_user(user: &User, process: &Process) {
    let status = fs::read_to_string(format!("/proc/{}/status", process.pid())).expect("it runs");
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("the kernel says so");
        line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(field("Uid:"), [UID.to_string(), UID.to_string(), UID.to_string(), UID.to_string()]);
    let capabilities = if user.has_ptrace { PTRACE } else { 0 };
    for set in ["CapPrm:", "CapEff:", "CapAmb:"] {
        assert_eq!(u64::from_str_radix(&field(set)[0], 16), Ok(capabilities), "{set}");
    }
}

/// Two clones of a page server, all of them of one user, share memory and are whole.
fn check_that_clones_live(user: &User, server_user: &User) {
    let template = Template::shared();
    let (place, snapshot) = place_of(user, &template);
    let server = PageServer::start_as(server_user, &place, &snapshot);
    check_user(server_user, &server.process);
    for mode in ["shared", "copy"] {
        let socket = server.socket.to_str().expect("the path is text");
        for number in 1..=2 {
            let name = format!("{mode}-{number}");
            let mut vm = restore(user, &place, &snapshot, &["--uffd", socket, "--uffd-mode", mode], &name);
            template.facts.check(&mut vm.agent());
            check_user(user, &vm.process);
            if mode == "shared" {
                assert!(procfs::guest_ram(vm.pid()).rss_kib > 4 << 10, "its memory is the store");
            }
            vm.stop();
        }
    }
    let metrics = server.metrics();
    assert_eq!((metrics.sessions_total, metrics.refused_total, metrics.stores_retired_total), (4, 0, 0));
    assert!(metrics.stores.iter().all(|store| store.uid.is_none_or(|uid| uid == UID)), "{:?}", metrics.stores);
    assert_eq!(server.process.stop().code(), 0);
}

#[test]
fn access_to_the_device_is_enough_for_the_vmm() {
    require!(Kvm, Userfaultfd);
    require_user!();
    check_that_clones_live(&WITH_DEVICE, &WITH_NOTHING);
}

#[test]
fn a_capability_is_enough_for_the_vmm() {
    require!(Kvm, Userfaultfd);
    require_user!();
    check_that_clones_live(&WITH_CAPABILITY, &WITH_NOTHING);
}

#[test]
fn a_capability_is_enough_for_the_vmm_where_there_is_no_device() {
    require!(Kvm, Userfaultfd);
    require_user!();
    let absent = |user: User| User { device: Device::Absent, ..user };
    check_that_clones_live(&absent(WITH_CAPABILITY), &absent(WITH_NOTHING));
}

#[test]
fn a_vmm_with_neither_says_what_it_needs_and_restores_from_the_file() {
    require!(Kvm, Userfaultfd);
    require_user!();
    if everybody_may() {
        return test_skip::skip("vm.unprivileged_userfaultfd is 1 here: every user may catch the kernel's faults");
    }
    let template = Template::shared();
    let (place, snapshot) = place_of(&WITH_NOTHING, &template);
    let server = PageServer::start_as(&WITH_NOTHING, &place, &snapshot);
    let socket = server.socket.to_str().expect("the path is text");
    for device in [Device::Closed, Device::Absent] {
        for mode in ["shared", "copy"] {
            let user = User { device, ..WITH_NOTHING };
            let vm = restore(&user, &place, &snapshot, &["--uffd", socket, "--uffd-mode", mode], mode);
            let done = vm.process.finish();
            assert_eq!(done.code(), 77, "{}", done.stderr);
            println!("{device:?}: {}", done.one_line());
            for part in ["not permitted", "/dev/userfaultfd", "CAP_SYS_PTRACE", "vm.unprivileged_userfaultfd=1"] {
                assert!(done.one_line().contains(part), "{part}: {}", done.stderr);
            }
        }
    }
    let doctor = WITH_NOTHING
        .start(&place, "doctor", binaries::vmm(), |vmm| {
            vmm.arg("doctor");
        })
        .finish();
    assert_eq!(doctor.code(), 0, "VMs can run: {}", doctor.stdout);
    assert!(doctor.stdout.contains("CAP_SYS_PTRACE"), "{}", doctor.stdout);
    let mut vm = restore(&WITH_NOTHING, &place, &snapshot, &[], "file");
    template.facts.check(&mut vm.agent());
    vm.stop();
    // The server has seen nothing that would matter to it, or to others.
    let metrics = server.metrics();
    assert_eq!((metrics.sessions.len(), metrics.stores_retired_total), (0, 0));
}

/// A page server that root runs serves guests of another user, once its socket is open to them, with a store of their own.
#[test]
fn a_user_is_served_by_the_page_server_of_another() {
    require!(Kvm, Userfaultfd);
    require_user!();
    let template = Template::shared();
    let (place, snapshot) = place_of(&WITH_DEVICE, &template);
    let server = PageServer::start(&place, &template.snapshot);
    let socket = server.socket.to_str().expect("the path is text");
    let done = restore(&WITH_DEVICE, &place, &snapshot, &["--uffd", socket], "closed").process.finish();
    assert_eq!(done.code(), 1);
    assert!(done.one_line().contains(socket), "{}", done.stderr);

    fs::set_permissions(&server.socket, PermissionsExt::from_mode(0o666)).expect("it is ours");
    let mut own = tests::Restore::new(&place, &template.snapshot).uffd(&server).start("own");
    template.facts.check(&mut own.agent());
    let mut vm = restore(&WITH_DEVICE, &place, &snapshot, &["--uffd", socket], "open");
    template.facts.check(&mut vm.agent());
    let users: Vec<_> = server.metrics().stores.iter().map(|store| store.uid).collect();
    assert_eq!(users.len(), 2, "{users:?}");
    assert!(users.contains(&Some(UID)), "{users:?}");
    vm.stop();
    own.stop();
}
