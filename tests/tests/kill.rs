//! The kill test: twenty clones work on their memory while their page server is killed, stopped and replaced, again and again.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::agent::{Pages, Request, Response};
use api_spec::stats::{PageServerState, PageServerStats};
use rustix::process::Signal;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};
use tests::procfs::outstanding_faults;
use tests::template::SEED;
use tests::{Agent, PageServer, Place, Random, Restore, Template, TemplateOptions, Vm, require, until};

const CLONES: usize = 20;
const ROUNDS: u32 = 10;
/// Pages that are looked at with one request.
const SLICE: u32 = 16;
/// What a clone rests between its pieces of work: twenty of them that never do are too many for a small host, and wait for each other.
const REST: Duration = Duration::from_millis(10);
/// Longest that a guest may stand still.
const STALL: Duration = Duration::from_secs(1);
/// Longest that one request may take before it counts as lost.
const LOST: Duration = Duration::from_secs(60);

/// What happens to the page server in a round.
#[derive(Clone, Copy, Debug)]
enum Blow {
    /// SIGKILL, and a new one after a while.
    Kill,
    /// SIGSTOP, and SIGCONT after a while.
    Stop,
    /// SIGTERM, and a new one at once.
    Replace,
}

/// How far the clones may go into memory that they have never touched. What is left is for the rounds to come, so that there are
/// faults in each of them.
struct Course {
    slices: AtomicU32,
    over: AtomicBool,
}

/// Has a clone check its memory: slices that it has never touched, as far as the course goes, and, again and again, those that it
/// has. Ends when the course is over and all of it was touched. Returns the longest that a request took.
fn work(agent: &mut Agent, course: &Course, mut random: Random) -> Duration {
    let (mut touched, mut longest) = (0, Duration::ZERO);
    let mut check = |agent: &mut Agent, slice: u32| {
        let start = Instant::now();
        let question = Request::Verify { pages: Pages::run(slice * SLICE, SLICE), seed: SEED };
        let answer = agent.try_ask_within(LOST, question).unwrap_or_else(|e| panic!("the clone is lost: {e}"));
        assert_eq!(answer, Response::Mismatches(0), "slice {slice}");
        longest = longest.max(start.elapsed());
    };
    loop {
        let (over, end) = (course.over.load(Ordering::Relaxed), course.slices.load(Ordering::Relaxed));
        if over && touched >= end {
            return longest;
        }
        if touched < end {
            check(agent, touched);
            touched += 1;
        }
        if touched > 0 {
            check(agent, random.below(u64::from(touched)) as u32);
        }
        std::thread::sleep(REST);
    }
}

#[test]
fn no_clone_is_lost_whatever_becomes_of_the_page_server() {
    require!(Kvm, Userfaultfd);
    let template = Template::make(TemplateOptions { memory_mib: 40, working_set_mib: 24, ..Default::default() });
    let slices = template.facts.working_set.count / SLICE;
    let place = Place::new();
    // Other moments each time; these again by the number.
    let seed = std::env::var("COPPICE_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| std::process::id().into());
    println!("COPPICE_SEED={seed}");
    let mut random = Random::new(seed);
    let mut server = PageServer::start(&place, &template.snapshot);
    let (mut vms, agents): (Vec<Vm>, Vec<Agent>) = (0..CLONES)
        .map(|number| Restore::new(&place, &template.snapshot).uffd(&server).ready(&format!("clone-{number}")))
        .unzip();
    let course = Course { slices: AtomicU32::new(0), over: AtomicBool::new(false) };
    let results = std::thread::scope(|scope| {
        let workers: Vec<_> = agents
            .into_iter()
            .map(|mut agent| {
                let (course, random) = (&course, Random::new(random.next()));
                scope.spawn(move || work(&mut agent, course, random))
            })
            .collect();
        // Ends the workers also if this panics, so that the panic is heard of.
        let over = Over(&course);
        for round in 0..ROUNDS {
            let blow = [Blow::Kill, Blow::Stop, Blow::Replace][round as usize % 3];
            course.slices.store((round + 1) * slices / ROUNDS, Ordering::Relaxed);
            std::thread::sleep(Duration::from_millis(random.below(20)));
            server.process.signal(Signal::STOP);
            let mut waiting = 0;
            until("a fault is outstanding", || {
                waiting = vms.iter().filter(|vm| outstanding_faults(vm.pid()) > 0).count();
                waiting > 0
            });
            let pause = Duration::from_millis(random.below(300));
            println!("round {round}: {blow:?} with faults of {waiting} clones outstanding, {pause:?}");
            server = strike(server, blow, pause, &place, &template);
            for vm in &mut vms {
                vm.until_served(PageServerState::Serving);
            }
        }
        drop(over);
        workers.into_iter().map(|worker| worker.join().expect("every word is right")).collect::<Vec<_>>()
    });
    let longest = *results.iter().max().expect("there are clones");
    let all: Vec<PageServerStats> = vms.iter_mut().map(Vm::page_server).collect();
    let takeover = all.iter().filter_map(|stats| stats.takeover_us).max().expect("the vmms took over");
    let (losses, hangs, served) = all.iter().fold((0, 0, 0), |(losses, hangs, served), stats| {
        (losses + stats.losses, hangs + stats.hangs, served + stats.faults_served)
    });
    println!(
        "longest request {longest:?}, longest last takeover {takeover} us, {losses} losses, {hangs} hangs, {served} faults served without a page server"
    );
    assert!(longest < STALL, "a clone stood still for {longest:?}");
    for mut vm in vms {
        template.facts.check(&mut vm.agent());
        vm.stop();
    }
}

/// Says that the course is over when it is dropped; if that is because of a panic, there is no more of it.
struct Over<'a>(&'a Course);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.slices.store(0, Ordering::Relaxed);
        }
        self.0.over.store(true, Ordering::Relaxed);
    }
}

/// Deals a blow to a server that stands still, and returns the one that serves after that.
fn strike(mut server: PageServer, blow: Blow, pause: Duration, place: &Place, template: &Template) -> PageServer {
    match blow {
        Blow::Kill => {
            server.process.kill();
            std::thread::sleep(pause);
            PageServer::start(place, &template.snapshot)
        }
        Blow::Stop => {
            std::thread::sleep(pause);
            server.process.signal(Signal::CONT);
            server
        }
        Blow::Replace => {
            server.process.signal(Signal::CONT);
            server.process.stop();
            PageServer::start(place, &template.snapshot)
        }
    }
}
