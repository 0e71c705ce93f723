//! What a client can do with the store that it was given: map it privately, and nothing else.
#![allow(missing_docs)]

mod common;
use common::*;
use rustix::fs::FallocateFlags;
use std::fs::{File, OpenOptions, Permissions};
use std::io::{ErrorKind, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::process::Command;

const NOBODY: u32 = 65534;

/// The same file, opened anew for writing.
fn reopen(store: &impl AsRawFd) -> std::io::Result<File> {
    OpenOptions::new().read(true).write(true).open(format!("/proc/self/fd/{}", store.as_raw_fd()))
}

#[test]
fn nobody_writes_resizes_or_punches_the_store() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(MIB);
        let server = Server::start(&sample);
        let client = Client::connect(&sample);
        client.view.check_all();
        let greeted = Client::greet(&sample).unwrap();
        let given = File::from(greeted.store.try_clone().unwrap());
        assert!(given.write_at(b"x", 0).is_err() && given.set_len(4096).is_err());
        // Its owner, and root, can open it again; the seals are what counts.
        let Ok(mut writable) = reopen(&greeted.store) else {
            return test_skip::skip("the store cannot be reopened here");
        };
        assert_eq!(writable.write(b"x").unwrap_err().kind(), ErrorKind::PermissionDenied);
        assert!(writable.set_len(4096).is_err() && writable.set_len(2 * MIB as u64).is_err());
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        assert!(rustix::fs::fallocate(&writable, punch, 0, 4096).is_err());
        assert!(View::try_map_shared(&writable, sample.size()).is_err());
        client.view.check_all();
        assert_eq!(server.metrics().stores_retired_total, 0);
    });
}

#[test]
fn pages_that_cannot_be_found_end_the_sessions_that_might_read_them() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(4 * MIB);
        let server = Server::start(&sample);
        let client = Client::connect(&sample);
        client.view.check_page(0);
        let greeted = Client::greet(&sample).unwrap();
        let Ok(writable) = reopen(&greeted.store) else { return test_skip::skip("the store cannot be reopened here") };
        // Allocated but never filled: reads as zeros, and looks like a hole.
        rustix::fs::fallocate(&writable, FallocateFlags::empty(), 2 * MIB as u64, CHUNK as u64).unwrap();
        assert!(client.wait_for_end().contains("cannot be put right"));
        assert_eq!(server.metrics().stores_retired_total, 1);
        Client::connect(&sample).view.check_all();
    });
}

#[test]
fn another_user_gets_another_store_and_cannot_open_it_for_writing() {
    if let (Ok(dir), Ok(image)) = (std::env::var("COPPICE_SAMPLE"), std::env::var("COPPICE_IMAGE")) {
        return be_the_other_user(&dir, image);
    }
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(MIB);
        let server = Server::start(&sample);
        let client = Client::connect(&sample);
        client.view.check_all();
        std::fs::set_permissions(sample.root.path(), Permissions::from_mode(0o755)).unwrap();
        std::fs::set_permissions(sample.socket(), Permissions::from_mode(0o666)).unwrap();
        let other = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "another_user_gets_another_store_and_cannot_open_it_for_writing"])
            .env("COPPICE_SAMPLE", sample.root.path())
            .env("COPPICE_IMAGE", &sample.manifest.memory.root)
            .current_dir("/")
            .uid(NOBODY)
            .output();
        let output = match other {
            Ok(output) => output,
            Err(error) => return test_skip::skip(format!("cannot run a program as another user: {error}")),
        };
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        let stores = server.metrics().stores;
        assert_eq!(
            stores.iter().map(|store| (store.uid, store.filled_pages)).collect::<Vec<_>>(),
            [(Some(rustix::process::getuid().as_raw()), 256), (Some(NOBODY), 0)]
        );
    });
}

/// What the other process of the test above does.
fn be_the_other_user(dir: &str, image: String) {
    let hello = api_spec::handshake::Hello {
        version: api_spec::handshake::VERSION,
        image,
        size: MIB as u64,
        mode: Default::default(),
    };
    let greeted = uffd_handler::client::greet(&std::path::Path::new(dir).join("s"), &hello).unwrap();
    assert_eq!(reopen(&greeted.store).unwrap_err().kind(), ErrorKind::PermissionDenied);
    drop(View::map(&greeted.store, MIB));
}
