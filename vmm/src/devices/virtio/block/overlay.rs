//! Layers over an image: what a guest writes to a disk that it shares with others.
//!
//! ```text
//!   newest   top       private, written               a scratch file without a name
//!            frozen    private, no longer written     what was the top when a snapshot was taken
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

use rustix::fs::FallocateFlags;
use snapshot::clusters::{CLUSTER_BYTES, Cluster, Clusters};
use snapshot::create::LayerSource;
use snapshot::disk::Held;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Most layers. So many come about only if folding fails time and again, since each snapshot, whether it succeeds or fails,
/// ends with folding.
const MAX_LAYERS: usize = 32;
/// How much is copied at a time when layers are folded, in bytes.
const PIECE: usize = 1 << 20;

/// A layer: a file, and which of its clusters mean anything.
#[derive(Debug)]
pub struct Layer {
    file: Arc<File>,
    clusters: Clusters,
    /// The file is ours alone, and nobody may want to come back to what is in it.
    private: bool,
}

/// What a disk was at a checkpoint.
#[derive(Debug)]
pub struct OverlayMark {
    /// How many layers there were below the top, which was empty.
    layers: usize,
    private: Clusters,
}

impl Layer {
    fn scratch(dir: &Path, size: u64) -> io::Result<Layer> {
        Ok(Layer { file: Arc::new(tempfile::tempfile_in(dir)?), clusters: Clusters::new(size), private: true })
    }
}

/// Layers that do not change, over an image or over nothing.
#[derive(Clone, Debug)]
pub struct Stack {
    size: u64,
    image: Option<Arc<File>>,
    /// Oldest first.
    layers: Vec<Arc<Layer>>,
}

