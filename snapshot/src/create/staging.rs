//! The directory in which a snapshot comes about.

use super::link::Link;
use super::{Cancel, CreateError, MemorySource};
use crate::chunk::{ZeroDigests, is_zero};
use crate::compat::HostFacts;
use crate::dir::Dir;
use crate::manifest::{Devices, Machine, Manifest, Memory, MemoryRegion, Readiness, StateFile};
use crate::stamp::Stamp;
use crate::state::{self, MachineState};
use crate::{CHUNK_BYTES, PAGE_BYTES, file};
use rustix::fs::{FlockOperation, Mode, RenameFlags};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;
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

/// What [`Staging::write_memory`] has written.
#[derive(Debug)]
pub struct MemoryDigest {
    regions: Vec<MemoryRegion>,
    size_bytes: u64,
    data_bytes: u64,
    digests: Vec<u8>,
    root: blake3::Hash,
    file: File,
}

impl MemoryDigest {
    /// The root digest, in hex.
    pub fn root(&self) -> String {
        self.root.to_hex().to_string()
    }

    /// How much was written, in bytes; the rest are holes.
    pub fn data_bytes(&self) -> u64 {
        self.data_bytes
    }
}

impl Staging {
    /// Makes a directory beside `target`, which must not exist, whereas the directory above it must.
    pub fn begin(target: &Path) -> Result<Staging, CreateError> {
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
        remove_leftovers(&parent, name);
        let (staging_name, dir) = make_locked(&parent, name)?;
        let (target, unsynced) = (name.to_owned(), Vec::new());
        Ok(Staging { parent, dir, name: staging_name, target, unsynced, link: None, done: false })
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

    pub(super) fn dir(&self) -> &Dir {
        &self.dir
    }

    /// Has a file synced before the snapshot gets its name.
    pub(super) fn sync_later(&mut self, name: String, file: File) {
        self.unsynced.push((name, file));
    }

    /// Writes the memory. Zero pages become holes. `cancel` is looked at before each chunk. Nothing is synced to disk
    /// yet: a guest may be standing still meanwhile.
    pub fn write_memory(
        &mut self,
        source: &mut dyn MemorySource,
        cancel: &dyn Cancel,
    ) -> Result<MemoryDigest, CreateError> {
        let (size, regions) = (source.size(), source.regions());
        Memory::check_layout(&regions, size)?;
        let file = self.dir.create_file(file::MEMORY).map_err(|e| self.write_error(file::MEMORY, 0, e))?;
        let mut image = ImageWriter::new(&file, size);
        let written = file.set_len(size).map_err(Fault::Write).and_then(|()| image.copy(source, cancel));
        // Complete: from here on nobody writes it, and the mode says so.
        let written = written.and_then(|()| rustix::fs::fchmod(&file, Mode::RUSR).map_err(|e| Fault::Write(e.into())));
        match written {
            Ok(()) => {}
            Err(Fault::Cancelled) => return Err(CreateError::Cancelled),
            Err(Fault::Source { offset, source }) => return Err(CreateError::Source { offset, source }),
            Err(Fault::Write(e)) => {
                let needed = image.data_bytes + data_bytes(source, image.position(), cancel);
                return Err(self.write_error(file::MEMORY, needed, e));
            }
        }
        let ImageWriter { digests, data_bytes, .. } = image;
        let root = blake3::hash(&digests);
        Ok(MemoryDigest { regions, size_bytes: size, data_bytes, digests, root, file })
    }

    /// Writes everything else and gives the snapshot its name. Once this returns it survives a power cut.
    pub fn commit(mut self, memory: MemoryDigest, facts: Facts, state: &MachineState) -> Result<Manifest, CreateError> {
        let state_bytes = state::encode(state)?;
        let manifest = describe(&memory, facts, state.vcpus.len(), &state_bytes);
        manifest.check()?;

        memory.file.sync_all().map_err(|e| self.write_error(file::MEMORY, memory.data_bytes, e))?;
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
        for (name, contents) in [
            (file::DIGESTS, memory.digests.as_slice()),
            (file::STATE, &state_bytes),
            (file::MANIFEST, &manifest.to_json()),
        ] {
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
        self.publish()?;
        Ok(manifest)
    }

    /// Renames the directory to the target and makes that durable.
    fn publish(&mut self) -> Result<(), CreateError> {
        let target = self.parent.path().join(OsStr::from_bytes(&self.target));
        let (from, to) = (self.name.as_slice(), self.target.as_slice());
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

    fn write_error(&self, name: &str, needed_bytes: u64, source: io::Error) -> CreateError {
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

/// What the manifest says of all this.
fn describe(memory: &MemoryDigest, facts: Facts, vcpus: usize, state: &[u8]) -> Manifest {
    let Facts { vmm_version, host: HostFacts { arch, cpu, kernel }, devices, readiness, config } = facts;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut manifest = Manifest {
        format_version: 0,
        vmm_version,
        created_unix_ms: now.as_millis() as u64,
        arch,
        cpu,
        host_kernel: kernel,
        machine: Machine { vcpus: vcpus as u32, memory_bytes: memory.size_bytes },
        memory: Memory {
            file: file::MEMORY.into(),
            size_bytes: memory.size_bytes,
            regions: memory.regions.clone(),
            chunk_bytes: CHUNK_BYTES,
            digests: file::DIGESTS.into(),
            root: memory.root(),
            packed: None,
            parent: None,
            map: None,
        },
        state: StateFile {
            file: file::STATE.into(),
            size_bytes: state.len() as u64,
            digest: blake3::hash(state).to_hex().to_string(),
        },
        devices,
        readiness,
        config,
        digest: String::new(),
    };
    manifest.format_version = manifest.lowest_version();
    manifest.seal();
    manifest
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
            Err(e) => return Err(failed(e)),
        };
        match rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::BADF) => {}
            Err(Errno::WOULDBLOCK) => continue,
            Err(e) => return Err(failed(e.into())),
        }
        if rustix::fs::statat(parent, &name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).is_ok() {
            return Ok((name, dir));
        }
    }
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
        // A living writer holds the lock. Where there are no locks nothing is removed.
        if rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive).is_ok() {
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

/// How many runs of data are looked for to say how much space they take.
const COUNTED_RUNS: usize = 1000;

/// How much of a source, from `at` on, may be data, in bytes: what comes after many runs counts as such, since a guest may be
/// standing still meanwhile.
fn data_bytes(source: &mut dyn MemorySource, mut at: u64, cancel: &dyn Cancel) -> u64 {
    let (size, mut sum) = (source.size(), 0);
    for _ in 0..COUNTED_RUNS {
        match source.next_data(at) {
            Ok(Some(range)) if range.end > at && !cancel.is_cancelled() => {
                sum += range.end - range.start.max(at);
                at = range.end;
            }
            _ => return sum,
        }
    }
    sum + size.saturating_sub(at)
}

/// Why copying memory stopped.
enum Fault {
    Cancelled,
    Source { offset: u64, source: io::Error },
    Write(io::Error),
}

/// Writes an image and digests it on the way.
struct ImageWriter<'f> {
    file: &'f File,
    size: u64,
    /// Digests of the chunks so far, 32 bytes each.
    digests: Vec<u8>,
    data_bytes: u64,
}

impl<'f> ImageWriter<'f> {
    fn new(file: &'f File, size: u64) -> ImageWriter<'f> {
        let digests = Vec::with_capacity(size.div_ceil(CHUNK_BYTES) as usize * 32);
        ImageWriter { file, size, digests, data_bytes: 0 }
    }

    /// How far it has come, in bytes: what follows may have been written in part.
    fn position(&self) -> u64 {
        self.digests.len() as u64 / 32 * CHUNK_BYTES
    }

    fn copy(&mut self, source: &mut dyn MemorySource, cancel: &dyn Cancel) -> Result<(), Fault> {
        let zero = ZeroDigests::new(self.size);
        let mut buf = vec![0; CHUNK_BYTES as usize];
        let chunks = self.size.div_ceil(CHUNK_BYTES);
        let mut index = 0;
        while index < chunks {
            let at = index * CHUNK_BYTES;
            let data = source.next_data(at).map_err(|source| Fault::Source { offset: at, source })?;
            let (from, to) = match data {
                Some(range) if range.end > at && range.start < self.size => {
                    (range.start.max(at) / CHUNK_BYTES, range.end.min(self.size).div_ceil(CHUNK_BYTES))
                }
                Some(_) => {
                    let source = io::Error::new(io::ErrorKind::InvalidData, "its next data lies outside it");
                    return Err(Fault::Source { offset: at, source });
                }
                None => (chunks, chunks),
            };
            for hole in index..from {
                self.digests.extend_from_slice(zero.of(hole));
            }
            for chunk in from..to {
                if cancel.is_cancelled() {
                    return Err(Fault::Cancelled);
                }
                let offset = chunk * CHUNK_BYTES;
                let buf = &mut buf[..(self.size - offset).min(CHUNK_BYTES) as usize];
                source.read(offset, buf).map_err(|source| Fault::Source { offset, source })?;
                if is_zero(buf) {
                    self.digests.extend_from_slice(zero.of(chunk));
                } else {
                    self.write_pages(offset, buf).map_err(Fault::Write)?;
                    self.digests.extend_from_slice(blake3::hash(buf).as_bytes());
                }
            }
            index = to;
        }
        Ok(())
    }

    /// Writes the runs of pages that are not zero.
    fn write_pages(&mut self, offset: u64, chunk: &[u8]) -> io::Result<()> {
        let page_end = |at: usize| (at + PAGE_BYTES as usize).min(chunk.len());
        let mut at = 0;
        while at < chunk.len() {
            let mut end = at;
            while end < chunk.len() && !is_zero(&chunk[end..page_end(end)]) {
                end = page_end(end);
            }
            if end > at {
                self.file.write_all_at(&chunk[at..end], offset + at as u64)?;
                self.data_bytes += (end - at) as u64;
            }
            // The page at `end`, if any, is zero.
            at = page_end(end);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// Every other page is data; counts how often it is asked.
    struct Alternating(usize);

    const SIZE: u64 = 1 << 40;

    impl MemorySource for Alternating {
        fn size(&self) -> u64 {
            SIZE
        }

        fn regions(&self) -> Vec<MemoryRegion> {
            Vec::new()
        }

        fn next_data(&mut self, from: u64) -> io::Result<Option<std::ops::Range<u64>>> {
            self.0 += 1;
            let page = (from / PAGE_BYTES).next_multiple_of(2) * PAGE_BYTES;
            Ok((page < SIZE).then_some(page..page + PAGE_BYTES))
        }

        fn read(&mut self, _offset: u64, _buf: &mut [u8]) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_a_memory_takes_is_said_without_a_walk_over_all_of_it() {
        let cancel = AtomicBool::new(false);
        let end = SIZE - 8 * PAGE_BYTES;
        assert_eq!(data_bytes(&mut Alternating(0), end, &cancel), 4 * PAGE_BYTES);
        let mut source = Alternating(0);
        let most = data_bytes(&mut source, 0, &cancel);
        assert!((SIZE / 2..=SIZE).contains(&most) && source.0 <= COUNTED_RUNS, "{most} after {}", source.0);
        cancel.store(true, Ordering::Relaxed);
        let mut source = Alternating(0);
        data_bytes(&mut source, 0, &cancel);
        assert_eq!(source.0, 1);
    }
}
