//! `state.bin`, as whoever restores reads it.
//!
//! An input that begins as a state file does is one; it is read as it is, and with the digests of its sections set right. Any
//! other is the body of one section, which its first byte names, of a file that is right besides.

use snapshot::state::{
    BalloonState, DriveState, IrqchipState, MachineState, Msr, NetState, StateError, decode, encode,
};

const MAGIC: &[u8] = b"coppice\n";
/// Bytes before the first section.
const FILE_HEADER: usize = 16;
/// Bytes of a section before its body: 16 that its digest covers, and that.
const SECTION_HEADER: usize = 48;
/// Kinds of sections, in the order in which they are written for a machine with one vCPU.
const KINDS: [&[u8; 4]; 3] = [b"vcpu", b"vm  ", b"devs"];

/// Reads a state file.
pub fn check(data: &[u8]) {
    if data.starts_with(MAGIC) {
        accepted(decode(data));
        accepted(decode(&resealed(data)));
    } else if let [which, body @ ..] = data {
        let which = usize::from(*which) % KINDS.len();
        let mut bodies = bodies(&MachineState::blank(1));
        bodies[which] = body.to_vec();
        accepted(decode(&file_of(&bodies)));
    }
}

/// What is accepted can be written, and comes back.
fn accepted(decoded: Result<MachineState, StateError>) {
    match decoded {
        Ok(state) => {
            let bytes = encode(&state).expect("what was accepted can be written");
            assert_eq!(decode(&bytes).as_ref(), Ok(&state), "what was accepted comes back");
            assert_eq!(encode(&state).as_deref(), Ok(&bytes[..]), "writing is repeatable");
        }
        Err(error) => assert!(error.to_string().len() < 1000, "a message is one for people"),
    }
}

/// The file with the digest of every section set right, as far as it has sections.
fn resealed(data: &[u8]) -> Vec<u8> {
    let mut file = data.to_vec();
    let mut rest = file.get_mut(FILE_HEADER..).unwrap_or_default();
    while let Some((header, after)) = rest.split_first_chunk_mut::<SECTION_HEADER>() {
        let len = header[8..16].iter().rev().fold(0, |len, byte| len << 8 | u64::from(*byte));
        let Some((body, next)) = usize::try_from(len).ok().and_then(|len| after.split_at_mut_checked(len)) else {
            break;
        };
        let digest = blake3::Hasher::new().update(&header[..16]).update(body).finalize();
        header[16..].copy_from_slice(digest.as_bytes());
        rest = next;
    }
    file
}

/// A file of a machine with one vCPU, of these bodies.
fn file_of(bodies: &[Vec<u8>; 3]) -> Vec<u8> {
    let mut file = [MAGIC, &1u32.to_le_bytes(), &3u32.to_le_bytes()].concat();
    for (kind, body) in KINDS.iter().zip(bodies) {
        file.extend_from_slice(*kind);
        file.extend_from_slice(&1u32.to_le_bytes());
        file.extend_from_slice(&(body.len() as u64).to_le_bytes());
        file.extend_from_slice(&[0; 32]);
        file.extend_from_slice(body);
    }
    resealed(&file)
}

/// The bodies of the sections of a machine with one vCPU.
fn bodies(state: &MachineState) -> [Vec<u8>; 3] {
    let encoded = [
        postcard::to_allocvec(&state.vcpus[0]),
        postcard::to_allocvec(&state.vm),
        postcard::to_allocvec(&state.devices),
    ];
    encoded.map(|body| body.expect("plain data can be encoded"))
}

/// A machine with one of everything.
fn state() -> MachineState {
    let mut state = MachineState::blank(1);
    state.vcpus[0].msrs = vec![Msr { index: 0x10, data: 1 << 40 }; 3];
    state.vm.irqchips = vec![IrqchipState { chip_id: 2, chip: vec![5; 512] }];
    state.devices.serial.in_buffer = vec![b'x'; 3];
    state.devices.vsock = Some(Default::default());
    state.devices.drives = vec![DriveState { drive_id: "root".into(), ..Default::default() }];
    state.devices.drives[0].transport.queues = vec![Default::default(); 2];
    state.devices.network = vec![NetState { iface_id: "eth0".into(), ..Default::default() }];
    state.devices.entropy = Some(Default::default());
    state.devices.balloon = Some(BalloonState { statistics: vec![(1, 2)], ..Default::default() });
    state
}

/// Whole files, and each body of one.
pub fn seeds() -> Vec<Vec<u8>> {
    let state = state();
    let whole = encode(&state).expect("this state can be written");
    let blank = encode(&MachineState::blank(2)).expect("that of no machine can be written");
    let body = |(which, body): (usize, Vec<u8>)| [vec![which as u8], body].concat();
    let bodies = bodies(&state).into_iter().enumerate().map(body);
    [whole, blank].into_iter().chain(bodies).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_made_as_the_format_has_it() {
        assert_eq!(file_of(&bodies(&state())), encode(&state()).unwrap());
    }

    #[test]
    fn digests_are_set_right() {
        let mut file = encode(&state()).unwrap();
        let at = file.len() - 1;
        file[at] ^= 0x40;
        assert!(matches!(decode(&file), Err(StateError::Digest { .. })));
        assert!(!matches!(decode(&resealed(&file)), Err(StateError::Digest { .. })));
    }
}
