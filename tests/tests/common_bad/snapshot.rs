//! Snapshots that are damaged, of another kind, or made up.

use super::{FAILED, RESET, Random, refused};
use serde_json::{Value, json};
use snapshot::state::{MachineState, Msr, VcpuState};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tests::{Place, Process, Template, TemplateOptions, binaries, require};

/// What may be allowed to differ on the host that restores.
const MISMATCHES: [&str; 4] = ["vendor", "cpu_features", "xsave", "tsc_khz"];
const FILES: [&str; 4] = ["snap.json", "state.bin", "mem.b3", "mem.bin"];

pub(super) fn template() -> Template {
    Template::make(TemplateOptions { vcpus: 1, memory_mib: 16, working_set_mib: 1 })
}

/// A copy of a template's snapshot, to be damaged.
pub(super) struct Copy<'t> {
    place: &'t Place,
    pub(super) dir: PathBuf,
}

impl<'t> Copy<'t> {
    pub(super) fn of(template: &'t Template) -> Self {
        let dir = template.place.join("copy");
        fs::create_dir(&dir).expect("a directory can be made in the test's directory");
        for name in FILES {
            fs::copy(template.snapshot.join(name), dir.join(name)).expect("a file can be copied");
            make_writable(&dir.join(name));
        }
        Copy { place: &template.place, dir }
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.dir.join(name)).expect("it is there")
    }

    fn write(&self, name: &str, contents: &[u8]) {
        fs::write(self.dir.join(name), contents).expect("it can be written");
    }

    pub(super) fn manifest(&self) -> Value {
        serde_json::from_slice(&self.read("snap.json")).expect("JSON")
    }

    /// Changes the manifest, with its digest set right.
    pub(super) fn reseal(&self, change: impl FnOnce(&mut Value)) {
        let mut manifest = self.manifest();
        change(&mut manifest);
        let sealed = snapshot::manifest::reseal(manifest.to_string().as_bytes()).expect("it is a manifest still");
        self.write("snap.json", &sealed);
    }

    /// Changes the state, with all digests set right, and what the manifest tells of its CPU left out. Without effect if such a
    /// state cannot be written at all.
    pub(super) fn change_state(&self, change: impl FnOnce(&mut MachineState)) {
        let mut state = snapshot::state::decode(&self.read("state.bin")).expect("it is a state");
        change(&mut state);
        let Ok(bytes) = snapshot::state::encode(&state) else { return };
        self.write("state.bin", &bytes);
        self.reseal(|manifest| {
            manifest["state"]["size_bytes"] = json!(bytes.len());
            manifest["state"]["digest"] = json!(blake3::hash(&bytes).to_hex().as_str());
            manifest.as_object_mut().expect("an object").remove("guest_cpu");
        });
    }

    /// The vmm refuses to restore it.
    #[track_caller]
    pub(super) fn expect_refused(self, name: &str, words: &[&str]) {
        refuses(self.place, name, &self.dir, words);
    }

    /// The vmm refuses to restore it, or runs it and can be ended, even if it may try what does not fit this host.
    #[track_caller]
    fn expect_survived(self, name: &str) {
        let place = self.place;
        let mut vmm = Process::start(place, name, binaries::vmm(), |vmm| {
            arguments(vmm, place, &self.dir);
            vmm.args(MISMATCHES.iter().flat_map(|field| ["--allow-mismatch", field]));
        });
        // From its socket on it heeds signals; then the guest gets a moment to do what its state makes it do.
        tests::until("the vmm has begun or ended", || place.join("c.api").exists() || !vmm.is_alive());
        tests::holds_within(Duration::from_millis(20), || !vmm.is_alive());
        let done = vmm.stop();
        super::no_panic(&done.stderr);
        assert!(done.stderr.lines().count() <= 7, "{name}: {}", done.stderr);
        // It may also reset its machine.
        if ![Some(0), Some(RESET)].contains(&done.status.code()) {
            assert_eq!(done.status.code(), Some(FAILED), "{name}: {done:?}");
            let last = done.stderr.lines().last().unwrap_or_default();
            assert!(last.starts_with("vmm: "), "{name}: {done:?}");
        }
        assert!(!place.names().iter().any(|left| left.starts_with("c.")), "{name}: its sockets are gone");
    }
}

