//! Copy mode: the protocol of Firecracker's page servers, as the vmm speaks it. The server is one of the kind that people write
//! (`src/bin/copy-handler.rs`).

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::agent::{Pages, Request};
use api_spec::client::rest::RestError;
use api_spec::snapshot::{MemBackend, MemBackendType, OnHandlerLoss, SnapshotLoad};
use api_spec::stats::PageServerState;
use api_spec::vm::{InstanceState, VmPatch, VmState};
use rustix::process::Signal;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tests::process::Finished;
use tests::procfs::{self, resident};
use tests::template::SEED;
use tests::vm::balloon;
use tests::{Agent, Boot, Place, Process, Restore, Template, TemplateOptions, Vm, holds_within, require, until};

/// Longest that a vmm may take to end; see the tests of a page server's death.
const DEADLINE: Duration = Duration::from_secs(20);

/// A running page server.
struct Handler {
    process: Process,
    socket: PathBuf,
}

impl Handler {
    /// Serves the memory of a snapshot.
    fn start(place: &Place, snapshot: &Path, habit: &[&str]) -> Self {
        let socket = place.join("copy.sock");
        let process = Process::start(place, "copy-handler", Path::new(env!("CARGO_BIN_EXE_copy-handler")), |handler| {
            handler.arg(&socket).arg(snapshot.join("mem.bin")).args(habit);
        });
        let mut handler = Handler { process, socket };
        handler.until_it_says("listening");
        handler
    }

    /// What it has said with this word at the beginning of a line.
    fn said(&self, word: &str) -> Vec<String> {
        let printed = self.process.printed();
        let lines = printed.lines().filter_map(|line| line.strip_prefix(word));
        lines.map(|rest| rest.trim().to_owned()).collect()
    }

    fn until_it_says(&mut self, word: &str) {
        until(&format!("the page server says {word}"), || {
            self.process.check_alive();
            !self.said(word).is_empty()
        });
    }
}

/// A clone that is to end with its page server.
fn dying<'a>(place: &'a Place, template: &Template, handler: &Handler) -> Restore<'a> {
    from(place, template, handler).on_handler_loss(OnHandlerLoss::Kill)
}

fn from<'a>(place: &'a Place, template: &Template, handler: &Handler) -> Restore<'a> {
    Restore::new(place, &template.snapshot).copied_from(&handler.socket)
}

/// The vmm ends with 1 and one line that says why.
fn fails(vm: Vm, words: &[&str]) -> Finished {
    let done = vm.process.finish_within(DEADLINE);
    assert_eq!(done.code(), 1, "{}", done.stderr);
    let line = done.one_line();
    assert!(words.iter().all(|word| line.contains(word)), "{words:?}: {line}");
    assert!(!vm.api.exists() && !vm.vsock.exists(), "sockets are left behind");
    done
}

#[test]
fn clones_get_their_pages_from_a_page_server_of_firecrackers_kind() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (Template::shared(), Place::new());
    let mut handler = Handler::start(&place, &template.snapshot, &[]);
    let (mut one, mut agent) = from(&place, &template, &handler).ready("one");
    template.facts.check(&mut agent);

    // The message, field by field.
    let [message] = handler.said("message").try_into().expect("one message");
    let message: serde_json::Value = serde_json::from_str(&message).expect("the message is JSON");
    let regions = message.as_array().expect("the message is an array");
    assert_eq!(regions.len(), 1, "guests below 3 GiB have one region");
    let mut fields: Vec<&String> = regions[0].as_object().expect("of objects").keys().collect();
    fields.sort();
    assert_eq!(fields, ["base_host_virt_addr", "offset", "page_size", "page_size_kib", "size"]);
    let number = |name: &str| regions[0][name].as_u64().expect("all are numbers");
    assert_eq!(["offset", "size", "page_size", "page_size_kib"].map(number), [0, 32 << 20, 4096, 4096]);
    assert!(number("base_host_virt_addr").is_multiple_of(4096));

    // By the API, paused, and beside the first: what one writes is its own.
    let (mut two, mut other) = from(&place, &template, &handler).by_api().ready("two");
    template.facts.check(&mut other);
    let page = template.facts.first_free_page();
    agent.set_word(page, 1);
    other.set_word(page, 2);
    assert_eq!((agent.word(page), other.word(page)), (1, 2));
    for vm in [&mut one, &mut two] {
        vm.pause();
        vm.resume();
        template.facts.check(&mut vm.agent());
        assert_eq!(vm.state(), InstanceState::Running);
        // All that it has is its own: nothing is shared.
        assert!(resident(vm.pid(), "RssAnon") > 4 << 10);
        assert_eq!(resident(vm.pid(), "RssShmem"), 0);
    }
    assert_eq!(handler.said("hangup").len(), 0, "the connections stay open");
    one.stop();
    two.stop();
    until("both have hung up", || handler.said("hangup").len() == 2);
    handler.process.check_alive();
}

