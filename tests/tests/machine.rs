//! Machines at their limits: many vCPUs, much memory.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::agent::Pages;
use api_spec::agent::burn::Burn;
use api_spec::agent::pattern::Checksum;
use std::os::unix::fs::MetadataExt;
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

/// Memory in two parts, around the hole for devices below 4 GiB: written, snapshotted and restored on both sides of it, from
/// the file and from a page server; what nobody has touched takes no space.
#[test]
fn memory_beyond_the_hole_goes_through_a_snapshot() {
    require!(Kvm, Userfaultfd);
    const MIB: u64 = 5 << 10;
    let place = Place::new();
    let (mut parent, mut agent) = Boot::new(&place).memory_mib(MIB).ready("parent");
    let facts = Facts::gather(&mut agent, 1);
    let info = agent.info();
    let page_at = |addr: u64| u32::try_from((addr - info.pages_base) / 4096).expect("so many pages there are");
    let hole = page_at(3 << 30);
    assert_eq!(info.pages, hole + (2 << 18), "2 GiB lie above the hole");
    // On both sides of the hole, and the last of all; the other ones of a run far from both.
    let runs = [
        Pages::run(hole - 40, 80),
        Pages { first: hole + (1 << 18) - 50, count: 100, stride: 3 },
        Pages::run(info.pages - 30, 30),
    ];
    for (pages, seed) in runs.into_iter().zip(1..) {
        agent.fill(pages, seed);
    }
    let path = place.join("snapshot");
    let status = parent.snapshot(&path);
    let on_disk = path.join("mem.bin").metadata().expect("it is there");
    println!("snapshot of {MIB} MiB: {} bytes written, {} on disk", status.memory_bytes, on_disk.blocks() * 512);
    assert_eq!(on_disk.len(), MIB << 20);
    assert!(status.memory_bytes < 64 << 20 && on_disk.blocks() * 512 < 64 << 20);

    let server = PageServer::start(&place, &path);
    let by_file = Restore::new(&place, &path).ready("by-file");
    let by_uffd = Restore::new(&place, &path).uffd(&server).ready("by-uffd");
    // Each changes what it has before the next one is looked at.
    for (vm, mut agent) in [(parent, agent), by_file, by_uffd] {
        facts.check(&mut agent);
        for (pages, seed) in runs.into_iter().zip(1..) {
            assert_eq!(agent.mismatches(pages, seed), 0, "{}: run {seed}", vm.name);
            assert_eq!(agent.checksum(pages), Checksum::of_pattern(pages, seed).value());
            agent.fill(pages, 100 + seed);
            assert_eq!(agent.mismatches(pages, 100 + seed), 0, "{}: run {seed}, written", vm.name);
        }
        assert_eq!(agent.touch(Pages { first: hole + 100, count: 100, stride: 7 }), 0, "what nobody wrote is zero");
        vm.stop();
    }
}
