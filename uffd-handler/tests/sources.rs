//! Sources that are slow, cannot be reached, or are damaged: who does not need them notices nothing, and who does gets
//! every word in the end, or is told.
#![allow(missing_docs)]

mod common;
use api_spec::handshake::Reply;
use common::source::*;
use common::*;
use snapshot::tools::Job;
use snapshot::tools::store::{Form, flatten, pack, write_diff};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::JoinHandle;
use std::time::Instant;
use uffd_handler::fetch::{Fetcher, Inbox, Urgency};
use uffd_handler::server::Limits;
use uffd_handler::stores::Stores;

const SIZE: usize = 2 * MIB + 3 * PAGE;

/// Reads a page on a thread of its own, which is known to be in it once the server has seen the fault.
fn touch(server: &Local, client: &Arc<CopyClient>, page: usize) -> JoinHandle<u64> {
    let before = events(server);
    let guest = client.clone();
    let reader = std::thread::spawn(move || guest.view.get(page * PAGE / 8));
    until("the fault is seen", || events(server) > before);
    reader
}

fn events(server: &Local) -> u64 {
    server.metrics().sessions.iter().map(|session| session.uffd_events).sum()
}

#[test]
fn a_slow_source_holds_up_nobody_elses_guests() {
    with_userfaultfd(|| {
        let (slow, hand) = TestSource::boxed("slow", SIZE, Weather::Stuck);
        let (fine, _) = TestSource::boxed("fine", SIZE, Weather::Fine);
        let server = Local::start(vec![slow, fine], Limits::default());
        let (waits, copies) = (server.share("slow", SIZE), server.copy("slow", SIZE));
        std::thread::scope(|scope| {
            // More than there are threads to read.
            let view = &waits.view;
            let readers: Vec<_> = (0..20).map(|chunk| scope.spawn(move || view.check_page(chunk * 16))).collect();
            let copy_reader = scope.spawn(|| copies.view.check_page(3));
            until("all wait", || server.metrics().sessions.iter().map(|s| s.waiting).sum::<u64>() == 21);
            server.share("fine", SIZE).view.check_all();
            server.copy("fine", SIZE).view.check_all();
            assert_eq!(ping(&waits.stream, 7), Reply::Pong { ping: 7, waiting: 20, away: None });
            assert_eq!(server.metrics().images[0].chunks_waiting, 20);
            assert!(readers.iter().all(|reader| !reader.is_finished()) && !copy_reader.is_finished());
            hand.set(Weather::Fine);
        });
        assert_eq!(ping(&waits.stream, 8), Reply::Pong { ping: 8, waiting: 0, away: None });
        // One read was enough for the store of those who share and for that from which copies come.
        assert_eq!(hand.reads(0), 1);
        waits.view.check_all();
        copies.view.check_all();
        let metrics = server.metrics();
        assert_eq!((metrics.images[0].chunks_waiting, metrics.images[0].source.as_str()), (0, "test"));
        assert!(metrics.faults.deferred >= 21);
        assert!(metrics.sessions.iter().all(|session| session.waiting == 0));
    });
}

#[test]
fn what_is_away_is_tried_again_until_it_is_back() {
    with_userfaultfd(|| {
        let (away, hand) = TestSource::boxed("away", SIZE, Weather::Away);
        let (fine, _) = TestSource::boxed("fine", SIZE, Weather::Fine);
        let server = Local::start(vec![away, fine], Limits::default());
        let client = server.share("away", SIZE);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| client.view.check_page(0));
            until("it was tried again", || server.metrics().images[0].failures >= 3);
            server.share("fine", SIZE).view.check_all();
            let why = Some("the test has cut the line".to_string());
            assert_eq!(ping(&client.stream, 1), Reply::Pong { ping: 1, waiting: 1, away: why.clone() });
            let metrics = server.metrics();
            assert_eq!((&metrics.images[0].away, metrics.images[0].chunks_waiting), (&why, 1));
            assert_eq!(metrics.images[0].damage, None);
            // Others may come, and wait as well.
            let second = server.share("away", SIZE);
            scope.spawn(move || {
                let second = second;
                second.view.check_all();
            });
            assert!(!reader.is_finished());
            hand.set(Weather::Fine);
        });
        client.view.check_all();
        assert_eq!(server.metrics().images[0].away, None);
        assert_eq!(ping(&client.stream, 2), Reply::Pong { ping: 2, waiting: 0, away: None });
    });
}

