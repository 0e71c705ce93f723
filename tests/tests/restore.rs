//! Restoring a guest: by command line and API, from a file and from a page server.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::agent::Request;
use api_spec::vm::InstanceState;
use std::time::Duration;
use tests::procfs::{self, guest_ram};
use tests::{Agent, PageServer, Place, Process, Restore, Template, TemplateOptions, binaries, require};

/// The plain command of the documentation, with nothing alive but the vmm and the page server.
#[test]
fn a_guest_is_restored_by_one_command_and_a_page_server() {
    require!(Kvm, Userfaultfd);
    let template = Template::make(TemplateOptions::default());
    let place = Place::new();
    let server = PageServer::start(&place, &template.snapshot);
    let process = Process::start(&place, "clone", binaries::vmm(), |vmm| {
        vmm.arg("--restore").arg(template.snapshot.join("snap.json")).arg("--uffd").arg(&server.socket);
    });
    let api = place.join("none");
    let mut vm = tests::Vm { process, name: "clone".into(), vsock: template.recorded_vsock.clone(), api };
    template.facts.check(&mut vm.agent());

    let here = template.place.path().to_str().expect("the path is text");
    let mut alive = procfs::processes_with(here);
    alive.sort();
    let mut expected = [vm.pid(), server.process.pid()];
    expected.sort();
    assert_eq!(alive, expected, "no other process knows this snapshot");
    vm.stop();
}

#[test]
fn every_way_to_restore_gives_the_same_guest() {
    require!(Kvm, Userfaultfd);
    let template = Template::shared();
    let place = Place::new();
    let handler = PageServer::start(&place, &template.snapshot);
    let second_place = Place::new();
    let in_vmm = PageServer::start_in_vmm(&second_place, &template.snapshot.join("snap.json"));
    let from = || Restore::new(&place, &template.snapshot);
    let ways = [
        ("file", from()),
        ("file-api", from().by_api()),
        ("handler", from().uffd(&handler)),
        ("handler-api", from().uffd(&handler).by_api()),
        ("vmm-server", from().uffd(&in_vmm)),
        ("vmm-server-api", from().uffd(&in_vmm).by_api()),
    ];
    for (name, way) in ways {
        let (mut clone, mut agent) = way.clone().ready(name);
        template.facts.check(&mut agent);
        assert_eq!(clone.state(), InstanceState::Running, "{name}");
        clone.pause();
        clone.resume();
        template.facts.check(&mut agent);
        clone.stop();

        let name = format!("{name}-paused");
        let mut clone = way.paused().start(&name);
        assert_eq!(clone.state(), InstanceState::Paused, "{name}");
        clone.resume();
        template.facts.check(&mut clone.agent());
        clone.stop();
    }
}

/// Less than 5 % of guest memory has been read when load has returned, and when the agent has answered.
#[test]
fn restore_reads_only_what_the_guest_touches() {
    require!(Kvm, Userfaultfd);
    let template = Template::make(TemplateOptions { memory_mib: 128, working_set_mib: 64, ..Default::default() });
    let few_kib = 128 * 1024 / 20;
    let place = Place::new();
    let server = PageServer::start(&place, &template.snapshot);
    let check = |when: &str, ram: procfs::Memory| {
        assert!(ram.rss_kib < few_kib, "{when}: {} KiB of guest RAM are mapped", ram.rss_kib);
        let served_kib = server.filled_pages() * 4;
        assert!(served_kib < few_kib, "{when}: {served_kib} KiB were served");
    };
    let mut clone = Restore::new(&place, &template.snapshot).uffd(&server).paused().start("clone");
    assert_eq!(clone.state(), InstanceState::Paused);
    check("loaded", guest_ram(clone.pid()));
    clone.resume();
    let mut agent = clone.agent();
    check("first reply", guest_ram(clone.pid()));
    template.facts.check(&mut agent);
    clone.stop();

    let image = template.snapshot.join("mem.bin");
    let ram = |pid| procfs::memory(pid, |name| name == image.to_str().expect("the path is text"));
    let mut clone = Restore::new(&place, &template.snapshot).paused().start("file-clone");
    assert_eq!(clone.state(), InstanceState::Paused);
    assert!(ram(clone.pid()).rss_kib < few_kib, "loaded: {:?}", ram(clone.pid()));
    clone.resume();
    clone.agent();
    assert!(ram(clone.pid()).rss_kib < few_kib, "first reply: {:?}", ram(clone.pid()));
    clone.stop();
}

