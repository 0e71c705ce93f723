//! How long a call of the REST API takes, and how soon after its start a vmm can be called.

use super::figure::{Figure, Spread, Unit};
use super::guest::{PATIENCE, Workplace, write_config};
use super::{BenchError, io_error};
use api_spec::vm::{BootSource, InstanceInfo, InstanceState, MachineConfig, VmConfig};
use serde::Serialize;
use std::fmt;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How often to try whether a vmm can be called.
const AGAIN: Duration = Duration::from_micros(50);
/// How many calls come before those that count.
const WARM_UP: u32 = 100;
/// About how long a request and its answer are, in bytes.
const REQUEST: usize = 36;
const ANSWER: usize = 260;

/// What to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Number of calls.
    pub calls: u32,
    /// Number of processes to start.
    pub starts: u32,
}

impl Default for Options {
    fn default() -> Self {
        Options { calls: 5000, starts: 20 }
    }
}

impl Options {
    /// Whether the values make sense.
    pub fn check(&self) -> Result<(), String> {
        match self {
            Options { calls: 0 | 1_000_001.., .. } => Err(format!("--calls {}: must be 1 to 1000000", self.calls)),
            Options { starts: 0 | 1001.., .. } => Err(format!("--starts {}: must be 1 to 1000", self.starts)),
            _ => Ok(()),
        }
    }
}

/// What was found out.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// `GET /` on a running VM, over a connection that stays open.
    pub get_info: Spread,
    /// As many bytes there and back between two threads over a Unix socket, and nothing else.
    pub socket_round_trip: Spread,
    /// Median of the first, divided by that of the second.
    pub ratio: f64,
    /// From before a process was started until its API took a connection.
    pub start_to_connection: Spread,
    /// Number of calls.
    pub calls: u32,
    /// Number of processes.
    pub starts: u32,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<34} {}", "", Spread::heading())?;
        for (name, spread) in [
            ("GET / on a running VM", self.get_info),
            ("as many bytes over a socket", self.socket_round_trip),
            ("process start until a connection", self.start_to_connection),
        ] {
            writeln!(f, "{name:<34} {}", spread.columns())?;
        }
        writeln!(
            f,
            "\nGET / takes {:.1} times what the socket alone does ({} calls, {} starts)",
            self.ratio, self.calls, self.starts
        )
    }
}

impl super::Report for Report {
    fn figures(&self) -> Vec<Figure> {
        vec![
            Figure::spread("api.get-info", "GET / on a running VM", &self.get_info),
            Figure::value("api.get-info-to-socket", "the same beside a bare socket", Unit::Times, self.ratio),
            Figure::spread("api.start", "process start until the API takes a connection", &self.start_to_connection),
        ]
    }
}

/// Measures.
pub fn run(options: &Options) -> Result<Report, BenchError> {
    let place = Workplace::new(PATIENCE)?;
    let start_to_connection = measure_starts(&place, options.starts)?;
    let get_info = measure_calls(&place, options.calls)?;
    let socket_round_trip = measure_socket(&place, options.calls)?;
    let ratio = get_info.p50_us / socket_round_trip.p50_us.max(0.1);
    let Options { calls, starts } = *options;
    let ratio = (ratio * 10.0).round() / 10.0;
    Ok(Report { get_info, socket_round_trip, ratio, start_to_connection, calls, starts })
}

fn measure_starts(place: &Workplace, starts: u32) -> Result<Spread, BenchError> {
    let mut durations = Vec::new();
    for number in 0..starts {
        place.go_on()?;
        let api = place.path(&format!("start-{number}.sock"));
        let before = Instant::now();
        let mut child = place.children.start("vmm", &place.path("start.log"), |vmm| {
            vmm.arg("--api-sock").arg(&api);
        })?;
        place.connect(&mut child, &api)?;
        durations.push(before.elapsed());
    }
    Ok(Spread::of(durations))
}

fn measure_calls(place: &Workplace, calls: u32) -> Result<Spread, BenchError> {
    let (config, api) = (place.path("vm.json"), place.path("vm.sock"));
    let document = VmConfig {
        boot_source: Some(BootSource { embedded_guest: true, ..Default::default() }),
        machine_config: MachineConfig::default(),
        ..Default::default()
    };
    write_config(&config, &document)?;
    let mut child = place.children.start("guest", &place.path("vm.log"), |vmm| {
        vmm.arg("--config").arg(&config).arg("--api-sock").arg(&api);
    })?;
    let mut client = place.connect(&mut child, &api)?;
    let mut ask = || client.get::<InstanceInfo>("/").map_err(|source| BenchError::Api { what: "GET /", source });
    let deadline = Instant::now() + PATIENCE;
    while ask()?.state != InstanceState::Running {
        place.go_on()?;
        if Instant::now() > deadline {
            return Err(BenchError::Late("the guest does not run", PATIENCE));
        }
        std::thread::sleep(AGAIN);
    }
    measure(place, calls, || ask().map(drop))
}

/// Two threads, one of which answers what the other asks.
fn measure_socket(place: &Workplace, calls: u32) -> Result<Spread, BenchError> {
    let failed = |e: io::Error| io_error("cannot measure a socket")(e);
    let (mut here, mut there) = UnixStream::pair().map_err(failed)?;
    let answering = std::thread::Builder::new().name("echo".into()).spawn(move || {
        let mut request = [0; REQUEST];
        while there.read_exact(&mut request).is_ok() && there.write_all(&[0; ANSWER]).is_ok() {}
    });
    let answering = answering.map_err(failed)?;
    let spread = measure(place, calls, || {
        here.write_all(&[0; REQUEST]).and_then(|()| here.read_exact(&mut [0; ANSWER])).map_err(failed)
    });
    drop(here);
    let _ = answering.join();
    spread
}

fn measure(
    place: &Workplace,
    times: u32,
    mut call: impl FnMut() -> Result<(), BenchError>,
) -> Result<Spread, BenchError> {
    /// How often to look whether a signal has come, which costs a system call.
    const LOOK: u32 = 1000;
    for _ in 0..WARM_UP {
        call()?;
    }
    let mut durations = Vec::new();
    for number in 0..times {
        if number % LOOK == 0 {
            place.go_on()?;
        }
        let before = Instant::now();
        call()?;
        durations.push(before.elapsed());
    }
    Ok(Spread::of(durations))
}
