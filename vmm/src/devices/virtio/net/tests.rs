//! The device as a whole: a driver of our own in place of the guest's, and a pair of sockets in place of the tap. Real
//! taps are tried in a network namespace, where the host lets us.

use std::io;
use std::net::UdpSocket;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use api_spec::devices::{NetworkInterface, RateLimiter, TokenBucket};
use proptest::prelude::*;
use snapshot::state::NetState;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_MRG_RXBUF,
};
use vm_memory::{Bytes, GuestAddress};

use super::super::fake_driver::{Driver, FREE, MEMORY, NEXT, Noise, SIZE, WRITE, both, memory, noise};
use super::super::{EVENT_IDX, VirtioDevice};
use super::device::{RX, TX};
use super::frame::{HEADER_LEN, MAX_LEN, Offloads};
use super::{Link, Net, Tap, TapError};
use crate::devices::bus::BusDevice;
use crate::devices::lock;

const MRG: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const CSUM: u64 = 1 << VIRTIO_NET_F_CSUM;
const HOST_TSO4: u64 = 1 << VIRTIO_NET_F_HOST_TSO4;
const GUEST_CSUM: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM;
const GUEST_TSO4: u64 = 1 << VIRTIO_NET_F_GUEST_TSO4;
/// Where the driver's buffers are that it receives into, and that it sends from.
const IN: u64 = FREE;
const OUT: u64 = 0x20_0000;
/// What no device says of offloads.
const NO_OFFLOADS_YET: u32 = u32::MAX;

/// A pair of sockets keeps frames apart, as a tap does.
struct Wire {
    end: OwnedFd,
    offloads: Arc<AtomicU32>,
    obeys: bool,
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.end.as_fd()
    }
}

impl Link for Wire {
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.offloads.store(offloads.tun_flags(), Ordering::SeqCst);
        if self.obeys { Ok(()) } else { Err(io::Error::other("as planned")) }
    }
}

fn config(mac: &str) -> NetworkInterface {
    NetworkInterface {
        iface_id: "eth0".into(),
        host_dev_name: "tap0".into(),
        guest_mac: Some(mac.parse().unwrap()),
        rx_rate_limiter: None,
        tx_rate_limiter: None,
        mtu: None,
    }
}

/// A device, the host's end of its wire, and what the wire was last told about offloads.
fn device_of(config: &NetworkInterface) -> (Arc<Mutex<Net>>, UnixDatagram, Arc<AtomicU32>) {
    let (host, end) = UnixDatagram::pair().unwrap();
    host.set_nonblocking(true).unwrap();
    end.set_nonblocking(true).unwrap();
    let offloads = Arc::new(AtomicU32::new(NO_OFFLOADS_YET));
    let wire = Wire { end: end.into(), offloads: offloads.clone(), obeys: true };
    (Net::new(config, Box::new(wire)).unwrap(), host, offloads)
}

/// A machine with a network device, and the host's end of its wire.
struct Rig {
    driver: Driver<Net>,
    host: UnixDatagram,
    offloads: Arc<AtomicU32>,
}

impl std::ops::Deref for Rig {
    type Target = Driver<Net>;
    fn deref(&self) -> &Driver<Net> {
        &self.driver
    }
}

impl std::ops::DerefMut for Rig {
    fn deref_mut(&mut self) -> &mut Driver<Net> {
        &mut self.driver
    }
}

impl Rig {
    fn new(features: u64) -> Self {
        Rig::of(&config("06:00:00:00:00:01"), features)
    }

    fn of(config: &NetworkInterface, features: u64) -> Self {
        let (device, host, offloads) = device_of(config);
        let mut rig = Rig { driver: Driver::started(device, features), host, offloads };
        rig.run();
        rig
    }

    fn restored(&self, state: &NetState, mac: &str) -> Self {
        let (device, host, offloads) = device_of(&config(mac));
        let restore = |device: &Mutex<Net>, transport: &mut _| super::restore(device, transport, state).unwrap();
        Rig { driver: self.driver.restored(device, restore), host, offloads }
    }

    fn save(&self) -> NetState {
        super::save(&self.device, || self.transport.save())
    }

    /// The driver sends a frame in pieces of these lengths, and the rest in one more.
    fn send(&mut self, frame: &[u8], cuts: &[usize]) {
        self.mem.write_slice(frame, GuestAddress(OUT)).unwrap();
        let (mut pieces, mut at) = (Vec::new(), 0);
        for cut in cuts.iter().copied().chain([usize::MAX]) {
            let len = cut.min(frame.len() - at);
            pieces.push((OUT + at as u64, len as u32, 0));
            at += len;
        }
        self.offer(TX, 0, &pieces);
        self.run();
    }

