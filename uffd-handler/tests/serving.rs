//! Guests that behave: every word is right, is shared, and stays private when written.
#![allow(missing_docs)]

mod common;
use common::*;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::unix::fs::FileExt;
use std::sync::Barrier;

/// An image whose end, and a region's border, are inside of chunks.
fn small() -> Sample {
    Sample::of_bytes(2 * MIB + 3 * PAGE)
}

#[test]
fn one_client_reads_every_word_right() {
    with_userfaultfd(|| {
        let sample = small();
        let server = Server::start(&sample);
        let client = Client::connect_split(&sample, &[5 * PAGE, MIB + 9 * PAGE]);
        client.view.check_all();
        let metrics = server.metrics();
        let pages = (sample.size() / PAGE) as u64;
        assert_eq!((metrics.stores[0].filled_pages, metrics.stores[0].image_pages), (pages, pages));
        assert_eq!(metrics.sessions[0].pages_filled, pages);
        assert_eq!((metrics.sessions_total, metrics.refused_total, metrics.stores_retired_total), (1, 0, 0));
    });
}

#[test]
fn a_second_client_raises_no_event() {
    with_userfaultfd(|| {
        let sample = small();
        let server = Server::start(&sample);
        Client::connect(&sample).view.check_all();
        until("first session ends", || server.metrics().sessions.is_empty());
        let second = Client::connect(&sample);
        second.view.check_all();
        let session = &server.metrics().sessions[0];
        assert_eq!((session.id, session.uffd_events), (2, 0));
        assert_eq!(session.pid, std::process::id());
    });
}

#[test]
fn writes_stay_private() {
    with_userfaultfd(|| {
        let sample = small();
        let _server = Server::start(&sample);
        let (writer, reader) = (Client::connect(&sample), Client::connect(&sample));
        let pages = sample.size() / PAGE;
        // First touch by writing, for half of the pages; of those, half are read by the other before, half after.
        for page in (0..pages).filter(|page| page % 2 == 0) {
            if page % 4 == 0 {
                reader.view.check_page(page);
            }
            writer.view.set(page * PAGE / 8 + 7, 0xdead);
        }
        reader.view.check_all();
        Client::connect(&sample).view.check_all();
        for page in 0..pages {
            let index = page * PAGE / 8 + 7;
            assert_eq!(writer.view.get(index), if page % 2 == 0 { 0xdead } else { word(index) });
            assert_eq!(writer.view.get(index + 1), word(index + 1), "the rest of a written page");
        }
    });
}

#[test]
fn three_clients_at_once_in_different_orders() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(64 * MIB);
        let server = Server::start(&sample);
        run_three(&sample);
        let metrics = server.metrics();
        assert_eq!(metrics.stores.len(), 1);
        assert_eq!(metrics.stores[0].filled_pages, (64 * MIB / PAGE) as u64);
        assert_eq!(metrics.stores_retired_total, 0, "{}", server.log());
    });
}

fn run_three(sample: &Sample) {
    let pages = sample.size() / PAGE;
    let start = Barrier::new(3);
    std::thread::scope(|scope| {
        for order in 0..3 {
            let start = &start;
            scope.spawn(move || {
                let client = Client::connect(sample);
                start.wait();
                for step in 0..pages {
                    client.view.check_page(match order {
                        0 => step,
                        1 => pages - 1 - step,
                        // An odd stride visits every page of a power of two.
                        _ => step * 4099 % pages,
                    });
                }
            });
        }
    });
}

#[test]
fn many_threads_of_one_client_fault_on_the_same_pages() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(16 * MIB);
        let _server = Server::start(&sample);
        let client = Client::connect(&sample);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| client.view.check_all());
            }
        });
    });
}

#[test]
fn the_kernel_faults_too() {
    with_userfaultfd(|| {
        let sample = small();
        let _server = Server::start(&sample);
        let client = Client::connect(&sample);
        // read(2) into a missing page: the kernel writes it, and the rest of the page is the image's.
        let mut file = tempfile::tempfile_in(sample.root.path()).unwrap();
        file.write_all(&[0xab; PAGE]).unwrap();
        file.read_exact_at(client.view.raw(20 * PAGE + 64, 64), 0).unwrap();
        assert_eq!(client.view.get((20 * PAGE + 64) / 8), 0xabab_abab_abab_abab);
        assert_eq!(client.view.get(20 * PAGE / 8), word(20 * PAGE / 8));
        // write(2) from missing pages: the kernel reads them.
        let (at, len) = (3 * CHUNK - 8, 2 * CHUNK);
        file.rewind().unwrap();
        file.write_all(client.view.raw(at, len)).unwrap();
        check_file(&mut file, at, len);
    });
}

fn check_file(file: &mut File, at: usize, len: usize) {
    let mut bytes = vec![0; len];
    file.rewind().unwrap();
    file.read_exact(&mut bytes).unwrap();
    let words = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap()));
    assert!(words.enumerate().all(|(index, got)| got == word(at / 8 + index)));
}
