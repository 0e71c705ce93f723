//! A running guest is forked: others become clones of it, and it goes on.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::agent::Pages;
use api_spec::client::rest::MAX_DESCRIPTORS;
use api_spec::devices::Drive;
use api_spec::fork::{ForkTarget, VmFork, VmForked};
use api_spec::reset::{VmCheckpoint, VmReset};
use api_spec::snapshot::{SnapshotCreate, SnapshotState, VsockOverride};
use api_spec::stats::{PageServerState, PhaseTrace, TracedOperation};
use api_spec::vm::{InstanceState, VmConfig};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketType, sendmsg,
};
use rustix::process::Signal;
use serde_json::json;
use std::fs::File;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use tests::vm::{balloon, drive, waiting};
use tests::{Agent, Boot, PageServer, Place, Restore, Template, TemplateOptions, Vm, procfs, require, until};

const MIB: u64 = 64;
const SEED: u64 = 5;
/// How often a guest is forked where nothing is to grow, unless the environment says otherwise.
const ROUNDS: u32 = 100;
/// Pages that are scattered, and pages in a row.
const SCATTERED: Pages = Pages { first: 2048, count: 100, stride: 7 };
const IN_A_ROW: Pages = Pages { first: 4096, count: 512, stride: 1 };
/// Size of disks, and what is written to them.
const DISK: u64 = 8 << 20;
const ON_DISK: Pages = Pages { first: 10, count: 40, stride: 3 };

/// A vmm with a shell that a guest of [`MIB`] fits.
fn shell(place: &Place, name: &str) -> Vm {
    shell_with(place, name, &[])
}

/// The same with drives of these names.
fn shell_with(place: &Place, name: &str, drives: &[&str]) -> Vm {
    let drive = |name: &&str| json!({ "drive_id": name, "path_on_host": "/nowhere" });
    listening(tests::vm::shell(place, name, 1, MIB, json!({ "drives": drives.iter().map(drive).collect::<Vec<_>>() })))
}

/// A vmm without anything yet.
fn empty(place: &Place, name: &str) -> Vm {
    listening(waiting(place, name))
}

/// Whoever forks a guest does not wait for those who get the clones to listen.
fn listening(mut vm: Vm) -> Vm {
    assert_eq!(vm.state(), InstanceState::NotStarted);
    vm
}

/// The vmm's shell.
fn as_it_is(vm: &Vm) -> ForkTarget {
    ForkTarget { api_sock: vm.api.clone(), vsock_override: None, network_overrides: Vec::new() }
}

/// A vmm without a shell.
fn anew(vm: &Vm) -> ForkTarget {
    ForkTarget { vsock_override: Some(VsockOverride { uds_path: vm.vsock.clone() }), ..as_it_is(vm) }
}

fn into(targets: &[ForkTarget]) -> VmFork {
    VmFork { into: targets.to_vec(), count: None, resume_vm: true, new_generation: true }
}

fn try_fork(vm: &mut Vm, request: &VmFork) -> Result<VmForked, String> {
    vm.client().fork(request).map_err(|e| e.to_string())
}

fn fork(vm: &mut Vm, targets: &[ForkTarget]) -> VmForked {
    let forked = try_fork(vm, &into(targets)).unwrap_or_else(|e| panic!("{}: it is not forked: {e}", vm.name));
    assert!(forked.clones.iter().all(|clone| clone.error.is_none()), "{}: {forked:?}", vm.name);
    forked
}

/// How often something is done over and over.
fn rounds(usual: u32) -> u32 {
    std::env::var("COPPICE_FORKS").map_or(usual, |rounds| rounds.parse().expect("a number"))
}

/// An image of a disk.
fn disk_image(place: &Place, name: &str) -> PathBuf {
    let path = place.join(name);
    File::create(&path).and_then(|file| file.set_len(DISK)).expect("a file can be made in the test's directory");
    path
}

fn overlay(id: &str, image: &Path) -> Drive {
    Drive { overlay: true, ..drive(id, image) }
}

/// The guest writes this to its disk.
fn put_on_disk(agent: &mut Agent, pages: Pages, seed: u64) {
    agent.fill(pages, seed);
    agent.disk_write(pages);
}

/// How much of what is on the guest's disk is not this.
fn wrong_on_disk(agent: &mut Agent, pages: Pages, seed: u64) -> u64 {
    agent.fill(pages, !seed);
    agent.disk_read(pages);
    agent.mismatches(pages, seed)
}

