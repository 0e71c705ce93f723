//! What becomes of a page server when one of its threads makes a system call that its table does not have.
// UNSAFETY: the tests make system calls that have no safe form, or none that would let them be forbidden.
#![allow(unsafe_code)]

use std::process::{Command, Output};
use uffd_handler::sandbox::{Kind, confine, start};

/// Tells a child of these tests what it is to do.
const PART: &str = "COPPICE_SANDBOX_TEST";
/// What the process ends with.
const TRAPPED: i32 = 148;

const INET: [i64; 3] = [libc::AF_INET as i64, libc::SOCK_STREAM as i64, 0];
const UNIX: [i64; 3] = [libc::AF_UNIX as i64, libc::SOCK_STREAM as i64, 0];
const EXECUTABLE: [i64; 6] = [0, 4096, libc::PROT_EXEC as i64, (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as i64, -1, 0];

/// What is to be done by a child, by name: as which kind of thread, and whether the page server has snapshots from elsewhere.
fn part(name: &str) -> (Option<Kind>, bool, i64, [i64; 6]) {
    let three = |[a, b, c]: [i64; 3]| [a, b, c, 0, 0, 0];
    match name {
        "execve" => (None, true, libc::SYS_execve, [0; 6]),
        "kvm" => (None, true, libc::SYS_ioctl, [-1, 0xae80, 0, 0, 0, 0]),
        "network" => (None, false, libc::SYS_socket, three(INET)),
        "network from elsewhere" => (None, true, libc::SYS_socket, three(INET)),
        "packets from elsewhere" => {
            (None, true, libc::SYS_socket, [libc::AF_PACKET as i64, libc::SOCK_RAW as i64, 0, 0, 0, 0])
        }
        "code" => (None, false, libc::SYS_mmap, EXECUTABLE),
        "code from elsewhere" => (None, true, libc::SYS_mmap, EXECUTABLE),
        "socket" => (None, false, libc::SYS_socket, three(UNIX)),
        "socket of memory" => (Some(Kind::Memory), false, libc::SYS_socket, three(UNIX)),
        "unlink of memory" => (Some(Kind::Memory), false, libc::SYS_unlink, [0; 6]),
        "socket of a writer" => (Some(Kind::Writer), false, libc::SYS_socket, three(UNIX)),
        "unlink of a writer" => (Some(Kind::Writer), false, libc::SYS_unlink, [0; 6]),
        other => panic!("{other}"),
    }
}

/// Does its part in a thread of its own, if this is a child.
#[test]
fn child() {
    let Ok(name) = std::env::var(PART) else { return };
    let (kind, remote, number, [a, b, c, d, e, f]) = part(&name);
    start(remote).expect("filters can be installed");
    let work = move || {
        kind.into_iter().for_each(confine);
        // SAFETY: these calls fail for their arguments, or make what nobody uses.
        unsafe { libc::syscall(number, a, b, c, d, e, f) };
    };
    std::thread::Builder::new().name("tested".into()).spawn(work).unwrap().join().unwrap();
}

fn run(name: &str) -> Output {
    let program = std::env::current_exe().expect("a process can find its own program");
    let mut command = Command::new(program);
    command.args(["--exact", "child", "--nocapture"]).env(PART, name);
    command.output().expect("a program can be started")
}

#[test]
fn a_forbidden_call_ends_the_process_and_is_named() {
    for (part, call) in [
        ("execve", "execve (59)"),
        ("kvm", "ioctl (16)"),
        ("network", "socket (41)"),
        ("packets from elsewhere", "socket (41)"),
        ("code", "mmap (9)"),
        ("code from elsewhere", "mmap (9)"),
        ("socket of memory", "socket (41)"),
        ("unlink of memory", "unlink (87)"),
        ("socket of a writer", "socket (41)"),
    ] {
        let done = run(part);
        let said = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(TRAPPED), "{part}: {said}");
        let expected = format!("the thread tested has made a system call that it may not make: {call}, ");
        assert!(said.contains(&expected), "{part}: {said}");
    }
}

#[test]
fn what_is_needed_may_be_done() {
    for part in ["network from elsewhere", "socket", "unlink of a writer"] {
        let done = run(part);
        assert_eq!(done.status.code(), Some(0), "{part}: {done:?}");
    }
}
