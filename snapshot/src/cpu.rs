//! What a guest may use of a CPU, by what CPUID says: features by name, and how long an XSAVE area is and what lies where in
//! it. Pure.

use crate::manifest::BadField;
use crate::state::{CpuidEntry, MachineState};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Leaf that describes the XSAVE area: 0 the whole, 1 the instructions, from 2 on a component each.
const XSAVE: u32 = 0xd;
/// Legacy part and header of an XSAVE area, in bytes.
const XSAVE_LEAST: u64 = 576;
/// The first leaf of the extended ones. It and leaf 0 say in EAX which is the last of their kind.
const EXTENDED: u32 = 0x8000_0000;
/// Most features that a manifest names.
const MAX_FEATURES: usize = 1024;
/// Longest name of a feature, in bytes.
const MAX_NAME: usize = 64;

/// A register of a leaf.
#[derive(Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Register::{Eax, Ebx, Ecx, Edx};

impl Register {
    fn of(self, leaf: &CpuidEntry) -> u32 {
        match self {
            Eax => leaf.eax,
            Ebx => leaf.ebx,
            Ecx => leaf.ecx,
            Edx => leaf.edx,
        }
    }
}

/// A word of feature bits: leaf, index, register, and the names of the bits that count.
type Word = (u32, u32, Register, &'static [(u32, &'static str)]);

/// The bits by which a CPU offers an instruction, a register or a mode that a guest cannot do without once it has begun to use
/// it, named as Linux names them in /proc/cpuinfo.
///
/// A bit is left out if KVM may set it whatever the CPU says, since then a host lacks it that gave it to the guest: those that
/// KVM emulates (`x2apic`, `tsc_deadline_timer`, `tsc_adjust`, `umip`, `arat`, machine checks, memory types, pages of 1 GiB,
/// counters), makes up (`hypervisor`, `arch_capabilities`, mitigations of speculation) or copies from a control register
/// (`osxsave`, `ospke`, `apic`). So is a bit that only says that something is fast (`erms`, `fsrm`), and one that describes the
/// topology.
const WORDS: &[Word] = &[
    (
        0x1,
        0,
        Ecx,
        &[
            (0, "pni"),
            (1, "pclmulqdq"),
            (9, "ssse3"),
            (12, "fma"),
            (13, "cx16"),
            (17, "pcid"),
            (19, "sse4_1"),
            (20, "sse4_2"),
            (22, "movbe"),
            (23, "popcnt"),
            (25, "aes"),
            (26, "xsave"),
            (28, "avx"),
            (29, "f16c"),
            (30, "rdrand"),
        ],
    ),
    (
        0x1,
        0,
        Edx,
        &[
            (0, "fpu"),
            (1, "vme"),
            (2, "de"),
            (3, "pse"),
            (4, "tsc"),
            (5, "msr"),
            (6, "pae"),
            (8, "cx8"),
            (11, "sep"),
            (13, "pge"),
            (15, "cmov"),
            (16, "pat"),
            (17, "pse36"),
            (19, "clflush"),
            (23, "mmx"),
            (24, "fxsr"),
            (25, "sse"),
            (26, "sse2"),
        ],
    ),
    (
        0x7,
        0,
        Ebx,
        &[
            (0, "fsgsbase"),
            (3, "bmi1"),
            (4, "hle"),
            (5, "avx2"),
            (7, "smep"),
            (8, "bmi2"),
            (10, "invpcid"),
            (11, "rtm"),
            (14, "mpx"),
            (16, "avx512f"),
            (17, "avx512dq"),
            (18, "rdseed"),
            (19, "adx"),
            (20, "smap"),
            (21, "avx512ifma"),
            (23, "clflushopt"),
            (24, "clwb"),
            (26, "avx512pf"),
            (27, "avx512er"),
            (28, "avx512cd"),
            (29, "sha_ni"),
            (30, "avx512bw"),
            (31, "avx512vl"),
        ],
    ),
    (
        0x7,
        0,
        Ecx,
        &[
            (1, "avx512vbmi"),
            (3, "pku"),
            (5, "waitpkg"),
            (6, "avx512_vbmi2"),
            (7, "shstk"),
            (8, "gfni"),
            (9, "vaes"),
            (10, "vpclmulqdq"),
            (11, "avx512_vnni"),
            (12, "avx512_bitalg"),
            (14, "avx512_vpopcntdq"),
            (16, "la57"),
            (22, "rdpid"),
            (25, "cldemote"),
            (27, "movdiri"),
            (28, "movdir64b"),
            (29, "enqcmd"),
        ],
    ),
    (
        0x7,
        0,
        Edx,
        &[
            (2, "avx512_4vnniw"),
            (3, "avx512_4fmaps"),
            (8, "avx512_vp2intersect"),
            (14, "serialize"),
            (16, "tsxldtrk"),
            (20, "ibt"),
            (22, "amx_bf16"),
            (23, "avx512_fp16"),
            (24, "amx_tile"),
            (25, "amx_int8"),
        ],
    ),
    (
        0x7,
        1,
        Eax,
        &[
            (0, "sha512"),
            (1, "sm3"),
            (2, "sm4"),
            (4, "avx_vnni"),
            (5, "avx512_bf16"),
            (7, "cmpccxadd"),
            (17, "fred"),
            (18, "lkgs"),
            (19, "wrmsrns"),
            (21, "amx_fp16"),
            (23, "avx_ifma"),
            (26, "lam"),
            (31, "movrs"),
        ],
    ),
    (
        0x7,
        1,
        Edx,
        &[
            (4, "avx_vnni_int8"),
            (5, "avx_ne_convert"),
            (8, "amx_complex"),
            (10, "avx_vnni_int16"),
            (14, "prefetchi"),
            (19, "avx10"),
            (21, "apx_f"),
        ],
    ),
    (
        XSAVE,
        0,
        Eax,
        &[
            (0, "xstate_x87"),
            (1, "xstate_sse"),
            (2, "xstate_avx"),
            (3, "xstate_bndregs"),
            (4, "xstate_bndcsr"),
            (5, "xstate_opmask"),
            (6, "xstate_zmm_hi256"),
            (7, "xstate_hi16_zmm"),
            (9, "xstate_pkru"),
            (17, "xstate_xtilecfg"),
            (18, "xstate_xtiledata"),
            (19, "xstate_apx"),
        ],
    ),
    (XSAVE, 1, Eax, &[(0, "xsaveopt"), (1, "xsavec"), (2, "xgetbv1"), (3, "xsaves"), (4, "xfd")]),
    (XSAVE, 1, Ecx, &[(11, "xstate_cet_user"), (12, "xstate_cet_kernel")]),
    (
        0x8000_0001,
        0,
        Ecx,
        &[
            (0, "lahf_lm"),
            (4, "cr8_legacy"),
            (5, "abm"),
            (6, "sse4a"),
            (7, "misalignsse"),
            (8, "3dnowprefetch"),
            (11, "xop"),
            (15, "lwp"),
            (16, "fma4"),
            (21, "tbm"),
        ],
    ),
    (
        0x8000_0001,
        0,
        Edx,
        &[
            (11, "syscall"),
            (20, "nx"),
            (22, "mmxext"),
            (25, "fxsr_opt"),
            (27, "rdtscp"),
            (29, "lm"),
            (30, "3dnowext"),
            (31, "3dnow"),
        ],
    ),
    (0x8000_0008, 0, Ebx, &[(0, "clzero"), (2, "xsaveerptr"), (4, "rdpru"), (9, "wbnoinvd")]),
];