/// How many files of overlays a vmm has open.
fn scratch_files(vm: &Vm) -> usize {
    let is_scratch = |descriptor: &&String| descriptor.contains("(deleted)") && !descriptor.contains("memfd:");
    procfs::descriptors(vm.pid()).iter().filter(is_scratch).count()
}

fn mismatches(agent: &mut Agent, seed: u64) -> [u64; 2] {
    [SCATTERED, IN_A_ROW].map(|pages| agent.mismatches(pages, seed))
}

/// Each of these writes, and sees nothing of what the others write.
fn go_separate_ways(agents: &mut [Agent], before: u64) {
    for (number, agent) in agents.iter_mut().enumerate() {
        assert_eq!(mismatches(agent, before), [0, 0], "number {number} finds what was there");
        let own = before + 1 + number as u64;
        agent.fill(SCATTERED, own);
        agent.fill(IN_A_ROW, own);
    }
    for (number, agent) in agents.iter_mut().enumerate() {
        assert_eq!(mismatches(agent, before + 1 + number as u64), [0, 0], "number {number} finds what it wrote");
    }
}

#[test]
fn a_booted_guest_is_forked_into_a_shell_and_another_vmm_and_all_go_their_own_ways() {
    require!(Kvm);
    let place = Place::new();
    let (mut parent, mut agent) = Boot::new(&place).memory_mib(MIB).ready("parent");
    agent.fill(SCATTERED, SEED);
    agent.fill(IN_A_ROW, SEED);
    let (mut first, mut second) = (shell(&place, "first"), empty(&place, "second"));
    let forked = fork(&mut parent, &[as_it_is(&first), anew(&second)]);
    assert_eq!(forked.copied_pages, 0, "what a booted guest has written is the image of its forks");
    assert_eq!(parent.state(), InstanceState::Running);
    go_separate_ways(&mut [agent, first.agent(), second.agent()], SEED);

    // Once more, now that each of them has pages of its own.
    let mut third = shell(&place, "third");
    let forked = fork(&mut first, &[as_it_is(&third)]);
    let written = u64::from(SCATTERED.count + IN_A_ROW.count);
    assert!((written..written + 200).contains(&forked.copied_pages), "{forked:?}");
    // The parent's end is not that of its clones.
    parent.process.kill();
    go_separate_ways(&mut [first.agent(), third.agent()], SEED + 2);
    for vm in [first, second, third] {
        vm.stop();
    }
}

#[test]
fn a_clone_is_forked_while_it_loads_and_what_it_gave_back_stays_away() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) = Boot::new(&place).memory_mib(MIB).balloon(balloon(0)).ready("original");
    let (given, short) = (Pages::run(8192, 2048), Pages::run(12_000, 5));
    for pages in [SCATTERED, IN_A_ROW, given, short] {
        agent.fill(pages, SEED);
    }
    vm.snapshot(&place.join("snapshot"));
    vm.stop();
    // It has read next to nothing when it is forked.
    let mut clone = Restore::new(&place, &place.join("snapshot")).start("clone");
    let mut early = empty(&place, "early");
    fork(&mut clone, &[anew(&early)]);
    let mut agent = clone.agent();
    agent.give_back(given);
    agent.give_back(short);
    let mut late = empty(&place, "late");
    fork(&mut clone, &[anew(&late)]);
    let (mut early_agent, mut late_agent) = (early.agent(), late.agent());
    assert_eq!([given, short].map(|pages| early_agent.mismatches(pages, SEED)), [0, 0]);
    let resident = procfs::rss_kib(late.pid());
    assert_eq!([given, short].map(|pages| late_agent.checksum(pages)), [0, 0]);
    let grown = procfs::rss_kib(late.pid()).saturating_sub(resident);
    assert!(grown < 4 << 10, "reading 8 MiB that were given back has taken {grown} KiB");
    go_separate_ways(&mut [agent, early_agent, late_agent], SEED);
    // A fork is snapshotted as any other.
    late.snapshot(&place.join("second"));
    let (heir, mut heirs) = Restore::new(&place, &place.join("second")).ready("heir");
    assert_eq!(mismatches(&mut heirs, SEED + 3), [0, 0]);
    assert_eq!(heirs.checksum(given), 0);
    for vm in [clone, early, late, heir] {
        vm.stop();
    }
}

