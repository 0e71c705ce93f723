//! KVM's part in bringing a guest back to a checkpoint: which pages were written, and what it has to forget.
//!
//! The log is KVM's bitmap of written pages, one bit a page, and not its ring (`KVM_CAP_DIRTY_LOG_RING`):
//!
//! - A ring has to be chosen when a VM is made, for all that it lives; a bitmap begins with the first checkpoint, and costs a guest
//!   that never has one nothing.
//! - A ring that is full ends `KVM_RUN`, and whoever takes pages out of it has to arm it again; a bitmap is never full.
//! - What KVM writes outside of a vCPU's run, such as the wall clock when an MSR is set, is in the bitmap alone.
//! - A bitmap of 128 MiB has 4 KiB, and is read in a microsecond or two, most of it zeros that are not looked at twice.
//!
//! Where the CPU walks the guest's page tables itself, with a second stage below (EPT, NPT), KVM keeps nothing that it has
//! derived from them. Elsewhere it has *shadows* of them, which it keeps up to date as the guest writes its tables. It does not
//! see what this process writes there, so it has to forget all shadows when tables may have gone back.

use super::slots::{self, MovingSlot};
use crate::memory::GuestRam;
use crate::memory::bits::Bits;
use kvm_ioctls::VmFd;
use std::io;

/// What the modules of KVM say of a second stage, where it is in use.
const SECOND_STAGE: [&str; 2] = ["/sys/module/kvm_intel/parameters/ept", "/sys/module/kvm_amd/parameters/npt"];

/// Why KVM does not do its part.
#[derive(Debug, thiserror::Error)]
pub enum WrittenError {
    /// A log.
    #[error("KVM does not log what the guest writes: {0}")]
    Keep(kvm_ioctls::Error),
    /// What is in it.
    #[error("KVM does not tell what the guest has written: {0}")]
    Take(kvm_ioctls::Error),
    /// Shadows.
    #[error("KVM does not forget what it has derived from the guest's page tables: {0}")]
    Forget(kvm_ioctls::Error),
    /// The slot that this takes.
    #[error("no memory slot by which KVM is made to forget page tables: {0}")]
    Slot(io::Error),
}

/// The log of a VM, which is kept as long as there is a VM.
#[derive(Debug)]
pub struct Log {
    /// What has shadows forgotten, where there are any.
    shadows: Option<MovingSlot>,
}

impl Log {
    /// Has KVM keep a log from now on; nothing is in it yet. Takes milliseconds. No vCPU may run.
    pub fn keep(vm: &VmFd, ram: &GuestRam) -> Result<Log, WrittenError> {
        slots::keep_log(vm, ram).map_err(WrittenError::Keep)?;
        let shadows = match has_second_stage() {
            true => None,
            false => match MovingSlot::new(vm) {
                // Only a second stage makes KVM mind that no CPU has such addresses.
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => None,
                slot => Some(slot.map_err(WrittenError::Slot)?),
            },
        };
        let log = Log { shadows };
        log.take(vm, ram, &mut ram.no_pages())?;
        Ok(log)
    }

    /// Takes what was written since the last time out of the log.
    pub fn take(&self, vm: &VmFd, ram: &GuestRam, pages: &mut [Bits]) -> Result<(), WrittenError> {
        slots::take_log(vm, ram, pages).map_err(WrittenError::Take)
    }

    /// Whether [`Log::forget_tables`] has all translations forgotten; otherwise whoever loads vCPUs has to see to that.
    pub fn forgets_translations(&self) -> bool {
        self.shadows.is_some()
    }

    /// The guest's page tables may be other ones than KVM knows. No vCPU may run.
    pub fn forget_tables(&self, vm: &VmFd) -> Result<(), WrittenError> {
        self.shadows.as_ref().map_or(Ok(()), |slot| slot.move_on(vm)).map_err(WrittenError::Forget)
    }
}

/// Whether KVM says that the CPU walks a second stage of page tables.
fn has_second_stage() -> bool {
    let says_yes = |path| std::fs::read_to_string(path).is_ok_and(|text| matches!(text.trim(), "Y" | "1"));
    SECOND_STAGE.into_iter().any(says_yes)
}
