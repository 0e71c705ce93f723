//! Puts a kernel, its command line and its initial RAM disk into guest memory.

use crate::arch::boot::{Initrd, write_start_info, write_zero_page};
use crate::arch::regs::Entry;
use crate::arch::{COMMAND_LINE, COMMAND_LINE_MAX, HIGH_MEMORY, regs};
use crate::memory::{GuestRam, PAGE_SIZE};
use crate::vcpu::ring0_is_emulated;
use linux_loader::cmdline::Cmdline;
use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{self, BzImage, Elf, KernelLoader, KernelLoaderResult, load_cmdline};
use std::fs::File;
use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, ReadVolatile};

/// The guest that this program carries.
pub const EMBEDDED_GUEST: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/embedded-guest.elf"));

/// Why a kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file cannot be read.
    #[error("cannot read {what} {path}: {source}")]
    Read {
        /// Kernel or initial RAM disk.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Not a kernel.
    #[error(
        "{path} is no kernel that can be booted here: it is neither an x86-64 ELF executable ({elf}) nor a bzImage ({bzimage})"
    )]
    NoKernel {
        /// The file.
        path: PathBuf,
        /// Why it is no ELF.
        elf: loader::Error,
        /// Why it is no bzImage.
        bzimage: loader::Error,
    },
    /// A kernel with no entry that we know.
    #[error("{0} has no 64-bit entry point; build it for x86-64 with protocol 2.12 or newer")]
    NoEntry(PathBuf),
    /// An ELF file of another kind.
    #[error("{path} is no kernel that can be booted here: {problem}; build it as an x86-64 executable")]
    OtherElf {
        /// The file.
        path: PathBuf,
        /// What it is.
        problem: &'static str,
    },
    /// A bzImage that is not whole.
    #[error(
        "{path} was cut short: its header speaks of {expected} bytes of code, and {found} are there; copy it again"
    )]
    CutShort {
        /// The file.
        path: PathBuf,
        /// Bytes that its header speaks of.
        expected: u64,
        /// Bytes behind its header.
        found: u64,
    },
    /// A kernel that unpacks itself to more than there is.
    #[error(
        "{path} takes {needed} MiB of memory to begin with, and the guest has {mib}: give it more (`mem_size_mib`)"
    )]
    NeedsMore {
        /// The file.
        path: PathBuf,
        /// Memory that it reaches to, in MiB.
        needed: u64,
        /// Guest memory, in MiB.
        mib: u64,
    },
    /// A Linux kernel on a host that cannot run it.
    #[error(
        "{0} cannot run here: this host's KVM has no hardware virtualization and emulates the guest kernel's instructions, of which it lacks some that every stock kernel uses: use a host with AMD-V or VT-x, or the embedded guest (`vmm doctor` says more)"
    )]
    Ring0Emulated(PathBuf),
    /// An initial RAM disk without contents.
    #[error("{0} is empty, which is no initial RAM disk; name another file, or leave `initrd_path` out")]
    EmptyInitrd(PathBuf),
    /// The kernel does not fit.
    #[error(
        "{path} does not fit into {mib} MiB of guest memory, or was cut short: give the guest more (`mem_size_mib`), or copy the file again"
    )]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Guest memory, in MiB.
        mib: u64,
    },
    /// The command line is too long or has characters that it may not have.
    #[error("the kernel command line is not usable: {0}; it may have {COMMAND_LINE_MAX} bytes of printable ASCII")]
    CommandLine(linux_loader::cmdline::Error),
    /// The command line is too long.
    #[error(
        "boot_args and the words that the vmm appends have {0} bytes together, and must have fewer than {COMMAND_LINE_MAX}"
    )]
    LongCommandLine(usize),
    /// Something does not fit into guest memory.
    #[error("cannot write boot data into guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
    /// The loader refused.
    #[error("cannot write boot data into guest memory: {0}")]
    Write(loader::Error),
    /// The zero page does not fit.
    #[error("cannot write boot parameters into guest memory: {0}")]
    ZeroPage(#[from] linux_loader::configurator::Error),
}

/// What to boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// The guest that this program carries.
    Embedded,
    /// A file.
    File(PathBuf),
}

