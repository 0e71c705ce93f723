//! A page server that is not there; and guests that are to end with theirs (`--on-handler-loss kill`). Those that are not: see
//! `survival`.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::agent::Request;
use api_spec::snapshot::OnHandlerLoss;
use rustix::process::Signal;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;
use tests::process::Finished;
use tests::template::SEED;
use tests::{PageServer, Place, Restore, Template, TemplateOptions, Vm, holds_within, require, until};

/// Longest that a vmm may take to end when its page server is gone. It takes half a second; but closing a VM waits for
/// the kernel's grace periods, which have been seen to take ten seconds on a host with far too much to do.
const DEADLINE: Duration = Duration::from_secs(20);

fn restore_from(template: &Template, place: &Place, socket: &Path) -> Finished {
    let vm = Restore::new(place, &template.snapshot).uffd_at(socket).start("clone");
    let done = vm.process.finish_within(DEADLINE);
    assert_eq!(done.code(), 1, "{}", done.stderr);
    let line = done.one_line();
    assert!(line.contains(socket.to_str().expect("the path is text")), "the server is named: {line}");
    assert!(!vm.api.exists() && !vm.vsock.exists(), "sockets are left behind: {:?}", place.names());
    done
}

#[test]
fn without_a_page_server_the_vmm_ends_and_says_so() {
    require!(Kvm, Userfaultfd);
    let template = Template::shared();
    let place = Place::new();
    let none = restore_from(&template, &place, &place.join("none"));
    assert!(none.one_line().contains("is it running?"), "{}", none.stderr);

    let dead = place.join("dead");
    drop(UnixListener::bind(&dead).expect("a socket can be made"));
    let dead = restore_from(&template, &place, &dead);
    assert!(dead.one_line().contains("is it running?"), "{}", dead.stderr);
}

#[test]
fn a_page_server_that_was_killed_before_is_named_over_the_api() {
    require!(Kvm, Userfaultfd);
    let template = Template::shared();
    let place = Place::new();
    let server = PageServer::start(&place, &template.snapshot);
    let socket = server.socket.clone();
    server.process.kill();
    restore_from(&template, &place, &socket);
}

#[test]
fn a_server_that_takes_the_connection_and_says_nothing_is_given_up_on() {
    require!(Kvm, Userfaultfd);
    let template = Template::shared();
    let place = Place::new();
    let path = place.join("silent");
    let _listener = UnixListener::bind(&path).expect("a socket can be made");
    let done = restore_from(&template, &place, &path);
    assert!(done.one_line().contains("no answer"), "{}", done.stderr);
}

/// The vmm ends with 1 and says why.
fn ends_for_want_of(server: &Path, vm: Vm) {
    let done = vm.process.finish_within(DEADLINE);
    assert_eq!(done.code(), 1, "{}", done.stderr);
    let socket = server.to_str().expect("the path is text");
    assert!(done.stderr.contains(&format!("the page server at {socket} is gone")), "{}", done.stderr);
}

#[test]
fn a_clone_that_works_while_its_page_server_is_killed_reads_nothing_wrong_and_ends() {
    require!(Kvm, Userfaultfd);
    let template = Template::make(TemplateOptions { memory_mib: 64, working_set_mib: 48, ..Default::default() });
    let place = Place::new();
    let server = PageServer::start(&place, &template.snapshot);
    let (clone, mut agent) = dying(&place, &template, &server).ready("clone");
    let socket = server.socket.clone();
    template.facts.check_until_the_end(&mut agent, DEADLINE, || drop(server.process.kill()));
    ends_for_want_of(&socket, clone);
}

/// The guest waits for a page of a server that stands still, and then the server is killed.
#[test]
fn a_clone_that_waits_for_a_page_when_the_server_is_killed_ends() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (Template::shared(), Place::new());
    let (server, clone) = waiting_clone(&template, &place);
    let socket = server.socket.clone();
    server.process.kill();
    ends_for_want_of(&socket, clone);
}

/// A clone that is to end with its page server.
fn dying<'a>(place: &'a Place, template: &Template, server: &PageServer) -> Restore<'a> {
    Restore::new(place, &template.snapshot).uffd(server).on_handler_loss(OnHandlerLoss::Kill)
}

/// A clone whose guest waits for a page of a server that stands still.
fn waiting_clone(template: &Template, place: &Place) -> (PageServer, Vm) {
    let mut server = PageServer::start(place, &template.snapshot);
    let (clone, mut agent) = dying(place, template, &server).ready("clone");
    server.process.signal(Signal::STOP);
    let question = Request::Verify { pages: template.facts.working_set, seed: SEED };
    agent.try_ask_within(Duration::from_millis(200), question).expect_err("the server stands still");
    (server, clone)
}

#[test]
fn a_clone_that_waits_for_a_page_can_be_stopped() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (Template::shared(), Place::new());
    let (mut server, mut clone) = waiting_clone(&template, &place);
    clone.process.signal(Signal::TERM);
    let done = clone.process.finish_within(DEADLINE);
    assert_eq!((done.code(), done.stderr.as_str()), (0, ""));
    server.process.signal(Signal::CONT);
    still_serves(&server, &template, &place);
}

#[test]
fn a_clone_that_is_killed_while_it_waits_for_a_page_harms_no_other() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (Template::shared(), Place::new());
    let (mut server, mut clone) = waiting_clone(&template, &place);
    clone.process.signal(Signal::KILL);
    server.process.signal(Signal::CONT);
    clone.process.finish_within(DEADLINE);
    still_serves(&server, &template, &place);
}

#[test]
fn a_clone_that_is_killed_while_it_waits_for_a_page_goes_with_its_page_server() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (Template::shared(), Place::new());
    let (server, mut clone) = waiting_clone(&template, &place);
    clone.process.signal(Signal::KILL);
    server.process.kill();
    clone.process.finish_within(DEADLINE);
}

