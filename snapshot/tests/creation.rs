//! A snapshot is whole or absent.
#![allow(missing_docs)]

mod common;

use common::*;
use snapshot::create::{BytesSource, CreateError, FileSource, MemorySource, Staging};
use snapshot::image::{Basis, ensure_same, ensure_trusted};
use snapshot::load;
use snapshot::manifest::MemoryRegion;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn only_the_owner_has_access_and_nobody_writes_the_memory() {
    let sample = Sample::new();
    assert_eq!(
        names(&sample.dir),
        [
            "disk-root.img",
            "disk-root.map",
            "disk-root.stamp",
            "mem.b3",
            "mem.bin",
            "mem.stamp",
            "snap.json",
            "state.bin"
        ]
    );
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&sample.dir), 0o700);
    for name in names(&sample.dir) {
        assert_eq!(
            mode(&sample.path(&name)),
            if name == "mem.bin" || name.ends_with(".img") { 0o400 } else { 0o600 },
            "{name}"
        );
    }
    assert_eq!(names(sample.root.path()), ["snap"]);
}

/// A memfd with a hole before, between and after its data.
fn memfd(size: u64, data: &[(u64, &[u8])]) -> File {
    let file = File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.set_len(size).unwrap();
    for (offset, bytes) in data {
        file.write_all_at(bytes, *offset).unwrap();
    }
    file
}

#[test]
fn holes_stay_holes() {
    let root = tempfile::tempdir().unwrap();
    let size = 64 << 20;
    let file = memfd(size, &[(40 * 4096, &[7; 10]), (32 << 20, &[9; 4096]), (33 << 20, &[0; 1 << 20])]);
    let regions = vec![
        MemoryRegion { guest_addr: 0, size_bytes: 48 << 20, offset: 0 },
        MemoryRegion { guest_addr: 1 << 32, size_bytes: 16 << 20, offset: 48 << 20 },
    ];
    let mut staging = Staging::begin(&root.path().join("s")).unwrap();
    let written = staging.write_memory(&mut FileSource::new(&file, regions.clone()).unwrap(), &NEVER).unwrap();
    assert_eq!(written.data_bytes(), 2 * 4096, "zero pages are left out, those with data in the source too");
    let facts = facts(&mut staging);
    let manifest = staging.commit(written, facts, &state(1)).unwrap();
    assert_eq!(manifest.memory.regions, regions);
    let image = fs::metadata(root.path().join("s/mem.bin")).unwrap();
    assert_eq!(image.len(), size);
    assert!(image.blocks() * 512 <= 64 * 1024, "{} blocks", image.blocks());

    // The same contents without any holes in the source have the same root.
    let mut bytes = vec![0; size as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let again = create_at(&root.path().join("t"), &bytes, &state(1)).unwrap();
    assert_eq!(again.memory.root, manifest.memory.root);
}

#[test]
fn nothing_is_overwritten() {
    let sample = Sample::new();
    let root = sample.root.path();
    fs::write(root.join("file"), "").unwrap();
    fs::create_dir(root.join("empty")).unwrap();
    std::os::unix::fs::symlink("nowhere", root.join("link")).unwrap();
    let before = names(root);
    for name in ["snap", "file", "empty", "link", "snap/"] {
        let result = create_at(&root.join(name), &memory(), &state(1));
        assert!(matches!(result, Err(CreateError::Exists { .. })), "{name}");
    }
    assert_eq!(names(root), before);
    load::open(&sample.dir).unwrap();
}

#[test]
fn a_target_that_appears_meanwhile_is_not_overwritten() {
    for make in [|path: &Path| fs::create_dir(path), |path: &Path| fs::write(path, "")] {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("s");
        let mut staging = Staging::begin(&target).unwrap();
        let written = staging.write_memory(&mut BytesSource::new(&memory()), &NEVER).unwrap();
        make(&target).unwrap();
        let facts = facts(&mut staging);
        assert!(matches!(staging.commit(written, facts, &state(1)), Err(CreateError::Exists { .. })));
        assert_eq!(names(root.path()), ["s"]);
    }
}

#[test]
fn a_target_without_a_place_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let result = Staging::begin(&root.path().join("a/b"));
    assert!(matches!(result, Err(CreateError::NoParent { .. })));
    for path in ["/", "..", "a/..", ""] {
        assert!(matches!(Staging::begin(Path::new(path)), Err(CreateError::BadName { .. })), "{path}");
    }
    let long = root.path().join("n".repeat(201));
    assert!(matches!(Staging::begin(&long), Err(CreateError::BadName { .. })));
    let longest = root.path().join("n".repeat(200));
    create_at(&longest, &memory(), &state(1)).unwrap();
    load::open(&longest).unwrap();
}

