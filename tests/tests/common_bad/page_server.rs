//! Page servers that are none, or do not keep to the protocol.

use super::{FAILED, refused};
use api_spec::handshake::{MAX_MESSAGE, Reply};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::io::{BufRead, BufReader, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::{JoinHandle, spawn};
use std::time::Duration;
use tests::{Place, Process, Template, TemplateOptions, binaries, require};

const MEMORY_MIB: u64 = 16;
const MEMORY: u64 = MEMORY_MIB << 20;

fn template() -> Template {
    Template::make(TemplateOptions { vcpus: 1, memory_mib: MEMORY_MIB, working_set_mib: 1 })
}

/// The vmm refuses to restore from whatever is at `socket`.
#[track_caller]
fn refuses(template: &Template, name: &str, socket: &Path, words: &[&str]) {
    let place = &template.place;
    let path = socket.to_string_lossy();
    let words = [words, &[&*path]].concat();
    refused(place, name, FAILED, &words, |vmm| {
        vmm.arg("--restore").arg(&template.snapshot).arg("--uffd").arg(socket);
        vmm.arg("--vsock").arg(place.join("c.v")).arg("--api-sock").arg(place.join("c.api"));
    });
}

/// The vmm refuses to restore from a server that behaves like this to its one client.
#[track_caller]
fn refuses_server(template: &Template, name: &str, words: &[&str], act: impl FnOnce(Peer) + Send + 'static) {
    let socket = template.place.join("s");
    let listener = UnixListener::bind(&socket).expect("a socket can be made in the test's directory");
    let server = spawn(move || act(Peer::accept(&listener)));
    refuses(template, name, &socket, words);
    server.join().expect("the server did as it should");
    std::fs::remove_file(&socket).expect("it is ours");
}

/// A client of a page server, seen from the server.
struct Peer(UnixStream);

impl Peer {
    fn accept(listener: &UnixListener) -> Self {
        let (stream, _) = listener.accept().expect("the vmm comes");
        stream.set_read_timeout(Some(tests::PATIENCE)).expect("a socket takes a timeout");
        Peer(stream)
    }

    fn hear(&mut self) -> String {
        let mut line = String::new();
        BufReader::new(&self.0).read_line(&mut line).expect("the vmm speaks lines");
        line
    }

    /// Waits for the vmm to leave.
    fn linger(mut self) {
        let mut rest = [0; 4096];
        while self.0.read(&mut rest).is_ok_and(|n| n > 0) {}
    }

    fn say(&mut self, bytes: &[u8], fds: &[&OwnedFd]) {
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        }
        // The vmm may have left already.
        let _ = sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL);
    }

    fn reply(&mut self, reply: &Reply, fds: &[&OwnedFd]) {
        let mut line = serde_json::to_vec(reply).expect("a reply has a JSON form");
        line.push(b'\n');
        self.say(&line, fds);
    }
}

fn store(size: u64) -> OwnedFd {
    let fd = memfd_create("store", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("there is memory");
    ftruncate(&fd, size).expect("it can have any size");
    fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW).expect("it can be sealed");
    fd
}

fn store_reply(size: u64) -> Reply {
    Reply::Store { size, page_size: 4096 }
}

#[test]
fn a_page_server_that_is_not_there_is_named() {
    require!(Kvm, Userfaultfd);
    let template = template();
    let socket = template.place.join("s");
    refuses(&template, "missing", &socket, &["cannot connect", "is it running?"]);
    refuses(&template, "directory-missing", &template.place.join("no/s"), &["cannot connect"]);
    std::fs::write(&socket, "text").expect("a file can be made");
    refuses(&template, "file", &socket, &["cannot connect"]);
    std::fs::remove_file(&socket).expect("it is ours");
    drop(UnixListener::bind(&socket).expect("a socket can be made"));
    refuses(&template, "closed", &socket, &["cannot connect"]);
    refuses(&template, "directory", template.place.path(), &["cannot connect"]);
    refuses(&template, "long", &template.place.join("x".repeat(108)), &["107 bytes"]);
}

#[test]
fn a_page_server_that_never_accepts_is_given_up() {
    require!(Kvm, Userfaultfd);
    let template = template();
    let socket = template.place.join("s");
    let listener = UnixListener::bind(&socket).expect("a socket can be made in the test's directory");
    rustix::net::listen(&listener, 1).expect("a backlog can be shortened");
    let mut waiting = Vec::new();
    while waiting.len() < 1000 {
        let Ok(client) = api_spec::client::unix::connect(&socket, Duration::ZERO) else { break };
        waiting.push(client);
    }
    assert!(waiting.len() < 1000, "the backlog never fills up");
    refuses(&template, "backlog", &socket, &["cannot connect", "is it running?"]);
}

