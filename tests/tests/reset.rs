//! A running guest is remembered, and becomes again what it was, in place.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::agent::burn::Burn;
use api_spec::agent::{Pages, Request, Response};
use api_spec::devices::{Balloon, Drive};
use api_spec::reset::{VmCheckpoint, VmCheckpointed, VmReset, VmResetDone};
use api_spec::vm::InstanceState;
use snapshot::state::{ClockState, MachineState, Msr, PitState, VcpuState};
use std::fs::File;
use std::path::Path;
use tests::template::{self, Facts};
use tests::vm::drive;
use tests::{Agent, Boot, PageServer, Place, Restore, Template, Vm, procfs, require, until};

const SEED: u64 = 5;
const OTHER_SEED: u64 = 6;
/// How often a guest is reset where nothing is to grow, unless the environment says otherwise.
const ROUNDS: u32 = 1_000;

/// By then the kernel has delivered what interrupts there were.
const ON_ITS_WAY: std::time::Duration = std::time::Duration::from_millis(100);

fn checkpoint(vm: &mut Vm) -> VmCheckpointed {
    vm.client().checkpoint(&VmCheckpoint {}).unwrap_or_else(|e| panic!("{}: no checkpoint: {e}", vm.name))
}

fn try_reset(vm: &mut Vm, reset: VmReset) -> Result<VmResetDone, String> {
    vm.client().reset(&reset).map_err(|e| e.to_string())
}

fn reset(vm: &mut Vm) -> VmResetDone {
    let done = try_reset(vm, VmReset::default()).unwrap_or_else(|e| panic!("{}: it is not reset: {e}", vm.name));
    assert_eq!(done.trace.phases.iter().map(|phase| phase.ns).sum::<u64>(), done.trace.total_ns, "{:?}", done.trace);
    assert!(vm.client().stats().expect("counters").traces.contains(&done.trace), "it is the last one");
    done
}

fn reset_paused(vm: &mut Vm) -> VmResetDone {
    let paused = VmReset { resume: false, ..VmReset::default() };
    try_reset(vm, paused).unwrap_or_else(|e| panic!("{}: it is not reset: {e}", vm.name))
}

/// No stream is open, so that the guest has nothing to forget.
fn until_quiet(vm: &mut Vm) {
    until("all streams are closed", || {
        let stats = vm.client().stats().expect("counters");
        stats.vsock.expect("there is a vsock device").connections == 0
    });
}

/// All that a snapshot says of a guest: the digest of all its memory, which is read by another way than any log says, and its
/// state, but for what moves while a guest stands still.
#[derive(Debug, PartialEq)]
struct Whole {
    memory: String,
    state: MachineState,
}

fn whole(vm: &mut Vm, path: &Path) -> Whole {
    assert_eq!(vm.state(), InstanceState::Paused);
    vm.snapshot(path);
    let snapshot = snapshot::load::open(path).expect("it is a snapshot");
    Whole { memory: snapshot.manifest().memory.root.clone(), state: settled(snapshot.state()) }
}

/// The time-stamp counter, and when its timer is to go off: a timer that has gone off does so once more, as after a restore.
const MOVING_MSRS: [u32; 2] = [0x10, 0x6e0];
/// Where the local APIC has the time that is left of its timer, and the bit that tells that it has gone off: the request of the
/// vector that the embedded guest gives it, 0x20.
const TIMER_LEFT: std::ops::Range<usize> = 0x390..0x394;
const TIMER_GONE_OFF: (usize, u8) = (0x210, 1);

/// Without what moves: the time-stamp counter and what KVM keeps of the time of day, the local APIC's timer, and when the
/// interval timer was loaded.
fn settled(state: &MachineState) -> MachineState {
    let vcpu = |vcpu: &VcpuState| {
        let mut vcpu = vcpu.clone();
        vcpu.lapic[TIMER_LEFT].fill(0);
        vcpu.lapic[TIMER_GONE_OFF.0] &= !TIMER_GONE_OFF.1;
        let moves = |msr: &Msr| MOVING_MSRS.contains(&msr.index);
        vcpu.msrs.iter_mut().filter(|msr| moves(msr)).for_each(|msr| msr.data = 0);
        vcpu
    };
    let mut vm = state.vm.clone();
    vm.clock = ClockState { flags: vm.clock.flags, ..ClockState::default() };
    let PitState { channels, .. } = &mut vm.pit;
    channels.iter_mut().for_each(|channel| channel.count_load_time = 0);
    MachineState { vcpus: state.vcpus.iter().map(vcpu).collect(), vm, devices: state.devices.clone() }
}

