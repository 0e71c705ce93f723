//! Linux guests with a root file system: systemd, and a Python interpreter that has warmed up. Runs in the reference machine:
//! `tests/rig/run` is the runner.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::agent::Level;
use api_spec::vm::Readiness;
use std::collections::HashSet;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use tests::linux::{Console, LinuxAgent, PATIENCE, assert_calm};
use tests::{Boot, Linux, PageServer, Place, Restore, Vm, holds_within};

/// A service with a state that only its own memory has, on vsock port 6000: who it is, how many requests it had, what it made up
/// when it started, and the next number of its random generator.
const SERVICE: &str = "
import os, random, signal, socket
made_up = random.getrandbits(64)
signal.signal(signal.SIGHUP, lambda *_: random.seed())
listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
listener.bind((socket.VMADDR_CID_ANY, 6000))
listener.listen()
requests = 0
while True:
    peer, _ = listener.accept()
    try:
        peer.recv(16)
        requests += 1
        peer.sendall(f'{os.getpid()} {requests} {made_up:x} {random.getrandbits(64):x}'.encode())
        peer.close()
    except OSError:
        pass
";
/// Has the service seed its generator again.
const HOOK: &str = "#!/bin/sh\nkill -HUP $(cat /run/service.pid)\n";

/// What the service answers.
#[derive(Debug)]
struct Answer {
    pid: u32,
    requests: u64,
    made_up: String,
    random: String,
}

/// Asks the service, once it listens.
fn ask(vm: &Vm) -> Answer {
    let mut heard = String::new();
    let answered = holds_within(PATIENCE, || {
        heard.clear();
        let mut stream = UnixStream::connect(&vm.vsock).expect("the vsock socket takes connections");
        stream.set_read_timeout(Some(PATIENCE)).expect("a socket can be limited");
        stream.write_all(b"CONNECT 6000\n?").is_ok() && stream.read_to_string(&mut heard).is_ok() && !heard.is_empty()
    });
    assert!(answered, "{}: the service does not answer", vm.name);
    let (greeting, answer) = heard.split_once('\n').expect("the device greets first");
    assert!(greeting.starts_with("OK "), "{heard}");
    let mut words = answer.split(' ').map(str::to_owned);
    let mut word = || words.next().expect("the service answers with four words");
    Answer {
        pid: word().parse().expect("a process id"),
        requests: word().parse().expect("a number"),
        made_up: word(),
        random: word(),
    }
}

/// A guest that has started from an overlay over the root image, with more files in it.
fn boot(
    place: &Place,
    linux: Linux,
    files: &[(&str, u32, &[u8])],
    words: &str,
    readiness: Readiness,
) -> (Vm, LinuxAgent) {
    let root = linux.root_disk();
    let linux = linux.elf().with_files(place, files);
    let words = format!("quiet systemd.show_status=false {words}");
    let mut vm = Boot::new(place).linux(&linux, &words).memory_mib(256).drive(root).start("parent");
    vm.becomes(readiness);
    let mut agent = vm.linux_agent();
    // Ready is when nothing is left that starts.
    assert_eq!(agent.shell("cat /proc/1/comm; systemctl list-jobs --no-legend"), "systemd");
    assert_eq!(agent.shell("grep ' / ' /proc/mounts | cut -d' ' -f1"), "/dev/vda");
    (vm, agent)
}

fn put(agent: &mut LinuxAgent, path: &str, mode: u32, content: &str) {
    agent.put(path, mode, content.len() as u64, &mut content.as_bytes()).unwrap_or_else(|e| panic!("{path}: {e}"));
}

/// The first random number of a fresh interpreter.
fn fresh_random(agent: &mut LinuxAgent) -> String {
    agent.shell("python3 -c 'import random; print(random.getrandbits(64))'")
}

fn start_time(agent: &mut LinuxAgent, pid: u32) -> String {
    agent.shell(&format!("cut -d' ' -f22 /proc/{pid}/stat"))
}

/// How much of two seconds a guest with one vCPU was busy, in per cent.
fn busy(agent: &mut LinuxAgent) -> u64 {
    let both = agent.shell("head -n 1 /proc/stat; sleep 2; head -n 1 /proc/stat");
    let ticks =
        |line: &str| -> Vec<u64> { line.split_ascii_whitespace().skip(1).map_while(|n| n.parse().ok()).collect() };
    let [before, after] = both.lines().map(ticks).collect::<Vec<_>>().try_into().expect("two lines");
    let passed: Vec<u64> = after.iter().zip(&before).map(|(after, before)| after - before).collect();
    let (all, idle): (u64, u64) = (passed.iter().sum(), passed[3] + passed[4]);
    (all - idle) * 100 / all.max(1)
}