    /// The next frame that the host gets.
    fn sent(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; MAX_LEN + 100];
        let len = self.host.recv(&mut frame).ok()?;
        frame.truncate(len);
        Some(frame)
    }

    /// The driver offers buffers of so many bytes to receive into, one behind the other in memory.
    fn offer_buffers(&mut self, ids: std::ops::Range<u16>, len: u32) {
        for id in ids {
            self.offer(RX, id, &[(buffer(id, len), len, WRITE)]);
        }
    }

    /// The next frame that the driver gets, from buffers of so many bytes. They are not offered again.
    fn received(&mut self, len: u32) -> Option<Vec<u8>> {
        let (id, used) = self.used(RX)?;
        let mut frame = self.bytes(buffer(id, len), used as usize);
        let spread = u16::from_le_bytes([frame[10], frame[11]]);
        assert!(spread >= 1);
        let mut last = used;
        for _ in 1..spread {
            assert_eq!(last, len, "all buffers but the last are full");
            let (id, used) = self.used(RX).expect("all buffers of a frame are used together");
            frame.extend(self.bytes(buffer(id, len), used as usize));
            last = used;
        }
        frame[10..12].fill(0);
        Some(frame)
    }
}

fn buffer(id: u16, len: u32) -> u64 {
    IN + u64::from(id) * u64::from(len)
}

/// A frame of so many bytes with its header, in which no two neighbours are alike.
fn frame(len: usize, seed: usize) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..len).map(|n| ((n + seed) % 251) as u8).collect();
    frame[..HEADER_LEN].fill(0);
    frame
}

#[test]
fn frames_leave_the_guest_whole_however_they_lie_in_memory() {
    both(|event_idx| {
        let mut rig = Rig::new(event_idx);
        for (round, cuts) in [vec![], vec![12], vec![12, 14], vec![5, 0, 9, 400], vec![1; 11]].iter().enumerate() {
            let sent = frame(1000 + round, round);
            rig.send(&sent, cuts);
            assert_eq!(rig.sent(), Some(sent), "{cuts:?}");
            assert_eq!(rig.used(TX), Some((0, 0)));
            assert!(rig.interrupted());
        }
        assert_eq!(rig.sent(), None);
    });
}

#[test]
fn frames_reach_the_guest_in_one_buffer_or_in_many() {
    both(|event_idx| {
        for (features, len) in [(0, 2048), (MRG, 2048), (MRG, 120), (MRG, 5000)] {
            let mut rig = Rig::new(event_idx | features);
            rig.offer_buffers(0..SIZE, len);
            rig.run();
            let frames = [frame(60, 1), frame(1514, 2), frame(100, 3)];
            for frame in &frames {
                rig.host.send(frame).unwrap();
            }
            rig.run();
            for frame in &frames {
                assert_eq!(rig.received(len).as_ref(), Some(frame), "{len}");
            }
            assert!(rig.interrupted() && !rig.has_failed());
        }
    });
}

#[test]
fn buffers_in_pieces_are_filled() {
    let mut rig = Rig::new(MRG);
    rig.offer(RX, 0, &[(IN, 7, WRITE), (IN + 100, 0, WRITE), (IN + 200, 13, WRITE)]);
    rig.offer(RX, 3, &[(IN + 300, 4000, WRITE)]);
    let sent = frame(500, 9);
    rig.host.send(&sent).unwrap();
    rig.run();
    assert_eq!((rig.used(RX), rig.used(RX), rig.used(RX)), (Some((0, 20)), Some((3, 480)), None));
    let got = [rig.bytes(IN, 7), rig.bytes(IN + 200, 13), rig.bytes(IN + 300, 480)].concat();
    assert_eq!(got[10..12], [2, 0], "two buffers");
    assert_eq!(got[12..], sent[12..]);
}

#[test]
fn all_buffers_of_a_frame_are_used_in_one_step_and_interrupt_once() {
    let mut rig = Rig::new(MRG | EVENT_IDX);
    rig.offer_buffers(0..4, 50);
    rig.run();
    // The driver wants to hear of the second buffer, which is not the last of the frame.
    rig.mem.write_obj(1u16, GuestAddress(0x1400 + 4 + 2 * u64::from(SIZE))).unwrap();
    rig.host.send(&frame(150, 0)).unwrap();
    rig.run();
    assert!(rig.interrupted());
    assert_eq!(rig.received(50), Some(frame(150, 0)));
}

