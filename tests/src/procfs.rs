//! What the kernel says about a process.

use rustix::process::Signal;
use std::fs;

/// The memory of one mapping or several, in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Mapped pages.
    pub rss_kib: u64,
    /// Mapped pages, each divided by how many processes map it.
    pub pss_kib: u64,
    /// Pages of the process's own: those that it has written.
    pub anonymous_kib: u64,
    /// Shared pages that are mapped by the 2 MiB.
    pub huge_kib: u64,
}

/// One line of `/proc/PID/maps`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Protection and sharing, such as `rw-p`.
    pub mode: String,
    /// The file that is mapped; empty if none is.
    pub name: String,
}

/// Name of the mappings of guest RAM that a page server provides.
pub const STORE: &str = "/memfd:coppice-store";

/// The memory of all mappings of process `pid` that `is_wanted` chooses by name.
pub fn memory(pid: u32, is_wanted: impl Fn(&str) -> bool) -> Memory {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("the process is there to be looked at");
    let mut memory = Memory::default();
    let mut counts = false;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        let Some(field) = first.strip_suffix(':') else {
            counts = is_wanted(mapping(line).map(|m| m.name).unwrap_or_default().as_str());
            continue;
        };
        let mut kib = || words.next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
        match field {
            _ if !counts => {}
            "Rss" => memory.rss_kib += kib(),
            "Pss" => memory.pss_kib += kib(),
            "Anonymous" => memory.anonymous_kib += kib(),
            "ShmemPmdMapped" | "FilePmdMapped" => memory.huge_kib += kib(),
            _ => {}
        }
    }
    memory
}

/// Memory of process `pid` that is its own and is not its guest's, in KiB.
pub fn rss_kib(pid: u32) -> u64 {
    memory(pid, |name| !name.starts_with("/memfd:")).anonymous_kib
}

/// Memory of process `pid` that is its own and comes from no file (`RssAnon`), or from shared memory such as a memfd
/// (`RssShmem`), in KiB.
pub fn resident(pid: u32, kind: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process is there to be looked at");
    let line = status.lines().find_map(|line| line.strip_prefix(kind)?.strip_prefix(':'));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    kib.unwrap_or_else(|| panic!("the kernel does not tell {kind} of process {pid}"))
}

/// Memory that the host can give to new processes, in MiB.
pub fn available_mib() -> u64 {
    let text = fs::read_to_string("/proc/meminfo").expect("the kernel tells how much memory there is");
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kib.expect("the kernel tells how much memory is available") >> 10
}

/// The guest RAM of the vmm `pid`, restored from a page server.
pub fn guest_ram(pid: u32) -> Memory {
    memory(pid, |name| name.starts_with(STORE))
}

/// Whether process `pid` blocks or catches a signal, instead of dying of it.
pub fn heeds(pid: u32, signal: Signal) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let mask = |key| {
        let mask = status.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default();
        u64::from_str_radix(mask.trim(), 16).unwrap_or(0)
    };
    (mask("SigBlk:") | mask("SigCgt:")) & (1 << (signal.as_raw() - 1)) != 0
}

/// What process `pid` has mapped.
pub fn mappings(pid: u32) -> Vec<Mapping> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).expect("the process is there to be looked at");
    maps.lines().filter_map(mapping).collect()
}

fn mapping(line: &str) -> Option<Mapping> {
    // Addresses, protection, offset, device, inode, name.
    let mut words = line.split_whitespace();
    let mode = words.nth(1)?.to_owned();
    let name = words.skip(3).collect::<Vec<_>>().join(" ");
    Some(Mapping { mode, name })
}

/// What the open descriptors of process `pid` are.
pub fn descriptors(pid: u32) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).expect("the process is there to be looked at");
    let names = entries.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    names.map(|name| name.to_string_lossy().into_owned()).collect()
}

/// Processor time that process `pid` has used, in ticks of 10 ms.
pub fn ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process is there to be looked at");
    // The name of the process comes before, and may have spaces and parentheses.
    let fields = stat.rsplit_once(") ").map_or("", |(_, fields)| fields);
    let times = fields.split(' ').skip(11).take(2);
    times.map(|time| time.parse::<u64>().expect("user and system time are numbers")).sum()
}

/// Processor time that the threads of process `pid` whose names are wanted have used, in nanoseconds.
pub fn thread_time(pid: u32, is_wanted: impl Fn(&str) -> bool) -> u64 {
    thread_times(pid).into_iter().filter(|(name, _)| is_wanted(name)).map(|(_, time)| time).sum()
}

/// Whether the process `pid` has a thread of this name.
pub fn has_thread(pid: u32, name: &str) -> bool {
    thread_times(pid).iter().any(|(thread, _)| thread == name)
}

/// Processor time that each vCPU thread of the vmm `pid` has used, in nanoseconds.
pub fn vcpu_times(pid: u32) -> Vec<u64> {
    let mut times = thread_times(pid);
    times.retain(|(name, _)| name.starts_with("vcpu"));
    times.sort();
    times.into_iter().map(|(_, time)| time).collect()
}

fn thread_times(pid: u32) -> Vec<(String, u64)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("the process is there to be looked at");
    tasks
        .filter_map(|task| {
            let task = task.ok()?.path();
            let name = fs::read_to_string(task.join("comm")).ok()?.trim().to_owned();
            let schedstat = fs::read_to_string(task.join("schedstat")).ok()?;
            Some((name, schedstat.split_whitespace().next()?.parse().ok()?))
        })
        .collect()
}

/// As [`vcpu_times`], once all `count` threads are there and stand still; panics if they do not come to that.
pub fn still_vcpu_times(pid: u32, count: usize) -> Vec<u64> {
    // A thread that has just been started is on its way to where it waits, and gives itself its name there.
    let mut times = vcpu_times(pid);
    crate::until("vCPUs stand still", || {
        std::thread::sleep(std::time::Duration::from_millis(5));
        let before = std::mem::replace(&mut times, vcpu_times(pid));
        times.len() == count && times == before
    });
    times
}

/// How the files that process `pid` has open are opened: their names, and whether they can be written through there.
pub fn open_files(pid: u32) -> Vec<(String, bool)> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).expect("the process is there to be looked at");
    entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let name = fs::read_link(entry.path()).ok()?.to_string_lossy().into_owned();
            let info =
                fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", entry.file_name().to_string_lossy())).ok()?;
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?.trim().to_owned();
            let access_mode = u32::from_str_radix(&flags, 8).ok()? & 3;
            Some((name, access_mode != 0))
        })
        .collect()
}

/// Ids of all processes whose command line contains `text`.
pub fn processes_with(text: &str) -> Vec<u32> {
    let entries = fs::read_dir("/proc").expect("/proc can be read").filter_map(Result::ok);
    entries
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let line = fs::read(entry.path().join("cmdline")).ok()?;
            String::from_utf8_lossy(&line).contains(text).then_some(pid)
        })
        .collect()
}

/// Page faults on a process's userfaultfds that nobody has answered yet, as the kernel counts them.
pub fn outstanding_faults(pid: u32) -> u64 {
    let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return 0 };
    let numbers = entries.filter_map(Result::ok).filter(|entry| {
        std::fs::read_link(entry.path()).is_ok_and(|link| link.as_os_str() == "anon_inode:[userfaultfd]")
    });
    let count = |name: std::ffi::OsString| -> Option<u64> {
        let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", name.to_str()?)).ok()?;
        info.lines().find_map(|line| line.strip_prefix("total:"))?.trim().parse().ok()
    };
    numbers.filter_map(|entry| count(entry.file_name())).sum()
}
