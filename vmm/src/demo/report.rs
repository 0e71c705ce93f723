//! What the demonstration found out, as a table and as JSON.

use super::DemoOptions;
use crate::host::{self, Host};
use api_spec::page_server::Metrics;
use api_spec::snapshot::SnapshotStatus;
use serde::Serialize;
use std::fmt;
use std::time::Duration;

/// What the demonstration found out.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// From starting the process to the agent's first reply, in milliseconds.
    pub boot_ms: f64,
    /// How long the guest stood still for its snapshot, in microseconds.
    pub snapshot_pause_us: u64,
    /// From the request until the snapshot was complete on disk, in milliseconds.
    pub snapshot_total_ms: f64,
    /// Guest memory, in MiB.
    pub memory_mib: u64,
    /// Memory that every clone read, in MiB.
    pub working_set_mib: u64,
    /// vCPUs of each guest.
    pub vcpus: u8,
    /// This host.
    pub host: Host,
    /// The clones, in order.
    pub clones: Vec<CloneReport>,
    /// Whether the image's bytes were the same at the end.
    pub image_digest_unchanged: bool,
    /// Pages (4 KiB) that the page server had put into the store.
    pub store_pages: u64,
    /// All of it, in milliseconds.
    pub total_ms: f64,
    /// How many things were checked: those of each clone, and the image.
    pub checks: usize,
    /// How many of them did not hold.
    pub checks_failed: usize,
}

/// What was found out about one clone.
#[derive(Clone, Debug, Default, Serialize)]
pub struct CloneReport {
    /// Its number.
    pub id: u32,
    /// From before its process was started to the agent's first reply, in microseconds.
    pub restore_to_reply_us: u64,
    /// Page faults that the page server was asked about; absent if the server does not know the clone.
    pub uffd_events: Option<u64>,
    /// Guest RAM that is the clone's own because it wrote it, in KiB.
    pub private_kib: u64,
    /// Guest RAM that it has mapped from the store, in KiB.
    pub shared_kib: u64,
    /// Its share of guest RAM, in KiB: mapped pages divided by how many map them.
    pub pss_kib: u64,
    /// The boot nonce is that of the snapshotted guest: a restore, not a boot.
    pub nonce_ok: bool,
    /// Timer interrupts are counted on from the snapshot.
    pub ticks_continue: bool,
    /// Every word of the working set is what was snapshotted.
    pub working_set_ok: bool,
    /// No other clone gave the same random bytes.
    pub random_unique: bool,
    /// No other clone has the same generation id.
    pub generation_unique: bool,
    /// It has what it wrote and else what was snapshotted, as have the parent and the image.
    pub isolated: bool,
    /// The page server knows it.
    pub served: bool,
}

impl CloneReport {
    fn checks(&self) -> [(&'static str, bool); 7] {
        [
            ("nonce", self.nonce_ok),
            ("ticks", self.ticks_continue),
            ("memory", self.working_set_ok),
            ("random", self.random_unique),
            ("generation", self.generation_unique),
            ("isolated", self.isolated),
            ("served", self.served),
        ]
    }
}

impl Report {
    pub(super) fn new(
        options: &DemoOptions,
        boot: Duration,
        snapshot: SnapshotStatus,
        clones: Vec<CloneReport>,
        image_digest_unchanged: bool,
        metrics: &Metrics,
        total: Duration,
    ) -> Self {
        let ms = |duration: Duration| (duration.as_secs_f64() * 1e6).round() / 1e3;
        let mut report = Report {
            boot_ms: ms(boot),
            snapshot_pause_us: snapshot.pause_us,
            snapshot_total_ms: ms(Duration::from_micros(snapshot.total_us)),
            memory_mib: options.memory_mib,
            working_set_mib: options.working_set_mib,
            vcpus: options.vcpus,
            host: host::summary(),
            clones,
            image_digest_unchanged,
            store_pages: metrics.stores.iter().map(|store| store.filled_pages).sum(),
            total_ms: ms(total),
            checks: 0,
            checks_failed: 0,
        };
        (report.checks_failed, report.checks) = report.count_checks();
        report
    }

    /// How many checks did not hold, and how many there were.
    fn count_checks(&self) -> (usize, usize) {
        let checks = self.clones.iter().flat_map(|clone| clone.checks().map(|(_, held)| held));
        let (failed, all) = checks.fold((0, 0), |(failed, all), held| (failed + usize::from(!held), all + 1));
        (failed + usize::from(!self.image_digest_unchanged), all + 1)
    }

    /// One JSON document.
    pub(super) fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).map_or_else(|e| format!("{{\"error\":\"{e}\"}}\n"), |text| text + "\n")
    }
}

