//! Machines that are built before it is known which snapshot they are to run.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::agent::{Pages, Request};
use api_spec::devices::{Drive, Entropy};
use api_spec::snapshot::{MemBackend, MemBackendType, SnapshotLoad, VsockOverride};
use api_spec::stats::{TracedOperation, VmStats};
use api_spec::vm::{InstanceState, VmConfig};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use tests::taps::is_inside;
use tests::vm::{drive, shell};
use tests::{Agent, Boot, PageServer, Place, Restore, Template, TemplateOptions, Vm, require, until};

fn load(template: &Template) -> SnapshotLoad {
    SnapshotLoad { resume_vm: true, ..SnapshotLoad::of(template.snapshot.clone()) }
}

/// The phases of the last operation of this kind.
fn phases(vm: &mut Vm, operation: TracedOperation) -> Vec<String> {
    let stats: VmStats = vm.api().get("/vm/stats").expect("a VM that was started has counters");
    let trace = stats.traces.into_iter().find(|trace| trace.operation == operation).expect("it was done");
    assert_eq!(trace.phases.iter().map(|phase| phase.ns).sum::<u64>(), trace.total_ns, "{trace:?}");
    trace.phases.into_iter().map(|phase| phase.name).collect()
}

/// What is built of a machine before a snapshot is loaded into it.
const BUILT: [&str; 4] = ["kvm", "vm", "devices", "threads"];

#[test]
fn a_snapshot_is_loaded_into_a_shell_from_a_file_and_from_a_page_server() {
    require!(Kvm, Userfaultfd);
    let template = Template::make(TemplateOptions { vcpus: 2, memory_mib: 32, working_set_mib: 4 });
    let place = Place::new();
    let server = PageServer::start(&place, &template.snapshot);
    for (name, backend) in
        [("file", None), ("shared", Some(MemBackendType::UffdShared)), ("copied", Some(MemBackendType::Uffd))]
    {
        let mut vm = shell(&place, name, 2, 32, json!({}));
        assert_eq!(vm.state(), InstanceState::NotStarted, "{name}");
        let mem_backend = backend.map(|backend| MemBackend::of(backend, server.socket.clone()));
        vm.api().put("/snapshot/load", &SnapshotLoad { mem_backend, ..load(&template) }).expect("it fits");
        template.facts.check(&mut vm.agent());
        let (built, loaded) = (phases(&mut vm, TracedOperation::Shell), phases(&mut vm, TracedOperation::Load));
        assert!(BUILT.iter().all(|phase| built.iter().any(|built| built == phase)), "{name}: {built:?}");
        assert!(!BUILT.iter().any(|phase| loaded.iter().any(|loaded| loaded == phase)), "{name}: {loaded:?}");
        vm.pause();
        vm.resume();
        template.facts.check(&mut vm.agent());
        vm.stop();
    }
}

#[test]
fn a_snapshot_that_does_not_fit_the_shell_is_loaded_without_and_the_log_says_why() {
    require!(Kvm);
    let template = Template::make(TemplateOptions { vcpus: 1, memory_mib: 16, working_set_mib: 1 });
    let place = Place::new();
    let elsewhere = |vm: &Vm| Some(VsockOverride { uds_path: vm.vsock.with_extension("other") });
    for (name, vcpus, memory_mib, more, moved, why) in [
        ("vcpus", 2, 16, json!({}), false, "the shell has 2 vCPUs and the snapshot 1"),
        ("memory", 1, 32, json!({}), false, "the shell has 32 MiB of memory and the snapshot 16 MiB"),
        (
            "entropy",
            1,
            16,
            json!({ "entropy": {} }),
            false,
            "the shell and the snapshot do not have the same source of entropy",
        ),
        (
            "drives",
            1,
            16,
            json!({ "drives": [{ "drive_id": "root", "path_on_host": "/nowhere" }] }),
            false,
            "the shell and the snapshot do not have the same drives",
        ),
        ("moved", 1, 16, json!({}), true, "vsock_override wants another host side than the shell has"),
    ] {
        let mut vm = shell(&place, name, vcpus, memory_mib, more);
        let vsock_override = if moved { elsewhere(&vm) } else { Some(VsockOverride { uds_path: vm.vsock.clone() }) };
        vm.api()
            .put("/snapshot/load", &SnapshotLoad { vsock_override, ..load(&template) })
            .expect("loaded all the same");
        if moved {
            vm.vsock = vm.vsock.with_extension("other");
        }
        template.facts.check(&mut vm.agent());
        let loaded = phases(&mut vm, TracedOperation::Load);
        assert!(BUILT.iter().all(|phase| loaded.iter().any(|loaded| loaded == phase)), "{name}: {loaded:?}");
        let log = vm.process.log();
        let told = log.lines().filter(|line| line.contains("does not fit the shell")).collect::<Vec<_>>();
        assert!(told.len() == 1 && told[0].contains(why), "{name}: {log}");
        vm.stop();
    }
}

