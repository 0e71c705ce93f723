//! Clones of Linux guests, each told by its agent who it is. Runs in the reference machine: `tests/rig/run` is the runner.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::agent::linux::Exec;
use api_spec::agent::{Refusal, Request, Response};
use api_spec::client::agent::AgentError;
use api_spec::devices::{CacheType, Drive};
use api_spec::vm::Readiness;
use std::collections::HashSet;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;
use tests::linux::{LinuxAgent, PATIENCE, a_minute_passes, assert_calm, shell};
use tests::vm::drive;
use tests::{Boot, Linux, PageServer, Place, Restore, Vm, holds_within};

/// Keeps count, and notes it if monotonic time goes back. A file that it holds open has no name any more.
const WATCHER: &str = r#"
echo held >/tmp/held; exec 3</tmp/held; rm /tmp/held
count=0 last=0
while :; do
  read up rest </proc/uptime
  now=${up%.*}${up#*.}
  [ $now -ge $last ] || echo "$last $now" >>/tmp/back
  last=$now count=$((count + 1))
  echo $count >/tmp/count.new; mv /tmp/count.new /tmp/count
  sleep 0.05
done"#;

/// A snapshot of a busy guest, and what is known of it.
struct Parent {
    snapshot: PathBuf,
    nonce: Response,
    watcher: u32,
    watcher_started: String,
    count: u64,
    /// Blocks that are known to be on disk.
    written: u32,
    uptime: f64,
    /// Of the parent, after the snapshot.
    ids: Ids,
}

/// What no two guests have in common.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Ids {
    random: String,
    hostname: String,
    machine_id: String,
    generation: [u8; 16],
}

fn ids(agent: &mut LinuxAgent) -> Ids {
    Ids {
        random: agent.shell("head -c 32 /dev/urandom | hexdump -v -e '1/1 \"%02x\"'"),
        hostname: agent.shell("hostname"),
        machine_id: agent.shell("cat /etc/machine-id"),
        generation: agent.generation(),
    }
}

fn count(agent: &mut LinuxAgent) -> u64 {
    agent.shell("cat /tmp/count").parse().expect("the watcher counts")
}

fn uptime(agent: &mut LinuxAgent) -> f64 {
    agent.shell("cut -d' ' -f1 /proc/uptime").parse().expect("uptime is a number")
}

/// When a process of the guest started, in the guest's ticks since boot.
fn started(agent: &mut LinuxAgent, pid: u32) -> String {
    agent.shell(&format!("cut -d' ' -f22 /proc/{pid}/stat"))
}

fn parent(place: &Place, linux: &Linux, vcpus: u8) -> Parent {
    let disk = place.join("disk");
    File::create(&disk).and_then(|file| file.set_len(64 << 20)).expect("a file can be made in the test's directory");
    let disk = Drive { overlay: true, cache_type: CacheType::Writeback, ..drive("data", &disk) };
    let mut vm = Boot::new(place).linux(linux, "").vcpus(vcpus).drive(disk).start("parent");
    vm.becomes(Readiness::Full);
    let mut agent = vm.linux_agent();
    let watcher = agent.leave(WATCHER).pid;
    agent.keep_writing();
    // Every vCPU is busy.
    for _ in 0..vcpus {
        agent.leave("while :; do :; done");
    }
    assert!(holds_within(PATIENCE, || agent.shell("[ -e /tmp/count ] && echo yes || echo no") == "yes"));

    // A program whose host waits for it, over a connection that the snapshot finds open.
    let mut waiting = vm.linux_agent();
    let running = Exec { argv: vec!["/bin/sleep".into(), "4242".into()], ..Exec::default() };
    std::thread::scope(|scope| {
        let waits = scope.spawn(move || waiting.try_run(&running, b""));
        assert!(holds_within(PATIENCE, || sleepers(&mut agent) == "1"), "the program runs");

        let snapshot = place.join("snapshot");
        agent.pre_snapshot().expect("the guest prepares for a snapshot");
        let known = Parent {
            snapshot: snapshot.clone(),
            nonce: agent.ask(Request::Nonce),
            watcher,
            watcher_started: started(&mut agent, watcher),
            count: count(&mut agent),
            written: agent.written(),
            uptime: uptime(&mut agent),
            ids: ids(&mut agent),
        };
        vm.snapshot(&snapshot);
        // The parent goes on as if nothing had been: the same connections, the same program, the same identity.
        assert_eq!(sleepers(&mut agent), "1");
        assert!(count(&mut agent) > known.count);
        let after = ids(&mut agent);
        assert_eq!((&after.machine_id, &after.generation), (&known.ids.machine_id, &known.ids.generation));
        agent.shell("kill $(ps -o pid,args | sed -n 's|^ *\\([0-9]*\\) /bin/sleep 424[2]$|\\1|p')");
        waits.join().expect("the thread ends").expect("its program has ended");
        assert_calm(&vm.stop().stdout);
        Parent { ids: after, ..known }
    })
}

/// How many run of the program whose host waits for it.
fn sleepers(agent: &mut LinuxAgent) -> String {
    agent.shell("ps -o args | grep -c '^/bin/sleep 424[2]' || true")
}

