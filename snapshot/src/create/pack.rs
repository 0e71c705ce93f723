//! Writing a packed memory image: each chunk once, compressed where that is shorter, by as many threads as there are CPUs.

use super::base::Base;
use super::memory::{Fault, MemoryDigest, Over};
use super::{Cancel, CreateError, Staging};
use crate::chunk::Digest;
use crate::digests::Digests;
use crate::image::MemoryImage;
use crate::manifest::{Memory, MemoryRegion, Packed};
use crate::packed::{self, Entry, Index};
use crate::page_runs::PageRuns;
use crate::threads;
use crate::{CHUNK_BYTES, PAGE_BYTES, file};
use rustix::fs::Mode;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// How hard zstd tries. Higher levels take several times as long for some percent.
const LEVEL: i32 = 3;
/// Chunks that a thread compresses before what it has is written.
const CHUNKS_PER_TURN: usize = 32;
/// Pages in a chunk.
const CHUNK_PAGES: u64 = CHUNK_BYTES / PAGE_BYTES;

/// What is to be packed, and how.
#[derive(Clone, Copy, Debug)]
pub struct Packing<'a> {
    /// The memory.
    pub image: &'a MemoryImage,
    /// Where it belongs in the guest.
    pub regions: &'a [MemoryRegion],
    /// The snapshot that the packed image is to lie over, if it is not to stand alone.
    pub over: Option<&'a Base>,
    /// Pages that clones are known to use: the chunks that have them come first.
    pub hot: &'a PageRuns,
}

impl Staging {
    /// Writes the memory of a snapshot as a packed image. Each chunk is checked on the way. `cancel` is looked at now and then, and
    /// `progress` is told how much of what is to be stored is, and how much that is, in bytes of memory. Nothing is synced yet.
    pub fn write_packed(
        &mut self,
        packing: Packing<'_>,
        cancel: &dyn Cancel,
        progress: &dyn Fn(u64, u64),
    ) -> Result<MemoryDigest, CreateError> {
        let Packing { image, regions, over, hot } = packing;
        let size = image.size();
        Memory::check_layout(regions, size)?;
        if over.is_some_and(|base| base.image.size() != size) {
            let source = io::Error::new(io::ErrorKind::InvalidData, "it has another size than that of the parent");
            return Err(CreateError::Source { offset: 0, source });
        }
        let parent = over.map(|base| Ok::<_, CreateError>((self.parent(base)?, base.dir().to_owned()))).transpose()?;
        let plan = plan(image.digests(), over.map(|base| base.image.digests()), hot);

        let failed = |staging: &Staging, e| {
            staging.write_error(file::PACKED_MEMORY, packed::index_bytes(size) + plan.bytes(image), e)
        };
        let file = self.dir().create_file(file::PACKED_MEMORY).map_err(|e| failed(self, e))?;
        let mut writer = Writer {
            file: &file,
            end: packed::index_bytes(size),
            room: self.room(),
            digest: blake3::Hasher::new(),
            entries: Vec::new(),
        };
        if let Err(fault) = writer.write(image, &plan, cancel, progress) {
            let needed = || packed::index_bytes(size) + plan.bytes(image);
            return Err(self.failed(file::PACKED_MEMORY, fault, needed));
        }
        let (file_bytes, data_digest) = (writer.end, writer.digest.finalize().to_hex().to_string());
        let index = plan.index(&writer.entries, size).encode();
        let written = file.write_all_at(&index, 0).and_then(|()| Ok(rustix::fs::fchmod(&file, Mode::RUSR)?));
        written.map_err(|e| failed(self, e))?;
        self.take(file_bytes)?;
        let digests: Vec<u8> =
            (0..image.chunks()).filter_map(|index| image.digests().get(index)).flatten().copied().collect();
        Ok(MemoryDigest {
            regions: regions.to_vec(),
            size_bytes: size,
            data_bytes: file_bytes,
            root: blake3::hash(&digests),
            digests,
            file,
            packed: Some(Packed { file_bytes, index_digest: blake3::hash(&index).to_hex().to_string(), data_digest }),
            over: parent.map(|(parent, dir)| Over { parent, dir, map: None }),
        })
    }
}

