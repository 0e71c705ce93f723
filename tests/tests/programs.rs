//! What the programs do besides running VMs: the demonstration, the examination of the host, the exported guest.

#![allow(missing_docs, reason = "tests are named for what they show")]

use serde_json::Value;
use tests::process::run_vmm;
use tests::template::Facts;
use tests::{Boot, Place, Template, require};

const FLAGS: [&str; 6] =
    ["nonce_ok", "ticks_continue", "working_set_ok", "random_unique", "generation_unique", "isolated"];

/// Runs a small demonstration; its exit code and its report.
fn demo(more: &[&str]) -> (i32, Value) {
    let place = Place::new();
    let dir = place.join("demo");
    let dir = dir.to_str().expect("the path is text");
    let mut arguments = vec!["demo", "--clones", "3", "--memory", "32", "--working-set", "4", "--json", "--dir", dir];
    arguments.extend(more);
    let done = run_vmm(&place, "demo", &arguments);
    let report = serde_json::from_str(&done.stdout)
        .unwrap_or_else(|e| panic!("the report is no JSON document ({e}): {} {}", done.stdout, done.stderr));
    (done.code(), report)
}

#[test]
fn the_demonstration_reports_what_it_promises_and_every_flag_is_true() {
    require!(Kvm, Userfaultfd);
    let (code, report) = demo(&[]);
    for field in ["boot_ms", "snapshot_total_ms"] {
        assert!(report[field].as_f64().is_some_and(|ms| ms > 0.0), "{field}: {report}");
    }
    for field in ["snapshot_pause_us", "store_pages"] {
        assert!(report[field].as_u64().is_some_and(|count| count > 0), "{field}: {report}");
    }
    assert!(report["host"]["kernel"].is_string(), "{report}");
    assert_eq!(report["image_digest_unchanged"], true);
    let clones = report["clones"].as_array().expect("clones are listed");
    assert_eq!(clones.len(), 3);
    for (number, clone) in clones.iter().enumerate() {
        assert_eq!(clone["id"], number);
        for field in ["restore_to_reply_us", "uffd_events", "private_kib", "pss_kib"] {
            assert!(clone[field].is_u64(), "{field}: {clone}");
        }
        for flag in FLAGS {
            assert_eq!(clone[flag], true, "{flag}: {clone}");
        }
    }
    let events = |clone: &Value| clone["uffd_events"].as_u64().expect("checked above");
    assert!(clones[1..].iter().all(|clone| events(clone) * 20 <= events(&clones[0])), "{report}");
    assert_eq!(code, 0);
}

/// The flags about identity are measured: without a new identity just those are false.
#[test]
fn without_reseeding_the_demonstration_fails_in_identity_alone() {
    require!(Kvm, Userfaultfd);
    let (code, report) = demo(&["--no-reseed"]);
    assert_eq!(code, 1);
    assert_eq!(report["image_digest_unchanged"], true);
    for clone in report["clones"].as_array().expect("clones are listed") {
        for flag in FLAGS {
            let expected = !["random_unique", "generation_unique"].contains(&flag);
            assert_eq!(clone[flag], expected, "{flag}: {clone}");
        }
    }
}

#[test]
fn a_demonstration_leaves_nothing_but_what_it_was_told_to() {
    require!(Kvm, Userfaultfd);
    let place = Place::new();
    let temporary = place.join("tmp");
    std::fs::create_dir(&temporary).expect("a directory can be made in the test's directory");
    let done = tests::Process::start(&place, "demo", tests::binaries::vmm(), |vmm| {
        vmm.args(["demo", "--clones", "2", "--memory", "16", "--working-set", "1"]).env("TMPDIR", &temporary);
    })
    .finish();
    assert_eq!((done.code(), done.stderr.as_str()), (0, ""));
    assert!(done.stdout.contains("checks held"), "{}", done.stdout);
    assert_eq!(std::fs::read_dir(&temporary).expect("it was made above").count(), 0);
    let here = place.path().to_str().expect("the path is text");
    assert_eq!(tests::procfs::processes_with(here), [0; 0], "processes are left");
}

#[test]
fn the_exported_guest_is_a_kernel_that_boots() {
    require!(Kvm);
    let place = Place::new();
    let kernel = place.join("guest.elf");
    let done = run_vmm(&place, "export", &["guest", "export", kernel.to_str().expect("the path is text")]);
    assert_eq!((done.code(), done.stderr.as_str(), done.stdout.as_str()), (0, "", ""));
    assert!(std::fs::read(&kernel).expect("the kernel was written").starts_with(b"\x7fELF"));
    let (vm, mut agent) = Boot::new(&place).kernel(&kernel, "coppice.vcpus=2").vcpus(2).ready("guest");
    assert_eq!(agent.info().vcpus, 2);
    Facts::gather(&mut agent, 1).check(&mut agent);
    vm.stop();
}

