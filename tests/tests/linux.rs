//! Debian's kernel, unmodified, as a guest that has no agent but counts on its console: boot, snapshot and clones. Runs in
//! the reference machine: `tests/rig/run` is the runner.

#![allow(missing_docs, reason = "tests are named for what they show")]

use tests::linux::{Console, Linux, PATIENCE, assert_calm, counts};
use tests::{Boot, PageServer, Place, Restore};

const UP: &str = "coppice: Linux ";

/// Boots a guest without an agent that switches itself off.
fn boots(linux: &Linux, vcpus: u8) {
    let place = Place::new();
    let mut vm = Boot::new(&place).linux(linux, "coppice.then=poweroff").vcpus(vcpus).start("guest");
    let up = vm.said(UP);
    println!("Linux {up}");
    assert!(up.contains(&format!(" is up, {vcpus} CPUs, clock kvm-clock, virtio virtio0")), "{up}");
    let done = vm.process.finish_within(PATIENCE);
    assert_calm(&done.stdout);
    assert_eq!((done.code(), done.stderr.as_str()), (0, ""));
}

#[test]
fn an_elf_kernel_is_entered_by_pvh() {
    let Some(linux) = Linux::guest("6.1") else { return };
    boots(&linux.elf(), 1);
}

/// A snapshot of a guest that counts, and the number that it had counted to before.
fn snapshot(place: &Place, linux: &Linux, vcpus: u8) -> (std::path::PathBuf, u64) {
    let mut vm = Boot::new(place).linux(linux, "coppice.then=count").vcpus(vcpus).start("original");
    vm.said(UP);
    let before = vm.counted_beyond(3);
    let path = place.join("snapshot");
    let status = vm.snapshot(&path);
    println!("snapshot with {vcpus} vCPUs at count {before}: {} bytes", status.memory_bytes);
    let after = vm.counted_beyond(before);
    vm.counted_beyond(after + 3);
    assert_calm(&vm.stop().stdout);
    (path, before)
}

/// Clones go on from where the snapshot was taken, each by itself.
fn clones_go_on(vcpus: u8, uffd: bool) {
    let Some(linux) = Linux::guest("6.1") else { return };
    let place = Place::new();
    let (path, before) = snapshot(&place, &linux.elf(), vcpus);
    let server = uffd.then(|| PageServer::start(&place, &path));
    for name in ["first", "second"] {
        let restore = Restore::new(&place, &path);
        let mut clone = match &server {
            Some(server) => restore.uffd(server).start(name),
            None => restore.start(name),
        };
        let reached = clone.counted_beyond(before + 10);
        let done = clone.stop();
        let numbers = counts(&done.stdout);
        println!("{name} clone counted {:?} to {reached}", numbers.first());
        assert!(
            numbers.first().is_some_and(|first| *first >= before && *first <= before + 20),
            "{before}: {numbers:?}"
        );
        assert!(numbers.windows(2).all(|pair| pair[0] + 1 == pair[1]), "{numbers:?}");
        assert_calm(&done.stdout);
    }
}

#[test]
fn a_clone_goes_on_counting() {
    clones_go_on(1, false);
}

#[test]
fn clones_from_a_page_server_go_on_counting() {
    clones_go_on(2, true);
}