/// What becomes of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Zero,
    Parent,
    /// It is what is stored as this number.
    Stored(usize),
}

/// What is to be stored.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    /// Of each chunk.
    places: Vec<Place>,
    /// The chunks that are stored, in the order in which they will lie in the file. No two are equal.
    stored: Vec<u64>,
    /// How many of them clones are known to use: the first.
    hot: usize,
}

/// Decides what is stored, and in which order: chunks with hot pages first, then the others, each in the order of their numbers.
fn plan(digests: &Digests, below: Option<&Digests>, hot: &PageRuns) -> Plan {
    let chunk_runs = hot.runs().iter().map(|run| run.start / CHUNK_PAGES..run.end.div_ceil(CHUNK_PAGES));
    let hot = PageRuns::new(chunk_runs).before(digests.chunks());
    let mut plan = Plan { places: vec![Place::Zero; digests.chunks() as usize], stored: Vec::new(), hot: 0 };
    let mut known: HashMap<&Digest, usize> = HashMap::new();
    let mut put = |plan: &mut Plan, index: u64| {
        let Some(digest) = digests.get(index) else { return };
        plan.places[index as usize] = if digests.is_zero(index) {
            Place::Zero
        } else if below.is_some_and(|below| digests.agree(below, index)) {
            Place::Parent
        } else {
            Place::Stored(*known.entry(digest).or_insert_with(|| {
                plan.stored.push(index);
                plan.stored.len() - 1
            }))
        };
    };
    hot.runs().iter().cloned().flatten().for_each(|index| put(&mut plan, index));
    plan.hot = plan.stored.len();
    (0..digests.chunks()).filter(|index| hot.pages_in(*index..index + 1) == 0).for_each(|index| put(&mut plan, index));
    plan
}

impl Plan {
    /// Bytes of memory that are stored.
    fn bytes(&self, image: &MemoryImage) -> u64 {
        self.stored.iter().map(|index| image.digests().chunk_len(*index) as u64).sum()
    }

    /// The index, given where each of the stored chunks lies, and the end of the file as one more.
    fn index(&self, stored: &[(Entry, u64)], image_bytes: u64) -> Index {
        let entries = self.places.iter().map(|place| match place {
            Place::Zero => Entry::Zero,
            Place::Parent => Entry::Parent,
            Place::Stored(number) => stored[*number].0,
        });
        let hot_end = self.hot.checked_sub(1).map_or(packed::index_bytes(image_bytes), |last| stored[last].1);
        Index::new(entries.collect(), hot_end - packed::index_bytes(image_bytes))
    }
}

/// Puts chunks one behind the other.
struct Writer<'f> {
    file: &'f File,
    /// How long the file is, or would be.
    end: u64,
    /// How long it may be.
    room: u64,
    /// Of all that was put there.
    digest: blake3::Hasher,
    /// Where each chunk lies, and where it ends.
    entries: Vec<(Entry, u64)>,
}

impl Writer<'_> {
    fn write(
        &mut self,
        image: &MemoryImage,
        plan: &Plan,
        cancel: &dyn Cancel,
        progress: &dyn Fn(u64, u64),
    ) -> Result<(), Fault> {
        let (mut done, total) = (0, plan.bytes(image));
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        progress(done, total);
        for turn in plan.stored.chunks(CHUNKS_PER_TURN * threads) {
            if cancel.is_cancelled() {
                return Err(Fault::Cancelled);
            }
            self.append(&compress(image, turn)?)?;
            done += turn.iter().map(|index| image.digests().chunk_len(*index) as u64).sum::<u64>();
            progress(done, total);
        }
        Ok(())
    }

    fn append(&mut self, chunks: &[Stored]) -> Result<(), Fault> {
        let start = self.end;
        for chunk in chunks {
            let (offset, len) = (self.end, chunk.bytes.len() as u32);
            self.end += u64::from(len);
            self.entries
                .push((if chunk.is_frame { Entry::Zstd { offset, len } } else { Entry::Plain { offset } }, self.end));
        }
        if self.end > self.room {
            return Err(Fault::Full(self.end));
        }
        let bytes: Vec<u8> = chunks.iter().flat_map(|chunk| &chunk.bytes).copied().collect();
        self.digest.update(&bytes);
        self.file.write_all_at(&bytes, start).map_err(Fault::Write)
    }
}

