//! Checks of KVM: is it there, what is behind it, what does it offer, what does it cost.

use super::probe_vm::ProbeVm;
use super::{Check, read_or_empty};
use crate::kvm::{KVM_API_VERSION as API_VERSION, KVM_DEVICE as DEVICE};
use kvm_ioctls::Kvm;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

/// From here on an instruction is taken to be emulated: about 650 ns where it is, below 1 ns where it is not.
const EMULATED_NS: f64 = 100.0;
/// From here on making a VM is taken to wait for something.
const SLOW_CREATION: Duration = Duration::from_millis(10);

pub(super) fn checks() -> Vec<Check> {
    let mut checks = Vec::new();
    match Kvm::new() {
        Ok(kvm) => {
            checks.push(Check::ok("kvm.device", format!("{DEVICE} can be opened")));
            checks.push(api(kvm.get_api_version()));
            checks.push(kind());
            checks.push(ring0(&kvm));
            checks.extend(capabilities(|number| kvm.check_extension_raw(number.into())));
            checks.push(creation(&kvm));
        }
        Err(e) => {
            checks.push(closed(Path::new(DEVICE).exists(), &io::Error::from_raw_os_error(e.errno())));
            checks.push(kind());
        }
    }
    checks
}

/// What it means that the device cannot be opened.
fn closed(exists: bool, error: &io::Error) -> Check {
    let name = "kvm.device";
    match error.kind() {
        _ if !exists => Check::fail(
            name,
            format!("there is no {DEVICE}"),
            "load kvm_amd or kvm_intel (in a VM: have nested virtualization turned on; in a container: pass the device in)",
        ),
        io::ErrorKind::PermissionDenied => Check::fail(
            name,
            format!("no permission to open {DEVICE}, which has {}", owner_and_mode(Path::new(DEVICE))),
            "join its group if that may read and write it (`usermod -aG GROUP USER`, then log in again); \
             else run as root, or let root give it to a group (`chgrp kvm /dev/kvm && chmod 660 /dev/kvm`)",
        ),
        _ => Check::fail(
            name,
            format!("{DEVICE} cannot be opened: {error}"),
            "see whether the KVM module for this CPU is loaded and the firmware allows virtualization",
        ),
    }
}

fn owner_and_mode(path: &Path) -> String {
    use std::os::unix::fs::MetadataExt;
    match std::fs::metadata(path) {
        Ok(meta) => format!("owner {}, group {}, mode {:o}", meta.uid(), meta.gid(), meta.mode() & 0o777),
        Err(e) => format!("an owner and mode that cannot be seen ({e})"),
    }
}

fn api(version: i32) -> Check {
    if version == API_VERSION {
        Check::ok("kvm.api", format!("version {version}"))
    } else {
        Check::fail("kvm.api", format!("version {version}, not {API_VERSION}"), "use a kernel newer than 2.6.22")
    }
}

/// What stands behind KVM here.
fn kind() -> Check {
    let modules: Vec<&str> = ["kvm_amd", "kvm_intel", "kvm_pvm"]
        .into_iter()
        .filter(|module| Path::new("/sys/module").join(module).exists())
        .collect();
    describe_kind(&cpu_flags(&read_or_empty("/proc/cpuinfo")), &modules)
}

/// Those flags of the first CPU that say something about virtualization.
fn cpu_flags(cpuinfo: &str) -> Vec<&str> {
    let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags")?.trim_start().strip_prefix(':'));
    flags.unwrap_or_default().split_whitespace().filter(|flag| ["svm", "vmx", "hypervisor"].contains(flag)).collect()
}

fn describe_kind(flags: &[&str], modules: &[&str]) -> Check {
    let name = "kvm.kind";
    let nested = if flags.contains(&"hypervisor") { ", itself inside a VM: exits from guests are slower" } else { "" };
    let extension = match (flags.contains(&"svm"), flags.contains(&"vmx")) {
        (true, _) => "AMD SVM",
        (_, true) => "Intel VMX",
        _ if modules.contains(&"kvm_pvm") => {
            return Check::info(name, "kvm_pvm, without hardware virtualization (no svm or vmx in /proc/cpuinfo)");
        }
        _ => {
            return Check::info(name, "no svm or vmx in /proc/cpuinfo: not hardware virtualization as this CPU has it");
        }
    };
    if modules.contains(&"kvm_pvm") {
        return Check::info(name, format!("kvm_pvm is loaded although the CPU has {extension}{nested}"));
    }
    Check::ok(name, format!("{extension}{nested}"))
}

