//! Linux guests, as `resources/linux/build` makes them, what they say on their consoles, and their agents.
//!
//! `COPPICE_LINUX_GUESTS` names the directory that holds a directory for each; `rig/run` sets it in the reference machine.

use crate::holds_within;
use crate::place::Place;
use crate::vm::Vm;
use api_spec::agent::linux::{Exec, Exit, Identity, Interface};
use api_spec::agent::{Request, Response, Resumed};
use api_spec::client::AgentClient;
use api_spec::client::agent::AgentError;
use api_spec::client::linux::{Finished, Started};
use api_spec::devices::{CacheType, Drive};
use api_spec::vm::Readiness;
use std::ops::{Deref, DerefMut};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

/// What every Linux guest is told. Warnings and worse go to the console.
pub const COMMAND_LINE: &str = "console=ttyS0 loglevel=5 panic=-1";
/// What the minimal guest needs.
pub const MEMORY_MIB: u64 = 192;
/// Longest that a Linux guest may take to come up, or to answer, on an emulated machine with a busy host.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// A Linux guest's files.
#[derive(Clone, Debug)]
pub struct Linux {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: PathBuf,
    /// An image of a root file system, which a guest has only if it is given one.
    pub root: PathBuf,
}

impl Linux {
    /// The guest with this kernel, `6.1` or `6.12`. `None`, and noted as skipped, where the environment names no guests, or
    /// on a host that cannot run them.
    pub fn guest(kernel: &str) -> Option<Self> {
        let reason = match std::env::var_os("COPPICE_LINUX_GUESTS") {
            None => "COPPICE_LINUX_GUESTS names no Linux guests; tests/rig/prepare makes them".to_owned(),
            Some(_) if std::path::Path::new("/sys/module/kvm_pvm").exists() => {
                "this host's KVM emulates ring 0, where no Linux guest runs; tests/rig/run runs this test anywhere"
                    .to_owned()
            }
            Some(dir) => {
                let (all, dir) = (PathBuf::from(&dir), PathBuf::from(dir).join(kernel));
                let root = all.join("root/root.ext4");
                return Some(Linux { kernel: dir.join("vmlinuz"), initrd: dir.join("initrd"), root });
            }
        };
        test_skip::skip(reason);
        None
    }

    /// A private overlay over the root image, as the guest's root disk.
    pub fn root_disk(&self) -> Drive {
        Drive {
            drive_id: "root".into(),
            path_on_host: self.root.clone(),
            is_root_device: true,
            is_read_only: false,
            partuuid: None,
            cache_type: CacheType::Writeback,
            io_engine: Default::default(),
            rate_limiter: None,
            overlay: true,
            max_overlay_mib: None,
            socket: None,
        }
    }

    /// The same guest with more files in its initial RAM disk, or with others: path, permission bits, content. What is
    /// missing of the directories above them is made.
    pub fn with_files(&self, place: &Place, files: &[(&str, u32, &[u8])]) -> Self {
        let mut disk = std::fs::read(&self.initrd).expect("the initial RAM disk can be read");
        // The kernel unpacks one archive after the other.
        disk.resize(disk.len().next_multiple_of(4), 0);
        disk.extend(archive(files));
        let initrd = place.join("initrd");
        std::fs::write(&initrd, disk).expect("a file can be made in the test's directory");
        Linux { initrd, ..self.clone() }
    }

    /// The same kernel as an ELF file, which is entered by PVH. It need not unpack itself, which takes an emulated machine
    /// longer than all the rest of its start.
    pub fn elf(self) -> Self {
        Linux { kernel: self.kernel.with_file_name("vmlinux"), ..self }
    }
}

/// The console of a Linux guest: what its vmm prints.
pub trait Console {
    /// What it said so far.
    fn console(&self) -> String;

    /// Waits until the guest has said a line that begins with `start`; what follows in that line.
    fn said(&mut self, start: &str) -> String;

    /// The last number that the minimal guest has counted to, once it has counted further than `than`.
    fn counted_beyond(&mut self, than: u64) -> u64;
}