impl Drop for Copy<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

fn make_writable(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, PermissionsExt::from_mode(0o600)).expect("it is ours");
}

pub(super) fn arguments(vmm: &mut std::process::Command, place: &Place, snapshot: &Path) {
    vmm.arg("--restore").arg(snapshot).arg("--vsock").arg(place.join("c.v")).arg("--api-sock").arg(place.join("c.api"));
}

#[track_caller]
fn refuses(place: &Place, name: &str, snapshot: &Path, words: &[&str]) {
    refused(place, name, FAILED, words, |vmm| arguments(vmm, place, snapshot));
}

#[test]
fn a_snapshot_that_is_none_is_named() {
    require!(Kvm);
    let place = Place::new();
    refuses(&place, "missing", &place.join("none"), &["none"]);
    refuses(&place, "missing-file", &place.join("none/snap.json"), &["none"]);
    let file = place.join("file");
    fs::write(&file, "text").expect("a file can be made");
    refuses(&place, "file", &file, &["file"]);
    refuses(&place, "under-a-file", &file.join("snap.json"), &["file"]);
    refuses(&place, "empty", place.path(), &["snap.json"]);
    refuses(&place, "device", Path::new("/dev/null"), &["/dev/null"]);
    refuses(&place, "line\nbreak", &place.join("a\nb"), &["a\\nb"]);
    refuses(&place, "nothing", Path::new(""), &["snapshot"]);
    refused(&place, "verify", FAILED, &["none"], |vmm| {
        vmm.args(["snapshot", "verify"]).arg(place.join("none"));
    });
    refused(&place, "verify-empty", FAILED, &["snap.json"], |vmm| {
        vmm.args(["snapshot", "verify", "--json"]).arg(place.path());
    });
}

#[test]
fn each_file_that_is_missing_cut_longer_or_altered_is_named() {
    require!(Kvm);
    let template = template();
    for file in FILES {
        let copy = Copy::of(&template);
        fs::remove_file(copy.dir.join(file)).expect("it is there");
        copy.expect_refused("missing", &[file]);

        let copy = Copy::of(&template);
        fs::remove_file(copy.dir.join(file)).expect("it is there");
        fs::create_dir(copy.dir.join(file)).expect("there is room");
        copy.expect_refused("directory", &[file]);

        let copy = Copy::of(&template);
        fs::remove_file(copy.dir.join(file)).expect("it is there");
        std::os::unix::fs::symlink(template.snapshot.join(file), copy.dir.join(file)).expect("there is room");
        copy.expect_refused("link", &[file]);

        let copy = Copy::of(&template);
        let fifo = copy.dir.join(file);
        fs::remove_file(&fifo).expect("it is there");
        assert!(std::process::Command::new("mkfifo").arg(&fifo).status().expect("there is mkfifo").success());
        copy.expect_refused("fifo", &[file]);

        let bytes = Copy::of(&template).read(file);
        for length in [0, 1, bytes.len() / 2, bytes.len() - 2] {
            let copy = Copy::of(&template);
            copy.write(file, &bytes[..length]);
            copy.expect_refused("cut", &[file]);
        }
        let copy = Copy::of(&template);
        copy.write(file, &[&bytes[..], b"x"].concat());
        copy.expect_refused("longer", &[file]);

        let mut random = Random::new(1);
        for _ in 0..4 {
            let copy = Copy::of(&template);
            let mut bytes = bytes.clone();
            let at = random.below(bytes.len() as u64) as usize;
            bytes[at] ^= 1 << random.below(8);
            copy.write(file, &bytes);
            copy.expect_refused("altered", &[if file == "snap.json" { "snap.json" } else { "" }]);
        }
    }
    for file in FILES {
        if super::is_root() {
            break; // who may read everything
        }
        let copy = Copy::of(&template);
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(copy.dir.join(file), PermissionsExt::from_mode(0o000)).expect("it is ours");
        copy.expect_refused("unreadable", &[file, "ermission"]);
    }
}