#[test]
fn without_buffers_frames_wait_in_order() {
    both(|event_idx| {
        let mut rig = Rig::new(event_idx | MRG);
        let frames: Vec<_> = (0..5).map(|n| frame(300 + n, n)).collect();
        for frame in &frames {
            rig.host.send(frame).unwrap();
        }
        rig.run();
        assert_eq!(rig.used(RX), None);
        for (n, frame) in frames.iter().enumerate() {
            // One buffer does not suffice, so nothing is used until there is another.
            let id = n as u16 * 2;
            rig.offer_buffers(id..id + 1, 200);
            rig.run();
            assert_eq!(rig.used(RX), None, "{n}");
            rig.offer_buffers(id + 1..id + 2, 200);
            rig.run();
            assert_eq!(rig.received(200).as_ref(), Some(frame), "{n}");
        }
    });
}

#[test]
fn frames_that_never_fit_are_dropped() {
    // With one buffer a frame, and with all that there can be.
    for (features, len) in [(0, 200), (MRG, 20)] {
        let mut rig = Rig::new(features);
        rig.offer_buffers(0..SIZE, len);
        rig.run();
        rig.host.send(&frame(1000, 0)).unwrap();
        rig.host.send(&frame(100, 1)).unwrap();
        rig.run();
        assert_eq!(rig.received(len), Some(frame(100, 1)));
        assert!(!rig.has_failed());
    }
}

#[test]
fn runts_and_giants_are_dropped_both_ways() {
    let mut rig = Rig::new(MRG);
    for len in [HEADER_LEN, HEADER_LEN + 13, MAX_LEN + 1, 100_000] {
        rig.send(&frame(len, 0), &[12]);
        assert_eq!(rig.used(TX), Some((0, 0)), "{len}");
    }
    // No byte of what is too long is looked at.
    rig.offer(TX, 0, &[(OUT, 12, 0), (MEMORY as u64 + 5, 0x4000_0000, 0)]);
    rig.run();
    assert_eq!(rig.used(TX), Some((0, 0)));
    assert_eq!(rig.sent(), None);
    rig.offer_buffers(0..SIZE, 5000);
    for len in [0, 1, HEADER_LEN + 13, MAX_LEN + 1, MAX_LEN + 9] {
        rig.host.send(&vec![0; len]).unwrap();
    }
    rig.run();
    assert_eq!(rig.used(RX), None);
    let stats = lock(&rig.device).stats();
    assert_eq!([stats.rx_dropped, stats.tx_dropped, stats.rx_frames, stats.tx_frames], [5, 5, 0, 0]);
    // The longest and the shortest pass.
    for len in [MAX_LEN, HEADER_LEN + 14] {
        rig.send(&frame(len, 1), &[]);
        assert_eq!(rig.sent(), Some(frame(len, 1)));
        rig.host.send(&frame(len, 2)).unwrap();
        rig.run();
        assert_eq!(rig.received(5000), Some(frame(len, 2)));
    }
    assert!(!rig.has_failed());
}

#[test]
fn offloads_are_what_the_driver_has_accepted() {
    let mut rig = Rig::new(MRG | CSUM | HOST_TSO4 | GUEST_CSUM | GUEST_TSO4);
    assert_eq!(rig.offloads.load(Ordering::SeqCst), 3);
    let mut large = frame(60_000, 0);
    (large[0], large[1]) = (1, 1);
    rig.send(&large, &[]);
    assert_eq!(rig.sent().as_ref(), Some(&large));
    rig.offer_buffers(0..SIZE, 5000);
    rig.host.send(&large).unwrap();
    rig.run();
    assert_eq!(rig.received(5000).as_ref(), Some(&large));
    // A clone's tap is told again.
    let clone = rig.restored(&rig.save(), "06:00:00:00:00:01");
    assert_eq!(clone.offloads.load(Ordering::SeqCst), 3);
    // Another driver accepts less, and is given no more. Until it has, the tap is not told: nobody reads its frames.
    rig.write(0x70, 0);
    assert_eq!(rig.offloads.load(Ordering::SeqCst), 3);
    rig.start(MRG);
    assert_eq!(rig.offloads.load(Ordering::SeqCst), 0);
    rig.offer_buffers(0..SIZE, 5000);
    rig.host.send(&large).unwrap();
    rig.send(&large, &[]);
    assert_eq!((rig.used(RX), rig.sent()), (None, None));
}

