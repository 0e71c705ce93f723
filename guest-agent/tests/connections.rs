//! Bad connections, and many of them.

mod common;

use api_spec::agent::linux::{CHUNK, Either, Request as Linux, encode_request};
use api_spec::agent::{GuestKind, Refusal, Request, Response, VERSION};
use api_spec::client::agent::AgentError;
use common::{Agent, argv, eventually, soon};
use guest_agent::serve::MAX_CONNECTIONS;
use std::io::{Read, Write};

fn answers(agent: &Agent) -> bool {
    matches!(agent.connect().call(Request::Ping { token: 9 }), Ok(Response::Pong { token: 9 }))
}

#[test]
fn the_common_requests_are_answered_as_by_any_guest() {
    let agent = Agent::start();
    let mut client = agent.connect();
    assert_eq!(client.call(Request::Ping { token: 5 }).unwrap(), Response::Pong { token: 5 });
    let Ok(Response::Info(info)) = client.call(Request::Info) else { panic!("no info") };
    assert_eq!((info.kind, info.pages), (GuestKind::Linux, 0));
    assert!(info.vcpus >= 1);
    let mut random = || match client.call(Request::Random) {
        Ok(Response::Random(bytes)) => bytes,
        other => panic!("{other:?}"),
    };
    assert_ne!(random(), random());
    let nonce = client.call(Request::Nonce).unwrap();
    assert_eq!(agent.connect().call(Request::Nonce).unwrap(), nonce);
    let Ok(Response::Time { tsc, wall_ns }) = client.call(Request::Time) else { panic!("no time") };
    assert!(tsc > 0 && wall_ns > 1_700_000_000_000_000_000);
    for request in [Request::Ticks { advance: 0 }, Request::Burn { steps: 1 }, Request::BurnStop { vcpu: 1 }] {
        assert!(matches!(client.call(request), Err(AgentError::Refused(Refusal::NotHere))), "{request:?}");
    }
}

#[test]
fn it_answers_after_a_hundred_connections_were_reset() {
    let agent = Agent::start();
    assert!(answers(&agent));
    let before = agent.descriptors();
    let ping = encode_request(1, &Either::Common(Request::Ping { token: 1 })).unwrap();
    let exec = encode_request(1, &Either::Linux(Linux::Exec(argv(&["sleep", "1000"])))).unwrap();
    for round in 0..100 {
        let mut stream = agent.raw();
        match round % 4 {
            0 => {}
            1 => stream.write_all(&ping[..5]).unwrap(),
            // An unread answer makes closing a reset.
            2 => stream.write_all(&ping.repeat(3)).unwrap(),
            _ => stream.write_all(&exec).unwrap(),
        }
        drop(stream);
        assert!(answers(&agent), "after {round}");
    }
    eventually("nothing is left", || agent.children() == 0 && agent.descriptors() <= before);
}

#[test]
fn garbage_closes_its_own_connection_only() {
    let agent = Agent::start();
    let mut good = agent.connect();
    let version = VERSION as u8;
    for garbage in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0xff; 64],
        &[0, 0, 0, 0, 2, 0, 0, 0],
        &[1, 0, 1, 0, version, 0, 0, 0, 0],
        &[2, 0, 0, 0, version, 0, 0, 0, 1, 99],
        &[3, 0, 0, 0, version, 0, 0, 0, 1, 17, 99],
        &[0, 0, 0, 0, version, 0, 0, 0],
    ] {
        let mut stream = agent.raw();
        stream.write_all(garbage).unwrap();
        let mut rest = Vec::new();
        let end = stream.read_to_end(&mut rest);
        // Bytes that were not read any more make closing a reset.
        assert!(end.is_ok() || end.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionReset), "{garbage:?}");
        assert!(rest.is_empty(), "{garbage:?}");
        assert!(good.call(Request::Ping { token: 1 }).is_ok());
    }
}

#[test]
fn data_of_no_conversation_is_dropped() {
    let agent = Agent::start();
    let mut stream = agent.raw();
    for _ in 0..20 {
        stream.write_all(&encode_request(7, &Either::Linux(Linux::Data(vec![1; CHUNK]))).unwrap()).unwrap();
    }
    let mut client = api_spec::client::AgentClient::over(stream, common::PATIENCE);
    assert!(client.call(Request::Ping { token: 1 }).is_ok());
}

#[test]
fn connections_beyond_the_limit_are_told_so() {
    let agent = Agent::start();
    eventually("only idle", || answers(&agent));
    let mut open = Vec::new();
    let refused = loop {
        let mut client = agent.connect();
        match client.call(Request::Ping { token: 1 }) {
            Ok(_) => open.push(client),
            Err(e) => break e,
        }
        assert!(open.len() <= MAX_CONNECTIONS);
    };
    // Told, or cut off before the request was sent whole.
    assert!(matches!(refused, AgentError::Refused(Refusal::Busy) | AgentError::Io(_)), "{refused}");
    for client in &mut open {
        assert!(client.call(Request::Ping { token: 1 }).is_ok());
    }
    drop(open);
    eventually("there is room again", || answers(&agent));
    let finished = agent.connect().run(&argv(&["true"]), b"", soon());
    assert!(finished.is_ok());
}