/// A fork of a clone that a page server serves is served by it too, and loses it as any clone does.
#[test]
fn a_clone_of_a_page_server_is_forked_while_it_loads_and_its_fork_outlives_the_server() {
    require!(Kvm, Userfaultfd);
    let (place, template) = (Place::new(), Template::make(TemplateOptions { memory_mib: MIB, ..Default::default() }));
    let server = PageServer::start(&place, &template.snapshot);
    let mut clone = Restore::new(&place, &template.snapshot).uffd(&server).start("clone");
    let (mut early, mut late, mut last) = (shell(&place, "early"), empty(&place, "late"), shell(&place, "last"));
    fork(&mut clone, &[as_it_is(&early)]);
    template.facts.check(&mut early.agent());
    // Scattered over pages that nobody has loaded, and in a row.
    let first = template.facts.first_free_page();
    let (scattered, in_a_row) = (Pages { first, count: 60, stride: 17 }, Pages::run(first + 2048, 600));
    let mut agent = clone.agent();
    agent.fill(scattered, SEED);
    agent.fill(in_a_row, SEED);
    assert!(fork(&mut clone, &[anew(&late)]).copied_pages >= 660);
    assert_eq!(late.page_server().state, PageServerState::Serving);
    let mut agents = [agent, late.agent()];
    for (agent, own) in agents.iter_mut().zip([SEED + 1, SEED + 2]) {
        assert_eq!([scattered, in_a_row].map(|pages| agent.mismatches(pages, SEED)), [0, 0]);
        agent.fill(Pages::run(in_a_row.first, 10), own);
    }
    server.process.kill();
    // What is not served cannot be forked: the new one would have to be served.
    late.until_served(PageServerState::Failover);
    let error = try_fork(&mut late, &into(&[as_it_is(&last)])).expect_err("there is no page server");
    assert!(error.contains("no clone came about") && error.contains("page-server"), "{error}");
    assert_eq!(late.state(), InstanceState::Running);
    template.facts.check(&mut agents[1]);
    assert_eq!(agents[1].mismatches(Pages::run(in_a_row.first, 10), SEED + 2), 0);
    assert_eq!(agents[1].mismatches(Pages::run(in_a_row.first + 10, 590), SEED), 0);
    template.facts.check(&mut agents[0]);
    // Nothing is left of that: another guest fits.
    let server = PageServer::start(&place, &template.snapshot);
    late.until_served(PageServerState::Serving);
    fork(&mut late, &[anew(&last)]);
    assert_eq!(last.agent().mismatches(Pages::run(in_a_row.first, 10), SEED + 2), 0);
    drop(server);
    for vm in [clone, early, late, last] {
        vm.stop();
    }
}

/// Its memory lies in files of a chain, each page at its place.
#[test]
fn a_clone_of_a_chain_of_snapshots_is_forked() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) = Boot::new(&place).memory_mib(MIB).ready("original");
    agent.fill(SCATTERED, SEED);
    agent.fill(IN_A_ROW, SEED + 7);
    vm.snapshot(&place.join("full"));
    agent.fill(IN_A_ROW, SEED);
    vm.snapshot_changes(&place.join("diff"));
    vm.stop();
    let mut clone = Restore::new(&place, &place.join("diff")).start("clone");
    let (mut first, mut second) = (empty(&place, "first"), shell(&place, "second"));
    fork(&mut clone, &[anew(&first)]);
    fork(&mut first, &[as_it_is(&second)]);
    go_separate_ways(&mut [clone.agent(), first.agent(), second.agent()], SEED);
    for vm in [clone, first, second] {
        vm.stop();
    }
}

/// A clone that nobody waits for any more does not begin to run.
#[test]
fn who_is_given_up_has_no_clone() {
    require!(Kvm);
    let place = Place::new();
    let (mut parent, _) = Boot::new(&place).memory_mib(MIB).ready("parent");
    let mut target = shell(&place, "target");
    target.process.signal(Signal::STOP);
    let (mut client, request) = (parent.client(), into(&[as_it_is(&target)]));
    std::thread::scope(|scope| {
        let caller = scope.spawn(move || client.fork(&request).map_err(|e| e.to_string()));
        let is_forked = |trace: &PhaseTrace| trace.operation == TracedOperation::Fork;
        until("the guest is forked", || parent.client().stats().expect("counters").traces.iter().any(is_forked));
        assert!(
            try_fork(&mut parent, &into(&[as_it_is(&target)])).expect_err("one at a time").contains("is being forked")
        );
        parent.process.kill();
        assert!(caller.join().expect("it does not panic").is_err());
    });
    target.process.signal(Signal::CONT);
    assert_eq!(target.state(), InstanceState::NotStarted);
    let (mut other, mut agent) = Boot::new(&place).memory_mib(MIB).ready("other");
    agent.fill(SCATTERED, SEED);
    fork(&mut other, &[anew(&target)]);
    assert_eq!(target.agent().mismatches(SCATTERED, SEED), 0);
    for vm in [target, other] {
        vm.stop();
    }
}

