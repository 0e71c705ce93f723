//! Making a userfaultfd, and telling one from any other descriptor.

// UNSAFETY: the `userfaultfd` crate offers no system-call fallback and no checked way to adopt a received descriptor.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use userfaultfd::{FeatureFlags, Uffd, UffdBuilder};
use vmm_sys_util::ioctl::ioctl_with_mut_ref;

/// Whose faults a userfaultfd catches.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Faults {
    /// Those of user code only; any process may have this.
    User,
    /// Those of the kernel as well, which is how a vCPU's faults arrive.
    UserAndKernel,
}

/// A userfaultfd could not be made.
#[derive(Debug, thiserror::Error)]
#[error("no userfaultfd ({reasons}); {remedy}")]
pub struct UffdError {
    reasons: String,
    remedy: &'static str,
    host_cannot: bool,
}

impl UffdError {
    /// What was tried, and what the kernel said.
    pub fn reasons(&self) -> &str {
        &self.reasons
    }

    /// What to do.
    pub fn remedy(&self) -> &'static str {
        self.remedy
    }

    /// Whether there is none to be had on this host, as opposed to none at this moment.
    pub fn host_cannot(&self) -> bool {
        self.host_cannot
    }
}

/// A received descriptor is not one that faults can be served on.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdoptError {
    /// It is something else.
    #[error("the descriptor is {0}, not a userfaultfd")]
    Other(String),
    /// Reading it would block the server.
    #[error("the userfaultfd is blocking: create it with O_NONBLOCK")]
    Blocking,
    /// It could not be looked at.
    #[error("cannot look at the descriptor: {0}")]
    Unknown(String),
}

/// Makes a userfaultfd (close-on-exec, non-blocking) that also catches kernel-mode faults, as KVM needs.
pub fn create() -> Result<Uffd, UffdError> {
    create_for(Faults::UserAndKernel, FeatureFlags::empty())
}

/// As [`create`], with features that the kernel must have.
pub fn create_with(features: FeatureFlags) -> Result<Uffd, UffdError> {
    create_for(Faults::UserAndKernel, features)
}

/// Makes a userfaultfd (close-on-exec, non-blocking) for user-mode faults, which needs no privilege.
///
/// A kernel-mode access to a missing page of a range registered with it fails instead of waiting.
pub fn create_user_only() -> Result<Uffd, UffdError> {
    create_for(Faults::User, FeatureFlags::empty())
}

fn create_for(faults: Faults, features: FeatureFlags) -> Result<Uffd, UffdError> {
    let mut builder = UffdBuilder::new();
    builder.close_on_exec(true).non_blocking(true).user_mode_only(faults == Faults::User).require_features(features);
    match builder.create() {
        Ok(uffd) => Ok(uffd),
        // The device is there but closed to us; the system call may yet be open.
        Err(userfaultfd::Error::OpenDevUserfaultfd(device)) => create_by_syscall(faults, features)
            .map_err(|call| describe(&format!("/dev/userfaultfd: {device}; system call: {call}"), Some(&call))),
        // Said by the device, if it is there, or by the system call; the crate's text for it names no reason.
        Err(userfaultfd::Error::SystemError(errno)) => {
            let error = io::Error::from_raw_os_error(errno as i32);
            Err(describe(&error.to_string(), Some(&error)))
        }
        Err(other) => Err(describe(&other.to_string(), None)),
    }
}

/// Says what to do about the error that the kernel gave last.
fn describe(reasons: &str, last: Option<&io::Error>) -> UffdError {
    let (remedy, host_cannot) = match last.and_then(io::Error::raw_os_error) {
        Some(libc::EMFILE | libc::ENFILE) => ("raise the limit of open files (ulimit -n)", false),
        Some(libc::ENOMEM) => ("free some memory", false),
        Some(libc::ENOSYS) => ("this kernel has none: one built with CONFIG_USERFAULTFD is needed", true),
        Some(libc::EINVAL) => ("this kernel's lacks what is needed: use a newer kernel", true),
        _ => (
            "give this user access to /dev/userfaultfd, or CAP_SYS_PTRACE, or set sysctl vm.unprivileged_userfaultfd=1",
            true,
        ),
    };
    UffdError { reasons: reasons.to_string(), remedy, host_cannot }
}

/// `struct uffdio_api` of the kernel's interface.
#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