/// Memory of which something goes wrong after three chunks.
struct Faulty<'a>(&'a dyn Fn() -> io::Result<()>);

impl MemorySource for Faulty<'_> {
    fn size(&self) -> u64 {
        8 * CHUNK as u64
    }

    fn regions(&self) -> Vec<MemoryRegion> {
        vec![MemoryRegion { guest_addr: 0, size_bytes: self.size(), offset: 0 }]
    }

    fn next_data(&mut self, from: u64) -> io::Result<Option<Range<u64>>> {
        Ok(Some(from..self.size()))
    }

    fn read(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.fill(1);
        if offset == 3 * CHUNK as u64 { (self.0)() } else { Ok(()) }
    }
}

#[test]
fn memory_that_cannot_be_read_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let mut staging = Staging::begin(&root.path().join("s")).unwrap();
    let result = staging.write_memory(&mut Faulty(&|| Err(io::ErrorKind::UnexpectedEof.into())), &NEVER);
    assert!(matches!(result, Err(CreateError::Source { offset: 0x30000, .. })));
    drop(staging);
    assert!(names(root.path()).is_empty());
}

#[test]
fn cancelling_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let cancel = AtomicBool::new(false);
    let mut staging = Staging::begin(&root.path().join("s")).unwrap();
    let cancelling = || {
        cancel.store(true, Ordering::Relaxed);
        Ok(())
    };
    let result = staging.write_memory(&mut Faulty(&cancelling), &cancel);
    assert!(matches!(result, Err(CreateError::Cancelled)));
    assert_eq!(names(root.path()).len(), 1);
    drop(staging);
    assert!(names(root.path()).is_empty());
}

#[test]
fn a_source_that_makes_no_progress_is_refused() {
    struct Stuck;
    impl MemorySource for Stuck {
        fn size(&self) -> u64 {
            4 * CHUNK as u64
        }
        fn regions(&self) -> Vec<MemoryRegion> {
            vec![MemoryRegion { guest_addr: 0, size_bytes: self.size(), offset: 0 }]
        }
        fn next_data(&mut self, _: u64) -> io::Result<Option<Range<u64>>> {
            Ok(Some(0..4096))
        }
        fn read(&mut self, _: u64, buf: &mut [u8]) -> io::Result<()> {
            buf.fill(1);
            Ok(())
        }
    }
    let root = tempfile::tempdir().unwrap();
    let mut staging = Staging::begin(&root.path().join("s")).unwrap();
    let result = staging.write_memory(&mut Stuck, &NEVER);
    assert!(matches!(result, Err(CreateError::Source { .. })));
}

#[test]
fn what_could_not_be_loaded_is_not_written() {
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("s");
    assert!(matches!(create_at(&target, &[0; 100], &state(1)), Err(CreateError::Manifest(_))), "no whole pages");
    assert!(matches!(create_at(&target, &[], &state(1)), Err(CreateError::Manifest(_))), "no memory");
    assert!(matches!(create_at(&target, &memory(), &state(0)), Err(CreateError::Manifest(_))), "no vCPU");
    assert!(matches!(create_at(&target, &memory(), &state(65)), Err(CreateError::Manifest(_))), "too many vCPUs");
    let mut odd = state(1);
    odd.vcpus[0].lapic.pop();
    assert!(matches!(create_at(&target, &memory(), &odd), Err(CreateError::State(_))));
    assert!(names(root.path()).is_empty());
}

#[test]
fn what_a_dead_process_left_is_removed() {
    let root = tempfile::tempdir().unwrap();
    for name in [".s.partial-4194304-0", ".s.partial-1-7"] {
        fs::create_dir(root.path().join(name)).unwrap();
        fs::write(root.path().join(name).join("mem.bin"), "half").unwrap();
    }
    let bystanders = [".s.partial-x-1", ".s.partial-1", ".s2.partial-1-1", ".s.partial-1-1.partial-1-1"];
    for name in bystanders {
        fs::create_dir(root.path().join(name)).unwrap();
    }
    let alive = Staging::begin(&root.path().join("s")).unwrap();
    let mut left = names(root.path());
    assert_eq!(left.len(), bystanders.len() + 1, "{left:?}");
    let second = Staging::begin(&root.path().join("s")).unwrap();
    assert_eq!(names(root.path()).len(), bystanders.len() + 2, "the first is alive");
    drop((alive, second));
    left = names(root.path());
    assert_eq!(left.len(), bystanders.len(), "{left:?}");
}

