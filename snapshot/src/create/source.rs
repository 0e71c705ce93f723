//! Where the memory of a snapshot, and what it holds of disks, comes from.

use crate::clusters::Clusters;
use crate::manifest::MemoryRegion;
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Guest memory, seen as an image: one run of bytes, some of which are holes that read as zero.
pub trait MemorySource {
    /// Size of the image, in bytes.
    fn size(&self) -> u64;

    /// Where the image belongs in the guest, as [`crate::manifest::Memory::regions`] wants it: ascending, without gaps
    /// in the image.
    fn regions(&self) -> Vec<MemoryRegion>;

    /// The next range of bytes at or after `from` that may hold anything but zeros, or `None` if there is none. It may
    /// begin at `from` itself.
    fn next_data(&mut self, from: u64) -> io::Result<Option<Range<u64>>>;

    /// Reads the bytes at `offset` until `buf` is full. Holes read as zeros.
    fn read(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
}

/// What lies over something else, and does not change: a disk as layers, or the pages that a guest has changed of its memory.
pub trait LayerSource {
    /// Size of all of it, in bytes.
    fn size(&self) -> u64;

    /// Which clusters (pages) are to be written, and which are zero whatever lies below.
    fn clusters(&self) -> &Clusters;

    /// Reads the bytes at `offset`, which are those of clusters that are data, until `buf` is full.
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
}

/// Memory in a file whose holes the kernel knows, such as a memfd.
///
/// The file must not be written meanwhile: seal it, or map it privately everywhere. Its seek position is used.
#[derive(Debug)]
pub struct FileSource<'f> {
    file: &'f File,
    size: u64,
    regions: Vec<MemoryRegion>,
}

impl<'f> FileSource<'f> {
    /// The memory is the whole file.
    pub fn new(file: &'f File, regions: Vec<MemoryRegion>) -> io::Result<FileSource<'f>> {
        Ok(FileSource { file, size: file.metadata()?.len(), regions })
    }
}

impl MemorySource for FileSource<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    fn regions(&self) -> Vec<MemoryRegion> {
        self.regions.clone()
    }

    fn next_data(&mut self, from: u64) -> io::Result<Option<Range<u64>>> {
        next_data(self.file, from, self.size)
    }

    fn read(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }
}

/// The next range of a file at or after `from` that the file system holds data for.
pub(crate) fn next_data(file: &File, from: u64, size: u64) -> io::Result<Option<Range<u64>>> {
    if from >= size {
        return Ok(None);
    }
    let start = match rustix::fs::seek(file, SeekFrom::Data(from)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        // The file system does not know its holes: all is data.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some(from..size)),
        Err(e) => return Err(e.into()),
    };
    let end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
    Ok((start < size).then(|| start..end.min(size)))
}

/// Memory in a slice, for tests and tools.
#[derive(Clone, Debug)]
pub struct BytesSource<'b> {
    bytes: &'b [u8],
    regions: Vec<MemoryRegion>,
}

impl<'b> BytesSource<'b> {
    /// One region of memory from guest-physical address 0.
    pub fn new(bytes: &'b [u8]) -> BytesSource<'b> {
        let region = MemoryRegion { guest_addr: 0, size_bytes: bytes.len() as u64, offset: 0 };
        BytesSource { bytes, regions: vec![region] }
    }
}

impl MemorySource for BytesSource<'_> {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn regions(&self) -> Vec<MemoryRegion> {
        self.regions.clone()
    }

    fn next_data(&mut self, from: u64) -> io::Result<Option<Range<u64>>> {
        Ok((from < self.size()).then(|| from..self.size()))
    }

    fn read(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let at = usize::try_from(offset).ok().and_then(|at| self.bytes.get(at..)?.get(..buf.len()));
        buf.copy_from_slice(at.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}
