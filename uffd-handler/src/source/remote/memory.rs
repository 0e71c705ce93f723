//! Chunks kept in memory, those fetched last: mostly such as nobody has asked for yet. Pure.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// Bytes of a chunk, found right.
pub type Bytes = Arc<[u8]>;

/// A bounded number of chunks. The oldest goes first.
#[derive(Debug)]
pub struct ChunkCache {
    most: usize,
    order: VecDeque<u64>,
    chunks: HashMap<u64, Bytes>,
}

impl ChunkCache {
    /// Room for so many chunks.
    pub fn new(most: usize) -> Self {
        Self { most, order: VecDeque::new(), chunks: HashMap::new() }
    }

    /// A chunk, if it is there.
    pub fn get(&self, index: u64) -> Option<Bytes> {
        self.chunks.get(&index).cloned()
    }

    /// Keeps a chunk.
    pub fn insert(&mut self, index: u64, bytes: Bytes) {
        if self.chunks.insert(index, bytes).is_none() {
            self.order.push_back(index);
        }
        while self.order.len() > self.most {
            let oldest = self.order.pop_front();
            oldest.and_then(|oldest| self.chunks.remove(&oldest));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_holds_the_newest_and_no_more(most in 0usize..6, inserts in prop::collection::vec((0u64..12, any::<u8>()), 0..60)) {
            let mut cache = ChunkCache::new(most);
            let mut model: Vec<(u64, u8)> = Vec::new();
            for (index, byte) in inserts {
                cache.insert(index, [byte].into());
                match model.iter_mut().find(|(known, _)| *known == index) {
                    Some(entry) => entry.1 = byte,
                    None => model.push((index, byte)),
                }
                model.drain(..model.len().saturating_sub(most));
                for index in 0..12 {
                    let wanted = model.iter().find(|(known, _)| *known == index).map(|(_, byte)| *byte);
                    prop_assert_eq!(cache.get(index).map(|bytes| bytes[0]), wanted);
                }
                prop_assert_eq!((cache.chunks.len(), cache.order.len()), (model.len(), model.len()));
            }
        }
    }
}
