//! How much a cache directory may hold, and what has to go. Pure.

use std::time::SystemTime;

/// Most that is granted to one server at a time, in bytes: so much more than the bound there can be for each further server that
/// shares the directory.
const LARGEST_GRANT: u64 = 64 << 20;

/// A file of a cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// What it takes of the disk, in bytes.
    pub bytes: u64,
    /// When it was last used.
    pub used: SystemTime,
}

/// How much is granted at once of a cache of `most` bytes.
fn grant(most: u64) -> u64 {
    (most / 16).clamp(1, LARGEST_GRANT)
}

/// What is left of `most` bytes, as far as it is granted at once; files that nobody uses make way for that, the one that was used
/// longest ago first. `remove` says whether a file is gone.
pub fn make_room(most: u64, mut entries: Vec<Entry>, mut remove: impl FnMut(&str) -> bool) -> u64 {
    let mut taken = entries.iter().fold(0u64, |sum, entry| sum.saturating_add(entry.bytes));
    entries.sort_by(|a, b| (a.used, &a.name).cmp(&(b.used, &b.name)));
    for entry in entries {
        if taken.saturating_add(grant(most)) <= most {
            break;
        }
        if remove(&entry.name) {
            taken = taken.saturating_sub(entry.bytes);
        }
    }
    most.saturating_sub(taken).min(grant(most))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    proptest! {
        #[test]
        fn the_bound_holds_and_the_oldest_go_first(
            most in 16u64..1000, files in prop::collection::vec((0u64..300, 0u64..50, any::<bool>()), 0..12)
        ) {
            let entry = |(name, &(bytes, age, _)): (usize, &(u64, u64, bool))| Entry {
                name: name.to_string(), bytes, used: SystemTime::UNIX_EPOCH + Duration::from_secs(age),
            };
            let entries: Vec<Entry> = files.iter().enumerate().map(entry).collect();
            let mut gone = Vec::new();
            let free = make_room(most, entries, |name| {
                let index: usize = name.parse().unwrap();
                let in_use = files[index].2;
                if !in_use {
                    gone.push(index);
                }
                !in_use
            });
            let stays = |index: &usize| !gone.contains(index);
            let left: u64 = (0..files.len()).filter(stays).map(|index| files[index].0).sum();
            prop_assert!(free == 0 || left + free <= most);
            prop_assert!(free <= most / 16);
            // What went is older than what stayed and could have gone.
            for kept in (0..files.len()).filter(stays).filter(|index| !files[*index].2) {
                prop_assert!(gone.iter().all(|&index| files[index].1 <= files[kept].1));
                prop_assert_eq!(free, most / 16, "no more went than had to");
            }
        }
    }
}
