//! Clones that are asked for at once: none before all can be, and none ends before all have replied.

use super::guest::PATIENCE;
use crate::devices::lock;
use std::sync::{Condvar, Mutex};

/// Where clones that are asked for at once wait for each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// Before any is asked for.
    Start,
    /// Until all have replied, or cannot.
    Reply,
}

/// Clones that are asked for at once.
pub struct Together {
    /// How many have not come to each gate yet.
    missing: Mutex<[usize; 2]>,
    came: Condvar,
}

/// One of them. Whatever becomes of it, nobody waits for it for ever.
pub struct Member<'a> {
    all: &'a Together,
    came: [bool; 2],
}

impl Together {
    /// So many.
    pub fn new(count: usize) -> Self {
        Together { missing: Mutex::new([count; 2]), came: Condvar::new() }
    }

    /// One of them.
    pub fn member(&self) -> Member<'_> {
        Member { all: self, came: [false; 2] }
    }
}

impl Member<'_> {
    fn come_to(&mut self, gate: Gate) {
        if !std::mem::replace(&mut self.came[gate as usize], true) {
            lock(&self.all.missing)[gate as usize] -= 1;
            self.all.came.notify_all();
        }
    }

    /// Waits there for the others.
    pub fn wait_at(&mut self, gate: Gate) {
        self.come_to(gate);
        let missing = lock(&self.all.missing);
        drop(self.all.came.wait_timeout_while(missing, PATIENCE, |missing| missing[gate as usize] > 0));
    }
}

impl Drop for Member<'_> {
    fn drop(&mut self) {
        self.come_to(Gate::Start);
        self.come_to(Gate::Reply);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_fails_keeps_nobody_waiting() {
        let all = Together::new(3);
        let replied = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for number in 0..3 {
                let (all, replied) = (&all, &replied);
                scope.spawn(move || {
                    let mut member = all.member();
                    member.wait_at(Gate::Start);
                    if number == 0 {
                        return;
                    }
                    replied.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                    member.wait_at(Gate::Reply);
                    assert_eq!(replied.load(std::sync::atomic::Ordering::SeqCst), 2);
                });
            }
        });
        assert_eq!(*lock(&all.missing), [0, 0]);
    }
}