/// Whether a guest's kernel mode runs on the CPU or is emulated: measured.
fn ring0(kvm: &Kvm) -> Check {
    match ProbeVm::new(kvm).and_then(|mut vm| vm.ring0_ns_per_instruction()) {
        Ok(ns) => judge_ring0(ns),
        Err(why) => Check::warn(
            "kvm.ring0",
            format!("a small VM could not be run: {why}"),
            "try `vmm demo`; if that fails too, look for the reason in the kernel's log (dmesg)",
        ),
    }
}

fn judge_ring0(ns: f64) -> Check {
    let name = "kvm.ring0";
    if ns > EMULATED_NS {
        return Check::warn(
            name,
            format!(
                "emulated ({ns:.0} ns an instruction): Linux kernels as distributed cannot boot here, since such emulators \
                 refuse cmpxchg16b, xrstor and int3; the embedded guest can, its ring 3 runs at full speed"
            ),
            "for Linux guests use a host with svm or vmx in /proc/cpuinfo",
        );
    }
    Check::ok(name, format!("runs on the CPU ({ns:.1} ns an instruction)"))
}

/// A capability of KVM, by its number in the kernel's interface.
struct Capability {
    name: &'static str,
    number: u32,
    /// What happens without it; without those that have nothing here nothing works.
    otherwise: Option<&'static str>,
}

const fn required(name: &'static str, number: u32) -> Capability {
    Capability { name, number, otherwise: None }
}

const fn optional(name: &'static str, number: u32, otherwise: &'static str) -> Capability {
    Capability { name, number, otherwise: Some(otherwise) }
}

const CAPABILITIES: [Capability; 15] = [
    required("user_memory", kvm_bindings::KVM_CAP_USER_MEMORY),
    required("irqchip", kvm_bindings::KVM_CAP_IRQCHIP),
    required("pit2", kvm_bindings::KVM_CAP_PIT2),
    required("irqfd", kvm_bindings::KVM_CAP_IRQFD),
    required("ioeventfd", kvm_bindings::KVM_CAP_IOEVENTFD),
    required("immediate_exit", kvm_bindings::KVM_CAP_IMMEDIATE_EXIT),
    required("set_tss_addr", kvm_bindings::KVM_CAP_SET_TSS_ADDR),
    required("mp_state", kvm_bindings::KVM_CAP_MP_STATE),
    required("vcpu_events", kvm_bindings::KVM_CAP_VCPU_EVENTS),
    optional("xsave2", kvm_bindings::KVM_CAP_XSAVE2, "saves 4 KiB of extended registers: guests do without AMX"),
    optional(
        "adjust_clock",
        kvm_bindings::KVM_CAP_ADJUST_CLOCK,
        "the paravirtual clock is not saved: a restored guest's clock starts anew",
    ),
    optional(
        "tsc_control",
        kvm_bindings::KVM_CAP_TSC_CONTROL,
        "a guest's time-stamp counter keeps its pace only on hosts of the same frequency",
    ),
    optional("tsc_deadline_timer", kvm_bindings::KVM_CAP_TSC_DEADLINE_TIMER, "guests use the slower one-shot timer"),
    optional(
        "kvmclock_ctrl",
        kvm_bindings::KVM_CAP_KVMCLOCK_CTRL,
        "a restored Linux guest may report a soft lockup for the time that it stood still",
    ),
    optional(
        "pre_fault_memory",
        kvm_bindings::KVM_CAP_PRE_FAULT_MEMORY,
        "a restored guest's pages are mapped as it touches them (Linux 6.11 has it, not for every kind of KVM)",
    ),
];

fn capabilities(ask: impl Fn(u32) -> i32) -> Vec<Check> {
    let missing: Vec<&Capability> = CAPABILITIES.iter().filter(|c| ask(c.number) <= 0).collect();
    let required: Vec<&str> = missing.iter().filter(|c| c.otherwise.is_none()).map(|c| c.name).collect();
    let mut checks = vec![if required.is_empty() {
        let names: Vec<&str> = CAPABILITIES.iter().filter(|c| c.otherwise.is_none()).map(|c| c.name).collect();
        Check::ok("kvm.required", names.join(", "))
    } else {
        let remedy = "use a newer kernel, or another kind of KVM: nothing can stand in for these";
        Check::fail("kvm.required", format!("absent: {}", required.join(", ")), remedy)
    }];
    checks.extend(CAPABILITIES.iter().filter_map(|capability| {
        let otherwise = capability.otherwise?;
        let name = format!("kvm.{}", capability.name);
        Some(match missing.iter().any(|c| c.number == capability.number) {
            false => Check::ok(&name, "offered"),
            true => Check::info(&name, format!("absent; {otherwise}")),
        })
    }));
    checks
}

