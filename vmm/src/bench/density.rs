//! What many clones of one snapshot cost that are alive at once: memory of the whole host, time, and processor while they stand idle.
//!
//! Each clone is restored by a process of its own, and has replied before the next is started. What is counted of memory is by how much
//! `MemAvailable` of `/proc/meminfo` falls: everything that the host needs for them, the kernel's own structures as well.

use super::guest::{Guest, PATIENCE, Workplace};
use super::restore::Backend;
use super::{BenchError, Spread, host_line, io_error};
use crate::host::{self, Host};
use api_spec::snapshot::SnapshotCreate;
use api_spec::vm::MachineConfig;
use serde::Serialize;
use std::fmt;
use std::time::{Duration, Instant};

/// How many clones are compared, of the first and of the last.
const COMPARED: usize = 10;
/// For how long they are seen to stand idle.
const IDLE: Duration = Duration::from_secs(2);
/// Clock ticks in a second, as `/proc/PID/stat` counts them.
const TICKS: f64 = 100.0;

/// What to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// How many clones are to be alive at once.
    pub clones: u32,
    /// Guest memory, in MiB.
    pub memory_mib: u64,
    /// Print JSON.
    pub json: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options { clones: 200, memory_mib: 128, json: false }
    }
}

impl Options {
    /// Whether the values make sense.
    pub fn check(&self) -> Result<(), String> {
        match *self {
            Options { clones: 0 | 10_001.., .. } => Err(format!("--n {}: must be 1 to 10000", self.clones)),
            Options { memory_mib: 0..8 | 4097.., .. } => {
                Err(format!("--memory {}: must be 8 to 4096", self.memory_mib))
            }
            _ => Ok(()),
        }
    }
}

/// What was found out of clones over one kind of memory.
#[derive(Clone, Debug, Serialize)]
struct Row {
    backend: Backend,
    /// By how much less memory is available, for each clone, in KiB. With the page server's.
    host_kib: f64,
    /// What a clone's own process has for itself, in KiB, in half of them no more.
    private_kib: u64,
    /// Threads of a clone.
    threads: u64,
    /// All of them, one after the other, until the last had replied, in seconds.
    seconds: f64,
    /// From the start of the process to the reply, of the first clones.
    first: Spread,
    /// The same of the last.
    last: Spread,
    /// What all of them together take of a processor while they stand idle.
    idle_cpu_percent: f64,
}

/// What was found out.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    host: Host,
    /// How many clones were alive at once.
    clones: u32,
    /// Guest memory, in MiB.
    memory_mib: u64,
    backends: Vec<Row>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { host, clones, memory_mib, backends } = self;
        writeln!(f, "{}\n{clones} clones of {memory_mib} MiB alive at once\n", host_line(host))?;
        let names: Vec<&str> = backends.iter().map(|row| row.backend.name()).collect();
        writeln!(f, "{:<50} {}", "", names.iter().map(|name| format!("{name:>12}")).collect::<String>())?;
        let mut line = |what: &str, of: &dyn Fn(&Row) -> f64| {
            let figures: String = backends.iter().map(|row| format!("{:>12.1}", of(row))).collect();
            writeln!(f, "{what:<50} {figures}")
        };
        line("memory of the host for each, KiB", &|row| row.host_kib)?;
        line("private memory of its process, p50, KiB", &|row| row.private_kib as f64)?;
        line("threads of each", &|row| row.threads as f64)?;
        line("time for all, s", &|row| row.seconds)?;
        line("from exec to the reply, first 10, p50, us", &|row| row.first.p50_us)?;
        line("from exec to the reply, last 10, p50, us", &|row| row.last.p50_us)?;
        line("processor while all stand idle, %", &|row| row.idle_cpu_percent)
    }
}

/// Measures.
pub fn run(options: &Options) -> Result<Report, BenchError> {
    let place = Workplace::new(PATIENCE)?;
    let machine = MachineConfig { mem_size_mib: options.memory_mib, ..Default::default() };
    let guest = place.boot(machine)?;
    guest.api.snapshot(&SnapshotCreate::of(place.path("snap")))?;
    drop(guest);
    let rows = [Backend::File, Backend::Shared].map(|backend| measure(backend, options.clones, &place));
    let Options { clones, memory_mib, .. } = *options;
    let backends = rows.into_iter().collect::<Result<_, _>>()?;
    Ok(Report { host: host::summary(), clones, memory_mib, backends })
}