#[test]
fn a_page_server_that_breaks_off_or_falls_silent_is_given_up() {
    require!(Kvm, Userfaultfd);
    let template = template();
    refuses_server(&template, "silent", &["no answer to the hello"], Peer::linger);
    refuses_server(&template, "closing", &["closed the connection"], drop);
    refuses_server(&template, "closing-after-hello", &["closed the connection"], |mut peer| drop(peer.hear()));
    refuses_server(&template, "closing-after-store", &["closed the connection"], |mut peer| {
        peer.hear();
        peer.reply(&store_reply(MEMORY), &[&store(MEMORY)]);
        peer.hear();
    });
    refuses_server(&template, "closing-at-store", &["the connection"], |mut peer| {
        peer.hear();
        peer.reply(&store_reply(MEMORY), &[&store(MEMORY)]);
    });
    refuses_server(&template, "never-serving", &["no answer to the attach"], |mut peer| {
        peer.hear();
        peer.reply(&store_reply(MEMORY), &[&store(MEMORY)]);
        peer.hear();
        peer.linger();
    });
    refuses_server(&template, "half-a-line", &["no answer to the hello"], |mut peer| {
        peer.hear();
        peer.say(b"{\"reply\":", &[]);
        peer.linger();
    });
}

#[test]
fn a_page_server_that_says_the_wrong_thing_is_refused() {
    require!(Kvm, Userfaultfd);
    let template = template();
    let makes_no_sense: &[&str] = &["makes no sense"];
    let answers: Vec<(&str, &[&str], Vec<u8>)> = vec![
        ("garbage", makes_no_sense, b"\x00\xff\xfe garbage\n".to_vec()),
        ("empty-line", makes_no_sense, b"\n".to_vec()),
        ("unknown-reply", makes_no_sense, b"{\"reply\":\"dance\"}\n".to_vec()),
        ("unknown-field", makes_no_sense, b"{\"reply\":\"serving\",\"x\":1}\n".to_vec()),
        ("two-lines", makes_no_sense, b"{\"reply\":\"serving\"}\n{\"reply\":\"serving\"}\n".to_vec()),
        ("serving-first", makes_no_sense, b"{\"reply\":\"serving\"}\n".to_vec()),
        ("nested", makes_no_sense, [b"[".repeat(5000), b"\n".to_vec()].concat()),
        ("too-long", &["longer than"], vec![b'x'; 2 * MAX_MESSAGE]),
        ("refused", &["refused: not today"], b"{\"reply\":\"refused\",\"reason\":\"not today\"}\n".to_vec()),
        (
            "refused-in-lines",
            &["refused: not"],
            b"{\"reply\":\"refused\",\"reason\":\"not\\ntoday\\u001b[2J\"}\n".to_vec(),
        ),
    ];
    for (name, words, answer) in answers {
        refuses_server(&template, name, words, move |mut peer| {
            peer.hear();
            peer.say(&answer, &[]);
            peer.linger();
        });
    }
}

#[test]
fn a_page_server_with_the_wrong_store_is_refused() {
    require!(Kvm, Userfaultfd);
    let template = template();
    let cases: Vec<(&str, &[&str], Reply, Vec<OwnedFd>)> = vec![
        ("no-descriptor", &["page server at"], store_reply(MEMORY), vec![]),
        ("two-descriptors", &["more than one descriptor"], store_reply(MEMORY), vec![store(MEMORY), store(MEMORY)]),
        ("wrong-size-said", &["makes no sense"], store_reply(MEMORY / 2), vec![store(MEMORY)]),
        ("too-short", &["bytes", "something else"], store_reply(MEMORY), vec![store(MEMORY - 4096)]),
        ("too-long-store", &["bytes", "something else"], store_reply(MEMORY), vec![store(MEMORY + 4096)]),
        ("empty", &["bytes", "something else"], store_reply(MEMORY), vec![store(0)]),
        ("pipe", &["bytes", "something else"], store_reply(MEMORY), vec![rustix::pipe::pipe().expect("a pipe").0]),
    ];
    for (name, words, reply, fds) in cases {
        refuses_server(&template, name, words, move |mut peer| {
            peer.hear();
            peer.reply(&reply, &fds.iter().collect::<Vec<_>>());
            drop(fds);
            peer.linger();
        });
    }
    // It could shrink under the guest, and take the vmm with it.
    refuses_server(&template, "unsealed", &["page server at", "seal"], |mut peer| {
        peer.hear();
        let fd = memfd_create("store", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).expect("there is memory");
        ftruncate(&fd, MEMORY).expect("it can have any size");
        peer.reply(&store_reply(MEMORY), &[&fd]);
        peer.linger();
    });
    let file = std::fs::File::create(template.place.join("file")).expect("a file can be made");
    file.set_len(MEMORY).expect("it can have any size");
    refuses_server(&template, "a-file", &["page server at", "seal"], move |mut peer| {
        peer.hear();
        peer.reply(&store_reply(MEMORY), &[&OwnedFd::from(file)]);
        peer.linger();
    });
}