#[test]
fn one_chunk_that_cannot_be_had_holds_up_no_other() {
    with_userfaultfd(|| {
        let (source, hand) = TestSource::boxed("image", SIZE, Weather::AwayAt(5));
        let server = Local::start(vec![source], Limits::default());
        let client = server.share("image", SIZE);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| client.view.check_page(5 * 16));
            until("it was tried again", || server.metrics().images[0].failures >= 2);
            for chunk in (0..SIZE.div_ceil(CHUNK)).filter(|chunk| *chunk != 5) {
                client.view.check_page(chunk * 16);
                assert_eq!(hand.reads(chunk as u64), 1);
            }
            let metrics = server.metrics();
            assert_eq!((metrics.images[0].chunks_waiting, metrics.sessions[0].waiting), (1, 1));
            assert!(!reader.is_finished());
            hand.set(Weather::Fine);
        });
        client.view.check_all();
    });
}

#[test]
fn what_nobody_waits_for_is_not_tried_again() {
    with_userfaultfd(|| {
        let (away, hand) = TestSource::boxed("away", SIZE, Weather::Away);
        let server = Local::start(vec![away], Limits::default());
        let client = Arc::new(server.copy("away", SIZE));
        let _sleeps_for_ever = touch(&server, &client, 40);
        until("it was tried", || hand.reads(2) >= 2);
        client.stream.shutdown(std::net::Shutdown::Both).unwrap();
        until("the session ends", || server.metrics().sessions.is_empty());
        until("nobody waits", || server.metrics().images[0].chunks_waiting == 0);
        // Whoever comes then is tried for at once, and what was given up is not.
        hand.set(Weather::Fine);
        let before = hand.reads(2);
        let other = server.copy("away", SIZE);
        other.view.check_page(0);
        assert!(hand.reads(2) <= before + 1);
        std::mem::forget(client);
    });
}

#[test]
fn a_damaged_chunk_ends_who_needs_it_without_a_word() {
    with_userfaultfd(|| {
        let (bad, hand) = TestSource::boxed("bad", SIZE, Weather::Fine);
        let server = Local::start(vec![bad], Limits::default());
        let (unlucky, lucky) = (Arc::new(server.copy("bad", SIZE)), server.share("bad", SIZE));
        lucky.view.check_page(0);
        hand.set(Weather::Damaged);
        let guest = unlucky.clone();
        let reader = std::thread::spawn(move || guest.view.get(64 * PAGE / 8));
        let words = last_words(&unlucky.stream);
        assert_eq!(words, "", "there may be another server with a good image");
        assert!(!reader.is_finished());
        assert!(server.greet("bad", SIZE).unwrap_err().to_string().contains("damaged"));
        lucky.view.check_page(5);
        let metrics = server.metrics();
        assert!(metrics.images[0].damage.as_ref().unwrap().contains("chunk 4"));
        assert_eq!(metrics.sessions.len(), 1);
    });
}

#[test]
fn a_page_given_back_while_it_is_waited_for_reads_as_zeros_at_once() {
    with_userfaultfd(|| {
        let (slow, hand) = TestSource::boxed("slow", SIZE, Weather::Stuck);
        let server = Local::start(vec![slow], Limits::default());
        let client = Arc::new(server.copy("slow", SIZE));
        let (given_back, kept) = (touch(&server, &client, 5), touch(&server, &client, 6));
        client.view.advise(5 * PAGE, PAGE, libc::MADV_DONTNEED).unwrap();
        assert_eq!(given_back.join().unwrap(), 0);
        assert!(!kept.is_finished());
        hand.set(Weather::Fine);
        assert_eq!(kept.join().unwrap(), word(6 * PAGE / 8));
        assert_eq!(client.view.get(5 * PAGE / 8 + 1), 0);
    });
}

#[test]
fn who_waits_for_a_page_that_somebody_else_puts_there_is_woken() {
    with_userfaultfd(|| {
        let (slow, hand) = TestSource::boxed("slow", SIZE, Weather::Stuck);
        let server = Local::start(vec![slow], Limits::default());
        let client = Arc::new(server.copy("slow", SIZE));
        let reader = touch(&server, &client, 5);
        // The page is there then, and nobody was told.
        let mine = [0x77_u8; PAGE];
        client.put_without_waking(5 * PAGE, &mine);
        assert!(!reader.is_finished());
        hand.set(Weather::Fine);
        assert_eq!(reader.join().unwrap(), 0x7777_7777_7777_7777);
        assert_eq!(server.metrics().sessions[0].pages_copied, 0);
        client.view.check_page(6);
    });
}

#[test]
fn who_waits_for_a_page_that_was_taken_out_of_the_servers_hands_is_woken() {
    with_userfaultfd(|| {
        let (slow, hand) = TestSource::boxed("slow", SIZE, Weather::Stuck);
        let server = Local::start(vec![slow], Limits::default());
        let client = Arc::new(server.copy("slow", SIZE));
        let reader = touch(&server, &client, 5);
        client.view.replace(5 * PAGE, PAGE);
        hand.set(Weather::Fine);
        assert_eq!(reader.join().unwrap(), 0);
        client.view.check_page(6);
    });
}

