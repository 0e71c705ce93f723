//! Layers over an image: what a guest writes to a disk that it shares with others.
//!
//! ```text
//!   newest   top       private, written               a scratch file without a name
//!            frozen    private, no longer written     what was the top when a snapshot was taken
//!            shared    never written again            what was frozen when the guest was forked, by it or by those it comes from
//!            held      shared, never written          what the snapshot holds that this guest was restored from
//!   oldest   image     shared, never written          none if the snapshot holds the whole disk
//! ```
//!
//! Each cluster is seen in the newest layer that holds it. A scratch file has each cluster at its place, so it is sparse.
//!
//! *Freezing* makes the top a frozen layer and begins a new one. Frozen layers can be read on any thread while the guest
//! goes on. *Folding* afterwards brings the newer ones into the oldest of them, in the background and in place: what is
//! written there is hidden by the newer layers until the guest takes the result over. So a guest has two private layers at
//! most, but for the time of a snapshot, and each cluster is copied once however often a snapshot is taken.
//!
//! *Sharing* hands frozen layers on to clones, whose overlays lie over the same files from then on. Nobody writes these any more:
//! they can only be read through what is handed on, folding leaves them alone, and where the guest goes on is above them. So they
//! would become more with each fork. *Merging* copies several of them into a new one, in the background; it is shared from the
//! beginning. The newest go first, and a layer only with newer ones that hold as much together, so that a large one is not copied for
//! each few small ones.

use rustix::fs::{FallocateFlags, Mode, OFlags};
use snapshot::clusters::{CLUSTER_BYTES, Cluster, Clusters};
use snapshot::create::LayerSource;
use snapshot::disk::Held;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Most layers. So many come about only if folding and merging fail time and again, since each snapshot, whether it succeeds or
/// fails, ends with folding, and each fork with merging.
const MAX_LAYERS: usize = 32;
/// How much is copied at a time when layers are folded, in bytes.
const PIECE: usize = 1 << 20;

/// A layer: a file, and which of its clusters mean anything.
#[derive(Debug)]
pub struct Layer {
    file: Arc<File>,
    clusters: Arc<Clusters>,
    /// Others may read the file, or have made it: it is not written.
    shared: AtomicBool,
}

/// What a disk was at a checkpoint, besides its layers.
#[derive(Debug)]
pub struct OverlayMark {
    private: Clusters,
}

impl Layer {
    fn new(file: Arc<File>, clusters: Clusters, shared: bool) -> Arc<Layer> {
        Arc::new(Layer { file, clusters: Arc::new(clusters), shared: shared.into() })
    }

    fn is_shared(&self) -> bool {
        self.shared.load(Ordering::Relaxed)
    }

    /// The same layer, to be read by others. Whoever is folding others into it stops.
    fn share(&self) -> io::Result<Arc<Layer>> {
        let layer = Layer { file: read_only(&self.file)?, clusters: self.clusters.clone(), shared: true.into() };
        self.shared.store(true, Ordering::Relaxed);
        Ok(Arc::new(layer))
    }
}

/// The layer that is written.
#[derive(Debug)]
struct Top {
    file: File,
    clusters: Clusters,
}

impl Top {
    fn new(dir: &Path, size: u64) -> io::Result<Top> {
        Ok(Top { file: tempfile::tempfile_in(dir)?, clusters: Clusters::new(size) })
    }
}

/// The same file, through which nobody can write it.
fn read_only(file: &File) -> io::Result<Arc<File>> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let opened = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let unreadable =
        |e| io::Error::other(format!("a layer of its overlay cannot be opened for reading: {e}; is /proc there?"));
    Ok(Arc::new(File::from(opened.map_err(unreadable)?)))
}

/// Which of layers, the oldest first, that hold so much each are to become one for there to be `excess` fewer, or still fewer: the
/// newest, and all that hold no more than what is newer together.
fn to_merge(held: &[u64], excess: usize) -> Range<usize> {
    let mut first = held.len().saturating_sub(excess + 1);
    let mut sum: u64 = held[first..].iter().sum();
    while first > 0 && held[first - 1] <= sum {
        first -= 1;
        sum += held[first];
    }
    first..held.len()
}

/// Layers that do not change, over an image or over nothing.
#[derive(Clone, Debug)]
pub struct Stack {
    size: u64,
    image: Option<Arc<File>>,
    /// Oldest first.
    layers: Vec<Arc<Layer>>,
    /// How many of them, from the oldest on, somebody may want to come back to. No layer comes to be of both these and others.
    marked: usize,
    /// Where scratch files are made.
    dir: PathBuf,
}

impl Stack {
    /// Layers that others have made, the oldest first.
    fn over(size: u64, image: Option<Arc<File>>, layers: impl IntoIterator<Item = Held>, dir: PathBuf) -> Stack {
        let layer = |Held { file, clusters }| Layer::new(Arc::new(file), clusters, true);
        Stack { size, image, layers: layers.into_iter().map(layer).collect(), marked: 0, dir }
    }

    /// The files of the layers and what they hold, the newest first.
    pub fn layers(&self) -> impl ExactSizeIterator<Item = (&File, &Clusters)> {
        self.layers.iter().rev().map(|layer| (&*layer.file, &*layer.clusters))
    }

    /// From now on others may read the layers through what [`Stack::layers`] tells, and nobody writes them.
    fn share(&mut self) -> io::Result<()> {
        for layer in self.layers.iter_mut().filter(|layer| !layer.is_shared()) {
            *layer = layer.share()?;
        }
        Ok(())
    }

