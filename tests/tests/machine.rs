//! Machines at their limits: many vCPUs.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::agent::burn::Burn;
use tests::template::Facts;
use tests::{Boot, PageServer, Place, Restore, require};

/// All eight compute while the snapshot is taken, and go on computing in the guest and in its clones.
#[test]
fn eight_vcpus_go_on_in_clones() {
    require!(Kvm, Userfaultfd);
    let place = Place::new();
    let (mut parent, mut agent) = Boot::new(&place).vcpus(8).ready("parent");
    let facts = Facts::gather(&mut agent, 1);
    for vcpu in 1..8 {
        agent.burn_start(vcpu);
    }
    agent.ticks(50);
    let path = place.join("snapshot");
    parent.snapshot(&path);
    let server = PageServer::start(&place, &path);
    let by_file = Restore::new(&place, &path).ready("by-file");
    let by_uffd = Restore::new(&place, &path).uffd(&server).ready("by-uffd");
    for (vm, mut agent) in [(parent, agent), by_file, by_uffd] {
        facts.check(&mut agent);
        assert_eq!(agent.info().vcpus, 8);
        for vcpu in 1..8 {
            let burn = agent.burn_stop(vcpu);
            assert_eq!(burn, Burn::after(burn.steps), "{}: vCPU {vcpu}", vm.name);
        }
        vm.stop();
    }
}
