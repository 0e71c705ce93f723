//! Counters: what a VM tells of itself is true, and telling it changes nothing.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::agent::Pages;
use api_spec::client::rest::RestError;
use api_spec::devices::Balloon;
use api_spec::logger::MetricsSink;
use api_spec::stats::{MemoryMap, MemoryStats, PageKind, VmStats};
use api_spec::vm::{Action, ActionType, BootSource};
use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use tests::vm::drive;
use tests::{Boot, PageServer, Place, Restore, Template, TemplateOptions, Vm, require, until};

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
/// What the embedded guest and its devices may touch besides what a test asks for; and what the kernel may map around it.
const SLACK: u64 = MIB;

fn stats(vm: &mut Vm) -> VmStats {
    vm.api().get("/vm/stats").unwrap_or_else(|e| panic!("{}: GET /vm/stats: {e}", vm.name))
}

#[track_caller]
fn memory(vm: &mut Vm) -> MemoryStats {
    let memory = stats(vm).memory;
    let MemoryStats { size_bytes, not_loaded_bytes, shared_bytes, private_bytes } = memory;
    assert_eq!(not_loaded_bytes + shared_bytes + private_bytes, size_bytes, "{memory:?}");
    println!("{}: {memory:?}", vm.name);
    memory
}

fn map(vm: &mut Vm, query: &str) -> Result<MemoryMap, RestError> {
    vm.api().get(&format!("/vm/memory-map{query}"))
}

#[track_caller]
fn about(bytes: u64, expected: u64) {
    assert!((expected..=expected + SLACK).contains(&bytes), "{bytes} bytes; it should be {expected} or little more");
}

fn counts_pages(uffd: bool) {
    require!(Kvm);
    if uffd {
        require!(Userfaultfd);
    }
    let template = Template::make(TemplateOptions { memory_mib: 64, working_set_mib: 16, ..Default::default() });
    let place = Place::new();
    let server = uffd.then(|| PageServer::start(&place, &template.snapshot));
    let restore = |name: &str| match &server {
        Some(server) => Restore::new(&place, &template.snapshot).uffd(server).ready(name),
        None => Restore::new(&place, &template.snapshot).ready(name),
    };
    // The first to touch a page of a page server may get some as its own, which later clones share.
    let (first, mut agent) = restore("first");
    agent.touch(template.facts.working_set);

    let (mut clone, mut agent) = restore("clone");
    let before = memory(&mut clone);
    assert_eq!(before.size_bytes, 64 * MIB);
    assert!(before.not_loaded_bytes > 56 * MIB, "little is loaded: {before:?}");
    agent.touch(Pages::run(0, 8 << 8));
    let read = memory(&mut clone);
    assert!(read.shared_bytes >= before.shared_bytes + 7 * MIB, "8 MiB were read");
    assert!(read.private_bytes < before.private_bytes + SLACK);
    assert!(read.not_loaded_bytes <= before.not_loaded_bytes - 7 * MIB);
    agent.fill(Pages::run(0, 4 << 8), 3);
    let written = memory(&mut clone);
    about(written.private_bytes - read.private_bytes, 4 * MIB);
    about(read.shared_bytes - written.shared_bytes + SLACK / 2, 4 * MIB);
    // What was neither mapped nor read is its own at once.
    let fresh = Pages::run(14 << 8, 2 << 8);
    agent.fill(fresh, 3);
    about(memory(&mut clone).private_bytes - written.private_bytes, 2 * MIB);
    clone.pause();
    let still = memory(&mut clone);
    assert_eq!(memory(&mut clone), still, "looking at it changes nothing");
    check_map(&mut clone, still);
    clone.stop();
    first.stop();
}

