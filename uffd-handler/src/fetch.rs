//! Reading chunks that have to be waited for, on threads of their own, so that the event loop never waits.
//!
//! ```text
//!   event loop --want--> Queue --take--> a few threads, each in Source::read_chunk
//!       ^                                     |
//!       +------ bounded channel, bell --------+
//! ```
//!
//! Each image has threads of its own: one that is slow, or hangs, holds up nobody else's. They touch neither stores nor
//! guests. What was asked for by a guest goes before what is read ahead, and a thread is always kept for it. Nobody
//! waits for the threads at the end: one that hangs in its source ends with the process.

use crate::source::{Chunk, Source, SourceError};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

#[cfg(test)]
use shuttle::sync::{Condvar, Mutex, MutexGuard, mpsc};
#[cfg(not(test))]
use std::sync::{Condvar, Mutex, MutexGuard, mpsc};

/// Threads of one image, at most.
const MOST_THREADS: usize = 8;
/// Chunks of one image that may wait to be read ahead.
const MOST_AHEAD: usize = 16384;
/// Chunks that were read and not yet taken by the event loop.
const MOST_FETCHED: usize = 32;

/// How soon a chunk is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Urgency {
    /// When there is nothing better to do.
    Ahead,
    /// A guest waits for it.
    Demand,
}

/// What a thread brings back.
pub struct Fetched {
    /// Number of the image.
    pub image: usize,
    /// Chunk of the image.
    pub chunk: u64,
    /// Room for a chunk, and how many bytes of it are the image's; or why not.
    pub bytes: Result<(Box<Chunk>, usize), SourceError>,
}

/// Where a wanted chunk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// In the queue of its urgency.
    Queued(Urgency),
    /// With a thread, or on its way back; it was taken with this urgency.
    Taken(Urgency),
}

/// The chunks of one image that are wanted. Each is wanted once, however often it is asked for.
#[derive(Debug, Default)]
struct Queue {
    places: BTreeMap<u64, Place>,
    demand: VecDeque<u64>,
    /// May also hold chunks that have become urgent since, and are passed over.
    ahead: VecDeque<u64>,
    /// How many of the threads read ahead.
    reading_ahead: usize,
    closed: bool,
}

impl Queue {
    /// Notes that a chunk is wanted; false if there is nothing new in that, or no room for more to read ahead.
    fn want(&mut self, chunk: u64, urgency: Urgency) -> bool {
        match (self.places.get(&chunk), urgency) {
            (None, Urgency::Ahead) if self.ahead.len() >= MOST_AHEAD => return false,
            (None, Urgency::Ahead) => self.ahead.push_back(chunk),
            (None | Some(Place::Queued(Urgency::Ahead)), Urgency::Demand) => self.demand.push_back(chunk),
            _ => return false,
        }
        self.places.insert(chunk, Place::Queued(urgency));
        true
    }

    /// The next chunk for a thread, if there is one that it may read.
    fn take(&mut self) -> Option<(u64, Urgency)> {
        let (chunk, urgency) = match self.demand.pop_front() {
            Some(chunk) => (chunk, Urgency::Demand),
            // One thread is kept for what guests wait for.
            None if self.reading_ahead + 1 >= MOST_THREADS => return None,
            None => (self.next_ahead()?, Urgency::Ahead),
        };
        self.reading_ahead += usize::from(urgency == Urgency::Ahead);
        self.places.insert(chunk, Place::Taken(urgency));
        Some((chunk, urgency))
    }

    /// Forgets what is queued for guests of which none waits any more: `is_awaited` says so. What was to be read ahead all the same
    /// is so again. Takes time only where there is something to forget, for all of it at once.
    fn forget(&mut self, is_awaited: impl Fn(u64) -> bool) {
        let (awaited, forgotten): (VecDeque<u64>, VecDeque<u64>) =
            self.demand.drain(..).partition(|&chunk| is_awaited(chunk));
        self.demand = awaited;
        if forgotten.is_empty() {
            return;
        }
        let ahead: BTreeSet<u64> = self.ahead.iter().copied().collect();
        for chunk in forgotten {
            if ahead.contains(&chunk) {
                self.places.insert(chunk, Place::Queued(Urgency::Ahead));
            } else {
                self.places.remove(&chunk);
            }
        }
    }

