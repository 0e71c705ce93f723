//! Copy mode, as Firecracker speaks it and as we do: each word is right, and what was given back reads as zeros.
#![allow(missing_docs)]

mod common;
use api_spec::handshake::{CopyRegion, Mode, Reply};
use common::*;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

fn small() -> Sample {
    Sample::of_bytes(2 * MIB + 3 * PAGE)
}

#[test]
fn a_firecracker_gets_every_word_and_keeps_its_own() {
    with_userfaultfd(|| {
        let sample = small();
        let server = Server::start(&sample);
        let client = CopyClient::firecracker(&sample.socket(), sample.size(), &[5 * PAGE, MIB + 9 * PAGE]);
        client.view.set(8 * PAGE / 8 + 1, 0xdead);
        assert_eq!(client.view.get(8 * PAGE / 8), word(8 * PAGE / 8));
        (0..sample.size() / PAGE).filter(|page| *page != 8).for_each(|page| client.view.check_page(page));
        let other = CopyClient::firecracker(&sample.socket(), sample.size(), &[]);
        other.view.check_all();
        let metrics = server.metrics();
        let pages = (sample.size() / PAGE) as u64;
        assert_eq!(
            metrics.sessions.iter().map(|s| (s.mode, s.pages_copied)).collect::<Vec<_>>(),
            [(Mode::Copy, pages), (Mode::Copy, pages)]
        );
        let [store] = &metrics.stores[..] else { panic!("{:?}", metrics.stores) };
        assert_eq!((store.uid, store.filled_pages, store.sessions), (None, pages, 2));
        assert_eq!(metrics.images[0].source, "file");
        assert_eq!(metrics.images[0].bytes_read, sample.size() as u64);
        // One page after the other: most were copied before anybody asked.
        let faults = metrics.faults.copied + metrics.faults.deferred;
        assert!((2 * pages / 16..pages).contains(&faults), "{faults} faults for twice {pages} pages");
        assert_eq!(metrics.fault_latency.count, faults);
        drop((client, other));
        until("they are gone", || server.metrics().sessions.is_empty());
    });
}

#[test]
fn ours_gets_every_word_too_beside_a_guest_that_shares() {
    with_userfaultfd(|| {
        let sample = small();
        let server = Server::start(&sample);
        let (copies, shares) = (CopyClient::ours(&sample.socket(), &sample.hello()), Client::connect(&sample));
        copies.view.set(0, 7);
        shares.view.check_all();
        assert_eq!(copies.view.get(0), 7);
        assert_eq!(copies.view.get(1), word(1));
        (1..sample.size() / PAGE).for_each(|page| copies.view.check_page(page));
        assert_eq!(ping(&copies.stream, 5), Reply::Pong { ping: 5, waiting: 0, away: None });
        assert_eq!(server.metrics().stores.len(), 2);
    });
}

#[test]
fn many_threads_fault_on_the_same_pages() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(8 * MIB);
        let _server = Server::start(&sample);
        let client = CopyClient::firecracker(&sample.socket(), sample.size(), &[]);
        std::thread::scope(|scope| {
            (0..8).for_each(|_| drop(scope.spawn(|| client.view.check_all())));
        });
    });
}

/// Sends parts of a message, each with these descriptors, then waits until the server has read them.
fn send_parts(stream: &UnixStream, parts: &[(&[u8], &[i32])]) {
    for (bytes, descriptors) in parts {
        let sent = if descriptors.is_empty() {
            let mut stream = stream;
            stream.write(bytes).unwrap()
        } else {
            stream.send_with_fds(&[*bytes], descriptors).unwrap()
        };
        assert_eq!(sent, bytes.len());
        until("it is read", || uffd_handler::process::unread_by_peer(stream).unwrap() == 0);
    }
}

#[test]
fn the_message_may_come_in_pieces_and_the_descriptor_with_any_of_them() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(MIB);
        let server = Server::start(&sample);
        for case in 0..5 {
            let (view, uffd) = CopyClient::memory(sample.size());
            let fd = uffd.as_raw_fd();
            // Under the older name alone, and with fields that nobody knows.
            let text = format!(
                "[{{\"more\":[\"]\",{{}}],\"base_host_virt_addr\":{},\"size\":{},\"offset\":0,\"page_size_kib\":4096}}]",
                view.address(),
                sample.size()
            );
            let (first, second) = text.as_bytes().split_at(14);
            let stream = UnixStream::connect(sample.socket()).unwrap();
            match case {
                0 => send_parts(&stream, &[(text.as_bytes(), &[fd])]),
                1 => send_parts(&stream, &[(first, &[fd]), (second, &[])]),
                2 => send_parts(&stream, &[(first, &[]), (second, &[fd])]),
                3 => send_parts(&stream, &[(text.as_bytes(), &[]), (b" ", &[fd])]),
                _ => {
                    let bytes: Vec<(&[u8], &[i32])> = text.as_bytes().chunks(1).map(|byte| (byte, &[][..])).collect();
                    send_parts(&stream, &bytes);
                    send_parts(&stream, &[(b"\n", &[fd])]);
                }
            }
            view.check_all();
        }
        assert_eq!(server.metrics().refused_total, 0, "{}", server.log());
    });
}