impl Stack {
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
        read_layer(layer, offset, buf, |offset, buf| self.read_below(below.len(), offset, buf))
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
        let private = self.layers.iter().position(|layer| layer.private).unwrap_or(self.layers.len());
        let Some((oldest, newer)) = self.layers[private..].split_first() else { return Ok(None) };
        if newer.is_empty() {
            return Ok(None);
        }
        let (mut clusters, mut above) = (oldest.clusters.clone(), Clusters::new(self.size));
        newer.iter().for_each(|layer| above.lay(&layer.clusters));
        match self.bring_into(oldest, &above, cancel) {
            Ok(true) => {}
            stopped => {
                // What the oldest layer does not hold is to stay a hole: nobody would give it back.
                for (run, _) in above.runs(0..above.count()).filter(|(_, state)| *state == Cluster::Data) {
                    let added = oldest.clusters.runs(run).filter(|(_, state)| *state != Cluster::Data);
                    added.for_each(|(run, _)| give_back(oldest, run));
                }
                return stopped.map(|_| None);
            }
        }
        clusters.lay(&above);
        if self.image.is_none() && private == 0 {
            clusters.forget_zeros();
        }
        let layer = Layer { file: oldest.file.clone(), clusters, private: true };
        Ok(Some(Folded { layers: self.layers[private..].to_vec(), layer: Arc::new(layer) }))
    }

    /// Brings what the layers show in the clusters `above` into the file of `oldest`. `false` on `cancel`.
    fn bring_into(&self, oldest: &Layer, above: &Clusters, cancel: &AtomicBool) -> io::Result<bool> {
        let mut buf = vec![0; PIECE];
        for (run, state) in above.runs(0..above.count()) {
            match state {
                Cluster::Absent => {}
                Cluster::Zero => give_back(oldest, run),
                Cluster::Data => {
                    let Range { start: mut at, end } = bytes(&run, self.size);
                    while at < end {
                        if cancel.load(Ordering::Relaxed) {
                            return Ok(false);
                        }
                        let piece = &mut buf[..(end - at).min(PIECE as u64) as usize];
                        self.read(at, piece)?;
                        oldest.file.write_all_at(piece, at)?;
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
#[derive(Debug)]
pub struct Folded {
    layers: Vec<Arc<Layer>>,
    layer: Arc<Layer>,
}

/// A disk that a guest can write, over layers that do not change.
#[derive(Debug)]
pub struct Overlay {
    below: Stack,
    top: Layer,
    /// How many of those below come from a snapshot.
    held: usize,
    /// What all private layers hold together. Folding does not change it.
    private: Clusters,
    /// Where scratch files are made.
    dir: PathBuf,
}

impl Overlay {
    /// A disk of `size` bytes with nothing written to it, over `held` over `image`.
    pub fn new(size: u64, image: Option<Arc<File>>, held: Option<Held>, dir: PathBuf) -> io::Result<Overlay> {
        let top = Layer::scratch(&dir, size)?;
        let held = held.map(|Held { file, clusters }| Layer { file: Arc::new(file), clusters, private: false });
        let below = Stack { size, image, layers: held.into_iter().map(Arc::new).collect::<Vec<_>>() };
        Ok(Overlay { held: below.layers.len(), below, top, private: Clusters::new(size), dir })
    }

    /// Clusters that private layers hold and that can be seen. A cluster that two of them hold counts once: the older is
    /// hidden, and goes when they are folded.
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
        read_layer(&self.top, offset, buf, |offset, buf| self.below.read(offset, buf))
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
        give_back(&self.top, whole.clone());
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
        if self.top.clusters != Clusters::new(self.below.size) {
            if self.below.layers.len() >= MAX_LAYERS {
                return Err(io::Error::other(
                    "its overlay has too many layers, which could not be folded; that is tried again now: see whether the \
                     file system of TMPDIR is full, then repeat the snapshot",
                ));
            }
            let top = std::mem::replace(&mut self.top, Layer::scratch(&self.dir, self.below.size)?);
            self.below.layers.push(Arc::new(top));
        }
        Ok(self.below.clone())
    }

    /// Remembers what the disk is now, in place of what was remembered before. With `may_fold`, which nobody else may be doing, it
    /// may take as long as what was written since then takes to be copied; without it, the next time does that.
    pub fn mark(&mut self, may_fold: bool) -> io::Result<OverlayMark> {
        self.unmark();
        self.freeze()?;
        let folded = if may_fold { self.below.fold(&AtomicBool::new(false))? } else { None };
        folded.into_iter().for_each(|folded| self.adopt(folded));
        // Whoever folds from now on leaves them alone, since the newer layers may go.
        self.hold(self.held..self.below.layers.len(), false);
        Ok(OverlayMark { layers: self.below.layers.len(), private: self.private.clone() })
    }

    /// Nobody comes back to what was remembered.
    pub fn unmark(&mut self) {
        self.hold(self.held..self.below.layers.len(), true);
    }

    /// Brings the disk back to what it was.
    pub fn rewind(&mut self, mark: &OverlayMark) -> io::Result<()> {
        let newer = self.below.layers.len() > mark.layers;
        if !newer && self.top.clusters.is_empty() {
            return Ok(());
        }
        self.below.layers.truncate(mark.layers);
        self.top.file.set_len(0)?;
        self.top.clusters = Clusters::new(self.below.size);
        self.private = mark.private.clone();
        Ok(())
    }

    fn hold(&mut self, layers: Range<usize>, private: bool) {
        for layer in &mut self.below.layers[layers] {
            if layer.private != private {
                let Layer { file, clusters, private: _ } = &**layer;
                *layer = Arc::new(Layer { file: file.clone(), clusters: clusters.clone(), private });
            }
        }
    }

    /// All layers below the top.
    pub fn frozen(&self) -> Stack {
        self.below.clone()
    }

    /// Takes over the result of [`Stack::fold`].
    pub fn adopt(&mut self, folded: Folded) {
        let Folded { layers, layer } = folded;
        let same = |pair: (&Arc<Layer>, &Arc<Layer>)| Arc::ptr_eq(pair.0, pair.1);
        let ours = &mut self.below.layers;
        // The layers that were folded are still there, if those that came later are on top of them.
        if let Some(at) = ours.windows(layers.len()).position(|ours| ours.iter().zip(&layers).all(same)) {
            ours.splice(at..at + layers.len(), [layer]);
        }
    }
}

/// The bytes of these clusters of a disk of `size` bytes, whose last cluster may be short.
fn bytes(clusters: &Range<u64>, size: u64) -> Range<u64> {
    (clusters.start * CLUSTER_BYTES).min(size)..(clusters.end * CLUSTER_BYTES).min(size)
}

/// Reads what `layer` holds, and through `below` what it does not.
fn read_layer(
    layer: &Layer,
    offset: u64,
    buf: &mut [u8],
    below: impl Fn(u64, &mut [u8]) -> io::Result<()>,
) -> io::Result<()> {
    let end = offset + buf.len() as u64;
    for (run, state) in layer.clusters.runs(offset / CLUSTER_BYTES..end.div_ceil(CLUSTER_BYTES)) {
        let from = (run.start * CLUSTER_BYTES).max(offset);
        let to = (run.end * CLUSTER_BYTES).min(end);
        let part = &mut buf[(from - offset) as usize..(to - offset) as usize];
        match state {
            Cluster::Data => layer.file.read_exact_at(part, from)?,
            Cluster::Zero => part.fill(0),
            Cluster::Absent => below(from, part)?,
        }
    }
    Ok(())
}

/// Gives back the space of clusters of a private layer. Where the file system cannot, it is lost until the layer goes.
///
/// What the layer does not hold is a hole already, so the whole range is given back at once, however many runs it has.
fn give_back(layer: &Layer, clusters: Range<u64>) {
    let (start, len) = (clusters.start * CLUSTER_BYTES, (clusters.end - clusters.start) * CLUSTER_BYTES);
    // The kernel takes no empty range.
    if len > 0 {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let _ = rustix::fs::fallocate(&*layer.file, flags, start, len);
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
            folded.into_iter().for_each(|folded| overlay.adopt(folded));
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
        overlay.adopt(stack.fold(&AtomicBool::new(false)).unwrap().unwrap());
        assert_eq!(overlay.below.layers[0].clusters, first);
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
        overlay.adopt(stack.fold(&never).unwrap().unwrap());
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
        overlay.adopt(folded);
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
                            stack.fold(&never).unwrap().into_iter().for_each(|folded| overlay.adopt(folded));
                        }
                    }
                    Step::Mark(may_fold) => {
                        // What is being folded, and taken over later, is another matter then.
                        if may_fold {
                            frozen = None;
                        }
                        marked = Some((overlay.mark(may_fold).unwrap(), model.clone(), overlay.private_clusters()));
                        let private = overlay.below.layers.len() - overlay.held;
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

    fn bytes_of(clusters: Range<u64>) -> Range<u64> {
        bytes(&clusters, SIZE)
    }
}
