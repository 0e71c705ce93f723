//! A machine that is saved when it stops, and goes on when it starts.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::agent::Request;
use api_spec::devices::{Drive, Entropy, RateLimiter, TokenBucket};
use api_spec::logger::{LogLevel, Logger};
use api_spec::saved::{Saved, SavedState, StartMode, Started, StopMode, Stopped, VmStop, VmStopped};
use api_spec::vm::{BootSource, InstanceState, MachineConfig, Vsock};
use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};
use serde_json::{Value, json};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};
use tests::http::{answers, connect, hear, request};
use tests::process::{Finished, Process};
use tests::template::Facts;
use tests::vm::drive;
use tests::{Agent, Boot, Place, Random, Restore, Vm, binaries, require, until};

const RESTORED: Started = Started { mode: StartMode::Restored, reason: None, drift: false };
const COLD: Started = Started { mode: StartMode::Cold, reason: None, drift: false };

fn path(place: &Place) -> PathBuf {
    place.join("saved")
}

/// A small guest that is saved at [`path`].
fn machine(place: &Place, save_on_stop: bool) -> Boot<'_> {
    Boot::new(place).memory_mib(16).saved_state(&path(place), save_on_stop)
}

fn started(vm: &mut Vm) -> Started {
    vm.info().started.expect("it says how it was started")
}

fn saved(vm: &mut Vm) -> Saved {
    vm.info().saved.expect("it says whether it is saved")
}

/// Why it was booted.
#[track_caller]
fn cold_reason(vm: &mut Vm) -> String {
    let Started { mode, reason, drift } = started(vm);
    assert_eq!((mode, drift), (StartMode::Cold, false));
    reason.expect("there was something to go on from")
}

#[track_caller]
fn ended_well(vm: Vm) -> Finished {
    let finished = vm.process.finish();
    assert_eq!(finished.code(), 0, "{finished:?}");
    finished
}

#[track_caller]
fn stop(mut vm: Vm, mode: StopMode) -> VmStopped {
    let stopped = vm.client().stop(VmStop { mode: Some(mode) }).expect("it can be stopped");
    ended_well(vm);
    stopped
}

/// A machine that was saved, and what is known of it.
fn saved_machine(place: &Place) -> Facts {
    let (vm, mut agent) = machine(place, false).ready("guest");
    let facts = Facts::gather(&mut agent, 1);
    assert_eq!(stop(vm, StopMode::Save), VmStopped { how: Stopped::Saved, reason: None });
    assert!(path(place).join("snap.json").exists());
    facts
}

fn ctl(place: &Place, vm: &Vm, line: &str) -> Finished {
    Process::start(place, "ctl", binaries::vmm(), |vmm| {
        vmm.arg("ctl").arg("--api-sock").arg(&vm.api).args(line.split_whitespace());
    })
    .finish()
}

fn no_partials(place: &Place) {
    assert!(place.names().iter().all(|name| !name.contains(".partial")), "{:?}", place.names());
}

/// As a service manager stops and starts it, again and again.
#[test]
fn a_machine_that_is_stopped_goes_on_when_it_is_started() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) = machine(&place, true).ready("guest");
    let facts = Facts::gather(&mut agent, 1);
    let generation = agent.ask(Request::Generation);
    assert_eq!((started(&mut vm), saved(&mut vm)), (COLD, Saved::default()));
    for _ in 0..3 {
        vm.stop();
        assert!(path(&place).join("snap.json").exists());
        (vm, agent) = machine(&place, true).ready("guest");
        assert_eq!((started(&mut vm), saved(&mut vm)), (RESTORED, Saved::default()));
        assert!(!path(&place).exists(), "it is used once");
        facts.check(&mut agent);
        assert_eq!(agent.ask(Request::Generation), generation, "it is no clone");
    }
    // One that was paused runs when it is started.
    vm.pause();
    vm.stop();
    (vm, agent) = machine(&place, true).ready("guest");
    facts.check(&mut agent);
    assert_eq!(stop(vm, StopMode::Shutdown).how, Stopped::Ended);
    no_partials(&place);
}

/// Off unless it is said, and either way for one stop.
#[test]
fn the_configuration_says_whether_a_stop_saves_and_a_stop_can_say_otherwise() {
    require!(Kvm);
    let is_saved = |option: bool, line: &str| {
        let place = Place::new();
        let (vm, _) = machine(&place, option).ready("guest");
        let done = ctl(&place, &vm, line);
        assert_eq!((done.code(), done.stderr.as_str()), (0, ""), "{line}");
        ended_well(vm);
        no_partials(&place);
        let is_saved = path(&place).join("snap.json").exists();
        assert_eq!(done.stdout.contains("saved"), is_saved, "{}", done.stdout);
        is_saved
    };
    assert!(!is_saved(false, "stop"));
    assert!(is_saved(false, "stop --save"));
    assert!(is_saved(true, "stop"));
    assert!(!is_saved(true, "stop --shutdown"));
    assert!(!is_saved(true, "stop --force"));
    let place = Place::new();
    machine(&place, false).ready("guest").0.stop();
    assert!(!path(&place).exists(), "SIGTERM does as the configuration says");
}

