//! How long the steps of an operation take, told in `GET /vm/stats` and, on request, in the log. Pure but for the clock.

use api_spec::stats::{PhaseTime, PhaseTrace, TracedOperation};
use std::time::{Duration, Instant};

/// What one operation spends its time on: phases that follow each other without gaps, so that their times add up to the whole.
#[derive(Clone, Debug)]
pub struct Phases {
    operation: TracedOperation,
    started: Instant,
    /// When the last phase ended.
    ended: Instant,
    phases: Vec<(&'static str, Duration)>,
}

/// How long ago that was, in microseconds.
pub fn us_since(start: Instant) -> u64 {
    start.elapsed().as_micros() as u64
}

/// As many phases as an operation has, so that noting them allocates once.
const MOST: usize = 16;

impl Phases {
    /// An operation begins.
    pub fn of(operation: TracedOperation) -> Self {
        let now = Instant::now();
        Phases { operation, started: now, ended: now, phases: Vec::with_capacity(MOST) }
    }

    /// What was done since the last phase ended was this.
    pub fn end(&mut self, phase: &'static str) {
        let now = Instant::now();
        self.phases.push((phase, now - self.ended));
        self.ended = now;
    }

    /// What operation it is.
    pub fn operation(&self) -> TracedOperation {
        self.operation
    }

    /// From the beginning to the end of the last phase, in microseconds.
    pub fn total_us(&self) -> u64 {
        (self.ended - self.started).as_micros() as u64
    }

    /// As a document.
    pub fn trace(&self) -> PhaseTrace {
        let ns = |duration: Duration| duration.as_nanos() as u64;
        PhaseTrace {
            operation: self.operation,
            total_ns: ns(self.ended - self.started),
            phases: self
                .phases
                .iter()
                .map(|(name, time)| PhaseTime { name: (*name).to_owned(), ns: ns(*time) })
                .collect(),
        }
    }
}

impl std::fmt::Display for Phases {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let us = |duration: Duration| duration.as_secs_f64() * 1e6;
        write!(f, "{} {:.1} us:", self.operation, us(self.ended - self.started))?;
        for (number, (name, time)) in self.phases.iter().enumerate() {
            let comma = if number == 0 { "" } else { "," };
            write!(f, "{comma} {name} {:.1}", us(*time))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_add_up_to_the_whole() {
        let mut phases = Phases::of(TracedOperation::Load);
        std::thread::sleep(Duration::from_millis(2));
        phases.end("first");
        phases.end("second");
        let trace = phases.trace();
        assert_eq!(trace.phases.iter().map(|phase| phase.ns).sum::<u64>(), trace.total_ns);
        assert!(trace.phases[0].ns >= 2_000_000, "{trace:?}");
        assert_eq!(trace.phases.iter().map(|phase| &phase.name[..]).collect::<Vec<_>>(), ["first", "second"]);
        let line = phases.to_string();
        assert!(line.starts_with("load ") && line.contains(" us: first ") && line.contains(", second "), "{line}");
    }
}
