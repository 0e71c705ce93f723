//! No death of a page server costs a guest.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::agent::Pages;
use api_spec::snapshot::OnHandlerLoss;
use api_spec::stats::{PageServerState, PageServerStats};
use api_spec::vm::InstanceState;
use rustix::process::Signal;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use tests::template::SEED;
use tests::{Agent, PageServer, Place, Restore, Template, TemplateOptions, Vm, require, until};

fn large() -> Template {
    Template::make(TemplateOptions { memory_mib: 64, working_set_mib: 48, ..Default::default() })
}

/// A part of the working set, of twelve, each of pages that no other part has.
fn part(template: &Template, number: u32) -> Pages {
    let count = template.facts.working_set.count / 12;
    Pages::run(number * count, count)
}

fn check_part(template: &Template, agent: &mut Agent, number: u32) {
    assert_eq!(agent.mismatches(part(template, number), SEED), 0, "part {number} of the working set");
}

#[test]
fn a_clone_whose_page_server_is_killed_goes_on_and_is_served_by_the_next() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (large(), Place::new());
    let server = PageServer::start(&place, &template.snapshot);
    let (mut clone, mut agent) = Restore::new(&place, &template.snapshot).uffd(&server).ready("clone");
    check_part(&template, &mut agent, 0);
    assert_eq!(clone.page_server(), PageServerStats::default());

    server.process.kill();
    check_part(&template, &mut agent, 1);
    let lost = clone.until_served(PageServerState::Failover);
    assert_eq!((lost.losses, lost.hangs, lost.takeovers, lost.reattachments), (1, 0, 1, 0));
    assert!(lost.faults_served >= 50 && lost.reason.is_some(), "{lost:?}");
    assert_eq!(clone.info().page_server, Some(PageServerState::Failover));

    let server = PageServer::start(&place, &template.snapshot);
    let found = clone.until_served(PageServerState::Serving);
    assert_eq!((found.losses, found.takeovers, found.reattachments, found.reason), (1, 1, 1, None));
    check_part(&template, &mut agent, 2);
    assert_eq!(clone.page_server().faults_served, found.faults_served, "the new server serves");
    let session = server.session(clone.pid());
    assert!(session.pages_copied > 0, "by copies: {session:?}");

    // Everything, and once more without any server.
    server.process.kill();
    template.facts.check(&mut agent);
    let lost = clone.until_served(PageServerState::Failover);
    assert_eq!((lost.losses, lost.takeovers), (2, 2));
    clone.stop();
}

/// The guest itself waits for a page of a server that stands still, and is then killed.
#[test]
fn a_clone_that_waits_for_a_page_when_its_server_is_killed_gets_it() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (large(), Place::new());
    for vcpus in [1, 4] {
        let template =
            if vcpus == 1 { &template } else { &Template::make(TemplateOptions { vcpus, ..Default::default() }) };
        let mut server = PageServer::start(&place, &template.snapshot);
        let (mut clone, mut agent) = Restore::new(&place, &template.snapshot).uffd(&server).ready("clone");
        server.process.signal(Signal::STOP);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| agent.mismatches(template.facts.working_set, SEED));
            until("a fault waits", || outstanding(clone.pid()) > 0 || reader.is_finished());
            server.process.kill();
            assert_eq!(reader.join().expect("the guest answers"), 0);
        });
        let stats = clone.page_server();
        assert_eq!((stats.state, stats.losses), (PageServerState::Failover, 1), "{stats:?}");
        assert!(stats.takeover_us.is_some());
        clone.stop();
    }
}

/// Faults of a vmm's guest that nobody has answered.
fn outstanding(pid: u32) -> u64 {
    tests::procfs::outstanding_faults(pid)
}

#[test]
fn a_server_that_stands_still_is_stood_in_for_and_serves_again_when_it_goes_on() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (large(), Place::new());
    let mut server = PageServer::start(&place, &template.snapshot);
    let (mut clone, mut agent) = Restore::new(&place, &template.snapshot).uffd(&server).ready("clone");
    server.process.signal(Signal::STOP);
    check_part(&template, &mut agent, 0);
    let silent = clone.until_served(PageServerState::Failover);
    assert_eq!((silent.losses, silent.hangs, silent.takeovers), (0, 1, 1), "{silent:?}");
    server.process.signal(Signal::CONT);
    let back = clone.until_served(PageServerState::Serving);
    assert_eq!((back.losses, back.takeovers, back.reattachments), (0, 1, 0), "{back:?}");
    // What it does late does no harm, and what it serves is shared again.
    let before = server.filled_pages();
    check_part(&template, &mut agent, 1);
    assert!(server.filled_pages() >= before + 100);
    assert_eq!(clone.page_server().faults_served, back.faults_served);
    template.facts.check(&mut agent);
    assert_eq!(server.metrics().stores_retired_total, 0);
    clone.stop();
}

