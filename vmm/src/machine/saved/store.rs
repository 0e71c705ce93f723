//! A saved state on disk: a snapshot with a mark that says whether it was used.

use rustix::fs::{AtFlags, CWD, Dir, FileType, FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Name of the file with the mark.
pub const MARK: &str = ::snapshot::file::SAVED_MARK;
/// The mark of a state that nobody has gone on from. All marks have the same length, so that one can be put in place of
/// another where files cannot be made, and even where there is no space.
pub const FRESH: &[u8; 6] = b"fresh\n";
/// The mark of one that somebody has gone on from, or was about to.
const USED: &[u8; 6] = b"used \n";
/// The mark of one that a start could not use, and could not set aside either.
const LEFT: &[u8; 6] = b"left \n";
/// Most states that are set aside in one place.
const MAX_ASIDE: u32 = 1000;

/// What lies where a state would be.
#[derive(Debug)]
pub enum Found {
    /// Nothing.
    Nothing,
    /// A state to go on from.
    Fresh(State),
    /// Something else.
    Unusable {
        /// Why a start cannot use it.
        reason: String,
        /// What is to be done with it by a machine that is booted instead.
        then: Then,
    },
}

/// What is done with what cannot be used.
#[derive(Debug)]
pub enum Then {
    /// It stays: it is no saved state of ours, or somebody else's.
    Leave,
    /// It is removed: it was used.
    Remove,
    /// It gets another name, so that no later start takes it for the machine as it is then.
    SetAside(Option<State>),
}

/// A saved state that nobody has gone on from. Nobody else can while this exists.
#[derive(Debug)]
pub struct State {
    path: PathBuf,
    mark: File,
}

/// Looks what there is to go on from.
pub fn find(path: &Path) -> Found {
    // The last piece of one that was being removed, or a directory that was made ahead: nothing is lost with it.
    let (_, mark) = match open(path, |_| fs::remove_dir(path).is_ok()) {
        Ok(opened) => opened,
        Err(found) => return found,
    };
    let unusable = |reason: String, then| Found::Unusable { reason: told(path, &reason), then };
    match rustix::fs::flock(&mark, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) | Err(Errno::OPNOTSUPP) => {}
        Err(Errno::WOULDBLOCK) => return unusable("another vmm is using it right now".into(), Then::Leave),
        Err(e) => return unusable(format!("{MARK} cannot be locked: {e}"), Then::SetAside(None)),
    }
    let state = State { path: path.to_owned(), mark };
    match judge(&state.mark) {
        Ok(()) => Found::Fresh(state),
        Err((reason, then)) => unusable(reason, then(state)),
    }
}

/// What the state that there is to go on from takes on disk, in bytes; `None` if nothing is there, or why a start would not even
/// open what is. Changes nothing, and locks nothing that a start would find locked.
pub fn look(path: &Path) -> Result<Option<u64>, String> {
    let (dir, mark) = match open(path, is_empty) {
        Ok(opened) => opened,
        Err(Found::Unusable { reason, .. }) => return Err(reason),
        Err(_) => return Ok(None),
    };
    judge(&mark).map_err(|(reason, _)| told(path, &reason))?;
    size(&dir).map(Some).map_err(|e| told(path, &format!("it cannot be read: {e}")))
}

fn told(path: &Path, reason: &str) -> String {
    format!("{}: {reason}", path.display())
}

/// Opens the directory of a state and its mark. `is_nothing` is asked about a directory that has none.
fn open(path: &Path, is_nothing: impl FnOnce(&OwnedFd) -> bool) -> Result<(OwnedFd, File), Found> {
    let unusable = |reason: String, then| Found::Unusable { reason: told(path, &reason), then };
    let dir = match open_dir(path) {
        Ok(dir) => dir,
        Err(Errno::NOENT) => return Err(Found::Nothing),
        Err(Errno::NOTDIR | Errno::LOOP) => return Err(unusable("it is no directory".into(), Then::Leave)),
        Err(e) => return Err(unusable(format!("it cannot be opened: {e}"), Then::Leave)),
    };
    match open_mark(&dir, OFlags::RDWR) {
        Ok(mark) => Ok((dir, mark)),
        Err(Errno::NOENT) if is_nothing(&dir) => Err(Found::Nothing),
        Err(Errno::NOENT) => {
            let reason = format!("it is no saved state, as it has no {MARK}; `--restore` restores snapshots");
            Err(unusable(reason, Then::Leave))
        }
        Err(e) => {
            let was_used =
                open_mark(&dir, OFlags::RDONLY).is_ok_and(|mark| read(&mark).is_ok_and(|mark| mark != *FRESH));
            let reason = if was_used { WAS_USED.into() } else { format!("{MARK}: {e}") };
            Err(unusable(reason, if was_used { Then::Leave } else { Then::SetAside(None) }))
        }
    }
}

