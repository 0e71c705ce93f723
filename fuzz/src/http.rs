//! What a client sends to the REST API: requests of HTTP, in pieces, and the documents in them.
//!
//! The last byte of an input says where the bytes before it are cut.

use vmm::api::http::{Limits, Message, Parsed, Parser};
use vmm::api::router::route;

/// Reads requests.
pub fn check(data: &[u8]) {
    let Some((cut, sent)) = data.split_last() else { return };
    let whole = parse([sent]);
    assert_eq!(parse(sent.chunks(1 + usize::from(*cut) % 64)), whole, "the same in other pieces");
    for message in &whole.messages {
        assert!(message.body.len() <= Limits::default().max_body);
        let mut again = parse([&written(message)[..]]);
        assert_eq!((again.messages.pop().as_ref(), again.refused), (Some(message), None), "what was read comes back");
        if let Err(refused) = route(message) {
            assert!((400..500).contains(&refused.status), "{refused:?} to {message:?}");
        }
    }
}

/// What some bytes are.
#[derive(Debug, PartialEq, Eq)]
struct Read {
    messages: Vec<Message>,
    /// With which status what comes then was refused.
    refused: Option<u16>,
    /// Whether a part of a request is left.
    left: bool,
}

fn parse<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Read {
    let (mut parser, mut messages) = (Parser::new(Limits::default()), Vec::new());
    for piece in pieces {
        parser.push(piece);
        loop {
            match parser.parse() {
                Parsed::Partial { .. } => break,
                Parsed::Complete(message) => messages.push(message),
                Parsed::Bad(status, reason) => {
                    assert!((400..=501).contains(&status) && !reason.is_empty());
                    return Read { messages, refused: Some(status), left: false };
                }
            }
        }
    }
    Read { messages, refused: None, left: !parser.is_empty() }
}

/// The request in other bytes: all of its path escaped, and its body in one chunk.
fn written(message: &Message) -> Vec<u8> {
    let Message { method, path, query, body, keep_alive } = message;
    let path: String = path.bytes().map(|byte| format!("%{byte:02x}")).collect();
    let path = path.replace("%2f", "/");
    let query = query.as_ref().map(|query| format!("?{query}")).unwrap_or_default();
    let connection = if *keep_alive { "keep-alive" } else { "close" };
    let head =
        format!("{method} {path}{query} HTTP/1.1\r\nConnection: {connection}\r\nTransfer-Encoding: chunked\r\n\r\n");
    let chunk = match body.len() {
        0 => Vec::new(),
        length => [format!("{length:x}\r\n").as_bytes(), body, b"\r\n"].concat(),
    };
    [head.as_bytes(), &chunk, b"0\r\n\r\n"].concat()
}

/// A request of every kind, in either framing.
pub fn seeds() -> Vec<Vec<u8>> {
    const CALLS: [(&str, &str, &str); 16] = [
        ("GET", "/", ""),
        ("GET", "/vm/memory-map?start=4096&max_runs=7", ""),
        ("PUT", "/machine-config", r#"{"vcpu_count":2,"mem_size_mib":64,"track_dirty_pages":false}"#),
        ("PATCH", "/machine-config", r#"{"mem_size_mib":256}"#),
        ("PUT", "/boot-source", r#"{"kernel_image_path":"k","initrd_path":null,"boot_args":"quiet"}"#),
        (
            "PUT",
            "/drives/root",
            r#"{"drive_id":"root","path_on_host":"r.img","is_root_device":true,"is_read_only":false,"cache_type":"Unsafe","rate_limiter":{"bandwidth":{"size":1,"one_time_burst":2,"refill_time":3}}}"#,
        ),
        ("PATCH", "/drives/root", r#"{"drive_id":"root","rate_limiter":{"ops":{"size":1,"refill_time":3}}}"#),
        (
            "PUT",
            "/network-interfaces/eth0",
            r#"{"iface_id":"eth0","host_dev_name":"tap0","guest_mac":"06:00:00:00:00:01"}"#,
        ),
        ("PUT", "/vsock", r#"{"guest_cid":3,"uds_path":"v.sock"}"#),
        ("PUT", "/balloon", r#"{"amount_mib":1,"deflate_on_oom":true,"stats_polling_interval_s":1}"#),
        ("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#),
        ("PATCH", "/vm", r#"{"state":"Paused"}"#),
        ("PUT", "/snapshot/create", r#"{"snapshot_type":"Full","snapshot_path":"s","mem_file_path":"m"}"#),
        (
            "PUT",
            "/snapshot/load",
            r#"{"snapshot_path":"s","mem_backend":{"backend_type":"Uffd","backend_path":"u"},"resume_vm":true,"network_overrides":[{"iface_id":"eth0","host_dev_name":"t"}]}"#,
        ),
        ("PUT", "/logger", r#"{"log_path":"l","level":"Info","show_level":true}"#),
        ("PUT", "/metrics", r#"{"metrics_path":"m"}"#),
    ];
    let sized = CALLS.map(|(method, path, body)| {
        let length = body.len();
        format!("{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{body}\u{5}").into_bytes()
    });
    let others = [
        "PUT /vsock HTTP/1.1\r\nExpect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n1;x=y\r\n{\r\n1\r\n}\r\n0\r\nX: y\r\n\r\n\u{1}",
        "GET http://localhost/%76m/stats HTTP/1.0\r\nConnection: keep-alive\r\n\r\n\r\nGET / HTTP/1.1\r\n\r\n\u{9}",
    ];
    sized.into_iter().chain(others.map(Into::into)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_requests_that_are_understood() {
        for seed in seeds() {
            let read = parse([&seed[..seed.len() - 1]]);
            assert!(!read.messages.is_empty() && read.refused.is_none() && !read.left, "{read:?}");
        }
        for seed in &seeds()[..16] {
            let message = &parse([&seed[..seed.len() - 1]]).messages[0];
            assert!(route(message).is_ok(), "{:?}", route(message));
        }
    }
}
