//! Disks of Linux guests: what they write is there, once, in the guest and in each of its clones, and nowhere else. Runs in the
//! reference machine: `tests/rig/run` is the runner.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::devices::{CacheType, Drive, DriveUpdate};
use api_spec::vm::{InstanceState, Readiness};
use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use tests::linux::{LinuxAgent, PATIENCE, assert_calm};
use tests::vm::drive;
use tests::{Boot, Linux, Place, Restore, Vm, holds_within};

const BLOCK: usize = 4096;
const MIB: usize = 1 << 20;
/// Size of the disks, in MiB.
const SIZE_MIB: usize = 64;

/// An image whose blocks each say which they are, and its contents.
fn image(place: &Place) -> (PathBuf, Vec<u8>) {
    let bytes: Vec<u8> =
        (0..SIZE_MIB * MIB / BLOCK).flat_map(|n| format!("{:<BLOCK$}", format!("block {n}")).into_bytes()).collect();
    let path = place.join("disk.img");
    fs::write(&path, &bytes).expect("a file can be made in the test's directory");
    (path, bytes)
}

fn overlay(path: &Path) -> Drive {
    Drive { overlay: true, cache_type: CacheType::Writeback, ..drive("data", path) }
}

fn boot(place: &Place, linux: Linux, drive: Drive) -> (Vm, LinuxAgent) {
    let mut vm = Boot::new(place).linux(&linux.elf(), "").drive(drive).start("parent");
    vm.becomes(Readiness::Full);
    let agent = vm.linux_agent();
    (vm, agent)
}

fn restore(place: &Place, snapshot: &Path, name: &str) -> (Vm, LinuxAgent) {
    let mut vm = Restore::new(place, snapshot).start(name);
    let mut agent = vm.linux_agent();
    agent.becomes_itself(name);
    vm.becomes(Readiness::Full);
    (vm, agent)
}

/// The first word or two of a block.
fn block(agent: &mut LinuxAgent, number: u32) -> String {
    agent.shell(&format!("dd if=/dev/vda bs={BLOCK} skip={number} count=1 2>/dev/null | tr -d '\\0'"))
}

fn write_block(agent: &mut LinuxAgent, number: u32, text: &str) {
    let dd = format!("dd of=/dev/vda bs={BLOCK} seek={number} conv=notrunc,fsync");
    agent.shell(&format!("printf '%-{BLOCK}s' '{text}' | {dd} 2>/dev/null"));
}

#[test]
fn a_file_system_on_an_overlay_lives_in_each_clone_by_itself() {
    let Some(linux) = Linux::guest("6.1") else { return };
    let place = Place::new();
    let (path, before) = image(&place);
    let (mut vm, mut agent) = boot(&place, linux, overlay(&path));
    let facts = "cd /sys/block/vda; cat serial; echo; cat queue/write_cache queue/physical_block_size ro";
    assert_eq!(agent.shell(facts), "data\nwrite back\n4096\n0");
    assert_eq!(agent.shell("blockdev --getsize64 /dev/vda"), (SIZE_MIB * MIB).to_string());
    assert_eq!(block(&mut agent, 12_345), "block 12345");
    println!(
        "{}",
        agent.shell("cd /sys/block/vda/queue; grep . discard_max_bytes write_zeroes_max_bytes max_segments")
    );

    agent.shell("blkdiscard -o 4194304 -l 1048576 /dev/vda");
    assert_eq!((block(&mut agent, 1024), block(&mut agent, 1023)), (String::new(), "block 1023".to_owned()));
    agent.shell("mke2fs -q /dev/vda; mkdir /mnt; mount -t ext4 /dev/vda /mnt");
    agent.shell("dd if=/dev/urandom of=/mnt/a bs=64k count=100 2>/dev/null; cp /bin/busybox /mnt/b; sync");
    let sums = agent.shell("cd /mnt; md5sum a b");
    agent.forget_disk();
    assert_eq!(agent.shell("cd /mnt; md5sum a b"), sums);
    println!("trimmed: {}", agent.shell("fstrim -v /mnt"));
    agent.forget_disk();
    assert_eq!(agent.shell("cd /mnt; md5sum a b"), sums, "what is in use is not trimmed");

    let snapshot = place.join("snapshot");
    agent.pre_snapshot().expect("the guest prepares for a snapshot");
    vm.snapshot(&snapshot);
    agent.shell("echo parent >/mnt/who; rm /mnt/a; sync");

    // Each writes its own, at the same time, over the same base.
    let mut clones = ["clone-a", "clone-b"].map(|name| restore(&place, &snapshot, name));
    for (clone, agent) in &mut clones {
        agent.forget_disk();
        assert_eq!(agent.shell("cd /mnt; md5sum a b; ls"), format!("{sums}\na\nb\nlost+found"));
        agent.shell(&format!("echo {} >/mnt/who; cp /mnt/a /mnt/{0}; sync", clone.name));
    }
    let second = place.join("second");
    for (clone, agent) in &mut clones {
        agent.forget_disk();
        let name = clone.name.clone();
        assert_eq!(agent.shell("cat /mnt/who"), name);
        assert_eq!(agent.shell("cd /mnt; ls"), format!("a\nb\n{name}\nlost+found\nwho"));
        let sums = agent.shell(&format!("cd /mnt; md5sum <a; md5sum <{name}"));
        assert_eq!(sums.lines().collect::<HashSet<_>>().len(), 1, "{sums}");
    }
    // A clone of a clone has what both have written.
    let (first, agent_a) = &mut clones[0];
    agent_a.pre_snapshot().expect("the guest prepares for a snapshot");
    first.snapshot(&second);
    let (grandchild, mut agent_c) = restore(&place, &second, "grandchild");
    agent_c.forget_disk();
    assert_eq!(agent_c.shell("cat /mnt/who; cd /mnt; md5sum a b"), format!("clone-a\n{sums}"));
    agent.forget_disk();
    assert_eq!(agent.shell("cat /mnt/who; ls /mnt"), "parent\nb\nlost+found\nwho");
    let [a, b] = clones.map(|(vm, _)| vm);
    for vm in [vm, a, b, grandchild] {
        assert_calm(&vm.stop().stdout);
    }
    assert!(fs::read(&path).expect("it can be read") == before, "nobody has written to the image");
}

