//! Command lines that ask for nothing sensible, and standard streams that take nothing.

use super::{BAD_USAGE, FAILED, refused, refused_by};
use api_spec::agent::Request;
use api_spec::client::AgentClient;
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::time::Instant;
use tests::{Place, Process, binaries, require};

#[track_caller]
fn bad_usage(line: &str, words: &[&str]) {
    let place = Place::new();
    refused(&place, "usage", BAD_USAGE, &[words, &["--help"]].concat(), |vmm| {
        vmm.args(line.split_whitespace());
    });
}

#[test]
fn options_that_make_no_sense_are_named() {
    bad_usage("", &["--config"]);
    bad_usage("--nonsense", &["--nonsense"]);
    bad_usage("-x", &["-x"]);
    bad_usage("nonsense", &["nonsense"]);
    for option in ["--config", "--restore", "--api-sock", "--id", "--log-level", "--uffd", "--uffd-mode", "--vsock"] {
        bad_usage(option, &[option]);
    }
    bad_usage("--config a b", &["b"]);
    bad_usage("--config a --restore b", &["--config", "--restore"]);
    bad_usage("--config a --paused=yes", &["yes"]);
    bad_usage("--config a --log-level loud", &["loud"]);
    let with_restore =
        ["--uffd u", "--vsock v", "--paused", "--same-generation", "--max-private-mib 5", "--allow-mismatch vendor"];
    for option in with_restore {
        bad_usage(&format!("--config a {option}"), &["makes sense with --restore only"]);
        bad_usage(&format!("--api-sock a {option}"), &["makes sense with --restore only"]);
    }
    let allowed = ["--allow-mismatch arch", "vendor", "cpu_features", "xsave", "tsc_khz"];
    bad_usage("--restore a --allow-mismatch arch", &allowed);
    bad_usage("snapshot check", &["check SNAPSHOT"]);
    bad_usage("--restore a --uffd-mode copy", &["--uffd-mode", "--uffd"]);
    bad_usage("--restore a --uffd b --uffd-mode x", &["--uffd-mode x"]);
    bad_usage("guest", &["export FILE"]);
    bad_usage("guest export", &["export FILE"]);
    bad_usage("guest export a b", &["\"b\""]);
    bad_usage("snapshot", &["verify SNAPSHOT"]);
    bad_usage("snapshot verify", &["verify SNAPSHOT"]);
    bad_usage("snapshot remove a", &["verify SNAPSHOT"]);
    bad_usage("snapshot verify a b", &["b"]);
    bad_usage("snapshot pack a", &["SOURCE TARGET", "vmm snapshot --help"]);
    bad_usage("snapshot unpack a b --packed", &["--packed"]);
    bad_usage("snapshot flatten a b c", &["SOURCE TARGET"]);
    bad_usage("snapshot diff a", &["--write PARENT CHILD TARGET"]);
    bad_usage("snapshot diff a b --max-bytes 5", &["--max-bytes"]);
    bad_usage("snapshot show", &["SNAPSHOT"]);
    bad_usage("snapshot rm a --force", &["--force"]);
    bad_usage("doctor all", &["all"]);
    for line in [
        "--clones 0",
        "--clones x",
        "--clones -1",
        "--clones 99999999999",
        "--memory 0",
        "--memory 18446744073709551615",
        "--working-set 0",
        "--working-set 128",
        "--working-set 18446744073709551615",
        "--vcpus 0",
        "--vcpus 9",
        "--vcpus 256",
        "--dir",
        "--nonsense",
    ] {
        bad_usage(&format!("demo {line}"), &[]);
    }
    bad_usage("uffd-handler", &["--snapshot is missing"]);
    bad_usage("uffd-handler --socket s --snapshot a --ready-fd 1", &["3 or more"]);

    let place = Place::new();
    for argument in [b"--nonsense\nvmm: all is well".to_vec(), b"\xff\xfe".to_vec(), b"\x1b[2J".to_vec()] {
        refused(&place, "usage", BAD_USAGE, &[], |vmm| {
            vmm.arg(OsString::from_vec(argument));
        });
    }
}