#[test]
fn a_clone_answers_from_the_interpreter_that_was_in_the_snapshot() {
    let Some(linux) = Linux::guest("6.12") else { return };
    let place = Place::new();
    let image = linux.root.clone();
    let before = std::fs::read(&image).expect("the root image can be read");
    let (mut vm, mut agent) = boot(&place, linux, &[], "", Readiness::Full);
    put(&mut agent, "/srv/service.py", 0o644, SERVICE);
    agent.shell("mkdir -p /etc/coppice/hooks.d/resumed");
    put(&mut agent, "/etc/coppice/hooks.d/resumed/10-service", 0o755, HOOK);
    let service = agent.leave("echo $$ >/run/service.pid; exec python3 /srv/service.py").pid;
    let warm = ask(&vm);
    assert_eq!((warm.pid, warm.requests), (service, 1));
    let started = start_time(&mut agent, service);
    agent.shell("echo parent >/srv/who; sync");
    let snapshot = place.join("snapshot");
    agent.pre_snapshot().expect("the guest prepares for a snapshot");
    vm.snapshot(&snapshot);
    assert_eq!(ask(&vm).requests, 2, "the parent's own service goes on");
    let mut randoms = HashSet::from([fresh_random(&mut agent)]);
    assert_calm(&vm.stop().stdout);

    let server = PageServer::start(&place, &snapshot);
    for name in ["clone-a", "clone-b"] {
        let mut clone = Restore::new(&place, &snapshot).uffd(&server).start(name);
        let mut agent = clone.linux_agent();
        agent.becomes_itself(name);
        let answer = ask(&clone);
        println!("{name}: {answer:?}, started at {started}");
        assert_eq!((answer.pid, answer.requests, &answer.made_up), (service, 2, &warm.made_up));
        assert_eq!(start_time(&mut agent, service), started);
        // A generator of a program's own repeats itself unless a hook has it seeded again.
        assert!(randoms.insert(answer.random), "{name}'s service repeats what another has said");
        assert!(randoms.insert(fresh_random(&mut agent)), "{name}'s fresh interpreter repeats what another has said");
        assert_eq!(agent.shell("hostname; cat /etc/hostname"), format!("{name}\n{name}"));
        assert!(holds_within(PATIENCE, || busy(&mut agent) < 5), "{name} does not come to rest");
        assert_eq!(agent.shell("systemctl list-jobs --no-legend"), "");
        // Its disk is its own, over the image and what the parent had written.
        agent.shell("sync; echo 3 >/proc/sys/vm/drop_caches");
        assert_eq!(agent.shell("cat /srv/who"), "parent");
        assert_eq!(agent.shell(&format!("echo {name} >/srv/who; sync; cat /srv/who")), name);
        clone.becomes(Readiness::Full);
        assert_calm(&clone.stop().stdout);
    }
    assert!(std::fs::read(&image).expect("the root image can be read") == before, "somebody wrote the image");
}

#[test]
fn a_unit_that_fails_degrades_the_guest_and_is_named() {
    const UNIT: &[u8] = b"[Service]\nType=oneshot\nExecStart=/bin/false\n";
    let Some(linux) = Linux::guest("6.1") else { return };
    let place = Place::new();
    let files = [("/overlay/etc/systemd/system/broken.service", 0o644, UNIT)];
    let (vm, mut agent) = boot(&place, linux, &files, "systemd.wants=broken.service", Readiness::Degraded);
    let readiness = agent.readiness().expect("it says how ready it is");
    assert_eq!((readiness.level, readiness.failed), (Level::Degraded, vec!["broken.service".to_owned()]));
    // It serves all the same, and ends in order.
    assert_eq!(agent.shell("python3 -c 'print(6 * 7)'"), "42");
    agent.power_off().expect("it agrees to be switched off");
    let done = vm.process.finish_within(PATIENCE);
    assert_calm(&done.stdout);
    assert_eq!((done.code(), done.stderr.as_str()), (0, ""));
}

#[test]
fn a_guest_without_its_root_ends_early_and_says_what_is_missing() {
    let Some(linux) = Linux::guest("6.1") else { return };
    let place = Place::new();
    let mut vm = Boot::new(&place).linux(&linux.elf(), "root=/dev/none").start("guest");
    assert_eq!(vm.said("coppice: cannot start "), "/sbin/init on the root file system /dev/none");
    assert_eq!(vm.process.finish_within(PATIENCE).code(), 0);
}