/// Memory that lies around the hole below 4 GiB is two regions, whose offsets are sums of sizes.
#[test]
fn a_large_guest_has_two_regions() {
    require!(Kvm, Userfaultfd);
    let template = Template::make(TemplateOptions { memory_mib: 3 << 10 | 64, ..Default::default() });
    let place = Place::new();
    let handler = Handler::start(&place, &template.snapshot, &[]);
    let (clone, mut agent) = from(&place, &template, &handler).ready("clone");
    template.facts.check(&mut agent);
    let message: serde_json::Value = serde_json::from_str(&handler.said("message")[0]).expect("the message is JSON");
    let sums = [0, 1].map(|n| [&message[n]["offset"], &message[n]["size"]].map(|v| v.as_u64().expect("a number")));
    assert_eq!(sums, [[0, 3 << 30], [3 << 30, 64 << 20]]);
    clone.stop();
}

#[test]
fn a_page_server_that_copies_everything_ahead_is_fine() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (Template::shared(), Place::new());
    let mut handler = Handler::start(&place, &template.snapshot, &["everything"]);
    let (clone, mut agent) = from(&place, &template, &handler).ready("clone");
    template.facts.check(&mut agent);
    handler.until_it_says("all");
    template.facts.check(&mut agent);
    clone.stop();
}

/// A closed connection says nothing: the page server has what it needs.
#[test]
fn a_page_server_that_closes_the_connection_and_serves_is_fine() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (Template::shared(), Place::new());
    let handler = Handler::start(&place, &template.snapshot, &["closes"]);
    let (clone, mut agent) = dying(&place, &template, &handler).ready("clone");
    template.facts.check(&mut agent);
    let socket = handler.socket.clone();
    handler.process.kill();
    // It is the end of its process that counts.
    ends_for_want_of(&socket, clone);
}

fn ends_for_want_of(server: &Path, vm: Vm) {
    let socket = server.to_str().expect("the path is text");
    fails(vm, &[&format!("the page server at {socket} is gone")]);
}

#[test]
fn a_clone_that_works_while_its_page_server_is_killed_reads_nothing_wrong_and_ends() {
    require!(Kvm, Userfaultfd);
    let template = Template::make(TemplateOptions { memory_mib: 64, working_set_mib: 48, ..Default::default() });
    let place = Place::new();
    let handler = Handler::start(&place, &template.snapshot, &[]);
    let (clone, mut agent) = dying(&place, &template, &handler).ready("clone");
    let socket = handler.socket.clone();
    template.facts.check_until_the_end(&mut agent, DEADLINE, || drop(handler.process.kill()));
    ends_for_want_of(&socket, clone);
}

#[test]
fn a_clone_outlives_its_page_server() {
    require!(Kvm, Userfaultfd);
    let template = Template::make(TemplateOptions { memory_mib: 64, working_set_mib: 48, ..Default::default() });
    let place = Place::new();
    let mut handler = Handler::start(&place, &template.snapshot, &[]);
    let (mut clone, mut agent) = from(&place, &template, &handler).ready("clone");
    let part = |number: u32| Pages::run(number * 1024, 1024);
    assert_eq!(agent.mismatches(part(0), SEED), 0);
    // It hangs, goes on, and is found to do so.
    handler.process.signal(Signal::STOP);
    assert_eq!(agent.mismatches(part(1), SEED), 0);
    clone.until_served(PageServerState::Failover);
    handler.process.signal(Signal::CONT);
    clone.until_served(PageServerState::Serving);
    assert_eq!(agent.mismatches(part(2), SEED), 0);
    let socket = handler.socket.clone();
    handler.process.kill();
    assert_eq!(agent.mismatches(part(3), SEED), 0);
    clone.until_served(PageServerState::Failover);
    // Whoever listens there next may have another guest's memory.
    std::fs::remove_file(&socket).expect("the page server has left it");
    let handler = Handler::start(&place, &template.snapshot, &[]);
    template.facts.check(&mut agent);
    clone.until_served(PageServerState::Failover);
    assert_eq!(handler.said("message").len(), 0);
    clone.stop();
}

