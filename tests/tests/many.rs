//! One page server and two hundred guests of two images: each has its own image's bytes, and the server stays small and quiet.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::agent::Pages;
use api_spec::handshake::Mode;
use api_spec::page_server::StoreMetrics;
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tests::{Agent, Boot, PageServer, Place, Restore, Vm, procfs, require, skip_test, until};

const CLONES: usize = 200;
/// Clones that are started, or ended, at one time.
const AT_ONCE: usize = 8;
/// Every so many clones one has its memory copied, instead of sharing it.
const COPIED: usize = 25;
/// What the host must have for a clone, in MiB: a debug build and the pages of its own.
const MIB_EACH: u64 = 24;
/// What a clone reads, and what it then writes of that.
const READ: Pages = Pages::run(0, 4 << 8);
const WRITTEN: Pages = Pages::run(64, 4);
/// The rest, which nobody writes.
const UNWRITTEN: [Pages; 2] = [Pages::run(0, 64), Pages::run(68, (4 << 8) - 68)];
/// Of the server's own, in KiB, with all guests there.
const MOST_OWN_MEMORY: u64 = 64 << 10;
/// Descriptors for each guest (its connection, its userfaultfd, its process) or store (a writable and a read-only one, and its
/// userfaultfd), and for whatever else.
const DESCRIPTORS_EACH: usize = 3;
const OTHER_DESCRIPTORS: usize = 32;
/// How long nobody faults, and how many ticks of 10 ms the server may run meanwhile.
const QUIET: Duration = Duration::from_secs(3);
const MOST_TICKS: u64 = 5;

/// One of two images. They differ in their size too, as that is how a client of the copy mode says which it means.
struct Kind {
    snapshot: PathBuf,
    seed: u64,
    nonce: [u8; 16],
    memory_mib: u64,
}

impl Kind {
    fn make(place: &Place, memory_mib: u64, seed: u64) -> Self {
        let name = format!("parent-{memory_mib}");
        let (mut parent, mut agent) = Boot::new(place).memory_mib(memory_mib).ready(&name);
        agent.fill(READ, seed);
        let snapshot = place.join(format!("snapshot-{memory_mib}"));
        parent.snapshot(&snapshot);
        let kind = Kind { snapshot, seed, nonce: agent.nonce(), memory_mib };
        parent.stop();
        kind
    }
}

/// A clone, and what it must be.
struct Clone<'a> {
    vm: Vm,
    agent: Agent,
    kind: &'a Kind,
    number: usize,
}

impl<'a> Clone<'a> {
    /// Starts a clone, which reads all that is known of it and then writes some of that.
    fn start(number: usize, kinds: &'a [Kind; 2], place: &Place, server: &PageServer) -> Self {
        let kind = &kinds[number % 2];
        let restore = Restore::new(place, &kind.snapshot);
        let restore = match mode(number) {
            Mode::Shared => restore.uffd(server),
            Mode::Copy => restore.copied_from(&server.socket),
        };
        let (vm, mut agent) = restore.ready(&format!("clone-{number}"));
        assert_eq!(agent.nonce(), kind.nonce, "clone {number} is of another image");
        assert_eq!(agent.mismatches(READ, kind.seed), 0, "clone {number}");
        agent.fill(WRITTEN, seed_of(number));
        Clone { vm, agent, kind, number }
    }

    /// Looks again, now that all others have written too.
    fn check(&mut self) {
        let Clone { agent, kind, number, .. } = self;
        assert_eq!(agent.mismatches(WRITTEN, seed_of(*number)), 0, "what clone {number} has written is its own");
        for pages in UNWRITTEN {
            assert_eq!(agent.mismatches(pages, kind.seed), 0, "clone {number}: {pages:?}");
        }
    }
}

fn mode(number: usize) -> Mode {
    // Pairs of neighbours, so that there are some of each image.
    if number / 2 % COPIED == COPIED - 1 { Mode::Copy } else { Mode::Shared }
}

/// What a clone writes, and no other.
fn seed_of(number: usize) -> u64 {
    0x0077_0000 + number as u64
}

