//! Counters as a line of JSON, in the shape that tools for Firecracker's metrics know: an object for each part of the VM, and
//! what has been counted since the line before. What we have beyond that is `coppice`: all of `GET /vm/stats` but memory, counted
//! since the process began. Pure.

use super::process::StartupTimes;
use api_spec::stats::{
    BalloonStats, DriveStats, EntropyStats, Latencies, NetworkStats, VcpuStats, VmStats, VsockStats,
};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::time::Duration;

/// What a line tells besides counters.
#[derive(Debug)]
pub struct Facts<'a> {
    /// When it is written, since the Unix epoch.
    pub time: Duration,
    /// The id of the VM, if lines are to tell it.
    pub id: Option<&'a str>,
    /// What all lines say.
    pub properties: &'a BTreeMap<String, String>,
    /// How long the process took to start.
    pub startup: StartupTimes,
    /// Lines that were not written since the last one.
    pub missed: u64,
}

/// The line, with its end.
pub fn line(facts: &Facts, now: &VmStats, before: &VmStats) -> String {
    let mut line = Map::new();
    line.insert("utc_timestamp_ms".into(), json!(facts.time.as_millis() as u64));
    if let Some(id) = facts.id {
        line.insert("id".into(), id.into());
    }
    if !facts.properties.is_empty() {
        line.insert("properties".into(), json!(facts.properties));
    }
    line.insert(
        "api_server".into(),
        json!({
            "process_startup_time_us": facts.startup.wall_us,
            "process_startup_time_cpu_us": facts.startup.cpu_us,
        }),
    );
    line.insert("latencies_us".into(), latencies(&now.latencies));
    line.insert("logger".into(), json!({ "missed_metrics_count": facts.missed }));
    if let Value::Object(counted) = delta(counters(now), &counters(before)) {
        line.extend(counted);
    }
    let mut whole = serde_json::to_value(now).unwrap_or_default();
    if let Some(whole) = whole.as_object_mut() {
        whole.remove("memory");
    }
    line.insert("coppice".into(), whole);
    format!("{}\n", Value::Object(line))
}

/// How long the last operation of each kind took; 0 if there was none. We time an operation where the machine does it: what
/// the API adds to that is nothing.
fn latencies(latencies: &Latencies) -> Value {
    let Latencies { boot_us: _, load_us, snapshot_pause_us: _, snapshot_total_us, pause_us, resume_us } = *latencies;
    let us = |latency: Option<u64>| latency.unwrap_or(0);
    let (create, load, pause, resume) = (us(snapshot_total_us), us(load_us), us(pause_us), us(resume_us));
    json!({
        "full_create_snapshot": create,
        "load_snapshot": load,
        "pause_vm": pause,
        "resume_vm": resume,
        "vmm_full_create_snapshot": create,
        "vmm_load_snapshot": load,
        "vmm_pause_vm": pause,
        "vmm_resume_vm": resume,
    })
}

/// All counters of a line, since the process began.
fn counters(stats: &VmStats) -> Value {
    let mut parts = Map::new();
    let mut part = |name: String, counted: Value| parts.insert(name, counted);
    part("vcpu".into(), sum(stats.vcpus.iter().map(vcpu), vcpu(&VcpuStats::default())));
    part("block".into(), sum(stats.drives.iter().map(drive), drive(&DriveStats::default())));
    for stats in &stats.drives {
        part(format!("block_{}", stats.drive_id), drive(stats));
    }
    part("net".into(), sum(stats.network_interfaces.iter().map(network), network(&NetworkStats::default())));
    for stats in &stats.network_interfaces {
        part(format!("net_{}", stats.iface_id), network(stats));
    }
    part("vsock".into(), vsock(&stats.vsock.unwrap_or_default()));
    part("entropy".into(), entropy(&stats.entropy.unwrap_or_default()));
    part("balloon".into(), balloon(&stats.balloon.unwrap_or_default()));
    let console = stats.console;
    part("uart".into(), json!({ "write_count": console.written_bytes, "missed_write_count": console.lost_bytes }));
    Value::Object(parts)
}

fn vcpu(stats: &VcpuStats) -> Value {
    json!({
        "exit_io_in": stats.io_in,
        "exit_io_out": stats.io_out,
        "exit_mmio_read": stats.mmio_read,
        "exit_mmio_write": stats.mmio_write,
        "failures": stats.failures,
    })
}

