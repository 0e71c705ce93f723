//! A guest gives memory back: the host has it again, the guest reads zeros there, and so does every snapshot.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::agent::{Pages, Refusal, Request};
use api_spec::client::rest::RestError;
use api_spec::devices::{Balloon, BalloonStatistics, BalloonStatisticsUpdate, BalloonUpdate};
use api_spec::vm::VmConfig;
use std::path::PathBuf;
use tests::procfs::resident;
use tests::{Agent, Boot, PageServer, Place, Restore, Vm, require};

const MIB: u64 = 1024; // in KiB
/// What is written before the snapshot: 8 MiB, then 64 MiB that are given back later, then 8 MiB.
const BEFORE: Pages = Pages::run(0, 2048);
const GIVEN: Pages = Pages::run(2048, 16384);
const AFTER: Pages = Pages::run(18432, 2048);
const SEED: u64 = 7;
const NEW_SEED: u64 = 8;

fn balloon() -> Balloon {
    Balloon {
        amount_mib: 0,
        deflate_on_oom: false,
        stats_polling_interval_s: 1,
        free_page_reporting: true,
        free_page_hinting: false,
    }
}

fn filled(place: &Place) -> (Vm, Agent) {
    let (vm, mut agent) = Boot::new(place).memory_mib(128).balloon(balloon()).ready("original");
    for pages in [BEFORE, GIVEN, AFTER] {
        agent.fill(pages, SEED);
    }
    (vm, agent)
}

/// A snapshot of a guest with a balloon that has filled its pages.
fn snapshot(place: &Place) -> PathBuf {
    let (mut vm, _agent) = filled(place);
    let path = place.join("snapshot");
    vm.snapshot(&path);
    vm.stop();
    path
}

/// What was given back reads as zeros, and its neighbours are what they were. A checksum of zeros alone is zero.
#[track_caller]
fn check(agent: &mut Agent) {
    assert_eq!(agent.checksum(GIVEN), 0, "zeros");
    assert_eq!([BEFORE, AFTER].map(|pages| agent.mismatches(pages, SEED)), [0, 0]);
}

fn a_clone_gives_back(uffd: bool) {
    require!(Kvm);
    if uffd {
        require!(Userfaultfd);
    }
    let place = Place::new();
    let path = snapshot(&place);
    let server = uffd.then(|| PageServer::start(&place, &path));
    let restore = |path: &PathBuf| match &server {
        Some(server) => Restore::new(&place, path).uffd(server),
        None => Restore::new(&place, path),
    };
    let (mut clone, mut agent) = restore(&path).ready("clone");
    agent.fill(GIVEN, NEW_SEED);
    let full = resident(clone.pid(), "RssAnon");
    assert!(full > 64 * MIB, "64 MiB were written: {full} KiB are private");
    agent.give_back(GIVEN);
    let left = resident(clone.pid(), "RssAnon");
    println!("private memory: {full} KiB, and {left} KiB after 64 MiB were given back");
    assert!(left + 63 * MIB < full, "{full} KiB were private, and {left} KiB are");
    // Not what was written, and not the image's bytes, which are older.
    check(&mut agent);

    // Pages that are used again are kept.
    let again = Pages::run(GIVEN.first + 5000, 300);
    agent.fill(again, NEW_SEED);
    let second = place.join("second");
    let status = clone.snapshot(&second);
    println!("snapshot: {} KiB", status.memory_bytes / 1024);
    assert!(status.memory_bytes / 1024 < 18 * MIB, "{} bytes", status.memory_bytes);
    let (grandchild, mut heir) = Restore::new(&place, &second).ready("grandchild");
    for agent in [&mut agent, &mut heir] {
        assert_eq!(agent.mismatches(again, NEW_SEED), 0);
        agent.give_back(again);
        check(agent);
    }
    // Its siblings have what was snapshotted.
    let (sibling, mut agent) = restore(&path).ready("sibling");
    assert_eq!(agent.mismatches(GIVEN, SEED), 0);
    for vm in [clone, grandchild, sibling] {
        vm.stop();
    }
}

#[test]
fn a_clone_over_a_file_gives_memory_back_and_reads_zeros() {
    a_clone_gives_back(false);
}

#[test]
fn a_clone_of_a_page_server_gives_memory_back_and_reads_zeros() {
    a_clone_gives_back(true);
}

/// Before it touches a page the clone gives it back: the page server is never asked for it.
#[test]
fn pages_that_were_given_back_are_not_fetched() {
    require!(Kvm, Userfaultfd);
    let place = Place::new();
    let path = snapshot(&place);
    let server = PageServer::start(&place, &path);
    let (clone, mut agent) = Restore::new(&place, &path).uffd(&server).ready("clone");
    let before = server.session(clone.pid()).uffd_events;
    agent.give_back(GIVEN);
    assert_eq!(agent.checksum(GIVEN), 0);
    let events = server.session(clone.pid()).uffd_events - before;
    println!("{events} events");
    assert!(events < 64, "64 MiB are 1,024 chunks of the image: {events} events");
    check(&mut agent);
    clone.stop();
}

