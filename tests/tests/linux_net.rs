//! Linux guests on a network. Runs in the reference machine: `tests/rig/run` is the runner.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::agent::linux::{Address, Interface};
use api_spec::devices::{Drive, Entropy, RateLimiter, TokenBucket};
use api_spec::mac::MacAddr;
use api_spec::snapshot::SnapshotLoad;
use api_spec::stats::TracedOperation;
use api_spec::vm::Readiness;
use serde_json::json;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Command, Stdio};
use tests::linux::{self, Console, LinuxAgent, PATIENCE, assert_calm};
use tests::vm::{drive, shell};
use tests::{Boot, Linux, Place, Restore, Vm, holds_within};

/// By this a test that was started again knows that it is inside.
const INSIDE: &str = "COPPICE_TEST_INSIDE";
const HOST: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const PARENT: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);
const OTHER: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 3);
/// How many random bytes a guest has each half second.
const RANDOM_AT_A_TIME: u64 = 512;
/// What is sent over one connection, in bytes.
const BULK: usize = 4 << 20;

/// Runs the test of that name again in a network namespace, where it can do no harm, and takes over its outcome. True if
/// this is the inside.
fn is_inside(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let this = std::env::current_exe().expect("this program has a path");
    let mut again = Command::new("unshare");
    again.arg("-n").arg(this).args(["--exact", test, "--nocapture"]).env(INSIDE, "1");
    let done = again.stderr(Stdio::inherit()).output().expect("unshare is there");
    // Without the line that counts tests: this is one of them already.
    let text = String::from_utf8_lossy(&done.stdout);
    text.lines().filter(|line| !line.starts_with("test result:")).for_each(|line| println!("{line}"));
    assert!(done.status.success(), "see above");
    false
}

/// A shell command on the host.
#[track_caller]
fn host(command: &str) {
    let done = Command::new("sh").args(["-c", command]).output().expect("there is a shell");
    assert!(done.status.success(), "{command}: {}", String::from_utf8_lossy(&done.stderr));
}

/// A bridge with the host at it.
fn bridge() {
    host("ip link set lo up");
    host("ip link add br0 type bridge 2>/dev/null || brctl addbr br0");
    host(&format!("ip address add {HOST}/24 dev br0 && ip link set br0 up"));
}

/// A tap device at the bridge.
fn tap(name: &str) {
    host(&format!("ip tuntap add dev {name} mode tap 2>/dev/null || tunctl -t {name}"));
    host(&format!("ip link set {name} master br0 2>/dev/null || brctl addif br0 {name}"));
    host(&format!("ip link set {name} up"));
}

fn mac(last: u8) -> MacAddr {
    MacAddr::new([6, 0, 10, 9, 0, last]).expect("an address of one interface")
}

/// Tells a guest who it is on the network.
fn joins(agent: &mut LinuxAgent, name: &str, mac: MacAddr, address: Ipv4Addr) {
    let interface = Interface {
        name: "eth0".into(),
        mac: Some(mac.bytes()),
        addresses: vec![Address { address: address.into(), prefix: 24 }],
        gateways: vec![HOST.into()],
    };
    agent.becomes_itself_at(name, vec![interface]);
    assert_eq!(agent.shell("cat /sys/class/net/eth0/address"), mac.to_string());
}

#[track_caller]
fn host_reaches(address: Ipv4Addr) {
    let ping = || {
        let tried = Command::new("ping").args(["-c", "1", "-W", "1", &address.to_string()]).output();
        tried.expect("there is a ping").status.success()
    };
    assert!(holds_within(PATIENCE, ping), "the host does not reach {address}");
}

#[track_caller]
fn guest_reaches(agent: &mut LinuxAgent, address: Ipv4Addr) {
    let ping = format!("ping -c 1 -W 1 {address} >/dev/null && echo yes || echo no");
    assert!(holds_within(PATIENCE, || agent.shell(&ping) == "yes"), "the guest does not reach {address}");
}