fn drive(stats: &DriveStats) -> Value {
    json!({
        "read_count": stats.reads,
        "write_count": stats.writes,
        "flush_count": stats.flushes,
        "read_bytes": stats.read_bytes,
        "write_bytes": stats.written_bytes,
        "execute_fails": stats.errors,
        "rate_limiter_throttled_events": stats.throttled,
    })
}

fn network(stats: &NetworkStats) -> Value {
    json!({
        "rx_count": stats.rx_frames,
        "rx_packets_count": stats.rx_frames,
        "rx_bytes_count": stats.rx_bytes,
        "rx_fails": stats.rx_dropped,
        "rx_rate_limiter_throttled": stats.rx_throttled,
        "tx_count": stats.tx_frames,
        "tx_packets_count": stats.tx_frames,
        "tx_bytes_count": stats.tx_bytes,
        "tx_fails": stats.tx_dropped,
        "tx_rate_limiter_throttled": stats.tx_throttled,
    })
}

fn vsock(stats: &VsockStats) -> Value {
    json!({
        "rx_bytes_count": stats.rx_bytes,
        "rx_packets_count": stats.rx_packets,
        "tx_bytes_count": stats.tx_bytes,
        "tx_packets_count": stats.tx_packets,
        "conns_added": stats.opened,
        "conns_removed": stats.opened.saturating_sub(stats.connections),
    })
}

fn entropy(stats: &EntropyStats) -> Value {
    json!({
        "entropy_event_count": stats.requests,
        "entropy_bytes": stats.bytes,
        "entropy_rate_limiter_throttled": stats.throttled,
    })
}

fn balloon(stats: &BalloonStats) -> Value {
    json!({
        "inflate_count": stats.inflations,
        "deflate_count": stats.deflations,
        "stats_updates_count": stats.updates,
        "free_page_report_count": stats.reports,
        "free_page_report_freed": stats.reported_bytes,
    })
}

/// The sum of objects of counters; `zero` if there are none.
fn sum(parts: impl Iterator<Item = Value>, zero: Value) -> Value {
    parts.fold(zero, |sum, part| combine(sum, &part, u64::saturating_add))
}

/// What has been counted from `before` to `now`. A counter that is smaller than before, as that of something else would be,
/// has begun anew.
fn delta(now: Value, before: &Value) -> Value {
    combine(now, before, |now, before| now.checked_sub(before).unwrap_or(now))
}

