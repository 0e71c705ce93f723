//! Huge pages must not bring pages into a store that nobody has put there.
#![allow(missing_docs)]

mod common;
use common::*;
use std::sync::{Mutex, PoisonError};

const SHMEM_ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
const MADV_COLLAPSE: i32 = 25;
const MADV_HUGEPAGE: i32 = 14;
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// The host's setting is another while this lives.
struct ShmemEnabled(String);

impl ShmemEnabled {
    fn force() -> Option<Self> {
        let now = std::fs::read_to_string(SHMEM_ENABLED).ok()?;
        let chosen = now.split(['[', ']']).nth(1)?.to_string();
        std::fs::write(SHMEM_ENABLED, "force").ok()?;
        Some(Self(chosen))
    }
}

impl Drop for ShmemEnabled {
    fn drop(&mut self) {
        let _ = std::fs::write(SHMEM_ENABLED, &self.0);
    }
}

fn with_forced_huge_pages(test: impl FnOnce() + Send + 'static) {
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    match ShmemEnabled::force() {
        Some(_guard) => with_userfaultfd(test),
        None => test_skip::skip(format!("{SHMEM_ENABLED} cannot be set here")),
    }
}

#[test]
fn three_clients_with_huge_shared_memory_forced() {
    with_forced_huge_pages(|| {
        let sample = Sample::of_bytes(64 * MIB);
        let server = Server::start(&sample);
        std::thread::scope(|scope| {
            for first in 0..3 {
                let sample = &sample;
                scope.spawn(move || {
                    let client = Client::connect(sample);
                    client.view.advise(0, sample.size(), MADV_HUGEPAGE).unwrap();
                    let pages = sample.size() / PAGE;
                    (0..pages).for_each(|step| client.view.check_page((step * 4099 + first * 5000) % pages));
                });
            }
        });
        assert_eq!(server.metrics().stores_retired_total, 0, "{}", server.log());
    });
}

#[test]
fn collapse_of_a_clients_mapping_invents_nothing() {
    with_forced_huge_pages(|| {
        let sample = Sample::of_bytes(16 * MIB);
        let server = Server::start(&sample);
        let (client, other) = (Client::connect(&sample), Client::connect(&sample));
        // Of the 2 MiB ranges one stays empty, one is there in part, the others are complete.
        (0..3).for_each(|page| client.view.check_page(2 * MIB / PAGE + page));
        (4 * MIB / PAGE..sample.size() / PAGE).for_each(|page| client.view.check_page(page));
        for range in 0..8 {
            let collapsed = client.view.advise(range * 2 * MIB, 2 * MIB, MADV_COLLAPSE);
            assert!(range > 1 || collapsed.is_err(), "range {range} with absent pages was collapsed");
        }
        other.view.check_all();
        client.view.check_all();
        Client::connect(&sample).view.check_all();
        assert_eq!(server.metrics().stores_retired_total, 0, "{}", server.log());
    });
}

#[test]
fn a_huge_page_read_into_a_hole_is_found_and_put_right() {
    with_forced_huge_pages(|| {
        let sample = Sample::of_bytes(16 * MIB);
        let server = Server::start(&sample);
        let client = Client::connect(&sample);
        client.view.check_page(0);
        read_unregistered(&sample, 6 * MIB / PAGE + 77);
        until("store is retired", || server.metrics().stores_retired_total == 1);
        client.view.check_all();
        Client::connect(&sample).view.check_all();
    });
}
