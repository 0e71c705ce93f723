//! `state.bin`: a machine's state as versioned sections.
//!
//! ```text
//!   0                8          12         16
//!   | magic          | format   | sections | section 0 ... section n-1, and nothing after them
//!   | "coppice\n"    | u32 LE=1 | u32 LE=n |
//!
//! section:
//!   0        4          8         16          48
//!   | kind   | version  | length  | BLAKE3    | body: `length` bytes, postcard
//!   | 4 char | u32 LE   | u64 LE  | 32 bytes  |
//! ```
//!
//! The digest covers the 16 bytes before it and the body. The sections are one `vcpu` per vCPU in order of their
//! numbers, one `vm  ` and one `devs`. Each kind has a version of its own; a section of another kind or version is
//! refused by name, as are bytes left over in a section or after the last one.

use super::{BalloonState, DeviceState, DriveState, IrqchipState, MachineState, NetState, VcpuState, VmState};
use serde::{Serialize, de::DeserializeOwned};

const MAGIC: [u8; 8] = *b"coppice\n";
const FORMAT: u32 = 1;
const FILE_HEADER: usize = 16;
const SECTION_HEADER: usize = 48;

/// A section kind, and the only version of it that is written and read.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Kind {
    name: [u8; 4],
    version: u32,
}

const VCPU: Kind = Kind { name: *b"vcpu", version: 1 };
const VM: Kind = Kind { name: *b"vm  ", version: 1 };
const DEVICES: Kind = Kind { name: *b"devs", version: 1 };

/// Length of a local APIC's register page, in bytes.
const LAPIC_BYTES: usize = 1024;
/// Length of an interrupt controller's state, in bytes.
const IRQCHIP_BYTES: usize = 512;
/// Shortest and longest XSAVE area, in bytes. AMX tiles need 11 KiB.
const XSAVE_BYTES: std::ops::RangeInclusive<usize> = 4096..=64 * 1024;
/// Most entries in any other list of a section. KVM's own limits are lower.
const MAX_ENTRIES: usize = 4096;

/// Why bytes are no saved state of a machine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// The first bytes are not those of a state file.
    #[error("it does not begin as a state file does")]
    Magic,
    /// Another layout of the file.
    #[error("its layout is version {found}; this program reads version {supported}")]
    Format {
        /// Version in the file.
        found: u32,
        /// Version that is read.
        supported: u32,
    },
    /// The file ends within a section.
    #[error("it ends in the middle of section {section}")]
    Truncated {
        /// Number of the section, from 0.
        section: u32,
    },
    /// A section that this program does not know.
    #[error("section {section} is of the unknown kind `{kind}`; a newer program wrote it")]
    UnknownKind {
        /// Number of the section, from 0.
        section: u32,
        /// Its kind.
        kind: String,
    },
    /// A section in another version.
    #[error("section `{kind}` has version {found}; this program reads version {supported}")]
    UnknownVersion {
        /// Kind of the section.
        kind: String,
        /// Version in the file.
        found: u32,
        /// Version that is read.
        supported: u32,
    },
    /// A section's digest is not that of its bytes.
    #[error("section {section} (`{kind}`) is damaged: its digest does not match")]
    Digest {
        /// Number of the section, from 0.
        section: u32,
        /// Its kind.
        kind: String,
    },
    /// A section's bytes are not an encoding of what it should hold.
    #[error("section {section} (`{kind}`) cannot be decoded, or holds more than it should")]
    Body {
        /// Number of the section, from 0.
        section: u32,
        /// Its kind.
        kind: String,
    },
    /// A section that must be there once is absent or repeated.
    #[error("it has {found} sections `{kind}` and must have {expected}")]
    Count {
        /// Kind of the section.
        kind: String,
        /// How many there are.
        found: usize,
        /// How many there must be.
        expected: &'static str,
    },
    /// Bytes after the last section.
    #[error("{bytes} bytes are left over after its last section")]
    Leftover {
        /// How many.
        bytes: usize,
    },
    /// A list of a length that it cannot have.
    #[error("`{field}` has {found} entries, which no machine has")]
    Length {
        /// Which list.
        field: &'static str,
        /// Its length.
        found: usize,
    },
}

