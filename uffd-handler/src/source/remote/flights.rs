//! One fetch for all who want the same: threads that ask for the same thing at the same time share one answer.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Work in progress, by what it is for.
#[derive(Debug)]
pub struct Flights<K, T>(Mutex<HashMap<K, Arc<OnceLock<T>>>>);

impl<K, T> Default for Flights<K, T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Eq + Hash + Copy, T: Clone> Flights<K, T> {
    /// Does `work`, or waits for whoever does it for the same key already: as long as the work takes, which must have a deadline of
    /// its own. Whoever asks after it is done has it done anew.
    pub fn join(&self, key: K, work: impl FnOnce() -> T) -> T {
        let flight = self.lock().entry(key).or_default().clone();
        let result = flight.get_or_init(work).clone();
        let mut flights = self.lock();
        if flights.get(&key).is_some_and(|known| Arc::ptr_eq(known, &flight)) {
            flights.remove(&key);
        }
        result
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<K, Arc<OnceLock<T>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn who_asks_meanwhile_gets_the_same_answer() {
        let (flights, done) = (Flights::default(), AtomicU32::new(0));
        let (started, all_asked) = (Barrier::new(2), Barrier::new(2));
        std::thread::scope(|scope| {
            let first = scope.spawn(|| {
                flights.join(1, || {
                    started.wait();
                    all_asked.wait();
                    done.fetch_add(1, Ordering::SeqCst)
                })
            });
            started.wait();
            let flight = flights.lock().get(&1).unwrap().clone();
            let second = scope.spawn(|| flights.join(1, || done.fetch_add(100, Ordering::SeqCst)));
            // The map, the first, this thread, and then the second.
            while Arc::strong_count(&flight) < 4 {
                std::thread::yield_now();
            }
            assert_eq!(flights.join(2, || 7), 7, "another key waits for nobody");
            all_asked.wait();
            assert_eq!((first.join().unwrap(), second.join().unwrap()), (0, 0));
        });
        assert_eq!(flights.join(1, || done.fetch_add(1, Ordering::SeqCst)), 1, "done anew");
        assert!(flights.lock().is_empty());
    }
}
