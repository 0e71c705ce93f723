//! Which system calls the threads of a vmm may make. docs/security.md says the same in words.
//!
//! A thread may make the calls that are in its own table and in [`PROCESS`], since it inherits that one.

use libc::*;
use sandbox::groups::{
    CHANGED_FILES, EVENTS, FILES, NARROWING, OPENS_NOTHING, OWN_LIMITS, SYSTEM, TALK, THREAD, UNIX_SOCKETS, USERFAULTFD,
};
use sandbox::table::{Rule, always, bits, is, when};

const KVM_RUN: u32 = 0xae80;
const KVM_GET_REGS: u32 = 0x8090_ae81;
const KVM_KVMCLOCK_CTRL: u32 = 0xaead;
const PAGEMAP_SCAN: u32 = 0xc060_6610;
const UFFDIO_WAKE: u32 = 0x8010_aa02;

/// All of KVM: its ioctls are those of type 0xae.
const KVM: &[Rule] = &[when(SYS_ioctl, &[&[bits(1, 0xff00, 0xae00)]])];

/// A guest that runs, and its processor's part of that.
const GUEST: &[Rule] = &[when(SYS_ioctl, &[&[is(1, KVM_RUN)], &[is(1, KVM_KVMCLOCK_CTRL)], &[is(1, KVM_GET_REGS)]])];

/// What a driver in the guest chooses of a tap device when it starts.
const TAP_OFFLOADS: &[Rule] = &[when(SYS_ioctl, &[&[is(1, TUNSETOFFLOAD as u32)]])];

/// Tap devices, and how they are found.
const TAPS: &[Rule] =
    &[when(SYS_ioctl, &[&[is(1, TUNSETIFF as u32)], &[is(1, TUNSETVNETHDRSZ as u32)], &[is(1, SIOCGIFINDEX as u32)]])];

/// Pseudo-terminals, and the terminal that the vmm was started at.
const TERMINALS: &[Rule] = &[when(
    SYS_ioctl,
    &[
        &[is(1, TCSETS as u32)],
        &[is(1, TCSETSW as u32)],
        &[is(1, TCSETS2 as u32)],
        &[is(1, TIOCGPTN as u32)],
        &[is(1, TIOCSPTLCK as u32)],
        &[is(1, TIOCGPTPEER as u32)],
    ],
)];

/// Which pages of this process are there.
const PAGES: &[Rule] = &[when(SYS_ioctl, &[&[is(1, PAGEMAP_SCAN)]])];

/// Timers of devices, which a driver's start and end wind: the balloon's statistics.
const TIMERS: &[Rule] = &[always(SYS_timerfd_settime)];

/// The streams of a vsock device that its driver resets are hung up.
const HANGING_UP: &[Rule] = &[always(SYS_shutdown)];

/// The files of disks, which are open: read, written, made sparse, and brought to their disk.
const DISKS: &[Rule] = &[
    always(SYS_pread64),
    always(SYS_preadv),
    always(SYS_preadv2),
    always(SYS_pwrite64),
    always(SYS_pwritev),
    always(SYS_pwritev2),
    always(SYS_fallocate),
    always(SYS_fdatasync),
    always(SYS_fsync),
    always(SYS_ftruncate),
];

/// Whoever waits for a page that its guest gives back in copy mode is let go.
const WAKES: &[Rule] = &[when(SYS_ioctl, &[&[is(1, UFFDIO_WAKE)]])];

/// The console's file is as long as this says.
const FILE_LENGTH: &[Rule] = &[always(SYS_statx)];

/// A userfaultfd takes the number that was kept for it.
const NUMBERS: &[Rule] = &[always(SYS_dup3)];

/// The whole process; what the event loop does, and what any of the other threads does. KVM comes first, as its
/// requests do: cases are looked at in this order.
pub const PROCESS: &[&[Rule]] = &[
    KVM,
    THREAD,
    NARROWING,
    FILES,
    CHANGED_FILES,
    TALK,
    UNIX_SOCKETS,
    EVENTS,
    USERFAULTFD,
    NUMBERS,
    OWN_LIMITS,
    SYSTEM,
    TAP_OFFLOADS,
    TAPS,
    TERMINALS,
    PAGES,
];

/// `vcpu0` and so on: the guest, and the registers of its devices. It opens nothing.
pub const VCPU: &[&[Rule]] = &[THREAD, OPENS_NOTHING, NARROWING, GUEST, TAP_OFFLOADS, TIMERS, HANGING_UP, FILE_LENGTH];

/// `devices`: the work of the guest's devices, between its queues, the files of its disks, taps, and the sockets of its vsock device.
/// It opens nothing.
pub const DEVICES: &[&[Rule]] =
    &[THREAD, OPENS_NOTHING, DISKS, TALK, UNIX_SOCKETS, EVENTS, TAP_OFFLOADS, WAKES, FILE_LENGTH];

/// `console` and `output`: the console's two directions.
pub const STREAM: &[&[Rule]] = &[THREAD, OPENS_NOTHING, FILE_LENGTH];

/// `snapshot`, and the threads that it shares its work with: a snapshot's files.
pub const WRITER: &[&[Rule]] = &[THREAD, FILES, CHANGED_FILES, SYSTEM, PAGES];

/// `replay`, `scan`, `private` and `first-page`: the guest's memory is looked at, and touched.
pub const MEMORY: &[&[Rule]] = &[THREAD, FILES, &[always(SYS_memfd_create)], PAGES];

/// `keeper`, `attach`, `report`, `prepare`, `shutdown` and `fork`: page servers, other vmms and the guest's agent are talked to, and memory is kept without them.
pub const PEER: &[&[Rule]] = &[THREAD, FILES, CHANGED_FILES, TALK, UNIX_SOCKETS, EVENTS, USERFAULTFD, PAGES];
