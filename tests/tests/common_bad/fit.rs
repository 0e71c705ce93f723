//! Snapshots that do not fit this host: refused by name before KVM is asked, and restored all the same where that is allowed.

use super::snapshot::{Copy, arguments, template};
use super::{FAILED, host, refused, refused_by, skip};
use serde_json::{Value, json};
use snapshot::state::MachineState;
use std::path::Path;
use tests::process::Finished;
use tests::{Agent, Place, Process, Template, binaries, require};

/// Features that no CPU with KVM has all of: they are of different makers.
const ABSENT: [&str; 3] = ["3dnow", "avx512_4vnniw", "avx512_vp2intersect"];

/// Gives a guest all features of two registers.
fn add_features(state: &mut MachineState) {
    for leaf in state.vcpus.iter_mut().flat_map(|vcpu| &mut vcpu.cpuid) {
        if (leaf.function, leaf.index) == (7, 0) || leaf.function == 0x8000_0001 {
            leaf.edx = !0;
        }
    }
}

/// Moves the registers of AVX within the XSAVE area.
fn move_avx(state: &mut MachineState) {
    let avx = |leaf: &&mut snapshot::state::CpuidEntry| (leaf.function, leaf.index) == (0xd, 2);
    state.vcpus.iter_mut().flat_map(|vcpu| &mut vcpu.cpuid).filter(avx).for_each(|leaf| leaf.ebx += 7);
}

type Change = fn(&Copy);

/// Ways to make a snapshot one that does not fit: the field, words of the message, and what is changed.
const MISFITS: [(&str, &[&str], Change); 5] = [
    ("arch", &["aarch64", "x86_64"], |copy| copy.reseal(|manifest| manifest["arch"] = json!("aarch64"))),
    ("vendor", &["OtherMakerCo"], |copy| copy.reseal(|manifest| manifest["cpu"]["vendor"] = json!("OtherMakerCo"))),
    ("cpu_features", &["features of the CPU", "all but", "3dnow"], |copy| copy.change_state(add_features)),
    ("xsave", &["bytes at 583 for component 2", "bytes at 576"], |copy| copy.change_state(move_avx)),
    ("xsave", &["65536 bytes"], |copy| {
        copy.change_state(|state| state.vcpus.iter_mut().for_each(|vcpu| vcpu.xsave.resize(65536, 0)));
    }),
];

/// Runs `vmm snapshot check`.
fn check(place: &Place, snapshot: &Path, json: bool) -> Finished {
    Process::start(place, "check", binaries::vmm(), |vmm| {
        vmm.args(["snapshot", "check"]).arg(snapshot).args(json.then_some("--json"));
    })
    .finish()
}

fn fields(done: &Finished) -> Vec<(String, String)> {
    let report: Value = serde_json::from_str(&done.stdout).expect("one JSON document");
    let text = |value: &Value| value.as_str().expect("a word").to_owned();
    let fields = report["fields"].as_array().expect("it lists fields");
    fields.iter().map(|field| (text(&field["field"]), text(&field["verdict"]))).collect()
}

#[test]
fn a_snapshot_that_does_not_fit_is_refused_by_name_and_a_check_says_the_same() {
    require!(Kvm);
    let template = template();
    for (field, words, change) in MISFITS {
        let copy = Copy::of(&template);
        change(&copy);
        let done = check(&template.place, &copy.dir, true);
        assert_eq!((done.status.code(), done.stderr.as_str()), (Some(FAILED), ""), "{field}");
        let differ: Vec<_> = fields(&done).into_iter().filter(|(_, verdict)| verdict == "differs").collect();
        assert_eq!(differ, [(field.to_owned(), "differs".to_owned())]);
        let done = check(&template.place, &copy.dir, false);
        assert_eq!(done.status.code(), Some(FAILED));
        assert!(
            done.stdout.contains("does not fit") && words.iter().all(|word| done.stdout.contains(word)),
            "{done:?}"
        );
        copy.expect_refused(field, &[words, &[field]].concat());
    }
}

#[test]
fn all_features_that_are_missing_are_named() {
    require!(Kvm);
    let template = template();
    let copy = Copy::of(&template);
    copy.change_state(add_features);
    let line = refused(&template.place, "features", FAILED, &["cpu_features"], |vmm| {
        arguments(vmm, &template.place, &copy.dir);
        // Other fields do not matter.
        vmm.args(["--allow-mismatch", "vendor", "--allow-mismatch", "xsave", "--allow-mismatch", "tsc_khz"]);
    });
    assert!(ABSENT.iter().filter(|name| line.contains(*name)).count() >= 2, "{line}");
}

#[test]
fn a_frequency_that_the_host_cannot_give_is_refused() {
    require!(Kvm);
    let template = template();
    let copy = Copy::of(&template);
    copy.change_state(|state| state.vcpus.iter_mut().for_each(|vcpu| vcpu.tsc_khz = 1));
    let line = refused(&template.place, "tsc", FAILED, &[], |vmm| arguments(vmm, &template.place, &copy.dir));
    // By us or, where KVM scales frequencies but not that far, by KVM.
    assert!(line.contains("tsc_khz") || line.contains("frequency of the time-stamp counter"), "{line}");
}

