//! Debian's kernels, unmodified, as guests with an agent: readiness, programs, files, the ends. Runs in the reference
//! machine: `tests/rig/run` is the runner.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::agent::linux::{Exec, Exit};
use api_spec::agent::{GuestKind, Level, Request, Response};
use api_spec::client::AgentClient;
use api_spec::client::agent::AgentError;
use api_spec::vm::{InstanceState, Readiness};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;
use tests::linux::{Console, LinuxAgent, PATIENCE, assert_calm, shell};
use tests::{Boot, Linux, Place, Vm};

/// How a guest is to end.
#[derive(Clone, Copy, Debug)]
enum End {
    PowerOff,
    Reboot,
    /// As a machine whose reset line is pulled.
    Reset,
}

/// A guest becomes ready, serves, and ends as it is told.
fn serves(kernel: &str, vcpus: u8, end: End) {
    let Some(linux) = Linux::guest(kernel) else { return };
    // One as Debian has it, the others as what is packed in that.
    let linux = if vcpus == 1 { linux } else { linux.elf() };
    let place = Place::new();
    let mut vm = Boot::new(&place).linux(&linux, "").vcpus(vcpus).start("guest");
    let up = vm.said("coppice: Linux ");
    println!("Linux {up}");
    assert!(up.starts_with(&format!("{kernel}.")), "{up}");
    assert!(up.contains(&format!(" is up, {vcpus} CPUs, clock kvm-clock, virtio virtio0")), "{up}");
    vm.becomes(Readiness::Full);

    let mut agent = vm.linux_agent();
    match agent.ask(Request::Info) {
        Response::Info(info) => assert_eq!((info.kind, info.vcpus), (GuestKind::Linux, vcpus)),
        other => panic!("{other:?}"),
    }
    let readiness = agent.readiness().expect("it says how ready it is");
    assert_eq!((readiness.level, readiness.failed), (Level::Full, vec![]));
    assert_ne!(agent.generation(), [0; 16], "the agent cannot read the generation id");
    assert_eq!(agent.shell("nproc"), vcpus.to_string());
    runs_programs(&mut agent);
    moves_files(&mut agent);
    survives_nonsense(&vm, &mut agent);
    answers_after_a_pause(&mut vm);

    match end {
        End::PowerOff => agent.power_off().expect("it agrees to be switched off"),
        End::Reboot => agent.reboot().expect("it agrees to start again"),
        End::Reset => {
            agent.set_patience(Duration::from_secs(10));
            let answer = agent.call(Request::Reset);
            assert!(matches!(answer, Err(AgentError::Io(_))), "{answer:?}");
        }
    }
    let code = match end {
        End::PowerOff => 0,
        End::Reboot | End::Reset => 4,
    };
    let done = vm.process.finish_within(PATIENCE);
    assert_calm(&done.stdout);
    assert_eq!((done.code(), done.stderr.as_str()), (code, ""));
}

fn runs_programs(agent: &mut LinuxAgent) {
    let both = Exec { stdin: true, ..shell("tr a-z A-Z; echo aside >&2; exit 7") };
    let done = agent.program(&both, b"through the pipe");
    assert_eq!((done.exit, &*done.stdout, &*done.stderr), (Exit::Code(7), &b"THROUGH THE PIPE"[..], &b"aside\n"[..]));

    let much = vec![b'x'; 300_000];
    let counting = Exec { argv: vec!["wc".into(), "-c".into()], stdin: true, ..Exec::default() };
    assert_eq!(agent.program(&counting, &much).stdout, b"300000\n");

    let killed = agent.program(&shell("kill -TERM $$"), b"");
    assert_eq!(killed.exit, Exit::Signal(15));
    let slow = Exec { deadline_ms: Some(300), ..shell("sleep 1000") };
    assert_eq!(agent.program(&slow, b"").exit, Exit::Deadline);

    let placed = Exec {
        cwd: Some("/tmp".into()),
        env: vec![("GREETING".into(), "hello".into())],
        user: Some("nobody".into()),
        ..shell("echo $(pwd) $GREETING $(id -un)")
    };
    assert_eq!(agent.program(&placed, b"").stdout, b"/tmp hello nobody\n");

    let none = Exec { argv: vec!["/no/such/program".into()], ..Exec::default() };
    let refused = agent.try_run(&none, b"").expect_err("there is no such program").to_string();
    assert!(refused.contains("/no/such/program"), "{refused}");
}

fn moves_files(agent: &mut LinuxAgent) {
    let content: Vec<u8> = (0..200_000_u32).map(|n| (n % 251) as u8).collect();
    agent.put("/tmp/put", 0o640, content.len() as u64, &mut &content[..]).expect("a file can be put");
    assert_eq!(agent.shell("wc -c </tmp/put"), "200000");
    let mut back = Vec::new();
    assert_eq!(agent.get("/tmp/put", &mut back).expect("a file can be got"), 0o640);
    assert!(back == content, "the file came back changed");
    let refused = agent.get("/tmp/none", &mut back).expect_err("there is no such file").to_string();
    assert!(refused.contains("/tmp/none"), "{refused}");
}

