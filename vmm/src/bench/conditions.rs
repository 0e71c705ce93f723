//! Under which conditions something was measured: what the host is set to, and how much it did besides.

use super::figure::Spread;
use super::{BenchError, io_error};
use crate::host::proc;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

/// How often the same is computed, and how long that takes about.
const ROUNDS: usize = 300;
const ROUND: Duration = Duration::from_micros(100);
/// From when on figures are not to be relied on: what others took of the processors, what the hypervisor gave to others, and how much
/// longer the same computation took in one of a hundred cases than in half of them.
const NOISY_OTHERS: f64 = 10.0;
const NOISY_STEAL: f64 = 2.0;
const NOISY_JITTER: f64 = 1.5;

/// What was seen of the host while something was measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Conditions {
    /// Kernel samepage merging, which merges memory of clones behind everybody's back: `off`, `on`, `unknown`.
    pub ksm: String,
    /// How the first CPU chooses its frequency, if the kernel tells.
    pub governor: Option<String>,
    /// Transparent huge pages, if the kernel tells.
    pub transparent_huge_pages: Option<String>,
    /// What others took of all processors.
    pub others_percent: f64,
    /// What the hypervisor gave to others.
    pub steal_percent: f64,
    /// The same computation, in one of a hundred cases divided by half of them.
    pub jitter: f64,
    /// Why the figures are not to be relied on; nothing if they are.
    pub noisy: Vec<String>,
}

/// Looks at the host while something is measured.
pub struct Watch {
    began: Instant,
    before: Ticks,
    jitter: f64,
}

/// Clock ticks since the host, or this process, began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Ticks {
    all: u64,
    busy: u64,
    steal: u64,
    /// By this process and those of its children that have ended.
    own: u64,
}

impl Watch {
    /// Begins.
    pub fn begin() -> Result<Self, BenchError> {
        Ok(Watch { jitter: jitter(), before: Ticks::now()?, began: Instant::now() })
    }

    /// What was seen. All children must have ended.
    pub fn end(self) -> Result<Conditions, BenchError> {
        let (before, after) = (self.before, Ticks::now()?);
        let all = after.all.saturating_sub(before.all).max(1) as f64;
        let percent = |ticks: u64| (ticks as f64 / all * 1000.0).round() / 10.0;
        let own = after.own.saturating_sub(before.own);
        // Ticks are too coarse for a glance.
        let others = match self.began.elapsed() < Duration::from_millis(500) {
            true => 0.0,
            false => percent(after.busy.saturating_sub(before.busy).saturating_sub(own)),
        };
        let jitter = self.jitter.max(jitter());
        Ok(Conditions::of(others, percent(after.steal.saturating_sub(before.steal)), jitter))
    }
}

impl Conditions {
    fn of(others_percent: f64, steal_percent: f64, jitter: f64) -> Self {
        let mut noisy = Vec::new();
        if others_percent > NOISY_OTHERS {
            noisy.push(format!("other processes took {others_percent:.1} % of the processors"));
        }
        if steal_percent > NOISY_STEAL {
            noisy.push(format!("the hypervisor gave {steal_percent:.1} % of the processors to others"));
        }
        if jitter > NOISY_JITTER {
            noisy.push(format!("the same computation took up to {jitter:.1} times as long"));
        }
        let ksm = match word(Path::new("/sys/kernel/mm/ksm/run")).as_deref() {
            Some("1") => "on",
            Some(_) => "off",
            None => "unknown",
        };
        Conditions {
            ksm: ksm.into(),
            governor: word(Path::new("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
            transparent_huge_pages: word(Path::new("/sys/kernel/mm/transparent_hugepage/enabled")),
            others_percent,
            steal_percent,
            jitter: (jitter * 100.0).round() / 100.0,
            noisy,
        }
    }
}

impl fmt::Display for Conditions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Conditions { ksm, governor, transparent_huge_pages, others_percent, steal_percent, jitter, noisy: _ } =
            self;
        let told = |value: &Option<String>| value.clone().unwrap_or_else(|| "unknown".into());
        write!(
            f,
            "KSM {ksm}, governor {}, huge pages {}; others took {others_percent:.1} % of the processors, the hypervisor \
             {steal_percent:.1} %; the same computation took up to {jitter:.2} times as long",
            told(governor),
            told(transparent_huge_pages)
        )
    }
}

impl Ticks {
    fn now() -> Result<Self, BenchError> {
        let read =
            |path| std::fs::read_to_string(path).map_err(io_error("cannot read what /proc says of the processors"));
        let (own, children) = proc::ticks(&read("/proc/self/stat")?);
        Ok(Ticks { own: own + children, ..Ticks::of_host(&read("/proc/stat")?) })
    }

    /// From `/proc/stat`, as proc(5) has it: user, nice, system, idle, iowait, irq, softirq, steal; what guests take is in the first two.
    fn of_host(text: &str) -> Self {
        let numbers = text.lines().next().into_iter().flat_map(|line| line.split_whitespace().skip(1).take(8));
        let numbers: Vec<u64> = numbers.filter_map(|number| number.parse().ok()).collect();
        let at = |index: usize| numbers.get(index).copied().unwrap_or_default();
        let busy = [0, 1, 2, 5, 6].map(at).iter().sum();
        Ticks { all: numbers.iter().sum(), busy, steal: at(7), own: 0 }
    }
}

/// What a file of the kernel says: its first word, or the one in brackets, which is the choice among several.
fn word(path: &Path) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    let mut words = text.split_whitespace();
    let chosen = words.clone().find_map(|word| word.strip_prefix('[')?.strip_suffix(']'));
    chosen.or_else(|| words.next()).map(str::to_owned)
}

/// How much longer the same computation takes in one of a hundred cases than in half of them.
fn jitter() -> f64 {
    let compute = |steps: u64| {
        let before = Instant::now();
        std::hint::black_box((0..steps).fold(1u64, |x, step| std::hint::black_box(x.wrapping_mul(step | 1))));
        before.elapsed()
    };
    const TRIAL: u64 = 10_000;
    let fastest = (0..5).map(|_| compute(TRIAL)).min().unwrap_or(ROUND).as_nanos().max(1) as u64;
    let steps = TRIAL * ROUND.as_nanos() as u64 / fastest;
    let spread = Spread::of((0..ROUNDS).map(|_| compute(steps)).collect());
    spread.p99_us / spread.p50_us.max(0.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says_is_read() {
        let text = "cpu  100 1 20 1000 50 3 4 7 60 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n";
        assert_eq!(Ticks::of_host(text), Ticks { all: 1185, busy: 128, steal: 7, own: 0 });
        assert_eq!(Ticks::of_host(""), Ticks::default());
    }

    #[test]
    fn a_noisy_host_says_why() {
        assert!(Conditions::of(0.5, 0.0, 1.1).noisy.is_empty());
        let noisy = Conditions::of(50.0, 5.0, 3.0).noisy;
        assert_eq!(noisy.len(), 3, "{noisy:?}");
        assert!(noisy[0].contains("50.0 %"));
    }

    #[test]
    fn this_host_is_watched() {
        let conditions = Watch::begin().unwrap().end().unwrap();
        assert!(conditions.jitter >= 1.0, "{conditions:?}");
        assert!(["on", "off", "unknown"].contains(&conditions.ksm.as_str()));
    }
}
