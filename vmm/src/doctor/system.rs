//! Checks of the kernel and its settings, of memory and of limits.

use super::{Check, cgroup, look, read_or_empty};
use uffd_handler::huge::Settings;

pub(super) fn checks() -> Vec<Check> {
    vec![
        look("kernel.version", "/proc/sys/kernel/osrelease", "the kernel does not tell its release", kernel_version),
        cgroup::check(),
        look("kvm.nx_huge_pages", "/sys/module/kvm/parameters/nx_huge_pages", "no such guard here", nx_huge_pages),
        look("memory.ksm", "/sys/kernel/mm/ksm/run", "this kernel merges no pages", ksm),
        look("memory.thp", "/sys/kernel/mm/transparent_hugepage/enabled", "no transparent huge pages", thp),
        look("memory.thp_shmem", "/sys/kernel/mm/transparent_hugepage/shmem_enabled", "none for memfds", thp_shmem),
        thp_stores(&read_or_empty("/proc/sys/kernel/osrelease"), &Settings::read()),
        look("memory.huge_pages", "/proc/meminfo", "the kernel does not tell", huge_pages),
        look("memory.overcommit", "/proc/sys/vm/overcommit_memory", "no such setting", overcommit),
        look("memory.max_map_count", "/proc/sys/vm/max_map_count", "no such setting", max_map_count),
        look("memory.free", "/proc/meminfo", "the kernel does not tell", free_memory),
        limit("limits.files", "Max open files", 4096, "ulimit -n 65536"),
        limit("limits.processes", "Max processes", 4096, "ulimit -u 65536"),
        look("limits.pids", "/proc/sys/kernel/pid_max", "no such setting", |most| pids(most, &cgroup::pids_max())),
        Check::info("sockets", "paths of Unix sockets may have at most 107 bytes: keep them short, as in /run"),
    ]
}