#[test]
fn each_manifest_of_something_else_is_refused_by_name() {
    require!(Kvm);
    let template = template();
    let resealed = |name: &str, words: &[&str], change: &dyn Fn(&mut Value)| {
        let copy = Copy::of(&template);
        copy.reseal(change);
        copy.expect_refused(name, words);
    };
    let mib16 = 16u64 << 20;
    let set = |pointer: &'static str, value: Value| {
        move |manifest: &mut Value| *manifest.pointer_mut(pointer).expect("it is there") = value.clone()
    };
    resealed("vcpus-0", &["machine.vcpus", "1 to 64"], &set("/machine/vcpus", json!(0)));
    resealed("vcpus-65", &["machine.vcpus", "1 to 64"], &set("/machine/vcpus", json!(65)));
    resealed("vcpus-9", &["vCPU", "9"], &set("/machine/vcpus", json!(9)));
    resealed("memory-0", &["memory"], &set("/machine/memory_bytes", json!(0)));
    resealed("memory-half", &["must be equal"], &set("/machine/memory_bytes", json!(mib16 / 2)));
    resealed("arch", &["aarch64", "x86_64"], &set("/arch", json!("aarch64")));
    resealed("vendor", &["OtherMakerCo"], &set("/cpu/vendor", json!("OtherMakerCo")));
    resealed("chunk", &["chunk_bytes"], &set("/memory/chunk_bytes", json!(4096)));
    resealed("path", &["memory.file"], &set("/memory/file", json!("../snapshot/mem.bin")));
    resealed("state-name", &["state.file"], &set("/state/file", json!("/etc/passwd")));
    resealed("cid", &["guest_cid"], &set("/devices/vsock/guest_cid", json!(2)));
    resealed("uds", &["uds_path"], &set("/devices/vsock/uds_path", json!("a\0b")));
    resealed("state-long", &["state.size_bytes"], &set("/state/size_bytes", json!(u64::MAX)));
    resealed("state-short", &["state.bin"], &set("/state/size_bytes", json!(0)));
    resealed("root", &["mem.b3"], &set("/memory/root", json!("0".repeat(64))));
    resealed("text", &["host_kernel"], &set("/host_kernel", json!("6.1\nroot")));
    let both = |bytes: u64, regions: Value| {
        move |manifest: &mut Value| {
            manifest["machine"]["memory_bytes"] = json!(bytes);
            manifest["memory"]["size_bytes"] = json!(bytes);
            manifest["memory"]["regions"] = regions.clone();
        }
    };
    let region = |addr: u64, size: u64, offset: u64| json!({"guest_addr": addr, "size_bytes": size, "offset": offset});
    resealed("twice-as-much", &["mem."], &both(2 * mib16, json!([region(0, 2 * mib16, 0)])));
    resealed("hole", &["lie as this program lays it out"], &both(mib16, json!([region(0xd000_0000, mib16, 0)])));
    let around = json!([region(0, 4096, 0), region(0xd000_0000, mib16 - 4096, 4096)]);
    resealed("part-in-hole", &["lie as this program lays it out"], &both(mib16, around));
    resealed(
        "huge",
        &[""],
        &both(1 << 40, json!([region(0, 3 << 30, 0), region(4 << 30, (1 << 40) - (3 << 30), 3 << 30)])),
    );
    resealed("overlap", &["overlaps"], &both(mib16, json!([region(0, 8 << 20, 0), region(4096, 8 << 20, 8 << 20)])));
    resealed("overflow", &["regions"], &both(mib16, json!([region(u64::MAX - 4095, mib16, 0)])));
    resealed("no-regions", &["regions"], &both(mib16, json!([])));

    // What reseal does not make.
    let edited = |name: &str, words: &[&str], change: &dyn Fn(&mut Value)| {
        let copy = Copy::of(&template);
        let mut manifest = copy.manifest();
        change(&mut manifest);
        copy.write("snap.json", manifest.to_string().as_bytes());
        copy.expect_refused(name, words);
    };
    edited("newer", &["version 3", "snap.json"], &set("/format_version", json!(3)));
    edited("newest", &["snap.json", "18446744073709551615"], &set("/format_version", json!(u64::MAX)));
    edited("older", &["snap.json"], &set("/format_version", json!(0)));
    edited("version-text", &["snap.json"], &set("/format_version", json!("1")));
    edited("unknown", &["unknown field `speed`"], &|manifest| manifest["speed"] = json!(9));
    edited("unknown-deep", &["unknown field `speed`"], &|manifest| manifest["memory"]["speed"] = json!(9));
    edited("unsealed", &["snap.json"], &set("/machine/vcpus", json!(2)));
    for (name, text) in [
        ("nested", b"[".repeat(100_000)),
        ("text", b"snapshot".to_vec()),
        ("zeros", vec![0; 4096]),
        ("long", vec![b' '; 2 << 20]),
    ] {
        let copy = Copy::of(&template);
        copy.write("snap.json", &text);
        copy.expect_refused(name, &["snap.json"]);
    }
}