const WAS_USED: &str = "it was used by an earlier start";

/// Why a state is not used, and what becomes of it.
type Verdict = (String, fn(State) -> Then);

/// Why nobody goes on from a state with this mark, if so, and what is to be done with it.
fn judge(mark: &File) -> Result<(), Verdict> {
    match read(mark) {
        Ok(mark) if mark == *FRESH => Ok(()),
        Ok(mark) if mark == *USED => Err((WAS_USED.into(), |_| Then::Remove)),
        Ok(mark) if mark == *LEFT => Err(("an earlier start could not use it, and left it".into(), |_| Then::Leave)),
        Ok(_) => Err((format!("{MARK} is damaged"), |state| Then::SetAside(Some(state)))),
        Err(e) => Err((format!("{MARK} cannot be read: {e}"), |state| Then::SetAside(Some(state)))),
    }
}

fn is_empty(dir: &OwnedFd) -> bool {
    let is_own = |name: &[u8]| name == b"." || name == b"..";
    Dir::read_from(dir).is_ok_and(|entries| {
        entries.into_iter().all(|entry| entry.is_ok_and(|entry| is_own(entry.file_name().to_bytes())))
    })
}

/// What the files of a directory take on disk, in bytes.
fn size(dir: &OwnedFd) -> Result<u64, Errno> {
    let sizes = Dir::read_from(dir)?.map(|entry| {
        let entry = rustix::fs::statat(dir, entry?.file_name(), AtFlags::SYMLINK_NOFOLLOW)?;
        let is_file = FileType::from_raw_mode(entry.st_mode) == FileType::RegularFile;
        Ok(if is_file { entry.st_blocks as u64 * 512 } else { 0 })
    });
    sizes.sum()
}

/// Makes way for a state that is to be saved, if what is in the way was used.
pub fn make_room(path: &Path) {
    if let Found::Unusable { then: then @ Then::Remove, .. } = find(path) {
        then.apply(path);
    }
}

impl State {
    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Marks it as used: from now on nobody goes on from it.
    pub fn mark_as_used(&self) -> io::Result<()> {
        put(&self.mark, USED)
    }

    /// Removes it. It must be marked as used.
    pub fn remove(self) {
        Then::Remove.apply(&self.path);
    }
}

impl Then {
    /// Does it, as far as that goes. What was done is in the log.
    pub fn apply(self, path: &Path) {
        match self {
            Then::Leave => {}
            Then::Remove => match remove(path) {
                Ok(()) => tracing::info!("the saved state {} was used and is removed", path.display()),
                Err(e) => tracing::error!(
                    "the saved state {} was used, will not be used again, and cannot be removed: {e}; remove it, or the next save fails",
                    path.display()
                ),
            },
            Then::SetAside(state) => match set_aside(path) {
                Ok(aside) => tracing::warn!(
                    "the saved state {} is kept as {}: remove it if it is of no use",
                    path.display(),
                    aside.display()
                ),
                Err(e) => {
                    // If that cannot be written either, no start can use it: it would have to mark it first.
                    let _ = state.map(|state| put(&state.mark, LEFT));
                    tracing::error!(
                        "the saved state {} will not be used any more, and cannot be renamed: {e}; move it, or the next save fails",
                        path.display()
                    );
                }
            },
        }
    }
}

fn open_dir(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
}

fn open_mark(dir: &OwnedFd, access: OFlags) -> Result<File, Errno> {
    let flags = access | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mark = File::from(rustix::fs::openat(dir, MARK, flags, Mode::empty())?);
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&mark)?.st_mode);
    if kind == FileType::RegularFile { Ok(mark) } else { Err(Errno::INVAL) }
}

