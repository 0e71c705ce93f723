//! Which system calls the threads of a page server may make. docs/security.md says the same in words.
//!
//! A thread may make the calls that are in its own table and in that of the process, since it inherits that one.

use libc::*;
use sandbox::groups::{
    CHANGED_FILES, EVENTS, FILES, NARROWING, OWN_LIMITS, SYSTEM, TALK, THREAD, UNIX_SOCKETS, USERFAULTFD,
};
use sandbox::table::{Rule, always, bits, is, when};

/// Connections to other hosts, and looking up their names, for which the C library may load more of itself.
const NETWORK: &[Rule] = &[
    when(
        SYS_socket,
        &[
            &[is(0, AF_INET as u32)],
            &[is(0, AF_INET6 as u32)],
            &[is(0, AF_NETLINK as u32), is(2, NETLINK_ROUTE as u32)],
        ],
    ),
    always(SYS_sendmmsg),
    always(SYS_recvmmsg),
    when(SYS_ioctl, &[&[is(1, FIONREAD as u32)]]),
    // A file's, not what was written to memory.
    when(SYS_mmap, &[&[bits(3, MAP_ANONYMOUS as u64, 0)]]),
];

/// The whole process, if all snapshots lie on this host.
pub const PROCESS: &[&[Rule]] =
    &[THREAD, NARROWING, FILES, CHANGED_FILES, TALK, UNIX_SOCKETS, EVENTS, USERFAULTFD, OWN_LIMITS, SYSTEM];

/// The whole process, if snapshots have URLs.
pub const REMOTE_PROCESS: &[&[Rule]] =
    &[THREAD, NARROWING, FILES, CHANGED_FILES, TALK, UNIX_SOCKETS, EVENTS, USERFAULTFD, OWN_LIMITS, SYSTEM, NETWORK];

/// `huge-pages` and `drop-store`: memory is rearranged, or given back.
pub const MEMORY: &[&[Rule]] = &[THREAD, FILES];

/// `learn`: a file is written beside a snapshot.
pub const WRITER: &[&[Rule]] = &[THREAD, FILES, CHANGED_FILES];
