//! Page servers.

use crate::place::Place;
use crate::process::Process;
use crate::{PATIENCE, binaries, until};
use api_spec::client::metrics;
use api_spec::page_server::{Metrics, SessionMetrics};
use std::path::{Path, PathBuf};

/// A running page server.
#[derive(Debug)]
pub struct PageServer {
    /// Its process.
    pub process: Process,
    /// Where it serves.
    pub socket: PathBuf,
    metrics: PathBuf,
}

impl PageServer {
    /// Starts the `uffd-handler` program for a snapshot, and waits until it listens.
    pub fn start(place: &Place, snapshot: &Path) -> Self {
        PageServer::start_program(place, "page-server", snapshot, binaries::uffd_handler(), &[])
    }

    /// As [`PageServer::start`], with further arguments.
    pub fn start_with(place: &Place, snapshot: &Path, arguments: &[&str]) -> Self {
        PageServer::start_program(place, "page-server", snapshot, binaries::uffd_handler(), arguments)
    }

    /// As [`PageServer::start`], but with the same server inside the `vmm` program.
    pub fn start_in_vmm(place: &Place, snapshot: &Path) -> Self {
        PageServer::start_program(place, "page-server", snapshot, binaries::vmm(), &["uffd-handler"])
    }

    fn start_program(place: &Place, name: &str, snapshot: &Path, program: &Path, first: &[&str]) -> Self {
        let (socket, metrics) = (place.join(format!("{name}.sock")), place.join(format!("{name}.metrics")));
        let mut process = Process::start(place, name, program, |command| {
            command.args(first).arg("--socket").arg(&socket).arg("--metrics").arg(&metrics);
            command.arg("--snapshot").arg(snapshot);
        });
        until("the page server listens", || {
            process.check_alive();
            metrics::read(&metrics, PATIENCE).is_ok()
        });
        PageServer { process, socket, metrics }
    }

    /// Its counters.
    pub fn metrics(&self) -> Metrics {
        metrics::read(&self.metrics, PATIENCE).expect("the page server gives its counters")
    }

    /// Its counters for the guest of one vmm.
    pub fn session(&self, pid: u32) -> SessionMetrics {
        let sessions = self.metrics().sessions;
        sessions.into_iter().find(|s| s.pid == pid).unwrap_or_else(|| panic!("the server does not know process {pid}"))
    }

    /// Pages in all its stores.
    pub fn filled_pages(&self) -> u64 {
        self.metrics().stores.iter().map(|store| store.filled_pages).sum()
    }
}
