//! Linux guests give memory back through the balloon. Runs in the reference machine: `tests/rig/run` is the runner.
//!
//! What a guest reads where it has given memory away cannot be asked of Linux, which clears a page before anyone gets it
//! back. But a snapshot of a clone is read through the very mapping that the guest reads through: what was private and is
//! in the image no more reads as zeros. That a guest itself reads zeros is shown in `balloon.rs`, by one that does not clear
//! its pages.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::devices::{Balloon, BalloonStatistics, BalloonUpdate};
use api_spec::vm::Readiness;
use std::io::Read;
use std::path::Path;
use tests::linux::{LinuxAgent, PATIENCE, assert_calm};
use tests::procfs::resident;
use tests::{Boot, Linux, PageServer, Place, Restore, Vm, holds_within};

const MIB: u64 = 1024; // in KiB
const MEMORY_MIB: u64 = 320;
/// What is written and given back, and what of that must be gone at least: the guest keeps some free memory.
const WRITTEN_MIB: u64 = 96;
const GONE_MIB: u64 = 64;
/// Every page that is written begins so, and has nothing else.
const MARK: &str = "coppice-balloon";

fn balloon() -> Balloon {
    Balloon {
        amount_mib: 0,
        deflate_on_oom: false,
        stats_polling_interval_s: 1,
        free_page_reporting: false,
        free_page_hinting: false,
    }
}

fn boot(place: &Place, linux: Linux, balloon: Balloon) -> (Vm, LinuxAgent) {
    let boot = Boot::new(place).linux(&linux.elf(), "").memory_mib(MEMORY_MIB).balloon(balloon);
    let mut vm = boot.start("original");
    vm.becomes(Readiness::Full);
    let agent = vm.linux_agent();
    (vm, agent)
}

/// A line of /proc/meminfo, in KiB.
fn meminfo(agent: &mut LinuxAgent, field: &str) -> u64 {
    agent.shell(&format!("sed -n 's/^{field}: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo")).parse().expect("a number of KiB")
}

/// Writes a file in memory, and reads it.
fn write(agent: &mut LinuxAgent) {
    agent.shell(&format!("yes {MARK} | head -c 1048576 >/tmp/one"));
    agent.shell(&format!("for i in $(seq {WRITTEN_MIB}); do cat /tmp/one; done >/tmp/all"));
    let different =
        agent.shell("for i in 0 31 63 95; do dd if=/tmp/all bs=1M count=1 skip=$i 2>/dev/null | cmp /tmp/one -; done");
    assert_eq!(different, "");
}

fn remove(agent: &mut LinuxAgent) {
    agent.shell("rm /tmp/all /tmp/one");
}

fn statistics(vm: &mut Vm) -> BalloonStatistics {
    vm.api().get("/balloon/statistics").expect("there is a balloon")
}

/// Sets the balloon's size, and waits until the guest has followed.
#[track_caller]
fn resize(vm: &mut Vm, amount_mib: u64) {
    vm.api().patch("/balloon", &BalloonUpdate { amount_mib }).expect("the balloon has a size");
    let came = holds_within(PATIENCE, || statistics(vm).actual_mib == amount_mib);
    let last = statistics(vm);
    assert!(came, "{}: the guest does not follow: {last:?}", vm.name);
}

/// Has the guest put nearly all that is free into the balloon.
#[track_caller]
fn inflate(vm: &mut Vm, agent: &mut LinuxAgent) -> u64 {
    const LEFT_MIB: u64 = 16;
    let amount_mib = meminfo(agent, "MemFree") / MIB - LEFT_MIB;
    assert!(amount_mib > WRITTEN_MIB, "{amount_mib} MiB can be had");
    resize(vm, amount_mib);
    amount_mib
}

/// How many marked pages there are in the image of a snapshot.
fn marked(snapshot: &Path) -> u64 {
    let mut image = std::fs::File::open(snapshot.join("mem.bin")).expect("the snapshot has an image");
    let (mut page, mut count) = ([0; 4096], 0);
    while image.read_exact(&mut page).is_ok() {
        count += u64::from(page.starts_with(MARK.as_bytes()));
    }
    count
}

