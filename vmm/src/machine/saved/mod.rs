//! A machine that is saved when it stops and goes on when it starts.
//!
//! ```text
//!   stop:   pause -> snapshot at PATH, with a copy of the configuration, and a mark that says `fresh` -> end
//!   start:  PATH is fresh? -> restore -> mark it as used -> run -> remove it
//!                 any of it fails -> boot -> set PATH aside -> run
//! ```
//!
//! The mark comes before the guest runs, and what has been marked is never gone on from again: from then on the guest writes
//! its disks, which the saved memory knows nothing of. It is written into a file that is there already, so that even a
//! directory in which nothing can be made or removed does not make a guest run twice.
//!
//! - `seen`: what of a configuration its guest can tell (pure)
//! - `going_on`: how a machine that was saved is restored with the configuration of today (pure)
//! - `store`: what lies on disk
//! - `open`: opening it, and looking whether a start could

mod going_on;
mod open;
mod seen;
mod store;

pub use going_on::{GoingOn, GoingOnError, plan};
pub use open::{Looked, OpenError, look, open};
pub use seen::FILE as CONFIGURATION;
pub use seen::{Configuration, ConfigurationError};
pub use store::{FRESH, Found, MARK, State, Then, find, make_room};
