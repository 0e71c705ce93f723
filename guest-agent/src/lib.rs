//! The agent that a Linux guest runs, as a service or as its first process.
//!
//! Rules without I/O, each tested by itself:
//!
//! - [`gate`]: which requests a guest may serve in which state
//! - [`frames`]: requests out of a stream of bytes
//! - [`readiness`]: how ready the guest is, from what systemd says or how start jobs end
//! - [`users`]: users and groups out of the guest's own files
//!
//! What works on the guest:
//!
//! - [`serve`]: connections, and what becomes of each request; [`stream`] is one connection, [`address`] its two kinds
//! - [`exec`], [`files`], [`hooks`]: programs, files, hooks and start jobs; [`spawn`] starts every process
//! - [`identity`]: a clone becomes itself, through the trait [`system::System`], which tests replace; [`network`]
//! - [`announce`]: tells the host how ready the guest is, and hears when the guest has been restored
//! - [`init`]: the first process
//!
//! No async runtime: a thread per connection, and few of them.

pub mod address;
pub mod announce;
pub mod exec;
pub mod files;
pub mod frames;
pub mod gate;
pub mod hooks;
pub mod identity;
pub mod init;
pub mod network;
pub mod options;
pub mod readiness;
pub mod serve;
pub mod spawn;
pub mod stream;
pub mod system;
pub mod users;

/// Writes a line to standard error, which is the journal or the console. A console that is gone is no reason to stop.
pub fn say(line: impl std::fmt::Display) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "guest-agent: {line}");
}