/// Deeper than layers are kept apart, with a marker of each generation.
#[test]
fn forks_of_forks_have_the_markers_of_all_that_came_before_them() {
    require!(Kvm);
    const GENERATIONS: u32 = 10;
    let place = Place::new();
    let marker = |generation: u32| Pages::run(4096 + generation * 40, 40);
    let (mut vm, mut agent) = Boot::new(&place).memory_mib(MIB).ready("parent");
    for generation in 0..GENERATIONS {
        agent.fill(marker(generation), u64::from(generation));
        // The one before is written over in part.
        if generation > 0 {
            agent.fill(Pages::run(marker(generation - 1).first, 3), 100);
        }
        let mut next = shell(&place, &format!("generation{generation}"));
        fork(&mut vm, &[as_it_is(&next)]);
        vm.stop();
        agent = next.agent();
        vm = next;
        for earlier in 0..=generation {
            let pages = marker(earlier);
            let over = if earlier < generation { 3 } else { 0 };
            assert_eq!(agent.mismatches(Pages::run(pages.first, over), 100), 0, "{generation}: {earlier}");
            let rest = Pages::run(pages.first + over, pages.count - over);
            assert_eq!(agent.mismatches(rest, u64::from(earlier)), 0, "{generation}: {earlier}");
        }
        let mappings = procfs::mappings(vm.pid()).len();
        assert!(mappings < 400, "generation {generation} has {mappings} mappings");
    }
    vm.stop();
}

#[test]
fn many_get_a_clone_each_of_one_moment_and_what_fails_is_told_and_harms_nobody() {
    require!(Kvm);
    let place = Place::new();
    let (mut parent, mut agent) = Boot::new(&place).memory_mib(MIB).ready("parent");
    agent.fill(SCATTERED, SEED);
    agent.fill(IN_A_ROW, SEED);
    let mut clones: Vec<Vm> = (0..6).map(|number| shell(&place, &format!("clone{number}"))).collect();
    let mut targets: Vec<ForkTarget> = clones.iter().map(as_it_is).collect();
    // Nobody listens at one, nobody takes connections of another, and one runs a guest already.
    targets.insert(2, ForkTarget { api_sock: place.join("nobody"), ..targets[0].clone() });
    let full = place.join("full");
    let listener = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).expect("a socket");
    rustix::net::bind(&listener, &SocketAddrUnix::new(&full).expect("a short path")).expect("it can be bound");
    rustix::net::listen(&listener, 0).expect("it can listen");
    let _first = UnixStream::connect(&full).expect("there is room for one");
    targets.insert(0, ForkTarget { api_sock: full, ..targets[0].clone() });
    targets.push(ForkTarget { api_sock: parent.api.clone(), ..targets[0].clone() });
    let forked = try_fork(&mut parent, &into(&targets)).expect("most of them are there");
    let errors: Vec<Option<&str>> = forked.clones.iter().map(|clone| clone.error.as_deref()).collect();
    assert!(errors[0].is_some_and(|error| error.contains("timed out")), "{errors:?}");
    assert!(errors[3].is_some_and(|error| error.contains("No such file")), "{errors:?}");
    assert!(errors[8].is_some_and(|error| error.contains("started")), "{errors:?}");
    assert_eq!(errors.iter().flatten().count(), 3, "{errors:?}");
    assert!(forked.clones.iter().map(|clone| &clone.api_sock).eq(targets.iter().map(|target| &target.api_sock)));
    let mut agents: Vec<Agent> = clones.iter_mut().map(Vm::agent).collect();
    agents.push(agent);
    go_separate_ways(&mut agents, SEED);
    let generations: std::collections::BTreeSet<_> = agents.iter_mut().map(Agent::generation).collect();
    assert_eq!(generations.len(), agents.len(), "each has a generation id of its own");
    for vm in clones {
        vm.stop();
    }
    parent.stop();
}