    /// Reads the bytes at `offset` until `buf` is full.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.read_below(self.layers.len(), offset, buf)
    }

    /// Reads what the `count` oldest layers show.
    fn read_below(&self, count: usize, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let Some((layer, below)) = self.layers[..count].split_last() else {
            return match &self.image {
                Some(image) => image.read_exact_at(buf, offset),
                None => {
                    buf.fill(0);
                    Ok(())
                }
            };
        };
        let Layer { file, clusters, .. } = &**layer;
        read_layer(file, clusters, offset, buf, |offset, buf| self.read_below(below.len(), offset, buf))
    }

    /// Whether anything but zeros can be seen in these clusters, or hidden.
    fn holds_data(&self, clusters: &Range<u64>) -> bool {
        let in_layer = |layer: &Arc<Layer>| layer.clusters.runs(clusters.clone()).any(|(_, s)| s == Cluster::Data);
        self.image.is_some() || self.layers.iter().any(in_layer)
    }

    /// These layers as one, to be written into a snapshot.
    pub fn flattened(&self) -> Flattened {
        let mut clusters = Clusters::new(self.size);
        self.layers.iter().for_each(|layer| clusters.lay(&layer.clusters));
        if self.image.is_none() {
            clusters.forget_zeros();
        }
        Flattened { stack: self.clone(), clusters }
    }

    /// Brings all private layers into the oldest of them. `None` if there are not two, or on `cancel`. May take long.
    pub fn fold(&self, cancel: &AtomicBool) -> io::Result<Option<Folded>> {
        // What was frozen is above what is shared.
        let shared = self.layers.iter().rposition(|layer| layer.is_shared()).map_or(0, |last| last + 1);
        let private = shared.max(self.marked);
        let Some((oldest, newer)) = self.layers[private..].split_first() else { return Ok(None) };
        if newer.is_empty() {
            return Ok(None);
        }
        let (mut clusters, mut above) = (Clusters::clone(&oldest.clusters), Clusters::new(self.size));
        newer.iter().for_each(|layer| above.lay(&layer.clusters));
        let is_over = || cancel.load(Ordering::Relaxed) || oldest.is_shared();
        match self.bring_into(&oldest.file, self.layers.len(), &above, is_over) {
            Ok(true) => {}
            // What has come into it is hidden, wherever it is.
            _ if oldest.is_shared() => return Ok(None),
            stopped => {
                // What the oldest layer does not hold is to stay a hole: nobody would give it back.
                for (run, _) in above.runs(0..above.count()).filter(|(_, state)| *state == Cluster::Data) {
                    let added = oldest.clusters.runs(run).filter(|(_, state)| *state != Cluster::Data);
                    added.for_each(|(run, _)| give_back(&oldest.file, run));
                }
                return stopped.map(|_| None);
            }
        }
        clusters.lay(&above);
        if self.image.is_none() && private == 0 {
            clusters.forget_zeros();
        }
        // Nobody is to go on writing to what has been shared meanwhile.
        let layer = Layer::new(oldest.file.clone(), clusters, oldest.is_shared());
        Ok(Some(Folded { layers: self.layers[private..].to_vec(), layer }))
    }

    /// Copies layers that others share into fewer, until there are no more than `most`, as far as that can be or until it is over. The
    /// `kept` oldest stay what they are. Nothing that is there is written. What was done is returned even if something fails then. May
    /// take long.
    pub fn merge(&mut self, kept: usize, most: usize, is_over: &dyn Fn() -> bool) -> (Vec<Folded>, io::Result<()>) {
        let mut merged = Vec::new();
        // Those that nobody shares are folded, and would be copied twice.
        let end = self.layers.iter().rposition(|layer| layer.is_shared()).map_or(0, |last| last + 1);
        // What somebody may come back to last: the others are newer.
        for zone in [self.marked.max(kept)..end, kept..self.marked.min(end)] {
            let excess = self.layers.len().saturating_sub(most).min(zone.len().saturating_sub(1));
            if excess > 0 {
                let held: Vec<u64> = self.layers[zone.clone()].iter().map(|layer| layer.clusters.data()).collect();
                let range = to_merge(&held, excess);
                match self.merged(zone.start + range.start..zone.start + range.end, is_over) {
                    Ok(Some(folded)) => {
                        self.adopt(&folded);
                        merged.push(folded);
                    }
                    Ok(None) => break,
                    Err(e) => return (merged, Err(e)),
                }
            }
        }
        (merged, Ok(()))
    }

    /// How many of the oldest layers are those of another stack, which was this one before, or older than such.
    pub fn known_to(&self, other: &Stack) -> usize {
        let is_there = |layer: &Arc<Layer>| other.layers.iter().any(|other| Arc::ptr_eq(layer, other));
        self.layers.iter().rposition(is_there).map_or(0, |last| last + 1)
    }

    /// A new layer that shows what some of these show. `None` if it is over before that.
    fn merged(&self, range: Range<usize>, is_over: &dyn Fn() -> bool) -> io::Result<Option<Folded>> {
        let layers = self.layers[range.clone()].to_vec();
        let mut clusters = Clusters::new(self.size);
        layers.iter().for_each(|layer| clusters.lay(&layer.clusters));
        let file = tempfile::tempfile_in(&self.dir)?;
        if !self.bring_into(&file, range.end, &clusters, is_over)? {
            return Ok(None);
        }
        if self.image.is_none() && range.start == 0 {
            clusters.forget_zeros();
        }
        Ok(Some(Folded { layers, layer: Layer::new(read_only(&file)?, clusters, true) }))
    }

    /// Puts one layer in the place of several. Says whether they are there.
    pub fn adopt(&mut self, folded: &Folded) -> bool {
        let Folded { layers, layer } = folded;
        let same = |pair: (&Arc<Layer>, &Arc<Layer>)| Arc::ptr_eq(pair.0, pair.1);
        // The layers that were folded are still there, if those that came later are on top of them.
        let at = self.layers.windows(layers.len()).position(|ours| ours.iter().zip(layers).all(same));
        let Some(at) = at else { return false };
        let end = at + layers.len();
        if (at + 1..end).contains(&self.marked) {
            return false;
        }
        self.layers.splice(at..end, [layer.clone()]);
        if self.marked >= end {
            self.marked -= layers.len() - 1;
        }
        true
    }

    /// Brings what the `count` oldest layers show in these clusters into a file, which is written nowhere else. `false` if it is over
    /// before that.
    fn bring_into(
        &self,
        file: &File,
        count: usize,
        clusters: &Clusters,
        is_over: impl Fn() -> bool,
    ) -> io::Result<bool> {
        let mut buf = vec![0; PIECE];
        for (run, state) in clusters.runs(0..clusters.count()) {
            match state {
                Cluster::Absent => {}
                Cluster::Zero => give_back(file, run),
                Cluster::Data => {
                    let Range { start: mut at, end } = bytes(&run, self.size);
                    while at < end {
                        if is_over() {
                            return Ok(false);
                        }
                        let piece = &mut buf[..(end - at).min(PIECE as u64) as usize];
                        self.read_below(count, at, piece)?;
                        file.write_all_at(piece, at)?;
                        at += piece.len() as u64;
                    }
                }
            }
        }
        Ok(true)
    }
}

