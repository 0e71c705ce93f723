//! Thousands of requests that no client should make, against a vmm whose guest runs: each is refused in the documented
//! form or, if it is none yet, not answered; slow ones are cut off; and neither the guest nor the vmm is any the worse.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::vm::InstanceState;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::path::Path;
use std::thread;
use std::time::Duration;
use tests::http::{answers, connect, hear, request, say_in_pieces};
use tests::template::Facts;
use tests::{Boot, PATIENCE, Place, Random, procfs, require, until};

/// The first seed; each case has one of its own, which is named if the case fails.
const SEED: u64 = 20_000;
/// Cases of each kind.
const CASES: u64 = 250;
/// Documented statuses of a request that is not understood or not legal.
const REFUSALS: [u16; 8] = [400, 404, 405, 408, 413, 417, 431, 501];
/// How much the vmm may have grown, in KiB.
const GROWTH_KIB: u64 = 8 * 1024;

/// What is sent, and what must come of it.
struct Case {
    bytes: Vec<u8>,
    /// How many requests it is.
    requests: usize,
    /// The status of the last answer; none, if what is sent is only the beginning of a request.
    last: Option<&'static [u16]>,
}

/// Makes a case of some kind.
type Make = fn(&mut Random) -> Case;

fn case(last: u16, bytes: Vec<u8>) -> Case {
    let at = REFUSALS.iter().position(|status| *status == last).expect("a status that is documented");
    Case { bytes, requests: 1, last: Some(&REFUSALS[at..=at]) }
}