#[test]
fn a_stop_that_says_two_things_is_refused_and_the_machine_runs_on() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) = machine(&place, true).ready("guest");
    let facts = Facts::gather(&mut agent, 1);
    for line in ["stop --save --force", "stop --shutdown --save", "stop --force --mode=save"] {
        let done = ctl(&place, &vm, line);
        assert_eq!(done.code(), 2, "{done:?}");
        assert!(done.one_line().contains("cannot be used with"), "{}", done.stderr);
    }
    let refused =
        vm.api().put("/vm/stop", &json!({ "mode": "save", "force": true })).expect_err("there is no such field");
    assert!(refused.to_string().contains("force"), "{refused}");
    assert_eq!(vm.state(), InstanceState::Running);
    facts.check(&mut agent);
    // Nor can one be saved that has no place for it.
    let (mut other, mut agent) = Boot::new(&place).memory_mib(16).ready("other");
    let refused = other.client().stop(VmStop { mode: Some(StopMode::Save) }).expect_err("there is no place");
    assert!(refused.to_string().contains("saved-state"), "{refused}");
    agent.ticks(2);
    assert_eq!((other.info().started, other.info().saved), (None, None));
    other.stop();
}

/// Whatever is wrong with a saved state: it is kept, the machine boots, and says why; or does not start, if it is strict.
#[test]
fn a_machine_boots_if_it_cannot_go_on_and_says_why() {
    require!(Kvm);
    let place = Place::new();
    for (number, file) in ["state.bin", "snap.json", "mem.bin", "config.json"].into_iter().enumerate() {
        let facts = saved_machine(&place);
        let damaged = path(&place).join(file);
        let mut bytes = fs::read(&damaged).expect("it can be read");
        let at = bytes.iter().rposition(|byte| *byte != 0 && *byte != b'\n').expect("there is something in it");
        bytes[at] ^= 1;
        let before = fs::metadata(&damaged).expect("it is there").permissions();
        fs::remove_file(&damaged).expect("it can be replaced");
        fs::write(&damaged, bytes).expect("it can be replaced");
        fs::set_permissions(&damaged, before).expect("it can be made as it was");

        let refused = machine(&place, false).strict().start("strict").process.finish();
        assert_eq!(refused.code(), 1, "{refused:?}");
        assert!(refused.one_line().contains("saved state") && refused.one_line().contains("strict"), "{refused:?}");
        assert!(damaged.exists(), "it is kept where it is");

        let (mut vm, mut agent) = machine(&place, false).ready("guest");
        let reason = cold_reason(&mut vm);
        assert!(refused.stderr.contains(&reason), "{reason}, and strict: {refused:?}");
        assert_ne!(agent.nonce(), facts.nonce, "it was booted");
        assert!(!path(&place).exists(), "it cannot be taken for a later machine");
        let aside = place.join(format!("saved.unusable-{}", number + 1));
        assert!(aside.join(file).exists(), "{:?}", place.names());
        assert!(vm.process.log().contains(&reason) && vm.process.log().contains(".unusable-"), "{}", vm.process.log());
        vm.stop();
    }
}

#[test]
fn a_machine_boots_where_its_saved_state_does_not_fit_the_host() {
    require!(Kvm);
    let place = Place::new();
    let facts = saved_machine(&place);
    let manifest = path(&place).join("snap.json");
    let mut other: Value = serde_json::from_slice(&fs::read(&manifest).expect("it is there")).expect("JSON");
    other["cpu"]["vendor"] = "OtherMakerCo".into();
    let other = snapshot::manifest::reseal(other.to_string().as_bytes()).expect("it is a manifest");
    fs::remove_file(&manifest).expect("it can be replaced");
    fs::write(&manifest, other).expect("it can be replaced");
    let (mut vm, mut agent) = machine(&place, false).ready("guest");
    let reason = cold_reason(&mut vm);
    assert!(reason.contains("vendor") && reason.contains("OtherMakerCo"), "{reason}");
    assert_ne!(agent.nonce(), facts.nonce);
    assert!(place.join("saved.unusable-1/snap.json").exists());
    vm.stop();
}

