//! What clients of Firecracker rely on: a session with it that was recorded (`firecracker/session.json`, whose head says how) is
//! played against the vmm, and answers have the same status and shape, but for the differences that `docs/firecracker.md` names.

#![allow(missing_docs, reason = "tests are named for what they show")]

use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use tests::code::Code;
use tests::http::{self, Answer};
use tests::process::{Finished, run_vmm};
use tests::{Place, Process, Vm, binaries, require, taps, until};

const SESSION: &str = include_str!("../firecracker/session.json");
const GUIDE: &str = include_str!("../../docs/firecracker.md");
/// What a phase may need that not every host has.
const TAP: &str = "tap";
/// What a phase may need besides the vmm.
const PAGE_SERVER: &str = "page server";

fn phases() -> Vec<Value> {
    let session: Value = serde_json::from_str(SESSION).expect("the session is JSON");
    session["phases"].as_array().expect("it has phases").clone()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn text(value: &Value) -> &str {
    value.as_str().expect("this is text")
}

fn needs(phase: &Value, what: &str) -> bool {
    list(&phase["needs"]).any(|need| need == what)
}

/// Plays phases, one after the other, in a directory of their own.
fn play(phases: impl Iterator<Item = Value>) {
    let place = Place::new();
    run_vmm(&place, "export", &["guest", "export", place.join("kernel").to_str().expect("the path is text")]);
    for name in ["disk", "disk2", "disk3"] {
        let disk = File::create(place.join(name)).expect("a file can be made in the test's directory");
        disk.set_len(1 << 20).expect("a file can have holes");
    }
    let failures: Vec<String> = phases.flat_map(|phase| Player::start(&place, &phase).play(&phase)).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// A vmm, and who plays a phase against it.
struct Player<'a> {
    place: &'a Place,
    vm: Vm,
    connection: UnixStream,
    _page_server: Option<Process>,
}

impl<'a> Player<'a> {
    /// Starts a fresh vmm, with the flags that Firecracker's clients give.
    fn start(place: &'a Place, phase: &Value) -> Self {
        let name = text(&phase["name"]).replace(|c: char| !c.is_ascii_alphanumeric(), "-");
        let page_server = needs(phase, PAGE_SERVER).then(|| page_server(place));
        let api = place.join("api");
        let process = Process::start(place, &name, binaries::vmm(), |vmm| {
            vmm.arg("--api-sock").arg(&api).args(["--id", &name, "--no-seccomp", "--level", "Warning", "--show-level"]);
            vmm.arg("--show-log-origin").arg("--log-path").arg(place.join("vmm.log"));
            vmm.args(["--start-time-us", "1", "--start-time-cpu-us", "1", "--parent-cpu-time-us", "1"]);
            vmm.args(["--http-api-max-payload-size", "51200"]).args(list(&phase["args"]).map(text));
        });
        let mut vm = Vm { process, name, vsock: PathBuf::new(), api };
        vm.api();
        let connection = http::connect(&vm.api);
        Player { place, vm, connection, _page_server: page_server }
    }

    /// Plays the steps of a phase; what was not as it should be.
    fn play(mut self, phase: &Value) -> Vec<String> {
        let mut failures = Vec::new();
        for step in list(&phase["steps"]) {
            if let Some(vsock) = step["ready"].as_str() {
                self.vm.vsock = self.fill(vsock).into();
                self.vm.agent();
            }
            let answer = self.ask(step);
            if let Err(why) = check(step, &answer) {
                let what = format!("{}, {}: {} {}", phase["name"], step["name"], step["method"], step["path"]);
                failures.push(format!("{what}: {why}; it says {} {}", answer.status, answer.body));
            }
            if expected(step, "closes") == true {
                self.connection = http::connect(&self.vm.api);
            }
        }
        self.vm.stop();
        failures
    }

    fn ask(&mut self, step: &Value) -> Answer {
        let body = match (&step.get("text"), step.get("body")) {
            (Some(words), _) => Some(self.fill(text(words))),
            (None, body) => body.map(|body| self.fill(&body.to_string())),
        };
        let mut head = format!("{} {} HTTP/1.1\r\nHost: localhost\r\n", text(&step["method"]), text(&step["path"]));
        if let Some(body) = &body {
            head += &format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len());
        }
        let said = format!("{head}\r\n{}", body.unwrap_or_default());
        // It may have closed the connection before it has heard all.
        let _ = self.connection.write_all(said.as_bytes());
        http::next(&mut self.connection).unwrap_or_else(|| panic!("{}: no answer to {step}", self.vm.name))
    }

    fn fill(&self, text: &str) -> String {
        let dir = self.place.path().to_str().expect("the path is text");
        text.replace("${DIR}", dir).replace("${LARGE}", &" ".repeat(51201))
    }
}

