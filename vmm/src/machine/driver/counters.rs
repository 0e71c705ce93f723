//! Counters: what is told of them, to whom, and when.

use super::{Asker, Driver, RequestError};
use crate::api::Response;
use crate::api::server::{Pending, Server};
use crate::machine::phases::Phases;
use crate::machine::requests::NotNow;
use crate::stats::process::process;
use crate::stats::prometheus;
use crate::stats::scan::{Found, Scanned, Wanted};
use crate::stats::sink::MetricsError;
use api_spec::logger::MetricsSink;
use api_spec::stats::{MemoryMapQuery, MemoryStats, VmStats};
use event_manager::EventOps;

/// Whether a client still waits for an answer.
fn is_there(api: &Option<Server>, to: Pending) -> bool {
    api.as_ref().is_some_and(|api| api.awaits(to))
}

impl Driver {
    /// Everything that is counted, with what is known of memory.
    fn stats(&self, memory: MemoryStats) -> VmStats {
        let mut stats = VmStats {
            uptime_us: process().uptime_us(),
            page_faults: process().page_faults(),
            api: self.api.as_ref().map(Server::stats).unwrap_or_default(),
            latencies: self.latencies,
            traces: self.traces.iter().map(Phases::trace).collect(),
            memory,
            ..Default::default()
        };
        if let Some(machine) = &self.machine {
            machine.count(&mut stats);
        }
        stats
    }

    /// Keeps what an operation has spent its time on until there is another of its kind.
    pub(super) fn keep_trace(&mut self, phases: Phases) {
        tracing::info!("{phases}");
        self.traces.retain(|old| old.operation() != phases.operation());
        self.traces.push(phases);
    }

    /// Has somebody answered when memory was looked at.
    fn ask_for_scan(&mut self, wanted: Wanted, from: Pending) -> Result<(), RequestError> {
        let kinds = self.machine.as_ref().ok_or(NotNow::NotStarted)?.memory_kinds();
        if let Wanted::Map(query) = wanted {
            kinds.check_start(query.start)?;
        }
        let api = &self.api;
        self.scanner.ask(kinds, wanted, from, |to| is_there(api, to)).map_err(RequestError::Scan)
    }

    /// `GET /vm/stats`
    pub(super) fn get_stats(&mut self, from: Pending) -> Result<Option<Response>, RequestError> {
        self.ask_for_scan(Wanted::Stats, from).map(|()| None)
    }

    /// `GET /vm/memory-map`
    pub(super) fn get_memory_map(
        &mut self,
        query: MemoryMapQuery,
        from: Pending,
    ) -> Result<Option<Response>, RequestError> {
        self.ask_for_scan(Wanted::Map(query), from).map(|()| None)
    }

    /// `GET /metrics`
    pub(super) fn get_metrics(&mut self, from: Pending) -> Result<Option<Response>, RequestError> {
        match self.machine {
            Some(_) => self.ask_for_scan(Wanted::Metrics, from).map(|()| None),
            None => Ok(Some(Response::text(prometheus::render(&self.stats(MemoryStats::default()))))),
        }
    }

    /// Memory was looked at: whoever has asked is answered with that, and with how all else stands now.
    pub(super) fn on_scanned(&mut self, scanned: Scanned, ops: &mut EventOps) {
        let response = match scanned.result {
            Ok(Found::Stats(memory)) => Response::document(&self.stats(memory)),
            Ok(Found::Metrics(memory)) => Response::text(prometheus::render(&self.stats(memory))),
            Ok(Found::Map(map)) => Response::document(&map),
            Err(reason) => Response::fault(400, &reason),
        };
        let api = &self.api;
        if let Err(e) = self.scanner.go_on(|to| is_there(api, to)) {
            tracing::error!("guest memory cannot be looked at any more: {e}");
        }
        self.respond(Asker::Client(scanned.to), &response, ops);
    }

    /// Sets where counters are written.
    pub(super) fn set_metrics(&mut self, sink: MetricsSink) -> Result<(), MetricsError> {
        self.metrics.open(sink.clone())?;
        // No part of what is booted: a snapshot can be loaded all the same.
        self.config.metrics = Some(sink);
        Ok(())
    }

    /// Writes a line of counters.
    pub(super) fn flush_metrics(&mut self) -> Result<(), MetricsError> {
        let stats = self.stats(MemoryStats::default());
        self.metrics.write(&self.id, &stats)
    }

    /// Writes a line of counters that nobody has asked for, if there is where.
    pub(super) fn flush_metrics_unasked(&mut self) {
        if self.metrics.is_open()
            && let Err(e) = self.flush_metrics()
        {
            tracing::warn!("counters are not written; the next line has them: {e}");
        }
    }
}
