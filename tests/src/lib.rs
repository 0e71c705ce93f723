//! Guest tests: they start real `vmm` and `uffd-handler` processes on the host's own KVM, boot the embedded guest in
//! them, and talk to it. This library is the harness; the tests are in `tests/`.
//!
//! - [`binaries`]: finds the programs under test, and refuses stale ones
//! - [`host`]: what this host offers; [`require!`](crate::require) skips a test that needs more, and says so
//! - [`http`]: what a client of the API should not say, and what it is answered
//! - [`code`]: guests of a few instructions
//! - [`place`]: a directory of its own for each test
//! - [`process`]: processes that always end, with what they said shown when a test fails
//! - [`vm`]: boots, restores, snapshots and commands VMs
//! - [`page_server`]: starts page servers
//! - [`linux`]: Linux guests, and what they say on their consoles
//! - [`taps`]: tap devices of a test's own
//! - [`user`]: programs as a user without privileges
//! - [`agent`]: talks to the agent in a guest
//! - [`random`]: numbers that look random and are the same each time
//! - [`template`]: a snapshot with known contents, and the one check that holds after every step of a guest's life
//! - [`procfs`]: what the kernel says about a process
//!
//! The harness panics when something is not as it should be: it runs in tests only. Every wait has a deadline.

pub mod agent;
pub mod binaries;
pub mod code;
pub mod host;
pub mod http;
pub mod linux;
pub mod page_server;
pub mod place;
pub mod process;
pub mod procfs;
pub mod random;
pub mod taps;
pub mod template;
pub mod user;
pub mod vm;
pub mod web;

pub use agent::Agent;
pub use linux::Linux;
pub use page_server::PageServer;
pub use place::Place;
pub use process::Process;
pub use random::Random;
pub use template::{Template, TemplateOptions};
pub use test_skip::skip_test;
pub use user::User;
pub use vm::{Boot, Restore, Vm};
pub use web::Web;

use std::time::{Duration, Instant};

/// Longest that anything may take that takes milliseconds; only a failure takes as long.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `condition` holds; panics after [`PATIENCE`].
pub fn until(what: &str, condition: impl FnMut() -> bool) {
    assert!(holds_within(PATIENCE, condition), "it never came about within {PATIENCE:?} that {what}");
}

/// Whether `condition` comes to hold within `patience`.
pub fn holds_within(patience: Duration, mut condition: impl FnMut() -> bool) -> bool {
    const PAUSE: Duration = Duration::from_millis(1);
    let deadline = Instant::now() + patience;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(PAUSE);
    }
}