    fn next_ahead(&mut self) -> Option<u64> {
        loop {
            let chunk = self.ahead.pop_front()?;
            if self.places.get(&chunk) == Some(&Place::Queued(Urgency::Ahead)) {
                return Some(chunk);
            }
        }
    }

    /// A thread has read what it took.
    fn has_read(&mut self, urgency: Urgency) {
        self.reading_ahead -= usize::from(urgency == Urgency::Ahead);
    }

    /// The event loop has it. Says how soon it was wanted.
    fn delivered(&mut self, chunk: u64) -> Option<Urgency> {
        match self.places.remove(&chunk)? {
            Place::Taken(urgency) | Place::Queued(urgency) => Some(urgency),
        }
    }

    fn is_empty(&self) -> bool {
        self.demand.is_empty() && self.ahead.is_empty()
    }
}

/// What the event loop and the threads of one image share.
struct Shared {
    queue: Mutex<Queue>,
    /// Something was queued, or the end has come.
    news: Condvar,
}

impl Shared {
    fn new() -> Self {
        Self { queue: Mutex::new(Queue::default()), news: Condvar::new() }
    }

    /// A thread that panicked has left the queue as it was between two of its steps.
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// What a thread is to read next; waits for it. `None` at the end.
    fn take(&self) -> Option<(u64, Urgency)> {
        let mut queue = self.queue();
        loop {
            if queue.closed {
                return None;
            }
            if let Some(taken) = queue.take() {
                return Some(taken);
            }
            queue = self.news.wait(queue).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    /// A thread is free again: one more may read ahead.
    fn has_read(&self, urgency: Urgency) {
        self.queue().has_read(urgency);
        if urgency == Urgency::Ahead {
            self.news.notify_one();
        }
    }

    fn close(&self) {
        self.queue().closed = true;
        self.news.notify_all();
    }
}

/// What a thread does until the end: takes, reads, hands over, rings.
fn work(shared: &Shared, read: impl Fn(u64) -> Fetched, results: &mpsc::SyncSender<Fetched>, ring: impl Fn()) {
    while let Some((chunk, urgency)) = shared.take() {
        let fetched = read(chunk);
        shared.has_read(urgency);
        if results.send(fetched).is_err() {
            return;
        }
        ring();
    }
}

/// Where all images' threads hand over what they have read: the event loop's end.
pub struct Inbox {
    results: mpsc::Receiver<Fetched>,
    sender: mpsc::SyncSender<Fetched>,
    bell: Arc<EventFd>,
}

impl Inbox {
    /// Makes it, empty.
    pub fn new() -> io::Result<Self> {
        let (sender, results) = mpsc::sync_channel(MOST_FETCHED);
        let bell = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Self { results, sender, bell: Arc::new(bell) })
    }

    /// Readable when something has come.
    pub fn bell(&self) -> &EventFd {
        &self.bell
    }

    /// Silences the bell. What came before that is there to be taken.
    pub fn hush(&self) {
        let _ = self.bell.read();
    }

    /// Rings the bell again, for what is left.
    pub fn ring(&self) {
        let _ = self.bell.write(1);
    }

    /// Something that has come.
    pub fn take(&self) -> Option<Fetched> {
        self.results.try_recv().ok()
    }
}

/// The event loop's side of one image's threads.
pub struct Fetcher {
    image: usize,
    source: Arc<dyn Source>,
    shared: Arc<Shared>,
    sender: mpsc::SyncSender<Fetched>,
    bell: Arc<EventFd>,
    threads: usize,
}

impl Fetcher {
    /// Of image number `image`; threads are started when they are needed.
    pub fn new(image: usize, source: Arc<dyn Source>, inbox: &Inbox) -> Self {
        let (sender, bell) = (inbox.sender.clone(), inbox.bell.clone());
        Self { image, source, shared: Arc::new(Shared::new()), sender, bell, threads: 0 }
    }

