//! Network interfaces and the source of entropy of guests that do not use them: what can be configured, what is refused, and
//! what a snapshot makes of it. What is in frames, and what Linux does with them, is in `linux_net.rs`.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::mac::MacAddr;
use api_spec::vm::VmConfig;
use tests::taps::is_inside;
use tests::{Boot, Place, Restore, Vm, require};

fn mac(last: u8) -> MacAddr {
    MacAddr::new([6, 0, 10, 9, 0, last]).expect("an address of one interface")
}

fn config(vm: &mut Vm) -> VmConfig {
    vm.api().get("/vm/config").expect("the configuration can be asked for")
}

/// That the vmm ends at once, with one line that says this.
#[track_caller]
fn refused(vm: Vm, words: &str) {
    let done = vm.process.finish();
    assert_eq!(done.code(), 1, "{}", done.stderr);
    assert!(done.stderr.contains(words) && done.stderr.trim_end().lines().count() == 1, "{}", done.stderr);
}

#[test]
fn each_clone_has_a_tap_and_a_mac_address_of_its_own() {
    require!(Kvm);
    if !is_inside("each_clone_has_a_tap_and_a_mac_address_of_its_own", &["tap0", "tap1", "tap2"]) {
        return;
    }
    let place = Place::new();
    let boot = || Boot::new(&place).entropy();
    refused(boot().network("eth0", "tap9", None).start("missing"), "there is no tap device tap9");
    refused(boot().network("eth0", "lo", None).start("other"), "lo is not a tap device");
    let twice = boot().network("eth0", "tap0", Some(mac(1))).network("eth1", "tap1", Some(mac(1)));
    refused(twice.start("twice"), "two network interfaces have the guest_mac 06:00:0a:09:00:01");

    let boot = boot().network("eth0", "tap0", Some(mac(1))).network("eth1", "tap1", None);
    let (mut parent, _agent) = boot.ready("parent");
    let known = config(&mut parent);
    let random = known.network_interfaces[1].guest_mac.expect("it was given one");
    assert_eq!(random.bytes()[0] & 3, 2, "of local administration");
    assert!(known.entropy.is_some());
    let path = place.join("snapshot");
    parent.snapshot(&path);

    refused(Restore::new(&place, &path).start("busy"), "the tap device tap0 is in use");
    let unknown = Restore::new(&place, &path).tap("eth7", "tap2", None);
    refused(unknown.start("unknown"), "the snapshot has no network interface eth7; it has: eth0, eth1");
    let same = Restore::new(&place, &path).tap("eth0", "tap2", Some(random));
    refused(same.start("same"), "two network interfaces have the guest_mac");
    parent.stop();

    let (mut clone, _agent) = Restore::new(&place, &path).tap("eth0", "tap2", Some(mac(3))).ready("clone");
    let network = config(&mut clone).network_interfaces;
    assert_eq!((&*network[0].host_dev_name, network[0].guest_mac), ("tap2", Some(mac(3))));
    assert_eq!((&*network[1].host_dev_name, network[1].guest_mac), ("tap1", Some(random)));
    clone.stop();
    let (mut clone, _agent) = Restore::new(&place, &path).by_api().tap("eth1", "tap2", None).ready("by-api");
    let network = config(&mut clone).network_interfaces;
    assert_eq!((&*network[0].host_dev_name, network[0].guest_mac), ("tap0", Some(mac(1))));
    assert_eq!((&*network[1].host_dev_name, network[1].guest_mac), ("tap2", Some(random)));
    clone.stop();
}
