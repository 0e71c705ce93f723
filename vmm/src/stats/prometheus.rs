//! Counters as Prometheus reads them: its text format, version 0.0.4. Pure.

use api_spec::prometheus::{Kind, Text};
use api_spec::stats::{DeviceAtWork, NetworkStats, PageServerState, PageServerStats, VmStats};

/// All counters.
pub fn render(stats: &VmStats) -> String {
    let mut text = Text::default();
    process(&mut text, stats);
    // Before a VM was started there is none.
    if stats.memory.size_bytes > 0 {
        memory(&mut text, stats);
        vcpus(&mut text, stats);
        drives(&mut text, stats);
        network(&mut text, stats);
        others(&mut text, stats);
    }
    if let Some(server) = &stats.page_server {
        page_server(&mut text, server);
    }
    text.into_string()
}

fn process(text: &mut Text, stats: &VmStats) {
    text.family("coppice_uptime_seconds", Kind::Gauge, "For how long this process has run.");
    text.seconds(&[], stats.uptime_us);
    text.family(
        "coppice_page_faults_total",
        Kind::Counter,
        "Page faults of this process's own threads, not those of its guest that had to wait; major ones had to read a disk.",
    );
    text.sample(&[("kind", "minor")], stats.page_faults.minor);
    text.sample(&[("kind", "major")], stats.page_faults.major);
    text.family("coppice_api_requests_total", Kind::Counter, "Requests to the API.");
    text.sample(&[], stats.api.requests);
    text.family("coppice_api_refused_total", Kind::Counter, "Requests to the API that were refused.");
    text.sample(&[], stats.api.refused);
    let latencies = &stats.latencies;
    let operations = [
        ("boot", latencies.boot_us),
        ("load", latencies.load_us),
        ("snapshot_pause", latencies.snapshot_pause_us),
        ("snapshot", latencies.snapshot_total_us),
        ("pause", latencies.pause_us),
        ("resume", latencies.resume_us),
    ];
    text.family(
        "coppice_operation_duration_seconds",
        Kind::Gauge,
        "How long the last operation of this kind took; snapshot_pause is how long the guest stood still for one.",
    );
    for (operation, us) in operations {
        if let Some(us) = us {
            text.seconds(&[("operation", operation)], us);
        }
    }
}

fn page_server(text: &mut Text, stats: &PageServerStats) {
    text.family(
        "coppice_vm_page_server_state",
        Kind::Gauge,
        "Who serves this guest's pages: 1 for what is so, 0 for the others.",
    );
    let states = [
        ("serving", PageServerState::Serving),
        ("failover", PageServerState::Failover),
        ("lost", PageServerState::Lost),
    ];
    for (name, state) in states {
        text.sample(&[("state", name)], u64::from(stats.state == state));
    }
    text.family(
        "coppice_vm_page_server_troubles_total",
        Kind::Counter,
        "Times that the page server of this guest was gone, or found silent or unable to get its bytes.",
    );
    text.sample(&[("kind", "gone")], stats.losses);
    text.sample(&[("kind", "silent")], stats.hangs);
    text.family(
        "coppice_vm_page_server_takeovers_total",
        Kind::Counter,
        "Times that the vmm began to serve page faults.",
    );
    text.sample(&[], stats.takeovers);
    text.family(
        "coppice_vm_page_server_reattachments_total",
        Kind::Counter,
        "Times that a page server was found again.",
    );
    text.sample(&[], stats.reattachments);
    text.family("coppice_vm_page_server_faults_total", Kind::Counter, "Page faults that the vmm has served itself.");
    text.sample(&[("raised", "before_takeover")], stats.faults_taken_over);
    text.sample(&[("raised", "after_takeover")], stats.faults_served.saturating_sub(stats.faults_taken_over));
    if let Some(us) = stats.takeover_us {
        text.family("coppice_vm_page_server_takeover_seconds", Kind::Gauge, "How long the last takeover took.");
        text.seconds(&[], us);
    }
}

fn memory(text: &mut Text, stats: &VmStats) {
    let memory = &stats.memory;
    text.family(
        "coppice_memory_bytes",
        Kind::Gauge,
        "Guest memory: not loaded, shared pages of the image, and private pages of the guest. Their sum is its size.",
    );
    text.sample(&[("kind", "not_loaded")], memory.not_loaded_bytes);
    text.sample(&[("kind", "shared")], memory.shared_bytes);
    text.sample(&[("kind", "private")], memory.private_bytes);
}

