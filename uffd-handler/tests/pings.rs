//! What a served client may say, and what it hears.
#![allow(missing_docs)]

mod common;
use api_spec::handshake::Reply;
use common::*;
use std::io::{ErrorKind, Write};
use std::sync::mpsc;

fn pong(ping: u64) -> Reply {
    Reply::Pong { ping, waiting: 0, away: None }
}

#[test]
fn pings_are_answered_in_order_while_guests_fault() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(4 * MIB);
        let _server = Server::start(&sample);
        let client = Client::connect(&sample);
        std::thread::scope(|scope| {
            (0..2).for_each(|_| drop(scope.spawn(|| client.view.check_all())));
            (0..200).for_each(|number| assert_eq!(ping(&client.stream, number), pong(number)));
        });
        // Many at once, and one in pieces.
        let many: String = (0..100).map(|number| format!("{{\"ping\":{number}}}\n")).collect();
        (&client.stream).write_all(many.as_bytes()).unwrap();
        (0..100).for_each(|number| assert_eq!(next_reply(&client.stream), pong(number)));
        for piece in [&b"{\"pi"[..], b"ng\":18446744073709551615}", b"\n"] {
            (&client.stream).write_all(piece).unwrap();
        }
        assert_eq!(next_reply(&client.stream), pong(u64::MAX));
    });
}

#[test]
fn every_fault_that_was_raised_before_a_ping_is_answered_before_its_pong() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(4 * MIB);
        let server = Server::start(&sample);
        let client = CopyClient::ours(&sample.socket(), &sample.hello());
        for round in 0..20_u64 {
            let page = round as usize * 40;
            std::thread::scope(|scope| {
                server.signal(libc::SIGSTOP);
                let (tell, told) = mpsc::channel();
                let view = &client.view;
                let reader = scope.spawn(move || {
                    tell.send(rustix::thread::gettid().as_raw_nonzero()).unwrap();
                    view.get(page * PAGE / 8)
                });
                // It does not wait for anything else.
                let stat = format!("/proc/self/task/{}/stat", told.recv().unwrap());
                until("it is in the fault", || {
                    let stat = std::fs::read_to_string(&stat).unwrap();
                    stat.rsplit(") ").next().unwrap().starts_with(['S', 'D'])
                });
                (&client.stream).write_all(format!("{{\"ping\":{round}}}\n").as_bytes()).unwrap();
                server.signal(libc::SIGCONT);
                assert_eq!(next_reply(&client.stream), pong(round));
                assert!(view.is_resident(page), "page {page} came after the pong");
                assert_eq!(reader.join().unwrap(), word(page * PAGE / 8));
            });
        }
        assert_eq!(server.metrics().sessions[0].waiting, 0);
    });
}

#[test]
fn what_is_no_ping_ends_the_session_with_a_word() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(MIB);
        let server = Server::start(&sample);
        let good = Client::connect(&sample);
        let endless = vec![b' '; 21_000];
        for (bytes, part) in [
            (&b"hello\n"[..], "nothing but ping"),
            (b"{\"ping\":1,\"more\":2}\n", "did not match"),
            (b"{\"ping\":1}{\"ping\":2}\n", "trailing characters"),
            (b"\xff\xfe\n", "nothing but ping"),
            (&endless, "more than 20480 bytes"),
        ] {
            for copies in [false, true] {
                let words = if copies {
                    let client = CopyClient::ours(&sample.socket(), &sample.hello());
                    (&client.stream).write_all(bytes).unwrap();
                    last_words(&client.stream)
                } else {
                    let client = Client::connect(&sample);
                    (&client.stream).write_all(bytes).unwrap();
                    last_words(&client.stream)
                };
                assert!(words.contains("\"refused\"") && words.contains(part), "{part}: {words}");
                until("it is in the log", || server.logged(part) >= 1);
            }
        }
        until("they are gone", || server.metrics().sessions.len() == 1);
        good.view.check_all();
        // A Firecracker has nothing to say at all, and hears nothing.
        let firecracker = CopyClient::firecracker(&sample.socket(), sample.size(), &[]);
        firecracker.view.check_page(0);
        (&firecracker.stream).write_all(b"{\"ping\":1}\n").unwrap();
        assert_eq!(last_words(&firecracker.stream), "");
    });
}

#[test]
fn who_never_reads_its_pongs_is_ended_and_holds_up_nobody() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(MIB);
        let server = Server::start(&sample);
        let (good, deaf) = (Client::connect(&sample), Client::connect(&sample));
        deaf.stream.set_write_timeout(Some(PATIENCE)).unwrap();
        let error = loop {
            if let Err(error) = (&deaf.stream).write_all(b"{\"ping\":1}\n") {
                break error;
            }
        };
        assert!(matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset), "{error}");
        until("its session ends", || server.metrics().sessions.len() == 1);
        until("it is in the log", || server.logged("does not read what it is answered") == 1);
        assert_eq!(ping(&good.stream, 1), pong(1));
        good.view.check_all();
    });
}