/// Encodes a machine's state as the contents of `state.bin`. State that [`decode`] would refuse is refused here.
pub fn encode(state: &MachineState) -> Result<Vec<u8>, StateError> {
    let MachineState { vcpus, vm, devices } = state;
    check(state)?;
    let mut out = Vec::with_capacity(16 * 1024 * (vcpus.len() + 1));
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&FORMAT.to_le_bytes());
    out.extend_from_slice(&(vcpus.len() as u32 + 2).to_le_bytes());
    for vcpu in vcpus {
        put(&mut out, VCPU, vcpu);
    }
    put(&mut out, VM, vm);
    put(&mut out, DEVICES, devices);
    Ok(out)
}

fn put<T: Serialize>(out: &mut Vec<u8>, kind: Kind, body: &T) {
    let at = out.len();
    out.extend_from_slice(&kind.name);
    out.extend_from_slice(&kind.version.to_le_bytes());
    out.extend_from_slice(&[0; SECTION_HEADER - 8]);
    *out = postcard::to_extend(body, std::mem::take(out)).expect("memory is the only limit of this encoding");
    let len = (out.len() - at - SECTION_HEADER) as u64;
    out[at + 8..at + 16].copy_from_slice(&len.to_le_bytes());
    let digest = section_digest(&out[at..at + 16], &out[at + SECTION_HEADER..]);
    out[at + 16..at + SECTION_HEADER].copy_from_slice(&digest);
}

fn section_digest(head: &[u8], body: &[u8]) -> [u8; 32] {
    *blake3::Hasher::new().update(head).update(body).finalize().as_bytes()
}

/// Decodes the contents of a `state.bin`.
pub fn decode(bytes: &[u8]) -> Result<MachineState, StateError> {
    let (header, mut rest) = bytes.split_first_chunk::<FILE_HEADER>().ok_or(StateError::Magic)?;
    let (magic, numbers) = header.split_at(8);
    if magic != MAGIC {
        return Err(StateError::Magic);
    }
    let format = le32(&numbers[0..4]);
    if format != FORMAT {
        return Err(StateError::Format { found: format, supported: FORMAT });
    }
    let (mut vcpus, mut vms, mut devices) = (Vec::new(), Vec::new(), Vec::new());
    for number in 0..le32(&numbers[4..8]) {
        let section = Section::take(number, &mut rest)?;
        match &section.kind {
            b"vcpu" => vcpus.push(section.decode::<VcpuState>(VCPU)?),
            b"vm  " => vms.push(section.decode::<VmState>(VM)?),
            b"devs" => devices.push(section.decode::<DeviceState>(DEVICES)?),
            _ => return Err(StateError::UnknownKind { section: number, kind: section.kind_name() }),
        }
    }
    if !rest.is_empty() {
        return Err(StateError::Leftover { bytes: rest.len() });
    }
    if vcpus.is_empty() {
        return Err(StateError::Count { kind: name(&VCPU.name), found: 0, expected: "one per vCPU" });
    }
    let state = MachineState { vcpus, vm: only(VM, vms)?, devices: only(DEVICES, devices)? };
    check(&state)?;
    Ok(state)
}

fn only<T>(kind: Kind, mut found: Vec<T>) -> Result<T, StateError> {
    match (found.pop(), found.len()) {
        (Some(one), 0) => Ok(one),
        (last, others) => Err(StateError::Count {
            kind: name(&kind.name),
            found: others + usize::from(last.is_some()),
            expected: "one",
        }),
    }
}

/// A section as it lies in the file.
struct Section<'b> {
    number: u32,
    kind: [u8; 4],
    version: u32,
    body: &'b [u8],
    intact: bool,
}