/// Layers as one.
#[derive(Debug)]
pub struct Flattened {
    stack: Stack,
    clusters: Clusters,
}

impl LayerSource for Flattened {
    fn size(&self) -> u64 {
        self.stack.size
    }

    fn clusters(&self) -> &Clusters {
        &self.clusters
    }

    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.stack.read(offset, buf)
    }
}

/// A layer that shows what several others show.
#[derive(Clone, Debug)]
pub struct Folded {
    layers: Vec<Arc<Layer>>,
    layer: Arc<Layer>,
}

impl PartialEq for Folded {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.layer, &other.layer)
    }
}

impl Eq for Folded {}

/// A disk that a guest can write, over layers that do not change.
#[derive(Debug)]
pub struct Overlay {
    below: Stack,
    top: Top,
    /// What was written here, into whatever layers. Neither folding, sharing nor merging changes it.
    private: Clusters,
}

impl Overlay {
    /// A disk of `size` bytes with nothing written to it, over what others have written, the oldest first, over `image`.
    pub fn new(
        size: u64,
        image: Option<Arc<File>>,
        held: impl IntoIterator<Item = Held>,
        dir: PathBuf,
    ) -> io::Result<Overlay> {
        let top = Top::new(&dir, size)?;
        Ok(Overlay { below: Stack::over(size, image, held, dir), top, private: Clusters::new(size) })
    }

    /// Clusters that were written here and that can be seen. A cluster that two layers hold counts once: the older is hidden, and goes
    /// when they are folded, or is the clones' concern.
    pub fn private_clusters(&self) -> u64 {
        self.private.data()
    }

    /// How many clusters more that will be once these bytes are written.
    pub fn growth(&self, offset: u64, len: u64) -> u64 {
        let clusters = offset / CLUSTER_BYTES..(offset + len).div_ceil(CLUSTER_BYTES);
        let runs = self.private.runs(clusters).filter(|(_, state)| *state != Cluster::Data);
        runs.map(|(run, _)| run.end - run.start).sum()
    }

