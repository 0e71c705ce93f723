//! What this host is, as snapshots record it and are compared with it, and as reports tell it.

pub mod proc;
mod tsc;

use serde::{Deserialize, Serialize};
use snapshot::compat::{self, HostFacts};
use snapshot::cpu;
use snapshot::manifest::Cpu;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::fmt;
use std::sync::OnceLock;

/// Asks the CPU and the kernel.
pub fn facts() -> HostFacts {
    let uname = rustix::system::uname();
    HostFacts {
        arch: uname.machine().to_string_lossy().into_owned(),
        cpu: cpu(),
        kernel: uname.release().to_string_lossy().into_owned(),
    }
}

/// What a snapshot is compared with: what can be known without KVM and without delay. It is found out once: in a VM each leaf of
/// CPUID costs a way to the hypervisor and back.
pub fn to_compare() -> &'static compat::Host {
    static HOST: OnceLock<compat::Host> = OnceLock::new();
    HOST.get_or_init(|| compat::Host {
        facts: facts(),
        page_bytes: rustix::param::page_size() as u64,
        cpuid: cpu::read(cpuid),
        tsc: tsc::told(cpuid, tsc::cpuinfo),
    })
}

/// As [`to_compare`], for whoever has time: the frequency of the time-stamp counter is measured if it is not told.
pub fn to_compare_closely() -> compat::Host {
    let mut host = to_compare().clone();
    if host.tsc.khz.is_none() {
        host.tsc = tsc::measured(tsc::cpuinfo);
    }
    host
}

/// EAX, EBX, ECX and EDX of a leaf of this CPU.
fn cpuid(leaf: u32, index: u32) -> [u32; 4] {
    let found = __cpuid_count(leaf, index);
    [found.eax, found.ebx, found.ecx, found.edx]
}

fn cpu() -> Cpu {
    let text = |words: &[u32]| {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).take_while(|b| *b != 0).collect();
        String::from_utf8_lossy(&bytes).trim().to_owned()
    };
    let leaf = __cpuid(0);
    let vendor = text(&[leaf.ebx, leaf.edx, leaf.ecx]);
    let signature = __cpuid(1).eax;
    let (base_family, base_model) = ((signature >> 8) & 0xf, (signature >> 4) & 0xf);
    let family = if base_family == 0xf { base_family + ((signature >> 20) & 0xff) } else { base_family };
    let model = if base_family >= 6 { base_model | (((signature >> 16) & 0xf) << 4) } else { base_model };
    let brand = if __cpuid(0x8000_0000).eax >= 0x8000_0004 {
        let words: Vec<u32> =
            (0x8000_0002..=0x8000_0004).map(__cpuid).flat_map(|l| [l.eax, l.ebx, l.ecx, l.edx]).collect();
        text(&words)
    } else {
        String::new()
    };
    Cpu { vendor, family, model, stepping: signature & 0xf, brand }
}

/// A host in a few words, for reports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// CPU.
    pub cpu: String,
    /// Number of CPUs.
    pub cpus: usize,
    /// Kernel release.
    pub kernel: String,
    /// Whether its KVM emulates ring 0.
    pub ring0_emulated: bool,
}

impl Host {
    /// Whether times that were measured on one mean something on the other.
    pub fn is_like(&self, other: &Host) -> bool {
        let Host { cpu, cpus, kernel: _, ring0_emulated } = self;
        (cpu, cpus, ring0_emulated) == (&other.cpu, &other.cpus, &other.ring0_emulated)
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Host { cpu, cpus, kernel, ring0_emulated } = self;
        let plural = if *cpus == 1 { "" } else { "s" };
        let emulated = if *ring0_emulated { ", KVM emulates ring 0" } else { "" };
        write!(f, "{cpu}, {cpus} CPU{plural}, Linux {kernel}{emulated}")
    }
}

/// This host in a few words.
pub fn summary() -> Host {
    let facts = facts();
    Host {
        cpu: if facts.cpu.brand.is_empty() { facts.cpu.vendor } else { facts.cpu.brand },
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        kernel: facts.kernel,
        ring0_emulated: crate::vcpu::ring0_is_emulated(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_tells_what_its_cpu_can_do() {
        let host = to_compare();
        assert_eq!(host.page_bytes, 4096);
        let features = cpu::features(&host.cpuid);
        assert!(["fpu", "sse2", "lm", "syscall"].iter().all(|name| features.contains(name)), "{features:?}");
    }

    #[test]
    fn this_host_has_a_name() {
        let facts = super::facts();
        assert_eq!(facts.arch, "x86_64");
        assert_eq!(facts.cpu.vendor.len(), 12, "{:?}", facts.cpu);
    }
}