/// Does something with each, some at a time. The results are in order.
fn in_batches<T: Send, R: Send>(items: impl IntoIterator<Item = T>, work: impl Fn(T) -> R + Sync) -> Vec<R> {
    let (mut items, work, mut done) = (items.into_iter(), &work, Vec::new());
    loop {
        let batch: Vec<T> = items.by_ref().take(AT_ONCE).collect();
        if batch.is_empty() {
            return done;
        }
        std::thread::scope(|scope| {
            let threads: Vec<_> = batch.into_iter().map(|item| scope.spawn(move || work(item))).collect();
            done.extend(threads.into_iter().map(|thread| thread.join().expect("all went well")));
        });
    }
}

/// The stores, those that guests share first; checks that there are as many as may be, and that none has more than its image.
fn check_stores(server: &PageServer) -> Vec<StoreMetrics> {
    let metrics = server.metrics();
    assert_eq!((metrics.refused_total, metrics.stores_retired_total), (0, 0));
    assert!(metrics.images.iter().all(|image| image.damage.is_none() && image.away.is_none()), "{:?}", metrics.images);
    let (shared, copied): (Vec<_>, Vec<_>) = metrics.stores.into_iter().partition(|store| store.uid.is_some());
    for stores in [&shared, &copied] {
        let images: BTreeSet<_> = stores.iter().map(|store| &store.image).collect();
        assert_eq!((stores.len(), images.len()), (2, 2), "one store for each image: {stores:?}");
        for store in stores {
            let filled = u64::from(READ.count)..=store.image_pages;
            assert!(filled.contains(&store.filled_pages) && !store.retired, "{store:?}");
        }
    }
    [shared, copied].concat()
}

#[test]
fn one_page_server_serves_two_hundred_guests_of_two_images() {
    require!(Kvm, Userfaultfd);
    let (needed, available) = (CLONES as u64 * MIB_EACH, procfs::available_mib());
    if available < needed {
        let reason = format!("{CLONES} clones need {needed} MiB of free memory, and {available} MiB are available");
        return skip_test("one_page_server_serves_two_hundred_guests_of_two_images", reason);
    }
    let place = Place::new();
    let kinds = [Kind::make(&place, 16, 0xa11c_e000), Kind::make(&place, 24, 0x0b0b_0000)];
    let verified = || kinds.each_ref().map(|kind| snapshot::verify::verify(&kind.snapshot).expect("it is whole"));
    let before = verified();
    let server = PageServer::start_of(&place, &kinds.each_ref().map(|kind| kind.snapshot.as_path()));
    let pid = server.process.pid();
    let descriptors_before = descriptors_without_clients(pid);

    let start = Instant::now();
    let mut clones = in_batches(0..CLONES, |number| Clone::start(number, &kinds, &place, &server));
    println!("{CLONES} clones started and checked in {:?}", start.elapsed());
    in_batches(clones.iter_mut(), Clone::check);

    let metrics = server.metrics();
    let served: BTreeSet<(u32, bool)> =
        metrics.sessions.iter().map(|session| (session.pid, session.mode == Mode::Copy)).collect();
    let expected: BTreeSet<(u32, bool)> =
        clones.iter().map(|clone| (clone.vm.pid(), mode(clone.number) == Mode::Copy)).collect();
    assert_eq!((metrics.sessions.len(), &served), (CLONES, &expected), "each vmm has one session");
    let copied = expected.iter().filter(|(_, copied)| *copied).count();
    assert!(copied >= 4, "{copied} clones have their memory copied");
    let stores = check_stores(&server);
    for store in &stores {
        let users = clones.iter().filter(|clone| {
            clone.kind.memory_mib << 8 == store.image_pages && (mode(clone.number) == Mode::Copy) == store.uid.is_none()
        });
        assert_eq!(store.sessions, users.count() as u64, "{store:?}");
    }
    let filled: Vec<_> = stores.iter().map(|store| format!("{}/{}", store.filled_pages, store.image_pages)).collect();
    let faults: u64 = metrics.sessions.iter().map(|session| session.uffd_events).sum();
    println!("{copied} of them copied; pages in the stores: {}; {faults} faults", filled.join(", "));

    let (own, shared) = (procfs::resident(pid, "RssAnon"), procfs::resident(pid, "RssShmem"));
    println!("the server has {own} KiB of its own, and {shared} KiB of stores mapped");
    assert!(own < MOST_OWN_MEMORY, "the server has {own} KiB of its own");
    let descriptors = procfs::descriptors(pid).len();
    println!("it has {descriptors} descriptors, {} before", descriptors_before.len());
    let most = descriptors_before.len() + CLONES * DESCRIPTORS_EACH + OTHER_DESCRIPTORS;
    assert!(descriptors <= most, "{descriptors} descriptors, {most} may be");

    check_quiet(pid, &clones);
    in_batches(clones, |clone| drop(clone.vm.stop()));
    until("all sessions have ended", || server.metrics().sessions.is_empty());
    check_rest(&server, &descriptors_before);
    check_warm(&kinds, &place, &server, &stores);
    let done = server.process.stop();
    assert_eq!(done.code(), 0, "{}", done.stderr);
    assert_eq!(verified(), before, "a hundred clones of each have changed nothing");
}

