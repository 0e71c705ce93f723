//! Configurations and kernels that cannot be booted.

use super::{FAILED, RESET, refused};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use tests::{Place, Process, binaries, require};

/// The vmm refuses the file at `path`.
#[track_caller]
fn refuses_file(place: &Place, name: &str, path: &Path, words: &[&str]) -> String {
    refused(place, name, FAILED, words, |vmm| {
        vmm.arg("--config").arg(path).arg("--api-sock").arg(place.join("api"));
    })
}

/// The vmm refuses this configuration, which becomes a file.
#[track_caller]
fn refuses(place: &Place, name: &str, config: impl AsRef<[u8]>, words: &[&str]) -> String {
    let path = place.join("vm.json");
    fs::write(&path, config).expect("a file can be made in the test's directory");
    refuses_file(place, name, &path, words)
}

fn good(place: &Place) -> Value {
    json!({
        "boot-source": { "embedded_guest": true },
        "machine-config": { "vcpu_count": 1, "mem_size_mib": 16 },
        "vsock": { "guest_cid": 3, "uds_path": place.join("v") },
    })
}

#[test]
fn a_file_that_is_no_configuration_is_named() {
    let place = Place::new();
    refuses_file(&place, "missing", &place.join("none.json"), &["none.json", "No such file"]);
    refuses_file(&place, "directory", place.path(), &["cannot read the configuration"]);
    refuses_file(&place, "zeros", Path::new("/dev/zero"), &["/dev/zero"]);
    refuses_file(&place, "line\nbreak", &place.join("a\nb.json"), &["b.json"]);
    let is_not: &[&str] = &["vm.json is not what it should be", "line 1"];
    for (name, text) in [
        ("empty", Vec::new()),
        ("text", b"boot, please".to_vec()),
        ("cut", b"{\"boot-source\": {\"embedded_gu".to_vec()),
        ("trailing", b"{} {}".to_vec()),
        ("binary", vec![0xff; 100]),
        ("number", b"7".to_vec()),
        ("nested-arrays", b"[".repeat(100_000)),
        ("nested-objects", b"{\"boot-source\":".repeat(50_000)),
        ("nested-value", [b"{\"vsock\":{\"guest_cid\":".as_slice(), &b"[".repeat(100_000)].concat()),
        ("no-utf8", b"{\"vsock\":{\"guest_cid\":3,\"uds_path\":\"\xff\xfe\"}}".to_vec()),
        ("huge-number", [b"{\"vsock\":{\"guest_cid\":".as_slice(), &b"9".repeat(100_000), b"}}"].concat()),
    ] {
        refuses(&place, name, text, if name == "empty" { &is_not[..1] } else { is_not });
    }
    refuses(&place, "endless", vec![b' '; 2 << 20], &["vm.json"]);
}

