//! Which clusters of a disk a layer of it holds: the map of an overlay, in memory and in a snapshot. Pure.
//!
//! A layer lies over other layers, or over nothing. Where it is absent one sees what lies below, and zeros below all.
//!
//! A map takes 1 KiB for each 16 MiB of disk in which the layer holds anything, whatever a guest does to it.

use std::collections::BTreeMap;
use std::ops::Range;

/// Unit in which a layer holds a disk, in bytes. The last cluster of a disk may be shorter.
pub const CLUSTER_BYTES: u64 = 4096;
/// Clusters in a block of the map.
const BLOCK: u64 = 64 * WORDS as u64;
/// Words of each kind in a block.
const WORDS: usize = 64;
/// Longest map file of any disk, in bytes: that of one of which 2 TiB are in use. It is read whole.
pub const MAX_MAP_BYTES: u64 = 128 << 20;
/// Length of a block in a map file, in bytes: its number and its words.
const RECORD: usize = 8 + 2 * 8 * WORDS;

/// What a layer holds of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cluster {
    /// Nothing: what lies below is seen.
    Absent,
    /// Its bytes.
    Data,
    /// That it is zero.
    Zero,
}

/// Why bytes are no map of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// Not a whole number of blocks.
    #[error("its length of {0} bytes is not that of a map")]
    Length(usize),
    /// A block that is out of order, or beyond the end of the disk, or empty.
    #[error("its block {0} is out of place")]
    Block(u64),
    /// A cluster that is both data and zero, or lies beyond the end of the disk.
    #[error("its block {0} has clusters that no disk has")]
    Clusters(u64),
}

/// The clusters of 16 MiB of disk, one bit each. None is both.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Block {
    data: [u64; WORDS],
    zero: [u64; WORDS],
}

impl Block {
    const EMPTY: Block = Block { data: [0; WORDS], zero: [0; WORDS] };

    fn is_empty(&self) -> bool {
        *self == Block::EMPTY
    }

    fn data_count(&self) -> u64 {
        self.data.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    fn get(&self, cluster: u64) -> Cluster {
        let (word, bit) = (((cluster % BLOCK) / 64) as usize, 1 << (cluster % 64));
        match (self.data[word] & bit != 0, self.zero[word] & bit != 0) {
            (true, _) => Cluster::Data,
            (false, true) => Cluster::Zero,
            (false, false) => Cluster::Absent,
        }
    }

    /// Whether all 64 clusters from `cluster`, a multiple of 64, are so.
    fn word_is(&self, cluster: u64, state: Cluster) -> bool {
        let word = ((cluster % BLOCK) / 64) as usize;
        let wanted = match state {
            Cluster::Absent => (0, 0),
            Cluster::Data => (u64::MAX, 0),
            Cluster::Zero => (0, u64::MAX),
        };
        (self.data[word], self.zero[word]) == wanted
    }
}

/// Which clusters of a disk a layer holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Clusters {
    count: u64,
    blocks: BTreeMap<u64, Box<Block>>,
    data: u64,
}

impl Clusters {
    /// Nothing of a disk of this size, in bytes.
    pub fn new(disk_bytes: u64) -> Clusters {
        Clusters { count: disk_bytes.div_ceil(CLUSTER_BYTES), blocks: BTreeMap::new(), data: 0 }
    }

    /// Number of clusters of the disk.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Number of clusters whose bytes the layer holds.
    pub fn data(&self) -> u64 {
        self.data
    }

    /// End of the last cluster whose bytes the layer holds, 0 if it holds none: its file is no shorter, but for a last cluster that is.
    pub fn end_of_data(&self) -> u64 {
        let last = self.blocks.iter().rev().find_map(|(number, block)| {
            let word = block.data.iter().rposition(|word| *word != 0)?;
            Some(number * BLOCK + word as u64 * 64 + 64 - u64::from(block.data[word].leading_zeros()))
        });
        last.unwrap_or(0)
    }

    /// Whether all clusters are absent.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// What the layer holds of a cluster.
    pub fn get(&self, cluster: u64) -> Cluster {
        self.blocks.get(&(cluster / BLOCK)).map_or(Cluster::Absent, |block| block.get(cluster))
    }