#[test]
fn sockets_that_cannot_be_made_are_named() {
    let place = Place::new();
    let long = place.join("x".repeat(108 - place.path().as_os_str().len() - 1));
    assert_eq!(long.as_os_str().len(), 108);
    let file = place.join("file");
    fs::write(&file, "mine").expect("a file can be made");
    let busy = place.join("busy");
    let listener = std::os::unix::net::UnixListener::bind(&busy).expect("a socket can be made");
    rustix::net::listen(&listener, 1).expect("a backlog can be shortened");
    let cases: [(&Path, &str); 7] = [
        (&long, "107 fit"),
        (Path::new(""), "is empty"),
        (&file, "is no socket"),
        (&busy, "is in use"),
        (place.path(), "is no socket"),
        (&place.join("no/s"), "No such file"),
        (&file.join("s"), "Not a directory"),
    ];
    let mut waiting = Vec::new();
    for _ in 0..2 {
        for (path, word) in cases {
            refused(&place, "api", FAILED, &[word], |vmm| {
                vmm.arg("--api-sock").arg(path);
            });
            refused(&place, "server", FAILED, &[], |vmm| {
                vmm.args(["uffd-handler", "--snapshot", "none", "--socket"]).arg(path);
            });
        }
        // Once more, with a queue so full that a connection has to wait.
        while waiting.len() < 1000 {
            let connected = api_spec::client::unix::connect(&busy, std::time::Duration::ZERO);
            let Ok(client) = connected else { break };
            waiting.push(client);
        }
    }
    assert_eq!(fs::read(&file).expect("it is there"), b"mine");
}

#[test]
fn sockets_of_a_restored_guest_that_cannot_be_made_are_named() {
    require!(Kvm);
    let template = tests::Template::make(tests::TemplateOptions { vcpus: 1, memory_mib: 16, working_set_mib: 1 });
    let place = &template.place;
    let long = place.join("x".repeat(108 - place.path().as_os_str().len() - 1));
    let api = place.join("c.api");
    for (option, path, words) in [
        ("--vsock", long.as_path(), ["vsock_override", "107 fit"]),
        ("--vsock", Path::new(""), ["vsock_override", "is empty"]),
        ("--vsock", api.as_path(), ["c.api", "is in use"]),
        ("--vsock", place.path(), ["exists", "is no socket"]),
        ("--uffd", long.as_path(), ["page server", "107 bytes"]),
        ("--uffd", Path::new(""), ["page server", "cannot connect"]),
        ("--uffd", Path::new("/dev/null"), ["page server", "cannot connect"]),
    ] {
        refused(place, "restore", FAILED, &words, |vmm| {
            vmm.arg("--restore").arg(&template.snapshot).arg("--api-sock").arg(&api).arg(option).arg(path);
        });
    }
}

#[test]
fn a_guest_that_cannot_be_exported_leaves_no_file() {
    let place = Place::new();
    let export = |path: &Path, words: &[&str]| {
        refused(&place, "export", FAILED, words, |vmm| {
            vmm.args(["guest", "export"]).arg(path);
        });
    };
    export(&place.join("no/guest"), &["cannot write", "no/guest", "No such file"]);
    export(place.path(), &["cannot write", "directory"]);
    export(Path::new("/dev/full"), &["cannot write /dev/full", "No space"]);
    export(Path::new(""), &["cannot write"]);
    // Beyond a limit on file sizes.
    refused_by(&place, "limited", Path::new("prlimit"), FAILED, &["cannot write", "guest", "too large"], |vmm| {
        vmm.arg("--fsize=4096").arg(binaries::vmm()).args(["guest", "export"]).arg(place.join("guest"));
    });
}

#[test]
fn too_few_open_files_are_told_with_a_remedy() {
    let place = Place::new();
    fs::create_dir(place.join("snap")).expect("a directory can be made");
    let words = ["snap.json", "open no more", "ulimit -n"];
    for verb in ["show", "check", "verify"] {
        refused_by(&place, "few", Path::new("prlimit"), FAILED, &words, |vmm| {
            vmm.arg("--nofile=4").arg(binaries::vmm()).args(["snapshot", verb]).arg(place.join("snap"));
        });
    }
}

