//! May a snapshot run on this host? Asked before KVM is, so that a snapshot that does not fit is refused by name, not by
//! whatever the kernel makes of it, or the guest later.

use crate::PAGE_BYTES;
use crate::cpu;
use crate::image::MemoryImage;
use crate::load::Snapshot;
use crate::manifest::{Cpu, Manifest};
use crate::state::{CpuidEntry, MachineState};
use serde::Serialize;
use std::fmt;
use std::path::PathBuf;

/// The XSAVE area of a snapshot has at least so many bytes, whatever is in it.
const XSAVE_AREA: u64 = 4096;

/// What a snapshot records of the host that writes it. Whoever has the means to ask the CPU and the kernel fills this in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostFacts {
    /// Architecture, as `uname -m` names it: `x86_64`.
    pub arch: String,
    /// The CPU.
    pub cpu: Cpu,
    /// Release of the kernel, as `uname -r` prints it.
    pub kernel: String,
}

/// What a snapshot is compared with. What could not be found out is empty or absent, and nothing is refused for its sake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Architecture, CPU and kernel.
    pub facts: HostFacts,
    /// Size of a page, in bytes.
    pub page_bytes: u64,
    /// CPUID, as [`cpu::read`] reads it.
    pub cpuid: Vec<CpuidEntry>,
    /// The time-stamp counter.
    pub tsc: HostTsc,
}

/// The time-stamp counter of a host, as far as it can be known without KVM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostTsc {
    /// Its frequency, in kHz.
    pub khz: Option<u32>,
    /// Whether a guest can be given one of another frequency.
    pub scales: Option<bool>,
}

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Field {
    /// Architecture.
    Arch,
    /// Size of a page.
    PageSize,
    /// Maker of the CPU: features, registers and quirks that the guest has settled on differ between them.
    Vendor,
    /// Features of the CPU, as CPUID tells them.
    CpuFeatures,
    /// The area in which XSAVE keeps registers: its size, and what lies where.
    Xsave,
    /// Frequency of the time-stamp counter.
    TscKhz,
}

impl Field {
    /// All of them, in the order in which they are looked at.
    pub const ALL: [Field; 6] =
        [Field::Arch, Field::PageSize, Field::Vendor, Field::CpuFeatures, Field::Xsave, Field::TscKhz];

    /// Its name, as users say it.
    pub fn name(self) -> &'static str {
        match self {
            Field::Arch => "arch",
            Field::PageSize => "page_size",
            Field::Vendor => "vendor",
            Field::CpuFeatures => "cpu_features",
            Field::Xsave => "xsave",
            Field::TscKhz => "tsc_khz",
        }
    }

    /// Whether anything good can come of a restore where it differs.
    pub fn can_be_allowed(self) -> bool {
        !matches!(self, Field::Arch | Field::PageSize)
    }
}

/// What a comparison has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The host has what the snapshot needs.
    Fits,
    /// It does not.
    Differs,
    /// The host does not tell.
    Unknown,
}

/// A comparison of one field.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Comparison {
    /// Which one.
    pub field: Field,
    /// What the snapshot needs.
    pub snapshot: String,
    /// What the host has, if it tells.
    pub host: Option<String>,
    /// Whether that is enough.
    pub verdict: Verdict,
}

impl Comparison {
    fn new(field: Field, snapshot: impl Into<String>, host: impl Into<String>, fits: bool) -> Comparison {
        let verdict = if fits { Verdict::Fits } else { Verdict::Differs };
        Comparison { field, snapshot: snapshot.into(), host: Some(host.into()), verdict }
    }

    fn unknown(field: Field, snapshot: impl Into<String>) -> Comparison {
        Comparison { field, snapshot: snapshot.into(), host: None, verdict: Verdict::Unknown }
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Comparison { field, snapshot, host, verdict } = self;
        let (name, host) = (field.name(), host.as_deref());
        match verdict {
            Verdict::Fits => write!(f, "the snapshot fits this host in `{name}`")?,
            Verdict::Differs => write!(f, "the snapshot does not fit this host in `{name}`")?,
            Verdict::Unknown => write!(f, "whether the snapshot fits this host in `{name}` is not known")?,
        }
        write!(f, ": it needs {snapshot}, the host {}", told(host))
    }
}

