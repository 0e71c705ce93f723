//! Peers that do not keep to the protocol: each is refused by name, and leaves nothing behind.
#![allow(missing_docs)]

mod common;
use api_spec::handshake::{Attach, Hello, MAX_MESSAGE};
use common::*;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use uffd_handler::client::Greeted;
use userfaultfd::UffdBuilder;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

fn connect(sample: &Sample) -> UnixStream {
    UnixStream::connect(sample.socket()).unwrap()
}

fn say(sample: &Sample, bytes: &[u8]) -> String {
    let mut stream = connect(sample);
    stream.write_all(bytes).unwrap();
    last_words(&stream)
}

fn line(message: &impl serde::Serialize) -> Vec<u8> {
    [&serde_json::to_vec(message).unwrap()[..], b"\n"].concat()
}

fn greet_with(sample: &Sample, change: impl FnOnce(&mut Hello)) -> String {
    let mut hello = sample.hello();
    change(&mut hello);
    say(sample, &line(&hello))
}

/// A correct hello, then this message with these descriptors.
fn attach_with(sample: &Sample, bytes: &[u8], descriptors: &[RawFd]) -> String {
    let stream = connect(sample);
    (&stream).write_all(&line(&sample.hello())).unwrap();
    let mut reply = [0; 512];
    let (count, store) = stream.recv_with_fd(&mut reply).unwrap();
    assert!(store.is_some() && reply[..count].ends_with(b"\n"));
    let sent = if descriptors.is_empty() {
        (&stream).write(bytes).unwrap()
    } else {
        stream.send_with_fds(&[bytes], descriptors).unwrap()
    };
    assert_eq!(sent, bytes.len());
    last_words(&stream)
}

fn whole(sample: &Sample) -> Attach {
    Attach { regions: vec![region(0x7000_0000_0000, sample.size(), 0)] }
}

#[test]
fn each_is_refused_by_name_and_nothing_leaks() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(4 * MIB);
        let server = Server::start(&sample);
        // The first guest makes the store, which stays.
        Client::connect(&sample).view.check_page(0);
        until("it is gone", || server.metrics().sessions.is_empty());
        let before = server.descriptors();
        let mut refused = 0;
        let mut expect = |answer: String, part: &str| {
            assert!(answer.contains("\"refused\"") && answer.contains(part), "{part}: {answer}");
            refused += 1;
        };
        hello_refusals(&sample, &mut expect);
        attach_refusals(&sample, &mut expect);
        // Firecracker's copy mode, and peers that leave early, get no answer, but are counted.
        assert_eq!(say(&sample, b"[{\"base_host_virt_addr\":4096,\"size\":4096,\"offset\":0}]"), "");
        drop(connect(&sample));
        connect(&sample).write_all(b"{\"version\":").unwrap();
        let greeted: Greeted = Client::greet(&sample).unwrap();
        drop(greeted);
        refused += 4;
        until("all were counted", || server.metrics().refused_total >= refused);
        assert_eq!(server.metrics().refused_total, refused);
        until("log has them", || server.logged(" refused pid ") as u64 == refused);
        assert_eq!(server.logged("not a valid copy mode message: missing field `page_size`"), 1);
        until("descriptors are closed", || server.descriptors() <= before);
        let good = Client::connect(&sample);
        good.view.check_all();
        assert_eq!(server.metrics().sessions_total, 2);
    });
}

fn hello_refusals(sample: &Sample, expect: &mut impl FnMut(String, &str)) {
    expect(say(sample, b"GET / HTTP/1.1\r\n\r\n"), "bytes after");
    expect(say(sample, b"\x00\xff\xfe\n"), "not a valid hello");
    expect(say(sample, b"{}\n"), "missing field");
    expect(say(sample, &vec![b'x'; MAX_MESSAGE]), "longer than");
    expect(say(sample, &[&line(&sample.hello())[..], b"{}\n"].concat()), "bytes after");
    expect(greet_with(sample, |hello| hello.version = 1), "version 1");
    expect(greet_with(sample, |hello| hello.image = "00\nforged line".into()), "is not served here");
    expect(greet_with(sample, |hello| hello.size += 4096), "bytes, not");
    let null = File::open("/dev/null").unwrap();
    let with_descriptor = |descriptors: &[RawFd]| {
        let stream = connect(sample);
        stream.send_with_fds(&[&line(&sample.hello())[..]], descriptors).unwrap();
        last_words(&stream)
    };
    expect(with_descriptor(&[null.as_raw_fd()]), "descriptor with the hello");
    expect(with_descriptor(&[null.as_raw_fd(); 30]), "more than one descriptor");
}

