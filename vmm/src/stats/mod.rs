//! Counters: what there is to tell of a VM, and in which forms.
//!
//! - [`process`]: what the kernel counts for this process, and when it began
//! - [`scan`]: looks at which kinds of pages guest memory consists of, on a thread of its own
//! - [`prometheus`]: counters as Prometheus reads them (pure)
//! - [`mod@line`]: counters as a line of JSON, in the shape that tools for Firecracker's metrics know (pure)
//! - [`sink`]: where such lines are written
//!
//! Devices and vCPUs count for themselves; [`crate::machine::Machine::count`] gathers.

pub mod line;
pub mod process;
pub mod prometheus;
pub mod scan;
pub mod sink;
