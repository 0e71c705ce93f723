//! The device as a whole, with a driver of our own in place of the guest's.

use std::sync::{Arc, Mutex};

use api_spec::devices::{RateLimiter, TokenBucket};
use proptest::prelude::*;
use snapshot::state::EntropyState;
use vm_memory::{Bytes, GuestAddress};

use super::super::EVENT_IDX;
use super::super::fake_driver::{Driver, FREE, MEMORY, NEXT, SIZE, WRITE, both, noise};
use super::Rng;
use super::device::{BATCH, MAX_REQUEST};
use crate::devices::lock;

fn device() -> Arc<Mutex<Rng>> {
    Rng::new(None).unwrap()
}

fn save(driver: &Driver<Rng>) -> EntropyState {
    super::save(&driver.device, || driver.transport.save())
}

fn restored(driver: &Driver<Rng>, state: &EntropyState) -> Driver<Rng> {
    driver.restored(device(), |device, transport| super::restore(device, transport, state).unwrap())
}

/// Whether these bytes are as random as bytes can look: not all of them alike.
fn look_random(bytes: &[u8]) -> bool {
    bytes.windows(2).any(|pair| pair[0] != pair[1])
}

#[test]
fn a_buffer_in_pieces_is_filled_and_nothing_beside_it() {
    both(|event_idx| {
        let mut driver = Driver::started(device(), event_idx);
        driver.offer(0, 0, &[(FREE, 30, WRITE), (FREE + 100, 0, WRITE), (FREE + 200, 34, WRITE)]);
        driver.run();
        assert_eq!(driver.used(0), Some((0, 64)));
        assert!(driver.interrupted());
        let bytes = driver.bytes(FREE, 300);
        assert!(look_random(&bytes[..30]) && look_random(&bytes[200..234]));
        assert!(bytes[30..200].iter().chain(&bytes[234..]).all(|byte| *byte == 0));
        driver.offer(0, 5, &[(FREE + 1000, 30, WRITE)]);
        driver.run();
        assert_eq!(driver.used(0), Some((5, 30)));
        assert_ne!(driver.bytes(FREE + 1000, 30), bytes[..30]);
    });
}

#[test]
fn a_request_is_given_no_more_than_the_most() {
    let mut driver = Driver::started(device(), 0);
    driver.offer(0, 0, &[(FREE, 0x2_0000, WRITE)]);
    // Beyond what is filled nobody looks at where it is.
    driver.offer(0, 1, &[(FREE, 0x1_0000, WRITE), (u64::MAX - 5, 4, WRITE)]);
    driver.offer(0, 3, &[(FREE, 0, WRITE)]);
    driver.run();
    let used: Vec<_> = std::iter::from_fn(|| driver.used(0)).collect();
    assert_eq!(used, [(0, MAX_REQUEST as u32), (1, MAX_REQUEST as u32), (3, 0)]);
    assert_eq!(driver.bytes(FREE + MAX_REQUEST, 16), [0; 16]);
    assert!(!driver.has_failed());
}

#[test]
fn many_requests_take_many_turns() {
    both(|event_idx| {
        let mut driver = Driver::started(device(), event_idx);
        for round in 0..5 {
            (0..SIZE).for_each(|id| driver.offer(0, id, &[(FREE + u64::from(id) * 64, 64, WRITE)]));
            driver.run();
            assert_eq!(std::iter::from_fn(|| driver.used(0)).count() as u16, SIZE, "{round}");
        }
    });
}

#[test]
fn a_driver_that_breaks_the_rules_stops_its_device_until_it_resets_it() {
    type Break = fn(&mut Driver<Rng>);
    let cases: [(&str, Break); 6] = [
        ("nothing to write to", |d| d.offer(0, 0, &[(FREE, 8, 0)])),
        ("partly nothing to write to", |d| d.offer(0, 0, &[(FREE, 8, WRITE), (FREE, 8, 0)])),
        ("outside of memory", |d| d.offer(0, 0, &[(MEMORY as u64 - 4, 8, WRITE)])),
        ("a loop", |d| {
            d.describe(0, 0, FREE, 8, WRITE | NEXT, 1);
            d.describe(0, 1, FREE, 8, WRITE | NEXT, 0);
            d.offer_head(0, 0);
        }),
        ("no such descriptor", |d| d.offer_head(0, SIZE + 3)),
        ("more chains than there can be", |d| {
            d.mem.write_obj(SIZE + 9, GuestAddress(0x1402)).unwrap();
            d.kick(0);
        }),
    ];
    for (name, breaks) in cases {
        let mut driver = Driver::started(device(), 0);
        breaks(&mut driver);
        driver.run();
        assert!(driver.has_failed(), "{name}");
        driver.offer(0, 4, &[(FREE, 8, WRITE)]);
        driver.run();
        assert_eq!(driver.used(0), None, "{name}");
        driver.start(0);
        driver.offer(0, 0, &[(FREE, 8, WRITE)]);
        driver.run();
        assert_eq!(driver.used(0), Some((0, 8)), "{name}");
    }
}

