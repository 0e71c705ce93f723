//! A packed memory image: a file in which each chunk is stored compressed, once, or not at all, and a table at its beginning
//! that says where.

use crate::chunk;

/// Length of the beginning of the file that is the same for every image, in bytes.
pub const HEADER_BYTES: u64 = 64;
/// Length of an entry of the table, in bytes: one for each chunk.
pub const ENTRY_BYTES: u64 = 16;

/// How long a packed image of so many bytes of memory can be, in bytes: no chunk takes more room than it has bytes.
pub fn longest(image_bytes: u64) -> u64 {
    HEADER_BYTES + chunk::count(image_bytes) * ENTRY_BYTES + image_bytes
}