/// A machine that does not come about either way leaves everything as it was.
#[test]
fn a_failed_start_leaves_the_saved_state_where_it_is() {
    require!(Kvm);
    let place = Place::new();
    let facts = saved_machine(&place);
    fs::write(place.join("guest.vsock"), "in the way").expect("a file can be made");
    let failed = machine(&place, false).start("guest").process.finish();
    assert_eq!(failed.code(), 1, "{failed:?}");
    fs::remove_file(place.join("guest.vsock")).expect("it can be removed");
    let (mut vm, mut agent) = machine(&place, false).ready("guest");
    assert_eq!(started(&mut vm), RESTORED);
    facts.check(&mut agent);
    vm.stop();
}

#[test]
fn what_is_no_saved_state_is_left_alone() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, _) = Boot::new(&place).memory_mib(16).ready("original");
    vm.snapshot(&path(&place));
    vm.stop();
    let (mut vm, _) = machine(&place, true).ready("guest");
    assert!(cold_reason(&mut vm).contains("no saved state"));
    // It is in the way of a save, which is a shutdown then.
    let stopped = vm.client().stop(VmStop::default()).expect("it can be stopped");
    assert_eq!(stopped.how, Stopped::Ended);
    assert!(stopped.reason.expect("it was to be saved").contains("exists already"));
    ended_well(vm);
    let (vm, _) = Restore::new(&place, &path(&place)).ready("clone");
    vm.stop();
}

/// Units make the directories that they name, and there is nothing to lose in one.
#[test]
fn an_empty_directory_in_the_place_of_a_saved_state_is_as_nothing() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) = machine(&place, true).ready("guest");
    let facts = Facts::gather(&mut agent, 1);
    fs::create_dir(path(&place)).expect("a directory can be made");
    assert_eq!(saved(&mut vm), Saved::default());
    vm.stop();
    let (mut vm, mut agent) = machine(&place, true).ready("guest");
    assert_eq!(started(&mut vm), RESTORED);
    facts.check(&mut agent);
    stop(vm, StopMode::Shutdown);
    fs::create_dir(path(&place)).expect("a directory can be made");
    let (mut vm, _) = machine(&place, true).strict().ready("guest");
    assert_eq!(started(&mut vm), COLD);
    // With anything in it it is somebody's.
    fs::create_dir(path(&place)).expect("a directory can be made");
    fs::write(path(&place).join("note"), "mine").expect("a file can be made");
    let stopped = vm.client().stop(VmStop::default()).expect("it can be stopped");
    assert!(stopped.reason.expect("it was to be saved").contains("exists already"));
    ended_well(vm);
    assert_eq!(fs::read(path(&place).join("note")).expect("it is there"), b"mine");
}

/// The disk is full: the guest is shut down, and nothing is left of what was begun.
#[test]
fn a_machine_that_cannot_be_saved_is_shut_down() {
    require!(Kvm);
    let limit = |vm: &Vm| {
        let pid = Pid::from_raw(vm.pid() as i32).expect("it has a number");
        // As if the disk were full: no file can be as long as the guest's memory.
        let small = Rlimit { current: Some(1 << 20), maximum: Some(1 << 20) };
        prlimit(Some(pid), Resource::Fsize, small).expect("it can be limited");
    };
    let place = Place::new();
    let (mut vm, _) = machine(&place, true).ready("guest");
    limit(&vm);
    let stopped = vm.client().stop(VmStop { mode: Some(StopMode::Save) }).expect("it can be stopped");
    assert_eq!(stopped.how, Stopped::Ended, "the embedded guest has no way to switch itself off");
    assert!(stopped.reason.expect("it was to be saved").contains("no space"));
    let finished = ended_well(vm);
    assert!(finished.stderr.contains("could not be saved") && finished.stderr.contains("no space"), "{finished:?}");
    let (vm, _) = machine(&place, true).ready("guest");
    limit(&vm);
    let finished = vm.stop();
    assert!(finished.stderr.contains("could not be saved"), "{finished:?}");
    assert!(!path(&place).exists());
    no_partials(&place);
}

