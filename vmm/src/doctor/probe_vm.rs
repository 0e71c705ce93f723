//! A VM of two pages, made to find out how fast this host runs a guest's ring 0.
// UNSAFETY: a memory slot gives the guest access to whatever is mapped at an address.
#![allow(unsafe_code)]

use kvm_bindings::{kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use std::io;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// `1: dec ecx; jnz 1b; hlt`, 32 bit.
const LOOP: [u8; 4] = [0x49, 0x75, 0xfd, 0xf4];
/// Where the loop lies in the guest.
const LOOP_ADDRESS: u64 = 0x1000;
/// Iterations of a short and a long run. Their difference is what is timed, so that entering and leaving the guest does
/// not count.
const ITERATIONS: (u64, u64) = (500, 5_500);
/// Runs of either, of which the quickest counts.
const RUNS: usize = 5;

/// The VM. Fields are dropped in order: the guest goes before its memory.
pub(super) struct ProbeVm {
    vcpu: VcpuFd,
    _vm: VmFd,
    _memory: GuestMemoryMmap<()>,
}

impl ProbeVm {
    /// Makes the VM and puts the loop into its memory.
    pub(super) fn new(kvm: &Kvm) -> Result<ProbeVm, String> {
        let said = |step: &'static str| move |e: kvm_ioctls::Error| format!("{step}: {}", text(e));
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x2000)]).map_err(|e| e.to_string())?;
        memory.write_slice(&LOOP, GuestAddress(LOOP_ADDRESS)).map_err(|e| e.to_string())?;
        let vm = kvm.create_vm().map_err(said("creating a VM"))?;
        for (slot, region) in memory.iter().enumerate() {
            let slot = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the range is a mapping that was made for this guest alone and that `ProbeVm` drops after the VM.
            unsafe { vm.set_user_memory_region(slot) }.map_err(said("giving it memory"))?;
        }
        let vcpu = vm.create_vcpu(0).map_err(said("creating a vCPU"))?;
        let mut sregs = vcpu.get_sregs().map_err(said("reading its registers"))?;
        let data = kvm_segment { limit: u32::MAX, selector: 0x10, type_: 3, present: 1, s: 1, db: 1, g: 1, ..sregs.ds };
        let flat = kvm_segment { base: 0, dpl: 0, l: 0, unusable: 0, ..data };
        sregs.cs = kvm_segment { selector: 0x08, type_: 11, ..flat };
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (flat, flat, flat, flat, flat);
        sregs.cr0 |= 1;
        vcpu.set_sregs(&sregs).map_err(said("setting its registers"))?;
        Ok(ProbeVm { vcpu, _vm: vm, _memory: memory })
    }

    /// How long an instruction takes in ring 0, in nanoseconds.
    pub(super) fn ring0_ns_per_instruction(&mut self) -> Result<f64, String> {
        let mut quickest = [Duration::MAX; 2];
        for _ in 0..RUNS {
            for (best, iterations) in quickest.iter_mut().zip([ITERATIONS.0, ITERATIONS.1]) {
                *best = self.run(iterations)?.min(*best);
            }
        }
        // Two instructions an iteration.
        let instructions = 2 * (ITERATIONS.1 - ITERATIONS.0);
        Ok(quickest[1].saturating_sub(quickest[0]).as_nanos() as f64 / instructions as f64)
    }

    /// Runs the loop so many times.
    fn run(&mut self, iterations: u64) -> Result<Duration, String> {
        // Bit 1 of RFLAGS is always set.
        let regs = kvm_regs { rip: LOOP_ADDRESS, rcx: iterations, rflags: 2, ..Default::default() };
        self.vcpu.set_regs(&regs).map_err(|e| format!("setting its registers: {}", text(e)))?;
        let start = Instant::now();
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::Hlt) => return Ok(start.elapsed()),
                Ok(other) => return Err(format!("the guest stopped with {other:?}")),
                Err(e) if io::Error::from_raw_os_error(e.errno()).kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(format!("running it: {}", text(e))),
            }
        }
    }
}

fn text(error: kvm_ioctls::Error) -> String {
    io::Error::from_raw_os_error(error.errno()).to_string()
}