#[test]
fn a_clone_that_is_to_wait_for_the_next_page_server_does() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (Template::shared(), Place::new());
    let handler = Handler::start(&place, &template.snapshot, &[]);
    let (mut clone, mut agent) =
        from(&place, &template, &handler).on_handler_loss(OnHandlerLoss::Reattach).ready("clone");
    let socket = handler.socket.clone();
    handler.process.kill();
    clone.until_served(PageServerState::Lost);
    std::fs::remove_file(&socket).expect("the page server has left it");
    let mut handler = Handler::start(&place, &template.snapshot, &[]);
    clone.until_served(PageServerState::Serving);
    handler.until_it_says("message");
    template.facts.check(&mut agent);
    clone.stop();
}

/// A clone that waits for a page of a server that stands still answers its API, and ends when it is told to.
#[test]
fn a_clone_that_waits_for_a_page_can_be_paused_and_stopped() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (Template::shared(), Place::new());
    let mut handler = Handler::start(&place, &template.snapshot, &[]);
    let (mut clone, mut agent) = dying(&place, &template, &handler).ready("clone");
    handler.process.signal(Signal::STOP);
    let question = Request::Verify { pages: template.facts.working_set, seed: SEED };
    agent.try_ask_within(Duration::from_millis(300), question).expect_err("there are no pages");
    match clone.api().patch("/vm", &VmPatch { state: VmState::Paused }) {
        Ok(()) | Err(RestError::Refused { status: 400, .. }) => {}
        other => panic!("{other:?}"),
    }
    clone.process.signal(Signal::TERM);
    let done = clone.process.finish_within(DEADLINE);
    assert_eq!((done.code(), done.stderr.as_str()), (0, ""));
    handler.process.signal(Signal::CONT);
    let (late, mut agent) = from(&place, &template, &handler).ready("late");
    template.facts.check(&mut agent);
    late.stop();
}

#[test]
fn a_page_server_that_stands_still_for_a_while_is_waited_for() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (Template::shared(), Place::new());
    let mut handler = Handler::start(&place, &template.snapshot, &[]);
    let (clone, mut agent) = dying(&place, &template, &handler).ready("clone");
    handler.process.signal(Signal::STOP);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| agent.mismatches(template.facts.working_set, SEED));
        assert!(!holds_within(Duration::from_millis(300), || reader.is_finished()), "pages came from nowhere");
        handler.process.signal(Signal::CONT);
        assert_eq!(reader.join().expect("the guest answers"), 0);
    });
    template.facts.check(&mut agent);
    clone.stop();
}

/// Nobody takes the connection, or somebody takes it and wants none of it: one line, soon, and nothing left behind. Over the API
/// the process can then be asked again.
#[test]
fn a_page_server_that_serves_nothing_is_given_up_on() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (Template::shared(), Place::new());
    let deaf = place.join("deaf");
    let _listener = UnixListener::bind(&deaf).expect("a socket can be made");
    let vm = Restore::new(&place, &template.snapshot).copied_from(&deaf).start("deaf");
    fails(vm, &[deaf.to_str().expect("the path is text"), "has not taken the userfaultfd"]);

    let vm = Restore::new(&place, &template.snapshot).copied_from(&place.join("none")).start("none");
    fails(vm, &["cannot connect"]);

    let handler = Handler::start(&place, &template.snapshot, &["refuses"]);
    let vm = from(&place, &template, &handler).start("refused");
    fails(vm, &["has not delivered the first page", "closed the connection"]);

    let mut vm = tests::vm::waiting(&place, "again");
    let load = |path: &Path, backend_type| SnapshotLoad {
        mem_backend: Some(MemBackend::of(backend_type, path.to_owned())),
        vsock_override: Some(api_spec::snapshot::VsockOverride { uds_path: place.join("again.vsock") }),
        resume_vm: true,
        ..SnapshotLoad::of(template.snapshot.clone())
    };
    let before = |vm: &mut Vm| {
        vm.state();
        procfs::descriptors(vm.pid()).len()
    };
    let descriptors = before(&mut vm);
    match vm.api().put("/snapshot/load", &load(&handler.socket, MemBackendType::Uffd)) {
        Err(RestError::Refused { status: 400, message }) => {
            assert!(message.contains("has not delivered the first page"), "{message}");
        }
        other => panic!("{other:?}"),
    }
    until("all descriptors are closed", || before(&mut vm) <= descriptors);
    assert_eq!(procfs::mappings(vm.pid()).iter().filter(|mapping| mapping.name.contains("uffd")).count(), 0);
    let own = load(&template.snapshot.join("mem.bin"), MemBackendType::File);
    vm.api().put("/snapshot/load", &own).expect("it can be asked again");
    template.facts.check(&mut vm.agent());
    vm.stop();
}