/// A clone that goes on while its page server stands still: its devices wait for a page of a queue.
fn with_a_device_that_waits(place: &Place, server: &mut PageServer, policy: OnHandlerLoss) -> Vm {
    let restore = Restore::new(place, &Template::shared().snapshot).uffd(server).on_handler_loss(policy);
    let mut clone = restore.paused().start("clone");
    clone.state();
    server.process.signal(Signal::STOP);
    clone.resume();
    clone
}

#[test]
fn a_vmm_that_waits_for_a_page_gets_it() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (Template::shared(), Place::new());
    let mut server = PageServer::start(&place, &template.snapshot);
    let mut clone = with_a_device_that_waits(&place, &mut server, OnHandlerLoss::Failover);
    server.process.kill();
    assert_eq!(clone.state(), InstanceState::Running);
    template.facts.check(&mut clone.agent());
    clone.stop();
}

/// Whatever a device waits for, the API does not, and says what is wrong.
#[test]
fn the_api_answers_while_a_device_waits_for_a_page() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (Template::shared(), Place::new());
    let mut server = PageServer::start(&place, &template.snapshot);
    let mut clone = with_a_device_that_waits(&place, &mut server, OnHandlerLoss::Pause);
    // A vCPU that waits for a page may not stand still before that has come.
    until("the guest is to stand still", || clone.info().pause_reason.is_some());
    let reason = clone.info().pause_reason.unwrap_or_default();
    assert!(reason.contains("page server"), "{reason}");
    let at_work = |clone: &mut Vm| clone.client().stats().expect("the API answers").device_at_work;
    let waits = at_work(&mut clone).expect("its queue is not there");
    assert!(waits.device == "vsock" && waits.for_us > 0, "{waits:?}");
    let refused = clone.try_snapshot(&place.join("snapshot")).expect_err("the device cannot be saved").to_string();
    assert!(refused.contains("vsock has been at work") || refused.contains("vCPU 0 did not stand still"), "{refused}");
    assert!(!place.join("snapshot").exists());

    server.process.signal(Signal::CONT);
    until("the guest goes on", || clone.state() == InstanceState::Running);
    template.facts.check(&mut clone.agent());
    assert_eq!(at_work(&mut clone), None);
    clone.stop();
}

#[test]
fn a_vmm_ends_in_good_order_while_a_device_waits_for_a_page() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (Template::shared(), Place::new());
    let mut server = PageServer::start(&place, &template.snapshot);
    let mut clone = with_a_device_that_waits(&place, &mut server, OnHandlerLoss::Pause);
    until("the guest is to stand still", || clone.info().pause_reason.is_some());
    let vsock = clone.vsock.clone();
    clone.stop();
    assert!(!vsock.exists(), "its socket is left");
    // The store is whole: who shares it finds the image.
    server.process.signal(Signal::CONT);
    let (other, mut agent) = Restore::new(&place, &template.snapshot).uffd(&server).ready("other");
    template.facts.check(&mut agent);
    other.stop();
}

#[test]
fn a_guest_that_is_to_wait_for_a_server_is_paused_with_the_reason_and_goes_on_with_the_next() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (large(), Place::new());
    for policy in [OnHandlerLoss::Reattach, OnHandlerLoss::Pause] {
        let server = PageServer::start(&place, &template.snapshot);
        let restore = Restore::new(&place, &template.snapshot).uffd(&server).on_handler_loss(policy);
        let (mut clone, mut agent) = restore.ready("clone");
        check_part(&template, &mut agent, 0);
        server.process.kill();
        until("the guest is paused", || clone.state() == InstanceState::Paused);
        let info = clone.info();
        let reason = info.pause_reason.expect("nobody has paused it");
        assert!(reason.contains("page server") && reason.contains("is gone"), "{reason}");
        assert_eq!(info.page_server, Some(PageServerState::Lost));
        let refused = clone.client().resume().expect_err("nobody serves it").to_string();
        assert!(refused.contains("is gone"), "{refused}");

        let server = PageServer::start(&place, &template.snapshot);
        until("the guest goes on", || clone.state() == InstanceState::Running);
        assert_eq!(clone.info().pause_reason, None);
        template.facts.check(&mut agent);
        let stats = clone.page_server();
        assert_eq!((stats.takeovers, stats.reattachments), (0, 1), "{stats:?}");
        clone.stop();
        server.process.kill();
    }
}

