//! Parts of a file that hold nothing, and read as zeros: what is claimed to be there need not be read to know it.

use crate::create::next_data;
use std::fs::File;
use std::io;
use std::ops::Range;

/// The holes of a file, asked for in order.
#[derive(Debug)]
pub(crate) struct Holes<'f> {
    file: &'f File,
    /// The one that was found last.
    last: Range<u64>,
}

impl<'f> Holes<'f> {
    /// Those of this file. Its seek position is used.
    pub(crate) fn of(file: &'f File) -> Self {
        Holes { file, last: 0..0 }
    }

    /// Whether all of a range, which lies within the file, is a hole. Never where the file system does not know its holes.
    pub(crate) fn cover(&mut self, range: Range<u64>) -> io::Result<bool> {
        if range.is_empty() {
            return Ok(true);
        }
        if !(self.last.contains(&range.start) && range.end <= self.last.end) {
            let end = next_data(self.file, range.start, u64::MAX)?.map_or(u64::MAX, |data| data.start);
            self.last = range.start..end;
        }
        Ok(range.end <= self.last.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::FileExt;

    const BLOCK: u64 = 4096;

    proptest! {
        #[test]
        fn what_is_covered_holds_nothing(
            data in prop::collection::vec(0u64..64, 0..20),
            asked in prop::collection::vec((0u64..64 * BLOCK, 0u64..4 * BLOCK), 1..20),
        ) {
            let file = tempfile::tempfile().unwrap();
            file.set_len(68 * BLOCK).unwrap();
            data.iter().for_each(|block| file.write_all_at(&[1; BLOCK as usize], block * BLOCK).unwrap());
            let mut holes = Holes::of(&file);
            for (start, len) in asked {
                let mut bytes = vec![7; len as usize];
                file.read_exact_at(&mut bytes, start).unwrap();
                // The other way round is for the file system to say.
                prop_assert!(!holes.cover(start..start + len).unwrap() || bytes.iter().all(|byte| *byte == 0));
            }
        }
    }
}
