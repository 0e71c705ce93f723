//! What was found out of snapshots, in figures: a document, and tables for people. Pure.

use super::{Case, Found, LARGE_MIB, Options, Origin, SMALL_MIB, USED_MIB};
use crate::bench::figure::{Figure as Named, Unit, rounded};
use api_spec::snapshot::SnapshotType;
use serde::Serialize;
use std::fmt;
use std::time::Duration;

/// How a number was spread over the runs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Figure {
    /// The least.
    pub min: f64,
    /// In half of the runs no more.
    pub p50: f64,
    /// The most.
    pub max: f64,
}

impl Figure {
    /// Of these numbers, of which there must be one at least.
    fn of(numbers: impl Iterator<Item = f64>) -> Self {
        let mut numbers: Vec<f64> = numbers.collect();
        numbers.sort_unstable_by(f64::total_cmp);
        let last = numbers.len().saturating_sub(1);
        let at = |index: usize| rounded(numbers.get(index).copied().unwrap_or_default());
        Figure { min: at(0), p50: at(last / 2), max: at(last) }
    }
}

/// One median divided by another, if that can be done.
fn ratio(of: Figure, to: Figure) -> Option<f64> {
    (to.p50 > 0.0).then(|| rounded(of.p50 / to.p50))
}

fn us(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

/// One snapshot.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// Which.
    #[serde(flatten)]
    pub case: Case,
    /// How long the guest stood still, as the vmm tells.
    pub pause_us: Figure,
    /// From the request until it was complete on disk, as the vmm tells.
    pub total_us: Figure,
    /// How long whoever asked for it waited.
    pub call_us: Figure,
    /// Bytes of memory that were written.
    pub stored_bytes: Figure,
}

/// What it costs a guest to write a page that it has written before.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Writing {
    /// Its memory, in MiB.
    pub memory_mib: u64,
    /// Before it was ever snapshotted, a page.
    pub before_us: Figure,
    /// The first time after the snapshot, a page.
    pub after_us: Figure,
    /// The second, divided by the first.
    pub ratio: Option<f64>,
}

/// From the start of a process to the first reply of a clone.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Restoring {
    /// How many snapshots of changes the chain has.
    pub chain: u32,
    /// Restored from the last of them.
    pub chain_us: Figure,
    /// Restored from a full snapshot of the same guest.
    pub full_us: Figure,
    /// The first, divided by the second.
    pub ratio: Option<f64>,
}

/// How fast a snapshot is checked.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verifying {
    /// How much is read.
    pub bytes: Figure,
    /// As `vmm snapshot verify` does it, GiB a second.
    pub verify_gib_s: Figure,
    /// The same file read out of the page cache, and nothing else, GiB a second.
    pub read_gib_s: Figure,
    /// The first, divided by the second.
    pub ratio: Option<f64>,
}

/// What was found out.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// How often everything was measured.
    pub runs: u32,
    /// Memory in use of the guest that has much in use, in MiB.
    pub resident_mib: u64,
    /// Snapshots.
    pub snapshots: Vec<Row>,
    /// Pause of the first snapshot with much memory, divided by that with little.
    pub pause_ratio: Option<f64>,
    /// How much longer that pause is for each GiB that is in use.
    pub pause_us_per_resident_gib: f64,
    /// What a guest notices after its first snapshot.
    pub writing: Vec<Writing>,
    /// Restores.
    pub restoring: Restoring,
    /// Checks.
    pub verifying: Verifying,
}

impl Report {
    pub(super) fn new(options: &Options, found: &Found) -> Self {
        let pause = |case| row(case, found).pause_us;
        let (small, large) = (pause(Case::booted(SMALL_MIB)), pause(Case::booted(LARGE_MIB)));
        let more_gib = (options.resident_mib - USED_MIB) as f64 / 1024.0;
        Report {
            runs: options.runs,
            resident_mib: options.resident_mib,
            snapshots: options.cases().into_iter().map(|case| row(case, found)).collect(),
            pause_ratio: ratio(large, small),
            pause_us_per_resident_gib: rounded((pause(options.resident()).p50 - large.p50) / more_gib),
            writing: [SMALL_MIB, LARGE_MIB].map(|memory_mib| writing(memory_mib, found)).into(),
            restoring: restoring(found),
            verifying: verifying(found),
        }
    }
}

