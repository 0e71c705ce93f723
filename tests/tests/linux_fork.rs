//! A Linux guest is forked while it runs and writes to its disk, and reset. Runs in the reference machine: `tests/rig/run` is the runner.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::devices::{CacheType, Drive};
use api_spec::fork::{ForkTarget, VmFork};
use api_spec::reset::{VmCheckpoint, VmReset};
use api_spec::snapshot::VsockOverride;
use api_spec::vm::Readiness;
use std::fs::File;
use tests::linux::{LinuxAgent, PATIENCE, assert_calm};
use tests::vm::{drive, waiting};
use tests::{Boot, Linux, Place, Vm};

/// A guest that is seen to schedule, to have a clock that goes on, and files of its own.
fn works(agent: &mut LinuxAgent, marker: &str) {
    assert_eq!(agent.shell("cat /run/marker"), marker);
    let uptime = |agent: &mut LinuxAgent| agent.shell("cut -d. -f1 /proc/uptime").parse::<u64>().expect("a number");
    let before = uptime(agent);
    agent.shell("sleep 1");
    assert!(uptime(agent) > before);
}

fn mark(agent: &mut LinuxAgent, marker: &str) {
    agent.shell(&format!("echo {marker} > /run/marker"));
}

#[test]
fn a_linux_guest_is_forked_while_it_runs_and_reset() {
    let Some(linux) = Linux::guest("6.12") else { return };
    let place = Place::new();
    let image = place.join("disk.img");
    File::create(&image).and_then(|file| file.set_len(64 << 20)).expect("a file can be made in the test's directory");
    let disk = Drive { overlay: true, cache_type: CacheType::Writeback, ..drive("data", &image) };
    let mut parent = Boot::new(&place).linux(&linux.elf(), "").drive(disk).start("parent");
    parent.becomes(Readiness::Full);
    let mut agent = parent.linux_agent();
    mark(&mut agent, "common");
    agent.leave("while :; do echo >>/run/busy; done");
    agent.keep_writing();

    // One of the booted guest, and one of that.
    let mut clones: Vec<(Vm, LinuxAgent)> = Vec::new();
    for number in 0..2 {
        let mut clone = waiting(&place, &format!("clone{number}"));
        clone.state();
        let vsock_override = Some(VsockOverride { uds_path: clone.vsock.clone() });
        let target = ForkTarget { api_sock: clone.api.clone(), vsock_override, network_overrides: Vec::new() };
        let request = VmFork { into: vec![target], count: Some(1), resume_vm: true, new_generation: true };
        let mut client = clones.last_mut().map_or_else(|| parent.client(), |(last, _)| last.client());
        client.set_patience(PATIENCE);
        client.fork(&request).unwrap_or_else(|e| panic!("fork {number}: {e}"));
        let mut agent = clone.linux_agent();
        agent.becomes_itself(&format!("clone{number}"));
        clones.push((clone, agent));
    }
    for (number, (_, clone)) in clones.iter_mut().enumerate() {
        works(clone, "common");
        mark(clone, &format!("clone{number}"));
    }
    works(&mut agent, "common");
    mark(&mut agent, "parent");
    let mut ids = vec![agent.generation()];
    for (number, (_, clone)) in clones.iter_mut().enumerate() {
        works(clone, &format!("clone{number}"));
        ids.push(clone.generation());
    }
    assert!(ids[0] != ids[1] && ids[1] != ids[2] && ids[0] != ids[2], "{ids:?}");
    works(&mut agent, "parent");
    // Each goes on writing where all of them were, and finds what it has written, once.
    for agent in clones.iter_mut().map(|(_, agent)| agent).chain([&mut agent]) {
        let written = agent.written();
        println!("{} blocks", agent.stop_writing(written));
    }
    assert!(
        std::fs::read(&image).expect("it can be read").iter().all(|byte| *byte == 0),
        "nobody has written to the image"
    );

    // Back to where it is now, each time.
    let mut client = parent.client();
    client.set_patience(PATIENCE);
    client.checkpoint(&VmCheckpoint {}).expect("it is remembered");
    for round in 0..3 {
        mark(&mut agent, "gone");
        agent.shell("echo x > /run/other; head -c 4000000 /dev/urandom > /run/large");
        let done = client.reset(&VmReset::default()).expect("it is reset");
        assert!(done.dirty_pages > 900, "{round}: {done:?}");
        agent = parent.linux_agent();
        works(&mut agent, "parent");
        assert_eq!(agent.shell("ls /run/other /run/large 2>/dev/null | wc -l"), "0", "{round}");
    }
    let all = clones.into_iter().map(|(clone, agent)| (clone, agent)).chain([(parent, agent)]);
    for (vm, mut agent) in all {
        agent.power_off().expect("it agrees to be switched off");
        let done = vm.process.finish_within(PATIENCE);
        assert_eq!(done.code(), 0, "{done:?}");
        assert_calm(&done.stdout);
    }
}