impl Console for Vm {
    fn console(&self) -> String {
        self.process.printed()
    }

    #[track_caller]
    fn said(&mut self, start: &str) -> String {
        let mut found = None;
        let came = holds_within(PATIENCE, || {
            // In this order, since the vmm may end after the guest has said so.
            let alive = self.process.is_alive();
            found = lines(&self.process.printed()).find_map(|line| line.strip_prefix(start).map(str::to_owned));
            found.is_some() || !alive
        });
        assert!(came, "{}: the guest never said {start:?}", self.name);
        found.unwrap_or_else(|| panic!("{}: the vmm ended before the guest said {start:?}", self.name))
    }

    #[track_caller]
    fn counted_beyond(&mut self, than: u64) -> u64 {
        let mut last = None;
        let came = holds_within(PATIENCE, || {
            self.process.check_alive();
            last = counts(&self.process.printed()).last().copied();
            last.is_some_and(|n| n > than)
        });
        assert!(came, "{}: the guest has not counted beyond {than}: {last:?}", self.name);
        last.expect("just found")
    }
}

impl Vm {
    /// The agent of a Linux guest, once it answers.
    #[track_caller]
    pub fn linux_agent(&mut self) -> LinuxAgent {
        const SLICE: Duration = Duration::from_millis(500);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let token = u64::from(self.pid());
            let slice = deadline.min(Instant::now() + SLICE);
            match AgentClient::first_reply(&self.vsock, PATIENCE, slice, Request::Ping { token }) {
                Ok((client, answer)) => {
                    assert_eq!(answer, Response::Pong { token }, "{}", self.name);
                    return LinuxAgent(client);
                }
                Err(e) => {
                    self.process.check_alive();
                    assert!(Instant::now() < deadline, "{}: its agent does not answer: {e}", self.name);
                }
            }
        }
    }

    /// Waits until the guest's agent has announced this.
    #[track_caller]
    pub fn becomes(&mut self, readiness: Readiness) {
        let mut found = None;
        let came = holds_within(PATIENCE, || {
            found = self.info().readiness;
            found == Some(readiness)
        });
        assert!(came, "{}: it should have become {readiness:?}, and is {found:?}", self.name);
    }
}

/// A connection to the agent of a Linux guest.
#[derive(Debug)]
pub struct LinuxAgent(AgentClient);

impl Deref for LinuxAgent {
    type Target = AgentClient;

    fn deref(&self) -> &AgentClient {
        &self.0
    }
}

impl DerefMut for LinuxAgent {
    fn deref_mut(&mut self) -> &mut AgentClient {
        &mut self.0
    }
}

impl LinuxAgent {
    /// Runs a program.
    pub fn try_run(&mut self, exec: &Exec, stdin: &[u8]) -> Result<Finished, AgentError> {
        self.0.run(exec, stdin, Instant::now() + PATIENCE)
    }

    /// Runs a program; panics if that cannot be done.
    #[track_caller]
    pub fn program(&mut self, exec: &Exec, stdin: &[u8]) -> Finished {
        self.try_run(exec, stdin).unwrap_or_else(|e| panic!("{:?}: {e}", exec.argv))
    }

    /// What a shell command prints, without the white space around it. It must end with 0.
    #[track_caller]
    pub fn shell(&mut self, command: &str) -> String {
        let done = self.program(&shell(command), b"");
        let (stdout, stderr) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
        assert_eq!((done.exit, &*stderr), (Exit::Code(0), ""), "{command}: {stdout}");
        stdout.trim().to_owned()
    }

    /// Starts a shell command that goes on by itself, and outlives a snapshot.
    #[track_caller]
    pub fn leave(&mut self, command: &str) -> Started {
        self.0.exec_detached(&shell(command)).unwrap_or_else(|e| panic!("{command}: {e}"))
    }

    /// Asks what every guest can be asked.
    #[track_caller]
    pub fn ask(&mut self, request: Request) -> Response {
        self.0.call(request).unwrap_or_else(|e| panic!("{request:?}: {e}"))
    }

