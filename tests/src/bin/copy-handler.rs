//! A page server for tests, as people write them for Firecracker: it takes a userfaultfd and the list of regions in one message,
//! and copies pages of a memory file to where faults are. It shares no code with ours.
//!
//! `copy-handler SOCKET MEMORY-FILE [HABIT]`. What it does is told on standard output, a line each: `message JSON`, `page OFFSET`
//! for a fault that it has answered, `gone OFFSET` for one whose page is not to be had any more, `remove` for an event of that
//! name, `all` once everything was copied, `hangup`. If anything is not as it should be, it panics.

// UNSAFETY: a received descriptor is adopted, and pages are copied into the memory of another process.
#![allow(unsafe_code)]

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use std::fs::File;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use userfaultfd::{Error, Event, Uffd};

const PAGE: u64 = 4096;

/// What sets it apart.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Habit {
    /// Copies the page of each fault.
    OnDemand,
    /// Copies everything at once, and then what is asked for all the same.
    Everything,
    /// Closes the connection when it has the message, and serves.
    Closes,
    /// Closes all that it has when it has the message.
    Refuses,
    /// Keeps all that it has, and does nothing.
    Idles,
}

struct Region {
    base: u64,
    size: u64,
    offset: u64,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (socket, memory) = (&arguments[0], &arguments[1]);
    let habit = match arguments.get(2).map(String::as_str) {
        None => Habit::OnDemand,
        Some("everything") => Habit::Everything,
        Some("closes") => Habit::Closes,
        Some("refuses") => Habit::Refuses,
        Some("idles") => Habit::Idles,
        Some(other) => panic!("{other}"),
    };
    let memory = Arc::new(File::open(memory).expect("the memory file can be opened"));
    let listener = UnixListener::bind(socket).expect("a socket can be made");
    println!("listening");
    for stream in listener.incoming() {
        let (stream, memory) = (stream.expect("connections can be accepted"), memory.clone());
        std::thread::spawn(move || {
            // A thread that panics is to end the process, as a page server would.
            if std::panic::catch_unwind(move || serve(stream, &memory, habit)).is_err() {
                std::process::exit(101);
            }
        });
    }
}

fn serve(stream: UnixStream, memory: &File, habit: Habit) {
    let (regions, uffd) = receive(&stream);
    let size = memory.metadata().expect("a file has a size").len();
    assert_eq!(regions.iter().map(|region| region.size).sum::<u64>(), size, "the regions are the memory file's");
    let mut connection = Some(stream);
    match habit {
        Habit::OnDemand => {}
        Habit::Everything => {
            regions.iter().for_each(|region| copy_all(&uffd, memory, region));
            println!("all");
        }
        Habit::Closes => connection = None,
        Habit::Refuses => return,
        Habit::Idles => loop {
            std::thread::park();
        },
    }
    loop {
        let mut sources = vec![PollFd::new(&uffd, PollFlags::IN)];
        sources.extend(connection.iter().map(|stream| PollFd::new(stream, PollFlags::IN)));
        poll(&mut sources, None).expect("descriptors can be polled");
        let ready: Vec<bool> = sources.iter().map(|source| !source.revents().is_empty()).collect();
        while let Some(event) = uffd.read_event().expect("events can be read") {
            match event {
                Event::Pagefault { addr, .. } => answer(&uffd, memory, &regions, addr as u64 / PAGE * PAGE),
                Event::Remove { .. } => println!("remove"),
                other => panic!("{other:?}"),
            }
        }
        if ready.get(1) == Some(&true) {
            let count = rustix::net::recv(connection.as_ref().expect("polled"), &mut [0u8; 8][..], RecvFlags::DONTWAIT);
            assert_eq!(count.map(|(_, count)| count), Ok(0), "a client says nothing after its message");
            println!("hangup");
            return;
        }
    }
}

/// The one message, in a buffer of the size that others have.
fn receive(stream: &UnixStream) -> (Vec<Region>, Uffd) {
    let mut bytes = [0; 1024];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(stream, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC);
    let count = received.expect("a message comes").bytes;
    let mut descriptors: Vec<OwnedFd> = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = message {
            descriptors.extend(passed);
        }
    }
    assert_eq!(descriptors.len(), 1, "one descriptor comes with the message");
    let fd = descriptors.remove(0).into_raw_fd();
    // SAFETY: the descriptor was received here and nobody else has it. If it is no userfaultfd, its first use fails.
    let uffd = unsafe { Uffd::from_raw_fd(fd) };
    let text = std::str::from_utf8(&bytes[..count]).expect("the message is text");
    println!("message {text}");
    let regions: Vec<serde_json::Value> = serde_json::from_str(text).expect("the message is an array");
    let number = |region: &serde_json::Value, name: &str| region[name].as_u64().unwrap_or_else(|| panic!("{name}"));
    let regions = regions.iter().map(|region| Region {
        base: number(region, "base_host_virt_addr"),
        size: number(region, "size"),
        offset: number(region, "offset"),
    });
    (regions.collect(), uffd)
}

fn answer(uffd: &Uffd, memory: &File, regions: &[Region], addr: u64) {
    let region = regions.iter().find(|region| (region.base..region.base + region.size).contains(&addr));
    let region = region.expect("faults are within regions");
    let offset = addr - region.base + region.offset;
    let copied = copy(uffd, memory, addr, offset, PAGE);
    println!("{} {offset}", if copied { "page" } else { "gone" });
}

fn copy_all(uffd: &Uffd, memory: &File, region: &Region) {
    const PIECE: u64 = 1 << 20;
    for at in (0..region.size).step_by(PIECE as usize) {
        copy(uffd, memory, region.base + at, region.offset + at, PIECE.min(region.size - at));
    }
}

/// Copies, page by page once something is there already. The result is whether there was room for the last page.
fn copy(uffd: &Uffd, memory: &File, addr: u64, offset: u64, len: u64) -> bool {
    let mut bytes = vec![0u8; len as usize];
    memory.read_exact_at(&mut bytes, offset).expect("the memory file can be read");
    let (mut done, mut step, mut present) = (0, len, true);
    while done < len {
        let from = bytes[done as usize..].as_ptr();
        let len = step.min(len - done);
        // SAFETY: `from` is followed by at least `len` bytes; what is written is memory of the process that made the
        // userfaultfd, which has registered it.
        match unsafe { uffd.copy(from.cast(), (addr + done) as *mut _, len as usize, true) } {
            Ok(_) => (done, present) = (done + len, true),
            Err(Error::PartiallyCopied(count)) => done += count as u64,
            // Others go by another crate's type of error numbers.
            Err(Error::CopyFailed(errno)) => match errno as i32 {
                AGAIN => {}
                EXIST | NOENT if step > PAGE => step = PAGE,
                EXIST => {
                    uffd.wake((addr + done) as *mut _, len as usize).expect("waiting threads can be woken");
                    done += len;
                }
                // It was given back, and whoever waited there knows of that.
                NOENT => (done, present) = (done + len, false),
                // Its process is gone.
                SRCH => return false,
                other => panic!("copying to {:#x}: error {other}", addr + done),
            },
            Err(e) => panic!("copying to {:#x}: {e}", addr + done),
        }
    }
    present
}

const AGAIN: i32 = rustix::io::Errno::AGAIN.raw_os_error();
const EXIST: i32 = rustix::io::Errno::EXIST.raw_os_error();
const NOENT: i32 = rustix::io::Errno::NOENT.raw_os_error();
const SRCH: i32 = rustix::io::Errno::SRCH.raw_os_error();