/// Combines the numbers that two documents have in the same place; the others are those of the first.
fn combine(one: Value, other: &Value, with: impl Fn(u64, u64) -> u64 + Copy) -> Value {
    match one {
        Value::Object(members) => Value::Object(
            members
                .into_iter()
                .map(|(name, value)| {
                    let combined = match other.get(&name) {
                        Some(other) => combine(value, other, with),
                        None => value,
                    };
                    (name, combined)
                })
                .collect(),
        ),
        Value::Number(number) => match (number.as_u64(), other.as_u64()) {
            (Some(one), Some(other)) => with(one, other).into(),
            _ => Value::Number(number),
        },
        one => one,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn facts(properties: &BTreeMap<String, String>) -> Facts<'_> {
        let startup = StartupTimes { wall_us: 5, cpu_us: 6 };
        Facts { time: Duration::from_millis(1234), id: None, properties, startup, missed: 2 }
    }

    fn stats() -> VmStats {
        serde_json::from_str(
            api_spec::operations::find("GET", "/vm/stats")
                .and_then(|(operation, _)| match operation.answer {
                    api_spec::operations::Answer::Document(shape) => Some(shape.example),
                    _ => None,
                })
                .unwrap(),
        )
        .unwrap()
    }

    #[test]
    fn a_line_has_what_tools_look_for() {
        let properties = BTreeMap::from([("host".to_owned(), "a\nb".to_owned())]);
        let text = line(&Facts { id: Some("vm-1"), ..facts(&properties) }, &stats(), &VmStats::default());
        assert_eq!(text.matches('\n').count(), 1, "{text}");
        let line: Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&line["utc_timestamp_ms"], &line["id"]), (&json!(1234), &json!("vm-1")));
        assert_eq!(line["properties"]["host"], "a\nb");
        assert_eq!(line["api_server"]["process_startup_time_us"], 5);
        assert_eq!(line["latencies_us"]["vmm_load_snapshot"], 4100);
        assert_eq!(line["latencies_us"]["full_create_snapshot"], 0, "there was none");
        assert_eq!(line["logger"]["missed_metrics_count"], 2);
        assert_eq!(line["vcpu"]["exit_io_out"], 310);
        assert_eq!((&line["block_root"]["read_count"], &line["block"]["read_count"]), (&json!(120), &json!(120)));
        assert_eq!(line["net_eth0"]["tx_packets_count"], 9);
        assert_eq!(line["vsock"]["conns_removed"], 1);
        assert_eq!(line["coppice"]["drives"][0]["overlay_bytes"], 32768);
        assert_eq!(line["coppice"].get("memory"), None);
    }

    #[test]
    fn a_line_tells_what_was_counted_since_the_last() {
        let (mut now, before) = (stats(), stats());
        now.drives[0].reads += 3;
        now.drives.push(DriveStats { drive_id: "data".into(), reads: 4, ..Default::default() });
        let text = line(&facts(&BTreeMap::new()), &now, &before);
        let line: Value = serde_json::from_str(&text).unwrap();
        let reads = ["block", "block_root", "block_data"].map(|part| line[part]["read_count"].as_u64().unwrap());
        assert_eq!(reads, [7, 3, 4]);
        assert_eq!((&line["vcpu"]["exit_io_out"], &line["uart"]["write_count"]), (&json!(0), &json!(0)));
        assert_eq!(line["coppice"]["drives"][0]["reads"], 123, "since the beginning");
        assert!(line.get("id").is_none() && line.get("properties").is_none());
    }

    fn counted() -> impl Strategy<Value = VmStats> {
        let drives = prop::collection::vec((0..4u8, 0..1000u64), 0..4);
        (prop::collection::vec(0..1000u64, 0..3), drives).prop_map(|(vcpus, drives)| VmStats {
            vcpus: vcpus.into_iter().map(|io_in| VcpuStats { io_in, ..Default::default() }).collect(),
            drives: drives
                .into_iter()
                .map(|(id, reads)| DriveStats { drive_id: format!("d{id}"), reads, ..Default::default() })
                .collect(),
            ..Default::default()
        })
    }

    proptest! {
        /// Whoever adds up the lines knows what was counted.
        #[test]
        fn lines_add_up(mut steps in prop::collection::vec(0..1000u64, 1..10), stats in counted()) {
            let mut before = VmStats::default();
            let mut now = stats;
            let (mut sum, name) = (0, "vcpu");
            now.vcpus.push(VcpuStats::default());
            steps.insert(0, 0);
            for step in steps {
                now.vcpus[0].io_in += step;
                sum += delta(counters(&now), &counters(&before))[name]["exit_io_in"].as_u64().unwrap();
                before = now.clone();
            }
            prop_assert_eq!(sum, now.vcpus.iter().map(|vcpu| vcpu.io_in).sum::<u64>());
        }

        #[test]
        fn nothing_new_is_all_zeros(stats in counted()) {
            fn zeros(value: &Value) -> bool {
                value.as_u64() == Some(0) || value.as_object().is_some_and(|members| members.values().all(zeros))
            }
            let counters = counters(&stats);
            prop_assert!(zeros(&delta(counters.clone(), &counters)));
            prop_assert_eq!(delta(counters.clone(), &Value::Null), counters);
        }

        #[test]
        fn the_aggregate_is_the_sum_of_the_disks(reads in prop::collection::vec(0..1000u64, 0..5)) {
            let drive = |(n, reads): (usize, &u64)| DriveStats { drive_id: n.to_string(), reads: *reads, ..Default::default() };
            let drives = reads.iter().enumerate().map(drive).collect();
            let counters = counters(&VmStats { drives, ..Default::default() });
            prop_assert_eq!(counters["block"]["read_count"].as_u64(), Some(reads.iter().sum()));
            for (n, reads) in reads.iter().enumerate() {
                prop_assert_eq!(counters[format!("block_{n}")]["read_count"].as_u64(), Some(*reads));
            }
        }
    }
}