fn measure(backend: Backend, count: u32, place: &Workplace) -> Result<Row, BenchError> {
    let (snapshot, socket) = (place.path("snap"), place.path("uffd.sock"));
    // What the first clone brings into caches is nobody's cost.
    drop(place.restore(&snapshot, |_| ())?);
    let before = available_kib()?;
    let server = match backend {
        Backend::File => None,
        Backend::Shared => Some(place.start_page_server(&socket, &[])?),
    };
    let (mut clones, mut times, began) = (Vec::<Guest>::new(), Vec::new(), Instant::now());
    for number in 0..count {
        let start = Instant::now();
        let mut clone = place.restore_as(&format!("clone{number}"), &snapshot, |vmm| {
            if server.is_some() {
                vmm.arg("--uffd").arg(&socket);
            }
        })?;
        times.push(start.elapsed());
        // A stream for each would be a cost of ours.
        clone.hang_up();
        clones.push(clone);
    }
    let seconds = began.elapsed().as_secs_f64();
    let after = available_kib()?;
    let ticks = || clones.iter().map(|clone| ticks(clone.child.pid())).sum::<Result<u64, _>>();
    let (from, start) = (ticks()?, Instant::now());
    std::thread::sleep(IDLE);
    let idle_cpu_percent = (ticks()? - from) as f64 / TICKS / start.elapsed().as_secs_f64() * 100.0;
    let status = |field: &str| -> Result<u64, BenchError> {
        let values = clones.iter().map(|clone| status(clone.child.pid(), field));
        let mut values = values.collect::<Result<Vec<u64>, _>>()?;
        values.sort_unstable();
        Ok(values[values.len() / 2])
    };
    let (private_kib, threads) = (status("RssAnon:")?, status("Threads:")?);
    for clone in &mut clones {
        clone.child.ask_to_end();
    }
    let compared = COMPARED.min(times.len());
    let host_kib = before.saturating_sub(after) as f64 / f64::from(count);
    Ok(Row {
        backend,
        host_kib,
        private_kib,
        threads,
        seconds,
        first: Spread::of(times[..compared].to_vec()),
        last: Spread::of(times[times.len() - compared..].to_vec()),
        idle_cpu_percent,
    })
}

fn available_kib() -> Result<u64, BenchError> {
    let text = std::fs::read_to_string("/proc/meminfo").map_err(io_error("cannot read /proc/meminfo"))?;
    field(&text, "MemAvailable:")
}

fn status(pid: u32, name: &str) -> Result<u64, BenchError> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"));
    field(&text.map_err(io_error("cannot read a clone's /proc/PID/status"))?, name)
}

/// The number in the line of this name.
fn field(text: &str, name: &str) -> Result<u64, BenchError> {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    number.ok_or_else(|| {
        io_error("the kernel does not say what a benchmark asks for")(std::io::ErrorKind::NotFound.into())
    })
}

/// What a process and its threads have taken of a processor, in clock ticks.
fn ticks(pid: u32) -> Result<u64, BenchError> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    let text = text.map_err(io_error("cannot read a clone's /proc/PID/stat"))?;
    // The name, in parentheses, may hold anything; fields 14 and 15 of proc(5), and that is the second.
    let rest = text.rsplit_once(')').map_or("", |(_, rest)| rest);
    Ok(rest.split_whitespace().skip(11).take(2).filter_map(|ticks| ticks.parse::<u64>().ok()).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_bounds() {
        let check = |clones, memory_mib| Options { clones, memory_mib, json: false }.check();
        assert!(check(1, 8).is_ok() && check(10_000, 4096).is_ok());
        for (clones, memory_mib, option) in
            [(0, 128, "--n"), (10_001, 128, "--n"), (1, 7, "--memory"), (1, 4097, "--memory")]
        {
            assert!(check(clones, memory_mib).is_err_and(|error| error.starts_with(option)));
        }
    }

    #[test]
    fn the_kernels_figures_are_found() {
        assert_eq!(field("VmRSS:\t 7 kB\nThreads:\t4\n", "Threads:").unwrap(), 4);
        assert!(field("VmRSS:\t 7 kB\n", "Threads:").is_err());
        assert!(available_kib().unwrap() > 0);
        let own = std::process::id();
        let before = ticks(own).unwrap();
        let start = Instant::now();
        while ticks(own).unwrap() == before {
            assert!(start.elapsed() < Duration::from_secs(60));
        }
        assert!(status(own, "RssAnon:").unwrap() > 0);
    }
}
