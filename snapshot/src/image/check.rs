//! Comparing a whole image with its digests, on as many threads as there are CPUs.

use super::layer::{Form, Patience};
use super::{ImageError, MemoryImage};
use crate::CHUNK_BYTES;
use crate::create::next_data;
use crate::digests::Digests;
use crate::holes::Holes;
use crate::threads;
use std::ops::Range;

/// Fewest chunks for which a thread is worth its start.
const CHUNKS_PER_THREAD: u64 = 256;

/// What a comparison has found.
#[derive(Debug, Default)]
pub(crate) struct Checked {
    /// Bytes that were read.
    pub(crate) bytes: u64,
    /// Chunks that differ.
    pub(crate) damaged: u64,
    /// The first of them.
    pub(crate) first: Option<ImageError>,
}

impl Checked {
    /// The first damage as an error.
    pub(crate) fn whole(self) -> Result<u64, ImageError> {
        self.first.map_or(Ok(self.bytes), Err)
    }

    fn damage(&mut self, what: ImageError) {
        self.damaged += 1;
        self.first.get_or_insert(what);
    }

    /// With what was found further on.
    fn and(self, later: Checked) -> Checked {
        Checked {
            bytes: self.bytes + later.bytes,
            damaged: self.damaged + later.damaged,
            first: self.first.or(later.first),
        }
    }
}

impl MemoryImage {
    /// Compares what the uppermost layer holds with the digests, holes that should be data and data that should be holes included,
    /// and that of which it holds nothing with the digests of the image below.
    pub(crate) fn check(&self, below: Option<&Digests>) -> Result<Checked, ImageError> {
        let parts = threads::split(self.chunks(), CHUNKS_PER_THREAD, |part| self.check_part(part, below))?;
        Ok(parts.into_iter().fold(Checked::default(), Checked::and))
    }

    fn check_part(&self, part: Range<u64>, below: Option<&Digests>) -> Result<Checked, ImageError> {
        let mut checked = Checked::default();
        let mut buf = vec![0; CHUNK_BYTES as usize];
        let mut holes: Vec<Holes<'_>> = self.layers.iter().map(|layer| Holes::of(&layer.file)).collect();
        let mut index = part.start;
        while index < part.end {
            let held = self.next_held(index)?;
            let held = held.start.min(part.end)..held.end.min(part.end);
            for chunk in index..held.start {
                let is_right = match below {
                    Some(below) => self.digests.agree(below, chunk),
                    None => self.chunk_is_zero(chunk),
                };
                if !is_right {
                    checked.damage(self.damaged(chunk));
                }
            }
            for chunk in held.clone() {
                if self.is_hole(chunk, &mut holes)? {
                    if !self.chunk_is_zero(chunk) {
                        checked.damage(self.damaged(chunk));
                    }
                    continue;
                }
                let buf = &mut buf[..self.digests.chunk_len(chunk)];
                match self.assemble(chunk, buf, Patience::Waits) {
                    Ok(_) if self.digests.is_right(chunk, buf) => {}
                    Ok(_) => checked.damage(self.damaged(chunk)),
                    Err(damaged @ ImageError::Damaged { .. }) => checked.damage(damaged),
                    Err(other) => return Err(other),
                }
                checked.bytes += buf.len() as u64;
            }
            index = held.end;
        }
        Ok(checked)
    }

    /// Whether a chunk is zero because no file has anything where it would be read: a file that claims much and holds nothing is
    /// not read through.
    fn is_hole(&self, chunk: u64, holes: &mut [Holes<'_>]) -> Result<bool, ImageError> {
        for (layer, holes) in self.layers.iter().zip(holes) {
            let Some(bytes) = layer.place_of(chunk) else { return Ok(false) };
            let offset = bytes.start;
            let unreadable = |source| ImageError::Read { path: layer.path.clone(), offset, source };
            if !holes.cover(bytes).map_err(unreadable)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The next run of chunks, from `index` on, of which the uppermost layer holds something. Those of a whole image that are holes
    /// of its file are none of them.
    fn next_held(&self, index: u64) -> Result<Range<u64>, ImageError> {
        let layer = &self.layers[0];
        let end = self.chunks();
        if let Form::Whole = layer.form {
            let at = index * CHUNK_BYTES;
            let data = next_data(&layer.file, at, self.size());
            let data = data.map_err(|source| ImageError::Read { path: layer.path.clone(), offset: at, source })?;
            return Ok(
                data.map_or(end..end, |data| (data.start / CHUNK_BYTES).max(index)..data.end.div_ceil(CHUNK_BYTES))
            );
        }
        let start = (index..end).find(|chunk| layer.holds(*chunk)).unwrap_or(end);
        Ok(start..(start..end).find(|chunk| !layer.holds(*chunk)).unwrap_or(end))
    }
}
