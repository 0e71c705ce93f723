//! `uffd-handler top`: what a page server does, as it does it.
//!
//! What is shown is computed from the counters at two moments ([`View::between`]) and written as text ([`View::render`]),
//! both pure; [`run`] asks, waits and draws.

use crate::process::Signals;
use crate::prometheus::{mode_name, short};
use crate::text::one_line;
use api_spec::client::metrics;
use api_spec::page_server::{
    FaultMetrics, Histogram, HugeMetrics, ImageMetrics, Metrics, SessionMetrics, StoreMetrics,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long the page server may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Bounds of the time between two looks, in seconds.
pub const INTERVALS: std::ops::RangeInclusive<f64> = 0.1..=3600.0;
/// Guests that are shown where nobody says how many lines there are.
const GUESTS_SHOWN: usize = 50;

/// What to show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The page server's metrics socket.
    pub metrics: PathBuf,
    /// Time between two looks.
    pub interval: Duration,
    /// Show it once, and end.
    pub once: bool,
    /// Once, as a JSON document.
    pub json: bool,
}

/// Why nothing can be shown.
#[derive(Debug, thiserror::Error)]
pub enum TopError {
    /// Nobody tells any counters there.
    #[error("cannot read the counters at {path}: {source}; start the page server with `--metrics {path}`")]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// What went wrong.
        source: io::Error,
    },
    /// The page server has ended before there was anything to show.
    #[error("the page server at {path} has gone: {source}")]
    Gone {
        /// The socket.
        path: PathBuf,
        /// How that showed.
        source: io::Error,
    },
    /// Signals cannot be waited for, or standard output cannot be written.
    #[error("cannot show anything: {0}")]
    Io(#[from] io::Error),
}

/// Shows what the page server does until a signal comes or the server has gone. Must be called while the process has one
/// thread, since signals are blocked.
pub fn run(options: &Options) -> Result<(), TopError> {
    let signals = Signals::catch()?;
    let look = || metrics::read(&options.metrics, PATIENCE).map(|metrics| (Instant::now(), metrics));
    let path = || options.metrics.clone();
    let mut before = look().map_err(|source| TopError::Unreachable { path: path(), source })?;
    let mut screen = Screen::new(options);
    while !come_within(&signals, options.interval)? {
        let now = match look() {
            Ok(now) => now,
            Err(source) if screen.is_empty => return Err(TopError::Gone { path: path(), source }),
            Err(source) => {
                screen.write(&format!("the page server at {} has gone: {source}\n", options.metrics.display()))?;
                return Ok(());
            }
        };
        let view = View::between(&before.1, now.1.clone(), now.0 - before.0);
        screen.draw(&view)?;
        if options.once || options.json || screen.is_closed {
            return Ok(());
        }
        before = now;
    }
    Ok(())
}

/// Waits for a signal.
fn come_within(signals: &Signals, wait: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + wait;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(signals, PollFlags::IN)], Some(&left)) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Standard output.
struct Screen {
    json: bool,
    is_terminal: bool,
    is_empty: bool,
    /// Nobody reads it any more.
    is_closed: bool,
}

impl Screen {
    fn new(options: &Options) -> Self {
        let is_terminal = io::stdout().is_terminal() && !options.once && !options.json;
        Screen { json: options.json, is_terminal, is_empty: true, is_closed: false }
    }

    fn draw(&mut self, view: &View) -> io::Result<()> {
        let text = if self.json {
            serde_json::to_string_pretty(view)? + "\n"
        } else if self.is_terminal {
            self.frame(view)
        } else if self.is_empty {
            view.render(GUESTS_SHOWN)
        } else {
            format!("\n{}", view.render(GUESTS_SHOWN))
        };
        self.is_empty = false;
        self.write(&text)
    }

    /// The text in the place of what was there before.
    fn frame(&self, view: &View) -> String {
        // A terminal that does not know its size has that of old.
        let size = rustix::termios::tcgetwinsize(io::stdout()).ok().filter(|size| size.ws_row > 0 && size.ws_col > 0);
        let (rows, columns) = size.map_or((24, 80), |size| (size.ws_row.into(), size.ws_col.into()));
        let clear = if self.is_empty { "\x1b[2J" } else { "" };
        format!("{clear}\x1b[H{}\x1b[J", fit(&view.render(GUESTS_SHOWN), rows, columns))
    }