#[track_caller]
fn assert_whole(now: &Whole, then: &Whole, what: &str) {
    assert_eq!(now.memory, then.memory, "{what}: memory");
    for (number, (now, then)) in now.state.vcpus.iter().zip(&then.state.vcpus).enumerate() {
        // Part by part: a vCPU is long.
        assert_eq!((now.mp_state, &now.regs), (then.mp_state, &then.regs), "{what}: vCPU {number}");
        assert_eq!(now.sregs, then.sregs, "{what}: vCPU {number}");
        assert_eq!((&now.debug_regs, &now.xcrs), (&then.debug_regs, &then.xcrs), "{what}: vCPU {number}");
        assert_eq!(now.events, then.events, "{what}: vCPU {number}");
        assert_eq!(now.msrs, then.msrs, "{what}: vCPU {number}");
        let differing: Vec<usize> = (0..now.lapic.len()).filter(|at| now.lapic[*at] != then.lapic[*at]).collect();
        let pairs: Vec<_> = differing.iter().map(|at| (*at, now.lapic[*at], then.lapic[*at])).collect();
        assert!(pairs.is_empty(), "{what}: vCPU {number}: its local APIC has (place, now, then) {pairs:x?}");
        assert!(now.xsave == then.xsave, "{what}: vCPU {number}: FPU");
    }
    assert_eq!(now.state.vm, then.state.vm, "{what}");
    assert_eq!(now.state.devices, then.state.devices, "{what}");
    assert!(now == then, "{what}");
}

fn balloon() -> Balloon {
    Balloon {
        amount_mib: 0,
        deflate_on_oom: false,
        stats_polling_interval_s: 1,
        free_page_reporting: true,
        free_page_hinting: false,
    }
}

/// A guest that is at work on all vCPUs, with a stream that is open and without.
#[test]
fn nothing_is_left_of_what_a_guest_has_done_since() {
    require!(Kvm);
    for has_stream in [false, true] {
        let place = Place::new();
        let boot = Boot::new(&place).vcpus(3).balloon(balloon()).entropy();
        let (mut vm, mut agent) = boot.ready("guest");
        let facts = Facts::gather(&mut agent, 1);
        let (free, gone) = (Pages::run(facts.first_free_page(), 500), Pages::run(facts.first_free_page() + 500, 100));
        agent.fill(free, SEED);
        agent.fill(gone, SEED);
        agent.give_back(gone);
        agent.burn_start(1);
        agent.ticks(2);
        let mut stream = Some(agent);
        if !has_stream {
            stream = None;
            until_quiet(&mut vm);
        }
        std::thread::sleep(ON_ITS_WAY);
        vm.pause();
        let told = checkpoint(&mut vm);
        assert_eq!(told.private_pages, 0, "what was the guest's own is the image by now");
        let then = whole(&mut vm, &place.join("then"));
        for round in 0..4u32 {
            vm.resume();
            // Each time something else: memory, other vCPUs, devices; and once nothing at all.
            if round != 2 {
                let mut agent = vm.agent();
                agent.fill(Pages::run(free.first, 100 * (round + 1)), OTHER_SEED);
                agent.fill(Pages::run(gone.first + 10, 20), OTHER_SEED);
                agent.give_back(Pages::run(free.first + 50, 20));
                agent.give_back(gone);
                agent.burn_start(2);
                agent.ticks(3);
                agent.burn_stop(1);
                agent.burn(100_000);
                drop((agent, stream.take()));
                until_quiet(&mut vm);
            }
            // An interrupt that is on its way would arrive after the reset.
            std::thread::sleep(ON_ITS_WAY);
            reset_paused(&mut vm);
            let what = format!("round {round}, {}", if has_stream { "with a stream" } else { "without" });
            assert_whole(&whole(&mut vm, &place.join(format!("now-{round}"))), &then, &what);
        }
        vm.resume();
        let mut agent = vm.agent();
        facts.check(&mut agent);
        assert_eq!((agent.mismatches(free, SEED), agent.checksum(gone)), (0, 0));
        let burn = agent.burn_stop(1);
        assert_eq!(burn, Burn::after(burn.steps), "it goes on from the very step");
        agent.burn_start(2);
        vm.stop();
    }
}