/// A duration, in the unit that reads best.
fn time(us: u64) -> String {
    match us {
        0..=9_999 => format!("{us} us"),
        10_000..=999_999 => format!("{:.1} ms", us as f64 / 1e3),
        _ => format!("{:.1} s", us as f64 / 1e6),
    }
}

/// A number of things.
fn count(n: usize, thing: &str) -> String {
    format!("{n} {thing}{}", if n == 1 { "" } else { "s" })
}

/// An amount of memory, in the unit that reads best.
fn size(kib: u64) -> String {
    match kib {
        0..=9_999 => format!("{kib} KiB"),
        10_000..=1_023_999 => format!("{:.1} MiB", kib as f64 / 1024.0),
        _ => format!("{:.1} GiB", kib as f64 / f64::from(1 << 20)),
    }
}

/// The value in the middle, or between the two that are.
fn median(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    let middle = values.len() / 2;
    match values.get(middle) {
        None => 0,
        Some(upper) if values.len() % 2 == 1 => *upper,
        Some(upper) => (values[middle - 1] + upper) / 2,
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "host      {}", self.host)?;
        let (memory, working_set) = (self.memory_mib, self.working_set_mib);
        writeln!(f, "guest     {memory} MiB, {}, working set {working_set} MiB\n", count(self.vcpus.into(), "vCPU"))?;
        writeln!(f, "boot      {:>9}   process start to the agent's first reply", time((self.boot_ms * 1e3) as u64))?;
        writeln!(
            f,
            "snapshot  {:>9}   of which the guest stood still {}\n",
            time((self.snapshot_total_ms * 1e3) as u64),
            time(self.snapshot_pause_us)
        )?;
        writeln!(f, "clone  first reply  page faults     private      shared       share  checks")?;
        writeln!(f, "                      to server  (it wrote)                   (PSS)")?;
        for clone in &self.clones {
            let held = clone.checks().iter().all(|(_, held)| *held);
            let events = clone.uffd_events.map_or("?".to_owned(), |events| events.to_string());
            writeln!(
                f,
                "{:>5}  {:>11}  {:>11}  {:>10}  {:>10}  {:>10}  {}",
                clone.id,
                time(clone.restore_to_reply_us),
                events,
                size(clone.private_kib),
                size(clone.shared_kib),
                size(clone.pss_kib),
                if held { "ok" } else { "FAILED" }
            )?;
        }
        let pick = |value: fn(&CloneReport) -> u64| self.clones.iter().map(value).collect::<Vec<_>>();
        let events: u64 = self.clones.iter().filter_map(|clone| clone.uffd_events).sum();
        writeln!(
            f,
            "  all  {:>11}  {:>11}  {:>10}  {:>10}  {:>10}",
            format!("~ {}", time(median(pick(|c| c.restore_to_reply_us)))),
            events,
            size(pick(|c| c.private_kib).iter().sum()),
            "",
            size(pick(|c| c.pss_kib).iter().sum())
        )?;
        self.write_failures(f)?;
        let image = if self.image_digest_unchanged { "unchanged" } else { "CHANGED" };
        writeln!(f, "\nstore     {:>9}   filled by the page server, once for all clones", size(self.store_pages * 4))?;
        writeln!(f, "image     {image:>9}   by its digest, after all clones have written")?;
        let Report { checks, checks_failed, .. } = self;
        let verdict = if *checks_failed == 0 {
            format!("{checks} checks held")
        } else {
            format!("{checks_failed} of {checks} checks FAILED")
        };
        writeln!(f, "total     {:>9}   {verdict} (~ is the median)", time((self.total_ms * 1e3) as u64))
    }
}

impl Report {
    /// Which checks did not hold, and for how many clones.
    fn write_failures(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.clones.first().map(|clone| clone.checks().map(|(name, _)| name)).into_iter().flatten();
        for name in names {
            let failed = self.clones.iter().filter(|clone| clone.checks().contains(&(name, false))).count();
            if failed > 0 {
                writeln!(f, "FAILED  {name}: {}", count(failed, "clone"))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_read_well() {
        assert_eq!([950, 12_345, 2_500_000].map(time), ["950 us", "12.3 ms", "2.5 s"]);
        assert_eq!([12, 20_480, 3 << 20].map(size), ["12 KiB", "20.0 MiB", "3.0 GiB"]);
        assert_eq!([1, 4].map(|n| count(n, "vCPU")), ["1 vCPU", "4 vCPUs"]);
        assert_eq!((median(vec![3, 1, 2]), median(vec![1, 3]), median(vec![])), (2, 2, 0));
    }

    #[test]
    fn a_clone_that_nobody_served_is_a_failed_check() {
        let clone = CloneReport { served: false, ..Default::default() };
        assert!(clone.checks().contains(&("served", false)));
    }
}