const UFFD_API: u64 = 0xAA;
const UFFD_USER_MODE_ONLY: libc::c_int = 1;

mod request {
    #![allow(missing_docs, reason = "the macro makes an undocumented public function")]
    vmm_sys_util::ioctl_iowr_nr!(UFFDIO_API, 0xAA, 0x3F, super::UffdioApi);
}

fn create_by_syscall(faults: Faults, features: FeatureFlags) -> io::Result<Uffd> {
    let user_only = if faults == Faults::User { UFFD_USER_MODE_ONLY } else { 0 };
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | user_only;
    // SAFETY: the call takes flags and no pointer; it can only return a new descriptor or fail.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us and nobody else knows its number.
    let uffd = unsafe { Uffd::from_raw_fd(fd as libc::c_int) };
    let mut api = UffdioApi { api: UFFD_API, features: features.bits(), ioctls: 0 };
    // SAFETY: UFFDIO_API reads and writes one `uffdio_api`, which is what `api` is laid out as.
    if unsafe { ioctl_with_mut_ref(&uffd, request::UFFDIO_API(), &mut api) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(uffd)
}

/// Sees to it that reading a userfaultfd never waits: whoever else has it may have changed that.
pub fn make_nonblocking(uffd: &Uffd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(uffd)?;
    if !flags.contains(rustix::fs::OFlags::NONBLOCK) {
        rustix::fs::fcntl_setfl(uffd, flags | rustix::fs::OFlags::NONBLOCK)?;
    }
    Ok(())
}

/// Takes a descriptor that a client sent, if it is a userfaultfd that can be read without blocking.
pub fn adopt(fd: OwnedFd) -> Result<Uffd, AdoptError> {
    check(&fd)?;
    // SAFETY: ownership moves from `fd` to the `Uffd`, which closes it once; the check above says what it is.
    Ok(unsafe { Uffd::from_raw_fd(fd.into_raw_fd()) })
}

fn check(fd: &OwnedFd) -> Result<(), AdoptError> {
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .map_err(|error| AdoptError::Unknown(error.to_string()))?;
    if link.as_os_str() != "anon_inode:[userfaultfd]" {
        return Err(AdoptError::Other(format!("{:?}", link.display().to_string())));
    }
    let flags = rustix::fs::fcntl_getfl(fd).map_err(|error| AdoptError::Unknown(error.to_string()))?;
    if flags.contains(rustix::fs::OFlags::NONBLOCK) { Ok(()) } else { Err(AdoptError::Blocking) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;

    #[test]
    fn a_file_is_no_userfaultfd() {
        let file: OwnedFd = File::open("/dev/null").unwrap().into();
        assert_eq!(adopt(file).unwrap_err(), AdoptError::Other("\"/dev/null\"".into()));
    }

    #[test]
    fn the_system_call_makes_what_the_device_makes() {
        match create_by_syscall(Faults::User, FeatureFlags::EVENT_REMOVE) {
            // Not `into_raw_fd`: in this version of the crate that closes the descriptor it returns.
            Ok(uffd) => assert!(adopt(uffd.as_fd().try_clone_to_owned().unwrap()).is_ok()),
            Err(error) => println!("skipped: no userfaultfd here: {error}"),
        }
    }

    #[test]
    fn what_the_kernel_says_is_passed_on_whichever_way_was_taken() {
        // A feature that no kernel has.
        let error = create_for(Faults::User, FeatureFlags::from_bits_retain(1 << 62)).unwrap_err();
        if error.remedy().contains("CONFIG_USERFAULTFD") {
            return println!("skipped: no userfaultfd here: {error}");
        }
        assert!(error.host_cannot() && error.remedy().contains("newer kernel"), "{error}");
        assert!(error.reasons().contains("Invalid argument"), "{error}");
    }

    #[test]
    fn the_error_says_what_is_missing() {
        let text = describe("system call: EPERM", Some(&io::Error::from_raw_os_error(libc::EPERM))).to_string();
        assert!(text.contains("/dev/userfaultfd") && text.contains("CAP_SYS_PTRACE"), "{text}");
        let limit = describe("x", Some(&io::Error::from_raw_os_error(libc::EMFILE)));
        assert!(!limit.host_cannot() && limit.remedy().contains("ulimit"), "{limit}");
        assert!(describe("x", Some(&io::Error::from_raw_os_error(libc::ENOSYS))).to_string().contains("CONFIG"));
    }
}