    fn write(&mut self, text: &str) -> io::Result<()> {
        let mut out = io::stdout().lock();
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                self.is_closed = true;
                Ok(())
            }
            done => done,
        }
    }
}

/// As much of a text as fits, each line of which clears what it does not cover. The last row stays free for the cursor.
fn fit(text: &str, rows: usize, columns: usize) -> String {
    let lines = text.lines().take(rows.saturating_sub(1));
    lines.map(|line| line.chars().take(columns).collect::<String>() + "\x1b[K\n").collect()
}

/// A time of which it is known in which class it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    /// No longer than this, in microseconds.
    AtMostUs(u64),
    /// Longer than this, the largest bound there is, in microseconds.
    AboveUs(u64),
}

impl std::fmt::Display for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Bound::AtMostUs(us) => write!(f, "within {us} us"),
            Bound::AboveUs(us) => write!(f, "longer than {us} us"),
        }
    }
}

/// What was answered between two moments, and how fast.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Latency {
    /// Half of the faults were answered in this time.
    pub p50: Option<Bound>,
    /// 99 of 100 faults were answered in this time.
    pub p99: Option<Bound>,
    /// The mean, in microseconds.
    pub mean_us: Option<u64>,
}

impl Latency {
    /// Of what was counted in `now` and not yet in `before`.
    fn between(before: &Histogram, now: &Histogram) -> Self {
        let earlier: BTreeMap<u64, u64> = before.buckets.iter().map(|bucket| (bucket.le_us, bucket.count)).collect();
        let fresh = |le_us: u64, count: u64| count.saturating_sub(earlier.get(&le_us).copied().unwrap_or(0));
        let classes: Vec<(u64, u64)> = now.buckets.iter().map(|one| (one.le_us, fresh(one.le_us, one.count))).collect();
        let in_classes = classes.iter().fold(0_u64, |sum, (_, count)| sum.saturating_add(*count));
        let count = now.count.saturating_sub(before.count).max(in_classes);
        Latency {
            p50: quantile(&classes, count, 50),
            p99: quantile(&classes, count, 99),
            mean_us: now.sum_us.saturating_sub(before.sum_us).checked_div(count),
        }
    }
}

/// Where `percent` of `count` lie. The classes have their bounds in order.
fn quantile(classes: &[(u64, u64)], count: u64, percent: u64) -> Option<Bound> {
    let rank = (u128::from(count) * u128::from(percent)).div_ceil(100).max(1);
    let last = classes.last().filter(|_| count > 0)?;
    let mut sum = 0;
    for (le_us, count) in classes {
        sum += u128::from(*count);
        if sum >= rank {
            return Some(Bound::AtMostUs(*le_us));
        }
    }
    Some(Bound::AboveUs(last.0))
}

/// One guest and how often it faults.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Guest {
    /// Its counters.
    #[serde(flatten)]
    pub counters: SessionMetrics,
    /// Faults in a second.
    pub faults_per_second: f64,
}

/// What is shown.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct View {
    /// Time between the two moments, in milliseconds.
    pub interval_ms: u64,
    /// Guests served since the start of the server, those of now included.
    pub sessions_total: u64,
    /// Clients that were refused or broke off the handshake.
    pub refused_total: u64,
    /// Stores that were retired.
    pub stores_retired_total: u64,
    /// Faults answered since the start of the server.
    pub faults: FaultMetrics,
    /// Faults answered in a second, by how they were.
    pub faults_per_second: BTreeMap<&'static str, f64>,
    /// How fast they were answered.
    pub latency: Latency,
    /// Blocks of stores that were to become huge pages, since the start of the server.
    pub huge_pages: HugeMetrics,
    /// Where pages come from.
    pub images: Vec<ImageMetrics>,
    /// Page stores.
    pub stores: Vec<StoreMetrics>,
    /// Guests, those that fault most first.
    pub guests: Vec<Guest>,
}

const MIB_PAGES: f64 = 256.0;
const MIB_CHUNKS: f64 = 16.0;