/// Whatever moment a save is cut short at, the next start finds all of it or nothing.
#[test]
fn a_save_that_is_killed_leaves_all_or_nothing() {
    require!(Kvm);
    let seed = std::env::var("COPPICE_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()));
    println!("COPPICE_SEED={seed}");
    let mut random = Random::new(seed);
    let place = Place::new();
    let boot = || machine(&place, true).memory_mib(64);
    let (mut vm, mut agent) = boot().ready("guest");
    let mut facts = Facts::gather(&mut agent, 32);
    // Around as long as a save takes, whatever that is here.
    let (mut restored, mut window) = (0, Duration::from_millis(80));
    for _ in 0..20 {
        vm.process.signal(Signal::TERM);
        std::thread::sleep(window * random.below(1000) as u32 / 1000);
        vm.process.kill();
        let was_saved = path(&place).exists();
        (vm, agent) = boot().ready("guest");
        no_partials(&place);
        assert_eq!(started(&mut vm), if was_saved { RESTORED } else { COLD });
        if was_saved {
            restored += 1;
            window = window * 2 / 3;
        } else {
            window *= 2;
            facts = Facts::gather(&mut agent, 32);
        }
        facts.check(&mut agent);
        assert!(!path(&place).exists());
    }
    println!("{restored} of 20 were saved");
    vm.stop();
}

#[test]
fn a_saved_state_is_used_once_even_if_it_cannot_be_removed() {
    require!(Kvm);
    let place = Place::new();
    let facts = saved_machine(&place);
    // Something that is not removed with it.
    fs::create_dir_all(path(&place).join("a-directory/of-somebody")).expect("a directory can be made");
    let (mut vm, mut agent) = machine(&place, false).ready("guest");
    assert_eq!((started(&mut vm), saved(&mut vm)), (RESTORED, Saved::default()));
    facts.check(&mut agent);
    assert!(vm.process.log().contains("cannot be removed"), "{}", vm.process.log());
    assert_eq!(stop(vm, StopMode::Force).how, Stopped::Ended);
    let refused = machine(&place, false).strict().start("strict").process.finish();
    assert_eq!(refused.code(), 1);
    assert!(refused.one_line().contains("was used by an earlier start"), "{refused:?}");
    let (mut vm, mut agent) = machine(&place, false).ready("guest");
    assert!(cold_reason(&mut vm).contains("was used by an earlier start"));
    assert_ne!(agent.nonce(), facts.nonce);
    vm.stop();
    fs::remove_dir_all(path(&place).join("a-directory")).expect("it can be removed");
    let (mut vm, _) = machine(&place, false).ready("guest");
    assert!(cold_reason(&mut vm).contains("was used by an earlier start"));
    assert!(!path(&place).exists(), "now it can be removed");
    vm.stop();
}

/// Sets or clears the attribute that keeps all names of a directory as they are. False if this place has no such thing.
fn immutable(path: &Path, sign: &str) -> bool {
    Command::new("chattr").arg(format!("{sign}i")).arg(path).output().is_ok_and(|output| output.status.success())
}

#[test]
fn a_saved_state_in_an_immutable_directory_is_used_once() {
    require!(Kvm);
    let place = Place::new();
    let facts = saved_machine(&place);
    if !immutable(&path(&place), "+") {
        return test_skip::skip("no directory can be made immutable here");
    }
    let (mut vm, mut agent) = machine(&place, false).ready("guest");
    let how = started(&mut vm);
    facts.check(&mut agent);
    let finished = vm.stop();
    let (mut vm, _) = machine(&place, false).ready("guest");
    let reason = cold_reason(&mut vm);
    vm.stop();
    assert!(immutable(&path(&place), "-"), "it can be made as it was");
    assert_eq!(how, RESTORED);
    assert!(finished.stderr.contains("cannot be removed"), "{finished:?}");
    assert!(reason.contains("was used by an earlier start"), "{reason}");
}

/// A state that cannot be marked as used is not used, and one that was marked is not, wherever a copy of it lies.
#[test]
fn a_saved_state_that_cannot_be_marked_is_not_used() {
    require!(Kvm);
    let place = Place::new();
    let facts = saved_machine(&place);
    let mark = path(&place).join("saved.mark");
    fs::rename(&mark, place.join("elsewhere")).expect("it can be moved");
    std::os::unix::fs::symlink(place.join("elsewhere"), &mark).expect("a link can be made");
    let (mut vm, mut agent) = machine(&place, false).ready("guest");
    assert!(cold_reason(&mut vm).contains("saved.mark"));
    assert_ne!(agent.nonce(), facts.nonce);
    assert!(place.join("saved.unusable-1/snap.json").exists());
    vm.stop();
}

/// A guest that restarts its machine really does, whatever is saved otherwise.
#[test]
fn a_reboot_is_a_reboot() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) = machine(&place, true).ready("guest");
    let facts = Facts::gather(&mut agent, 1);
    for _ in 0..2 {
        agent.try_ask(Request::Reset).expect_err("a reset machine does not answer");
        let finished = vm.process.finish();
        assert_eq!(finished.code(), 4, "{finished:?}");
        assert!(!path(&place).exists());
        (vm, agent) = machine(&place, true).ready("guest");
        assert_eq!(started(&mut vm), COLD);
        assert_ne!(agent.nonce(), facts.nonce);
    }
    // One that goes on from a saved state, too.
    let facts = Facts::gather(&mut agent, 1);
    vm.stop();
    (vm, agent) = machine(&place, true).ready("guest");
    facts.check(&mut agent);
    agent.try_ask(Request::Reset).expect_err("a reset machine does not answer");
    assert_eq!(vm.process.finish().code(), 4);
    (vm, agent) = machine(&place, true).ready("guest");
    assert_eq!(started(&mut vm), COLD);
    assert_ne!(agent.nonce(), facts.nonce);
    vm.stop();
}