    /// Reads the bytes at `offset` until `buf` is full.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let Top { file, clusters } = &self.top;
        read_layer(file, clusters, offset, buf, |offset, buf| self.below.read(offset, buf))
    }

    /// Writes `data` at `offset`.
    pub fn write(&mut self, mut offset: u64, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            let whole = self.whole_clusters(offset, data.len() as u64);
            let taken = if whole.is_empty() {
                self.write_part(offset, data)?
            } else {
                let Range { start, end } = bytes(&whole, self.below.size);
                self.top.file.write_all_at(&data[..(end - start) as usize], start)?;
                self.note(whole, Cluster::Data);
                (end - start) as usize
            };
            offset += taken as u64;
            data = &data[taken..];
        }
        Ok(())
    }

    /// Writes the part of `data` that lies in its first cluster, the rest of which is kept. Returns how long that is.
    fn write_part(&mut self, offset: u64, data: &[u8]) -> io::Result<usize> {
        let cluster = offset / CLUSTER_BYTES;
        let Range { start, end } = bytes(&(cluster..cluster + 1), self.below.size);
        let data = &data[..data.len().min((end - offset) as usize)];
        if self.top.clusters.get(cluster) == Cluster::Data {
            self.top.file.write_all_at(data, offset)?;
            return Ok(data.len());
        }
        let mut copy = [0; CLUSTER_BYTES as usize];
        let copy = &mut copy[..(end - start) as usize];
        self.read(start, copy)?;
        copy[(offset - start) as usize..][..data.len()].copy_from_slice(data);
        self.top.file.write_all_at(copy, start)?;
        self.note(cluster..cluster + 1, Cluster::Data);
        Ok(data.len())
    }

    /// The whole clusters at the beginning of these bytes, if they begin with one.
    fn whole_clusters(&self, offset: u64, len: u64) -> Range<u64> {
        let (first, end) = (offset / CLUSTER_BYTES, offset + len);
        if !offset.is_multiple_of(CLUSTER_BYTES) {
            return first..first;
        }
        // The last cluster may be shorter than the others.
        first..if end == self.below.size { end.div_ceil(CLUSTER_BYTES) } else { end / CLUSTER_BYTES }
    }

    /// Makes bytes zero and gives their space back.
    pub fn zero(&mut self, offset: u64, len: u64) -> io::Result<()> {
        let (first, end) = (offset.next_multiple_of(CLUSTER_BYTES), offset + len);
        const ZEROS: [u8; CLUSTER_BYTES as usize] = [0; CLUSTER_BYTES as usize];
        if first >= end {
            return self.write(offset, &ZEROS[..len as usize]);
        }
        self.write(offset, &ZEROS[..(first - offset) as usize])?;
        let whole = self.discard(first, end - first);
        let rest = bytes(&whole, self.below.size).end.max(first)..end;
        self.write(rest.start, &ZEROS[..(rest.end - rest.start) as usize])
    }

    /// Makes whole clusters zero and gives their space back; parts of clusters are kept. Returns the clusters.
    pub fn discard(&mut self, offset: u64, len: u64) -> Range<u64> {
        let first = offset.next_multiple_of(CLUSTER_BYTES);
        let whole = self.whole_clusters(first, (offset + len).saturating_sub(first));
        give_back(&self.top.file, whole.clone());
        // Where nothing lies below there is nothing to hide, and nothing to keep a record of.
        let state = if self.below.holds_data(&whole) { Cluster::Zero } else { Cluster::Absent };
        self.note(whole.clone(), state);
        whole
    }

    /// Notes what the top now holds.
    fn note(&mut self, clusters: Range<u64>, state: Cluster) {
        self.top.clusters.set(clusters.clone(), state);
        self.private.set(clusters, state);
    }

    /// Makes what was written until now a layer that no longer changes. Returns all layers below the new top.
    pub fn freeze(&mut self) -> io::Result<Stack> {
        if !self.top.clusters.is_empty() {
            if self.below.layers.len() >= MAX_LAYERS {
                return Err(io::Error::other(
                    "its overlay has too many layers, which could not be brought together; that is tried again now: see \
                     whether the file system of TMPDIR is full, then ask again",
                ));
            }
            let top = Top::new(&self.below.dir, self.below.size)?;
            let Top { file, clusters } = std::mem::replace(&mut self.top, top);
            self.below.layers.push(Layer::new(Arc::new(file), clusters, false));
        }
        Ok(self.below.clone())
    }

    /// The same, for others to read: nobody writes these layers any more.
    pub fn share(&mut self) -> io::Result<Stack> {
        self.freeze()?;
        self.below.share()?;
        Ok(self.frozen())
    }

    /// Remembers what the disk is now, in place of what was remembered before. With `may_fold`, which nobody else may be doing, it
    /// may take as long as what was written since then takes to be copied; without it, the next time does that.
    pub fn mark(&mut self, may_fold: bool) -> io::Result<OverlayMark> {
        self.unmark();
        self.freeze()?;
        let folded = if may_fold { self.below.fold(&AtomicBool::new(false))? } else { None };
        folded.into_iter().for_each(|folded| self.adopt(&folded));
        // Whoever folds or merges from now on keeps to one side, since the newer layers may go.
        self.below.marked = self.below.layers.len();
        Ok(OverlayMark { private: self.private.clone() })
    }

    /// Nobody comes back to what was remembered.
    pub fn unmark(&mut self) {
        self.below.marked = 0;
    }

    /// Brings the disk back to what it was.
    pub fn rewind(&mut self, mark: &OverlayMark) -> io::Result<()> {
        let newer = self.below.layers.len() > self.below.marked;
        if !newer && self.top.clusters.is_empty() {
            return Ok(());
        }
        self.below.layers.truncate(self.below.marked);
        self.top.file.set_len(0)?;
        self.top.clusters = Clusters::new(self.below.size);
        self.private = mark.private.clone();
        Ok(())
    }

    /// All layers below the top.
    pub fn frozen(&self) -> Stack {
        self.below.clone()
    }

    /// Takes over the result of [`Stack::fold`] or [`Stack::merge`].
    pub fn adopt(&mut self, folded: &Folded) {
        self.below.adopt(folded);
    }
}

/// The bytes of these clusters of a disk of `size` bytes, whose last cluster may be short.
fn bytes(clusters: &Range<u64>, size: u64) -> Range<u64> {
    (clusters.start * CLUSTER_BYTES).min(size)..(clusters.end * CLUSTER_BYTES).min(size)
}

/// Reads what a layer holds in its file, and through `below` what it does not.
fn read_layer(
    file: &File,
    clusters: &Clusters,
    offset: u64,
    buf: &mut [u8],
    below: impl Fn(u64, &mut [u8]) -> io::Result<()>,
) -> io::Result<()> {
    let end = offset + buf.len() as u64;
    for (run, state) in clusters.runs(offset / CLUSTER_BYTES..end.div_ceil(CLUSTER_BYTES)) {
        let from = (run.start * CLUSTER_BYTES).max(offset);
        let to = (run.end * CLUSTER_BYTES).min(end);
        let part = &mut buf[(from - offset) as usize..(to - offset) as usize];
        match state {
            Cluster::Data => file.read_exact_at(part, from)?,
            Cluster::Zero => part.fill(0),
            Cluster::Absent => below(from, part)?,
        }
    }
    Ok(())
}

