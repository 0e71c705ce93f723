//! Where counters are written, as lines of JSON: every minute, when somebody asks for it, and at the end.

use super::line::{self, Facts};
use crate::devices::alarm::Alarm;
use api_spec::logger::MetricsSink;
use api_spec::stats::VmStats;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use uffd_handler::logging::{LogError, Sink};

/// How often counters are written.
const INTERVAL: Duration = Duration::from_secs(60);

/// Why there is no such place, or nothing is written there.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// It cannot be opened.
    #[error("metrics_path: {0}")]
    Open(#[from] LogError),
    /// There is one.
    #[error("metrics_path: counters are written to {0} already; that is set once")]
    Set(PathBuf),
    /// There is none.
    #[error("there is no metrics_path to write the counters to; set one before the start (`PUT /metrics`)")]
    NotSet,
    /// A FIFO that nobody reads, or a full disk.
    #[error("metrics_path: {0} has no room for a line now")]
    Full(PathBuf),
}

/// Writes counters.
#[derive(Debug)]
pub struct Metrics {
    alarm: Alarm,
    open: Option<Open>,
}

/// The place that they are written to.
struct Open {
    config: MetricsSink,
    sink: Sink,
    /// What the last line told.
    before: VmStats,
    /// Lines that have not been written for want of room since the last one that was.
    missed: u64,
}

impl std::fmt::Debug for Open {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Open").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Metrics {
    /// Without a place to write to.
    pub fn new() -> io::Result<Self> {
        Ok(Metrics { alarm: Alarm::new()?, open: None })
    }

    /// Sets the place. The first line tells what has happened since the process began.
    pub fn open(&mut self, config: MetricsSink) -> Result<(), MetricsError> {
        if let Some(open) = &self.open {
            return Err(MetricsError::Set(open.config.metrics_path.clone()));
        }
        let sink = Sink::open(Some(&config.metrics_path))?;
        self.open = Some(Open { config, sink, before: VmStats::default(), missed: 0 });
        self.alarm.set(Some(INTERVAL));
        Ok(())
    }

    /// Whether there is a place to write to.
    pub fn is_open(&self) -> bool {
        self.open.is_some()
    }

    /// Writes a line of how things stand in the VM of this name, and winds the timer for the next.
    pub fn write(&mut self, id: &str, stats: &VmStats) -> Result<(), MetricsError> {
        let Open { config, sink, before, missed } = self.open.as_mut().ok_or(MetricsError::NotSet)?;
        self.alarm.set(Some(INTERVAL));
        let facts = Facts {
            time: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
            id: config.emit_id.then_some(id),
            properties: &config.properties,
            startup: super::process::process().startup(),
            missed: *missed,
        };
        if !sink.put_whole(&line::line(&facts, stats, before)) {
            *missed += 1;
            return Err(MetricsError::Full(config.metrics_path.clone()));
        }
        // What a line that was not written would have told is in the next one.
        (*before, *missed) = (stats.clone(), 0);
        Ok(())
    }
}

/// The timer that says when to write.
impl AsRawFd for Metrics {
    fn as_raw_fd(&self) -> RawFd {
        self.alarm.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;
    use std::path::Path;

    fn sink(path: &Path) -> MetricsSink {
        MetricsSink { metrics_path: path.to_owned(), emit_id: true, properties: Default::default() }
    }

    #[test]
    fn lines_are_appended_and_tell_what_is_new() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics");
        let mut metrics = Metrics::new().unwrap();
        assert!(matches!(metrics.write("vm", &VmStats::default()), Err(MetricsError::NotSet)));
        metrics.open(sink(&path)).unwrap();
        let mut stats = VmStats::default();
        for written in [100, 130] {
            stats.console.written_bytes = written;
            metrics.write("vm", &stats).unwrap();
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let written: Vec<_> = lines.iter().map(|line| line["uart"]["write_count"].as_u64().unwrap()).collect();
        assert_eq!((written, &lines[0]["id"]), (vec![100, 30], &Value::from("vm")));
        let refused = metrics.open(sink(&path)).unwrap_err().to_string();
        assert!(refused.contains("metrics_path") && refused.contains(path.to_str().unwrap()), "{refused}");
    }

    #[test]
    fn a_place_that_is_none_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let mut metrics = Metrics::new().unwrap();
        for path in [dir.path().to_owned(), dir.path().join("none/metrics")] {
            let refused = metrics.open(sink(&path)).unwrap_err().to_string();
            assert!(refused.starts_with("metrics_path: ") && refused.contains(path.to_str().unwrap()), "{refused}");
        }
        assert!(!metrics.is_open());
    }

    #[test]
    fn what_found_no_room_is_told_later() {
        let mut metrics = Metrics::new().unwrap();
        metrics.open(sink(Path::new("/dev/full"))).unwrap();
        let mut stats = VmStats::default();
        stats.console.written_bytes = 5;
        for missed in 1..3 {
            assert!(matches!(metrics.write("vm", &stats), Err(MetricsError::Full(_))));
            assert_eq!(
                metrics.open.as_ref().map(|open| (open.missed, open.before.clone())),
                Some((missed, VmStats::default()))
            );
        }
    }
}
