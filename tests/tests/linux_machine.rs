//! The machine as Debian's kernel, unmodified, finds it. Runs in the reference machine, as the tests in `linux.rs` do.

#![allow(missing_docs, reason = "tests are named for what they show")]

use tests::linux::{Console, Linux, PATIENCE};
use tests::{Boot, Place};

const UP: &str = "coppice: Linux ";
/// Exit code: the guest's kernel panicked.
const PANICKED: i32 = 3;

/// A kernel that resets the machine after a panic has still said why.
#[test]
fn a_panic_ends_the_vmm_with_a_result_of_its_own() {
    let Some(linux) = Linux::guest() else { return };
    let place = Place::new();
    let mut vm = Boot::new(&place).linux(&linux, "coppice.then=panic").start("guest");
    vm.said(UP);
    let done = vm.process.finish_within(PATIENCE);
    assert!(done.stdout.contains("Kernel panic - not syncing"), "{}", done.stdout);
    assert_eq!((done.code(), done.one_line()), (PANICKED, "vmm: the guest's kernel panicked; its console says why"));
}