/// The vmm's own accesses to guest memory wait for pages as the guest's do: a packet is put into the receive queue, whose
/// pages nobody has touched since the restore, before any vCPU runs.
#[test]
fn the_vmm_itself_may_be_the_first_to_touch_a_page() {
    require!(Kvm, Userfaultfd);
    let template = Template::shared();
    let place = Place::new();
    let server = PageServer::start(&place, &template.snapshot);
    let mut clone = Restore::new(&place, &template.snapshot).uffd(&server).paused().start("clone");
    assert_eq!(clone.state(), InstanceState::Paused);
    let vcpu_times = procfs::still_vcpu_times(clone.pid(), 1);
    let mut early = Agent::connect(&clone.vsock);
    let silence = early.try_ask_within(Duration::from_millis(100), Request::Ping { token: 1 });
    silence.expect_err("a paused guest does not answer");
    assert!(server.session(clone.pid()).uffd_events > 0, "the vmm has touched pages that were not there");
    assert_eq!(procfs::vcpu_times(clone.pid()), vcpu_times, "no vCPU has run");
    drop(early);
    clone.resume();
    let mut agent = clone.agent();
    template.facts.check(&mut agent);
    clone.stop();
}

/// vCPUs that were computing when they were snapshotted use no processor time, and change no byte, until resumed.
#[test]
fn a_guest_loaded_paused_does_not_run() {
    require!(Kvm, Userfaultfd);
    let (template, mut agent, mut parent) =
        Template::make_with_parent(TemplateOptions { vcpus: 2, ..Default::default() });
    agent.burn_start(1);
    let snapshot = template.place.join("burning");
    parent.snapshot(&snapshot);
    parent.stop();
    let before = snapshot::verify::verify(&snapshot).expect("the snapshot is whole");

    let place = Place::new();
    let server = PageServer::start(&place, &snapshot);
    for (name, way) in [
        ("file", Restore::new(&place, &snapshot)),
        ("uffd", Restore::new(&place, &snapshot).uffd(&server)),
        ("api", Restore::new(&place, &snapshot).uffd(&server).by_api()),
    ] {
        let mut clone = way.paused().same_generation().start(name);
        assert_eq!(clone.state(), InstanceState::Paused, "{name}");
        let times = procfs::still_vcpu_times(clone.pid(), 2);
        let mut early = Agent::connect(&clone.vsock);
        let silence = early.try_ask_within(Duration::from_millis(100), Request::Ping { token: 1 });
        silence.expect_err("a paused guest does not answer");
        drop(early);
        assert_eq!(procfs::vcpu_times(clone.pid()), times, "{name}: a vCPU has run");

        clone.resume();
        let mut agent = clone.agent();
        template.facts.check(&mut agent);
        assert!(procfs::vcpu_times(clone.pid())[1] > times[1], "{name}: the burning vCPU goes on");
        agent.burn_stop(1);
        clone.stop();
    }

    // Nobody talks to this one while it stands still, so its memory is still the snapshot's.
    let mut still = Restore::new(&place, &snapshot).paused().same_generation().start("still");
    let again = place.join("again");
    still.snapshot(&again);
    assert_eq!(snapshot::verify::verify(&again).expect("the snapshot is whole").root, before.root);
    still.stop();
}

#[test]
fn three_clones_start_at_once() {
    require!(Kvm, Userfaultfd);
    let template = Template::shared();
    let place = Place::new();
    let server = PageServer::start(&place, &template.snapshot);
    let names = ["one", "two", "three"];
    let clones = names.map(|name| Restore::new(&place, &template.snapshot).uffd(&server).start(name));
    std::thread::scope(|scope| {
        for mut clone in clones {
            scope.spawn(|| {
                template.facts.check(&mut clone.agent());
                clone.stop();
            });
        }
    });
}