/// What was on a disk is there, and nobody sees what another one writes.
#[test]
fn disks_are_forked_at_the_same_instant_and_all_go_their_own_ways() {
    require!(Kvm);
    let place = Place::new();
    let (image, constant) = (disk_image(&place, "image"), disk_image(&place, "constant"));
    let read_only = Drive { is_read_only: true, ..drive("constant", &constant) };
    let boot = Boot::new(&place).memory_mib(MIB).drive(overlay("data", &image)).drive(read_only);
    let (mut parent, mut agent) = boot.ready("parent");
    put_on_disk(&mut agent, ON_DISK, SEED);
    let mut first = shell_with(&place, "first", &["data", "constant"]);
    let mut second = empty(&place, "second");
    // One without drives makes way for a clone that is built anew, with the sockets of the shell.
    let mut bare = shell(&place, "bare");
    fork(&mut parent, &[as_it_is(&first), anew(&second), as_it_is(&bare)]);
    for (vm, is_used) in [(&first, true), (&bare, false)] {
        assert_eq!(!vm.process.log().contains("do not have the same drives"), is_used, "{}", vm.process.log());
    }
    let mut agents = [agent, first.agent(), second.agent(), bare.agent()];
    let half = Pages { count: ON_DISK.count / 2, ..ON_DISK };
    let rest = Pages { first: ON_DISK.first + half.count * half.stride, ..half };
    for (number, agent) in agents.iter_mut().enumerate() {
        assert_eq!(wrong_on_disk(agent, ON_DISK, SEED), 0, "{number}");
        put_on_disk(agent, half, SEED + 1 + number as u64);
    }
    for (number, agent) in agents.iter_mut().enumerate() {
        assert_eq!(wrong_on_disk(agent, half, SEED + 1 + number as u64), 0, "{number}");
        assert_eq!(wrong_on_disk(agent, rest, SEED), 0, "{number}");
    }
    let bytes = |vm: &mut Vm| vm.client().stats().expect("counters").drives[0].overlay_bytes;
    assert_eq!(bytes(&mut parent), 40 * 4096, "its own is what it has written");
    assert_eq!(bytes(&mut first), 20 * 4096, "and not what it has inherited");
    let config = |vm: &mut Vm| vm.api().get::<VmConfig>("/vm/config").expect("a configuration").drives;
    assert_eq!(config(&mut second), config(&mut parent));

    // A fork of a fork; and the parent's end is not that of its clones.
    let mut third = empty(&place, "third");
    fork(&mut first, &[anew(&third)]);
    parent.process.kill();
    let mut thirds = third.agent();
    assert_eq!(wrong_on_disk(&mut thirds, half, SEED + 2), 0);
    assert_eq!(wrong_on_disk(&mut thirds, rest, SEED), 0);

    // A clone is reset, also to what it was before it was forked.
    let mut client = third.client();
    client.checkpoint(&VmCheckpoint {}).expect("it is remembered");
    for seed in 20..23 {
        put_on_disk(&mut thirds, ON_DISK, seed);
        let fourth = empty(&place, &format!("fourth{seed}"));
        fork(&mut third, &[anew(&fourth)]);
        third.client().reset(&VmReset::default()).expect("it is reset");
        thirds = third.agent();
        assert_eq!(wrong_on_disk(&mut thirds, half, SEED + 2), 0);
        let mut fourth = fourth;
        assert_eq!(wrong_on_disk(&mut fourth.agent(), ON_DISK, seed), 0);
        fourth.stop();
    }

    // And snapshotted: all that it has is there, over the image.
    let snapshot = place.join("snapshot");
    third.snapshot(&snapshot);
    let manifest = snapshot::load::open(&snapshot).expect("it is a snapshot").manifest().clone();
    let named: Vec<&str> =
        manifest.devices.drives.iter().filter_map(|drive| Some(drive.image.as_ref()?.path.as_str())).collect();
    assert_eq!(named, [image.to_str().expect("UTF-8"), constant.to_str().expect("UTF-8")]);
    for vm in [first, second, third] {
        vm.stop();
    }
    let (mut heir, mut heirs) = Restore::new(&place, &snapshot).ready("heir");
    assert_eq!(wrong_on_disk(&mut heirs, half, SEED + 2), 0);
    assert_eq!(wrong_on_disk(&mut heirs, rest, SEED), 0);
    // What was restored is forked in turn, with what the snapshot holds.
    put_on_disk(&mut heirs, Pages { count: 3, ..half }, 30);
    let mut last = empty(&place, "last");
    fork(&mut heir, &[anew(&last)]);
    let mut lasts = last.agent();
    assert_eq!(wrong_on_disk(&mut lasts, Pages { count: 3, ..half }, 30), 0);
    assert_eq!(wrong_on_disk(&mut lasts, rest, SEED), 0);
    for vm in [heir, last] {
        vm.stop();
    }
    assert!(
        std::fs::read(&image).expect("it can be read").iter().all(|byte| *byte == 0),
        "nobody has written to the image"
    );
}

