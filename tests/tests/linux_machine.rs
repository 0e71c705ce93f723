//! The machine as Debian's kernel, unmodified, finds it. Runs in the reference machine, as the tests in `linux.rs` do.

#![allow(missing_docs, reason = "tests are named for what they show")]

use tests::linux::{Console, Linux, PATIENCE};
use tests::{Boot, Place};

const UP: &str = "coppice: Linux ";
/// Exit code: the guest's kernel panicked.
const PANICKED: i32 = 3;
/// What a kernel says of firmware, memory types or interrupts that are not as they should be.
const COMPLAINTS: [&str; 9] = [
    "BUG:",
    "WARNING:",
    "Call Trace",
    "ACPI Error",
    "ACPI Warning",
    "Firmware Bug",
    "BIOS bug",
    "mtrr: ",
    "MTRRs disabled",
];

/// The kernel has nothing to say about the firmware or the processors that it finds: not about memory types, not about
/// topology, not about interrupts.
#[test]
fn eight_vcpus_boot_without_a_complaint() {
    let Some(linux) = Linux::guest("6.1") else { return };
    let place = Place::new();
    let mut vm = Boot::new(&place).linux(&linux, "loglevel=7 coppice.then=poweroff").vcpus(8).start("guest");
    let up = vm.said(UP);
    assert!(up.contains(" is up, 8 CPUs, clock kvm-clock"), "{up}");
    let done = vm.process.finish_within(PATIENCE);
    println!("Linux {up}");
    for complaint in COMPLAINTS {
        let line = done.stdout.lines().find(|line| line.contains(complaint));
        assert_eq!(line, None, "{complaint}");
    }
    assert_eq!((done.code(), done.stderr.as_str()), (0, ""));
}

/// A kernel that resets the machine after a panic has still said why.
#[test]
fn a_panic_ends_the_vmm_with_a_result_of_its_own() {
    let Some(linux) = Linux::guest("6.1") else { return };
    let place = Place::new();
    let mut vm = Boot::new(&place).linux(&linux, "coppice.then=panic").start("guest");
    vm.said(UP);
    let done = vm.process.finish_within(PATIENCE);
    assert!(done.stdout.contains("Kernel panic - not syncing"), "{}", done.stdout);
    assert_eq!((done.code(), done.one_line()), (PANICKED, "vmm: the guest's kernel panicked; its console says why"));
}
