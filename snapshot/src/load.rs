//! Reading a snapshot: everything but the memory is read and checked here, in an order that gives each fault its name.

use crate::create::{Facts, describe};
use crate::digests::Digests;
use crate::dir::{Dir, FileError, Lock, told};
use crate::manifest::{self, BadField, Manifest, Memory, MemoryRegion, StateFile};
use crate::state::{self, MachineState, StateError};
use crate::{CHUNK_BYTES, FORMAT_VERSION, OLDEST_FORMAT_VERSION, file};
use serde::Deserialize;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// Why a snapshot is refused.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Nothing is there, or something else.
    #[error("{path} is neither a snapshot directory nor the snap.json in one; check the path")]
    NotASnapshot {
        /// The path that was given.
        path: PathBuf,
    },
    /// The directory cannot be opened.
    #[error("cannot open {path}: {}", told(.source))]
    Open {
        /// The path that was given.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file is absent, is no regular file, has the wrong length or cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// A format that this program does not read.
    #[error(
        "{path} has format version {found} and this program reads versions {OLDEST_FORMAT_VERSION} to {FORMAT_VERSION}; use the program that wrote it, or create the snapshot anew"
    )]
    UnsupportedVersion {
        /// The manifest.
        path: PathBuf,
        /// Its version.
        found: u64,
    },
    /// The manifest is no JSON document of this version.
    #[error(
        "{path} is not a manifest of a format version from {OLDEST_FORMAT_VERSION} to {FORMAT_VERSION}: {source}; copy it again or create the snapshot anew"
    )]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// A value of the manifest was changed.
    #[error("{path} was changed after it was written: its digest does not match; copy it again")]
    ManifestDigest {
        /// The manifest.
        path: PathBuf,
    },
    /// A value of the manifest is none that a snapshot can have.
    #[error("{path}: {source}; the snapshot was not written by this program")]
    Field {
        /// The manifest.
        path: PathBuf,
        /// Which value, and what is wrong with it.
        source: BadField,
    },
    /// The state file is not the one that the manifest describes.
    #[error("{path} is damaged or belongs to another snapshot: its digest does not match; copy it again")]
    StateDigest {
        /// The state file.
        path: PathBuf,
    },
    /// The state file cannot be decoded.
    #[error("{path} cannot be used: {source}; use the program that wrote it, or create the snapshot anew")]
    State {
        /// The state file.
        path: PathBuf,
        /// What is wrong.
        source: StateError,
    },
    /// The state file is of a machine with another number of vCPUs.
    #[error("{path} holds {found} vCPUs and the manifest says {expected}; the files belong to two snapshots")]
    VcpuCount {
        /// The state file.
        path: PathBuf,
        /// vCPUs in the state file.
        found: usize,
        /// vCPUs in the manifest.
        expected: u32,
    },
    /// The state file is of a machine with another CPU.
    #[error("{path} is of another CPU than the manifest tells: guest_cpu.{what}; the files belong to two snapshots")]
    GuestCpu {
        /// The state file.
        path: PathBuf,
        /// What the manifest claims, and what the state says.
        what: String,
    },
    /// The state file is of a machine with other disks.
    #[error("{path} is of other disks than the manifest lists; the files belong to two snapshots")]
    Drives {
        /// The state file.
        path: PathBuf,
    },
    /// The snapshot whose memory is below cannot be used.
    #[error("{path} lies over another snapshot, its parent: {source}")]
    Parent {
        /// The manifest of the child.
        path: PathBuf,
        /// What is wrong with the parent.
        source: Box<LoadError>,
    },
    /// What is in the parent's place is another snapshot.
    #[error(
        "{path} is not the snapshot that {child} lies over; put that one there, or use a snapshot that stands alone"
    )]
    OtherParent {
        /// The directory where the parent should be.
        path: PathBuf,
        /// The manifest of the child.
        child: PathBuf,
    },
    /// Somebody removes it.
    #[error("{path} is being removed, so it can be used no more")]
    Removed {
        /// Its directory.
        path: PathBuf,
    },
    /// Too many snapshots lie over each other.
    #[error(
        "more than {MAX_LEVELS} snapshots lie over each other at {path}; flatten one of them (vmm snapshot flatten)"
    )]
    TooDeep {
        /// The manifest of the snapshot that has too many below it.
        path: PathBuf,
    },
}

