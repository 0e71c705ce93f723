//! Memory that is taken away under a running guest: the guest ends, and its vmm says why.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::agent::Request;
use api_spec::vm::InstanceState;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use tests::{Place, Restore, Template, TemplateOptions, Vm, require, until};

/// Cuts the memory file of a snapshot short, which nobody should.
fn cut_short(template: &Template) {
    let memory = template.snapshot.join("mem.bin");
    fs::set_permissions(&memory, Permissions::from_mode(0o600)).expect("it is ours");
    File::options().write(true).open(memory).expect("it can be opened").set_len(0).expect("it can be cut short");
}

fn ends_with_a_reason(vm: Vm) {
    let done = vm.process.finish();
    assert_eq!(done.code(), 1, "{}", done.stderr);
    assert!(done.stderr.contains("guest's memory") && done.stderr.contains("cut short"), "{}", done.stderr);
}

#[test]
fn a_guest_whose_memory_file_is_cut_short_ends_with_a_reason() {
    require!(Kvm);
    let (template, place) = (Template::make(TemplateOptions::default()), Place::new());
    let (vm, mut agent) = Restore::new(&place, &template.snapshot).no_replay().ready("clone");
    cut_short(&template);
    // It may come as far as an answer only if it has all that it needs.
    let _ = agent.try_ask(Request::Checksum { pages: template.facts.working_set });
    ends_with_a_reason(vm);
}

/// Here it is the vmm that reads: all of memory, to write it.
#[test]
fn a_vmm_whose_guests_memory_file_is_cut_short_ends_with_a_reason() {
    require!(Kvm);
    let (template, place) = (Template::make(TemplateOptions::default()), Place::new());
    let mut vm = Restore::new(&place, &template.snapshot).no_replay().paused().start("clone");
    until("it is restored", || vm.state() == InstanceState::Paused);
    // Nothing is known any more that a snapshot could be written over.
    fs::remove_file(template.snapshot.join("snap.json")).expect("it can be removed");
    cut_short(&template);
    let _ = vm.try_snapshot(&place.join("never"));
    ends_with_a_reason(vm);
    assert!(!place.join("never").exists());
    // It can remove nothing at such an end. Whoever is next in the same places does.
    let left = |part: &str| place.names().iter().any(|name| name.contains(part));
    assert!(left("clone.api") && left(".never.partial"), "{:?}", place.names());
    let template = Template::make(TemplateOptions::default());
    let (mut vm, mut agent) = Restore::new(&place, &template.snapshot).ready("clone");
    template.facts.check(&mut agent);
    vm.snapshot(&place.join("never"));
    assert!(!left(".partial"), "{:?}", place.names());
    vm.stop();
    assert!(!left("clone.api") && !left("vsock"), "{:?}", place.names());
}
