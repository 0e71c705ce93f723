//! What many clones of one snapshot cost that are alive at once: memory of the whole host, time, and processor while they stand idle.
//!
//! Each clone is restored by a process of its own, and has replied before the next is started. Guests that have booted, and share nothing,
//! stand beside them. What is counted of memory is by how much
//! `MemAvailable` of `/proc/meminfo` falls: everything that the host needs for them, the kernel's own structures as well.

use super::figure::{Figure, Series, Spread, Unit};
use super::guest::{Guest, PATIENCE, Workplace};
use super::restore::Backend;
use super::{BenchError, io_error};
use crate::host::proc;
use api_spec::agent::Pages;
use api_spec::snapshot::SnapshotCreate;
use api_spec::vm::MachineConfig;
use serde::Serialize;
use std::fmt;
use std::time::{Duration, Instant};

/// How many clones are compared, of the first and of the last.
const COMPARED: usize = 10;
/// For how long they are seen to stand idle.
const IDLE: Duration = Duration::from_secs(2);
/// How often memory is looked at, about.
const LOOKS: u32 = 50;
/// Most guests that boot, which takes its time.
const MOST_BOOTED: u32 = 100;
/// Memory in use of each guest, in MiB, where there is so much, and what it needs besides; and what it holds.
const USED_MIB: u64 = 8;
const GUEST_OWN_MIB: u64 = 16;
const SEED: u64 = 0x6465_6e73_6500;
/// Clock ticks in a second, as `/proc/PID/stat` counts them.
const TICKS: f64 = 100.0;

/// What to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// How many clones are to be alive at once.
    pub clones: u32,
    /// Guest memory, in MiB.
    pub memory_mib: u64,
}

impl Default for Options {
    fn default() -> Self {
        Options { clones: 200, memory_mib: 128 }
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

    fn used_mib(&self) -> u64 {
        USED_MIB.min(self.memory_mib.saturating_sub(GUEST_OWN_MIB))
    }
}

/// Where guests come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    /// The memory file of one snapshot.
    File,
    /// A page server, whose store they share.
    Shared,
    /// They have booted, each for itself, and have nothing in common.
    Booted,
}

impl Kind {
    fn title(self) -> &'static str {
        match self {
            Kind::File => Backend::File.title(),
            Kind::Shared => Backend::Shared.title(),
            Kind::Booted => "booted",
        }
    }

    fn name(self) -> &'static str {
        match self {
            Kind::File => "file",
            Kind::Shared => "shared",
            Kind::Booted => "booted",
        }
    }
}

/// What was found out of one kind of guests.
#[derive(Clone, Debug, Serialize)]
struct Row {
    kind: Kind,
    /// How many were alive at once.
    guests: u32,
    /// By how much less memory is available, for each, in KiB. With the page server's.
    host_kib: f64,
    /// What its own process has for itself, in KiB, in half of them no more.
    private_kib: u64,
    /// Threads of each.
    threads: u64,
    /// All of them, one after the other, until the last had replied, in seconds.
    seconds: f64,
    /// From the start of the process to the reply, of the first.
    first: Spread,
    /// The same of the last.
    last: Spread,
    /// What all of them together take of a processor while they stand idle.
    idle_cpu_percent: f64,
    #[serde(skip)]
    times: Vec<Duration>,
    /// How many were there when less memory was available by so much, in KiB.
    #[serde(skip)]
    memory: Vec<(usize, u64)>,
}

/// What was found out.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// How many clones were alive at once.
    clones: u32,
    /// Guest memory, in MiB.
    memory_mib: u64,
    /// How much of that guests had in use before they were snapshotted, in MiB.
    used_mib: u64,
    guests: Vec<Row>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { clones, memory_mib, used_mib, guests } = self;
        writeln!(f, "{clones} clones of {memory_mib} MiB alive at once, of a guest that had {used_mib} MiB in use\n")?;
        let names: String = guests.iter().map(|row| format!("{:>12}", row.kind.title())).collect();
        writeln!(f, "{:<50} {names}", "")?;
        let mut line = |what: &str, of: &dyn Fn(&Row) -> f64| {
            let figures: String = guests.iter().map(|row| format!("{:>12.1}", of(row))).collect();
            writeln!(f, "{what:<50} {figures}")
        };
        line("guests", &|row| f64::from(row.guests))?;
        line("memory of the host for each, KiB", &|row| row.host_kib)?;
        line("private memory of its process, p50, KiB", &|row| row.private_kib as f64)?;
        line("threads of each", &|row| row.threads as f64)?;
        line("time for all, s", &|row| row.seconds)?;
        line("from exec to the reply, first 10, p50, us", &|row| row.first.p50_us)?;
        line("from exec to the reply, last 10, p50, us", &|row| row.last.p50_us)?;
        line("processor while all stand idle, %", &|row| row.idle_cpu_percent)
    }
}

