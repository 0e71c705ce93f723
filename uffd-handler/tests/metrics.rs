//! The metrics socket of a running server.
#![allow(missing_docs)]

mod common;
use api_spec::page_server::{Bucket, Histogram, ImageMetrics, Metrics, SessionMetrics, StoreMetrics};
use common::*;
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};

fn ask(sample: &Sample, request: &str) -> String {
    let mut stream = UnixStream::connect(sample.path("m")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "{request} HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn whoever_asks_is_told_as_text_or_as_a_document() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(MIB);
        let server = Server::start(&sample);
        let client = Client::connect(&sample);
        client.view.check_all();
        let text = ask(&sample, "GET /metrics");
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200 ") && head.contains("version=0.0.4"), "{head}");
        openmetrics_parser::prometheus::parse_prometheus(body).unwrap();
        assert!(body.contains("\ncoppice_page_server_active_sessions{mode=\"shared\"} 1\n"), "{body}");
        assert_eq!(server.metrics().sessions.len(), 1);
        assert!(ask(&sample, "GET /other").starts_with("HTTP/1.1 404 "));
    });
}

#[test]
fn clients_that_say_nothing_keep_nobody_out_for_long() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(MIB);
        let server = Server::start(&sample);
        let client = Client::connect(&sample);
        client.view.check_page(0);
        let before = server.descriptors();
        let silent: Vec<UnixStream> = (0..64).map(|_| UnixStream::connect(sample.path("m")).unwrap()).collect();
        until("the silent are left", || api_spec::client::metrics::read(&sample.path("m"), PATIENCE).is_ok());
        client.view.check_all();
        until("all is given back", || server.descriptors() <= before);
        for mut stream in silent {
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
        }
    });
}

/// The names of all fields of a document, and of the documents in it.
fn fields(document: &serde_json::Value, names: &mut BTreeSet<String>) {
    match document {
        serde_json::Value::Object(members) => members.iter().for_each(|(name, value)| {
            names.insert(name.clone());
            fields(value, names);
        }),
        serde_json::Value::Array(items) => items.iter().for_each(|item| fields(item, names)),
        _ => {}
    }
}

#[test]
fn the_guide_to_operations_names_every_field() {
    let metrics = Metrics {
        stores: vec![StoreMetrics::default()],
        images: vec![ImageMetrics::default()],
        sessions: vec![SessionMetrics::default()],
        fault_latency: Histogram { buckets: vec![Bucket::default()], ..Default::default() },
        ..Default::default()
    };
    let mut names = BTreeSet::new();
    fields(&serde_json::to_value(metrics).unwrap(), &mut names);
    let guide = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/operations.md")).unwrap();
    let row = guide.lines().find(|line| line.contains("`GET /metrics.json`")).unwrap();
    let absent: Vec<_> = names.iter().filter(|name| !row.contains(&format!("`{name}`"))).collect();
    assert!(names.len() > 30 && absent.is_empty(), "docs/operations.md does not name {absent:?}");
}

/// Processor time that a process has used, in ticks of 10 ms.
fn ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    fields.split(' ').skip(11).take(2).map(|time| time.parse::<u64>().unwrap()).sum()
}

#[test]
fn without_descriptors_whoever_connects_waits_and_the_server_does_not_spin() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(MIB);
        let server = Server::start(&sample);
        let pid = Pid::from_raw(server.pid() as i32).unwrap();
        // What is open stays so; a server has the limits of who has started it.
        let none = Rlimit { current: Some(0), ..getrlimit(Resource::Nofile) };
        let before = prlimit(Some(pid), Resource::Nofile, none).unwrap();
        let reader = std::thread::spawn({
            let path = sample.path("m");
            move || api_spec::client::metrics::read(&path, PATIENCE)
        });
        let guest = UnixStream::connect(sample.socket()).unwrap();
        let tries = |name| server.logged(&format!("cannot accept connections at {}:", sample.path(name).display()));
        until("it has tried both", || tries("m") > 0 && tries("s") > 0);
        let before_both = (ticks(server.pid()), tries("m"), tries("s"));
        until("it has tried both again", || tries("m") >= before_both.1 + 2 && tries("s") >= before_both.2 + 2);
        let (ticks, tries) = (ticks(server.pid()) - before_both.0, tries("m") + tries("s"));
        assert!(ticks < 50 && tries < 50, "{ticks} ticks of processor time and {tries} tries");
        prlimit(Some(pid), Resource::Nofile, before).unwrap();
        assert_eq!(reader.join().unwrap().unwrap().sessions_total, 0);
        drop(guest);
        Client::connect(&sample).view.check_all();
    });
}

fn top(sample: &Sample, more: &[&str]) -> Command {
    let mut command = server_command();
    command.args(["top", "--interval", "0.1", "--metrics"]).arg(sample.path("m")).args(more).stdout(Stdio::piped());
    command
}

/// Waits until it has shown something.
fn show(child: &mut Child) {
    let mut first = [0; 6];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    assert_eq!(&first, b"guests");
}

#[test]
fn top_shows_a_server_as_a_document_or_until_it_goes() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(MIB);
        let mut server = Server::start(&sample);
        let client = Client::connect(&sample);
        client.view.check_all();
        let shown = top(&sample, &["--json"]).output().unwrap();
        let document: serde_json::Value = serde_json::from_slice(&shown.stdout).unwrap();
        assert_eq!(document["guests"][0]["pid"], std::process::id());
        assert!(shown.status.success());

        let mut until_signal = top(&sample, &[]).spawn().unwrap();
        show(&mut until_signal);
        signal_process(until_signal.id(), libc::SIGINT);
        assert!(until_signal.wait().unwrap().success());

        let mut until_end = top(&sample, &[]).spawn().unwrap();
        show(&mut until_end);
        server.signal(libc::SIGTERM);
        server.wait();
        let shown = until_end.wait_with_output().unwrap();
        let text = String::from_utf8(shown.stdout).unwrap();
        assert!(shown.status.success() && text.lines().last().unwrap().contains("has gone"), "{text}");

        let absent = top(&sample, &["--once"]).stderr(Stdio::piped()).output().unwrap();
        assert_eq!(absent.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&absent.stderr).contains("start the page server"));
    });
}
