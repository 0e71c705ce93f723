//! The calls of the REST API, as a table: the vmm's router, its command line (`vmm ctl`), the published document and the
//! tests that hold them together all go by it.

use crate::devices::{
    Balloon, BalloonStatistics, BalloonStatisticsUpdate, BalloonUpdate, Drive, DriveUpdate, Entropy, NetworkInterface,
    NetworkUpdate, Serial,
};
use crate::fork::{ForkLoad, VmFork, VmForked};
use crate::logger::{Logger, MetricsSink};
use crate::reset::{VmCheckpoint, VmCheckpointed, VmReset, VmResetDone};
use crate::saved::{SavedState, VmStop, VmStopped};
use crate::snapshot::{SnapshotCancel, SnapshotCreate, SnapshotLoad, SnapshotStatus};
use crate::stats::{MemoryMap, MemoryMapQuery, VmStats};
use crate::strict::{self, DocumentError};
use crate::vm::{
    Action, BootSource, InstanceInfo, MachineConfig, MachinePatch, Version, VmConfig, VmPatch, VmSave, Vsock,
};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::DeserializeOwned;

/// A call.
#[derive(Debug)]
pub struct Operation {
    /// Its name, unique among all.
    pub id: &'static str,
    /// HTTP method.
    pub method: &'static str,
    /// Path. A last part in braces stands for the name of a device.
    pub path: &'static str,
    /// What it does, in a few words.
    pub summary: &'static str,
    /// When it is taken.
    pub when: When,
    /// What its query says, if it takes one.
    pub query: Option<Shape>,
    /// Its body, if it takes one.
    pub body: Option<Shape>,
    /// What its answer is when it succeeds.
    pub answer: Answer,
    /// The commands of `vmm ctl` that make it. None for a call that is not offered.
    pub commands: &'static [Command],
}

/// When a call is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// At any time.
    Always,
    /// Before a VM was booted or loaded.
    BeforeStart,
    /// Before a VM was booted or loaded, and before any part of a boot configuration was given.
    Fresh,
    /// Once a VM was booted or loaded.
    AfterStart,
    /// Never: what it is about is not offered.
    Never,
}

impl When {
    /// The same in words.
    pub fn words(self) -> &'static str {
        match self {
            When::Always => "At any time.",
            When::BeforeStart => "Before a VM was started.",
            When::Fresh => "Before a VM was started or anything of a boot configuration was given.",
            When::AfterStart => "Once a VM was started.",
            When::Never => "Not offered: always refused.",
        }
    }
}

/// The form of a document, and an example of it.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Name of its type.
    pub name: fn() -> String,
    /// Its JSON schema, or a reference to it.
    pub schema: fn(&mut SchemaGenerator) -> Schema,
    /// Reads a document of this form, as the vmm does, and says what is wrong with it.
    pub check: fn(&[u8]) -> Result<(), DocumentError>,
    /// An example, as JSON.
    pub example: &'static str,
}

impl std::fmt::Debug for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&(self.name)())
    }
}