impl super::Report for Report {
    fn figures(&self) -> Vec<Figure> {
        let direct = self.guests.iter().find(|row| row.kind == Kind::Booted).map(|row| row.host_kib);
        let of_row = |row: &Row| {
            let Row { kind, guests, .. } = row;
            let name = |what: &str| format!("density.{}.{what}", kind.name());
            let title = |what: &str| format!("{}, {guests} guests: {what}", kind.title());
            // Where more is available afterwards, others have given it back, and nothing was measured.
            let host_kib = if row.host_kib > 0.0 { row.host_kib } else { f64::NAN };
            let mut figures = vec![
                Figure::value(name("host-kib"), title("memory of the host for each"), Unit::Kib, host_kib),
                Figure::value(
                    name("private-kib"),
                    title("private memory of its process"),
                    Unit::Kib,
                    row.private_kib as f64,
                ),
                Figure::value(name("seconds"), title("time for all"), Unit::Seconds, row.seconds),
                Figure::spread(name("reply"), title("from exec to the reply"), &Spread::of(row.times.clone())),
                Figure::value(
                    name("idle"),
                    title("processor while all stand idle"),
                    Unit::Percent,
                    row.idle_cpu_percent,
                ),
            ];
            if *guests as usize >= 2 * COMPARED {
                let growth = row.last.p50_us / row.first.p50_us.max(0.1);
                figures.push(Figure::value(
                    name("growth"),
                    title("the last to reply beside the first"),
                    Unit::Times,
                    growth,
                ));
            }
            if let Some(direct) = direct.filter(|direct| *kind != Kind::Booted && *direct > 0.0) {
                let share = host_kib / direct * 100.0;
                figures.push(Figure::value(
                    name("to-booted"),
                    title("memory beside guests that booted"),
                    Unit::Percent,
                    share,
                ));
            }
            figures
        };
        self.guests.iter().flat_map(of_row).collect()
    }

    fn series(&self) -> Vec<Series> {
        /// As many points as a line shows.
        const POINTS: usize = 200;
        let of_row = |row: &Row| {
            let title = row.kind.title().to_owned();
            let step = row.times.len().div_ceil(POINTS).max(1);
            // What one of them took says little: the middle of its neighbourhood is drawn.
            let times = row.times.chunks(step).enumerate().map(|(number, times)| {
                let at = number * step + times.len();
                (at as f64, (Spread::of(times.to_vec()).p50_us / 100.0).round() / 10.0)
            });
            let memory = row.memory.iter().map(|(at, kib)| (*at as f64, (*kib as f64 / 102.4).round() / 10.0));
            let series = |what: &str, y: &str, points| Series {
                name: format!("density.{what}.{}", row.kind.name()),
                title: title.clone(),
                x: "guests alive at once".into(),
                y: y.into(),
                points,
            };
            [
                series("time", "from exec to the reply, ms", times.collect()),
                series("memory", "memory of the host, MiB", memory.collect()),
            ]
        };
        self.guests.iter().flat_map(of_row).collect()
    }
}

/// Measures.
pub fn run(options: &Options) -> Result<Report, BenchError> {
    let Options { clones, memory_mib } = *options;
    let bench = Bench { place: Workplace::new(PATIENCE)?, options: *options };
    let mut guest = bench.place.boot_as("template", bench.machine())?;
    bench.use_memory(&mut guest)?;
    guest.api.snapshot(&SnapshotCreate::of(bench.place.path("snap")))?;
    drop(guest);
    let of = [(Kind::File, clones), (Kind::Shared, clones), (Kind::Booted, clones.min(MOST_BOOTED))];
    let guests = of.into_iter().map(|(kind, count)| bench.measure(kind, count)).collect::<Result<_, _>>()?;
    Ok(Report { clones, memory_mib, used_mib: options.used_mib(), guests })
}

