//! A guest that cannot prepare for its snapshot: that is told by name, before anything is done. What guests that can do is in
//! `linux_trim.rs`.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::client::rest::RestError;
use api_spec::devices::Balloon;
use api_spec::snapshot::{SnapshotCreate, SnapshotState};
use serde_json::json;
use std::path::Path;
use tests::vm::waiting;
use tests::{Boot, Place, Restore, Vm, require};

fn balloon() -> Balloon {
    Balloon {
        amount_mib: 2,
        deflate_on_oom: false,
        stats_polling_interval_s: 0,
        free_page_reporting: true,
        free_page_hinting: false,
    }
}

fn trim(path: &Path) -> SnapshotCreate {
    SnapshotCreate { trim: true, ..SnapshotCreate::of(path.to_owned()) }
}

fn hooks(path: &Path) -> SnapshotCreate {
    SnapshotCreate { run_hooks: true, ..SnapshotCreate::of(path.to_owned()) }
}

/// The vmm refuses it in these words, and nothing has happened.
#[track_caller]
fn refused(vm: &mut Vm, create: &SnapshotCreate, words: &[&str]) {
    let before = vm.client().snapshot_status().expect("it is told");
    match vm.client().snapshot_create(create) {
        Err(RestError::Refused { status: 400, message }) => {
            assert!(words.iter().all(|word| message.contains(word)), "{message}");
        }
        other => panic!("should have been refused for {words:?}: {other:?}"),
    }
    assert_eq!(vm.client().snapshot_status().expect("it is told"), before);
    assert!(!create.snapshot_path.exists());
}

#[test]
fn what_cannot_be_done_is_refused_by_name_before_anything_is() {
    require!(Kvm);
    let place = Place::new();
    let path = place.join("snapshot");
    let (mut vm, _agent) = Boot::new(&place).balloon(balloon()).ready("guest");
    refused(&mut vm, &trim(&path), &["trim", "embedded guest"]);
    refused(&mut vm, &hooks(&path), &["run_hooks", "embedded guest"]);
    vm.pause();
    refused(&mut vm, &trim(&path), &["trim", "paused", "resume"]);
    refused(&mut vm, &hooks(&path), &["run_hooks", "paused"]);
    // A snapshot without either is what it was.
    let status = vm.snapshot(&path);
    assert_eq!((status.state, status.trimmed), (SnapshotState::Done, None));
    vm.stop();

    // A clone whose guest was not told yet who it is.
    let mut clone = Restore::new(&place, &path).start("clone");
    refused(&mut clone, &trim(&place.join("second")), &["trim", "agent"]);
    clone.stop();

    let (mut vm, _agent) = Boot::new(&place).ready("without-balloon");
    refused(&mut vm, &trim(&place.join("second")), &["trim", "no balloon", "PUT /balloon"]);
    vm.stop();
    let mut vm = waiting(&place, "without-vsock");
    let mut api = vm.api();
    api.put("/boot-source", &json!({ "embedded_guest": true })).expect("there is one");
    api.put("/balloon", &balloon()).expect("it can have one");
    api.put("/actions", &json!({ "action_type": "InstanceStart" })).expect("it starts");
    refused(&mut vm, &trim(&place.join("second")), &["trim", "no vsock device", "PUT /vsock"]);
    refused(&mut vm, &hooks(&place.join("second")), &["run_hooks", "no vsock device"]);
    vm.stop();
}