#[test]
fn a_booted_guest_gives_memory_back_before_and_after_its_snapshot() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) = filled(&place);
    let full = resident(vm.pid(), "RssShmem");
    agent.give_back(GIVEN);
    let left = resident(vm.pid(), "RssShmem");
    assert!(left + 63 * MIB < full, "{full} KiB were resident, and {left} KiB are");
    check(&mut agent);
    let first = place.join("first");
    let status = vm.snapshot(&first);
    assert!(status.memory_bytes / 1024 < 20 * MIB, "{} bytes", status.memory_bytes);
    let (clone, mut heir) = Restore::new(&place, &first).ready("clone");
    check(&mut heir);

    // It is a private view now.
    agent.fill(GIVEN, NEW_SEED);
    agent.give_back(GIVEN);
    check(&mut agent);
    let second = place.join("second");
    vm.snapshot(&second);
    let (heir, mut second) = Restore::new(&place, &second).ready("second");
    check(&mut second);
    for vm in [vm, clone, heir] {
        vm.stop();
    }
}

/// One page in two, then the others: more runs than get a mapping of their own.
#[test]
fn scattered_pages_never_exhaust_the_vmm() {
    require!(Kvm);
    let place = Place::new();
    let path = snapshot(&place);
    let (mut clone, mut agent) = Restore::new(&place, &path).ready("clone");
    let every_other = |first| Pages { first: GIVEN.first + first, count: GIVEN.count / 2, stride: 2 };
    agent.give_back(every_other(0));
    let mappings = tests::procfs::mappings(clone.pid()).len();
    assert!(mappings < 2200, "{mappings} mappings");
    agent.give_back(every_other(1));
    assert_eq!([BEFORE, AFTER].map(|pages| agent.mismatches(pages, SEED)), [0, 0]);
    agent.give_back(GIVEN);
    check(&mut agent);
    assert!(tests::procfs::mappings(clone.pid()).len() < 2200);
    clone.snapshot(&place.join("second"));
    let (heir, mut agent) = Restore::new(&place, &place.join("second")).ready("second");
    check(&mut agent);
    clone.stop();
    heir.stop();
}

#[track_caller]
fn refused(answer: Result<(), RestError>, word: &str) {
    match answer {
        Err(RestError::Refused { status: 400, message }) => assert!(message.contains(word), "{message}"),
        other => panic!("should have been refused for {word}: {other:?}"),
    }
}

#[test]
fn the_balloon_is_configured_resized_and_asked_over_the_api() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) = Boot::new(&place).balloon(balloon()).ready("guest");
    let mut api = vm.api();
    assert_eq!(api.get::<Balloon>("/balloon").unwrap(), balloon());
    api.patch("/balloon", &BalloonUpdate { amount_mib: 4 }).unwrap();
    refused(api.patch("/balloon", &BalloonUpdate { amount_mib: 33 }), "at most 32");
    refused(api.put("/balloon", &balloon()), "started already");
    agent.give_back(Pages::run(0, 512));
    let statistics: BalloonStatistics = api.get("/balloon/statistics").unwrap();
    let expected = BalloonStatistics {
        target_pages: 1024,
        actual_pages: 512,
        target_mib: 4,
        actual_mib: 2,
        ..BalloonStatistics::default()
    };
    assert_eq!(statistics, expected);
    api.patch("/balloon/statistics", &BalloonStatisticsUpdate { stats_polling_interval_s: 5 }).unwrap();
    let off = BalloonStatisticsUpdate { stats_polling_interval_s: 0 };
    refused(api.patch("/balloon/statistics", &off), "stats_polling_interval_s");

    let path = place.join("snapshot");
    vm.snapshot(&path);
    let (mut clone, _agent) = Restore::new(&place, &path).ready("clone");
    let mut api = clone.api();
    let now = Balloon { amount_mib: 4, stats_polling_interval_s: 5, ..balloon() };
    assert_eq!(api.get::<Balloon>("/balloon").unwrap(), now);
    assert_eq!(api.get::<VmConfig>("/vm/config").unwrap().balloon, Some(now));
    assert_eq!(api.get::<BalloonStatistics>("/balloon/statistics").unwrap(), expected);
    vm.stop();
    clone.stop();
}

#[test]
fn without_a_balloon_there_is_nothing_to_resize() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) = Boot::new(&place).ready("guest");
    let refusal = agent.try_ask(Request::GiveBack { pages: Pages::run(0, 1) }).unwrap_err();
    assert!(refusal.to_string().contains(&Refusal::NotHere.to_string()), "{refusal}");
    let mut api = vm.api();
    refused(api.patch("/balloon", &BalloonUpdate { amount_mib: 1 }), "no balloon");
    refused(api.get::<Balloon>("/balloon").map(drop), "no balloon");
    refused(api.get::<BalloonStatistics>("/balloon/statistics").map(drop), "no balloon");
    vm.stop();
}

#[test]
fn a_balloon_larger_than_the_guest_is_refused_before_the_start() {
    let place = Place::new();
    let vm = Boot::new(&place).balloon(Balloon { amount_mib: 33, ..balloon() }).start("guest");
    let done = vm.process.finish();
    assert_eq!(done.status.code(), Some(1));
    assert!(done.stderr.contains("balloon.amount_mib is 33"), "{}", done.stderr);
}
