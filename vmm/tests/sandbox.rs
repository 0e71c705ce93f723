//! What becomes of a vmm when one of its threads makes a system call that its table does not have.
// UNSAFETY: the tests make system calls that have no safe form, or none that would let them be forbidden.
#![allow(unsafe_code)]

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::process::{Command, Output};
use std::time::Duration;
use vmm::devices::alarm::Alarm;
use vmm::sandbox::{Kind, confine, start};

/// Tells a child of these tests what it is to do.
const PART: &str = "COPPICE_SANDBOX_TEST";
/// What the process ends with.
const TRAPPED: i32 = 148;

const KVM_SET_REGS: i64 = 0x4090_ae82;
const KVM_RUN: i64 = 0xae80;
const TIOCSTI: i64 = 0x5412;

/// A system call, its name, and the start of its arguments. None of them would do any harm.
type Forbidden = (&'static str, i64, [i64; 3]);

/// What no thread may do, nor the process as a whole.
const BY_ALL: [Forbidden; 12] = [
    ("execve", libc::SYS_execve, [0; 3]),
    ("fork", libc::SYS_fork, [0; 3]),
    ("clone", libc::SYS_clone, [libc::SIGCHLD as i64, 0, 0]),
    ("clone", libc::SYS_clone, [(libc::CLONE_THREAD | libc::CLONE_NEWUSER) as i64, 0, 0]),
    ("ptrace", libc::SYS_ptrace, [libc::PTRACE_ATTACH as i64, 0, 0]),
    ("kill", libc::SYS_kill, [i32::MAX as i64, 0, 0]),
    ("tgkill", libc::SYS_tgkill, [i32::MAX as i64, i32::MAX as i64, libc::SIGKILL as i64]),
    ("socket", libc::SYS_socket, [libc::AF_INET as i64, libc::SOCK_STREAM as i64, 0]),
    ("mmap", libc::SYS_mmap, [0, 4096, (libc::PROT_READ | libc::PROT_EXEC) as i64]),
    ("mprotect", libc::SYS_mprotect, [0, 4096, libc::PROT_EXEC as i64]),
    ("ioctl", libc::SYS_ioctl, [-1, TIOCSTI, 0]),
    ("prctl", libc::SYS_prctl, [libc::PR_SET_DUMPABLE as i64, 1, 0]),
];

/// What a thread of this kind may not do, though the process may.
fn forbidden(kind: Kind) -> &'static [Forbidden] {
    const SOCKET: Forbidden = ("socket", libc::SYS_socket, [libc::AF_UNIX as i64, libc::SOCK_STREAM as i64, 0]);
    const UNLINK: Forbidden = ("unlink", libc::SYS_unlink, [0; 3]);
    const RUN: Forbidden = ("ioctl", libc::SYS_ioctl, [-1, KVM_RUN, 0]);
    match kind {
        Kind::Vcpu => &[SOCKET, UNLINK, ("ioctl", libc::SYS_ioctl, [-1, KVM_SET_REGS, 0])],
        Kind::Devices => &[UNLINK, RUN],
        Kind::Stream => &[SOCKET, UNLINK, RUN],
        Kind::Writer => &[SOCKET, RUN],
        Kind::Memory => &[SOCKET, UNLINK, RUN],
        Kind::Peer => &[RUN],
    }
}

/// Runs this program once more, for the test `child` alone.
fn run(part: &str) -> Output {
    let program = std::env::current_exe().expect("a process can find its own program");
    let mut command = Command::new(program);
    command.args(["--exact", "child", "--nocapture"]).env(PART, part);
    command.output().expect("a program can be started")
}

/// Does its part in a thread of its own, if this is a child: `process` or a number among the kinds, and a number among what is forbidden.
#[test]
fn child() {
    let Ok(part) = std::env::var(PART) else { return };
    let (kind, call) = part.split_once(' ').expect("there are two words");
    let kind = kind.parse::<usize>().ok().map(|number| Kind::ALL[number]);
    let forbidden: Vec<_> = kind.map(forbidden).unwrap_or_default().iter().chain(&BY_ALL).collect();
    let call = call.parse::<usize>().ok().map(|number| forbidden[number]);
    start().expect("filters can be installed");
    let mut alarm = Alarm::new().expect("there are timers");
    let (stream, _peer) = UnixStream::pair().expect("there are sockets");
    let work = move || {
        kind.into_iter().for_each(confine);
        live();
        if kind == Some(Kind::Vcpu) {
            // As devices that the guest starts and resets.
            alarm.set(Some(Duration::from_secs(60)));
            stream.shutdown(Shutdown::Both).expect("it is open");
        }
        if let Some(&(_, number, [a, b, c])) = call {
            // SAFETY: each of these calls fails for its arguments, if it is made at all.
            unsafe { libc::syscall(number, a, b, c) };
        }
    };
    std::thread::Builder::new().name("tested".into()).spawn(work).unwrap().join().unwrap();
}

/// What every thread may do.
fn live() {
    let memory: Vec<u64> = (0..1 << 20).collect();
    assert_eq!(memory.iter().max(), Some(&((1 << 20) - 1)));
    std::thread::sleep(Duration::from_millis(1));
    std::thread::spawn(|| println!("{:?}", std::time::Instant::now())).join().unwrap();
}

#[test]
fn a_thread_that_does_what_it_may_is_let_live() {
    for kind in (0..Kind::ALL.len()).map(|kind| kind.to_string()).chain(["process".to_owned()]) {
        let done = run(&format!("{kind} none"));
        assert_eq!(done.status.code(), Some(0), "{kind}: {done:?}");
    }
}

#[test]
fn a_forbidden_call_ends_the_process_and_is_named() {
    let of_kinds = Kind::ALL.iter().enumerate().map(|(number, kind)| (number.to_string(), forbidden(*kind)));
    for (kind, own) in of_kinds.chain([("process".to_owned(), [].as_slice())]) {
        for (number, (name, call, _)) in own.iter().chain(&BY_ALL).enumerate() {
            let done = run(&format!("{kind} {number}"));
            let said = String::from_utf8_lossy(&done.stderr);
            assert_eq!(done.status.code(), Some(TRAPPED), "{kind} {name}: {said}");
            let expected = format!("the thread tested has made a system call that it may not make: {name} ({call})");
            assert!(said.contains(&expected), "{kind} {name}: {said}");
        }
    }
}