#[test]
fn the_doctor_names_every_finding_and_a_remedy_for_every_bad_one() {
    let place = Place::new();
    let done = run_vmm(&place, "doctor", &["doctor", "--json"]);
    let report: Value = serde_json::from_str(&done.stdout).expect("one JSON document");
    let checks = report["checks"].as_array().expect("checks are listed");
    assert!(checks.len() > 10, "{report}");
    for check in checks {
        assert!(check["name"].is_string() && check["found"].is_string(), "{check}");
        let status = check["status"].as_str().expect("a status");
        assert!(["ok", "info", "warn", "fail"].contains(&status), "{check}");
        assert!(!["warn", "fail"].contains(&status) || check["remedy"].is_string(), "{check}");
    }
    let failed = checks.iter().any(|check| check["status"] == "fail");
    assert_eq!(done.code(), if failed { 77 } else { 0 }, "{report}");
    let text = run_vmm(&place, "doctor-text", &["doctor"]);
    assert_eq!(text.code(), done.code());
    assert!(text.stdout.contains("kvm.device"), "{}", text.stdout);
}

#[test]
fn a_snapshot_is_verified_by_command() {
    require!(Kvm);
    let template = Template::shared();
    let place = Place::new();
    let path = template.snapshot.to_str().expect("the path is text");
    let done = run_vmm(&place, "verify", &["snapshot", "verify", path, "--json"]);
    assert_eq!((done.code(), done.stderr.as_str()), (0, ""));
    let report: Value = serde_json::from_str(&done.stdout).expect("one JSON document");
    assert_eq!((&report["vcpus"], &report["memory_bytes"]), (&Value::from(1), &Value::from(32 << 20)));
}

#[test]
fn a_snapshot_is_packed_compared_shown_and_removed_by_command() {
    require!(Kvm);
    let template = Template::shared();
    let place = Place::new();
    let path = |name: &str| place.join(name).to_str().expect("the path is text").to_owned();
    let source = template.snapshot.to_str().expect("the path is text");
    let tool = |words: &[&str]| {
        let done = run_vmm(&place, words[0], &[&["snapshot"], words, &["--json"]].concat());
        assert_eq!((done.code(), done.stderr.as_str()), (0, ""), "{words:?}");
        serde_json::from_str::<Value>(&done.stdout).unwrap_or_else(|e| panic!("{words:?}: {e}: {}", done.stdout))
    };
    let root = tool(&["verify", source])["root"].clone();
    for words in [
        &["pack", source, &path("packed")][..],
        &["unpack", &path("packed"), &path("raw")],
        &["diff", "--write", &path("packed"), source, &path("over")],
        &["flatten", "--packed", &path("over"), &path("alone")],
    ] {
        assert_eq!(tool(words)["root"], root, "{words:?}");
    }
    let shown = tool(&["show", &path("packed")]);
    assert_eq!((&shown["vcpus"], &shown["memory"]["levels"][0]["form"]), (&1.into(), &"packed".into()));
    assert_eq!(shown["children"].as_array().map(Vec::len), Some(1), "{shown}");
    let difference = tool(&["diff", source, &path("over")]);
    assert_eq!((&difference["pages"], &difference["state"]), (&0.into(), &Value::Array(vec![])));
    let packed = std::fs::metadata(place.join("packed/mem.pack")).expect("it is packed").len();
    eprintln!("32 MiB with a small guest are {packed} bytes, packed");
    assert!(packed < 8 << 20, "{packed}");

    let kept = run_vmm(&place, "kept", &["snapshot", "rm", &path("packed")]);
    assert!(kept.code() == 1 && kept.stderr.contains("over"), "{kept:?}");
    let bound = run_vmm(&place, "bound", &["snapshot", "pack", source, &path("x"), "--max-bytes", "1000"]);
    assert!(bound.code() == 1 && bound.stderr.contains("1000"), "{bound:?}");
    let told = run_vmm(&place, "told", &["snapshot", "pack", source, &path("x"), "--progress"]);
    assert!(told.code() == 0 && told.stderr.contains("100 % of"), "{told:?}");
    for name in ["over", "packed", "x", "raw"] {
        tool(&["rm", &path(name)]);
    }
    tool(&["verify", &path("alone")]);
}