#[test]
fn the_configuration_is_the_mac_address() {
    let mut rig = Rig::new(0);
    let mut config = [0xff; 12];
    rig.transport.read(0x100, &mut config);
    assert_eq!(config, [6, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    let mut byte = [0xff];
    rig.transport.read(0x105, &mut byte);
    assert_eq!(byte, [1]);
    rig.transport.write(0x100, &[9; 6]);
    rig.transport.read(0x100, &mut byte);
    assert_eq!(byte, [6], "it is not for the driver to change");
    let offered = lock(&rig.device).features();
    assert_ne!(offered & 1 << 5, 0);
}

#[test]
fn a_driver_that_breaks_the_rules_stops_its_device_until_it_resets_it() {
    type Break = fn(&mut Rig);
    let cases: [(&str, Break); 11] = [
        ("no header to send", |r| r.offer(TX, 0, &[(OUT, 11, 0)])),
        ("nothing to send", |r| r.offer(TX, 0, &[(OUT, 0, 0)])),
        ("a buffer of the wrong direction to send", |r| r.offer(TX, 0, &[(OUT, 40, 0), (OUT, 40, WRITE)])),
        ("something to send outside of memory", |r| r.offer(TX, 0, &[(MEMORY as u64 - 9, 100, 0)])),
        ("no room for a header", |r| r.offer(RX, 0, &[(IN, 11, WRITE)])),
        ("no room for a header in the second buffer", |r| {
            r.offer(RX, 0, &[(IN, 50, WRITE)]);
            r.offer(RX, 1, &[(IN, 0, WRITE)]);
        }),
        ("a buffer of the wrong direction to receive into", |r| r.offer(RX, 0, &[(IN, 2000, 0)])),
        ("a buffer outside of memory", |r| r.offer(RX, 0, &[(u64::MAX - 100, 2000, WRITE)])),
        ("a second buffer outside of memory", |r| {
            r.offer(RX, 0, &[(IN, 50, WRITE)]);
            r.offer(RX, 1, &[(u64::MAX - 100, 2000, WRITE)]);
        }),
        ("a loop to send", |r| {
            r.describe(TX, 0, OUT, 40, NEXT, 1);
            r.describe(TX, 1, OUT, 40, NEXT, 0);
            r.offer_head(TX, 0);
        }),
        ("a loop to receive into", |r| {
            r.describe(RX, 0, IN, 8, WRITE | NEXT, 0);
            r.offer_head(RX, 0);
        }),
    ];
    for (name, breaks) in cases {
        let mut rig = Rig::new(MRG);
        breaks(&mut rig);
        rig.host.send(&frame(100, 0)).unwrap();
        rig.run();
        assert!(rig.has_failed(), "{name}");
        assert_eq!((rig.sent(), rig.used(RX)), (None, None), "{name}");
        rig.host.send(&frame(100, 1)).unwrap();
        rig.run();
        rig.start(MRG);
        rig.offer_buffers(0..SIZE, 500);
        rig.send(&frame(60, 2), &[]);
        assert_eq!(rig.sent(), Some(frame(60, 2)), "{name}");
        rig.host.send(&frame(100, 3)).unwrap();
        rig.run();
        let got: Vec<_> = std::iter::from_fn(|| rig.received(500)).collect();
        assert_eq!(got.last(), Some(&frame(100, 3)), "{name}");
    }
}

#[test]
fn a_reset_in_mid_flight_leaves_memory_alone() {
    let mut rig = Rig::new(MRG);
    // A frame waits for a second buffer, another for the first turn.
    rig.offer_buffers(0..1, 50);
    rig.host.send(&frame(300, 0)).unwrap();
    rig.run();
    rig.offer(TX, 0, &[(OUT, 60, 0)]);
    rig.write(0x70, 0);
    let before = rig.contents();
    rig.kick(RX);
    rig.host.send(&frame(300, 1)).unwrap();
    rig.run();
    assert!(rig.contents() == before);
    assert_eq!(rig.sent(), None);
    rig.start(MRG);
    rig.offer_buffers(0..1, 500);
    rig.run();
    assert_eq!(rig.received(500), Some(frame(300, 1)), "what the guest was never given is gone, the rest is not");
}

#[test]
fn a_lost_tap_cuts_the_guest_off_and_nothing_else() {
    // A descriptor that can be read, and says that it is none that can be read.
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("s")).unwrap();
    let _client = UnixStream::connect(dir.path().join("s")).unwrap();
    let wire = Box::new(Wire { end: listener.into(), offloads: Arc::default(), obeys: true });
    let mut driver = Driver::started(Net::new(&config("06:00:00:00:00:01"), wire).unwrap(), MRG);
    driver.run();
    assert!(lock(&driver.device).cable.lost);
    driver.offer(TX, 0, &[(OUT, 60, 0)]);
    driver.run();
    assert_eq!(driver.used(TX), Some((0, 0)), "the guest can send as ever");
    assert!(!driver.has_failed());
}

#[test]
fn a_tap_that_does_not_take_its_offloads_loses_large_frames_only() {
    let (host, end) = UnixDatagram::pair().unwrap();
    end.set_nonblocking(true).unwrap();
    let wire = Box::new(Wire { end: end.into(), offloads: Arc::default(), obeys: false });
    let mut driver = Driver::started(Net::new(&config("06:00:00:00:00:01"), wire).unwrap(), MRG);
    for (number, mut sent) in [frame(5000, 1), frame(300, 2)].into_iter().enumerate() {
        // The first asks for what the driver has not accepted.
        sent[1] = u8::from(number == 0);
        host.send(&sent).unwrap();
    }
    driver.offer(RX, 0, &[(IN, 6000, WRITE)]);
    driver.run();
    assert_eq!(driver.used(RX), Some((0, 300)));
    assert!(!lock(&driver.device).cable.lost);
}

#[test]
fn rate_limits_make_frames_wait() {
    let bucket = |size| Some(TokenBucket { size, one_time_burst: None, refill_time: 20 });
    let limited = NetworkInterface {
        rx_rate_limiter: Some(RateLimiter { bandwidth: bucket(100), ops: None }),
        tx_rate_limiter: Some(RateLimiter { bandwidth: None, ops: bucket(1) }),
        ..config("06:00:00:00:00:01")
    };
    let mut rig = Rig::of(&limited, MRG);
    rig.offer_buffers(0..SIZE, 500);
    let frames: Vec<_> = (0..4).map(|n| frame(112, n)).collect();
    for (n, frame) in frames.iter().enumerate() {
        rig.host.send(frame).unwrap();
        let addr = OUT + n as u64 * 200;
        rig.mem.write_slice(frame, GuestAddress(addr)).unwrap();
        rig.offer(TX, n as u16, &[(addr, 112, 0)]);
    }
    let (mut sent, mut received) = (Vec::new(), Vec::new());
    let host = rig.host.try_clone().unwrap();
    rig.run();
    while let Some(frame) = rig.received(500) {
        received.push(frame);
    }
    assert!(received.len() < 4);
    rig.driver.run_until(|driver| {
        let mut bytes = [0; 200];
        while let Ok(len) = host.recv(&mut bytes) {
            sent.push(bytes[..len].to_vec());
        }
        while let Some((id, len)) = driver.used(RX) {
            let mut frame = driver.bytes(buffer(id, 500), len as usize);
            frame[10] = 0;
            received.push(frame);
        }
        sent.len() == 4 && received.len() == 4
    });
    assert!(sent == frames && received == frames, "all come, in order");
    let stats = lock(&rig.device).stats();
    assert_eq!([stats.rx_frames, stats.rx_bytes, stats.tx_frames, stats.tx_bytes], [4, 400, 4, 400]);
    assert!(stats.rx_throttled > 0 && stats.tx_throttled > 0 && stats.rx_dropped + stats.tx_dropped == 0, "{stats:?}");
}

/// Frames that would wait for ever go on.
#[test]
fn rate_limits_that_are_lifted_let_waiting_frames_pass() {
    let never = |size| Some(TokenBucket { size, one_time_burst: None, refill_time: u64::MAX });
    let limited = NetworkInterface {
        rx_rate_limiter: Some(RateLimiter { bandwidth: None, ops: never(1) }),
        tx_rate_limiter: Some(RateLimiter { bandwidth: None, ops: never(1) }),
        ..config("06:00:00:00:00:01")
    };
    let mut rig = Rig::of(&limited, MRG);
    rig.offer_buffers(0..SIZE, 500);
    for n in 0..2 {
        rig.host.send(&frame(112, n)).unwrap();
        let addr = OUT + n as u64 * 200;
        rig.mem.write_slice(&frame(112, n), GuestAddress(addr)).unwrap();
        rig.offer(TX, n as u16, &[(addr, 112, 0)]);
    }
    let host = rig.host.try_clone().unwrap();
    let mut bytes = [0; 200];
    rig.run();
    let received = std::iter::from_fn(|| rig.received(500)).count();
    let sent = std::iter::from_fn(|| host.recv(&mut bytes).ok()).count();
    assert_eq!((received, sent), (1, 1));
    lock(&rig.device).set_rates(None, None);
    let (mut received, mut sent) = (0, 0);
    rig.driver.run_until(|driver| {
        received += std::iter::from_fn(|| driver.used(RX)).count();
        sent += std::iter::from_fn(|| host.recv(&mut bytes).ok()).count();
        received == 1 && sent == 1
    });
}

#[test]
fn what_the_guest_has_to_send_is_sent_before_it_is_saved_and_once() {
    both(|event_idx| {
        let bucket = Some(TokenBucket { size: 1, one_time_burst: None, refill_time: 3_600_000 });
        let limited = NetworkInterface {
            tx_rate_limiter: Some(RateLimiter { bandwidth: None, ops: bucket }),
            ..config("06:00:00:00:00:01")
        };
        let mut rig = Rig::of(&limited, event_idx | MRG);
        rig.mem.write_slice(&frame(100, 0), GuestAddress(OUT)).unwrap();
        (0..3).for_each(|id| rig.offer(TX, id, &[(OUT, 100, 0)]));
        let state = rig.save();
        assert_eq!(std::iter::from_fn(|| rig.sent()).count(), 3);
        rig.run();
        assert_eq!(rig.sent(), None);
        let mut clone = rig.restored(&state, "06:00:00:00:00:01");
        assert_eq!(clone.save(), state, "a clone that never ran is saved as what it came from");
        clone.resume();
        assert_eq!(clone.sent(), None);
        assert_eq!(std::iter::from_fn(|| clone.used(TX)).count(), 3);
        clone.send(&frame(70, 1), &[20]);
        assert_eq!(clone.sent(), Some(frame(70, 1)));
    });
}

#[test]
fn a_clone_reads_no_frames_and_touches_no_memory_until_it_runs() {
    both(|event_idx| {
        let mut parent = Rig::new(event_idx | MRG);
        parent.offer_buffers(0..2, 200);
        // One frame is with the guest, and another waits for buffers: that one stays with the parent.
        parent.host.send(&frame(150, 0)).unwrap();
        parent.host.send(&frame(350, 1)).unwrap();
        parent.run();
        let state = parent.save();
        let mut clone = parent.restored(&state, "06:00:00:00:00:01");
        clone.host.send(&frame(120, 2)).unwrap();
        let before = clone.contents();
        clone.run();
        assert!(clone.contents() == before);
        clone.resume();
        assert!(clone.interrupted(), "an interrupt that was pending is raised again");
        assert_eq!(clone.received(200), Some(frame(150, 0)));
        assert_eq!(clone.received(200), Some(frame(120, 2)));
        parent.received(200);
        parent.offer_buffers(2..4, 200);
        parent.run();
        assert_eq!(parent.received(200), Some(frame(350, 1)));
        // Idle, a clone leaves memory alone even when it runs.
        let mut idle = parent.restored(&parent.save(), "06:00:00:00:00:01");
        let before = idle.contents();
        idle.resume();
        assert!(idle.contents() == before);
    });
}

#[test]
fn another_mac_address_is_another_configuration() {
    let parent = Rig::new(MRG);
    let state = parent.save();
    assert_eq!(state.mac, Some([6, 0, 0, 0, 0, 1]));
    let generation = |rig: &mut Rig| {
        let mut bytes = [0; 4];
        rig.transport.read(0xfc, &mut bytes);
        u32::from_le_bytes(bytes)
    };
    let mut same = parent.restored(&state, "06:00:00:00:00:01");
    assert_eq!(generation(&mut same), state.transport.config_generation);
    let mut renamed = parent.restored(&state, "06:00:00:00:00:02");
    assert_ne!(generation(&mut renamed), state.transport.config_generation);
    assert_eq!(renamed.save().mac, Some([6, 0, 0, 0, 0, 2]));
}

#[test]
fn a_device_without_a_driver_is_saved_and_restored() {
    let (device, _host, _) = device_of(&config("06:00:00:00:00:01"));
    let cold = Driver::cold(device, memory());
    let state = super::save(&cold.device, || cold.transport.save());
    let (device, host, offloads) = device_of(&config("06:00:00:00:00:01"));
    let restore = |device: &Mutex<Net>, transport: &mut _| super::restore(device, transport, &state).unwrap();
    let mut clone = Rig { driver: cold.restored(device, restore), host, offloads };
    clone.resume();
    clone.start(MRG);
    clone.run();
    clone.send(&frame(60, 0), &[]);
    assert_eq!(clone.sent(), Some(frame(60, 0)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Frames arrive whole and in order, whatever their lengths and those of the buffers.
    #[test]
    fn frames_are_spread_over_any_buffers(
        lens in prop::collection::vec(26usize..4000, 1..12),
        buffers in prop::collection::vec(12u32..3000, 1..8),
        event_idx in prop::sample::select(vec![0, EVENT_IDX]),
    ) {
        // Buffers that cannot hold the longest frame, all of them together, would never be given it.
        let all: u32 = buffers.iter().cycle().take(usize::from(SIZE)).sum();
        let lens: Vec<_> = lens.into_iter().map(|len| len.min(all as usize)).filter(|len| *len >= 26).collect();
        let mut rig = Rig::new(MRG | event_idx);
        let frames: Vec<_> = lens.iter().enumerate().map(|(n, len)| frame(*len, n)).collect();
        for frame in &frames {
            rig.host.send(frame).unwrap();
        }
        let mut kinds = buffers.iter().cycle();
        let (mut rooms, mut got, mut free) = ([0; SIZE as usize], Vec::new(), (0..SIZE).collect::<Vec<_>>());
        let mut bytes = Vec::new();
        let mut left = 0;
        for _ in 0..1000 {
            for id in free.drain(..) {
                rooms[usize::from(id)] = *kinds.next().unwrap();
                rig.offer(RX, id, &[(buffer(id, 4096), rooms[usize::from(id)], WRITE)]);
            }
            rig.run();
            while let Some((id, len)) = rig.used(RX) {
                let piece = rig.bytes(buffer(id, 4096), len as usize);
                if left == 0 {
                    left = u16::from_le_bytes([piece[10], piece[11]]);
                }
                left -= 1;
                prop_assert!(left == 0 || len == rooms[usize::from(id)], "all but the last are full");
                bytes.extend(piece);
                free.push(id);
                if left == 0 {
                    bytes[10..12].fill(0);
                    got.push(std::mem::take(&mut bytes));
                }
            }
            prop_assert_eq!(left, 0, "frames are seen whole or not at all");
            if got.len() == frames.len() {
                break;
            }
        }
        prop_assert!(got == frames);
    }

    /// Whatever a driver puts into its queues, the device comes to rest, and works again after a reset.
    #[test]
    fn noise_in_the_queues_does_no_harm(rx in noise(), tx in noise(), features in prop::sample::select(vec![0, MRG, EVENT_IDX, MRG | EVENT_IDX])) {
        let mut rig = Rig::new(features);
        let noise: [&Noise; 2] = [&rx, &tx];
        for (queue, noise) in noise.into_iter().enumerate() {
            rig.host.send(&frame(1500, queue)).unwrap();
            rig.host.send(&frame(30, queue)).unwrap();
            rig.scribble(queue, noise);
            rig.run();
        }
        let mut clone = rig.restored(&rig.save(), "06:00:00:00:00:01");
        clone.resume();
        while rig.sent().is_some() {}
        rig.start(MRG);
        rig.send(&frame(60, 5), &[]);
        prop_assert_eq!(rig.sent(), Some(frame(60, 5)));
    }
}

/// By this a test that was started again knows that it is inside.
const INSIDE: &str = "COPPICE_TEST_INSIDE";

/// Runs the test of that name again in a network namespace, and takes over its outcome. True if this is the inside.
fn is_inside(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    // Of its own user namespace too: whatever goes wrong, it has no rights over the host.
    let unshare = || {
        let mut unshare = Command::new("unshare");
        unshare.args(["--user", "--map-root-user", "--net"]);
        unshare
    };
    let tried = unshare().args(["sh", "-c", "ip tuntap add dev tap0 mode tap && ip link del tap0"]).output();
    if !tried.as_ref().is_ok_and(|output| output.status.success()) {
        let why = tried.map_or_else(|e| e.to_string(), |o| String::from_utf8_lossy(&o.stderr).trim().to_owned());
        test_skip::skip(format!("no tap devices in a network namespace here: {why}"));
        return false;
    }
    let this = std::env::current_exe().unwrap();
    let test = format!("devices::virtio::net::tests::{test}");
    let done = unshare().arg(this).args(["--exact", &test, "--nocapture"]).env(INSIDE, "1").output().unwrap();
    let text = [done.stdout, done.stderr].concat();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&text));
    false
}

fn ip(arguments: &str) {
    let done = Command::new("ip").args(arguments.split_whitespace()).output().unwrap();
    assert!(done.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&done.stderr));
}