/// The named features that these leaves offer, in order of their names. Leaves may be those of several vCPUs.
pub fn features(cpuid: &[CpuidEntry]) -> BTreeSet<&'static str> {
    let mut found = BTreeSet::new();
    for &(function, index, register, names) in WORDS {
        let word = cpuid.iter().filter(|leaf| (leaf.function, leaf.index) == (function, index));
        let bits = word.fold(0, |bits, leaf| bits | register.of(leaf));
        found.extend(names.iter().filter(|(bit, _)| bits >> bit & 1 == 1).map(|(_, name)| name));
    }
    found
}

/// Whether this is the name of a feature.
fn is_known(name: &str) -> bool {
    WORDS.iter().any(|(.., names)| names.iter().any(|(_, known)| *known == name))
}

/// A component of an XSAVE area.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Component {
    /// Its bit in XCR0.
    pub bit: u32,
    /// Its size, in bytes.
    pub bytes: u32,
    /// Where it lies in an area of the standard form, in bytes.
    pub offset: u32,
}

/// The components, from the third on, of the XSAVE area that these leaves describe.
pub(crate) fn components(cpuid: &[CpuidEntry]) -> BTreeSet<Component> {
    let xsave = || cpuid.iter().filter(|leaf| leaf.function == XSAVE);
    let offered = xsave().filter(|leaf| leaf.index == 0).fold(0, |bits, leaf| bits | xfeatures(leaf));
    xsave()
        .filter(|leaf| (2..64).contains(&leaf.index) && offered >> leaf.index & 1 == 1)
        .map(|leaf| Component { bit: leaf.index, bytes: leaf.eax, offset: leaf.ebx })
        .collect()
}