/// Of its drives a shell needs to know no more than how they are called.
#[test]
fn disks_come_with_the_snapshot_into_drives_of_their_names() {
    require!(Kvm);
    const PAGES: Pages = Pages { first: 512, count: 40, stride: 3 };
    const SEED: u64 = 11;
    let place = Place::new();
    let image = |name: &str| {
        let path = place.join(name);
        let made = std::fs::File::create(&path).and_then(|file| file.set_len(8 << 20));
        made.expect("a file can be made in the test's directory");
        path
    };
    // What is asked of the guest's disk is asked of the first.
    let root = Drive { overlay: true, max_overlay_mib: Some(2), ..drive("root", &image("root.img")) };
    let copied = drive("copied", &image("copied.img"));
    let sealed = Drive { is_read_only: true, ..drive("sealed", &image("sealed.img")) };
    let boot = Boot::new(&place).memory_mib(16).drive(root).drive(copied).drive(sealed);
    let (mut original, mut agent) = boot.ready("original");
    agent.fill(PAGES, SEED);
    agent.disk_write(PAGES);
    let snapshot = place.join("snapshot");
    original.snapshot(&snapshot);
    original.stop();

    let wanted = {
        let (mut clone, _) = Restore::new(&place, &snapshot).ready("plain");
        let drives = clone.api().get::<VmConfig>("/vm/config").expect("a configuration").drives;
        clone.stop();
        drives
    };
    let named = |names: [&str; 3]| json!({ "drives": names.map(|name| json!({ "drive_id": name, "path_on_host": "/nowhere" })) });
    let load = SnapshotLoad { resume_vm: true, ..SnapshotLoad::of(snapshot) };
    let mut clones = ["first", "second"].map(|name| shell(&place, name, 1, 16, named(["root", "copied", "sealed"])));
    let mut agents = clones.each_mut().map(|vm| {
        vm.api().put("/snapshot/load", &load).expect("it fits");
        let loaded = phases(vm, TracedOperation::Load);
        assert!(!loaded.iter().any(|phase| BUILT.contains(&phase.as_str())), "the shell was used: {loaded:?}");
        assert_eq!(vm.api().get::<VmConfig>("/vm/config").expect("a configuration").drives, wanted);
        vm.agent()
    });
    let holds = |agent: &mut Agent, seed: u64| {
        agent.fill(PAGES, !seed);
        agent.disk_read(PAGES);
        assert_eq!(agent.mismatches(PAGES, seed), 0, "{seed}");
    };
    for (agent, own) in agents.iter_mut().zip([1, 2]) {
        holds(agent, SEED);
        agent.fill(PAGES, own);
        agent.disk_write(PAGES);
    }
    for ((vm, agent), own) in clones.iter_mut().zip(&mut agents).zip([1, 2]) {
        holds(agent, own);
        let stats = vm.client().stats().expect("counters");
        let ids: Vec<_> = stats.drives.iter().map(|drive| (drive.drive_id.as_str(), drive.overlay_bytes)).collect();
        assert_eq!(ids, [("root", 40 * 4096), ("copied", 0), ("sealed", 0)]);
    }
    // The bound of its overlay is that of the snapshot.
    let [mut first, second] = clones;
    let too_much = Pages::run(512, 600);
    agents[0].fill(too_much, SEED);
    let waits = agents[0].try_ask_within(std::time::Duration::from_millis(200), Request::DiskWrite { pages: too_much });
    assert!(waits.is_err(), "{waits:?}");
    until("the guest stands still", || first.state() == InstanceState::Paused);
    first.stop();
    second.stop();

    // Another order is another machine.
    let mut other = shell(&place, "other", 1, 16, named(["copied", "root", "sealed"]));
    let vsock_override = Some(VsockOverride { uds_path: other.vsock.clone() });
    other.api().put("/snapshot/load", &SnapshotLoad { vsock_override, ..load }).expect("loaded all the same");
    holds(&mut other.agent(), SEED);
    assert!(other.process.log().contains("do not have the same drives"), "{}", other.process.log());
    other.stop();
}

