//! The log, and last words, as the page server writes them.

use std::fmt::Display;
pub use uffd_handler::logging::{
    Change, Format, Level, LogError, NoFormat, NoLevel, Settings, change, request_span, settings, start, warn_once,
};

/// Says why this vmm fails, in one line and once.
pub fn last_words(reason: &dyn Display) {
    uffd_handler::logging::last_words("vmm", reason);
}
