//! `working-set.json`: which pages of a memory image its clones use, beside the snapshot.
//!
//! It is learnt from clones after the snapshot was made, so no manifest speaks of it, and it is only ever advice: whoever
//! follows it gets pages ready before they are asked for. A file that is damaged, or of another image, counts as absent.

use crate::dir::FileError;
use crate::load::Snapshot;
use crate::page_runs::PageRuns;
use crate::{PAGE_BYTES, file};
use serde::{Deserialize, Serialize};
use std::io;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

/// Version of the file that is written, and the only one that is read.
pub const VERSION: u32 = 1;
/// Most runs of pages in each of the two sets.
pub const MAX_RUNS: usize = 16_384;
/// Longest file, in bytes. What keeps to [`MAX_RUNS`] is shorter.
pub const MAX_BYTES: u64 = 1 << 20;

/// Which pages of a memory image its clones use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkingSet {
    /// [`VERSION`].
    version: u32,
    /// Root digest of the memory image.
    image: String,
    /// Its size, in pages.
    image_pages: u64,
    /// How many clones it was learnt from.
    pub clones: u64,
    /// When the first of them was learnt from, in milliseconds since the Unix epoch.
    pub created_unix_ms: u64,
    /// When the last was.
    pub updated_unix_ms: u64,
    /// Pages that clones read, or ran.
    read: PageRuns,
    /// Pages that they wrote.
    written: PageRuns,
    /// BLAKE3, in hex, over the compact JSON of all this with an empty digest.
    digest: String,
}

/// What one clone did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Used {
    /// Pages that it read, or ran.
    pub read: PageRuns,
    /// Pages that it wrote.
    pub written: PageRuns,
}

/// Why the file that is there is of no use. It is advice: go on without it.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// It cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// It is no such document.
    #[error("{path} is no working set: {source}; `uffd-handler ws clear` removes it")]
    Document {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// It is of a version that this program does not read.
    #[error("{path} has version {found} and this program reads {VERSION}; `uffd-handler ws clear` removes it")]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// Its digest does not fit, or it says what no such file can.
    #[error("{path} is damaged: {what}; `uffd-handler ws clear` removes it")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What shows it.
        what: &'static str,
    },
    /// It is of other memory.
    #[error("{path} is of image {found}, not of this snapshot's; `uffd-handler ws clear` removes it")]
    Foreign {
        /// The file.
        path: PathBuf,
        /// Root digest of that memory.
        found: String,
    },
}

