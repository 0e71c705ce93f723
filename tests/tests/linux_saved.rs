//! A Linux guest that is saved when it stops, goes on when it starts, and is shut down in order.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::saved::{StartMode, StopMode, Stopped, VmStop, VmStopped};
use api_spec::vm::Readiness;
use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};
use tests::linux::{PATIENCE, assert_calm};
use tests::{Boot, Linux, Place, Vm};

fn start(place: &Place, linux: &Linux) -> Vm {
    Boot::new(place).linux(linux, "").saved_state(&place.join("saved"), true).start("guest")
}

fn mode(vm: &mut Vm) -> StartMode {
    vm.info().started.expect("it says how it was started").mode
}

fn stop(mut vm: Vm, mode: StopMode) -> VmStopped {
    let mut client = vm.client();
    client.set_patience(PATIENCE);
    let stopped = client.stop(VmStop { mode: Some(mode) }).expect("it can be stopped");
    let done = vm.process.finish_within(PATIENCE);
    assert_calm(&done.stdout);
    assert_eq!(done.code(), 0, "{done:?}");
    stopped
}

#[test]
fn a_linux_guest_goes_on_and_is_shut_down_in_order() {
    let Some(linux) = Linux::guest("6.12") else { return };
    let linux = linux.elf();
    let place = Place::new();
    let mut vm = start(&place, &linux);
    vm.becomes(Readiness::Full);
    let mut agent = vm.linux_agent();
    let boot_id = agent.shell("echo here > /run/marker; cat /proc/sys/kernel/random/boot_id");
    let uptime = |uptime: String| uptime.split('.').next().and_then(|s| s.parse::<u64>().ok()).expect("a number");
    let before = uptime(agent.shell("cat /proc/uptime"));

    // As a service manager does.
    vm.process.signal(Signal::TERM);
    let done = vm.process.finish_within(PATIENCE);
    assert_eq!((done.code(), &*done.stderr), (0, ""));
    let mut vm = start(&place, &linux);
    let mut agent = vm.linux_agent();
    assert_eq!(mode(&mut vm), StartMode::Restored);
    assert_eq!(vm.info().readiness, Some(Readiness::Full), "it is what it was");
    assert_eq!(agent.shell("cat /run/marker /proc/sys/kernel/random/boot_id"), format!("here\n{boot_id}"));
    assert!(uptime(agent.shell("cat /proc/uptime")) >= before);

    assert_eq!(stop(vm, StopMode::Shutdown), VmStopped { how: Stopped::ShutDown, reason: None });
    assert!(!place.join("saved").exists());

    // One that cannot be saved, as the disk is full.
    let mut vm = start(&place, &linux);
    vm.becomes(Readiness::Full);
    assert_eq!(mode(&mut vm), StartMode::Cold);
    let of_this_boot = vm.linux_agent().shell("cat /proc/sys/kernel/random/boot_id");
    assert_ne!(of_this_boot, boot_id);
    // A reboot is none of the ends that it is saved at.
    vm.linux_agent().reboot().expect("it agrees to start again");
    assert_eq!(vm.process.finish_within(PATIENCE).code(), 4);
    assert!(!place.join("saved").exists());
    let mut vm = start(&place, &linux);
    vm.becomes(Readiness::Full);
    assert_eq!(mode(&mut vm), StartMode::Cold);
    assert_ne!(vm.linux_agent().shell("cat /proc/sys/kernel/random/boot_id"), of_this_boot);
    let small = Rlimit { current: Some(1 << 20), maximum: Some(1 << 20) };
    let pid = Pid::from_raw(vm.pid() as i32).expect("it has a number");
    prlimit(Some(pid), Resource::Fsize, small).expect("it can be limited");
    let stopped = stop(vm, StopMode::Save);
    assert_eq!(stopped.how, Stopped::ShutDown);
    assert!(stopped.reason.expect("it was to be saved").contains("no space"));
    assert!(place.names().iter().all(|name| !name.contains("saved")), "{:?}", place.names());
}
