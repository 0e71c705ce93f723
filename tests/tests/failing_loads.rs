//! Loads that need pages which do not come: their page server's image is damaged, or out of reach. A load fails then, whatever is to
//! become of a guest that loses its server, and the vmm can be asked again.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::client::rest::RestError;
use api_spec::snapshot::{MemBackend, MemBackendType, OnHandlerLoss, SnapshotLoad, VsockOverride};
use api_spec::vm::InstanceState;
use rustix::process::Signal;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use tests::{PageServer, Place, Restore, Template, Vm, Web, procfs, require, until};

const POLICIES: [OnHandlerLoss; 4] =
    [OnHandlerLoss::Failover, OnHandlerLoss::Reattach, OnHandlerLoss::Pause, OnHandlerLoss::Kill];
const CHUNK: u64 = 64 << 10;

/// A copy of a template's snapshot that can be written.
fn copy(template: &Template, place: &Place, name: &str) -> PathBuf {
    let copy = place.join(name);
    fs::create_dir(&copy).expect("a directory can be made in the test's directory");
    for entry in fs::read_dir(&template.snapshot).expect("the snapshot is there") {
        let entry = entry.expect("it can be read on");
        let file = copy.join(entry.file_name());
        fs::copy(entry.path(), &file).expect("it can be copied");
        fs::set_permissions(&file, PermissionsExt::from_mode(0o600)).expect("it is ours");
    }
    copy
}

fn memory(snapshot: &Path) -> File {
    File::options().write(true).open(snapshot.join("mem.bin")).expect("it can be written")
}

/// Every chunk of it has other bytes.
fn overwrite(snapshot: &Path) {
    let file = memory(snapshot);
    let chunks = file.metadata().expect("it is there").len() / CHUNK;
    (0..chunks).for_each(|chunk| file.write_all_at(b"overwritten", chunk * CHUNK).expect("it can be written"));
}

fn cut_short(snapshot: &Path) {
    memory(snapshot).set_len(CHUNK).expect("it can be cut short");
}

fn document(vm: &Vm, snapshot: &Path, socket: &Path, kind: MemBackendType, policy: OnHandlerLoss) -> SnapshotLoad {
    SnapshotLoad {
        mem_backend: Some(MemBackend { on_handler_loss: Some(policy), ..MemBackend::of(kind, socket.to_owned()) }),
        vsock_override: Some(VsockOverride { uds_path: vm.vsock.clone() }),
        resume_vm: true,
        new_generation: true,
        ..SnapshotLoad::of(snapshot.to_owned())
    }
}

/// The load fails and says so; nothing is left of it, and nothing was started.
#[track_caller]
fn fails(vm: &mut Vm, document: &SnapshotLoad, words: &[&str]) {
    let held = |vm: &mut Vm| {
        vm.state();
        procfs::descriptors(vm.pid()).len()
    };
    let before = held(vm);
    let message = match vm.api().put("/snapshot/load", document) {
        Err(RestError::Refused { status: 400, message }) => message,
        other => panic!("it should have been refused: {other:?}"),
    };
    println!("{message}");
    let socket = document.mem_backend.as_ref().expect("there is a server").backend_path.display().to_string();
    assert!([words, &[&*socket]].concat().iter().all(|word| message.contains(word)), "{words:?}: {message}");
    assert_eq!(vm.state(), InstanceState::NotStarted);
    until("all descriptors are closed", || held(vm) <= before);
    let left = |name: &str| procfs::mappings(vm.pid()).iter().filter(|mapping| mapping.name.contains(name)).count();
    assert_eq!((left("uffd"), left("page-store")), (0, 0));
    assert!(!vm.vsock.exists(), "its socket is left behind");
}

/// The vmm loads the same guest from somewhere else.
fn loads_from(vm: &mut Vm, template: &Template, document: &SnapshotLoad) {
    vm.api().put("/snapshot/load", document).expect("it can be asked again");
    template.facts.check(&mut vm.agent());
}

/// By the command line it ends with 1 and one line.
#[track_caller]
fn ends(restore: Restore, words: &[&str]) {
    let vm = restore.start("clone");
    let (api, vsock) = (vm.api.clone(), vm.vsock.clone());
    let done = vm.process.finish();
    assert_eq!(done.code(), 1, "{}", done.stderr);
    assert!(words.iter().all(|word| done.stderr.contains(word)), "{words:?}: {}", done.stderr);
    assert!(!done.stderr.contains("panicked"), "{}", done.stderr);
    assert!(!api.exists() && !vsock.exists(), "sockets are left behind");
}

