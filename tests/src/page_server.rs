//! Page servers.

use crate::place::Place;
use crate::process::Process;
use crate::user::User;
use crate::{PATIENCE, binaries, until};
use api_spec::client::metrics;
use api_spec::page_server::{Metrics, SessionMetrics};
use std::ffi::OsString;
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
        PageServer::start_of(place, &[snapshot])
    }

    /// Starts the `uffd-handler` program for several snapshots.
    pub fn start_of(place: &Place, snapshots: &[&Path]) -> Self {
        PageServer::start_program(place, snapshots, |name, arguments| {
            Process::start(place, name, binaries::uffd_handler(), |command| {
                command.args(arguments);
            })
        })
    }

    /// As [`PageServer::start`], with further arguments.
    pub fn start_with(place: &Place, snapshot: &Path, arguments: &[&str]) -> Self {
        PageServer::start_program(place, &[snapshot], |name, usual| {
            Process::start(place, name, binaries::uffd_handler(), |command| {
                command.args(usual).args(arguments);
            })
        })
    }

    /// As [`PageServer::start`], but with the same server inside the `vmm` program.
    pub fn start_in_vmm(place: &Place, snapshot: &Path) -> Self {
        PageServer::start_program(place, &[snapshot], |name, arguments| {
            Process::start(place, name, binaries::vmm(), |command| {
                command.arg("uffd-handler").args(arguments);
            })
        })
    }

    /// As [`PageServer::start`], but as another user.
    pub fn start_as(user: &User, place: &Place, snapshot: &Path) -> Self {
        PageServer::start_program(place, &[snapshot], |name, arguments| {
            user.start(place, name, binaries::uffd_handler(), |command| {
                command.args(arguments);
            })
        })
    }

    /// `start` is given the name of the process and the arguments.
    fn start_program(place: &Place, snapshots: &[&Path], start: impl FnOnce(&str, &[OsString]) -> Process) -> Self {
        let name = "page-server";
        let (socket, metrics) = (place.join(format!("{name}.sock")), place.join(format!("{name}.metrics")));
        let mut arguments: Vec<OsString> = vec!["--socket".into(), (&socket).into()];
        arguments.extend(["--metrics".into(), (&metrics).into()]);
        arguments.extend(snapshots.iter().flat_map(|snapshot| ["--snapshot".into(), snapshot.into()]));
        let mut process = start(name, &arguments);
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