/// Loads a kernel and all that it needs, and returns where it is entered: by PVH where an ELF file offers that, else by
/// the 64-bit Linux protocol. The embedded guest, which knows both, is entered by the latter.
pub fn load(ram: &GuestRam, kernel: &Kernel, command_line: &str, initrd: Option<&Path>) -> Result<Entry, LoadError> {
    let (loaded, entry) = match kernel {
        Kernel::Embedded => load_kernel(ram, Path::new("the embedded guest"), &mut Cursor::new(EMBEDDED_GUEST))?,
        Kernel::File(path) => {
            let read = |source| LoadError::Read { what: "kernel", path: path.clone(), source };
            let mut file = open_regular(path).map_err(read)?;
            load_kernel(ram, path, &mut file)?
        }
    };
    let kernel_end = loaded.setup_header.map_or(loaded.kernel_end, |header| unpacked_end(&loaded, &header));
    if let Kernel::File(path) = kernel {
        // Below the hole for devices, where all kernels begin.
        if kernel_end > low_memory(ram) {
            let (path, needed) = (path.clone(), kernel_end.div_ceil(1 << 20));
            return Err(LoadError::NeedsMore { path, needed, mib: ram.size() >> 20 });
        }
        // It would unpack itself for minutes, without a word, and then end at the first such instruction.
        if loaded.setup_header.is_some() && ring0_is_emulated() {
            return Err(LoadError::Ring0Emulated(path.clone()));
        }
    }
    let initrd = initrd.map(|path| load_initrd(ram, path, kernel_end)).transpose()?;
    if !command_line.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
        return Err(LoadError::CommandLine(linux_loader::cmdline::Error::InvalidAscii));
    }
    if command_line.len() >= COMMAND_LINE_MAX {
        return Err(LoadError::LongCommandLine(command_line.len()));
    }
    let line = Cmdline::try_from(command_line, COMMAND_LINE_MAX).map_err(LoadError::CommandLine)?;
    load_cmdline(ram.memory(), GuestAddress(COMMAND_LINE), &line).map_err(LoadError::Write)?;
    regs::write_tables(ram.memory())?;
    match (loaded.pvh_boot_cap, kernel) {
        (PvhBootCapability::PvhEntryPresent(entry), Kernel::File(_)) => {
            write_start_info(ram.memory(), ram.regions(), initrd)?;
            Ok(Entry::Pvh(entry.raw_value()))
        }
        _ => {
            write_zero_page(ram.memory(), ram.regions(), loaded.setup_header, command_line.len() + 1, initrd)?;
            Ok(Entry::Linux64(entry))
        }
    }
}

/// Opens a file that must be a regular one: reading from a FIFO or a terminal could last for ever.
fn open_regular(path: &Path) -> io::Result<File> {
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("not a regular file")) }
}

fn load_kernel(
    ram: &GuestRam,
    path: &Path,
    image: &mut (impl Read + ReadVolatile + Seek),
) -> Result<(KernelLoaderResult, u64), LoadError> {
    let high = Some(GuestAddress(HIGH_MEMORY));
    let rewind = |source| LoadError::Read { what: "kernel", path: path.to_owned(), source };
    let elf = match Elf::load(ram.memory(), None, image, high) {
        Ok(loaded) => {
            let entry = loaded.kernel_load.raw_value();
            let other = |problem| LoadError::OtherElf { path: path.to_owned(), problem };
            check_elf(image).map_err(rewind)?.map_or(Ok(()), |problem| Err(other(problem)))?;
            if entry >= loaded.kernel_end {
                return Err(other("it does not begin where it is loaded"));
            }
            return Ok((loaded, entry));
        }
        Err(e) if is_too_large(&e) => return Err(too_large(ram, path)),
        Err(e) => e,
    };
    image.seek(SeekFrom::Start(0)).map_err(rewind)?;
    match BzImage::load(ram.memory(), None, image, high) {
        Ok(loaded) => {
            // The 64-bit entry lies 0x200 bytes into the loaded kernel, if the header says that there is one.
            const XLF_KERNEL_64: u16 = 1;
            let header = loaded.setup_header.unwrap_or_default();
            if { header.xloadflags } & XLF_KERNEL_64 == 0 {
                return Err(LoadError::NoEntry(path.to_owned()));
            }
            check_whole(path, &header, loaded.kernel_end - loaded.kernel_load.raw_value())?;
            let entry = loaded.kernel_load.raw_value() + 0x200;
            Ok((loaded, entry))
        }
        Err(e) if is_too_large(&e) => Err(too_large(ram, path)),
        Err(bzimage) => Err(LoadError::NoKernel { path: path.to_owned(), elf, bzimage }),
    }
}