#[test]
fn taps_are_attached_to_and_never_made() {
    if !is_inside("taps_are_attached_to_and_never_made") {
        return;
    }
    assert!(matches!(Tap::open("tap0"), Err(TapError::Missing(name)) if name == "tap0"));
    assert!(matches!(Tap::open("tap%d"), Err(TapError::Missing(_))));
    assert!(matches!(Tap::open("sixteen-bytes-xx"), Err(TapError::Missing(_))));
    assert!(matches!(Tap::open("lo"), Err(TapError::Other(_))));
    ip("tuntap add dev tun0 mode tun");
    assert!(matches!(Tap::open("tun0"), Err(TapError::Other(_))));
    ip("tuntap add dev many0 mode tap multi_queue");
    assert!(matches!(Tap::open("many0"), Err(TapError::Other(_))));
    ip("tuntap add dev tap0 mode tap");
    let tap = Tap::open("tap0").unwrap();
    assert!(matches!(Tap::open("tap0"), Err(TapError::Busy(_))));
    drop(tap);
    let tap = Tap::open("tap0").unwrap();
    for (csum, tso4, tso6) in [(true, true, true), (true, false, true), (true, false, false), (false, false, false)] {
        tap.set_offloads(Offloads { csum, tso4, tso6 }).unwrap();
    }
    drop(tap);
    ip("link show tap0"); // It has outlived us, as it should.
}