/// A shell has the taps, and the snapshot how much may go over them.
#[test]
fn bounds_come_with_the_snapshot() {
    require!(Kvm);
    if !is_inside("bounds_come_with_the_snapshot", &["tap0", "tap1"]) {
        return;
    }
    let place = Place::new();
    let mac = "02:00:00:00:00:01".parse().expect("a MAC address");
    let bounded = Boot::new(&place).memory_mib(16).network("eth0", "tap0", Some(mac)).entropy().configured(|config| {
        let limit = |size| serde_json::from_value(json!({ "bandwidth": { "size": size, "refill_time": 100 } })).ok();
        config.network_interfaces[0].rx_rate_limiter = limit(1 << 20);
        config.network_interfaces[0].tx_rate_limiter = limit(2 << 20);
        config.entropy = Some(Entropy { rate_limiter: limit(4096) });
    });
    let (mut original, _agent) = bounded.ready("original");
    let snapshot = place.join("snapshot");
    original.snapshot(&snapshot);
    let VmConfig { network_interfaces: mut wanted, entropy, .. } =
        original.api().get("/vm/config").expect("a configuration");
    original.stop();

    wanted[0].host_dev_name = "tap1".into();
    let interface = json!({ "iface_id": "eth0", "host_dev_name": "tap1", "guest_mac": mac });
    let mut clone = shell(&place, "clone", 1, 16, json!({ "network-interfaces": [interface], "entropy": {} }));
    let load = SnapshotLoad { resume_vm: true, ..SnapshotLoad::of(snapshot) };
    clone.api().put("/snapshot/load", &load).expect("it fits");
    let loaded = phases(&mut clone, TracedOperation::Load);
    assert!(!loaded.iter().any(|phase| BUILT.contains(&phase.as_str())), "the shell was used: {loaded:?}");
    let found: VmConfig = clone.api().get("/vm/config").expect("a configuration");
    assert!(wanted[0].rx_rate_limiter.is_some() && entropy.is_some_and(|entropy| entropy.rate_limiter.is_some()));
    assert_eq!((found.network_interfaces, found.entropy), (wanted, entropy));
    clone.agent();
    clone.stop();
}

#[test]
fn a_load_that_is_refused_before_it_touches_the_shell_leaves_it_as_it_was() {
    require!(Kvm);
    let template = Template::make(TemplateOptions { vcpus: 1, memory_mib: 16, working_set_mib: 1 });
    let place = Place::new();
    let mut vm = shell(&place, "shell", 1, 16, json!({}));
    let nowhere = SnapshotLoad::of(place.join("nowhere"));
    vm.api().put("/snapshot/load", &nowhere).expect_err("there is no such snapshot");
    vm.api().put("/snapshot/load", &load(&template)).expect("it fits");
    template.facts.check(&mut vm.agent());
    let loaded = phases(&mut vm, TracedOperation::Load);
    assert!(!loaded.iter().any(|phase| phase == "vm"), "the shell was used: {loaded:?}");
    vm.stop();
}

#[test]
fn a_load_that_fails_in_the_shell_leaves_a_process_that_can_load_without() {
    require!(Kvm);
    let template = Template::make(TemplateOptions { vcpus: 1, memory_mib: 16, working_set_mib: 1 });
    let place = Place::new();
    let mut vm = shell(&place, "shell", 1, 16, json!({}));
    let gone = Some(MemBackend::of(MemBackendType::UffdShared, place.join("nobody")));
    vm.api().put("/snapshot/load", &SnapshotLoad { mem_backend: gone, ..load(&template) }).expect_err("nobody serves");
    assert_eq!(vm.state(), InstanceState::NotStarted);
    let vsock_override = Some(VsockOverride { uds_path: vm.vsock.clone() });
    vm.api().put("/snapshot/load", &SnapshotLoad { vsock_override, ..load(&template) }).expect("it is loaded");
    template.facts.check(&mut vm.agent());
    vm.stop();
}

