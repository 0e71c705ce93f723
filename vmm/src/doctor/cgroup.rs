//! How control groups are set up, which decides what it costs KVM to start a thread for a VM.

use super::{Check, read_or_empty};
use std::path::{Path, PathBuf};

/// The control groups of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Groups {
    /// None mounted.
    None,
    /// Version 1, perhaps with an empty version 2 beside it.
    V1,
    /// Version 2 alone.
    V2 {
        /// Whether moving a task takes a cheap lock, at some cost to forks.
        favordynmods: bool,
    },
}

pub(super) fn check() -> Check {
    judge(groups(&read_or_empty("/proc/self/mountinfo")))
}

/// `pids.max` of the control group that this process is in and of those above it, as far as they can be seen.
pub(super) fn pids_max() -> Vec<String> {
    pids_groups(&read_or_empty("/proc/self/cgroup"))
        .into_iter()
        .flat_map(|(root, group)| {
            let above = group.ancestors().map(move |group| root.join(group).join("pids.max")).collect::<Vec<_>>();
            above.into_iter().filter_map(|path| std::fs::read_to_string(path).ok())
        })
        .collect()
}

/// Where the controller of process ids is mounted, in either version, and this process's group in it.
fn pids_groups(cgroups: &str) -> Vec<(&'static Path, PathBuf)> {
    // Number, controllers, path.
    let fields = |line: &str| {
        let mut fields = line.splitn(3, ':').skip(1).map(str::to_owned);
        Some((fields.next()?, fields.next()?))
    };
    let root = |controllers: &str| match controllers {
        "" => Some("/sys/fs/cgroup"),
        controllers if controllers.split(',').any(|one| one == "pids") => Some("/sys/fs/cgroup/pids"),
        _ => None,
    };
    let groups = cgroups.lines().filter_map(fields);
    groups
        .filter_map(|(controllers, group)| {
            Some((Path::new(root(&controllers)?), PathBuf::from(group.trim_start_matches('/'))))
        })
        .collect()
}

fn groups(mountinfo: &str) -> Groups {
    let mut found = Groups::None;
    for line in mountinfo.lines() {
        // ... mount point, options, any number of tags, "-", type, source, options of the file system
        let Some((_, rest)) = line.split_once(" - ") else { continue };
        let mut fields = rest.split_whitespace();
        let (kind, options) = (fields.next(), fields.nth(1).unwrap_or_default());
        match kind {
            Some("cgroup") => return Groups::V1,
            Some("cgroup2") => {
                found = Groups::V2 { favordynmods: options.split(',').any(|option| option == "favordynmods") };
            }
            _ => {}
        }
    }
    found
}

fn judge(groups: Groups) -> Check {
    let name = "cgroup";
    match groups {
        Groups::None => Check::info(name, "none mounted here"),
        Groups::V1 => Check::info(name, "version 1: making a VM can take tens of ms (see kvm.create_vm)"),
        Groups::V2 { favordynmods: true } => Check::ok(name, "version 2 with favordynmods"),
        Groups::V2 { favordynmods: false } => {
            Check::info(name, "version 2 without favordynmods: making a VM can take tens of ms (see kvm.create_vm)")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V2: &str = "25 1 0:22 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate";

    #[test]
    fn the_group_of_process_ids_is_found_in_either_version() {
        let v1 = "9:name=systemd:/\n8:pids:/a/b\n4:memory:/x\n0::/\n";
        let pids = (Path::new("/sys/fs/cgroup/pids"), PathBuf::from("a/b"));
        assert_eq!(pids_groups(v1), [pids, (Path::new("/sys/fs/cgroup"), PathBuf::new())]);
        assert_eq!(pids_groups("0::/user.slice/x:y\n"), [(Path::new("/sys/fs/cgroup"), "user.slice/x:y".into())]);
        assert_eq!(pids_groups("nonsense"), []);
    }

    #[test]
    fn versions_are_told_apart() {
        assert_eq!(groups(V2), Groups::V2 { favordynmods: false });
        assert_eq!(groups(&format!("{V2},favordynmods\n")), Groups::V2 { favordynmods: true });
        let v1 = "30 25 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu";
        assert_eq!(groups(&format!("{V2}\n{v1}\n")), Groups::V1);
        assert_eq!(groups("1 0 8:1 / / rw - ext4 /dev/sda1 rw\nnonsense\n"), Groups::None);
        assert_eq!(groups("1 1 0:1 / /x rw - cgroup2"), Groups::V2 { favordynmods: false });
    }
}
