//! Guest memory that is gone: its file was cut short under the mapping, its disk fails, or the memory itself does.
//!
//! A vCPU hears of it from KVM, which names an error. Whoever else touches such a page gets a signal, SIGBUS, after which there is
//! nothing to go on with. Its default is to end the process without a word; here it says what has happened.
//!
//! Where the kernel fails to put something in the place of guest memory nothing is known of that place any more, so that ends the
//! process too.
// UNSAFETY: a signal handler, which may do next to nothing: it reads what the kernel hands it, and makes two system calls; and an
// end that comes as quickly.
#![allow(unsafe_code)]

use std::io::{self, Write};
use vmm_sys_util::signal::register_signal_handler;

const CUT_SHORT: &[u8] =
    b"a page of the guest's memory cannot be read any more (SIGBUS): the file of its snapshot was cut short or \
    cannot be read, so the guest has ended; check the snapshot (vmm snapshot verify) and its disk\n";
const BROKEN: &[u8] = b"a page of the guest's memory is broken (SIGBUS): the host's memory has failed there, so the guest has ended; see \
    the kernel's log\n";
/// As any other failure.
const EXIT_CODE: libc::c_int = 1;

/// What KVM's error of a page that it cannot reach means.
pub const UNREACHABLE: &str = "a page of the guest's memory cannot be had: the file of its snapshot was cut short or cannot be read, or the \
    host is out of memory; check the snapshot (vmm snapshot verify) and its disk";

/// From now on the process says so when it is ended by memory that is gone.
pub fn announce() -> io::Result<()> {
    register_signal_handler(libc::SIGBUS, lost).map_err(|e| io::Error::from_raw_os_error(e.errno()))
}

extern "C" fn lost(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel hands a handler that asks for it (SA_SIGINFO, which `register_signal_handler` sets) a valid `siginfo_t`.
    let code = unsafe { info.as_ref() }.map_or(0, |info| info.si_code);
    let words = if matches!(code, libc::BUS_MCEERR_AO | libc::BUS_MCEERR_AR) { BROKEN } else { CUT_SHORT };
    end(words)
}

/// Ends the process since the kernel has failed, with this error, to put something in the place of guest memory: what was there may
/// be gone. Nothing is mapped meanwhile, which could get that place: nothing is allocated.
pub fn end_of_a_place(error: &io::Error) -> ! {
    let mut words = [0; 256];
    let mut rest = &mut words[..];
    let code = error.raw_os_error().unwrap_or_default();
    // What does not fit is not said.
    let _ = writeln!(
        rest,
        "guest memory cannot be remapped (system error {code}), and some of it may be gone, so the guest has ended; is the host out of \
        memory, or vm.max_map_count or a limit of this process (ulimit -v) low?"
    );
    let unused = rest.len();
    end(&words[..words.len() - unused])
}

fn end(words: &[u8]) -> ! {
    // SAFETY: `write` and `_exit` may be called in a signal handler, and at any other time; the bytes are there while they are
    // read.
    unsafe {
        libc::write(libc::STDERR_FILENO, words.as_ptr().cast(), words.len());
        libc::_exit(EXIT_CODE)
    }
}
