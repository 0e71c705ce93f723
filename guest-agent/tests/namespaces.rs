//! The agent on a real kernel, where it can change nothing of the host: in namespaces of its own.

mod common;

use api_spec::agent::linux::{Address, Interface};
use api_spec::client::AgentClient;
use common::{PATIENCE, argv, eventually, script, sh, soon};
use guest_agent::network;
use guest_agent::system::{Linux, System};
use std::fs;
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

/// By this a test that was started again knows that it is inside.
const INSIDE: &str = "COPPICE_TEST_INSIDE";

fn unshare(flags: &str) -> Command {
    let mut unshare = Command::new("unshare");
    // A user namespace besides the others: whatever goes wrong, it has no rights over the host.
    unshare.args(["--user", "--map-root-user"]).args(flags.split_whitespace());
    unshare
}

fn can_unshare(flags: &str) -> bool {
    let tried = unshare(flags).arg("true").stdin(Stdio::null()).output();
    let can = tried.as_ref().is_ok_and(|output| output.status.success());
    if !can {
        let why = tried.map_or_else(|e| e.to_string(), |o| String::from_utf8_lossy(&o.stderr).trim().to_owned());
        test_skip::skip(format!("no namespaces here: {why}"));
    }
    can
}

/// The first process of its namespaces, which ends with it.
struct Init(Child);

