//! A snapshot with known words, a server process, and clients of it.
#![allow(dead_code, missing_docs, unsafe_code, reason = "each test program uses its part of this; clients map memory")]

pub mod source;

use api_spec::handshake::{Hello, Mode, Region, Reply, VERSION};
use api_spec::page_server::Metrics;
use snapshot::create::{BytesSource, Facts, Staging};
use snapshot::manifest::{Cpu, Manifest};
use snapshot::state::MachineState;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};
use uffd_handler::client::{self, ClientError, Greeted};
use userfaultfd::{FeatureFlags, Uffd};

pub const PAGE: usize = 4096;
pub const CHUNK: usize = 65536;
pub const MIB: usize = 1 << 20;
/// Longest that anything may take here; only a failure takes as long.
pub const PATIENCE: Duration = Duration::from_secs(60);
static NEVER: AtomicBool = AtomicBool::new(false);

/// Runs a test unless there is no userfaultfd here; fails if it does not come to an end.
pub fn with_userfaultfd(test: impl FnOnce() + Send + 'static) {
    if let Err(error) = uffd_handler::uffd::create() {
        return test_skip::skip(error);
    }
    let (done, wait) = mpsc::channel();
    // Under the test's own name, so that it can still say that it is skipped.
    let name = std::thread::current().name().unwrap_or("test").to_owned();
    let body = std::thread::Builder::new().name(name).spawn(move || {
        test();
        let _ = done.send(());
    });
    let body = body.unwrap();
    match wait.recv_timeout(2 * PATIENCE) {
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("hangs"),
        _ => body.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
    }
}

pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The word at an index of the image: never zero, except that every eleventh chunk is empty.
pub fn word(index: usize) -> u64 {
    if (index * 8 / CHUNK) % 11 == 10 { 0 } else { (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1 }
}

/// A snapshot in a directory of its own, where the sockets are too.
pub struct Sample {
    pub root: tempfile::TempDir,
    pub manifest: Manifest,
}

impl Sample {
    pub fn of_bytes(size: usize) -> Sample {
        Sample::of_words(size, word)
    }

    pub fn of_words(size: usize, word: impl Fn(usize) -> u64) -> Sample {
        let root = tempfile::tempdir().unwrap();
        let memory: Vec<u8> = (0..size / 8).flat_map(|index| word(index).to_le_bytes()).collect();
        let mut staging = Staging::begin(&root.path().join("snap")).unwrap();
        let digest = staging.write_memory(&mut BytesSource::new(&memory), &NEVER).unwrap();
        let manifest = staging.commit(digest, facts(), &MachineState::blank(1)).unwrap();
        Sample { root, manifest }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    pub fn socket(&self) -> PathBuf {
        self.path("s")
    }

    pub fn size(&self) -> usize {
        self.manifest.memory.size_bytes as usize
    }

    pub fn hello(&self) -> Hello {
        Hello {
            version: VERSION,
            image: self.manifest.memory.root.clone(),
            size: self.size() as u64,
            mode: Mode::Shared,
        }
    }

    /// Changes one byte of the image file, whatever its mode.
    pub fn flip_byte(&self, at: usize) {
        let path = self.path("snap/mem.bin");
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[at] ^= 0x10;
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, bytes).unwrap();
    }
}

fn facts() -> Facts {
    let cpu = Cpu { vendor: "AuthenticAMD".into(), ..Cpu::default() };
    let host = snapshot::compat::HostFacts { arch: "x86_64".into(), cpu, kernel: "6.18.0".into() };
    Facts { vmm_version: "0.1.0".into(), host, devices: Default::default(), readiness: None, config: None }
}

pub fn server_command() -> Command {
    Command::new(env!("CARGO_BIN_EXE_uffd-handler"))
}

/// A running server; killed when dropped.
pub struct Server {
    child: Child,
    metrics: PathBuf,
    log: Arc<Mutex<String>>,
}

impl Server {
    pub fn start(sample: &Sample) -> Server {
        Server::start_with(sample, &[])
    }

    /// With more arguments.
    pub fn start_with(sample: &Sample, more: &[&OsStr]) -> Server {
        Server::start_program(sample, sample.path("snap/snap.json").as_ref(), more)
    }

    /// Serves the sample from this path or URL.
    pub fn start_from(sample: &Sample, snapshot: impl AsRef<OsStr>) -> Server {
        Server::start_program(sample, snapshot.as_ref(), &[])
    }

    /// Serves this path or URL, with more arguments.
    pub fn start_program(sample: &Sample, snapshot: &OsStr, more: &[&OsStr]) -> Server {
        let metrics = sample.path("m");
        let mut command = server_command();
        command.arg("--socket").arg(sample.socket()).arg("--metrics").arg(&metrics).args(more);
        command.arg("--snapshot").arg(snapshot).stderr(Stdio::piped());
        // SAFETY: a plain system call without pointers.
        let die_with_parent = || match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        };
        // SAFETY: prctl is a plain system call, and all that happens between fork and exec.
        unsafe { command.pre_exec(die_with_parent) };
        let mut child = command.spawn().unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let (stderr, copy) = (child.stderr.take().unwrap(), log.clone());
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                copy.lock().unwrap().push_str(&(line + "\n"));
            }
        });
        let mut server = Server { child, metrics, log };
        until("server listens", || {
            assert_eq!(server.child.try_wait().unwrap(), None, "{}", server.log());
            // An answer, not only a connection: it has set up all that it needs then.
            api_spec::client::metrics::read(&server.metrics, PATIENCE).is_ok()
        });
        server
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    pub fn logged(&self, part: &str) -> usize {
        self.log().lines().filter(|line| line.contains(part)).count()
    }

    pub fn metrics(&self) -> Metrics {
        api_spec::client::metrics::read(&self.metrics, PATIENCE).unwrap()
    }

    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    pub fn signal(&self, signal: i32) {
        signal_process(self.pid(), signal);
    }

    pub fn wait(&mut self) -> Option<i32> {
        until("server ends", || self.child.try_wait().unwrap().is_some());
        self.child.wait().unwrap().code()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- the server's log:\n{}", self.log());
        }
    }
}