    /// Has a chunk read, if it is not being read already; false if nothing new was queued.
    pub fn want(&mut self, chunk: u64, urgency: Urgency) -> bool {
        let new = self.shared.queue().want(chunk, urgency);
        if new {
            self.shared.news.notify_one();
            self.man();
        }
        new
    }

    /// Has no chunk read for guests that none waits for any more, unless a thread is at it: `is_awaited` tells.
    pub fn forget(&mut self, is_awaited: impl Fn(u64) -> bool) {
        self.shared.queue().forget(is_awaited);
    }

    /// Says how soon a chunk was wanted that has come, which may be asked for again from now on.
    pub fn delivered(&mut self, chunk: u64) -> Option<Urgency> {
        self.shared.queue().delivered(chunk)
    }

    /// Starts a thread if there is work that the others may not get to.
    pub fn man(&mut self) {
        if self.threads < MOST_THREADS && !self.shared.queue().is_empty() {
            match self.start_thread() {
                Ok(()) => self.threads += 1,
                Err(error) if self.threads == 0 => {
                    tracing::error!("cannot start a thread to read image {}: {error}", self.source.root());
                }
                Err(_) => {}
            }
        }
    }

    fn start_thread(&self) -> io::Result<()> {
        let (image, source, shared) = (self.image, self.source.clone(), self.shared.clone());
        let (sender, bell) = (self.sender.clone(), self.bell.clone());
        let read = move |chunk| {
            let mut bytes = Box::new([0; size_of::<Chunk>()]);
            let bytes = source.read_chunk(chunk, &mut bytes).map(|count| (bytes, count));
            Fetched { image, chunk, bytes }
        };
        let ring = move || drop(bell.write(1));
        let body = move || work(&shared, read, &sender, ring);
        std::thread::Builder::new().name("fetch".into()).spawn(body).map(drop)
    }
}

impl Drop for Fetcher {
    fn drop(&mut self) {
        self.shared.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn demand_goes_first_and_one_thread_is_kept_for_it() {
        let mut queue = Queue::default();
        (0..12).for_each(|chunk| assert!(queue.want(chunk, Urgency::Ahead)));
        assert!(queue.want(20, Urgency::Demand) && queue.want(7, Urgency::Demand));
        assert!(!queue.want(7, Urgency::Ahead) && !queue.want(20, Urgency::Demand));
        let taken: Vec<u64> = std::iter::from_fn(|| queue.take()).map(|(chunk, _)| chunk).collect();
        assert_eq!(taken, [20, 7, 0, 1, 2, 3, 4, 5, 6]);
        queue.has_read(Urgency::Ahead);
        assert_eq!(queue.take(), Some((8, Urgency::Ahead)));
    }

    #[test]
    fn what_nobody_waits_for_any_more_is_not_read_unless_it_was_to_be_read_ahead() {
        let mut queue = Queue::default();
        (0..3).for_each(|chunk| assert!(queue.want(chunk, Urgency::Ahead)));
        [10, 11, 2, 12, 13].into_iter().for_each(|chunk| assert!(queue.want(chunk, Urgency::Demand)));
        assert_eq!(queue.take(), Some((10, Urgency::Demand)));
        queue.forget(|chunk| chunk == 12);
        assert!(queue.want(13, Urgency::Demand), "it may be wanted again");
        assert!(!queue.want(10, Urgency::Demand), "it is on its way");
        let taken: Vec<_> = std::iter::from_fn(|| queue.take()).collect();
        let (demand, ahead) = (Urgency::Demand, Urgency::Ahead);
        assert_eq!(taken, [(12, demand), (13, demand), (0, ahead), (1, ahead), (2, ahead)]);
    }

    #[test]
    fn what_is_read_ahead_is_bounded() {
        let mut queue = Queue::default();
        (0..MOST_AHEAD as u64).for_each(|chunk| assert!(queue.want(chunk, Urgency::Ahead)));
        let next = MOST_AHEAD as u64;
        assert!(!queue.want(next, Urgency::Ahead) && queue.want(next, Urgency::Demand));
    }

    proptest! {
        #[test]
        fn each_chunk_is_wanted_once_and_none_is_lost(
            steps in prop::collection::vec((0..5u8, 0..12u64), 0..200)
        ) {
            let mut queue = Queue::default();
            let (mut open, mut taken) = (BTreeSet::new(), Vec::new());
            for (what, chunk) in steps {
                match what {
                    0 => prop_assert_eq!(queue.want(chunk, Urgency::Ahead), open.insert(chunk)),
                    1 => drop((queue.want(chunk, Urgency::Demand), open.insert(chunk))),
                    2 => taken.extend(queue.take()),
                    3 => {
                        let is_awaited = |other| other % 3 == chunk % 3;
                        let waited: Vec<u64> = queue.demand.iter().copied().filter(|&other| !is_awaited(other)).collect();
                        queue.forget(is_awaited);
                        prop_assert!(queue.demand.iter().all(|&other| is_awaited(other)));
                        for chunk in waited.into_iter().filter(|chunk| !queue.ahead.contains(chunk)) {
                            prop_assert!(open.remove(&chunk));
                        }
                    }
                    _ => if let Some((chunk, urgency)) = taken.pop() {
                        queue.has_read(urgency);
                        prop_assert_eq!(queue.delivered(chunk), Some(urgency));
                        prop_assert!(open.remove(&chunk));
                    }
                }
                prop_assert!(queue.places.keys().eq(&open));
            }
            // In the end all that is left is taken, each chunk once.
            taken.iter().for_each(|&(_, urgency)| queue.has_read(urgency));
            while let Some((chunk, urgency)) = queue.take() {
                queue.has_read(urgency);
                taken.push((chunk, urgency));
            }
            let mut all: Vec<u64> = taken.into_iter().map(|(chunk, _)| chunk).collect();
            all.sort_unstable();
            prop_assert!(all.iter().eq(&open));
        }
    }

    /// Threads, an event loop that wants chunks and takes them, and an end at a bad time, in random schedules.
    fn hand_over() {
        use shuttle::thread;
        let shared = Arc::new(Shared::new());
        let (sender, results) = mpsc::sync_channel(1);
        let bell = Arc::new((Mutex::new(0), Condvar::new()));
        let worker = |_| {
            let (shared, sender, bell) = (shared.clone(), sender.clone(), bell.clone());
            let read = |chunk| Fetched { image: 0, chunk, bytes: Err(SourceError::Away(String::new())) };
            thread::spawn(move || {
                work(&shared, read, &sender, || {
                    *bell.0.lock().unwrap() += 1;
                    bell.1.notify_one();
                });
            })
        };
        let workers: Vec<_> = (0..3).map(worker).collect();
        let want = |chunk, urgency| {
            let new = shared.queue().want(chunk, urgency);
            if new {
                shared.news.notify_one();
            }
        };
        want(1, Urgency::Ahead);
        want(2, Urgency::Demand);
        want(3, Urgency::Ahead);
        want(1, Urgency::Demand);
        let mut come = Vec::new();
        while come.len() < 3 {
            // As the event loop does: waits for the bell, silences it, takes what is there.
            let mut rung = bell.0.lock().unwrap();
            while *rung == 0 {
                rung = bell.1.wait(rung).unwrap();
            }
            *rung = 0;
            drop(rung);
            while let Ok(fetched) = results.try_recv() {
                assert!(shared.queue().delivered(fetched.chunk).is_some());
                come.push(fetched.chunk);
            }
        }
        come.sort_unstable();
        assert_eq!(come, [1, 2, 3]);
        want(4, Urgency::Demand);
        want(5, Urgency::Ahead);
        want(6, Urgency::Ahead);
        drop(results);
        shared.close();
        workers.into_iter().for_each(|worker| worker.join().unwrap());
    }

    #[test]
    fn what_is_wanted_comes_once_and_the_end_reaches_every_thread() {
        shuttle::check_random(hand_over, 1000);
    }
}