/// A page server of Firecracker's kind for the memory file `mem`, at `uffd.sock`.
fn page_server(place: &Place) -> Process {
    let mut server = Process::start(place, "pages", Path::new(env!("CARGO_BIN_EXE_copy-handler")), |handler| {
        handler.arg(place.join("uffd.sock")).arg(place.join("mem"));
    });
    until("the page server listens", || {
        server.check_alive();
        server.printed().contains("listening")
    });
    server
}

/// What is expected of an answer: what was recorded, unless it differs on purpose.
fn expected<'s>(step: &'s Value, what: &str) -> &'s Value {
    step["differs"].get(what).unwrap_or(&step[what])
}

fn check(step: &Value, answer: &Answer) -> Result<(), String> {
    if expected(step, "status") != answer.status {
        return Err(format!("not {}, as it should", expected(step, "status")));
    }
    let connection = if expected(step, "closes") == true { "close" } else { "keep-alive" };
    if answer.header("connection") != Some(connection) {
        return Err(format!("the connection is not {connection}"));
    }
    if answer.status >= 400 && answer.fault().is_none() {
        return Err("it does not say why in the way that is documented".into());
    }
    if step["status"] != answer.status {
        return Ok(());
    }
    if answer.header("content-type") != step["type"].as_str() {
        return Err(format!("its type is not {}", step["type"]));
    }
    let body = serde_json::from_str(&answer.body).unwrap_or_default();
    let lacks = lacking(&step["shape"], &body, "");
    let excused: Vec<&str> = list(&step["differs"]["lacks"]).map(text).collect();
    if lacks != excused { Err(format!("it lacks {lacks:?}, and should {excused:?}")) } else { Ok(()) }
}

/// The members that were recorded and that a document lacks, or that are something else in it. One that was null may be absent.
fn lacking(shape: &Value, document: &Value, at: &str) -> Vec<String> {
    let kind = match document {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "list",
        Value::Object(_) => "object",
    };
    match shape {
        Value::Null => Vec::new(),
        Value::String(recorded) if recorded == "null" || recorded == kind => Vec::new(),
        Value::Object(members) if document.is_object() => {
            let member = |(name, shape): (&String, &Value)| lacking(shape, &document[name], &format!("{at}/{name}"));
            members.iter().flat_map(member).collect()
        }
        Value::Array(items) if document.is_array() => match items.first() {
            Some(shape) => {
                // Items may differ in what they have; together they have all.
                let together: serde_json::Map<_, _> = list(document)
                    .filter_map(Value::as_object)
                    .flatten()
                    .map(|(k, v)| (k.clone(), v.clone()))
                    .collect();
                lacking(shape, &Value::Object(together), &format!("{at}/0"))
            }
            None => Vec::new(),
        },
        _ => vec![at.to_owned()],
    }
}

#[test]
fn a_recorded_session_goes_as_it_went() {
    require!(Kvm, Userfaultfd);
    play(phases().into_iter().filter(|phase| !needs(phase, TAP)));
}