    /// The generation id as the guest sees it.
    #[track_caller]
    pub fn generation(&mut self) -> [u8; 16] {
        match self.ask(Request::Generation) {
            Response::Generation(id) => id,
            other => panic!("no generation: {other:?}"),
        }
    }

    /// Has a program write numbered blocks of 4 KiB to the disk /dev/vda, from its block 4096 on, each on disk before the
    /// next, and waits until it has written some.
    #[track_caller]
    pub fn keep_writing(&mut self) {
        const WRITER: &str = "echo $$ >/tmp/writer; n=0; while :; do
          printf '%-4096d' $n | dd of=/dev/vda bs=4096 seek=$((4096 + n)) conv=notrunc,fsync 2>/dev/null || echo $n >>/tmp/failed
          echo $n >/tmp/n.new; mv /tmp/n.new /tmp/n; n=$((n + 1))
        done";
        self.leave(WRITER);
        let begun = || self.shell("[ -e /tmp/n ] && cat /tmp/n || echo 0").parse::<u32>().is_ok_and(|n| n > 5);
        assert!(holds_within(PATIENCE, begun), "the writer writes");
    }

    /// The number of the last block that is known to be on disk.
    #[track_caller]
    pub fn written(&mut self) -> u32 {
        self.shell("cat /tmp/n").parse().expect("a number")
    }

    /// Waits until the writer has gone on from block `at_least`, ends it, and checks that what it wrote is on the disk, each
    /// block once and in its place. The number of the last.
    #[track_caller]
    pub fn stop_writing(&mut self, at_least: u32) -> u32 {
        assert!(holds_within(PATIENCE, || self.written() > at_least + 2), "the writer does not go on");
        self.shell("kill $(cat /tmp/writer); sleep 0.3");
        self.forget_disk();
        let last = self.written();
        let numbers =
            self.shell(&format!("dd if=/dev/vda bs=4096 skip=4096 count={} 2>/dev/null | tr -s ' ' '\\n'", last + 1));
        let wanted: Vec<String> = (0..=last).map(|n| n.to_string()).collect();
        assert!(numbers.lines().eq(wanted.iter()), "not 0 to {last}: {numbers}");
        assert_eq!(self.shell("cat /tmp/failed 2>/dev/null || true"), "", "a write has failed");
        last
    }

    /// From here on the guest reads from its disk /dev/vda, and not what it remembers.
    #[track_caller]
    pub fn forget_disk(&mut self) {
        self.shell("sync; echo 3 >/proc/sys/vm/drop_caches; blockdev --flushbufs /dev/vda");
    }

    /// Tells a clone who it is: the generation id that it sees, the time, fresh entropy, and this host name.
    #[track_caller]
    pub fn becomes_itself(&mut self, hostname: &str) -> [u8; 16] {
        self.becomes_itself_at(hostname, Vec::new())
    }

    /// As [`LinuxAgent::becomes_itself`], and these are its network interfaces.
    #[track_caller]
    pub fn becomes_itself_at(&mut self, hostname: &str, interfaces: Vec<Interface>) -> [u8; 16] {
        let generation = self.generation();
        let mut entropy = [0; 32];
        rustix::rand::getrandom(&mut entropy, rustix::rand::GetRandomFlags::empty()).expect("the host has entropy");
        let resumed = Resumed { generation, time_ns: wall_clock().as_nanos() as u64, entropy };
        let identity = Identity { hostname: Some(hostname.to_owned()), interfaces, ..Identity::new(resumed) };
        let taken = self.0.identity(&identity).unwrap_or_else(|e| panic!("{hostname} did not become itself: {e}"));
        assert_eq!(taken, generation);
        generation
    }

    /// How far the guest's wall clock is from the host's.
    #[track_caller]
    pub fn clock_error(&mut self) -> Duration {
        let before = wall_clock();
        let guest = match self.ask(Request::Time) {
            Response::Time { wall_ns, .. } => Duration::from_nanos(wall_ns),
            other => panic!("no time: {other:?}"),
        };
        before.saturating_sub(guest).max(guest.saturating_sub(wall_clock()))
    }
}