/// What the host has, as a predicate.
fn told(host: Option<&str>) -> String {
    host.map_or("does not tell".to_owned(), |host| format!("has {host}"))
}

/// Why a snapshot cannot run on a host: the first of what differs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}; {remedy}", remedy = remedy(.0.field))]
pub struct Mismatch(pub Comparison);

fn remedy(field: Field) -> String {
    let (name, elsewhere) = (field.name(), "restore it on a host like that, or create it anew here");
    match field.can_be_allowed() {
        true => format!("{elsewhere}; a restore that allows the mismatch `{name}` tries all the same"),
        false => elsewhere.to_owned(),
    }
}

/// Checks that the snapshot can run on the host. Returns what is to be warned of: what differs and is allowed to, and what the
/// host does not tell.
pub fn check(
    manifest: &Manifest,
    state: &MachineState,
    host: &Host,
    allowed: &[Field],
) -> Result<Vec<Comparison>, Mismatch> {
    let mut warnings = Vec::new();
    for comparison in compare(manifest, state, host) {
        let field = comparison.field;
        match comparison.verdict {
            Verdict::Fits => {}
            Verdict::Differs if !(field.can_be_allowed() && allowed.contains(&field)) => {
                return Err(Mismatch(comparison));
            }
            Verdict::Differs | Verdict::Unknown => warnings.push(comparison),
        }
    }
    Ok(warnings)
}

/// Compares every field.
pub fn compare(manifest: &Manifest, state: &MachineState, host: &Host) -> [Comparison; 6] {
    let guest = cpu::guest_leaves(state);
    Field::ALL.map(|field| match field {
        Field::Arch => Comparison::new(field, &manifest.arch, &host.facts.arch, manifest.arch == host.facts.arch),
        Field::PageSize => {
            let pages = |bytes: u64| format!("pages of {bytes} bytes");
            Comparison::new(field, pages(PAGE_BYTES), pages(host.page_bytes), host.page_bytes == PAGE_BYTES)
        }
        Field::Vendor => vendor(manifest, &guest, host),
        Field::CpuFeatures => features(&guest, host),
        Field::Xsave => xsave(state, &guest, host),
        Field::TscKhz => tsc(state, host.tsc),
    })
}

/// A guest that was restored on a CPU of another vendor has its own in its CPUID still.
fn vendor(manifest: &Manifest, guest: &[CpuidEntry], host: &Host) -> Comparison {
    let (field, here, recorded) = (Field::Vendor, &host.facts.cpu.vendor, &manifest.cpu.vendor);
    if here.is_empty() {
        return Comparison::unknown(field, recorded);
    }
    let seen = cpu::vendors(guest);
    match std::iter::once(recorded).chain(&seen).find(|vendor| *vendor != here) {
        Some(other) => Comparison::new(field, other, here, false),
        None => Comparison::new(field, recorded, here, true),
    }
}

fn features(guest: &[CpuidEntry], host: &Host) -> Comparison {
    let (field, offered) = (Field::CpuFeatures, cpu::features(guest));
    let needs = format!("{} features of the CPU", offered.len());
    if host.cpuid.is_empty() {
        return Comparison::unknown(field, needs);
    }
    let here = cpu::features(&host.cpuid);
    let missing: Vec<&str> = offered.difference(&here).copied().collect();
    match missing.is_empty() {
        true => Comparison::new(field, needs, "all of them", true),
        false => Comparison::new(field, needs, format!("all but {}", missing.join(", ")), false),
    }
}