/// What is legal at other times, or with another device: none of these may be accepted by a guest that runs.
const ILLEGAL: [(&str, &str, &str); 14] = [
    ("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#),
    ("PUT", "/boot-source", r#"{"embedded_guest":true}"#),
    ("PUT", "/boot-source", r#"{"kernel_image_path":"/dev/zero"}"#),
    ("PUT", "/machine-config", r#"{"vcpu_count":2,"mem_size_mib":64}"#),
    ("PUT", "/vsock", r#"{"guest_cid":4,"uds_path":"late"}"#),
    ("PUT", "/drives/late", r#"{"drive_id":"late","path_on_host":"late"}"#),
    ("PATCH", "/drives/late", r#"{"drive_id":"late","max_overlay_mib":9}"#),
    ("PUT", "/network-interfaces/late", r#"{"iface_id":"late","host_dev_name":"late"}"#),
    ("PUT", "/entropy", "{}"),
    ("PUT", "/balloon", r#"{"amount_mib":1}"#),
    ("PATCH", "/balloon", r#"{"amount_mib":1}"#),
    ("PATCH", "/balloon/statistics", r#"{"stats_polling_interval_s":1}"#),
    ("PUT", "/snapshot/load", r#"{"snapshot_path":"none"}"#),
    ("GET", "/balloon/statistics", ""),
];

/// Fields, with what they are not.
const WRONG: [(&str, &str, &str, &[&str]); 9] = [
    ("PATCH", "/vm", "state", &["1", "null", "true", "[]", "{}", "\"\"", "\"paused\"", "\"Paused \"", "[\"Paused\"]"]),
    (
        "PATCH",
        "/machine-config",
        "max_private_mib",
        &["-1", "1.5", "1e400", "\"1\"", "[1]", "{}", "18446744073709551616"],
    ),
    ("PUT", "/machine-config", "vcpu_count", &["-1", "256", "\"1\"", "null", "1.0", "[]"]),
    ("PUT", "/snapshot/create", "snapshot_path", &["1", "null", "{}", "[[]]", "true", "\"\\u0000\"", "\"\\ud800\""]),
    ("PUT", "/snapshot/load", "snapshot_path", &["1", "null", "{}", "[\"a\"]"]),
    ("PUT", "/boot-source", "boot_args", &["1", "{}", "[\"a\"]", "\"\u{1}\""]),
    ("PUT", "/vsock", "guest_cid", &["-1", "\"3\"", "4294967296", "null", "{}"]),
    ("PUT", "/drives/a", "drive_id", &["1", "null", "\"b\"", "{}"]),
    (
        "PUT",
        "/actions",
        "action_type",
        &["1", "null", "\"instancestart\"", "[\"InstanceStart\"]", "{\"InstanceStart\":1}"],
    ),
];

fn illegal(random: &mut Random) -> (&'static str, &'static str, &'static str) {
    ILLEGAL[random.below(ILLEGAL.len() as u64) as usize]
}

/// The beginning of a request.
fn truncated(random: &mut Random) -> Case {
    let (method, path, body) = illegal(random);
    let mut bytes = if body.is_empty() || random.below(2) == 0 {
        request(method, path, body.as_bytes())
    } else {
        chunked(method, path, body.as_bytes(), random)
    };
    bytes.truncate(random.below(bytes.len() as u64) as usize);
    Case { bytes, requests: 1, last: None }
}

fn chunked(method: &str, path: &str, body: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = format!("{method} {path} HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n").into_bytes();
    for chunk in body.chunks(1 + body.len() / (1 + random.below(20) as usize)) {
        bytes.extend(format!("{:x};x\r\n", chunk.len()).bytes());
        bytes.extend([chunk, b"\r\n"].concat());
    }
    [&bytes[..], b"0\r\nX: y\r\n\r\n"].concat()
}

/// More of something than there may be.
fn oversized(random: &mut Random) -> Case {
    let much = 8 * 1024 + random.below(8 * 1024) as usize;
    let too_large = 51_201 + random.below(1 << 40);
    let head = |headers: String| format!("PUT /vm HTTP/1.1\r\n{headers}\r\n\r\n").into_bytes();
    match random.below(9) {
        0 => case(431, head(format!("X: {}", "y".repeat(much)))),
        1 => case(431, head(format!("{}: x", "y".repeat(much)))),
        2 => case(431, head("X: y\r\n".repeat(65 + much % 200).trim_end().to_owned())),
        3 => case(431, format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(much)).into_bytes()),
        4 => case(413, head(format!("Content-Length: {too_large}"))),
        5 => case(413, request("PUT", "/vm", &vec![b' '; 51_201 + much])),
        6 => case(413, head(format!("Transfer-Encoding: chunked\r\n\r\n1\r\n{{\r\n{too_large:x}"))),
        7 => case(431, head(format!("Transfer-Encoding: chunked\r\n\r\n1;{}", "x".repeat(much + 20)))),
        _ => case(413, chunked("PUT", "/vm", &vec![b' '; 51_201], random)),
    }
}

/// Bytes that are no UTF-8 where there should be text.
fn not_text(random: &mut Random) -> Case {
    let bad = random.of(&[&b"\xff"[..], b"\xc3(", b"\xe2\x82", b"\xf0\x28\x8c\x28", b"\xed\xa0\x80", b"\xc0\x80"]);
    let escaped: String = bad.iter().map(|byte| format!("%{byte:02x}")).collect();
    let around = |before: &str, after: &str| [before.as_bytes(), bad, after.as_bytes()].concat();
    match random.below(6) {
        0 => case(400, around("GET /", " HTTP/1.1\r\n\r\n")),
        1 => case(400, format!("GET /{escaped} HTTP/1.1\r\n\r\n").into_bytes()),
        2 => case(400, around("GET / HTTP/1.1\r\nContent-Length: ", "\r\n\r\n")),
        3 => case(501, around("GET / HTTP/1.1\r\nTransfer-Encoding: ", "\r\n\r\n")),
        4 => case(400, request("PATCH", "/vm", &around(r#"{"state":"#, "\"}"))),
        _ => case(400, request("PUT", "/snapshot/create", &around(r#"{"snapshot_path":"x"#, "\"}"))),
    }
}

/// Documents that say the wrong thing.
fn wrong(random: &mut Random) -> Case {
    let (method, path, field, values) = WRONG[random.below(WRONG.len() as u64) as usize];
    let value = random.of(values);
    let body = match random.below(6) {
        0 => value.to_owned(),
        1 => format!("{{\"{field}\":{value},\"{field}\":{value}}}"),
        2 => format!("{{\"{field}_\":{value}}}"),
        3 => format!("{{\"{field}\":{value}"),
        _ => format!("{{\"{field}\":{value}}}"),
    };
    case(400, request(method, path, body.as_bytes()))
}

/// Documents within documents.
fn nested(random: &mut Random) -> Case {
    let (method, path, field, _) = WRONG[random.below(WRONG.len() as u64) as usize];
    let depth = 100 + random.below(8000) as usize;
    let (open, close) = if random.below(2) == 0 { ("[", "]") } else { ("{\"a\":", "}") };
    let inner = match random.below(3) {
        0 => open.repeat(depth),
        1 => format!("{}{}", open.repeat(depth), close.repeat(depth)),
        _ => format!("{}1{}", open.repeat(depth), close.repeat(depth)),
    };
    let body = if random.below(2) == 0 { inner } else { format!("{{\"{field}\":{inner}}}") };
    case(if body.len() > 51_200 { 413 } else { 400 }, request(method, path, body.as_bytes()))
}

/// Requests one after the other, and something that is none.
fn pipelined(random: &mut Random) -> Case {
    let before = 1 + random.below(6) as usize;
    let mut bytes = Vec::new();
    for _ in 0..before {
        let (method, path, body) = illegal(random);
        bytes.extend(request(method, path, body.as_bytes()));
    }
    let garbage = random.of(&[
        &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"[..],
        b"GET",
        b"{\"state\":\"Paused\"}\r\n\r\n",
        b"PATCH /vm HTTP/1.1\r\nContent-Length: 18\r\nTransfer-Encoding: chunked\r\n\r\n{\"state\":\"Paused\"}",
        b"PATCH /vm HTTP/1.1\r\nContent-Length : 18\r\n\r\n{\"state\":\"Paused\"}",
        b"PATCH /vm HTTP/1.1\r\nX: y\r\n Content-Length: 18\r\n\r\n{\"state\":\"Paused\"}",
        b"PATCH /vm HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n12\r\n{\"state\":\"Paused\"}\r\n0\r\n\r\n",
        b"PATCH /vm HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n12\n{\"state\":\"Paused\"}\n0\n\n",
        b"PATCH /vm HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0x12\r\n{\"state\":\"Paused\"}\r\n0\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ]);
    Case { bytes: [&bytes[..], garbage].concat(), requests: before + 1, last: Some(&[400]) }
}

/// Requests that are well-formed, in an order that makes no sense.
fn out_of_order(random: &mut Random) -> Case {
    let (method, path, body) = illegal(random);
    match random.below(5) {
        0 => case(
            405,
            request(random.of(&["DELETE", "POST", "OPTIONS", "get", "Q"]), path.trim_end_matches("late"), b""),
        )
        .unless(path.ends_with("late"), 404),
        1 => case(404, request(method, &format!("{path}/x"), body.as_bytes())),
        2 => case(400, chunked(method, path, body.as_bytes(), random)),
        _ => case(400, request(method, path, body.as_bytes())),
    }
}

impl Case {
    fn unless(self, otherwise: bool, last: u16) -> Self {
        if otherwise { case(last, self.bytes) } else { self }
    }
}

/// A request that is refused anyway, with some bytes changed, left out, doubled or put in.
fn damaged(random: &mut Random) -> Case {
    let (method, path, body) = illegal(random);
    let mut bytes = request(method, path, body.as_bytes());
    for _ in 0..1 + random.below(6) {
        let at = random.below(bytes.len() as u64) as usize;
        match random.below(4) {
            0 => bytes[at] = random.next() as u8,
            1 => bytes.insert(at, *random.of(&[&b'\r', &b'\n', &b' ', &b'%', &0, &b'"'])),
            2 => bytes.insert(at, bytes[at]),
            _ => drop(bytes.remove(at)),
        }
    }
    Case { bytes, requests: 1, last: Some(&REFUSALS) }
}

/// Sends a case in pieces and judges what comes of it.
fn judge(api: &Path, case: &Case, damaged: bool, random: &mut Random, name: &str) {
    let mut rest = &case.bytes[..];
    let mut pieces = Vec::new();
    while !rest.is_empty() {
        let most = if random.below(2) == 0 { rest.len() } else { 1 + rest.len() / 4 };
        let (piece, later) = rest.split_at(1 + random.below(most as u64) as usize);
        pieces.push(piece);
        rest = later;
    }
    let said = say_in_pieces(api, pieces);
    let shown = || format!("{name}: {:?}: {said}", String::from_utf8_lossy(&case.bytes[..case.bytes.len().min(300)]));
    let heard = answers(&said);
    for answer in &heard {
        let refused = REFUSALS.contains(&answer.status) && answer.fault().is_some_and(|words| words.len() > 10);
        assert!(refused && answer.header("x-request-id").is_some(), "{}", shown());
    }
    match (case.last, heard.last()) {
        // What is damaged may be the beginning of a request, or two.
        (Some(last), answer) if damaged => {
            assert!(answer.is_none_or(|answer| last.contains(&answer.status)), "{}", shown());
        }
        (Some(last), Some(answer)) => {
            assert!(last.contains(&answer.status) && heard.len() <= case.requests, "{}", shown());
        }
        (last, answer) => assert!(last.is_none() && answer.is_none(), "{}", shown()),
    }
}

/// Ways to begin a request and never to finish it: what is said at first, and what again and again.
const SLOW: [(&str, &str); 5] = [
    ("", "G"),
    ("GET / HTTP/1.1\r\nX: ", "y"),
    ("PUT /vm HTTP/1.1\r\nContent-Length: 51200\r\n\r\n", " "),
    ("PUT /vm HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", "1\r\n \r\n"),
    ("GET / HTTP/1.1\r\n", ""),
];

/// One who never comes to the end is told so and sent away.
fn be_slow(api: &Path, (first, again): (&str, &str)) {
    const PAUSE: Duration = Duration::from_millis(50);
    let mut stream = connect(api);
    let _ = stream.write_all(first.as_bytes());
    stream.set_read_timeout(Some(PAUSE)).expect("a socket takes a timeout");
    let mut said = [0];
    // The answer comes whether or not more is said.
    until("the API has had enough", || {
        let _ = stream.write_all(again.as_bytes());
        stream.read(&mut said).is_ok()
    });
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket takes a timeout");
    let said = format!("{}{}", said[0] as char, hear(&mut stream));
    let heard = answers(&said);
    let told = |words: String| words.contains("not complete within");
    assert!(heard.len() == 1 && heard[0].status == 408 && heard[0].fault().is_some_and(told), "{first:?}: {said}");
}

/// One who asks, and never listens, is sent away.
fn be_deaf(api: &Path) {
    let mut stream = connect(api);
    stream.set_write_timeout(Some(Duration::from_millis(50))).expect("a socket takes a timeout");
    let asked = request("GET", "/vm/config", b"").repeat(50);
    until("the API has had enough", || match stream.write(&asked) {
        Ok(_) => false,
        Err(e) => e.kind() == std::io::ErrorKind::BrokenPipe || e.kind() == std::io::ErrorKind::ConnectionReset,
    });
    let _ = stream.shutdown(Shutdown::Both);
}

#[test]
fn thousands_of_requests_that_nobody_should_make_change_nothing() {
    require!(Kvm);
    let place = Place::new();
    let (mut vm, mut agent) = Boot::new(&place).memory_mib(16).ready("guest");
    let facts = Facts::gather(&mut agent, 1);
    let (api, pid) = (vm.api.clone(), vm.pid());
    let config: serde_json::Value = vm.api().get("/vm/config").expect("it has one");
    let descriptors = procfs::descriptors(pid).len();

    // They are in the middle of something all the while.
    let slow: Vec<_> = SLOW.iter().chain(&SLOW).map(|how| (api.clone(), *how)).collect();
    let mut slow: Vec<_> = slow.into_iter().map(|(api, how)| thread::spawn(move || be_slow(&api, how))).collect();
    let deaf = api.clone();
    slow.push(thread::spawn(move || be_deaf(&deaf)));

    let kinds: [(&str, Make); 8] = [
        ("truncated", truncated),
        ("oversized", oversized),
        ("not text", not_text),
        ("wrong", wrong),
        ("nested", nested),
        ("pipelined", pipelined),
        ("out of order", out_of_order),
        ("damaged", damaged),
    ];
    let mut requests = slow.len();
    let mut grown_from = None;
    for (nth, (kind, make)) in kinds.into_iter().enumerate() {
        for seed in (SEED + nth as u64 * CASES..).take(CASES as usize) {
            let mut random = Random::new(seed);
            let case = make(&mut random);
            judge(&api, &case, kind == "damaged", &mut random, &format!("{kind}, seed {seed}"));
            requests += case.requests;
        }
        facts.check(&mut agent);
        vm.process.check_alive();
        // Buffers have their size by now.
        grown_from.get_or_insert_with(|| procfs::rss_kib(pid));
    }
    for client in slow {
        client.join().expect("it was sent away");
    }
    assert!(requests >= 2000, "{requests} requests");

    until("all descriptors are closed", || procfs::descriptors(pid).len() <= descriptors);
    let (before, after) = (grown_from.unwrap_or_default(), procfs::rss_kib(pid));
    assert!(after < before + GROWTH_KIB, "it has grown from {before} to {after} KiB");
    facts.check(&mut agent);
    let now: serde_json::Value = vm.api().get("/vm/config").expect("it has one");
    assert_eq!(now, config);
    assert_eq!(vm.state(), InstanceState::Running);
    let done = vm.stop();
    assert!(!done.stderr.contains("panicked"), "{}", done.stderr);
}
