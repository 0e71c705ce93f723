//! The directory in which a snapshot comes about.

use super::CreateError;
use super::link::Link;
use super::memory::{MemoryDigest, Over};
use crate::compat::HostFacts;
use crate::cpu::GuestCpu;
use crate::dir::{Dir, Lock};
use crate::file;
use crate::manifest::{Devices, Machine, Manifest, Memory, Readiness, StateFile};
use crate::stamp::Stamp;
use crate::state::{self, MachineState};
use crate::working_set::WorkingSet;
use rustix::fs::{FlockOperation, Mode, RenameFlags};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// A snapshot that is being written. Dropping it removes what was written.
#[derive(Debug)]
pub struct Staging {
    /// The directory that will hold the snapshot.
    parent: Dir,
    /// The directory that becomes the snapshot. Its lock says that we are alive.
    dir: Dir,
    /// Present name of `dir` in `parent`.
    name: Vec<u8>,
    /// Name of the snapshot in `parent`.
    target: Vec<u8>,
    /// Files of `dir` that must be on disk before it has its name.
    unsynced: Vec<(String, File)>,
    /// What its files may hold in all, in bytes.
    max_bytes: u64,
    /// What those that are written do.
    taken_bytes: u64,
    /// The second name that the memory file is to have.
    link: Option<Link>,
    /// Whether `dir` is a finished snapshot and no longer ours to remove.
    done: bool,
}

/// What a caller knows about the machine and its host that the memory and the state do not say.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Version of the vmm.
    pub vmm_version: String,
    /// The host.
    pub host: HostFacts,
    /// Devices whose host side a restore has to provide.
    pub devices: Devices,
    /// What the agent in the guest had announced when the state was saved.
    pub readiness: Option<Readiness>,
    /// Digest of the configuration that the machine was started with, if a later start is to compare its own with it.
    pub config: Option<String>,
}

impl Staging {
    /// Says what stands in the way of a snapshot at `target`, as far as it can be known, and makes nothing.
    pub fn check(target: &Path) -> Result<(), CreateError> {
        place(target).map(drop)
    }

    /// Makes a directory beside `target`, which must not exist, whereas the directory above it must.
    pub fn begin(target: &Path) -> Result<Staging, CreateError> {
        let (parent, name) = place(target)?;
        remove_leftovers(&parent, name);
        let (staging_name, dir) = make_locked(&parent, name)?;
        let (target, unsynced) = (name.to_owned(), Vec::new());
        Ok(Staging {
            parent,
            dir,
            name: staging_name,
            target,
            unsynced,
            max_bytes: u64::MAX,
            taken_bytes: 0,
            link: None,
            done: false,
        })
    }

    /// Has the memory file also get the name `path`, once the snapshot is complete. It must not exist, and lie on the same file
    /// system, in a directory that exists. What stands in the way of that is said here, as far as it can be known.
    pub fn link_memory(&mut self, path: &Path) -> Result<(), CreateError> {
        let link = Link::plan(path, &self.dir)?;
        if link.is(&self.parent, &self.target) {
            return Err(CreateError::LinkIsTarget { path: link.path().to_owned() });
        }
        self.link = Some(link);
        Ok(())
    }

    /// Adds a file of the caller's own, synced. Its name must be none of a snapshot's.
    pub fn add_file(&self, name: &str, contents: &[u8]) -> Result<(), CreateError> {
        self.dir.write_file(name, contents).map_err(|e| self.write_error(name, contents.len() as u64, e))
    }

    /// Has the snapshot refused if its files would hold more than so many bytes; holes do not count.
    pub fn limit(&mut self, max_bytes: u64) {
        self.max_bytes = max_bytes;
    }

    /// How many bytes more its files may hold.
    pub(super) fn room(&self) -> u64 {
        self.max_bytes.saturating_sub(self.taken_bytes)
    }

    /// Counts what a file holds, or is about to.
    pub(super) fn take(&mut self, bytes: u64) -> Result<(), CreateError> {
        if bytes > self.room() {
            return Err(self.over_limit(bytes));
        }
        self.taken_bytes += bytes;
        Ok(())
    }