/// While nobody faults the server, which looks at its stores each second, does next to nothing.
fn check_quiet(server: u32, clones: &[Clone<'_>]) {
    let of_threads = |is_wanted: fn(&str) -> bool| {
        clones.iter().map(|clone| procfs::thread_time(clone.vm.pid(), is_wanted)).sum::<u64>()
    };
    let times = || [procfs::thread_time(server, |_| true), of_threads(|name| name == "keeper"), of_threads(|_| true)];
    let (ticks, before) = (procfs::ticks(server), times());
    std::thread::sleep(QUIET);
    let (ticks, after) = (procfs::ticks(server) - ticks, times());
    let [own, keepers, vmms] = std::array::from_fn(|i| Duration::from_nanos(after[i].saturating_sub(before[i])));
    println!("in {QUIET:?} without faults the server ran for {own:?}, all keepers {keepers:?}, all vmms {vmms:?}");
    assert!(ticks <= MOST_TICKS, "the server has run for {ticks} ticks");
}

fn count(descriptors: &[String], kind: &str) -> usize {
    descriptors.iter().filter(|name| name.starts_with(kind)).count()
}

/// The server's descriptors, once it has no connection of any guest or reader: two sockets listen.
fn descriptors_without_clients(server: u32) -> Vec<String> {
    let mut descriptors = Vec::new();
    until("the server has only its own descriptors", || {
        descriptors = procfs::descriptors(server);
        count(&descriptors, "socket:") == 2 && count(&descriptors, "anon_inode:[pidfd]") == 0
    });
    descriptors
}

/// Of the guests nothing is left in the server but their stores.
fn check_rest(server: &PageServer, descriptors_before: &[String]) {
    let stores = check_stores(server).len();
    let now = descriptors_without_clients(server.process.pid());
    assert_eq!(count(&now, "anon_inode:[userfaultfd]"), stores, "each store has a userfaultfd, and nobody else");
    let left = now.len() - descriptors_before.len();
    println!("{left} descriptors are left for {stores} stores");
    assert!(left <= stores * DESCRIPTORS_EACH, "{now:?}");
}

/// Who comes late finds the stores as they were.
fn check_warm(kinds: &[Kind; 2], place: &Place, server: &PageServer, before: &[StoreMetrics]) {
    for (number, kind) in (CLONES..).zip(kinds) {
        let late = Clone::start(number, kinds, place, server);
        let events = server.session(late.vm.pid()).uffd_events;
        println!("a late clone with {} MiB raised {events} faults", kind.memory_mib);
        late.vm.stop();
    }
    let filled = |stores: &[StoreMetrics]| stores.iter().map(|store| store.filled_pages).sum::<u64>();
    assert_eq!(filled(&check_stores(server)), filled(before), "nothing had to be filled again");
}