#[test]
fn a_store_that_must_be_put_right_waits_for_its_bytes_but_not_for_ever() {
    with_userfaultfd(|| {
        let (slow, hand) = TestSource::boxed("slow", SIZE, Weather::Fine);
        let server = Local::start(vec![slow], Limits::default());
        let spoil = |page: usize| {
            let greeted = server.greet("slow", SIZE).unwrap();
            assert_eq!(View::map(&greeted.store, SIZE).get(page * PAGE / 8), 0);
        };
        let patient = server.share("slow", SIZE);
        patient.view.check_page(0);
        spoil(100);
        until("store is retired", || server.metrics().stores_retired_total == 1);
        until("it is put right", || patient.view.get(100 * PAGE / 8) == word(100 * PAGE / 8));
        patient.view.check_all();
        // The same, where the bytes do not come.
        let new = server.share("slow", SIZE);
        new.view.check_page(0);
        hand.set(Weather::Stuck);
        spoil(200);
        let words = new.wait_for_end();
        assert!(words.contains("\"refused\"") && words.contains("cannot be put right"), "{words}");
        assert_eq!(server.metrics().sessions.len(), 1);
        hand.set(Weather::Fine);
        server.share("slow", SIZE).view.check_all();
    });
}

#[test]
fn the_end_does_not_wait_for_a_thread_that_hangs() {
    let (source, hand) = TestSource::boxed("hangs", SIZE, Weather::Stuck);
    let inbox = Inbox::new().unwrap();
    let mut fetcher = Fetcher::new(0, Arc::from(source), &inbox);
    assert!(fetcher.want(0, Urgency::Demand) && !fetcher.want(0, Urgency::Demand));
    until("a thread hangs", || hand.reads(0) == 1);
    drop((fetcher, inbox));
    assert_eq!(hand.reads(0), 1);
}

#[test]
fn reading_ahead_fills_the_stores_that_there_are() {
    with_userfaultfd(|| {
        let (source, hand) = TestSource::boxed("image", SIZE, Weather::Fine);
        let inbox = Inbox::new().unwrap();
        let mut stores = Stores::new(vec![source], None, 0, &inbox, None);
        assert_eq!(stores.prefetch("image", 0..10), 0, "there is no store that it would be for");
        stores.grant(0, Some(1)).unwrap();
        stores.grant(0, None).unwrap();
        assert_eq!(stores.prefetch("image", [3, 0, 32, 33, 3, u64::MAX / 16]), 3);
        assert_eq!(stores.prefetch("other", 0..10), 0);
        let filled =
            |stores: &Stores| -> u64 { stores.metrics(&Default::default()).iter().map(|s| s.filled_pages).sum() };
        until("they have come", || {
            while let Some(fetched) = inbox.take() {
                assert!(stores.receive(fetched, Instant::now()).unwrap().ready.is_empty());
            }
            filled(&stores) == 2 * (16 + 16 + 3)
        });
        assert_eq!((hand.reads(3), hand.reads(33), stores.prefetch("image", [3])), (1, 0, 0));
    });
}

#[test]
fn a_server_that_waits_for_nothing_is_not_kept_busy() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(MIB);
        let server = Server::start(&sample);
        let client = Client::connect(&sample);
        client.view.check_all();
        let wakeups = || {
            let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
            let count = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap();
            count.trim().parse::<u64>().unwrap()
        };
        let cpu = || {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", server.pid())).unwrap();
            let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
            fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
        };
        let (before, cpu_before, since) = (wakeups(), cpu(), Instant::now());
        std::thread::sleep(std::time::Duration::from_secs(3));
        // A tick each second; a loop that turns would use a hundred units of time in each.
        let (woken, used, seconds) = (wakeups() - before, cpu() - cpu_before, since.elapsed().as_secs() + 1);
        assert!(woken <= 8 * seconds && used <= 25 * seconds, "woken {woken} times, {used} units of time");
    });
}

#[test]
fn a_guest_that_dies_while_it_waits_is_forgotten() {
    with_userfaultfd(|| {
        let (slow, hand) = TestSource::boxed("slow", SIZE, Weather::Stuck);
        let server = Local::start(vec![slow], Limits::default());
        let client = Arc::new(server.copy("slow", SIZE));
        let _reader = touch(&server, &client, 0);
        client.stream.shutdown(std::net::Shutdown::Write).unwrap();
        until("the session ends", || server.metrics().sessions.is_empty());
        hand.set(Weather::Fine);
        let other = server.share("slow", SIZE);
        other.view.check_all();
        std::mem::forget(client);
    });
}