#[test]
fn the_first_of_two_wins() {
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("s");
    let mut first = Staging::begin(&target).unwrap();
    let mut second = Staging::begin(&target).unwrap();
    let one = first.write_memory(&mut BytesSource::new(&memory()), &NEVER).unwrap();
    let two = second.write_memory(&mut BytesSource::new(&memory()), &NEVER).unwrap();
    let (one_facts, two_facts) = (facts(&mut first), facts(&mut second));
    second.commit(two, two_facts, &state(2)).unwrap();
    assert!(matches!(first.commit(one, one_facts, &state(1)), Err(CreateError::Exists { .. })));
    assert_eq!(names(root.path()), ["s"]);
    let snapshot = load::open(&target).unwrap();
    assert_eq!(snapshot.manifest().machine.vcpus, 2);
    assert_eq!(ensure_trusted(&snapshot).unwrap().basis, Basis::Stamp);
}

/// Runs the test `name`, in its part as a child, in a shell that has made space short.
fn create_in_a_shell(name: &str, script: &str, dir: &Path) -> std::process::Output {
    let script = format!("{script}; exec \"$0\" --exact {name}");
    let test = std::env::current_exe().unwrap();
    let unshared = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", &script])
        .arg(test)
        .env("SHORT_OF_SPACE", dir)
        .output();
    unshared.expect("unshare is part of util-linux")
}

/// What the child of a test that makes space short does in the directory that it was given.
fn create_where_space_is_short(dir: &Path) {
    let memory: Vec<u8> = (0..64 * PAGE).map(|i| i as u8 | 1).collect();
    match create_at(&dir.join("s"), &memory, &state(1)) {
        Err(CreateError::NoSpace { path, needed_bytes }) => {
            assert!(path.ends_with("mem.bin"), "{path:?}");
            assert_eq!(needed_bytes, memory.len() as u64);
        }
        other => panic!("{other:?}"),
    }
    assert!(names(dir).is_empty());
}

