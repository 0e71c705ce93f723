//! What a guest sends to the host: frames of the agent protocol, read by a client that has asked something, and by the vsock
//! device, to which a guest announces that it is ready.
//!
//! The first byte of an input says what was asked; the rest is what the guest sends.

use api_spec::agent::linux::{
    Either, Exec, Exit, Failure, Part, Readiness, Response as Linux, Stream, decode_request, decode_response,
    encode_request, encode_response,
};
use api_spec::agent::{self, Envelope, GuestKind, HEADER_LEN, Info, Level, MAX_BODY, Refusal, Request, Response};
use api_spec::client::AgentClient;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use vmm::devices::virtio::vsock::ready::{Announcements, ReadySink};

/// Longest that anything may take. A guest that has sent everything has closed, so nothing takes long.
const PATIENCE: Duration = Duration::from_secs(5);

/// Reads what a guest sends.
pub fn check(data: &[u8]) {
    let Some((question, sent)) = data.split_first() else { return };
    announcements(sent);
    frames(sent);
    ask(*question, sent);
}

/// The same announcements are heard in whatever pieces they come.
fn announcements(sent: &[u8]) {
    let whole = heard([sent]);
    assert_eq!(heard(sent.chunks(1)), whole);
    assert!(whole.0 * HEADER_LEN <= sent.len());
}

/// How many announcements there are, and whether all bytes belong to some.
fn heard<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (usize, bool) {
    let (tell, heard) = std::sync::mpsc::channel();
    let mut sink: ReadySink = Box::new(move |level, kind| tell.send((level, kind)).unwrap_or_default());
    let mut announcements = Announcements::default();
    let right = pieces.into_iter().try_for_each(|piece| announcements.take(piece, &mut sink)).is_ok();
    (heard.try_iter().count(), right)
}

/// Each frame is what it is when it is written and read again.
fn frames(mut sent: &[u8]) {
    while let Some((header, rest)) = sent.split_first_chunk::<HEADER_LEN>() {
        let Ok(len) = agent::body_len(header) else { return };
        assert!(len <= MAX_BODY);
        let Some((body, rest)) = rest.split_at_checked(len) else { return };
        sent = rest;
        if let Ok(Envelope { id, body }) = decode_response(body) {
            let frame = encode_response(id, &body).expect("what was read can be written");
            assert_eq!(decode_response(&frame[HEADER_LEN..]), Ok(Envelope { id, body }));
        }
        if let Ok(Envelope { id, body }) = decode_request(body) {
            let frame = encode_request(id, &body).expect("what was read can be written");
            assert_eq!(decode_request(&frame[HEADER_LEN..]), Ok(Envelope { id, body }));
        }
    }
}

/// A client that asks gets an answer or an error, and has read no more than was sent.
fn ask(question: u8, sent: &[u8]) {
    let (near, mut far) = UnixStream::pair().expect("there are descriptors");
    far.set_nonblocking(true).expect("a socket can be made not to block");
    // What does not fit is not sent.
    let _ = far.write(sent).and_then(|_| far.shutdown(Shutdown::Write));
    let mut client = AgentClient::over(near, PATIENCE);
    let exec = Exec { argv: vec!["true".into()], stdin: true, ..Exec::default() };
    let mut output = Vec::new();
    let _ = match question % 7 {
        0 => client.call(Request::Info).map(drop),
        1 => client.run(&exec, b"input", Instant::now() + PATIENCE).map(|done| {
            output = [done.stdout, done.stderr].concat();
        }),
        2 => client.get("/etc/hostname", &mut output).map(drop),
        3 => client.put("/etc/hostname", 0o644, 3, &mut &b"abc"[..]),
        4 => client.readiness().map(drop),
        5 => client.trim().map(drop),
        _ => client.pre_snapshot(),
    };
    assert!(output.len() <= sent.len(), "more was read than was sent");
    // A connection on which something went wrong may be used again.
    let _ = client.call(Request::Ping { token: 1 });
}

/// What a guest answers to each question.
pub fn seeds() -> Vec<Vec<u8>> {
    let frame = |id, response| encode_response(id, &response).expect("these are short");
    let common = |response| frame(1, Either::Common(response));
    let linux = |response| frame(1, Either::Linux(response));
    let info = Info { kind: GuestKind::Embedded, vcpus: 1, pages: 7, pages_base: 1 << 20 };
    let readiness = Readiness { level: Level::Degraded, failed: vec!["ssh.service".into()] };
    let output = |stream| linux(Linux::Output { stream, data: b"some output".to_vec() });
    let ready = frame(0, Either::Common(Response::Ready { level: Level::Full, kind: GuestKind::Linux }));
    let ping = encode_request(2, &Either::Common(Request::Ping { token: 1 })).expect("this is short");
    vec![
        [vec![0], common(Response::Info(info)), frame(2, Either::Common(Response::Pong { token: 1 })), ping].concat(),
        [
            vec![1],
            linux(Linux::Started { exec: 1, pid: 2 }),
            output(Stream::Stdout),
            output(Stream::Stderr),
            linux(Linux::Exited(Exit::Code(0))),
        ]
        .concat(),
        [vec![2], linux(Linux::File { mode: 0o644, size: 11 }), output(Stream::File), linux(Linux::Done)].concat(),
        [vec![3], linux(Linux::Done), linux(Linux::Done)].concat(),
        [vec![4], linux(Linux::Readiness(readiness))].concat(),
        [vec![6], linux(Linux::Failed(Failure { part: Part::Hook, detail: "no".into() }))].concat(),
        [vec![0], frame(0, Either::Common(Response::Refused(Refusal::Busy)))].concat(),
        [vec![0], ready.clone(), ready].concat(),
        [vec![5], linux(Linux::Trimmed { free_kib: 4096 })].concat(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announcements_of_a_seed_are_heard() {
        assert_eq!(heard([&seeds()[7][1..]]), (2, true));
    }
}
