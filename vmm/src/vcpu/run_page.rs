//! The page that KVM shares with us for each vCPU (`struct kvm_run`).
// UNSAFETY: the page is raw memory that the kernel writes, and its exit data is a C union.
#![allow(unsafe_code)]

use kvm_bindings::{KVM_INTERNAL_ERROR_EMULATION, kvm_run};
use kvm_ioctls::VcpuFd;
use std::io;
use std::mem::offset_of;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU8, Ordering};

/// Makes a vCPU's `KVM_RUN` return at once, from any thread.
#[derive(Debug)]
pub struct ImmediateExit {
    page: NonNull<AtomicU8>,
}

// SAFETY: the only access is atomic.
unsafe impl Send for ImmediateExit {}
// SAFETY: the only access is atomic.
unsafe impl Sync for ImmediateExit {}

const PAGE: usize = 4096;

impl ImmediateExit {
    /// Maps the first page of a vCPU's run area a second time.
    pub fn of(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
        let page = unsafe {
            libc::mmap(ptr::null_mut(), PAGE, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, vcpu.as_raw_fd(), 0)
        };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let page = NonNull::new(page.cast()).ok_or_else(|| io::Error::other("mmap returned a null address"))?;
        Ok(ImmediateExit { page })
    }

    /// Sets or clears the flag.
    pub fn set(&self, on: bool) {
        // SAFETY: the field lies within the page that is mapped for the life of this value, and bytes need no alignment.
        let flag = unsafe { self.page.byte_add(offset_of!(kvm_run, immediate_exit)).as_ref() };
        flag.store(on.into(), Ordering::SeqCst);
    }
}

impl Drop for ImmediateExit {
    fn drop(&mut self) {
        // SAFETY: `of` mapped exactly this page for this value alone.
        unsafe { libc::munmap(self.page.as_ptr().cast(), PAGE) };
    }
}

/// After `KVM_EXIT_INTERNAL_ERROR`: the error's number, and the bytes of the instruction if KVM could not emulate one.
pub fn internal_error(vcpu: &mut VcpuFd) -> (u32, Option<Vec<u8>>) {
    let run = vcpu.get_kvm_run();
    // SAFETY: every variant of the union is plain integers, for which any bytes are valid; the caller's exit reason says
    // that this variant was written.
    let failure = unsafe { run.__bindgen_anon_1.emulation_failure };
    if failure.suberror != KVM_INTERNAL_ERROR_EMULATION {
        return (failure.suberror, None);
    }
    const HAS_BYTES: u64 = kvm_bindings::KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES as u64;
    // SAFETY: as above; plain integers.
    let bytes = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
    if failure.ndata < 1 || failure.flags & HAS_BYTES == 0 {
        return (failure.suberror, Some(Vec::new()));
    }
    let len = usize::from(bytes.insn_size).min(bytes.insn_bytes.len());
    (failure.suberror, Some(bytes.insn_bytes[..len].to_vec()))
}
