//! QEMU: a `microvm` machine with no devices but COM1, told what to do by QMP. Its snapshot is what it would send to another host to migrate
//! there.
//!
//! ```text
//!   standard input   a socket, the other end of COM1, over which the agent is called
//!   standard output  the snapshot, which is read as it is loaded
//!   qmp.sock         QMP
//! ```

use super::super::guest::{PATIENCE, Workplace};
use super::super::{BenchError, io_error};
use super::{Prepared, remove};
use crate::children::{Child, Children};
use api_spec::client::AgentClient;
use serde_json::{Value, json};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// How its socket of QMP is called in the directory of a process.
const QMP: &str = "qmp.sock";
/// The file of a snapshot.
const STATE: &str = "state";
/// Where a process finds the snapshot.
const FROM_STANDARD_OUTPUT: &str = "fd:1";
/// No devices that the guest does not use, as their state would be saved and loaded. QEMU offers a feature of the host that KVM cannot give
/// to a guest everywhere.
const MACHINE: [&str; 9] = [
    "-machine",
    "microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=on,accel=kvm",
    "-cpu",
    "host,-arch-capabilities",
    "-nodefaults",
    "-no-user-config",
    "-display",
    "none",
    "-no-reboot",
];
/// How long a line of QMP may be, in bytes.
const LONGEST_LINE: u64 = 64 << 10;

/// A process.
pub struct Process {
    child: Child,
    monitor: Monitor,
    line: UnixStream,
}

/// What a process starts with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// The guest's kernel.
    Booting,
    /// Nothing yet: it waits until it is told to load the snapshot.
    Waiting,
    /// The snapshot, which it loads at once.
    Loading,
}

/// Takes the snapshot, and tells the version.
pub fn prepare(
    prepared: &Prepared,
    place: &Workplace,
    something: impl FnOnce(&mut AgentClient) -> Result<(), BenchError>,
) -> Result<String, BenchError> {
    let mut process = Process::start(prepared, place, "parent", Start::Booting)?;
    let taken = process.give_snapshot(place, &prepared.snapshot.join(STATE), something);
    taken.or_else(|e| why_it_ended(&mut process.child).and(Err(e)))?;
    Ok(process.monitor.version)
}

impl Process {
    /// Starts a process, and waits until it can be told something.
    pub fn start(prepared: &Prepared, place: &Workplace, name: &str, start: Start) -> Result<Self, BenchError> {
        let Prepared { program, kernel, machine, snapshot, .. } = prepared;
        let room = prepared.room(place, name)?;
        // Whoever boots leaves the snapshot where it works.
        let (dir, output) = match start {
            Start::Booting => (snapshot, Stdio::null()),
            Start::Waiting | Start::Loading => {
                let file = File::open(snapshot.join(STATE)).map_err(io_error("cannot read QEMU's snapshot"))?;
                (&room, Stdio::from(file))
            }
        };
        let (line, theirs) = UnixStream::pair().map_err(io_error("cannot make a pair of sockets"))?;
        remove(&dir.join(QMP));
        let mut child = Children::start_other("other VMM", &room.join("log"), program, |vmm| {
            vmm.current_dir(dir).stdin(std::os::fd::OwnedFd::from(theirs)).stdout(output).args(MACHINE);
            vmm.args(["-smp", &machine.vcpu_count.to_string(), "-m", &machine.mem_size_mib.to_string()]);
            vmm.args(["-kernel".as_ref(), kernel.as_os_str(), "-append".as_ref(), "quiet".as_ref()]);
            vmm.args(["-chardev", "socket,id=line,fd=0", "-serial", "chardev:line"]);
            vmm.args(["-qmp", &format!("unix:{QMP},server=on,wait=off")]);
            match start {
                Start::Booting => {}
                Start::Waiting => drop(vmm.args(["-incoming", "defer"])),
                Start::Loading => drop(vmm.args(["-incoming", FROM_STANDARD_OUTPUT])),
            }
        })?;
        let monitor = Monitor::connect(place, &mut child, &dir.join(QMP));
        let monitor = monitor.or_else(|e| why_it_ended(&mut child).and(Err(e)))?;
        Ok(Process { child, monitor, line })
    }