#[test]
fn the_benchmark_of_the_api_prints_one_document() {
    require!(Kvm);
    let place = Place::new();
    let done = run_vmm(&place, "bench", &["bench", "api", "--calls", "20", "--starts", "2", "--json"]);
    assert_eq!((done.code(), done.stderr.as_str()), (0, ""));
    let document: Value = serde_json::from_str(&done.stdout).expect("one document");
    let report = &document["reports"]["api"];
    for spread in ["get_info", "socket_round_trip", "start_to_connection"] {
        let [min, p50, max] = ["min_us", "p50_us", "max_us"].map(|field| report[spread][field].as_f64().expect(field));
        assert!(0.0 < min && min <= p50 && p50 <= max, "{spread}: {report}");
    }
    assert_eq!((&report["calls"], &report["starts"]), (&20.into(), &2.into()));
    let table = run_vmm(&place, "table", &["bench", "api", "--calls", "20", "--starts", "1"]);
    assert!(table.code() == 0 && table.stdout.contains("GET / on a running VM"), "{table:?}");
}

#[test]
fn the_benchmark_of_faults_measures_our_page_server_and_another_one() {
    require!(Kvm, Userfaultfd);
    let place = Place::new();
    let peer = env!("CARGO_BIN_EXE_copy-handler");
    let arguments = ["bench", "faults", "--pages", "64", "--n", "1", "--peer-handler", peer, "--json"];
    let done = run_vmm(&place, "bench", &arguments);
    assert_eq!((done.code(), done.stderr.as_str()), (0, ""));
    let document: Value = serde_json::from_str(&done.stdout).expect("one document");
    let report = &document["reports"]["faults"];
    let rows = report["faults"].as_array().expect("a list");
    for case in ["first", "later", "later_write", "peer"] {
        for pattern in ["scattered", "contiguous"] {
            let row = rows.iter().find(|row| row["case"] == case && row["pattern"] == pattern);
            let [min, p50, max] =
                ["min_us", "p50_us", "max_us"].map(|field| row.expect(case)[field].as_f64().expect(field));
            assert!(0.0 <= min && min <= p50 && p50 <= max, "{case}, {pattern}: {report}");
        }
    }
    assert_eq!((&report["pages"], &report["runs"]), (&64.into(), &1.into()));
}

#[test]
fn another_vmm_is_measured_beside_ours() {
    const QEMU: &str = "qemu-system-x86_64";
    require!(Kvm);
    if std::process::Command::new(QEMU).arg("--version").output().is_err() {
        return test_skip::skip("qemu-system-x86_64 is not installed");
    }
    let place = Place::new();
    // Where a shell finds it.
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut programs = std::env::split_paths(&path).map(|dir| dir.join(QEMU));
    let peer = format!("qemu={}", programs.find(|program| program.exists()).expect("it was found").display());
    let bench = ["bench", "restore", "--n", "2", "--backend", "file", "--working-set", "64", "--concurrency", "2"];
    let done = run_vmm(&place, "bench", &[&bench[..], &["--peer", &peer, "--json"]].concat());
    assert_eq!((done.code(), done.stderr.as_str()), (0, ""));
    let document: Value = serde_json::from_str(&done.stdout).expect("one document");
    let report = &document["reports"]["restore"];
    assert_eq!(report["peers"][0][0], "qemu");
    let figures = document["figures"].as_array().expect("a list");
    let value = |name: String| {
        let figure = figures.iter().find(|figure| figure["name"] == *name);
        figure.unwrap_or_else(|| panic!("{name}: {document}"))["p50"].as_f64().expect("a number")
    };
    for (shell, touch) in [("none", "reply"), ("none", "scattered"), ("warm", "reply"), ("warm", "contiguous")] {
        let [ours, theirs] = ["serial", "qemu"].map(|whose| value(format!("restore.{whose}.{shell}.file.{touch}")));
        let ratio = value(format!("restore.serial.{shell}.file.{touch}-to-peer"));
        assert!(ours > 0.0 && theirs > 0.0 && ratio > 0.0, "{shell}, {touch}: {report}");
    }
}