fn vcpus(text: &mut Text, stats: &VmStats) {
    let each = || stats.vcpus.iter().enumerate().map(|(number, vcpu)| (number.to_string(), vcpu));
    text.family("coppice_vcpu_exits_total", Kind::Counter, "Times that a vCPU has left the guest, and for what.");
    for (number, vcpu) in each() {
        let exits = [
            ("io_in", vcpu.io_in),
            ("io_out", vcpu.io_out),
            ("mmio_read", vcpu.mmio_read),
            ("mmio_write", vcpu.mmio_write),
            ("interrupted", vcpu.interrupted),
            ("other", vcpu.other),
        ];
        for (reason, count) in exits {
            text.sample(&[("vcpu", &number), ("reason", reason)], count);
        }
    }
    text.family("coppice_vcpu_failures_total", Kind::Counter, "Times that a vCPU could not go on.");
    for (number, vcpu) in each() {
        text.sample(&[("vcpu", &number)], vcpu.failures);
    }
}

fn drives(text: &mut Text, stats: &VmStats) {
    let drives = &stats.drives;
    if drives.is_empty() {
        return;
    }
    text.family("coppice_drive_requests_total", Kind::Counter, "Requests to a disk that succeeded.");
    for drive in drives {
        let requests =
            [("read", drive.reads), ("write", drive.writes), ("flush", drive.flushes), ("discard", drive.discards)];
        for (kind, count) in requests {
            text.sample(&[("drive", &drive.drive_id), ("kind", kind)], count);
        }
    }
    text.family("coppice_drive_bytes_total", Kind::Counter, "What was read from a disk and written to it.");
    for drive in drives {
        text.sample(&[("drive", &drive.drive_id), ("kind", "read")], drive.read_bytes);
        text.sample(&[("drive", &drive.drive_id), ("kind", "write")], drive.written_bytes);
    }
    text.family("coppice_drive_errors_total", Kind::Counter, "Requests to a disk that were answered with an error.");
    for drive in drives {
        text.sample(&[("drive", &drive.drive_id)], drive.errors);
    }
    text.family("coppice_drive_throttled_total", Kind::Counter, "Times that the rate limit had a disk wait.");
    for drive in drives {
        text.sample(&[("drive", &drive.drive_id)], drive.throttled);
    }
    text.family("coppice_drive_overlay_bytes", Kind::Gauge, "What a disk's overlay holds of this guest.");
    for drive in drives {
        text.sample(&[("drive", &drive.drive_id)], drive.overlay_bytes);
    }
}

fn network(text: &mut Text, stats: &VmStats) {
    let mut both = |name, help, rx: fn(&NetworkStats) -> u64, tx: fn(&NetworkStats) -> u64| {
        if stats.network_interfaces.is_empty() {
            return;
        }
        text.family(name, Kind::Counter, help);
        for interface in &stats.network_interfaces {
            text.sample(&[("interface", &interface.iface_id), ("direction", "rx")], rx(interface));
            text.sample(&[("interface", &interface.iface_id), ("direction", "tx")], tx(interface));
        }
    };
    both(
        "coppice_network_frames_total",
        "Frames to the guest (rx) and from it (tx).",
        |interface| interface.rx_frames,
        |interface| interface.tx_frames,
    );
    both(
        "coppice_network_bytes_total",
        "Bytes of frames to the guest (rx) and from it (tx).",
        |interface| interface.rx_bytes,
        |interface| interface.tx_bytes,
    );
    both(
        "coppice_network_dropped_total",
        "Frames to the guest (rx) and from it (tx) that did not arrive.",
        |interface| interface.rx_dropped,
        |interface| interface.tx_dropped,
    );
    both(
        "coppice_network_throttled_total",
        "Times that the rate limit had frames to the guest (rx) or from it (tx) wait.",
        |interface| interface.rx_throttled,
        |interface| interface.tx_throttled,
    );
}