/// Whether as much code is there as the header of a bzImage speaks of, in units of 16 bytes.
fn check_whole(path: &Path, header: &setup_header, found: u64) -> Result<(), LoadError> {
    let expected = u64::from(header.syssize) * 16;
    if found.next_multiple_of(16) >= expected {
        return Ok(());
    }
    Err(LoadError::CutShort { path: path.to_owned(), expected, found })
}

/// What keeps an ELF file from being a kernel for this machine, which the loader does not ask.
fn check_elf(image: &mut (impl Read + Seek)) -> io::Result<Option<&'static str>> {
    const CLASS_64: u8 = 2;
    const EXECUTABLE: [u8; 2] = [2, 0];
    const SHARED: [u8; 2] = [3, 0];
    const X86_64: [u8; 2] = [62, 0];
    let mut header = [0; 20];
    image.seek(SeekFrom::Start(0))?;
    image.read_exact(&mut header)?;
    let [.., t0, t1, m0, m1] = header;
    Ok(if header[4] != CLASS_64 {
        Some("it is an ELF file, but not of 64 bits")
    } else if [m0, m1] != X86_64 {
        Some("it is an ELF file for another machine than x86-64")
    } else if [t0, t1] != EXECUTABLE && [t0, t1] != SHARED {
        Some("it is an ELF file, but not an executable one")
    } else {
        None
    })
}

fn is_too_large(error: &loader::Error) -> bool {
    use linux_loader::loader::{bzimage, elf};
    matches!(
        error,
        loader::Error::MemoryOverflow
            | loader::Error::Elf(elf::Error::ReadKernelImage)
            | loader::Error::Bzimage(bzimage::Error::ReadBzImageCompressedKernel)
    )
}

fn too_large(ram: &GuestRam, path: &Path) -> LoadError {
    LoadError::TooLarge { path: path.to_owned(), mib: ram.size() >> 20 }
}

/// Where a bzImage ends once it has unpacked itself: it takes `init_size` bytes from where it prefers to be, or from where
/// it was loaded, aligned (Documentation/arch/x86/boot.rst).
fn unpacked_end(loaded: &KernelLoaderResult, header: &setup_header) -> u64 {
    let (preferred, size, alignment) = (header.pref_address, header.init_size, header.kernel_alignment);
    let start = loaded.kernel_load.raw_value().next_multiple_of(u64::from(alignment).max(1)).max(preferred);
    loaded.kernel_end.max(start.saturating_add(size.into()))
}

/// Size of the RAM that begins at 0, in bytes.
fn low_memory(ram: &GuestRam) -> u64 {
    ram.memory().iter().next().map_or(0, |region| region.len())
}

/// Puts an initial RAM disk at the top of low memory, page-aligned.
fn load_initrd(ram: &GuestRam, path: &Path, kernel_end: u64) -> Result<Initrd, LoadError> {
    let read = |source| LoadError::Read { what: "initial RAM disk", path: path.to_owned(), source };
    let mut file = open_regular(path).map_err(read)?;
    let size = file.metadata().map_err(read)?.len();
    if size == 0 {
        return Err(LoadError::EmptyInitrd(path.to_owned()));
    }
    let addr = low_memory(ram).checked_sub(size).map(|addr| addr & !(PAGE_SIZE - 1)).filter(|addr| *addr >= kernel_end);
    let addr = addr.ok_or_else(|| too_large(ram, path))?;
    vm_memory::Bytes::read_exact_volatile_from(ram.memory(), GuestAddress(addr), &mut file, size as usize)?;
    Ok(Initrd { addr, size })
}
