//! Limits of a guest: at each of them it is paused, the reason can be read, and it goes on once there is room.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::agent::Pages;
use api_spec::vm::{InstanceState, MachineConfig, MachinePatch, VmPatch, VmState};
use tests::template::Facts;
use tests::{Agent, Boot, Place, Restore, Vm, require, until};

/// Pages of the working set and of what a guest then writes: 64 MiB.
const WRITTEN: Pages = Pages::run(4096, 64 << 8);

fn set_limit(vm: &mut Vm, max_private_mib: Option<u64>) {
    vm.api()
        .patch("/machine-config", &MachinePatch { max_private_mib: Some(max_private_mib), ..Default::default() })
        .expect("a limit can be changed");
}

fn resume(vm: &mut Vm) -> Result<(), String> {
    vm.api().patch("/vm", &VmPatch { state: VmState::Resumed }).map_err(|e| e.to_string())
}

/// Lets a guest write more than it may have, on a thread; waits until it is paused for it.
#[track_caller]
fn reach_the_limit(vm: &mut Vm, mut agent: Agent, limit: u64) -> std::thread::JoinHandle<Agent> {
    let writer = std::thread::spawn(move || {
        agent.fill(WRITTEN, 7);
        agent
    });
    until("the guest is paused", || vm.state() == InstanceState::Paused);
    let reason = vm.info().pause_reason.expect("nobody has paused it");
    println!("{}: {reason}", vm.name);
    assert!(reason.starts_with("max_private_mib: ") && reason.contains(&format!("of {limit} MiB")), "{reason}");
    writer
}

#[test]
fn a_clone_that_writes_too_much_is_paused_and_goes_on_with_more() {
    require!(Kvm, Userfaultfd);
    let place = Place::new();
    let (mut parent, mut agent) = Boot::new(&place).memory_mib(128).ready("parent");
    let facts = Facts::gather(&mut agent, 1);
    let path = place.join("snapshot");
    parent.snapshot(&path);
    let (mut clone, clone_agent) = Restore::new(&place, &path).max_private_mib(24).ready("clone");
    let (neighbour, mut neighbour_agent) =
        Restore::new(&place, &path).by_api().max_private_mib(1000).ready("neighbour");

    let writer = reach_the_limit(&mut clone, clone_agent, 24);
    neighbour_agent.fill(WRITTEN, 9);
    facts.check(&mut neighbour_agent);
    // It cannot go on as it is.
    for _ in 0..2 {
        let refused = resume(&mut clone).expect_err("there is no room");
        assert!(refused.contains("max_private_mib"), "{refused}");
        assert_eq!(clone.state(), InstanceState::Paused);
    }
    // Less than it has is still no room.
    set_limit(&mut clone, Some(20));
    resume(&mut clone).expect_err("there is still no room");

    set_limit(&mut clone, Some(120));
    resume(&mut clone).expect("there is room");
    let mut agent = writer.join().expect("the guest has written");
    assert_eq!((clone.state(), clone.info().pause_reason), (InstanceState::Running, None));
    assert_eq!(agent.mismatches(WRITTEN, 7), 0);
    facts.check(&mut agent);

    // A limit below what there is counts at once; without one the guest goes on.
    set_limit(&mut clone, Some(30));
    until("the guest is paused", || clone.state() == InstanceState::Paused);
    let config: MachineConfig = clone.api().get("/machine-config").expect("there is a configuration");
    assert_eq!(config.max_private_mib, Some(30));
    set_limit(&mut clone, None);
    resume(&mut clone).expect("there is no limit");
    facts.check(&mut agent);
    let log = clone.stop().stderr;
    assert_eq!(log.matches("the guest is paused: max_private_mib: ").count(), 2, "{log}");
    neighbour.stop();
    parent.stop();
}

/// A guest that was booted here shares its memory with the image that its snapshot becomes; only what it writes after that is
/// its own.
#[test]
fn a_booted_guest_reaches_its_limit_only_after_a_snapshot() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) = Boot::new(&place).memory_mib(128).max_private_mib(24).ready("guest");
    let facts = Facts::gather(&mut agent, 1);
    agent.fill(WRITTEN, 6);
    assert_eq!(vm.state(), InstanceState::Running);
    vm.snapshot(&place.join("snapshot"));
    facts.check(&mut agent);
    let writer = reach_the_limit(&mut vm, agent, 24);
    // What stands still can be snapshotted, and still stands.
    vm.snapshot(&place.join("halted"));
    assert_eq!(vm.state(), InstanceState::Paused);
    assert!(vm.info().pause_reason.is_some());
    set_limit(&mut vm, Some(500));
    resume(&mut vm).expect("there is room");
    facts.check(&mut writer.join().expect("the guest has written"));
    let (clone, mut agent) = Restore::new(&place, &place.join("halted")).ready("clone");
    facts.check(&mut agent);
    clone.stop();
    vm.stop();
}

#[test]
fn bad_limits_are_refused_by_name() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) = Boot::new(&place).ready("guest");
    let refused = |vm: &mut Vm, body: serde_json::Value| {
        vm.api().patch("/machine-config", &body).expect_err("it is no limit").to_string()
    };
    assert!(refused(&mut vm, serde_json::json!({ "max_private_mib": 0 })).contains("max_private_mib is 0"));
    assert!(refused(&mut vm, serde_json::json!({})).contains("max_private_mib"));
    assert!(refused(&mut vm, serde_json::json!({ "max_private_mib": -1 })).contains("invalid value"));
    assert!(refused(&mut vm, serde_json::json!({ "vcpu_count": 2 })).contains("vcpu_count"));
    assert_eq!(agent.ping(3), 3);
    vm.stop();
}