impl View {
    /// What there is to show of the counters `now`, which are by `elapsed` younger than those `before`.
    pub fn between(before: &Metrics, now: Metrics, elapsed: Duration) -> Self {
        let rate = |now: u64, before: u64| per_second(now.saturating_sub(before), elapsed);
        let (old, new) = (kinds(&before.faults), kinds(&now.faults));
        let faults_per_second = new.iter().zip(old).map(|((kind, now), (_, before))| (*kind, rate(*now, before)));
        let earlier: BTreeMap<u64, u64> = before.sessions.iter().map(|one| (one.id, one.uffd_events)).collect();
        let guest = |counters: SessionMetrics| {
            let before = earlier.get(&counters.id).copied().unwrap_or(0);
            Guest { faults_per_second: rate(counters.uffd_events, before), counters }
        };
        let mut guests: Vec<Guest> = now.sessions.into_iter().map(guest).collect();
        guests.sort_by(|a, b| {
            b.faults_per_second.total_cmp(&a.faults_per_second).then(a.counters.id.cmp(&b.counters.id))
        });
        View {
            interval_ms: elapsed.as_millis() as u64,
            sessions_total: now.sessions_total,
            refused_total: now.refused_total,
            stores_retired_total: now.stores_retired_total,
            faults_per_second: faults_per_second.collect(),
            latency: Latency::between(&before.fault_latency, &now.fault_latency),
            faults: now.faults,
            huge_pages: now.huge_pages,
            images: now.images,
            stores: now.stores,
            guests,
        }
    }

    /// All of it as text, with so many guests at most.
    pub fn render(&self, guests: usize) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = self.write_totals(&mut text);
        let _ = self.write_images(&mut text);
        let _ = self.write_stores(&mut text);
        let _ = self.write_guests(&mut text, guests);
        text
    }

    fn write_totals(&self, text: &mut String) -> std::fmt::Result {
        writeln!(
            text,
            "guests {} now, {} in all; refused {}; stores retired {}; over the last {:.1} s:",
            self.guests.len(),
            self.sessions_total,
            self.refused_total,
            self.stores_retired_total,
            self.interval_ms as f64 / 1000.0
        )?;
        let kinds = kinds(&self.faults);
        write!(text, "\n{:<14}", "FAULTS")?;
        kinds.iter().try_for_each(|(kind, _)| write!(text, " {kind:>12}"))?;
        write!(text, " {:>12}\n{:<14}", "all", "per second")?;
        let rate = |kind| self.faults_per_second.get(kind).copied().unwrap_or(0.0);
        kinds.iter().try_for_each(|(kind, _)| write!(text, " {:>12.1}", rate(kind)))?;
        write!(text, " {:>12.1}\n{:<14}", self.faults_per_second.values().sum::<f64>(), "in all")?;
        kinds.iter().try_for_each(|(_, count)| write!(text, " {count:>12}"))?;
        writeln!(text, " {:>12}", kinds.iter().fold(0_u64, |sum, (_, count)| sum.saturating_add(*count)))?;
        match self.latency {
            Latency { p50: Some(p50), p99: Some(p99), mean_us: Some(mean) } => {
                writeln!(text, "answered       half {p50}, 99 of 100 {p99}, mean {mean} us")
            }
            _ => writeln!(text, "answered       none"),
        }?;
        match self.huge_pages {
            HugeMetrics { collapsed: 0, failed: 0 } => Ok(()),
            HugeMetrics { collapsed, failed } => {
                writeln!(text, "huge pages     {collapsed} blocks of 2 MiB collapsed, {failed} could not be")
            }
        }
    }

    fn write_images(&self, text: &mut String) -> std::fmt::Result {
        if self.images.is_empty() {
            return Ok(());
        }
        writeln!(
            text,
            "\n{:<12} {:<8} {:>10} {:>10} {:>8} {:>8}  STATE",
            "IMAGE", "SOURCE", "READ MiB", "CACHED MiB", "WAITING", "FAILURES"
        )?;
        for one in &self.images {
            let state = match (&one.damage, &one.away) {
                (Some(why), _) => format!("damaged: {}", one_line(why)),
                (None, Some(why)) => format!("away: {}", one_line(why)),
                (None, None) => "ok".into(),
            };
            let (image, source, mib) = (one_line(&short(&one.image)), one_line(&one.source), one.bytes_read >> 20);
            let cached = one.cached_chunks as f64 / MIB_CHUNKS;
            writeln!(
                text,
                "{image:<12} {source:<8} {mib:>10} {cached:>10.0} {:>8} {:>8}  {state}",
                one.chunks_waiting, one.failures
            )?;
        }
        Ok(())
    }

    fn write_stores(&self, text: &mut String) -> std::fmt::Result {
        if self.stores.is_empty() {
            return Ok(());
        }
        let titles = ("STORE OF", "UID", "FILLED MiB", "OF MiB", "GUESTS");
        writeln!(
            text,
            "\n{:<12} {:>8} {:>10} {:>10} {:>6} {:>8}  STATE",
            titles.0, titles.1, titles.2, titles.3, "%", titles.4
        )?;
        for one in &self.stores {
            let uid = one.uid.map_or("copies".into(), |uid| uid.to_string());
            let (filled, all) = (one.filled_pages as f64, one.image_pages as f64);
            let (image, state) = (one_line(&short(&one.image)), if one.retired { "retired" } else { "ok" });
            writeln!(
                text,
                "{image:<12} {uid:>8} {:>10.1} {:>10.1} {:>6.1} {:>8}  {state}",
                filled / MIB_PAGES,
                all / MIB_PAGES,
                100.0 * filled / all.max(1.0),
                one.sessions
            )?;
        }
        Ok(())
    }

    fn write_guests(&self, text: &mut String, most: usize) -> std::fmt::Result {
        if self.guests.is_empty() {
            return Ok(());
        }
        writeln!(
            text,
            "\n{:<8} {:>8} {:<6} {:>12} {:>10} {:>10} {:>10} {:>10} {:>8}",
            "GUEST", "PID", "MODE", "FAULTS/S", "FAULTS", "FILLED", "PRESENT", "COPIED", "WAITING"
        )?;
        for Guest { counters: one, faults_per_second } in self.guests.iter().take(most) {
            writeln!(
                text,
                "{:<8} {:>8} {:<6} {faults_per_second:>12.1} {:>10} {:>10} {:>10} {:>10} {:>8}",
                one.id,
                one.pid,
                mode_name(one.mode),
                one.uffd_events,
                one.pages_filled,
                one.already_present,
                one.pages_copied,
                one.waiting
            )?;
        }
        match self.guests.len().saturating_sub(most) {
            0 => Ok(()),
            more => writeln!(text, "and {more} more"),
        }
    }
}

