//! What is logged, where and how; and what is not.

#![allow(missing_docs, reason = "tests are named for what they show")]

use serde_json::{Value, json};
use std::fs;
use std::io::Read;
use std::path::Path;
use tests::http::{answers, request, say};
use tests::template::Facts;
use tests::{Boot, Place, Vm, require, until};

/// What nobody but the guest should know.
const SECRET: &str = "a-word-that-is-nobodys-business";

/// The lines of a log for programs. Every one of them must be a document.
fn lines(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).expect("the log can be read");
    let parse =
        |line| serde_json::from_str(line).unwrap_or_else(|e| panic!("a line of the log is no JSON ({e}): {line}"));
    text.lines().map(parse).collect()
}

fn waiting(place: &Place, arguments: &[&str]) -> Vm {
    let mut vm = tests::vm::waiting_with(place, "vmm", |vmm| {
        vmm.args(arguments);
    });
    vm.api();
    vm
}

#[test]
fn lines_for_programs_are_documents_that_tell_the_request() {
    require!(Kvm);
    let place = Place::new();
    let log = place.join("log");
    let path = log.to_str().expect("the path is text");
    let log_options = ["--id", "vm-7", "--log-file", path, "--log-format", "json", "--log-level", "trace"];
    let console = place.join("console");
    let console = ["--console", console.to_str().expect("the path is text")];
    let vm = waiting(&place, &[&log_options[..], &console[..]].concat());
    let source = json!({ "embedded_guest": true, "boot_args": SECRET });
    let mut numbers = Vec::new();
    for (method, path, body) in [
        ("PUT", "/boot-source", source.to_string()),
        ("PUT", "/machine-config", json!({ "mem_size_mib": 16, "vcpu_count": 99 }).to_string()),
        ("PUT", "/actions", json!({ "action_type": "InstanceStart" }).to_string()),
        ("PATCH", "/vm", json!({ "state": "Paused" }).to_string()),
    ] {
        let said = say(&vm.api, &request(method, path, body.as_bytes()));
        let heard = answers(&said);
        numbers
            .push(heard[0].header("x-request-id").expect("an answer has a number").parse::<u64>().expect("a number"));
    }
    let finished = vm.stop();
    assert_eq!((finished.stdout.as_str(), finished.stderr.as_str()), ("", ""), "nothing of it is elsewhere");
    let lines = lines(&log);
    for number in &numbers {
        assert!(lines.iter().any(|line| line["request"] == *number), "request {number}: {lines:?}");
    }
    let booted = lines.iter().find(|line| line["message"].as_str().is_some_and(|words| words.starts_with("booted")));
    assert_eq!(booted.map(|line| &line["request"]), Some(&numbers[2].into()), "{lines:?}");
    for line in &lines {
        assert!(line["time"].is_string() && line["level"].is_string() && line["message"].is_string(), "{line}");
        assert_eq!(line["id"], "vm-7");
    }
    assert!(!fs::read_to_string(&log).expect("the log can be read").contains(SECRET));
}

#[test]
fn the_log_can_be_changed_while_a_guest_runs() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) = Boot::new(&place).memory_mib(16).ready("guest");
    let facts = Facts::gather(&mut agent, 1);
    let log = place.join("log");
    let change = |vm: &mut Vm, body: Value| vm.api().put("/logger", &body);
    change(&mut vm, json!({ "log_path": log, "level": "Debug", "format": "json" })).expect("a file can be a log");
    vm.info();
    assert!(lines(&log).iter().any(|line| line["level"] == "debug"));
    // Whole or not at all: a path that cannot be opened leaves all as it was.
    let refused = change(&mut vm, json!({ "log_path": place.join("none/log"), "level": "Off" })).unwrap_err();
    assert!(refused.to_string().contains("none/log"), "{refused}");
    let before = lines(&log).len();
    vm.info();
    assert!(lines(&log).len() > before);
    change(&mut vm, json!({ "level": "error", "format": "human" })).expect("both can be changed");
    let before = fs::read_to_string(&log).expect("the log can be read");
    vm.info();
    assert_eq!(fs::read_to_string(&log).expect("the log can be read"), before, "nothing to say at that level");
    let config: Value = vm.api().get("/vm/config").expect("it is told");
    let logger = json!({ "log_path": log, "level": "Error", "format": "human" });
    assert_eq!(config["logger"], logger);
    facts.check(&mut agent);
    let finished = vm.stop();
    assert_eq!(finished.code(), 0);
}

