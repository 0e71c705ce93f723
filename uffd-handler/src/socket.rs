//! Receiving bytes and descriptors together, without losing track of a descriptor.

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

/// What came with some bytes.
#[derive(Debug)]
pub enum Passed {
    /// Nothing.
    None,
    /// One descriptor, close-on-exec.
    One(OwnedFd),
    /// More than one; all were closed.
    Many,
}

/// Receives what is there, up to the size of `bytes`. No bytes mean the end of the stream.
pub fn receive(stream: &UnixStream, bytes: &mut [u8]) -> io::Result<(usize, Passed)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(stream, &mut [IoSliceMut::new(bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = message {
            descriptors.extend(passed);
        }
    }
    // What did not fit was not received; the kernel says so.
    let passed = match descriptors.pop() {
        _ if received.flags.contains(ReturnFlags::CTRUNC) => Passed::Many,
        Some(one) if descriptors.is_empty() => Passed::One(one),
        Some(_) => Passed::Many,
        None => Passed::None,
    };
    Ok((received.bytes, passed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::sock_ctrl_msg::ScmSocket;

    #[test]
    fn one_is_told_from_many_however_many() {
        let (near, far) = UnixStream::pair().unwrap();
        for count in 0..40 {
            far.send_with_fds(&[&b"x"[..]], &vec![0; count]).unwrap();
            let (bytes, passed) = receive(&near, &mut [0; 8]).unwrap();
            let right = match passed {
                Passed::None => count == 0,
                Passed::One(_) => count == 1,
                Passed::Many => count > 1,
            };
            assert!(right && bytes == 1, "{count} descriptors");
        }
    }
}