/// While a load waits for the first page, the process can be ended all the same; and it ends with the server.
#[test]
fn a_load_that_waits_for_the_first_page_can_be_ended() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (Template::shared(), Place::new());
    let mut handler = Handler::start(&place, &template.snapshot, &["idles"]);
    let mut clone = from(&place, &template, &handler).start("one");
    handler.until_it_says("message");
    clone.process.signal(Signal::TERM);
    let done = clone.process.finish_within(DEADLINE);
    assert_eq!((done.code(), done.stderr.as_str()), (0, ""));
    let clone = from(&place, &template, &handler).start("two");
    until("it has the second message", || handler.said("message").len() == 2);
    let socket = handler.socket.clone();
    handler.process.kill();
    ends_for_want_of(&socket, clone);
}

/// Over the API, whoever has asked for such a load is told why it was given up. That is a load that has failed as any may: the
/// process can be asked again; and a signal ends it in good order.
#[test]
fn a_load_that_is_given_up_while_it_waits_is_answered() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (Template::shared(), Place::new());
    let mut vm = tests::vm::waiting(&place, "asked");
    let vsock = vm.vsock.clone();
    let load = |path: &Path, backend_type| SnapshotLoad {
        mem_backend: Some(MemBackend::of(backend_type, path.to_owned())),
        vsock_override: Some(api_spec::snapshot::VsockOverride { uds_path: vsock.clone() }),
        resume_vm: true,
        ..SnapshotLoad::of(template.snapshot.clone())
    };
    // What a load is answered during whose wait something happens.
    let given_up = |vm: &mut Vm, happens: &mut dyn FnMut(&mut Vm, Handler)| {
        let mut handler = Handler::start(&place, &template.snapshot, &["idles"]);
        let (mut api, document) = (vm.api(), load(&handler.socket, MemBackendType::Uffd));
        let answer = std::thread::scope(|scope| {
            let asked = scope.spawn(move || api.put("/snapshot/load", &document));
            handler.until_it_says("message");
            happens(vm, handler);
            asked.join().expect("no panic")
        });
        match answer {
            Err(RestError::Refused { status: 400, message }) => message,
            other => panic!("it should have been refused: {other:?}"),
        }
    };
    let socket = place.join("copy.sock");
    let gone = format!("the page server at {} is gone", socket.display());
    for _ in 0..2 {
        let message = given_up(&mut vm, &mut |_, handler| drop(handler.process.kill()));
        assert!(message.contains(&gone), "{message}");
        std::fs::remove_file(&socket).expect("the page server has left it");
    }
    // At once, so that what is left of the load before may not end this one.
    let own = load(&template.snapshot.join("mem.bin"), MemBackendType::File);
    vm.api().put("/snapshot/load", &own).expect("it can be asked again");
    template.facts.check(&mut vm.agent());
    // The guards of the loads before would have ended it by now.
    assert!(!holds_within(Duration::from_secs(1), || !vm.process.is_alive()), "it has ended");
    let done = vm.stop();
    assert_eq!(done.stderr, "");

    let mut vm = tests::vm::waiting(&place, "ended");
    let mut server = None;
    let message = given_up(&mut vm, &mut |vm, handler| {
        vm.process.signal(Signal::TERM);
        server = Some(handler);
    });
    assert!(message.contains("the vmm is ending"), "{message}");
    let done = vm.process.finish_within(DEADLINE);
    assert_eq!((done.code(), done.stderr.as_str()), (0, ""));
    assert!(!vm.api.exists());
}

/// Pages that have not come yet are no zeros: a snapshot has them.
#[test]
fn a_snapshot_of_a_clone_has_the_pages_that_it_never_touched() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (Template::shared(), Place::new());
    let handler = Handler::start(&place, &template.snapshot, &[]);
    // Of one that has never run, whose memory is the snapshot's.
    let mut still = from(&place, &template, &handler).paused().same_generation().start("still");
    still.snapshot(&place.join("again"));
    let root = |path: &Path| snapshot::verify::verify(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())).root;
    assert_eq!(root(&place.join("again")), root(&template.snapshot));
    still.stop();
    // And of one that has.
    let (mut clone, mut agent) = from(&place, &template, &handler).ready("clone");
    let page = template.facts.first_free_page();
    agent.set_word(page, 7);
    clone.snapshot(&place.join("early"));
    agent = clone.agent();
    template.facts.check(&mut agent);
    let (heir, mut agent) = Restore::new(&place, &place.join("early")).ready("heir");
    assert_eq!(agent.word(page), 7);
    template.facts.check(&mut agent);
    heir.stop();
    clone.stop();
}

