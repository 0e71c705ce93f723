//! Booting, pausing and resetting a guest.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::agent::{GuestKind, Request};
use api_spec::vm::{InstanceState, Readiness};
use std::time::Duration;
use tests::template::Facts;
use tests::{Boot, Place, require, until};

fn boots_with(vcpus: u8) {
    let place = Place::new();
    let (mut vm, mut agent) = Boot::new(&place).vcpus(vcpus).ready("guest");
    // The agent answers while other CPUs are still being started.
    until("the guest is ready", || vm.info().readiness == Some(Readiness::Full));
    let info = agent.info();
    assert_eq!((info.kind, info.vcpus), (GuestKind::Embedded, vcpus));
    assert_eq!(vm.state(), InstanceState::Running);
    assert_eq!(agent.ping(7), 7);
    Facts::gather(&mut agent, 1).check(&mut agent);
    vm.stop();
    assert_eq!(place.names(), ["guest.json", "guest.log", "guest.out"], "the sockets are gone");
}

#[test]
fn one_vcpu_boots_to_full_readiness() {
    require!(Kvm);
    boots_with(1);
}

#[test]
fn two_vcpus_boot_to_full_readiness() {
    require!(Kvm);
    boots_with(2);
}

#[test]
fn four_vcpus_boot_to_full_readiness() {
    require!(Kvm);
    boots_with(4);
}

#[test]
fn eight_vcpus_boot_to_full_readiness() {
    require!(Kvm);
    boots_with(8);
}

#[test]
fn odd_numbers_of_vcpus_boot_to_full_readiness() {
    require!(Kvm);
    [3, 5, 6, 7].into_iter().for_each(boots_with);
}

#[test]
fn a_reset_by_the_guest_ends_the_vmm_in_good_order_and_with_a_code_of_its_own() {
    require!(Kvm);
    let place = Place::new();
    let (vm, mut agent) = Boot::new(&place).ready("guest");
    agent.try_ask(Request::Reset).expect_err("a reset machine does not answer");
    let done = vm.process.finish();
    assert_eq!((done.code(), done.stderr.as_str()), (4, ""));
    assert_eq!(place.names(), ["guest.json", "guest.log", "guest.out"], "the sockets are gone");
}

#[test]
fn a_paused_guest_is_silent_and_a_resumed_one_answers_on_the_same_stream() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) = Boot::new(&place).ready("guest");
    let facts = Facts::gather(&mut agent, 1);
    for _ in 0..3 {
        vm.pause();
        vm.pause();
        assert_eq!(vm.state(), InstanceState::Paused);
        let mut other = tests::Agent::connect(&vm.vsock);
        let silence = other.try_ask_within(Duration::from_millis(100), Request::Ping { token: 1 });
        silence.expect_err("a paused guest does not answer");
        vm.resume();
        vm.resume();
        assert_eq!(vm.state(), InstanceState::Running);
        facts.check(&mut agent);
    }
}