fn read(mark: &File) -> Result<[u8; FRESH.len()], Errno> {
    let mut bytes = Vec::new();
    mark.take(FRESH.len() as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
    // What has another length is no mark.
    Ok(bytes.try_into().unwrap_or_default())
}

fn put(mark: &File, word: &[u8]) -> io::Result<()> {
    mark.write_all_at(word, 0)?;
    mark.sync_all()
}

/// Removes a state file by file, the mark last: whatever is left at any moment says what it is.
fn remove(path: &Path) -> io::Result<()> {
    let dir = open_dir(path)?;
    let names: Vec<_> =
        Dir::read_from(&dir)?.map(|entry| Ok(entry?.file_name().to_owned())).collect::<Result<_, Errno>>()?;
    let is_file = |name: &std::ffi::CString| ![&b"."[..], b"..", MARK.as_bytes()].contains(&name.as_bytes());
    for name in names.into_iter().filter(is_file) {
        rustix::fs::unlinkat(&dir, name, AtFlags::empty())?;
    }
    rustix::fs::unlinkat(&dir, MARK, AtFlags::empty())?;
    fs::remove_dir(path)
}

/// Gives a state a name of its own beside its place, and returns it.
fn set_aside(path: &Path) -> io::Result<PathBuf> {
    for number in 1..=MAX_ASIDE {
        let mut name = OsString::from(path);
        name.push(format!(".unusable-{number}"));
        let aside = PathBuf::from(name);
        let renamed = match rustix::fs::renameat_with(CWD, path, CWD, &aside, RenameFlags::NOREPLACE) {
            // The file system cannot promise that. A directory replaces nothing but an empty one anyway.
            Err(Errno::INVAL | Errno::NOSYS) => rustix::fs::renameat(CWD, path, CWD, &aside),
            other => other,
        };
        match renamed {
            Ok(()) => return Ok(aside),
            Err(Errno::EXIST | Errno::NOTEMPTY | Errno::NOTDIR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Err(io::Error::other(format!("there are {MAX_ASIDE} of them already")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(dir: &Path, mark: &[u8]) -> PathBuf {
        let path = dir.join("state");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("mem.bin"), vec![1; 10_000]).unwrap();
        fs::write(path.join(MARK), mark).unwrap();
        path
    }

    fn reason(path: &Path) -> String {
        let looked = look(path);
        match find(path) {
            Found::Unusable { reason, .. } => {
                // Who only looks sees no lock.
                assert!(looked == Err(reason.clone()) || reason.contains("another vmm"), "{looked:?}, {reason}");
                reason
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_state_is_used_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        assert!(matches!(find(&path), Found::Nothing));
        assert_eq!(look(&path), Ok(None));
        let path = state(dir.path(), FRESH);
        let bytes = look(&path).unwrap();
        assert!(bytes >= Some(10_000 + FRESH.len() as u64), "{bytes:?}");
        let Found::Fresh(first) = find(&path) else { panic!() };
        assert!(reason(&path).contains("another vmm"), "nobody else can have it");
        first.mark_as_used().unwrap();
        assert!(look(&path).unwrap_err().contains(WAS_USED));
        drop(first);
        let Found::Unusable { reason, then } = find(&path) else { panic!() };
        assert!(reason.contains("used by an earlier start"), "{reason}");
        then.apply(&path);
        assert!(!path.exists());
    }

    #[test]
    fn what_is_no_fresh_state_is_told_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        fs::write(&path, "a file").unwrap();
        assert!(reason(&path).contains("no directory"));
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert_eq!(look(&path), Ok(None));
        assert!(path.exists(), "a look changes nothing");
        assert!(matches!(find(&path), Found::Nothing), "the rest of one that was being removed");
        assert!(!path.exists());
        fs::create_dir(&path).unwrap();
        fs::write(path.join("snap.json"), "{}").unwrap();
        assert!(reason(&path).contains("--restore"));
        make_room(&path);
        assert!(path.exists());
        fs::remove_dir_all(&path).unwrap();
        for (number, mark) in [&b""[..], b"fresh", b"fresh\n ", b"\0\0\0\0\0\0"].into_iter().enumerate() {
            let path = state(dir.path(), mark);
            let Found::Unusable { reason, then } = find(&path) else { panic!() };
            assert!(reason.contains("damaged"), "{reason}");
            then.apply(&path);
            assert!(
                !path.exists() && dir.path().join(format!("state.unusable-{}", number + 1)).join("mem.bin").exists()
            );
        }
        let path = state(dir.path(), LEFT);
        assert!(reason(&path).contains("left it"));
        make_room(&path);
        assert!(path.exists());
    }

    #[test]
    fn a_used_state_is_removed_to_make_room() {
        let dir = tempfile::tempdir().unwrap();
        let path = state(dir.path(), USED);
        make_room(&path);
        assert!(!path.exists());
        let path = state(dir.path(), FRESH);
        make_room(&path);
        assert!(path.exists());
    }
}