/// Why a working set was not written.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// It is of other memory.
    #[error("the working set is of image {0}, not of this snapshot's")]
    Foreign(String),
    /// The system refused.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl WorkingSet {
    /// That of a snapshot no clone of which is known yet.
    pub fn of(snapshot: &Snapshot) -> WorkingSet {
        let memory = &snapshot.manifest().memory;
        WorkingSet::new(memory.root.clone(), memory.size_bytes / PAGE_BYTES)
    }

    fn new(image: String, image_pages: u64) -> WorkingSet {
        let now = now_ms();
        WorkingSet {
            version: VERSION,
            image,
            image_pages,
            clones: 0,
            created_unix_ms: now,
            updated_unix_ms: now,
            read: PageRuns::default(),
            written: PageRuns::default(),
            digest: String::new(),
        }
    }

    /// Root digest of the memory image.
    pub fn image(&self) -> &str {
        &self.image
    }

    /// Size of the memory image, in pages.
    pub fn image_pages(&self) -> u64 {
        self.image_pages
    }

    /// Pages that clones read, or ran.
    pub fn read(&self) -> &PageRuns {
        &self.read
    }

    /// Pages that clones wrote.
    pub fn written(&self) -> &PageRuns {
        &self.written
    }

    /// Learns from one more clone.
    pub fn merge(&mut self, used: &Used) {
        self.merge_common(std::slice::from_ref(used), 1);
    }

    /// Learns from clones what so many of them at least have done: what one of them alone does is its own affair. Pages
    /// outside of the image are left out; where the runs are too many the smallest gaps between them are closed.
    pub fn merge_common(&mut self, clones: &[Used], at_least: usize) {
        let common = |set: fn(&Used) -> &PageRuns| {
            let sets: Vec<&PageRuns> = clones.iter().map(set).collect();
            PageRuns::in_at_least(at_least, &sets).before(self.image_pages)
        };
        let (read, written) = (common(|used| &used.read), common(|used| &used.written));
        self.read = self.read.union(&read).bounded(MAX_RUNS);
        self.written = self.written.union(&written).bounded(MAX_RUNS);
        self.clones = self.clones.saturating_add(clones.len() as u64);
        self.updated_unix_ms = now_ms().max(self.created_unix_ms);
    }

    /// Whether there is one beside a snapshot, as far as can be told without reading it.
    pub fn exists(snapshot: &Snapshot) -> bool {
        snapshot.open_dir().has_file(file::WORKING_SET)
    }

    /// What is beside a snapshot: `None` if there is nothing.
    pub fn load(snapshot: &Snapshot) -> Result<Option<WorkingSet>, Unusable> {
        let dir = snapshot.open_dir();
        let bytes = match dir.read(file::WORKING_SET, MAX_BYTES) {
            Err(FileError::Missing { .. }) => return Ok(None),
            other => other?,
        };
        let path = || dir.join(file::WORKING_SET);
        let set = WorkingSet::parse(&bytes, path)?;
        let expected = WorkingSet::of(snapshot);
        if (&set.image, set.image_pages) != (&expected.image, expected.image_pages) {
            return Err(Unusable::Foreign { path: path(), found: set.image });
        }
        Ok(Some(set))
    }

    /// Decodes and checks the contents of a `working-set.json`, of whatever image it is. `path` names it in messages.
    pub fn parse(bytes: &[u8], path: impl Fn() -> PathBuf) -> Result<WorkingSet, Unusable> {
        // The version comes first: a file of another version may hold anything else.
        #[derive(Deserialize)]
        struct AnyVersion {
            version: u32,
        }
        let document = |source| Unusable::Document { path: path(), source };
        let AnyVersion { version: found } = serde_json::from_slice(bytes).map_err(document)?;
        if found != VERSION {
            return Err(Unusable::Version { path: path(), found });
        }
        let set: WorkingSet = serde_json::from_slice(bytes).map_err(document)?;
        let damaged = |what| Unusable::Damaged { path: path(), what };
        if set.digest != set.expected_digest() {
            return Err(damaged("its digest does not match"));
        }
        if set.read.end().max(set.written.end()) > set.image_pages {
            return Err(damaged("it names pages that the image does not have"));
        }
        if set.read.runs().len().max(set.written.runs().len()) > MAX_RUNS {
            return Err(damaged("it has too many runs"));
        }
        Ok(set)
    }

    /// Puts it beside a snapshot, in the place of an older one: whole, and on disk once this returns. Of several who do so
    /// at once one has the last word.
    pub fn save(&self, snapshot: &Snapshot) -> Result<(), SaveError> {
        let own = WorkingSet::of(snapshot);
        if (&self.image, self.image_pages) != (&own.image, own.image_pages) {
            return Err(SaveError::Foreign(self.image.clone()));
        }
        let dir = snapshot.open_dir();
        let written = dir.replace_file(file::WORKING_SET, &self.to_json()).and_then(|()| dir.sync());
        written.map_err(|source| SaveError::Write { path: dir.join(file::WORKING_SET), source })
    }

    /// Removes what is beside a snapshot, whatever it is; false if there is nothing.
    pub fn clear(snapshot: &Snapshot) -> Result<bool, SaveError> {
        let dir = snapshot.open_dir();
        match dir.remove_file(file::WORKING_SET) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(SaveError::Write { path: dir.join(file::WORKING_SET), source }),
        }
    }

    fn expected_digest(&self) -> String {
        let unsealed = WorkingSet { digest: String::new(), ..self.clone() };
        blake3::hash(&to_json(&unsealed)).to_hex().to_string()
    }

    /// The contents of the file.
    pub(crate) fn to_json(&self) -> Vec<u8> {
        let mut json = to_json(&WorkingSet { digest: self.expected_digest(), ..self.clone() });
        json.push(b'\n');
        json
    }
}

