//! The metrics socket of a running server.
#![allow(missing_docs)]

mod common;
use common::*;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

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
        assert!(body.contains("\ncoppice_page_server_sessions{mode=\"shared\"} 1\n"), "{body}");
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