/// An Ethernet frame with a UDP packet to everybody, behind a header.
fn broadcast(port: u16, payload: &[u8]) -> Vec<u8> {
    let udp_len = (8 + payload.len()) as u16;
    let mut ip =
        [&[0x45, 0][..], &(20 + udp_len).to_be_bytes(), &[0, 0, 0, 0, 64, 17, 0, 0, 10, 7, 0, 2, 10, 7, 0, 255]]
            .concat();
    let sum: u32 = ip.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let ethernet = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 6, 0, 0, 0, 0, 1, 8, 0];
    let udp = [port.to_be_bytes(), port.to_be_bytes(), udp_len.to_be_bytes(), [0; 2]].concat();
    [&[0; HEADER_LEN][..], &ethernet, &ip, &udp, payload].concat()
}

#[test]
fn frames_pass_a_real_tap_both_ways_until_it_is_removed() {
    const PORT: u16 = 4321;
    if !is_inside("frames_pass_a_real_tap_both_ways_until_it_is_removed") {
        return;
    }
    ip("tuntap add dev tap0 mode tap");
    ip("address add 10.7.0.1/24 broadcast 10.7.0.255 dev tap0");
    let tap = Tap::open("tap0").unwrap();
    let device = Net::new(&config("06:00:00:00:00:01"), Box::new(tap)).unwrap();
    let mut driver = Driver::started(device, MRG | CSUM | GUEST_CSUM | GUEST_TSO4);
    // Before the tap is up what the guest sends is dropped.
    let frame = broadcast(PORT, b"from the guest");
    driver.mem.write_slice(&frame, GuestAddress(OUT)).unwrap();
    driver.offer(TX, 0, &[(OUT, frame.len() as u32, 0)]);
    driver.run();
    assert_eq!(driver.used(TX), Some((0, 0)));
    assert!(!driver.has_failed() && !lock(&driver.device).cable.lost);

    ip("link set tap0 up");
    let host = UdpSocket::bind(("0.0.0.0", PORT)).unwrap();
    host.set_broadcast(true).unwrap();
    host.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    for id in 0..SIZE {
        driver.offer(RX, id, &[(buffer(id, 2048), 2048, WRITE)]);
    }
    driver.offer(TX, 0, &[(OUT, frame.len() as u32, 0)]);
    driver.run();
    let mut got = [0; 100];
    let (len, from) = host.recv_from(&mut got).unwrap();
    assert_eq!((&got[..len], from.to_string()), (&b"from the guest"[..], format!("10.7.0.2:{PORT}")));

    host.send_to(b"from the host", ("10.7.0.255", PORT)).unwrap();
    let mut found = None;
    // The kernel says other things as well on a network that has just come up.
    driver.run_until(|driver| {
        while let Some((id, len)) = driver.used(RX) {
            let bytes = driver.bytes(buffer(id, 2048), len as usize);
            if bytes.ends_with(b"from the host") {
                found = Some(bytes);
            }
        }
        found.is_some()
    });
    let found = found.unwrap();
    assert_eq!(found[..HEADER_LEN][10..12], [1, 0]);
    assert_eq!(found[0] & 1, 1, "the guest fills in, or trusts, checksums: it has said that it can");

    ip("link del tap0");
    driver.offer(TX, 0, &[(OUT, frame.len() as u32, 0)]);
    driver.run();
    assert_eq!(driver.used(TX).map(|used| used.1), Some(0));
    assert!(lock(&driver.device).cable.lost && !driver.has_failed());
}