#[test]
fn a_shell_has_its_console_and_makes_way_for_a_guest_that_is_booted() {
    require!(Kvm);
    let place = Place::new();
    let mut vm = shell(&place, "shell", 1, 16, json!({}));
    let config: Value = vm.api().get("/vm/config").expect("it is told");
    assert_eq!((&config["machine-config"]["mem_size_mib"], &config["vsock"]["guest_cid"]), (&json!(16), &json!(3)));
    let moved = vm.api().put("/serial", &json!({ "serial_out_path": place.join("out") }));
    assert!(moved.expect_err("its console is open").to_string().contains("--console"));
    vm.api().put("/boot-source", &json!({ "embedded_guest": true })).expect("a guest can be booted all the same");
    let vsock = json!({ "guest_cid": 3, "uds_path": vm.vsock });
    vm.api().put("/vsock", &vsock).expect("it can have the socket that the shell has");
    vm.api().put("/actions", &json!({ "action_type": "InstanceStart" })).expect("it boots");
    assert_eq!(vm.agent().ping(5), 5);
    vm.stop();
}

/// Every system call from the request that loads a snapshot into a shell, from a file, until the vCPU enters the guest, on all threads. One
/// that is not here is not needed, or has to be argued for here.
const TO_THE_FIRST_INSTRUCTION: &[(&str, usize)] = &[
    ("recvmsg", 1), // the request
    ("open", 2),    // the snapshot's directory: to read from, and to hold against `vmm snapshot rm`
    ("flock", 1),
    ("openat", 6), // manifest, memory, its digests (twice: are they there; which are trusted), state, stamp
    ("statx", 7),  // each is what the manifest says, and memory still what the stamp says
    // Manifest, stamp, state (twice: it is longer than a buffer); the devices' thread takes note of being woken.
    ("read", 6),
    ("close", 10),
    ("newfstatat", 1), // there is no working set
    ("fcntl", 2),      // the memory file for those who map it and those who count it
    ("mmap", 1),       // guest memory
    ("madvise", 2),    // neither in core dumps nor in children
    ("KVM_SET_CPUID2", 1),
    ("KVM_GET_TSC_KHZ", 1),
    ("KVM_SET_MP_STATE", 1),
    ("KVM_SET_REGS", 1),
    ("KVM_SET_SREGS", 1),
    ("KVM_CHECK_EXTENSION", 1), // how long the XSAVE area is
    ("KVM_SET_XSAVE", 1),
    ("KVM_SET_XCRS", 1),
    ("KVM_SET_DEBUGREGS", 1),
    ("KVM_SET_LAPIC", 1),
    ("KVM_SET_MSRS", 2), // the time-stamp counter is first set far away, so that KVM does not take it for another vCPU's
    ("KVM_SET_VCPU_EVENTS", 1),
    ("KVM_SET_PIT2", 1),
    ("KVM_SET_CLOCK", 1),
    ("KVM_SET_IRQCHIP", 3),
    ("getrandom", 1), // the generation id
    ("write", 4), // the generation is told to the guest; the devices' thread is woken, twice; the guest is told that its streams are gone
    ("sendto", 1), // the answer
    ("KVM_KVMCLOCK_CTRL", 1),
    ("KVM_RUN", 1),
];