pub fn signal_process(pid: u32, signal: i32) {
    // SAFETY: kill is a plain system call; the process is a child that was not waited for yet.
    assert_eq!(unsafe { libc::kill(pid as i32, signal) }, 0);
}

/// Memory mapped from a store.
#[derive(Debug)]
pub struct View {
    base: *mut u8,
    len: usize,
}

// SAFETY: raw memory, accessed a word at a time with volatile operations; the tests' threads use it as a guest's would.
unsafe impl Send for View {}
// SAFETY: as above.
unsafe impl Sync for View {}

impl View {
    /// Maps a store privately. Reading it before it is registered damages the store.
    pub fn map(store: &impl AsRawFd, len: usize) -> View {
        View::try_map(store, len, libc::MAP_PRIVATE | libc::MAP_NORESERVE).unwrap()
    }

    /// Maps a store so that writes would reach it.
    pub fn try_map_shared(store: &impl AsRawFd, len: usize) -> std::io::Result<View> {
        View::try_map(store, len, libc::MAP_SHARED)
    }

    /// Private memory of nobody's, as a guest in copy mode has it.
    pub fn anonymous(len: usize) -> View {
        View::try_map(&-1, len, libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_ANONYMOUS).unwrap()
    }

    /// Puts fresh memory in the place of some that is there, as nobody should who is served.
    pub fn replace(&self, at: usize, len: usize) {
        assert!(at + len <= self.len);
        let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the range lies in this mapping, and stays mapped; its users look at words only.
        let base = unsafe { libc::mmap(self.base.add(at).cast(), len, prot, flags, -1, 0) };
        assert_ne!(base, libc::MAP_FAILED);
    }

