//! What a driver asks of a disk (virtio 1.2, section 5.2.6), and whether that is legal. Pure.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

/// Length of a sector, in bytes, whatever the block size.
pub const SECTOR: u64 = 512;
/// Length of the header of a request, in bytes.
pub const HEADER_LEN: usize = 16;
/// Length of the disk's name, in bytes.
pub const ID_LEN: usize = 20;
/// Length of a range to discard or to write zeros to, in bytes.
pub const SEGMENT_LEN: usize = 16;
/// Longest request to read or write, in bytes. As long as the announced limits on its pieces allow.
pub const MAX_DATA: u64 = 16 << 20;
/// Most ranges in a request to discard.
pub const MAX_DISCARD_SEGMENTS: u32 = 16;
/// Longest range to discard, in sectors.
pub const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// Longest range to write zeros to, in sectors; there may be one. A host that cannot do it otherwise writes them.
pub const MAX_ZERO_SECTORS: u32 = (MAX_DATA / SECTOR) as u32;

/// What giving back a range costs, in bytes that could be moved meanwhile.
const DISCARD_COST: u64 = 64 << 10;
/// What a flush costs, likewise.
const FLUSH_COST: u64 = 1 << 20;

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// It was done.
    Ok = VIRTIO_BLK_S_OK as u8,
    /// It was not done, or not all of it.
    IoError = VIRTIO_BLK_S_IOERR as u8,
    /// The device does no such thing.
    Unsupported = VIRTIO_BLK_S_UNSUPP as u8,
}

/// What a disk allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Its size, in bytes.
    pub size: u64,
    /// It cannot be written.
    pub read_only: bool,
    /// It offers to flush.
    pub flush: bool,
}

/// A legal request. Offsets and lengths are in bytes, and lie within the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Read.
    Read {
        /// From here.
        offset: u64,
        /// So much.
        len: u64,
    },
    /// Write.
    Write {
        /// To here.
        offset: u64,
        /// So much.
        len: u64,
    },
    /// Have on disk what was written.
    Flush,
    /// Tell the disk's name.
    GetId,
    /// Ranges that are no longer needed: so many bytes of them are to be read and given to [`Limits::segments`].
    Discard {
        /// Length of the list of ranges.
        list: usize,
    },
    /// Ranges that are to be zero: the same.
    WriteZeroes {
        /// Length of the list of ranges.
        list: usize,
    },
}

impl Request {
    /// How much of the host's time the request takes, in bytes that could be moved meanwhile. `segments` are its ranges.
    pub fn cost(&self, segments: &[Segment]) -> u64 {
        match self {
            Request::Flush => FLUSH_COST,
            _ => self.traffic(segments),
        }
    }

    /// How much the rate limit counts, in bytes. What a flush brings to disk was counted when it was written.
    pub fn traffic(&self, segments: &[Segment]) -> u64 {
        match self {
            Request::Read { len, .. } | Request::Write { len, .. } => *len,
            Request::Flush | Request::GetId => 0,
            Request::Discard { .. } => DISCARD_COST * segments.len() as u64,
            // The host may have to write them.
            Request::WriteZeroes { .. } => segments.iter().map(|segment| segment.len).sum(),
        }
    }
}

/// A range to discard or to write zeros to, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it begins.
    pub offset: u64,
    /// Its length.
    pub len: u64,
    /// Its space may be given back.
    pub unmap: bool,
}

impl Limits {
    /// The range of bytes, if it lies within the disk.
    fn range(&self, sector: u64, len: u64) -> Result<u64, Status> {
        let offset = sector.checked_mul(SECTOR).ok_or(Status::IoError)?;
        let end = offset.checked_add(len).ok_or(Status::IoError)?;
        if len.is_multiple_of(SECTOR) && end <= self.size { Ok(offset) } else { Err(Status::IoError) }
    }

