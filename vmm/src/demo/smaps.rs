//! What a clone's RAM costs, as the kernel counts it in `/proc/PID/smaps`.

use std::io;

/// The memory of a mapping or several, in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Mapped pages.
    pub rss_kib: u64,
    /// Mapped pages, each divided by how many processes map it.
    pub pss_kib: u64,
    /// Pages of the process's own: those that it has written.
    pub anonymous_kib: u64,
}

/// The guest RAM of the vmm with this process id, restored from a page server.
pub fn guest_ram(pid: u32) -> io::Result<Memory> {
    Ok(sum(&std::fs::read_to_string(format!("/proc/{pid}/smaps"))?, "/memfd:coppice-store"))
}

/// Adds up the mappings of files whose name begins with `file`.
fn sum(smaps: &str, file: &str) -> Memory {
    let mut memory = Memory::default();
    let mut counts = false;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        let Some(field) = first.strip_suffix(':') else {
            // A mapping's first line: addresses, protection, offset, device, inode, name.
            counts = words.nth(4).is_some_and(|name| name.starts_with(file));
            continue;
        };
        let mut kib = || words.next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
        match field {
            _ if !counts => {}
            "Rss" => memory.rss_kib += kib(),
            "Pss" => memory.pss_kib += kib(),
            "Anonymous" => memory.anonymous_kib += kib(),
            _ => {}
        }
    }
    memory
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_named_mappings_count() {
        let text = "\
7f00-7f10 rw-p 00000000 00:01 12 /memfd:coppice-store (deleted)
Size:    100 kB
Rss:      40 kB
Pss:      10 kB
Anonymous: 8 kB
7f20-7f30 r--p 00000000 00:01 13 /lib/libc.so
Rss:       5 kB
7f40-7f50 rw-p 00000000 00:00 0
Rss:       7 kB
7f50-7f60 rw-p 00100000 00:01 12 /memfd:coppice-store (deleted)
Rss:       4 kB
Pss:       1 kB
Anonymous: 4 kB
";
        let expected = Memory { rss_kib: 44, pss_kib: 11, anonymous_kib: 12 };
        assert_eq!(sum(text, "/memfd:coppice-store"), expected);
    }
}
