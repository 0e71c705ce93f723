//! Linux guests prepare for their snapshots. Runs in the reference machine: `tests/rig/run` is the runner.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::devices::{Balloon, BalloonStatistics, Drive};
use api_spec::snapshot::{SnapshotCancel, SnapshotCreate, SnapshotState, SnapshotStatus, Trimmed};
use api_spec::vm::Readiness;
use std::path::Path;
use tests::linux::{Console, LinuxAgent, PATIENCE, assert_calm};
use tests::random::Random;
use tests::vm::{balloon, drive};
use tests::{Boot, Linux, Place, Restore, Vm, holds_within};

const MIB: u64 = 1 << 20;
const MEMORY_MIB: u64 = 320;
/// What the guest reads of a disk, and what of that must not be stored at least: some of it may be in what the guest keeps.
const READ_MIB: u64 = 96;
const GONE_MIB: u64 = 64;
/// What the balloon holds before and after.
const BALLOON_MIB: u64 = 8;

fn boot(place: &Place, linux: Linux) -> (Vm, LinuxAgent) {
    let disk = place.join("disk");
    let mut random = Random::new(1);
    let bytes: Vec<u8> = (0..READ_MIB * MIB / 8).flat_map(|_| random.next().to_le_bytes()).collect();
    std::fs::write(&disk, bytes).expect("there is room for a disk");
    let boot = Boot::new(place).linux(&linux.elf(), "").memory_mib(MEMORY_MIB).balloon(balloon(BALLOON_MIB));
    let disk = Drive { is_read_only: true, ..drive("data", &disk) };
    let mut vm = boot.drive(disk).start("original");
    vm.becomes(Readiness::Full);
    let agent = vm.linux_agent();
    settles(&mut vm);
    (vm, agent)
}

fn statistics(vm: &mut Vm) -> BalloonStatistics {
    vm.api().get("/balloon/statistics").expect("there is a balloon")
}

/// Waits until the balloon is as large as it is configured.
#[track_caller]
fn settles(vm: &mut Vm) {
    let came = holds_within(PATIENCE, || statistics(vm).actual_mib == BALLOON_MIB);
    let last = statistics(vm);
    assert!(came, "{}: {last:?}", vm.name);
}

/// A line of /proc/meminfo, in bytes.
fn meminfo(agent: &mut LinuxAgent, field: &str) -> u64 {
    let kib = agent.shell(&format!("sed -n 's/^{field}: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo"));
    kib.parse::<u64>().expect("a number of KiB") * 1024
}

fn create(vm: &mut Vm, create: &SnapshotCreate) -> Result<SnapshotStatus, String> {
    vm.client().snapshot_create(create).map_err(|e| e.to_string())?;
    let status = vm.client().snapshot_status().expect("it is told");
    assert_eq!((status.state, &status.error), (SnapshotState::Done, &None));
    Ok(status)
}

fn trimmed(path: &Path) -> SnapshotCreate {
    SnapshotCreate { trim: true, ..SnapshotCreate::of(path.to_owned()) }
}

fn hooks(path: &Path) -> SnapshotCreate {
    SnapshotCreate { run_hooks: true, ..SnapshotCreate::of(path.to_owned()) }
}

/// What a guest remembers of a disk is in a snapshot of it, and not in one for which it was trimmed.
#[test]
fn caches_are_not_stored_of_a_guest_that_is_trimmed() {
    let Some(linux) = Linux::guest("6.12") else { return };
    let place = Place::new();
    let (mut vm, mut agent) = boot(&place, linux);
    let total = meminfo(&mut agent, "MemTotal");
    // Linux forgets a disk that nobody has open.
    agent.leave("exec sleep 1000000 </dev/vda");
    agent.shell("cat /dev/vda >/dev/null");
    let cached = meminfo(&mut agent, "Buffers");
    assert!(cached >= READ_MIB * MIB, "{cached} bytes are remembered of the disk");
    let sum = agent.shell("head -c 1048576 /dev/vda | md5sum");

    let plain = vm.snapshot(&place.join("plain"));
    assert_eq!(plain.trimmed, None);
    let path = place.join("trimmed");
    let status = create(&mut vm, &trimmed(&path)).expect("there is a snapshot");
    println!(
        "{} KiB are stored, and {} KiB of the trimmed guest: {:?}",
        plain.memory_bytes / 1024,
        status.memory_bytes / 1024,
        status.trimmed
    );
    assert!(plain.memory_bytes >= READ_MIB * MIB, "{plain:?}");
    assert!(status.memory_bytes + GONE_MIB * MIB < plain.memory_bytes, "{plain:?} {status:?}");
    let told = status.trimmed.expect("it was trimmed");
    assert_eq!(told.shortfall, None);
    assert!(told.given_back_bytes >= READ_MIB * MIB, "{told:?}");

    // The parent and its clone have the balloon that is configured, all their memory, and what was in it.
    let mut clone = Restore::new(&place, &path).start("clone");
    let mut clones_agent = clone.linux_agent();
    clones_agent.becomes_itself("clone");
    for (vm, agent) in [(&mut vm, &mut agent), (&mut clone, &mut clones_agent)] {
        let BalloonStatistics { target_mib, actual_mib, .. } = statistics(vm);
        assert_eq!((target_mib, actual_mib), (BALLOON_MIB, BALLOON_MIB), "{}", vm.name);
        assert_eq!(vm.api().get::<Balloon>("/balloon").expect("there is one").amount_mib, BALLOON_MIB);
        assert_eq!(meminfo(agent, "MemTotal"), total, "{}", vm.name);
        assert_eq!(agent.shell("head -c 1048576 /dev/vda | md5sum"), sum, "{}", vm.name);
    }
    // What came of it is told of the last snapshot alone.
    assert_eq!(vm.snapshot(&place.join("last")).trimmed, None);
    assert_calm(&clone.stop().stdout);
    assert_calm(&vm.stop().stdout);
}