#[test]
fn each_field_that_is_wrong_is_named() {
    let place = Place::new();
    let cases: Vec<(&str, &str, Value, &[&str])> = vec![
        ("unknown-top", "/speed", json!(9), &["unknown field `speed`"]),
        ("unknown-boot", "/boot-source/speed", json!(9), &["unknown field `speed`"]),
        ("unknown-machine", "/machine-config/speed", json!(9), &["unknown field `speed`"]),
        ("unknown-vsock", "/vsock/speed", json!("v"), &["unknown field `speed`"]),
        ("other-smt", "/machine-config/smt", json!(true), &["machine-config.smt is not offered"]),
        ("other-pages", "/machine-config/huge_pages", json!("2M"), &["machine-config.huge_pages is not offered"]),
        ("other-cpus", "/machine-config/cpu_template", json!("T2"), &["machine-config.cpu_template is not offered"]),
        ("other-cpu", "/cpu-config", json!("cpu.json"), &["cpu-config is not offered"]),
        ("other-mmds", "/mmds-config", json!({}), &["mmds-config is not offered"]),
        ("other-pmem", "/pmem", json!([]), &["pmem is not offered"]),
        ("other-memory", "/memory-hotplug", json!({}), &["memory-hotplug is not offered"]),
        ("other-serial", "/serial", json!({"rate_limiter": {}}), &["serial.rate_limiter is not offered"]),
        ("other-hints", "/balloon", json!({"amount_mib": 0, "free_page_hinting": true}), &["free_page_hinting"]),
        ("level", "/logger", json!({"level": "loud"}), &["loud"]),
        ("log-path", "/logger", json!({"log_path": "/nowhere/at/all"}), &["/nowhere/at/all"]),
        ("unknown-escape", "/a\n\u{1b}[2Jb", json!(9), &["unknown field"]),
        ("boot-text", "/boot-source", json!("guest"), &["invalid type"]),
        ("boot-null-bool", "/boot-source/embedded_guest", json!(null), &["invalid type"]),
        ("boot-number", "/boot-source/kernel_image_path", json!(5), &["invalid type"]),
        ("machine-list", "/machine-config", json!([[1], 2]), &["invalid type"]),
        ("machine-fields", "/machine-config", json!([1, 64]), &["invalid type"]),
        ("vsock-number", "/vsock", json!(3), &["invalid type"]),
        ("vcpu-text", "/machine-config/vcpu_count", json!("1"), &["invalid type"]),
        ("vcpu-float", "/machine-config/vcpu_count", json!(1.5), &["invalid type"]),
        ("vcpu-negative", "/machine-config/vcpu_count", json!(-1), &["invalid value"]),
        ("vcpu-0", "/machine-config/vcpu_count", json!(0), &["machine-config.vcpu_count is 0", "1 to 8"]),
        ("vcpu-9", "/machine-config/vcpu_count", json!(9), &["machine-config.vcpu_count is 9", "1 to 8"]),
        ("vcpu-256", "/machine-config/vcpu_count", json!(256), &["invalid value", "256"]),
        ("memory-0", "/machine-config/mem_size_mib", json!(0), &["mem_size_mib is 0", "8 to 1048576"]),
        ("memory-7", "/machine-config/mem_size_mib", json!(7), &["mem_size_mib is 7", "8 to 1048576"]),
        ("memory-much", "/machine-config/mem_size_mib", json!(1048577), &["mem_size_mib is 1048577"]),
        ("memory-max", "/machine-config/mem_size_mib", json!(u64::MAX), &["mem_size_mib is", "8 to 1048576"]),
        ("cid-0", "/vsock/guest_cid", json!(0), &["vsock.guest_cid is 0", "3 to"]),
        ("cid-1", "/vsock/guest_cid", json!(1), &["vsock.guest_cid is 1"]),
        ("cid-2", "/vsock/guest_cid", json!(2), &["vsock.guest_cid is 2"]),
        ("cid-max", "/vsock/guest_cid", json!(u32::MAX), &["vsock.guest_cid is"]),
        ("cid-more", "/vsock/guest_cid", json!(1u64 << 32), &["invalid value"]),
        ("uds-long", "/vsock/uds_path", json!(format!("/{}", "x".repeat(107))), &["vsock.uds_path", "107"]),
        ("uds-empty", "/vsock/uds_path", json!(""), &["uds_path"]),
        ("uds-nul", "/vsock/uds_path", json!("a\0b"), &["socket"]),
        ("uds-abstract", "/vsock/uds_path", json!("\0b"), &["socket"]),
        ("uds-nowhere", "/vsock/uds_path", json!("/nowhere/at/all"), &["/nowhere/at/all"]),
        ("uds-directory", "/vsock/uds_path", json!("/"), &["no socket"]),
        ("uds-api", "/vsock/uds_path", json!(place.join("api")), &["api is in use"]),
        ("uds-null", "/vsock/uds_path", json!("/dev/null"), &["/dev/null exists and is no socket"]),
        ("no-boot", "/boot-source", json!(null), &["boot-source is missing"]),
        ("no-kernel", "/boot-source", json!({}), &["boot-source is missing", "kernel_image_path"]),
        ("both-kernels", "/boot-source/kernel_image_path", json!("k"), &["boot-source names both"]),
        ("embedded-initrd", "/boot-source/initrd_path", json!("i"), &["initrd_path"]),
        ("args-long", "/boot-source/boot_args", json!("x".repeat(4097)), &["boot_args", "4096"]),
        ("args-almost", "/boot-source/boot_args", json!("x".repeat(4080)), &["boot_args", "4096"]),
        ("args-accent", "/boot-source/boot_args", json!("quiet caf\u{e9}"), &["command line", "ASCII"]),
        ("args-lines", "/boot-source/boot_args", json!("a\nb"), &["command line", "ASCII"]),
        ("args-nul", "/boot-source/boot_args", json!("a\0b"), &["command line", "ASCII"]),
    ];
    let has_kvm = tests::host::missing(&[tests::host::Need::Kvm]).is_none();
    for (name, pointer, value, words) in cases {
        let (parent, field) = pointer.rsplit_once('/').expect("it is a pointer");
        let mut config = good(&place);
        let parent = config.pointer_mut(parent).expect("it is there");
        parent.as_object_mut().expect("it has fields").insert(field.to_owned(), value);
        if has_kvm || !name.starts_with("args") && !name.starts_with("uds") {
            refuses(&place, name, serde_json::to_vec(&config).expect("JSON"), words);
        }
    }
}