#[test]
fn the_benchmark_of_resets_has_figures_of_every_case() {
    require!(Kvm);
    let place = Place::new();
    let done = run_vmm(&place, "bench", &["bench", "reset", "--n", "3", "--json"]);
    assert_eq!((done.code(), done.stderr.as_str()), (0, ""));
    let document: Value = serde_json::from_str(&done.stdout).expect("one document");
    let report = &document["reports"]["reset"];
    let rows = report["resets"].as_array().expect("a list");
    let cases: Vec<_> = rows.iter().map(|row| (row["pages"].as_u64(), row["pattern"].as_str())).collect();
    let wanted = [(64, "contiguous"), (64, "scattered"), (2048, "contiguous"), (2048, "scattered")];
    assert_eq!(cases, wanted.map(|(pages, pattern)| (Some(pages), Some(pattern))));
    for row in rows {
        let number = |part: &str, at: &str| row[part][at].as_f64().unwrap_or_else(|| panic!("{part}.{at}: {row}"));
        for part in ["total", "call", "copy"] {
            let spread = ["min_us", "p50_us", "p99_us", "max_us"].map(|at| number(part, at));
            assert!(spread.is_sorted(), "{part}: {row}");
        }
        let phases = row["phases_us"].as_array().expect("a list");
        let names: Vec<_> = phases.iter().map(|phase| phase[0].as_str().expect("a name")).collect();
        assert_eq!(names, ["pause", "written", "memory", "state", "translations", "device_state", "resume"]);
        let longest = number("total", "max_us");
        assert!(phases.iter().all(|phase| (0.0..=longest).contains(&phase[1].as_f64().expect("a number"))), "{row}");
        assert!(row["dirty_pages"].as_u64() >= row["pages"].as_u64(), "{row}");
        assert!(number("call", "max_us") >= number("total", "max_us"), "{row}");
    }
}

#[test]
fn the_benchmark_of_snapshots_has_figures_of_every_case() {
    require!(Kvm);
    let place = Place::new();
    let done = run_vmm(&place, "bench", &["bench", "snapshot", "--n", "1", "--resident-mib", "16", "--json"]);
    assert_eq!((done.code(), done.stderr.as_str()), (0, ""));
    let document: Value = serde_json::from_str(&done.stdout).expect("one document");
    let report = &document["reports"]["snapshot"];
    let ordered = |figure: &Value| {
        let [min, p50, max] = ["min", "p50", "max"].map(|field| figure[field].as_f64().expect(field));
        assert!(0.0 < min && min <= p50 && p50 <= max, "{report}");
    };
    let rows = report["snapshots"].as_array().expect("a list");
    assert_eq!(rows.len(), 12);
    for row in rows {
        ["pause_us", "total_us", "call_us", "stored_bytes"].iter().for_each(|figure| ordered(&row[figure]));
        // What is stored is what is in use, or what was written, and little else.
        let mib = row["stored_bytes"]["max"].as_f64().expect("a number") / (1 << 20) as f64;
        let pages = |field: &str, of_a_mib: f64| row[field].as_f64().expect(field) / of_a_mib;
        let is_diff = row["snapshot_type"] == "Diff";
        let least = if is_diff { pages("written_pages", 256.0) } else { pages("used_mib", 1.0) };
        assert!((least..least + 4.0).contains(&mib), "{row}");
    }
    report["writing"].as_array().expect("a list").iter().for_each(|row| ordered(&row["after_us"]));
    ["chain_us", "full_us"].iter().for_each(|figure| ordered(&report["restoring"][figure]));
    ["verify_gib_s", "read_gib_s"].iter().for_each(|figure| ordered(&report["verifying"][figure]));
    assert_eq!((&report["runs"], &report["resident_mib"]), (&1.into(), &16.into()));
}

#[test]
fn the_benchmark_of_restores_has_figures_of_every_way() {
    require!(Kvm, Userfaultfd);
    let place = Place::new();
    let line = "bench restore --n 3 --memory 64 --working-set 64 --write-fraction 0.5 --concurrency 2 --cold --json";
    let done = run_vmm(&place, "bench", &line.split(' ').collect::<Vec<_>>());
    assert_eq!((done.code(), done.stderr.as_str()), (0, ""));
    let document: Value = serde_json::from_str(&done.stdout).expect("one document");
    let figures = document["figures"].as_array().expect("a list");
    for backend in ["file", "shared", "copy"] {
        for shell in ["none", "warm"] {
            let ends = if backend == "copy" { vec!["reply"] } else { vec!["reply", "contiguous", "scattered"] };
            for end in ends {
                let name = format!("restore.{shell}.{backend}.{end}");
                let figure = figures.iter().find(|figure| figure["name"] == name).unwrap_or_else(|| panic!("{name}"));
                // Three, in twos.
                assert_eq!(figure["count"], 4, "{figure}");
                let quantiles: Vec<f64> =
                    figure["quantiles"].as_array().expect("a list").iter().filter_map(Value::as_f64).collect();
                assert!(quantiles.len() == 101 && quantiles.is_sorted() && quantiles[0] > 0.0, "{figure}");
                let parts = figure["parts"].as_array().expect("a list");
                let sum: f64 = parts.iter().filter_map(|part| part["p50"].as_f64()).sum();
                assert!(!parts.is_empty() && sum < quantiles[100], "{figure}");
            }
        }
    }
}

