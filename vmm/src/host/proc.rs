//! Numbers in what proc(5) says. Pure.

/// The number that a line begins with after this name, as in `/proc/meminfo`.
pub fn number_after(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
}

/// What `/proc/PID/stat` says that a process has taken of a processor, in clock ticks: itself, and those of its children that have ended.
pub fn ticks(stat: &str) -> (u64, u64) {
    // The name, in parentheses, may hold anything, and is the second field; these are fields 14 to 17.
    let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let mut ticks = rest.split_whitespace().skip(11).map(|ticks| ticks.parse().unwrap_or(0));
    let mut two = || ticks.next().unwrap_or(0) + ticks.next().unwrap_or(0);
    (two(), two())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found() {
        assert_eq!(number_after("VmRSS:\t 7 kB\nThreads:\t4\n", "VmRSS:"), Some(7));
        assert_eq!(number_after("VmRSS:\t 7 kB\nThreads:\t4\n", "Threads:"), Some(4));
        assert_eq!(number_after("VmRSS:\t 7 kB\n", "Threads:"), None);
        assert_eq!(number_after("a -1", "a"), None);
        assert_eq!(ticks("7 (a ) b) S 1 2 3 4 5 6 7 8 9 10 100 20 3 4 0 0"), (120, 7));
        assert_eq!(ticks(""), (0, 0));
    }
}