    /// There is no room for so many bytes more.
    pub(super) fn over_limit(&self, bytes: u64) -> CreateError {
        let needed_bytes = self.taken_bytes.saturating_add(bytes);
        CreateError::OverLimit { path: self.target_path(), needed_bytes, max_bytes: self.max_bytes }
    }

    pub(super) fn dir(&self) -> &Dir {
        &self.dir
    }

    /// Where the snapshot will be.
    pub(super) fn target_path(&self) -> PathBuf {
        self.parent.path().join(OsStr::from_bytes(&self.target))
    }

    /// Has a file synced before the snapshot gets its name.
    pub(super) fn sync_later(&mut self, name: String, file: File) {
        self.unsynced.push((name, file));
    }

    /// Writes everything else and gives the snapshot its name. Once this returns it survives a power cut.
    pub fn commit(self, memory: MemoryDigest, facts: Facts, state: &MachineState) -> Result<Manifest, CreateError> {
        let state_bytes = state::encode(state)?;
        let manifest = describe(memory.describe(), facts, state, &state_bytes);
        self.complete(memory, manifest, &state_bytes)
    }

    /// The same for a snapshot of the machine that another one is of, as it stood then, with its memory stored as `memory` says:
    /// `manifest` and `state` are those of that other one. The disks that it holds must have been [copied](Staging::copy_held).
    pub fn commit_as(self, memory: MemoryDigest, manifest: &Manifest, state: &[u8]) -> Result<Manifest, CreateError> {
        let state_file = StateFile { file: file::STATE.into(), ..manifest.state.clone() };
        // It is no saved state, whatever the other was.
        let manifest = Manifest { memory: memory.describe(), state: state_file, config: None, ..manifest.clone() };
        self.complete(memory, manifest, state)
    }

    /// Writes which pages clones use, for a snapshot of the memory that this was learnt from.
    pub fn write_working_set(&mut self, set: &WorkingSet) -> Result<(), CreateError> {
        let json = set.to_json();
        self.take(json.len() as u64)?;
        self.dir.write_file(file::WORKING_SET, &json).map_err(|e| self.write_error(file::WORKING_SET, 0, e))
    }

    fn complete(
        mut self,
        memory: MemoryDigest,
        mut manifest: Manifest,
        state_bytes: &[u8],
    ) -> Result<Manifest, CreateError> {
        manifest.format_version = manifest.lowest_version();
        manifest.seal();
        manifest.check()?;

        let (digests, json) = (memory.digests.as_slice(), manifest.to_json());
        self.take((digests.len() + state_bytes.len() + json.len()) as u64)?;

        memory.file.sync_all().map_err(|e| self.write_error(memory.name(), memory.data_bytes, e))?;
        for (name, file) in &self.unsynced {
            file.sync_all().map_err(|e| self.write_error(name, memory.data_bytes, e))?;
        }
        for drive in &manifest.devices.drives {
            let Some(held) = &drive.held else { continue };
            let Some((name, file)) = self.unsynced.iter().find(|(name, _)| *name == held.file) else { continue };
            let stamp = Stamp::of(file, &held.digest)
                .and_then(|stamp| self.dir.write_file(&file::disk_stamp(&drive.drive_id), &stamp.to_json()));
            stamp.map_err(|e| self.write_error(name, memory.data_bytes, e))?;
        }
        let map = memory.over.as_ref().and_then(|over| over.map.as_deref());
        let files = [
            (file::DIGESTS, Some(digests)),
            (file::PAGE_MAP, map),
            (file::STATE, Some(state_bytes)),
            (file::MANIFEST, Some(&json)),
        ];
        for (name, contents) in files.into_iter().filter_map(|(name, contents)| Some((name, contents?))) {
            self.dir.write_file(name, contents).map_err(|e| self.write_error(name, memory.data_bytes, e))?;
        }
        // As late as can be, since it is seen at once; but a link changes what the stamp tells of the file.
        if let Some(link) = &mut self.link {
            link.make(&self.dir)?;
        }
        let stamp = Stamp::of(&memory.file, &manifest.memory.root)
            .and_then(|stamp| self.dir.write_file(file::STAMP, &stamp.to_json()));
        stamp.map_err(|e| self.write_error(file::STAMP, memory.data_bytes, e))?;
        self.dir.sync().map_err(|e| self.write_error(".", memory.data_bytes, e))?;
        let _base = memory.over.as_ref().map(|over| self.protect(over)).transpose()?;
        self.publish()?;
        Ok(manifest)
    }

