//! Where the agent listens, and where the host does: vsock in a guest, a Unix socket in tests.

// UNSAFETY: rustix has no vsock addresses; the kernel's structure goes in and out as bytes here.
#![allow(unsafe_code)]

use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::{
    AddressFamily, SocketAddrAny, SocketAddrUnix, SocketFlags, SocketType, acceptfrom_with, bind, connect, listen,
    socket_with,
};
use std::path::PathBuf;
use std::str::FromStr;

/// The host's context id.
const HOST: u32 = libc::VMADDR_CID_HOST;
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 64;

/// A place to listen at or to connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A vsock port: one of the guest's to listen at, one of the host's to connect to.
    Vsock(u32),
    /// A Unix socket.
    Unix(PathBuf),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is neither vsock:PORT nor unix:PATH");
        match text.split_once(':').ok_or_else(wrong)? {
            ("vsock", port) => Ok(Address::Vsock(port.parse().map_err(|_| wrong())?)),
            ("unix", path) if !path.is_empty() => Ok(Address::Unix(path.into())),
            _ => Err(wrong()),
        }
    }
}

impl Address {
    /// Connects. The stream does not block, but this does.
    pub fn connect(&self) -> Result<OwnedFd, Errno> {
        let stream = self.socket()?;
        match self {
            Address::Vsock(port) => connect(&stream, &VsockAddr::new(HOST, *port))?,
            Address::Unix(path) => connect(&stream, &SocketAddrUnix::new(path)?)?,
        }
        rustix::io::ioctl_fionbio(&stream, true)?;
        Ok(stream)
    }

    /// Listens. What remained of a Unix socket of that name is replaced.
    pub fn listen(&self) -> Result<Listener, Errno> {
        let socket = self.socket()?;
        match self {
            Address::Vsock(port) => bind(&socket, &VsockAddr::new(libc::VMADDR_CID_ANY, *port))?,
            Address::Unix(path) => {
                let _ = std::fs::remove_file(path);
                bind(&socket, &SocketAddrUnix::new(path)?)?;
            }
        }
        listen(&socket, BACKLOG)?;
        Ok(Listener { socket })
    }

    fn socket(&self) -> Result<OwnedFd, Errno> {
        let family = match self {
            Address::Vsock(_) => AddressFamily::VSOCK,
            Address::Unix(_) => AddressFamily::UNIX,
        };
        socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)
    }
}

/// A socket that listens.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
}

impl Listener {
    /// The next connection, which does not block. On vsock only the host's are taken: a process in the guest could
    /// otherwise reach the agent through the loopback transport, and would be root.
    pub fn accept(&self) -> Result<OwnedFd, Errno> {
        loop {
            let (stream, peer) = acceptfrom_with(self.socket.as_fd(), SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
            match peer.as_ref().and_then(cid_of) {
                Some(cid) if cid != HOST => crate::say(format_args!("refused a connection of context id {cid}")),
                _ => return Ok(stream),
            }
        }
    }
}

/// A vsock address as the kernel has it.
struct VsockAddr(libc::sockaddr_vm);

impl VsockAddr {
    fn new(cid: u32, port: u32) -> Self {
        VsockAddr(libc::sockaddr_vm {
            svm_family: libc::AF_VSOCK as libc::sa_family_t,
            svm_reserved1: 0,
            svm_port: port,
            svm_cid: cid,
            svm_zero: [0; 4],
        })
    }
}

// SAFETY: the pointer is to a whole `sockaddr_vm` that outlives the call, with its family set and its length given.
unsafe impl SocketAddrArg for VsockAddr {
    unsafe fn with_sockaddr<R>(&self, f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R) -> R {
        f((&raw const self.0).cast(), size_of::<libc::sockaddr_vm>() as SocketAddrLen)
    }
}

/// The context id in a vsock address; none in another.
fn cid_of(address: &SocketAddrAny) -> Option<u32> {
    let whole = address.addr_len() as usize >= size_of::<libc::sockaddr_vm>();
    if address.address_family() != AddressFamily::VSOCK || !whole {
        return None;
    }
    // SAFETY: the address holds at least as many initialised bytes as the structure has, all of whose fields are
    // integers; it is read unaligned.
    let address = unsafe { address.as_ptr().cast::<libc::sockaddr_vm>().read_unaligned() };
    Some(address.svm_cid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read() {
        assert_eq!("vsock:5000".parse(), Ok(Address::Vsock(5000)));
        assert_eq!("unix:/run/a".parse(), Ok(Address::Unix("/run/a".into())));
        for wrong in ["", "vsock", "vsock:", "vsock:x", "unix:", "tcp:1"] {
            assert!(wrong.parse::<Address>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_context_id_of_a_peer_is_read_back() {
        assert_eq!(cid_of(&VsockAddr::new(7, 1).as_any()), Some(7));
        assert_eq!(cid_of(&SocketAddrUnix::new("/a").unwrap().as_any()), None);
    }
}