/// The guest sends and receives more than fits into a packet, or into all buffers at once.
fn talks_in_bulk(agent: &mut LinuxAgent) {
    let listener = TcpListener::bind((HOST, 0)).expect("the host can listen");
    let port = listener.local_addr().expect("it has an address").port();
    let bulk: Vec<u8> = b"coppice\n".iter().copied().cycle().take(BULK).collect();
    let from_guest = || {
        let (mut stream, _) = listener.accept().expect("the guest connects");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout can be set");
        let mut got = Vec::new();
        stream.read_to_end(&mut got).expect("the guest sends all");
        got
    };
    let to_guest = || {
        let (mut stream, _) = listener.accept().expect("the guest connects");
        // What it asks for is of no interest, only that it has asked.
        let _ = stream.read(&mut [0; 1024]).expect("it asks");
        write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {BULK}\r\n\r\n").expect("it listens");
        stream.write_all(&bulk).expect("it takes all");
    };
    std::thread::scope(|scope| {
        let got = scope.spawn(from_guest);
        agent.shell(&format!("yes coppice | head -c {BULK} | nc {HOST} {port}"));
        assert!(got.join().expect("the host listens") == bulk, "every byte, in order");
    });
    std::thread::scope(|scope| {
        scope.spawn(to_guest);
        let sum = agent.shell(&format!("wget -q -O - http://{HOST}:{port}/ | sha256sum"));
        assert_eq!(sum, agent.shell(&format!("yes coppice | head -c {BULK} | sha256sum")));
    });
}

/// Random bytes of the host, through the source of entropy.
fn random(agent: &mut LinuxAgent) -> String {
    agent.shell("head -c 32 /dev/hwrng | hexdump -v -e '1/1 \"%02x\"'")
}

fn ends(vm: Vm) {
    assert_calm(&vm.stop().stdout);
}

/// A clone that is told nothing but its name has a network, a disk, a console and an agent, as its parent had.
fn works_by_default(place: &Place, snapshot: &Path) {
    let mut clone = Restore::new(place, snapshot).start("default");
    let mut agent = clone.linux_agent();
    agent.becomes_itself("default");
    clone.becomes(Readiness::Full);
    guest_reaches(&mut agent, HOST);
    host_reaches(PARENT);
    agent.shell("echo written >/dev/vda; sync; echo 3 >/proc/sys/vm/drop_caches");
    assert_eq!(agent.shell("head -c 7 /dev/vda"), "written");
    agent.shell("echo 'coppice: echo' >/dev/console");
    clone.said("coppice: echo");
    // What was said before the snapshot is not said again.
    assert!(!clone.console().contains("coppice: Linux"), "{}", clone.console());
    drop(agent);
    ends(clone);
}

/// A clone that is loaded into a shell has the parent's bound of random bytes, of which the shell knew nothing, and waits for more.
fn is_bounded_in_a_shell(place: &Place, snapshot: &Path) {
    let interface = json!({ "iface_id": "eth0", "host_dev_name": "tap-parent", "guest_mac": mac(2) });
    let disk = json!({ "drive_id": "data", "path_on_host": "/nowhere" });
    let more = json!({ "network-interfaces": [interface], "drives": [disk], "entropy": {} });
    let mut clone = shell(place, "bounded", 1, linux::MEMORY_MIB, more);
    let load = SnapshotLoad { resume_vm: true, ..SnapshotLoad::of(snapshot.to_owned()) };
    clone.client().snapshot_load(&load).expect("it fits");
    let stats = clone.client().stats().expect("it has counters");
    let loaded = stats.traces.iter().find(|trace| trace.operation == TracedOperation::Load).expect("it was loaded");
    assert!(loaded.phases.iter().all(|phase| phase.name != "vm"), "a VM was built: {}", clone.process.log());
    let mut agent = clone.linux_agent();
    agent.becomes_itself("bounded");
    guest_reaches(&mut agent, HOST);
    agent.shell(&format!("head -c {} /dev/hwrng | wc -c", 8 * RANDOM_AT_A_TIME));
    let stats = clone.client().stats().expect("it has counters").entropy.expect("it has a source");
    assert!(stats.throttled > 0, "{stats:?}");
    drop(agent);
    ends(clone);
}

