//! The working set of an image, which lies beside its snapshot: made use of, and, if that is wanted, learnt from clones.

use crate::recorder::Recorder;
use crate::region::CHUNK_PAGES;
use snapshot::load::Snapshot;
use snapshot::page_runs::PageRuns;
use snapshot::working_set::{Used, WorkingSet};
use std::collections::BTreeSet;
use std::sync::Arc;

/// What is known, and what is being learnt, of the working set of one image.
#[derive(Debug, Default)]
pub struct Learning {
    /// Where it lies, if that is on this host.
    snapshot: Option<Arc<Snapshot>>,
    recorder: Option<Recorder>,
    /// Chunks that clones use.
    hot: Vec<u64>,
}

impl Learning {
    /// Reads what is known of an image, and begins to learn from so many clones, none if that is 0.
    pub fn begin(snapshot: Option<Arc<Snapshot>>, clones: usize) -> Self {
        let Some(snapshot) = snapshot else { return Learning::default() };
        let known = WorkingSet::load(&snapshot).unwrap_or_else(|unusable| {
            tracing::warn!("the working set of {} is not made use of: {unusable}", snapshot.dir().display());
            None
        });
        let hot = known.map(|set| chunks(&[set.read(), set.written()])).unwrap_or_default();
        Learning { snapshot: Some(snapshot), recorder: (clones > 0).then(|| Recorder::new(clones)), hot }
    }

    /// Chunks that clones use.
    pub fn hot(&self) -> &[u64] {
        &self.hot
    }

    /// Whether another clone is to be asked what it has used.
    pub fn wants_more(&self) -> bool {
        self.recorder.as_ref().is_some_and(Recorder::wants_more)
    }

    /// One is asked.
    pub fn asked(&mut self) {
        self.recorder.iter_mut().for_each(Recorder::asked);
    }

    /// One that was asked has gone without an answer.
    pub fn went(&mut self) {
        self.recorder.iter_mut().for_each(Recorder::went);
    }

    /// Hears of what a clone has used. Once enough have told, the working set is written, on a thread that has the time.
    pub fn hear(&mut self, used: Used) {
        let (Some(recorder), Some(snapshot)) = (&mut self.recorder, &self.snapshot) else { return };
        let Some((clones, agree)) = recorder.hear(used) else { return };
        self.recorder = None;
        let snapshot = snapshot.clone();
        let begun = std::thread::Builder::new().name("learn".into()).spawn(move || {
            crate::sandbox::confine(crate::sandbox::Kind::Writer);
            // One that is of no use is written over.
            let known = WorkingSet::load(&snapshot).ok().flatten();
            let mut set = known.unwrap_or_else(|| WorkingSet::of(&snapshot));
            set.merge_common(&clones, agree);
            let (read, written) = (set.read().pages(), set.written().pages());
            match set.save(&snapshot) {
                Ok(()) => tracing::info!(
                    "learnt the working set of {} from {} clones: {read} pages read, {written} written",
                    snapshot.dir().display(),
                    clones.len()
                ),
                Err(error) => tracing::error!("the working set that clones have told is lost: {error}"),
            }
        });
        if let Err(error) = begun {
            tracing::error!("the working set that clones have told is lost: no thread to write it: {error}");
        }
    }
}

/// The chunks that any of these pages lie in, in order.
fn chunks(sets: &[&PageRuns]) -> Vec<u64> {
    let runs = sets.iter().flat_map(|set| set.runs());
    let chunks: BTreeSet<u64> = runs.flat_map(|run| run.start / CHUNK_PAGES..run.end.div_ceil(CHUNK_PAGES)).collect();
    chunks.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_those_of_the_pages() {
        let [read, written] = [PageRuns::new([0..1, 31..33]), PageRuns::new([16..17, 800..801])];
        assert_eq!(chunks(&[&read, &written]), [0, 1, 2, 50]);
        assert!(chunks(&[]).is_empty());
    }
}