#[test]
fn a_reset_device_leaves_memory_alone() {
    let mut driver = Driver::started(device(), 0);
    driver.offer(0, 0, &[(FREE, 8, WRITE)]);
    driver.write(0x70, 0);
    let before = driver.contents();
    driver.kick(0);
    driver.run();
    assert!(driver.contents() == before);
}

#[test]
fn a_rate_limit_makes_requests_wait() {
    let bandwidth = Some(TokenBucket { size: 100, one_time_burst: None, refill_time: 20 });
    let limit = RateLimiter { bandwidth, ops: None };
    let limited_later = Rng::new(None).unwrap();
    lock(&limited_later).set_rate(Some(&limit));
    for limited in [Rng::new(Some(&limit)).unwrap(), limited_later] {
        let mut driver = Driver::started(limited, 0);
        for id in 0..6 {
            driver.offer(0, id, &[(FREE, 100, WRITE)]);
        }
        driver.run();
        let mut used = std::iter::from_fn(|| driver.used(0)).count();
        assert!(used < 6, "{used}");
        driver.run_until(|driver| {
            used += usize::from(driver.used(0).is_some());
            used == 6
        });
        driver.run();
        assert_eq!(driver.used(0), None);
        let stats = lock(&driver.device).stats();
        assert_eq!((stats.requests, stats.bytes), (6, 600));
        assert!(stats.throttled > 0);
    }
}

#[test]
fn requests_that_wait_are_served_by_each_clone_with_bytes_of_its_own() {
    both(|event_idx| {
        let mut parent = Driver::started(device(), event_idx);
        parent.offer(0, 0, &[(FREE, 32, WRITE)]);
        // The event loop has not come round to it.
        let before = parent.contents();
        let state = save(&parent);
        assert!(state.pending && parent.contents() == before);
        let mut seen = Vec::new();
        for _ in 0..2 {
            let mut clone = restored(&parent, &state);
            assert_eq!(save(&clone), state, "a clone that never ran is saved as what it came from");
            clone.resume();
            assert_eq!(clone.used(0), Some((0, 32)));
            seen.push(clone.bytes(FREE, 32));
        }
        parent.run();
        assert_eq!(parent.used(0), Some((0, 32)));
        seen.push(parent.bytes(FREE, 32));
        assert!(seen[0] != seen[1] && seen[1] != seen[2] && seen[0] != seen[2]);
    });
}

#[test]
fn a_clone_of_an_idle_device_leaves_memory_alone_until_it_is_kicked() {
    both(|event_idx| {
        let mut parent = Driver::started(device(), event_idx);
        parent.offer(0, 0, &[(FREE, 32, WRITE)]);
        parent.run();
        parent.used(0);
        let state = save(&parent);
        assert!(!state.pending);
        let mut clone = restored(&parent, &state);
        let before = clone.contents();
        clone.resume();
        assert!(clone.contents() == before);
        assert!(clone.interrupted(), "an interrupt that was pending is raised again");
        clone.offer(0, 1, &[(FREE, 16, WRITE)]);
        clone.run();
        assert_eq!(clone.used(0), Some((1, 16)));
    });
}

#[test]
fn a_turn_that_ends_with_the_queue_leaves_no_clone_deaf() {
    both(|event_idx| {
        let mut parent = Driver::started(device(), event_idx);
        // As many as one turn serves, so that it ends without a look at the queue.
        (0..BATCH as u16).for_each(|id| parent.offer(0, id, &[(FREE + u64::from(id) * 64, 64, WRITE)]));
        lock(&parent.device).serve();
        assert_eq!(std::iter::from_fn(|| parent.used(0)).count(), BATCH);
        let state = save(&parent);
        let mut clone = restored(&parent, &state);
        clone.resume();
        for driver in [&mut parent, &mut clone] {
            driver.run();
            driver.offer(0, 1, &[(FREE, 16, WRITE)]);
            driver.run();
            assert_eq!(driver.used(0), Some((1, 16)));
        }
    });
}

#[test]
fn a_device_without_a_driver_is_saved_and_restored() {
    let cold = Driver::cold(device(), super::super::fake_driver::memory());
    let state = save(&cold);
    let mut clone = restored(&cold, &state);
    clone.resume();
    clone.start(0);
    clone.offer(0, 0, &[(FREE, 16, WRITE)]);
    clone.run();
    assert_eq!(clone.used(0), Some((0, 16)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a driver puts into its queue, the device comes to rest, and works again after a reset.
    #[test]
    fn noise_in_the_queue_does_no_harm(noise in noise(), event_idx in prop::sample::select(vec![0, EVENT_IDX])) {
        let mut driver = Driver::started(device(), event_idx);
        driver.scribble(0, &noise);
        driver.run();
        let mut clone = restored(&driver, &save(&driver));
        clone.resume();
        driver.start(0);
        driver.offer(0, 0, &[(FREE, 16, WRITE)]);
        driver.run();
        prop_assert_eq!(driver.used(0), Some((0, 16)));
    }
}