/// A map of a guest that stands still adds up, also when it is had in parts.
#[track_caller]
fn check_map(vm: &mut Vm, sum: MemoryStats) {
    let whole = map(vm, "?max_runs=10000").expect("a map");
    assert_eq!(whole.next, None);
    let of = |kind| whole.runs.iter().filter(|run| run.kind == kind).map(|run| run.size_bytes).sum::<u64>();
    let kinds = [PageKind::NotLoaded, PageKind::Shared, PageKind::Private].map(of);
    assert_eq!(kinds, [sum.not_loaded_bytes, sum.shared_bytes, sum.private_bytes]);
    for pair in whole.runs.windows(2) {
        assert!(pair[0].kind != pair[1].kind && pair[0].guest_addr + pair[0].size_bytes == pair[1].guest_addr);
    }
    let (mut runs, mut start) = (Vec::new(), Some(0));
    while let Some(at) = start {
        let part = map(vm, &format!("?start={at}&max_runs=3")).expect("a part");
        assert!(part.runs.len() <= 3 && part.runs[0].guest_addr == at);
        runs.extend(part.runs);
        start = part.next;
    }
    assert_eq!(runs, whole.runs);
}

#[test]
fn a_clone_over_a_file_tells_what_its_memory_consists_of() {
    counts_pages(false);
}

#[test]
fn a_clone_of_a_page_server_tells_what_its_memory_consists_of() {
    counts_pages(true);
}

#[test]
fn all_that_a_booted_guest_has_is_its_own() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) = Boot::new(&place).memory_mib(64).ready("guest");
    agent.fill(Pages::run(0, 8 << 8), 5);
    let before = memory(&mut vm);
    assert!(before.shared_bytes == 0 && before.private_bytes >= 8 * MIB);
    vm.snapshot(&place.join("snapshot"));
    agent.touch(Pages::run(0, 8 << 8));
    let after = memory(&mut vm);
    assert!(after.shared_bytes >= 7 * MIB && after.private_bytes < MIB, "the image is shared from then on");
    vm.stop();
}

#[test]
fn counters_count() {
    require!(Kvm);
    let place = Place::new();
    let image = place.join("disk");
    File::create_new(&image).and_then(|file| file.set_len(MIB)).expect("an image");
    let balloon = Balloon {
        amount_mib: 0,
        deflate_on_oom: false,
        stats_polling_interval_s: 1,
        free_page_reporting: true,
        free_page_hinting: false,
    };
    let boot = Boot::new(&place).vcpus(2).memory_mib(64).balloon(balloon).drive(drive("root", &image));
    let (mut vm, mut agent) = boot.ready("guest");
    let before = stats(&mut vm);
    assert_eq!(before.vcpus.len(), 2);
    assert!(before.vcpus[0].io_out > 0 && before.vcpus[0].mmio_write > 0, "{before:?}");
    assert!(before.page_faults.minor > 0 && before.latencies.boot_us > Some(0) && before.latencies.load_us.is_none());
    assert_eq!((before.drives.len(), before.drives[0].drive_id.as_str()), (1, "root"));
    assert_eq!(before.vsock.map(|vsock| vsock.connections), Some(1), "the test's own");

    agent.fill(Pages::run(0, 1024), 1);
    agent.give_back(Pages::run(0, 512));
    vm.pause();
    vm.resume();
    vm.snapshot(&place.join("snapshot"));
    vm.api().put("/drives/root", &drive("root", &image)).expect_err("the VM was started");
    let mut again = vm.agent();
    again.ping(1);
    let after = stats(&mut vm);
    let (old, new) = (before.vsock.expect("there is one"), after.vsock.expect("there is one"));
    assert!(new.opened > old.opened && new.rx_bytes > old.rx_bytes && new.tx_bytes > old.tx_bytes, "{new:?}");
    assert!(new.rx_packets > old.rx_packets && new.tx_packets > old.tx_packets);
    let balloon = after.balloon.expect("there is one");
    assert_eq!(balloon.discarded_bytes - before.balloon.expect("there is one").discarded_bytes, 512 * PAGE);
    assert!(after.vcpus.iter().map(|vcpu| vcpu.interrupted).sum::<u64>() >= 2, "{:?}", after.vcpus);
    assert!(after.api.requests > before.api.requests + 4);
    assert_eq!(after.api.refused, before.api.refused + 1);
    let latencies = after.latencies;
    let [pause, total] =
        [latencies.snapshot_pause_us, latencies.snapshot_total_us].map(|us| us.expect("there was one"));
    assert!(pause <= total && latencies.pause_us.is_some() && latencies.resume_us.is_some(), "{latencies:?}");
    assert!(after.uptime_us > before.uptime_us && after.console.written_bytes >= before.console.written_bytes);
    vm.stop();
}