#[test]
fn a_machine_goes_on_with_the_configuration_that_it_was_saved_with() {
    require!(Kvm);
    let place = Place::new();
    let facts = saved_machine(&place);
    let edited = || machine(&place, false).vcpus(2).memory_mib(32);
    let (mut vm, mut agent) = edited().ready("guest");
    assert_eq!(started(&mut vm), Started { drift: true, ..RESTORED });
    facts.check(&mut agent);
    let config = vm.client().config().expect("it tells");
    assert_eq!((config.machine_config.vcpu_count, config.machine_config.mem_size_mib), (1, 16));
    assert!(vm.process.log().contains("another configuration"), "{}", vm.process.log());
    // It is another one still, when it was saved and started once more.
    stop(vm, StopMode::Save);
    let (mut vm, mut agent) = edited().ready("guest");
    assert_eq!(started(&mut vm), Started { drift: true, ..RESTORED });
    facts.check(&mut agent);
    stop(vm, StopMode::Shutdown);
    // A machine that boots has what is configured.
    let (mut vm, _) = edited().ready("guest");
    assert_eq!(started(&mut vm), COLD);
    assert_eq!(vm.client().config().expect("it tells").machine_config.vcpu_count, 2);
    vm.stop();
}

#[test]
fn what_the_guest_cannot_tell_is_no_other_configuration_and_is_as_configured_now() {
    require!(Kvm);
    let place = Place::new();
    let facts = saved_machine(&place);
    let config = place.join("guest.json");
    let file = File::options().append(true).open(&config).expect("it can be opened");
    file.set_modified(SystemTime::now()).expect("it can be touched");
    // A name of its own, so another socket of the vsock device; and another log and limit.
    let (mut vm, mut agent) = machine(&place, false)
        .max_private_mib(300)
        .configured(|config| config.logger = Some(Logger { level: Some(LogLevel::Info), ..Logger::default() }))
        .ready("renamed");
    assert_eq!(started(&mut vm), RESTORED);
    facts.check(&mut agent);
    let config = vm.client().config().expect("it tells");
    assert_eq!(config.machine_config.max_private_mib, Some(300));
    assert_eq!(config.vsock.expect("it has one").uds_path, place.join("renamed.vsock"));
    assert_eq!(config.boot_source, Some(BootSource { embedded_guest: true, ..Default::default() }));
    // One more word for its kernel it could tell.
    stop(vm, StopMode::Save);
    let (mut vm, mut agent) = machine(&place, false)
        .configured(|config| config.boot_source.as_mut().expect("there is one").boot_args = Some("more".into()))
        .ready("guest");
    assert_eq!(started(&mut vm), Started { drift: true, ..RESTORED });
    facts.check(&mut agent);
    vm.stop();
}

/// Limits are nothing that a guest can tell, and those of today hold.
#[test]
fn bounds_are_as_configured_now() {
    require!(Kvm);
    let place = Place::new();
    let image = place.join("image");
    std::fs::write(&image, [0; 1 << 20]).expect("a file can be made in the test's directory");
    let limit = |size| {
        let bandwidth = Some(TokenBucket { size, one_time_burst: None, refill_time: 100 });
        Some(RateLimiter { bandwidth, ops: None })
    };
    let bounded = |rate_limiter: Option<RateLimiter>| {
        let disk = Drive { overlay: true, rate_limiter, ..drive("data", &image) };
        machine(&place, false).drive(disk).configured(|config| config.entropy = Some(Entropy { rate_limiter }))
    };
    let (vm, _agent) = bounded(limit(4096)).ready("guest");
    stop(vm, StopMode::Save);
    for now in [limit(8192), None, limit(4096)] {
        let (mut vm, _agent) = bounded(now).ready("guest");
        assert_eq!(started(&mut vm), RESTORED);
        let config = vm.client().config().expect("it tells");
        assert_eq!(config.entropy, Some(Entropy { rate_limiter: now }));
        assert_eq!(config.drives[0].rate_limiter, now);
        stop(vm, StopMode::Save);
    }
}

/// What `du` says.
fn on_disk(path: &Path) -> u64 {
    let entries = fs::read_dir(path).expect("it can be read").flatten();
    entries.map(|entry| entry.metadata().expect("it is there").blocks() * 512).sum()
}