/// A clone becomes itself, and is what its parent was.
fn check_clone(clone: &mut Vm, parent: &Parent) -> Ids {
    let mut agent = clone.linux_agent();
    // Nobody may use it before it is itself.
    let early = agent.try_run(&shell("true"), b"");
    assert!(matches!(early, Err(AgentError::Refused(Refusal::NotResumed))), "{early:?}");
    assert_eq!(clone.info().readiness, None, "it has announced itself too early");
    agent.becomes_itself(&clone.name);
    clone.becomes(Readiness::Full);

    // It is the same boot of the same guest.
    assert_eq!(agent.ask(Request::Nonce), parent.nonce);
    assert_eq!(started(&mut agent, parent.watcher), parent.watcher_started);
    assert_eq!(agent.shell(&format!("cat /proc/{}/fd/3", parent.watcher)), "held");
    // Time goes on from where it was, and timers fire.
    assert!(uptime(&mut agent) >= parent.uptime);
    let before = count(&mut agent);
    assert!(before >= parent.count, "{before}, and it was {}", parent.count);
    assert!(holds_within(PATIENCE, || count(&mut agent) > before + 3), "the watcher's timer stands still");
    assert_eq!(agent.shell("cat /tmp/back 2>/dev/null || true"), "", "monotonic time went back");
    let error = agent.clock_error();
    assert!(error < Duration::from_secs(1), "its wall clock is wrong by {error:?}");
    // What was bound to a connection that the restore has reset has ended.
    assert!(holds_within(PATIENCE, || sleepers(&mut agent) == "0"), "a program outlived its connection");
    println!("{}: wrote blocks 0 to {}", clone.name, agent.stop_writing(parent.written));
    let ids = ids(&mut agent);
    assert_eq!(ids.hostname, clone.name);
    ids
}

/// Three clones, two of them with memory from a page server, a minute after the snapshot was taken.
fn clones_are_themselves(kernel: &str, vcpus: u8) {
    let Some(linux) = Linux::guest(kernel) else { return };
    let place = Place::new();
    let parent = parent(&place, &linux.elf(), vcpus);
    let server = PageServer::start(&place, &parent.snapshot);
    a_minute_passes();
    let mut seen = HashSet::from([parent.ids.random.clone(), parent.ids.hostname.clone()]);
    seen.extend([parent.ids.machine_id.clone(), format!("{:?}", parent.ids.generation)]);
    for (name, served) in [("clone-a", false), ("clone-b", true), ("clone-c", true)] {
        let restore = Restore::new(&place, &parent.snapshot);
        let mut clone = if served { restore.uffd(&server) } else { restore }.start(name);
        let ids = check_clone(&mut clone, &parent);
        println!("{name}: {ids:?}");
        for id in [ids.random, ids.hostname, ids.machine_id, format!("{:?}", ids.generation)] {
            assert!(seen.insert(id.clone()), "{name} shares {id} with another");
        }
        if kernel == "6.12" {
            let mut agent = clone.linux_agent();
            let bound = agent.shell("ls -d /sys/bus/*/drivers/vmgenid/*:*");
            println!("vmgenid is bound to {bound}");
            let log = agent.shell("dmesg | grep 'virtual machine fork'");
            assert_eq!(log.lines().count(), 1, "{log}");
        }
        assert_calm(&clone.stop().stdout);
    }
}

#[test]
fn clones_with_6_1_are_themselves() {
    clones_are_themselves("6.1", 2);
}

#[test]
fn clones_with_6_12_are_themselves() {
    clones_are_themselves("6.12", 2);
}

/// A clone of a clone of a clone, with bad company in each.
#[test]
fn the_agent_survives_many_resets() {
    const ROUNDS: u32 = 12;
    let Some(linux) = Linux::guest("6.1") else { return };
    let place = Place::new();
    let mut vm = Boot::new(&place).linux(&linux.elf(), "").memory_mib(96).start("round-0");
    vm.becomes(Readiness::Full);
    let mut agent = vm.linux_agent();
    let pid = agent.shell("pidof guest-agent");
    let state = agent.leave("while :; do sleep 1; done").pid;
    let mut last = place.join("snapshot-0");
    vm.snapshot(&last);
    vm.stop();
    let mut generations = HashSet::new();
    for round in 1..=ROUNDS {
        let mut vm = Restore::new(&place, &last).start(&format!("round-{round}"));
        let mut agent = vm.linux_agent();
        assert!(generations.insert(agent.becomes_itself(&format!("round-{round}"))));
        // Some say nothing, some nonsense, and all are open while the next snapshot is taken.
        let company: Vec<UnixStream> = [&b""[..], b"\xff\xff\xff\xff nonsense", b"\x08\0\0\0\x01\0\0\0half"]
            .iter()
            .map(|start| {
                let mut stream = UnixStream::connect(&vm.vsock).expect("the vsock socket takes connections");
                stream.set_read_timeout(Some(PATIENCE)).expect("a socket can be limited");
                stream.write_all(&[b"CONNECT 5000\n", *start].concat()).expect("bytes can be sent");
                stream.read_exact(&mut [0; 3]).expect("the guest takes the connection");
                stream
            })
            .collect();
        assert_eq!(agent.shell("pidof guest-agent"), pid, "the agent was started again");
        assert_eq!(agent.shell(&format!("kill -0 {state} && hostname")), format!("round-{round}"));
        let next = place.join(format!("snapshot-{round}"));
        vm.snapshot(&next);
        drop(company);
        assert_calm(&vm.stop().stdout);
        std::fs::remove_dir_all(&last).expect("a snapshot can be removed");
        last = next;
    }
}