    /// Maps a file so as to look at it.
    pub fn map_readable(file: &impl AsRawFd, len: usize) -> View {
        View::map_as(file, len, libc::PROT_READ, libc::MAP_SHARED).unwrap()
    }

    fn try_map(store: &impl AsRawFd, len: usize, flags: i32) -> std::io::Result<View> {
        View::map_as(store, len, libc::PROT_READ | libc::PROT_WRITE, flags)
    }

    fn map_as(store: &impl AsRawFd, len: usize, prot: i32, flags: i32) -> std::io::Result<View> {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, store.as_raw_fd(), 0) };
        if base == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        Ok(View { base: base.cast(), len })
    }

    pub fn address(&self) -> u64 {
        self.base as u64
    }

    pub fn get(&self, index: usize) -> u64 {
        assert!(index * 8 + 8 <= self.len);
        // SAFETY: aligned and inside of the mapping, which lives as long as `self`.
        unsafe { self.base.cast::<u64>().add(index).read_volatile() }
    }

    pub fn set(&self, index: usize, value: u64) {
        assert!(index * 8 + 8 <= self.len);
        // SAFETY: as in `get`; the mapping is writable.
        unsafe { self.base.cast::<u64>().add(index).write_volatile(value) }
    }

    /// The bytes, for system calls to read or write; not to be touched by Rust code meanwhile.
    #[allow(clippy::mut_from_ref, reason = "it is memory of a guest, which its users share")]
    pub fn raw(&self, at: usize, len: usize) -> &mut [u8] {
        assert!(at + len <= self.len);
        // SAFETY: inside of the mapping; only the kernel looks at it, while the one caller waits.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(at), len) }
    }

    pub fn advise(&self, at: usize, len: usize, advice: i32) -> std::io::Result<()> {
        // SAFETY: only advice that leaves the mapping mapped is given.
        match unsafe { libc::madvise(self.base.add(at).cast(), len, advice) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    }

    /// Whether a page is there, without touching it.
    pub fn is_resident(&self, page: usize) -> bool {
        assert!((page + 1) * PAGE <= self.len);
        let mut resident = 0;
        // SAFETY: the page lies in the mapping, and one byte is written for one page.
        assert_eq!(unsafe { libc::mincore(self.base.add(page * PAGE).cast(), PAGE, &mut resident) }, 0);
        resident & 1 == 1
    }

    /// How many pages are there.
    pub fn resident_pages(&self) -> usize {
        (0..self.len.div_ceil(PAGE)).filter(|page| self.is_resident(*page)).count()
    }

    /// Compares the words of one page.
    pub fn check_page(&self, page: usize) {
        for index in page * PAGE / 8..(page + 1) * PAGE / 8 {
            let (got, want) = (self.get(index), word(index));
            assert_eq!(got, want, "page {page} word {index:#x}");
        }
    }

    pub fn check_all(&self) {
        (0..self.len / PAGE).for_each(|page| self.check_page(page));
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

/// A guest, as far as the server can tell.
pub struct Client {
    pub stream: UnixStream,
    pub view: View,
    pub uffd: Uffd,
}

impl Client {
    pub fn greet(sample: &Sample) -> Result<Greeted, ClientError> {
        client::greet(&sample.socket(), &sample.hello())
    }

    /// Connects, with its memory in one region.
    pub fn connect(sample: &Sample) -> Client {
        Client::connect_split(sample, &[])
    }

    /// Connects, with its memory cut into regions at these offsets. In the message the last comes first.
    pub fn connect_split(sample: &Sample, cuts: &[usize]) -> Client {
        let greeted = Client::greet(sample).unwrap();
        let view = View::map(&greeted.store, sample.size());
        let uffd = register(&view);
        let bounds: Vec<usize> = [&[0], cuts, &[sample.size()]].concat();
        let region = |pair: &[usize]| region(view.address() + pair[0] as u64, pair[1] - pair[0], pair[0]);
        let regions = bounds.windows(2).map(region).rev().collect();
        let stream = greeted.attach(regions, &uffd).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Client { stream, view, uffd }
    }

    /// Waits until the server has closed the connection; returns what it said before.
    pub fn wait_for_end(&self) -> String {
        let mut text = String::new();
        (&self.stream).read_to_string(&mut text).unwrap();
        text
    }
}

/// A guest in copy mode: its memory is private, and tells when some is given back.
pub struct CopyClient {
    pub stream: UnixStream,
    pub view: View,
    pub uffd: Uffd,
}

impl CopyClient {
    /// Connects as Firecracker does, with its memory cut into regions at these offsets.
    pub fn firecracker(socket: &Path, size: usize, cuts: &[usize]) -> CopyClient {
        let (view, uffd) = CopyClient::memory(size);
        let bounds: Vec<usize> = [&[0], cuts, &[size]].concat();
        let region = |pair: &[usize]| region(view.address() + pair[0] as u64, pair[1] - pair[0], pair[0]);
        let regions: Vec<Region> = bounds.windows(2).map(region).collect();
        let stream = client::hand_over(socket, None, &regions, &uffd).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        CopyClient { stream, view, uffd }
    }

    /// Connects with a hello of ours.
    pub fn ours(socket: &Path, hello: &Hello) -> CopyClient {
        let promised = client::ask_for_copies(socket, hello).unwrap();
        let (view, uffd) = CopyClient::memory(hello.size as usize);
        let stream = promised.attach(vec![region(view.address(), hello.size as usize, 0)], &uffd).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        CopyClient { stream, view, uffd }
    }

    /// Puts a page into this memory, and tells nobody who waits for it.
    pub fn put_without_waking(&self, at: usize, page: &[u8; PAGE]) {
        assert!(at + PAGE <= self.view.len);
        // SAFETY: the source is an array, the target lies in the view; the kernel only adds a page that is absent.
        let copied = unsafe { self.uffd.copy(page.as_ptr().cast(), self.view.base.add(at).cast(), PAGE, false) };
        assert_eq!(copied.unwrap(), PAGE);
    }

    pub fn memory(size: usize) -> (View, Uffd) {
        let view = View::anonymous(size);
        let uffd = uffd_handler::uffd::create_with(FeatureFlags::EVENT_REMOVE).unwrap();
        uffd.register(view.base.cast(), view.len).unwrap();
        (view, uffd)
    }
}

/// All that the server says until it closes the connection.
pub fn last_words(mut stream: &UnixStream) -> String {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut text = Vec::new();
    match stream.read_to_end(&mut text) {
        Err(error) if error.kind() != ErrorKind::ConnectionReset => panic!("not closed: {error}"),
        _ => String::from_utf8_lossy(&text).into_owned(),
    }
}

/// Sends a ping and reads the answer.
pub fn ping(mut stream: &UnixStream, ping: u64) -> Reply {
    stream.write_all(format!("{{\"ping\":{ping}}}\n").as_bytes()).unwrap();
    next_reply(stream)
}

/// Reads one answer.
pub fn next_reply(mut stream: &UnixStream) -> Reply {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        line.extend(byte);
    }
    serde_json::from_slice(&line).unwrap()
}

pub fn register(view: &View) -> Uffd {
    let uffd = uffd_handler::uffd::create().unwrap();
    uffd.register(view.base.cast(), view.len).unwrap();
    uffd
}

pub fn region(base: u64, size: usize, offset: usize) -> Region {
    Region { base_host_virt_addr: base, size: size as u64, offset: offset as u64, page_size: PAGE as u64 }
}

/// Maps a store without userfaultfd and reads a page of it, as nobody should.
pub fn read_unregistered(sample: &Sample, page: usize) {
    let greeted = Client::greet(sample).unwrap();
    let view = View::map(&greeted.store, sample.size());
    assert_eq!(view.get(page * PAGE / 8), 0, "a hole reads as zero");
}

pub fn exists(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok()
}
