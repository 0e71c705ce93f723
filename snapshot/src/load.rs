//! Reading a snapshot: everything but the memory is read and checked here, in an order that gives each fault its name.

use crate::digests::Digests;
use crate::dir::{Dir, FileError};
use crate::manifest::{self, BadField, Manifest};
use crate::state::{self, MachineState, StateError};
use crate::{FORMAT_VERSION, OLDEST_FORMAT_VERSION, file};
use serde::Deserialize;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

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
    #[error("cannot open {path}: {source}")]
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
}

/// A snapshot whose manifest and state were read and found right. Its memory, if it is there, has the right size; for its contents
/// see [`crate::image`].
#[derive(Debug)]
pub struct Snapshot {
    dir: Dir,
    manifest: Manifest,
    state: MachineState,
    memory: Option<File>,
}

impl Snapshot {
    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
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
        self.dir.path()
    }

    pub(crate) fn open_dir(&self) -> &Dir {
        &self.dir
    }

    /// The memory image, as it was opened when the snapshot was, unless it lies elsewhere.
    pub(crate) fn memory_file(&self) -> Result<&File, FileError> {
        let missing = || FileError::Missing { path: self.dir.join(&self.manifest.memory.file) };
        self.memory.as_ref().ok_or_else(missing)
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
    snapshot.memory_file()?;
    let memory = &snapshot.manifest.memory;
    snapshot.dir.open_sized(&memory.digests, Digests::table_bytes(memory))?;
    Ok(snapshot)
}

/// As [`open`], of a snapshot whose memory and its digests may lie elsewhere: somebody else has them. What is there must have the
/// right size.
pub fn open_without_memory(path: &Path) -> Result<Snapshot, LoadError> {
    let dir = open_dir(path)?;
    let manifest = read_manifest(&dir)?;
    let state = read_state(&dir, &manifest)?;
    let there = |name: &str, size: u64| match dir.open_sized(name, size) {
        Ok(file) => Ok(Some(file)),
        Err(FileError::Missing { .. }) => Ok(None),
        Err(e) => Err(e),
    };
    let memory = there(&manifest.memory.file, manifest.memory.size_bytes)?;
    there(&manifest.memory.digests, Digests::table_bytes(&manifest.memory))?;
    for (drive, held) in manifest.devices.drives.iter().filter_map(|drive| Some((drive, drive.held.as_ref()?))) {
        dir.open_sized(&held.file, drive.size_bytes)?;
        dir.open_sized(&held.map, held.map_bytes)?;
    }
    Ok(Snapshot { dir, manifest, state, memory })
}

fn open_dir(path: &Path) -> Result<Dir, LoadError> {
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

fn read_manifest(dir: &Dir) -> Result<Manifest, LoadError> {
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

fn read_state(dir: &Dir, manifest: &Manifest) -> Result<MachineState, LoadError> {
    let path = || dir.join(&manifest.state.file);
    let bytes = dir.read_sized(&manifest.state.file, manifest.state.size_bytes)?;
    if blake3::hash(&bytes).to_hex().as_str() != manifest.state.digest {
        return Err(LoadError::StateDigest { path: path() });
    }
    let state = state::decode(&bytes).map_err(|source| LoadError::State { path: path(), source })?;
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