    /// Notes what the layer now holds of these clusters. Those beyond the end of the disk are left out.
    pub fn set(&mut self, clusters: Range<u64>, to: Cluster) {
        let mut at = clusters.start;
        let end = clusters.end.min(self.count);
        while at < end {
            let number = at / BLOCK;
            let block = self.blocks.entry(number).or_insert_with(|| Box::new(Block::EMPTY));
            let block_end = ((number + 1) * BLOCK).min(end);
            let before = block.data_count();
            while at < block_end {
                let len = (64 - at % 64).min(block_end - at);
                let mask = (u64::MAX >> (64 - len)) << (at % 64);
                let word = ((at % BLOCK) / 64) as usize;
                let (data, zero) = (&mut block.data[word], &mut block.zero[word]);
                (*data, *zero) = (*data & !mask, *zero & !mask);
                match to {
                    Cluster::Absent => {}
                    Cluster::Data => *data |= mask,
                    Cluster::Zero => *zero |= mask,
                }
                at += len;
            }
            self.data = self.data - before + block.data_count();
            if block.is_empty() {
                self.blocks.remove(&number);
            }
        }
    }

    /// Runs of clusters that are alike, in order, which together make up `within`.
    pub fn runs(&self, within: Range<u64>) -> impl Iterator<Item = (Range<u64>, Cluster)> + '_ {
        let (mut at, end) = (within.start, within.end.min(self.count));
        std::iter::from_fn(move || {
            let start = at;
            let state = (start < end).then(|| self.get(start))?;
            while at < end {
                match self.blocks.get(&(at / BLOCK)) {
                    Some(block) if at.is_multiple_of(64) && block.word_is(at, state) => at += 64,
                    Some(block) if block.get(at) == state => at += 1,
                    // To where the next block is, if any.
                    None if state == Cluster::Absent => {
                        at = self.blocks.range(at / BLOCK..).next().map_or(end, |(number, _)| number * BLOCK);
                    }
                    _ => break,
                }
            }
            at = at.min(end);
            Some((start..at, state))
        })
    }

    /// Lays a newer layer of the same disk on top: what it holds takes the place of what was held.
    pub fn lay(&mut self, newer: &Clusters) {
        for (number, top) in &newer.blocks {
            let block = self.blocks.entry(*number).or_insert_with(|| Box::new(Block::EMPTY));
            let before = block.data_count();
            for word in 0..WORDS {
                let (data, zero) = (top.data[word], top.zero[word]);
                block.data[word] = data | block.data[word] & !zero;
                block.zero[word] = zero | block.zero[word] & !data;
            }
            self.data = self.data - before + block.data_count();
        }
    }

    /// Makes what is zero absent, which is the same where nothing lies below.
    pub fn forget_zeros(&mut self) {
        self.blocks.retain(|_, block| {
            block.zero = [0; WORDS];
            !block.is_empty()
        });
    }

    /// The contents of a map file: for each block that is not empty its number and its words, data first, all 64 bits
    /// little-endian.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.blocks.len() * RECORD);
        for (number, block) in &self.blocks {
            for word in std::iter::once(number).chain(&block.data).chain(&block.zero) {
                out.extend_from_slice(&word.to_le_bytes());
            }
        }
        out
    }

    /// Longest map file of a disk of this size, in bytes.
    pub fn max_encoded(disk_bytes: u64) -> u64 {
        disk_bytes.div_ceil(CLUSTER_BYTES).div_ceil(BLOCK).saturating_mul(RECORD as u64).min(MAX_MAP_BYTES)
    }

    /// Decodes the contents of a map file.
    pub fn decode(bytes: &[u8], disk_bytes: u64) -> Result<Clusters, MapError> {
        let mut clusters = Clusters::new(disk_bytes);
        let (records, []) = bytes.as_chunks::<RECORD>() else { return Err(MapError::Length(bytes.len())) };
        for record in records {
            let mut words = record.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word));
            let number = words.next().unwrap_or(u64::MAX);
            let mut block = Box::new(Block::EMPTY);
            block.data.iter_mut().chain(&mut block.zero).zip(words).for_each(|(word, saved)| *word = saved);
            let in_order = clusters.blocks.last_key_value().is_none_or(|(last, _)| *last < number);
            if !in_order || block.is_empty() || number >= clusters.count.div_ceil(BLOCK) {
                return Err(MapError::Block(number));
            }
            let both = block.data.iter().zip(&block.zero).any(|(data, zero)| data & zero != 0);
            let beyond = (clusters.count..(number + 1) * BLOCK).any(|cluster| block.get(cluster) != Cluster::Absent);
            if both || beyond {
                return Err(MapError::Clusters(number));
            }
            clusters.data += block.data_count();
            clusters.blocks.insert(number, block);
        }
        Ok(clusters)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DISK: u64 = 3 * BLOCK * CLUSTER_BYTES - 512;

    fn states() -> impl Strategy<Value = Cluster> {
        prop::sample::select(vec![Cluster::Absent, Cluster::Data, Cluster::Zero])
    }

    /// A map and the plain list of states that it stands for.
    fn maps() -> impl Strategy<Value = (Clusters, Vec<Cluster>)> {
        let lens = prop_oneof![1u64..5, 60u64..70, 1u64..2 * BLOCK];
        prop::collection::vec((0..3 * BLOCK, lens, states()), 0..12).prop_map(|steps| {
            let (mut map, mut model) = (Clusters::new(DISK), vec![Cluster::Absent; 3 * BLOCK as usize]);
            for (from, len, state) in steps {
                map.set(from..from + len, state);
                model[from as usize..((from + len) as usize).min(3 * BLOCK as usize)].fill(state);
            }
            (map, model)
        })
    }

    #[test]
    fn bytes_that_are_no_map_are_refused() {
        let mut map = Clusters::new(DISK);
        map.set(5..70, Cluster::Data);
        map.set(BLOCK..BLOCK + 1, Cluster::Zero);
        let good = map.encode();
        assert_eq!(good.len(), 2 * RECORD);
        assert!(good.len() as u64 <= Clusters::max_encoded(DISK));
        let refused = |change: fn(&mut Vec<u8>)| {
            let mut bytes = good.clone();
            change(&mut bytes);
            Clusters::decode(&bytes, DISK).unwrap_err()
        };
        assert_eq!(refused(|b| b.truncate(RECORD + 1)), MapError::Length(RECORD + 1));
        assert_eq!(refused(|b| b[RECORD] = 0), MapError::Block(0));
        assert_eq!(refused(|b| b[RECORD] = 3), MapError::Block(3));
        assert_eq!(refused(|b| b[RECORD + 7] = 0x80), MapError::Block(1 << 63 | 1));
        assert_eq!(refused(|b| b[8..RECORD].fill(0)), MapError::Block(0));
        assert_eq!(refused(|b| b[8 + 512] = 0xff), MapError::Clusters(0));
        let short = Clusters::decode(&good[..RECORD], 70 * CLUSTER_BYTES).unwrap();
        assert_eq!(short.data(), 65);
        assert_eq!(Clusters::decode(&good[..RECORD], 69 * CLUSTER_BYTES), Err(MapError::Clusters(0)));
    }

    proptest! {
        #[test]
        fn a_map_is_a_list_of_states((map, model) in maps(), from in 0..3 * BLOCK, len in 0..3 * BLOCK) {
            prop_assert_eq!(map.count(), 3 * BLOCK);
            prop_assert_eq!(map.data(), model.iter().filter(|state| **state == Cluster::Data).count() as u64);
            let mut at = from;
            let mut last = None;
            for (run, state) in map.runs(from..from + len) {
                prop_assert_eq!(run.start, at);
                prop_assert!(run.end > run.start && last != Some(state), "runs are as long as they can be");
                prop_assert!(model[run.start as usize..run.end as usize].iter().all(|s| *s == state));
                (at, last) = (run.end, Some(state));
            }
            prop_assert_eq!(at, (from + len).min(3 * BLOCK).max(from));
            let end = model.iter().rposition(|state| *state == Cluster::Data).map_or(0, |last| last as u64 + 1);
            prop_assert_eq!(map.end_of_data(), end);
        }

        #[test]
        fn laying_on_top_replaces_what_is_held((mut below, lower) in maps(), (above, upper) in maps()) {
            below.lay(&above);
            for cluster in 0..3 * BLOCK {
                let wanted = match upper[cluster as usize] {
                    Cluster::Absent => lower[cluster as usize],
                    held => held,
                };
                prop_assert_eq!(below.get(cluster), wanted);
            }
            prop_assert_eq!(below.data(), (0..3 * BLOCK).filter(|c| below.get(*c) == Cluster::Data).count() as u64);
        }

        #[test]
        fn zeros_are_forgotten_and_nothing_else((mut map, model) in maps()) {
            map.forget_zeros();
            let mut wanted = Clusters::new(DISK);
            for (cluster, _) in model.iter().enumerate().filter(|(_, state)| **state == Cluster::Data) {
                wanted.set(cluster as u64..cluster as u64 + 1, Cluster::Data);
            }
            prop_assert_eq!(map, wanted);
        }

        #[test]
        fn a_map_comes_back((map, _) in maps()) {
            prop_assert_eq!(Clusters::decode(&map.encode(), DISK), Ok(map));
        }

        #[test]
        fn no_bytes_do_harm(mut bytes in prop::collection::vec(any::<u8>(), RECORD), disk in 0..DISK) {
            bytes[1..8].fill(0);
            if let Ok(map) = Clusters::decode(&bytes, disk) {
                prop_assert_eq!(map.encode(), bytes);
            }
        }
    }
}