/// Whoever talks to the guest is cut off, and the next one finds it as it was.
#[test]
fn a_guest_serves_each_client_as_if_it_were_the_first() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (Template::shared(), Place::new());
    let (facts, page) = (&template.facts, template.facts.first_free_page());
    let server = PageServer::start(&place, &template.snapshot);
    let of_file = Restore::new(&place, &template.snapshot);
    let of_server = Restore::new(&place, &template.snapshot).uffd(&server).no_replay();
    for (name, restore) in [("file", of_file), ("server", of_server)] {
        let (mut vm, mut agent) = restore.ready(name);
        agent.set_word(page, 1);
        drop(agent);
        until_quiet(&mut vm);
        let told = checkpoint(&mut vm);
        assert!(told.private_pages > 0, "{told:?}");
        for round in 0..30u32 {
            let mut agent = Agent::connect(&vm.vsock);
            assert_eq!((agent.word(page), agent.word(page + 1)), (1, 0), "{name}, {round}");
            agent.set_word(page, u64::from(round) + 2);
            agent.set_word(page + 1 + round % 5, 7);
            if round % 10 == 0 {
                // Pages that were never touched come from the server meanwhile.
                assert_eq!(agent.mismatches(facts.working_set, template::SEED), 0, "{name}, {round}");
            }
            let done = reset(&mut vm);
            assert!(done.dirty_pages >= 2, "{done:?}");
            assert!(agent.try_ask(Request::Ping { token: 1 }).is_err(), "its stream is cut off");
        }
        facts.check(&mut vm.agent());
        vm.stop();
    }
}

/// A stream that was open at the checkpoint: the guest forgets it, and takes others.
#[test]
fn streams_of_the_checkpoint_are_forgotten() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) = Boot::new(&place).ready("guest");
    let nonce = agent.nonce();
    checkpoint(&mut vm);
    assert_eq!(agent.nonce(), nonce, "the stream goes on");
    for _ in 0..10 {
        reset(&mut vm);
        assert!(agent.try_ask(Request::Ping { token: 1 }).is_err());
        agent = vm.agent();
        assert_eq!(agent.nonce(), nonce);
    }
    // Once more, of the guest as it is now.
    agent.set_word(0, 9);
    checkpoint(&mut vm);
    agent.set_word(0, 10);
    reset(&mut vm);
    assert_eq!(vm.agent().word(0), 9);
    vm.stop();
}

#[test]
fn what_cannot_be_reset_is_refused_by_name() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (Template::shared(), Place::new());
    let image = place.join("disk.img");
    File::create_new(&image).and_then(|file| file.set_len(1 << 20)).expect("a file can be made");
    let refused = |vm: &mut Vm| vm.client().checkpoint(&VmCheckpoint {}).expect_err("it is refused").to_string();

    let (mut raw, mut agent) = Boot::new(&place).drive(drive("data", &image)).ready("raw");
    let said = refused(&mut raw);
    assert!(said.contains("drive data") && said.contains("overlay"), "{said}");
    let said = try_reset(&mut raw, VmReset::default()).expect_err("there is none");
    assert!(said.contains("there is no checkpoint"), "{said}");
    agent.ticks(2);
    raw.stop();

    let server = PageServer::start(&place, &template.snapshot);
    let (mut copied, mut agent) = Restore::new(&place, &template.snapshot).copied_from(&server.socket).ready("copied");
    let said = refused(&mut copied);
    assert!(said.contains("`Uffd`") && said.contains("UffdShared"), "{said}");
    template.facts.check(&mut agent);
    copied.stop();

    // One that was without its page server keeps the pages that it has had.
    let (mut left, mut agent) = Restore::new(&place, &template.snapshot).uffd(&server).no_replay().ready("left");
    checkpoint(&mut left);
    server.process.kill();
    left.until_served(api_spec::stats::PageServerState::Failover);
    agent.set_word(template.facts.first_free_page(), 4);
    let said = try_reset(&mut left, VmReset::default()).expect_err("it is refused");
    assert!(said.contains("replace: ") && said.contains("page server"), "{said}");
    assert_eq!(left.state(), InstanceState::Paused);
    left.stop();
}

