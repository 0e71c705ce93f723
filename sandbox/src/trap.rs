//! The end of a process that has made a system call which it may not make.
// UNSAFETY: a signal handler, which may do next to nothing: it reads what the kernel hands it, and makes three system calls.
#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;

/// The process's exit code then, as Firecracker has it.
pub const EXIT_CODE: i32 = 148;

/// Longest name of a thread, with the zero that ends it.
const MAX_NAME: usize = 16;

/// From now on the process says so when it is ended by a filter.
pub fn announce() -> io::Result<()> {
    // SAFETY: all zeros are an action: the default, no flags, no signals.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = forbidden as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the action is whole, and the handler takes what SA_SIGINFO says.
    match unsafe { libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What the kernel says of a call that was trapped: `siginfo_t`, as it is for SIGSYS.
#[repr(C)]
struct Trapped {
    signal: [libc::c_int; 4],
    address: usize,
    call: libc::c_int,
}

extern "C" fn forbidden(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel hands a handler that asks for it (SA_SIGINFO) a valid `siginfo_t`, which is larger and begins so.
    let call = unsafe { info.cast::<Trapped>().as_ref() }.map_or(-1, |trapped| trapped.call);
    let mut thread = [0; MAX_NAME];
    // SAFETY: PR_GET_NAME writes so many bytes at most.
    unsafe { libc::prctl(libc::PR_GET_NAME, thread.as_mut_ptr()) };
    let mut line = Line::default();
    say(&mut line, call, thread.split(|&byte| byte == 0).next().unwrap_or_default());
    // SAFETY: `write` and `_exit` may be called in a signal handler; the bytes are there.
    unsafe {
        libc::write(libc::STDERR_FILENO, line.text.as_ptr().cast(), line.length);
        libc::_exit(EXIT_CODE);
    }
}

/// A line that needs no memory of the heap.
struct Line {
    text: [u8; 256],
    length: usize,
}

impl Default for Line {
    fn default() -> Self {
        Line { text: [0; 256], length: 0 }
    }
}

impl Line {
    fn add(&mut self, bytes: &[u8]) {
        for (place, byte) in self.text.iter_mut().skip(self.length).zip(bytes) {
            *place = *byte;
            self.length += 1;
        }
    }

    fn add_number(&mut self, number: u32) {
        let (mut digits, mut rest) = ([0; 10], number);
        for digit in digits.iter_mut().rev() {
            *digit = b'0' + (rest % 10) as u8;
            rest /= 10;
        }
        let zeros = digits.iter().take(9).take_while(|&&digit| digit == b'0').count();
        self.add(digits.get(zeros..).unwrap_or_default());
    }
}

fn say(line: &mut Line, call: i32, thread: &[u8]) {
    line.add(b"the thread ");
    line.add(thread);
    line.add(b" has made a system call that it may not make: ");
    match usize::try_from(call).ok().and_then(syscalls::Sysno::new) {
        Some(known) => line.add(known.name().as_bytes()),
        None => line.add(b"an unknown one"),
    }
    line.add(b" (");
    line.add_number(call.unsigned_abs());
    line.add(
        b"), so the process has ended; report this, and meanwhile use --no-seccomp if all that it serves is trusted\n",
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said() {
        let said = |call, thread| {
            let mut line = Line::default();
            say(&mut line, call, thread);
            String::from_utf8(line.text[..line.length].to_vec()).unwrap()
        };
        assert!(
            said(41, b"vcpu0")
                .starts_with("the thread vcpu0 has made a system call that it may not make: socket (41), ")
        );
        assert!(said(0, b"vmm").contains(": read (0), "));
        let longest = said(i32::MIN, b"fifteen letters");
        assert!(longest.contains(": an unknown one (2147483648), ") && longest.ends_with("is trusted\n"), "{longest}");
    }
}
