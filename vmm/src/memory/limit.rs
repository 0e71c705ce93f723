//! How much memory may be a guest's own, and how often to look. Pure.
//!
//! A guest's own are the pages that it has written over the image that it is a private view of: nobody else has them, and no
//! host can promise them to all guests at once. The kernel counts them for the process (anonymous memory, in RAM or swapped
//! out), and with them the one or two MiB of the vmm itself. Memory of a guest that was booted here and not yet snapshotted
//! is shared, and bounded by its size.
//!
//! Linux 6.2 to 6.15 show a sum that leaves out what each CPU has counted since it last added to it: up to 32 pages, or twice
//! the number of CPUs, times the number of CPUs. Only a walk over all pages would be exact there, which no limit is worth.

use std::time::Duration;

/// How fast one vCPU may fill memory, in bytes per second: what copying pages on write allows, with some to spare.
const FILL_RATE: u64 = 2 << 30;
/// The shortest time between two looks: near its limit a guest costs no more than some hundred looks a second, and goes beyond
/// by no more than what it fills in this time.
pub const SHORTEST: Duration = Duration::from_millis(10);
/// The longest: a guest far from its limit.
pub const LONGEST: Duration = Duration::from_millis(500);

/// How long a guest cannot reach its limit: when to look again. `None`: it has reached it.
pub fn next_look(used: u64, limit: u64, vcpus: u8) -> Option<Duration> {
    let headroom = limit.checked_sub(used).filter(|headroom| *headroom > 0)?;
    let rate = FILL_RATE * u64::from(vcpus.max(1));
    let micros = u128::from(headroom) * 1_000_000 / u128::from(rate);
    let until_full = Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX));
    Some(until_full.clamp(SHORTEST, LONGEST))
}

/// Private memory of a process, in bytes, from its `/proc/PID/status`: anonymous pages in RAM and swapped out. `None`: this is
/// no such text.
pub fn private_bytes(status: &str) -> Option<u64> {
    let bytes = |key| {
        let value = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
        value.trim().strip_suffix("kB")?.trim_end().parse::<u64>().ok()?.checked_mul(1024)
    };
    bytes("RssAnon")?.checked_add(bytes("VmSwap")?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn private_memory_is_read_from_the_kernels_table() {
        let text = "Name:\tvmm\nVmRSS:\t  9000 kB\nRssAnon:\t    2048 kB\nRssFile:\t 100 kB\nVmSwap:\t       4 kB\n";
        assert_eq!(private_bytes(text), Some(2052 << 10));
        for bad in ["", "RssAnon: 5 kB\n", "RssAnon: 5 MB\nVmSwap: 0 kB", "RssAnon: x kB\nVmSwap: 0 kB"] {
            assert_eq!(private_bytes(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn looks_end_at_the_limit_and_come_in_time(used: u64, limit: u64, vcpus: u8) {
            match next_look(used, limit, vcpus) {
                None => prop_assert!(used >= limit),
                Some(wait) => {
                    prop_assert!(used < limit && (SHORTEST..=LONGEST).contains(&wait));
                    // What can be filled by then is no more than there is room for, or than the shortest wait allows.
                    let filled = u128::from(FILL_RATE) * u128::from(vcpus.max(1)) * wait.as_micros() / 1_000_000;
                    prop_assert!(wait == SHORTEST || filled <= u128::from(limit - used));
                }
            }
        }

        #[test]
        fn less_room_is_never_looked_at_later(a: u64, b: u64, limit: u64, vcpus: u8) {
            let (less, more) = (a.min(b), a.max(b));
            if let Some(wait) = next_look(more, limit, vcpus) {
                prop_assert!(next_look(less, limit, vcpus) >= Some(wait));
            }
        }
    }
}