fn row(case: Case, found: &Found) -> Row {
    let taken = || found.snapshots.iter().filter(move |(of, _)| *of == case).map(|(_, taken)| taken);
    Row {
        case,
        pause_us: Figure::of(taken().map(|taken| taken.status.pause_us as f64)),
        total_us: Figure::of(taken().map(|taken| taken.status.total_us as f64)),
        call_us: Figure::of(taken().map(|taken| us(taken.call))),
        stored_bytes: Figure::of(taken().map(|taken| taken.status.memory_bytes as f64)),
    }
}

fn writing(memory_mib: u64, found: &Found) -> Writing {
    let pages = f64::from(Case::booted(memory_mib).used().count);
    let writes = || found.writes.iter().filter(|writes| writes.memory_mib == memory_mib);
    let before_us = Figure::of(writes().map(|writes| us(writes.before) / pages));
    let after_us = Figure::of(writes().map(|writes| us(writes.after) / pages));
    Writing { memory_mib, before_us, after_us, ratio: ratio(after_us, before_us) }
}

fn restoring(found: &Found) -> Restoring {
    let chain_us = Figure::of(found.restores.iter().map(|restores| us(restores.chain)));
    let full_us = Figure::of(found.restores.iter().map(|restores| us(restores.whole)));
    Restoring { chain: super::CHAIN, chain_us, full_us, ratio: ratio(chain_us, full_us) }
}

fn verifying(found: &Found) -> Verifying {
    let gib_s = |bytes: u64, duration: Duration| bytes as f64 / (1 << 30) as f64 / duration.as_secs_f64().max(1e-9);
    let checks = || found.checks.iter();
    let verify_gib_s = Figure::of(checks().map(|checks| gib_s(checks.bytes, checks.verify)));
    let read_gib_s = Figure::of(checks().map(|checks| gib_s(checks.bytes, checks.read)));
    let bytes = Figure::of(checks().map(|checks| checks.bytes as f64));
    Verifying { bytes, verify_gib_s, read_gib_s, ratio: ratio(verify_gib_s, read_gib_s) }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Case { guest, memory_mib, used_mib, vcpus, written_pages, snapshot_type } = self;
        let text = match (guest, snapshot_type) {
            (Origin::Booted, _) if *vcpus > 1 => format!("booted, {memory_mib} MiB, {vcpus} busy vCPUs"),
            (Origin::Booted, _) => format!("booted, {memory_mib} MiB, {used_mib} in use"),
            (Origin::Clone, SnapshotType::Full) => format!("clone, {memory_mib} MiB, {written_pages} pages written"),
            (Origin::Clone, SnapshotType::Diff) => format!("  changes only ({written_pages} pages)"),
        };
        f.pad(&text)
    }
}

/// The three numbers of a figure, each divided by `unit`.
fn columns(figure: Figure, unit: f64) -> String {
    let Figure { min, p50, max } = figure;
    format!(" {:>9.1} {:>9.1} {:>9.1}", min / unit, p50 / unit, max / unit)
}