/// A clone of a snapshot of a raw disk has no image.
#[test]
fn a_disk_without_an_image_is_forked() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) =
        Boot::new(&place).memory_mib(MIB).drive(drive("data", &disk_image(&place, "image"))).ready("original");
    put_on_disk(&mut agent, ON_DISK, SEED);
    vm.snapshot(&place.join("snapshot"));
    vm.stop();
    let mut clone = Restore::new(&place, &place.join("snapshot")).start("clone");
    let mut fork_of_it = empty(&place, "fork");
    fork(&mut clone, &[anew(&fork_of_it)]);
    for vm in [&mut clone, &mut fork_of_it] {
        let mut agent = vm.agent();
        assert_eq!(wrong_on_disk(&mut agent, ON_DISK, SEED), 0);
        put_on_disk(&mut agent, ON_DISK, SEED + 1);
    }
    fork_of_it.snapshot(&place.join("second"));
    let (heir, mut agent) = Restore::new(&place, &place.join("second")).ready("heir");
    assert_eq!(wrong_on_disk(&mut agent, ON_DISK, SEED + 1), 0);
    for vm in [clone, fork_of_it, heir] {
        vm.stop();
    }
}

/// What a snapshot has frozen and folds is shared meanwhile.
#[test]
fn a_guest_with_disks_is_forked_while_its_snapshot_is_written() {
    require!(Kvm);
    let place = Place::new();
    let image = disk_image(&place, "image");
    let boot = Boot::new(&place).memory_mib(MIB).drive(overlay("data", &image));
    let (mut parent, mut agent) = boot.ready("parent");
    // Memory that takes a while to write.
    agent.fill(Pages::run(4096, 1024), SEED);
    let pages = |round: u32| Pages { first: 10 + round * 30, ..ON_DISK };
    for round in 0..6 {
        put_on_disk(&mut agent, pages(round), round.into());
        let dir = place.join(format!("snapshot{round}"));
        let slow = SnapshotCreate { max_write_mib_s: Some(10), ..SnapshotCreate::of(dir.clone()) };
        let mut clone = empty(&place, &format!("clone{round}"));
        let mut client = parent.client();
        std::thread::scope(|scope| {
            let written = scope.spawn(move || client.snapshot_create(&slow));
            let is_written =
                |vm: &mut Vm| vm.client().snapshot_status().expect("a status").state == SnapshotState::Writing;
            until("it is being written", || is_written(&mut parent));
            put_on_disk(&mut agent, Pages { count: 7, ..pages(round) }, 100);
            fork(&mut parent, &[anew(&clone)]);
            put_on_disk(&mut agent, Pages { count: 3, ..pages(round) }, 200);
            written.join().expect("it does not panic").expect("it is written");
        });
        let mut clones = clone.agent();
        let after =
            |pages: Pages, from: u32, count: u32| Pages { first: pages.first + from * pages.stride, count, ..pages };
        assert_eq!(wrong_on_disk(&mut clones, Pages { count: 7, ..pages(round) }, 100), 0, "{round}");
        assert_eq!(wrong_on_disk(&mut clones, after(pages(round), 7, 33), round.into()), 0, "{round}");
        assert_eq!(wrong_on_disk(&mut agent, Pages { count: 3, ..pages(round) }, 200), 0, "{round}");
        assert_eq!(wrong_on_disk(&mut agent, after(pages(round), 3, 4), 100), 0, "{round}");
        clone.stop();
        let (heir, mut heirs) = Restore::new(&place, &dir).ready(&format!("heir{round}"));
        assert_eq!(wrong_on_disk(&mut heirs, pages(round), round.into()), 0, "{round}");
        heir.stop();
    }
    parent.stop();
}

#[test]
fn an_image_that_somebody_has_written_is_not_forked() {
    require!(Kvm);
    let place = Place::new();
    let image = disk_image(&place, "image");
    let (mut parent, mut agent) = Boot::new(&place).memory_mib(MIB).drive(overlay("data", &image)).ready("parent");
    put_on_disk(&mut agent, ON_DISK, SEED);
    let target = empty(&place, "target");
    File::options().write(true).open(&image).and_then(|file| file.set_len(DISK)).expect("it can be touched");
    let error = try_fork(&mut parent, &into(&[anew(&target)])).expect_err("it is another image");
    assert!(error.contains("drive data") && error.contains("somebody has written to its image"), "{error}");
    assert_eq!(wrong_on_disk(&mut agent, ON_DISK, SEED), 0);
    for vm in [parent, target] {
        vm.stop();
    }
}

