//! Huge pages must neither bring pages into a store that nobody has put there, nor change a byte of what is.
#![allow(missing_docs)]

mod common;
use common::*;
use std::sync::{Mutex, PoisonError};

const SHMEM_ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
const MADV_COLLAPSE: i32 = 25;
const MADV_HUGEPAGE: i32 = 14;
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// The host's setting is another while this lives.
struct ShmemEnabled(String);

impl ShmemEnabled {
    fn set(value: &str) -> Option<Self> {
        let now = std::fs::read_to_string(SHMEM_ENABLED).ok()?;
        let chosen = now.split(['[', ']']).nth(1)?.to_string();
        std::fs::write(SHMEM_ENABLED, value).ok()?;
        Some(Self(chosen))
    }
}

impl Drop for ShmemEnabled {
    fn drop(&mut self) {
        let _ = std::fs::write(SHMEM_ENABLED, &self.0);
    }
}

fn with_forced_huge_pages(test: impl FnOnce() + Send + 'static) {
    with_huge_pages("force", test);
}

fn with_huge_pages(value: &str, test: impl FnOnce() + Send + 'static) {
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    match ShmemEnabled::set(value) {
        Some(_guard) => with_userfaultfd(test),
        None => test_skip::skip(format!("{SHMEM_ENABLED} cannot be set here")),
    }
}

#[test]
fn three_clients_with_huge_shared_memory_forced() {
    with_forced_huge_pages(|| {
        let sample = Sample::of_bytes(64 * MIB);
        let server = Server::start(&sample);
        std::thread::scope(|scope| {
            for first in 0..3 {
                let sample = &sample;
                scope.spawn(move || {
                    let client = Client::connect(sample);
                    client.view.advise(0, sample.size(), MADV_HUGEPAGE).unwrap();
                    let pages = sample.size() / PAGE;
                    (0..pages).for_each(|step| client.view.check_page((step * 4099 + first * 5000) % pages));
                });
            }
        });
        assert_eq!(server.metrics().stores_retired_total, 0, "{}", server.log());
    });
}

#[test]
fn collapse_of_a_clients_mapping_invents_nothing() {
    with_forced_huge_pages(|| {
        let sample = Sample::of_bytes(16 * MIB);
        let server = Server::start(&sample);
        let (client, other) = (Client::connect(&sample), Client::connect(&sample));
        // Of the 2 MiB ranges one stays empty, one is there in part, the others are complete.
        (0..3).for_each(|page| client.view.check_page(2 * MIB / PAGE + page));
        (4 * MIB / PAGE..sample.size() / PAGE).for_each(|page| client.view.check_page(page));
        for range in 0..8 {
            let collapsed = client.view.advise(range * 2 * MIB, 2 * MIB, MADV_COLLAPSE);
            assert!(range > 1 || collapsed.is_err(), "range {range} with absent pages was collapsed");
        }
        other.view.check_all();
        client.view.check_all();
        Client::connect(&sample).view.check_all();
        assert_eq!(server.metrics().stores_retired_total, 0, "{}", server.log());
    });
}

#[test]
fn a_huge_page_read_into_a_hole_is_found_and_put_right() {
    with_forced_huge_pages(|| {
        let sample = Sample::of_bytes(16 * MIB);
        let server = Server::start(&sample);
        let client = Client::connect(&sample);
        client.view.check_page(0);
        read_unregistered(&sample, 6 * MIB / PAGE + 77);
        until("store is retired", || server.metrics().stores_retired_total == 1);
        client.view.check_all();
        Client::connect(&sample).view.check_all();
    });
}

/// Runs a test with a server that makes huge pages of complete blocks, where the host lets it.
fn with_collapsing_server(size: usize, test: impl FnOnce(&Sample, Server) + Send + 'static) {
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    with_userfaultfd(move || {
        let sample = Sample::of_bytes(size);
        let server = collapsing(&sample);
        test(&sample, server);
    });
}

fn collapsing(sample: &Sample) -> Server {
    Server::start_with(sample, &["--huge-pages".as_ref(), "collapse".as_ref()])
}

/// Waits until the kernel has had its say about so many blocks. False, and a reason, if it took none.
fn has_collapsed(server: &Server, blocks: u64) -> bool {
    let counts = || server.metrics().huge_pages;
    until("all complete blocks are tried", || counts().collapsed + counts().failed >= blocks);
    assert_eq!(counts().collapsed + counts().failed, blocks, "{}", server.log());
    if counts().collapsed == 0 {
        test_skip::skip(format!("the kernel makes no huge pages here: {}", server.log()));
    }
    println!("{:?}", counts());
    counts().collapsed > 0
}

const BLOCK: usize = 2 * MIB;
const BLOCK_PAGES: usize = BLOCK / PAGE;

/// A word that a guest writes: unlike any of the image.
fn own_word(page: usize) -> u64 {
    0x5eed_0000_0000_0000 | (page as u64) << 8
}