#[test]
fn a_load_from_a_damaged_image_fails_and_the_next_one_succeeds() {
    require!(Kvm, Userfaultfd);
    let template = Template::shared();
    for policy in POLICIES {
        let place = Place::new();
        let bad = copy(&template, &place, "bad");
        let server = PageServer::start(&place, &bad);
        overwrite(&bad);
        let mut vm = tests::vm::waiting(&place, "asked");
        let load = document(&vm, &bad, &server.socket, MemBackendType::UffdShared, policy);
        fails(&mut vm, &load, &["is gone", "check the snapshot"]);
        until("the server has let it go", || server.metrics().sessions.is_empty());
        // From now on its server refuses whoever comes.
        fails(&mut vm, &load, &["damaged"]);
        server.process.stop();
        let good = PageServer::start(&place, &template.snapshot);
        loads_from(&mut vm, &template, &SnapshotLoad { snapshot_path: template.snapshot.clone(), ..load });
        assert!(vm.info().page_server.is_some());
        vm.stop();
        good.process.stop();
    }
}

#[test]
fn a_restore_from_a_damaged_image_ends_with_1_and_says_why() {
    require!(Kvm, Userfaultfd);
    let template = Template::shared();
    for policy in POLICIES {
        for damage in [|snapshot: &Path| overwrite(snapshot), cut_short] {
            let place = Place::new();
            // The vmm has no memory file that it could look at.
            let (bad, bare) = (copy(&template, &place, "bad"), template.without_memory(&place));
            let server = PageServer::start(&place, &bad);
            damage(&bad);
            let socket = server.socket.to_str().expect("the path is text").to_owned();
            let restore = Restore::new(&place, &bare).uffd(&server).on_handler_loss(policy);
            ends(restore, &["the snapshot is not loaded", "is gone", &socket]);
            server.process.stop();
        }
    }
}

/// What was damaged is named where it can be known: by the vmm that has looked for itself, or by the server that refuses it.
#[test]
fn what_is_damaged_is_named() {
    require!(Kvm, Userfaultfd);
    let template = Template::shared();
    for policy in [OnHandlerLoss::Failover, OnHandlerLoss::Reattach, OnHandlerLoss::Pause] {
        let place = Place::new();
        let bad = copy(&template, &place, "bad");
        let server = PageServer::start(&place, &bad);
        overwrite(&bad);
        let image = bad.join("mem.bin").display().to_string();
        ends(
            Restore::new(&place, &bad).uffd(&server).on_handler_loss(policy),
            &["attaching to it again fails", "damaged", &image, "offset"],
        );
        server.process.stop();
    }
}

/// Copy mode waits for the first page before anything else is done, so it is that wait which ends.
#[test]
fn a_load_by_copies_of_a_damaged_image_fails_too() {
    require!(Kvm, Userfaultfd);
    let template = Template::shared();
    for policy in [OnHandlerLoss::Failover, OnHandlerLoss::Reattach] {
        let place = Place::new();
        let bad = copy(&template, &place, "bad");
        let server = PageServer::start(&place, &bad);
        overwrite(&bad);
        let mut vm = tests::vm::waiting(&place, "asked");
        let load = document(&vm, &bad, &server.socket, MemBackendType::Uffd, policy);
        fails(&mut vm, &load, &["has not delivered the first page", "closed the connection"]);
        server.process.stop();
        let good = PageServer::start(&place, &template.snapshot);
        loads_from(&mut vm, &template, &SnapshotLoad { snapshot_path: template.snapshot.clone(), ..load });
        vm.stop();
        good.process.stop();
    }
}

#[test]
fn a_load_from_a_store_that_is_out_of_reach_fails_until_it_is_back() {
    require!(Kvm, Userfaultfd);
    let template = Template::shared();
    for policy in POLICIES {
        let place = Place::new();
        let bare = template.without_memory(&place);
        let web = Web::start(template.place.path());
        let server = PageServer::start(&place, Path::new(&web.url("snapshot")));
        web.cut_off();
        let mut vm = tests::vm::waiting(&place, "asked");
        let load = document(&vm, &bare, &server.socket, MemBackendType::UffdShared, policy);
        fails(&mut vm, &load, &["cannot get"]);
        web.come_back();
        loads_from(&mut vm, &template, &load);
        vm.stop();
        server.process.stop();
    }
}

/// A signal while a load waits ends it, and whoever has asked is told.
#[test]
fn a_load_that_waits_can_be_ended() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (Template::shared(), Place::new());
    let mut server = PageServer::start(&place, &template.snapshot);
    let mut vm = tests::vm::waiting(&place, "asked");
    let (bare, mut api) = (template.without_memory(&place), vm.api());
    let load = document(&vm, &bare, &server.socket, MemBackendType::UffdShared, OnHandlerLoss::Reattach);
    // It takes the guest on, and then stands still.
    let answer = std::thread::scope(|scope| {
        let asked = scope.spawn(move || api.put("/snapshot/load", &load));
        until("it serves", || !server.metrics().sessions.is_empty() || asked.is_finished());
        server.process.signal(Signal::STOP);
        vm.process.signal(Signal::TERM);
        asked.join().expect("no panic")
    });
    // Which of the two was first is not known.
    if let Err(refused) = answer {
        assert!(refused.to_string().contains("the vmm is ending"), "{refused}");
    }
    let done = vm.process.finish();
    assert_eq!((done.code(), done.stderr.as_str()), (0, ""));
    server.process.signal(Signal::CONT);
    until("the session has ended", || server.metrics().sessions.is_empty());
}
