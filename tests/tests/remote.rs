//! Clones whose memory lies behind a web server, which comes and goes.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::agent::{Pages, Request, Response};
use api_spec::stats::PageServerState;
use api_spec::vm::InstanceState;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tests::procfs::outstanding_faults;
use tests::template::SEED;
use tests::{Agent, PageServer, Place, Restore, Template, TemplateOptions, Vm, Web, require, until};

/// How long a guest may wait for its pages once they can be had again.
const STALL: Duration = Duration::from_secs(1);

/// The snapshot without its memory, as each host has it.
fn without_memory(template: &Template, place: &Place) -> PathBuf {
    let copy = place.join("snapshot");
    std::fs::create_dir(&copy).expect("a directory can be made in the test's directory");
    for entry in std::fs::read_dir(&template.snapshot).expect("the snapshot is there") {
        let name = entry.expect("it can be read on").file_name();
        if !name.to_string_lossy().starts_with("mem.") {
            std::fs::copy(template.snapshot.join(&name), copy.join(&name)).expect("it can be copied");
        }
    }
    copy
}

/// A page server of the memory behind a web server.
fn server(place: &Place, template: &Template) -> (Web, PageServer) {
    let web = Web::start(template.place.path());
    let url = web.url("snapshot");
    let server = PageServer::start(place, Path::new(&url));
    (web, server)
}

fn large() -> Template {
    Template::make(TemplateOptions { memory_mib: 64, working_set_mib: 48, ..Default::default() })
}

#[test]
fn a_clone_has_memory_that_this_host_has_not() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (large(), Place::new());
    let snapshot = without_memory(&template, &place);
    let (web, server) = server(&place, &template);
    let (mut clone, mut agent) = Restore::new(&place, &snapshot).uffd(&server).ready("clone");
    let before = web.answered();
    assert_eq!(agent.mismatches(Pages::run(0, 64), SEED), 0);
    let fetched = web.answered() - before;
    assert!((1..20).contains(&fetched), "a quarter of a MiB was fetched with {fetched} requests");
    template.facts.check(&mut agent);
    // Nobody but the page server can have it, so the clone waits for the next one; if no chunk is being filled, which nobody could put right.
    let mut last = None;
    until("the page server rests", || {
        std::thread::sleep(Duration::from_millis(100));
        let now = Some((web.answered(), server.filled_pages()));
        now == std::mem::replace(&mut last, now)
    });
    let socket = server.socket.clone();
    server.process.kill();
    until("the clone is lost", || clone.info().page_server == Some(PageServerState::Lost));
    until("the guest is paused", || clone.state() == InstanceState::Paused);
    let reason = clone.info().pause_reason.expect("nobody has paused it");
    assert!(reason.contains("is gone") && reason.contains("mem.bin"), "{reason}");
    let next = PageServer::start(&place, Path::new(&web.url("snapshot")));
    assert_eq!(next.socket, socket);
    until("the guest goes on", || clone.state() == InstanceState::Running);
    template.facts.check(&mut clone.agent());
    clone.stop();
    // Without a page server there is no such clone.
    let done = Restore::new(&place, &snapshot).start("alone").process.finish();
    assert_eq!(done.code(), 1);
    assert!(done.one_line().contains("mem.bin"), "{}", done.stderr);
}

/// What a clone is asked, and how long after the return of the store it answers.
fn ask(agent: &mut Agent, pages: Pages) {
    let question = Request::Verify { pages, seed: SEED };
    let answer = agent.try_ask_within(Duration::from_secs(60), question).unwrap_or_else(|e| panic!("it is lost: {e}"));
    assert_eq!(answer, Response::Mismatches(0), "{pages:?}");
}

#[test]
fn a_store_that_is_cut_off_pauses_clones_with_the_reason_and_they_go_on_when_it_is_back() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (large(), Place::new());
    let snapshot = without_memory(&template, &place);
    let (web, server) = server(&place, &template);
    let restore = |name: &str| Restore::new(&place, &snapshot).uffd(&server).ready(name);
    let (mut vms, mut agents): (Vec<Vm>, Vec<Agent>) = (0..5).map(|n| restore(&format!("clone-{n}"))).unzip();
    let rounds = 4;
    // Those of the last round are far from what came along with others before.
    let part = |round: u32| {
        let count = template.facts.working_set.count / rounds;
        Pages { first: round * count, count: count / 256, stride: 256 }
    };
    for round in 0..rounds {
        web.cut_off();
        let mut back = Instant::now();
        std::thread::scope(|scope| {
            let asked: Vec<_> = agents.iter_mut().map(|agent| scope.spawn(move || ask(agent, part(round)))).collect();
            for vm in &mut vms {
                if round % 2 == 0 {
                    until("the guest is paused", || vm.state() == InstanceState::Paused);
                    let reason = vm.info().pause_reason.expect("nobody has paused it");
                    assert!(reason.contains("cannot get pages"), "{reason}");
                } else {
                    until("a fault is outstanding", || outstanding_faults(vm.pid()) > 0);
                }
            }
            back = Instant::now();
            web.come_back();
            asked.into_iter().for_each(|asked| asked.join().expect("every word is right"));
        });
        let stall = back.elapsed();
        println!("round {round}: all went on {stall:?} after the store was back");
        assert!(stall < STALL, "a clone stood still for {stall:?} after the store was back");
        for vm in &mut vms {
            until("the clone is served", || vm.info().page_server == Some(PageServerState::Serving));
            assert_eq!((vm.state(), vm.info().pause_reason), (InstanceState::Running, None));
        }
    }
    for mut vm in vms {
        template.facts.check(&mut vm.agent());
        vm.stop();
    }
    assert_eq!(server.metrics().stores_retired_total, 0);
}