/// KVM saves and loads the area as the host lays it out: a component must lie where it lay.
fn xsave(state: &MachineState, guest: &[CpuidEntry], host: &Host) -> Comparison {
    let (field, bytes) = (Field::Xsave, |bytes: u64| format!("{bytes} bytes"));
    let saved = state.vcpus.iter().map(|vcpu| vcpu.xsave.len() as u64).max().unwrap_or(0);
    let needs = saved.max(cpu::xsave_bytes(guest));
    if host.cpuid.is_empty() {
        return Comparison::unknown(field, bytes(needs));
    }
    let here = cpu::components(&host.cpuid);
    // A component that the host has not at all is a missing feature.
    let moved = |c: &cpu::Component| here.iter().find(|h| h.bit == c.bit && *h != c).map(|h| (*c, *h));
    if let Some((there, here)) = cpu::components(guest).iter().find_map(moved) {
        let place = |c: cpu::Component| format!("{} bytes at {} for component {}", c.bytes, c.offset, c.bit);
        return Comparison::new(field, place(there), place(here), false);
    }
    let room = cpu::xsave_bytes(&host.cpuid).max(XSAVE_AREA);
    Comparison::new(field, bytes(needs), bytes(room), needs <= room)
}

/// Whether a guest's time-stamp counter of `guest` kHz is, to KVM, that of a host of `host` kHz: within 250 ppm.
pub fn same_tsc(guest: u32, host: u32) -> bool {
    guest == 0 || guest.abs_diff(host) <= guest / 4000
}

fn tsc(state: &MachineState, host: HostTsc) -> Comparison {
    let field = Field::TscKhz;
    let rate = |khz: u32| format!("{khz} kHz");
    let mut rates = state.vcpus.iter().map(|vcpu| vcpu.tsc_khz).filter(|khz| *khz != 0);
    let Some(first) = rates.clone().next() else {
        return Comparison::new(field, "any frequency", host.khz.map_or("one".to_owned(), rate), true);
    };
    let Some(here) = host.khz else { return Comparison::unknown(field, rate(first)) };
    match (rates.find(|khz| !same_tsc(*khz, here)), host.scales) {
        (None, _) => Comparison::new(field, rate(first), rate(here), true),
        (Some(other), Some(true)) => {
            Comparison::new(field, rate(other), format!("{}, and scales it", rate(here)), true)
        }
        (Some(other), Some(false)) => {
            Comparison::new(field, rate(other), format!("{}, and cannot scale it", rate(here)), false)
        }
        (Some(other), None) => Comparison {
            field,
            snapshot: rate(other),
            host: Some(format!("{}, and may scale it", rate(here))),
            verdict: Verdict::Unknown,
        },
    }
}

/// How a snapshot compares with a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The directory.
    pub path: PathBuf,
    /// Version of the format.
    pub format_version: u32,
    /// Whether nothing differs.
    pub fits: bool,
    /// Each field.
    pub fields: [Comparison; 6],
    /// Where its memory is.
    pub memory: MemoryPlace,
    /// Why that cannot be used, if so.
    pub memory_fault: Option<String>,
}

/// Where the memory of a snapshot is, as far as can be told without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryPlace {
    /// In its directory and, if it lies over other snapshots, in theirs.
    Here,
    /// Not here: a page server may have it.
    Elsewhere,
    /// In its directory, and cannot be used: a file is missing or damaged, or a snapshot that it lies over.
    Unusable,
}

impl Report {
    /// Compares, and looks for the memory.
    pub fn of(snapshot: &Snapshot, host: &Host) -> Report {
        let fields = compare(snapshot.manifest(), snapshot.state(), host);
        let fits = fields.iter().all(|field| field.verdict != Verdict::Differs);
        let format_version = snapshot.manifest().format_version;
        let (memory, memory_fault) = match (snapshot.level().file(), MemoryImage::open(snapshot)) {
            (Err(_), _) => (MemoryPlace::Elsewhere, None),
            (Ok(_), Ok(_)) => (MemoryPlace::Here, None),
            (Ok(_), Err(fault)) => (MemoryPlace::Unusable, Some(fault.to_string())),
        };
        Report { path: snapshot.dir().to_owned(), format_version, fits, fields, memory, memory_fault }
    }

