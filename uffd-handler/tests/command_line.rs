//! The program: exit codes, sockets, signals.
#![allow(missing_docs)]

mod common;
use common::*;
use snapshot::page_runs::PageRuns;
use snapshot::working_set::{Used, WorkingSet};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

#[test]
fn bad_usage_is_2_and_help_is_0() {
    let run = |args: &[&str]| server_command().args(args).output().unwrap();
    let bad = run(&["--snapshot", "x"]);
    assert_eq!(bad.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&bad.stderr).contains("--socket is missing"));
    let help = run(&["--help"]);
    assert_eq!(help.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&help.stdout).contains("--ready-fd"));
}

#[test]
fn a_signal_ends_it_with_0_and_removes_the_sockets() {
    with_userfaultfd(|| {
        for signal in [libc::SIGTERM, libc::SIGINT] {
            let sample = Sample::of_bytes(MIB);
            let mut server = Server::start(&sample);
            for socket in [sample.socket(), sample.path("m")] {
                assert_eq!(std::fs::metadata(socket).unwrap().permissions().mode() & 0o777, 0o600);
            }
            let client = Client::connect(&sample);
            client.view.check_all();
            server.signal(signal);
            assert_eq!(server.wait(), Some(0));
            assert!(!exists(&sample.socket()) && !exists(&sample.path("m")));
            assert_eq!(client.wait_for_end(), "", "the server's own end is no refusal");
        }
    });
}

#[test]
fn a_missing_snapshot_and_a_taken_socket_are_1() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(MIB);
        let fails = |snapshot: &str, part: &str| {
            let mut command = server_command();
            command.arg("--socket").arg(sample.socket()).arg("--snapshot").arg(sample.path(snapshot));
            let output = command.output().unwrap();
            let text = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(1), "{text}");
            assert!(text.contains(part), "{text}");
        };
        fails("absent", "absent");
        assert!(!exists(&sample.socket()));
        let server = Server::start(&sample);
        fails("snap", "in use");
        Client::connect(&sample).view.check_all();
        assert_eq!(server.metrics().sessions_total, 1);
    });
}

#[test]
fn an_abandoned_socket_is_replaced() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(MIB);
        drop(Server::start(&sample));
        assert!(exists(&sample.socket()), "a killed server leaves its socket");
        let _server = Server::start(&sample);
        Client::connect(&sample).view.check_all();
    });
}

#[test]
fn the_parent_is_told_when_it_listens() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(MIB);
        let mut child = Command::new("sh")
            .arg("-c")
            .arg("exec \"$0\" --ready-fd 3 --socket \"$1\" --snapshot \"$2\" 3>&1 >/dev/null 2>&1")
            .arg(env!("CARGO_BIN_EXE_uffd-handler"))
            .args([sample.socket(), sample.path("snap")])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut told = Vec::new();
        child.stdout.take().unwrap().read_to_end(&mut told).unwrap();
        assert_eq!(told, b"1");
        Client::connect(&sample).view.check_all();
        signal_process(child.id(), libc::SIGTERM);
        assert_eq!(child.wait().unwrap().code(), Some(0));
    });
}

#[test]
fn a_working_set_is_shown_and_forgotten() {
    let sample = Sample::of_bytes(MIB);
    let run = |args: &[&str]| server_command().arg("ws").args(args).arg(sample.path("snap")).output().unwrap();
    let absent = run(&["show"]);
    assert_eq!(absent.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&absent.stderr).contains("no working set"));

    let snapshot = snapshot::load::open(&sample.path("snap")).unwrap();
    let mut set = WorkingSet::of(&snapshot);
    set.merge(&Used { read: PageRuns::new([0..4, 128..256]), written: PageRuns::of_pages([8]) });
    set.save(&snapshot).unwrap();
    let text = String::from_utf8(run(&["show"]).stdout).unwrap();
    for part in ["learnt from 1 clone\n", "read     132 pages, 0.5 MiB, in 2 runs", "[#...", "written  1 pages"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let document: serde_json::Value = serde_json::from_slice(&run(&["show", "--json"]).stdout).unwrap();
    assert_eq!((&document["read"]["pages"], &document["clones"]), (&132.into(), &1.into()));

    std::fs::write(sample.path("snap/working-set.json"), "{}").unwrap();
    assert_eq!(run(&["show"]).status.code(), Some(1));
    assert!(run(&["clear"]).status.success());
    assert!(!exists(&sample.path("snap/working-set.json")));
}