#[test]
fn what_is_saved_is_told_with_its_size_over_the_api_and_by_list() {
    require!(Kvm);
    let place = Place::new();
    let list = |words: &[&str]| {
        Process::start(&place, "list", binaries::vmm(), |vmm| {
            vmm.arg("list").args(words).arg(place.join("guest.json"));
        })
        .finish()
    };
    let listed = || serde_json::from_str::<Value>(&list(&["--json"]).stdout).expect("it is JSON");
    saved_machine(&place);
    let bytes = on_disk(&path(&place));
    assert!(bytes > 1 << 20);
    let expected = json!([{
        "config": place.join("guest.json"), "path": path(&place), "saved": true, "saved_bytes": bytes,
        "unusable": null, "config_drift": false,
    }]);
    assert_eq!(listed(), expected);
    assert!(list(&[]).stdout.contains("saved_bytes") && list(&[]).stdout.contains("true"), "{:?}", list(&[]));
    let mut vm = tests::vm::waiting(&place, "guest");
    assert_eq!((vm.info().saved, vm.info().started), (None, None));
    let saved_state = SavedState { path: path(&place), save_on_stop: true, strict: true };
    vm.client().put_saved_state(&saved_state).expect("it can be set");
    assert_eq!(saved(&mut vm), Saved { exists: true, bytes });
    // The configuration comes over the API as well, and the start is the same.
    let mut client = vm.client();
    client.put_boot_source(&BootSource { embedded_guest: true, ..Default::default() }).expect("it can be set");
    client.put_machine_config(&MachineConfig { mem_size_mib: 16, ..Default::default() }).expect("it can be set");
    client.put_vsock(&Vsock { guest_cid: 3, uds_path: vm.vsock.clone(), vsock_id: None }).expect("it can be set");
    client.start().expect("it can be started");
    assert_eq!((started(&mut vm), saved(&mut vm)), (RESTORED, Saved::default()));
    assert_eq!(listed()[0]["saved"], false);
    assert_eq!(listed()[0]["saved_bytes"], 0);
    vm.agent().ticks(2);
    assert_eq!(client.stop(VmStop::default()).expect("it can be stopped").how, Stopped::Saved);
    ended_well(vm);
    // Another configuration of the same place.
    let mut config: Value =
        serde_json::from_slice(&fs::read(place.join("guest.json")).expect("it is there")).expect("JSON");
    config["machine-config"]["vcpu_count"] = 2.into();
    fs::write(place.join("guest.json"), config.to_string()).expect("it can be written");
    assert_eq!((&listed()[0]["saved"], &listed()[0]["config_drift"]), (&json!(true), &json!(true)));
    config["saved-state"] = Value::Null;
    fs::write(place.join("guest.json"), config.to_string()).expect("it can be written");
    assert_eq!((&listed()[0]["saved"], &listed()[0]["path"]), (&json!(false), &Value::Null));
}

/// Neither by `list` nor over the API is anything a saved state that a start would not even open.
#[test]
fn what_a_start_could_not_open_is_told_as_unusable() {
    require!(Kvm);
    let place = Place::new();
    saved_machine(&place);
    let waiting = |name: &str| {
        let mut vm = tests::vm::waiting(&place, name);
        let saved_state = SavedState { path: path(&place), save_on_stop: true, strict: false };
        vm.client().put_saved_state(&saved_state).expect("it can be set");
        let exists = saved(&mut vm).exists;
        vm.stop();
        exists
    };
    let listed = || {
        let config = place.join("guest.json").to_string_lossy().into_owned();
        let done = tests::process::run_vmm(&place, "list", &["list", "--json", &config]);
        assert_eq!(done.code(), 0, "{done:?}");
        let machine = serde_json::from_str::<Value>(&done.stdout).expect("it is JSON")[0].clone();
        (machine["saved"] == true, machine["unusable"].as_str().map(str::to_owned))
    };
    assert_eq!((listed(), waiting("whole")), ((true, None), true));
    for (file, word) in [
        ("state.bin", "state.bin"),
        ("snap.json", "snap.json"),
        ("mem.bin", "mem.bin"),
        ("config.json", "config.json"),
        ("saved.mark", "is no saved state"),
    ] {
        let (part, aside) = (path(&place).join(file), place.join("aside"));
        fs::rename(&part, &aside).expect("it can be moved");
        let (is_saved, reason) = listed();
        let reason = reason.expect("it says why");
        assert!(!is_saved && reason.contains(word), "{file}: {reason}");
        assert!(!waiting(file), "{file}");
        fs::rename(&aside, &part).expect("it can be moved back");
    }
    for (mark, word) in [("used \n", "used by an earlier start"), ("left \n", "left it"), ("else", "damaged")] {
        fs::write(path(&place).join("saved.mark"), mark).expect("it can be written");
        let (is_saved, reason) = listed();
        assert!(!is_saved && reason.as_ref().is_some_and(|reason| reason.contains(word)), "{mark}: {reason:?}");
    }
    fs::write(path(&place).join("saved.mark"), "fresh\n").expect("it can be written");
    assert_eq!(listed(), (true, None));
    fs::remove_dir_all(path(&place)).expect("it can be removed");
    assert_eq!((listed(), waiting("none")), ((false, None), false));
    fs::write(path(&place), "a file").expect("a file can be made");
    assert!(listed().1.expect("it says why").contains("no directory"));
}