fn to_json(set: &WorkingSet) -> Vec<u8> {
    serde_json::to_vec(set).expect("numbers, strings and lists of them always have a JSON form")
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGES: u64 = 1 << 28;

    fn set() -> WorkingSet {
        WorkingSet::new("ab".repeat(32), PAGES)
    }

    fn parse(bytes: &[u8]) -> Result<WorkingSet, Unusable> {
        WorkingSet::parse(bytes, || "working-set.json".into())
    }

    #[test]
    fn the_largest_is_short_enough_and_comes_back() {
        let mut largest = set();
        // Runs at the far end of the largest image: numbers do not get longer.
        let runs =
            || PageRuns::new((0..20_000).map(|i| PAGES - 8_000_000 + 400 * i..PAGES - 8_000_000 + 400 * i + 200));
        largest.merge(&Used { read: runs(), written: runs() });
        assert_eq!((largest.read.runs().len(), largest.written.runs().len()), (MAX_RUNS, MAX_RUNS));
        let json = largest.to_json();
        assert!(json.len() as u64 <= MAX_BYTES, "{}", json.len());
        let back = parse(&json).unwrap();
        assert_eq!(WorkingSet { digest: String::new(), ..back }, largest);
    }

    #[test]
    fn what_is_not_right_is_named() {
        let sealed = |change: fn(&mut WorkingSet)| {
            let mut changed = set();
            change(&mut changed);
            changed.to_json()
        };
        let text = String::from_utf8(sealed(|_| {})).unwrap();
        for (bytes, part) in [
            (b"{".to_vec(), "no working set"),
            (b"{\"version\":2}".to_vec(), "version 2"),
            (text.replace("\"clones\":0", "\"clones\":1").into_bytes(), "digest"),
            (text.replace("\"read\":[]", "\"read\":[[3,0]]").into_bytes(), "page 3"),
            (text.replace("{\"version\"", "{\"more\":1,\"version\"").into_bytes(), "unknown field"),
            (sealed(|set| set.read = PageRuns::of_pages([PAGES])), "does not have"),
            (sealed(|set| set.read = PageRuns::of_pages((0..20_000).map(|i| 2 * i))), "too many"),
        ] {
            let error = parse(&bytes).unwrap_err().to_string();
            assert!(error.contains(part), "{part}: {error}");
        }
    }

    fn runs() -> impl Strategy<Value = PageRuns> {
        prop::collection::vec(0u64..300, 0..40).prop_map(PageRuns::of_pages)
    }

    proptest! {
        #[test]
        fn what_is_learnt_stays_and_lies_inside_the_image(a in runs(), b in runs(), c in runs(), at_least in 1usize..4) {
            let mut set = WorkingSet::new("ab".repeat(32), 200);
            set.merge(&Used { read: a.clone(), written: PageRuns::default() });
            let clones = [(&b, &c), (&c, &b)].map(|(read, written)| Used { read: read.clone(), written: written.clone() });
            set.merge_common(&clones, at_least);
            let both = PageRuns::in_at_least(at_least, &[&b, &c]);
            prop_assert_eq!(&set.read, &a.union(&both).before(200));
            prop_assert_eq!(&set.written, &both.before(200));
            prop_assert_eq!(set.clones, 3);
            prop_assert!(parse(&set.to_json()).is_ok());
        }

        #[test]
        fn no_bytes_make_parsing_panic(bytes: Vec<u8>) {
            prop_assert!(parse(&bytes).is_err());
        }
    }
}