#[test]
fn each_disk_that_cannot_be_is_named() {
    require!(Kvm);
    let place = Place::new();
    let file = |name: &str, size: u64| {
        let path = place.join(name);
        fs::File::create(&path).and_then(|file| file.set_len(size)).expect("a file can be made");
        path
    };
    let (good, empty, odd) = (file("good.img", 4096), file("empty.img", 0), file("odd.img", 1000));
    let disk = |id: &str, path: &Path, more: Value| {
        let mut disk = json!({ "drive_id": id, "path_on_host": path });
        for (field, value) in more.as_object().expect("fields") {
            disk[field] = value.clone();
        }
        disk
    };
    let sealed = || json!({ "is_read_only": true });
    let cases: Vec<(&str, Vec<Value>, &[&str])> = vec![
        ("missing", vec![disk("a", &place.join("none.img"), json!({}))], &["drive a", "none.img", "No such file"]),
        ("empty", vec![disk("a", &empty, json!({}))], &["empty.img has 0 bytes", "multiple of 512"]),
        ("odd", vec![disk("a", &odd, sealed())], &["odd.img has 1000 bytes", "multiple of 512"]),
        ("directory", vec![disk("a", place.path(), json!({}))], &["neither a regular file nor a block device"]),
        ("zeros", vec![disk("a", Path::new("/dev/zero"), sealed())], &["/dev/zero is neither"]),
        ("no-path", vec![disk("a", Path::new(""), json!({}))], &["path_on_host", "path is empty"]),
        ("nul-path", vec![disk("a", Path::new("a\0b"), json!({}))], &["drive a: cannot open"]),
        ("same-id", vec![disk("a", &good, sealed()), disk("a", &odd, sealed())], &["two have the drive_id a"]),
        ("two-writers", vec![disk("a", &good, json!({})), disk("b", &good, json!({}))], &["drive b", "is in use"]),
        ("reader-writer", vec![disk("a", &good, sealed()), disk("b", &good, json!({}))], &["drive b", "is in use"]),
        (
            "two-roots",
            ["a", "b"].map(|id| disk(id, &good, json!({ "is_root_device": true }))).to_vec(),
            &["a and b both say is_root_device"],
        ),
        ("async", vec![disk("a", &good, json!({ "io_engine": "Async" }))], &["io_engine `Async`", "not offered"]),
        ("engine", vec![disk("a", &good, json!({ "io_engine": "Fast" }))], &["unknown variant"]),
        ("cache", vec![disk("a", &good, json!({ "cache_type": "None" }))], &["unknown variant"]),
        ("field", vec![disk("a", &good, json!({ "speed": 1 }))], &["unknown field `speed`"]),
        ("id", vec![disk("a/b", &good, json!({}))], &["drives.drive_id is \"a/b\""]),
        (
            "sealed-overlay",
            vec![disk("a", &good, json!({ "is_read_only": true, "overlay": true }))],
            &["`overlay` makes no sense with is_read_only"],
        ),
        (
            "no-overlay",
            vec![disk("a", &good, json!({ "max_overlay_mib": 0 }))],
            &["max_overlay_mib must be at least 1"],
        ),
        ("partuuid", vec![disk("a", &good, json!({ "partuuid": "1" }))], &["partuuid", "is_root_device"]),
        (
            "rate",
            vec![disk("a", &good, json!({ "rate_limiter": { "ops": { "size": 0, "refill_time": 5 } } }))],
            &["drives.a.rate_limiter.ops"],
        ),
        (
            "too-many",
            (0..18).map(|n| disk(&format!("d{n}"), &good, sealed())).collect(),
            &["19 virtio devices are configured; there may be 18"],
        ),
    ];
    for (name, drives, words) in cases {
        let mut config = good_with(&place, drives);
        refuses(&place, name, config.to_string(), words);
        config["drives"] = json!({});
        refuses(&place, "no-list", config.to_string(), &["invalid type"]);
    }
    if !super::is_root() {
        fs::set_permissions(&good, std::os::unix::fs::PermissionsExt::from_mode(0o400)).expect("it is ours");
        refuses(&place, "sealed", good_with(&place, vec![disk("a", &good, json!({}))]).to_string(), &["for writing"]);
    }
    // Overlays need a directory for what is written.
    let overlay = good_with(&place, vec![disk("a", &good, json!({ "overlay": true }))]);
    let path = place.join("vm.json");
    fs::write(&path, overlay.to_string()).expect("a file can be made");
    for (name, dir) in [("no-tmp", "/nowhere/at/all"), ("sealed-tmp", "/proc"), ("file-tmp", "/dev/null")] {
        refused(&place, name, FAILED, &["drive a: cannot make the overlay's file", dir, "TMPDIR"], |vmm| {
            vmm.arg("--config").arg(&path).env("TMPDIR", dir);
        });
    }
}