/// Most snapshots that may lie over each other, the lowest included.
pub const MAX_LEVELS: usize = 64;

/// The part of a snapshot that its memory is made of: what [`Snapshot`] has, and what its parents are looked at for.
#[derive(Debug)]
pub(crate) struct Level {
    pub(crate) dir: Dir,
    pub(crate) manifest: Manifest,
    /// The memory image, as it was opened when the snapshot was, unless it lies elsewhere.
    memory: Option<File>,
}

impl Level {
    /// The memory image.
    pub(crate) fn file(&self) -> Result<&File, FileError> {
        self.memory.as_ref().ok_or_else(|| FileError::Missing { path: self.path() })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> PathBuf {
        self.dir.join(&self.manifest.memory.file)
    }

    fn open(dir: Dir) -> Result<Level, LoadError> {
        let manifest = read_manifest(&dir)?;
        let memory = &manifest.memory;
        let file_bytes = memory.packed.as_ref().map_or(memory.size_bytes, |packed| packed.file_bytes);
        let there = |name: &str, size: u64| match dir.open_sized(name, size) {
            Ok(file) => Ok(Some(file)),
            Err(FileError::Missing { .. }) => Ok(None),
            Err(e) => Err(e),
        };
        let file = there(&memory.file, file_bytes)?;
        there(&memory.digests, Digests::table_bytes(memory))?;
        if let Some(map) = &memory.map {
            there(&map.file, map.bytes)?;
        }
        Ok(Level { dir, memory: file, manifest })
    }

    /// The snapshot below, if there is one.
    fn parent(&self) -> Result<Option<Level>, LoadError> {
        let Some(parent) = &self.manifest.memory.parent else { return Ok(None) };
        let child = || self.dir.join(file::MANIFEST);
        let path = self.dir.path().join(&parent.path);
        // Else each level would add to the path.
        let path = path.canonicalize().unwrap_or(path);
        let level = open_dir(&path).and_then(Level::open);
        let level = level.map_err(|source| LoadError::Parent { path: child(), source: Box::new(source) })?;
        let (Manifest { digest, memory, .. }, own) = (&level.manifest, &self.manifest.memory);
        if (digest, &memory.root) != (&parent.digest, &parent.root) || memory.size_bytes != own.size_bytes {
            return Err(LoadError::OtherParent { path, child: child() });
        }
        let missing = |source| LoadError::Parent { path: child(), source: Box::new(LoadError::File(source)) };
        level.file().map_err(missing)?;
        Ok(Some(level))
    }
}

/// A snapshot whose manifest and state were read and found right. Its memory, if it is there, has the right size; for its contents
/// see [`crate::image`].
#[derive(Debug)]
pub struct Snapshot {
    level: Level,
    state: MachineState,
    below: OnceLock<Vec<Level>>,
}

impl Snapshot {
    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.level.manifest
    }

    /// The saved state.
    pub fn state(&self) -> &MachineState {
        &self.state
    }

    /// The saved state, to keep.
    pub fn into_state(self) -> MachineState {
        self.state
    }

    /// The directory of the snapshot.
    pub fn dir(&self) -> &Path {
        self.level.dir.path()
    }

    /// The contents of the state file.
    pub(crate) fn state_bytes(&self) -> Result<Vec<u8>, LoadError> {
        read_state_bytes(&self.level.dir, &self.level.manifest)
    }

    /// The directory that the manifest says this one lies over, whatever is there.
    pub(crate) fn parent_dir(&self) -> Option<PathBuf> {
        self.level.manifest.memory.parent.as_ref().map(|parent| self.dir().join(&parent.path))
    }

    pub(crate) fn open_dir(&self) -> &Dir {
        &self.level.dir
    }

    pub(crate) fn level(&self) -> &Level {
        &self.level
    }