#[test]
fn bad_queries_are_refused_by_name() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, _agent) = Boot::new(&place).ready("guest");
    for (query, word) in [
        ("?start=33554432", "start is 33554432; guest memory ends at 33554432"),
        ("?start=100", "start is 100"),
        ("?max_runs=0", "max_runs is 0"),
        ("?max_runs=10001", "max_runs is 10001"),
        ("?begin=0", "`begin`"),
        ("?start=-1", "start is `-1`"),
        ("?start=0&start=0", "start is there twice"),
    ] {
        let refused = map(&mut vm, query).expect_err(query).to_string();
        assert!(refused.contains(word), "{query}: {refused}");
    }
    let refused = vm.api().get::<VmStats>("/vm/stats?x=1").expect_err("no query").to_string();
    assert!(refused.contains("takes no query"), "{refused}");
    vm.stop();
}

/// The samples of the text that Prometheus gets.
fn samples(vm: &mut Vm) -> BTreeMap<String, f64> {
    let text = vm.api().get_text("/metrics").expect("text");
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').expect(line);
            (name.to_owned(), value.parse().expect(line))
        })
        .collect()
}

#[test]
fn prometheus_gets_the_same_also_before_the_start() {
    require!(Kvm);
    let place = Place::new();
    let mut vm = tests::vm::waiting(&place, "guest");
    let before = samples(&mut vm);
    assert!(before["coppice_uptime_seconds"] > 0.0 && before["coppice_api_requests_total"] == 1.0);
    let refused = vm.api().get::<VmStats>("/vm/stats").expect_err("there is none").to_string();
    assert!(refused.contains("there is no VM yet"), "{refused}");
    let source = BootSource { embedded_guest: true, ..Default::default() };
    vm.api().put("/boot-source", &source).expect("it is one");
    start(&mut vm);
    let (stats, samples) = (stats(&mut vm), samples(&mut vm));
    let memory: f64 = samples.iter().filter(|(name, _)| name.starts_with("coppice_memory_bytes")).map(|(_, b)| b).sum();
    assert_eq!(memory as u64, stats.memory.size_bytes);
    assert!(samples["coppice_operation_duration_seconds{operation=\"boot\"}"] > 0.0);
    assert!(samples.keys().any(|name| name == "coppice_vcpu_exits_total{vcpu=\"0\",reason=\"io_out\"}"), "{samples:?}");
    vm.stop();
}

fn action(vm: &mut Vm, action_type: ActionType) -> Result<(), RestError> {
    vm.api().put("/actions", &Action { action_type })
}

fn start(vm: &mut Vm) {
    action(vm, ActionType::InstanceStart).expect("it starts");
}

fn sink(path: &Path) -> MetricsSink {
    let properties = BTreeMap::from([("host".to_owned(), "a".to_owned())]);
    MetricsSink { metrics_path: path.to_owned(), emit_id: true, properties }
}

fn lines(text: &str) -> Vec<Value> {
    assert!(text.is_empty() || text.ends_with('\n'));
    text.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
}

/// How often the guest wrote to a port, summed over lines that each tell what is new.
fn exits(lines: &[Value]) -> u64 {
    lines.iter().map(|line| line["vcpu"]["exit_io_out"].as_u64().expect("a counter")).sum()
}

