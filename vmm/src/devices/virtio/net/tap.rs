//! The tap device: a network interface of the host whose other end is a file.
//!
//! A tap is never made here, only attached to: whoever configures the host's network decides which there are.

// UNSAFETY: nobody wraps the few ioctls of /dev/net/tun; each block hands the kernel one value of the size that the
// request names.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_uint, c_ulong};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::io::Errno;
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use vmm_sys_util::ioctl::{_IOC_WRITE, ioctl_expr, ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

use super::frame::{HEADER_LEN, Offloads};

/// Longest name of a network interface, in bytes.
pub const MAX_NAME: usize = 15;

/// Frames carry Ethernet headers.
const IFF_TAP: u16 = 0x0002;
/// No header of the tap's own in front of a frame.
const IFF_NO_PI: u16 = 0x1000;
/// A `virtio_net_hdr` in front of a frame.
const IFF_VNET_HDR: u16 = 0x4000;

const TUNSETIFF: c_ulong = request(202);
const TUNSETOFFLOAD: c_ulong = request(208);
const TUNSETVNETHDRSZ: c_ulong = request(216);

/// The requests of /dev/net/tun: each says that it reads an int, whatever it does (include/uapi/linux/if_tun.h).
const fn request(number: c_uint) -> c_ulong {
    ioctl_expr(_IOC_WRITE, b'T' as c_uint, number, size_of::<c_int>() as c_uint)
}

/// Why a tap device cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// There is none of that name.
    #[error("there is no tap device {0}; make it first: ip tuntap add {0} mode tap && ip link set {0} up")]
    Missing(String),
    /// Another process has it.
    #[error("the tap device {0} is in use, by another VM perhaps; each interface needs one of its own")]
    Busy(String),
    /// It is another kind of interface.
    #[error("{0} is not a tap device, or one with several queues; ip tuntap add NAME mode tap makes one that will do")]
    Other(String),
    /// This user may not have it.
    #[error("no permission to use the tap device {0}; make it this user's (ip tuntap add {0} mode tap user NAME)")]
    Denied(String),
    /// There are no tap devices.
    #[error("cannot open /dev/net/tun: {0}; it needs the kernel module tun, and access for this user")]
    NoTun(io::Error),
    /// Something else.
    #[error("the tap device {name} cannot be used: {source}")]
    System {
        /// Its name.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// The other end of the guest's cable: a descriptor on which each read and each write is one frame behind its header.
/// It does not block.
pub trait Link: AsFd + Send {
    /// What the guest takes upon itself of what it receives.
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()>;
}

/// A tap device of the host.
#[derive(Debug)]
pub struct Tap(File);

/// `struct ifreq`, as far as it goes here: a name and flags in 40 bytes.
#[repr(C)]
struct Request {
    name: [u8; MAX_NAME + 1],
    flags: u16,
    rest: [u8; 22],
}

impl Tap {
    /// Attaches to the tap device `name`, which must exist. Nothing is left to the guest at first.
    pub fn open(name: &str) -> Result<Self, TapError> {
        let system = |source| TapError::System { name: name.to_owned(), source };
        let index = interface_index(name)?;
        let flags = rustix::fs::OFlags::NONBLOCK.bits() as i32;
        let tun = OpenOptions::new().read(true).write(true).custom_flags(flags).open("/dev/net/tun");
        let tap = Tap(tun.map_err(TapError::NoTun)?);
        tap.attach(name)?;
        // It may have gone in between, and the kernel makes one that is not there. That one goes with this descriptor.
        if interface_index(name)? != index {
            return Err(TapError::Missing(name.to_owned()));
        }
        let len = HEADER_LEN as c_int;
        // SAFETY: the request reads one int, which outlives the call.
        done(unsafe { ioctl_with_ref(&tap.0, TUNSETVNETHDRSZ, &len) }).map_err(system)?;
        // What the last one to have it had agreed to is not forgotten otherwise.
        tap.set_offloads(Offloads::default()).map_err(system)?;
        Ok(tap)
    }

    fn attach(&self, name: &str) -> Result<(), TapError> {
        let mut request = Request { name: [0; MAX_NAME + 1], flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, rest: [0; 22] };
        // The last byte stays 0; a name that is longer has no index.
        request.name.iter_mut().zip(name.bytes().take(MAX_NAME)).for_each(|(to, from)| *to = from);
        // SAFETY: the request reads and writes one ifreq, of 40 bytes, which is what `Request` is, all of it initialised
        // and valid for any bytes.
        done(unsafe { ioctl_with_mut_ref(&self.0, TUNSETIFF, &mut request) }).map_err(|source| {
            let name = name.to_owned();
            match Errno::from_io_error(&source) {
                Some(Errno::BUSY) => TapError::Busy(name),
                Some(Errno::INVAL) => TapError::Other(name),
                Some(Errno::PERM) => TapError::Denied(name),
                _ => TapError::System { name, source },
            }
        })
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Link for Tap {
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        // SAFETY: the argument of this request is a number, no address.
        done(unsafe { ioctl_with_val(&self.0, TUNSETOFFLOAD, offloads.tun_flags().into()) })
    }
}

/// The number of an interface, if there is one of that name.
fn interface_index(name: &str) -> Result<u32, TapError> {
    let system = |source: Errno| TapError::System { name: name.to_owned(), source: source.into() };
    let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None).map_err(system)?;
    match name_to_index(&socket, name) {
        Ok(index) => Ok(index),
        Err(Errno::NODEV) => Err(TapError::Missing(name.to_owned())),
        Err(error) => Err(system(error)),
    }
}

fn done(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
