//! `uffd-handler ws`: the working set beside a snapshot, for people.

use serde::Serialize;
use snapshot::load::{self, LoadError};
use snapshot::page_runs::PageRuns;
use snapshot::working_set::{SaveError, Unusable, WorkingSet};
use std::fmt;
use std::path::{Path, PathBuf};

/// How many parts a map of the memory has.
const PARTS: u64 = 64;
/// What stands for a part of which none, up to a quarter, half, three quarters, and more is in the set.
const SHADES: [char; 5] = ['.', '-', '+', '*', '#'];

/// Why there is nothing to show, or it could not be removed.
#[derive(Debug, thiserror::Error)]
pub enum WsError {
    /// No snapshot.
    #[error(transparent)]
    Snapshot(#[from] LoadError),
    /// No working set.
    #[error("{0} has no working set: no clone of it was learnt from yet")]
    Absent(PathBuf),
    /// One of no use.
    #[error(transparent)]
    Unusable(#[from] Unusable),
    /// It stays where it is.
    #[error(transparent)]
    Clear(#[from] SaveError),
}

/// One of the two sets of pages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Part {
    /// Number of pages, of 4 KiB each.
    pub pages: u64,
    /// Number of runs of them.
    pub runs: usize,
    /// How many of them are in each 64th of the memory.
    pub pages_in_64ths: Vec<u64>,
}

impl Part {
    fn of(runs: &PageRuns, image_pages: u64) -> Self {
        let pages_in_64ths = (0..PARTS).map(|part| runs.pages_in(range(part, image_pages))).collect();
        Part { pages: runs.pages(), runs: runs.runs().len(), pages_in_64ths }
    }

    /// A character for each 64th of the memory.
    fn map(&self, image_pages: u64) -> String {
        let shade = |(part, pages): (u64, &u64)| {
            let range = range(part, image_pages);
            SHADES[(4 * pages).div_ceil((range.end - range.start).max(1)).min(4) as usize]
        };
        (0..PARTS).zip(&self.pages_in_64ths).map(shade).collect()
    }
}

/// The pages of a 64th of the memory.
fn range(part: u64, image_pages: u64) -> std::ops::Range<u64> {
    let at = |part: u64| (u128::from(image_pages) * u128::from(part) / u128::from(PARTS)) as u64;
    at(part)..at(part + 1)
}

/// What is known of a snapshot's working set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The snapshot.
    pub snapshot: PathBuf,
    /// Root digest of its memory image.
    pub image: String,
    /// Size of that, in pages.
    pub image_pages: u64,
    /// How many clones were learnt from.
    pub clones: u64,
    /// When the first was, in milliseconds since the Unix epoch.
    pub created_unix_ms: u64,
    /// When the last was.
    pub updated_unix_ms: u64,
    /// Pages that clones read.
    pub read: Part,
    /// Pages that they wrote.
    pub written: Part,
}

impl Report {
    /// What there is to say of a working set.
    pub fn new(snapshot: &Path, set: &WorkingSet) -> Self {
        let image_pages = set.image_pages();
        Report {
            snapshot: snapshot.to_owned(),
            image: set.image().to_owned(),
            image_pages,
            clones: set.clones,
            created_unix_ms: set.created_unix_ms,
            updated_unix_ms: set.updated_unix_ms,
            read: Part::of(set.read(), image_pages),
            written: Part::of(set.written(), image_pages),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |pages: u64| pages as f64 / 256.0;
        let clones = if self.clones == 1 { "clone" } else { "clones" };
        writeln!(f, "{}: learnt from {} {clones}", self.snapshot.display(), self.clones)?;
        writeln!(f, "  image    {}, {:.1} MiB", self.image, mib(self.image_pages))?;
        for (name, part) in [("read", &self.read), ("written", &self.written)] {
            writeln!(f, "  {name:<8} {} pages, {:.1} MiB, in {} runs", part.pages, mib(part.pages), part.runs)?;
            writeln!(f, "           [{}]", part.map(self.image_pages))?;
        }
        let [none, quarter, half, most, all] = SHADES;
        writeln!(
            f,
            "  a 64th of the memory each: {none} none, {quarter} up to a quarter, {half} half, {most} three quarters, {all} more"
        )
    }
}

/// Looks at the working set beside a snapshot.
pub fn show(snapshot: &Path) -> Result<Report, WsError> {
    let opened = load::open(snapshot)?;
    let set = WorkingSet::load(&opened)?.ok_or_else(|| WsError::Absent(snapshot.to_owned()))?;
    Ok(Report::new(snapshot, &set))
}

/// Removes the working set beside a snapshot; false if there is none.
pub fn clear(snapshot: &Path) -> Result<bool, WsError> {
    Ok(WorkingSet::clear(&load::open(snapshot)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_map_has_a_character_for_each_64th() {
        let part = Part::of(&PageRuns::new([0..256, 256..257, 512..640, 1000..1001]), 64 * 256);
        let mut expected = String::from("#-+-");
        expected.push_str(&".".repeat(60));
        assert_eq!(part.map(64 * 256), expected);
        assert_eq!((part.pages, part.runs, part.pages_in_64ths[2]), (386, 3, 128));
    }

    proptest! {
        #[test]
        fn each_page_is_in_one_part(pages in prop::collection::btree_set(0u64..500, 0..99), more in 0u64..500) {
            let runs = PageRuns::of_pages(pages.iter().copied());
            let part = Part::of(&runs, runs.end() + more);
            prop_assert_eq!(part.pages_in_64ths.iter().sum::<u64>(), pages.len() as u64);
            prop_assert_eq!(part.map(runs.end() + more).chars().count(), 64);
        }
    }
}
