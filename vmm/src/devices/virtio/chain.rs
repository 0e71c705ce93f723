//! Descriptor chains as runs of guest memory.
//!
//! A driver may split a buffer over as many descriptors as it likes, so a buffer is a list of pieces here and its
//! users see one run of bytes.

use virtio_queue::DescriptorChain;
use vm_memory::{Address, Bytes, GuestAddress};

use super::super::GuestMemory;
use super::queue::MAX_SIZE;

/// Which way a chain must point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// The device reads it.
    FromDriver,
    /// The device writes it.
    ToDriver,
}

/// What is wrong with a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// It has no descriptor that can be read.
    #[error("descriptor chain {0} has no valid descriptor")]
    Empty(u16),
    /// It loops, leads out of its table, or is longer than any queue.
    #[error("descriptor chain {0} loops, leaves its table or is longer than any queue")]
    Endless(u16),
    /// A descriptor points the wrong way.
    #[error("descriptor chain {0} has a descriptor of the wrong direction")]
    Direction(u16),
    /// A descriptor points outside of guest memory.
    #[error("descriptor chain leads to {0:#x}, which is not in guest memory")]
    Memory(u64),
    /// It is too short for what it should carry.
    #[error("descriptor chain of {len} bytes where {needed} are needed")]
    Short {
        /// How long it is, in bytes.
        len: u64,
        /// How long it must be, in bytes.
        needed: u64,
    },
}

/// A buffer in guest memory, in pieces. Kept between chains to save allocations.
///
/// There are no more pieces than the largest queue has entries, as in every chain of a good driver. `virtio-queue` would
/// follow more: in indirect tables, which no device of ours offers.
#[derive(Debug, Default)]
pub struct Buffer {
    pieces: Vec<(GuestAddress, u32)>,
    len: u64,
}

impl Buffer {
    /// Takes in the pieces of `chain` in place of those it had.
    pub fn load(&mut self, chain: DescriptorChain<&GuestMemory>, direction: Direction) -> Result<(), ChainError> {
        let head = chain.head_index();
        self.clear();
        let mut continues = None;
        for descriptor in chain {
            if descriptor.is_write_only() != (direction == Direction::ToDriver) {
                return Err(ChainError::Direction(head));
            }
            if self.pieces.len() == usize::from(MAX_SIZE) {
                return Err(ChainError::Endless(head));
            }
            self.push(descriptor.addr(), descriptor.len());
            continues = Some(descriptor.has_next());
        }
        complete(head, continues)
    }

    /// Takes in the pieces of a chain that holds a request and leaves room for its answer: those that the device reads in
    /// `request`, those that it writes in `answer`. What is read comes first (virtio 1.2, section 2.7.4.2).
    pub fn load_both(
        chain: DescriptorChain<&GuestMemory>,
        request: &mut Buffer,
        answer: &mut Buffer,
    ) -> Result<(), ChainError> {
        let head = chain.head_index();
        request.clear();
        answer.clear();
        let mut continues = None;
        for descriptor in chain {
            if request.pieces.len() + answer.pieces.len() == usize::from(MAX_SIZE) {
                return Err(ChainError::Endless(head));
            }
            let part = match descriptor.is_write_only() {
                true => &mut *answer,
                false if answer.pieces.is_empty() => &mut *request,
                false => return Err(ChainError::Direction(head)),
            };
            part.push(descriptor.addr(), descriptor.len());
            continues = Some(descriptor.has_next());
        }
        complete(head, continues)
    }

    fn clear(&mut self) {
        self.pieces.clear();
        self.len = 0;
    }

    fn push(&mut self, addr: GuestAddress, len: u32) {
        self.pieces.push((addr, len));
        self.len += u64::from(len);
    }