struct Bench {
    place: Workplace,
    options: Options,
}

impl Bench {
    fn machine(&self) -> MachineConfig {
        MachineConfig { mem_size_mib: self.options.memory_mib, ..Default::default() }
    }

    /// Has a guest that has booted use memory.
    fn use_memory(&self, guest: &mut Guest) -> Result<(), BenchError> {
        guest.fill(Pages::run(0, self.options.used_mib() as u32 * 256), SEED)
    }

    fn start(&self, kind: Kind, number: u32) -> Result<Guest, BenchError> {
        let name = format!("{}{number}", kind.name());
        match kind {
            Kind::Booted => self.place.boot_as(&name, self.machine()),
            Kind::File | Kind::Shared => self.place.restore_as(&name, &self.place.path("snap"), |vmm| {
                if kind == Kind::Shared {
                    vmm.arg("--uffd").arg(self.place.path("uffd.sock"));
                }
            }),
        }
    }

    fn measure(&self, kind: Kind, count: u32) -> Result<Row, BenchError> {
        // What the first brings into caches is nobody's cost.
        drop(self.place.restore(&self.place.path("snap"), |_| ())?);
        let before = available_kib()?;
        let _server = match kind {
            Kind::Shared => {
                Some(self.place.start_page_server(&self.place.path("snap"), &self.place.path("uffd.sock"), &[])?)
            }
            Kind::File | Kind::Booted => None,
        };
        let (mut guests, mut times, mut memory) = (Vec::<Guest>::new(), Vec::new(), Vec::new());
        let (began, step) = (Instant::now(), count.div_ceil(LOOKS));
        for number in 0..count {
            let start = Instant::now();
            let mut guest = self.start(kind, number)?;
            times.push(start.elapsed());
            if kind == Kind::Booted {
                self.use_memory(&mut guest)?;
            }
            // A stream for each would be a cost of ours.
            guest.hang_up();
            guests.push(guest);
            if (number + 1).is_multiple_of(step) {
                memory.push((guests.len(), before.saturating_sub(available_kib()?)));
            }
        }
        let seconds = began.elapsed().as_secs_f64();
        let after = available_kib()?;
        let ticks = || guests.iter().map(|guest| ticks(guest.child.pid())).sum::<Result<u64, _>>();
        let (from, start) = (ticks()?, Instant::now());
        std::thread::sleep(IDLE);
        let idle_cpu_percent = (ticks()? - from) as f64 / TICKS / start.elapsed().as_secs_f64() * 100.0;
        let status = |field: &str| -> Result<u64, BenchError> {
            let values = guests.iter().map(|guest| status(guest.child.pid(), field));
            let mut values = values.collect::<Result<Vec<u64>, _>>()?;
            values.sort_unstable();
            Ok(values[values.len() / 2])
        };
        let (private_kib, threads) = (status("RssAnon:")?, status("Threads:")?);
        for guest in &mut guests {
            guest.child.ask_to_end();
        }
        let compared = COMPARED.min(times.len());
        Ok(Row {
            kind,
            guests: count,
            host_kib: (before as f64 - after as f64) / f64::from(count),
            private_kib,
            threads,
            seconds,
            first: Spread::of(times[..compared].to_vec()),
            last: Spread::of(times[times.len() - compared..].to_vec()),
            idle_cpu_percent,
            times,
            memory,
        })
    }
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
    let missing = || io_error("the kernel does not say what a benchmark asks for")(std::io::ErrorKind::NotFound.into());
    proc::number_after(text, name).ok_or_else(missing)
}

/// What a process and its threads have taken of a processor, in clock ticks.
fn ticks(pid: u32) -> Result<u64, BenchError> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat"));
    Ok(proc::ticks(&text.map_err(io_error("cannot read a clone's /proc/PID/stat"))?).0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_bounds() {
        let check = |clones, memory_mib| Options { clones, memory_mib }.check();
        assert!(check(1, 8).is_ok() && check(10_000, 4096).is_ok());
        for (clones, memory_mib, option) in
            [(0, 128, "--n"), (10_001, 128, "--n"), (1, 7, "--memory"), (1, 4097, "--memory")]
        {
            assert!(check(clones, memory_mib).is_err_and(|error| error.starts_with(option)));
        }
    }

    #[test]
    fn the_kernels_figures_are_found() {
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
