//! REST documents of what a VM has done and what memory it has.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Answer to `GET /vm/stats`. Counters begin with the process, and never fall.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VmStats {
    /// For how long this process has run, in microseconds.
    pub uptime_us: u64,
    /// What guest memory consists of.
    pub memory: MemoryStats,
}

/// What guest memory consists of, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MemoryStats {
    /// All of it.
    pub size_bytes: u64,
    /// Nobody has touched it here: no memory of the host is behind it.
    pub not_loaded_bytes: u64,
    /// Pages of the image as they are, which other guests may have as well.
    pub shared_bytes: u64,
    /// The guest's own pages.
    pub private_bytes: u64,
}

/// Query of `GET /vm/memory-map`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MemoryMapQuery {
    /// Guest-physical address to begin at; 0 when absent.
    #[serde(default)]
    pub start: u64,
    /// Most runs in the answer, 1 to 10000; 1000 when absent.
    #[serde(default = "default_runs")]
    #[schemars(range(min = 1, max = 10_000))]
    pub max_runs: u32,
}

fn default_runs() -> u32 {
    1000
}

impl Default for MemoryMapQuery {
    fn default() -> Self {
        MemoryMapQuery { start: 0, max_runs: default_runs() }
    }
}

/// Answer to `GET /vm/memory-map`: guest memory as runs of pages of a kind, in ascending order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MemoryMap {
    /// The runs.
    pub runs: Vec<MemoryRun>,
    /// Where to go on, as `start` of the next call, if this is not all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<u64>,
}

/// A run of pages of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct MemoryRun {
    /// Guest-physical address of its first byte.
    pub guest_addr: u64,
    /// Its size, in bytes.
    pub size_bytes: u64,
    /// What its pages are.
    pub kind: PageKind,
}

/// What a page of guest memory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PageKind {
    /// Nobody has touched it here.
    NotLoaded,
    /// A page of the image as it is.
    Shared,
    /// The guest's own.
    Private,
}