    /// The request that has this header, `readable` bytes after it, and room for `writable` bytes before its status.
    pub fn parse(&self, header: &[u8; HEADER_LEN], readable: u64, writable: u64) -> Result<Request, Status> {
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = *header;
        let (kind, sector) = (u32::from_le_bytes([k0, k1, k2, k3]), u64::from_le_bytes(sector));
        match kind {
            VIRTIO_BLK_T_IN if writable <= MAX_DATA => {
                self.range(sector, writable).map(|offset| Request::Read { offset, len: writable })
            }
            VIRTIO_BLK_T_OUT if readable <= MAX_DATA && !self.read_only => {
                self.range(sector, readable).map(|offset| Request::Write { offset, len: readable })
            }
            VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT => Err(Status::IoError),
            VIRTIO_BLK_T_FLUSH if self.flush => Ok(Request::Flush),
            VIRTIO_BLK_T_GET_ID if writable >= ID_LEN as u64 => Ok(Request::GetId),
            VIRTIO_BLK_T_GET_ID => Err(Status::IoError),
            VIRTIO_BLK_T_DISCARD if !self.read_only => {
                list(readable, MAX_DISCARD_SEGMENTS).map(|list| Request::Discard { list })
            }
            VIRTIO_BLK_T_WRITE_ZEROES if !self.read_only => list(readable, 1).map(|list| Request::WriteZeroes { list }),
            _ => Err(Status::Unsupported),
        }
    }

    /// The ranges in the list of a request of the kind `request`. All of them are legal, or none is taken.
    pub fn segments(&self, request: Request, list: &[u8]) -> Result<Vec<Segment>, Status> {
        let (max_sectors, may_unmap) = match request {
            Request::WriteZeroes { .. } => (MAX_ZERO_SECTORS, true),
            _ => (MAX_DISCARD_SECTORS, false),
        };
        let (segments, []) = list.as_chunks::<SEGMENT_LEN>() else { return Err(Status::IoError) };
        segments.iter().map(|segment| self.segment(segment, max_sectors, may_unmap)).collect()
    }

    fn segment(&self, bytes: &[u8; SEGMENT_LEN], max_sectors: u32, may_unmap: bool) -> Result<Segment, Status> {
        let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = *bytes;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let (sectors, flags) = (u32::from_le_bytes([n0, n1, n2, n3]), u32::from_le_bytes(flags));
        let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
        if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || unmap && !may_unmap {
            return Err(Status::Unsupported);
        }
        if sectors > max_sectors {
            return Err(Status::IoError);
        }
        let len = u64::from(sectors) * SECTOR;
        Ok(Segment { offset: self.range(sector, len)?, len, unmap })
    }
}