fn good_with(place: &Place, drives: Vec<Value>) -> Value {
    let mut config = good(place);
    config["drives"] = json!(drives);
    config
}

#[test]
fn memory_beyond_what_the_host_has_is_refused_or_runs() {
    require!(Kvm);
    let place = Place::new();
    let mut config = good(&place);
    config["machine-config"]["mem_size_mib"] = json!(1 << 20);
    let path = place.join("vm.json");
    fs::write(&path, config.to_string()).expect("a file can be made");
    let mut vmm = Process::start(&place, "huge", binaries::vmm(), |vmm| {
        vmm.arg("--config").arg(&path).arg("--api-sock").arg(place.join("api"));
    });
    tests::holds_within(std::time::Duration::from_millis(500), || !vmm.is_alive());
    let done = vmm.stop();
    if done.status.code() != Some(0) {
        super::refusal("huge", &done, FAILED, &[]);
    }
    assert_eq!(place.names(), ["huge.log", "huge.out", "vm.json"]);
}

/// A kernel file and a configuration with it.
struct Kernels {
    place: Place,
    elf: Vec<u8>,
}

impl Kernels {
    fn new() -> Self {
        let place = Place::new();
        let path = place.join("guest.elf");
        let done = tests::process::run_vmm(&place, "export", &["guest", "export", &path.to_string_lossy()]);
        assert_eq!(done.code(), 0, "{done:?}");
        Kernels { elf: fs::read(&path).expect("it was exported"), place }
    }

    fn config(&self, source: Value) -> Vec<u8> {
        let mut config = good(&self.place);
        config["boot-source"] = source;
        serde_json::to_vec(&config).expect("JSON")
    }

    #[track_caller]
    fn refuses_path(&self, name: &str, path: &Path, words: &[&str]) {
        let text = path.to_string_lossy();
        let words = [words, &[&*text]].concat();
        refuses(&self.place, name, self.config(json!({ "kernel_image_path": path })), &words);
    }

    #[track_caller]
    fn refuses(&self, name: &str, contents: &[u8], words: &[&str]) {
        let path = self.place.join("kernel");
        fs::write(&path, contents).expect("a file can be made");
        self.refuses_path(name, &path, words);
    }
}

