//! A Unix socket's path has at most 107 bytes. A longer one is refused before anything is made or started.

#![allow(missing_docs, reason = "tests are named for what they show")]

use std::path::{Path, PathBuf};
use tests::process::Finished;
use tests::{Boot, Place, Process, Template, binaries, procfs, require};

/// A path that is too long, in a directory that is there.
fn too_long(place: &Place) -> PathBuf {
    let deep = place.join("d".repeat(80));
    std::fs::create_dir_all(&deep).expect("a directory can be made in the test's directory");
    let path = deep.join("s".repeat(40));
    assert!(path.as_os_str().len() > 107);
    path
}

fn run(place: &Place, program: &Path, arguments: &[&Path]) -> Finished {
    Process::start(place, "refused", program, |command| {
        command.args(arguments);
    })
    .finish()
}

/// It failed, named the path and the limit, and left nothing behind.
#[track_caller]
fn refused(place: &Place, before: &[String], done: &Finished) {
    assert!([1, 2].contains(&done.code()), "{done:?}");
    let line = done.one_line();
    assert!(line.contains("107"), "the limit is named: {line}");
    let mut after = place.names();
    after.retain(|name| !name.starts_with("refused."));
    assert_eq!(after, before, "something was made");
    let long = place.join("d".repeat(80));
    assert_eq!(std::fs::read_dir(long).expect("it was made above").count(), 0, "something was made");
    let here = place.path().to_str().expect("the path is text");
    assert_eq!(procfs::processes_with(here), [0; 0], "something runs");
}

#[test]
fn the_vmm_refuses_too_long_a_path_before_it_starts() {
    require!(Kvm);
    let template = Template::shared();
    let place = Place::new();
    let long = too_long(&place);
    let snapshot = template.snapshot.as_path();
    let (api, vsock, uffd) = (place.join("api"), place.join("vsock"), place.join("uffd"));
    let [api_sock, restore, with_uffd, with_vsock] = ["--api-sock", "--restore", "--uffd", "--vsock"].map(Path::new);
    let before = place.names();
    let commands: [&[&Path]; 5] = [
        &[api_sock, &long],
        &[restore, snapshot, api_sock, &long, with_vsock, &vsock],
        &[restore, snapshot, api_sock, &api, with_vsock, &vsock, with_uffd, &long],
        &[restore, snapshot, api_sock, &api, with_vsock, &long],
        &[restore, snapshot, api_sock, &api, with_vsock, &long, with_uffd, &uffd],
    ];
    for command in commands {
        let done = run(&place, binaries::vmm(), command);
        println!("{}", done.stderr);
        refused(&place, &before, &done);
    }
}

#[test]
fn a_configuration_with_too_long_a_vsock_path_is_refused() {
    require!(Kvm);
    let place = Place::new();
    let long = too_long(&place);
    let config = place.join("vm.json");
    let text = serde_json::json!({
        "boot-source": {"embedded_guest": true},
        "vsock": {"guest_cid": 3, "uds_path": long},
    });
    std::fs::write(&config, text.to_string()).expect("a file can be made in the test's directory");
    let before = place.names();
    let api = place.join("api");
    let done = run(&place, binaries::vmm(), &["--config".as_ref(), &config, "--api-sock".as_ref(), &api]);
    refused(&place, &before, &done);
}

#[test]
fn the_page_server_refuses_too_long_a_path_before_it_starts() {
    require!(Kvm, Userfaultfd);
    let template = Template::shared();
    let place = Place::new();
    let long = too_long(&place);
    let fine = place.join("s");
    let before = place.names();
    for (socket, metrics) in [(&long, &fine), (&fine, &long)] {
        let arguments: [&Path; 6] =
            ["--socket".as_ref(), socket, "--metrics".as_ref(), metrics, "--snapshot".as_ref(), &template.snapshot];
        let done = run(&place, binaries::uffd_handler(), &arguments);
        refused(&place, &before, &done);
        let mut arguments = arguments.to_vec();
        arguments.insert(0, "uffd-handler".as_ref());
        let done = run(&place, binaries::vmm(), &arguments);
        refused(&place, &before, &done);
    }
}

/// The longest path that fits is one that works.
#[test]
fn a_path_of_107_bytes_works() {
    require!(Kvm);
    let place = Place::new();
    // `Boot` makes the socket's path from the name: `<place>/<name>.vsock`.
    let room = 107 - place.join(".vsock").as_os_str().len();
    let (vm, mut agent) = Boot::new(&place).ready(&"n".repeat(room));
    assert_eq!(vm.vsock.as_os_str().len(), 107);
    assert_eq!(agent.ping(1), 1);
    vm.stop();
}