#[test]
fn a_file_gets_lines_when_asked_and_at_the_end() {
    require!(Kvm);
    let place = Place::new();
    let mut vm = tests::vm::waiting(&place, "guest");
    let refused = action(&mut vm, ActionType::FlushMetrics).expect_err("there is no path").to_string();
    assert!(refused.contains("metrics_path"), "{refused}");
    let refused = vm.api().put("/metrics", &sink(&place.join("none/metrics"))).expect_err("no such directory");
    assert!(refused.to_string().contains("none/metrics"), "{refused}");
    let path = place.join("metrics");
    vm.api().put("/metrics", &sink(&path)).expect("a file can be made");
    let refused = vm.api().put("/metrics", &sink(&place.join("other"))).expect_err("there is one").to_string();
    assert!(refused.contains("metrics_path"), "{refused}");
    vm.api().put("/boot-source", &BootSource { embedded_guest: true, ..Default::default() }).expect("it is one");
    start(&mut vm);
    for _ in 0..2 {
        action(&mut vm, ActionType::FlushMetrics).expect("there is a path");
    }
    let written = lines(&std::fs::read_to_string(&path).expect("a file"));
    assert_eq!(written.len(), 2);
    assert_eq!((&written[0]["properties"]["host"], &written[0]["id"]), (&"a".into(), &"anonymous-instance".into()));
    assert!(written[0]["coppice"]["latencies"]["boot_us"].as_u64() > Some(0));
    vm.pause();
    let counted = stats(&mut vm).vcpus[0].io_out;
    vm.stop();
    let written = lines(&std::fs::read_to_string(&path).expect("a file"));
    assert_eq!((written.len(), exits(&written)), (3, counted), "the last line tells the rest");
    assert!(!place.names().contains(&"other".to_owned()), "what was refused is not made");
}

#[test]
fn a_fifo_gets_lines_and_holds_nobody_up() {
    require!(Kvm);
    let place = Place::new();
    let fifo = place.join("fifo");
    mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("a FIFO can be made");
    let config = place.join("metrics.json");
    let document = serde_json::json!({
        "boot-source": { "embedded_guest": true },
        "metrics": { "metrics_path": fifo },
    });
    std::fs::write(&config, document.to_string()).expect("a file can be made");
    let api = place.join("guest.api");
    let process = tests::Process::start(&place, "guest", tests::binaries::vmm(), |vmm| {
        vmm.arg("--config").arg(&config).arg("--api-sock").arg(&api);
    });
    let mut vm = Vm { process, name: "guest".into(), vsock: place.join("none"), api };
    action(&mut vm, ActionType::FlushMetrics).expect("there is room");
    let mut reader =
        OpenOptions::new().read(true).custom_flags(OFlags::NONBLOCK.bits() as i32).open(&fifo).expect("it can be read");
    let mut text = Vec::new();
    until("a line comes", || {
        let _ = reader.read_to_end(&mut text);
        text.ends_with(b"\n")
    });
    let first = lines(std::str::from_utf8(&text).expect("text"));
    assert!(first.len() == 1 && first[0].get("id").is_none(), "{first:?}");
    // Nobody reads: at some time there is no room, which is said, and the VM goes on.
    let mut refused = None;
    for _ in 0..1000 {
        if let Err(e) = action(&mut vm, ActionType::FlushMetrics) {
            refused = Some(e.to_string());
            break;
        }
    }
    assert!(refused.is_some_and(|refused| refused.contains("no room")));
    stats(&mut vm);
    text.clear();
    let _ = reader.read_to_end(&mut text);
    action(&mut vm, ActionType::FlushMetrics).expect("there is room again");
    let _ = reader.read_to_end(&mut text);
    let written = lines(std::str::from_utf8(&text).expect("text"));
    let last = written.last().expect("a line");
    assert_eq!(last["logger"]["missed_metrics_count"], 1);
    vm.stop();
}

/// Whoever only looks changes nothing.
#[test]
fn looking_changes_nothing() {
    require!(Kvm);
    let template = Template::shared();
    let place = Place::new();
    let (mut vm, mut agent) = Restore::new(&place, &template.snapshot).ready("clone");
    let config = vm.api().get_text("/vm/config").expect("a configuration");
    let mut api = vm.api();
    for _ in 0..100 {
        for path in
            ["/", "/version", "/vm/config", "/machine-config", "/snapshot/status", "/vm/stats", "/vm/memory-map"]
        {
            api.get_text(path).expect(path);
        }
        api.get_text("/metrics").expect("text");
        api.get_text("/vm/memory-map?start=0&max_runs=1").expect("a map");
        api.get_text("/balloon").expect_err("there is none");
    }
    assert_eq!(vm.api().get_text("/vm/config").expect("a configuration"), config);
    template.facts.check(&mut agent);
    vm.stop();
}