/// Compares each word of a view in which `written` says of which pages the first word is the guest's own.
fn check_with_own(view: &View, pages: usize, written: impl Fn(usize) -> bool) {
    for page in 0..pages {
        for index in page * PAGE / 8..(page + 1) * PAGE / 8 {
            let want = if index % (PAGE / 8) == 0 && written(page) { own_word(page) } else { word(index) };
            assert_eq!(view.get(index), want, "page {page} word {index:#x}");
        }
    }
}

#[test]
fn complete_blocks_become_huge_pages_and_no_byte_of_anybody_changes() {
    // The last block is too short, one in the midst is not complete for now.
    with_collapsing_server(17 * MIB, |sample, server| {
        let pages = sample.size() / PAGE;
        let gap = 5 * BLOCK_PAGES..6 * BLOCK_PAGES;
        let written = |page: usize| page % 37 == 3 && !gap.contains(&page);
        let (writer, reader, idle) = (Client::connect(sample), Client::connect(sample), Client::connect(sample));
        (0..pages).rev().filter(|page| !gap.contains(page)).for_each(|page| writer.view.check_page(page));
        (0..pages).filter(|page| written(*page)).for_each(|page| writer.view.set(page * PAGE / 8, own_word(page)));
        (0..pages).step_by(5).filter(|page| !gap.contains(page)).for_each(|page| reader.view.check_page(page));
        reader.view.check_page(gap.start + 100);
        if !has_collapsed(&server, 7) {
            return;
        }
        let later = Client::connect(sample);
        (0..pages).filter(|page| !gap.contains(page)).for_each(|page| later.view.check_page(page));
        assert!(later.view.huge_kib() >= BLOCK as u64 / 1024);
        // A write takes the block's huge mapping from who writes, and nothing from anybody else.
        later.view.set(0, own_word(0));
        check_with_own(&later.view, gap.start, |page| page == 0);

        // What is not there is still told from what is: now the gap fills, and goes the same way.
        assert!(!idle.view.is_resident(gap.start + 300));
        gap.clone().for_each(|page| idle.view.check_page(page));
        has_collapsed(&server, 8);
        check_with_own(&writer.view, pages, written);
        for client in [&reader, &idle, &Client::connect(sample)] {
            client.view.check_all();
        }
        let (metrics, log) = (server.metrics(), server.log());
        assert_eq!(metrics.stores_retired_total, 0, "{log}");
        assert_eq!(metrics.stores[0].filled_pages, pages as u64, "{log}");
    });
}

#[test]
fn guests_that_use_their_memory_meanwhile_see_nothing_of_it() {
    with_collapsing_server(32 * MIB, |sample, server| {
        let pages = sample.size() / PAGE;
        let clients: Vec<Client> = (0..3).map(|_| Client::connect(sample)).collect();
        let over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            for (number, client) in clients.iter().enumerate() {
                let over = &over;
                scope.spawn(move || {
                    let written = |page: usize| page % 64 == number;
                    while !over.load(std::sync::atomic::Ordering::Relaxed) {
                        (0..pages)
                            .filter(|page| written(*page))
                            .for_each(|p| client.view.set(p * PAGE / 8, own_word(p)));
                        check_with_own(&client.view, pages, written);
                    }
                });
            }
            has_collapsed(&server, 16);
            over.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        Client::connect(sample).view.check_all();
        assert_eq!(server.metrics().stores_retired_total, 0, "{}", server.log());
    });
}

/// From that store bytes are copied page by page, so that nobody gains by it.
#[test]
fn the_store_for_copies_is_left_alone() {
    with_collapsing_server(8 * MIB, |sample, server| {
        let copies = CopyClient::firecracker(&sample.socket(), sample.size(), &[]);
        copies.view.check_all();
        let client = Client::connect(sample);
        (0..BLOCK_PAGES).for_each(|page| client.view.check_page(page));
        has_collapsed(&server, 1);
        copies.view.check_all();
    });
}

#[test]
fn huge_pages_outlive_the_server() {
    with_collapsing_server(8 * MIB, |sample, mut server| {
        let client = Client::connect(sample);
        client.view.check_all();
        client.view.set(0, own_word(0));
        let (idle, later) = (Client::connect(sample), Client::connect(sample));
        if !has_collapsed(&server, 4) {
            return;
        }
        later.view.check_page(3 * BLOCK_PAGES);
        server.signal(libc::SIGKILL);
        server.wait();
        check_with_own(&client.view, sample.size() / PAGE, |page| page == 0);
        idle.view.check_all();
        later.view.check_all();
    });
}

#[test]
fn a_host_that_denies_huge_pages_is_told_of_once() {
    with_huge_pages("deny", || {
        let sample = Sample::of_bytes(8 * MIB);
        let server = collapsing(&sample);
        Client::connect(&sample).view.check_all();
        until("all blocks are tried", || server.metrics().huge_pages.failed == 4);
        assert_eq!(server.metrics().huge_pages.collapsed, 0);
        until("that is logged", || server.logged("says `deny`") == 1);
        assert_eq!(server.logged("huge pages:"), 1, "{}", server.log());
        Client::connect(&sample).view.check_all();
    });
}
