//! Snapshots that hold what has changed, and how a snapshot that is being written is watched, slowed down and given up.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::snapshot::{SnapshotCancel, SnapshotCreate, SnapshotState, SnapshotType};
use api_spec::stats::PageServerState;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};
use tests::{Agent, Boot, PageServer, Place, Restore, Template, TemplateOptions, Vm, require, until};

/// Marks a snapshot's guest: the page of level `n` holds `n`, that of every third is zero again.
fn mark(agent: &mut Agent, first: u32, level: u32) {
    agent.set_word(first + level, u64::from(level) + 1);
    if level >= 3 {
        agent.set_word(first + level - 3, 0);
    }
}

/// What a guest of this level has in the pages of all levels.
fn marks(level: u32, of: u32) -> Vec<u64> {
    let value = |page: u32| if page <= level && page + 3 > level { u64::from(page) + 1 } else { 0 };
    (0..of).map(value).collect()
}

fn words(agent: &mut Agent, first: u32, of: u32) -> Vec<u64> {
    (0..of).map(|page| agent.word(first + page)).collect()
}

fn refused(vm: &mut Vm, path: &Path, snapshot_type: SnapshotType) -> String {
    let create = SnapshotCreate { snapshot_type, ..SnapshotCreate::of(path.to_owned()) };
    vm.client().snapshot_create(&create).expect_err("it is refused").to_string()
}

const LEVELS: u32 = 10;

#[test]
fn each_of_a_chain_of_ten_is_the_guest_as_it_was() {
    require!(Kvm, Userfaultfd);
    let (template, mut agent, mut parent) = Template::make_with_parent(TemplateOptions::default());
    let (facts, place) = (&template.facts, Place::new());
    let first = facts.first_free_page();
    let level = |n: u32| place.join(format!("level-{n}"));
    for n in 0..LEVELS {
        mark(&mut agent, first, n);
        let status = parent.snapshot_changes(&level(n));
        assert_eq!(status.state, SnapshotState::Done, "{status:?}");
        assert!(status.memory_bytes < 1 << 20, "{n}: what has not changed is not stored: {status:?}");
        assert_eq!(status.parent, Some(if n == 0 { template.snapshot.clone() } else { level(n - 1) }));
        agent = parent.agent();
    }
    let server = PageServer::start_of(&place, &[&level(4), &level(LEVELS - 1)]);
    for n in [0, 1, 4, LEVELS - 1] {
        let restored = || Restore::new(&place, &level(n));
        let mut guests = vec![restored().ready(&format!("file-{n}"))];
        if n == 4 || n == LEVELS - 1 {
            guests.push(restored().uffd(&server).ready(&format!("served-{n}")));
        }
        for (vm, mut agent) in guests {
            assert_eq!(words(&mut agent, first, LEVELS), marks(n, LEVELS), "{}", vm.name);
            facts.check(&mut agent);
            vm.stop();
        }
    }
    // One that is restored from a chain goes on with it.
    let (mut clone, mut agent) = Restore::new(&place, &level(4)).uffd(&server).ready("fifth");
    agent.set_word(first, 77);
    assert_eq!(clone.snapshot_changes(&place.join("branch")).parent, Some(level(4)));
    clone.snapshot(&place.join("alone"));
    for name in ["branch", "alone"] {
        let (vm, mut agent) = Restore::new(&place, &place.join(name)).ready(name);
        assert_eq!(agent.word(first), 77);
        assert_eq!(words(&mut agent, first + 1, LEVELS - 1), marks(4, LEVELS)[1..]);
        facts.check(&mut agent);
        vm.stop();
        snapshot::verify::verify(&place.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    clone.stop();
    parent.stop();
    // What lies below is needed.
    fs::rename(level(2), place.join("away")).expect("it can be moved");
    let done = Restore::new(&place, &level(4)).start("orphan").process.finish();
    assert_eq!(done.code(), 1);
    assert!(done.one_line().contains("level-2"), "{}", done.one_line());
    let (vm, mut agent) = Restore::new(&place, &level(1)).ready("below");
    facts.check(&mut agent);
    vm.stop();
}

/// Of a clone whose pages were copied, or loaded without a page server, all look written.
#[test]
fn pages_that_were_loaded_by_copying_are_not_taken_for_written_ones() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (Template::shared(), Place::new());
    let facts = &template.facts;
    let page = facts.first_free_page();
    let server = PageServer::start(&place, &template.snapshot);
    let (mut copied, mut of_copied) =
        Restore::new(&place, &template.snapshot).copied_from(&server.socket).ready("copied");
    let (mut left, mut of_left) = Restore::new(&place, &template.snapshot).uffd(&server).ready("left");
    facts.check(&mut of_copied);
    of_copied.set_word(page, 5);
    let status = copied.snapshot_changes(&place.join("of-copied"));
    assert!(status.memory_bytes < 1 << 20, "{status:?}");
    copied.stop();
    server.process.kill();
    left.until_served(PageServerState::Failover);
    facts.check(&mut of_left);
    of_left.set_word(page, 6);
    let status = left.snapshot_changes(&place.join("of-left"));
    assert!(status.memory_bytes < 1 << 20, "{status:?}");
    left.snapshot(&place.join("whole-of-left"));
    left.stop();
    for (name, word) in [("of-copied", 5), ("of-left", 6), ("whole-of-left", 6)] {
        let (vm, mut agent) = Restore::new(&place, &place.join(name)).ready(name);
        assert_eq!(agent.word(page), word, "{name}");
        facts.check(&mut agent);
        vm.stop();
    }
}

#[test]
fn a_snapshot_of_a_clone_that_has_loaded_next_to_nothing_is_whole() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (Template::shared(), Place::new());
    let server = PageServer::start(&place, &template.snapshot);
    let mut clone = Restore::new(&place, &template.snapshot).uffd(&server).paused().no_replay().start("clone");
    clone.snapshot(&place.join("whole"));
    let filled = server.filled_pages();
    clone.snapshot_changes(&place.join("changes"));
    clone.stop();
    let all = template.facts.working_set.count;
    assert!(filled < u64::from(all), "the snapshot has not loaded its memory: {filled} pages");
    for name in ["whole", "changes"] {
        let (vm, mut agent) = Restore::new(&place, &place.join(name)).ready(name);
        template.facts.check(&mut agent);
        vm.stop();
    }
}

