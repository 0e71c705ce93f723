//! Snapshots of guests that are busy, of clones, and of the same guest again.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::agent::burn::Burn;
use snapshot::state::Regs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tests::template::SEED;
use tests::{Agent, Boot, PageServer, Place, Restore, Template, TemplateOptions, require, until};

/// The guest goes on, what it writes later is its own, and snapshots of what are private views by now (the same guest
/// again, and a clone) hold what each had seen.
#[test]
fn snapshots_of_snapshotted_guests_and_of_clones_hold_what_each_has_seen() {
    require!(Kvm, Userfaultfd);
    let (template, mut parent_agent, mut parent) = Template::make_with_parent(TemplateOptions::default());
    let place = Place::new();
    let server = PageServer::start(&place, &template.snapshot);
    let facts = &template.facts;
    let [page_a, page_b, page_c] = [0, 1, 2].map(|n| facts.first_free_page() + n);
    let words = |agent: &mut Agent| [page_a, page_b, page_c].map(|page| agent.word(page));

    parent_agent.set_word(page_a, 1);
    let second = place.join("second");
    parent.snapshot(&second);
    parent_agent.set_word(page_a, 2);
    facts.check(&mut parent_agent);

    let (mut clone, mut agent) = Restore::new(&place, &template.snapshot).uffd(&server).ready("of-first");
    assert_eq!(words(&mut agent), [0, 0, 0], "the first snapshot is older than any mark");
    facts.check(&mut agent);
    agent.set_word(page_b, 3);
    let third = place.join("third");
    clone.snapshot(&third);
    agent = clone.agent();
    agent.set_word(page_b, 4);
    facts.check(&mut agent);

    let (mut grandchild, mut agent) = Restore::new(&place, &third).ready("of-third");
    assert_eq!(words(&mut agent), [0, 3, 0]);
    facts.check(&mut agent);
    agent.set_word(page_c, 5);
    let fourth = place.join("fourth");
    grandchild.snapshot(&fourth);

    let (of_fourth, mut agent) = Restore::new(&place, &fourth).ready("of-fourth");
    assert_eq!(words(&mut agent), [0, 3, 5]);
    facts.check(&mut agent);
    let (of_second, mut agent) = Restore::new(&place, &second).ready("of-second");
    assert_eq!(words(&mut agent), [1, 0, 0]);
    facts.check(&mut agent);
    assert_eq!(words(&mut parent.agent()), [2, 0, 0]);
    assert_eq!(words(&mut clone.agent()), [0, 4, 0]);
    for path in [&template.snapshot, &second, &third, &fourth] {
        snapshot::verify::verify(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }
    for vm in [parent, clone, grandchild, of_fourth, of_second] {
        vm.stop();
    }
}

#[test]
fn a_paused_guest_stays_paused_over_its_snapshot() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) = Boot::new(&place).ready("guest");
    let facts = tests::template::Facts::gather(&mut agent, 1);
    vm.pause();
    vm.snapshot(&place.join("one"));
    assert_eq!(vm.state(), api_spec::vm::InstanceState::Paused);
    vm.snapshot(&place.join("two"));
    vm.resume();
    facts.check(&mut vm.agent());
    for name in ["one", "two"] {
        let (clone, mut agent) = Restore::new(&place, &place.join(name)).ready(&format!("of-{name}"));
        facts.check(&mut agent);
        clone.stop();
    }
    vm.stop();
}

/// All registers that a computation uses, general and vector, go on in the guest and in every clone from the very step
/// at which the snapshot was taken.
#[test]
fn computations_go_on_from_the_step_they_were_snapshotted_at() {
    require!(Kvm, Userfaultfd);
    let place = Place::new();
    let (mut parent, mut agent) = Boot::new(&place).vcpus(4).ready("parent");
    let facts = tests::template::Facts::gather(&mut agent, 1);
    for vcpu in 1..4 {
        agent.burn_start(vcpu);
    }
    // On a busy host a vCPU may not have had its turn, or be in the midst of an interrupt, just then.
    let burning = (0..20).find_map(|attempt| {
        agent.ticks(50);
        let snapshot = place.join(format!("snapshot-{attempt}"));
        parent.snapshot(&snapshot);
        let saved = snapshot::load::open(&snapshot).expect("the snapshot can be opened");
        let steps: Option<Vec<u64>> = saved.state().vcpus[1..].iter().map(|vcpu| steps_in(&vcpu.regs)).collect();
        steps.map(|steps| (snapshot, steps))
    });
    let (snapshot, steps) = burning.expect("all vCPUs compute at some moment");
    println!("steps at the snapshot: {steps:?}");

    let server = PageServer::start(&place, &snapshot);
    let (by_file, by_file_agent) = Restore::new(&place, &snapshot).ready("by-file");
    let (by_uffd, by_uffd_agent) = Restore::new(&place, &snapshot).uffd(&server).ready("by-uffd");
    let guests = [("parent", parent.agent()), ("by-file", by_file_agent), ("by-uffd", by_uffd_agent)];
    for (name, mut agent) in guests {
        facts.check(&mut agent);
        for vcpu in 1..4 {
            let burn = agent.burn_stop(vcpu);
            assert_eq!(burn, Burn::after(burn.steps), "{name}: vCPU {vcpu}");
            let before = steps[usize::from(vcpu) - 1];
            assert!(burn.steps >= before, "{name}: vCPU {vcpu} did {} steps, {before} before the snapshot", burn.steps);
        }
        assert_eq!(agent.burn(100_000), Burn::after(100_000), "{name}: vCPU 0");
        // They take new work.
        agent.burn_start(3);
        let burn = agent.burn_stop(3);
        assert_eq!(burn, Burn::after(burn.steps), "{name}: vCPU 3 again");
    }
    for vm in [parent, by_file, by_uffd] {
        vm.stop();
    }
}

