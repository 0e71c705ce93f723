//! A bus: which device answers an address.
//!
//! A bus is filled while the machine is built and then shared, unchanging, by all vCPU threads.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use super::lock;

/// A device as a bus sees it: a range of bytes that can be read and written.
pub trait BusDevice: Send {
    /// Fills `data` with what the guest reads at `offset` bytes from the start of the range.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Takes what the guest writes at `offset` bytes from the start of the range.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// Why a device cannot be put on a bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// The range is empty or goes beyond the end of the address space.
    #[error("device range of {len:#x} bytes at {base:#x} is empty or leaves the address space; correct the layout")]
    BadRange {
        /// Where the range begins.
        base: u64,
        /// Its length, in bytes.
        len: u64,
    },
    /// Another device already answers there.
    #[error("device range of {len:#x} bytes at {base:#x} overlaps the device at {other:#x}; correct the layout")]
    Overlap {
        /// Where the range begins.
        base: u64,
        /// Its length, in bytes.
        len: u64,
        /// Where the range of the other device begins.
        other: u64,
    },
}

struct Entry {
    len: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// Devices by address. The machine has two: one for I/O ports, one for memory.
#[derive(Default)]
pub struct Bus {
    /// Accesses longer than a device are string instructions, which repeat one port.
    strings: bool,
    /// By the first address of each; the ranges do not overlap.
    devices: BTreeMap<u64, Entry>,
}

impl Bus {
    /// A bus for memory, without devices.
    pub fn memory() -> Self {
        Bus::default()
    }

    /// A bus for I/O ports, without devices. KVM hands over what a string instruction (`rep insb`) repeats as one access.
    pub fn ports() -> Self {
        Bus { strings: true, ..Bus::default() }
    }

    /// Lets `device` answer the `len` bytes from `base`.
    pub fn insert(&mut self, base: u64, len: u64, device: Arc<Mutex<dyn BusDevice>>) -> Result<(), BusError> {
        let last = match len.checked_sub(1).and_then(|n| base.checked_add(n)) {
            Some(last) => last,
            None => return Err(BusError::BadRange { base, len }),
        };
        // Ranges are disjoint, so only the nearest one that begins at or before our last byte can reach into ours.
        if let Some((&other, entry)) = self.devices.range(..=last).next_back()
            && other + (entry.len - 1) >= base
        {
            return Err(BusError::Overlap { base, len, other });
        }
        self.devices.insert(base, Entry { len, device });
        Ok(())
    }

    /// Reads for the guest. Without a device that answers the whole access `data` becomes all ones and the result is
    /// false.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> bool {
        match self.find(addr, data.len()) {
            Some((offset, device)) => {
                lock(device).read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Writes for the guest. The result is false, and nothing happens, without a device that answers the whole access.
    pub fn write(&self, addr: u64, data: &[u8]) -> bool {
        match self.find(addr, data.len()) {
            Some((offset, device)) => {
                lock(device).write(offset, data);
                true
            }
            None => false,
        }
    }

    fn find(&self, addr: u64, len: usize) -> Option<(u64, &Mutex<dyn BusDevice>)> {
        let (base, entry) = self.devices.range(..=addr).next_back()?;
        let offset = addr - base;
        let end = offset.checked_add(len as u64)?;
        (offset < entry.len && (end <= entry.len || self.strings)).then_some((offset, &*entry.device))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Remembers the last write; reads as the low byte of the offset.
    #[derive(Default)]
    struct Probe {
        written: Option<(u64, Vec<u8>)>,
    }

    impl BusDevice for Probe {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            self.written = Some((offset, data.to_vec()));
        }
    }

    fn probe() -> Arc<Mutex<Probe>> {
        Arc::default()
    }

    #[test]
    fn accesses_reach_the_device_with_its_own_offsets() {
        let (mut bus, device) = (Bus::memory(), probe());
        bus.insert(0x1000, 0x10, device.clone()).unwrap();
        let mut data = [0; 2];
        assert!(bus.read(0x1004, &mut data));
        assert_eq!(data, [4, 4]);
        assert!(bus.write(0x100f, &[7]));
        assert_eq!(lock(&device).written, Some((0xf, vec![7])));
    }

    #[test]
    fn what_no_device_answers_reads_as_ones() {
        let (mut bus, device) = (Bus::memory(), probe());
        bus.insert(0x1000, 0x10, device.clone()).unwrap();
        for (addr, len) in [(0xfff, 1), (0xfff, 2), (0x1010, 1), (0x100f, 2), (u64::MAX, 4)] {
            let mut data = vec![0; len];
            assert!(!bus.read(addr, &mut data), "{addr:#x}");
            assert_eq!(data, vec![0xff; len]);
            assert!(!bus.write(addr, &data));
        }
        assert_eq!(lock(&device).written, None);
    }

    #[test]
    fn overlaps_are_refused() {
        let mut bus = Bus::memory();
        bus.insert(0x1000, 0x10, probe()).unwrap();
        for (base, len) in [(0x1000, 0x10), (0xff0, 0x11), (0x100f, 1), (0x1004, 4), (0, 0x2000)] {
            let refused = bus.insert(base, len, probe());
            assert_eq!(refused, Err(BusError::Overlap { base, len, other: 0x1000 }));
        }
        bus.insert(0xff0, 0x10, probe()).unwrap();
        bus.insert(0x1010, 1, probe()).unwrap();
        bus.insert(u64::MAX, 1, probe()).unwrap();
    }

    #[test]
    fn bad_ranges_are_refused() {
        let mut bus = Bus::memory();
        assert_eq!(bus.insert(5, 0, probe()), Err(BusError::BadRange { base: 5, len: 0 }));
        assert_eq!(bus.insert(u64::MAX, 2, probe()), Err(BusError::BadRange { base: u64::MAX, len: 2 }));
    }

    #[test]
    fn a_string_instruction_repeats_one_port() {
        let mut bus = Bus::ports();
        bus.insert(0x3f8, 8, Arc::new(Mutex::new(Probe::default()))).unwrap();
        let mut data = [0; 100];
        assert!(bus.read(0x3fb, &mut data));
        assert_eq!(data, [3; 100]);
        assert!(!bus.read(0x400, &mut data));
    }
}