/// Faults by kind, in the order in which they are shown.
fn kinds(faults: &FaultMetrics) -> [(&'static str, u64); 5] {
    let FaultMetrics { filled, present, deferred, copied, zeroed } = *faults;
    [("filled", filled), ("present", present), ("deferred", deferred), ("copied", copied), ("zeroed", zeroed)]
}

fn per_second(count: u64, elapsed: Duration) -> f64 {
    let seconds = elapsed.as_secs_f64();
    if seconds > 0.0 { count as f64 / seconds } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use api_spec::handshake::Mode;
    use api_spec::page_server::Bucket;
    use proptest::prelude::*;

    fn histogram(counts: &[u64], above: u64, sum_us: u64) -> Histogram {
        let buckets: Vec<_> = (0..).zip(counts).map(|(i, &count)| Bucket { le_us: 10 << i, count }).collect();
        Histogram { buckets, count: counts.iter().sum::<u64>() + above, sum_us }
    }

    #[test]
    fn latencies_are_those_of_the_time_between() {
        let before = histogram(&[1000, 0, 0], 0, 5000);
        let now = histogram(&[1000, 98, 2], 0, 5000 + 2000);
        let latency = Latency::between(&before, &now);
        let expected = (Some(Bound::AtMostUs(20)), Some(Bound::AtMostUs(40)), Some(20));
        assert_eq!((latency.p50, latency.p99, latency.mean_us), expected);
        assert_eq!(Latency::between(&now, &now), Latency::default());
        // A server that was started anew has counted less.
        assert_eq!(Latency::between(&now, &before), Latency::default());
        let slow = Latency::between(&before, &histogram(&[1000, 0, 0], 3, 9_000_000));
        assert_eq!((slow.p50, slow.mean_us), (Some(Bound::AboveUs(40)), Some(8_995_000 / 3)));
    }

    fn sample() -> View {
        let session = |id, mode, uffd_events| SessionMetrics { id, pid: 7, mode, uffd_events, ..Default::default() };
        let before = Metrics {
            sessions: vec![session(1, Mode::Shared, 100), session(2, Mode::Copy, 0)],
            faults: FaultMetrics { filled: 50, ..Default::default() },
            ..Default::default()
        };
        let now = Metrics {
            sessions: vec![session(1, Mode::Shared, 110), session(2, Mode::Copy, 50), session(3, Mode::Shared, 2)],
            sessions_total: 4,
            stores: vec![
                StoreMetrics {
                    image: "0123456789abcdef".into(),
                    uid: Some(1000),
                    image_pages: 1024,
                    filled_pages: 256,
                    sessions: 2,
                    retired: false,
                },
                StoreMetrics {
                    image: "0123456789abcdef".into(),
                    image_pages: 1024,
                    retired: true,
                    ..Default::default()
                },
            ],
            images: vec![ImageMetrics {
                image: "0123456789abcdef".into(),
                source: "remote".into(),
                bytes_read: 3 << 20,
                cached_chunks: 16,
                chunks_waiting: 2,
                away: Some("no\x1b[31m route\nto host".into()),
                ..Default::default()
            }],
            faults: FaultMetrics { filled: 150, copied: 1, ..Default::default() },
            fault_latency: histogram(&[3, 1], 0, 40),
            huge_pages: HugeMetrics { collapsed: 6, failed: 1 },
            ..Default::default()
        };
        View::between(&before, now, Duration::from_secs(2))
    }

    #[test]
    fn a_view_says_all_that_there_is() {
        let expected = "\
guests 3 now, 4 in all; refused 0; stores retired 0; over the last 2.0 s:

FAULTS               filled      present     deferred       copied       zeroed          all
per second             50.0          0.0          0.0          0.5          0.0         50.5
in all                  150            0            0            1            0          151
answered       half within 10 us, 99 of 100 within 20 us, mean 10 us
huge pages     6 blocks of 2 MiB collapsed, 1 could not be

IMAGE        SOURCE     READ MiB CACHED MiB  WAITING FAILURES  STATE
0123456789ab remote            3          1        2        0  away: no [31m route to host

STORE OF          UID FILLED MiB     OF MiB      %   GUESTS  STATE
0123456789ab     1000        1.0        4.0   25.0        2  ok
0123456789ab   copies        0.0        4.0    0.0        0  retired

GUEST         PID MODE       FAULTS/S     FAULTS     FILLED    PRESENT     COPIED  WAITING
2               7 copy           25.0         50          0          0          0        0
1               7 shared          5.0        110          0          0          0        0
and 1 more
";
        assert_eq!(sample().render(2), expected);
        let json = serde_json::to_value(sample()).unwrap();
        assert_eq!(json["guests"][0]["id"], 2);
        assert_eq!(json["faults_per_second"]["filled"], 50.0);
        assert_eq!(json["latency"]["p99"]["at_most_us"], 20);
    }

    #[test]
    fn a_frame_fits_the_terminal() {
        let frame = fit(&sample().render(100), 10, 40);
        assert_eq!(frame.lines().count(), 9);
        assert!(frame.lines().all(|line| line.strip_suffix("\x1b[K").is_some_and(|line| line.chars().count() <= 40)));
    }

    proptest! {
        #[test]
        fn quantiles_lie_where_they_should(counts in prop::collection::vec(0u64..100, 1..8), above in 0u64..100, percent in 1u64..100) {
            let classes: Vec<(u64, u64)> = (0..).zip(&counts).map(|(i, &count)| (10 << i, count)).collect();
            let mut all: Vec<u64> = classes.iter().flat_map(|&(le, count)| (0..count).map(move |_| le)).collect();
            all.extend((0..above).map(|_| u64::MAX));
            let found = quantile(&classes, all.len() as u64, percent);
            let at = all.get((all.len() * percent as usize).div_ceil(100).saturating_sub(1));
            let last = classes[classes.len() - 1].0;
            let expected = at.map(|&le| if le == u64::MAX { Bound::AboveUs(last) } else { Bound::AtMostUs(le) });
            prop_assert_eq!(found, expected);
        }

        #[test]
        fn any_counters_can_be_shown(events: Vec<u64>, filled: u64, before: u64, counts: Vec<u64>, ms in 0u64..10_000) {
            let sessions = (0..).zip(events).map(|(id, uffd_events)| SessionMetrics { id, uffd_events, ..Default::default() });
            let buckets = (0..).zip(counts).map(|(le_us, count)| Bucket { le_us, count }).collect();
            let now = Metrics {
                sessions: sessions.collect(),
                faults: FaultMetrics { filled, copied: before, ..Default::default() },
                fault_latency: Histogram { buckets, count: before, sum_us: filled },
                ..Default::default()
            };
            let old = Metrics { faults: FaultMetrics { filled: before, ..Default::default() }, ..Default::default() };
            let text = View::between(&old, now, Duration::from_millis(ms)).render(3);
            prop_assert!(!text.contains("NaN") && !text.contains("inf"), "{}", text);
        }
    }
}