/// A chunk as it will lie in the file.
struct Stored {
    bytes: Vec<u8>,
    is_frame: bool,
}

/// Reads, checks and compresses chunks, which come back in the same order.
fn compress(image: &MemoryImage, chunks: &[u64]) -> Result<Vec<Stored>, Fault> {
    let shares = threads::split(chunks.len() as u64, 1, |run| {
        compress_share(image, &chunks[run.start as usize..run.end as usize])
    })?;
    Ok(shares.into_iter().flatten().collect())
}

fn compress_share(image: &MemoryImage, chunks: &[u64]) -> Result<Vec<Stored>, Fault> {
    let mut compressor = zstd::bulk::Compressor::new(LEVEL).map_err(Fault::Write)?;
    let mut buf = vec![0; CHUNK_BYTES as usize];
    let mut compress_one = |index: u64| {
        let read = image.read_chunk(index, &mut buf);
        let unreadable = |e| Fault::Source { offset: index * CHUNK_BYTES, source: io::Error::other(e) };
        let chunk = &buf[..read.map_err(unreadable)?];
        let frame = compressor.compress(chunk).map_err(Fault::Write)?;
        let is_frame = frame.len() < chunk.len();
        Ok(Stored { bytes: if is_frame { frame } else { chunk.to_vec() }, is_frame })
    };
    chunks.iter().map(|index| compress_one(*index)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk;
    use proptest::prelude::*;

    /// Digests of chunks that are filled with these bytes.
    fn digests(fills: &[u8]) -> Digests {
        let table: Vec<u8> = fills.iter().flat_map(|fill| chunk::digest(&[*fill; CHUNK_BYTES as usize])).collect();
        let memory = Memory {
            file: file::MEMORY.to_owned(),
            size_bytes: fills.len() as u64 * CHUNK_BYTES,
            regions: Vec::new(),
            chunk_bytes: CHUNK_BYTES,
            digests: file::DIGESTS.to_owned(),
            root: blake3::hash(&table).to_hex().to_string(),
            packed: None,
            parent: None,
            map: None,
        };
        Digests::check(&memory, &table).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn each_chunk_is_stored_once_if_at_all_and_hot_ones_first(
            fills in prop::collection::vec((0u8..4, 0u8..4), 1..30),
            hot in prop::collection::btree_set(0u64..600, 0..20),
            over in any::<bool>(),
        ) {
            let (own, parent): (Vec<u8>, Vec<u8>) = fills.iter().copied().unzip();
            let below = over.then(|| digests(&parent));
            let hot_chunks: Vec<u64> = hot.iter().map(|page| page / 16).filter(|chunk| *chunk < own.len() as u64).collect();
            let plan = plan(&digests(&own), below.as_ref(), &PageRuns::of_pages(hot));
            for (index, place) in plan.places.iter().enumerate() {
                match place {
                    Place::Zero => prop_assert_eq!(own[index], 0),
                    Place::Parent => prop_assert!(over && own[index] == parent[index] && own[index] != 0),
                    Place::Stored(number) => {
                        prop_assert_eq!(own[plan.stored[*number] as usize], own[index]);
                        prop_assert!(own[index] != 0 && !(over && own[index] == parent[index]));
                        prop_assert!(*number < plan.hot || !hot_chunks.contains(&(index as u64)));
                    }
                }
            }
            let mut kinds: Vec<u8> = plan.stored.iter().map(|index| own[*index as usize]).collect();
            kinds.sort_unstable();
            prop_assert!(kinds.windows(2).all(|pair| pair[0] < pair[1]), "{:?}", kinds);
            prop_assert!(plan.stored[..plan.hot].iter().all(|index| hot_chunks.contains(index)));
            prop_assert!(plan.stored[..plan.hot].is_sorted() && plan.stored[plan.hot..].is_sorted());
        }
    }
}
