//! What a client sends to the page server, from its first byte on: its hello and its regions, or the array of Firecracker's
//! copy mode, and then what a client says that is served.
//!
//! The bytes go through a socket, as descriptors come with some of them. The last eight of an input say where the bytes before
//! them are cut, and which pieces come with descriptors; a line ends a piece in any case.

use api_spec::handshake::{Attach, CopyRegion, Hello, Mode, Ping, Region, Reply, Used, VERSION, Word};
use serde_json::json;
use snapshot::page_runs::PageRuns;
use snapshot::working_set::{MAX_RUNS, WorkingSet};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::LazyLock;
use uffd_handler::handshake::{Handshake, Request};
use uffd_handler::recorder::{Recorder, Telling};
use uffd_handler::region::{CHUNK_SIZE, PAGE_SIZE, Regions};
use uffd_handler::talk::Talk;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// How many bytes of an input say how the others come.
const CONTROLS: usize = 8;
/// What is passed as a userfaultfd: here nobody looks into it.
static DESCRIPTOR: LazyLock<File> = LazyLock::new(|| File::open("/dev/null").expect("there is a /dev/null"));

/// Serves a client.
pub fn check(data: &[u8]) {
    let Some((sent, controls)) = data.split_last_chunk::<CONTROLS>() else { return };
    let mut pieces = Pieces { rest: sent, controls, next: 0 };
    if let Some((regions, size)) = shake_hands(&mut pieces) {
        check_regions(regions, size);
        converse(pieces);
    }
}

/// The pieces in which the bytes of a client come.
struct Pieces<'a> {
    rest: &'a [u8],
    controls: &'a [u8; CONTROLS],
    next: usize,
}