/// A shell command, to be run.
pub fn shell(command: &str) -> Exec {
    Exec { argv: ["/bin/sh", "-c", command].map(String::from).to_vec(), ..Exec::default() }
}

/// Time since the Unix epoch, by this host's clock.
pub fn wall_clock() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("it is later than 1970")
}

/// A minute passes by this host's wall clock. In the reference machine, whose clock is nobody's, it is moved.
pub fn a_minute_passes() {
    const MINUTE: Duration = Duration::from_secs(60);
    if std::env::var_os("COPPICE_RIG").is_none() {
        return std::thread::sleep(MINUTE);
    }
    let then = wall_clock() + MINUTE;
    let then = rustix::time::Timespec { tv_sec: then.as_secs() as i64, tv_nsec: i64::from(then.subsec_nanos()) };
    rustix::time::clock_settime(rustix::time::ClockId::Realtime, then)
        .expect("the reference machine's clock can be set");
}

/// A cpio archive (format newc) of files, with the directories above them.
fn archive(files: &[(&str, u32, &[u8])]) -> Vec<u8> {
    let mut archive = Vec::new();
    let mut entry = |path: &str, mode: u32, content: &[u8]| {
        let fields = [0, mode, 0, 0, 1, 0, content.len() as u32, 0, 0, 0, 0, path.len() as u32 + 1, 0];
        archive.extend(b"070701");
        archive.extend(fields.iter().flat_map(|field| format!("{field:08X}").into_bytes()));
        for bytes in [&[path.as_bytes(), b"\0"].concat(), content] {
            archive.extend(bytes);
            archive.resize(archive.len().next_multiple_of(4), 0);
        }
    };
    for (path, mode, content) in files {
        let path = path.trim_start_matches('/');
        for (at, _) in path.match_indices('/') {
            entry(&path[..at], 0o040_755, b"");
        }
        entry(path, 0o100_000 | mode, content);
    }
    entry("TRAILER!!!", 0, b"");
    archive
}

/// The numbers that the minimal guest has counted, in order.
pub fn counts(console: &str) -> Vec<u64> {
    lines(console).filter_map(|line| line.strip_prefix("coppice: ")?.parse().ok()).collect()
}

/// Whole lines, without what ends them. A last one that may be cut short is none.
fn lines(console: &str) -> impl Iterator<Item = &str> {
    console.rfind('\n').map_or("", |end| &console[..end]).lines().map(str::trim_end)
}

/// Panics if the kernel has complained of anything that a snapshot, a restore or a bad machine would make it complain of.
#[track_caller]
pub fn assert_calm(console: &str) {
    const COMPLAINTS: [&str; 9] =
        ["BUG:", "WARNING:", "Oops", "lockup", "rcu:", "hung task", "I/O error", "Call Trace", "ACPI Error"];
    for line in console.lines() {
        assert!(!COMPLAINTS.iter().any(|word| line.contains(word)), "the guest's kernel complains: {line}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_a_header_for_every_file_and_directory() {
        let archive = archive(&[("/a/b", 0o755, b"xyz")]);
        assert_eq!(archive.len() % 4, 0);
        let text = String::from_utf8_lossy(&archive);
        assert_eq!(text.matches("070701").count(), 3);
        // The mode, and where the name and the content are: a header has 110 bytes.
        assert_eq!((&text[14..22], &text[110..112]), ("000041ED", "a\0"));
        assert_eq!((&text[126..134], &text[222..232]), ("000081ED", "a/b\0\0\0xyz\0"));
    }

    #[test]
    fn only_whole_lines_count() {
        assert_eq!(counts("coppice: Linux is up\r\ncoppice: 1\r\n[ 1.0] noise\r\ncoppice: 2\r\ncoppice: 3"), [1, 2]);
        assert_eq!(counts("coppice: 1"), [0; 0]);
    }
}