impl Drop for Init {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs the test of that name again in namespaces, and takes over its outcome. True if this is the inside.
fn is_inside(test: &str) -> bool {
    const FLAGS: &str = "--mount --uts --net";
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    if can_unshare(FLAGS) {
        let this = std::env::current_exe().unwrap();
        let Output { status, stdout, stderr } =
            unshare(FLAGS).arg(this).args(["--exact", test, "--nocapture"]).env(INSIDE, "1").output().unwrap();
        let text = format!("{}\n{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
        assert!(status.success(), "{text}");
        println!("{text}");
    }
    false
}

fn output(line: &str) -> String {
    let output = Command::new("sh").args(["-c", line]).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn names_are_set() {
    if !is_inside("names_are_set") {
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let linux = Linux::new(root.path(), false);
    fs::create_dir(root.path().join("etc")).unwrap();
    fs::write(root.path().join("etc/hostname"), "parent\n").unwrap();
    linux.set_hostname("clone-7").unwrap();
    assert_eq!(fs::read_to_string("/proc/sys/kernel/hostname").unwrap(), "clone-7\n");
    assert_eq!(fs::read_to_string(root.path().join("etc/hostname")).unwrap(), "clone-7\n");

    // A root that cannot be written: the machine id is mounted over the old one.
    fs::write(root.path().join("etc/machine-id"), "parent\n").unwrap();
    fs::create_dir(root.path().join("run")).unwrap();
    let etc = root.path().join("etc").display().to_string();
    output(&format!("mount --bind {etc} {etc} && mount -o remount,bind,ro {etc}"));
    linux.set_machine_id([0xcd; 16]).unwrap();
    assert_eq!(fs::read_to_string(root.path().join("etc/machine-id")).unwrap().trim(), "cd".repeat(16));
    linux.set_machine_id([0xef; 16]).unwrap();
    assert_eq!(fs::read_to_string(root.path().join("etc/machine-id")).unwrap().trim(), "ef".repeat(16));
}

#[test]
fn an_interface_gets_its_addresses_and_loses_the_old_ones() {
    if !is_inside("an_interface_gets_its_addresses_and_loses_the_old_ones") {
        return;
    }
    network::loopback().unwrap();
    assert!(output("ip -o link show lo").contains("LOWER_UP"));
    let made = Command::new("ip").args("link add eth0 type dummy".split(' ')).output();
    let made = made.is_ok_and(|o| o.status.success())
        || Command::new("ip")
            .args("link add eth0 type veth peer name peer0".split(' '))
            .status()
            .is_ok_and(|s| s.success());
    if !made {
        return test_skip::skip("no network interface can be made here");
    }
    output("ip addr add 10.9.0.1/24 dev eth0 && ip link set eth0 up && ip route add default via 10.9.0.254");
    let address = |text: &str, prefix| Address { address: text.parse::<IpAddr>().unwrap(), prefix };
    let interface = Interface {
        name: "eth0".into(),
        mac: Some([2, 0, 0, 0, 0, 7]),
        addresses: vec![address("10.1.2.3", 16), address("fd00::3", 64)],
        gateways: vec!["10.1.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
    };
    let linux = Linux::new(Path::new("/"), false);
    // Twice: a host that gets no acknowledgement asks again.
    for _ in 0..2 {
        linux.configure(&interface).unwrap();
        let addresses = output("ip -o addr show dev eth0");
        assert!(addresses.contains("10.1.2.3/16") && addresses.contains("fd00::3/64"), "{addresses}");
        assert!(!addresses.contains("10.9.0.1") && !addresses.contains("tentative"), "{addresses}");
        assert!(output("ip -o link show eth0").contains("02:00:00:00:00:07"));
        assert_eq!(output("ip route show default").split_whitespace().nth(2), Some("10.1.0.1"));
        assert_eq!(output("ip -6 route show default").split_whitespace().nth(2), Some("fd00::1"));
    }
    let bounced = Interface { mac: None, addresses: vec![], gateways: vec![], ..interface.clone() };
    linux.configure(&bounced).unwrap();
    assert!(output("ip -o addr show dev eth0").contains("10.1.2.3/16"), "addresses that were not replaced stay");
    let unknown = Interface { name: "eth9".into(), ..interface };
    assert_eq!(linux.configure(&unknown).unwrap_err().raw_os_error(), Some(libc::ENODEV));
}

/// The agent as the first process of namespaces of its own, and its parent's view of how it ends.
#[test]
fn as_the_first_process_it_reaps_runs_jobs_and_ends_in_order() {
    const FLAGS: &str = "--mount --uts --net --pid --fork --kill-child";
    if !can_unshare(FLAGS) {
        return;
    }
    for (reboot, signal) in [(false, libc::SIGINT), (true, libc::SIGHUP)] {
        let dir = tempfile::tempdir().unwrap();
        script(&dir.path().join("start.d/10-good"), "true");
        script(&dir.path().join("start.d/20-bad"), "exit 1");
        let agent = env!("CARGO_BIN_EXE_guest-agent");
        let mut init = Init(unshare(FLAGS).arg(agent).args(common::arguments(dir.path())).spawn().unwrap());
        let socket = dir.path().join("agent");
        let connect = || UnixStream::connect(&socket).map(|stream| AgentClient::over(stream, PATIENCE));
        eventually("the agent listens", || connect().is_ok());
        let mut client = connect().unwrap();
        let mut run = |line: &str| {
            let finished = client.run(&sh(line), b"", soon()).unwrap();
            String::from_utf8(finished.stdout).unwrap()
        };
        assert_eq!(run("cat /proc/1/comm").trim(), "guest-agent");
        assert!(run("ip -o link show lo").contains("LOWER_UP"));

        // Orphans become children of the first process, which reaps them.
        run("for i in 1 2 3 4 5; do (sleep 0.01 &) ; done");
        eventually("no child of the first process is left but the agent", || {
            run("cat /proc/1/task/1/children").split_whitespace().count() == 1
        });
        eventually("the start jobs are done", || connect().unwrap().readiness().unwrap().failed == ["20-bad"]);

        // An agent that dies is started again, and does not run the jobs twice.
        fs::remove_file(dir.path().join("start.d/20-bad")).unwrap();
        let _ = client.run(&sh("kill -KILL $(cat /proc/1/task/1/children)"), b"", soon());
        eventually("there is another agent", || connect().is_ok_and(|mut client| client.readiness().is_ok()));
        eventually("it knows what failed", || connect().unwrap().readiness().unwrap().failed == ["20-bad"]);

        let mut client = connect().unwrap();
        client.exec_detached(&argv(&["sleep", "1000"])).unwrap();
        client.exec_detached(&sh("trap '' TERM; while :; do sleep 1; done")).unwrap();
        if reboot {
            client.reboot().unwrap()
        } else {
            client.power_off().unwrap()
        }
        let mut status = None;
        eventually("the machine ends", || {
            status = init.0.try_wait().unwrap();
            status.is_some()
        });
        let status = status.unwrap();
        // Of a pid namespace the kernel makes it a signal; unshare passes it on, or exits by its number.
        let ended_by = status.signal().or(status.code().map(|code| code & 0x7f));
        assert_eq!(ended_by, Some(signal), "{status:?}");
    }
}