/// The features of XSAVE that its leaf 0 offers.
fn xfeatures(leaf: &CpuidEntry) -> u64 {
    u64::from(leaf.edx) << 32 | u64::from(leaf.eax)
}

/// Length of an XSAVE area of the standard form with all that these leaves offer, in bytes.
pub fn xsave_bytes(cpuid: &[CpuidEntry]) -> u64 {
    let end = |c: Component| u64::from(c.offset) + u64::from(c.bytes);
    components(cpuid).into_iter().map(end).max().unwrap_or(0).max(XSAVE_LEAST)
}

/// The vendors that these leaves name, fit to print.
pub(crate) fn vendors(cpuid: &[CpuidEntry]) -> BTreeSet<String> {
    let name = |leaf: &CpuidEntry| {
        let bytes = [leaf.ebx, leaf.edx, leaf.ecx].into_iter().flat_map(u32::to_le_bytes);
        bytes.take_while(|byte| *byte != 0).flat_map(std::ascii::escape_default).map(char::from).collect()
    };
    let leaves = cpuid.iter().filter(|leaf| leaf.function == 0);
    leaves.map(name).filter(|name: &String| !name.is_empty()).collect()
}

/// Asks a CPU for all leaves that are looked at here. `ask` gets a leaf and an index, and answers with EAX, EBX, ECX and EDX.
pub fn read(ask: impl Fn(u32, u32) -> [u32; 4]) -> Vec<CpuidEntry> {
    let leaf = |function, index| {
        let [eax, ebx, ecx, edx] = ask(function, index);
        CpuidEntry { function, index, flags: 0, eax, ebx, ecx, edx }
    };
    let mut cpuid = vec![leaf(0, 0)];
    // Beyond its last leaf a CPU may say anything.
    let last = [cpuid[0].eax, ask(EXTENDED, 0)[0]];
    for &(function, index, ..) in WORDS {
        let there = function <= last[usize::from(function >= EXTENDED)];
        if there && !cpuid.iter().any(|other| (other.function, other.index) == (function, index)) {
            cpuid.push(leaf(function, index));
        }
    }
    let offered = cpuid.iter().find(|leaf| (leaf.function, leaf.index) == (XSAVE, 0)).map_or(0, xfeatures);
    cpuid.extend((2..64).filter(|bit| offered >> bit & 1 == 1).map(|bit| leaf(XSAVE, bit)));
    cpuid
}

/// The CPUID leaves of all vCPUs of a machine.
pub(crate) fn guest_leaves(state: &MachineState) -> Vec<CpuidEntry> {
    state.vcpus.iter().flat_map(|vcpu| vcpu.cpuid.iter().copied()).collect()
}

/// The CPU as a guest saw it, for people to read and for tools to choose a host by. What counts is the CPUID in the state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestCpu {
    /// Features that it was offered, named as in /proc/cpuinfo, in order of their names.
    pub features: Vec<String>,
    /// Length of its XSAVE area, in bytes.
    pub xsave_bytes: u64,
    /// Frequency of its time-stamp counter, in kHz; 0 if the host did not tell.
    pub tsc_khz: u32,
}

impl GuestCpu {
    /// That of a machine, if its state has any CPUID.
    pub fn of(state: &MachineState) -> Option<GuestCpu> {
        let cpuid = guest_leaves(state);
        (!cpuid.is_empty()).then(|| GuestCpu {
            features: features(&cpuid).into_iter().map(str::to_owned).collect(),
            xsave_bytes: xsave_bytes(&cpuid),
            tsc_khz: tsc_khz(state),
        })
    }