/// Serves in word only: its guest gets no page. Ends when told to.
fn idle_server(socket: &Path) -> (JoinHandle<Peer>, UnixStream) {
    let listener = UnixListener::bind(socket).expect("a socket can be made in the test's directory");
    let (near, mut far) = UnixStream::pair().expect("there are sockets");
    let server = spawn(move || {
        let mut peer = Peer::accept(&listener);
        peer.hear();
        peer.reply(&store_reply(MEMORY), &[&store(MEMORY)]);
        peer.hear();
        peer.reply(&Reply::Serving, &[]);
        let _ = far.write_all(b"s");
        peer
    });
    (server, near)
}

fn clone_of_idle_server(template: &Template, on_loss: &str) -> (Process, Peer) {
    let socket = template.place.join("s");
    let (server, mut serving) = idle_server(&socket);
    let clone = Process::start(&template.place, "clone", binaries::vmm(), |vmm| {
        vmm.arg("--restore").arg(&template.snapshot).arg("--uffd").arg(&socket);
        vmm.arg("--vsock").arg(template.place.join("c.v")).arg("--api-sock").arg(template.place.join("c.api"));
        vmm.args(["--on-handler-loss", on_loss]);
    });
    serving.set_read_timeout(Some(tests::PATIENCE)).expect("a socket takes a timeout");
    serving.read_exact(&mut [0]).expect("the server serves");
    (clone, server.join().expect("the server did as it should"))
}

fn sockets(place: &Place) -> Vec<String> {
    place.names().into_iter().filter(|name| name.starts_with("c.")).collect()
}

#[test]
fn a_guest_whose_page_server_gives_no_page_can_be_ended() {
    require!(Kvm, Userfaultfd);
    let template = template();
    for on_loss in ["failover", "reattach", "pause", "kill"] {
        let (clone, peer) = clone_of_idle_server(&template, on_loss);
        std::thread::sleep(Duration::from_millis(100));
        let done = clone.stop();
        super::no_panic(&done.stderr);
        assert_eq!(done.status.code(), Some(0), "{on_loss}: {done:?}");
        assert_eq!(sockets(&template.place), [""; 0], "its sockets are gone");
        drop(peer);
        std::fs::remove_file(template.place.join("s")).expect("it is ours");
    }
}

#[test]
fn a_guest_that_waits_for_a_page_ends_with_its_page_server() {
    require!(Kvm, Userfaultfd);
    let template = template();
    for delay_ms in [0, 5, 100] {
        let (clone, peer) = clone_of_idle_server(&template, "kill");
        std::thread::sleep(Duration::from_millis(delay_ms));
        drop(peer);
        let done = clone.finish();
        super::refusal("clone", &done, FAILED, &["page server at", "is gone"]);
        assert_eq!(sockets(&template.place), [""; 0], "its sockets are gone");
        std::fs::remove_file(template.place.join("s")).expect("it is ours");
    }
}

/// A server's last word comes with its end: whatever the policy, a store that was taken back is not used any more.
#[test]
fn a_guest_whose_store_is_taken_back_ends_whatever_else_it_is_to_do() {
    require!(Kvm, Userfaultfd);
    let template = template();
    for on_loss in ["failover", "reattach", "pause", "kill"] {
        let (clone, mut peer) = clone_of_idle_server(&template, on_loss);
        peer.reply(&Reply::Refused { reason: "there are wrong pages".into() }, &[]);
        drop(peer);
        let done = clone.finish();
        super::refusal("clone", &done, FAILED, &["page server at", "taken back", "there are wrong pages"]);
        assert_eq!(sockets(&template.place), [""; 0], "its sockets are gone");
        std::fs::remove_file(template.place.join("s")).expect("it is ours");
    }
}

/// A server that talks without end, or asks without end, does not keep a guest from being ended, nor make it grow.
#[test]
fn a_server_that_talks_without_end_is_left() {
    require!(Kvm, Userfaultfd);
    let template = template();
    for (name, words) in
        [("reports", serde_json::to_vec(&Reply::Report).expect("it has a JSON form")), ("noise", vec![b'x'; 100])]
    {
        let (clone, peer) = clone_of_idle_server(&template, "failover");
        let mut stream = peer.0.try_clone().expect("it can be cloned");
        stream.set_write_timeout(Some(Duration::from_millis(500))).expect("a socket takes a timeout");
        let line = [&words[..], if name == "noise" { b"" } else { b"\n" }].concat();
        for _ in 0..20_000 {
            if stream.write_all(&line).is_err() {
                break;
            }
        }
        let threads = std::fs::read_dir(format!("/proc/{}/task", clone.pid())).expect("it lives").count();
        assert!(threads < 12, "{name}: {threads} threads");
        assert!(tests::procfs::rss_kib(clone.pid()) < 64 << 10, "{name}");
        let done = clone.stop();
        assert_eq!(done.status.code(), Some(0), "{name}: {done:?}");
        drop(peer);
        std::fs::remove_file(template.place.join("s")).expect("it is ours");
    }
}
