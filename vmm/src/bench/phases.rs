//! What a vmm says that an operation has spent its time on.

use super::figure::Spread;
use api_spec::stats::{PhaseTrace, TracedOperation, VmStats};
use std::time::Duration;

/// The phases of an operation, in order.
pub type Phases = Vec<(String, Duration)>;

/// A phase, and its median in microseconds.
pub type Median = (String, f64);

/// Those of the last operation of this kind.
pub fn of(stats: VmStats, operation: TracedOperation) -> Phases {
    let trace = stats.traces.into_iter().find(|trace| trace.operation == operation);
    trace.map(of_trace).unwrap_or_default()
}

/// Those of one.
pub fn of_trace(trace: PhaseTrace) -> Phases {
    trace.phases.into_iter().map(|phase| (phase.name, Duration::from_nanos(phase.ns))).collect()
}

/// Each phase with its median, as a report tells them.
pub fn line(medians: &[Median]) -> String {
    medians.iter().map(|(name, us)| format!("{name} {us:.0}")).collect::<Vec<_>>().join(", ")
}

/// The median of each phase, in order.
pub fn medians<'a>(all: impl Iterator<Item = &'a Phases> + Clone) -> Vec<Median> {
    let names = all.clone().next().map_or(&[][..], Vec::as_slice);
    let median = |(name, _): &(String, Duration)| {
        let of_name = |phases: &Phases| phases.iter().find(|(other, _)| other == name).map(|(_, time)| *time);
        (name.clone(), Spread::of(all.clone().filter_map(of_name).collect()).p50_us)
    };
    names.iter().map(median).collect()
}
