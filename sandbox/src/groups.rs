//! System calls that belong together, for tables to be made of.

use crate::table::{Case, Rule, always, bits, is, refused, when, without};
use libc::*;

/// Bits of protection that make memory executable.
const EXECUTABLE: u64 = PROT_EXEC as u64;
/// A new thread, in the namespaces of the others. No new process.
const NAMESPACES: i32 =
    CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET;
const NEW_THREAD: Case = &[bits(0, (CLONE_THREAD | NAMESPACES) as u32 as u64, CLONE_THREAD as u64)];
/// The signal by which a vCPU is called out of its guest: the first that the C library (glibc, musl) does not use itself.
const KICKS: [u32; 2] = [34, 35];
/// What the kernel has told this process at its start (`PR_GET_AUXV`).
const PR_GET_AUXV: u32 = 0x4155_5856;

/// What every thread does: lives, waits, takes memory, logs, ends.
pub const THREAD: &[Rule] = &[
    // What is open. Nothing is opened by these.
    always(SYS_read),
    always(SYS_write),
    always(SYS_readv),
    always(SYS_writev),
    always(SYS_close),
    always(SYS_fstat),
    always(SYS_lseek),
    always(SYS_fcntl),
    always(SYS_poll),
    always(SYS_ppoll),
    // Memory, none of which can be executed.
    always(SYS_brk),
    when(SYS_mmap, &[&[without(2, EXECUTABLE)]]),
    when(SYS_mprotect, &[&[without(2, EXECUTABLE)]]),
    always(SYS_munmap),
    always(SYS_mremap),
    always(SYS_madvise),
    // Waiting, and the time.
    always(SYS_futex),
    always(SYS_nanosleep),
    always(SYS_clock_nanosleep),
    always(SYS_clock_gettime),
    always(SYS_clock_getres),
    always(SYS_gettimeofday),
    always(SYS_restart_syscall),
    always(SYS_sched_yield),
    always(SYS_membarrier),
    // Signals. Those that may be sent do no harm to a stranger but to end it, if it is of the same user.
    always(SYS_rt_sigaction),
    always(SYS_rt_sigprocmask),
    always(SYS_rt_sigreturn),
    always(SYS_sigaltstack),
    when(SYS_tgkill, &[&[is(2, SIGABRT as u32)], &[is(2, KICKS[0])], &[is(2, KICKS[1])]]),
    when(SYS_tkill, &[&[is(1, SIGABRT as u32)], &[is(1, KICKS[0])], &[is(1, KICKS[1])]]),
    // Threads: their beginning, and their end.
    when(SYS_clone, &[NEW_THREAD]),
    // Its flags are in memory, where no filter can see them.
    refused(SYS_clone3, ENOSYS),
    always(SYS_rseq),
    always(SYS_set_robust_list),
    always(SYS_set_tid_address),
    always(SYS_sched_getaffinity),
    when(SYS_prctl, &[&[is(0, PR_SET_NAME as u32)], &[is(0, PR_GET_NAME as u32)], &[is(0, PR_GET_AUXV)]]),
    always(SYS_exit),
    always(SYS_exit_group),
    // Who this is, and what is random.
    always(SYS_getpid),
    always(SYS_gettid),
    always(SYS_getuid),
    always(SYS_geteuid),
    always(SYS_getcpu),
    always(SYS_getrandom),
];

/// What a process does that gives its threads filters of their own, which can only take away. Flags might make them something else.
pub const NARROWING: &[Rule] = &[
    when(SYS_prctl, &[&[is(0, PR_SET_NO_NEW_PRIVS as u32)]]),
    when(SYS_seccomp, &[&[is(0, SECCOMP_SET_MODE_FILTER), bits(1, u64::MAX, 0)]]),
];

/// Files that are there: finding, opening and reading them.
pub const FILES: &[Rule] = &[
    always(SYS_open),
    always(SYS_openat),
    always(SYS_stat),
    always(SYS_lstat),
    always(SYS_newfstatat),
    always(SYS_statx),
    always(SYS_access),
    always(SYS_faccessat),
    always(SYS_faccessat2),
    always(SYS_readlink),
    always(SYS_readlinkat),
    always(SYS_getdents64),
    always(SYS_getcwd),
    always(SYS_statfs),
    always(SYS_fstatfs),
    always(SYS_pread64),
    always(SYS_preadv),
    always(SYS_preadv2),
    always(SYS_fadvise64),
    always(SYS_flock),
];