/// Whoever does not speak the protocol is cut off, and nobody else notices.
fn survives_nonsense(vm: &Vm, agent: &mut LinuxAgent) {
    const NONSENSE: [&[u8]; 5] = [
        b"GET / HTTP/1.1\r\nHost: guest\r\n\r\n",
        &[0xff; 64],
        // Another version; a body longer than any; a body that is no message.
        &[1, 0, 0, 0, 9, 0, 0, 0, 0],
        &[0xff, 0xff, 0xff, 0x7f, 1, 0, 0, 0],
        &[3, 0, 0, 0, 1, 0, 0, 0, 1, 200, 200],
    ];
    for nonsense in NONSENSE {
        let mut stream = UnixStream::connect(&vm.vsock).expect("the vsock socket takes connections");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket can be limited");
        stream.write_all(&[b"CONNECT 5000\n", nonsense].concat()).expect("bytes can be sent");
        let mut heard = Vec::new();
        // Cut off: an end, or a reset.
        let _ = stream.read_to_end(&mut heard).map_err(|e| assert_ne!(e.kind(), std::io::ErrorKind::WouldBlock));
        assert!(heard.starts_with(b"OK "), "{}", String::from_utf8_lossy(&heard));
    }
    // A hundred connections that say nothing, or go in the middle of a word.
    let starts = [&b"CONNECT 5000\n"[..], b"CONNECT 5000\n\x08\0\0", b"CONN"];
    for start in starts.iter().cycle().take(100) {
        let mut stream = UnixStream::connect(&vm.vsock).expect("the vsock socket takes connections");
        stream.write_all(start).expect("bytes can be sent");
    }
    assert_eq!(agent.shell("echo still here"), "still here");
}

/// Whoever connects to a guest that stands still is answered when it goes on.
fn answers_after_a_pause(vm: &mut Vm) {
    vm.pause();
    let vsock = vm.vsock.clone();
    let (asking, asks) = std::sync::mpsc::channel();
    let asked = std::thread::spawn(move || {
        let mut client = AgentClient::connect(&vsock, PATIENCE).expect("the vsock socket takes connections");
        asking.send(()).expect("the test waits");
        client.call(Request::Ping { token: 7 })
    });
    asks.recv().expect("the thread connects");
    assert_eq!(vm.state(), InstanceState::Paused);
    vm.resume();
    let answer = asked.join().expect("the thread ends").expect("the agent answers");
    assert_eq!(answer, Response::Pong { token: 7 });
}

#[test]
fn one_vcpu_with_6_1_serves_and_powers_off() {
    serves("6.1", 1, End::PowerOff);
}

#[test]
fn two_vcpus_with_6_1_serve_and_reboot() {
    serves("6.1", 2, End::Reboot);
}

#[test]
fn four_vcpus_with_6_1_serve_and_power_off() {
    serves("6.1", 4, End::PowerOff);
}

#[test]
fn one_vcpu_with_6_12_serves_and_reboots() {
    serves("6.12", 1, End::Reboot);
}

#[test]
fn two_vcpus_with_6_12_serve_and_power_off() {
    serves("6.12", 2, End::PowerOff);
}

#[test]
fn four_vcpus_with_6_12_serve_and_are_reset() {
    serves("6.12", 4, End::Reset);
}

#[test]
fn a_start_job_that_fails_degrades_the_guest_and_is_named() {
    let Some(linux) = Linux::guest("6.1") else { return };
    let place = Place::new();
    let files: [(&str, u32, &[u8]); 3] = [
        ("/etc/coppice/start.d/10-good", 0o755, b"#!/bin/sh\ntouch /run/good\n"),
        ("/etc/coppice/start.d/20-broken", 0o755, b"#!/bin/sh\nexit 3\n"),
        ("/etc/coppice/start.d/30-late", 0o755, b"#!/bin/sh\nsleep 2\ntouch /run/late\n"),
    ];
    let mut vm = Boot::new(&place).linux(&linux.elf().with_files(&place, &files), "").start("guest");
    // The agent answers while jobs are running, and says so.
    vm.becomes(Readiness::Agent);
    vm.becomes(Readiness::Degraded);
    let mut agent = vm.linux_agent();
    let readiness = agent.readiness().expect("it says how ready it is");
    assert_eq!((readiness.level, readiness.failed), (Level::Degraded, vec!["20-broken".to_owned()]));
    // Degraded is no failure: the guest serves, all jobs have run, and nothing is left that starts.
    assert_eq!(agent.shell("ls /run/good /run/late"), "/run/good\n/run/late");
    vm.stop();
}

#[test]
fn a_guest_without_an_agent_ends_early_and_says_what_is_missing() {
    let Some(linux) = Linux::guest("6.1") else { return };
    let place = Place::new();
    // As a file that is no program, which is what another archive can make of it.
    let linux = linux.elf().with_files(&place, &[("/guest-agent", 0o644, b"")]);
    let mut vm = Boot::new(&place).linux(&linux, "").start("guest");
    let missing = vm.said("coppice: no /guest-agent");
    assert!(missing.contains("resources/linux/build --agent"), "{missing}");
    assert_eq!(vm.info().readiness, None);
    assert_eq!(vm.process.finish_within(PATIENCE).code(), 0);
}