fn others(text: &mut Text, stats: &VmStats) {
    if let Some(vsock) = &stats.vsock {
        text.family("coppice_vsock_connections", Kind::Gauge, "Connections through vsock that there are.");
        text.sample(&[], vsock.connections);
        text.family("coppice_vsock_opened_total", Kind::Counter, "Connections through vsock that there have been.");
        text.sample(&[], vsock.opened);
        text.family("coppice_vsock_packets_total", Kind::Counter, "Packets to the guest (rx) and from it (tx).");
        text.sample(&[("direction", "rx")], vsock.rx_packets);
        text.sample(&[("direction", "tx")], vsock.tx_packets);
        text.family("coppice_vsock_bytes_total", Kind::Counter, "Bytes to the guest (rx) and from it (tx).");
        text.sample(&[("direction", "rx")], vsock.rx_bytes);
        text.sample(&[("direction", "tx")], vsock.tx_bytes);
    }
    if let Some(entropy) = &stats.entropy {
        text.family("coppice_entropy_requests_total", Kind::Counter, "Requests for random bytes.");
        text.sample(&[], entropy.requests);
        text.family("coppice_entropy_bytes_total", Kind::Counter, "Random bytes that the guest was given.");
        text.sample(&[], entropy.bytes);
        text.family("coppice_entropy_throttled_total", Kind::Counter, "Times that the rate limit had the guest wait.");
        text.sample(&[], entropy.throttled);
    }
    if let Some(balloon) = &stats.balloon {
        text.family("coppice_balloon_target_bytes", Kind::Gauge, "How large the balloon shall be.");
        text.sample(&[], balloon.target_mib.saturating_mul(1 << 20));
        text.family("coppice_balloon_actual_bytes", Kind::Gauge, "How large the balloon is.");
        text.sample(&[], balloon.actual_mib.saturating_mul(1 << 20));
        text.family("coppice_balloon_events_total", Kind::Counter, "What the guest has told the balloon.");
        text.sample(&[("kind", "inflation")], balloon.inflations);
        text.sample(&[("kind", "deflation")], balloon.deflations);
        text.sample(&[("kind", "report")], balloon.reports);
        text.sample(&[("kind", "statistics")], balloon.updates);
        text.family("coppice_balloon_discarded_bytes_total", Kind::Counter, "What the guest has given back in all.");
        text.sample(&[], balloon.discarded_bytes);
        text.family("coppice_balloon_reported_bytes_total", Kind::Counter, "How much of that was reported as free.");
        text.sample(&[], balloon.reported_bytes);
        text.family("coppice_balloon_kept_bytes_total", Kind::Counter, "What could not be given back.");
        text.sample(&[], balloon.kept_bytes);
    }
    if let Some(DeviceAtWork { device, for_us }) = &stats.device_at_work {
        text.family(
            "coppice_device_at_work_seconds",
            Kind::Gauge,
            "For how long a device has been at work that keeps the devices from being looked at; their counters are as they were before.",
        );
        text.seconds(&[("device", device)], *for_us);
    }
    text.family("coppice_console_written_bytes_total", Kind::Counter, "What the guest has written to its console.");
    text.sample(&[], stats.console.written_bytes);
    text.family("coppice_console_lost_bytes_total", Kind::Counter, "What of it is lost, since nobody read it in time.");
    text.sample(&[], stats.console.lost_bytes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use api_spec::prometheus::Label;
    use api_spec::stats::{BalloonStats, DriveStats, EntropyStats, Latencies, MemoryStats, VcpuStats, VsockStats};
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    /// What a reader makes of the text: each sample by its name and labels.
    type Samples = BTreeMap<(String, Vec<(String, String)>), f64>;

    /// Reads the format, and takes nothing that is not in order: each family has help and a type, its samples follow at once,
    /// and none comes twice.
    fn read(text: &str) -> Samples {
        let (mut samples, mut families) = (Samples::new(), BTreeSet::new());
        let mut lines = text.strip_suffix('\n').expect("the last line ends").split('\n').peekable();
        while let Some(help) = lines.next() {
            let (name, words) = help.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')).expect(help);
            assert!(!words.is_empty() && families.insert(name), "{help}");
            assert!(
                name.starts_with("coppice_") && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'),
                "{name}"
            );
            let kind = lines.next().and_then(|line| line.strip_prefix(&format!("# TYPE {name} "))).expect(name);
            assert_eq!(kind == "counter", name.ends_with("_total"), "{name}");
            assert!(["counter", "gauge"].contains(&kind), "{name}");
            while let Some(line) = lines.next_if(|line| !line.starts_with('#')) {
                let (labels, value) = sample(line.strip_prefix(name).expect(line));
                assert!(samples.insert((name.to_owned(), labels), value).is_none(), "{line}");
            }
        }
        samples
    }

    fn sample(rest: &str) -> (Vec<(String, String)>, f64) {
        let mut labels = Vec::new();
        let mut rest = rest;
        if let Some(inner) = rest.strip_prefix('{') {
            rest = inner;
            loop {
                let (name, value) = rest.split_once("=\"").expect(rest);
                let (mut said, mut chars) = (String::new(), value.char_indices());
                let end = loop {
                    match chars.next().expect("the label ends") {
                        (at, '"') => break at,
                        (_, '\\') => said.push(match chars.next().expect("an escape").1 {
                            'n' => '\n',
                            c @ ('\\' | '"') => c,
                            c => panic!("no such escape: {c}"),
                        }),
                        (_, c) => said.push(c),
                    }
                };
                labels.push((name.to_owned(), said));
                rest = &value[end + 1..];
                match rest.strip_prefix(',') {
                    Some(more) => rest = more,
                    None => break,
                }
            }
            rest = rest.strip_prefix('}').expect("the labels end");
        }
        let value = rest.strip_prefix(' ').expect("a value");
        assert!(value.bytes().all(|b| b.is_ascii_digit() || b == b'.'), "{value}");
        (labels, value.parse().expect(value))
    }

    fn get(samples: &Samples, name: &str, labels: &[Label]) -> Option<f64> {
        let labels = labels.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
        samples.get(&(name.to_owned(), labels)).copied()
    }

    #[test]
    fn before_the_start_there_is_the_process_alone() {
        let stats = VmStats { uptime_us: 12_500_000, ..Default::default() };
        let samples = read(&render(&stats));
        assert_eq!(get(&samples, "coppice_uptime_seconds", &[]), Some(12.5));
        assert!(samples.keys().all(|(name, _)| !name.contains("memory") && !name.contains("vcpu")), "{samples:?}");
    }

    #[test]
    fn all_that_there_is_is_told() {
        let drive = DriveStats { drive_id: "root".into(), reads: 1, read_bytes: 512, ..Default::default() };
        let interface = NetworkStats { iface_id: "eth0".into(), tx_bytes: 9, ..Default::default() };
        let stats = VmStats {
            latencies: Latencies { load_us: Some(4100), ..Default::default() },
            memory: MemoryStats { size_bytes: 8192, shared_bytes: 4096, private_bytes: 4096, not_loaded_bytes: 0 },
            vcpus: vec![VcpuStats::default(), VcpuStats { io_in: 7, ..Default::default() }],
            drives: vec![drive.clone(), DriveStats { drive_id: "data".into(), ..drive }],
            network_interfaces: vec![interface],
            vsock: Some(VsockStats { rx_bytes: 3, ..Default::default() }),
            entropy: Some(EntropyStats { bytes: 64, ..Default::default() }),
            balloon: Some(BalloonStats { target_mib: 2, ..Default::default() }),
            device_at_work: Some(DeviceAtWork { device: "vsock".into(), for_us: 1_500_000 }),
            ..Default::default()
        };
        let samples = read(&render(&stats));
        for (name, labels, value) in [
            ("coppice_operation_duration_seconds", &[("operation", "load")][..], 0.0041),
            ("coppice_memory_bytes", &[("kind", "shared")], 4096.0),
            ("coppice_vcpu_exits_total", &[("vcpu", "1"), ("reason", "io_in")], 7.0),
            ("coppice_drive_bytes_total", &[("drive", "data"), ("kind", "read")], 512.0),
            ("coppice_network_bytes_total", &[("interface", "eth0"), ("direction", "tx")], 9.0),
            ("coppice_vsock_bytes_total", &[("direction", "rx")], 3.0),
            ("coppice_entropy_bytes_total", &[], 64.0),
            ("coppice_balloon_target_bytes", &[], f64::from(2 << 20)),
            ("coppice_device_at_work_seconds", &[("device", "vsock")], 1.5),
            ("coppice_console_lost_bytes_total", &[], 0.0),
        ] {
            assert_eq!(get(&samples, name, labels), Some(value), "{name}");
        }
    }

    proptest! {
        #[test]
        fn what_a_label_says_comes_back(drive_id in "\\PC*|[\"\\\\\n,{}= a]*", reads: u64) {
            let drives = vec![DriveStats { drive_id: drive_id.clone(), reads, ..Default::default() }];
            let memory = MemoryStats { size_bytes: 4096, not_loaded_bytes: 4096, ..Default::default() };
            let samples = read(&render(&VmStats { drives, memory, ..Default::default() }));
            let read = get(&samples, "coppice_drive_requests_total", &[("drive", &drive_id), ("kind", "read")]);
            prop_assert_eq!(read, Some(reads as f64));
        }
    }
}
