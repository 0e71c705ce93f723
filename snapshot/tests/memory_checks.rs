//! A memory image that is not what the snapshot was made with is noticed where it is used.
#![allow(missing_docs)]

mod common;

use common::*;
use snapshot::image::{Basis, ImageError, MemoryImage, TrustedMemory, ensure_same, ensure_trusted};
use snapshot::load;
use snapshot::verify::{VerifyError, verify};
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

/// The kernel's clock for files may tick as slowly as every 10 ms.
fn let_file_times_pass() {
    std::thread::sleep(Duration::from_millis(25));
}

fn open_for_writing(path: &Path) -> File {
    fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
    File::options().write(true).open(path).unwrap()
}

fn flip(sample: &Sample, at: usize) {
    let_file_times_pass();
    let byte = memory()[at] ^ 0x40;
    open_for_writing(&sample.path("mem.bin")).write_all_at(&[byte], at as u64).unwrap();
}

fn damage_at(result: Result<impl Sized, ImageError>) -> u64 {
    match result {
        Err(ImageError::Damaged { offset, .. }) => offset,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("nothing was noticed"),
    }
}

#[test]
fn a_flipped_byte_is_noticed_where_it_is_read() {
    let mut buf = vec![0; CHUNK];
    let last = memory().len() - 1;
    for at in [0, CHUNK - 1, CHUNK + 3 * PAGE, 3 * CHUNK + 7, 4 * CHUNK, last] {
        let sample = Sample::new();
        flip(&sample, at);
        let snapshot = load::open(&sample.dir).unwrap();
        let image = MemoryImage::open(&snapshot).unwrap();
        let chunk = (at / CHUNK) as u64;
        assert_eq!(damage_at(image.read_chunk(chunk, &mut buf)), chunk * CHUNK as u64);
        assert!((0..5).filter(|i| *i != chunk).all(|i| image.read_chunk(i, &mut buf).is_ok()));
        assert_eq!(damage_at(ensure_trusted(&snapshot)), chunk * CHUNK as u64);
        match verify(&sample.dir) {
            Err(VerifyError::Damaged { damaged: 1, chunks: 5, .. }) => {}
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn what_is_read_without_waiting_is_the_same_or_nothing() {
    let sample = Sample::new();
    let at = 3 * CHUNK + 7;
    flip(&sample, at);
    let image = MemoryImage::open(&load::open(&sample.dir).unwrap()).unwrap();
    for forgotten in [false, true] {
        for index in 0..image.chunks() {
            let (mut now, mut later) = (vec![0; CHUNK], vec![0; CHUNK]);
            match (image.read_chunk_now(index, &mut now), image.read_chunk(index, &mut later)) {
                (Ok(Some(len)), Ok(same)) => assert_eq!((len, &now[..len]), (same, &later[..len])),
                (Ok(None), other) => assert!(index != 2 && (other.is_ok() || index == 3), "{index}: {other:?}"),
                (Err(now), Err(later)) => assert_eq!((now.to_string(), index), (later.to_string(), 3)),
                other => panic!("{index}, {forgotten}: {other:?}"),
            }
        }
        image.forget(0..image.chunks());
    }
    image.forget(0..u64::MAX / CHUNK as u64);
    image.forget(7..7);
}

#[test]
fn a_byte_in_a_hole_is_noticed_where_the_kernel_would_serve_it() {
    let sample = Sample::new();
    flip(&sample, 2 * CHUNK + 9);
    let snapshot = load::open(&sample.dir).unwrap();
    let mut buf = vec![0xff; CHUNK];
    MemoryImage::open(&snapshot).unwrap().read_chunk(2, &mut buf).unwrap();
    assert!(buf.iter().all(|b| *b == 0), "what the snapshot was made with");
    assert_eq!(damage_at(ensure_trusted(&snapshot)), 2 * CHUNK as u64);
}

#[test]
fn a_hole_in_the_place_of_data_is_noticed() {
    let sample = Sample::new();
    let_file_times_pass();
    let file = open_for_writing(&sample.path("mem.bin"));
    file.set_len(0).unwrap();
    file.set_len(memory().len() as u64).unwrap();
    assert_eq!(damage_at(ensure_trusted(&load::open(&sample.dir).unwrap())), 0);
    match verify(&sample.dir) {
        Err(VerifyError::Damaged { damaged: 4, .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn damaged_digests_are_noticed() {
    let sample = Sample::new();
    let good = sample.bytes("mem.b3");
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x04;
        sample.put("mem.b3", &bad);
        let snapshot = load::open(&sample.dir).unwrap();
        assert!(matches!(MemoryImage::open(&snapshot), Err(ImageError::Digests { .. })), "byte {at}");
    }
}

#[test]
fn chunks_beyond_the_end_are_refused() {
    let sample = Sample::new();
    let image = MemoryImage::open(&load::open(&sample.dir).unwrap()).unwrap();
    for index in [5, u64::MAX] {
        assert!(matches!(image.read_chunk(index, &mut [0; CHUNK]), Err(ImageError::NoSuchChunk { .. })));
        assert!(image.chunk_is_zero(index));
    }
}

fn basis(dir: &Path) -> Basis {
    ensure_trusted(&load::open(dir).unwrap()).unwrap().basis
}

#[test]
fn a_copied_snapshot_is_checked_once() {
    let sample = Sample::new();
    let copy = sample.root.path().join("copy");
    fs::create_dir(&copy).unwrap();
    for entry in fs::read_dir(&sample.dir).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
    }
    let_file_times_pass();
    assert!(matches!(basis(&copy), Basis::Verified { .. }));
    assert_eq!(basis(&copy), Basis::Stamp);
    assert_eq!(basis(&sample.dir), Basis::Stamp, "the original is as it was");
}

#[test]
fn a_moved_snapshot_keeps_its_stamp() {
    let sample = Sample::new();
    let moved = sample.root.path().join("moved");
    fs::rename(&sample.dir, &moved).unwrap();
    assert_eq!(basis(&moved), Basis::Stamp);
}

#[test]
fn verifying_makes_a_stamp() {
    let sample = Sample::new();
    fs::remove_file(sample.path("mem.stamp")).unwrap();
    let_file_times_pass();
    verify(&sample.dir).unwrap();
    assert_eq!(basis(&sample.dir), Basis::Stamp);
}

#[test]
fn an_image_that_just_changed_is_not_stamped() {
    let sample = Sample::new();
    // Rewritten with what it held: right, but a change in the same tick of the clock could not be told from it.
    open_for_writing(&sample.path("mem.bin")).write_all_at(&memory()[..1], 0).unwrap();
    assert!(matches!(basis(&sample.dir), Basis::Verified { .. }));
}

#[test]
fn a_stamp_that_cannot_be_read_or_is_of_other_memory_means_nothing() {
    let sample = Sample::new();
    let good = String::from_utf8(sample.bytes("mem.stamp")).unwrap();
    let other_root = good.replace(&sample.manifest.memory.root, &"0".repeat(64));
    assert_ne!(good, other_root);
    for stamp in ["", "{}", &other_root, &good.replace("\"ino\"", "\"inode\"")] {
        let_file_times_pass();
        sample.put("mem.stamp", stamp.as_bytes());
        assert!(matches!(basis(&sample.dir), Basis::Verified { .. }), "{stamp}");
        assert_eq!(basis(&sample.dir), Basis::Stamp);
    }
}

#[test]
fn memory_in_another_place_is_the_snapshots_or_is_refused() {
    let sample = Sample::new();
    let snapshot = load::open(&sample.dir).unwrap();
    let beside = |name: &str| sample.root.path().join(name);
    let same = |path: &Path| ensure_same(&snapshot, path).map(|trust| trust.basis);
    assert_eq!(same(&sample.path("mem.bin")).unwrap(), Basis::Stamp, "its own");
    std::os::unix::fs::symlink(sample.path("mem.bin"), beside("by-link")).unwrap();
    assert_eq!(same(&beside("by-link")).unwrap(), Basis::Stamp);

    let copy = beside("copy");
    fs::write(&copy, memory()).unwrap();
    for _ in 0..2 {
        assert!(matches!(same(&copy).unwrap(), Basis::Verified { .. }), "no stamp is made of it");
    }
    let trusted = ensure_same(&snapshot, &copy).unwrap();
    let TrustedMemory::Files(files) = trusted.memory else { panic!("it is not packed") };
    assert_eq!(files[0].file.metadata().unwrap().len(), memory().len() as u64);
    for at in [0, 2 * CHUNK + 9, memory().len() - 1] {
        let mut bytes = memory();
        bytes[at] ^= 0x40;
        fs::write(&copy, bytes).unwrap();
        match same(&copy) {
            Err(ImageError::OtherMemory { offset, path }) => {
                assert_eq!((offset, path), ((at / CHUNK * CHUNK) as u64, copy.clone()));
            }
            other => panic!("byte {at}: {other:?}"),
        }
    }
    fs::write(&copy, &memory()[1..]).unwrap();
    assert!(matches!(same(&copy), Err(ImageError::OtherSize { .. })));

    let fifo = beside("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RUSR).unwrap();
    for none in [&fifo, Path::new("/dev/zero"), sample.root.path()] {
        assert!(matches!(same(none), Err(ImageError::NotRegular { .. })), "{}", none.display());
    }
    assert!(matches!(same(&beside("absent")), Err(ImageError::Open { .. })));
    assert!(!beside("mem.stamp").exists());
}
