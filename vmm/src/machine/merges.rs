//! Layers of disks are copied into fewer while guests run: for each machine one copy at a time, as two would copy the same layers and
//! only one of them could be taken over.
//!
//! ```text
//!   owner:    start ------------------------------------> take over -> start, if anything came of it
//!   devices:        layers, once earlier ones are in place
//!   thread:                 copy -> tell the owner, and whoever waits
//! ```

use super::Machine;
use super::disks::{self, Layers, Merged};
use crate::devices::lock;
use crate::devices::virtio::block::overlay::Folded;
use crate::notice::{Notice, Notifier};
use crate::sandbox::{self, Kind};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

/// How many layers of a disk stay apart once its VM was forked.
const FEW_LAYERS: usize = 6;
/// How long to leave everybody else alone before anything is copied.
const BREATHER: Duration = Duration::from_millis(5);

/// The copies that are made for a machine.
#[derive(Debug, Default)]
pub struct Merges {
    now: Option<Arc<Merge>>,
    /// Somebody has asked for another one meanwhile.
    again: bool,
    /// Nobody takes anything over any more.
    is_over: Arc<AtomicBool>,
}

impl Merges {
    /// The copy that is under way.
    pub fn now(&self) -> Option<Arc<Merge>> {
        self.now.clone()
    }

    /// Set when the machine ends.
    pub fn is_over(&self) -> Arc<AtomicBool> {
        self.is_over.clone()
    }
}

impl Drop for Merges {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}

/// A copy that is under way, or over.
#[derive(Debug, Default)]
pub struct Merge {
    /// The layers that are copied, or stay because of that.
    taken: Mutex<Vec<Layers>>,
    merged: Mutex<Option<Vec<(usize, Folded)>>>,
    done: Condvar,
}

impl Merge {
    /// Starts it, of the layers that it is sent.
    fn start(
        layers: mpsc::Receiver<Vec<Layers>>,
        is_over: Arc<AtomicBool>,
        notifier: Notifier,
    ) -> io::Result<Arc<Merge>> {
        let merge = Arc::new(Merge::default());
        let shared = merge.clone();
        sandbox::spawn("merge", Kind::Peer, move || {
            // None come if the devices' thread is over.
            let mut layers = layers.recv().unwrap_or_default();
            *lock(&shared.taken) = layers.clone();
            std::thread::sleep(BREATHER);
            let is_over = || is_over.load(Ordering::Relaxed);
            let Merged { layers: merged, failed } = disks::merge(&mut layers, FEW_LAYERS, |_| 0, &is_over);
            if let Some((id, e)) = failed {
                tracing::warn!("drive {id}: the overlay's layers stay apart: {e}");
            }
            // The owner first: what a waiter goes on to make comes later.
            notifier.send(Notice::LayersMerged { merged: merged.clone(), ends: true });
            *lock(&shared.merged) = Some(merged);
            shared.done.notify_all();
        })?;
        Ok(merge)
    }

    /// How many of the oldest layers of a disk it has to do with.
    pub fn holds(&self, layers: &Layers) -> usize {
        disks::known(layers, &lock(&self.taken))
    }

    /// What has come of it, unless that takes until after the deadline.
    pub fn wait(&self, deadline: Instant) -> Option<Vec<(usize, Folded)>> {
        let left = deadline.saturating_duration_since(Instant::now());
        let waited = self.done.wait_timeout_while(lock(&self.merged), left, |merged| merged.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.clone()
    }
}

impl Machine {
    /// Has layers of its disks copied into fewer where there are many, unless that is being done.
    pub fn merge_layers(&mut self, notifier: &Notifier) {
        if !self.plan.drives.iter().any(|drive| drive.overlay) {
            return;
        }
        if self.merges.now.is_some() {
            self.merges.again = true;
            return;
        }
        let (sender, layers) = mpsc::channel();
        match Merge::start(layers, self.merges.is_over(), notifier.clone()) {
            Ok(merge) => {
                self.merges.now = Some(merge);
                self.to_devices(move |devices| {
                    let _ = sender.send(disks::layers(devices)); // It waits for them.
                });
            }
            Err(e) => tracing::warn!("the layers of overlays stay apart, as no thread can be started: {e}"),
        }
    }

    /// Takes over what was merged. A fork that copies layers itself leaves those alone that are being copied. Says whether there may be
    /// more to be done, if this `ends` the copy that was under way.
    pub fn adopt_merged(&mut self, merged: Vec<(usize, Folded)>, ends: bool) -> bool {
        let may_be_more = ends && (!merged.is_empty() || std::mem::take(&mut self.merges.again));
        if ends {
            self.merges.now = None;
        }
        self.adopt_folded(merged);
        may_be_more
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_waits_for_a_merge_has_its_result_or_goes_on_at_the_deadline() {
        let merge = Arc::new(Merge::default());
        assert_eq!(merge.wait(Instant::now() + Duration::from_millis(1)), None);
        let other = merge.clone();
        let waiter = std::thread::spawn(move || other.wait(Instant::now() + Duration::from_secs(60)));
        *lock(&merge.merged) = Some(Vec::new());
        merge.done.notify_all();
        assert_eq!(waiter.join().unwrap(), Some(Vec::new()));
    }

    #[test]
    fn copies_are_over_with_the_machine() {
        let merges = Merges::default();
        let is_over = merges.is_over();
        assert!(!is_over.load(Ordering::Relaxed));
        drop(merges);
        assert!(is_over.load(Ordering::Relaxed));
    }
}