/// Runs a shell command in which `$0` is the vmm; its exit code and what it said.
fn shell(place: &Place, script: &str) -> (i32, String) {
    let done = Process::start(place, "shell", Path::new("sh"), |sh| {
        sh.args(["-c", script]).arg(binaries::vmm());
    })
    .finish();
    super::no_panic(&done.stderr);
    (done.code(), done.stderr)
}

#[test]
fn standard_streams_that_are_closed_or_full_are_no_surprise() {
    let place = Place::new();
    for command in ["--version", "--help", "doctor", "doctor --json", "demo --help"] {
        let (code, said) = shell(&place, &format!("\"$0\" {command} >/dev/full"));
        assert_eq!(code, FAILED, "{command}: {said}");
        assert!(said.starts_with("vmm: cannot write to standard output") && said.lines().count() == 1, "{said}");
        // Nobody could be told.
        let (code, said) = shell(&place, &format!("\"$0\" {command} >/dev/full 2>/dev/full"));
        assert_eq!((code, said.as_str()), (FAILED, ""), "{command}");
        let (code, said) = shell(&place, &format!("\"$0\" {command} >&-"));
        assert!([0, 77].contains(&code) && said.is_empty(), "{command}: {code}, {said}");
        let (code, _) = shell(&place, &format!("\"$0\" {command} >&- 2>&- <&-"));
        assert!([0, 77].contains(&code), "{command}: {code}");
    }
    for command in ["--nonsense", "doctor all"] {
        for stream in ["2>&-", "2>/dev/full", ">&- 2>&- <&-"] {
            assert_eq!(shell(&place, &format!("\"$0\" {command} {stream}")), (BAD_USAGE, String::new()), "{command}");
        }
    }
    assert_eq!(shell(&place, "\"$0\" --config none 2>/dev/full"), (FAILED, String::new()));
    // A reader who leaves.
    let (code, said) = shell(&place, "(\"$0\" --help; echo $? >&2) | :");
    assert!(code == 0 && said.lines().count() <= 2, "{said}");
}

#[test]
fn a_demonstration_whose_report_cannot_be_printed_fails() {
    require!(Kvm, Userfaultfd);
    let place = Place::new();
    let demo = "demo --clones 1 --memory 16 --working-set 1 --json";
    let temporary = format!("TMPDIR='{}'", place.path().display());
    let (code, said) = shell(&place, &format!("{temporary} \"$0\" {demo} >/dev/full"));
    assert_eq!(code, FAILED, "{said}");
    assert!(said.starts_with("vmm: cannot write to standard output") && said.lines().count() == 1, "{said}");
    let (code, said) = shell(&place, &format!("{temporary} \"$0\" {demo} >&- 2>&- <&-"));
    assert_eq!((code, said.as_str()), (0, ""));
    assert_eq!(place.names(), ["shell.log", "shell.out"]);
}

#[test]
fn a_guest_runs_without_standard_streams() {
    require!(Kvm);
    let place = Place::new();
    let config = place.join("vm.json");
    let vsock = place.join("v");
    let text = format!(
        r#"{{"boot-source": {{"embedded_guest": true}}, "machine-config": {{"mem_size_mib": 16}},
            "vsock": {{"guest_cid": 3, "uds_path": "{}"}}}}"#,
        vsock.display()
    );
    fs::write(&config, text).expect("a file can be made");
    for streams in [">&- 2>&- <&-", ">/dev/full 2>/dev/full </dev/zero"] {
        let vmm = Process::start(&place, "closed", Path::new("sh"), |sh| {
            sh.args(["-c", &format!("exec \"$0\" --config \"$1\" {streams}")]).arg(binaries::vmm()).arg(&config);
        });
        let (deadline, ping) = (Instant::now() + tests::PATIENCE, Request::Ping { token: 3 });
        AgentClient::first_reply(&vsock, tests::PATIENCE, deadline, ping).expect("the guest answers");
        assert_eq!(vmm.stop().status.code(), Some(0), "{streams}");
        assert!(!vsock.exists());
    }
}
