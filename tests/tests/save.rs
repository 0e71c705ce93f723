//! `PUT /vm/save`: a guest stands still, is written to disk whole, and its vmm ends.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::vm::{InstanceState, VmSave};
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