/// How many times something is something else.
fn times(ratio: Option<f64>) -> String {
    ratio.map_or_else(|| "an unknown number of times".into(), |ratio| format!("{ratio:.3} times"))
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAME: usize = 40;
        let least_to_most = format!(" {:>9} {:>9} {:>9}", "min", "p50", "max");
        writeln!(f, "everything {} times\n", self.runs)?;
        writeln!(f, "{:<NAME$} {:^29}  {:^29} {:>9} {:>10}", "", "pause, us", "until complete, ms", "call, ms", "KiB")?;
        writeln!(f, "{:<NAME$}{least_to_most} {least_to_most} {:>9} {:>10}", "snapshot", "p50", "stored p50")?;
        for Row { case, pause_us, total_us, call_us, stored_bytes } in &self.snapshots {
            let (pause, total) = (columns(*pause_us, 1.0), columns(*total_us, 1000.0));
            let (call, stored) = (call_us.p50 / 1000.0, stored_bytes.p50 / 1024.0);
            writeln!(f, "{case:<NAME$}{pause} {total} {call:>9.1} {stored:>10.0}")?;
        }
        writeln!(f, "\n{:<NAME$}{least_to_most}", "")?;
        for Writing { memory_mib, before_us, after_us, .. } in &self.writing {
            for (when, figure) in [("before", before_us), ("after", after_us)] {
                let name = format!("write {when} a snapshot, {memory_mib} MiB");
                writeln!(f, "{name:<NAME$}{}  us a page", columns(*figure, 1.0))?;
            }
        }
        let Restoring { chain, chain_us, full_us, ratio: restoring } = &self.restoring;
        let Verifying { verify_gib_s, read_gib_s, ratio: verifying, .. } = &self.verifying;
        for (name, figure, unit, text) in [
            (format!("restore from a chain of {chain}"), chain_us, 1000.0, "ms"),
            ("restore from a full snapshot".into(), full_us, 1000.0, "ms"),
            (format!("verify {} MiB", self.resident_mib), verify_gib_s, 1.0, "GiB/s"),
            ("read the same file".into(), read_gib_s, 1.0, "GiB/s"),
        ] {
            writeln!(f, "{name:<NAME$}{}  {text}", columns(*figure, unit))?;
        }
        writeln!(f, "\npause with {LARGE_MIB} MiB: {} that with {SMALL_MIB} MiB", times(self.pause_ratio))?;
        writeln!(f, "pause for each GiB more in use: {:+.1} us", self.pause_us_per_resident_gib)?;
        for Writing { memory_mib, ratio, .. } in &self.writing {
            writeln!(f, "write after a snapshot, {memory_mib} MiB: {} before", times(*ratio))?;
        }
        writeln!(f, "restore from a chain of {chain}: {} from a full snapshot", times(*restoring))?;
        writeln!(f, "verify: {} as fast as reading", times(*verifying))
    }
}

impl crate::bench::Report for Report {
    fn figures(&self) -> Vec<Named> {
        let runs = self.runs as usize;
        let figure = |name: String, title: String, unit, Figure { min, p50, max }: Figure, of: f64| {
            let quantiles = if runs > 1 { vec![min / of, p50 / of, max / of] } else { Vec::new() };
            Named { count: runs, quantiles, ..Named::value(name, title, unit, p50 / of) }
        };
        let of_row = |row: &Row| {
            let (name, title) = (row.case.name(), row.case.to_string());
            let (name, title) =
                (|what: &str| format!("snapshot.{name}.{what}"), |what: &str| format!("{}: {what}", title.trim()));
            [
                figure(name("pause"), title("the guest stands still"), Unit::Us, row.pause_us, 1.0),
                figure(name("complete"), title("until it is complete"), Unit::Us, row.total_us, 1.0),
                figure(name("stored-kib"), title("memory stored"), Unit::Kib, row.stored_bytes, 1024.0),
            ]
        };
        let times = |name: &str, title: String, value: Option<f64>| {
            Some(Named::value(format!("snapshot.{name}"), title, Unit::Times, value?))
        };
        let others = [
            times("pause-ratio", format!("pause with {LARGE_MIB} MiB beside {SMALL_MIB} MiB"), self.pause_ratio),
            Some(Named::value(
                "snapshot.pause-per-resident-gib",
                "pause for each GiB more in use",
                Unit::Us,
                self.pause_us_per_resident_gib,
            )),
            times("chain-ratio", "restore from a chain of snapshots beside one alone".into(), self.restoring.ratio),
            // Of every figure less is better.
            times(
                "verify-ratio",
                "time to verify beside time to read".into(),
                self.verifying.ratio.filter(|ratio| *ratio > 0.0).map(|ratio| 1.0 / ratio),
            ),
        ];
        let writing = self.writing.iter().filter_map(|Writing { memory_mib, ratio, .. }| {
            let title = format!("writing a page after a snapshot beside before, {memory_mib} MiB");
            times(&format!("write-ratio.{memory_mib}"), title, *ratio)
        });
        self.snapshots.iter().flat_map(of_row).chain(others.into_iter().flatten()).chain(writing).collect()
    }
}

