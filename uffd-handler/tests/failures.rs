//! Guests and images that misbehave or die: nobody else is disturbed, and nobody reads a wrong word.
#![allow(missing_docs)]

mod common;
use common::*;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

#[test]
fn a_hole_read_without_userfaultfd_retires_the_store() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(4 * MIB);
        let server = Server::start(&sample);
        let old = Client::connect(&sample);
        old.view.check_page(3);
        read_unregistered(&sample, 500);
        until("store is retired", || server.metrics().stores_retired_total == 1);
        let new = Client::connect(&sample);
        new.view.check_all();
        old.view.check_all();
        let metrics = server.metrics();
        assert_eq!(metrics.stores.iter().map(|store| store.retired).collect::<Vec<_>>(), [true, false]);
        assert_eq!((metrics.sessions.len(), server.logged("it is retired")), (2, 1));
        drop(old);
        until("the retired store is dropped", || server.metrics().stores.len() == 1);
    });
}

#[test]
fn a_store_is_checked_before_it_is_handed_out() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(4 * MIB);
        let server = Server::start(&sample);
        for page in [0, 100, 1023] {
            read_unregistered(&sample, page);
            Client::connect(&sample).view.check_page(page);
        }
        assert_eq!(server.metrics().stores_retired_total, 3);
    });
}

#[test]
fn a_foreign_page_met_while_filling_is_put_right() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(4 * MIB);
        let server = Server::start(&sample);
        let client = Client::connect(&sample);
        read_unregistered(&sample, 5);
        // The same chunk: the server runs into the page at once, or has found it just before.
        client.view.check_page(6);
        client.view.check_page(5);
        client.view.check_page(4);
        until("store is retired", || server.metrics().stores_retired_total == 1);
        client.view.check_all();
    });
}

#[test]
fn a_flipped_byte_is_never_served() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(4 * MIB);
        sample.flip_byte(5 * CHUNK + 1234);
        let server = Server::start(&sample);
        let (unlucky, lucky) = (Arc::new(Client::connect(&sample)), Client::connect(&sample));
        unlucky.view.check_page(0);
        let has_read = Arc::new(AtomicBool::new(false));
        let (guest, flag) = (unlucky.clone(), has_read.clone());
        // It waits for a page that must never come, until this process ends.
        std::thread::spawn(move || {
            guest.view.get(5 * CHUNK / 8);
            flag.store(true, Ordering::SeqCst);
        });
        let words = unlucky.wait_for_end();
        assert_eq!(words, "", "there may be another server with a good image");
        until("the damage is logged", || server.logged("is damaged at offset") > 0);
        assert!(!has_read.load(Ordering::SeqCst), "a word of the damaged chunk was served");
        let refusal = Client::greet(&sample).unwrap_err().to_string();
        assert!(refusal.contains("damaged"), "{refusal}");
        // Who does not need that chunk goes on.
        (6 * CHUNK / PAGE..4 * MIB / PAGE).for_each(|page| lucky.view.check_page(page));
        until("the refusal is logged", || server.logged("is damaged: ") >= 2);
        assert_eq!(server.logged("is damaged: "), 2, "once for the image, once for the refusal:\n{}", server.log());
        assert_eq!(server.metrics().sessions.len(), 1);
        std::mem::forget(unlucky);
    });
}

#[test]
fn a_client_killed_in_a_fault_is_forgotten() {
    if let (Ok(dir), Ok(image)) = (std::env::var("COPPICE_SAMPLE"), std::env::var("COPPICE_IMAGE")) {
        return be_the_client_that_is_killed(&dir, image);
    }
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(4 * MIB);
        let server = Server::start(&sample);
        let descriptors = server.descriptors();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_client_killed_in_a_fault_is_forgotten", "--nocapture"])
            .env("COPPICE_SAMPLE", sample.root.path())
            .env("COPPICE_IMAGE", &sample.manifest.memory.root)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        until("the client faults", || server.metrics().sessions.first().is_some_and(|s| s.uffd_events > 2));
        // The server stands still, so that the client is surely waiting for it.
        server.signal(libc::SIGSTOP);
        std::thread::sleep(Duration::from_millis(50));
        child.kill().unwrap();
        child.wait().unwrap();
        server.signal(libc::SIGCONT);
        until("the session ends", || server.metrics().sessions.is_empty());
        Client::connect(&sample).view.check_all();
        // The store and its userfaultfd stay.
        until("descriptors are closed", || server.descriptors() <= descriptors + 3);
        assert_eq!(server.metrics().stores_retired_total, 0, "{}", server.log());
    });
}

/// What the other process of the test above does: faults slowly, until it is killed.
fn be_the_client_that_is_killed(dir: &str, image: String) {
    let size = 4 * MIB;
    let hello = api_spec::handshake::Hello {
        version: api_spec::handshake::VERSION,
        image,
        size: size as u64,
        mode: Default::default(),
    };
    let greeted = uffd_handler::client::greet(&std::path::Path::new(dir).join("s"), &hello).unwrap();
    let view = View::map(&greeted.store, size);
    let uffd = register(&view);
    let _stream = greeted.attach(vec![region(view.address(), size, 0)], &uffd).unwrap();
    for chunk in 0..size / CHUNK {
        view.get(chunk * CHUNK / 8);
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(PATIENCE);
}

#[test]
fn a_client_may_close_its_userfaultfd_or_its_connection_at_any_time() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(4 * MIB);
        let server = Server::start(&sample);
        let good = Client::connect(&sample);
        for page in 0..20 {
            let Client { stream, view, uffd } = Client::connect(&sample);
            view.check_page(page * 16);
            drop((view, uffd));
            good.view.check_page(page * 16 + 8);
            drop(stream);
        }
        until("their sessions end", || server.metrics().sessions.len() == 1);
        good.view.check_all();
        assert_eq!(server.metrics().sessions_total, 21);
    });
}