#[test]
fn a_full_file_system_leaves_nothing() {
    if let Some(dir) = std::env::var_os("SHORT_OF_SPACE") {
        return create_where_space_is_short(Path::new(&dir));
    }
    let root = tempfile::tempdir().unwrap();
    let mount = "set -e; mount -t tmpfs -o size=128k tmpfs \"$SHORT_OF_SPACE\"";
    let may_mount = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", mount])
        .env("SHORT_OF_SPACE", root.path())
        .status();
    if !may_mount.is_ok_and(|status| status.success()) {
        return test_skip::skip("a file system cannot be mounted here; allow user namespaces or run as root");
    }
    let output = create_in_a_shell("a_full_file_system_leaves_nothing", mount, root.path());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn a_limit_on_file_size_leaves_nothing() {
    if let Some(dir) = std::env::var_os("SHORT_OF_SPACE") {
        return create_where_space_is_short(Path::new(&dir));
    }
    let root = tempfile::tempdir().unwrap();
    let script = "trap '' XFSZ; ulimit -f 100; exec \"$0\" --exact a_limit_on_file_size_leaves_nothing";
    let output = Command::new("sh")
        .args(["-c", script])
        .arg(std::env::current_exe().unwrap())
        .env("SHORT_OF_SPACE", root.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

/// Begins a snapshot whose memory file is to have a second name, and completes it.
fn create_with_link(target: &Path, link: &Path) -> Result<(), CreateError> {
    let mut staging = Staging::begin(target)?;
    staging.link_memory(link)?;
    let digest = staging.write_memory(&mut BytesSource::new(&memory()), &NEVER)?;
    let facts = facts(&mut staging);
    staging.commit(digest, facts, &state(1)).map(drop)
}

#[test]
fn the_memory_file_can_have_a_second_name() {
    // The kernel's clock for files may tick as slowly as every 10 ms.
    let let_file_times_pass = || std::thread::sleep(std::time::Duration::from_millis(25));
    let root = tempfile::tempdir().unwrap();
    let (target, link) = (root.path().join("snap"), root.path().join("mem"));
    create_with_link(&target, &link).unwrap();
    assert_eq!(names(root.path()), ["mem", "snap"]);
    assert!(!target.join("mem.link").exists(), "the note has served its purpose");
    assert_eq!(fs::read(&link).unwrap(), memory());
    assert_eq!(fs::metadata(&link).unwrap().ino(), fs::metadata(target.join("mem.bin")).unwrap().ino());
    let basis = || ensure_trusted(&snapshot::load::open(&target).unwrap()).unwrap().basis;
    assert_eq!(basis(), Basis::Stamp, "the stamp knows of it");
    let by_link = ensure_same(&snapshot::load::open(&target).unwrap(), &link).unwrap();
    assert_eq!(by_link.basis, Basis::Stamp, "it is the same file");
    // Fewer names, other times: it is checked once more.
    let_file_times_pass();
    fs::remove_file(&link).unwrap();
    let_file_times_pass();
    assert!(matches!(basis(), Basis::Verified { .. }));
    assert_eq!(basis(), Basis::Stamp);
    snapshot::verify::verify(&target).unwrap();
}

#[test]
fn a_second_name_that_cannot_be_had_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let target = root.path().join("snap");
    fs::write(root.path().join("there"), b"mine").unwrap();
    let elsewhere = Path::new("/dev/shm/coppice-test-link");
    for (link, word) in [
        (root.path().join("there"), "exists already"),
        (target.clone(), "is also snapshot_path"),
        (root.path().join("none/mem"), "No such file"),
        (root.path().join("there/mem"), "Not a directory"),
        (root.path().join(".."), "mem_file_path"),
        (elsewhere.to_owned(), "file system"),
    ] {
        let other_fs = link == elsewhere;
        if other_fs
            && rustix::fs::stat("/dev/shm").map(|s| s.st_dev).ok()
                == rustix::fs::stat(root.path()).map(|s| s.st_dev).ok()
        {
            continue;
        }
        let refused = create_with_link(&target, &link).unwrap_err().to_string();
        assert!(refused.starts_with("mem_file_path ") && refused.contains(word), "{refused}");
        assert_eq!(names(root.path()), ["there"], "{}", link.display());
    }
    assert!(!elsewhere.exists());
    assert_eq!(fs::read(root.path().join("there")).unwrap(), b"mine");
}

#[test]
fn a_snapshot_that_fails_takes_its_second_name_along() {
    let root = tempfile::tempdir().unwrap();
    let (target, link) = (root.path().join("snap"), root.path().join("mem"));
    let begin = || {
        let mut staging = Staging::begin(&target).unwrap();
        staging.link_memory(&link).unwrap();
        let digest = staging.write_memory(&mut BytesSource::new(&memory()), &NEVER).unwrap();
        let facts = facts(&mut staging);
        (staging, digest, facts)
    };
    // Somebody takes the snapshot's name meanwhile.
    let (staging, digest, taken) = begin();
    fs::write(&target, b"").unwrap();
    let refused = staging.commit(digest, taken, &state(1)).unwrap_err();
    assert!(matches!(refused, CreateError::Exists { .. }), "{refused}");
    assert_eq!(names(root.path()), ["snap"]);
    fs::remove_file(&target).unwrap();
    // Or that of the link.
    let (staging, digest, taken) = begin();
    fs::write(&link, b"mine").unwrap();
    let refused = staging.commit(digest, taken, &state(1)).unwrap_err();
    assert!(matches!(refused, CreateError::LinkExists { .. }), "{refused}");
    assert_eq!(names(root.path()), ["mem"]);
    assert_eq!(fs::read(&link).unwrap(), b"mine");
    // Or it is given up.
    fs::remove_file(&link).unwrap();
    drop(begin());
    assert_eq!(names(root.path()), [""; 0]);
    // Or its process was killed before the snapshot was complete: the next one takes it away.
    let left = root.path().join(".snap.partial-1-0");
    fs::create_dir(&left).unwrap();
    fs::write(left.join("mem.bin"), b"incomplete").unwrap();
    fs::write(left.join("mem.link"), link.as_os_str().as_encoded_bytes()).unwrap();
    fs::hard_link(left.join("mem.bin"), &link).unwrap();
    create_with_link(&target, &link).unwrap();
    assert_eq!(names(root.path()), ["mem", "snap"]);
    assert_eq!(fs::read(&link).unwrap(), memory());
}
