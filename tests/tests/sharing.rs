//! Clones share every page that they have not written, and nothing that they have.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::agent::Pages;
use std::os::unix::fs::PermissionsExt;
use tests::procfs::{self, guest_ram};
use tests::template::SEED;
use tests::{PageServer, Place, Restore, Template, TemplateOptions, require};

const MIB: u64 = 1024; // in KiB

#[test]
fn ten_clones_that_read_64_mib_share_them() {
    require!(Kvm, Userfaultfd);
    let template = Template::make(TemplateOptions { memory_mib: 128, working_set_mib: 64, ..Default::default() });
    let place = Place::new();
    let server = PageServer::start(&place, &template.snapshot);
    let mut clones = Vec::new();
    for number in 0..10 {
        let (clone, mut agent) = Restore::new(&place, &template.snapshot).uffd(&server).ready(&format!("{number}"));
        assert_eq!(agent.mismatches(template.facts.working_set, SEED), 0, "clone {number}");
        clones.push(clone);
    }
    let memory: Vec<_> = clones.iter().map(|clone| guest_ram(clone.pid())).collect();
    let events: Vec<_> = clones.iter().map(|clone| server.session(clone.pid()).uffd_events).collect();
    println!("{memory:?}\n{events:?}");

    let sum = |value: fn(&procfs::Memory) -> u64| memory.iter().map(value).sum::<u64>();
    let (rss, pss, anonymous) = (sum(|m| m.rss_kib), sum(|m| m.pss_kib), sum(|m| m.anonymous_kib));
    assert!(rss >= 10 * 64 * MIB, "each clone has read 64 MiB: {rss} KiB");
    assert!(anonymous * 20 < rss, "{anonymous} KiB of {rss} KiB are private");
    assert!(pss * 4 <= (64 * MIB + anonymous) * 5, "the clones' shares sum to {pss} KiB");
    // Whoever is the first to touch a block of 64 KiB gets a private copy of the very page that it touched: the kernel's
    // asynchronous fault asks for it as for a write.
    assert!(memory[0].anonymous_kib <= memory[0].rss_kib / 16 + MIB, "first: {:?}", memory[0]);
    for (number, memory) in memory.iter().enumerate().skip(1) {
        assert!(memory.anonymous_kib < MIB, "clone {number}: {memory:?}");
        assert!(
            events[number] * 20 <= events[0],
            "clone {number} raised {} events, the first {}",
            events[number],
            events[0]
        );
    }
    clones.into_iter().for_each(|clone| drop(clone.stop()));
}

#[test]
fn a_clone_owns_what_it_writes_and_little_else() {
    require!(Kvm, Userfaultfd);
    let template = Template::shared();
    let place = Place::new();
    let server = PageServer::start(&place, &template.snapshot);
    let (first, mut agent) = Restore::new(&place, &template.snapshot).uffd(&server).ready("first");
    assert_eq!(agent.mismatches(template.facts.working_set, SEED), 0);
    let (clone, mut agent) = Restore::new(&place, &template.snapshot).uffd(&server).ready("clone");
    assert_eq!(agent.mismatches(template.facts.working_set, SEED), 0);
    let before = guest_ram(clone.pid()).anonymous_kib;
    assert!(before < MIB, "{before} KiB are private before anything was written");
    let written = Pages::run(0, 512);
    agent.write(written, 1);
    let after = guest_ram(clone.pid()).anonymous_kib;
    assert!(after >= 2 * MIB, "2 MiB were written, {after} KiB are private");
    assert!(after < before + 2 * MIB + MIB, "2 MiB were written, {after} KiB are private");
    first.stop();
    clone.stop();
}

/// What one clone writes is seen by no other, nor by the snapshot, wherever their memory comes from.
#[test]
fn writes_stay_with_the_clone_that_made_them() {
    require!(Kvm, Userfaultfd);
    let template = Template::shared();
    let before = snapshot::verify::verify(&template.snapshot).expect("the snapshot is whole");
    let place = Place::new();
    let server = PageServer::start(&place, &template.snapshot);
    let from = || Restore::new(&place, &template.snapshot);
    let ways =
        [("file-1", from()), ("file-2", from()), ("uffd-1", from().uffd(&server)), ("uffd-2", from().uffd(&server))];
    let mut clones: Vec<_> = ways.map(|(name, way)| way.ready(name)).into();

    // Each writes half of the working set, all of it different; half of that before it has read it.
    let pages = template.facts.working_set;
    let half = Pages::run(0, pages.count / 2);
    let rest = Pages::run(half.count, pages.count - half.count);
    for (number, (_, agent)) in clones.iter_mut().enumerate() {
        agent.fill(half, number as u64);
    }
    for (number, (_, agent)) in clones.iter_mut().enumerate() {
        assert_eq!(agent.mismatches(half, number as u64), 0, "clone {number} has what it wrote");
        assert_eq!(agent.mismatches(rest, SEED), 0, "clone {number} has what it did not write");
    }
    for (number, (clone, _)) in clones.iter().enumerate() {
        check_access(clone.pid(), &format!("clone {number}"));
    }
    check_access(server.process.pid(), "the page server");
    let (late, mut agent) = from().uffd(&server).ready("late");
    template.facts.check(&mut agent);
    late.stop();
    clones.into_iter().for_each(|(clone, _)| drop(clone.stop()));

    let after = snapshot::verify::verify(&template.snapshot).expect("the snapshot is whole");
    assert_eq!(before, after);
}

/// Nobody can write the memory image: not by a mapping, not by a descriptor, and not by its mode.
#[track_caller]
fn check_access(pid: u32, who: &str) {
    for mapping in procfs::mappings(pid) {
        let is_image = mapping.name.ends_with("/mem.bin");
        assert!(!is_image || !mapping.mode.contains('w') || mapping.mode.ends_with('p'), "{who}: {mapping:?}");
    }
    for (name, writable) in procfs::open_files(pid) {
        assert!(!name.ends_with("/mem.bin") || !writable, "{who} has {name} open for writing");
    }
}

#[test]
fn a_snapshot_is_its_owners_and_its_memory_read_only() {
    require!(Kvm);
    let template = Template::shared();
    let mode = |name: &str| {
        let metadata = std::fs::metadata(template.snapshot.join(name)).expect("the file is there");
        metadata.permissions().mode() & 0o777
    };
    assert_eq!(mode(""), 0o700, "the directory");
    for name in ["snap.json", "state.bin", "mem.b3"] {
        assert_eq!(mode(name) & 0o077, 0, "{name}");
    }
    assert_eq!(mode("mem.bin"), 0o400, "guests have it mapped");
}