#[test]
fn a_guest_without_a_snapshot_gets_a_whole_one_and_one_whose_snapshots_are_gone_a_reason() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) = Boot::new(&place).memory_mib(16).ready("guest");
    let facts = tests::template::Facts::gather(&mut agent, 1);
    let first = vm.snapshot_changes(&place.join("first"));
    assert_eq!((first.state, first.parent), (SnapshotState::Done, None));
    fs::rename(place.join("first"), place.join("moved")).expect("it can be moved");
    let reason = refused(&mut vm, &place.join("second"), SnapshotType::Diff);
    assert!(reason.contains("first") && reason.contains("Full"), "{reason}");
    assert!(!place.join("second").exists());
    // A whole one needs nothing, and is the parent of the next.
    vm.snapshot(&place.join("third"));
    assert_eq!(vm.snapshot_changes(&place.join("fourth")).parent, Some(place.join("third")));
    facts.check(&mut vm.agent());
    vm.stop();
    for name in ["moved", "third", "fourth"] {
        let (vm, mut agent) = Restore::new(&place, &place.join(name)).ready(name);
        facts.check(&mut agent);
        vm.stop();
    }
}

/// Kills a vmm this long after it was asked for a snapshot.
fn killed_in(vm: Vm, create: SnapshotCreate, after: Duration) {
    let mut vm = vm;
    let mut client = vm.client();
    std::thread::scope(|scope| {
        let asked = scope.spawn(move || client.snapshot_create(&create));
        std::thread::sleep(after);
        vm.process.kill();
        let _ = asked.join().expect("no panic");
    });
}

/// Snapshots whose vmm was killed at 40 moments are whole, or are not there; what is left goes with the next.
#[test]
fn a_snapshot_whose_vmm_is_killed_is_whole_or_absent() {
    require!(Kvm);
    const MOMENTS: u32 = 20;
    let (template, place) = (Template::shared(), Place::new());
    let restored = |name: &str| Restore::new(&place, &template.snapshot).ready(name);
    let booted = |name: &str| {
        let (vm, mut agent) = Boot::new(&place).memory_mib(64).ready(name);
        tests::template::Facts::gather(&mut agent, 8);
        (vm, agent)
    };
    for (kind, snapshot_type) in [("full", SnapshotType::Full), ("diff", SnapshotType::Diff)] {
        let guest = |name: &str| if snapshot_type == SnapshotType::Full { booted(name) } else { restored(name) };
        let create = |path: &Path| SnapshotCreate { snapshot_type, ..SnapshotCreate::of(path.to_owned()) };
        let (mut vm, mut agent) = guest(&format!("{kind}-whole"));
        agent.set_word(template.facts.first_free_page(), 1);
        let begun = Instant::now();
        vm.client().snapshot_create(&create(&place.join(format!("{kind}-first")))).expect("it can be taken");
        let takes = begun.elapsed();
        vm.stop();
        let (mut whole, mut absent) = (0, 0);
        for moment in 0..MOMENTS {
            let (vm, mut agent) = guest(&format!("{kind}-{moment}"));
            agent.set_word(template.facts.first_free_page(), 1);
            let path = place.join(format!("{kind}-snapshot"));
            killed_in(vm, create(&path), takes * 3 * moment / (2 * MOMENTS));
            if path.exists() {
                snapshot::verify::verify(&path).unwrap_or_else(|e| panic!("{kind} at {moment}: {e}"));
                fs::remove_dir_all(&path).expect("it can be removed");
                whole += 1;
            } else {
                absent += 1;
            }
        }
        println!("{kind}: {whole} whole, {absent} absent");
        let (mut vm, _agent) = guest(&format!("{kind}-last"));
        vm.client().snapshot_create(&create(&place.join(format!("{kind}-snapshot")))).expect("it can be taken");
        let left: Vec<_> = place.names().into_iter().filter(|name| name.contains("partial")).collect();
        assert!(left.is_empty(), "{left:?}");
        vm.stop();
    }
}

