//! Counts what a vCPU does, at no cost that it could notice.

use api_spec::stats::VcpuStats;
use std::sync::atomic::{AtomicU64, Ordering};

/// A counter that one thread counts with, and any may read.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts one more. Nobody else counts with it, so that it needs no locked instruction.
    pub fn add(&self) {
        self.0.store(self.get().wrapping_add(1), Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a vCPU has done; see [`VcpuStats`]. In a cache line of its own, so that no vCPU's counting slows another one down.
#[derive(Debug, Default)]
#[repr(align(64))]
#[allow(missing_docs, reason = "the fields of VcpuStats")]
pub struct Counts {
    pub io_in: Counter,
    pub io_out: Counter,
    pub mmio_read: Counter,
    pub mmio_write: Counter,
    pub interrupted: Counter,
    pub other: Counter,
    pub failures: Counter,
}

impl Counts {
    /// What has been counted so far.
    pub fn read(&self) -> VcpuStats {
        let Counts { io_in, io_out, mmio_read, mmio_write, interrupted, other, failures } = self;
        VcpuStats {
            io_in: io_in.get(),
            io_out: io_out.get(),
            mmio_read: mmio_read.get(),
            mmio_write: mmio_write.get(),
            interrupted: interrupted.get(),
            other: other.get(),
            failures: failures.get(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vcpu_counts_in_one_cache_line_of_its_own() {
        assert_eq!((size_of::<Counts>(), align_of::<Counts>()), (64, 64));
    }

    #[test]
    fn each_counter_counts_its_own() {
        let counts = Counts::default();
        counts.io_in.add();
        counts.mmio_read.add();
        counts.mmio_read.add();
        assert_eq!(counts.read(), VcpuStats { io_in: 1, mmio_read: 2, ..Default::default() });
    }
}