/// The answer of a call that succeeds.
#[derive(Clone, Copy, Debug)]
pub enum Answer {
    /// 204 and no body.
    Done,
    /// 200 and a JSON document.
    Document(Shape),
    /// 200 and plain text, such as this.
    Text(&'static str),
}

/// A command of `vmm ctl` that makes a call.
#[derive(Clone, Copy, Debug)]
pub struct Command {
    /// Its words, such as `drive set`.
    pub words: &'static str,
    /// What it does, in a few words; as the call's summary where empty.
    pub summary: &'static str,
    /// The field of the body that is given as an argument without a name.
    pub argument: Option<&'static str>,
    /// The whole body, as JSON, of a command that takes no fields.
    pub body: Option<&'static str>,
    /// When what it says is taken, if not whenever the call is.
    pub when: Option<When>,
    /// The field of the body whose words are flags as well, of which one can be given.
    pub flags: Option<&'static str>,
}

/// A command whose options are the fields of the body.
const fn command(words: &'static str) -> Command {
    Command { words, summary: "", argument: None, body: None, when: None, flags: None }
}

/// A command with one field as an argument without a name.
const fn with_argument(words: &'static str, field: &'static str) -> Command {
    Command { argument: Some(field), ..command(words) }
}

/// A command that takes the words of this field as flags.
const fn with_flags(words: &'static str, field: &'static str) -> Command {
    Command { flags: Some(field), ..command(words) }
}

/// A command that says one thing.
const fn fixed(words: &'static str, summary: &'static str, body: &'static str) -> Command {
    Command { summary, body: Some(body), ..command(words) }
}

impl Command {
    const fn at(self, when: When) -> Self {
        Command { when: Some(when), ..self }
    }
}

const fn shape<T: JsonSchema + DeserializeOwned>(example: &'static str) -> Shape {
    Shape {
        name: || T::schema_name().into_owned(),
        schema: |generator| generator.subschema_for::<T>(),
        check: |document| strict::from_slice::<T>(document).map(drop),
        example,
    }
}

const fn get(id: &'static str, path: &'static str, summary: &'static str, answer: Answer) -> Operation {
    Operation { id, method: "GET", path, summary, when: When::Always, query: None, body: None, answer, commands: &[] }
}

const fn put(id: &'static str, path: &'static str, summary: &'static str, body: Shape) -> Operation {
    Operation {
        id,
        method: "PUT",
        path,
        summary,
        when: When::BeforeStart,
        query: None,
        body: Some(body),
        answer: Answer::Done,
        commands: &[],
    }
}

const fn patch(id: &'static str, path: &'static str, summary: &'static str, body: Shape) -> Operation {
    Operation { method: "PATCH", when: When::AfterStart, ..put(id, path, summary, body) }
}

const fn declined(id: &'static str, method: &'static str, path: &'static str, what: &'static str) -> Operation {
    Operation {
        id,
        method,
        path,
        summary: what,
        when: When::Never,
        query: None,
        body: None,
        answer: Answer::Done,
        commands: &[],
    }
}

impl Operation {
    const fn by(self, commands: &'static [Command]) -> Self {
        Operation { commands, ..self }
    }

    const fn at(self, when: When) -> Self {
        Operation { when, ..self }
    }

    /// The start of the path and the name of what it ends with, if that is a name in braces.
    pub fn named(&self) -> Option<(&'static str, &'static str)> {
        let (start, name) = self.path.split_once('{')?;
        Some((start, name.strip_suffix('}')?))
    }

    /// The name at the end of the path as messages call it, such as `drives.drive_id`, if there is one.
    pub fn name_field(&self) -> Option<String> {
        let (start, name) = self.named()?;
        Some(format!("{}.{name}", start.trim_matches('/')))
    }

    /// Whether a path is one that this call's stands for. `Some` with the name at its end, or with nothing.
    pub fn matches<'p>(&self, path: &'p str) -> Option<&'p str> {
        match self.named() {
            Some((start, _)) => path.strip_prefix(start).filter(|name| !name.is_empty() && !name.contains('/')),
            None => (self.path == path).then_some(""),
        }
    }
}

/// The call of this method and path, with the name at the path's end. A slash more at the end of the path means nothing.
pub fn find<'p>(method: &str, path: &'p str) -> Option<(&'static Operation, &'p str)> {
    let path = trimmed(path);
    OPERATIONS
        .iter()
        .filter(|operation| operation.method == method)
        .find_map(|operation| Some((operation, operation.matches(path)?)))
}

fn trimmed(path: &str) -> &str {
    path.strip_suffix('/').filter(|path| !path.is_empty()).unwrap_or(path)
}

/// The methods that a path takes.
pub fn methods(path: &str) -> Vec<&'static str> {
    let path = trimmed(path);
    OPERATIONS.iter().filter(|operation| operation.matches(path).is_some()).map(|operation| operation.method).collect()
}