#[test]
fn a_recorded_session_with_network_interfaces_goes_as_it_went() {
    require!(Kvm);
    if taps::is_inside("a_recorded_session_with_network_interfaces_goes_as_it_went", &["tap0", "tap1"]) {
        play(phases().into_iter().filter(|phase| needs(phase, TAP)));
    }
}

/// The table in the guide has a row for each difference, and no other row.
#[test]
fn the_guide_names_the_differences() {
    let mut differences: BTreeMap<String, [BTreeSet<String>; 2]> = BTreeMap::new();
    for step in phases().iter().flat_map(|phase| list(&phase["steps"])) {
        if let Some(differs) = step.get("differs") {
            let [theirs, ours] = differences.entry(text(&differs["why"]).to_owned()).or_default();
            theirs.insert(step["status"].to_string());
            ours.insert(differs["status"].to_string());
        }
    }
    let cell = |statuses: &BTreeSet<String>| statuses.iter().cloned().collect::<Vec<_>>().join(", ");
    let row = |(why, [theirs, ours]): (&String, &[BTreeSet<String>; 2])| {
        format!("| {why} | {} | {} |", cell(theirs), cell(ours))
    };
    let expected: BTreeSet<String> = differences.iter().map(row).collect();
    let (_, table) =
        GUIDE.split_once("| difference | Firecracker | Coppice |\n|---|---|---|\n").expect("there is a table");
    let rows: BTreeSet<String> = table.lines().take_while(|line| line.starts_with('|')).map(str::to_owned).collect();
    let missing: Vec<_> = expected.difference(&rows).collect();
    let stale: Vec<_> = rows.difference(&expected).collect();
    assert!(missing.is_empty() && stale.is_empty(), "missing:\n{missing:#?}\nstale:\n{stale:#?}");
}

/// A configuration of a guest that consists of this code.
fn configure(place: &Place, code: &Code) -> Value {
    let kernel = place.join("kernel");
    fs::write(&kernel, code.elf()).expect("there is room");
    json!({ "boot-source": { "kernel_image_path": kernel }, "machine-config": { "vcpu_count": 1, "mem_size_mib": 16 } })
}

/// Runs a guest by a configuration file, until it ends by itself.
fn run_by_file(code: &Code, flags: &[&str]) -> Finished {
    let place = Place::new();
    let file = place.join("vm.json");
    fs::write(&file, configure(&place, code).to_string()).expect("there is room");
    let file = file.to_str().expect("the path is text");
    run_vmm(&place, "guest", &[flags, &[file]].concat())
}

#[test]
fn a_reset_is_an_end_like_any_other_for_clients_of_firecracker() {
    require!(Kvm);
    let mut code = Code::new();
    code.reset();
    let by_file = |flags: &[&str]| run_by_file(&code, flags).code();
    assert_eq!(by_file(&["--config"]), 4);
    assert_eq!(by_file(&["--no-api", "--config-file"]), 0);

    let place = Place::new();
    let config = configure(&place, &code);
    let mut vm = tests::vm::waiting(&place, "guest");
    let mut api = vm.api();
    for part in ["boot-source", "machine-config"] {
        api.put(&format!("/{part}"), &config[part]).expect("this can be configured");
    }
    api.put("/actions", &json!({ "action_type": "InstanceStart" })).expect("it boots");
    assert_eq!(vm.process.finish().code(), 0);
}

#[test]
fn the_time_of_booting_is_told_once_and_on_request() {
    require!(Kvm);
    let mut code = Code::new();
    // Another value, and the one that means something, twice.
    code.store(0xc000_0000, 1, 1).store(0xc000_0000, 123, 1).store(0xc000_0000, 123, 1).reset();
    let told = |flags: &[&str]| {
        let done = run_by_file(&code, &[flags, &["--no-api", "--config-file"]].concat());
        assert_eq!(done.code(), 0, "{}", done.stderr);
        done.stderr.matches("Guest-boot-time").count()
    };
    assert_eq!(told(&["--boot-timer"]), 1);
    assert_eq!(told(&["--level", "Info"]), 0);
}
