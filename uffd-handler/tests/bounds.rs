//! What a server may use, and that it gives back what nobody uses any more.
#![allow(missing_docs)]

mod common;
use common::source::*;
use common::*;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use uffd_handler::server::Limits;

#[test]
fn no_more_guests_than_may_be() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(MIB);
        let server = Server::start_with(&sample, &["--max-sessions".as_ref(), "2".as_ref()]);
        let first = Client::connect(&sample);
        let greeted = Client::greet(&sample).unwrap();
        let second = CopyClient::firecracker(&sample.socket(), sample.size(), &[]);
        second.view.check_all();
        let refusal = Client::greet(&sample).unwrap_err().to_string();
        assert!(refusal.contains("2 guests are served") && refusal.contains("--max-sessions"), "{refusal}");
        // One that had been greeted while there was room.
        let view = View::map(&greeted.store, sample.size());
        let uffd = register(&view);
        let refusal = greeted.attach(vec![region(view.address(), sample.size(), 0)], &uffd).unwrap_err().to_string();
        assert!(refusal.contains("2 guests are served"), "{refusal}");
        drop(first);
        until("it is gone", || server.metrics().sessions.len() == 1);
        Client::connect(&sample).view.check_all();
    });
}

#[test]
fn what_nobody_uses_is_kept_for_a_while_only() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(MIB);
        let server = Server::start_with(&sample, &["--keep-warm".as_ref(), "0".as_ref()]);
        let descriptors = server.descriptors();
        let (shares, copies) = (Client::connect(&sample), CopyClient::ours(&sample.socket(), &sample.hello()));
        shares.view.check_all();
        copies.view.check_all();
        // Longer than it is kept: what is used stays.
        std::thread::sleep(Duration::from_millis(2500));
        assert_eq!(server.metrics().stores.len(), 2);
        drop(copies);
        until("the store for copies is dropped", || server.metrics().stores.len() == 1);
        assert_eq!(server.metrics().stores[0].sessions, 1);
        drop(shares);
        until("the other is, too", || server.metrics().stores.is_empty());
        until("descriptors are closed", || server.descriptors() <= descriptors);
        Client::connect(&sample).view.check_all();
    });
}

#[test]
fn unused_stores_make_room_and_then_new_images_are_refused() {
    with_userfaultfd(|| {
        let sources = ["a", "b", "c"].map(|root| TestSource::boxed(root, MIB, Weather::Fine).0);
        let limits = Limits { max_stores: Some(3 * MIB as u64 / 2), ..Limits::default() };
        let server = Local::start(sources.into(), limits);
        server.share("a", MIB).view.check_all();
        let b = server.share("b", MIB);
        b.view.check_all();
        // Together they are beyond the bound: that of "a" has to go.
        until("the unused one is dropped", || server.metrics().stores.len() == 1);
        assert_eq!(server.metrics().stores[0].image, "b");
        // Another guest is welcome to what there is, and to what fits.
        let a = server.share("a", MIB);
        a.view.check_all();
        server.share("b", MIB).view.check_all();
        let refusal = server.greet("c", MIB).unwrap_err().to_string();
        assert!(refusal.contains("no room for pages of image c") && refusal.contains("--max-stores-mib"), "{refusal}");
        b.view.check_all();
        drop(b);
        until("it is gone", || server.metrics().sessions.len() == 1);
        server.share("c", MIB).view.check_all();
        a.view.check_all();
    });
}

#[test]
fn who_says_nothing_makes_room_for_who_does() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(MIB);
        let server = Server::start(&sample);
        let silent: Vec<UnixStream> = (0..300).map(|_| UnixStream::connect(sample.socket()).unwrap()).collect();
        Client::connect(&sample).view.check_all();
        // The oldest were sent away for that, well before their time.
        assert!(last_words(&silent[0]).contains("other clients have come"));
        assert!(last_words(&silent[43]).contains("other clients have come"));
        assert!(last_words(&silent[299]).contains("no complete hello message"));
        until("all are gone", || server.metrics().refused_total == 300);
        Client::connect(&sample).view.check_all();
    });
}
