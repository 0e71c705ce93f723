//! The metrics socket of a running server.
#![allow(missing_docs)]

mod common;
use common::*;
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
