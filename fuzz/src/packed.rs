//! The index of a packed memory image, and the map of the pages that an image over another one holds.
//!
//! An input begins with the size of the image in pages, that of the file beyond the index in units of 16 bytes, and whether there is a
//! parent; the rest is the index, or the map. The index is read as it is, and once more with its header set right.

use snapshot::clusters::Clusters;
use snapshot::packed::{ENTRY_BYTES, Entry, HEADER_BYTES, Index, index_bytes};
use snapshot::{CHUNK_BYTES, PAGE_BYTES};

/// Reads an index and a map.
pub fn check(data: &[u8]) {
    let Some(([low, high, stored, parent], bytes)) = data.split_first_chunk() else { return };
    let image = (1 + u64::from(u16::from_le_bytes([*low, *high]))) * PAGE_BYTES;
    let (file, has_parent) = (index_bytes(image) + 16 * u64::from(*stored), parent & 1 == 1);
    index(bytes, image, file, has_parent);
    if let Some(entries) = bytes.get(..(index_bytes(image) - HEADER_BYTES) as usize) {
        let blank = Index::new(vec![Entry::Zero; entries.len() / ENTRY_BYTES as usize], 0).encode();
        index(&[&blank[..HEADER_BYTES as usize], entries].concat(), image, file, has_parent);
    }
    if let Ok(map) = Clusters::decode(bytes, image) {
        assert_eq!(map.encode(), bytes, "what is accepted comes back");
        assert!(map.data() <= map.count() && map.count() == image / PAGE_BYTES);
        assert_eq!(map.runs(0..u64::MAX).map(|(run, _)| run.end - run.start).sum::<u64>(), map.count());
    }
}

fn index(bytes: &[u8], image: u64, file: u64, has_parent: bool) {
    let Ok(index) = Index::decode(bytes, image, file, has_parent) else { return };
    assert_eq!(index.encode(), bytes, "what is accepted comes back");
    assert!(index.hot_bytes() <= file - index_bytes(image));
    let chunks = image.div_ceil(CHUNK_BYTES);
    for number in 0..chunks {
        let whole = (image - number * CHUNK_BYTES).min(CHUNK_BYTES);
        let (offset, len) = match index.entry(number) {
            Entry::Zero => continue,
            Entry::Parent => {
                assert!(has_parent);
                continue;
            }
            Entry::Plain { offset } => (offset, whole),
            Entry::Zstd { offset, len } => (offset, len.into()),
        };
        assert!(len <= whole && offset >= index_bytes(image) && offset + len <= file, "{number} lies in the file");
    }
    assert_eq!(index.entry(chunks), Entry::Zero);
}

/// An index with an entry of each kind, and a map with pages of each.
pub fn seeds() -> Vec<Vec<u8>> {
    let image = 4 * CHUNK_BYTES;
    let head = |parent: u8| [((image / PAGE_BYTES - 1) as u16).to_le_bytes().as_slice(), &[255, parent]].concat();
    let data = index_bytes(image);
    let entries = vec![Entry::Zero, Entry::Parent, Entry::Zstd { offset: data, len: 4000 }, Entry::Zero];
    let mut map = Clusters::new(image);
    map.set(3..20, snapshot::clusters::Cluster::Data);
    map.set(20..30, snapshot::clusters::Cluster::Zero);
    vec![
        [head(1), Index::new(entries, 4000).encode()].concat(),
        [head(0), Index::new(vec![Entry::Zero; 4], 0).encode()].concat(),
        [head(0), map.encode()].concat(),
    ]
}