    /// Whether nothing is known to stand in the way of a restore.
    pub fn is_usable(&self) -> bool {
        self.fits && self.memory != MemoryPlace::Unusable
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Report { path, format_version: _, fits, fields, memory, memory_fault } = self;
        writeln!(f, "{} {} this host", path.display(), if *fits { "fits" } else { "does not fit" })?;
        for Comparison { field, snapshot, host, verdict } in fields {
            let verdict = match verdict {
                Verdict::Fits => "fits",
                Verdict::Differs => "differs",
                Verdict::Unknown => "not known",
            };
            writeln!(f, "  {:<12} {verdict}: it needs {snapshot}, the host {}", field.name(), told(host.as_deref()))?;
        }
        match (memory, memory_fault) {
            (MemoryPlace::Here, _) => {
                writeln!(f, "  memory       is here, and was not read (vmm snapshot verify reads it)")
            }
            (MemoryPlace::Elsewhere, _) => writeln!(f, "  memory       is not here: a page server must have it"),
            (MemoryPlace::Unusable, fault) => {
                writeln!(f, "  memory       cannot be used: {}", fault.as_deref().unwrap_or_default())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::create::{BytesSource, Facts, Staging};
    use crate::manifest::Devices;
    use proptest::prelude::*;
    use std::sync::LazyLock;
    use std::sync::atomic::AtomicBool;

    /// Leaf 7, EBX: avx2, avx512f, avx512bw.
    const AVX2: u32 = 1 << 5;
    const AVX512: u32 = 1 << 16 | 1 << 30;

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidEntry {
        CpuidEntry { function, index, flags: 0, eax, ebx, ecx, edx }
    }

    /// An XSAVE area with PKRU at `pkru`.
    fn cpuid(features: u32, pkru: u32) -> Vec<CpuidEntry> {
        let [ebx, edx, ecx] = [*b"Auth", *b"enti", *b"cAMD"].map(u32::from_le_bytes);
        vec![
            leaf(0, 0, [0xd, ebx, ecx, edx]),
            leaf(7, 0, [0, features, 0, 0]),
            leaf(0xd, 0, [0x207, 0, 0, 0]),
            leaf(0xd, 2, [256, 576, 0, 0]),
            leaf(0xd, 9, [8, pkru, 0, 0]),
        ]
    }

    fn facts() -> HostFacts {
        let cpu = Cpu { vendor: "AuthenticAMD".into(), ..Cpu::default() };
        HostFacts { arch: "x86_64".into(), cpu, kernel: "6.18.0".into() }
    }

    fn host() -> Host {
        let tsc = HostTsc { khz: Some(2_450_000), scales: Some(false) };
        Host { facts: facts(), page_bytes: 4096, cpuid: cpuid(AVX2 | AVX512, 2688), tsc }
    }

    /// As it is made on [`host`].
    fn state() -> MachineState {
        let mut state = MachineState::blank(2);
        for vcpu in &mut state.vcpus {
            (vcpu.cpuid, vcpu.tsc_khz) = (cpuid(AVX2 | AVX512, 2688), 2_450_000);
        }
        state
    }

    /// A manifest as it is written on [`host`].
    static MANIFEST: LazyLock<Manifest> = LazyLock::new(|| {
        let dir = tempfile::tempdir().unwrap();
        let mut staging = Staging::begin(&dir.path().join("s")).unwrap();
        let memory = staging.write_memory(&mut BytesSource::new(&[1; 4096]), &AtomicBool::new(false)).unwrap();
        let (vmm_version, devices) = ("0.1.0".into(), Devices::default());
        let facts = Facts { vmm_version, host: facts(), devices, readiness: None, config: None };
        staging.commit(memory, facts, &MachineState::blank(1)).unwrap()
    });

    /// What is said of a snapshot, made on [`host`], on a host and of a guest that were changed like this.
    fn said(allowed: &[Field], change: impl FnOnce(&mut Host, &mut MachineState)) -> Result<Vec<Comparison>, Mismatch> {
        let (mut host, mut state) = (host(), state());
        change(&mut host, &mut state);
        check(&MANIFEST, &state, &host, allowed)
    }

    /// It is refused by the name of this field, in one line with these words, even if all others are allowed; and is not if it is
    /// allowed, where that can be: then the same words are warned of.
    #[track_caller]
    fn refused(field: Field, words: &[&str], change: impl Fn(&mut Host, &mut MachineState)) {
        let others: Vec<Field> = Field::ALL.into_iter().filter(|other| *other != field).collect();
        for allowed in [&[][..], &others] {
            let mismatch = said(allowed, &change).unwrap_err();
            let message = mismatch.to_string();
            assert_eq!((mismatch.0.field, mismatch.0.verdict), (field, Verdict::Differs));
            for word in words.iter().chain([&field.name()]) {
                assert!(message.contains(word) && !message.contains('\n'), "`{word}` is not in: {message}");
            }
        }
        match said(&Field::ALL, &change) {
            Ok(warnings) => {
                assert!(field.can_be_allowed());
                let [warning] = &warnings[..] else { panic!("{warnings:?}") };
                let text = warning.to_string();
                assert!(warning.field == field && words.iter().all(|word| text.contains(word)), "{text}");
            }
            Err(mismatch) => assert!(!field.can_be_allowed() && mismatch.0.field == field),
        }
    }

    #[test]
    fn a_snapshot_fits_where_it_was_made_and_on_a_larger_host() {
        assert_eq!(said(&[], |_, _| {}), Ok(vec![]));
        let larger = said(&[], |host, state| {
            host.facts.cpu.model = 17;
            host.facts.kernel = "7.0.0".into();
            state.vcpus.iter_mut().for_each(|vcpu| vcpu.cpuid = cpuid(AVX2, 2688));
        });
        assert_eq!(larger, Ok(vec![]));
        // A state of an old snapshot, or one that never ran, needs nothing.
        assert_eq!(check(&MANIFEST, &MachineState::blank(1), &host(), &[]), Ok(vec![]));
    }

    #[test]
    fn another_architecture_page_size_or_vendor_is_refused_with_both_named() {
        refused(Field::Arch, &["x86_64", "aarch64"], |host, _| host.facts.arch = "aarch64".into());
        refused(Field::PageSize, &["4096", "65536"], |host, _| host.page_bytes = 65536);
        let intel = |host: &mut Host, _: &mut MachineState| host.facts.cpu.vendor = "GenuineIntel".into();
        refused(Field::Vendor, &["AuthenticAMD", "GenuineIntel"], intel);
        // A guest that came from elsewhere and was snapshotted here.
        refused(Field::Vendor, &["GenuineIntel", "AuthenticAMD"], |_, state| {
            let [ebx, edx, ecx] = [*b"Genu", *b"ineI", *b"ntel"].map(u32::from_le_bytes);
            state.vcpus[1].cpuid[0] = leaf(0, 0, [0xd, ebx, ecx, edx]);
        });
    }

    #[test]
    fn all_features_that_a_host_lacks_are_named_at_once() {
        refused(Field::CpuFeatures, &["7 features", "all but avx512bw, avx512f"], |host, _| {
            host.cpuid = cpuid(AVX2, 2688);
        });
        refused(Field::CpuFeatures, &["all but xstate_pkru"], |host, _| host.cpuid[2].eax = 7);
        // One vCPU is enough.
        refused(Field::CpuFeatures, &["all but adx"], |_, state| state.vcpus[1].cpuid[1].ebx |= 1 << 19);
    }

    #[test]
    fn an_xsave_area_that_is_too_long_or_laid_out_otherwise_is_refused() {
        refused(Field::Xsave, &["11008 bytes", "4096 bytes"], |_, state| state.vcpus[1].xsave.resize(11008, 0));
        refused(Field::Xsave, &["8 bytes at 2688", "8 bytes at 2432", "component 9"], |host, _| {
            host.cpuid[4].ebx = 2432;
        });
        let larger = said(&[], |host, state| {
            state.vcpus[0].xsave.resize(11008, 0);
            host.cpuid[2].eax |= 1 << 18;
            host.cpuid.push(leaf(0xd, 18, [8192, 2816, 0, 0]));
        });
        assert_eq!(larger, Ok(vec![]));
    }

    #[test]
    fn another_frequency_is_refused_where_it_cannot_be_scaled() {
        let faster = |scales| {
            move |host: &mut Host, _: &mut MachineState| {
                host.tsc = HostTsc { khz: Some(2_600_000), scales };
            }
        };
        refused(Field::TscKhz, &["2450000 kHz", "2600000 kHz", "cannot scale"], faster(Some(false)));
        assert_eq!(said(&[], faster(Some(true))), Ok(vec![]));
        let unknown = said(&[], faster(None)).unwrap();
        assert_eq!((unknown.len(), unknown[0].verdict), (1, Verdict::Unknown));
        refused(Field::TscKhz, &["9 kHz", "2450000 kHz"], |_, state| state.vcpus[1].tsc_khz = 9);
        // What is not known needs nothing, and 250 ppm are the same.
        assert_eq!(said(&[], |_, state| state.vcpus[0].tsc_khz = 0), Ok(vec![]));
        assert_eq!(said(&[], |host, _| host.tsc.khz = Some(2_450_612)), Ok(vec![]));
        refused(Field::TscKhz, &["2450613 kHz"], |host, _| host.tsc.khz = Some(2_450_613));
    }

    #[test]
    fn what_a_host_does_not_tell_is_only_warned_of() {
        let warnings = said(&[], |host, _| {
            host.facts.cpu.vendor.clear();
            host.cpuid.clear();
            host.tsc = HostTsc::default();
        });
        let warnings = warnings.unwrap();
        let fields: Vec<Field> = warnings.iter().map(|warning| warning.field).collect();
        assert_eq!(fields, [Field::Vendor, Field::CpuFeatures, Field::Xsave, Field::TscKhz]);
        assert!(warnings.iter().all(|w| w.verdict == Verdict::Unknown && w.to_string().contains("not known")));
    }

    #[test]
    fn every_field_is_listed_once_under_its_name() {
        for (field, comparison) in Field::ALL.into_iter().zip(compare(&MANIFEST, &state(), &host())) {
            assert_eq!((comparison.field, comparison.verdict), (field, Verdict::Fits));
            assert_eq!(serde_json::to_value(field).unwrap(), field.name());
        }
    }

    proptest! {
        /// Whatever the two are, it fits just where the host has all, and what is missing is all named.
        #[test]
        fn features_fit_just_where_there_are_as_many(guest: [u32; 4], host_bits: [u32; 4], index in 0u32..2) {
            let (mut here, mut state) = (host(), state());
            here.cpuid.push(leaf(7, index, host_bits));
            state.vcpus[0].cpuid.push(leaf(7, index, guest));
            let missing: Vec<_> = cpu::features(&cpu::guest_leaves(&state))
                .difference(&cpu::features(&here.cpuid)).copied().collect();
            match check(&MANIFEST, &state, &here, &[]) {
                Ok(warnings) => prop_assert!(missing.is_empty() && warnings.is_empty()),
                Err(Mismatch(why)) => {
                    prop_assert_eq!(why.field, Field::CpuFeatures);
                    prop_assert_eq!(why.host, Some(format!("all but {}", missing.join(", "))));
                }
            }
        }

        /// No CPUID that a file may hold makes it panic.
        #[test]
        fn absurd_leaves_are_compared_too(
            leaves in prop::collection::vec((prop::sample::select(vec![0u32, 1, 7, 0xd, 0x8000_0001]), 0u32..70, any::<[u32; 4]>()), 0..40),
            khz: u32,
            here: u32,
        ) {
            let mut state = state();
            state.vcpus[0].cpuid = leaves.into_iter().map(|(function, index, all)| leaf(function, index, all)).collect();
            state.vcpus[0].tsc_khz = khz;
            let mut host = host();
            host.tsc.khz = Some(here);
            for comparison in compare(&MANIFEST, &state, &host) {
                prop_assert!(!comparison.to_string().contains('\n'));
            }
        }
    }
}