fn attach_refusals(sample: &Sample, expect: &mut impl FnMut(String, &str)) {
    let good = line(&whole(sample));
    let uffd = uffd_handler::uffd::create().unwrap();
    let fd = uffd.as_raw_fd();
    let null = File::open("/dev/null").unwrap();
    let blocking = UffdBuilder::new().close_on_exec(true).create().unwrap();
    expect(attach_with(sample, &good, &[]), "no userfaultfd");
    expect(attach_with(sample, &good, &[null.as_raw_fd()]), "not a userfaultfd");
    expect(attach_with(sample, &good, &[blocking.as_raw_fd()]), "blocking");
    expect(attach_with(sample, &good, &[fd, fd]), "more than one descriptor");
    expect(attach_with(sample, b"{\"regions\":7}\n", &[fd]), "not a valid attach");
    expect(attach_with(sample, &line(&sample.hello()), &[fd]), "not a valid attach");
    expect(attach_with(sample, &[&good[..], b" "].concat(), &[fd]), "bytes after");
    expect(attach_with(sample, &vec![b' '; MAX_MESSAGE + 1], &[fd]), "longer than");
    let mut refuse_regions = |change: &dyn Fn(&mut Attach), part: &str| {
        let mut attach = whole(sample);
        change(&mut attach);
        expect(attach_with(sample, &line(&attach), &[fd]), part);
    };
    refuse_regions(&|attach| attach.regions.clear(), "no regions");
    refuse_regions(&|attach| attach.regions[0].page_size = 2 << 20, "page size");
    refuse_regions(&|attach| attach.regions[0].base_host_virt_addr += 1, "multiples");
    refuse_regions(&|attach| attach.regions[0].size -= 4096, "exactly once");
    refuse_regions(&|attach| attach.regions[0].size = !4095, "address space");
    refuse_regions(&|attach| attach.regions.push(attach.regions[0]), "exactly once");
}

#[test]
fn a_silent_peer_is_refused_after_a_while() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(MIB);
        let server = Server::start(&sample);
        let (silent, after_hello) = (connect(&sample), connect(&sample));
        (&after_hello).write_all(&line(&sample.hello())).unwrap();
        Client::connect(&sample).view.check_all();
        assert!(last_words(&silent).contains("no complete hello message"));
        assert!(last_words(&after_hello).contains("no complete attach message"));
        assert_eq!(server.metrics().refused_total, 2);
    });
}

#[test]
fn who_talks_or_faults_elsewhere_after_the_handshake_is_dropped() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(MIB);
        let server = Server::start(&sample);
        let (good, talker) = (Client::connect(&sample), Client::connect(&sample));
        (&talker.stream).write_all(b"more").unwrap();
        (&talker.stream).write_all(b"\n").unwrap();
        assert!(last_words(&talker.stream).contains("nothing but ping"));
        // One whose userfaultfd also covers memory that it did not name.
        let stray = Client::connect(&sample);
        let store = Client::greet(&sample).unwrap();
        let elsewhere = View::map(&store.store, sample.size());
        stray.uffd.register(elsewhere.address() as *mut _, sample.size()).unwrap();
        std::thread::spawn(move || elsewhere.get(0));
        stray.wait_for_end();
        std::mem::forget(stray);
        good.view.check_all();
        assert_eq!(server.metrics().sessions.len(), 1);
        assert_eq!(server.metrics().stores_retired_total, 0);
    });
}

#[test]
fn a_userfaultfd_that_turns_blocking_costs_its_owner_only() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(MIB);
        let server = Server::start(&sample);
        let (good, bad) = (Client::connect(&sample), Client::connect(&sample));
        let flags = rustix::fs::fcntl_getfl(&bad.uffd).unwrap();
        rustix::fs::fcntl_setfl(&bad.uffd, flags - rustix::fs::OFlags::NONBLOCK).unwrap();
        let bad = std::sync::Arc::new(bad);
        let guest = bad.clone();
        std::thread::spawn(move || guest.view.get(0));
        until("it is dropped", || server.metrics().sessions.len() == 1);
        good.view.check_all();
        std::mem::forget(bad);
    });
}