#[test]
fn figures_can_be_kept_compared_drawn_and_shown() {
    require!(Kvm);
    let place = Place::new();
    let path = |name: &str| place.join(name).to_str().expect("the path is text").to_owned();
    let bench = ["bench", "restore", "--n", "2", "--backend", "file", "--shell", "none"];
    let kept = run_vmm(&place, "kept", &[&bench[..], &["--json", "--plot", &path("charts")]].concat());
    assert_eq!((kept.code(), kept.stderr.as_str()), (0, ""));
    std::fs::write(path("kept.json"), &kept.stdout).expect("it is written");
    for (kind, begins) in [("svg", &b"<svg"[..]), ("png", b"\x89PNG")] {
        let chart = std::fs::read(path(&format!("charts/restore-times-until-the-reply.{kind}"))).expect("it is drawn");
        assert!(chart.windows(begins.len()).any(|part| part == begins), "{kind}");
    }

    let budget = |p50: u32| format!(r#"{{"budgets": [{{"figure": "restore.none.file.reply", "p50": {p50}}}]}}"#);
    std::fs::write(path("generous.json"), budget(1_000_000_000)).expect("it is written");
    std::fs::write(path("mean.json"), budget(1)).expect("it is written");
    std::fs::write(path("other.json"), r#"{"budgets": [{"figure": "nothing", "p50": 1}]}"#).expect("it is written");
    let gated = |gate: &str| run_vmm(&place, gate, &[&bench[..], &["--gate", &path(gate)]].concat());
    let done = gated("generous.json");
    assert!(done.code() == 0 && done.stdout.contains("holds  restore.none.file.reply p50"), "{done:?}");
    let done = gated("mean.json");
    assert!(done.code() == 1 && done.stdout.contains("FAILS  restore.none.file.reply p50"), "{done:?}");
    assert!(done.stderr.contains("1 of 1 values are worse"), "{done:?}");
    let done = gated("other.json");
    assert!(done.code() == 1 && done.stderr.contains("says nothing of what was measured"), "{done:?}");

    let report = |more: &[&str]| run_vmm(&place, "report", &[&["bench", "report", &path("kept.json")], more].concat());
    let same = report(&["--json", "--gate", &path("kept.json")]);
    assert_eq!((same.code(), &same.stdout), (0, &kept.stdout));
    let page = report(&["--gate", &path("mean.json")]);
    assert!(page.code() == 1 && page.stdout.contains("| 1.00, - | **missed** |"), "{page:?}");
    let page = report(&["--plot", &path("again")]);
    assert!(page.code() == 0 && page.stdout.starts_with("# Benchmarks"), "{page:?}");
    assert!(place.join("again/restore-phases-until-the-reply.png").exists());

    // What cannot be used is refused before anything is measured.
    std::fs::write(path("bad.json"), "{\"format\": 7}").expect("it is written");
    for (option, value) in [("--gate", "bad.json"), ("--gate", "nowhere.json"), ("--plot", "kept.json/x")] {
        let done = run_vmm(&place, "bad", &[&bench[..], &[option, &path(value)]].concat());
        assert!(done.code() == 1 && done.stdout.is_empty() && !done.stderr.is_empty(), "{option} {value}: {done:?}");
    }
    for peer in ["firecracker=/nowhere", "qemu=/nowhere"] {
        let done = run_vmm(&place, "bad", &[&bench[..], &["--peer", peer]].concat());
        assert!(done.code() == 1 && done.stderr.contains("other VMM"), "{peer}: {done:?}");
    }
    // It ends at once.
    for peer in ["firecracker=/bin/false", "qemu=/bin/false"] {
        let done = run_vmm(&place, "bad", &[&bench[..], &["--peer", peer]].concat());
        assert!(done.code() == 1 && done.stderr.contains("other VMM ended"), "{peer}: {done:?}");
    }
}
