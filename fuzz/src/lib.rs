//! What the fuzz targets check, each in a module of its own: a function that takes any bytes and panics if they do harm, and
//! seeds for it, which are bytes that get far.
//!
//! Harm is more than a panic of the code under test: what it has accepted must be what it says, must come back when it is
//! written and read again, must be the same in whatever pieces it comes, and must not take more memory than there is reason to.
//!
//! - [`agent`]: what a guest sends to the host
//! - [`handshake`]: what a client sends to the page server, from its first byte on
//! - [`http`]: what a client sends to the REST API
//! - [`manifest`], [`packed`], [`state`], [`working_set`]: files of a snapshot
//!
//! docs/fuzzing.md says how to run them.

pub mod agent;
pub mod edit;
pub mod handshake;
pub mod http;
pub mod manifest;
pub mod packed;
pub mod state;
pub mod working_set;

use cap::Cap;
use std::alloc::System;
use std::path::Path;

/// Most memory that may be in use for one input, in bytes, what the target itself needs for it included. No input is longer than
/// 32 KiB.
pub const MOST_MEMORY: usize = 16 << 20;

#[global_allocator]
static MEMORY: Cap<System> = Cap::new(System, usize::MAX);

/// A target.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name, which is that of its program.
    pub name: &'static str,
    /// Panics if the bytes do harm.
    pub check: fn(&[u8]),
    /// Bytes that get far.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All of them.
pub const TARGETS: [Target; 7] = [
    Target { name: "agent", check: agent::check, seeds: agent::seeds },
    Target { name: "handshake", check: handshake::check, seeds: handshake::seeds },
    Target { name: "http", check: http::check, seeds: http::seeds },
    Target { name: "manifest", check: manifest::check, seeds: manifest::seeds },
    Target { name: "packed", check: packed::check, seeds: packed::seeds },
    Target { name: "state", check: state::check, seeds: state::seeds },
    Target { name: "working_set", check: working_set::check, seeds: working_set::seeds },
];

/// Checks one input. A check that takes more than [`MOST_MEMORY`] ends the process: an allocation fails.
pub fn run(check: fn(&[u8]), data: &[u8]) {
    // It fails only if there is more in use already.
    let _ = MEMORY.set_limit(MEMORY.allocated().saturating_add(MOST_MEMORY));
    check(data);
    let _ = MEMORY.set_limit(usize::MAX);
}

/// The variable of the environment that says where seeds are written.
pub const SEEDS: &str = "COPPICE_FUZZ_SEEDS";

/// Begins a target: writes its seeds into the directory that [`SEEDS`] names, if it names one.
pub fn begin(seeds: fn() -> Vec<Vec<u8>>) {
    lift_limit_on_panic();
    let Some(directory) = std::env::var_os(SEEDS) else { return };
    for (number, seed) in seeds().iter().enumerate() {
        let path = Path::new(&directory).join(format!("seed-{number}"));
        std::fs::write(&path, seed).unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
    }
}

/// Lets a panic take as much memory as it needs to say where it is.
fn lift_limit_on_panic() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let _ = MEMORY.set_limit(usize::MAX);
        tell(panic);
    }));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn seeds_do_no_harm_whole_or_cut_short() {
        for Target { check, seeds, .. } in TARGETS {
            for seed in seeds() {
                check(&seed);
                (0..seed.len().min(512)).for_each(|len| check(&seed[..len]));
            }
        }
    }

    proptest! {
        #[test]
        fn damaged_seeds_do_no_harm(
            target in prop::sample::select(TARGETS.map(|target| target.name).to_vec()),
            which: prop::sample::Index,
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        ) {
            let target = TARGETS.into_iter().find(|one| one.name == target).unwrap();
            let mut seed = which.get(&(target.seeds)()).clone();
            for (at, byte) in damage {
                *at.get_mut(&mut seed) = byte;
            }
            (target.check)(&seed);
        }
    }
}
