//! Signals at any moment: nothing is left behind.

use super::no_panic;
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use tests::procfs::processes_with;
use tests::{Boot, PageServer, Place, Process, Template, TemplateOptions, binaries, require};

/// Moments after the start of a process at which it is sent a signal.
fn moments() -> impl Iterator<Item = (Duration, Signal)> {
    (0..20u64).map(|i| (Duration::from_micros(i * 1500), if i % 2 == 0 { Signal::TERM } else { Signal::INT }))
}

/// What is left in `place`, but for what was there and what the processes said.
fn left(place: &Place) -> Vec<String> {
    let named =
        |name: &String| !name.ends_with(".out") && !name.ends_with(".log") && name != "vm.json" && name != "snapshot";
    place.names().into_iter().filter(named).collect()
}

fn send(process: &Process, signal: Signal) {
    let pid = Pid::from_raw(process.pid() as i32).expect("it has a number");
    // It may have ended, but was not waited for.
    let _ = kill_process(pid, signal);
}

fn at_every_moment(place: &Place, start: impl Fn(&mut Command)) {
    for (moment, signal) in moments() {
        let process = Process::start(place, "vmm", binaries::vmm(), |vmm| start(vmm));
        std::thread::sleep(moment);
        send(&process, signal);
        let done = process.finish();
        no_panic(&done.stderr);
        // Before the vmm had anything to lose, the signal itself ends it.
        let killed = std::os::unix::process::ExitStatusExt::signal(&done.status) == Some(signal.as_raw());
        assert!(killed || done.status.code() == Some(0), "{moment:?}: {done:?}");
        assert_eq!(left(place), [""; 0], "{moment:?}: {done:?}");
    }
}

fn config(place: &Place) -> std::path::PathBuf {
    let path = place.join("vm.json");
    let text = serde_json::json!({
        "boot-source": { "embedded_guest": true },
        "machine-config": { "vcpu_count": 2, "mem_size_mib": 64 },
        "vsock": { "guest_cid": 3, "uds_path": place.join("v") },
    });
    fs::write(&path, text.to_string()).expect("there is room");
    path
}

#[test]
fn a_boot_can_be_interrupted_at_any_moment() {
    require!(Kvm);
    let place = Place::new();
    let config = config(&place);
    at_every_moment(&place, |vmm| {
        vmm.arg("--config").arg(&config).arg("--api-sock").arg(place.join("api"));
    });
}

#[test]
fn a_restore_can_be_interrupted_at_any_moment() {
    require!(Kvm, Userfaultfd);
    let template = Template::make(TemplateOptions { vcpus: 2, memory_mib: 64, working_set_mib: 4 });
    let place = Place::new();
    for uffd in [false, true] {
        let server = uffd.then(|| PageServer::start(&template.place, &template.snapshot));
        at_every_moment(&place, |vmm| {
            vmm.arg("--restore").arg(&template.snapshot).arg("--api-sock").arg(place.join("api"));
            vmm.arg("--vsock").arg(place.join("v"));
            if let Some(server) = &server {
                vmm.arg("--uffd").arg(&server.socket);
            }
        });
        let Some(server) = server else { continue };
        tests::until("the page server has no guests left", || server.metrics().sessions.is_empty());
    }
}

#[test]
fn a_snapshot_can_be_interrupted_at_any_moment() {
    require!(Kvm);
    let place = Place::new();
    for (moment, signal) in moments() {
        let (mut vm, mut agent) = Boot::new(&place).memory_mib(64).ready("guest");
        agent.fill(api_spec::agent::Pages::run(0, 32 << 8), 1);
        vm.api();
        let mut api = api_spec::client::unix::connect(&vm.api, tests::PATIENCE).expect("it takes connections");
        let body = serde_json::json!({ "snapshot_path": place.join("snapshot") }).to_string();
        let head = format!("PUT /snapshot/create HTTP/1.1\r\nContent-Length: {}\r\n\r\n", body.len());
        api.write_all(format!("{head}{body}").as_bytes()).expect("it is connected");
        std::thread::sleep(moment * 4);
        vm.process.signal(signal);
        let done = vm.process.finish();
        no_panic(&done.stderr);
        assert_eq!(done.status.code(), Some(0), "{moment:?}: {done:?}");
        let rest: Vec<_> = left(&place).into_iter().filter(|name| name != "guest.json").collect();
        assert_eq!(rest, [""; 0], "{moment:?}");
        // Whole or absent.
        if place.join("snapshot").exists() {
            snapshot::verify::verify(&place.join("snapshot")).expect("it is whole");
            fs::remove_dir_all(place.join("snapshot")).expect("it is ours");
        }
    }
}

#[test]
fn a_demonstration_can_be_interrupted_at_any_moment() {
    require!(Kvm, Userfaultfd);
    let place = Place::new();
    let temporary = place.join("t");
    let text = temporary.to_string_lossy().into_owned();
    for (moment, signal) in moments() {
        fs::create_dir(&temporary).expect("there is room");
        let demo = Process::start(&place, "demo", binaries::vmm(), |vmm| {
            vmm.args(["demo", "--clones", "1000", "--memory", "16", "--working-set", "1"]).env("TMPDIR", &temporary);
        });
        std::thread::sleep(moment * 30);
        send(&demo, signal);
        let done = demo.finish();
        no_panic(&done.stderr);
        let killed = std::os::unix::process::ExitStatusExt::signal(&done.status) == Some(signal.as_raw());
        if !killed {
            super::refusal("demo", &done, super::FAILED, &["interrupted by a signal"]);
        }
        tests::until("its processes are gone", || processes_with(&text).is_empty());
        assert_eq!(entries(&temporary), 0, "{moment:?}: {done:?}");
        fs::remove_dir(&temporary).expect("it is empty");
    }
}

fn entries(dir: &Path) -> usize {
    fs::read_dir(dir).expect("it is there").count()
}