    /// Length of the buffer, in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the buffer has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its pieces: addresses, and lengths in bytes. They may lie outside of guest memory.
    pub fn pieces(&self) -> impl Iterator<Item = (GuestAddress, u32)> + '_ {
        self.pieces.iter().copied()
    }

    /// Copies bytes from `offset` bytes into the buffer to `data`.
    pub fn read(&self, mem: &GuestMemory, offset: u64, data: &mut [u8]) -> Result<(), ChainError> {
        self.each_piece(offset, data.len(), |addr, at, len| {
            mem.read_slice(&mut data[at..at + len], addr).map_err(|_| ChainError::Memory(addr.0))
        })
    }

    /// Copies `data` to `offset` bytes into the buffer.
    pub fn write(&self, mem: &GuestMemory, offset: u64, data: &[u8]) -> Result<(), ChainError> {
        self.each_piece(offset, data.len(), |addr, at, len| {
            mem.write_slice(&data[at..at + len], addr).map_err(|_| ChainError::Memory(addr.0))
        })
    }

    /// Calls `act(address, index of its first byte, length)` for each run of the `len` bytes from `offset`.
    fn each_piece(
        &self,
        offset: u64,
        len: usize,
        mut act: impl FnMut(GuestAddress, usize, usize) -> Result<(), ChainError>,
    ) -> Result<(), ChainError> {
        let needed = offset.saturating_add(len as u64);
        if needed > self.len {
            return Err(ChainError::Short { len: self.len, needed });
        }
        let (mut skip, mut at) = (offset, 0);
        for &(addr, piece) in &self.pieces {
            let piece = u64::from(piece);
            if at == len {
                break;
            }
            if skip >= piece {
                skip -= piece;
                continue;
            }
            let run = (piece - skip).min((len - at) as u64) as usize;
            let start = addr.checked_add(skip).ok_or(ChainError::Memory(addr.0))?;
            act(start, at, run)?;
            (skip, at) = (0, at + run);
        }
        Ok(())
    }
}

/// Whether a chain came to its end: its last descriptor that could be read does not continue.
fn complete(head: u16, continues: Option<bool>) -> Result<(), ChainError> {
    match continues {
        Some(false) => Ok(()),
        Some(true) => Err(ChainError::Endless(head)),
        None => Err(ChainError::Empty(head)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn buffer(pieces: &[(u64, u32)]) -> Buffer {
        let pieces: Vec<_> = pieces.iter().map(|&(addr, len)| (GuestAddress(addr), len)).collect();
        Buffer { len: pieces.iter().map(|p| u64::from(p.1)).sum(), pieces }
    }

    fn mem() -> GuestMemory {
        crate::memory::from_zero(0x1000)
    }

    #[test]
    fn pieces_read_and_write_as_one_run() {
        let (mem, buffer) = (mem(), buffer(&[(0x100, 3), (0x10, 0), (0x200, 5)]));
        buffer.write(&mem, 2, b"abcd").unwrap();
        let mut bytes = [0; 4];
        mem.read_slice(&mut bytes[..1], GuestAddress(0x102)).unwrap();
        mem.read_slice(&mut bytes[1..], GuestAddress(0x200)).unwrap();
        assert_eq!(&bytes, b"abcd");
        let mut back = [0; 4];
        buffer.read(&mem, 2, &mut back).unwrap();
        assert_eq!(&back, b"abcd");
    }

    #[test]
    fn nothing_outside_is_touched() {
        let mem = mem();
        assert_eq!(buffer(&[(0, 4)]).read(&mem, 2, &mut [0; 3]), Err(ChainError::Short { len: 4, needed: 5 }));
        assert_eq!(buffer(&[(0xfff, 4)]).write(&mem, 0, &[1; 4]), Err(ChainError::Memory(0xfff)));
        assert_eq!(buffer(&[(u64::MAX, 4)]).write(&mem, 2, &[1]), Err(ChainError::Memory(u64::MAX)));
    }

    proptest! {
        #[test]
        fn any_split_is_one_run(lens in proptest::collection::vec(0u32..20, 1..8), from in 0usize..150, len in 0usize..150) {
            let mem = mem();
            let mut next = 0x100u64;
            let pieces: Vec<_> = lens.iter().map(|&l| { next += 64; (next, l) }).collect();
            let buffer = buffer(&pieces);
            let text: Vec<u8> = (0..buffer.len() as u8).collect();
            buffer.write(&mem, 0, &text).unwrap();
            let mut back = vec![0; len];
            let read = buffer.read(&mem, from as u64, &mut back);
            prop_assert_eq!(read.is_ok(), from + len <= text.len());
            if read.is_ok() {
                prop_assert_eq!(&back, &text[from..from + len]);
            }
        }
    }
}
