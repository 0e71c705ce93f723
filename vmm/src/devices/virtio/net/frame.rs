//! Frames, each behind a `virtio_net_hdr` (virtio 1.2, section 5.1.6): what the header says, and which may pass. Pure.
//!
//! ```text
//!   0       1          2         4          6            8             10            12
//!   | flags | gso type | hdr len | gso size | csum start | csum offset | num buffers | Ethernet frame
//! ```

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_F_NEEDS_CSUM,
    VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
};

/// Length of the header, in bytes.
pub const HEADER_LEN: usize = 12;
/// Least length of a frame with its header, in bytes: an Ethernet header must be there.
pub const MIN_LEN: usize = HEADER_LEN + 14;
/// Most, in bytes: an Ethernet header and 64 KiB, which the host or the guest cuts into packets.
pub const MAX_LEN: usize = MIN_LEN + 0x1_0000;
/// Where the header says over how many buffers the frame is spread.
pub const NUM_BUFFERS: u64 = 10;

const FLAGS: usize = 0;
const GSO_TYPE: usize = 1;
const NEEDS_CSUM: u8 = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
const DATA_VALID: u8 = VIRTIO_NET_HDR_F_DATA_VALID as u8;
const GSO_NONE: u8 = VIRTIO_NET_HDR_GSO_NONE as u8;
const GSO_TCPV4: u8 = VIRTIO_NET_HDR_GSO_TCPV4 as u8;
const GSO_TCPV6: u8 = VIRTIO_NET_HDR_GSO_TCPV6 as u8;

/// Offloads of the tap: the kernel's `TUN_F_CSUM`, `TUN_F_TSO4` and `TUN_F_TSO6` (include/uapi/linux/if_tun.h).
const TUN_CSUM: u32 = 1;
const TUN_TSO4: u32 = 2;
const TUN_TSO6: u32 = 4;

/// What whoever sends frames may leave to whoever takes them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// To fill in checksums, and to take them on trust.
    pub csum: bool,
    /// To cut TCP over IPv4 into packets.
    pub tso4: bool,
    /// To cut TCP over IPv6 into packets.
    pub tso6: bool,
}

impl Offloads {
    /// What the guest may leave to the host, with these features accepted.
    pub fn of_guest(features: u64) -> Self {
        Self::of(features, [VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6])
    }

    /// What the host may leave to the guest, with these features accepted.
    pub fn of_host(features: u64) -> Self {
        Self::of(features, [VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6])
    }

    /// Without the first of them there are no others (virtio 1.2, section 5.1.3.1).
    fn of(features: u64, bits: [u32; 3]) -> Self {
        let [csum, tso4, tso6] = bits.map(|bit| features & 1 << bit != 0);
        Offloads { csum, tso4: csum && tso4, tso6: csum && tso6 }
    }

    /// The same for the tap.
    pub fn tun_flags(self) -> u32 {
        let Offloads { csum, tso4, tso6 } = self;
        [(csum, TUN_CSUM), (tso4, TUN_TSO4), (tso6, TUN_TSO6)].map(|(on, bit)| if on { bit } else { 0 }).iter().sum()
    }
}

/// Who sends a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    /// The guest.
    Guest,
    /// The host.
    Host,
}

/// Whether a frame may pass: it has a length that a frame can have, and leaves to its receiver only what that has agreed
/// to. What a receiver must not heed in its header is taken out.
pub fn admit(frame: &mut [u8], sender: Sender, offloads: Offloads) -> bool {
    if !(MIN_LEN..=MAX_LEN).contains(&frame.len()) {
        return false;
    }
    let known = match sender {
        Sender::Guest => NEEDS_CSUM,
        Sender::Host => NEEDS_CSUM | DATA_VALID,
    };
    let flags = frame[FLAGS] & known;
    let partial = flags & NEEDS_CSUM != 0;
    frame[FLAGS] = if offloads.csum { flags } else { flags & !DATA_VALID };
    frame[NUM_BUFFERS as usize..HEADER_LEN].fill(0);
    (!partial || offloads.csum)
        && match frame[GSO_TYPE] {
            GSO_NONE => true,
            GSO_TCPV4 => partial && offloads.tso4,
            GSO_TCPV6 => partial && offloads.tso6,
            _ => false,
        }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: Offloads = Offloads { csum: true, tso4: true, tso6: true };
    const NONE: Offloads = Offloads { csum: false, tso4: false, tso6: false };

    fn passes(flags: u8, gso_type: u8, sender: Sender, offloads: Offloads) -> Option<u8> {
        let mut frame = vec![9; MIN_LEN];
        (frame[0], frame[1]) = (flags, gso_type);
        let passes = admit(&mut frame, sender, offloads);
        assert_eq!(frame[2..10], [9; 8]);
        passes.then(|| frame[0])
    }

    #[test]
    fn only_what_was_agreed_on_passes() {
        for sender in [Sender::Guest, Sender::Host] {
            assert_eq!(passes(0, 0, sender, NONE), Some(0));
            assert_eq!(passes(NEEDS_CSUM, 0, sender, NONE), None);
            assert_eq!(passes(NEEDS_CSUM, 0, sender, ALL), Some(NEEDS_CSUM));
            assert_eq!(passes(NEEDS_CSUM, GSO_TCPV4, sender, ALL), Some(NEEDS_CSUM));
            assert_eq!(passes(NEEDS_CSUM, GSO_TCPV6, sender, Offloads { tso6: false, ..ALL }), None);
            assert_eq!(passes(0, GSO_TCPV4, sender, ALL), None, "whoever cuts must fill in checksums");
            for gso_type in [2, 3, 5, 0x80, 0x81, 0xff] {
                assert_eq!(passes(NEEDS_CSUM, gso_type, sender, ALL), None, "{gso_type}");
            }
        }
        assert_eq!(passes(DATA_VALID, 0, Sender::Host, ALL), Some(DATA_VALID));
        assert_eq!(passes(DATA_VALID, 0, Sender::Host, NONE), Some(0));
        assert_eq!(passes(0xfe, 0, Sender::Guest, ALL), Some(0));
    }

    #[test]
    fn runts_and_giants_do_not_pass() {
        for (len, fine) in [(0, false), (11, false), (25, false), (26, true), (MAX_LEN, true), (MAX_LEN + 1, false)] {
            assert_eq!(admit(&mut vec![0; len], Sender::Guest, ALL), fine, "{len}");
        }
        assert_eq!(MAX_LEN, 65562);
    }

    #[test]
    fn the_tap_is_told_what_the_guest_takes() {
        let bits = |bits: &[u32]| bits.iter().map(|bit| 1u64 << bit).sum::<u64>();
        let flags = |features| Offloads::of_host(bits(features)).tun_flags();
        assert_eq!(flags(&[VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4]), 0);
        assert_eq!(flags(&[VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO6]), 5);
        assert_eq!(flags(&[VIRTIO_NET_F_GUEST_TSO4]), 0, "nothing without checksums");
        assert_eq!(
            Offloads::of_guest(bits(&[VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4])),
            Offloads { tso6: false, ..ALL }
        );
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..64), csum: bool, tso4: bool) {
            let offloads = Offloads { csum, tso4, tso6: false };
            if admit(&mut bytes, Sender::Host, offloads) {
                let once = bytes.clone();
                prop_assert!(admit(&mut bytes, Sender::Host, offloads) && once == bytes, "what has passed once passes");
            }
        }
    }
}