#[test]
fn a_guest_that_has_written_too_much_is_left_paused_to_be_replaced() {
    require!(Kvm);
    let (template, place) = (Template::shared(), Place::new());
    let (mut vm, mut agent) = Restore::new(&place, &template.snapshot).ready("clone");
    let pages = Pages::run(template.facts.first_free_page(), 400);
    checkpoint(&mut vm);
    agent.fill(pages, SEED);
    let bounded = VmReset { max_dirty_pages: Some(300), ..VmReset::default() };
    for _ in 0..2 {
        let said = try_reset(&mut vm, bounded).expect_err("it has written more");
        assert!(said.contains("replace: ") && said.contains("max_dirty_pages is 300"), "{said}");
        assert_eq!(vm.state(), InstanceState::Paused);
    }
    // What was written is not forgotten by that.
    let done = reset(&mut vm);
    assert!(done.dirty_pages >= 400, "{done:?}");
    assert_eq!(vm.agent().checksum(pages), 0);
    try_reset(&mut vm, VmReset { max_dirty_pages: Some(4096), ..bounded }).expect("it has written less");
    vm.stop();
}

/// What is given back while there is a checkpoint comes back, and so does what was given back before.
#[test]
fn a_balloon_gives_nothing_away_that_a_reset_needs() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) = Boot::new(&place).balloon(balloon()).ready("guest");
    let (before, after) = (Pages::run(0, 300), Pages::run(1000, 300));
    agent.fill(before, SEED);
    agent.fill(after, SEED);
    agent.give_back(before);
    checkpoint(&mut vm);
    for _ in 0..3 {
        let mut agent = vm.agent();
        agent.fill(Pages::run(100, 100), OTHER_SEED);
        agent.give_back(Pages::run(120, 10));
        agent.give_back(after);
        agent.fill(Pages::run(1100, 10), OTHER_SEED);
        reset(&mut vm);
        let mut agent = vm.agent();
        assert_eq!((agent.checksum(before), agent.mismatches(after, SEED)), (0, 0));
    }
    vm.stop();
}

#[test]
fn a_guest_with_an_overlay_is_reset_and_snapshotted_in_between() {
    require!(Kvm);
    let place = Place::new();
    let image = place.join("disk.img");
    File::create_new(&image).and_then(|file| file.set_len(1 << 20)).expect("a file can be made");
    let disk = Drive { overlay: true, ..drive("data", &image) };
    let (mut vm, mut agent) = Boot::new(&place).drive(disk).ready("guest");
    agent.set_word(0, 1);
    checkpoint(&mut vm);
    for round in 0..3u64 {
        vm.agent().set_word(0, 2 + round);
        vm.snapshot(&place.join(format!("snapshot-{round}")));
        reset(&mut vm);
        assert_eq!(vm.agent().word(0), 1);
    }
    checkpoint(&mut vm);
    vm.stop();
    let (clone, mut agent) = Restore::new(&place, &place.join("snapshot-1")).ready("clone");
    assert_eq!(agent.word(0), 3);
    clone.stop();
}

/// What lies over a snapshot that was taken between checkpoint and reset would lack the pages that went back.
#[test]
fn snapshots_after_a_reset_are_whole() {
    require!(Kvm);
    let (template, place) = (Template::shared(), Place::new());
    let page = template.facts.first_free_page();
    let (mut vm, mut agent) = Restore::new(&place, &template.snapshot).ready("clone");
    agent.set_word(page, 1);
    vm.snapshot(&place.join("before"));
    checkpoint(&mut vm);
    let mut agent = vm.agent();
    agent.set_word(page, 2);
    agent.set_word(page + 1, 2);
    vm.snapshot(&place.join("between"));
    reset(&mut vm);
    vm.agent().set_word(page + 2, 3);
    let status = vm.snapshot_changes(&place.join("after"));
    assert_eq!(status.parent, Some(place.join("before")));
    for (name, words) in [("before", [1, 0, 0]), ("between", [2, 2, 0]), ("after", [1, 0, 3])] {
        let (clone, mut agent) = Restore::new(&place, &place.join(name)).ready(name);
        assert_eq!([0, 1, 2].map(|n| agent.word(page + n)), words, "{name}");
        template.facts.check(&mut agent);
        clone.stop();
    }
    vm.stop();
}

