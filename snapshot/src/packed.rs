//! A packed memory image: a file in which each chunk is stored once, compressed, or not at all, and a table at its beginning that
//! says where. Pure.
//!
//! ```text
//! 0                 16         20          24         32           40
//! | "coppice pack\n" | version  | chunk     | chunks   | hot bytes  | zeros up to 64
//! |  and zeros       | u32 = 1  | u32 bytes | u64      | u64        |
//!
//! an entry, one for each chunk, from 64 on:
//! 0          8          12       13
//! | offset   | stored   | kind   | zeros up to 16
//! | u64      | u32      | u8     |
//! ```
//!
//! Numbers are little-endian. What is stored follows the table, first the chunks that clones are known to use: `hot bytes` of the
//! file, from the end of the table on.

use crate::CHUNK_BYTES;
use crate::chunk;

/// Length of the beginning of the file that is the same for every image, in bytes.
pub const HEADER_BYTES: u64 = 64;
/// Length of an entry of the table, in bytes.
pub const ENTRY_BYTES: u64 = 16;

const MAGIC: [u8; 16] = *b"coppice pack\n\0\0\0";
const VERSION: u32 = 1;

/// What the table says of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// It is all zero.
    Zero,
    /// It is that of the parent.
    Parent,
    /// Its bytes, as they are.
    Plain {
        /// Where in the file.
        offset: u64,
    },
    /// Its bytes, as one frame of zstd.
    Zstd {
        /// Where in the file.
        offset: u64,
        /// Length of the frame, in bytes.
        len: u32,
    },
}

/// Where each chunk of a packed image lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Index {
    hot_bytes: u64,
    entries: Vec<Entry>,
}

/// Why bytes are no index of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IndexError {
    /// Not the beginning of a packed image at all.
    #[error("it is no packed memory image")]
    Magic,
    /// One that this program does not read.
    #[error("it is packed in version {0}, and this program reads version {VERSION}")]
    Version(u32),
    /// Of another image.
    #[error("its table is not that of an image of this size")]
    Size,
    /// The hot part reaches beyond the end.
    #[error("its hot bytes lie beyond its end")]
    Hot,
    /// An entry that none can be.
    #[error("its entry of chunk {0} is none that a packed image can have")]
    Entry(u64),
}

/// How long the index of an image is, in bytes.
pub fn index_bytes(image_bytes: u64) -> u64 {
    HEADER_BYTES + chunk::count(image_bytes) * ENTRY_BYTES
}

/// How long a packed image can be, in bytes: no chunk takes more room than it has bytes.
pub fn longest(image_bytes: u64) -> u64 {
    index_bytes(image_bytes) + image_bytes
}

impl Index {
    /// The index with these entries. `hot_bytes` of the file, from its end on, are of chunks that are used most.
    pub fn new(entries: Vec<Entry>, hot_bytes: u64) -> Index {
        Index { hot_bytes, entries }
    }

    /// What it says of a chunk; those beyond the end are zero.
    pub fn entry(&self, index: u64) -> Entry {
        usize::try_from(index).ok().and_then(|index| self.entries.get(index)).copied().unwrap_or(Entry::Zero)
    }

    /// Bytes of chunks that are used most.
    pub fn hot_bytes(&self) -> u64 {
        self.hot_bytes
    }

