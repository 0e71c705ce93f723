//! Reading events from a userfaultfd that somebody else owns too.
//!
//! Whether a read waits is a property of the open file, which the client shares and may change at any time: an ordinary
//! read could stop the server, and with it every other guest. So each read says by itself that it must not wait.

// UNSAFETY: an event may carry a descriptor, by number, that is ours to close.
#![allow(unsafe_code)]

use rustix::io::{Errno, ReadWriteFlags};
use std::io::{self, IoSliceMut};
use std::ops::Range;
use std::os::fd::{FromRawFd, OwnedFd};
use userfaultfd::Uffd;

/// Events that are read at once.
pub const BATCH: usize = 64;
/// Size of the kernel's `struct uffd_msg`: the kind in the first byte, what belongs to it from the ninth on.
const MESSAGE: usize = 32;
const KIND_PAGEFAULT: u8 = 0x12;
const KIND_FORK: u8 = 0x13;
const KIND_REMOVE: u8 = 0x15;
/// The offset that stands for "where the file is", for files that have no offsets.
const NO_OFFSET: u64 = u64::MAX;

/// Room for a batch of events, used again and again.
#[derive(Debug)]
pub struct EventReader {
    messages: [u8; BATCH * MESSAGE],
    addresses: Vec<u64>,
    removes: Vec<Range<u64>>,
    others: usize,
}

impl EventReader {
    /// Allocates it.
    pub fn new() -> Self {
        Self { messages: [0; BATCH * MESSAGE], addresses: Vec::new(), removes: Vec::new(), others: 0 }
    }

    /// Reads the events that are there, [`BATCH`] at most, never waiting; returns how many there were.
    pub fn read(&mut self, uffd: &Uffd) -> io::Result<usize> {
        self.addresses.clear();
        self.removes.clear();
        self.others = 0;
        let bytes = match read_without_waiting(uffd, &mut self.messages) {
            Ok(bytes) => bytes,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(error) => return Err(error.into()),
        };
        for message in self.messages[..bytes].as_chunks::<MESSAGE>().0 {
            match parse(message) {
                Event::Fault(address) => self.addresses.push(address),
                Event::Remove(range) => self.removes.push(range),
                Event::Other => self.others += 1,
            }
        }
        Ok(bytes / MESSAGE)
    }

    /// Addresses of the faults in the batch that was read last.
    pub fn addresses(&self) -> &[u64] {
        &self.addresses
    }

    /// Ranges that the client gives back, in that batch.
    pub fn removes(&self) -> &[Range<u64>] {
        &self.removes
    }

    /// How many events in that batch were something else.
    pub fn others(&self) -> usize {
        self.others
    }
}

impl Default for EventReader {
    fn default() -> Self {
        Self::new()
    }
}

fn read_without_waiting(uffd: &Uffd, messages: &mut [u8]) -> rustix::io::Result<usize> {
    match rustix::io::preadv2(uffd, &mut [IoSliceMut::new(messages)], NO_OFFSET, ReadWriteFlags::NOWAIT) {
        // Linux before 6.10 cannot do that for a userfaultfd; there the flag of the open file has to do.
        Err(Errno::OPNOTSUPP | Errno::SPIPE) => rustix::io::read(uffd, messages),
        result => result,
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Event {
    Fault(u64),
    Remove(Range<u64>),
    Other,
}

fn parse(message: &[u8; MESSAGE]) -> Event {
    let word = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&message[at..at + 8]);
        u64::from_ne_bytes(bytes)
    };
    match message[0] {
        // Flags come first, then the address.
        KIND_PAGEFAULT => Event::Fault(word(16)),
        // From where, to where.
        KIND_REMOVE => Event::Remove(word(8)..word(16)),
        KIND_FORK => {
            let fd = word(8) as u32 as i32;
            // SAFETY: the kernel has just opened this descriptor for us, with this event, and nobody else uses it.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
            Event::Other
        }
        _ => Event::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_has_its_address_and_a_remove_its_range() {
        let mut message = [0; MESSAGE];
        message[0] = KIND_PAGEFAULT;
        message[8] = 1;
        message[16..24].copy_from_slice(&0x7f00_1234_5000u64.to_ne_bytes());
        assert_eq!(parse(&message), Event::Fault(0x7f00_1234_5000));
        message[0] = KIND_REMOVE;
        assert_eq!(parse(&message), Event::Remove(1..0x7f00_1234_5000));
        message[0] = 0x16;
        assert_eq!(parse(&message), Event::Other);
    }

    #[test]
    fn no_event_is_no_waiting_even_if_the_file_waits() {
        let Ok(uffd) = crate::uffd::create_user_only() else { return println!("skipped: no userfaultfd here") };
        let mut reader = EventReader::new();
        assert_eq!(reader.read(&uffd).unwrap(), 0);
        let nowait =
            rustix::io::preadv2(&uffd, &mut [IoSliceMut::new(&mut [0; 32])], NO_OFFSET, ReadWriteFlags::NOWAIT);
        if nowait != Err(Errno::AGAIN) {
            return println!("skipped: this kernel cannot read a userfaultfd with RWF_NOWAIT");
        }
        let flags = rustix::fs::fcntl_getfl(&uffd).unwrap();
        rustix::fs::fcntl_setfl(&uffd, flags - rustix::fs::OFlags::NONBLOCK).unwrap();
        assert_eq!(reader.read(&uffd).unwrap(), 0);
    }
}