#[test]
fn bad_firecrackers_are_named_in_the_log_and_hear_nothing() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(MIB);
        let server = Server::start(&sample);
        let uffd = uffd_handler::uffd::create().unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        // The first guest makes the store, which stays.
        CopyClient::firecracker(&sample.socket(), sample.size(), &[]).view.check_page(0);
        until("it is gone", || server.metrics().sessions.is_empty());
        let before = server.descriptors();
        let (fd, file) = (uffd.as_raw_fd(), null.as_raw_fd());
        let element = |base: u64, size: usize, offset: usize, page: usize| {
            format!("{{\"base_host_virt_addr\":{base},\"size\":{size},\"offset\":{offset},\"page_size\":{page}}}")
        };
        let whole = format!("[{}]", element(0x7000_0000_0000, MIB, 0, PAGE));
        let two = |other: String| format!("[{},{other}]", element(0x7000_0000_0000, MIB / 2, 0, PAGE));
        let endless = format!("[\"{}", "x".repeat(20_000));
        for (text, descriptors, part) in [
            (whole.clone(), &[file][..], "not a userfaultfd"),
            (whole.clone(), &[fd, fd], "more than one descriptor"),
            (endless, &[fd], "longer than"),
            ("[7]".into(), &[fd], "not a valid copy mode message"),
            ("[]".into(), &[fd], "no image of 0 bytes is served here, only 1048576"),
            (format!("[{}]", element(0x7000_0000_0000, MIB / 2, 0, PAGE)), &[fd], "no image of 524288 bytes"),
            (format!("[{}]", element(0x7000_0000_0000, MIB, 0, 2 * MIB)), &[fd], "page size 2097152"),
            (format!("[{}]", element(0x7000_0000_0001, MIB, 0, PAGE)), &[fd], "multiples of 4096"),
            (two(element(0x7000_0000_0000, MIB / 2, MIB / 2, PAGE)), &[fd], "overlap"),
            (two(element(0x7000_1000_0000, MIB / 2, 0, PAGE)), &[fd], "exactly once"),
            (two(element(0x7000_1000_0000, usize::MAX, 0, PAGE)), &[fd], "no image of 18446744073709551615"),
        ] {
            let stream = UnixStream::connect(sample.socket()).unwrap();
            stream.send_with_fds(&[text.as_bytes()], descriptors).unwrap();
            assert_eq!(last_words(&stream), "", "{part}");
            until(part, || server.logged(part) == 1);
        }
        let no_descriptor = UnixStream::connect(sample.socket()).unwrap();
        (&no_descriptor).write_all(whole.as_bytes()).unwrap();
        assert_eq!(last_words(&no_descriptor), "");
        until("it is named", || server.logged("no userfaultfd with the copy mode message") == 1);
        until("descriptors are closed", || server.descriptors() <= before);
        assert_eq!(server.metrics().refused_total, 12);
        // One that was served, and then comes with more.
        let client = CopyClient::firecracker(&sample.socket(), sample.size(), &[]);
        client.view.check_page(3);
        client.stream.send_with_fds(&[&b"x"[..]], &[fd]).unwrap();
        assert_eq!(last_words(&client.stream), "");
        until("it is named", || server.logged("another descriptor") == 1);
        assert!(server.metrics().sessions.is_empty());
        CopyClient::firecracker(&sample.socket(), sample.size(), &[]).view.check_all();
    });
}

#[test]
fn of_images_of_one_size_the_named_one_is_copied() {
    with_userfaultfd(|| {
        let (sample, other) = (Sample::of_bytes(MIB), Sample::of_words(MIB, |index| !word(index)));
        let path = other.path("snap");
        let both = ["--snapshot".as_ref(), path.as_os_str()];
        {
            let server = Server::start_with(&sample, &both);
            let refused = CopyClient::firecracker(&sample.socket(), MIB, &[]);
            assert_eq!(last_words(&refused.stream), "");
            until("it is named", || server.logged("--copy-snapshot SNAPSHOT") == 1);
        }
        let _server = Server::start_with(&sample, &[&both[..], &["--copy-snapshot".as_ref(), both[1]]].concat());
        let client = CopyClient::firecracker(&sample.socket(), MIB, &[]);
        for index in (0..MIB / 8).step_by(PAGE / 16) {
            assert_eq!(client.view.get(index), !word(index), "word {index:#x}");
        }
        CopyClient::ours(&sample.socket(), &sample.hello()).view.check_all();
    });
}

