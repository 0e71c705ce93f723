//! Whose turn it is to touch the devices of a machine: their own thread's, or its owner's.
//!
//! ```text
//!   thread:  begin -> one event -> done, with the errands that have come meanwhile -> begin -> ...
//!   owner:   stop, go       whether a further event may begin
//!            take           a moment between two events; waits for it only so long
//!            have_done      an errand: at once, or by the thread as soon as it is done with its event
//!            ask            the same by the thread, whatever it is in the midst of; waits for what comes of it only so long
//! ```
//!
//! An event may take for ever, since a device may wait for a page of guest memory that does not come, or for a disk. So the owner
//! never waits for the lock of a device, but for its turn.

use api_spec::stats::DeviceAtWork;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

#[cfg(test)]
use shuttle::sync::{Condvar, Mutex, MutexGuard, mpsc};
#[cfg(not(test))]
use std::sync::{Condvar, Mutex, MutexGuard, mpsc};

/// A device has been at work for longer than somebody could wait.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{device} has been at work for {} ms: it waits for a page of guest memory that does not come, or for a slow disk; try again when it is done",
    .time.as_millis()
)]
pub struct AtWork {
    /// The device's name.
    pub device: String,
    /// For how long.
    pub time: Duration,
}

impl AtWork {
    /// The same for clients.
    pub fn document(self) -> DeviceAtWork {
        DeviceAtWork { device: self.device, for_us: self.time.as_micros() as u64 }
    }
}

/// Stands for no device in particular: the thread is busy with errands.
const ERRANDS: usize = usize::MAX;

/// Something to do between two events.
type Errand = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    /// No further event begins.
    stopped: bool,
    /// The thread is to end.
    over: bool,
    /// The device whose event the thread is in the midst of, and since when.
    at_work: Option<(usize, Instant)>,
    /// How many wait for their turn, who go first.
    waiting: usize,
    errands: Vec<Errand>,
}

/// What the thread and the owner share. Devices are called by their numbers.
pub struct Turns {
    /// The names of the devices. If there are none, there is no thread.
    names: Vec<String>,
    state: Mutex<State>,
    changed: Condvar,
}

/// The owner's turn. It lasts until this is dropped, and nothing else of [`Turns`] may be called by its holder until then.
pub struct Turn<'a> {
    _state: MutexGuard<'a, State>,
}

impl std::fmt::Debug for Turns {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Turns").field("names", &self.names).finish_non_exhaustive()
    }
}