type Change<T> = fn(&mut T);

#[test]
fn a_state_with_absurd_values_is_refused_or_runs() {
    require!(Kvm);
    let template = template();
    let survives = |name: &str, change: &dyn Fn(&mut MachineState)| {
        let copy = Copy::of(&template);
        copy.change_state(change);
        copy.expect_survived(name);
    };
    let vcpu: Vec<(&str, Change<VcpuState>)> = vec![
        ("no-msrs", |v| v.msrs.clear()),
        ("unknown-msr", |v| v.msrs.push(Msr { index: 0xdead_beef, data: u64::MAX })),
        ("many-msrs", |v| v.msrs = vec![Msr { index: 0x10, data: 1 }; 1000]),
        ("wild-msrs", |v| v.msrs.iter_mut().for_each(|msr| msr.data = u64::MAX)),
        ("zero-msrs", |v| v.msrs.iter_mut().for_each(|msr| msr.data = 0)),
        ("clock-msr", |v| v.msrs.push(Msr { index: 0x4b56_4d01, data: 0xffff_ffff_ffff_f001 })),
        ("steal-msr", |v| v.msrs.push(Msr { index: 0x4b56_4d03, data: 0xffff_ffff_ffc1 })),
        ("async-pf-msr", |v| v.msrs.push(Msr { index: 0x4b56_4d02, data: 0xffff_ffff_ff09 })),
        ("apic-base-msr", |v| v.msrs.push(Msr { index: 0x1b, data: 0xd000_0800 })),
        ("cr0", |v| v.sregs.cr0 = u64::MAX),
        ("cr0-paging-off", |v| v.sregs.cr0 &= !(1 << 31)),
        ("cr3", |v| v.sregs.cr3 = u64::MAX),
        ("cr3-hole", |v| v.sregs.cr3 = 0xd000_0000),
        ("cr4", |v| v.sregs.cr4 = u64::MAX),
        ("cr8", |v| v.sregs.cr8 = u64::MAX),
        ("efer", |v| v.sregs.efer = u64::MAX),
        ("apic-base", |v| v.sregs.apic_base = u64::MAX),
        ("apic-moved", |v| v.sregs.apic_base = 0xd000_0000 | 0x900),
        ("interrupt-bitmap", |v| v.sregs.interrupt_bitmap = [u64::MAX; 4]),
        ("segments", |v| v.sregs.cs = snapshot::state::Segment { type_: 255, dpl: 255, l: 9, db: 9, ..v.sregs.cs }),
        ("tables", |v| v.sregs.idt.base = u64::MAX),
        ("rip", |v| v.regs.rip = 0x8000_0000_0000_0000),
        ("rip-hole", |v| v.regs.rip = 0xd000_0000),
        ("rflags", |v| v.regs.rflags = u64::MAX),
        ("rsp", |v| v.regs.rsp = u64::MAX),
        ("xsave-empty", |v| v.xsave.clear()),
        ("xsave-short", |v| v.xsave.truncate(4095)),
        ("xsave-odd", |v| v.xsave.push(1)),
        ("xsave-long", |v| v.xsave.resize(1 << 20, 0)),
        ("xsave-header", |v| v.xsave[512..576].fill(0xff)),
        ("xsave-xcomp", |v| v.xsave[520..528].fill(0xff)),
        ("xsave-mxcsr", |v| v.xsave[24..28].fill(0xff)),
        ("xsave-all", |v| v.xsave.fill(0xff)),
        ("no-xcrs", |v| v.xcrs.clear()),
        ("many-xcrs", |v| v.xcrs = vec![v.xcrs.first().copied().unwrap_or_default(); 17]),
        ("xcr0", |v| v.xcrs.iter_mut().for_each(|xcr| xcr.value = u64::MAX)),
        ("xcr-number", |v| v.xcrs.iter_mut().for_each(|xcr| xcr.xcr = 77)),
        ("debug", |v| (v.debug_regs.dr6, v.debug_regs.dr7) = (u64::MAX, u64::MAX)),
        ("debug-low", |v| (v.debug_regs.db, v.debug_regs.dr7) = ([0; 4], 0xffff_27ff)),
        ("lapic-empty", |v| v.lapic.clear()),
        ("lapic-long", |v| v.lapic.push(0)),
        ("lapic-ones", |v| v.lapic.fill(0xff)),
        ("lapic-zeros", |v| v.lapic.fill(0)),
        ("lapic-timer", |v| {
            v.lapic[0x320..0x324].copy_from_slice(&0x2_00ec_u32.to_le_bytes());
            v.lapic[0x380..0x384].copy_from_slice(&1u32.to_le_bytes());
            v.lapic[0x3e0..0x3e4].copy_from_slice(&0xbu32.to_le_bytes());
        }),
        ("events", |v| {
            v.events.exception = snapshot::state::ExceptionEvent { injected: 1, nr: 255, ..Default::default() };
            v.events.flags = u32::MAX;
        }),
        ("exception", |v| {
            v.events.exception = snapshot::state::ExceptionEvent { injected: 1, nr: 8, ..Default::default() }
        }),
        ("smm", |v| (v.events.smi.smm, v.events.smi.pending, v.events.flags) = (1, 1, 0xf)),
        ("triple-fault", |v| (v.events.triple_fault, v.events.flags) = (1, 0x20)),
        ("nmi", |v| (v.events.nmi.pending, v.events.flags) = (1, 1)),
        ("cpuid-none", |v| v.cpuid.clear()),
        ("cpuid-many", |v| v.cpuid = vec![Default::default(); 300]),
        ("cpuid-wild", |v| v.cpuid.iter_mut().for_each(|e| (e.eax, e.ebx, e.ecx, e.edx) = (!0, !0, !0, !0))),
        ("mp-state", |v| v.mp_state = 77),
        ("mp-uninitialized", |v| v.mp_state = 1),
        ("mp-sipi", |v| v.mp_state = 4),
        ("tsc-slow", |v| v.tsc_khz = 1),
        ("tsc-fast", |v| v.tsc_khz = u32::MAX),
    ];
    for (name, change) in vcpu {
        survives(name, &|state| state.vcpus.iter_mut().for_each(change));
    }

    let machine: Vec<(&str, Change<MachineState>)> = vec![
        ("no-irqchips", |s| s.vm.irqchips.clear()),
        ("irqchip-number", |s| s.vm.irqchips[2].chip_id = 9),
        ("irqchip-twice", |s| s.vm.irqchips[1] = s.vm.irqchips[0].clone()),
        ("irqchip-short", |s| s.vm.irqchips[2].chip.truncate(100)),
        ("irqchip-ones", |s| s.vm.irqchips.iter_mut().for_each(|chip| chip.chip.fill(0xff))),
        ("irqchip-zeros", |s| s.vm.irqchips.iter_mut().for_each(|chip| chip.chip.fill(0))),
        ("pit", |s| s.vm.pit.channels.iter_mut().for_each(|c| (c.count, c.mode, c.rw_mode) = (u32::MAX, 255, 255))),
        ("pit-fast", |s| s.vm.pit.channels.iter_mut().for_each(|c| (c.count, c.mode, c.gate) = (1, 2, 1))),
        ("pit-time", |s| s.vm.pit.channels.iter_mut().for_each(|c| c.count_load_time = i64::MIN)),
        ("pit-flags", |s| s.vm.pit.flags = u32::MAX),
        ("clock", |s| s.vm.clock.clock = u64::MAX),
        ("serial-buffer", |s| s.devices.serial.in_buffer = vec![0; 65]),
        ("serial-registers", |s| {
            let serial = &mut s.devices.serial;
            (serial.interrupt_enable, serial.line_control, serial.line_status) = (0xff, 0xff, 0xff);
            (serial.interrupt_identification, serial.modem_control) = (0xff, 0xff);
        }),
        ("no-vsock", |s| s.devices.vsock = None),
    ];
    for (name, change) in machine {
        survives(name, &change);
    }
}

