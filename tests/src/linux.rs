//! Linux guests, as `resources/linux/build` makes them, and what they say on their consoles.
//!
//! `COPPICE_LINUX_GUEST` names the directory with the kernel and the initial RAM disk; `rig/run` sets it in the reference
//! machine.

use crate::holds_within;
use crate::vm::Vm;
use std::path::PathBuf;
use std::time::Duration;

/// What every Linux guest is told. Warnings and worse go to the console.
pub const COMMAND_LINE: &str = "console=ttyS0 loglevel=5 panic=-1";
/// What the minimal guest needs.
pub const MEMORY_MIB: u64 = 192;
/// Longest that a Linux guest may take to come up, or to answer, on an emulated machine with a busy host.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A Linux guest's files.
#[derive(Clone, Debug)]
pub struct Linux {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: PathBuf,
}

impl Linux {
    /// The guest that the environment names. `None`, and noted as skipped, without one, or on a host that cannot run it.
    pub fn guest() -> Option<Self> {
        let reason = match std::env::var_os("COPPICE_LINUX_GUEST") {
            None => "COPPICE_LINUX_GUEST names no Linux guest; resources/linux/build makes one".to_owned(),
            Some(_) if std::path::Path::new("/sys/module/kvm_pvm").exists() => {
                "this host's KVM emulates ring 0, where no Linux guest runs; tests/rig/run runs this test anywhere"
                    .to_owned()
            }
            Some(dir) => {
                let dir = PathBuf::from(dir);
                return Some(Linux { kernel: dir.join("vmlinuz"), initrd: dir.join("initrd") });
            }
        };
        test_skip::skip(reason);
        None
    }

    /// The same kernel as an ELF file, to be entered by PVH, if the guest has one.
    pub fn elf(&self) -> Option<Self> {
        let kernel = self.kernel.with_file_name("vmlinux");
        kernel.exists().then(|| Linux { kernel, initrd: self.initrd.clone() })
    }
}

/// The console of a Linux guest: what its vmm prints.
pub trait Console {
    /// What it said so far.
    fn console(&self) -> String;

    /// Waits until the guest has said a line that begins with `start`; what follows in that line.
    fn said(&mut self, start: &str) -> String;

    /// The last number that the minimal guest has counted to, once it has counted further than `than`.
    fn counted_beyond(&mut self, than: u64) -> u64;
}

impl Console for Vm {
    fn console(&self) -> String {
        self.process.printed()
    }

    #[track_caller]
    fn said(&mut self, start: &str) -> String {
        let mut found = None;
        let came = holds_within(PATIENCE, || {
            // In this order, since the vmm may end after the guest has said so.
            let alive = self.process.is_alive();
            found = lines(&self.process.printed()).find_map(|line| line.strip_prefix(start).map(str::to_owned));
            found.is_some() || !alive
        });
        assert!(came, "{}: the guest never said {start:?}", self.name);
        found.unwrap_or_else(|| panic!("{}: the vmm ended before the guest said {start:?}", self.name))
    }

    #[track_caller]
    fn counted_beyond(&mut self, than: u64) -> u64 {
        let mut last = None;
        let came = holds_within(PATIENCE, || {
            self.process.check_alive();
            last = counts(&self.process.printed()).last().copied();
            last.is_some_and(|n| n > than)
        });
        assert!(came, "{}: the guest has not counted beyond {than}: {last:?}", self.name);
        last.expect("just found")
    }
}

/// The numbers that the minimal guest has counted, in order.
pub fn counts(console: &str) -> Vec<u64> {
    lines(console).filter_map(|line| line.strip_prefix("coppice: ")?.parse().ok()).collect()
}

/// Whole lines, without what ends them. A last one that may be cut short is none.
fn lines(console: &str) -> impl Iterator<Item = &str> {
    console.rfind('\n').map_or("", |end| &console[..end]).lines().map(str::trim_end)
}

/// Panics if the kernel has complained of anything that a snapshot, a restore or a bad machine would make it complain of.
#[track_caller]
pub fn assert_calm(console: &str) {
    const COMPLAINTS: [&str; 9] =
        ["BUG:", "WARNING:", "Oops", "lockup", "rcu:", "hung task", "I/O error", "Call Trace", "ACPI Error"];
    for line in console.lines() {
        assert!(!COMPLAINTS.iter().any(|word| line.contains(word)), "the guest's kernel complains: {line}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_lines_count() {
        assert_eq!(counts("coppice: Linux is up\r\ncoppice: 1\r\n[ 1.0] noise\r\ncoppice: 2\r\ncoppice: 3"), [1, 2]);
        assert_eq!(counts("coppice: 1"), [0; 0]);
    }
}