/// What a clone writes and gives back leaves the host's memory and its snapshots, and it goes on.
#[test]
fn a_clone_gives_back_what_it_has_written() {
    let Some(linux) = Linux::guest("6.1") else { return };
    let place = Place::new();
    let (mut parent, mut agent) = boot(&place, linux, balloon());
    let total = meminfo(&mut agent, "MemTotal");
    let path = place.join("snapshot");
    parent.snapshot(&path);
    parent.stop();

    let server = PageServer::start(&place, &path);
    let mut clone = Restore::new(&place, &path).uffd(&server).start("clone");
    let mut agent = clone.linux_agent();
    agent.becomes_itself("clone");
    write(&mut agent);
    let full = resident(clone.pid(), "RssAnon");
    assert!(full > WRITTEN_MIB * MIB, "{full} KiB are private");
    let before = place.join("before");
    let bytes_before = clone.snapshot(&before).memory_bytes;
    assert!(marked(&before) >= WRITTEN_MIB * 256);

    remove(&mut agent);
    let amount_mib = inflate(&mut clone, &mut agent);
    let left = resident(clone.pid(), "RssAnon");
    let after = place.join("after");
    let bytes_after = clone.snapshot(&after).memory_bytes;
    let marks = marked(&after);
    println!(
        "{amount_mib} MiB in the balloon: {full} KiB were private, {left} KiB are; the image had {} KiB, and has {}; \
         {marks} pages with old bytes",
        bytes_before / 1024,
        bytes_after / 1024
    );
    assert!(left + GONE_MIB * MIB < full, "{full} KiB were private, and {left} KiB are");
    assert!(bytes_after + (GONE_MIB << 20) < bytes_before, "the image had {bytes_before} bytes, and has {bytes_after}");
    assert!(marks < (WRITTEN_MIB - GONE_MIB) * 256, "{marks} pages are what they were");

    // The clone, and one from that snapshot, report, take the memory back, and use it.
    let mut heir = Restore::new(&place, &after).start("heir");
    let mut heirs_agent = heir.linux_agent();
    heirs_agent.becomes_itself("heir");
    for (vm, agent) in [(&mut clone, &mut agent), (&mut heir, &mut heirs_agent)] {
        assert_eq!(statistics(vm).actual_mib, amount_mib);
        resize(vm, 0);
        assert_eq!(meminfo(agent, "MemTotal"), total);
        let reported = holds_within(PATIENCE, || statistics(vm).free_memory.is_some_and(|b| b > WRITTEN_MIB << 20));
        let last = statistics(vm);
        assert!(reported, "{}: {last:?}", vm.name);
        write(agent);
        remove(agent);
    }
    assert_calm(&clone.stop().stdout);
    assert_calm(&heir.stop().stdout);
}

/// A balloon that grows and shrinks before a snapshot leaves out of it what the guest does not use.
#[test]
fn a_guest_is_trimmed_before_its_snapshot() {
    let Some(linux) = Linux::guest("6.12") else { return };
    let place = Place::new();
    let (mut vm, mut agent) = boot(&place, linux, Balloon { deflate_on_oom: true, ..balloon() });
    let total = meminfo(&mut agent, "MemTotal");
    write(&mut agent);
    remove(&mut agent);
    let before = resident(vm.pid(), "RssShmem");
    inflate(&mut vm, &mut agent);
    resize(&mut vm, 0);
    let after = resident(vm.pid(), "RssShmem");
    let path = place.join("trimmed");
    let bytes = vm.snapshot(&path).memory_bytes;
    println!("{before} KiB were resident, {after} KiB are, and {} KiB are in the image", bytes / 1024);
    assert!(after + GONE_MIB * MIB < before, "{before} KiB were resident, and {after} KiB are");
    assert!(bytes / 1024 <= after, "{bytes} bytes are in the image, and {after} KiB were resident");
    assert!(marked(&path) < (WRITTEN_MIB - GONE_MIB) * 256);
    for name in ["first", "second"] {
        let mut clone = Restore::new(&place, &path).start(name);
        let mut agent = clone.linux_agent();
        agent.becomes_itself(name);
        assert_eq!(meminfo(&mut agent, "MemTotal"), total);
        write(&mut agent);
        assert_calm(&clone.stop().stdout);
    }
    assert_calm(&vm.stop().stdout);
}

/// Free memory comes back by itself.
#[test]
fn a_clone_reports_free_pages() {
    let Some(linux) = Linux::guest("6.1") else { return };
    let place = Place::new();
    // Without statistics the queue for free pages has another number.
    let reporting = Balloon { free_page_reporting: true, stats_polling_interval_s: 0, ..balloon() };
    let (mut parent, _agent) = boot(&place, linux, reporting);
    let path = place.join("snapshot");
    parent.snapshot(&path);
    parent.stop();
    let mut clone = Restore::new(&place, &path).start("clone");
    let mut agent = clone.linux_agent();
    agent.becomes_itself("clone");
    write(&mut agent);
    let full = resident(clone.pid(), "RssAnon");
    remove(&mut agent);
    let came = holds_within(PATIENCE, || resident(clone.pid(), "RssAnon") + GONE_MIB * MIB < full);
    let left = resident(clone.pid(), "RssAnon");
    println!("{full} KiB were private, and {left} KiB are");
    assert!(came, "{full} KiB were private, and {left} KiB are");
    write(&mut agent);
    assert_calm(&clone.stop().stdout);
}