    /// Checks what can be checked without the state.
    pub(crate) fn check(&self) -> Result<(), BadField> {
        let GuestCpu { features, xsave_bytes: _, tsc_khz: _ } = self;
        let plain = |name: &String| {
            let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
            (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(plain)
        };
        if features.len() > MAX_FEATURES || !features.iter().all(plain) || !features.is_sorted_by(|a, b| a < b) {
            let problem = format!(
                "must be at most {MAX_FEATURES} names of 1 to {MAX_NAME} lower-case letters, digits and `_`, in order"
            );
            return Err(BadField::new("guest_cpu.features", problem));
        }
        Ok(())
    }

    /// What it claims that the state says otherwise, if there is such a thing. Another program may have named fewer features, or
    /// more than are known here; but none that is known here and that the guest was not offered.
    pub(crate) fn contradiction(&self, state: &MachineState) -> Option<String> {
        let cpuid = guest_leaves(state);
        let offered = features(&cpuid);
        let claimed = self.features.iter().find(|name| is_known(name) && !offered.contains(name.as_str()));
        let (xsave, khz) = (xsave_bytes(&cpuid), tsc_khz(state));
        if let Some(name) = claimed {
            return Some(format!("features has {name}, which no vCPU was offered"));
        }
        if self.xsave_bytes != xsave {
            return Some(format!("xsave_bytes is {}, not {xsave}", self.xsave_bytes));
        }
        (self.tsc_khz != khz).then(|| format!("tsc_khz is {}, not {khz}", self.tsc_khz))
    }
}

/// Frequency of the first vCPU's time-stamp counter, in kHz.
fn tsc_khz(state: &MachineState) -> u32 {
    state.vcpus.first().map_or(0, |vcpu| vcpu.tsc_khz)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidEntry {
        CpuidEntry { function, index, flags: 0, eax, ebx, ecx, edx }
    }

    /// A leaf for each word, with some bits set.
    fn any_cpuid() -> impl Strategy<Value = Vec<CpuidEntry>> {
        prop::collection::vec(any::<[u32; 4]>(), WORDS.len()).prop_map(|registers| {
            let words = WORDS.iter().zip(registers);
            words.map(|((function, index, ..), registers)| leaf(*function, *index, registers)).collect()
        })
    }

    #[test]
    fn every_name_is_plain_and_stands_for_one_bit() {
        let names: Vec<&str> = WORDS.iter().flat_map(|(.., names)| names.iter().map(|(_, name)| *name)).collect();
        let all = WORDS.iter().map(|(function, index, ..)| leaf(*function, *index, [!0; 4])).collect::<Vec<_>>();
        assert_eq!(features(&all).len(), names.len(), "each once");
        let listed =
            GuestCpu { features: features(&all).into_iter().map(str::to_owned).collect(), ..GuestCpu::default() };
        listed.check().unwrap();
        for (.., bits) in WORDS {
            assert!(bits.windows(2).all(|pair| pair[0].0 < pair[1].0) && bits.iter().all(|(bit, _)| *bit < 32));
        }
    }

    #[test]
    fn what_kvm_makes_up_is_no_feature() {
        // x2apic, deadline timer, osxsave, hypervisor; tsc_adjust, erms; umip, ospke; arch_capabilities; pages of 1 GiB.
        let made_up = [
            leaf(0x1, 0, [0, !0, 1 << 21 | 1 << 24 | 1 << 27 | 1 << 31, 1 << 7 | 1 << 9 | 1 << 12 | 1 << 14 | 1 << 28]),
            leaf(0x7, 0, [0, 1 << 1 | 1 << 9, 1 << 2 | 1 << 4, 1 << 26 | 1 << 27 | 1 << 29 | 1 << 31]),
            leaf(0x8000_0001, 0, [0, 0, 1 << 22 | 1 << 23, 1 << 26]),
            leaf(0x6, 0, [!0; 4]),
            leaf(0x4000_0001, 0, [!0; 4]),
        ];
        assert_eq!(features(&made_up), BTreeSet::new());
    }

    #[test]
    fn a_cpu_is_asked_only_for_leaves_that_it_has() {
        let asked = std::cell::RefCell::new(Vec::new());
        let answers = |last: u32, last_extended: u32| {
            asked.borrow_mut().clear();
            read(|function, index| {
                asked.borrow_mut().push((function, index));
                match (function, index) {
                    (0, _) => [last, 0, 0, 0],
                    (EXTENDED, _) => [last_extended, 0, 0, 0],
                    (XSAVE, 0) => [0b1000_0111, 0, 0, 1],
                    _ => [!0; 4],
                }
            })
        };
        let old = answers(1, 0);
        assert_eq!(*asked.borrow(), [(0, 0), (EXTENDED, 0), (1, 0)]);
        assert!(features(&old).contains("avx") && !features(&old).contains("avx2"));
        let new = answers(0xd, 0x8000_0008);
        assert!(features(&new).contains("wbnoinvd") && features(&new).contains("avx512f"));
        let parts: Vec<u32> = components(&new).into_iter().map(|component| component.bit).collect();
        assert_eq!(parts, [2, 7, 32], "those that leaf 0 offers");
        let mut once = asked.borrow().clone();
        once.sort_unstable();
        once.dedup();
        assert_eq!(once.len(), asked.borrow().len());
    }

    #[test]
    fn an_area_ends_where_its_last_component_does() {
        assert_eq!(xsave_bytes(&[]), 576);
        let avx512 = [
            leaf(XSAVE, 0, [0xe7, 0, 0, 0]),
            leaf(XSAVE, 2, [256, 576, 0, 0]),
            leaf(XSAVE, 6, [512, 1152, 0, 0]),
            leaf(XSAVE, 7, [1024, 1664, 0, 0]),
            // Not offered.
            leaf(XSAVE, 9, [8, 2688, 0, 0]),
            leaf(XSAVE, 11, [16, 0, 1, 0]),
        ];
        assert_eq!(xsave_bytes(&avx512), 2688);
        let absurd = [leaf(XSAVE, 0, [!0; 4]), leaf(XSAVE, 2, [!0; 4]), leaf(XSAVE, 99, [!0; 4])];
        assert_eq!(xsave_bytes(&absurd), 2 * u64::from(u32::MAX));
    }

    #[test]
    fn a_vendor_is_read_in_its_order_of_registers() {
        let [ebx, edx, ecx] = [*b"Auth", *b"enti", *b"cAMD"].map(u32::from_le_bytes);
        let vendors = |leaves: &[CpuidEntry]| vendors(leaves).into_iter().collect::<Vec<_>>();
        assert_eq!(vendors(&[leaf(0, 0, [1, ebx, ecx, edx])]), ["AuthenticAMD"]);
        assert_eq!(vendors(&[leaf(0, 0, [1, u32::from_le_bytes(*b"a\nb\xff"), 0, 0])]), ["a\\nb\\xff"]);
        assert!(vendors(&[leaf(0, 0, [1, 0, 0, 0]), leaf(1, 0, [!0; 4])]).is_empty());
    }

    #[test]
    fn a_description_that_a_state_belies_is_noticed() {
        let mut state = MachineState::blank(2);
        assert_eq!(GuestCpu::of(&state), None);
        state.vcpus[0].tsc_khz = 5;
        state.vcpus[1].cpuid = vec![leaf(1, 0, [0, 0, 1 << 25, 0])];
        let right = GuestCpu::of(&state).unwrap();
        assert_eq!(right, GuestCpu { features: vec!["aes".into()], xsave_bytes: 576, tsc_khz: 5 });
        let says = |change: fn(&mut GuestCpu)| {
            let mut cpu = right.clone();
            change(&mut cpu);
            cpu.contradiction(&state)
        };
        assert_eq!(says(|_| {}), None);
        assert_eq!(says(|cpu| cpu.features.clear()), None, "another program knew fewer");
        assert_eq!(says(|cpu| cpu.features.push("quantum".into())), None, "or more");
        assert!(says(|cpu| cpu.features.push("avx".into())).unwrap().contains("avx"));
        assert!(says(|cpu| cpu.xsave_bytes = 577).unwrap().contains("577"));
        assert!(says(|cpu| cpu.tsc_khz = 6).unwrap().contains("tsc_khz is 6, not 5"));
    }

    #[test]
    fn a_description_has_plain_names_in_order() {
        let check = |names: &[&str]| {
            let features = names.iter().map(|name| (*name).to_owned()).collect();
            GuestCpu { features, ..GuestCpu::default() }.check()
        };
        check(&[]).unwrap();
        check(&["3dnow", "aes", "avx"]).unwrap();
        for bad in [&["avx", "aes"][..], &["aes", "aes"], &[""], &["A"], &["a b"], &["a\nb"], &["\u{e9}"]] {
            assert_eq!(check(bad).unwrap_err().field, "guest_cpu.features", "{bad:?}");
        }
        assert!(check(&["x".repeat(65).as_str()]).is_err());
        let many = (1000..=2024).map(|n| n.to_string()).collect();
        assert!(GuestCpu { features: many, ..GuestCpu::default() }.check().is_err());
    }

    proptest! {
        #[test]
        fn more_leaves_never_offer_less(a in any_cpuid(), b in any_cpuid()) {
            let both = [a.clone(), b.clone()].concat();
            let union: BTreeSet<_> = features(&a).union(&features(&b)).copied().collect();
            prop_assert_eq!(features(&both), union);
            prop_assert!(xsave_bytes(&both) >= xsave_bytes(&a).max(xsave_bytes(&b)));
        }

        #[test]
        fn a_description_fits_the_state_that_it_is_of(cpuid in any_cpuid(), khz: u32, vcpus in 1usize..4) {
            let mut state = MachineState::blank(vcpus);
            state.vcpus.iter_mut().for_each(|vcpu| vcpu.tsc_khz = khz);
            state.vcpus[vcpus - 1].cpuid = cpuid;
            let cpu = GuestCpu::of(&state).unwrap();
            prop_assert!(cpu.check().is_ok());
            prop_assert_eq!(cpu.contradiction(&state), None);
        }
    }
}