#[test]
fn a_guest_that_is_to_know_has_another_generation_id() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) = Boot::new(&place).ready("guest");
    let then = agent.generation();
    checkpoint(&mut vm);
    reset(&mut vm);
    assert_eq!(vm.agent().generation(), then);
    let new = VmReset { new_generation: true, ..VmReset::default() };
    let ids: Vec<[u8; 16]> = (0..2)
        .map(|_| {
            try_reset(&mut vm, new).expect("it can be reset");
            vm.agent().generation()
        })
        .collect();
    assert!(ids[0] != then && ids[1] != then && ids[0] != ids[1], "{ids:?}");
    reset(&mut vm);
    assert_eq!(vm.agent().generation(), then);
    vm.stop();
}

/// What a process has: descriptors, threads, mappings, and memory in KiB.
fn holdings(pid: u32) -> ([usize; 3], [u64; 2]) {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).expect("the process is there").count();
    let counts = [procfs::descriptors(pid).len(), threads, procfs::mappings(pid).len()];
    (counts, ["RssAnon", "RssShmem"].map(|kind| procfs::resident(pid, kind)))
}

/// `COPPICE_RESETS` says how often, if not a thousand times.
#[test]
fn many_resets_leave_nothing_behind() {
    require!(Kvm);
    let rounds = std::env::var("COPPICE_RESETS").ok().and_then(|n| n.parse().ok()).unwrap_or(ROUNDS);
    let (template, place) = (Template::shared(), Place::new());
    let (mut vm, agent) = Restore::new(&place, &template.snapshot).ready("clone");
    let page = template.facts.first_free_page();
    drop(agent);
    until_quiet(&mut vm);
    checkpoint(&mut vm);
    let (mut client, vsock) = (vm.client(), vm.vsock.clone());
    let mut rest = |round: u32| {
        let mut agent = Agent::connect(&vsock);
        agent.write(Pages::run(page + round % 40, 16), u64::from(round));
        drop(agent);
        client.reset(&VmReset::default()).expect("it can be reset")
    };
    // Until all pages that take part have their copies.
    (0..100).for_each(|round| {
        rest(round);
    });
    until_quiet(&mut vm);
    std::thread::sleep(ON_ITS_WAY);
    let (counts, memory) = holdings(vm.process.pid());
    let dirty: u64 = (0..rounds).map(|round| rest(round).dirty_pages).sum();
    println!("{rounds} resets, {} pages each", dirty / u64::from(rounds));
    let mut last = holdings(vm.process.pid());
    // The last streams, and connections to the API, are closed some time later.
    until(&format!("no more is left than {counts:?}"), || {
        last = holdings(vm.process.pid());
        last.0.iter().zip(counts).all(|(now, then)| *now <= then)
    });
    for (now, then) in last.1.iter().zip(memory) {
        assert!(*now < then + 1024, "{then} KiB, and {now} KiB after {rounds} resets");
    }
    template.facts.check(&mut vm.agent());
    vm.stop();
}

/// The answer of an agent whose question was asked before the reset never comes.
#[test]
fn a_reset_right_after_a_question_is_one_all_the_same() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) = Boot::new(&place).vcpus(2).ready("guest");
    agent.set_word(3, 1);
    drop(agent);
    until_quiet(&mut vm);
    checkpoint(&mut vm);
    for round in 0..20 {
        let vsock = vm.vsock.clone();
        let asking = std::thread::spawn(move || {
            let mut agent = Agent::connect(&vsock);
            agent.try_ask(Request::Write { pages: Pages::run(3, 4), value: 8 })
        });
        std::thread::sleep(std::time::Duration::from_micros(500 * round));
        reset(&mut vm);
        // Cut off, or its stream was opened only when the reset was over: then the guest has written since.
        if let Ok(Ok(answer)) = asking.join() {
            assert_eq!(answer, Response::Done);
        }
        reset(&mut vm);
        assert_eq!(vm.agent().word(3), 1);
    }
    vm.stop();
}