/// Layers are merged in the background, so that neither they nor their descriptors become more; nor do those of forks of forks.
/// `COPPICE_FORKS` says how often.
#[test]
fn disks_that_are_forked_over_and_over_have_few_layers() {
    require!(Kvm);
    let rounds = rounds(45);
    let place = Place::new();
    let image = disk_image(&place, "image");
    let (mut parent, mut agent) = Boot::new(&place).memory_mib(16).drive(overlay("data", &image)).ready("parent");
    let pages = |round: u32| Pages { first: 10 + round % 300 * 5, count: 8, stride: 1 };
    for round in 0..rounds {
        put_on_disk(&mut agent, pages(round), round.into());
        let mut clone = empty(&place, "clone");
        fork(&mut parent, &[anew(&clone)]);
        let layers = scratch_files(&clone);
        assert!(layers <= 9, "fork {round}: {layers} files");
        if round % 15 == 14 {
            let mut clones = clone.agent();
            for earlier in round - 14..=round {
                let last = if earlier < round { 5 } else { 8 };
                assert_eq!(wrong_on_disk(&mut clones, Pages { count: last, ..pages(earlier) }, earlier.into()), 0);
            }
        }
        clone.stop();
    }
    until("few are left", || scratch_files(&parent) <= 7);
    let mut vm = parent;
    for generation in rounds..rounds + 12 {
        put_on_disk(&mut agent, pages(generation), generation.into());
        let mut next = empty(&place, &format!("generation{generation}"));
        fork(&mut vm, &[anew(&next)]);
        vm.stop();
        agent = next.agent();
        vm = next;
        assert!(scratch_files(&vm) <= 9, "generation {generation}");
        assert_eq!(wrong_on_disk(&mut agent, pages(generation), generation.into()), 0);
        assert_eq!(wrong_on_disk(&mut agent, Pages { count: 5, ..pages(rounds - 3) }, (rounds - 3).into()), 0);
    }
    vm.stop();
}

#[test]
fn a_fork_that_cannot_be_is_refused_by_name_and_the_guest_goes_on() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (Template::shared(), Place::new());
    let target = shell(&place, "target");
    let targets = [as_it_is(&target)];
    let refused = |vm: &mut Vm, request: &VmFork, why: &str| {
        let error = try_fork(vm, request).expect_err(why);
        assert!(error.contains(why), "{error}");
        assert_eq!(vm.state(), InstanceState::Running);
    };
    let (image, own) = (disk_image(&place, "image"), disk_image(&place, "own"));
    let raw = Boot::new(&place).memory_mib(16).drive(overlay("root", &image)).drive(drive("data", &own));
    let (mut raw, mut agent) = raw.ready("raw");
    agent.fill(ON_DISK, SEED);
    agent.disk_write(ON_DISK);
    refused(&mut raw, &into(&targets), "drive data: the guest writes its image itself");
    agent.fill(ON_DISK, SEED + 1);
    agent.disk_read(ON_DISK);
    assert_eq!(agent.mismatches(ON_DISK, SEED), 0);
    raw.stop();
    let server = PageServer::start(&place, &template.snapshot);
    let (mut copied, mut agent) = Restore::new(&place, &template.snapshot).copied_from(&server.socket).ready("copied");
    refused(&mut copied, &into(&targets), "a VM into which a page server copies its pages is not forked");
    template.facts.check(&mut agent);
    copied.stop();
    let (mut vm, _) = Boot::new(&place).memory_mib(16).ready("vm");
    refused(&mut vm, &into(&[]), "name the vmms that are to have a clone each");
    refused(&mut vm, &VmFork { count: Some(2), ..into(&targets) }, "count is 2, and into names 1 vmms");
    refused(&mut vm, &into(&[targets[0].clone(), targets[0].clone()]), "is named twice");
    vm.stop();
    let mut waits = empty(&place, "waits");
    let early = try_fork(&mut waits, &into(&targets)).expect_err("there is no VM");
    assert!(early.contains("there is no VM yet"), "{early}");
    for vm in [waits, target] {
        vm.stop();
    }
}