    /// Notes in the directory of the snapshot that this one lies over that it does, so that nobody removes that one. Nobody does
    /// while the result is there.
    fn protect(&self, over: &Over) -> Result<Dir, CreateError> {
        let path = || over.dir.clone();
        let failed = |source| CreateError::Note { path: path(), source };
        let dir = Dir::open(&over.dir).map_err(failed)?;
        if !dir.lock(Lock::Shared).map_err(|e| failed(e.into()))? || !dir.has_file(file::MANIFEST) {
            return Err(CreateError::BaseRemoved { path: path() });
        }
        let there = crate::load::read_manifest(&dir).map_err(|e| failed(io::Error::other(e)))?;
        if there.digest != over.parent.digest {
            return Err(CreateError::BaseReplaced { path: path() });
        }
        let child = super::base::relative(&over.dir, &self.target_path()).map_err(failed)?;
        let child = child.as_os_str().as_bytes();
        dir.replace_file(&file::child(child), child).map_err(failed)?;
        dir.sync().map_err(failed)?;
        Ok(dir)
    }

    /// Renames the directory to the target and makes that durable.
    fn publish(&mut self) -> Result<(), CreateError> {
        let target = self.target_path();
        let (from, to) = (self.name.as_slice(), self.target.as_slice());
        // From now on it may be used, and still not be removed. Where there are no locks there was none.
        let _ = self.dir.lock(Lock::Shared);
        let renamed = match rustix::fs::renameat_with(&self.parent, from, &self.parent, to, RenameFlags::NOREPLACE) {
            // The file system cannot promise that. An ordinary rename still refuses all but an empty directory.
            Err(Errno::INVAL | Errno::NOSYS) => rustix::fs::renameat(&self.parent, from, &self.parent, to),
            other => other,
        };
        match renamed {
            Ok(()) => self.name = self.target.clone(),
            Err(Errno::EXIST | Errno::NOTEMPTY | Errno::NOTDIR) => return Err(CreateError::Exists { path: target }),
            Err(e) => return Err(CreateError::Write { path: target, source: e.into() }),
        }
        self.parent.sync().map_err(|source| CreateError::Write { path: target, source })?;
        self.done = true;
        if let Some(link) = self.link.take() {
            link.keep(&self.dir);
        }
        Ok(())
    }

    pub(super) fn write_error(&self, name: &str, needed_bytes: u64, source: io::Error) -> CreateError {
        let path = self.dir.join(name);
        match Errno::from_io_error(&source) {
            Some(Errno::NOSPC | Errno::DQUOT | Errno::FBIG) => CreateError::NoSpace { path, needed_bytes },
            _ => CreateError::Write { path, source },
        }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.done {
            // First, as its note is in the directory.
            self.link = None;
            self.dir.clear();
            let _ = self.parent.remove_dir(OsStr::from_bytes(&self.name));
        }
    }
}

/// What the manifest says of all this; it is still to be sealed.
pub(crate) fn describe(memory: Memory, facts: Facts, machine: &MachineState, state: &[u8]) -> Manifest {
    let Facts { vmm_version, host: HostFacts { arch, cpu, kernel }, devices, readiness, config } = facts;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Manifest {
        format_version: 0,
        vmm_version,
        created_unix_ms: now.as_millis() as u64,
        arch,
        cpu,
        guest_cpu: GuestCpu::of(machine),
        host_kernel: kernel,
        machine: Machine { vcpus: machine.vcpus.len() as u32, memory_bytes: memory.size_bytes },
        memory,
        state: StateFile {
            file: file::STATE.into(),
            size_bytes: state.len() as u64,
            digest: blake3::hash(state).to_hex().to_string(),
        },
        devices,
        readiness,
        config,
        digest: String::new(),
    }
}

