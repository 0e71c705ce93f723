//! `vmm ctl` against real vmms: each command, what it prints, how it ends, and that all ways of asking are judged alike.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::client::rest::RestError;
use api_spec::vm::{InstanceState, VmConfig};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use tests::process::Finished;
use tests::{Boot, Place, Process, Vm, binaries, require};

/// Failed, or refused.
const FAILED: i32 = 1;
/// Bad usage.
const BAD_USAGE: i32 = 2;

/// Runs `vmm ctl` with the words of a line in the directory of the test.
fn ctl(place: &Place, line: &str, more: impl FnOnce(&mut Command)) -> Finished {
    let done = Process::start(place, "ctl", binaries::vmm(), |vmm| {
        vmm.arg("ctl").args(line.split_whitespace()).current_dir(place.path()).env_remove("COPPICE_API_SOCK");
        more(vmm);
    })
    .finish();
    assert!(!done.stderr.contains("panicked"), "{done:?}");
    done
}

/// Commands for one vmm.
struct Ctl<'a> {
    place: &'a Place,
    socket: &'a Path,
}

impl Ctl<'_> {
    fn run(&self, line: &str) -> Finished {
        ctl(self.place, line, |vmm| {
            vmm.env("COPPICE_API_SOCK", self.socket);
        })
    }

    /// A command that has nothing to tell.
    #[track_caller]
    fn done(&self, line: &str) {
        let done = self.run(line);
        assert_eq!((done.code(), &*done.stdout, &*done.stderr), (0, "", ""), "{line}");
    }

    /// A command that tells something: as JSON. What people get of it is something else.
    #[track_caller]
    fn told(&self, line: &str) -> Value {
        let (people, programs) = (self.run(line), self.run(&format!("{line} --json")));
        assert_eq!((people.code(), &*people.stderr), (0, ""), "{line}");
        assert_eq!((programs.code(), &*programs.stderr), (0, ""), "{line}");
        assert!(!people.stdout.trim().is_empty() && people.stdout.ends_with('\n'), "{line}: {people:?}");
        assert!(serde_json::from_str::<Value>(&people.stdout).is_err(), "{line}: {}", people.stdout);
        serde_json::from_str(&programs.stdout).unwrap_or_else(|e| panic!("{line}: {e}: {}", programs.stdout))
    }

    /// A command that the vmm refuses, with this word among others.
    #[track_caller]
    fn refused(&self, line: &str, word: &str) -> String {
        let done = self.run(line);
        assert_eq!((done.code(), &*done.stdout), (FAILED, ""), "{line}: {done:?}");
        let said = done.one_line();
        assert!(said.starts_with("vmm: ") && said.contains(word), "{line}: {said}");
        said.to_owned()
    }
}

/// A vmm that waits for instructions, and for which relative paths are in the directory of the test.
fn waiting(place: &Place, name: &str) -> Vm {
    let mut vm = tests::vm::waiting_with(place, name, |vmm| {
        vmm.current_dir(place.path());
    });
    drop(vm.client());
    vm
}