/// Hooks that fail cost the snapshot. A guest that gives nothing back, or whose agent does not answer, does not.
#[test]
fn a_guest_that_does_not_do_its_part_is_snapshotted_all_the_same() {
    let Some(linux) = Linux::guest("6.1") else { return };
    let place = Place::new();
    let (mut vm, mut agent) = boot(&place, linux);
    const HOOKS: &str = "/etc/coppice/hooks.d/pre-snapshot";
    agent.shell(&format!(
        "mkdir -p {HOOKS}; printf '#!/bin/sh\ntouch /tmp/ran\n' >{HOOKS}/10-ran; chmod +x {HOOKS}/10-ran"
    ));
    create(&mut vm, &hooks(&place.join("hooked"))).expect("the hook does its work");
    assert_eq!(agent.shell("rm /tmp/ran && echo it ran"), "it ran");
    agent.shell(&format!("printf '#!/bin/sh\nexit 3\n' >{HOOKS}/20-no; chmod +x {HOOKS}/20-no"));
    let both = SnapshotCreate { trim: true, ..hooks(&place.join("never")) };
    let told = create(&mut vm, &both).expect_err("a hook fails");
    assert!(["run_hooks", "`20-no`", "code 3"].iter().all(|word| told.contains(word)), "{told}");
    assert_eq!(vm.client().snapshot_status().expect("it is told").state, SnapshotState::Failed);
    assert!(!place.names().iter().any(|name| name.contains("never")), "{:?}", place.names());
    assert_eq!(statistics(&mut vm).target_mib, BALLOON_MIB);

    agent.shell("rmmod virtio_balloon");
    let status = create(&mut vm, &trimmed(&place.join("no-driver"))).expect("there is a snapshot");
    let Trimmed { shortfall, .. } = status.trimmed.expect("it was to be trimmed");
    assert!(shortfall.as_ref().is_some_and(|why| why.contains("virtio_balloon")), "{shortfall:?}");

    // The agent stands still from now on. Not the first process, which cannot be stopped.
    agent.leave("sleep 3; kill -STOP $(pidof guest-agent); echo The agent stands still >/dev/console");
    vm.said("The agent stands still");
    let given_up = trimmed(&place.join("given-up"));
    let mut other = vm.client();
    std::thread::scope(|scope| {
        let asked = scope.spawn(move || other.snapshot_create(&given_up));
        let preparing = holds_within(PATIENCE, || {
            vm.client().snapshot_status().is_ok_and(|status| status.state == SnapshotState::Preparing)
        });
        assert!(preparing);
        let second = vm.try_snapshot(&place.join("second")).expect_err("one at a time").to_string();
        assert!(second.contains("still being written"), "{second}");
        vm.client().snapshot_cancel(&SnapshotCancel {}).expect("it can be given up");
        let told = asked.join().expect("no panic").expect_err("it was given up").to_string();
        assert!(told.contains("cancelled"), "{told}");
    });
    // The agent is waited for all the same, and no second time meanwhile.
    let silent = trimmed(&place.join("silent"));
    let busy = create(&mut vm, &silent).expect_err("the agent is still to answer");
    assert!(busy.contains("busy"), "{busy}");
    let mut taken = None;
    holds_within(PATIENCE, || {
        taken = create(&mut vm, &silent).inspect_err(|e| assert!(e.contains("busy"), "{e}")).ok();
        taken.is_some()
    });
    let Trimmed { shortfall, .. } = taken.and_then(|status| status.trimmed).expect("it was to be trimmed");
    assert!(shortfall.as_ref().is_some_and(|why| why.contains("did not answer")), "{shortfall:?}");
    Restore::new(&place, &silent.snapshot_path).start("clone").stop();
    assert_calm(&vm.stop().stdout);
}