/// How many steps a burning vCPU has done: the register whose count leads to what another register holds.
fn steps_in(regs: &Regs) -> Option<u64> {
    let all = [
        regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi, regs.rsp, regs.rbp, regs.r8, regs.r9, regs.r10,
        regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ];
    // The integer may be one step ahead of the count, or half a step.
    let half_a_step = |steps: u64| Burn::after(steps + 1).integer.wrapping_sub(Burn::next_integer(0));
    let is_count = |&steps: &u64| {
        let integers = [Burn::after(steps).integer, half_a_step(steps), Burn::after(steps + 1).integer];
        steps > 0 && integers.iter().any(|integer| all.contains(integer))
    };
    all.into_iter().find(is_count)
}

/// vCPU 0, which serves requests, is in the middle of a computation; its answer is right.
#[test]
fn the_answering_vcpu_computes_across_a_snapshot() {
    require!(Kvm);
    let place = Place::new();
    let (mut parent, mut agent) = Boot::new(&place).ready("parent");
    let facts = tests::template::Facts::gather(&mut agent, 1);
    const STEPS: u64 = 500_000_000;
    let snapshot = place.join("snapshot");
    std::thread::scope(|scope| {
        let burn = scope.spawn(|| agent.burn(STEPS));
        std::thread::sleep(std::time::Duration::from_millis(50));
        parent.snapshot(&snapshot);
        assert_eq!(burn.join().expect("the parent answers"), Burn::after(STEPS));
    });
    // The clone ends the computation, for nobody, and then answers.
    let (clone, mut agent) = Restore::new(&place, &snapshot).ready("clone");
    facts.check(&mut agent);
    assert_eq!(agent.burn(1000), Burn::after(1000));
    clone.stop();
    parent.stop();
}

/// A request that waits for the guest's timer while the snapshot is taken: the guest answers it on the old stream, the
/// clone drops that stream and takes new ones, and its timer goes on.
#[test]
fn a_request_that_is_waiting_is_answered_by_the_parent_and_dropped_by_the_clone() {
    require!(Kvm, Userfaultfd);
    let place = Place::new();
    let (mut parent, mut agent) = Boot::new(&place).ready("parent");
    let facts = tests::template::Facts::gather(&mut agent, 1);
    let snapshot = place.join("snapshot");
    let start = agent.ticks(0);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| agent.ticks(300));
        // An answer on a second stream shows that the guest has taken in what came before.
        let mut other = Agent::connect(&parent.vsock);
        other.ping(1);
        other.ping(2);
        parent.snapshot(&snapshot);
        other.ping(3);
        let count = waiting.join().expect("the parent answers on the old stream");
        assert!(count >= start + 300, "{count} ticks, from {start}");
    });
    facts.check(&mut agent);
    let server = PageServer::start(&place, &snapshot);
    for (name, way) in
        [("file", Restore::new(&place, &snapshot)), ("uffd", Restore::new(&place, &snapshot).uffd(&server))]
    {
        let (clone, mut agent) = way.ready(name);
        facts.check(&mut agent);
        // Past the tick that the old request waits for.
        agent.ticks(310);
        facts.check(&mut agent);
        clone.stop();
    }
    parent.stop();
}

/// Streams stay open, and no request goes unanswered, while one snapshot after another is taken.
#[test]
fn a_guest_answers_without_a_break_while_it_is_snapshotted() {
    require!(Kvm, Userfaultfd);
    let place = Place::new();
    let (mut parent, mut agent) = Boot::new(&place).vcpus(2).ready("parent");
    let facts = tests::template::Facts::gather(&mut agent, 4);
    let (done, answers) = (AtomicBool::new(false), AtomicU64::new(0));
    let paths = ["one", "two", "three"].map(|name| place.join(name));
    let vsock = parent.vsock.clone();
    std::thread::scope(|scope| {
        let talkers = [0, 1].map(|talker| {
            let (done, answers, facts, vsock) = (&done, &answers, &facts, &vsock);
            scope.spawn(move || {
                let page = facts.first_free_page() + talker;
                let mut agent = Agent::connect(vsock);
                let mut value = 0;
                while !done.load(Ordering::Relaxed) {
                    value += 1;
                    agent.set_word(page, value);
                    assert_eq!(agent.word(page), value);
                    Agent::connect(vsock).ping(value);
                    answers.fetch_add(1, Ordering::Relaxed);
                }
            })
        });
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for path in &paths {
                let before = answers.load(Ordering::Relaxed);
                until("requests are answered", || answers.load(Ordering::Relaxed) > before + 5);
                parent.snapshot(path);
            }
        }));
        done.store(true, Ordering::Relaxed);
        for talker in talkers {
            talker.join().expect("every request was answered");
        }
        result.expect("snapshots are taken");
    });
    facts.check(&mut agent);
    for path in &paths {
        check_clones(&place, path, |agent| facts.check(agent));
    }
    parent.stop();
}

fn check_clones(place: &Place, snapshot: &Path, check: impl Fn(&mut Agent)) {
    let name = snapshot.file_name().expect("it has a name").to_string_lossy().into_owned();
    let (clone, mut agent) = Restore::new(place, snapshot).ready(&format!("of-{name}"));
    check(&mut agent);
    assert_eq!(agent.mismatches(api_spec::agent::Pages::run(0, 256), SEED), 0);
    clone.stop();
}