/// Sends bytes and descriptors to a vmm's API, and returns what it says.
fn send(api: &Path, bytes: &[u8], descriptors: usize) -> String {
    let mut stream = UnixStream::connect(api).expect("the API takes connections");
    let null = File::open("/dev/null").expect("there is one");
    let descriptors = vec![null.as_fd(); descriptors];
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS + 1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
    sendmsg(&stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).expect("it is sent");
    let mut answer = [0; 4096];
    let length = stream.read(&mut answer).unwrap_or(0);
    String::from_utf8_lossy(&answer[..length]).into_owned()
}

#[test]
fn descriptors_that_nobody_asked_for_are_closed() {
    require!(Kvm);
    let place = Place::new();
    let mut vm = shell(&place, "vm");
    let before = procfs::descriptors(vm.pid()).len();
    let body =
        json!({ "vmm_version": env!("CARGO_PKG_VERSION"), "vcpu_count": 1, "memory_bytes": MIB << 20, "state_bytes": 4,
        "layers": [{ "map_bytes": 0, "packed": true }], "resume_vm": true, "new_generation": true })
        .to_string();
    let load = format!("PUT /fork/load HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    for round in 0..3 {
        assert!(send(&vm.api, b"GET / HTTP/1.1\r\n\r\n", MAX_DESCRIPTORS).starts_with("HTTP/1.1 200"), "{round}");
        // More than any call takes: it is not heard.
        assert_eq!(send(&vm.api, b"GET / HTTP/1.1\r\n\r\n", MAX_DESCRIPTORS + 1), "", "{round}");
        for (number, why) in [(0, "0 came"), (2, "2 came"), (16, "16 came"), (3, "descriptor 0 is of no use")] {
            let answer = match number {
                0 => vm
                    .api()
                    .put("/fork/load", &serde_json::from_str::<serde_json::Value>(&body).unwrap())
                    .unwrap_err()
                    .to_string(),
                _ => send(&vm.api, load.as_bytes(), number),
            };
            assert!(answer.contains(why), "{number}: {answer}");
        }
        // Never completed.
        let unfinished = UnixStream::connect(&vm.api).expect("the API takes connections");
        drop(unfinished);
    }
    until("all are closed", || procfs::descriptors(vm.pid()).len() <= before);
    // And it is still a shell that a guest can be forked into.
    let (mut parent, mut agent) = Boot::new(&place).memory_mib(MIB).ready("parent");
    agent.fill(SCATTERED, SEED);
    agent.fill(IN_A_ROW, SEED);
    fork(&mut parent, &[as_it_is(&vm)]);
    assert_eq!(mismatches(&mut vm.agent(), SEED), [0, 0]);
    for vm in [vm, parent] {
        vm.stop();
    }
}

/// `COPPICE_FORKS` says how often, if more than a hundred times.
#[test]
fn a_guest_that_is_forked_over_and_over_has_no_more_than_before() {
    require!(Kvm);
    let rounds = rounds(ROUNDS).max(ROUNDS);
    let place = Place::new();
    let (mut parent, mut agent) = Boot::new(&place).memory_mib(MIB).ready("parent");
    let mut used = [0; 4];
    for round in 0..rounds {
        agent.fill(SCATTERED, round.into());
        let mut clone = shell(&place, "clone");
        fork(&mut parent, &[as_it_is(&clone)]);
        assert_eq!(clone.agent().mismatches(SCATTERED, round.into()), 0);
        clone.stop();
        // By then it has what it needs for any number of forks. What is got ready for the next comes and goes.
        if SETTLED.contains(&round) {
            used.iter_mut().zip(use_of(&parent)).for_each(|(used, now)| *used = now.max(*used));
        }
    }
    until("nothing of the last fork is left", || {
        use_of(&parent).iter().zip(used).zip(MORE).all(|((now, then), more)| *now <= then + more)
    });
    parent.stop();
}

/// The forks during which is looked what a VM needs.
const SETTLED: Range<u32> = 16..24;
/// How many more of each there may be afterwards: fewer than if each fork left one, or one page. Code that is used for the first time
/// counts as memory.
const MORE: [u64; 4] = [0, 0, 1, 96];

/// Descriptors, threads, mappings, and KiB of memory.
fn use_of(vm: &Vm) -> [u64; 4] {
    let threads = std::fs::read_dir(format!("/proc/{}/task", vm.pid())).map_or(0, Iterator::count);
    let [descriptors, mappings] = [procfs::descriptors(vm.pid()).len(), procfs::mappings(vm.pid()).len()];
    [descriptors as u64, threads as u64, mappings as u64, procfs::rss_kib(vm.pid())]
}
