//! The time-stamp counter of this host, as far as it can be known without KVM.
// UNSAFETY: the counter is read by an instruction for which there is no safe function.
#![allow(unsafe_code)]

use snapshot::compat::HostTsc;
use std::fs::File;
use std::io::Read;
use std::time::Duration;

/// The first leaf of a hypervisor, and that in which some tell the frequency of the time-stamp counter.
const HYPERVISOR: u32 = 0x4000_0000;
const HYPERVISOR_TSC: u32 = 0x4000_0010;
/// Leaf 1, ECX: there is a hypervisor.
const HAS_HYPERVISOR: u32 = 1 << 31;
/// The leaf that tells it on a bare CPU: as a fraction (EBX / EAX) of a clock, and that in Hz (ECX).
const CRYSTAL: u32 = 0x15;
/// How long the counter is measured, and how often each end of that.
const MEASURED: Duration = Duration::from_millis(20);
const TRIES: usize = 32;
/// The first CPU in /proc/cpuinfo takes fewer bytes.
const CPUINFO: u64 = 8192;

/// The beginning of /proc/cpuinfo, if it can be read.
pub(super) fn cpuinfo() -> Option<String> {
    let mut text = Vec::new();
    File::open("/proc/cpuinfo").ok()?.take(CPUINFO).read_to_end(&mut text).ok()?;
    Some(String::from_utf8_lossy(&text).into_owned())
}

/// What the CPU or the hypervisor tells. Most do not, and are not asked for more then: KVM knows, and refuses what it cannot do.
pub(super) fn told(cpuid: impl Fn(u32, u32) -> [u32; 4], cpuinfo: impl FnOnce() -> Option<String>) -> HostTsc {
    with_scaling(tsc_khz(cpuid), cpuinfo)
}

/// What a look at the clock says. Takes [`MEASURED`].
pub(super) fn measured(cpuinfo: impl FnOnce() -> Option<String>) -> HostTsc {
    let first = Moment::now();
    std::thread::sleep(MEASURED);
    with_scaling(first.khz_until(Moment::now()), cpuinfo)
}

fn with_scaling(khz: Option<u32>, cpuinfo: impl FnOnce() -> Option<String>) -> HostTsc {
    HostTsc { khz, scales: khz.and_then(|_| tsc_scales(&cpuinfo()?)) }
}

/// A moment by both clocks.
#[derive(Clone, Copy, Debug)]
struct Moment {
    /// The counter.
    tsc: u64,
    /// The kernel's clock, in nanoseconds, that runs at the frequency which the kernel believes the counter to have, and which KVM
    /// goes by: just before the counter was read, and just after.
    before: u64,
    after: u64,
}

impl Moment {
    /// The one of several of which most is known.
    fn now() -> Moment {
        let mut best = Moment::read();
        for _ in 1..TRIES {
            let next = Moment::read();
            if next.after - next.before < best.after - best.before {
                best = next;
            }
        }
        best
    }

    fn read() -> Moment {
        let before = raw_ns();
        // SAFETY: RDTSC reads a counter into registers, and touches no memory. Every CPU of this architecture has it, and KVM
        // needs it of the kernel.
        let tsc = unsafe { core::arch::x86_64::_rdtsc() };
        Moment { tsc, before, after: raw_ns() }
    }

    /// The frequency of the counter from this moment until a later one, if what lies between is known well enough.
    fn khz_until(self, end: Moment) -> Option<u32> {
        let ticks = u128::from(end.tsc.checked_sub(self.tsc)?);
        let khz = |from: u64, to: u64| {
            let ns = u128::from(to.checked_sub(from)?);
            (ticks * 1_000_000).checked_div(ns)
        };
        let (least, most) = (khz(self.before, end.after)?, khz(self.after, end.before)?);
        // A quarter of what KVM takes for the same.
        let known = least > 0 && most.checked_sub(least)? <= least / 16_000;
        known.then(|| u32::try_from((least + most) / 2).ok()).flatten()
    }
}

/// The kernel's raw monotonic clock, in nanoseconds.
fn raw_ns() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::MonotonicRaw);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

fn tsc_khz(cpuid: impl Fn(u32, u32) -> [u32; 4]) -> Option<u32> {
    if cpuid(1, 0)[2] & HAS_HYPERVISOR != 0 {
        // What the CPU says of its clock need not be true of the counter that the hypervisor gives us.
        let [last, names @ ..] = cpuid(HYPERVISOR, 0);
        let known = [b"KVMKVMKVM\0\0\0", b"VMwareVMware"].iter().any(|name| {
            let words = name.chunks_exact(4).map(|w| u32::from_le_bytes([w[0], w[1], w[2], w[3]]));
            words.eq(names)
        });
        let khz = (known && last >= HYPERVISOR_TSC).then(|| cpuid(HYPERVISOR_TSC, 0)[0]);
        return khz.filter(|khz| *khz != 0);
    }
    let [below, above, hz, _] = if cpuid(0, 0)[0] >= CRYSTAL { cpuid(CRYSTAL, 0) } else { [0; 4] };
    let khz = (u64::from(hz) / 1000 * u64::from(above)).checked_div(below.into())?;
    u32::try_from(khz).ok().filter(|khz| *khz != 0)
}