/// Whoever pauses a guest means it, also if it stands still already.
#[test]
fn a_guest_that_was_paused_meanwhile_stays_so_when_there_is_a_server_again() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (Template::shared(), Place::new());
    let server = PageServer::start(&place, &template.snapshot);
    let restore = Restore::new(&place, &template.snapshot).uffd(&server).on_handler_loss(OnHandlerLoss::Pause);
    let (mut clone, _agent) = restore.ready("clone");
    server.process.kill();
    until("the guest is paused", || clone.state() == InstanceState::Paused);
    clone.pause();
    let _server = PageServer::start(&place, &template.snapshot);
    clone.until_served(PageServerState::Serving);
    assert_eq!(clone.state(), InstanceState::Paused);
    clone.resume();
    template.facts.check(&mut clone.agent());
    clone.stop();
}

/// A guest is never given bytes that fail their check.
#[test]
fn a_guest_whose_image_is_damaged_is_paused_until_there_is_a_server_with_a_good_one() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (large(), Place::new());
    let copy = place.join("copy");
    copy_directory(&template.snapshot, &copy);
    let server = PageServer::start(&place, &copy);
    let (mut clone, mut agent) = Restore::new(&place, &copy).uffd(&server).ready("clone");
    check_part(&template, &mut agent, 0);
    // Every chunk of it, in the file that the vmm has opened.
    let file = std::fs::File::options().write(true).open(copy.join("mem.bin")).expect("it can be written");
    let length = file.metadata().expect("it is there").len();
    (0..length).step_by(4096).for_each(|at| file.write_all_at(b"x", at).expect("it can be written"));
    server.process.kill();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| agent.mismatches(template.facts.working_set, SEED));
        until("the guest is paused", || clone.state() == InstanceState::Paused);
        let reason = clone.info().pause_reason.expect("nobody has paused it");
        assert!(reason.contains("damaged"), "{reason}");
        let _server = PageServer::start(&place, &template.snapshot);
        assert_eq!(reader.join().expect("the guest answers"), 0);
        assert_eq!(clone.state(), InstanceState::Running);
        clone.stop();
    });
}

fn copy_directory(from: &Path, to: &Path) {
    std::fs::create_dir(to).expect("a directory can be made in the test's directory");
    for entry in std::fs::read_dir(from).expect("the snapshot is there") {
        let entry = entry.expect("it can be read on");
        let copy = to.join(entry.file_name());
        std::fs::copy(entry.path(), &copy).expect("it can be copied");
        std::fs::set_permissions(&copy, PermissionsExt::from_mode(0o600)).expect("it is ours");
    }
}

#[test]
fn a_clone_without_a_page_server_is_snapshotted_and_gives_pages_back() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (large(), Place::new());
    let server = PageServer::start(&place, &template.snapshot);
    let (mut clone, mut agent) = Restore::new(&place, &template.snapshot).uffd(&server).ready("clone");
    check_part(&template, &mut agent, 0);
    server.process.kill();
    check_part(&template, &mut agent, 1);
    clone.snapshot(&place.join("second"));
    template.facts.check(&mut agent);
    clone.stop();
    let (late, mut agent) = Restore::new(&place, &place.join("second")).ready("late");
    template.facts.check(&mut agent);
    late.stop();
}

#[test]
fn a_load_during_which_the_server_is_killed_succeeds_without_it() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (Template::shared(), Place::new());
    for number in 0..5 {
        let server = PageServer::start(&place, &template.snapshot);
        let name = format!("clone-{number}");
        let mut clone = Restore::new(&place, &template.snapshot).uffd(&server).start(&name);
        until("it is served", || !server.metrics().sessions.is_empty());
        server.process.kill();
        template.facts.check(&mut clone.agent());
        clone.stop();
    }
}

#[test]
fn a_clone_that_is_killed_without_its_server_harms_no_other() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (large(), Place::new());
    let server = PageServer::start(&place, &template.snapshot);
    let restore = || Restore::new(&place, &template.snapshot).uffd(&server);
    let (one, mut first) = restore().ready("one");
    let (two, mut second) = restore().ready("two");
    server.process.kill();
    check_part(&template, &mut first, 0);
    check_part(&template, &mut second, 1);
    one.process.kill();
    template.facts.check(&mut second);
    two.stop();
}