#[test]
fn a_saved_state_over_the_api_is_set_before_the_start_and_has_a_name() {
    require!(Kvm);
    let place = Place::new();
    let mut vm = tests::vm::waiting(&place, "guest");
    for (body, word) in [(json!({ "path": "/" }), "saved-state.path"), (json!({ "save_on_stop": true }), "path")] {
        let refused = vm.api().put("/saved-state", &body).expect_err("that is no place").to_string();
        assert!(refused.contains(word), "{refused}");
    }
    let done = ctl(&place, &vm, "saved-state set a/b --save-on-stop");
    assert_eq!(done.code(), 0, "{done:?}");
    let config = vm.client().config().expect("it tells").saved_state;
    assert_eq!(config, Some(SavedState { path: "a/b".into(), save_on_stop: true, strict: false }));
    vm.stop();
    let (mut vm, _) = machine(&place, true).ready("other");
    let refused = vm.api().put("/saved-state", &json!({ "path": "x" })).expect_err("it runs").to_string();
    assert!(refused.contains("started already"), "{refused}");
    stop(vm, StopMode::Force);
    // One that could never be saved is not started.
    let nowhere = Boot::new(&place).saved_state(&place.join("none/saved"), true).start("nowhere").process.finish();
    assert_eq!(nowhere.code(), 1);
    assert!(nowhere.one_line().contains("saved-state.path"), "{nowhere:?}");
    let config = place.join("plain.json");
    fs::write(&config, r#"{"boot-source": {"embedded_guest": true}}"#).expect("a file can be made");
    let config = config.to_string_lossy();
    let refused = tests::process::run_vmm(&place, "plain", &["--config", &config, "--strict"]);
    assert_eq!(refused.code(), 1);
    assert!(refused.one_line().contains("saved-state"), "{refused:?}");
}

/// Whoever asks twice means it.
#[test]
fn a_second_signal_ends_a_save() {
    require!(Kvm);
    let mut given_up = 0;
    for delay_ms in [0, 1, 2, 4, 8, 16, 32] {
        let place = Place::new();
        let (mut vm, mut agent) = machine(&place, true).memory_mib(256).ready("guest");
        let facts = Facts::gather(&mut agent, 64);
        vm.process.signal(Signal::TERM);
        std::thread::sleep(Duration::from_millis(delay_ms));
        vm.process.signal(Signal::INT);
        let log = ended_well(vm).stderr;
        no_partials(&place);
        if path(&place).exists() {
            let (vm, mut agent) = machine(&place, true).memory_mib(256).ready("guest");
            facts.check(&mut agent);
            stop(vm, StopMode::Force);
        } else {
            given_up += 1;
            // The first may have come so late that both are one.
            let says = log.contains("given up") || log.contains("could not be saved") || delay_ms == 0;
            assert!(says, "after {delay_ms} ms: {log}");
        }
    }
    println!("{given_up} of 7 were given up");
}

#[test]
fn a_save_that_is_given_up_is_told() {
    require!(Kvm);
    let place = Place::new();
    // One that waits for a snapshot.
    let (mut vm, mut agent) = machine(&place, true).memory_mib(64).ready("guest");
    Facts::gather(&mut agent, 32);
    let create = json!({ "snapshot_path": place.join("snap"), "max_write_mib_s": 1 }).to_string();
    let mut stream = connect(&vm.api);
    stream.write_all(&request("PUT", "/snapshot/create", create.as_bytes())).expect("the API listens");
    until("it is being written", || place.names().iter().any(|name| name.starts_with(".snap")));
    vm.process.signal(Signal::TERM);
    // It is known to have been heard when nothing else is begun any more.
    until("it is stopping", || vm.api().patch("/vm", &json!({ "state": "Resumed" })).is_err());
    vm.process.signal(Signal::TERM);
    let log = ended_well(vm).stderr;
    assert!(log.contains("is not saved") && log.contains("the next start boots"), "{log}");
    assert!(!path(&place).exists());
    no_partials(&place);
}

/// A snapshot that somebody waits for is completed first.
#[test]
fn a_stop_waits_for_a_snapshot_that_is_being_written() {
    require!(Kvm);
    for by_signal in [true, false] {
        let place = Place::new();
        let (mut vm, mut agent) = machine(&place, true).memory_mib(64).ready("guest");
        let facts = Facts::gather(&mut agent, 32);
        let create = json!({ "snapshot_path": place.join("snap") }).to_string();
        let mut stream = connect(&vm.api);
        stream.write_all(&request("PUT", "/snapshot/create", create.as_bytes())).expect("the API listens");
        until("it is being written", || place.names().iter().any(|name| name.starts_with(".snap") || name == "snap"));
        let stopped = match by_signal {
            true => {
                vm.process.signal(Signal::TERM);
                Stopped::Saved
            }
            false => vm.client().stop(VmStop::default()).expect("it can be stopped").how,
        };
        assert_eq!((answers(&hear(&mut stream))[0].status, stopped), (204, Stopped::Saved));
        ended_well(vm);
        for snapshot in ["snap", "saved"] {
            let (vm, mut agent) = Restore::new(&place, &place.join(snapshot)).ready("clone");
            facts.check(&mut agent);
            vm.stop();
        }
    }
}

/// What is asked for while a machine is being saved and stopped changes nothing about it, unless it is to end at once.
#[test]
fn a_save_on_stop_can_be_ended_by_force() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) = machine(&place, true).memory_mib(512).ready("guest");
    Facts::gather(&mut agent, 128);
    let mut other = vm.client();
    let mut stream = connect(&vm.api);
    stream.write_all(&request("PUT", "/vm/stop", b"{}")).expect("the API listens");
    until("it is being saved", || place.names().iter().any(|name| name.starts_with(".saved") || name == "saved"));
    let forced = other.stop(VmStop { mode: Some(StopMode::Force) });
    let heard = answers(&hear(&mut stream));
    ended_well(vm);
    no_partials(&place);
    let first: VmStopped = serde_json::from_str(&heard[0].body).expect("a document");
    assert_eq!(first.how == Stopped::Saved, path(&place).exists(), "{first:?}, {forced:?}");
}

