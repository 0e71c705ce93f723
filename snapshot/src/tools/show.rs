//! What a snapshot is, at a glance. Of its memory nothing is read but where it lies.

use super::children::{ChildrenError, children};
use crate::image::{self, ImageError, MemoryImage};
use crate::load::{self, Level, LoadError, Snapshot};
use crate::manifest::{Cpu, DriveDevice, Readiness};
use crate::working_set::WorkingSet;
use serde::Serialize;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// What a snapshot is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Its directory.
    pub path: PathBuf,
    /// Version of the format.
    pub format_version: u32,
    /// Digest of the manifest, in hex.
    pub digest: String,
    /// Version of the vmm that saved the machine.
    pub vmm_version: String,
    /// When that was, in milliseconds since the Unix epoch.
    pub created_unix_ms: u64,
    /// What the agent in the guest had announced.
    pub readiness: Option<Readiness>,
    /// Digest of the configuration that the machine was started with, in hex, if that is known.
    pub config: Option<String>,
    /// The architecture.
    pub arch: String,
    /// CPU of the host that saved it.
    pub cpu: Cpu,
    /// Kernel of that host.
    pub host_kernel: String,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// The memory.
    pub memory: MemorySummary,
    /// The disks.
    pub disks: Vec<DiskSummary>,
    /// Names of the network interfaces.
    pub network: Vec<String>,
    /// Whether it has a vsock device.
    pub vsock: bool,
    /// What is known of which pages clones use.
    pub working_set: Option<WorkingSetSummary>,
    /// The directory of the snapshot that it lies over.
    pub parent: Option<PathBuf>,
    /// Snapshots that lie over it.
    pub children: Vec<PathBuf>,
}

/// The memory of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MemorySummary {
    /// Its size, in bytes.
    pub size_bytes: u64,
    /// The root digest, in hex.
    pub root: String,
    /// Number of chunks of 64 KiB.
    pub chunks: u64,
    /// How many of them are all zero.
    pub zero_chunks: u64,
    /// What it is made of: the image of this snapshot, and those of the ones that it lies over, the uppermost first.
    pub levels: Vec<LevelSummary>,
    /// How much of the uppermost image, if it is packed, are chunks that clones were known to use, in bytes.
    pub hot_bytes: u64,
}

/// One image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LevelSummary {
    /// Its file.
    pub path: PathBuf,
    /// `raw`: all of the memory; `changes`: pages that differ from the level below; `packed`: chunks, compressed.
    pub form: &'static str,
    /// Length of the file, in bytes.
    pub file_bytes: u64,
    /// Space that it takes, in bytes: holes take none.
    pub disk_bytes: u64,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DiskSummary {
    /// Its name.
    pub drive_id: String,
    /// Its size, in bytes.
    pub size_bytes: u64,
    /// The guest can only read it.
    pub is_read_only: bool,
    /// The image on the host that it lies on.
    pub image: Option<String>,
    /// How much of it the snapshot holds, in bytes; none if it holds nothing.
    pub held_bytes: Option<u64>,
}

/// Which pages clones use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct WorkingSetSummary {
    /// How many clones that was learnt from.
    pub clones: u64,
    /// Pages that they read.
    pub read_pages: u64,
    /// Pages that they wrote.
    pub written_pages: u64,
}

