//! `mem.stamp`, `disk-ID.stamp`: notes that the memory image, or what is held of a disk, is still the file that was checked.
//!
//! Checking a whole file takes longer than restoring it. The note identifies the file that was checked, with the time
//! of its last change, which the kernel keeps: a file that was written since, or replaced, does not match. The note is
//! advisory and belongs to one host. It guards against accidents, not against whoever may write to the directory.

use crate::dir::Dir;
use serde::{Deserialize, Serialize};
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Longest stamp that is read, in bytes.
const MAX_BYTES: u64 = 4096;
/// Two changes within this time may carry the same time stamp (the kernel's clock for files ticks every 1 to 10 ms).
pub const FILE_TIME_GRANULARITY: Duration = Duration::from_millis(20);

/// Identity of a file that was checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Stamp {
    dev: u64,
    ino: u64,
    size: u64,
    mtime_ns: i64,
    ctime_ns: i64,
    /// Digest of what the file should hold: the root of a memory image, or that of a disk.
    root: String,
}

impl Stamp {
    /// The stamp that fits the file as it is now.
    pub(crate) fn of(file: &File, root: &str) -> io::Result<Stamp> {
        Ok(Stamp::from_metadata(&file.metadata()?, root))
    }

    fn from_metadata(metadata: &Metadata, root: &str) -> Stamp {
        let ns = |seconds: i64, nanos: i64| seconds.saturating_mul(1_000_000_000).saturating_add(nanos);
        Stamp {
            dev: metadata.dev(),
            ino: metadata.ino(),
            size: metadata.size(),
            mtime_ns: ns(metadata.mtime(), metadata.mtime_nsec()),
            ctime_ns: ns(metadata.ctime(), metadata.ctime_nsec()),
            root: root.to_owned(),
        }
    }

    /// Whether the file changed so recently that a further change might go unnoticed.
    pub(crate) fn is_too_fresh(&self) -> bool {
        let changed = UNIX_EPOCH + Duration::from_nanos(self.ctime_ns.max(self.mtime_ns).max(0) as u64);
        SystemTime::now() < changed + FILE_TIME_GRANULARITY
    }

    /// Whether `file`, of which this was the stamp before it was checked, holds what it held then. A name that it got or
    /// lost meanwhile does not matter, nor its mode: those move the time of its last change of any kind (ctime), and what is
    /// written moves that of its contents too (mtime).
    pub(crate) fn still_fits(&self, file: &File) -> io::Result<bool> {
        let now = Stamp::of(file, &self.root)?;
        Ok(Stamp { ctime_ns: self.ctime_ns, ..now } == *self)
    }

    /// The same, and writes the stamp for the next user if nothing at all has moved. One that cannot be written costs them
    /// another check, no more.
    pub(crate) fn confirm(&self, file: &File, dir: &Dir, name: &str) -> io::Result<bool> {
        if Stamp::of(file, &self.root)? == *self && !self.is_too_fresh() {
            let _ = self.write(dir, name);
        }
        self.still_fits(file)
    }

    pub(crate) fn to_json(&self) -> Vec<u8> {
        let mut json = serde_json::to_vec_pretty(self).expect("numbers and strings always have a JSON form");
        json.push(b'\n');
        json
    }

    /// The stamp of this name, if there is one that can be read.
    pub(crate) fn read(dir: &Dir, name: &str) -> Option<Stamp> {
        serde_json::from_slice(&dir.read(name, MAX_BYTES).ok()?).ok()
    }

    /// Puts this stamp in the place of an older one.
    pub(crate) fn write(&self, dir: &Dir, name: &str) -> io::Result<()> {
        dir.replace_file(name, &self.to_json())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Write;

    #[test]
    fn names_come_and_go_while_a_file_is_checked_but_no_bytes() {
        let root = tempfile::tempdir().unwrap();
        let dir = Dir::open(root.path()).unwrap();
        let path = root.path().join("mem.bin");
        fs::write(&path, b"as it was").unwrap();
        let mut file = File::options().append(true).open(&path).unwrap();
        let pass = || std::thread::sleep(2 * FILE_TIME_GRANULARITY);
        pass();
        let before = Stamp::of(&file, "root").unwrap();
        let stamp = || Stamp::read(&dir, "mem.stamp");

        pass();
        fs::hard_link(&path, root.path().join("other")).unwrap();
        assert_ne!(Stamp::of(&file, "root").unwrap(), before, "that shows");
        assert!(before.confirm(&file, &dir, "mem.stamp").unwrap());
        assert_eq!(stamp(), None, "it would not fit");

        pass();
        let before = Stamp::of(&file, "root").unwrap();
        assert!(before.confirm(&file, &dir, "mem.stamp").unwrap());
        assert_eq!(stamp().as_ref(), Some(&before));

        fs::remove_file(root.path().join("mem.stamp")).unwrap();
        file.write_all(b", and more").unwrap();
        assert!(!before.confirm(&file, &dir, "mem.stamp").unwrap());
        // Of the same length, and only the time tells.
        let before = Stamp::of(&file, "root").unwrap();
        pass();
        let file = File::options().write(true).open(&path).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"is", 3).unwrap();
        assert!(!before.confirm(&file, &dir, "mem.stamp").unwrap());
        assert_eq!(stamp(), None);
    }
}