#[test]
fn a_saved_device_with_absurd_values_is_refused_or_runs() {
    require!(Kvm);
    let template = template();
    let survives = |name: &str, change: &dyn Fn(&mut snapshot::state::VsockState)| {
        let copy = Copy::of(&template);
        copy.change_state(|state| change(state.devices.vsock.as_mut().expect("it has one")));
        copy.expect_survived(name);
    };
    survives("cid", &|v| v.guest_cid = u64::MAX);
    survives("reset", &|v| v.needs_reset = !v.needs_reset);
    survives("features", &|v| v.transport.driver_features = u64::MAX);
    survives("no-features", &|v| v.transport.driver_features = 0);
    survives("selects", &|v| {
        (v.transport.queue_select, v.transport.device_features_select) = (u32::MAX, u32::MAX);
    });
    for status in [0, 1, 3, 0xb, 0x4f, 0x80, u32::MAX] {
        survives("status", &|v| v.transport.status = status);
    }
    survives("interrupt", &|v| v.transport.interrupt_status = u32::MAX);
    survives("no-queues", &|v| v.transport.queues.clear());
    survives("more-queues", &|v| v.transport.queues.push(v.transport.queues[0]));
    let addresses =
        [0, 1, 0x1000, 0x9_f000, (16 << 20) - 16, 16 << 20, 0xd000_0000, 0xfee0_0000, 1 << 40, !15, u64::MAX];
    for queue in 0..3 {
        for address in addresses {
            survives("descriptors", &|v| v.transport.queues[queue].desc_table = address);
            survives("available", &|v| v.transport.queues[queue].avail_ring = address);
            survives("used", &|v| v.transport.queues[queue].used_ring = address);
        }
        for size in [0, 1, 3, 255, 512, u16::MAX] {
            survives("size", &|v| v.transport.queues[queue].size = size);
            survives("max-size", &|v| v.transport.queues[queue].max_size = size);
        }
        survives("not-ready", &|v| v.transport.queues[queue].ready = false);
        survives("event-indices", &|v| {
            v.transport.queues[queue].event_idx_enabled = !v.transport.queues[queue].event_idx_enabled;
        });
        let mut random = Random::new(queue as u64);
        for _ in 0..6 {
            let (avail, used) = (random.next() as u16, random.next() as u16);
            survives("next-available", &|v| v.transport.queues[queue].next_avail = avail);
            survives("indices", &|v| {
                (v.transport.queues[queue].next_avail, v.transport.queues[queue].next_used) = (avail, avail);
            });
            survives("next-used", &|v| v.transport.queues[queue].next_used = used);
        }
    }
}

#[test]
fn a_state_file_with_random_damage_is_refused_or_runs() {
    require!(Kvm);
    let template = template();
    let mut random = Random::new(7);
    for _ in 0..60 {
        let copy = Copy::of(&template);
        let mut bytes = copy.read("state.bin");
        for _ in 0..=random.below(8) {
            let at = random.below(bytes.len() as u64) as usize;
            bytes[at] = random.next() as u8;
        }
        copy.write("state.bin", &bytes);
        copy.reseal(|manifest| manifest["state"]["digest"] = json!(blake3::hash(&bytes).to_hex().as_str()));
        copy.expect_survived("damaged");
    }
}
