//! The header of a vsock packet (virtio 1.2, section 5.10.6), read from and written to descriptor chains.
//!
//! A driver may put header and payload into one descriptor or spread them over any number of them, so both are treated
//! as one run of bytes. The header is copied out once: the guest can change its memory at any time.

use super::super::chain::{Buffer, ChainError};
use crate::devices::GuestMemory;

/// Length of a header, in bytes.
pub const HEADER_LEN: usize = 44;
/// The context id of the host.
pub const HOST_CID: u64 = 2;
/// The only type of socket that the device knows: a stream.
pub const STREAM: u16 = 1;
/// Longest payload that a packet may have, in bytes.
pub const MAX_PAYLOAD: usize = 64 * 1024;

/// What a packet does.
pub mod op {
    #![allow(missing_docs, reason = "named as the specification names them")]
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flag of a `SHUTDOWN`: the sender will not receive any more.
pub const NO_RECEIVE: u32 = 1;
/// Flag of a `SHUTDOWN`: the sender will not send any more.
pub const NO_SEND: u32 = 2;
/// Both flags of a `SHUTDOWN`.
pub const BOTH_ENDS: u32 = NO_RECEIVE | NO_SEND;

/// A packet header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Context id of the sender.
    pub src_cid: u64,
    /// Context id of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Length of the payload, in bytes.
    pub len: u32,
    /// Type of socket.
    pub kind: u16,
    /// What the packet does, one of [`op`].
    pub op: u16,
    /// Flags of a `SHUTDOWN`.
    pub flags: u32,
    /// How many bytes the sender has room for in all.
    pub buf_alloc: u32,
    /// How many bytes the sender's side has consumed since the connection was made, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// The header in these bytes.
    pub fn from_bytes(bytes: &[u8; HEADER_LEN]) -> Self {
        let mut rest = bytes.as_slice();
        Header {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// The bytes of this header.
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let Header { src_cid, dst_cid, src_port, dst_port, len, kind, op, flags, buf_alloc, fwd_cnt } = self;
        let mut bytes = [0; HEADER_LEN];
        let mut rest = bytes.as_mut_slice();
        put(&mut rest, src_cid.to_le_bytes());
        put(&mut rest, dst_cid.to_le_bytes());
        put(&mut rest, src_port.to_le_bytes());
        put(&mut rest, dst_port.to_le_bytes());
        put(&mut rest, len.to_le_bytes());
        put(&mut rest, kind.to_le_bytes());
        put(&mut rest, op.to_le_bytes());
        put(&mut rest, flags.to_le_bytes());
        put(&mut rest, buf_alloc.to_le_bytes());
        put(&mut rest, fwd_cnt.to_le_bytes());
        bytes
    }

    /// The reset that answers this packet.
    pub fn reset(&self) -> Header {
        Header {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Header::default()
        }
    }
}

/// Takes the first `N` bytes; the callers above take 44 in all.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&rest[..N]);
    *rest = &rest[N..];
    bytes
}

/// Puts `N` bytes; the callers above put 44 in all.
fn put<const N: usize>(rest: &mut &mut [u8], bytes: [u8; N]) {
    let (head, tail) = std::mem::take(rest).split_at_mut(N);
    head.copy_from_slice(&bytes);
    *rest = tail;
}

/// Reads a packet that the guest sends. `payload` becomes its payload, and stays empty if that is longer than any may
/// be.
pub fn read(buffer: &Buffer, mem: &GuestMemory, payload: &mut Vec<u8>) -> Result<Header, ChainError> {
    payload.clear();
    let mut bytes = [0; HEADER_LEN];
    buffer.read(mem, 0, &mut bytes)?;
    let header = Header::from_bytes(&bytes);
    let needed = HEADER_LEN as u64 + u64::from(header.len);
    if buffer.len() < needed {
        return Err(ChainError::Short { len: buffer.len(), needed });
    }
    if header.len as usize <= MAX_PAYLOAD {
        payload.resize(header.len as usize, 0);
        buffer.read(mem, HEADER_LEN as u64, payload)?;
    }
    Ok(header)
}

/// How long a payload fits into a buffer of the guest, in bytes. A data packet needs at least one.
pub fn room(buffer: &Buffer) -> Result<usize, ChainError> {
    let needed = HEADER_LEN as u64 + 1;
    if buffer.len() < needed {
        return Err(ChainError::Short { len: buffer.len(), needed });
    }
    Ok((buffer.len() - HEADER_LEN as u64).min(MAX_PAYLOAD as u64) as usize)
}

/// Writes a packet to the guest and returns its length in all, in bytes.
pub fn write(buffer: &Buffer, mem: &GuestMemory, header: &Header, payload: &[u8]) -> Result<u32, ChainError> {
    buffer.write(mem, 0, &header.to_bytes())?;
    buffer.write(mem, HEADER_LEN as u64, payload)?;
    Ok((HEADER_LEN + payload.len()) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_have_the_layout_of_the_specification() {
        let bytes: [u8; HEADER_LEN] = std::array::from_fn(|i| i as u8);
        let header = Header::from_bytes(&bytes);
        assert_eq!(header.src_cid, 0x0706_0504_0302_0100);
        assert_eq!(header.dst_port, 0x1716_1514);
        assert_eq!(header.len, 0x1b1a_1918);
        assert_eq!((header.kind, header.op), (0x1d1c, 0x1f1e));
        assert_eq!((header.flags, header.buf_alloc, header.fwd_cnt), (0x2322_2120, 0x2726_2524, 0x2b2a_2928));
        assert_eq!(header.to_bytes(), bytes);
    }

    #[test]
    fn a_reset_goes_back_where_the_packet_came_from() {
        let header = Header { src_cid: 3, dst_cid: 9, src_port: 1, dst_port: 2, kind: 7, len: 5, ..Header::default() };
        let reset = header.reset();
        assert_eq!((reset.src_cid, reset.dst_cid, reset.src_port, reset.dst_port), (9, 3, 2, 1));
        assert_eq!((reset.kind, reset.op, reset.len), (7, op::RST, 0));
    }
}