/// Files that are made, written, renamed and removed.
pub const CHANGED_FILES: &[Rule] = &[
    always(SYS_pwrite64),
    always(SYS_pwritev),
    always(SYS_pwritev2),
    always(SYS_copy_file_range),
    always(SYS_ftruncate),
    always(SYS_fallocate),
    always(SYS_fsync),
    always(SYS_fdatasync),
    always(SYS_sync_file_range),
    always(SYS_fchmod),
    always(SYS_utimensat),
    always(SYS_umask),
    always(SYS_mkdir),
    always(SYS_mkdirat),
    always(SYS_rmdir),
    always(SYS_unlink),
    always(SYS_unlinkat),
    always(SYS_rename),
    always(SYS_renameat),
    always(SYS_renameat2),
    always(SYS_link),
    always(SYS_linkat),
    always(SYS_memfd_create),
    when(SYS_ioctl, &[&[is(1, FICLONE as u32)]]),
];

/// Talking on sockets that are there.
pub const TALK: &[Rule] = &[
    always(SYS_sendto),
    always(SYS_recvfrom),
    always(SYS_sendmsg),
    always(SYS_recvmsg),
    always(SYS_shutdown),
    always(SYS_getsockopt),
    always(SYS_setsockopt),
    always(SYS_getsockname),
    always(SYS_getpeername),
    // Whether a socket blocks, and how much of what was sent is unread.
    when(SYS_ioctl, &[&[is(1, FIONBIO as u32)], &[is(1, TIOCOUTQ as u32)]]),
];

/// Making sockets that lead to processes of this host, and knowing these.
pub const UNIX_SOCKETS: &[Rule] = &[
    when(SYS_socket, &[&[is(0, AF_UNIX as u32)]]),
    when(SYS_socketpair, &[&[is(0, AF_UNIX as u32)]]),
    always(SYS_bind),
    always(SYS_listen),
    always(SYS_accept4),
    always(SYS_connect),
    always(SYS_pidfd_open),
];

/// Event loops: what is waited for, and what wakes it up.
pub const EVENTS: &[Rule] = &[
    always(SYS_epoll_create1),
    always(SYS_epoll_ctl),
    always(SYS_epoll_wait),
    always(SYS_epoll_pwait),
    always(SYS_eventfd2),
    always(SYS_timerfd_create),
    always(SYS_timerfd_settime),
    always(SYS_signalfd4),
    always(SYS_pipe2),
];

/// Faults of other memory than one's own: the ioctls of userfaultfd, which are those of type 0xaa.
pub const USERFAULTFD: &[Rule] = &[always(SYS_userfaultfd), when(SYS_ioctl, &[&[bits(1, 0xff00, 0xaa00)]])];

/// Its own limits, which it can raise no further than it was allowed to.
pub const OWN_LIMITS: &[Rule] = &[when(SYS_prlimit64, &[&[is(0, 0)]])];

/// What the kernel and the terminal are.
pub const SYSTEM: &[Rule] = &[
    always(SYS_uname),
    always(SYS_sysinfo),
    when(SYS_ioctl, &[&[is(1, TCGETS as u32)], &[is(1, TCGETS2 as u32)], &[is(1, TIOCGWINSZ as u32)]]),
];

/// What a thread has that opens nothing: the C library's allocator looks up how many CPUs there are, if it can, and what prints a
/// backtrace where the program's file is.
pub const OPENS_NOTHING: &[Rule] = &[
    refused(SYS_open, EACCES),
    refused(SYS_openat, EACCES),
    refused(SYS_readlink, EACCES),
    refused(SYS_readlinkat, EACCES),
    refused(SYS_getcwd, EACCES),
    refused(SYS_stat, EACCES),
    refused(SYS_newfstatat, EACCES),
];
