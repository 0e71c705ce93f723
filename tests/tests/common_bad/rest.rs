//! Clients of the REST API that do not keep to it.

use super::{Random, no_panic, rss_kib};
use api_spec::vm::InstanceState;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use tests::http::{connect, request, say, status};
use tests::template::Facts;
use tests::vm::waiting;
use tests::{Boot, Place, require};

const PUTS: [&str; 7] =
    ["/machine-config", "/boot-source", "/vsock", "/balloon", "/actions", "/snapshot/create", "/snapshot/load"];

#[test]
fn malformed_requests_are_refused_and_the_guest_goes_on() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) = Boot::new(&place).memory_mib(16).ready("guest");
    let facts = Facts::gather(&mut agent, 1);
    let api = vm.api.clone();
    let whole = request("PATCH", "/vm", br#"{"state":"Resumed"}"#);
    assert_eq!(status(&say(&api, &whole)), 204, "what is said before the end is answered");
    for length in 0..whole.len() {
        let answer = say(&api, &whole[..length]);
        assert_eq!(answer, "", "{length} bytes are no request");
    }
    let head = |rest: &str| format!("GET / HTTP/1.1\r\n{rest}\r\n\r\n").into_bytes();
    let long = "x".repeat(9000);
    let cases: Vec<(u16, Vec<u8>)> = vec![
        (400, b"\r\r\r\r GET\r\n\r\n".to_vec()),
        (400, b"\x16\x03\x01\x02\x00\x01\x00".to_vec()),
        (400, b"GET /\xff\xfe\x00 HTTP/1.1\r\n\r\n".to_vec()),
        (400, b"GET / HTTP/9.9\r\n\r\n".to_vec()),
        (400, head("bad header")),
        (400, head("Content-Length: -1")),
        (400, head("Content-Length: 1e3")),
        (400, head("Content-Length: 1\r\nContent-Length: 2")),
        (400, head("Content-Length: 1\r\nTransfer-Encoding: chunked")),
        (400, b"GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec()),
        (400, [&head("Transfer-Encoding: chunked")[..], b"x\r\n"].concat()),
        (400, b"GET /%ff HTTP/1.1\r\n\r\n".to_vec()),
        (417, head("Expect: a miracle")),
        (501, head("Transfer-Encoding: gzip, chunked")),
        (413, head("Content-Length: 51201")),
        (413, head("Content-Length: 18446744073709551615")),
        (413, head("Content-Length: 99999999999999999999999999")),
        (413, [&head("Transfer-Encoding: chunked")[..], b"c801\r\n"].concat()),
        (431, head(&format!("X: {long}"))),
        (431, format!("GET /{long} HTTP/1.1\r\n\r\n").into_bytes()),
        (431, head("X: y\r\n".repeat(70).trim_end())),
        (404, request("GET", "/nothing", b"")),
        (404, request("GET", "/../../etc/passwd", b"")),
        (404, request("GET", "http://vm/nothing", b"")),
        (405, request("DELETE", "/vm", b"")),
        (405, request("BREW", "/", b"")),
        (405, request("PUT", "/", b"{}")),
        (400, request("PATCH", "/vm", b"")),
        (400, request("PATCH", "/vm", b"{}")),
        (400, request("PATCH", "/vm", b"[]")),
        (400, request("PATCH", "/vm", b"\xff\xff")),
        (400, request("PATCH", "/vm", br#"{"state":"Broken"}"#)),
        (400, request("PATCH", "/vm", br#"{"state":1}"#)),
        (400, request("PATCH", "/vm", br#"{"state":"Paused","state":"Paused"}"#)),
        (400, request("PATCH", "/vm", br#"{"state":"Paused"} {}"#)),
        (400, request("PATCH", "/vm", &b"[".repeat(50_000))),
        (400, request("PATCH", "/vm", &b"{\"state\":".repeat(5_000))),
    ];
    for (expected, bytes) in cases {
        let answer = say(&api, &bytes);
        let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(100)]).into_owned();
        assert_eq!(status(&answer), expected, "{shown}: {answer}");
        let body = answer.split("\r\n\r\n").nth(1).unwrap_or_default();
        let body: serde_json::Value = serde_json::from_str(body).unwrap_or_else(|e| panic!("{shown}: {e}: {answer}"));
        assert!(body["fault_message"].as_str().is_some_and(|text| text.len() > 10), "{shown}: {answer}");
    }
    // Wrong types and unknown fields, everywhere.
    for path in PUTS {
        for body in
            ["", "{", "null", "7", "\"x\"", "[]", "[[[[]]]]", r#"{"speed":9}"#, r#"{"a":{"b":{"c":[]}}}"#, "\u{0}"]
        {
            let answer = say(&api, &request("PUT", path, body.as_bytes()));
            assert_eq!(status(&answer), 400, "{path} {body}: {answer}");
        }
    }
    facts.check(&mut agent);
    let before = rss_kib(vm.pid());
    let mut random = Random::new(23);
    for _ in 0..300 {
        let path = ["/", "/vm", "/snapshot/create", "/machine-config", "/snapshot/load"][random.below(5) as usize];
        let mut bytes =
            request(["GET", "PUT", "PATCH"][random.below(3) as usize], path, br#"{"snapshot_type":"Full"}"#);
        for _ in 0..=random.below(6) {
            let at = random.below(bytes.len() as u64) as usize;
            bytes[at] = random.next() as u8;
        }
        let answer = say(&api, &bytes);
        assert!(answer.is_empty() || (200..600).contains(&status(&answer)), "{answer}");
    }
    facts.check(&mut agent);
    let after = rss_kib(vm.pid());
    assert!(after < before + 8 * 1024, "it has grown from {before} to {after} KiB");
    assert_eq!(vm.state(), InstanceState::Running);
    let done = vm.stop();
    no_panic(&done.stderr);
}

#[test]
fn requests_may_be_written_in_all_the_ways_that_http_has() {
    let place = Place::new();
    let mut vm = waiting(&place, "fresh");
    vm.api();
    let get = |line: &str, headers: &str| format!("{line}\r\n{headers}\r\n").into_bytes();
    let chunked = |body: &str| {
        let line = "PUT /machine-config HTTP/1.1";
        get(line, &format!("Transfer-Encoding: chunked\r\n\r\n{body}0\r\nX: y\r\n"))
    };
    let heard = |bytes: &[u8]| tests::http::answers(&say(&vm.api, bytes));
    let statuses = |bytes: &[u8]| heard(bytes).iter().map(|answer| answer.status).collect::<Vec<_>>();
    for line in
        ["GET / HTTP/1.1", "GET / HTTP/1.0", "GET /? HTTP/1.1", "GET http://vm HTTP/1.1", "GET /%76ersion HTTP/1.1"]
    {
        assert_eq!(statuses(&get(line, "")), [200], "{line}");
    }
    assert_eq!(statuses(&chunked("c\r\n{\"vcpu_count\r\n4;x=y\r\n\":2}\r\n")), [204]);
    assert_eq!(statuses(&chunked("1\r\n{\r\n")), [400], "a body that is understood, and is no JSON");
    let old = [get("GET / HTTP/1.0", "Connection: x, keep-alive\r\n"), get("GET / HTTP/1.0", "")].concat();
    assert_eq!(statuses(&old.repeat(2)), [200, 200], "the second one closes the connection");
    let numbers: Vec<u64> = heard(&get("GET / HTTP/1.1", "").repeat(3))
        .iter()
        .map(|answer| answer.header("x-request-id").and_then(|number| number.parse().ok()).expect("it has a number"))
        .collect();
    assert!(numbers[0] > 8 && numbers == [numbers[0], numbers[0] + 1, numbers[0] + 2], "{numbers:?}");
    // The answer to `HEAD` is the head of an answer, which another may follow.
    let said = say(&vm.api, &[get("HEAD / HTTP/1.1", ""), get("GET / HTTP/1.1", "")].concat());
    let (head, rest) = said.split_once("\r\n\r\n").expect("a head");
    assert!(status(head) == 405 && !head.contains("\r\nContent-Length: 0"), "{said}");
    assert_eq!(status(rest), 200, "{said}");
    // Who asks for leave to send a body gets it, and then an answer.
    let mut patient = connect(&vm.api);
    patient
        .write_all(b"PUT /machine-config HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 16\r\n\r\n")
        .expect("there is room");
    let mut leave = [0; 25];
    patient.read_exact(&mut leave).expect("it gives leave");
    assert_eq!(&leave, b"HTTP/1.1 100 Continue\r\n\r\n");
    patient.write_all(br#"{"vcpu_count":1}"#).expect("there is room");
    patient.shutdown(Shutdown::Write).expect("it is connected");
    assert_eq!(status(&tests::http::hear(&mut patient)), 204);
    no_panic(&vm.stop().stderr);
}

#[test]
fn requests_out_of_order_are_refused_by_name() {
    require!(Kvm);
    let template = tests::Template::make(tests::TemplateOptions { vcpus: 1, memory_mib: 16, working_set_mib: 1 });
    let place = &template.place;
    let mut vm = waiting(place, "fresh");
    vm.api();
    let api = vm.api.clone();
    let load = serde_json::json!({ "snapshot_path": template.snapshot, "vsock_override": { "uds_path": vm.vsock } });
    let load = load.to_string();
    let create = serde_json::json!({ "snapshot_path": place.join("new") }).to_string();
    let refuses = |method: &str, path: &str, body: &str, word: &str| {
        let answer = say(&api, &request(method, path, body.as_bytes()));
        assert!(status(&answer) == 400 && answer.contains(word), "{method} {path}: {answer}");
    };
    let accepts = |method: &str, path: &str, body: &str| {
        let answer = say(&api, &request(method, path, body.as_bytes()));
        assert!([200, 204].contains(&status(&answer)), "{method} {path}: {answer}");
    };
    let start = r#"{"action_type":"InstanceStart"}"#;
    refuses("PUT", "/snapshot/create", &create, "there is no VM yet");
    refuses("PATCH", "/vm", r#"{"state":"Paused"}"#, "there is no VM yet");
    refuses("PATCH", "/vm", r#"{"state":"Resumed"}"#, "there is no VM yet");
    refuses("PUT", "/actions", start, "boot-source is missing");
    refuses("PUT", "/actions", r#"{"action_type":"Explode"}"#, "Explode");
    refuses("PUT", "/machine-config", r#"{"vcpu_count":9}"#, "1 to 8");
    refuses("PUT", "/boot-source", "{}", "boot-source is missing");
    refuses("PUT", "/vsock", r#"{"guest_cid":2,"uds_path":"v"}"#, "guest_cid is 2");
    // Loads that fail leave nothing behind.
    let bad_load = |body: serde_json::Value, word: &str| refuses("PUT", "/snapshot/load", &body.to_string(), word);
    let given = &template.snapshot;
    bad_load(serde_json::json!({"snapshot_path": "none"}), "none");
    bad_load(serde_json::json!({"snapshot_path": given, "vsock_override": {"uds_path": "x".repeat(108)}}), "107 fit");
    bad_load(serde_json::json!({"snapshot_path": given, "vsock_override": {"uds_path": "a\u{0}"}}), "zero byte");
    bad_load(
        serde_json::json!({"snapshot_path": given, "mem_backend": {"backend_type": "File", "backend_path": "/dev/zero"}}),
        "/dev/zero",
    );
    bad_load(
        serde_json::json!({"snapshot_path": given, "mem_backend": {"backend_type": "Uffd", "backend_path": "u"}}),
        "cannot connect",
    );
    bad_load(
        serde_json::json!({"snapshot_path": given, "mem_backend": {"backend_type": "UffdShared", "backend_path": "u"}}),
        "cannot connect",
    );
    bad_load(serde_json::json!({"snapshot_path": given, "vcpu_count": 2}), "unknown field `vcpu_count`");
    bad_load(serde_json::json!({"snapshot_path": given, "mem_size_mib": 32}), "unknown field `mem_size_mib`");
    assert!(!vm.vsock.exists());
    accepts("PUT", "/snapshot/load", &load);
    refuses("PUT", "/snapshot/load", &load, "started already");
    refuses("PUT", "/actions", start, "started already");
    // A clone has the vCPUs, the memory and the devices of its snapshot; none grows, none is added later.
    for (path, body) in [
        ("/machine-config", r#"{"vcpu_count":2,"mem_size_mib":32}"#),
        ("/vsock", r#"{"guest_cid":4,"uds_path":"late"}"#),
        ("/drives/late", r#"{"drive_id":"late","path_on_host":"late"}"#),
        ("/entropy", "{}"),
        ("/balloon", r#"{"amount_mib":1}"#),
    ] {
        refuses("PUT", path, body, "started already");
    }
    accepts("PATCH", "/vm", r#"{"state":"Resumed"}"#);
    refuses("PUT", "/snapshot/create", r#"{"snapshot_path":"s","max_write_mib_s":0}"#, "max_write_mib_s");
    refuses("PUT", "/snapshot/cancel", "{}", "no snapshot is being written");
    refuses("PUT", "/snapshot/create", r#"{"snapshot_path":"s","mem_file_path":"s"}"#, "mem_file_path");
    template.facts.check(&mut vm.agent());
    vm.stop();

    let mut vm = waiting(place, "fresh");
    vm.api();
    accepts("PUT", "/boot-source", r#"{"embedded_guest":true}"#);
    refuses("PUT", "/snapshot/load", &load, "boot configuration was given already");
    accepts("PUT", "/machine-config", r#"{"mem_size_mib":16}"#);
    accepts("PUT", "/actions", start);
    refuses("PUT", "/actions", start, "started already");
    refuses("PUT", "/snapshot/load", &load, "started already");
    assert_eq!(vm.state(), InstanceState::Running);
    let done = vm.stop();
    no_panic(&done.stderr);
}

#[test]
fn a_boot_that_fails_leaves_nothing_and_can_be_tried_again() {
    require!(Kvm);
    let place = Place::new();
    let mut vm = waiting(&place, "fresh");
    vm.api();
    let (api, vsock) = (vm.api.clone(), vm.vsock.clone());
    let put = |path: &str, body: String| status(&say(&api, &request("PUT", path, body.as_bytes())));
    let start = r#"{"action_type":"InstanceStart"}"#;
    assert_eq!(put("/vsock", serde_json::json!({"guest_cid": 3, "uds_path": vsock}).to_string()), 204);
    let descriptors = tests::procfs::descriptors(vm.pid()).len();
    for _ in 0..5 {
        assert_eq!(put("/boot-source", r#"{"kernel_image_path":"/dev/zero"}"#.into()), 204);
        assert_eq!(put("/actions", start.into()), 400);
        assert!(!vm.vsock.exists());
    }
    tests::until("all descriptors are closed", || tests::procfs::descriptors(vm.pid()).len() <= descriptors);
    assert_eq!(put("/boot-source", r#"{"embedded_guest":true}"#.into()), 204);
    assert_eq!(put("/actions", start.into()), 204);
    assert_eq!(vm.agent().ping(1), 1);
    let done = vm.stop();
    no_panic(&done.stderr);
}

#[test]
fn clients_that_say_nothing_read_nothing_or_come_in_crowds_hold_nobody_up() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) = Boot::new(&place).memory_mib(16).ready("guest");
    let facts = Facts::gather(&mut agent, 1);
    let connect = || connect(&vm.api);
    let before = rss_kib(vm.process.pid());

    // One that asks and asks, and never reads.
    let mut deaf: UnixStream = connect();
    deaf.set_write_timeout(Some(Duration::from_millis(300))).expect("a socket takes a timeout");
    let asked = request("GET", "/vm/config", b"").repeat(200);
    for _ in 0..1000 {
        if deaf.write_all(&asked).is_err() {
            break;
        }
    }
    facts.check(&mut agent);
    // Pipelined, and read.
    let mut pipelined: UnixStream = connect();
    pipelined.write_all(&request("GET", "/version", b"").repeat(50)).expect("there is room");
    pipelined.shutdown(Shutdown::Write).expect("it is connected");
    let mut answers = String::new();
    pipelined.read_to_string(&mut answers).expect("it answers and closes");
    assert_eq!(answers.matches("HTTP/1.1 200 OK").count(), 50);

    // A crowd that says nothing, or half of something.
    let mut crowd: Vec<UnixStream> = (0..100).map(|_| connect()).collect();
    for half in crowd.iter_mut().step_by(2) {
        half.write_all(b"GET / HT").expect("there is room");
    }
    facts.check(&mut agent);
    let answer = say(&vm.api, &request("GET", "/", b""));
    assert_eq!(status(&answer), 200, "{answer}");
    drop(crowd);
    drop(deaf);

    // A crowd that asks at once.
    let asking: Vec<_> = (0..100)
        .map(|_| {
            let api = vm.api.clone();
            std::thread::spawn(move || status(&say(&api, &request("GET", "/", b""))))
        })
        .collect();
    for client in asking {
        assert_eq!(client.join().expect("it asked"), 200);
    }
    facts.check(&mut agent);
    let after = rss_kib(vm.process.pid());
    assert!(after < before + 8 * 1024, "it has grown from {before} to {after} KiB");
    assert_eq!(vm.state(), InstanceState::Running);
    let done = vm.stop();
    no_panic(&done.stderr);
}
