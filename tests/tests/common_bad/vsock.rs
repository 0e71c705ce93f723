//! Clients of the vsock socket that do not keep to it.

use super::{Random, no_panic, rss_kib};
use api_spec::agent::{AGENT_PORT, Envelope, MAX_BODY, Request, VERSION, encode};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;
use tests::template::Facts;
use tests::{Agent, Boot, Place, Vm, holds_within, require};

struct Rig {
    _place: Place,
    vm: Vm,
    agent: Agent,
    facts: Facts,
}

impl Rig {
    fn new() -> Self {
        let place = Place::new();
        let (vm, mut agent) = Boot::new(&place).memory_mib(16).ready("guest");
        let facts = Facts::gather(&mut agent, 1);
        Rig { _place: place, vm, agent, facts }
    }

    fn connect(&self) -> UnixStream {
        let stream = api_spec::client::unix::connect(&self.vm.vsock, tests::PATIENCE).expect("there is a device");
        stream.set_read_timeout(Some(tests::PATIENCE)).expect("a socket takes a timeout");
        stream.set_write_timeout(Some(tests::PATIENCE)).expect("a socket takes a timeout");
        stream
    }

    /// A stream to the agent.
    fn stream(&self) -> UnixStream {
        let mut stream = self.connect();
        stream.write_all(format!("CONNECT {AGENT_PORT}\n").as_bytes()).expect("it is connected");
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            let mut byte = [0];
            stream.read_exact(&mut byte).expect("the guest accepts");
            line.push(byte[0]);
        }
        assert!(line.starts_with(b"OK "));
        stream
    }

    /// The guest goes on, on its old stream and on a new one.
    #[track_caller]
    fn check(&mut self) {
        self.facts.check(&mut self.agent);
        let mut agent = self.vm.agent();
        assert_eq!(agent.ping(9), 9);
    }

    fn end(mut self) {
        self.check();
        let done = self.vm.stop();
        no_panic(&done.stderr);
        assert!(done.stderr.len() < 200_000, "it logs too much");
    }
}

/// Expects that a connection is closed without an answer.
#[track_caller]
fn is_closed(mut stream: UnixStream, what: &str) {
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Ok(_) => assert_eq!(String::from_utf8_lossy(&answer), "", "{what}"),
        Err(e) => assert_eq!(e.kind(), ErrorKind::ConnectionReset, "{what}"),
    }
}

#[test]
fn first_lines_that_make_no_sense_are_answered_by_closing() {
    require!(Kvm);
    let mut rig = Rig::new();
    for line in [
        "\n",
        "HELLO\n",
        "CONNECT\n",
        "CONNECT x\n",
        "CONNECT -1\n",
        "CONNECT 4294967296\n",
        "CONNECT 1 2\n",
        "CONNECT 99999999999999999999999999999999999999\n",
        "GET / HTTP/1.1\r\n\r\n",
        "CONNECT 5000 and no end of it at all",
    ] {
        let mut stream = rig.connect();
        stream.write_all(line.as_bytes()).expect("it is connected");
        is_closed(stream, line);
    }
    let mut stream = rig.connect();
    stream.write_all(&[0xff; 4096]).expect("it is connected");
    is_closed(stream, "bytes");
    rig.check();
    // Ports that nobody listens on.
    for port in [0, 1, 4999, 5001, 65535, u32::MAX] {
        let mut stream = rig.connect();
        stream.write_all(format!("CONNECT {port}\n").as_bytes()).expect("it is connected");
        is_closed(stream, "port");
    }
    // Nothing at all: closed in the end.
    let silent = rig.connect();
    is_closed(silent, "silence");
    rig.end();
}

#[test]
fn frames_that_make_no_sense_end_their_stream_only() {
    require!(Kvm);
    let mut rig = Rig::new();
    let mut buf = [0; 64];
    let good = encode(&Envelope { id: 1, body: Request::Ping { token: 1 } }, &mut buf).expect("it is short").to_vec();
    let header = |length: u32, version: u16, reserved: u16| {
        [&length.to_le_bytes()[..], &version.to_le_bytes(), &reserved.to_le_bytes()].concat()
    };
    let mut frames = vec![
        header(u32::MAX, VERSION, 0),
        header(MAX_BODY as u32 + 1, VERSION, 0),
        header(4, VERSION + 1, 0),
        header(4, 0, 0),
        header(4, VERSION, 1),
        [header(0, VERSION, 0), good.clone()].concat(),
        [header(4, VERSION, 0), vec![0xff; 4]].concat(),
        [header(MAX_BODY as u32, VERSION, 0), vec![0xff; MAX_BODY]].concat(),
        [header(200, VERSION, 0), vec![0; 200]].concat(),
    ];
    let mut random = Random::new(31);
    for _ in 0..40 {
        frames.push((0..random.below(300)).map(|_| random.next() as u8).collect());
        let mut damaged = good.clone();
        let at = random.below(damaged.len() as u64) as usize;
        damaged[at] = random.next() as u8;
        frames.push(damaged);
    }
    for (i, frame) in frames.iter().enumerate() {
        let mut stream = rig.stream();
        let _ = stream.write_all(frame);
        let _ = stream.write_all(&good);
        // It is answered, or closed; neither has to come at once, and the guest goes on in any case.
        stream.set_read_timeout(Some(Duration::from_millis(20))).expect("a socket takes a timeout");
        let _ = stream.read(&mut [0; 256]);
        drop(stream);
        if i % 10 == 0 {
            rig.check();
        }
    }
    // In the midst of a frame: clients that vanish, and one that waits.
    let waiting: Vec<_> = (1..good.len())
        .map(|cut| {
            let mut stream = rig.stream();
            stream.write_all(&good[..cut]).expect("it is connected");
            stream
        })
        .collect();
    rig.check();
    drop(waiting);
    rig.end();
}