#[test]
fn a_load_makes_only_the_system_calls_that_were_reviewed() {
    require!(Kvm);
    if std::process::Command::new("strace").arg("-V").output().is_err() {
        return test_skip::skip("strace is not installed");
    }
    let template = Template::make(TemplateOptions { vcpus: 1, memory_mib: 32, ..Default::default() });
    let place = Place::new();
    // The first load checks what later ones can trust.
    let mut first = shell(&place, "first", 1, 32, json!({}));
    first.api().put("/snapshot/load", &load(&template)).expect("it fits");
    first.stop();

    let mut vm = shell(&place, "shell", 1, 32, json!({}));
    let mut client = vm.api();
    let (pid, calls) = (vm.pid().to_string(), place.join("calls"));
    let mut strace = std::process::Command::new("strace")
        .args(["-f", "-s", "200", "-o"])
        .arg(&calls)
        .args(["-p", &pid])
        .stderr(std::process::Stdio::null())
        .spawn()
        .expect("it starts");
    let traced = || std::fs::read_to_string(&calls).unwrap_or_default();
    // It is there once it has seen the event loop wait.
    until("strace is attached", || traced().contains("epoll_wait"));
    client.put("/snapshot/load", &load(&template)).expect("it fits");
    until("the guest runs", || traced().contains("KVM_RUN"));
    vm.agent().ping(1);
    let _ = strace.kill().and_then(|()| strace.wait());
    vm.stop();

    let text = traced();
    let lines = text.lines().skip_while(|line| !line.contains("PUT /snapshot/load"));
    let mut found: BTreeMap<String, usize> = BTreeMap::new();
    for line in lines {
        // `PID call(arguments) = result`, or the end of one that has begun before. The devices' thread waits for what it is told, and
        // whoever waits for a lock waits as long as it takes: neither is work.
        let Some((name, arguments)) = line.split_once(' ').and_then(|(_, call)| call.trim_start().split_once('('))
        else {
            continue;
        };
        let name = match name {
            "ioctl" => {
                arguments.split([',', ')']).nth(1).and_then(|name| name.split_whitespace().next()).unwrap_or_default()
            }
            "futex" | "epoll_wait" => continue,
            // The standard library of a debug build looks at each descriptor before it is closed.
            "fcntl" if arguments.contains("F_GETFD") => continue,
            name if name.contains(['<', '-', '+']) => continue,
            name => name,
        };
        *found.entry(name.to_owned()).or_default() += 1;
        if name == "KVM_RUN" {
            break;
        }
    }
    assert_eq!(found.get("KVM_RUN"), Some(&1), "{text}");
    for (name, count) in &found {
        let most = TO_THE_FIRST_INSTRUCTION.iter().find(|(known, _)| known == name).map_or(0, |(_, most)| *most);
        assert!(*count <= most, "{name} is called {count} times, and {most} were reviewed:\n{text}");
    }
}

#[test]
fn a_shell_writes_counters_where_its_file_says() {
    require!(Kvm);
    let place = Place::new();
    let counters = place.join("counters");
    let mut vm = shell(&place, "shell", 1, 16, json!({ "metrics": { "metrics_path": counters } }));
    vm.api().put("/actions", &json!({ "action_type": "FlushMetrics" })).expect("there is a place");
    assert!(std::fs::metadata(&counters).is_ok_and(|file| file.len() > 0));
    vm.stop();
}

#[test]
fn what_a_shell_cannot_have_is_refused_by_name() {
    let place = Place::new();
    for (name, more, why) in [
        ("boot", json!({ "boot-source": { "embedded_guest": true } }), "boot-source"),
        (
            "drives",
            json!({ "drives": [{ "drive_id": "a", "path_on_host": "/a" }, { "drive_id": "a", "path_on_host": "/b" }] }),
            "drive",
        ),
        (
            "bounded",
            json!({ "drives": [{ "drive_id": "a", "path_on_host": "/a", "overlay": true, "max_overlay_mib": 1 }] }),
            "drives.a.max_overlay_mib",
        ),
        (
            "network",
            json!({ "network-interfaces": [{ "iface_id": "eth0", "host_dev_name": "tap0", "tx_rate_limiter": {} }] }),
            "eth0: tx_rate_limiter",
        ),
        ("entropy", json!({ "entropy": { "rate_limiter": {} } }), "entropy.rate_limiter"),
        ("saved", json!({ "saved-state": { "path": "/a" } }), "saved-state"),
        (
            "private",
            json!({ "machine-config": { "vcpu_count": 1, "mem_size_mib": 16, "max_private_mib": 4 } }),
            "max_private_mib",
        ),
    ] {
        let ended = shell(&place, name, 1, 16, more).process.finish();
        assert_eq!(ended.code(), 1, "{name}: {}", ended.stderr);
        assert!(ended.one_line().contains(why), "{name}: {}", ended.stderr);
    }
    for arguments in [&["--shell", "s.json"][..], &["--shell", "s", "--api-sock", "a", "--restore", "r"]] {
        let ended = tests::process::run_vmm(&place, "usage", arguments);
        assert_eq!(ended.code(), 2, "{}", ended.stderr);
    }
}