fn clones_share_a_bridge(kernel: &str, test: &str) {
    let Some(linux) = Linux::guest(kernel) else { return };
    if !is_inside(test) {
        return;
    }
    let place = Place::new();
    bridge();
    ["tap-parent", "tap-one", "tap-two"].iter().for_each(|name| tap(name));
    let disk = place.join("disk");
    std::fs::write(&disk, vec![0; 16 << 20]).expect("a file can be made in the test's directory");
    let disk = Drive { overlay: true, ..drive("data", &disk) };
    let boot = Boot::new(&place).linux(&linux, "").network("eth0", "tap-parent", Some(mac(2))).drive(disk);
    let boot = boot.configured(|config| {
        let bandwidth = TokenBucket { size: RANDOM_AT_A_TIME, one_time_burst: None, refill_time: 500 };
        config.entropy = Some(Entropy { rate_limiter: Some(RateLimiter { bandwidth: Some(bandwidth), ops: None }) });
    });
    let mut parent = boot.start("parent");
    parent.becomes(Readiness::Full);
    let mut agent = parent.linux_agent();
    assert_eq!(agent.shell("cat /sys/class/net/eth0/address"), mac(2).to_string());
    joins(&mut agent, "parent", mac(2), PARENT);
    host_reaches(PARENT);
    guest_reaches(&mut agent, HOST);
    talks_in_bulk(&mut agent);
    let of_parent = random(&mut agent);
    let path = place.join("snapshot");
    parent.snapshot(&path);
    // It goes on as if nothing had been.
    guest_reaches(&mut agent, HOST);
    drop(agent);
    ends(parent);
    works_by_default(&place, &path);
    is_bounded_in_a_shell(&place, &path);

    // One is at the parent's address with a MAC address of its own, while the host may still believe in the parent's.
    let mut clones = Vec::new();
    for (name, tap, number, address) in [("one", "tap-one", 3, PARENT), ("two", "tap-two", 4, OTHER)] {
        let restore = Restore::new(&place, &path).tap("eth0", tap, Some(mac(number)));
        let mut vm = if number == 3 { restore.start(name) } else { restore.by_api().start(name) };
        let mut agent = vm.linux_agent();
        joins(&mut agent, name, mac(number), address);
        clones.push((vm, agent, address));
    }
    let [(one, agent_one, at_one), (two, agent_two, at_two)] = &mut clones[..] else { panic!("two clones") };
    host_reaches(*at_one);
    host_reaches(*at_two);
    guest_reaches(agent_one, *at_two);
    guest_reaches(agent_two, *at_one);
    guest_reaches(agent_one, HOST);
    talks_in_bulk(agent_one);
    talks_in_bulk(agent_two);
    let randoms = [of_parent, random(agent_one), random(agent_two)];
    assert!(randoms.iter().all(|r| r.len() == 64), "{randoms:?}");
    assert!(randoms[0] != randoms[1] && randoms[1] != randoms[2] && randoms[0] != randoms[2], "{randoms:?}");
    println!("{kernel}: clones {} and {} reach each other, and the host both", one.name, two.name);
    for (vm, agent, _) in clones {
        drop(agent);
        ends(vm);
    }
}

#[test]
fn clones_of_6_1_share_a_bridge() {
    clones_share_a_bridge("6.1", "clones_of_6_1_share_a_bridge");
}

#[test]
fn clones_of_6_12_share_a_bridge() {
    clones_share_a_bridge("6.12", "clones_of_6_12_share_a_bridge");
}
