//! Checks of what the page server and shared images need: userfaultfd and sealed memfds, both tried out.

use super::{Check, look, read_or_empty};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use std::fs::File;
use std::io;
use vm_memory::{FileOffset, MmapRegion};

const DEVICE: &str = "/dev/userfaultfd";
/// Number of `CAP_SYS_PTRACE`.
const CAP_SYS_PTRACE: u32 = 19;
const SIZE: usize = 64 * 1024;

pub(super) fn checks() -> Vec<Check> {
    let opened = File::options().read(true).write(true).open(DEVICE);
    let allowed = has_capability(&read_or_empty("/proc/self/status"), CAP_SYS_PTRACE);
    let mut checks = vec![device(opened.err().as_ref())];
    checks.push(look("userfaultfd.sysctl", "/proc/sys/vm/unprivileged_userfaultfd", "no such setting", |value| {
        let meaning = if value == "0" { "the device or CAP_SYS_PTRACE is needed" } else { "open to every user" };
        Check::info("userfaultfd.sysctl", format!("vm.unprivileged_userfaultfd={value}: {meaning}"))
    }));
    let has = if allowed { "this process has it" } else { "this process does not have it" };
    checks.push(Check::info("userfaultfd.capability", format!("CAP_SYS_PTRACE: {has}")));
    checks.extend(kernel_faults());
    checks.push(sealing());
    checks
}

fn device(error: Option<&io::Error>) -> Check {
    let name = "userfaultfd.device";
    match error.map(io::Error::kind) {
        None => Check::ok(name, format!("{DEVICE} can be opened")),
        Some(io::ErrorKind::NotFound) => Check::info(name, format!("there is no {DEVICE} (Linux 6.1 has it)")),
        Some(_) => Check::info(name, format!("{DEVICE} is closed to this user")),
    }
}

/// Whether a set of effective capabilities in `/proc/PID/status` has this one.
fn has_capability(status: &str, number: u32) -> bool {
    let set = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    set.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).is_some_and(|set| set >> number & 1 == 1)
}

/// A guest's page faults are the kernel's own: can they be caught, and on shared memory?
fn kernel_faults() -> Vec<Check> {
    let (name, shmem) = ("userfaultfd.kernel_faults", "userfaultfd.missing_shmem");
    let uffd = match uffd_handler::uffd::create() {
        Ok(uffd) => uffd,
        Err(e) => {
            let found = format!(
                "cannot be caught: {}; the page server and `vmm demo` cannot be used, restoring from the file can",
                one_line(e.reasons())
            );
            return vec![Check::warn(name, found, e.remedy())];
        }
    };
    let registered = memfd()
        .map_err(|e| e.to_string())
        .and_then(|file| MmapRegion::<()>::from_file(FileOffset::new(file, 0), SIZE).map_err(|e| e.to_string()))
        .and_then(|region| uffd.register(region.as_ptr().cast(), region.size()).map(drop).map_err(|e| e.to_string()));
    vec![
        Check::ok(name, "can be caught"),
        match registered {
            Ok(()) => Check::ok(shmem, "missing pages of a memfd can be served"),
            Err(e) => {
                let found = format!("missing pages of a memfd cannot be served, so no page store can be used: {e}");
                Check::warn(shmem, one_line(&found), "use a kernel that is built with SHMEM and newer than 4.11")
            }
        },
    ]
}

fn one_line(text: &str) -> String {
    text.split('\n').map(str::trim).collect::<Vec<_>>().join(" ")
}

fn memfd() -> io::Result<File> {
    let file = File::from(memfd_create("doctor", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    file.set_len(SIZE as u64)?;
    Ok(file)
}

/// Can an image be sealed while it is mapped?
fn sealing() -> Check {
    let name = "memfd.sealing";
    let sealed = memfd().and_then(|file| {
        let mapped = MmapRegion::<()>::from_file(FileOffset::new(file.try_clone()?, 0), SIZE);
        let seals = SealFlags::FUTURE_WRITE | SealFlags::GROW | SealFlags::SHRINK;
        fcntl_add_seals(&file, seals)?;
        drop(mapped);
        Ok(())
    });
    match sealed {
        Ok(()) => Check::ok(name, "an image can be sealed against later writers (F_SEAL_FUTURE_WRITE)"),
        Err(e) => {
            let found = format!("an image cannot be sealed, so that guests could not share one safely: {e}");
            Check::fail(name, found, "use Linux 5.1 or newer with memfd_create allowed")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn capabilities_are_read_from_the_effective_set() {
        let status = "CapPrm:\t0000000000080000\nCapEff:\t0000000000080001\n";
        assert!(has_capability(status, 19));
        assert!(has_capability(status, 0));
        assert!(!has_capability(status, 1));
        assert!(!has_capability("CapPrm:\t0000000000080000\n", 19));
        assert!(!has_capability("CapEff:\tnonsense\n", 19));
    }

    #[test]
    fn a_closed_device_is_no_failure_by_itself() {
        assert_eq!(device(None).status, Status::Ok);
        assert_eq!(device(Some(&io::ErrorKind::NotFound.into())).status, Status::Info);
        assert_eq!(device(Some(&io::ErrorKind::PermissionDenied.into())).status, Status::Info);
    }

    #[test]
    fn messages_stay_on_one_line() {
        assert_eq!(one_line("a:\n  b\nc"), "a: b c");
    }
}