/// Packed, flattened and written as changes by the tools, a snapshot is the same guest; it is removed when nobody uses it.
#[test]
fn what_the_tools_write_is_the_same_guest_and_what_is_in_use_stays() {
    use snapshot::tools::Job;
    use snapshot::tools::remove::{RemoveError, remove};
    use snapshot::tools::store::{Form, flatten, pack, write_diff};
    require!(Kvm, Userfaultfd);
    let (template, mut agent, mut parent) = Template::make_with_parent(TemplateOptions::default());
    let (facts, place) = (&template.facts, Place::new());
    let page = facts.first_free_page();
    let base = place.join("base");
    parent.snapshot(&base);
    parent.agent().set_word(page, 5);
    parent.snapshot_changes(&place.join("changes"));
    agent = {
        drop(agent);
        parent.agent()
    };
    facts.check(&mut agent);
    parent.stop();
    let (go_on, quiet) = (std::sync::atomic::AtomicBool::new(false), |_, _| {});
    let job = Job { max_bytes: None, cancel: &go_on, progress: &quiet };
    let at = |name: &str| place.join(name);
    pack(&base, &at("packed-base"), &job).expect("it can be packed");
    flatten(&at("changes"), &at("flat"), Form::Packed, &job).expect("it can be flattened");
    write_diff(&at("packed-base"), &at("changes"), &at("packed-changes"), Form::Packed, &job)
        .expect("it can be written");
    let size = |name: &str| fs::metadata(at(name).join("mem.pack")).expect("it is there").len();
    assert!(size("packed-changes") < 64 << 10, "{}", size("packed-changes"));
    let server = PageServer::start_of(&place, &[&at("flat"), &at("packed-changes")]);
    for name in ["changes", "flat", "packed-changes"] {
        let restored = || Restore::new(&place, &at(name));
        let mut guests = vec![restored().ready(&format!("{name}-file"))];
        if name != "changes" {
            guests.push(restored().uffd(&server).ready(&format!("{name}-served")));
        }
        for (vm, mut agent) in guests {
            assert_eq!(agent.word(page), 5, "{}", vm.name);
            facts.check(&mut agent);
            for used in [name, if name == "changes" { "base" } else { name }] {
                let refused = remove(&at(used)).expect_err("it is in use");
                assert!(matches!(refused, RemoveError::Busy { .. }), "{refused}");
            }
            vm.stop();
        }
    }
    server.process.stop();
    let refused = remove(&base).expect_err("another lies over it");
    assert!(matches!(refused, RemoveError::HasChildren { .. }), "{refused}");
    for name in ["changes", "base", "packed-changes", "packed-base", "flat"] {
        remove(&at(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(!at(name).exists());
    }
}

/// One MiB a second is less than a guest of some MiB takes; that it is being written can be seen, and be ended.
#[test]
fn a_snapshot_that_is_written_slowly_can_be_watched_and_given_up() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) = Boot::new(&place).memory_mib(64).ready("guest");
    let facts = tests::template::Facts::gather(&mut agent, 32);
    let none = vm.client().snapshot_cancel(&SnapshotCancel {}).expect_err("there is none").to_string();
    assert!(none.contains("no snapshot is being written"), "{none}");
    let slow = SnapshotCreate { max_write_mib_s: Some(1), ..SnapshotCreate::of(place.join("slow")) };
    let mut other = vm.client();
    std::thread::scope(|scope| {
        let asked = scope.spawn(move || other.snapshot_create(&slow));
        let mut client = vm.client();
        let mut status = || client.snapshot_status().expect("it is told");
        until("some of it is written", || {
            let status = status();
            status.state == SnapshotState::Writing && status.memory_bytes > 0
        });
        assert!(status().memory_bytes < 32 << 20);
        // The guest runs meanwhile.
        facts.check(&mut agent);
        vm.client().snapshot_cancel(&SnapshotCancel {}).expect("it can be given up");
        let told = asked.join().expect("no panic").expect_err("it was given up").to_string();
        assert!(told.contains("cancelled"), "{told}");
    });
    assert_eq!(vm.client().snapshot_status().expect("it is told").state, SnapshotState::Failed);
    assert!(!place.names().iter().any(|name| name.contains("slow")), "{:?}", place.names());
    let zero = SnapshotCreate { max_write_mib_s: Some(0), ..SnapshotCreate::of(place.join("never")) };
    assert!(
        vm.client().snapshot_create(&zero).expect_err("it would take for ever").to_string().contains("max_write_mib_s")
    );
    // The guest is as well as before, and so is its next snapshot.
    vm.snapshot(&place.join("next"));
    facts.check(&mut vm.agent());
    vm.stop();
    let (vm, mut agent) = Restore::new(&place, &place.join("next")).ready("again");
    facts.check(&mut agent);
    vm.stop();
}