/// Why a snapshot cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum ShowError {
    /// It cannot be read.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Its memory image does not belong to it.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// It is not known what lies over it.
    #[error(transparent)]
    Children(#[from] ChildrenError),
    /// A file cannot be looked at.
    #[error("cannot look at {path}: {source}")]
    Look {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Says what the snapshot at `path` is.
pub fn show(path: &Path) -> Result<Summary, ShowError> {
    let snapshot = load::open(path)?;
    let manifest = snapshot.manifest();
    Ok(Summary {
        path: snapshot.dir().to_owned(),
        format_version: manifest.format_version,
        digest: manifest.digest.clone(),
        vmm_version: manifest.vmm_version.clone(),
        created_unix_ms: manifest.created_unix_ms,
        readiness: manifest.readiness,
        config: manifest.config.clone(),
        arch: manifest.arch.clone(),
        cpu: manifest.cpu.clone(),
        host_kernel: manifest.host_kernel.clone(),
        vcpus: manifest.machine.vcpus,
        memory: memory(&snapshot)?,
        disks: manifest.devices.drives.iter().map(disk).collect(),
        network: manifest.devices.network.iter().map(|interface| interface.iface_id.clone()).collect(),
        vsock: manifest.devices.vsock.is_some(),
        working_set: WorkingSet::load(&snapshot).ok().flatten().map(|set| WorkingSetSummary {
            clones: set.clones,
            read_pages: set.read().pages(),
            written_pages: set.written().pages(),
        }),
        parent: snapshot.parent_dir(),
        children: children(snapshot.open_dir(), Some(&manifest.digest))?,
    })
}

fn memory(snapshot: &Snapshot) -> Result<MemorySummary, ShowError> {
    let image = MemoryImage::open(snapshot)?;
    Ok(MemorySummary {
        size_bytes: image.size(),
        root: image.root().to_owned(),
        chunks: image.chunks(),
        zero_chunks: (0..image.chunks()).filter(|index| image.chunk_is_zero(*index)).count() as u64,
        levels: image::levels(snapshot)?.into_iter().map(level).collect::<Result<_, _>>()?,
        hot_bytes: image.hot_bytes(),
    })
}

fn level(level: &Level) -> Result<LevelSummary, ShowError> {
    let memory = &level.manifest.memory;
    let form = match (&memory.packed, &memory.parent) {
        (Some(_), _) => "packed",
        (None, Some(_)) => "changes",
        (None, None) => "raw",
    };
    let file: &File = level.file().map_err(ImageError::from)?;
    let metadata = file.metadata().map_err(|source| ShowError::Look { path: level.path(), source })?;
    Ok(LevelSummary { path: level.path(), form, file_bytes: metadata.len(), disk_bytes: metadata.blocks() * 512 })
}

fn disk(drive: &DriveDevice) -> DiskSummary {
    DiskSummary {
        drive_id: drive.drive_id.clone(),
        size_bytes: drive.size_bytes,
        is_read_only: drive.is_read_only,
        image: drive.image.as_ref().map(|image| image.path.clone()),
        held_bytes: drive.held.as_ref().map(|held| held.data_bytes),
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kib = |bytes: u64| bytes.div_ceil(1024);
        writeln!(f, "{}", self.path.display())?;
        writeln!(f, "  format   {}, written by vmm {}", self.format_version, self.vmm_version)?;
        writeln!(f, "  created  {} (seconds since 1970)", self.created_unix_ms / 1000)?;
        let plural = if self.vcpus == 1 { "" } else { "s" };
        writeln!(f, "  machine  {} vCPU{plural}, {} MiB, {}", self.vcpus, self.memory.size_bytes >> 20, self.arch)?;
        writeln!(f, "  host     {} ({}), Linux {}", self.cpu.brand, self.cpu.vendor, self.host_kernel)?;
        writeln!(f, "  memory   {} of {} chunks are zero", self.memory.zero_chunks, self.memory.chunks)?;
        for LevelSummary { path, form, file_bytes, disk_bytes } in &self.memory.levels {
            let path = path.display();
            writeln!(f, "           {form}: {path}, {} KiB long, {} KiB on disk", kib(*file_bytes), kib(*disk_bytes))?;
        }
        if self.memory.hot_bytes > 0 {
            writeln!(f, "           {} KiB of that are what clones are known to use", kib(self.memory.hot_bytes))?;
        }
        for DiskSummary { drive_id, size_bytes, is_read_only, image, held_bytes } in &self.disks {
            let mode = if *is_read_only { "read only, " } else { "" };
            let held = held_bytes.map_or("nothing".to_owned(), |bytes| format!("{} KiB", kib(bytes)));
            let image = image.as_ref().map_or(String::new(), |image| format!(", over {image:?}"));
            writeln!(f, "  disk     {drive_id}: {mode}{} KiB, {held} held{image}", kib(*size_bytes))?;
        }
        if let Some(WorkingSetSummary { clones, read_pages, written_pages }) = &self.working_set {
            writeln!(f, "  clones   {clones} were seen to read {read_pages} pages and to write {written_pages}")?;
        }
        for child in &self.children {
            writeln!(f, "  child    {child:?}")?;
        }
        writeln!(f, "  root     {}", self.memory.root)?;
        writeln!(f, "  digest   {}", self.digest)
    }
}
