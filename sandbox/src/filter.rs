//! Filters: programs that the kernel asks about each system call of a thread, and of the threads that it starts.
//!
//! A filter cannot be taken away again. One that is added takes away more: a call is made if all filters allow it.

use crate::Instruction;
use std::sync::atomic::{AtomicBool, Ordering};

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// The kernel did not take it.
    #[error("cannot filter system calls: {0}; is seccomp built into this kernel? --no-seccomp does without")]
    Install(#[from] seccompiler::Error),
    /// Nobody would be told what has happened.
    #[error("cannot catch SIGSYS: {0}")]
    Signal(std::io::Error),
}

/// Whether threads of this process are filtered.
static ON: AtomicBool = AtomicBool::new(false);

/// From now on this thread, and those that it starts, make the system calls that `program` allows. So do those that give themselves a
/// filter of their own ([`narrow`]).
pub fn start(program: &[Instruction]) -> Result<(), FilterError> {
    crate::trap::announce().map_err(FilterError::Signal)?;
    seccompiler::apply_filter(program)?;
    ON.store(true, Ordering::Relaxed);
    Ok(())
}

/// As [`start`], for a thread that needs less than the one that has started it. Does nothing in a process without filters.
pub fn narrow(program: &[Instruction]) -> Result<(), FilterError> {
    if ON.load(Ordering::Relaxed) {
        seccompiler::apply_filter(program)?;
    }
    Ok(())
}