/// Its store is sound, and good for another clone.
fn still_serves(server: &PageServer, template: &Template, place: &Place) {
    until("the session has ended", || server.metrics().sessions.is_empty());
    let (late, mut agent) = Restore::new(place, &template.snapshot).uffd(server).ready("late");
    template.facts.check(&mut agent);
    late.stop();
    assert_eq!(
        server.metrics().stores_retired_total,
        0,
        "a page came into the store that the server had not put there"
    );
}

#[test]
fn a_paused_clone_ends_with_its_page_server() {
    require!(Kvm, Userfaultfd);
    let template = Template::shared();
    let place = Place::new();
    let server = PageServer::start(&place, &template.snapshot);
    let mut clone = dying(&place, &template, &server).paused().start("clone");
    clone.state();
    let socket = server.socket.clone();
    server.process.kill();
    ends_for_want_of(&socket, clone);
}

/// Here it is the vmm itself that waits for a page: of a queue that it is to put a packet into.
#[test]
fn a_vmm_that_waits_for_a_page_ends_with_its_page_server() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (Template::shared(), Place::new());
    let mut server = PageServer::start(&place, &template.snapshot);
    let mut clone = dying(&place, &template, &server).paused().start("clone");
    clone.state();
    server.process.signal(Signal::STOP);
    let mut early = tests::Agent::connect(&clone.vsock);
    let silence = early.try_ask_within(Duration::from_millis(100), Request::Ping { token: 1 });
    silence.expect_err("a paused guest does not answer");
    let socket = server.socket.clone();
    server.process.kill();
    ends_for_want_of(&socket, clone);
}

/// A snapshot of a clone whose snapshot has no memory here needs all of it from its page server; one that cannot be finished leaves nothing that looks like one.
#[test]
fn a_snapshot_that_waits_for_pages_ends_with_the_page_server() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (Template::shared(), Place::new());
    let mut server = PageServer::start(&place, &template.snapshot);
    let bare = template.without_memory(&place);
    let clone = Restore::new(&place, &bare).uffd(&server).on_handler_loss(OnHandlerLoss::Kill);
    let (mut clone, _agent) = clone.ready("clone");
    server.process.signal(Signal::STOP);
    let (snapshots, socket) = (place.join("snapshots"), server.socket.clone());
    std::fs::create_dir(&snapshots).expect("a directory can be made in the test's directory");
    let mut api = clone.api();
    std::thread::scope(|scope| {
        let document = serde_json::json!({"snapshot_path": snapshots.join("half")});
        let asked = scope.spawn(move || api.put("/snapshot/create", &document));
        until("the snapshot has begun", || std::fs::read_dir(&snapshots).expect("it is there").count() > 0);
        server.process.kill();
        asked.join().expect("no panic").expect_err("there is no snapshot");
    });
    let done = clone.process.finish_within(DEADLINE);
    assert_eq!(done.code(), 1, "{}", done.stderr);
    let gone = format!("page server at {} is gone", socket.display());
    assert!(done.stderr.contains("stands still") && done.stderr.contains(&gone), "{}", done.stderr);
    let names = || {
        let entries = std::fs::read_dir(&snapshots).expect("it is there");
        entries.map(|entry| entry.expect("it can be read on").file_name().into_string().expect("text")).collect()
    };
    let left: Vec<String> = names();
    assert!(left.iter().all(|name| name.starts_with(".half.partial-")), "{left:?}");
    // Whoever takes the next snapshot there sweeps up what the ended process could not.
    let (mut other, _agent) = Restore::new(&place, &template.snapshot).ready("other");
    other.snapshot(&snapshots.join("half"));
    let left: Vec<String> = names();
    assert_eq!(left, ["half"]);
    other.stop();
}

/// A server that is merely slow is waited for.
#[test]
fn a_page_server_that_stands_still_for_a_while_is_waited_for() {
    require!(Kvm, Userfaultfd);
    let template = Template::shared();
    let place = Place::new();
    let mut server = PageServer::start(&place, &template.snapshot);
    let (clone, mut agent) = dying(&place, &template, &server).ready("clone");
    server.process.signal(Signal::STOP);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| agent.mismatches(template.facts.working_set, SEED));
        assert!(!holds_within(Duration::from_millis(300), || reader.is_finished()), "pages came from nowhere");
        server.process.signal(Signal::CONT);
        assert_eq!(reader.join().expect("the guest answers"), 0);
    });
    template.facts.check(&mut agent);
    clone.stop();
}

/// A server outlives any clone, however it ends.
#[test]
fn clones_that_are_killed_leave_nothing_in_the_page_server() {
    require!(Kvm, Userfaultfd);
    let template = Template::shared();
    let place = Place::new();
    let server = PageServer::start(&place, &template.snapshot);
    // The first clone's store is kept warm.
    Restore::new(&place, &template.snapshot).uffd(&server).ready("first").0.stop();
    until("the session has ended", || server.metrics().sessions.is_empty());
    let descriptors = || tests::procfs::descriptors(server.process.pid()).len();
    let before = descriptors();
    for number in 0..10 {
        let mut clone = Restore::new(&place, &template.snapshot).uffd(&server).start(&format!("clone-{number}"));
        // Some are killed early in their restore, some at work.
        if number % 2 == 0 {
            template.facts.check(&mut clone.agent());
        }
        clone.process.kill();
    }
    until("all sessions have ended", || server.metrics().sessions.is_empty());
    until("no descriptor is left", || descriptors() <= before);
    let (clone, mut agent) = Restore::new(&place, &template.snapshot).uffd(&server).ready("late");
    template.facts.check(&mut agent);
    clone.stop();
}
