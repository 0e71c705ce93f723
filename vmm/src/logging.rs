//! Log lines and last words on standard error, as the page server writes them.

use std::fmt::Display;
pub use uffd_handler::logging::start;

/// Says why this vmm fails, in one line and once.
pub fn last_words(reason: &dyn Display) {
    uffd_handler::logging::last_words("vmm", reason);
}