#[test]
fn a_file_that_is_no_kernel_is_named() {
    require!(Kvm);
    let kernels = Kernels::new();
    let place = &kernels.place;
    kernels.refuses_path("missing", &place.join("none"), &["cannot read kernel", "No such file"]);
    kernels.refuses_path("directory", place.path(), &["not a regular file"]);
    kernels.refuses_path("zeros", Path::new("/dev/zero"), &["not a regular file"]);
    let fifo = place.join("fifo");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status().expect("there is mkfifo");
    assert!(made.success());
    kernels.refuses_path("fifo", &fifo, &["not a regular file"]);
    kernels.refuses_path("under-a-file", &fifo.join("x"), &["cannot read kernel"]);

    let elf = &kernels.elf;
    let with = |at: usize, bytes: &[u8]| {
        let mut elf = elf.clone();
        elf[at..at + bytes.len()].copy_from_slice(bytes);
        elf
    };
    let no_kernel: &[&str] = &["is no kernel that can be booted here"];
    kernels.refuses("empty", b"", no_kernel);
    kernels.refuses("text", &b"I am no kernel.\n".repeat(5000), no_kernel);
    kernels.refuses("short", b"\x7fELF", no_kernel);
    kernels.refuses("other-machine", &with(18, &183u16.to_le_bytes()), &["x86-64"]);
    kernels.refuses("32-bit", &with(4, &[1]), &["x86-64"]);
    kernels.refuses("big-endian", &with(5, &[2]), no_kernel);
    kernels.refuses("object", &with(16, &1u16.to_le_bytes()), &["executable"]);
    kernels.refuses("low-entry", &with(24, &0x1000u64.to_le_bytes()), no_kernel);
    kernels.refuses("entry-nowhere", &with(24, &(1u64 << 40).to_le_bytes()), &["kernel"]);
    kernels.refuses("no-segments", &with(56, &0u16.to_le_bytes()), &["kernel"]);
    for cut in [70, 1000, elf.len() / 2] {
        kernels.refuses("cut", &elf[..cut], &["kernel"]);
    }
    let segment = u64::from_le_bytes(elf[32..40].try_into().expect("8 bytes")) as usize;
    for (name, field, value) in [
        ("offset", 8, u64::MAX),
        ("offset", 8, 1 << 62),
        ("address", 24, u64::MAX - 5),
        ("address", 24, 3 << 30),
        ("file-size", 32, u64::MAX),
        ("file-size", 32, 1 << 40),
        ("memory-size", 40, u64::MAX),
    ] {
        kernels.refuses(name, &with(segment + field, &value.to_le_bytes()), &["kernel"]);
    }
    // A bzImage in name only.
    let mut setup = vec![0u8; 4096];
    setup[0x202..0x206].copy_from_slice(b"HdrS");
    kernels.refuses("setup-only", &setup, no_kernel);
    setup[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    setup[0x211] = 1;
    setup[0x1f1] = 255;
    setup[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
    kernels.refuses("setup-beyond", &setup, no_kernel);
    setup[0x1f1] = 1;
    kernels.refuses("no-64-bit-entry", &setup, &["no 64-bit entry point"]);
    kernels.refuses("header-only", &setup[..0x203], no_kernel);
    // One with a 64-bit entry: its code is where its header says, or not.
    let bzimage = |code_len: usize, change: &dyn Fn(&mut [u8])| {
        let mut image = setup.clone();
        image.truncate(1024);
        image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
        image[0x236..0x238].copy_from_slice(&1u16.to_le_bytes()); // xloadflags: 64-bit entry
        image[0x1f4..0x1f8].copy_from_slice(&(0x1_0000u32 / 16).to_le_bytes()); // syssize
        image[0x230..0x234].copy_from_slice(&0x20_0000u32.to_le_bytes()); // kernel_alignment
        image[0x258..0x260].copy_from_slice(&0x100_0000u64.to_le_bytes()); // pref_address
        image[0x260..0x264].copy_from_slice(&0x10_0000u32.to_le_bytes()); // init_size
        change(&mut image);
        image.resize(1024 + code_len, 0xf4);
        image
    };
    kernels.refuses(
        "truncated",
        &bzimage(0x1_0000 - 16, &|_| {}),
        &["was cut short", "65536 bytes", "65520 are there"],
    );
    kernels.refuses("truncated-to-nothing", &bzimage(0, &|_| {}), &["was cut short"]);
    // 16 MiB is where it wants to be, and all that the guest has.
    kernels.refuses("unpacked", &bzimage(0x1_0000, &|_| {}), &["takes 17 MiB", "the guest has 16", "mem_size_mib"]);
    let huge = |image: &mut [u8]| image[0x260..0x264].copy_from_slice(&u32::MAX.to_le_bytes());
    kernels.refuses("unpacked-huge", &bzimage(0x1_0000, &huge), &["takes 4112 MiB"]);
    // An ELF file whose memory, not its contents, is larger than the guest's.
    let program = u64::from_le_bytes(elf[32..40].try_into().expect("8 bytes")) as usize + 56;
    let large = with(program + 40, &(20u64 << 20).to_le_bytes());
    kernels.refuses("large-bss", &large, &["MiB of memory to begin with", "the guest has 16"]);
    if super::guest::ring0_is_emulated() {
        let fits = |image: &mut [u8]| image[0x258..0x260].copy_from_slice(&0x20_0000u64.to_le_bytes());
        let (path, config) = (place.join("kernel"), place.join("vm.json"));
        fs::write(&path, bzimage(0x1_0000, &fits)).expect("a file can be made");
        fs::write(&config, kernels.config(json!({ "kernel_image_path": path }))).expect("a file can be made");
        let words = ["kernel cannot run here", "emulates the guest kernel's instructions", "vmm doctor"];
        refused(place, "emulated", super::HOST_CANNOT, &words, |vmm| {
            vmm.arg("--config").arg(&config);
        });
    }
}

#[test]
fn kernels_with_random_damage_never_take_the_vmm_down() {
    require!(Kvm);
    let kernels = Kernels::new();
    let place = &kernels.place;
    let mut random = super::Random::new(5);
    for _ in 0..100 {
        let mut elf = kernels.elf.clone();
        for _ in 0..=random.below(4) {
            // Where headers are.
            let at = random.below(64 + 4 * 56) as usize;
            elf[at] = random.next() as u8;
        }
        let path = place.join("kernel");
        fs::write(&path, &elf).expect("a file can be made");
        let config = place.join("vm.json");
        fs::write(&config, kernels.config(json!({ "kernel_image_path": path }))).expect("a file can be made");
        let mut vmm = Process::start(place, "damaged", binaries::vmm(), |vmm| {
            vmm.arg("--config").arg(&config);
        });
        tests::holds_within(std::time::Duration::from_millis(30), || !vmm.is_alive());
        let done = vmm.stop();
        super::no_panic(&done.stderr);
        // What is damaged may also run on, or reset its machine.
        if ![Some(0), Some(RESET)].contains(&done.status.code()) {
            super::refusal("damaged", &done, FAILED, &[]);
        }
    }
}

#[test]
fn a_ram_disk_that_cannot_be_loaded_is_named() {
    require!(Kvm);
    let kernels = Kernels::new();
    let place = &kernels.place;
    let disk = place.join("initrd");
    let refuses_disk = |name: &str, path: &Path, words: &[&str]| {
        let source = json!({ "kernel_image_path": place.join("guest.elf"), "initrd_path": path });
        refuses(place, name, kernels.config(source), words);
    };
    refuses_disk("missing", &disk, &["cannot read initial RAM disk", "initrd"]);
    refuses_disk("directory", place.path(), &["cannot read initial RAM disk", "not a regular file"]);
    refuses_disk("zeros", Path::new("/dev/zero"), &["not a regular file"]);
    let file = fs::File::create(&disk).expect("a file can be made");
    refuses_disk("empty", &disk, &["initrd", "empty"]);
    for size in [16 << 20, (16 << 20) - 4096, 17 << 20, 1 << 40] {
        file.set_len(size).expect("it can have any size");
        refuses_disk("large", &disk, &["initrd does not fit into 16 MiB", "mem_size_mib"]);
    }
}
