//! The page server learns what the clones of a snapshot use, and what is known is got ready for the next ones.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::agent::Pages;
use api_spec::snapshot::OnHandlerLoss;
use snapshot::working_set::WorkingSet;
use std::path::Path;
use tests::procfs::{self, resident};
use tests::template::SEED;
use tests::{Agent, PageServer, Place, Restore, Template, TemplateOptions, Vm, Web, require, until};

const MIB_PAGES: u32 = 256;

fn template() -> Template {
    Template::make(TemplateOptions { memory_mib: 64, working_set_mib: 40, ..Default::default() })
}

/// What every clone does: it reads 8 MiB and writes 2 MiB, of 40.
fn work(agent: &mut Agent) {
    assert_eq!(agent.mismatches(Pages::run(4 * MIB_PAGES, 8 * MIB_PAGES), SEED), 0);
    agent.write(Pages::run(20 * MIB_PAGES, 2 * MIB_PAGES), 7);
}

/// Waits until nothing more is got ready for a clone: what the vmm itself has in memory is not to be told from what it gets ready.
fn until_ready(clone: &Vm) {
    until("all pages are ready", || !procfs::has_thread(clone.pid(), "replay"));
}

fn known(snapshot: &Path) -> Option<WorkingSet> {
    let snapshot = snapshot::load::open(snapshot).expect("the snapshot is there");
    WorkingSet::load(&snapshot).expect("what is there can be used")
}

fn learn(template: &Template, place: &Place) {
    let server = PageServer::start_with(place, &template.snapshot, &["--record", "3"]);
    let clones: Vec<_> = (0..3)
        .map(|number| {
            // On a busy host a server may answer late, and one that was stood in for is not told what a clone has used.
            let restore =
                Restore::new(place, &template.snapshot).uffd(&server).on_handler_loss(OnHandlerLoss::Reattach);
            let (vm, mut agent) = restore.ready(&format!("teacher-{number}"));
            work(&mut agent);
            if number == 0 {
                // Its own affair.
                assert_eq!(agent.mismatches(Pages::run(30 * MIB_PAGES, MIB_PAGES), SEED), 0);
            }
            vm
        })
        .collect();
    until("the working set is known", || known(&template.snapshot).is_some());
    clones.into_iter().for_each(|vm| drop(vm.stop()));
    server.process.stop();
}

#[test]
fn what_clones_use_is_learnt_and_got_ready() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (template(), Place::new());
    learn(&template, &place);
    let set = known(&template.snapshot).expect("it was learnt");
    let mib = |pages: u64| pages as f64 / f64::from(MIB_PAGES);
    let (read, written) = (mib(set.read().pages()), mib(set.written().pages()));
    println!("read {read:.2} MiB, written {written:.2} MiB, by {} clones", set.clones);
    assert_eq!(set.clones, 3);
    // Beside that, what the guest's kernel uses; and the kernel maps the neighbours of pages that are read.
    assert!((8.0..12.0).contains(&(read + written - 2.0)), "{read} MiB");
    assert!((2.0..3.0).contains(&written), "{written} MiB");

    // It is in the store before anybody comes,
    let server = PageServer::start(&place, &template.snapshot);
    let wanted = set.read().union(set.written()).pages();
    until("the store is warm", || server.filled_pages() >= wanted);
    let filled = server.filled_pages();
    assert!(filled < 2 * wanted, "{filled} pages for {wanted}");
    // and mapped before the guest asks.
    let restore = |name: &str| Restore::new(&place, &template.snapshot).uffd(&server).paused().start(name);
    let clone = restore("clone");
    until("pages are mapped", || resident(clone.pid(), "RssShmem") > 6 << 10);
    until("pages are copied", || resident(clone.pid(), "RssAnon") > 2 << 10);
    until_ready(&clone);
    let mut clone = clone;
    clone.resume();
    let mut agent = clone.agent();
    let events = server.session(clone.pid()).uffd_events;
    work(&mut agent);
    let more = server.session(clone.pid()).uffd_events - events;
    assert!(more < 16, "{more} faults on pages that were got ready");
    template_check(&template, &mut agent);
    clone.stop();

    // Not where that is not wanted.
    let plain = Restore::new(&place, &template.snapshot).uffd(&server).paused().no_replay().start("plain");
    let mut plain = plain;
    plain.state();
    assert!(resident(plain.pid(), "RssShmem") < 2 << 10);
    plain.stop();
    server.process.stop();

    // From the memory file too.
    let (mut own, mut agent) = Restore::new(&place, &template.snapshot).ready("own");
    until("pages are copied", || resident(own.pid(), "RssAnon") > 2 << 10);
    work(&mut agent);
    template_check(&template, &mut agent);
    own.process.check_alive();
    own.stop();
}

/// Everything but what the work writes is as it was.
fn template_check(template: &Template, agent: &mut Agent) {
    let count = template.facts.working_set.count;
    assert_eq!(agent.mismatches(Pages::run(0, 20 * MIB_PAGES), SEED), 0);
    assert_eq!(agent.mismatches(Pages::run(22 * MIB_PAGES, count - 22 * MIB_PAGES), SEED), 0);
}

/// Whatever a file of that name says, a clone reads right words.
#[test]
fn a_working_set_that_is_of_no_use_costs_nothing() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (template(), Place::new());
    let path = template.snapshot.join("working-set.json");
    for bad in [&b"{}"[..], b"\xff\xfe", &vec![b'['; 2 << 20]] {
        std::fs::write(&path, bad).expect("it can be written");
        let server = PageServer::start(&place, &template.snapshot);
        assert!(server.process.log().contains("is not made use of"), "{}", server.process.log());
        let (mut clone, mut agent) = Restore::new(&place, &template.snapshot).uffd(&server).ready("clone");
        template.facts.check(&mut agent);
        clone.process.check_alive();
        clone.stop();
        server.process.stop();
    }
}

/// A server of a URL learns nothing, but what was learnt from the snapshot on some host goes with the files that each host has.
#[test]
fn a_clone_of_a_remote_image_gets_ready_what_a_local_one_has_taught() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (template(), Place::new());
    learn(&template, &place);
    let bare = template.without_memory(&place);
    let web = Web::start(template.place.path());
    let server = PageServer::start(&place, Path::new(&web.url("snapshot")));
    let restore = |name: &str| Restore::new(&place, &bare).uffd(&server).paused().start(name);
    let mut plain = restore("plain");
    plain.state();
    assert!(resident(plain.pid(), "RssShmem") < 2 << 10, "nothing is known here");
    plain.stop();

    let name = "working-set.json";
    std::fs::copy(template.snapshot.join(name), bare.join(name)).expect("it can be copied");
    let set = known(&template.snapshot).expect("it was learnt");
    let wanted = 4 * set.read().union(set.written()).pages();
    let mut tries = 0;
    let mut clone = loop {
        let clone = restore("clone");
        let mut was_without = false;
        until("all pages are there", || {
            was_without = clone.process.log().contains("does not deliver");
            was_without || resident(clone.pid(), "RssShmem") + resident(clone.pid(), "RssAnon") >= wanted
        });
        until_ready(&clone);
        tries += 1;
        // Nothing more is got ready for a clone whose page server was too slow for once, as on a busy host.
        if !was_without || tries == 5 {
            break clone;
        }
        clone.stop();
    };
    clone.resume();
    let mut agent = clone.agent();
    let events = server.session(clone.pid()).uffd_events;
    work(&mut agent);
    let more = server.session(clone.pid()).uffd_events - events;
    assert!(more < 16, "{more} faults on pages that were got ready");
    template_check(&template, &mut agent);
    clone.stop();
}