    /// The snapshots whose memory is seen where this one's holds nothing, the uppermost first. They are opened when they are asked
    /// for first, and then kept.
    pub(crate) fn below(&self) -> Result<&[Level], LoadError> {
        if let Some(below) = self.below.get() {
            return Ok(below);
        }
        let mut below = Vec::new();
        while let Some(level) = below.last().unwrap_or(&self.level).parent()? {
            below.push(level);
            if below.len() >= MAX_LEVELS {
                return Err(LoadError::TooDeep { path: self.level.dir.join(file::MANIFEST) });
            }
        }
        Ok(self.below.get_or_init(|| below))
    }
}

/// While this is there, nobody who asks removes the snapshot, nor one that it lies over.
#[derive(Debug)]
pub struct Lease {
    _dirs: Vec<Dir>,
}

impl Snapshot {
    /// Says that the snapshot is in use, to whoever would remove it (`vmm snapshot rm`).
    pub fn lease(&self) -> Result<Lease, LoadError> {
        let levels = std::iter::once(&self.level).chain(self.below()?);
        Ok(Lease { _dirs: levels.map(|level| lease(&level.dir)).collect::<Result<_, _>>()? })
    }

    /// As [`Snapshot::lease`], of a snapshot whose memory comes from elsewhere: those that it lies over may not be here.
    pub fn lease_alone(&self) -> Result<Lease, LoadError> {
        Ok(Lease { _dirs: vec![lease(&self.level.dir)?] })
    }
}

/// A shared lock on the directory, as long as the result is there.
fn lease(dir: &Dir) -> Result<Dir, LoadError> {
    let failed = |source| LoadError::Open { path: dir.path().to_owned(), source };
    let held = Dir::open(dir.path()).map_err(failed)?;
    match held.lock(Lock::Shared).map_err(|e| failed(e.into()))? {
        true => Ok(held),
        false => Err(LoadError::Removed { path: dir.path().to_owned() }),
    }
}

/// The one field of a manifest that means the same in every version.
#[derive(Deserialize)]
struct AnyVersion {
    format_version: u64,
}

/// Opens the snapshot at `path`, which is its directory or the `snap.json` in it.
pub fn open(path: &Path) -> Result<Snapshot, LoadError> {
    let snapshot = open_without_memory(path)?;
    let Level { dir, manifest: Manifest { memory, .. }, .. } = &snapshot.level;
    snapshot.level.file()?;
    dir.open_sized(&memory.digests, Digests::table_bytes(memory))?;
    if let Some(map) = &memory.map {
        dir.open_sized(&map.file, map.bytes)?;
    }
    snapshot.below()?;
    Ok(snapshot)
}

/// As [`open`], of a snapshot whose memory and its digests may lie elsewhere: somebody else has them. What is there must have the
/// right size.
pub fn open_without_memory(path: &Path) -> Result<Snapshot, LoadError> {
    let level = Level::open(open_dir(path)?)?;
    let state = read_state(&level.dir, &level.manifest)?;
    let Level { dir, manifest, .. } = &level;
    for (drive, held) in manifest.devices.drives.iter().filter_map(|drive| Some((drive, drive.held.as_ref()?))) {
        dir.open_sized(&held.file, drive.size_bytes)?;
        dir.open_sized(&held.map, held.map_bytes)?;
    }
    Ok(Snapshot { level, state, below: OnceLock::new() })
}

pub(crate) fn open_dir(path: &Path) -> Result<Dir, LoadError> {
    let not_a_snapshot = || LoadError::NotASnapshot { path: path.to_owned() };
    let opened = match Dir::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotADirectory => {
            if path.file_name() != Some(OsStr::new(file::MANIFEST)) {
                return Err(not_a_snapshot());
            }
            match path.parent() {
                Some(parent) if !parent.as_os_str().is_empty() => Dir::open(parent),
                _ => Dir::open(Path::new(".")),
            }
        }
        other => other,
    };
    opened.map_err(|source| match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => not_a_snapshot(),
        _ => LoadError::Open { path: path.to_owned(), source },
    })
}