/// The length of a list of ranges, if there is one of at most `max`.
fn list(len: u64, max: u32) -> Result<usize, Status> {
    let most = u64::from(max) * SEGMENT_LEN as u64;
    let whole = len > 0 && len.is_multiple_of(SEGMENT_LEN as u64) && len <= most;
    if whole { Ok(len as usize) } else { Err(Status::IoError) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITS: Limits = Limits { size: 100 * SECTOR, read_only: false, flush: true };

    fn header(kind: u32, sector: u64) -> [u8; HEADER_LEN] {
        let mut header = [0; HEADER_LEN];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        header
    }

    fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
        [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
    }

    #[test]
    fn reads_and_writes_lie_within_the_disk() {
        let read = |sector, len| LIMITS.parse(&header(VIRTIO_BLK_T_IN, sector), 0, len);
        assert_eq!(read(99, 512), Ok(Request::Read { offset: 99 * 512, len: 512 }));
        assert_eq!(read(100, 0), Ok(Request::Read { offset: 100 * 512, len: 0 }));
        for (sector, len) in
            [(99, 1024), (100, 512), (0, 511), (0, 1), (u64::MAX, 512), (1 << 55, 512), (0, MAX_DATA + 512)]
        {
            assert_eq!(read(sector, len), Err(Status::IoError), "{sector} {len}");
            assert_eq!(LIMITS.parse(&header(VIRTIO_BLK_T_OUT, sector), len, 0), Err(Status::IoError));
        }
        assert_eq!(LIMITS.parse(&header(VIRTIO_BLK_T_OUT, 1), 1024, 0), Ok(Request::Write { offset: 512, len: 1024 }));
    }

    #[test]
    fn what_a_disk_does_not_offer_it_does_not_do() {
        let sealed = Limits { read_only: true, flush: false, ..LIMITS };
        assert_eq!(sealed.parse(&header(VIRTIO_BLK_T_OUT, 0), 512, 0), Err(Status::IoError));
        for kind in [VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
            assert_eq!(sealed.parse(&header(kind, 0), 16, 0), Err(Status::Unsupported));
        }
        for kind in [2, 3, 5, 10, 14, 0x8000_0000, u32::MAX] {
            assert_eq!(LIMITS.parse(&header(kind, 0), 16, 0), Err(Status::Unsupported));
        }
        assert_eq!(LIMITS.parse(&header(VIRTIO_BLK_T_GET_ID, 0), 0, 19), Err(Status::IoError));
        assert_eq!(LIMITS.parse(&header(VIRTIO_BLK_T_GET_ID, 0), 0, 20), Ok(Request::GetId));
        assert_eq!(LIMITS.parse(&header(VIRTIO_BLK_T_FLUSH, 7), 0, 0), Ok(Request::Flush));
    }

    #[test]
    fn lists_of_ranges_are_legal_as_a_whole_or_refused() {
        for len in [0, 15, 17, 16 * 17] {
            assert_eq!(LIMITS.parse(&header(VIRTIO_BLK_T_DISCARD, 0), len, 0), Err(Status::IoError), "{len}");
        }
        assert_eq!(LIMITS.parse(&header(VIRTIO_BLK_T_WRITE_ZEROES, 0), 32, 0), Err(Status::IoError));
        let (discard, zeroes) = (Request::Discard { list: 0 }, Request::WriteZeroes { list: 0 });
        let good = segment(4, 8, 0);
        let unmap = |unmap| Segment { offset: 4 * 512, len: 8 * 512, unmap };
        assert_eq!(LIMITS.segments(discard, &good), Ok(vec![unmap(false)]));
        assert_eq!(LIMITS.segments(zeroes, &segment(4, 8, 1)), Ok(vec![unmap(true)]));
        for (bad, status) in [
            (segment(99, 2, 0), Status::IoError),
            (segment(u64::MAX, 1, 0), Status::IoError),
            (segment(0, u32::MAX, 0), Status::IoError),
            (segment(0, 1, 1), Status::Unsupported),
            (segment(0, 1, 2), Status::Unsupported),
        ] {
            assert_eq!(LIMITS.segments(discard, &[good.clone(), bad].concat()), Err(status));
        }
        let large = Limits { size: 1 << 40, ..LIMITS };
        assert_eq!(large.segments(zeroes, &segment(0, MAX_ZERO_SECTORS + 1, 0)), Err(Status::IoError));
    }

    #[test]
    fn a_request_costs_what_the_host_does_and_not_what_it_says() {
        let segment = |len| Segment { offset: 0, len, unmap: false };
        let zeroes = Request::WriteZeroes { list: 16 };
        assert_eq!((zeroes.cost(&[segment(MAX_DATA)]), zeroes.traffic(&[segment(MAX_DATA)])), (MAX_DATA, MAX_DATA));
        let discard = Request::Discard { list: 32 };
        assert_eq!(discard.cost(&[segment(512), segment(1 << 30)]), 2 * DISCARD_COST);
        assert_eq!(discard.traffic(&[segment(512)]), DISCARD_COST);
        assert_eq!((Request::Flush.cost(&[]), Request::Flush.traffic(&[])), (FLUSH_COST, 0));
        assert_eq!(Request::Write { offset: 0, len: 512 }.cost(&[]), 512);
    }

    proptest! {
        #[test]
        fn what_is_legal_lies_within_the_disk(bytes: [u8; 16], kind in 0u32..16, sector in 0u64..128, readable in 0u64..4096, writable in 0u64..4096) {
            for header in [bytes, header(kind, sector)] {
                match LIMITS.parse(&header, readable, writable) {
                    Ok(Request::Read { offset, len } | Request::Write { offset, len }) => {
                        prop_assert!(offset + len <= LIMITS.size && len % SECTOR == 0);
                    }
                    Ok(request @ (Request::Discard { list } | Request::WriteZeroes { list })) => {
                        let bytes = bytes.repeat(list / 16);
                        for Segment { offset, len, .. } in LIMITS.segments(request, &bytes).unwrap_or_default() {
                            prop_assert!(offset + len <= LIMITS.size);
                        }
                    }
                    _ => {}
                }
            }
        }
    }
}
