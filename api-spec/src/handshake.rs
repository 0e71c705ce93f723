//! The page-server protocol: a vmm and the page server over a Unix stream socket.
//!
//! Each message is one JSON object on one line (ended by `\n`, at most [`MAX_MESSAGE`] bytes). The client speaks first:
//!
//! ```text
//!   vmm                                              page server
//!   Hello { version, image, size, mode }      ->
//!                                             <-     Reply::Store { size, page_size }   + descriptor of the page store
//!   (maps the store privately, creates a userfaultfd and registers the ranges for MISSING faults)
//!   Attach { regions }  + the userfaultfd     ->
//!                                             <-     Reply::Serving
//!   (starts vCPUs; the connection stays open for the life of the guest)
//!   Ping { ping }                             ->     at any time, one after the other
//!                                             <-     Reply::Pong { ping, waiting, away }
//!                                             <-     Reply::Report: at any time, if the server is to learn the working set
//!   Used { read, written, more } ...          ->
//! ```
//!
//! At any step the server may answer [`Reply::Refused`] and close: then the client must not go on with what it was given. Either
//! side closing without a word tells the other that it is gone.
//!
//! With [`Mode::Copy`] the server gives no store ([`Reply::Image`] instead of [`Reply::Store`]): it copies each page into the
//! client's memory. That is how a guest is served that has lost its page server and found another one.
//!
//! **Firecracker's copy mode** is another protocol: the client sends one JSON array of [`CopyRegion`] (no line end), with
//! its userfaultfd, and nothing more is said in either direction. So a first byte `[` instead of `{` tells the two apart.

use serde::{Deserialize, Serialize};

/// Version of the protocol.
pub const VERSION: u32 = 2;
/// Longest message, in bytes, line end included. Longer ones are refused.
pub const MAX_MESSAGE: usize = 16 * 1024;
/// How long either side waits for the other's next message before it gives up, in milliseconds.
pub const REPLY_DEADLINE_MS: u64 = 5_000;
/// How long a client waits for the answer to its [`Hello`] before it reports a server of another protocol, in milliseconds.
pub const HELLO_DEADLINE_MS: u64 = 500;

/// The client's first message: which image it wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hello {
    /// [`VERSION`] of the client.
    pub version: u32,
    /// Root digest of the memory image, as `snap.json` has it.
    pub image: String,
    /// Size of the memory image, in bytes.
    pub size: u64,
    /// How pages are to come to the client.
    #[serde(default)]
    pub mode: Mode,
}

/// How pages come from the server to a client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Through a store that the client maps, and shares with other guests.
    #[default]
    Shared,
    /// Each by `UFFDIO_COPY`, into memory that nobody shares.
    Copy,
}

/// One range of guest memory in the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Address of the range in the client, in bytes.
    pub base_host_virt_addr: u64,
    /// Size of the range, in bytes.
    pub size: u64,
    /// Where the range begins in the memory image, in bytes.
    pub offset: u64,
    /// Size of the client's pages there, in bytes.
    pub page_size: u64,
}

/// One range of guest memory, as the message of copy mode lists it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyRegion {
    /// The range. `offset` is the sum of the sizes before it, which is its place in the memory file.
    #[serde(flatten)]
    pub region: Region,
    /// `page_size` once more, in bytes, under the deprecated name that older page servers look for.
    pub page_size_kib: u64,
}

impl From<Region> for CopyRegion {
    fn from(region: Region) -> Self {
        CopyRegion { region, page_size_kib: region.page_size }
    }
}

/// The client's second message, sent with its userfaultfd.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Attach {
    /// The ranges that are registered with the userfaultfd. They cover the image exactly once.
    pub regions: Vec<Region>,
}

/// A served client's question whether the server does its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ping {
    /// Any number: the answer bears it.
    pub ping: u64,
}

/// What a served client's guest has used of the image since it was restored: the answer to [`Reply::Report`], in as many messages as
/// it takes. Only ever advice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Used {
    /// Pages of the image that it has read, or run: runs of a first page and a number of pages, in any order.
    pub read: Vec<(u64, u64)>,
    /// Pages that it has written.
    pub written: Vec<(u64, u64)>,
    /// Another message of this answer follows.
    pub more: bool,
}

/// Most runs that one [`Used`] has, so that it is no longer than a message may be.
pub const MAX_USED_RUNS: usize = 256;
/// Most messages of one answer.
pub const MAX_USED_MESSAGES: usize = 64;

/// What a served client says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Word {
    /// A question.
    Ping(Ping),
    /// An answer.
    Used(Used),
}

/// What the server answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case", deny_unknown_fields)]
pub enum Reply {
    /// Answer to [`Ping`]. Every fault that had been raised before the ping was sent has been answered, except those that wait.
    Pong {
        /// The number of the ping.
        ping: u64,
        /// So many of the client's faults wait for bytes that the server has not got yet.
        waiting: u64,
        /// Why they may have to wait long, if the place where the bytes come from cannot be reached.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        away: Option<String>,
    },
    /// The client is to tell what its guest has used ([`Used`]). It may leave that.
    Report,
    /// Answer to [`Hello`] of [`Mode::Copy`].
    Image {
        /// Size of the image, in bytes.
        size: u64,
        /// Unit in which pages are copied, in bytes.
        page_size: u64,
    },
    /// Answer to [`Hello`] of [`Mode::Shared`], sent with a descriptor of the page store.
    Store {
        /// Size of the store, in bytes: that of the image.
        size: u64,
        /// Unit in which the store is filled, in bytes.
        page_size: u64,
    },
    /// Answer to [`Attach`]: faults are being served from now on.
    Serving,
    /// The server will not serve this client.
    Refused {
        /// What is wrong and what to do, in one line.
        reason: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_copy_mode_message_is_firecrackers() {
        let region = Region { base_host_virt_addr: 1 << 40, size: 8192, offset: 4096, page_size: 4096 };
        let json = serde_json::to_value([CopyRegion::from(region)]).unwrap();
        let expected = serde_json::json!([{
            "base_host_virt_addr": 1u64 << 40, "size": 8192, "offset": 4096, "page_size": 4096, "page_size_kib": 4096
        }]);
        assert_eq!(json, expected);
        assert_eq!(serde_json::from_value::<Vec<CopyRegion>>(json).unwrap(), [region.into()]);
    }

    #[test]
    fn the_longest_answer_of_what_was_used_fits_into_its_message() {
        let runs = vec![(u64::MAX >> 12, u64::MAX >> 12); MAX_USED_RUNS / 2];
        let used = Used { read: runs.clone(), written: runs, more: false };
        let json = serde_json::to_vec(&used).unwrap();
        assert!(json.len() < MAX_MESSAGE, "{} bytes", json.len());
        assert_eq!(serde_json::from_slice::<Word>(&json).unwrap(), Word::Used(used));
        assert_eq!(serde_json::from_str::<Word>("{\"ping\":1}").unwrap(), Word::Ping(Ping { ping: 1 }));
        assert!(serde_json::from_str::<Word>("{\"ping\":1,\"more\":true}").is_err());
    }
}