/// A snapshot that cannot be finished for want of pages holds nobody up.
#[test]
fn a_snapshot_that_waits_for_pages_ends_with_the_page_server() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (Template::shared(), Place::new());
    let mut handler = Handler::start(&place, &template.snapshot, &[]);
    let bare = template.without_memory(&place);
    let clone = Restore::new(&place, &bare).copied_from(&handler.socket).on_handler_loss(OnHandlerLoss::Kill);
    let (mut clone, _agent) = clone.ready("clone");
    handler.process.signal(Signal::STOP);
    let (path, socket) = (place.join("half"), handler.socket.clone());
    let mut api = clone.api();
    std::thread::scope(|scope| {
        let document = serde_json::json!({"snapshot_path": path});
        let asked = scope.spawn(move || api.put("/snapshot/create", &document));
        until("the snapshot has begun", || place.names().iter().any(|name| name.starts_with(".half.partial-")));
        handler.process.kill();
        asked.join().expect("no panic").expect_err("there is no snapshot");
    });
    let done = clone.process.finish_within(DEADLINE);
    assert_eq!(done.code(), 1, "{}", done.stderr);
    let gone = format!("page server at {} is gone", socket.display());
    assert!(done.stderr.contains("stands still") && done.stderr.contains(&gone), "{}", done.stderr);
    assert!(!path.exists());
}

const BEFORE: Pages = Pages::run(0, 1024);
const GIVEN: Pages = Pages::run(1024, 4096);
const AFTER: Pages = Pages::run(5120, 1024);

/// What a clone gives back, before or after it came, is zeros, and the page server is never asked about it.
#[test]
fn a_clone_gives_memory_back() {
    require!(Kvm, Userfaultfd);
    let place = Place::new();
    let (mut vm, mut agent) = Boot::new(&place).memory_mib(64).balloon(balloon(0)).ready("original");
    for pages in [BEFORE, GIVEN, AFTER] {
        agent.fill(pages, SEED);
    }
    let path = place.join("snapshot");
    vm.snapshot(&path);
    vm.stop();
    let handler = Handler::start(&place, &path, &[]);
    let check = |agent: &mut Agent| {
        assert_eq!(agent.checksum(GIVEN), 0, "zeros");
        assert_eq!([BEFORE, AFTER].map(|pages| agent.mismatches(pages, SEED)), [0, 0]);
    };
    let (mut clone, mut agent) = Restore::new(&place, &path).copied_from(&handler.socket).ready("clone");
    // The first half has come, the rest has not.
    let half = Pages::run(GIVEN.first, GIVEN.count / 2);
    assert_eq!(agent.mismatches(half, SEED), 0);
    let full = resident(clone.pid(), "RssAnon");
    assert!(full > 8 << 10, "8 MiB have come: {full} KiB are private");
    let asked = handler.said("page").len();
    agent.give_back(GIVEN);
    let left = resident(clone.pid(), "RssAnon");
    assert!(left + (7 << 10) < full, "{full} KiB were private, and {left} KiB are");
    assert_eq!(agent.checksum(GIVEN), 0);
    let asked = handler.said("page").len() - asked;
    assert!(asked < 64, "4,096 pages were read as zeros: {asked} of the image's were fetched");
    check(&mut agent);
    // Used again, given back again; and a snapshot knows all that.
    let again = Pages::run(GIVEN.first + 500, 300);
    agent.fill(again, SEED + 1);
    clone.snapshot(&place.join("second"));
    agent = clone.agent();
    let (heir, mut heirs) = Restore::new(&place, &place.join("second")).ready("heir");
    for agent in [&mut agent, &mut heirs] {
        assert_eq!(agent.mismatches(again, SEED + 1), 0);
        agent.give_back(again);
        check(agent);
    }
    assert_eq!(handler.said("remove").len(), 0);
    heir.stop();
    clone.stop();
}

/// What has come is the clone's own, and counts.
#[test]
fn pages_that_were_copied_count_as_private() {
    require!(Kvm, Userfaultfd);
    let template = Template::make(TemplateOptions { memory_mib: 64, working_set_mib: 32, ..Default::default() });
    let place = Place::new();
    let handler = Handler::start(&place, &template.snapshot, &[]);
    let (mut clone, mut agent) = from(&place, &template, &handler).max_private_mib(16).ready("clone");
    let question = Request::Verify { pages: template.facts.working_set, seed: SEED };
    agent.try_ask_within(Duration::from_secs(2), question).expect_err("the guest is paused before it has read it all");
    until("the guest is paused", || clone.info().pause_reason.is_some_and(|reason| reason.contains("max_private_mib")));
    clone.process.check_alive();
    clone.stop();
}
