//! What the boot loader left in memory: a memory map and a command line, under either boot protocol.

use embedded_guest::cmdline::CommandLine;
use embedded_guest::ram::{self, Range, WorkPages};

/// The stub's number for PVH; 0 is the 64-bit Linux protocol.
const PVH: u64 = 1;
const MAX_CMDLINE: u64 = 4096;
const MAX_RANGES: u64 = 128;

/// What the loader says.
pub struct Boot {
    /// The command line.
    pub cmdline: CommandLine,
    /// The work pages.
    pub pages: WorkPages,
}

/// Reads the loader's data at `params`.
#[cold]
#[inline(never)]
pub fn read(protocol: u64, params: u64) -> Boot {
    // SAFETY: the stub passes on what the loader gave it for this protocol.
    let (cmdline, map) = unsafe { if protocol == PVH { pvh(params) } else { linux(params) } };
    let mut line = [0; MAX_CMDLINE as usize];
    let mut len = 0;
    while cmdline != 0 && len < line.len() {
        // SAFETY: the loader's string; it ends with a zero.
        line[len] = unsafe { peek(cmdline + len as u64) };
        if line[len] == 0 {
            break;
        }
        len += 1;
    }
    Boot { cmdline: CommandLine::parse(&line[..len]), pages: ram::work_pages(map, crate::stub::end_of_image()) }
}

/// The loader's table of memory ranges.
struct Map {
    table: u64,
    stride: u64,
    left: u64,
}

impl Iterator for Map {
    type Item = Range;

    /// Both protocols' entries begin with a start, a length (64 bit each) and a type (32 bit).
    fn next(&mut self) -> Option<Range> {
        self.left = self.left.checked_sub(1)?;
        let entry = self.table;
        self.table += self.stride;
        // SAFETY: the table holds the entries that its maker counted.
        Some(unsafe { Range { start: peek(entry), len: peek(entry + 8), kind: peek(entry + 16) } })
    }
}

/// Command line and memory map of a `boot_params` page.
///
/// # Safety
/// `params` is the address of one.
unsafe fn linux(params: u64) -> (u64, Map) {
    const CMDLINE: u64 = 0x228;
    const CMDLINE_HIGH: u64 = 0x0c8;
    const E820_COUNT: u64 = 0x1e8;
    const E820: u64 = 0x2d0;
    // SAFETY: fields of that page.
    unsafe {
        let cmdline = u64::from(peek::<u32>(params + CMDLINE)) | u64::from(peek::<u32>(params + CMDLINE_HIGH)) << 32;
        let left = u64::from(peek::<u8>(params + E820_COUNT)).min(MAX_RANGES);
        (cmdline, Map { table: params + E820, stride: 20, left })
    }
}

/// Command line and memory map of a `hvm_start_info`.
///
/// # Safety
/// `params` is the address of one.
unsafe fn pvh(params: u64) -> (u64, Map) {
    const VERSION: u64 = 4;
    const CMDLINE: u64 = 24;
    const MAP: u64 = 40;
    const MAP_ENTRIES: u64 = 48;
    // SAFETY: fields of that structure; those of the map are there from version 1 on.
    unsafe {
        let map = match peek::<u32>(params + VERSION) {
            0 => Map { table: 0, stride: 0, left: 0 },
            _ => Map {
                table: peek(params + MAP),
                stride: 24,
                left: u64::from(peek::<u32>(params + MAP_ENTRIES)).min(MAX_RANGES),
            },
        };
        (peek(params + CMDLINE), map)
    }
}

/// A value somewhere in memory, aligned or not.
///
/// # Safety
/// A `T` is there.
unsafe fn peek<T: Copy>(address: u64) -> T {
    // SAFETY: the first 4 GiB are mapped, and the caller vouches for what is there.
    unsafe { core::ptr::with_exposed_provenance::<T>(address as usize).read_unaligned() }
}