#[test]
fn a_guest_is_configured_started_snapshotted_and_restored() {
    require!(Kvm);
    let place = Place::new();
    fs::write(place.join("disk"), vec![0; 1 << 20]).expect("a file can be made");
    let mut vm = waiting(&place, "first");
    let socket = vm.api.clone();
    let first = Ctl { place: &place, socket: &socket };

    assert_eq!(first.told("info")["state"], "Not started");
    assert!(first.told("version")["firecracker_version"].is_string());
    first.done("machine set --vcpu-count 2 --mem-size-mib 64");
    first.done("machine update --mem-size-mib 32");
    let machine = first.told("machine show");
    assert_eq!((&machine["vcpu_count"], &machine["mem_size_mib"]), (&json!(2), &json!(32)));
    first.done("boot-source set --embedded-guest");
    first.done("drive set data --path-on-host disk --overlay");
    first.done(&format!("vsock set --guest-cid 3 --uds-path {}", vm.vsock.display()));
    first.done("entropy set");
    first.done("serial set --serial-out-path console.log");
    first.refused("balloon show", "balloon");
    first.done("balloon set --amount-mib 0 --stats-polling-interval-s 1");
    assert_eq!(first.told("balloon show")["amount_mib"], 0);
    first.refused("pause", "there is no VM yet");
    first.done("start");
    vm.agent();
    first.refused("start", "started already");

    let config: VmConfig = serde_json::from_value(first.told("config")).expect("it is a configuration");
    assert_eq!((config.machine_config.mem_size_mib, config.drives.len()), (32, 1));
    assert!(config.drives[0].overlay && config.entropy.is_some());
    first.done("balloon update 4");
    assert_eq!(first.told("balloon statistics")["target_mib"], 4);
    first.done("balloon interval 5");
    first.done("drive update data --max-overlay-mib 7");
    assert_eq!(first.told("config")["drives"][0]["max_overlay_mib"], 7);
    first.done("drive update data --max-overlay-mib null");
    first.refused("network update eth0 --tx-rate-limiter {}", "eth0");
    first.refused("fork --into []", "name the vmms that are to have a clone each");
    first.refused("reset", "there is no checkpoint");
    first.refused("loop --reset --count 1", "there is no checkpoint");
    assert!(first.told("checkpoint")["pause_us"].is_u64());
    assert!(first.told("reset --max-dirty-pages 8192")["trace"]["total_ns"].is_u64());
    let rounds = first.told("loop --reset --count 3");
    assert!(rounds["rounds"] == 3 && rounds["reset_us"]["p50"].is_u64(), "{rounds}");
    assert!(first.told("loop --count 2").get("reset_us").is_none());
    assert_eq!(vm.state(), InstanceState::Running);
    first.done("pause");
    assert_eq!(vm.state(), InstanceState::Paused);
    first.done("snapshot create snap");
    assert_eq!(first.told("snapshot status")["state"], "done");
    first.refused("snapshot cancel", "no snapshot is being written");
    first.done("resume");
    assert_eq!(vm.state(), InstanceState::Running);
    first.refused("snapshot create snap", "exists already");

    let mut clone = waiting(&place, "clone");
    let socket = clone.api.clone();
    let second = Ctl { place: &place, socket: &socket };
    fs::write(place.join("elsewhere"), json!({ "uds_path": clone.vsock }).to_string()).expect("a file can be made");
    second.done("snapshot load snap --resume-vm --vsock-override @elsewhere");
    clone.agent();
    second.done("save saved");
    let done = clone.process.finish();
    assert_eq!(done.code(), 0, "{}", done.stderr);
    assert!(place.join("saved/snap.json").exists());
    vm.stop();
}

#[test]
fn counters_are_told_and_written() {
    require!(Kvm);
    let place = Place::new();
    let vm = waiting(&place, "vm");
    let ctl = Ctl { place: &place, socket: &vm.api };
    ctl.done("logger set --log-path vmm.log --level Info --format json");
    ctl.done("metrics set vmm.metrics --emit-id");
    ctl.done("machine set --mem-size-mib 16");
    ctl.done("boot-source set --embedded-guest");
    ctl.done("start");
    ctl.done("metrics flush");
    assert!(fs::metadata(place.join("vmm.metrics")).is_ok_and(|file| file.len() > 0));
    let text = ctl.told("metrics show");
    assert!(text["text"].as_str().is_some_and(|text| text.contains("coppice_uptime_seconds")), "{text}");
    let stats = ctl.told("stats");
    assert_eq!(stats["memory"]["size_bytes"], 16 << 20);
    let people = ctl.run("stats").stdout;
    assert!(people.lines().any(|line| line.ends_with("16777216 (16.0 MiB)")), "{people}");
    let map = ctl.told("memory-map --start 0 --max-runs 2");
    assert!(map["runs"].as_array().is_some_and(|runs| (1..=2).contains(&runs.len())), "{map}");
    let refused = ctl.refused("memory-map --max-runs 0", "max_runs is 0");
    assert_eq!(refused.matches("GET /vm/memory-map").count(), 1, "{refused}");
    assert!(fs::metadata(place.join("vmm.log")).is_ok());
    vm.stop();
}