/// All calls, in the order in which they are documented.
pub static OPERATIONS: &[Operation] = &[
    get(
        "getInfo",
        "/",
        "Tell where the VM stands",
        Answer::Document(shape::<InstanceInfo>(
            r#"{"id":"anonymous-instance","state":"Running","vmm_version":"0.1.0","app_name":"Coppice","readiness":"full"}"#,
        )),
    )
    .by(&[command("info")]),
    get(
        "getVersion",
        "/version",
        "Tell the vmm's version",
        Answer::Document(shape::<Version>(r#"{"firecracker_version":"0.1.0"}"#)),
    )
    .by(&[command("version")]),
    get(
        "getVmConfig",
        "/vm/config",
        "Tell the whole configuration in force",
        Answer::Document(shape::<VmConfig>(
            r#"{"boot-source":{"embedded_guest":true},"machine-config":{"vcpu_count":1,"mem_size_mib":128,"smt":false,"track_dirty_pages":false,"huge_pages":"None"},"vsock":{"guest_cid":3,"uds_path":"guest.vsock"},"drives":[],"network-interfaces":[]}"#,
        )),
    )
    .by(&[command("config")]),
    get(
        "getMachineConfig",
        "/machine-config",
        "Tell the vCPUs and the memory",
        Answer::Document(shape::<MachineConfig>(
            r#"{"vcpu_count":1,"mem_size_mib":128,"smt":false,"track_dirty_pages":false,"huge_pages":"None"}"#,
        )),
    )
    .by(&[command("machine show")]),
    put(
        "putMachineConfig",
        "/machine-config",
        "Set the vCPUs and the memory",
        shape::<MachineConfig>(r#"{"vcpu_count":2,"mem_size_mib":256}"#),
    )
    .by(&[command("machine set")]),
    patch(
        "patchMachineConfig",
        "/machine-config",
        "Change some of the vCPUs, the memory and its limit; once a VM was started, the limit only",
        shape::<MachinePatch>(r#"{"max_private_mib":64}"#),
    )
    .at(When::Always)
    .by(&[command("machine update")]),
    put(
        "putBootSource",
        "/boot-source",
        "Set what to boot",
        shape::<BootSource>(r#"{"kernel_image_path":"vmlinux","boot_args":"console=ttyS0"}"#),
    )
    .by(&[command("boot-source set")]),
    put(
        "putDrive",
        "/drives/{drive_id}",
        "Add a disk, or replace the one of that name",
        shape::<Drive>(r#"{"drive_id":"root","path_on_host":"root.ext4","is_root_device":true,"overlay":true}"#),
    )
    .by(&[command("drive set")]),
    patch(
        "patchDrive",
        "/drives/{drive_id}",
        "Change the bounds of a disk",
        shape::<DriveUpdate>(r#"{"drive_id":"root","max_overlay_mib":512}"#),
    )
    .by(&[command("drive update")]),
    put(
        "putNetworkInterface",
        "/network-interfaces/{iface_id}",
        "Add a network interface, or replace the one of that name",
        shape::<NetworkInterface>(
            r#"{"iface_id":"eth0","host_dev_name":"tap0","guest_mac":"06:00:0a:09:00:02"}"#,
        ),
    )
    .by(&[command("network set")]),
    patch(
        "patchNetworkInterface",
        "/network-interfaces/{iface_id}",
        "Change the bounds of a network interface",
        shape::<NetworkUpdate>(
            r#"{"iface_id":"eth0","tx_rate_limiter":{"bandwidth":{"size":1048576,"refill_time":1000}}}"#,
        ),
    )
    .by(&[command("network update")]),
    put(
        "putVsock",
        "/vsock",
        "Set the vsock device",
        shape::<Vsock>(r#"{"guest_cid":3,"uds_path":"guest.vsock"}"#),
    )
    .by(&[command("vsock set")]),
    put("putEntropy", "/entropy", "Set the source of entropy", shape::<Entropy>("{}")).by(&[command("entropy set")]),
    put(
        "putSerial",
        "/serial",
        "Set where the guest's console leads",
        shape::<Serial>(r#"{"serial_out_path":"console.log"}"#),
    )
    .by(&[command("serial set")]),
    put(
        "putSavedState",
        "/saved-state",
        "Set where the VM is saved when it is stopped",
        shape::<SavedState>(r#"{"path":"vm.saved","save_on_stop":true}"#),
    )
    .by(&[with_argument("saved-state set", "path")]),
    get(
        "getBalloon",
        "/balloon",
        "Tell the balloon as configured",
        Answer::Document(shape::<Balloon>(
            r#"{"amount_mib":0,"deflate_on_oom":false,"stats_polling_interval_s":1,"free_page_reporting":true}"#,
        )),
    )
    .by(&[command("balloon show")]),
    put(
        "putBalloon",
        "/balloon",
        "Set the balloon",
        shape::<Balloon>(r#"{"amount_mib":0,"deflate_on_oom":true,"stats_polling_interval_s":1}"#),
    )
    .by(&[command("balloon set")]),
    patch(
        "patchBalloon",
        "/balloon",
        "Change how much memory the guest shall give back",
        shape::<BalloonUpdate>(r#"{"amount_mib":64}"#),
    )
    .by(&[with_argument("balloon update", "amount_mib")]),
    get(
        "getBalloonStatistics",
        "/balloon/statistics",
        "Tell how much memory the guest has given back, and what it says of its memory",
        Answer::Document(shape::<BalloonStatistics>(
            r#"{"target_pages":16384,"actual_pages":16384,"target_mib":64,"actual_mib":64,"free_memory":20971520}"#,
        )),
    )
    .at(When::AfterStart)
    .by(&[command("balloon statistics")]),
    patch(
        "patchBalloonStatistics",
        "/balloon/statistics",
        "Change how often the guest reports on its memory",
        shape::<BalloonStatisticsUpdate>(r#"{"stats_polling_interval_s":5}"#),
    )
    .by(&[with_argument("balloon interval", "stats_polling_interval_s")]),
    put(
        "putAction",
        "/actions",
        "Start the VM, or write the counters out",
        shape::<Action>(r#"{"action_type":"InstanceStart"}"#),
    )
    .at(When::Always)
    .by(&[
        fixed("start", "Boot the configured VM", r#"{"action_type":"InstanceStart"}"#).at(When::BeforeStart),
        fixed("metrics flush", "Write the counters to the metrics path", r#"{"action_type":"FlushMetrics"}"#),
    ]),
    patch(
        "patchVm",
        "/vm",
        "Stop the vCPUs, or let them run",
        shape::<VmPatch>(r#"{"state":"Paused"}"#),
    )
    .by(&[
        fixed("pause", "Stop the vCPUs", r#"{"state":"Paused"}"#),
        fixed("resume", "Let the vCPUs run", r#"{"state":"Resumed"}"#),
    ]),
    put(
        "putVmSave",
        "/vm/save",
        "Take a snapshot, and end the vmm once it is complete",
        shape::<VmSave>(r#"{"snapshot_path":"saved"}"#),
    )
    .at(When::AfterStart)
    .by(&[with_argument("save", "snapshot_path")]),
    Operation {
        answer: Answer::Document(shape::<VmStopped>(r#"{"how":"saved"}"#)),
        ..put(
            "putVmStop",
            "/vm/stop",
            "Save the guest, shut it down, or end it, and end the vmm",
            shape::<VmStop>(r#"{"mode":"save"}"#),
        )
    }
    .at(When::AfterStart)
    .by(&[with_flags("stop", "mode")]),
    Operation {
        answer: Answer::Document(shape::<VmCheckpointed>(
            r#"{"private_pages":350,"pause_us":4100,"total_us":4300}"#,
        )),
        ..put(
            "putVmCheckpoint",
            "/vm/checkpoint",
            "Remember what the VM is, for it to be reset to",
            shape::<VmCheckpoint>("{}"),
        )
    }
    .at(When::AfterStart)
    .by(&[command("checkpoint")]),
    Operation {
        answer: Answer::Document(shape::<VmResetDone>(
            r#"{"dirty_pages":64,"fresh_pages":0,"dropped_pages":0,"trace":{"operation":"reset","total_ns":90000,"phases":[{"name":"pause","ns":15000},{"name":"written","ns":4000},{"name":"memory","ns":20000},{"name":"state","ns":40000},{"name":"translations","ns":0},{"name":"device_state","ns":5000},{"name":"resume","ns":6000}]}}"#,
        )),
        ..put(
            "putVmReset",
            "/vm/reset",
            "Make the VM what it was at the checkpoint",
            shape::<VmReset>(r#"{"max_dirty_pages":16384}"#),
        )
    }
    .at(When::AfterStart)
    .by(&[command("reset")]),
    Operation {
        answer: Answer::Document(shape::<VmForked>(
            r#"{"pause_us":350,"total_us":1900,"copied_pages":64,"clones":[{"api_sock":"/run/clone.sock"}]}"#,
        )),
        ..put(
            "putVmFork",
            "/vm/fork",
            "Give other vmms clones of the VM as it is now, while it goes on",
            shape::<VmFork>(r#"{"into":[{"api_sock":"/run/clone.sock"}]}"#),
        )
    }
    .at(When::AfterStart)
    .by(&[command("fork")]),
    put(
        "putForkLoad",
        "/fork/load",
        "Become a clone of a VM that is forked; for vmms, which send descriptors with it",
        shape::<ForkLoad>(
            r#"{"vmm_version":"0.1.0","vcpu_count":1,"memory_bytes":134217728,"state_bytes":9000,"layers":[{"map_bytes":136,"packed":true}],"resume_vm":true,"new_generation":true}"#,
        ),
    )
    .at(When::Fresh),
    get(
        "getVmStats",
        "/vm/stats",
        "Tell what the VM has done, and what its memory consists of",
        Answer::Document(shape::<VmStats>(STATS)),
    )
    .at(When::AfterStart)
    .by(&[command("stats")]),
    Operation {
        query: Some(shape::<MemoryMapQuery>(r#"{"start":0,"max_runs":100}"#)),
        ..get(
            "getMemoryMap",
            "/vm/memory-map",
            "Tell of which kind each page of guest memory is",
            Answer::Document(shape::<MemoryMap>(
                r#"{"runs":[{"guest_addr":0,"size_bytes":4096,"kind":"private"},{"guest_addr":4096,"size_bytes":134213632,"kind":"not_loaded"}]}"#,
            )),
        )
    }
    .at(When::AfterStart)
    .by(&[command("memory-map")]),
    put(
        "putSnapshotCreate",
        "/snapshot/create",
        "Take a snapshot; the answer comes when it is complete on disk",
        shape::<SnapshotCreate>(r#"{"snapshot_path":"snap"}"#),
    )
    .at(When::AfterStart)
    .by(&[with_argument("snapshot create", "snapshot_path")]),
    put(
        "putSnapshotLoad",
        "/snapshot/load",
        "Restore a VM from a snapshot",
        shape::<SnapshotLoad>(
            r#"{"snapshot_path":"snap","mem_backend":{"backend_type":"UffdShared","backend_path":"uffd.sock"},"resume_vm":true,"vsock_override":{"uds_path":"clone.vsock"}}"#,
        ),
    )
    .at(When::Fresh)
    .by(&[with_argument("snapshot load", "snapshot_path")]),
    put(
        "putSnapshotCancel",
        "/snapshot/cancel",
        "Give up the snapshot that is being written; whoever asked for it is told, and nothing of it is kept",
        shape::<SnapshotCancel>("{}"),
    )
    .at(When::AfterStart)
    .by(&[fixed("snapshot cancel", "", "{}")]),
    get(
        "getSnapshotStatus",
        "/snapshot/status",
        "Tell how the last snapshot went",
        Answer::Document(shape::<SnapshotStatus>(
            r#"{"state":"done","snapshot_path":"snap","pause_us":540,"total_us":14700,"memory_bytes":12582912}"#,
        )),
    )
    .by(&[command("snapshot status")]),
    put(
        "putLogger",
        "/logger",
        "Change where the log goes and what is in it",
        shape::<Logger>(r#"{"log_path":"vmm.log","level":"Info","show_level":true,"format":"json"}"#),
    )
    .at(When::Always)
    .by(&[command("logger set")]),
    put(
        "putMetrics",
        "/metrics",
        "Set where counters are written",
        shape::<MetricsSink>(r#"{"metrics_path":"vmm.metrics"}"#),
    )
    .by(&[with_argument("metrics set", "metrics_path")]),
    get(
        "getMetrics",
        "/metrics",
        "Tell all counters, as Prometheus reads them",
        Answer::Text("# HELP coppice_uptime_seconds For how long this process has run.\n# TYPE coppice_uptime_seconds gauge\ncoppice_uptime_seconds 12.5\n"),
    )
    .by(&[command("metrics show")]),
    declined("putCpuConfig", "PUT", "/cpu-config", "CPU templates"),
    declined("getMmds", "GET", "/mmds", "A metadata service"),
    declined("putMmds", "PUT", "/mmds", "A metadata service"),
    declined("patchMmds", "PATCH", "/mmds", "A metadata service"),
    declined("putMmdsConfig", "PUT", "/mmds/config", "A metadata service"),
    declined("putPmem", "PUT", "/pmem/{id}", "Persistent-memory devices"),
    declined("patchPmem", "PATCH", "/pmem/{id}", "Persistent-memory devices"),
    declined("deletePmem", "DELETE", "/pmem/{id}", "Persistent-memory devices"),
    declined("deleteDrive", "DELETE", "/drives/{drive_id}", "Unplugging disks"),
    declined("deleteNetworkInterface", "DELETE", "/network-interfaces/{iface_id}", "Unplugging network interfaces"),
    declined("getMemoryHotplug", "GET", "/hotplug/memory", "Memory that can be plugged in"),
    declined("putMemoryHotplug", "PUT", "/hotplug/memory", "Memory that can be plugged in"),
    declined("patchMemoryHotplug", "PATCH", "/hotplug/memory", "Memory that can be plugged in"),
    declined("startHinting", "PATCH", "/balloon/hinting/start", "Free page hinting"),
    declined("getHintingStatus", "GET", "/balloon/hinting/status", "Free page hinting"),
    declined("stopHinting", "PATCH", "/balloon/hinting/stop", "Free page hinting"),
];

/// Calls that one vmm makes to another, with descriptors: no command can.
pub const BETWEEN_VMMS: [&str; 1] = ["putForkLoad"];

/// Calls whose body need not be there: nothing in it has to be said.
pub const MAY_SAY_NOTHING: [&str; 3] = ["putVmCheckpoint", "putVmReset", "putSnapshotCancel"];

/// An example of counters.
const STATS: &str = r#"{"uptime_us":1500000,"page_faults":{"minor":2950,"major":12},"api":{"requests":3,"refused":1},"latencies":{"load_us":4100,"pause_us":45,"resume_us":12},"memory":{"size_bytes":134217728,"not_loaded_bytes":125829120,"shared_bytes":8306688,"private_bytes":81920},"vcpus":[{"io_in":24,"io_out":310,"mmio_read":40,"mmio_write":55,"interrupted":2,"other":0,"failures":0}],"drives":[{"drive_id":"root","reads":120,"writes":8,"flushes":2,"discards":0,"read_bytes":983040,"written_bytes":32768,"errors":0,"throttled":0,"overlay_bytes":32768}],"network_interfaces":[{"iface_id":"eth0","rx_frames":7,"rx_bytes":1094,"rx_dropped":0,"rx_throttled":0,"tx_frames":9,"tx_bytes":1287,"tx_dropped":0,"tx_throttled":0}],"vsock":{"connections":1,"opened":2,"rx_packets":14,"rx_bytes":300,"tx_packets":15,"tx_bytes":420},"entropy":{"requests":1,"bytes":64,"throttled":0},"balloon":{"target_mib":16,"actual_mib":16,"inflations":16,"deflations":0,"reports":0,"updates":3,"discarded_bytes":16777216,"reported_bytes":0,"kept_bytes":0},"console":{"written_bytes":310,"lost_bytes":0}}"#;

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn each_call_and_each_command_stands_once() {
        let mut ids = BTreeSet::new();
        let mut calls = BTreeSet::new();
        let mut commands = BTreeSet::new();
        for operation in OPERATIONS {
            assert!(ids.insert(operation.id), "{}", operation.id);
            assert!(calls.insert((operation.method, operation.path)), "{} {}", operation.method, operation.path);
            let has_none = operation.when == When::Never || BETWEEN_VMMS.contains(&operation.id);
            assert_eq!(operation.commands.is_empty(), has_none, "{}", operation.id);
            for command in operation.commands {
                assert!(commands.insert(command.words), "{}", command.words);
            }
        }
    }

    #[test]
    fn every_example_is_what_it_is_an_example_of() {
        for operation in OPERATIONS {
            let answer = match operation.answer {
                Answer::Document(shape) => Some(shape),
                Answer::Done | Answer::Text(_) => None,
            };
            for shape in [operation.query, operation.body, answer].into_iter().flatten() {
                (shape.check)(shape.example.as_bytes()).unwrap_or_else(|e| panic!("{}: {shape:?}: {e}", operation.id));
            }
            for body in operation.commands.iter().filter_map(|command| command.body) {
                let shape = operation.body.unwrap_or_else(|| panic!("{} takes no body", operation.id));
                (shape.check)(body.as_bytes()).unwrap_or_else(|e| panic!("{}: {body}: {e}", operation.id));
            }
        }
    }

    #[test]
    fn a_path_with_a_name_in_it_is_found() {
        let (operation, name) = find("PUT", "/drives/root").unwrap();
        assert_eq!((operation.id, name), ("putDrive", "root"));
        assert_eq!(find("GET", "/").map(|(operation, name)| (operation.id, name)), Some(("getInfo", "")));
        for path in ["/drives/", "/drives/a/b", "/drives", "//", ""] {
            assert!(find("PUT", path).is_none(), "{path}");
        }
        assert_eq!(find("PUT", "/drives/root/").map(|(_, name)| name), Some("root"));
        assert_eq!(find("GET", "/version/").map(|(operation, _)| operation.id), Some("getVersion"));
        assert_eq!(methods("/version/"), ["GET"]);
        assert_eq!(methods("/machine-config"), ["GET", "PUT", "PATCH"]);
        assert_eq!(methods("/drives/x"), ["PUT", "PATCH", "DELETE"]);
        assert!(methods("/nothing").is_empty());
    }
}