    /// Has the guest do something, and waits until what it is then is in a file.
    fn give_snapshot(
        &mut self,
        place: &Workplace,
        file: &Path,
        something: impl FnOnce(&mut AgentClient) -> Result<(), BenchError>,
    ) -> Result<(), BenchError> {
        let mut agent = self.agent()?;
        agent.ready().map_err(BenchError::Agent)?;
        something(&mut agent)?;
        // It goes on running until all is sent, so that clones run as well. The file's name needs no quotes: the shell works where it is.
        self.monitor.execute("migrate-set-parameters", json!({ "max-bandwidth": 1u64 << 40 }))?;
        self.monitor.execute("migrate", json!({ "uri": format!("exec:cat > part && mv part {STATE}") }))?;
        let deadline = Instant::now() + PATIENCE;
        let mut is_complete = false;
        // The file is there also if it fails, and whoever writes it may need a moment more than QEMU.
        while !(is_complete && file.exists()) {
            place.go_on()?;
            if Instant::now() > deadline {
                return Err(BenchError::Late("QEMU has not taken a snapshot", PATIENCE));
            }
            let status = self.monitor.execute("query-migrate", json!({}))?;
            match status["status"].as_str() {
                Some("failed" | "cancelled") => return Err(refused("it takes no snapshot", &status)),
                status => is_complete = status == Some("completed"),
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Loads the snapshot, and waits until the guest runs.
    pub fn load(&mut self) -> Result<(), BenchError> {
        let loading = self.monitor.execute("migrate-incoming", json!({ "uri": FROM_STANDARD_OUTPUT }));
        let runs = loading.and_then(|_| self.monitor.wait_until_resumed());
        runs.or_else(|e| why_it_ended(&mut self.child).and(Err(e)))
    }

    /// Waits until the guest runs, of which QMP tells once: before it was listened to, or after.
    pub fn wait_until_it_runs(&mut self) -> Result<(), BenchError> {
        let runs = match self.monitor.execute("query-status", json!({})) {
            Ok(status) if status["running"] == true => Ok(()),
            asked => asked.and_then(|_| self.monitor.wait_until_resumed()),
        };
        runs.or_else(|e| why_it_ended(&mut self.child).and(Err(e)))
    }

    /// The agent of the guest, over its COM1.
    pub fn agent(&self) -> Result<AgentClient, BenchError> {
        let line = self.line.try_clone().map_err(io_error("cannot call a guest"))?;
        Ok(AgentClient::over(line, PATIENCE))
    }
}

/// An error if a process has ended, or does so at once: it closes its sockets before it can be waited for.
fn why_it_ended(child: &mut Child) -> Result<(), BenchError> {
    let deadline = Instant::now() + Duration::from_millis(200);
    while Instant::now() < deadline {
        child.check_alive()?;
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// A connection for QMP: a JSON document a line, requests and replies, and events in between.
struct Monitor {
    stream: BufReader<UnixStream>,
    version: String,
    /// The guest was said to run.
    has_resumed: bool,
}

impl Monitor {
    fn connect(place: &Workplace, child: &mut Child, socket: &Path) -> Result<Self, BenchError> {
        let stream = place.keep_trying(child, || UnixStream::connect(socket).map_err(failed))?;
        stream
            .set_read_timeout(Some(PATIENCE))
            .and_then(|()| stream.set_write_timeout(Some(PATIENCE)))
            .map_err(failed)?;
        let mut monitor = Monitor { stream: BufReader::new(stream), version: String::new(), has_resumed: false };
        let greeting = monitor.receive(Instant::now() + PATIENCE)?;
        let number = |part| greeting["QMP"]["version"]["qemu"][part].as_u64().unwrap_or_default();
        monitor.version = format!("{}.{}.{}", number("major"), number("minor"), number("micro"));
        monitor.execute("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    fn receive(&mut self, deadline: Instant) -> Result<Value, BenchError> {
        if Instant::now() > deadline {
            return Err(BenchError::Late("QEMU has not answered", PATIENCE));
        }
        let mut line = Vec::new();
        if (&mut self.stream).take(LONGEST_LINE).read_until(b'\n', &mut line).map_err(failed)? == 0 {
            return Err(failed(io::ErrorKind::UnexpectedEof.into()));
        }
        let message: Value = serde_json::from_slice(&line).map_err(|e| failed(e.into()))?;
        self.has_resumed |= message["event"] == "RESUME";
        Ok(message)
    }

    /// Has QEMU do something, and tells what it says to that.
    fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, BenchError> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.stream.get_mut().write_all(format!("{request}\n").as_bytes()).map_err(failed)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let message = self.receive(deadline)?;
            if let Some(why) = message.get("error") {
                return Err(refused(command, why));
            }
            if let Some(answer) = message.get("return") {
                return Ok(answer.clone());
            }
        }
    }

    fn wait_until_resumed(&mut self) -> Result<(), BenchError> {
        let deadline = Instant::now() + PATIENCE;
        while !self.has_resumed {
            self.receive(deadline)?;
        }
        Ok(())
    }
}

fn failed(source: io::Error) -> BenchError {
    BenchError::Io { what: "QEMU cannot be told what to do by QMP", source }
}

fn refused(what: &str, why: &Value) -> BenchError {
    BenchError::Refused(format!("QEMU: {what}: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A monitor, and the other end.
    fn monitor() -> (Monitor, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        (Monitor { stream: BufReader::new(near), version: String::new(), has_resumed: false }, far)
    }

    #[test]
    fn events_come_between_requests_and_replies() {
        let (mut monitor, mut far) = monitor();
        far.write_all(b"{\"event\": \"STOP\"}\r\n{\"event\": \"RESUME\"}\r\n{\"return\": {\"running\": true}}\r\n")
            .unwrap();
        assert_eq!(monitor.execute("query-status", json!({})).unwrap(), json!({ "running": true }));
        // It has come already.
        monitor.wait_until_resumed().unwrap();
        let mut request = String::new();
        BufReader::new(far).read_line(&mut request).unwrap();
        let request: Value = serde_json::from_str(&request).unwrap();
        assert_eq!(request, json!({ "execute": "query-status", "arguments": {} }));
    }

    #[test]
    fn what_is_refused_and_what_is_no_answer_is_told() {
        let (mut monitor, mut far) = monitor();
        far.write_all(b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}\nno JSON\n").unwrap();
        let refused = monitor.execute("migrate", json!({})).unwrap_err().to_string();
        assert!(refused.contains("migrate") && refused.contains("\"no\""), "{refused}");
        assert!(monitor.wait_until_resumed().is_err());
        far.write_all(&[b' '; 2 * LONGEST_LINE as usize]).unwrap();
        assert!(monitor.wait_until_resumed().is_err());
        // Closed whole it would be reset: it has not read what it was told.
        far.shutdown(std::net::Shutdown::Write).unwrap();
        // What is left of the blanks, and the end.
        assert!(monitor.wait_until_resumed().is_err());
        let BenchError::Io { source, .. } = monitor.wait_until_resumed().unwrap_err() else { panic!("it is an end") };
        assert_eq!(source.to_string(), io::Error::from(io::ErrorKind::UnexpectedEof).to_string());
    }
}