#[test]
fn a_body_comes_from_the_command_line_a_file_or_standard_input() {
    require!(Kvm);
    let place = Place::new();
    let vm = waiting(&place, "vm");
    let ctl = Ctl { place: &place, socket: &vm.api };
    fs::write(place.join("machine"), r#"{"vcpu_count": 3, "mem_size_mib": 16}"#).expect("a file can be made");
    ctl.done("machine set --body @machine --mem-size-mib 17");
    let machine = ctl.told("machine show");
    assert_eq!((&machine["vcpu_count"], &machine["mem_size_mib"]), (&json!(3), &json!(17)));
    ctl.done(r#"machine set --body {"vcpu_count":4}"#);
    assert_eq!(ctl.told("machine show")["vcpu_count"], 4);
    let done = self::ctl(&place, "machine set --body -", |vmm| {
        let input = fs::File::open(place.join("machine")).expect("just written");
        vmm.arg("--api-sock").arg(&vm.api).stdin(input);
    });
    assert_eq!(done.code(), 0, "{done:?}");
    assert_eq!(ctl.told("machine show")["mem_size_mib"], 16);
    ctl.done(r#"network set eth0 --host-dev-name tap0 --tx-rate-limiter {"ops":{"size":5,"refill_time":6}}"#);
    assert_eq!(ctl.told("config")["network-interfaces"][0]["tx_rate_limiter"]["ops"]["refill_time"], 6);
    fs::write(place.join("none"), "{").expect("a file can be made");
    ctl.refused("machine set --body @none", "none is not what it should be");
    ctl.refused("machine set --body @missing", "cannot read missing: No such file");
    ctl.refused("machine set --body [1]", "a body is a JSON object");
    let unknown = ctl.refused(r#"machine set --body {"speed":9}"#, "unknown field `speed`");
    assert_eq!(unknown.matches("PUT /machine-config").count(), 1, "{unknown}");
    let quiet = ctl.run("machine update --vcpu-count 1 --json");
    assert_eq!(serde_json::from_str::<Value>(&quiet.stdout).expect("it is JSON"), json!({ "done": true }));
    let refused = ctl.run("machine set --vcpu-count 9 --json");
    assert_eq!((refused.code(), &*refused.stdout), (FAILED, ""), "only results go to standard output");
    vm.stop();
}

#[test]
fn bad_usage_ends_with_2_and_one_line() {
    let place = Place::new();
    for (line, word) in [
        ("", "subcommand"),
        ("drive", "subcommand"),
        ("drive set root", "--path-on-host"),
        ("drive set", "NAME"),
        ("nonsense", "nonsense"),
        ("machine set --mem-size-mib much", "--mem-size-mib much: must be a whole number"),
        ("machine set --body {", "--body {: must be JSON"),
        ("info now", "now"),
        ("info --timeout 0", "--timeout"),
        ("completions csh", "csh"),
        ("info", "--api-sock PATH"),
    ] {
        let done = ctl(&place, line, |_| {});
        assert_eq!((done.code(), &*done.stdout), (BAD_USAGE, ""), "{line}: {done:?}");
        assert!(done.one_line().starts_with("vmm: ") && done.one_line().contains(word), "{line}: {}", done.stderr);
    }
    for line in ["--help", "help", "drive set --help", "drive --help", "completions bash"] {
        let done = ctl(&place, line, |_| {});
        assert!(done.code() == 0 && done.stderr.is_empty() && !done.stdout.is_empty(), "{line}: {done:?}");
        let full = ctl(&place, line, |vmm| {
            vmm.stdout(fs::OpenOptions::new().write(true).open("/dev/full").expect("Linux has it"));
        });
        assert!(full.code() == FAILED && full.one_line().contains("cannot write to standard output"), "{line}");
    }
}

#[test]
fn a_vmm_that_is_gone_or_silent_is_named() {
    let place = Place::new();
    let at = |socket: &Path, more: &str| {
        let done = ctl(&place, &format!("info {more}"), |vmm| {
            vmm.arg("--api-sock").arg(socket);
        });
        assert_eq!((done.code(), &*done.stdout), (FAILED, ""), "{done:?}");
        done.one_line().to_owned()
    };
    let socket = place.join("s");
    assert!(at(&socket, "").contains("s: No such file or directory (os error 2); is a vmm running"));
    let listener = UnixListener::bind(&socket).expect("a socket can be made");
    assert!(
        at(&socket, "--timeout 1").ends_with(
            "GET /: no answer within 1 s; the vmm may still do it. Ask what became of it, or give --timeout"
        )
    );
    // The one that gave up still stands in its queue.
    rustix::net::listen(&listener, 0).expect("it may queue fewer");
    assert!(at(&socket, "--timeout 1").ends_with("a vmm is there, and takes no connection; try again, or see its log"));
    drop(listener);
    assert!(at(&socket, "").contains("Connection refused (os error 111); the vmm that made it is gone"));
    assert!(at(&place.join("x".repeat(200)), "").contains("107 bytes"));

    // One that goes while it is asked.
    let listener = UnixListener::bind(place.join("leaving")).expect("a socket can be made");
    let server = std::thread::spawn(move || (0..2).for_each(|_| drop(listener.accept())));
    assert!(at(&place.join("leaving"), "").contains("GET /: the vmm's API does not answer"));
    server.join().expect("it was asked twice");
}

/// What a test of one validator says in each of three ways.
struct Case {
    /// The key in the configuration file.
    key: &'static str,
    /// The path of the call.
    path: &'static str,
    /// What is said.
    body: Value,
    /// The same as a command.
    command: &'static str,
    /// A word of the refusal.
    word: &'static str,
    /// It is refused when the VM is to be started only, since more could have come.
    at_start: bool,
}

fn cases() -> Vec<Case> {
    let case = |key, path, body, command, word| Case { key, path, body, command, word, at_start: false };
    let machine = |body, command, word| case("machine-config", "/machine-config", body, command, word);
    vec![
        machine(json!({"vcpu_count": 9}), "machine set --vcpu-count 9", "vcpu_count is 9"),
        machine(json!({"mem_size_mib": 7}), "machine set --mem-size-mib 7", "mem_size_mib is 7"),
        case(
            "vsock",
            "/vsock",
            json!({"guest_cid": 2, "uds_path": "v"}),
            "vsock set --guest-cid 2 --uds-path v",
            "guest_cid is 2",
        ),
        case(
            "serial",
            "/serial",
            json!({"serial_out_path": "c", "pty": true}),
            "serial set --serial-out-path c --pty",
            "choose one",
        ),
        case(
            "drives",
            "/drives/a/b",
            json!({"drive_id": "a/b", "path_on_host": "d"}),
            "drive set a/b --path-on-host d",
            r#"drive_id is "a/b""#,
        ),
        Case {
            at_start: true,
            ..case("balloon", "/balloon", json!({"amount_mib": 129}), "balloon set --amount-mib 129", "at most 128")
        },
    ]
}

fn refusal(outcome: Result<(), RestError>) -> String {
    match outcome {
        Err(RestError::Refused { message, .. }) => message,
        other => panic!("it should be refused: {other:?}"),
    }
}

#[test]
fn the_same_is_refused_in_the_same_words_whichever_way_it_is_said() {
    require!(Kvm);
    for Case { key, path, body, command, word, at_start } in cases() {
        let place = Place::new();
        let listed = if key == "drives" { json!([body]) } else { body.clone() };
        let config = json!({ "boot-source": { "embedded_guest": true }, key: listed });
        fs::write(place.join("vm.json"), config.to_string()).expect("a file can be made");
        let by_file = Process::start(&place, "file", binaries::vmm(), |vmm| {
            vmm.args(["--config", "vm.json", "--api-sock", "api"]).current_dir(place.path());
        })
        .finish();
        assert_eq!(by_file.code(), FAILED, "{key}: {by_file:?}");

        let mut vm = waiting(&place, "vm");
        let said = vm.api().put(path, &body);
        let (by_rest, by_command) = {
            let ctl = Ctl { place: &place, socket: &vm.api.clone() };
            if at_start {
                said.expect("more could come");
                ctl.done(command);
                ctl.done("boot-source set --embedded-guest");
                let by_rest = refusal(vm.client().start());
                (by_rest, ctl.refused("start", word).replace("PUT /actions: ", ""))
            } else {
                let name = format!("PUT {path}: ");
                let by_command = ctl.refused(command, word);
                assert!(by_command.contains(&name), "{by_command}");
                (refusal(said), by_command.replace(&name, ""))
            }
        };
        assert!(by_rest.contains(word), "{by_rest}");
        assert_eq!(by_command, format!("vmm: {by_rest}"));
        assert_eq!(by_file.one_line(), format!("vmm: {by_rest}"));
        vm.stop();
        let left: Vec<String> = place.names();
        let known = ["ctl.log", "ctl.out", "file.log", "file.out", "vm.json", "vm.log", "vm.out"];
        assert_eq!(left, known, "{key}: something was left behind");
    }
}

#[test]
fn a_shell_completes_commands_and_options() {
    let place = Place::new();
    let script = ctl(&place, "completions bash", |_| {});
    fs::write(place.join("script"), script.stdout).expect("a file can be made");
    for (line, at, expected) in [
        ("vmm ctl dr", 2, "drive"),
        ("vmm ctl drive s", 3, "set"),
        ("vmm ctl drive set x --path-on", 5, "--path-on-host"),
        ("vmm ctl machine set --huge-pages T", 5, "Transparent"),
        ("vmm ctl --api-s", 2, "--api-sock"),
        ("vmm doc", 1, "doctor"),
        ("vmm snapshot v", 2, "verify"),
        ("vmm snapshot fl", 2, "flatten"),
        ("vmm snapshot pack a b --max", 5, "--max-bytes"),
        ("vmm demo --clo", 2, "--clones"),
        ("vmm --resto", 1, "--restore"),
    ] {
        let words: Vec<&str> = line.split(' ').collect();
        let ask = format!(
            "source ./script; COMP_WORDS=({line}); COMP_CWORD={at}; COMP_LINE='{line}'; COMP_POINT=${{#COMP_LINE}}\n\
             $(complete -p vmm | grep -o -- '-F [^ ]*' | cut -c4-) vmm '{}' '{}'; printf '%s\\n' \"${{COMPREPLY[@]}}\"",
            words[at],
            words[at - 1]
        );
        let done = Process::start(&place, "bash", Path::new("bash"), |bash| {
            bash.args(["-c", &ask]).current_dir(place.path());
        })
        .finish();
        assert_eq!(done.stdout.trim(), expected, "{line}: {done:?}");
    }
}

#[test]
fn the_sample_configuration_starts_as_it_stands() {
    require!(Kvm);
    if !tests::taps::is_inside("the_sample_configuration_starts_as_it_stands", &["tap0"]) {
        return;
    }
    let place = Place::new();
    fs::write(place.join("root.img"), vec![0; 1 << 20]).expect("a file can be made");
    let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/vm.json");
    let (vsock, api) = (place.join("guest.vsock"), place.join("api"));
    let process = Process::start(&place, "sample", binaries::vmm(), |vmm| {
        vmm.arg("--config").arg(&sample).arg("--api-sock").arg(&api).current_dir(place.path());
    });
    let mut vm = Vm { process, name: "sample".into(), vsock, api };
    vm.agent();
    let known: VmConfig = vm.client().config().expect("it can be asked for");
    let text = fs::read(&sample).expect("it was just read");
    let said: VmConfig = serde_json::from_slice(&text).expect("it is a configuration");
    assert_eq!((&known.drives, &known.network_interfaces), (&said.drives, &said.network_interfaces));
    assert_eq!((&known.machine_config, &known.balloon), (&said.machine_config, &said.balloon));
    vm.stop();
}

#[test]
fn a_guest_that_was_started_otherwise_is_commanded_as_well() {
    require!(Kvm);
    let place = Place::new();
    let (vm, _agent) = Boot::new(&place).ready("vm");
    let ctl = Ctl { place: &place, socket: &vm.api };
    assert_eq!(ctl.told("info")["state"], "Running");
    let people = ctl.run("info").stdout;
    assert!(people.lines().any(|line| line.split_whitespace().eq(["state", "Running"])), "{people}");
    let config = ctl.run("config").stdout;
    assert!(config.contains("machine-config.mem_size_mib") && config.contains("vsock.guest_cid"), "{config}");
    ctl.refused("machine set --vcpu-count 1", "started already");
    ctl.done("machine update --max-private-mib 500");
    ctl.done("machine update --max-private-mib null");
    assert_eq!(ctl.told("machine show").get("max_private_mib"), None);
    vm.stop();
}