/// Whether the first CPU of /proc/cpuinfo says that it can give guests another frequency, in AMD's words or Intel's; `None` if it
/// says nothing of what it can do for guests.
fn tsc_scales(cpuinfo: &str) -> Option<bool> {
    let has = |line: &str, word: &str| {
        let words = cpuinfo.lines().find_map(|text| text.strip_prefix(line)?.trim_start().strip_prefix(':'))?;
        Some(words.split_whitespace().any(|other| other == word))
    };
    match has("flags", "svm") {
        Some(true) => has("flags", "tsc_scale"),
        _ => has("vmx flags", "tsc_scaling"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Answers of a CPU with these leaves.
    fn cpu_with(leaves: &[(u32, [u32; 4])]) -> impl Fn(u32, u32) -> [u32; 4] {
        |asked, _| leaves.iter().find(|(leaf, _)| *leaf == asked).map_or([0; 4], |(_, registers)| *registers)
    }

    #[test]
    fn the_frequency_is_what_the_cpu_or_the_hypervisor_tells() {
        let crystal = (CRYSTAL, [2, 216, 24_000_000, 0]);
        assert_eq!(tsc_khz(cpu_with(&[(0, [0x16, 0, 0, 0]), crystal])), Some(2_592_000));
        assert_eq!(tsc_khz(cpu_with(&[(0, [0x14, 0, 0, 0]), crystal])), None, "it has no such leaf");
        for odd in [[0, 216, 24_000_000, 0], [2, 216, 0, 0], [2, 0, 24_000_000, 0], [1, !0, !0, 0]] {
            assert_eq!(tsc_khz(cpu_with(&[(0, [0x16, 0, 0, 0]), (CRYSTAL, odd)])), None, "{odd:?}");
        }
        let [ebx, ecx, edx] = [*b"KVMK", *b"VMKV", *b"M\0\0\0"].map(u32::from_le_bytes);
        let inside = |last, name: u32, khz| {
            let leaves = [
                (0, [0x16, 0, 0, 0]),
                crystal,
                (1, [0, 0, HAS_HYPERVISOR, 0]),
                (HYPERVISOR, [last, name, ecx, edx]),
                (HYPERVISOR_TSC, [khz, 0, 0, 0]),
            ];
            tsc_khz(cpu_with(&leaves))
        };
        assert_eq!(inside(HYPERVISOR_TSC, ebx, 2_450_000), Some(2_450_000));
        assert_eq!(inside(HYPERVISOR_TSC, ebx, 0), None);
        assert_eq!(inside(HYPERVISOR_TSC - 1, ebx, 2_450_000), None);
        assert_eq!(inside(HYPERVISOR_TSC, 7, 2_450_000), None, "what another hypervisor means by that is not known");
    }

    #[test]
    fn scaling_is_a_flag_of_the_first_cpu() {
        assert_eq!(tsc_scales("flags\t\t: fpu svm tsc_scale\n\nflags\t: fpu svm\n"), Some(true));
        assert_eq!(tsc_scales("flags\t\t: fpu svm\n"), Some(false));
        assert_eq!(tsc_scales("flags\t\t: vmx\nvmx flags\t: ept tsc_scaling\n"), Some(true));
        assert_eq!(tsc_scales("flags\t\t: vmx\nvmx flags\t: ept\n"), Some(false));
        assert_eq!(tsc_scales("flags\t\t: vmx\n"), None, "an older kernel");
        assert_eq!(tsc_scales(""), None);
        // Without a frequency nobody looks, and a file that cannot be read is no failure.
        let silent = told(cpu_with(&[]), || panic!("nobody looks"));
        assert_eq!(silent, HostTsc::default());
        let known = told(cpu_with(&[(0, [0x16, 0, 0, 0]), (CRYSTAL, [2, 216, 24_000_000, 0])]), || None);
        assert_eq!(known, HostTsc { khz: Some(2_592_000), scales: None });
    }

    #[test]
    fn a_measurement_that_is_too_rough_tells_nothing() {
        let moment = |tsc, before, after| Moment { tsc, before, after };
        let first = moment(1_000, 500, 600);
        let khz = first.khz_until(moment(49_001_000, 20_000_500, 20_000_600)).unwrap();
        assert!(snapshot::compat::same_tsc(2_450_000, khz), "{khz}");
        for rough in [
            // The thread was held up while it looked, time stood still, or the counter went back.
            moment(49_001_000, 20_000_500, 20_002_000),
            moment(1_000, 500, 600),
            moment(1_001, 600, 600),
            moment(999, 20_000_500, 20_000_600),
        ] {
            assert_eq!(first.khz_until(rough), None, "{rough:?}");
        }
    }

    proptest! {
        #[test]
        fn what_is_known_is_right(khz in 100_000u32..10_000_000, ns in 10_000_000u64..40_000_000, early in 0u64..300, late in 0u64..300) {
            let ticks = u64::try_from(u128::from(khz) * u128::from(ns) / 1_000_000).unwrap();
            let first = Moment { tsc: 7, before: 1_000 - early, after: 1_000 + late };
            let end = Moment { tsc: 7 + ticks, before: 1_000 + ns - late, after: 1_000 + ns + early };
            match first.khz_until(end) {
                Some(found) => prop_assert!(snapshot::compat::same_tsc(khz, found), "{found}"),
                None => prop_assert!((early + late) * 2 > ns / 20_000),
            }
        }

        #[test]
        fn no_moments_make_it_panic(a: [u64; 3], b: [u64; 3]) {
            let [first, end] = [a, b].map(|[tsc, before, after]| Moment { tsc, before, after });
            let _ = first.khz_until(end);
        }
    }
}