#[test]
fn what_is_given_back_reads_as_zeros_while_others_fault() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(4 * MIB);
        let server = Server::start(&sample);
        let client = CopyClient::ours(&sample.socket(), &sample.hello());
        let pages = sample.size() / PAGE;
        // Pages below are given back, or are about to be; of each four, three are.
        let begun = AtomicUsize::new(0);
        let start = Barrier::new(5);
        std::thread::scope(|scope| {
            for reader in 0..4 {
                let (view, begun, start) = (&client.view, &begun, &start);
                scope.spawn(move || {
                    start.wait();
                    for step in 0..4 * pages {
                        let page = (step * 613 + reader * 17) % pages;
                        let got = view.get(page * PAGE / 8 + reader);
                        let may_be_zero = page % 4 < 3 && page < begun.load(Ordering::SeqCst);
                        let is_right = got == word(page * PAGE / 8 + reader) || (got == 0 && may_be_zero);
                        assert!(is_right, "page {page}: {got:#x}");
                    }
                });
            }
            start.wait();
            for page in (0..pages).step_by(4) {
                begun.store(page + 4, Ordering::SeqCst);
                client.view.advise(page * PAGE, 3 * PAGE, libc::MADV_DONTNEED).unwrap();
                (page..page + 3).for_each(|page| assert_eq!(client.view.get(page * PAGE / 8), 0, "page {page}"));
            }
        });
        for page in 0..pages {
            match page % 4 {
                3 => client.view.check_page(page),
                _ => assert_eq!(client.view.get(page * PAGE / 8 + 5), 0),
            }
        }
        assert!(server.metrics().faults.zeroed > 0);
        // All of it at once, and again.
        for _ in 0..2 {
            client.view.advise(0, sample.size(), libc::MADV_DONTNEED).unwrap();
            (0..pages).for_each(|page| assert_eq!(client.view.get(page * PAGE / 8), 0));
        }
        assert_eq!(server.metrics().sessions.len(), 1, "{}", server.log());
    });
}

#[test]
fn a_client_may_die_at_every_step() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(MIB);
        let server = Server::start(&sample);
        CopyClient::firecracker(&sample.socket(), sample.size(), &[]).view.check_page(0);
        until("it is gone", || server.metrics().sessions.is_empty());
        let before = server.descriptors();
        let (view, uffd) = CopyClient::memory(sample.size());
        let regions = [CopyRegion::from(region(view.address(), sample.size(), 0))];
        let message = serde_json::to_vec(&regions).unwrap();
        let (first, second) = message.split_at(20);
        let fd = uffd.as_raw_fd();
        let steps: [&[(&[u8], &[i32])]; 4] =
            [&[(first, &[])], &[(first, &[fd])], &[(&message, &[])], &[(first, &[]), (second, &[fd])]];
        for step in steps {
            send_parts(&UnixStream::connect(sample.socket()).unwrap(), step);
        }
        drop(uffd_handler::client::ask_for_copies(&sample.socket(), &sample.hello()).unwrap());
        until("descriptors are closed", || server.descriptors() <= before);
        let metrics = server.metrics();
        assert_eq!((metrics.refused_total, metrics.sessions_total, metrics.sessions.len()), (4, 2, 0));
        assert_eq!(metrics.stores[0].sessions, 0);
    });
}

#[test]
fn a_client_killed_in_a_fault_ends_quietly() {
    if let Ok(dir) = std::env::var("COPPICE_SAMPLE") {
        return be_the_client_that_is_killed(&dir);
    }
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(4 * MIB);
        let server = Server::start(&sample);
        let bystander = CopyClient::firecracker(&sample.socket(), sample.size(), &[]);
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_client_killed_in_a_fault_ends_quietly", "--nocapture"])
            .env("COPPICE_SAMPLE", sample.root.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        until("the client faults", || server.metrics().sessions.get(1).is_some_and(|s| s.uffd_events > 2));
        // The server stands still, so that the client is surely waiting for it.
        server.signal(libc::SIGSTOP);
        std::thread::sleep(Duration::from_millis(50));
        child.kill().unwrap();
        child.wait().unwrap();
        server.signal(libc::SIGCONT);
        until("the session ends", || server.metrics().sessions.len() == 1);
        bystander.view.check_all();
        assert_eq!(server.logged("ERROR"), 0, "{}", server.log());
    });
}

/// What the other process of the test above does: faults slowly, until it is killed.
fn be_the_client_that_is_killed(dir: &str) {
    let client = CopyClient::firecracker(&std::path::Path::new(dir).join("s"), 4 * MIB, &[]);
    for page in 0..4 * MIB / PAGE {
        client.view.get(page * PAGE / 8);
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(PATIENCE);
}