#[test]
fn two_thousand_clients_hold_nobody_up() {
    require!(Kvm);
    let mut rig = Rig::new();
    let before = rss_kib(rig.vm.pid());
    let descriptors = tests::procfs::descriptors(rig.vm.pid()).len();
    // One after another, and leaving at once.
    for i in 0..2000 {
        let mut stream = rig.connect();
        if i % 2 == 0 {
            stream.write_all(format!("CONNECT {AGENT_PORT}\n").as_bytes()).expect("it is connected");
        }
    }
    rig.facts.check(&mut rig.agent);
    let settled = || tests::procfs::descriptors(rig.vm.pid()).len() <= descriptors + 1;
    assert!(holds_within(tests::PATIENCE, settled), "{:?}", tests::procfs::descriptors(rig.vm.pid()).len());
    rig.check();
    // All at once, as many as this process may have.
    let mut crowd = Vec::new();
    while crowd.len() < 900 {
        let Ok(mut stream) = api_spec::client::unix::connect(&rig.vm.vsock, Duration::from_millis(200)) else { break };
        let _ = stream.write_all(format!("CONNECT {AGENT_PORT}\n").as_bytes());
        crowd.push(stream);
    }
    assert!(crowd.len() > 200, "{}", crowd.len());
    rig.facts.check(&mut rig.agent);
    assert_eq!(rig.vm.state(), api_spec::vm::InstanceState::Running);
    drop(crowd);
    rig.facts.check(&mut rig.agent);
    tests::until("new clients are served", || {
        let client = api_spec::client::AgentClient::connect(&rig.vm.vsock, tests::PATIENCE);
        client.and_then(|mut client| client.call(Request::Ping { token: 5 })).is_ok()
    });
    let after = rss_kib(rig.vm.pid());
    assert!(after < before + 16 * 1024, "it has grown from {before} to {after} KiB");
    rig.end();
}

#[test]
fn more_clients_than_descriptors_hold_nobody_up() {
    require!(Kvm);
    let mut rig = Rig::new();
    let pid = rig.vm.pid().to_string();
    let limit = |open: &str| {
        let set = std::process::Command::new("prlimit").args(["--pid", &pid, &format!("--nofile={open}")]).status();
        assert!(set.is_ok_and(|status| status.success()), "a process of ours can be given a limit");
    };
    limit("64:1024");
    let mut crowd = Vec::new();
    while crowd.len() < 200 {
        let Ok(stream) = api_spec::client::unix::connect(&rig.vm.vsock, Duration::from_millis(100)) else { break };
        crowd.push(stream);
    }
    rig.facts.check(&mut rig.agent);
    // The API cannot take the client in, and does not burn the CPU over it.
    let mut waiting = api_spec::client::unix::connect(&rig.vm.api, tests::PATIENCE).expect("the queue takes it");
    let burned = cpu_ms(rig.vm.pid());
    std::thread::sleep(Duration::from_secs(2));
    let burned = cpu_ms(rig.vm.pid()) - burned;
    assert!(burned < 400, "{burned} ms of 2000 ms");
    drop(crowd);
    limit("1024");
    // Nor has it forgotten the client.
    waiting.set_read_timeout(Some(tests::PATIENCE)).expect("a socket takes a timeout");
    waiting.write_all(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n").expect("it is connected");
    let mut answer = String::new();
    waiting.read_to_string(&mut answer).expect("it answers in the end");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    tests::until("new clients are served", || {
        let client = api_spec::client::AgentClient::connect(&rig.vm.vsock, tests::PATIENCE);
        client.and_then(|mut client| client.call(Request::Ping { token: 5 })).is_ok()
    });
    assert_eq!(rig.vm.state(), api_spec::vm::InstanceState::Running);
    rig.end();
}

/// CPU time of a process.
fn cpu_ms(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
    let rest = stat.rsplit(") ").next().unwrap_or_default();
    let ticks: u64 = rest.split(' ').skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    ticks * 10
}