/// Gives back the space of clusters of a private layer. Where the file system cannot, it is lost until the layer goes.
///
/// What the layer does not hold is a hole already, so the whole range is given back at once, however many runs it has.
fn give_back(file: &File, clusters: Range<u64>) {
    let (start, len) = (clusters.start * CLUSTER_BYTES, (clusters.end - clusters.start) * CLUSTER_BYTES);
    // The kernel takes no empty range.
    if len > 0 {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let _ = rustix::fs::fallocate(file, flags, start, len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The last cluster is short.
    const SIZE: u64 = 24 * CLUSTER_BYTES - 1024;

    fn image() -> (Arc<File>, Vec<u8>) {
        let bytes: Vec<u8> = (0..SIZE).map(|i| (i / 97 + i % 5) as u8 | 1).collect();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&bytes, 0).unwrap();
        (Arc::new(file), bytes)
    }

    fn overlay(image: Option<Arc<File>>) -> Overlay {
        Overlay::new(SIZE, image, None, std::env::temp_dir()).unwrap()
    }

    fn read_all(overlay: &Overlay) -> Vec<u8> {
        let mut bytes = vec![0; SIZE as usize];
        overlay.read(0, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn the_image_is_never_written() {
        let (file, before) = image();
        let mut overlay = overlay(Some(file.clone()));
        overlay.write(100, b"new").unwrap();
        overlay.zero(3 * CLUSTER_BYTES, 5 * CLUSTER_BYTES).unwrap();
        assert_eq!(overlay.private_clusters(), 1);
        let mut after = vec![0; SIZE as usize];
        file.read_exact_at(&mut after, 0).unwrap();
        assert!(before == after);
    }

    #[test]
    fn discarded_space_is_given_back() {
        use std::os::unix::fs::MetadataExt;
        let mut overlay = overlay(None);
        overlay.write(0, &[7; 20 * CLUSTER_BYTES as usize]).unwrap();
        let blocks = |overlay: &Overlay| overlay.top.file.metadata().unwrap().blocks();
        let before = blocks(&overlay);
        assert_eq!(overlay.discard(1, 10 * CLUSTER_BYTES), 1..10);
        assert_eq!(overlay.private_clusters(), 11);
        assert!(blocks(&overlay) < before, "{before} blocks, and then {}", blocks(&overlay));
        assert_eq!(overlay.growth(0, SIZE), 13);
    }

    #[test]
    fn frozen_layers_are_folded_into_one_while_the_guest_goes_on() {
        let never = AtomicBool::new(false);
        let mut overlay = overlay(Some(image().0));
        for round in 0..5u8 {
            overlay.write(u64::from(round) * 5000, &[round + 1; 9000]).unwrap();
            let held = overlay.private_clusters();
            let stack = overlay.freeze().unwrap();
            assert_eq!(overlay.growth(1000, 8), 0, "what a snapshot has frozen can be written again");
            overlay.write(1000, &[0xee; 8]).unwrap();
            assert_eq!(overlay.private_clusters(), held);
            let before = read_all(&overlay);
            let folded = stack.fold(&never).unwrap();
            assert_eq!(folded.is_some(), round > 0);
            assert!(read_all(&overlay) == before, "folding is not seen");
            folded.into_iter().for_each(|folded| overlay.adopt(&folded));
            assert!(read_all(&overlay) == before, "nor is its result");
            assert_eq!(overlay.below.layers.len(), 1);
        }
        // A snapshot without anything written since adds no layer, and folds nothing.
        overlay.freeze().unwrap();
        let stack = overlay.freeze().unwrap();
        assert_eq!(stack.layers.len(), 2);
        assert!(stack.fold(&AtomicBool::new(true)).unwrap().is_none(), "cancelled");
    }

    #[test]
    fn zeros_over_nothing_are_not_recorded() {
        let mut overlay = overlay(None);
        overlay.discard(0, SIZE);
        assert_eq!(overlay.top.clusters, Clusters::new(SIZE));
        overlay.write(0, &[1; 3 * CLUSTER_BYTES as usize]).unwrap();
        overlay.freeze().unwrap();
        overlay.discard(CLUSTER_BYTES, SIZE - CLUSTER_BYTES);
        assert_eq!(overlay.top.clusters.get(1), Cluster::Zero, "it hides what is below");
        let stack = overlay.freeze().unwrap();
        let mut first = Clusters::new(SIZE);
        first.set(0..1, Cluster::Data);
        assert_eq!(*stack.flattened().clusters(), first);
        overlay.adopt(&stack.fold(&AtomicBool::new(false)).unwrap().unwrap());
        assert_eq!(*overlay.below.layers[0].clusters, first);
    }

    #[test]
    fn a_fold_that_fails_leaves_nothing_behind() {
        use std::os::unix::fs::MetadataExt;
        let never = AtomicBool::new(false);
        let mut overlay = overlay(None);
        overlay.write(0, &[1; 2 * CLUSTER_BYTES as usize]).unwrap();
        overlay.freeze().unwrap();
        overlay.write(0, &[2; 8 * CLUSTER_BYTES as usize]).unwrap();
        overlay.write(12 * CLUSTER_BYTES, &[2; 8 * CLUSTER_BYTES as usize]).unwrap();
        let stack = overlay.freeze().unwrap();
        let [oldest, newer] = &stack.layers[..] else { panic!("there are two") };
        let before = oldest.file.metadata().unwrap().blocks();
        // The first run can be brought over, the second cannot be read.
        newer.file.set_len(10 * CLUSTER_BYTES).unwrap();
        stack.fold(&never).unwrap_err();
        assert_eq!(oldest.file.metadata().unwrap().blocks(), before);
        newer.file.set_len(SIZE).unwrap();
        let shown = read_all(&overlay);
        overlay.adopt(&stack.fold(&never).unwrap().unwrap());
        assert!(read_all(&overlay) == shown);
    }

    #[test]
    fn layers_are_bounded_and_folding_them_makes_room() {
        let mut overlay = overlay(None);
        for _ in 0..MAX_LAYERS {
            overlay.write(0, b"x").unwrap();
            overlay.freeze().unwrap();
        }
        overlay.freeze().unwrap();
        overlay.write(0, b"y").unwrap();
        assert!(overlay.freeze().is_err());
        let mut first = [0];
        overlay.read(0, &mut first).unwrap();
        assert_eq!(&first, b"y");
        let folded = overlay.frozen().fold(&AtomicBool::new(false)).unwrap().unwrap();
        overlay.adopt(&folded);
        assert_eq!(overlay.freeze().unwrap().layers.len(), 2);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Write(u64, usize, u8),
        Zero(u64, u64),
        Discard(u64, u64),
        Freeze,
        Fold,
        Clone,
        Mark(bool),
        Rewind,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let range = (0..SIZE / 512, prop_oneof![1..4u64, 1..100u64]).prop_map(|(at, len)| {
            let at = at * 512;
            (at, (len * 512).min(SIZE - at))
        });
        let step = prop_oneof![
            4 => (range.clone(), any::<u8>()).prop_map(|((at, len), byte)| Step::Write(at, len as usize, byte)),
            2 => range.clone().prop_map(|(at, len)| Step::Zero(at, len)),
            1 => range.prop_map(|(at, len)| Step::Discard(at, len)),
            1 => Just(Step::Freeze),
            1 => Just(Step::Fold),
            1 => Just(Step::Clone),
            1 => any::<bool>().prop_map(Step::Mark),
            2 => Just(Step::Rewind),
        ];
        prop::collection::vec(step, 1..40)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// An overlay is a plain run of bytes, whatever is frozen, folded, or cut off by a snapshot and restored.
        #[test]
        fn an_overlay_is_a_run_of_bytes(steps in steps(), over_image: bool) {
            let (file, bytes) = image();
            let image = over_image.then_some(file);
            let mut overlay = overlay(image.clone());
            let mut model = if over_image { bytes } else { vec![0; SIZE as usize] };
            let never = AtomicBool::new(false);
            let mut frozen: Option<(Stack, Vec<u8>)> = None;
            let mut marked: Option<(OverlayMark, Vec<u8>, u64)> = None;
            for step in steps {
                match step {
                    Step::Write(at, len, byte) => {
                        let grown = overlay.private_clusters() + overlay.growth(at, len as u64);
                        overlay.write(at, &vec![byte; len]).unwrap();
                        prop_assert_eq!(overlay.private_clusters(), grown);
                        model[at as usize..at as usize + len].fill(byte);
                    }
                    Step::Zero(at, len) => {
                        overlay.zero(at, len).unwrap();
                        model[at as usize..(at + len) as usize].fill(0);
                    }
                    Step::Discard(at, len) => {
                        let Range { start, end } = bytes_of(overlay.discard(at, len));
                        prop_assert!(start == end || start >= at && end <= at + len);
                        model[start as usize..end as usize].fill(0);
                    }
                    Step::Freeze => frozen = Some((overlay.freeze().unwrap(), model.clone())),
                    Step::Fold => {
                        if let Some((stack, then)) = frozen.take() {
                            let mut bytes = vec![0; SIZE as usize];
                            stack.read(0, &mut bytes).unwrap();
                            prop_assert!(bytes == then, "frozen layers do not change");
                            stack.fold(&never).unwrap().into_iter().for_each(|folded| overlay.adopt(&folded));
                        }
                    }
                    Step::Mark(may_fold) => {
                        // What is being folded, and taken over later, is another matter then.
                        if may_fold {
                            frozen = None;
                        }
                        marked = Some((overlay.mark(may_fold).unwrap(), model.clone(), overlay.private_clusters()));
                        let private = overlay.below.layers.iter().filter(|layer| !layer.is_shared()).count();
                        prop_assert!(!may_fold || private <= 1, "what was written between two marks is folded");
                    }
                    Step::Rewind => {
                        if let Some((mark, then, private)) = &marked {
                            overlay.rewind(mark).unwrap();
                            model.clone_from(then);
                            prop_assert_eq!(overlay.private_clusters(), *private);
                        }
                    }
                    Step::Clone => {
                        (frozen, marked) = (None, None);
                        let flat = overlay.freeze().unwrap().flattened();
                        let file = tempfile::tempfile().unwrap();
                        for (run, _) in flat.clusters().runs(0..24).filter(|(_, state)| *state == Cluster::Data) {
                            let Range { start, end } = bytes_of(run);
                            let mut data = vec![0; (end - start) as usize];
                            flat.read(start, &mut data).unwrap();
                            file.write_all_at(&data, start).unwrap();
                        }
                        let held = Held { file, clusters: flat.clusters().clone() };
                        overlay = Overlay::new(SIZE, image.clone(), Some(held), std::env::temp_dir()).unwrap();
                        prop_assert_eq!(overlay.private_clusters(), 0);
                    }
                }
                prop_assert!(read_all(&overlay) == model);
            }
        }
    }

    fn merge(stack: &mut Stack, most: usize) -> Vec<Folded> {
        let (merged, result) = stack.merge(0, most, &|| false);
        result.unwrap();
        merged
    }

    /// What a clone gets of these layers.
    fn handed_on(stack: &Stack) -> Overlay {
        let held =
            stack.layers().map(|(file, clusters)| Held { file: file.try_clone().unwrap(), clusters: clusters.clone() });
        let mut held: Vec<Held> = held.collect();
        held.reverse();
        Overlay::new(SIZE, stack.image.clone(), held, std::env::temp_dir()).unwrap()
    }

    fn contents(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn what_clones_read_they_cannot_write() {
        let mut overlay = overlay(Some(image().0));
        overlay.write(0, b"parent").unwrap();
        let stack = overlay.share().unwrap();
        assert_eq!(stack.layers().len(), 1);
        for (file, _) in stack.layers() {
            assert!(file.write_at(b"x", 0).is_err() && file.set_len(0).is_err());
            give_back(file, 0..1);
        }
        let mut clone = handed_on(&stack);
        assert!(read_all(&clone) == read_all(&overlay));
        assert_eq!((clone.private_clusters(), overlay.private_clusters()), (0, 1), "what was inherited is not its own");
        clone.write(0, b"clone!").unwrap();
        assert_eq!(read_all(&overlay)[..6], *b"parent");
        assert_eq!(clone.private_clusters(), 1);
        // Nothing was written since: there is nothing more to share.
        assert_eq!(overlay.share().unwrap().layers().len(), 1);
    }

    /// What was begun before a fork comes to nothing, and what it has left behind is hidden.
    #[test]
    fn layers_that_are_being_folded_are_shared_all_the_same() {
        let never = AtomicBool::new(false);
        let mut overlay = overlay(None);
        overlay.write(0, &[1; 2 * CLUSTER_BYTES as usize]).unwrap();
        overlay.freeze().unwrap();
        overlay.write(CLUSTER_BYTES, &[2; 2 * CLUSTER_BYTES as usize]).unwrap();
        let before = overlay.freeze().unwrap();
        let folded = before.fold(&never).unwrap().unwrap();
        let stack = overlay.share().unwrap();
        let (clone, shown) = (handed_on(&stack), read_all(&overlay));
        overlay.adopt(&folded);
        assert_eq!(overlay.below.layers.len(), 2, "it would be written again, as one of its own");
        assert!(before.fold(&never).unwrap().is_none() && stack.fold(&never).unwrap().is_none());
        overlay.write(0, &[3; 3 * CLUSTER_BYTES as usize]).unwrap();
        overlay.freeze().unwrap();
        assert!(overlay.frozen().fold(&never).unwrap().is_none(), "there is but one that is not shared");
        assert!(read_all(&clone) == shown);
    }

    /// Sizes of layers, the oldest first, after each of many forks; and how much was copied in all.
    fn forks(written: impl Iterator<Item = u64>, most: usize) -> (Vec<u64>, u64) {
        let (mut held, mut copied) = (Vec::new(), 0);
        for size in written {
            held.push(size);
            let excess = held.len().saturating_sub(most);
            if excess > 0 {
                let merged: u64 = held.drain(to_merge(&held, excess)).sum();
                copied += merged;
                held.push(merged);
            }
            assert!(held.len() <= most);
        }
        (held, copied)
    }

    #[test]
    fn a_large_layer_is_not_copied_for_each_few_small_ones() {
        assert_eq!(to_merge(&[9, 1, 1, 1, 1, 1, 1], 1), 1..7);
        assert_eq!(to_merge(&[9, 8, 7, 6, 5, 2, 1], 1), 5..7);
        assert_eq!(to_merge(&[90, 60, 30, 6, 5, 2, 1], 3), 3..7, "as many as it takes, and no more");
        assert_eq!(to_merge(&[20, 4, 5, 1], 1), 1..4, "all that hold no more than what is newer");
        assert_eq!(to_merge(&[20, 10, 5, 1], 1), 2..4);
        let (_, copied) = forks((0..2000).map(|_| 1), 6);
        assert!(copied < 2000 * 8, "{copied}");
        let (held, copied) = forks((0..2000).map(|number| if number == 0 { 100_000 } else { 1 }), 6);
        assert!(held[0] == 100_000 && copied < 2000 * 16, "{held:?} {copied}");
    }

    proptest! {
        /// Merging copies nothing that is as large as all that is newer, unless it has to.
        #[test]
        fn merging_makes_room(held in prop::collection::vec(0..1000u64, 2..20), excess in 1..18usize) {
            prop_assume!(excess < held.len());
            let range = to_merge(&held, excess);
            prop_assert!(range.end == held.len() && range.len() > excess);
            prop_assert!(range.start == 0 || held[range.start - 1] > held[range.clone()].iter().sum());
        }
    }

    #[test]
    fn a_guest_that_is_forked_over_and_over_has_few_layers() {
        let mut overlay = overlay(None);
        overlay.write(0, &[7; 20 * CLUSTER_BYTES as usize]).unwrap();
        for round in 0..2000u64 {
            overlay.write(round % 24 * CLUSTER_BYTES, &round.to_le_bytes()).unwrap();
            let mut stack = overlay.share().unwrap();
            assert!(stack.layers().len() <= 7, "{round}");
            merge(&mut stack, 6).iter().for_each(|folded| overlay.adopt(folded));
            assert!(overlay.below.layers.len() <= 6, "{round}");
            if round % 100 == 0 {
                assert!(read_all(&handed_on(&stack)) == read_all(&overlay));
            }
        }
    }

    /// A stack of four layers below a checkpoint and four above it.
    fn stack_with_mark(overlay: &mut Overlay) -> Stack {
        for byte in 0..8u8 {
            overlay.write(u64::from(byte) * 3000, &[byte; 5000]).unwrap();
            overlay.share().unwrap();
            if byte == 3 {
                overlay.mark(false).unwrap();
            }
        }
        overlay.frozen()
    }

    #[test]
    fn what_was_merged_before_a_failure_is_handed_on() {
        let mut overlay = overlay(None);
        let mut stack = stack_with_mark(&mut overlay);
        // The newer ones can be read, and one of the older cannot.
        let broken = Layer::new(Arc::new(tempfile::tempfile().unwrap()), (*stack.layers[1].clusters).clone(), true);
        (stack.layers[1], overlay.below.layers[1]) = (broken.clone(), broken);
        let (merged, result) = stack.merge(0, 2, &|| false);
        result.unwrap_err();
        assert_eq!(merged.len(), 1);
        merged.iter().for_each(|folded| overlay.adopt(folded));
        assert_eq!((overlay.below.layers.len(), stack.layers.len()), (5, 5));
    }

    #[test]
    fn a_merge_that_nobody_wants_any_more_stops() {
        let mut stack = stack_with_mark(&mut overlay(None));
        let pieces = std::cell::Cell::new(0);
        let after_the_first = || pieces.replace(pieces.get() + 1) > 0;
        let (merged, result) = stack.merge(0, 2, &after_the_first);
        assert!(result.is_ok() && merged.len() <= 1);
        assert!(stack.layers.len() >= 5);
    }

    /// What somebody may come back to is merged by itself.
    #[test]
    fn merging_keeps_to_one_side_of_a_checkpoint() {
        let mut overlay = overlay(Some(image().0));
        let write = |overlay: &mut Overlay, byte: u8| {
            overlay.write(u64::from(byte) * 3000, &[byte; 5000]).unwrap();
            overlay.share().unwrap()
        };
        (0..4).for_each(|byte| drop(write(&mut overlay, byte)));
        let mark = overlay.mark(true).unwrap();
        let then = read_all(&overlay);
        let mut stack = (4..8).map(|byte| write(&mut overlay, byte)).last().unwrap();
        let now = read_all(&overlay);
        let merged = merge(&mut stack, 2);
        assert_eq!(merged.len(), 2);
        merged.iter().for_each(|folded| overlay.adopt(folded));
        assert_eq!((overlay.below.layers.len(), overlay.below.marked), (2, 1));
        assert!(read_all(&overlay) == now);
        overlay.rewind(&mark).unwrap();
        assert!(read_all(&overlay) == then);
        // One that spans a checkpoint that was set meanwhile is not taken.
        let mut stack = write(&mut overlay, 1);
        let merged = merge(&mut stack, 1);
        assert!(merged.is_empty());
        overlay.unmark();
        let merged = merge(&mut overlay.frozen(), 1);
        overlay.below.marked = 1;
        merged.iter().for_each(|folded| overlay.adopt(folded));
        assert_eq!(overlay.below.layers.len(), 2);
        overlay.unmark();
        merged.iter().for_each(|folded| overlay.adopt(folded));
        assert_eq!(overlay.below.layers.len(), 1);
    }

    #[derive(Clone, Debug)]
    enum Deed {
        Step(Step),
        Fork,
        /// Layers are merged until there are so many.
        Merge(usize),
        /// What was merged or folded is taken over.
        Adopt,
        Unmark,
    }

    /// One of several disks, and what it should be.
    struct Other {
        overlay: Overlay,
        model: Vec<u8>,
        frozen: Option<Stack>,
        done: Vec<Folded>,
        marked: Option<(OverlayMark, Vec<u8>)>,
    }

    impl Other {
        fn new(overlay: Overlay, model: Vec<u8>) -> Self {
            Other { overlay, model, frozen: None, done: Vec::new(), marked: None }
        }
    }

    fn deeds() -> impl Strategy<Value = Vec<(usize, Deed)>> {
        let deed = prop_oneof![
            6 => steps().prop_map(|steps| Deed::Step(steps[0].clone())),
            3 => Just(Deed::Fork),
            1 => (1..5usize).prop_map(Deed::Merge),
            2 => Just(Deed::Adopt),
            1 => Just(Deed::Unmark),
        ];
        prop::collection::vec((0..4usize, deed), 1..60)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]
        /// Disks that come from each other are a run of bytes each, whatever is shared, merged, folded or put back in whatever order;
        /// and no file that two of them have changes any more.
        #[test]
        fn forks_are_runs_of_bytes_each(deeds in deeds(), over_image: bool) {
            let (file, bytes) = image();
            let image = over_image.then_some(file);
            let model = if over_image { bytes } else { vec![0; SIZE as usize] };
            let mut disks = vec![Other::new(overlay(image), model)];
            let mut shared: Vec<(File, Vec<u8>)> = Vec::new();
            let never = AtomicBool::new(false);
            for (number, deed) in deeds {
                let number = number % disks.len();
                let Other { overlay, model, frozen, done, marked } = &mut disks[number];
                match deed {
                    Deed::Step(Step::Write(at, len, byte)) => {
                        overlay.write(at, &vec![byte; len]).unwrap();
                        model[at as usize..at as usize + len].fill(byte);
                    }
                    Deed::Step(Step::Zero(at, len)) => {
                        overlay.zero(at, len).unwrap();
                        model[at as usize..(at + len) as usize].fill(0);
                    }
                    Deed::Step(Step::Discard(at, len)) => {
                        let Range { start, end } = bytes_of(overlay.discard(at, len));
                        model[start as usize..end as usize].fill(0);
                    }
                    Deed::Step(Step::Freeze | Step::Clone) => *frozen = Some(overlay.freeze().unwrap()),
                    // What is done in the background is taken over some time, or never.
                    Deed::Step(Step::Fold) => {
                        let folded = frozen.take().map(|stack| stack.fold(&never).unwrap());
                        done.extend(folded.flatten());
                    }
                    Deed::Merge(most) => done.extend(merge(&mut overlay.frozen(), most)),
                    Deed::Adopt => done.drain(..).for_each(|folded| overlay.adopt(&folded)),
                    Deed::Step(Step::Mark(may_fold)) => {
                        if may_fold {
                            *frozen = None;
                        }
                        *marked = Some((overlay.mark(may_fold).unwrap(), model.clone()));
                    }
                    Deed::Unmark => {
                        overlay.unmark();
                        *marked = None;
                    }
                    Deed::Step(Step::Rewind) => {
                        if let Some((mark, then)) = marked {
                            overlay.rewind(mark).unwrap();
                            model.clone_from(then);
                        }
                    }
                    Deed::Fork => {
                        let mut stack = overlay.share().unwrap();
                        done.extend(merge(&mut stack, 8));
                        for (file, _) in stack.layers() {
                            prop_assert!(file.write_at(b"x", 0).is_err());
                            shared.push((file.try_clone().unwrap(), contents(file)));
                        }
                        let clone = Other::new(handed_on(&stack), model.clone());
                        prop_assert_eq!(clone.overlay.private_clusters(), 0);
                        if disks.len() < 4 {
                            disks.push(clone);
                        } else {
                            disks[(number + 1) % 4] = clone;
                        }
                    }
                }
                for disk in &disks {
                    prop_assert!(read_all(&disk.overlay) == disk.model);
                }
            }
            for (file, then) in shared {
                prop_assert!(contents(&file) == then);
            }
        }
    }

    fn bytes_of(clusters: Range<u64>) -> Range<u64> {
        bytes(&clusters, SIZE)
    }
}
