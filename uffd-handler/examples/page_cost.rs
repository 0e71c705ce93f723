//! What a page costs: `cargo run --release -p uffd-handler --example page_cost`.
//!
//! Serves a snapshot of 128 MiB from a process of its own and touches its pages from this one: the first client in
//! order, the first client one page per chunk, the second client, and a write to pages that are there. Prints the
//! microseconds per page, as one JSON document.
#![allow(unsafe_code, reason = "it maps memory and touches it, as a guest would")]

use api_spec::handshake::{Hello, Region, VERSION};
use sandbox::confinement::Confinement;
use snapshot::create::{BytesSource, Facts, Staging};
use snapshot::manifest::Cpu;
use snapshot::state::MachineState;
use std::error::Error;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};
use uffd_handler::logging::{Level, Settings};
use uffd_handler::{Options, client};

const SIZE: usize = 128 << 20;
const PAGE: usize = 4096;
const CHUNK: usize = 65536;
const RUNS: usize = 5;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    let args: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    match &args[..] {
        [] => measure(),
        [socket, snapshot] => {
            let snapshots = vec![snapshot.clone()];
            Ok(uffd_handler::run(&Options {
                socket: socket.clone(),
                snapshots,
                cache: None,
                metrics: None,
                limits: Default::default(),
                ready_fd: None,
                end_with_parent: false,
                confinement: Confinement { seccomp: false, ..Confinement::default() },
                log: Settings::new(Level::Info, "page_cost"),
            })?)
        }
        _ => Err("no arguments are wanted".into()),
    }
}

fn measure() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let image = make_snapshot(&dir.path().join("snap"))?;
    let hello = Hello { version: VERSION, image, size: SIZE as u64, mode: Default::default() };
    let names = ["first_contiguous", "first_one_per_64k", "second_contiguous", "second_one_per_64k", "write_present"];
    let mut figures = vec![Vec::new(); names.len()];
    for _ in 0..RUNS {
        let contiguous = run_one(dir.path(), &hello, PAGE)?;
        let sparse = run_one(dir.path(), &hello, CHUNK)?;
        for (list, figure) in figures.iter_mut().zip([contiguous.0, sparse.0, contiguous.1, sparse.1, contiguous.2]) {
            list.push(figure);
        }
    }
    let median = |mut list: Vec<f64>| {
        list.sort_by(f64::total_cmp);
        (list[RUNS / 2] * 100.0).round() / 100.0
    };
    let document: serde_json::Map<_, _> =
        names.iter().zip(figures).map(|(name, list)| (format!("{name}_us"), median(list).into())).collect();
    println!("{}", serde_json::to_string_pretty(&document)?);
    Ok(())
}

fn make_snapshot(target: &Path) -> Result<String> {
    let memory: Vec<u8> = (0..SIZE / 8).flat_map(|i| ((i as u64 * 0x9e37_79b9_7f4a_7c15) | 1).to_le_bytes()).collect();
    let mut staging = Staging::begin(target)?;
    let digest = staging.write_memory(&mut BytesSource::new(&memory), &AtomicBool::new(false))?;
    let cpu = Cpu { vendor: "AuthenticAMD".into(), ..Cpu::default() };
    let host = snapshot::compat::HostFacts { arch: "x86_64".into(), cpu, kernel: String::from("6.18.0") };
    let facts = Facts { vmm_version: "0.1.0".into(), host, devices: Default::default(), readiness: None, config: None };
    Ok(staging.commit(digest, facts, &MachineState::blank(1))?.memory.root)
}

/// A server that ends with this value.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Microseconds per page: first client, second client, and writing where the second has read.
fn run_one(dir: &Path, hello: &Hello, stride: usize) -> Result<(f64, f64, f64)> {
    let socket = dir.join("s");
    let _server = Server(Command::new(std::env::current_exe()?).args([&socket, &dir.join("snap")]).spawn()?);
    let first = connect(&socket, hello)?;
    let first_us = first.touch(stride, false);
    let second = connect(&socket, hello)?;
    Ok((first_us, second.touch(stride, false), second.touch(stride, true)))
}

struct Guest {
    base: *mut u8,
    _uffd: userfaultfd::Uffd,
    _stream: std::os::unix::net::UnixStream,
}

fn connect(socket: &Path, hello: &Hello) -> Result<Guest> {
    let deadline = Instant::now() + Duration::from_secs(10);
    let greeted = loop {
        match client::greet(socket, hello) {
            Err(client::ClientError::Connect { .. }) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(2))
            }
            other => break other?,
        }
    };
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_NORESERVE);
    // SAFETY: a new mapping at an address of the kernel's choice.
    let base = unsafe { libc::mmap(std::ptr::null_mut(), SIZE, prot, flags, greeted.store.as_raw_fd(), 0) };
    if base == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error().into());
    }
    let uffd = uffd_handler::uffd::create()?;
    uffd.register(base, SIZE)?;
    let whole = Region { base_host_virt_addr: base as u64, size: SIZE as u64, offset: 0, page_size: PAGE as u64 };
    let stream = greeted.attach(vec![whole], &uffd)?;
    Ok(Guest { base: base.cast(), _uffd: uffd, _stream: stream })
}

impl Guest {
    fn touch(&self, stride: usize, write: bool) -> f64 {
        let begin = Instant::now();
        for at in (0..SIZE).step_by(stride) {
            // SAFETY: inside of the mapping, which is never unmapped.
            unsafe {
                let byte = self.base.add(at);
                if write {
                    byte.write_volatile(1)
                } else {
                    let _ = std::hint::black_box(byte.read_volatile());
                }
            }
        }
        begin.elapsed().as_secs_f64() * 1e6 / (SIZE / stride) as f64
    }
}