/// What it costs to make a VM: measured.
fn creation(kvm: &Kvm) -> Check {
    let mut times = Vec::new();
    for _ in 0..5 {
        let start = Instant::now();
        let vm = kvm.create_vm();
        let created = start.elapsed();
        match vm {
            Ok(_vm) => times.push(created),
            Err(e) => {
                let why = io::Error::from_raw_os_error(e.errno());
                let remedy = "see the limits on processes and memory of this user and its cgroup";
                return Check::fail("kvm.create_vm", format!("a VM cannot be made: {why}"), remedy);
            }
        }
    }
    times.sort_unstable();
    judge_creation(times[times.len() / 2])
}

fn judge_creation(median: Duration) -> Check {
    let name = "kvm.create_vm";
    let found = format!("{:.2} ms", median.as_secs_f64() * 1e3);
    if median < SLOW_CREATION {
        return Check::ok(name, found);
    }
    Check::warn(
        name,
        format!("{found}: each VM's recovery thread for huge pages waits for the cgroup lock"),
        "use cgroup v2 mounted with favordynmods, or, on CPUs that do not need that guard, kvm.nx_huge_pages=never",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn cpu_flags_are_found_in_the_first_cpu() {
        let cpuinfo = "processor\t: 0\nvendor_id\t: X\nflags\t\t: fpu vme svm hypervisor svmx\n\nprocessor\t: 1\nflags\t\t: vmx\n";
        assert_eq!(cpu_flags(cpuinfo), ["svm", "hypervisor"]);
        assert!(cpu_flags("").is_empty());
        assert!(cpu_flags("flags without a colon").is_empty());
    }

    #[test]
    fn kinds_of_kvm_are_told_apart() {
        assert_eq!(describe_kind(&["svm"], &["kvm_amd"]), Check::ok("kvm.kind", "AMD SVM"));
        assert!(describe_kind(&["vmx", "hypervisor"], &["kvm_intel"]).found.contains("inside a VM"));
        let pvm = describe_kind(&["hypervisor"], &["kvm_pvm"]);
        assert_eq!(pvm.status, Status::Info);
        assert!(pvm.found.starts_with("kvm_pvm"));
        assert_eq!(describe_kind(&[], &[]).status, Status::Info);
    }

    #[test]
    fn slow_instructions_are_emulated_ones() {
        assert_eq!(judge_ring0(0.4).status, Status::Ok);
        let emulated = judge_ring0(650.0);
        assert_eq!(emulated.status, Status::Warn);
        assert!(emulated.found.contains("cmpxchg16b") && emulated.found.contains("embedded guest"), "{emulated:?}");
    }

    #[test]
    fn a_missing_capability_fails_only_if_nothing_stands_in_for_it() {
        assert!(capabilities(|_| 1).iter().all(|check| check.status == Status::Ok));
        let none = capabilities(|_| 0);
        assert_eq!(none[0].status, Status::Fail);
        assert!(none[0].found.contains("irqfd"), "{:?}", none[0]);
        assert!(none[1..].iter().all(|check| check.status == Status::Info));
        let no_xsave2 = capabilities(|number| i32::from(number != kvm_bindings::KVM_CAP_XSAVE2));
        assert_eq!(no_xsave2.iter().filter(|check| check.status != Status::Ok).count(), 1);
    }

    #[test]
    fn a_closed_device_says_why() {
        let error = |kind: io::ErrorKind| io::Error::from(kind);
        assert!(closed(false, &error(io::ErrorKind::NotFound)).found.contains("there is no"));
        let denied = closed(true, &error(io::ErrorKind::PermissionDenied));
        assert!(denied.remedy.unwrap().contains("group"));
        assert_eq!(closed(true, &error(io::ErrorKind::Other)).status, Status::Fail);
    }

    #[test]
    fn slow_creation_is_a_warning() {
        assert_eq!(judge_creation(Duration::from_micros(120)), Check::ok("kvm.create_vm", "0.12 ms"));
        assert!(judge_creation(Duration::from_millis(27)).remedy.unwrap().contains("favordynmods"));
    }
}
