//! The memory that this program's own code is in: a process that waits can have it mapped, so that what it then does meets no
//! page fault on the way.
// UNSAFETY: advice about mappings of code, which changes no byte of them.
#![allow(unsafe_code)]

use std::ops::Range;

/// Has the kernel map all code of this process and its libraries, as far as it is in memory or on disk. It is shared with every
/// other process that runs the same. Needs Linux 5.14; without, or if it fails, the code comes page by page as it is needed.
pub fn populate() {
    let Ok(maps) = std::fs::read_to_string("/proc/self/maps") else { return };
    for Range { start, end } in code(&maps) {
        // SAFETY: the advice has pages mapped that the mapping has anyway, and is refused where there is none any more.
        unsafe { libc::madvise(std::ptr::with_exposed_provenance_mut(start), end - start, libc::MADV_POPULATE_READ) };
    }
}

/// The addresses of code from files, by what `/proc/PID/maps` says (proc_pid_maps(5)).
fn code(maps: &str) -> impl Iterator<Item = Range<usize>> + '_ {
    maps.lines().filter_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let (addresses, permissions) = (fields.next()?, fields.next()?);
        let file = fields.nth(3)?;
        let (start, end) = addresses.split_once('-')?;
        let address = |text| usize::from_str_radix(text, 16).ok();
        let range = address(start)?..address(end)?;
        (permissions.contains('x') && file.starts_with('/') && !range.is_empty()).then_some(range)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_is_what_can_be_executed_and_comes_from_a_file() {
        let maps = "\
55a7bd71e000-55a7bda5d000 r--p 00000000 fe:00 26279 /usr/bin/vmm
55a7bda5d000-55a7be3b4000 r-xp 0033f000 fe:00 26279 /usr/bin/vmm (deleted)
7f4baf46b000-7f4baf482000 r-xp 00003000 fe:00 326426 /lib/x86_64-linux-gnu/libgcc_s.so.1
7ffc3d0e9000-7ffc3d0eb000 r-xp 00000000 00:00 0 [vdso]
7f4ba0000000-7f4ba0021000 rw-p 00000000 00:00 0
what is this
7f4ba0000000 r-xp 0 0 0 /x
";
        let found: Vec<_> = code(maps).collect();
        assert_eq!(found, [0x55a7bda5d000..0x55a7be3b4000, 0x7f4baf46b000..0x7f4baf482000]);
    }

    #[test]
    fn code_of_this_process_is_found_and_stays_what_it_is() {
        let here = populate as fn() as usize;
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        assert!(code(&maps).any(|range| range.contains(&here)));
        populate();
        assert_eq!(code("").count(), 0);
    }
}