/// An image that the guest writes itself stays in use, and is no part of what is saved.
#[test]
fn a_machine_goes_on_writing_its_disks() {
    require!(Kvm);
    let place = Place::new();
    let image = place.join("disk.img");
    File::create(&image).and_then(|file| file.set_len(64 << 20)).expect("a file can be made");
    fs::write(place.join("base.img"), vec![7; 1 << 20]).expect("a file can be made");
    let over = api_spec::devices::Drive { overlay: true, ..drive("over", &place.join("base.img")) };
    let boot = || machine(&place, true).drive(drive("raw", &image)).drive(over.clone());
    let (vm, mut agent) = boot().ready("guest");
    let facts = Facts::gather(&mut agent, 1);
    vm.stop();
    let is_locked = || {
        let file = File::open(&image).expect("it is there");
        rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockShared).is_err()
    };
    assert!(!is_locked());
    let (mut vm, mut agent) = boot().ready("guest");
    assert_eq!(started(&mut vm), RESTORED);
    facts.check(&mut agent);
    assert!(is_locked(), "nobody else can have what it writes");
    assert_eq!(vm.client().config().expect("it tells").drives, [drive("raw", &image), over.clone()]);
    // Again, as it is the same machine.
    vm.stop();
    let held = snapshot::load::open(&path(&place)).expect("it is one").manifest().devices.drives[0].clone();
    assert_eq!(held.held.map(|held| held.data_bytes), Some(0));
    assert_eq!(held.image.map(|image| PathBuf::from(image.path)), Some(image.clone()));
    // Whoever writes it meanwhile makes it another disk.
    OpenOptions::new().write(true).open(&image).and_then(|file| file.write_all_at(b"x", 0)).expect("it can be written");
    let (mut vm, mut agent) = boot().ready("guest");
    assert!(cold_reason(&mut vm).contains("disk.img was changed"));
    // Nor is it written to if it is configured no more.
    let facts = Facts::gather(&mut agent, 1);
    vm.stop();
    let (mut vm, mut agent) = machine(&place, true).drive(over.clone()).ready("guest");
    assert!(cold_reason(&mut vm).contains("drive raw"));
    assert_ne!(agent.nonce(), facts.nonce);
    stop(vm, StopMode::Force);
}

/// It is a guest like any other for whoever wants clones of it.
#[test]
fn a_saved_state_is_a_snapshot() {
    require!(Kvm);
    let place = Place::new();
    let facts = saved_machine(&place);
    let verified = Process::start(&place, "verify", binaries::vmm(), |vmm| {
        vmm.args(["snapshot", "verify"]).arg(path(&place));
    });
    assert_eq!(verified.finish().code(), 0);
    for name in ["one", "two"] {
        let (vm, mut agent) = Restore::new(&place, &path(&place)).ready(name);
        facts.check(&mut agent);
        vm.stop();
    }
    // Which has not used it.
    let (mut vm, mut agent): (Vm, Agent) = machine(&place, false).ready("guest");
    assert_eq!(started(&mut vm), RESTORED);
    facts.check(&mut agent);
    vm.stop();
}
