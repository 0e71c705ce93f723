//! `PUT /vm/save`: a guest stands still, is written to disk whole, and its vmm ends.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::client::rest::RestError;
use api_spec::vm::{InstanceState, VmSave};
use rustix::process::Signal;
use serde_json::json;
use std::io::Write;
use std::time::Duration;
use tests::http::{answers, connect, hear, request};
use tests::template::Facts;
use tests::{Boot, Place, Restore, Vm, require};

fn save(vm: &mut Vm, path: &std::path::Path) -> Result<(), String> {
    vm.api().put("/vm/save", &VmSave { snapshot_path: path.to_owned() }).map_err(|e| e.to_string())
}

#[test]
fn a_guest_that_was_saved_goes_on_where_it_stood() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) = Boot::new(&place).memory_mib(16).ready("guest");
    let facts = Facts::gather(&mut agent, 1);
    save(&mut vm, &place.join("saved")).expect("it can be saved");
    let finished = vm.process.finish();
    assert_eq!((finished.code(), finished.stderr.as_str()), (0, ""), "the answer came, and then the end");
    let (mut vm, mut agent) = Restore::new(&place, &place.join("saved")).ready("again");
    facts.check(&mut agent);
    // A paused one as well, and one that was restored.
    vm.pause();
    save(&mut vm, &place.join("saved-again")).expect("it can be saved");
    assert_eq!(vm.process.finish().code(), 0);
    let (vm, mut agent) = Restore::new(&place, &place.join("saved-again")).ready("once-more");
    facts.check(&mut agent);
    vm.stop();
}

#[test]
fn a_guest_that_cannot_be_saved_goes_on_if_it_ran() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) = Boot::new(&place).memory_mib(16).ready("guest");
    let facts = Facts::gather(&mut agent, 1);
    std::fs::create_dir(place.join("taken")).expect("a directory can be made");
    for path in [place.join("taken"), place.join("none/saved")] {
        let refused = save(&mut vm, &path).expect_err("there is no place for it");
        assert!(refused.contains("taken") || refused.contains("none"), "{refused}");
        assert_eq!(vm.state(), InstanceState::Running);
        facts.check(&mut agent);
    }
    vm.pause();
    save(&mut vm, &place.join("taken")).expect_err("there is no place for it");
    assert_eq!(vm.state(), InstanceState::Paused);
    vm.resume();
    facts.check(&mut agent);
    vm.stop();
}

/// One that waits for the folding of the snapshot before it, too.
#[test]
fn a_guest_is_saved_right_after_a_snapshot() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) = Boot::new(&place).memory_mib(16).ready("guest");
    let facts = Facts::gather(&mut agent, 1);
    vm.snapshot(&place.join("first"));
    save(&mut vm, &place.join("saved")).expect("it can be saved");
    assert_eq!(vm.process.finish().code(), 0);
    for snapshot in ["first", "saved"] {
        let (vm, mut agent) = Restore::new(&place, &place.join(snapshot)).ready(snapshot);
        facts.check(&mut agent);
        vm.stop();
    }
}

/// What is asked for behind a save, on the same connection, changes nothing about it; nor does what was asked before.
#[test]
fn a_save_ends_the_vmm_whatever_else_is_asked() {
    require!(Kvm);
    for order in [["save", "create"], ["create", "save"], ["save", "resume"], ["save", "save"]] {
        let place = Place::new();
        let (vm, mut agent) = Boot::new(&place).memory_mib(16).ready("guest");
        let facts = Facts::gather(&mut agent, 1);
        let mut said = Vec::new();
        for (number, what) in order.iter().enumerate() {
            let path = json!({ "snapshot_path": place.join(format!("{what}-{number}")) }).to_string();
            said.extend(match *what {
                "save" => request("PUT", "/vm/save", path.as_bytes()),
                "create" => request("PUT", "/snapshot/create", path.as_bytes()),
                _ => request("PATCH", "/vm", br#"{"state":"Resumed"}"#),
            });
        }
        let mut stream = connect(&vm.api);
        stream.write_all(&said).expect("the API listens");
        let heard = answers(&hear(&mut stream));
        assert_eq!(vm.process.finish().code(), 0, "{order:?}");
        let save = order.iter().position(|what| *what == "save").expect("there is one");
        let statuses: Vec<u16> = heard.iter().map(|answer| answer.status).collect();
        assert!(statuses[..=save].iter().all(|status| *status == 204), "{order:?}: {statuses:?}");
        assert!(statuses[save + 1..].iter().all(|status| *status == 400), "{order:?}: {statuses:?}");
        let (vm, mut agent) = Restore::new(&place, &place.join(format!("save-{save}"))).ready("again");
        facts.check(&mut agent);
        vm.stop();
    }
}

/// Another client cannot let the guest run on while it is being saved. Either it comes too late, or it is told so.
#[test]
fn a_guest_that_is_being_saved_cannot_be_resumed() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) = Boot::new(&place).memory_mib(512).ready("guest");
    Facts::gather(&mut agent, 1);
    let mut other = vm.api();
    let save = json!({ "snapshot_path": place.join("saved") }).to_string();
    let mut stream = connect(&vm.api);
    stream.write_all(&request("PUT", "/vm/save", save.as_bytes())).expect("the API listens");
    loop {
        // Before the save was heard of this changes nothing: the guest runs.
        match other.patch("/vm", &json!({ "state": "Resumed" })) {
            Ok(()) => {}
            Err(RestError::Refused { message, .. }) => {
                assert!(message.contains("being saved") || message.contains("is ending"), "{message}");
                break;
            }
            Err(_) => break,
        }
    }
    assert_eq!(answers(&hear(&mut stream))[0].status, 204);
    assert_eq!(vm.process.finish().code(), 0);
}

/// Whoever waits for a snapshot when the vmm is asked to end is told what became of it.
#[test]
fn a_snapshot_is_refused_at_the_end_just_if_there_is_none() {
    require!(Kvm);
    for delay_ms in [0, 1, 2, 4, 8, 16] {
        let place = Place::new();
        let (mut vm, mut agent) = Boot::new(&place).memory_mib(64).ready("guest");
        Facts::gather(&mut agent, 1);
        let mut stream = connect(&vm.api);
        let create = json!({ "snapshot_path": place.join("snap") }).to_string();
        stream.write_all(&request("PUT", "/snapshot/create", create.as_bytes())).expect("the API listens");
        std::thread::sleep(Duration::from_millis(delay_ms));
        vm.process.signal(Signal::TERM);
        let heard = answers(&hear(&mut stream));
        assert_eq!(vm.process.finish().code(), 0);
        let is_there = place.join("snap/snap.json").exists();
        match heard.first().map(|answer| answer.status) {
            Some(204) => assert!(is_there, "after {delay_ms} ms"),
            Some(400) => assert!(!is_there, "after {delay_ms} ms: {heard:?}"),
            // The end came before the request was read.
            None => assert!(!is_there, "after {delay_ms} ms"),
            other => panic!("{other:?}"),
        }
        assert!(place.names().iter().all(|name| !name.contains(".partial")), "{:?}", place.names());
    }
}
