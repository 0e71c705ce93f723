//! What the kernel counts for this process, and when it began.

use api_spec::stats::PageFaults;
use rustix::time::{ClockId, clock_gettime};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;
use std::time::Instant;

/// What whoever started this process says of that, in microseconds; each as Firecracker's option of that name has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessStart {
    /// When it was started, by the monotonic clock.
    pub start_time_us: Option<u64>,
    /// How much CPU time the process that became this one had used by then.
    pub start_time_cpu_us: Option<u64>,
    /// How much CPU time its parent had used for it.
    pub parent_cpu_time_us: Option<u64>,
}

impl ProcessStart {
    /// How long the start took, if it is over now: by the clock, and of CPU time. 0 where nothing was said.
    fn took(self, now_us: u64, now_cpu_us: u64) -> StartupTimes {
        let ProcessStart { start_time_us, start_time_cpu_us, parent_cpu_time_us } = self;
        let cpu = |start| now_cpu_us.saturating_sub(start).saturating_add(parent_cpu_time_us.unwrap_or(0));
        StartupTimes {
            wall_us: start_time_us.map_or(0, |start| now_us.saturating_sub(start)),
            cpu_us: start_time_cpu_us.map_or(0, cpu),
        }
    }
}

/// How long the start of this process took, in microseconds; 0 if nobody has said when it began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StartupTimes {
    /// By the clock.
    pub wall_us: u64,
    /// Of CPU time.
    pub cpu_us: u64,
}

/// This process.
#[derive(Debug)]
pub struct Process {
    began: Instant,
    startup: StartupTimes,
    /// Opened once: the process may come to live where there is no /proc.
    stat: Option<File>,
}

static PROCESS: OnceLock<Process> = OnceLock::new();

/// Notes that the process has started, and what is known of that. Only the first call counts; without any, the first use of
/// [`process`] is the start.
pub fn started(start: ProcessStart) -> &'static Process {
    let micros = |clock| {
        let time = clock_gettime(clock);
        time.tv_sec as u64 * 1_000_000 + time.tv_nsec as u64 / 1000
    };
    PROCESS.get_or_init(|| Process {
        began: Instant::now(),
        startup: start.took(micros(ClockId::Monotonic), micros(ClockId::ProcessCPUTime)),
        stat: File::open("/proc/self/stat").ok(),
    })
}

/// This process.
pub fn process() -> &'static Process {
    started(ProcessStart::default())
}

impl Process {
    /// For how long it has run, in microseconds.
    pub fn uptime_us(&self) -> u64 {
        self.began.elapsed().as_micros() as u64
    }

    /// How long its start took.
    pub fn startup(&self) -> StartupTimes {
        self.startup
    }

    /// The page faults of its threads; none where the kernel does not tell. Those of the guest that have to wait are not among
    /// them: KVM hands them to kernel threads.
    pub fn page_faults(&self) -> PageFaults {
        let mut bytes = [0; 1024];
        let read = self.stat.as_ref().and_then(|stat| stat.read_at(&mut bytes, 0).ok());
        page_faults(&String::from_utf8_lossy(&bytes[..read.unwrap_or(0)])).unwrap_or_default()
    }
}

/// The page faults in a `/proc/PID/stat`.
fn page_faults(stat: &str) -> Option<PageFaults> {
    // The name of the process is in parentheses, and may have any in it.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace().skip(7);
    let minor = fields.next()?.parse().ok()?;
    let major = fields.nth(1)?.parse().ok()?;
    Some(PageFaults { minor, major })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_faults_are_found_behind_any_name() {
        let stat = "7 (a) 1 2 (b)) S 1 7 7 0 -1 4194560 1234 5 67 8 9 10 0 0 20 0 1 0";
        assert_eq!(page_faults(stat), Some(PageFaults { minor: 1234, major: 67 }));
        assert_eq!(page_faults("7 (a) S 1"), None);
        assert_eq!(page_faults(""), None);
        assert!(process().page_faults().minor > 0, "this process has had some");
    }

    #[test]
    fn a_start_took_what_the_clocks_say() {
        let start =
            ProcessStart { start_time_us: Some(1000), start_time_cpu_us: Some(20), parent_cpu_time_us: Some(5) };
        assert_eq!(start.took(1700, 60), StartupTimes { wall_us: 700, cpu_us: 45 });
        assert_eq!(start.took(1, 1), StartupTimes { wall_us: 0, cpu_us: 5 }, "clocks that do not agree");
        assert_eq!(ProcessStart::default().took(1700, 60), StartupTimes::default());
    }
}