impl Turns {
    /// Turns of devices that stand still.
    pub fn new(names: Vec<String>) -> Self {
        Turns { names, state: Mutex::new(State { stopped: true, ..State::default() }), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread is about to handle an event of a device: waits until it may. False if it is to end instead.
    pub fn begin(&self, device: usize) -> bool {
        let mut state = self.lock();
        loop {
            state = self.run_errands(state);
            if state.over {
                return false;
            }
            if !state.stopped && state.waiting == 0 {
                state.at_work = Some((device, Instant::now()));
                return true;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The thread has handled it, or was woken for errands.
    pub fn done(&self) {
        let state = self.lock();
        drop(self.run_errands(state));
    }

    /// Does what there is to do. No device is at work any more afterwards.
    fn run_errands<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        loop {
            let errands = std::mem::take(&mut state.errands);
            if errands.is_empty() {
                if state.at_work.take().is_some() {
                    self.changed.notify_all();
                }
                return state;
            }
            state.at_work = Some((ERRANDS, Instant::now()));
            drop(state);
            errands.into_iter().for_each(|errand| errand());
            state = self.lock();
        }
    }

    /// Whether the thread is to end.
    pub fn are_over(&self) -> bool {
        self.lock().over
    }

    /// Has no further event begin.
    pub fn stop(&self) {
        self.lock().stopped = true;
    }

    /// Lets events begin.
    pub fn go(&self) {
        self.lock().stopped = false;
        self.changed.notify_all();
    }

    /// Has the thread end, once it is done with what it is in the midst of.
    pub fn end(&self) {
        self.lock().over = true;
        self.changed.notify_all();
    }

    /// Waits for the owner's turn, no longer than `patience`.
    pub fn take(&self, patience: Duration) -> Result<Turn<'_>, AtWork> {
        let (mut state, began) = (self.lock(), Instant::now());
        state.waiting += 1;
        let taken = loop {
            let Some((device, since)) = state.at_work else { break Ok(()) };
            let left = patience.saturating_sub(began.elapsed());
            if left.is_zero() {
                break Err(self.at_work(device, since));
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        };
        state.waiting -= 1;
        self.changed.notify_all();
        taken.map(|()| Turn { _state: state })
    }

    /// Looks at the devices in the owner's turn, if that comes within `patience`.
    pub fn look<T>(&self, patience: Duration, look: impl FnOnce() -> T) -> Result<T, AtWork> {
        let _turn = self.take(patience)?;
        Ok(look())
    }

    fn at_work(&self, device: usize, since: Instant) -> AtWork {
        let device = self.names.get(device).cloned().unwrap_or_else(|| "one of the devices".to_owned());
        AtWork { device, time: since.elapsed() }
    }

    /// Does something between two events, without waiting: now, or when the event is over that is being handled.
    pub fn have_done(&self, errand: impl FnOnce() + Send + 'static) {
        let mut state = self.lock();
        match state.at_work {
            None => errand(),
            Some(_) => state.errands.push(Box::new(errand)),
        }
    }

    /// Has the thread do something between two events, and waits for it no longer than `patience`. `wake` makes the thread look,
    /// by [`Turns::done`], if it waits for events.
    pub fn ask<T: Send + 'static>(
        &self,
        patience: Duration,
        wake: impl FnOnce(),
        question: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, AtWork> {
        if self.names.is_empty() {
            return Ok(question());
        }
        let (asked, (sender, answer)) = (Instant::now(), mpsc::channel());
        let mut state = self.lock();
        state.errands.push(Box::new(move || {
            // Nobody may be waiting any more.
            let _ = sender.send(question());
        }));
        self.changed.notify_all();
        drop(state);
        wake();
        answer.recv_timeout(patience).map_err(|_| {
            let (device, since) = self.lock().at_work.unwrap_or((ERRANDS, asked));
            self.at_work(device, since)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shuttle::sync::Arc;
    use shuttle::sync::atomic::{AtomicBool, AtomicU32, Ordering};
    use shuttle::thread;

    const FOREVER: Duration = Duration::MAX;

    fn turns() -> Turns {
        Turns::new(vec!["vsock".into(), "drive root".into()])
    }

    /// A thread with one event after the other, and an owner who wants everything of it.
    fn thread_and_owner() {
        let turns = Arc::new(turns());
        let (inside, events) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
        let thread = {
            let (turns, inside, events) = (turns.clone(), inside.clone(), events.clone());
            thread::spawn(move || {
                while turns.begin(1) {
                    assert!(!inside.swap(true, Ordering::SeqCst));
                    events.fetch_add(1, Ordering::SeqCst);
                    thread::yield_now();
                    inside.store(false, Ordering::SeqCst);
                    turns.done();
                }
                assert!(turns.are_over());
            })
        };
        assert_eq!(events.load(Ordering::SeqCst), 0, "devices stand still at first");
        turns.go();
        let done = Arc::new(Mutex::new(Vec::new()));
        for number in 0..3 {
            let (inside, done) = (inside.clone(), done.clone());
            turns.have_done(move || {
                assert!(!inside.load(Ordering::SeqCst), "in the midst of an event");
                done.lock().unwrap().push(number);
            });
        }
        let seen = turns.look(FOREVER, || {
            let before = events.load(Ordering::SeqCst);
            thread::yield_now();
            assert!(!inside.load(Ordering::SeqCst));
            assert_eq!(events.load(Ordering::SeqCst), before, "in the owner's turn");
            done.lock().unwrap().clone()
        });
        assert_eq!(seen, Ok(vec![0, 1, 2]), "errands are done in order, before the next turn");
        turns.stop();
        let answer = turns.ask(FOREVER, || (), {
            let (inside, events) = (inside.clone(), events.clone());
            move || {
                assert!(!inside.load(Ordering::SeqCst));
                events.load(Ordering::SeqCst)
            }
        });
        for _ in 0..3 {
            thread::yield_now();
            assert_eq!(answer, Ok(events.load(Ordering::SeqCst)), "an event has begun after the stop");
        }
        turns.go();
        turns.end();
        drop(turns.take(FOREVER).unwrap());
        thread.join().unwrap();
    }

    #[test]
    fn no_two_touch_the_devices_at_once_and_nobody_waits_in_vain() {
        shuttle::check_random(thread_and_owner, 2000);
    }

    #[test]
    fn who_has_no_patience_is_told_what_is_in_the_way() {
        let try_all = || {
            let turns = turns();
            turns.go();
            assert!(turns.begin(1));
            let in_the_way = turns.take(Duration::ZERO).err().expect("a turn in the midst of an event");
            assert_eq!(in_the_way.device, "drive root");
            let errands = Arc::new(AtomicU32::new(0));
            let count = errands.clone();
            turns.have_done(move || count.store(1, Ordering::SeqCst));
            assert_eq!(errands.load(Ordering::SeqCst), 0);
            turns.done();
            assert_eq!(errands.load(Ordering::SeqCst), 1);
            assert!(turns.take(Duration::ZERO).is_ok());
        };
        shuttle::check_random(try_all, 10);
    }

    #[test]
    fn without_devices_everything_is_done_at_once() {
        let ask = || {
            let turns = Turns::new(Vec::new());
            assert_eq!(turns.ask(Duration::ZERO, || panic!("there is nobody to wake"), || 7), Ok(7));
        };
        shuttle::check_random(ask, 1);
    }
}