#[test]
fn what_is_allowed_to_differ_is_warned_of_and_runs() {
    require!(Kvm);
    let template = template();
    for (field, words, change) in [MISFITS[1], MISFITS[2]] {
        let copy = Copy::of(&template);
        change(&copy);
        let vmm = Process::start(&template.place, "brave", binaries::vmm(), |vmm| {
            arguments(vmm, &template.place, &copy.dir);
            vmm.args(["--allow-mismatch", field]);
        });
        let vsock = template.place.join("c.v");
        tests::until("the clone has begun", || std::os::unix::net::UnixStream::connect(&vsock).is_ok());
        let mut agent = Agent::connect(&vsock);
        template.facts.check(&mut agent);
        let done = vmm.stop();
        let line = done.one_line();
        for word in words.iter().chain(&[field, "WARN", "all the same"]) {
            assert!(line.contains(word), "`{word}` is not in {line}");
        }
    }
}

#[test]
fn the_api_takes_what_may_differ_and_nothing_else() {
    require!(Kvm);
    let template = template();
    let copy = Copy::of(&template);
    copy.reseal(|manifest| manifest["cpu"]["vendor"] = json!("OtherMakerCo"));
    let mut vm = tests::vm::waiting(&template.place, "api");
    let mut load = |allowed: Value| {
        let vsock = json!({"uds_path": vm.vsock});
        let body = json!({"snapshot_path": copy.dir, "allow_mismatch": allowed, "vsock_override": vsock});
        vm.api().put("/snapshot/load", &body).map_err(|e| e.to_string())
    };
    for unknown in ["arch", "page_size", "speed"] {
        let refused = load(json!([unknown])).unwrap_err();
        assert!(
            ["vendor", "cpu_features", "xsave", "tsc_khz", unknown].iter().all(|name| refused.contains(name)),
            "{refused}"
        );
    }
    let refused = load(json!(["cpu_features"])).unwrap_err();
    assert!(refused.contains("OtherMakerCo") && refused.contains("`vendor`"), "{refused}");
    load(json!(["vendor", "vendor"])).expect("that is allowed");
    vm.resume();
    template.facts.check(&mut vm.agent());
    vm.stop();
}

#[test]
fn a_snapshot_fits_the_host_that_it_was_made_on() {
    require!(Kvm);
    let template = template();
    let done = check(&template.place, &template.snapshot.join("snap.json"), true);
    assert_eq!((done.status.code(), done.stderr.as_str()), (Some(0), ""), "{done:?}");
    let found = fields(&done);
    let names: Vec<&str> = found.iter().map(|(field, _)| field.as_str()).collect();
    assert_eq!(names, ["arch", "page_size", "vendor", "cpu_features", "xsave", "tsc_khz"]);
    assert!(found.iter().all(|(field, verdict)| verdict == "fits" || field == "tsc_khz" && verdict == "unknown"));
    // Its memory may lie elsewhere; what is no snapshot is named, and so is one of another version.
    let copy = Copy::of(&template);
    std::fs::remove_file(copy.dir.join("mem.bin")).expect("it is there");
    assert_eq!(check(&template.place, &copy.dir, false).status.code(), Some(0));
    let checked = |name: &str, words: &[&str], path: &Path| {
        refused(&template.place, name, FAILED, words, |vmm| {
            vmm.args(["snapshot", "check"]).arg(path);
        });
    };
    checked("none", &["none"], &template.place.join("none"));
    let mut manifest: Value =
        serde_json::from_slice(&std::fs::read(copy.dir.join("snap.json")).expect("it is there")).expect("JSON");
    manifest["format_version"] = json!(99);
    std::fs::write(copy.dir.join("snap.json"), manifest.to_string()).expect("it can be written");
    checked("version", &["snap.json", "version 99"], &copy.dir);
}

#[test]
fn what_the_manifest_tells_of_the_guests_cpu_is_held_to_its_state() {
    require!(Kvm);
    let template = template();
    let told = |template: &Template| Copy::of(template).manifest()["guest_cpu"].clone();
    let guest_cpu = told(&template);
    assert!(guest_cpu["features"].as_array().is_some_and(|names| names.contains(&json!("sse2"))), "{guest_cpu}");
    assert!(guest_cpu["xsave_bytes"].as_u64() >= Some(576));
    let copy = Copy::of(&template);
    copy.reseal(|manifest| manifest["guest_cpu"]["features"] = json!(["3dnow", "avx512_4vnniw", "sse2"]));
    copy.expect_refused("claimed", &["guest_cpu.features", "state.bin"]);
    let copy = Copy::of(&template);
    copy.reseal(|manifest| manifest["guest_cpu"]["tsc_khz"] = json!(1));
    copy.expect_refused("frequency", &["guest_cpu.tsc_khz is 1"]);
}

/// Nothing of KVM is needed to know that a snapshot does not fit.
#[test]
fn without_kvm_a_snapshot_is_compared_all_the_same() {
    require!(Kvm);
    let template = template();
    let place = &template.place;
    if let Some(obstacle) = host::obstacle(place, "u", "root") {
        skip!(&obstacle);
    }
    let done = Process::start(place, "check", host::unshare(), |vmm| {
        host::within(place, "u", "root")(vmm);
        vmm.args(["snapshot", "check"]).arg(&template.snapshot);
    })
    .finish();
    assert_eq!(done.status.code(), Some(0), "{done:?}");
    for (field, words, change) in MISFITS {
        let copy = Copy::of(&template);
        change(&copy);
        refused_by(place, "clone", host::unshare(), FAILED, &[words, &[field]].concat(), |vmm| {
            host::within(place, "u", "root")(vmm);
            arguments(vmm, place, &copy.dir);
        });
    }
    // One that fits gets as far as KVM.
    refused_by(place, "fits", host::unshare(), super::HOST_CANNOT, &["there is no /dev/kvm"], |vmm| {
        host::within(place, "u", "root")(vmm);
        arguments(vmm, place, &template.snapshot);
    });
}