impl<'b> Section<'b> {
    /// Takes the next section off `rest`.
    fn take(number: u32, rest: &mut &'b [u8]) -> Result<Section<'b>, StateError> {
        let truncated = StateError::Truncated { section: number };
        let (header, after) = rest.split_first_chunk::<SECTION_HEADER>().ok_or(truncated.clone())?;
        let [k0, k1, k2, k3, ..] = *header;
        let len = u64::from_le_bytes(header[8..16].try_into().expect("8 bytes"));
        let body = usize::try_from(len).ok().and_then(|len| after.get(..len)).ok_or(truncated)?;
        *rest = &after[body.len()..];
        let intact = section_digest(&header[..16], body) == header[16..];
        Ok(Section { number, kind: [k0, k1, k2, k3], version: le32(&header[4..8]), body, intact })
    }

    fn decode<T: DeserializeOwned>(&self, kind: Kind) -> Result<T, StateError> {
        let Kind { name: _, version: supported } = kind;
        if self.version != supported {
            return Err(StateError::UnknownVersion { kind: self.kind_name(), found: self.version, supported });
        }
        if !self.intact {
            return Err(StateError::Digest { section: self.number, kind: self.kind_name() });
        }
        match postcard::take_from_bytes(self.body) {
            Ok((value, [])) => Ok(value),
            _ => Err(StateError::Body { section: self.number, kind: self.kind_name() }),
        }
    }

    fn kind_name(&self) -> String {
        name(&self.kind)
    }
}

/// Checks the lengths of lists. What they hold is for KVM and the devices to judge.
fn check(state: &MachineState) -> Result<(), StateError> {
    let MachineState { vcpus, vm, devices } = state;
    for VcpuState { xsave, lapic, xcrs, msrs, cpuid, .. } in vcpus {
        ensure("vcpu.xsave", xsave.len(), XSAVE_BYTES.contains(&xsave.len()))?;
        ensure("vcpu.lapic", lapic.len(), lapic.len() == LAPIC_BYTES)?;
        for (field, len) in [("vcpu.xcrs", xcrs.len()), ("vcpu.msrs", msrs.len()), ("vcpu.cpuid", cpuid.len())] {
            ensure(field, len, len <= MAX_ENTRIES)?;
        }
    }
    ensure("vm.irqchips", vm.irqchips.len(), vm.irqchips.len() <= 16)?;
    for IrqchipState { chip_id: _, chip } in &vm.irqchips {
        ensure("vm.irqchips.chip", chip.len(), chip.len() == IRQCHIP_BYTES)?;
    }
    let DeviceState { serial, vsock, drives, network, entropy, balloon } = devices;
    ensure("devices.serial.in_buffer", serial.in_buffer.len(), serial.in_buffer.len() <= MAX_ENTRIES)?;
    if let Some(vsock) = vsock {
        ensure("devices.vsock.transport.queues", vsock.transport.queues.len(), vsock.transport.queues.len() <= 64)?;
    }
    ensure("devices.drives", drives.len(), drives.len() <= 32)?;
    for DriveState { drive_id, transport, pending: _ } in drives {
        ensure("devices.drives.drive_id", drive_id.len(), drive_id.len() <= 64)?;
        ensure("devices.drives.transport.queues", transport.queues.len(), transport.queues.len() <= 64)?;
    }
    if let Some(BalloonState { transport, statistics, .. }) = balloon {
        ensure("devices.balloon.transport.queues", transport.queues.len(), transport.queues.len() <= 64)?;
        ensure("devices.balloon.statistics", statistics.len(), statistics.len() <= 64)?;
    }
    ensure("devices.network", network.len(), network.len() <= 32)?;
    for NetState { iface_id, mac: _, transport } in network {
        ensure("devices.network.iface_id", iface_id.len(), iface_id.len() <= 64)?;
        ensure("devices.network.transport.queues", transport.queues.len(), transport.queues.len() <= 64)?;
    }
    if let Some(entropy) = entropy {
        let queues = entropy.transport.queues.len();
        ensure("devices.entropy.transport.queues", queues, queues <= 64)?;
    }
    Ok(())
}

fn ensure(field: &'static str, found: usize, holds: bool) -> Result<(), StateError> {
    if holds { Ok(()) } else { Err(StateError::Length { field, found }) }
}

fn name(kind: &[u8; 4]) -> String {
    kind.escape_ascii().to_string().trim_end().to_owned()
}

fn le32(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(bytes.try_into().expect("4 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{CpuidEntry, Msr, PitState};
    use proptest::prelude::*;

    fn state() -> MachineState {
        let mut state = MachineState::blank(2);
        state.vcpus[1].regs.rip = u64::MAX;
        state.vcpus[1].msrs = vec![Msr { index: 0x10, data: 1 << 40 }; 3];
        state.vm.irqchips = vec![IrqchipState { chip_id: 2, chip: vec![5; 512] }];
        state
    }

    /// A file of these sections, each with a right digest.
    fn file_of(sections: &[(&[u8; 4], u32, &[u8])]) -> Vec<u8> {
        let mut out = [MAGIC.as_slice(), &FORMAT.to_le_bytes(), &(sections.len() as u32).to_le_bytes()].concat();
        for (kind, version, body) in sections {
            let head = [kind.as_slice(), &version.to_le_bytes(), &(body.len() as u64).to_le_bytes()].concat();
            out.extend_from_slice(&head);
            out.extend_from_slice(&section_digest(&head, body));
            out.extend_from_slice(body);
        }
        out
    }

    fn bodies() -> [Vec<u8>; 3] {
        let state = state();
        [
            postcard::to_allocvec(&state.vcpus[1]).unwrap(),
            postcard::to_allocvec(&state.vm).unwrap(),
            postcard::to_allocvec(&state.devices).unwrap(),
        ]
    }

    #[test]
    fn state_comes_back() {
        let bytes = encode(&state()).unwrap();
        assert_eq!(decode(&bytes).unwrap(), state());
        let [vcpu, vm, devices] = bodies();
        decode(&file_of(&[(b"vcpu", 1, &vcpu), (b"vm  ", 1, &vm), (b"devs", 1, &devices)])).unwrap();
    }

    #[test]
    fn an_unknown_section_or_version_is_refused_by_name() {
        let [vcpu, vm, devices] = bodies();
        let unknown = file_of(&[(b"vcpu", 1, &vcpu), (b"vm  ", 1, &vm), (b"devs", 1, &devices), (b"gpu ", 1, b"")]);
        assert_eq!(decode(&unknown), Err(StateError::UnknownKind { section: 3, kind: "gpu".into() }));
        let newer = file_of(&[(b"vcpu", 1, &vcpu), (b"vm  ", 2, &vm), (b"devs", 1, &devices)]);
        let refused = StateError::UnknownVersion { kind: "vm".into(), found: 2, supported: 1 };
        assert_eq!(decode(&newer), Err(refused));
        let mut other_layout = encode(&state()).unwrap();
        other_layout[8] = 2;
        assert_eq!(decode(&other_layout), Err(StateError::Format { found: 2, supported: 1 }));
        other_layout[0] ^= 1;
        assert_eq!(decode(&other_layout), Err(StateError::Magic));
    }

    #[test]
    fn a_section_that_is_absent_or_repeated_is_refused() {
        let [vcpu, vm, devices] = bodies();
        let (vcpu, vm, devices) = ((b"vcpu", 1, &vcpu[..]), (b"vm  ", 1, &vm[..]), (b"devs", 1, &devices[..]));
        for (sections, kind, found) in [
            (&[vm, devices][..], "vcpu", 0),
            (&[vcpu, devices], "vm", 0),
            (&[vcpu, vm], "devs", 0),
            (&[vcpu, vm, vm, devices], "vm", 2),
            (&[devices, vcpu, vm, devices], "devs", 2),
        ] {
            match decode(&file_of(sections)) {
                Err(StateError::Count { kind: named, found: counted, .. }) => {
                    assert_eq!((named.as_str(), counted), (kind, found))
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn bytes_left_over_are_refused() {
        let [vcpu, vm, mut devices] = bodies();
        let mut bytes = encode(&state()).unwrap();
        bytes.push(0);
        assert_eq!(decode(&bytes), Err(StateError::Leftover { bytes: 1 }));
        devices.push(0);
        let inside = file_of(&[(b"vcpu", 1, &vcpu), (b"vm  ", 1, &vm), (b"devs", 1, &devices)]);
        assert_eq!(decode(&inside), Err(StateError::Body { section: 2, kind: "devs".into() }));
    }

    #[test]
    fn a_file_cut_short_anywhere_is_refused() {
        let bytes = encode(&state()).unwrap();
        for len in 0..bytes.len() {
            let refused = decode(&bytes[..len]).unwrap_err();
            assert!(matches!(refused, StateError::Magic | StateError::Truncated { .. }), "{len}: {refused}");
        }
    }

    #[test]
    fn a_length_beyond_the_file_is_refused_before_anything_is_allocated() {
        let mut bytes = encode(&state()).unwrap();
        bytes[FILE_HEADER + 8..FILE_HEADER + 16].copy_from_slice(&u64::MAX.to_le_bytes());
        assert_eq!(decode(&bytes), Err(StateError::Truncated { section: 0 }));
        let many = [MAGIC.as_slice(), &FORMAT.to_le_bytes(), &u32::MAX.to_le_bytes()].concat();
        assert_eq!(decode(&many), Err(StateError::Truncated { section: 0 }));
    }

    #[test]
    fn lists_of_impossible_length_are_refused() {
        type Spoil = fn(&mut MachineState);
        let cases: [(&str, Spoil); 16] = [
            ("vcpu.xsave", |s| s.vcpus[0].xsave.truncate(4095)),
            ("vcpu.xsave", |s| s.vcpus[0].xsave.resize(65537, 0)),
            ("vcpu.lapic", |s| s.vcpus[1].lapic.push(0)),
            ("vcpu.msrs", |s| s.vcpus[1].msrs.resize(4097, Msr::default())),
            ("vcpu.cpuid", |s| s.vcpus[1].cpuid.resize(4097, CpuidEntry::default())),
            ("vm.irqchips", |s| s.vm.irqchips.resize(17, s.vm.irqchips[0].clone())),
            ("vm.irqchips.chip", |s| s.vm.irqchips[0].chip.truncate(511)),
            ("devices.serial.in_buffer", |s| s.devices.serial.in_buffer.resize(4097, 0)),
            ("devices.balloon.statistics", |s| s.devices.balloon.get_or_insert_default().statistics.resize(65, (0, 0))),
            ("devices.drives", |s| s.devices.drives.resize(33, Default::default())),
            ("devices.drives.drive_id", |s| {
                s.devices.drives.push(DriveState { drive_id: "x".repeat(65), ..Default::default() })
            }),
            ("devices.drives.transport.queues", |s| {
                let mut drive = DriveState::default();
                drive.transport.queues.resize(65, Default::default());
                s.devices.drives.push(drive);
            }),
            ("devices.network", |s| s.devices.network.resize(33, Default::default())),
            ("devices.network.iface_id", |s| {
                s.devices.network.push(NetState { iface_id: "x".repeat(65), ..Default::default() })
            }),
            ("devices.network.transport.queues", |s| {
                s.devices.network.push(Default::default());
                s.devices.network[0].transport.queues.resize(65, Default::default())
            }),
            ("devices.entropy.transport.queues", |s| {
                s.devices.entropy.get_or_insert_default().transport.queues.resize(65, Default::default())
            }),
        ];
        for (field, spoil) in cases {
            let mut state = state();
            spoil(&mut state);
            match encode(&state) {
                Err(StateError::Length { field: named, .. }) => assert_eq!(named, field),
                other => panic!("{field}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_saved_vcpu_is_small() {
        let len = encode(&MachineState::blank(1)).unwrap().len();
        assert!(len < 8 * 1024, "{len} bytes");
    }

    /// A failure here means that stored snapshots can no longer be read: read docs/snapshot-versioning.md.
    #[test]
    fn the_bytes_of_version_1_are_pinned() {
        let digest = |bytes: &[u8]| blake3::hash(bytes).to_hex()[..16].to_owned();
        let mut state = state();
        state.vm.pit = PitState { flags: 3, ..PitState::default() };
        state.devices.vsock = Some(Default::default());
        state.devices.drives = vec![Default::default()];
        state.devices.network = vec![Default::default()];
        state.devices.balloon = Some(Default::default());
        state.devices.entropy = Some(Default::default());
        assert_eq!(digest(&encode(&state).unwrap()), "2c318b6332a9c405");
    }

    proptest! {
        #[test]
        fn no_bytes_make_decoding_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(decode(&bytes).is_err());
            prop_assert!(decode(&file_of(&[(b"vcpu", 1, &bytes)])).is_err());
        }

        #[test]
        fn a_damaged_body_with_a_right_digest_does_no_harm(at: prop::sample::Index, to: u8) {
            let [mut vcpu, vm, devices] = bodies();
            let at = at.index(vcpu.len());
            vcpu[at] = to;
            let file = file_of(&[(b"vcpu", 1, &vcpu), (b"vm  ", 1, &vm), (b"devs", 1, &devices)]);
            if let Ok(state) = decode(&file) {
                encode(&state).unwrap();
            }
        }
    }
}