impl Case {
    /// What programs call it.
    fn name(&self) -> String {
        let Case { guest, memory_mib, used_mib, vcpus, written_pages, snapshot_type } = self;
        match (guest, snapshot_type) {
            (Origin::Booted, _) => format!("booted-{memory_mib}-{used_mib}-{vcpus}"),
            (Origin::Clone, SnapshotType::Full) => format!("clone-{memory_mib}-{written_pages}"),
            (Origin::Clone, SnapshotType::Diff) => format!("changes-{memory_mib}-{written_pages}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Checks, Restores, Taken, Writes};
    use super::*;
    use api_spec::snapshot::SnapshotStatus;

    /// As if each case took as many microseconds as its number, from 100, says; three times, with `spread` around it.
    fn found(options: &Options, spread: u64) -> Found {
        let ms = Duration::from_millis;
        let mut found = Found::default();
        for run in 0..3 {
            for (case, number) in options.cases().into_iter().zip(100..) {
                let pause_us = number + spread * run;
                let status = SnapshotStatus { pause_us, total_us: 2000, memory_bytes: 4096, ..Default::default() };
                found.snapshots.push((case, Taken { status, call: ms(3) }));
            }
            for memory_mib in [SMALL_MIB, LARGE_MIB] {
                let us = Duration::from_micros;
                found.writes.push(Writes { memory_mib, before: us(2048), after: us(4 * 2048) });
            }
            found.restores.push(Restores { chain: ms(30), whole: ms(20) });
            found.checks.push(Checks { bytes: 1 << 30, verify: ms(500), read: ms(250) });
        }
        found
    }

    #[test]
    fn figures_are_the_least_the_median_and_the_most() {
        assert_eq!(Figure::of([3.0, 1.0, 9.0].into_iter()), Figure { min: 1.0, p50: 3.0, max: 9.0 });
        assert_eq!(Figure::of([4.0, 2.0].into_iter()), Figure { min: 2.0, p50: 2.0, max: 4.0 });
        assert_eq!(ratio(Figure::of([1.0].into_iter()), Figure::of([0.0].into_iter())), None);
    }

    #[test]
    fn a_report_compares_the_medians_of_what_belongs_together() {
        let options = Options { resident_mib: 1032, ..Options::default() };
        let report = Report::new(&options, &found(&options, 10));
        assert_eq!(report.snapshots[0].pause_us, Figure { min: 100.0, p50: 110.0, max: 120.0 });
        assert_eq!(report.pause_ratio, Some(rounded(111.0 / 110.0)));
        assert_eq!(report.pause_us_per_resident_gib, 2.0, "the fourth case and the second are a GiB apart");
        assert_eq!((report.writing[0].ratio, report.writing[1].ratio), (Some(4.0), Some(4.0)));
        assert_eq!((report.restoring.ratio, report.verifying.ratio), (Some(1.5), Some(0.5)));
        assert_eq!(report.verifying.verify_gib_s.p50, 2.0);
    }

    #[test]
    fn the_document_says_of_each_snapshot_what_it_is_of() {
        let options = Options::default();
        let report = serde_json::to_value(Report::new(&options, &found(&options, 0))).unwrap();
        let last = report["snapshots"].as_array().unwrap().last().unwrap();
        let expected = serde_json::json!({
            "guest": "clone", "memory_mib": 2048, "used_mib": 8, "vcpus": 1, "written_pages": 2048,
            "snapshot_type": "Diff",
            "pause_us": { "min": 111.0, "p50": 111.0, "max": 111.0 },
            "total_us": { "min": 2000.0, "p50": 2000.0, "max": 2000.0 },
            "call_us": { "min": 3000.0, "p50": 3000.0, "max": 3000.0 },
            "stored_bytes": { "min": 4096.0, "p50": 4096.0, "max": 4096.0 },
        });
        assert_eq!(*last, expected);
    }

    #[test]
    fn a_table_has_a_line_for_each_case() {
        let options = Options::default();
        let text = Report::new(&options, &found(&options, 0)).to_string();
        let case = |name: &str, pause: u32| format!("{name} {pause}.0 {pause}.0 {pause}.0 2.0 2.0 2.0 3.0 4");
        let squeezed = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
        for line in [
            case("booted, 128 MiB, 8 in use", 100),
            case("booted, 128 MiB, 4 busy vCPUs", 102),
            case("booted, 2048 MiB, 1024 in use", 103),
            case("clone, 2048 MiB, 2048 pages written", 110),
            case("  changes only (2048 pages)", 111),
            "restore from a chain of 10 30.0 30.0 30.0 ms".into(),
            "verify 1024 MiB 2.0 2.0 2.0 GiB/s".into(),
            "restore from a chain of 10: 1.500 times from a full snapshot".into(),
        ] {
            assert!(text.lines().any(|one| squeezed(one) == squeezed(&line)), "{line}\n{text}");
        }
    }
}