/// Describes a machine as a snapshot of it would, and reads that as [`open_without_memory`] does, but for the files: a process that does
/// this ahead has the code and the heap at hand when a snapshot comes.
pub fn rehearse(
    facts: Facts,
    regions: Vec<MemoryRegion>,
    machine: &MachineState,
) -> Result<(Manifest, MachineState), LoadError> {
    let path = || PathBuf::from("a rehearsal");
    let bytes = state::encode(machine).map_err(|source| LoadError::State { path: path(), source })?;
    let memory = Memory {
        file: file::MEMORY.into(),
        size_bytes: regions.iter().map(|region| region.size_bytes).sum(),
        regions,
        chunk_bytes: CHUNK_BYTES,
        digests: file::DIGESTS.into(),
        root: blake3::hash(&[]).to_hex().to_string(),
        packed: None,
        parent: None,
        map: None,
    };
    let mut described = describe(memory, facts, machine, &bytes);
    described.format_version = described.lowest_version();
    described.seal();
    let manifest = check_manifest(&path(), &described.to_json())?;
    let state = decode_state(path, &manifest, &bytes)?;
    Ok((manifest, state))
}

pub(crate) fn read_manifest(dir: &Dir) -> Result<Manifest, LoadError> {
    check_manifest(&dir.join(file::MANIFEST), &dir.read(file::MANIFEST, manifest::MAX_BYTES)?)
}

/// Decodes and checks the contents of a `snap.json`, wherever they come from. `path` names it in messages.
pub fn check_manifest(path: &Path, json: &[u8]) -> Result<Manifest, LoadError> {
    let path = || path.to_owned();
    // The version comes first: a manifest of another version may hold anything else.
    let malformed = |source| LoadError::Manifest { path: path(), source };
    let AnyVersion { format_version: found } = serde_json::from_slice(json).map_err(malformed)?;
    if !(u64::from(OLDEST_FORMAT_VERSION)..=u64::from(FORMAT_VERSION)).contains(&found) {
        return Err(LoadError::UnsupportedVersion { path: path(), found });
    }
    let manifest: Manifest = serde_json::from_slice(json).map_err(malformed)?;
    if manifest.digest != manifest.expected_digest() {
        return Err(LoadError::ManifestDigest { path: path() });
    }
    manifest.check().map_err(|source| LoadError::Field { path: path(), source })?;
    Ok(manifest)
}

fn read_state_bytes(dir: &Dir, manifest: &Manifest) -> Result<Vec<u8>, LoadError> {
    let StateFile { file, size_bytes, digest } = &manifest.state;
    dir.read_digested(file, *size_bytes, digest)?.ok_or_else(|| LoadError::StateDigest { path: dir.join(file) })
}

fn read_state(dir: &Dir, manifest: &Manifest) -> Result<MachineState, LoadError> {
    let bytes = read_state_bytes(dir, manifest)?;
    decode_state(|| dir.join(&manifest.state.file), manifest, &bytes)
}

/// Decodes the contents of a state file, and compares them with the manifest. `path` names it in messages.
fn decode_state(path: impl Fn() -> PathBuf, manifest: &Manifest, bytes: &[u8]) -> Result<MachineState, LoadError> {
    let state = state::decode(bytes).map_err(|source| LoadError::State { path: path(), source })?;
    if state.vcpus.len() as u64 != u64::from(manifest.machine.vcpus) {
        let (found, expected) = (state.vcpus.len(), manifest.machine.vcpus);
        return Err(LoadError::VcpuCount { path: path(), found, expected });
    }
    if let Some(what) = manifest.guest_cpu.as_ref().and_then(|cpu| cpu.contradiction(&state)) {
        return Err(LoadError::GuestCpu { path: path(), what });
    }
    let saved = state.devices.drives.iter().map(|drive| &drive.drive_id);
    if !saved.eq(manifest.devices.drives.iter().map(|drive| &drive.drive_id)) {
        return Err(LoadError::Drives { path: path() });
    }
    Ok(state)
}