/// Writes 24 MiB in one go.
const BULK: &str = "yes coppice | head -c 25165824";

/// The writers of a guest end; what they wrote is on its disk, each block once and in its place.
fn check_writes(vm: &Vm, agent: &mut LinuxAgent, at_least: u32) {
    let name = &vm.name;
    assert!(
        holds_within(PATIENCE, || agent.shell("cat /tmp/bulk 2>/dev/null || true") == "done"),
        "{name}: dd goes on"
    );
    let last = agent.stop_writing(at_least);
    assert_eq!(block(agent, 4096 + last + 2), format!("block {}", 4096 + last + 2), "{name}: and no other");
    let bulk = agent.shell("dd if=/dev/vda bs=1M skip=32 count=24 2>/dev/null | md5sum");
    assert_eq!(bulk, agent.shell(&format!("{BULK} | md5sum")), "{name}");
    println!("{name}: {last} blocks and 24 MiB");
}

fn writes_go_on(drive: impl FnOnce(&Path) -> Drive) {
    let Some(linux) = Linux::guest("6.12") else { return };
    let place = Place::new();
    let (path, before) = image(&place);
    let drive = drive(&path);
    let shared = drive.overlay;
    let (mut vm, mut agent) = boot(&place, linux, drive);
    agent.keep_writing();
    agent.leave(&format!(
        "{BULK} | dd of=/dev/vda bs=64k seek=512 conv=notrunc,fsync 2>/dev/null && echo done >/tmp/bulk"
    ));
    let snapshot = place.join("snapshot");
    let count = agent.written();
    agent.pre_snapshot().expect("the guest prepares for a snapshot");
    let status = vm.snapshot(&snapshot);
    println!("snapshot at block {count}: stood still {} us", status.pause_us);
    check_writes(&vm, &mut agent, count);
    for name in ["clone-a", "clone-b"] {
        let (clone, mut agent) = restore(&place, &snapshot, name);
        check_writes(&clone, &mut agent, count);
        assert_calm(&clone.stop().stdout);
    }
    assert_calm(&vm.stop().stdout);
    let after = fs::read(&path).expect("it can be read");
    assert_eq!(after == before, shared, "the image is written by a guest that has it for itself, and by no other");
}

#[test]
fn a_snapshot_while_an_overlay_is_written_loses_and_doubles_nothing() {
    writes_go_on(overlay);
}

#[test]
fn a_snapshot_while_an_image_is_written_loses_and_doubles_nothing() {
    writes_go_on(|path| Drive { cache_type: CacheType::Writeback, ..drive("data", path) });
}

#[test]
fn what_a_guest_has_flushed_is_in_the_image() {
    let Some(linux) = Linux::guest("6.1") else { return };
    let place = Place::new();
    let (path, mut wanted) = image(&place);
    let raw = Drive { cache_type: CacheType::Writeback, ..drive("data", &path) };
    let (vm, mut agent) = boot(&place, linux, raw);
    write_block(&mut agent, 77, "flushed");
    wanted[77 * BLOCK..78 * BLOCK].copy_from_slice(format!("{:<BLOCK$}", "flushed").as_bytes());
    assert!(fs::read(&path).expect("it can be read") == wanted);
    agent.shell("blkdiscard -o 8388608 -l 4194304 /dev/vda");
    wanted[8 * MIB..12 * MIB].fill(0);
    assert!(fs::read(&path).expect("it can be read") == wanted);
    assert_calm(&vm.stop().stdout);
}

#[test]
fn a_guest_whose_overlay_is_full_waits_for_room() {
    let Some(linux) = Linux::guest("6.1") else { return };
    let place = Place::new();
    let (path, before) = image(&place);
    let (mut vm, mut agent) = boot(&place, linux, Drive { max_overlay_mib: Some(8), ..overlay(&path) });
    agent.leave(&format!("{BULK} | dd of=/dev/vda bs=64k conv=notrunc,fsync 2>/dev/null && echo done >/tmp/bulk"));
    assert!(holds_within(PATIENCE, || vm.state() == InstanceState::Paused), "the guest is paused");
    let reason = vm.info().pause_reason.expect("it says why");
    assert!(
        reason.contains("max_overlay_mib") && reason.contains("drive data") && reason.contains("8 MiB"),
        "{reason}"
    );
    println!("{reason}");
    let update = DriveUpdate {
        drive_id: "data".into(),
        path_on_host: None,
        max_overlay_mib: Some(Some(64)),
        rate_limiter: None,
    };
    vm.api().patch("/drives/data", &update).expect("the bound can be raised");
    vm.resume();
    assert!(holds_within(PATIENCE, || agent.shell("cat /tmp/bulk 2>/dev/null || true") == "done"));
    assert_eq!(vm.info().pause_reason, None);
    agent.forget_disk();
    let sum = agent.shell("dd if=/dev/vda bs=1M count=24 2>/dev/null | md5sum");
    assert_eq!(sum, agent.shell(&format!("{BULK} | md5sum")));
    assert_calm(&vm.stop().stdout);
    assert!(fs::read(&path).expect("it can be read") == before);
}
