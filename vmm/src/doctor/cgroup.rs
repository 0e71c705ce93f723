//! How control groups are set up, which decides what it costs KVM to start a thread for a VM.

use super::{Check, read_or_empty};

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
    fn versions_are_told_apart() {
        assert_eq!(groups(V2), Groups::V2 { favordynmods: false });
        assert_eq!(groups(&format!("{V2},favordynmods\n")), Groups::V2 { favordynmods: true });
        let v1 = "30 25 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu";
        assert_eq!(groups(&format!("{V2}\n{v1}\n")), Groups::V1);
        assert_eq!(groups("1 0 8:1 / / rw - ext4 /dev/sda1 rw\nnonsense\n"), Groups::None);
        assert_eq!(groups("1 1 0:1 / /x rw - cgroup2"), Groups::V2 { favordynmods: false });
    }
}