/// First two numbers of a kernel release.
fn parse_release(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn kernel_version(release: &str) -> Check {
    let name = "kernel.version";
    match parse_release(release) {
        None => Check::warn(name, format!("{release:?} is not understood"), "use Linux 5.13 or newer"),
        Some(version) if version < (5, 13) => Check::fail(
            name,
            format!("{release}: a running guest's memory cannot be set aside for a snapshot (MREMAP_DONTUNMAP)"),
            "use Linux 5.13 or newer",
        ),
        Some(_) => Check::ok(name, release),
    }
}

fn nx_huge_pages(value: &str) -> Check {
    let name = "kvm.nx_huge_pages";
    match value {
        "never" => Check::ok(name, "never: VMs start no thread for it"),
        "N" => Check::info(name, "off, but each VM starts a thread for it; `never` would start none"),
        _ => Check::info(
            name,
            format!("{value}: huge pages from which a guest runs code are split, by a thread for each VM"),
        ),
    }
}

fn ksm(run: &str) -> Check {
    let name = "memory.ksm";
    match run {
        "0" => Check::ok(name, "off, so figures of memory per clone count what clones share themselves"),
        "2" => Check::ok(name, "off, and what was merged is unmerged"),
        _ => Check::warn(
            name,
            "on: it merges equal pages behind our back, which makes figures of memory per clone look better than they are \
             and opens a side channel between guests",
            "echo 2 > /sys/kernel/mm/ksm/run",
        ),
    }
}

/// The word in brackets, as in `always [madvise] never`.
fn chosen(setting: &str) -> Option<&str> {
    setting.split_once('[')?.1.split_once(']').map(|(word, _)| word)
}

fn thp(setting: &str) -> Check {
    let name = "memory.thp";
    match chosen(setting) {
        Some(word) => Check::info(name, format!("{word} for anonymous memory; clones' own pages are 4 KiB either way")),
        None => Check::info(name, format!("{setting:?} is not understood")),
    }
}

fn thp_shmem(setting: &str) -> Check {
    let name = "memory.thp_shmem";
    match chosen(setting) {
        Some(word @ ("always" | "within_size" | "force")) => Check::warn(
            name,
            format!("{word}: one touched page of a booting guest's memory may take 2 MiB, in its snapshot too"),
            "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled",
        ),
        Some(word) => Check::ok(name, format!("{word} for memfds")),
        None => Check::info(name, format!("{setting:?} is not understood")),
    }
}

/// Whether a page server can make huge pages of its stores.
fn thp_stores(release: &str, settings: &Settings) -> Check {
    let name = "memory.thp_stores";
    match settings.obstacle() {
        Some(obstacle) => Check::info(name, format!("`uffd-handler --huge-pages collapse` has no effect: {obstacle}")),
        None if parse_release(release).is_some_and(|version| version < (6, 1)) => {
            Check::info(name, "`uffd-handler --huge-pages collapse` has no effect before Linux 6.1")
        }
        None => Check::ok(name, "`uffd-handler --huge-pages collapse` can make huge pages of page stores"),
    }
}

/// A value of /proc/meminfo, in the unit that it has there.
fn meminfo(text: &str, key: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    value.split_whitespace().next()?.parse().ok()
}

fn huge_pages(text: &str) -> Check {
    let name = "memory.huge_pages";
    match (meminfo(text, "HugePages_Total"), meminfo(text, "HugePages_Free"), meminfo(text, "Hugepagesize")) {
        (Some(0) | None, ..) => Check::info(name, "none reserved; none are needed"),
        (Some(total), free, size) => {
            let (free, size) = (free.unwrap_or(0), size.unwrap_or(0));
            let reserved = total.saturating_mul(size) / 1024;
            Check::info(
                name,
                format!("{total} of {size} KiB reserved, {free} free: {reserved} MiB that guests do not use"),
            )
        }
    }
}

fn overcommit(mode: &str) -> Check {
    let name = "memory.overcommit";
    match mode {
        "0" | "1" => Check::ok(name, format!("vm.overcommit_memory={mode}")),
        _ => Check::warn(
            name,
            format!(
                "vm.overcommit_memory={mode}: every clone is charged for all of its memory, not for what it writes"
            ),
            "sysctl vm.overcommit_memory=0, or 1",
        ),
    }
}

fn max_map_count(value: &str) -> Check {
    let (name, enough) = ("memory.max_map_count", 65_530);
    match value.parse::<u64>() {
        Ok(count) if count >= enough => Check::ok(name, value),
        Ok(_) => Check::warn(
            name,
            format!("{value}: long chains of forks may not be mappable"),
            format!("sysctl vm.max_map_count={enough}"),
        ),
        Err(_) => Check::info(name, format!("{value:?} is not understood")),
    }
}

fn free_memory(text: &str) -> Check {
    let (name, enough_mib) = ("memory.free", 512);
    match meminfo(text, "MemAvailable") {
        None => Check::info(name, "the kernel does not tell"),
        Some(kib) if kib / 1024 < enough_mib => Check::warn(
            name,
            format!("{} MiB available", kib / 1024),
            "free some: a guest of 128 MiB and its snapshot need about twice that",
        ),
        Some(kib) => Check::ok(name, format!("{} MiB available", kib / 1024)),
    }
}

/// The soft limit of a line of /proc/PID/limits; `None` in it means no limit.
fn soft_limit(limits: &str, label: &str) -> Option<Option<u64>> {
    let value = limits.lines().find_map(|line| line.strip_prefix(label))?.split_whitespace().next()?;
    if value == "unlimited" { Some(None) } else { value.parse().ok().map(Some) }
}

fn limit(name: &str, label: &str, enough: u64, remedy: &str) -> Check {
    judge_limit(name, soft_limit(&read_or_empty("/proc/self/limits"), label), enough, remedy)
}

fn judge_limit(name: &str, limit: Option<Option<u64>>, enough: u64, remedy: &str) -> Check {
    match limit {
        None => Check::info(name, "the kernel does not tell"),
        Some(None) => Check::ok(name, "unlimited"),
        Some(Some(limit)) if limit >= enough => Check::ok(name, limit.to_string()),
        Some(Some(limit)) => Check::warn(name, format!("{limit}: enough for one guest, not for many"), remedy),
    }
}

/// Process and thread ids: of the host as a whole, and of the control group that this process is in.
fn pids(pid_max: &str, cgroup: &[String]) -> Check {
    // A guest takes one for each vCPU and two or three more.
    let (name, enough, each) = ("limits.pids", 32_768, 5);
    let Ok(pid_max) = pid_max.parse::<u64>() else {
        return Check::info(name, format!("{pid_max:?} is not understood"));
    };
    let group = cgroup.iter().filter_map(|max| max.trim().parse::<u64>().ok()).min();
    let most = pid_max.min(group.unwrap_or(u64::MAX));
    let whose = if most < pid_max { "pids.max of this control group" } else { "kernel.pid_max" };
    let found = format!("{most} processes and threads ({whose}): some {} guests", most / each);
    let remedy = if most < pid_max {
        format!("raise pids.max of this control group (systemd: TasksMax) to {enough}")
    } else {
        format!("sysctl kernel.pid_max={enough}")
    };
    if most < enough { Check::warn(name, found, remedy) } else { Check::ok(name, found) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn kernel_releases_are_compared_as_numbers() {
        assert_eq!(parse_release("6.18.44-some-1"), Some((6, 18)));
        assert_eq!(parse_release("6.1-rc3+"), Some((6, 1)));
        assert_eq!(parse_release("mainline"), None);
        assert_eq!(kernel_version("6.7.0").status, Status::Ok);
        assert_eq!(kernel_version("6.18.1").status, Status::Ok);
        assert_eq!(kernel_version("6.1.0-31-cloud-amd64").status, Status::Ok);
        assert_eq!(kernel_version("5.10.0").status, Status::Fail);
        assert_eq!(kernel_version("").status, Status::Warn);
    }

    #[test]
    fn settings_in_brackets_are_the_chosen_ones() {
        assert_eq!(chosen("always [madvise] never"), Some("madvise"));
        assert_eq!(chosen("always madvise"), None);
        assert_eq!(thp_shmem("always within_size advise [never] deny force").status, Status::Ok);
        assert_eq!(thp_shmem("[always] never").status, Status::Warn);
        assert_eq!(thp_shmem("").status, Status::Info);
        assert_eq!(thp("[always] madvise never").status, Status::Info);
    }

    #[test]
    fn huge_pages_of_stores_need_a_kernel_that_has_them() {
        let without = thp_stores("6.18.1", &Settings::default());
        assert_eq!(without.status, Status::Info);
        assert!(without.found.contains("no transparent huge pages"), "{}", without.found);
    }

    #[test]
    fn memory_is_read_from_the_kernels_table() {
        let text = "MemTotal:       24105000 kB\nMemAvailable:   1048576 kB\nHugePages_Total:     2\nHugePages_Free: 1\nHugepagesize: 2048 kB\n";
        assert_eq!(free_memory(text), Check::ok("memory.free", "1024 MiB available"));
        assert_eq!(free_memory("MemAvailable: 1024 kB").status, Status::Warn);
        assert_eq!(free_memory("").status, Status::Info);
        assert!(huge_pages(text).found.contains("4 MiB"));
        assert!(huge_pages("").found.contains("none"));
        assert_eq!(meminfo("MemAvailable2: 7 kB", "MemAvailable"), None);
    }

    #[test]
    fn merged_pages_are_a_warning() {
        assert_eq!(ksm("0").status, Status::Ok);
        assert_eq!(ksm("1").status, Status::Warn);
        assert_eq!(ksm("2").status, Status::Ok);
    }

    #[test]
    fn strict_accounting_and_few_mappings_are_warnings() {
        assert_eq!(overcommit("1").status, Status::Ok);
        assert_eq!(overcommit("2").status, Status::Warn);
        assert_eq!(max_map_count("65530").status, Status::Ok);
        assert_eq!(max_map_count("1000").status, Status::Warn);
        assert_eq!(max_map_count("many").status, Status::Info);
    }

    #[test]
    fn the_least_limit_of_ids_counts() {
        assert_eq!(pids("32768", &[]).status, Status::Ok);
        assert_eq!(
            pids("4194304", &["max\n".into()]).found,
            "4194304 processes and threads (kernel.pid_max): some 838860 guests"
        );
        let group = pids("4194304", &["max".into(), "1000\n".into(), "40000".into()]);
        assert_eq!(group.status, Status::Warn);
        assert!(group.found.contains("pids.max") && group.remedy.unwrap().contains("TasksMax"));
        assert!(pids("1000", &["40000".into()]).remedy.unwrap().contains("kernel.pid_max"));
        assert_eq!(pids("many", &[]).status, Status::Info);
    }

    #[test]
    fn limits_are_the_soft_ones() {
        let limits = "Limit                     Soft Limit           Hard Limit           Units     \n\
                      Max processes             unlimited            unlimited            processes \n\
                      Max open files            1024                 524288               files     \n";
        assert_eq!(soft_limit(limits, "Max open files"), Some(Some(1024)));
        assert_eq!(soft_limit(limits, "Max processes"), Some(None));
        assert_eq!(soft_limit(limits, "Max locked memory"), None);
        let files = judge_limit("limits.files", soft_limit(limits, "Max open files"), 4096, "ulimit -n 65536");
        assert_eq!(files.status, Status::Warn);
        assert_eq!(judge_limit("x", Some(None), 4096, "").status, Status::Ok);
        assert_eq!(judge_limit("x", None, 4096, "").status, Status::Info);
    }
}
