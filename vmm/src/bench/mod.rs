//! Benchmarks: what anyone can measure on a machine of their own. They drive ordinary `vmm` processes from outside, and
//! give each figure beside one of the same machine and run that it can be judged by.

pub mod api;
pub mod density;
pub mod faults;
pub mod fork;
mod guest;
pub mod pattern;
mod phases;
pub mod reset;
pub mod restore;
pub mod snapshot;

use crate::children::ChildError;
use crate::host::Host;
use api_spec::client::agent::AgentError;
use api_spec::client::rest::RestError;
use serde::Serialize;
use std::io;
use std::time::Duration;

/// What `vmm bench --help` prints.
pub const USAGE: &str = "\
Measures, on this machine, and prints what it found. Leave the machine alone meanwhile.

Usage: vmm bench api [options]       how long calls of the REST API take, and how soon it can be called
       vmm bench density [options]   what many clones cost that are alive at once
       vmm bench faults [options]    what it costs a guest to touch a page that is not there yet
       vmm bench fork [options]      how long a guest stands still to be forked, and how soon its clones answer
       vmm bench reset [options]     how long it takes to reset a guest, by how much it has written
       vmm bench restore [options]   how soon a clone answers that was asked for
       vmm bench snapshot [options]  how long guests stand still for snapshots, and what else these cost

  --json                  print one JSON document instead of a table

Of `api`:
  --calls N               how many calls on one connection, 1 to 1000000 (default 5000)
  --starts N              how many processes to start, 1 to 1000 (default 20)

Of `density` and `restore`:
  --memory MIB            guest memory (default 128)

Of `density`, `faults`, `fork`, `reset`, `restore` and `snapshot`:
  --n RUNS                how often to measure everything, 1 to 100 (default 5 for `faults`, 10 for `snapshot`); of `reset`
                          each kind of reset, 1 to 1000000 (default 500); of `fork` and `restore` how many of each kind, 1
                          to 10000 (default 200); of `density` how many clones are alive at once, 1 to 10000 (default 200)

Of `restore`:
  --vcpus N               1 to 8 (default 1)
  --backend WHICH         only `file`, or only `shared`, a page server whose store clones share
  --shell WHICH           only `warm`, into a process that was built ahead, or only `none`, by `vmm --restore`

Of `faults`:
  --pages N               how many pages to touch at once, 1 to 8192 (default 2048)
  --peer-handler PROGRAM  measure another page server of Firecracker's protocol as well; it is started with the path of
                          its socket and that of the memory file

Of `snapshot`:
  --resident-mib N        memory in use of the guest that has much in use, 16 to 1984 (default 1024); as much is written
                          to the temporary directory (TMPDIR)

Ends with 0, 1 on failure, 2 on bad usage, and 77 if this host cannot run microVMs.
";

/// Why a benchmark failed.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A process.
    #[error(transparent)]
    Child(#[from] ChildError),
    /// The API of a vmm.
    #[error("{what}: {source}")]
    Api {
        /// What was being done.
        what: &'static str,
        /// What went wrong.
        source: RestError,
    },
    /// A file, a socket, a thread.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A process does not do what it should in time.
    #[error("{0} within {1:?}")]
    Late(&'static str, Duration),
    /// The agent in a guest.
    #[error("a guest does not answer as it should: {0}")]
    Agent(AgentError),
    /// A guest has other pages than it should.
    #[error("{0}: the guest has read other pages than were snapshotted; nothing that was measured means anything")]
    WrongPages(&'static str),
    /// A guest has computed something else than it should.
    #[error("{0}: the guest has not computed what it should; nothing that was measured means anything")]
    WrongResult(&'static str),
    /// A snapshot that is not in order.
    #[error(transparent)]
    Verify(#[from] ::snapshot::verify::VerifyError),
    /// A signal.
    #[error("interrupted by a signal; every process of the benchmark has ended, start it again to see its figures")]
    Interrupted,
}

impl BenchError {
    /// Whether this host cannot run microVMs at all.
    pub fn host_cannot(&self) -> bool {
        matches!(self, BenchError::Child(e) if e.host_cannot())
    }
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> BenchError {
    move |source| BenchError::Io { what, source }
}

/// What a report says of the host.
fn host_line(host: &Host) -> String {
    let Host { cpu, cpus, kernel, ring0_emulated } = host;
    let emulated = if *ring0_emulated { ", KVM emulates ring 0" } else { "" };
    format!("host  {cpu}, {cpus} CPUs, Linux {kernel}{emulated}")
}

/// How some durations are spread, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The shortest.
    pub min_us: f64,
    /// Half of them are no longer.
    pub p50_us: f64,
    /// 99 of 100 are no longer.
    pub p99_us: f64,
    /// The longest.
    pub max_us: f64,
}

impl Spread {
    /// The spread of these durations, of which there must be one at least.
    fn of(mut durations: Vec<Duration>) -> Self {
        durations.sort_unstable();
        let last = durations.len().saturating_sub(1);
        let at = |share: usize| durations.get((last * share).div_ceil(100)).copied().unwrap_or_default();
        let us = |duration: Duration| (duration.as_secs_f64() * 1e7).round() / 10.0;
        Spread { min_us: us(at(0)), p50_us: us(at(50)), p99_us: us(at(99)), max_us: us(at(100)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_taken_from_the_right_places() {
        let spread = Spread::of((1..=201).rev().map(Duration::from_micros).collect());
        assert_eq!(spread, Spread { min_us: 1.0, p50_us: 101.0, p99_us: 199.0, max_us: 201.0 });
        let one = Spread::of(vec![Duration::from_nanos(1_250)]);
        assert_eq!((one.min_us, one.p50_us, one.p99_us, one.max_us), (1.3, 1.3, 1.3, 1.3));
    }
}
