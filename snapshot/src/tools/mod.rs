//! What is done with snapshots that lie there: [storing](store) one in another way, [comparing](diff) two, [showing](show) and
//! [removing](remove) one. Nothing is printed here.

mod children;
pub mod diff;
pub mod remove;
pub mod show;
pub mod store;

pub use children::ChildrenError;

use crate::create::Cancel;
use std::fmt;

/// How something that takes long is to be done.
pub struct Job<'a> {
    /// Whether it is to be given up.
    pub cancel: &'a dyn Cancel,
    /// Is told how much is done, and how much there is to do, in bytes of memory.
    pub progress: &'a dyn Fn(u64, u64),
    /// How many bytes the files of a snapshot that is written may hold, if there is a bound; holes do not count.
    pub max_bytes: Option<u64>,
}

impl fmt::Debug for Job<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Job").field("max_bytes", &self.max_bytes).finish_non_exhaustive()
    }
}
