//! Files to and from the host.

mod common;

use api_spec::agent::linux::{CHUNK, Either, Request, encode_request};
use api_spec::client::AgentClient;
use api_spec::client::agent::AgentError;
use common::{Agent, eventually};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

fn put(client: &mut AgentClient, path: &Path, mode: u32, size: u64, mut bytes: &[u8]) -> Result<(), AgentError> {
    client.put(path.to_str().unwrap(), mode, size, &mut bytes)
}

fn get(client: &mut AgentClient, path: &Path) -> Result<(u32, Vec<u8>), AgentError> {
    let mut content = Vec::new();
    let mode = client.get(path.to_str().unwrap(), &mut content)?;
    Ok((mode, content))
}

fn detail(result: Result<impl Sized, AgentError>) -> String {
    match result.map(|_| ()) {
        Err(AgentError::Failed(failure)) => failure.detail,
        other => panic!("{other:?}"),
    }
}

fn names(dir: &Path) -> Vec<String> {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn files_go_there_and_back() {
    let agent = Agent::start();
    let mut client = agent.connect();
    for (name, size) in [("empty", 0), ("small", 3), ("exact", 2 * CHUNK), ("large", 1_000_003)] {
        let path = agent.path(name);
        let content: Vec<u8> = (0..size).map(|i| (i * 31 % 251) as u8).collect();
        put(&mut client, &path, 0o640, size as u64, &content).unwrap();
        assert!(fs::read(&path).unwrap() == content, "{name}");
        let (mode, back) = get(&mut client, &path).unwrap();
        assert!(back == content && mode == 0o640, "{name}");
    }
}

#[test]
fn a_file_is_there_whole_or_as_before() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let dir = agent.path("files");
    fs::create_dir(&dir).unwrap();
    let path = dir.join("file");
    put(&mut client, &path, 0o600, 3, b"old").unwrap();
    assert!(detail(put(&mut client, &path, 0o600, 5, b"new")).ends_with("2 bytes are missing"));
    assert!(detail(put(&mut client, &path, 0o600, 2, b"new")).ends_with("more came than was said"));

    // A connection that breaks half-way.
    let mut stream = agent.raw();
    let put_request = Request::Put { path: path.to_str().unwrap().into(), mode: 0o600, size: 100 };
    stream.write_all(&encode_request(1, &Either::Linux(put_request)).unwrap()).unwrap();
    stream.read_exact(&mut [0; 1]).unwrap();
    stream.write_all(&encode_request(1, &Either::Linux(Request::Data(vec![1; 50]))).unwrap()).unwrap();
    eventually("the draft is there", || names(&dir).len() == 2);
    drop(stream);
    eventually("the draft is gone", || names(&dir).len() == 1);

    assert_eq!(fs::read(&path).unwrap(), b"old");
    put(&mut client, &path, 0o755, 3, b"new").unwrap();
    assert_eq!(get(&mut client, &path).unwrap(), (0o755, b"new".to_vec()));
    assert_eq!(names(&dir), ["file"]);
}

#[test]
fn a_link_is_replaced_and_not_followed() {
    let agent = Agent::start();
    let (target, link) = (agent.path("target"), agent.path("link"));
    fs::write(&target, "untouched").unwrap();
    symlink(&target, &link).unwrap();
    put(&mut agent.connect(), &link, 0o600, 3, b"new").unwrap();
    assert_eq!(fs::read(&target).unwrap(), b"untouched");
    assert!(fs::symlink_metadata(&link).unwrap().is_file());
}

#[test]
fn a_file_that_cannot_be_made_is_told_and_the_connection_goes_on() {
    let agent = Agent::start();
    let mut client = agent.connect();
    // No file can be made in there.
    let denied = Path::new("/proc/coppice");
    assert!(detail(put(&mut client, denied, 0o600, 3, b"abc")).starts_with("`/proc/coppice`: "));
    assert!(client.call(api_spec::agent::Request::Ping { token: 1 }).is_ok());
}

#[test]
fn what_names_no_file_is_refused() {
    let agent = Agent::start();
    let mut client = agent.connect();
    let dir = agent.path("dir");
    fs::create_dir(&dir).unwrap();
    for path in ["relative", "", "/", "/tmp/..", &format!("{}/", dir.display()), "/no/such/dir/file", "/tmp/a\0b"] {
        detail(client.put(path, 0o600, 0, &mut &b""[..]));
    }
    assert!(detail(put(&mut client, &dir, 0o600, 0, b"")).contains("is a directory"));
    for path in ["relative", "", "/no/such/file", dir.to_str().unwrap(), "/dev/zero"] {
        detail(client.get(path, &mut Vec::new()));
    }
    let fifo = agent.path("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    assert!(detail(get(&mut client, &fifo)).ends_with("it is no regular file"));
    assert!(fs::metadata(&fifo).unwrap().permissions().mode() & 0o777 != 0);
}

#[test]
fn files_that_the_kernel_makes_up_are_read_to_their_end() {
    let agent = Agent::start();
    let (_, content) = get(&mut agent.connect(), Path::new("/proc/version")).unwrap();
    assert!(content.starts_with(b"Linux version"));
}