/// A FIFO that nobody reads, and one that somebody does.
#[test]
fn a_log_may_be_a_fifo() {
    require!(Kvm);
    let place = Place::new();
    let fifo = place.join("fifo");
    let mode = rustix::fs::Mode::from(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).expect("a FIFO can be made");
    let path = fifo.to_str().expect("the path is text");
    let mut vm = waiting(&place, &["--log-path", path, "--level", "Debug", "--show-level", "--show-log-origin"]);
    // Far more than it holds.
    for _ in 0..2000 {
        vm.info();
    }
    let mut reader = fs::OpenOptions::new().read(true).open(&fifo).expect("it can be read");
    let mut text = vec![0; 4096];
    let read = reader.read(&mut text).expect("there is something");
    let text = String::from_utf8_lossy(&text[..read]).into_owned();
    let line = text.lines().next().expect("a line");
    assert!(line.contains("DEBUG") && line.contains("GET /") && line.contains(".rs:"), "{line}");
    assert_eq!(vm.stop().code(), 0);
}

#[test]
fn whoever_cannot_start_a_vm_is_told_how_it_was_configured() {
    require!(Kvm);
    let place = Place::new();
    let vm = waiting(&place, &[]);
    let put =
        |path: &str, body: Value| answers(&say(&vm.api, &request("PUT", path, body.to_string().as_bytes()))).remove(0);
    let kernel = place.join("no-kernel");
    fs::write(&kernel, "this is none").expect("a file can be made in the test's directory");
    assert_eq!(put("/boot-source", json!({ "kernel_image_path": kernel })).status, 204);
    assert_eq!(put("/machine-config", json!({ "mem_size_mib": 64 })).status, 204);
    let refused = put("/actions", json!({ "action_type": "InstanceStart" }));
    let body: Value = serde_json::from_str(&refused.body).expect("a document");
    assert!(refused.status == 400 && body["fault_message"].as_str().is_some_and(|words| words.contains("no-kernel")));
    assert_eq!(body["config"]["machine-config"]["mem_size_mib"], 64);
    assert!(
        body["config"]["boot-source"]["kernel_image_path"].as_str().is_some_and(|path| path.ends_with("no-kernel"))
    );
    // No other refusal tells as much.
    let other = put("/machine-config", json!({ "vcpu_count": 99 }));
    assert!(other.status == 400 && !other.body.contains("\"config\""), "{}", other.body);
    vm.stop();
}

#[test]
fn what_is_deprecated_is_said_once() {
    require!(Kvm);
    let place = Place::new();
    let vm = waiting(&place, &[]);
    let load = json!({ "snapshot_path": place.join("none"), "mem_file_path": "m", "enable_diff_snapshots": true });
    for _ in 0..3 {
        let heard = answers(&say(&vm.api, &request("PUT", "/snapshot/load", load.to_string().as_bytes())));
        assert_eq!(heard[0].status, 400);
    }
    let log = place.join("vmm.log");
    let count =
        |word: &str| fs::read_to_string(&log).unwrap_or_default().lines().filter(|line| line.contains(word)).count();
    until("it has been said", || count("mem_file_path") > 0);
    let finished = vm.stop();
    for word in ["mem_file_path", "enable_diff_snapshots"] {
        let told = finished.stderr.lines().filter(|line| line.contains(word) && line.contains("deprecated")).count();
        assert_eq!(told, 1, "{word}: {}", finished.stderr);
    }
}