/// How many pages of a file the kernel has in memory.
fn cached_pages(path: &std::path::Path) -> usize {
    let file = std::fs::File::open(path).unwrap();
    let len = file.metadata().unwrap().len() as usize;
    View::map_readable(&file, len).resident_pages()
}

#[test]
fn a_local_image_is_fetched_from_its_disk_and_not_kept_twice() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(SIZE);
        let image = sample.path("snap/mem.bin");
        let forget = || {
            let file = std::fs::File::open(&image).unwrap();
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
            cached_pages(&image) == 0
        };
        if !forget() {
            return test_skip::skip("this file system keeps its files in memory");
        }
        let server = Server::start(&sample);
        let client = Client::connect(&sample);
        std::thread::scope(|scope| {
            (0..4).for_each(|_| drop(scope.spawn(|| client.view.check_all())));
        });
        let metrics = server.metrics();
        assert_eq!(metrics.stores[0].filled_pages, (SIZE / PAGE) as u64);
        assert!(metrics.faults.deferred > 0, "{:?}", metrics.faults);
        until("it is let go", || cached_pages(&image) == 0);
        // For copies it is read anew.
        CopyClient::ours(&sample.socket(), &sample.hello()).view.check_all();
        until("it is let go", || cached_pages(&image) == 0);
    });
}

/// A sample that is stored in other ways beside itself: `packed`, `over` (what differs from a packed one), and `packed-over` (the
/// same, packed).
fn stored_otherwise() -> (Sample, [&'static str; 3]) {
    let sample = Sample::of_bytes(SIZE);
    // Every third page is another, and can be compressed.
    let base = Sample::of_words(SIZE, |index| if (index * 8 / PAGE).is_multiple_of(3) { 5 } else { word(index) });
    let never = AtomicBool::new(false);
    let job = Job { cancel: &never, progress: &|_, _| {}, max_bytes: None };
    let (snap, below) = (sample.path("snap"), sample.path("below"));
    flatten(&base.path("snap"), &below, Form::Packed, &job).unwrap();
    pack(&snap, &sample.path("packed"), &job).unwrap();
    write_diff(&below, &snap, &sample.path("over"), Form::Raw, &job).unwrap();
    write_diff(&below, &snap, &sample.path("packed-over"), Form::Packed, &job).unwrap();
    (sample, ["packed", "over", "packed-over"])
}

#[test]
fn packed_snapshots_and_such_that_lie_over_others_are_served_like_any() {
    with_userfaultfd(|| {
        let (sample, names) = stored_otherwise();
        for name in names {
            let server = Server::start_from(&sample, sample.path(name));
            let (first, second) = (Client::connect(&sample), Client::connect(&sample));
            std::thread::scope(|scope| {
                (0..3).for_each(|_| drop(scope.spawn(|| first.view.check_all())));
                scope.spawn(|| second.view.check_all());
            });
            CopyClient::ours(&sample.socket(), &sample.hello()).view.check_all();
            let metrics = server.metrics();
            let kind = if name == "packed" { "packed" } else { "chain" };
            assert_eq!((metrics.images[0].source.as_str(), &metrics.images[0].damage), (kind, &None), "{name}");
            assert_eq!(metrics.stores[0].filled_pages, (SIZE / PAGE) as u64, "{name}");
        }
    });
}

#[test]
fn damage_of_a_packed_image_or_of_a_parent_is_never_served() {
    with_userfaultfd(|| {
        for (name, file) in
            [("packed", "packed/mem.pack"), ("over", "below/mem.pack"), ("packed-over", "packed-over/mem.pack")]
        {
            let (sample, _) = stored_otherwise();
            // The end of chunk 31 lies there; chunk 32 is zero, or next to nothing where it is not.
            let path = sample.path(file);
            let mut bytes = std::fs::read(&path).unwrap();
            let at = bytes.len() - PAGE;
            bytes[at..].fill(0xa5);
            std::fs::remove_file(&path).unwrap();
            std::fs::write(&path, bytes).unwrap();
            let server = Server::start_from(&sample, sample.path(name));
            let (unlucky, lucky) = (Arc::new(Client::connect(&sample)), Client::connect(&sample));
            lucky.view.check_page(1);
            // It waits for a page that must never come, until this process ends.
            let guest = unlucky.clone();
            let reader = std::thread::spawn(move || guest.view.get((32 * CHUNK - PAGE) / 8));
            unlucky.wait_for_end();
            assert!(!reader.is_finished(), "{name}: a word of the damaged chunk was served");
            until("the log says so", || server.logged("is damaged at offset") > 0);
            assert!(Client::greet(&sample).unwrap_err().to_string().contains("damaged"), "{name}");
            lucky.view.check_page(2);
            std::mem::forget(unlucky);
        }
    });
}