impl<'a> Iterator for Pieces<'a> {
    /// Bytes, and how many descriptors come with them.
    type Item = (&'a [u8], usize);

    fn next(&mut self) -> Option<Self::Item> {
        let control = self.controls[self.next % CONTROLS];
        self.next += 1;
        let line = self.rest.iter().position(|byte| *byte == b'\n').map_or(self.rest.len(), |end| end + 1);
        // In most cases to the end of the line: then there is something to be read in it.
        let len = if control & 0x30 == 0x10 { line.min(1 + usize::from(control)) } else { line };
        let descriptors = match control & 0x0f {
            0..10 => 0,
            10..15 => 1,
            _ => 2,
        };
        let (piece, rest) = self.rest.split_at(len);
        self.rest = rest;
        // The second line of our clients, and the array of others, would be nothing without one.
        let ends = piece.ends_with(b"\n") && self.next > 1 || piece.ends_with(b"]");
        let descriptors = if ends && control & 0x40 == 0 { 1 } else { descriptors };
        (!piece.is_empty()).then_some((piece, descriptors))
    }
}

/// Goes on until there is a session, as the server would: the regions, and the size of the image that they should cover.
fn shake_hands(pieces: &mut Pieces<'_>) -> Option<(Vec<Region>, u64)> {
    let (near, mut far) = UnixStream::pair().expect("there are descriptors");
    let mut handshake = Handshake::new(near).expect("a socket can be set up");
    let (mut heard, mut size) = (Vec::new(), None);
    for (piece, descriptors) in pieces {
        let descriptors: Vec<RawFd> = vec![DESCRIPTOR.as_raw_fd(); descriptors];
        far.send_with_fds(&[piece], &descriptors).ok()?;
        heard.extend_from_slice(piece);
        match handshake.receive() {
            Ok(None) => assert!(handshake.check_deadline(handshake.began()).is_ok()),
            Ok(Some(Request::Hello(hello))) => {
                assert!(size.is_none() && handshake.is_answered(), "a client greets once");
                assert_eq!(
                    serde_json::from_slice::<Hello>(&heard).ok().as_ref(),
                    Some(&hello),
                    "the line is the message"
                );
                comes_back(&hello);
                size = Some(hello.size);
                match hello.mode {
                    Mode::Shared => handshake.send_store(hello.size, std::os::fd::AsFd::as_fd(&*DESCRIPTOR)),
                    Mode::Copy => handshake.send_image(hello.size),
                }
                .expect("an answer can be sent");
                let answered = read_reply(&mut far);
                assert!(
                    matches!(answered, Reply::Store { size, .. } | Reply::Image { size, .. } if size == hello.size)
                );
                heard.clear();
            }
            Ok(Some(Request::Attach(regions, _))) => {
                let attach = serde_json::from_slice::<Attach>(&heard).ok();
                assert_eq!(attach.map(|attach| attach.regions).as_ref(), Some(&regions), "the line is the message");
                comes_back(&Attach { regions: regions.clone() });
                handshake.send_serving().expect("an answer can be sent");
                assert_eq!(read_reply(&mut far), Reply::Serving);
                return Some((regions, size.expect("a client greets before it attaches")));
            }
            Ok(Some(Request::Copy(regions, _))) => {
                assert!(size.is_none() && !handshake.is_answered(), "nothing is answered in Firecracker's copy mode");
                let array: Vec<CopyRegion> = regions.iter().copied().map(CopyRegion::from).collect();
                comes_back(&array);
                let size = regions.iter().fold(0, |sum: u64, region| sum.saturating_add(region.size));
                return Some((regions, size));
            }
            Err(error) => {
                handshake.send_refusal(&error.to_string());
                return None;
            }
        }
    }
    None
}

fn read_reply(far: &mut UnixStream) -> Reply {
    let mut bytes = [0; 4096];
    let len = far.read(&mut bytes).expect("there is an answer");
    serde_json::from_slice(&bytes[..len]).expect("an answer is one that clients understand")
}

fn comes_back<T>(message: &T)
where
    T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug,
{
    let json = serde_json::to_vec(message).expect("a message has a JSON form");
    assert_eq!(&serde_json::from_slice::<T>(&json).expect("what was read can be read again"), message);
}

/// Regions that are found right cover the image once, and addresses in them are found.
fn check_regions(regions: Vec<Region>, size: u64) {
    let Ok(checked) = Regions::check(regions.clone(), size) else { return };
    assert_eq!(regions.iter().map(|region| region.size).sum::<u64>(), size);
    for Region { base_host_virt_addr: base, size: len, offset, .. } in regions {
        for within in [0, 1, PAGE_SIZE - 1, len / 2, len - 1] {
            let fault = checked.locate(base + within).expect("an address in a region is found");
            assert_eq!((fault.page, fault.chunk), ((offset + within) / PAGE_SIZE, (offset + within) / CHUNK_SIZE));
            assert!(fault.wake.contains(&(base + within)) && fault.wake.end - fault.wake.start <= CHUNK_SIZE);
            assert!(base <= fault.wake.start && fault.wake.end <= base + len);
            assert_eq!(checked.address_of(fault.page), Some((base + within) / PAGE_SIZE * PAGE_SIZE));
        }
        let pages = offset / PAGE_SIZE..(offset + len) / PAGE_SIZE;
        assert!(checked.pages_within(base..base + len).contains(&pages));
    }
    assert_eq!(checked.address_of(size / PAGE_SIZE), None);
    assert_eq!((checked.locate(0), checked.locate(u64::MAX)), (None, None));
}

/// Listens to a client that is served, and learns from it.
fn converse(pieces: Pieces<'_>) {
    let (mut talk, mut telling, mut recorder) = (Talk::default(), Telling::default(), Recorder::new(1));
    assert!(telling.ask());
    recorder.asked();
    for (piece, _) in pieces {
        if talk.hear(piece).is_err() {
            return;
        }
        while talk.has_line() {
            match talk.take() {
                Ok(Some(Word::Ping(ping))) => comes_back(&ping),
                Ok(Some(Word::Used(message))) => {
                    comes_back(&message);
                    let Ok(used) = telling.hear(message) else { return };
                    if let Some((used, agree)) = used.and_then(|used| recorder.hear(used)) {
                        learn(&used, agree);
                    }
                }
                Ok(None) => panic!("a line is a word or none"),
                Err(_) => return,
            }
        }
    }
}

/// What is learnt keeps to the image and to the bounds.
fn learn(used: &[snapshot::working_set::Used], agree: usize) {
    const PAGES: u64 = 1 << 20;
    let mut set: WorkingSet = serde_json::from_value(json!({
        "version": 1, "image": "", "image_pages": PAGES, "clones": 0, "created_unix_ms": 0, "updated_unix_ms": 0, "read": [],
        "written": [], "digest": ""
    }))
    .expect("these fields are those of a working set");
    set.merge_common(used, agree);
    let runs = |runs: &PageRuns| runs.runs().len() <= MAX_RUNS && runs.end() <= PAGES;
    assert!(runs(set.read()) && runs(set.written()));
    assert_eq!(set.read(), &used[0].read.before(PAGES), "what the only clone has read");
}

/// Whole conversations, in either mode, and Firecracker's array.
pub fn seeds() -> Vec<Vec<u8>> {
    let line = |message: serde_json::Value| format!("{message}\n");
    let regions = vec![
        Region { base_host_virt_addr: 1 << 40, size: 1 << 20, offset: 0, page_size: PAGE_SIZE },
        Region { base_host_virt_addr: 1 << 41, size: 3 << 12, offset: 1 << 20, page_size: PAGE_SIZE },
    ];
    let size = (1 << 20) + (3 << 12);
    let array: Vec<CopyRegion> = regions.iter().copied().map(CopyRegion::from).collect();
    let hello = |mode| line(json!(Hello { version: VERSION, image: "ab".repeat(32), size, mode }));
    let attach = line(json!(Attach { regions }));
    let ping = line(json!(Ping { ping: 7 }));
    let used = |more| line(json!(Used { read: vec![(1, 2), (0, 9), (1 << 30, 1)], written: vec![(7, 1)], more }));
    let served = [attach, ping.clone(), used(true), ping, used(false)].concat();
    let array = json!(array).to_string();
    [hello(Mode::Shared) + &served, hello(Mode::Copy) + &served, array.clone(), array + &used(false)]
        .iter()
        .flat_map(|sent| [[0; CONTROLS], [0x1b, 0, 0x5a, 0, 0x14, 0, 0, 0]].map(|how| [sent.as_bytes(), &how].concat()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_that_come_in_lines_are_served() {
        for seed in seeds().iter().step_by(2).take(3) {
            let (sent, controls) = seed.split_last_chunk().unwrap();
            let mut pieces = Pieces { rest: sent, controls, next: 0 };
            let (regions, size) = shake_hands(&mut pieces).unwrap();
            assert!(Regions::check(regions, size).is_ok());
        }
    }
}