/// Makes a directory `.NAME.partial-PID-N` and takes its lock.
fn make_locked(parent: &Dir, target: &[u8]) -> Result<(Vec<u8>, Dir), CreateError> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    loop {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let mut name = partial_prefix(target);
        name.extend_from_slice(format!("{}-{number}", std::process::id()).as_bytes());
        let path = || parent.path().join(OsStr::from_bytes(&name));
        let failed = |e: io::Error| match Errno::from_io_error(&e) {
            Some(Errno::NOSPC | Errno::DQUOT) => CreateError::NoSpace { path: path(), needed_bytes: 0 },
            _ => CreateError::Write { path: path(), source: e },
        };
        match rustix::fs::mkdirat(parent, &name, Mode::RWXU) {
            Ok(()) => {}
            Err(Errno::EXIST) => continue,
            Err(e) => return Err(failed(e.into())),
        }
        // Another process may take a directory that is not locked yet for a leftover and remove it: then make another.
        let dir = match parent.open_dir(OsStr::from_bytes(&name)) {
            Ok(dir) => dir,
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => {
                let _ = parent.remove_dir(OsStr::from_bytes(&name));
                return Err(failed(e));
            }
        };
        match dir.lock(Lock::Exclusive) {
            Ok(true) => {}
            Ok(false) => continue,
            Err(e) => {
                let _ = parent.remove_dir(OsStr::from_bytes(&name));
                return Err(failed(e.into()));
            }
        }
        if rustix::fs::statat(parent, &name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).is_ok() {
            return Ok((name, dir));
        }
    }
}

/// The directory above a snapshot that is to be made, and the name that is free there.
fn place(target: &Path) -> Result<(Dir, &[u8]), CreateError> {
    let bad_name = || CreateError::BadName { path: target.to_owned() };
    let name = target.file_name().ok_or_else(bad_name)?.as_bytes();
    // Room for the affixes of the staging directory's name in the file system's 255 bytes.
    if name.len() > 200 {
        return Err(bad_name());
    }
    let parent_path = match target.parent() {
        Some(path) if !path.as_os_str().is_empty() => path,
        _ => Path::new("."),
    };
    let parent = Dir::open(parent_path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => CreateError::NoParent { path: parent_path.to_owned() },
        _ => CreateError::Write { path: parent_path.to_owned(), source },
    })?;
    match rustix::fs::statat(&parent, name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => {}
        Err(e) => return Err(CreateError::Write { path: target.to_owned(), source: e.into() }),
        Ok(_) => return Err(CreateError::Exists { path: target.to_owned() }),
    }
    Ok((parent, name))
}

/// Removes what processes that no longer run have left of a snapshot that was to become `target`. [`Staging::begin`] does
/// the same.
pub fn clear_leftovers(target: &Path) {
    let parent = target.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if let (Some(name), Ok(parent)) = (target.file_name(), Dir::open(parent)) {
        remove_leftovers(&parent, name.as_bytes());
    }
}

/// Removes what processes that no longer run have left of snapshots of this name.
fn remove_leftovers(parent: &Dir, target: &[u8]) {
    let Ok(entries) = rustix::fs::Dir::read_from(parent) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_bytes();
        if !is_partial_of(name, target) {
            continue;
        }
        let Ok(dir) = parent.open_dir(OsStr::from_bytes(name)) else { continue };
        // A living writer holds the lock. Where there are no locks nothing is removed. One that has just finished has let it go,
        // and given the directory the name of a snapshot.
        if rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive).is_ok()
            && dir.is_named(parent, OsStr::from_bytes(name))
        {
            Link::remove_leftover(&dir);
            dir.clear();
            let _ = parent.remove_dir(OsStr::from_bytes(name));
        }
    }
}

fn partial_prefix(target: &[u8]) -> Vec<u8> {
    [b".", target, b".partial-"].concat()
}

fn is_partial_of(name: &[u8], target: &[u8]) -> bool {
    let Some(rest) = name.strip_prefix(partial_prefix(target).as_slice()) else { return false };
    let mut numbers = rest.split(|b| *b == b'-');
    let number = |part: Option<&[u8]>| part.is_some_and(|n| !n.is_empty() && n.iter().all(u8::is_ascii_digit));
    number(numbers.next()) && number(numbers.next()) && numbers.next().is_none()
}
