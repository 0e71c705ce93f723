//! Bad input of every kind: the host, the page server, snapshots, configurations, disks, clients, guests, command lines
//! and signals. Whatever it is, the vmm says in one line what is wrong, ends with the documented exit code, and leaves
//! nothing half-made behind; or it refuses the request and goes on.

#![allow(missing_docs, reason = "tests are named for what they show")]

mod common_bad;