    /// The beginning of the file.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_BYTES as usize + self.entries.len() * ENTRY_BYTES as usize);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&(CHUNK_BYTES as u32).to_le_bytes());
        out.extend_from_slice(&(self.entries.len() as u64).to_le_bytes());
        out.extend_from_slice(&self.hot_bytes.to_le_bytes());
        out.resize(HEADER_BYTES as usize, 0);
        for entry in &self.entries {
            let (kind, offset, stored) = match *entry {
                Entry::Zero => (0u8, 0, 0),
                Entry::Parent => (1, 0, 0),
                Entry::Plain { offset } => (2, offset, 0),
                Entry::Zstd { offset, len } => (3, offset, len),
            };
            out.extend_from_slice(&offset.to_le_bytes());
            out.extend_from_slice(&stored.to_le_bytes());
            out.extend_from_slice(&[kind, 0, 0, 0]);
        }
        out
    }

    /// Decodes the beginning, of [`index_bytes`], of a file of `file_bytes` that is to hold an image of `image_bytes`. Whatever an
    /// entry says then lies in the file.
    pub fn decode(bytes: &[u8], image_bytes: u64, file_bytes: u64, has_parent: bool) -> Result<Index, IndexError> {
        let (header, table) = bytes.split_at_checked(HEADER_BYTES as usize).ok_or(IndexError::Magic)?;
        let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
        let long = |at: usize| u64::from_le_bytes(header[at..at + 8].try_into().expect("eight bytes"));
        if header[..16] != MAGIC {
            return Err(IndexError::Magic);
        }
        if word(16) != VERSION {
            return Err(IndexError::Version(word(16)));
        }
        let expected = (CHUNK_BYTES, chunk::count(image_bytes), index_bytes(image_bytes));
        if (u64::from(word(20)), long(24), bytes.len() as u64) != expected {
            return Err(IndexError::Size);
        }
        let hot_bytes = long(32);
        let data = bytes.len() as u64;
        if file_bytes.checked_sub(data).is_none_or(|stored| hot_bytes > stored) || header[40..].iter().any(|b| *b != 0)
        {
            return Err(IndexError::Hot);
        }
        let lies_within =
            |offset: u64, len: u64| offset >= data && offset.checked_add(len).is_some_and(|end| end <= file_bytes);
        let entry = |(index, bytes): (usize, &[u8; ENTRY_BYTES as usize])| {
            let bad = IndexError::Entry(index as u64);
            let offset = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
            let stored = u32::from_le_bytes(bytes[8..12].try_into().expect("four bytes"));
            let whole = chunk::len(image_bytes, index as u64) as u64;
            match (&bytes[12..], offset, stored) {
                ([0, 0, 0, 0], 0, 0) => Ok(Entry::Zero),
                ([1, 0, 0, 0], 0, 0) if has_parent => Ok(Entry::Parent),
                ([2, 0, 0, 0], _, 0) if lies_within(offset, whole) => Ok(Entry::Plain { offset }),
                ([3, 0, 0, 0], _, 1..) if u64::from(stored) < whole && lies_within(offset, stored.into()) => {
                    Ok(Entry::Zstd { offset, len: stored })
                }
                _ => Err(bad),
            }
        };
        let entries = table.as_chunks().0.iter().enumerate().map(entry).collect::<Result<_, _>>()?;
        Ok(Index { hot_bytes, entries })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DATA: u64 = 1 << 20;

    /// An index of an image of so many bytes, and the length of its file.
    fn indexes() -> impl Strategy<Value = (Index, u64, u64)> {
        (1u64..20 * CHUNK_BYTES, 0..=DATA).prop_flat_map(|(image, hot)| {
            let data = index_bytes(image);
            let entry = prop_oneof![
                Just(Entry::Zero),
                Just(Entry::Parent),
                (data..=data + DATA - CHUNK_BYTES).prop_map(|offset| Entry::Plain { offset }),
                (data..=data + DATA - CHUNK_BYTES, 1..CHUNK_BYTES as u32)
                    .prop_map(|(offset, len)| Entry::Zstd { offset, len }),
            ];
            let count = chunk::count(image) as usize;
            prop::collection::vec(entry, count).prop_map(move |mut entries| {
                // The last chunk may be as short as a byte, of which nothing is shorter.
                if let Some(last @ Entry::Zstd { .. }) = entries.last_mut() {
                    *last = Entry::Zero;
                }
                (Index::new(entries, hot), image, data + DATA)
            })
        })
    }

    proptest! {
        #[test]
        fn an_index_comes_back((index, image, file) in indexes()) {
            let bytes = index.encode();
            prop_assert_eq!(bytes.len() as u64, index_bytes(image));
            prop_assert!(file <= longest(image) || image < DATA);
            prop_assert_eq!(Index::decode(&bytes, image, file, true), Ok(index.clone()));
            let needs_parent = index.entries.contains(&Entry::Parent);
            prop_assert_eq!(Index::decode(&bytes, image, file, false).is_err(), needs_parent);
            prop_assert!(Index::decode(&bytes[..bytes.len() - 1], image, file, true).is_err());
            prop_assert!(Index::decode(&bytes, image + CHUNK_BYTES, file, true).is_err());
        }

        #[test]
        fn what_a_changed_index_says_still_lies_in_the_file(
            (index, image, file) in indexes(),
            at in any::<prop::sample::Index>(),
            to in any::<u8>(),
        ) {
            let mut bytes = index.encode();
            let at = at.index(bytes.len());
            let changed = bytes[at] != to;
            bytes[at] = to;
            if let Ok(index) = Index::decode(&bytes, image, file, true) {
                prop_assert!(at >= 32 || !changed, "nothing else of the header can be changed");
                for (number, entry) in index.entries.iter().enumerate() {
                    let (start, len) = match *entry {
                        Entry::Zero | Entry::Parent => continue,
                        Entry::Plain { offset } => (offset, chunk::len(image, number as u64) as u64),
                        Entry::Zstd { offset, len } => (offset, len.into()),
                    };
                    prop_assert!(start >= index_bytes(image) && start + len <= file);
                }
                prop_assert!(index.hot_bytes() <= DATA);
                prop_assert_eq!(index.encode(), bytes);
            }
        }
    }

    #[test]
    fn what_cannot_be_an_index_is_refused_by_name() {
        let image = 3 * CHUNK_BYTES;
        let file = index_bytes(image) + 1000;
        let index = Index::new(vec![Entry::Zero, Entry::Zstd { offset: file - 10, len: 10 }, Entry::Parent], 1000);
        let good = index.encode();
        let refused = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = good.clone();
            change(&mut bytes);
            Index::decode(&bytes, image, file, true).unwrap_err()
        };
        assert_eq!(refused(&|b| b[0] = b'C'), IndexError::Magic);
        assert_eq!(refused(&|b| b.truncate(10)), IndexError::Magic);
        assert_eq!(refused(&|b| b[16] = 2), IndexError::Version(2));
        assert_eq!(refused(&|b| b[21] = 1), IndexError::Size);
        assert_eq!(refused(&|b| b[24] = 4), IndexError::Size);
        assert_eq!(refused(&|b| b.truncate(96)), IndexError::Size);
        assert_eq!(refused(&|b| b[32..34].copy_from_slice(&1001u16.to_le_bytes())), IndexError::Hot);
        assert_eq!(refused(&|b| b[40] = 1), IndexError::Hot);
        let second = HEADER_BYTES as usize + 16;
        assert_eq!(refused(&|b| b[second] = b[second].wrapping_add(1)), IndexError::Entry(1));
        assert_eq!(refused(&|b| b[second..second + 8].fill(0xff)), IndexError::Entry(1));
        assert_eq!(refused(&|b| b[second..second + 8].fill(0)), IndexError::Entry(1));
        assert_eq!(refused(&|b| b[second + 8] = 0), IndexError::Entry(1));
        assert_eq!(refused(&|b| b[second + 12] = 4), IndexError::Entry(1));
        assert_eq!(refused(&|b| b[second + 13] = 1), IndexError::Entry(1));
        assert_eq!(Index::decode(&good, image, file, false), Err(IndexError::Entry(2)));
    }
}
