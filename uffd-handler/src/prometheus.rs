//! The server's counters as Prometheus reads them. Pure.
//!
//! Series that would be told apart by nothing are summed: two retired stores of one image and user are one series.

use api_spec::handshake::Mode;
use api_spec::page_server::{HugeMetrics, ImageMetrics, Metrics, SessionMetrics, StoreMetrics};
use api_spec::prometheus::{Kind, Label, Text};
use std::collections::BTreeMap;

/// Most guests that have series of their own. Whoever stores what is told here pays for each series, for long.
pub const MAX_SESSIONS: usize = 100;
/// How much of an image's digest its label has: as much as tells images apart.
const IMAGE_DIGITS: usize = 12;

/// All counters.
pub fn render(metrics: &Metrics) -> String {
    let mut text = Text::default();
    server(&mut text, metrics);
    faults(&mut text, metrics);
    images(&mut text, &metrics.images);
    stores(&mut text, &metrics.stores);
    modes(&mut text, &metrics.sessions);
    if metrics.sessions.len() <= MAX_SESSIONS {
        sessions(&mut text, &metrics.sessions);
    }
    text.into_string()
}

fn server(text: &mut Text, metrics: &Metrics) {
    text.family("coppice_page_server_sessions_total", Kind::Counter, "Guests served so far, those of now included.");
    text.sample(&[], metrics.sessions_total);
    text.family(
        "coppice_page_server_refused_total",
        Kind::Counter,
        "Clients that were refused or broke off the handshake.",
    );
    text.sample(&[], metrics.refused_total);
    text.family(
        "coppice_page_server_stores_retired_total",
        Kind::Counter,
        "Stores retired because pages had appeared in them that the server had not put there.",
    );
    text.sample(&[], metrics.stores_retired_total);
    text.family(
        "coppice_page_server_huge_blocks_total",
        Kind::Counter,
        "Complete blocks of 2 MiB of stores by what became of them: one huge page, or none, as the kernel did not take them.",
    );
    let HugeMetrics { collapsed, failed } = metrics.huge_pages;
    for (outcome, count) in [("collapsed", collapsed), ("failed", failed)] {
        text.sample(&[("outcome", outcome)], count);
    }
}

fn faults(text: &mut Text, metrics: &Metrics) {
    let faults = &metrics.faults;
    text.family(
        "coppice_page_server_faults_total",
        Kind::Counter,
        "Faults by how they were answered: the store was filled at once, the page was present, the bytes had to be waited \
         for, the page was copied, or zeroed since the guest had given it back.",
    );
    for (kind, count) in [
        ("filled", faults.filled),
        ("present", faults.present),
        ("deferred", faults.deferred),
        ("copied", faults.copied),
        ("zeroed", faults.zeroed),
    ] {
        text.sample(&[("kind", kind)], count);
    }
    text.family(
        "coppice_page_server_fault_latency_seconds",
        Kind::Histogram,
        "From reading a fault event until its guest was woken.",
    );
    text.histogram(&metrics.fault_latency);
}

fn images(text: &mut Text, images: &[ImageMetrics]) {
    let groups = grouped(images, |one| (short(&one.image), one.source.as_str()));
    let mut each = |name, kind, help, value: fn(&ImageMetrics) -> u64| {
        text.family(name, kind, help);
        for ((image, source), group) in &groups {
            text.sample(&[("image", image), ("source", source)], sum(group, value));
        }
    };
    each(
        "coppice_page_server_image_read_chunks_total",
        Kind::Counter,
        "Chunks of 64 KiB of the image that were read and checked.",
        |one| one.chunks_read,
    );
    each("coppice_page_server_image_read_bytes_total", Kind::Counter, "Bytes in them.", |one| one.bytes_read);
    each(
        "coppice_page_server_image_read_failures_total",
        Kind::Counter,
        "Reads of the image that failed, and are tried again.",
        |one| one.failures,
    );
    each(
        "coppice_page_server_image_cached_chunks_total",
        Kind::Counter,
        "Chunks of a remote image that had come along with others, or were in the cache on disk.",
        |one| one.cached_chunks,
    );
    each(
        "coppice_page_server_image_cache_faults_total",
        Kind::Counter,
        "How often a chunk was found wrong in the cache on disk, and was fetched anew.",
        |one| one.cache_faults,
    );
    each(
        "coppice_page_server_image_waiting_chunks",
        Kind::Gauge,
        "Chunks of the image that are being waited for.",
        |one| one.chunks_waiting,
    );
    each(
        "coppice_page_server_image_away",
        Kind::Gauge,
        "Whether nothing of the image can be read at present: 0 or 1.",
        |one| one.away.is_some().into(),
    );
    each(
        "coppice_page_server_image_damaged",
        Kind::Gauge,
        "Whether the image is damaged, and served to nobody any more: 0 or 1.",
        |one| one.damage.is_some().into(),
    );
}

fn stores(text: &mut Text, stores: &[StoreMetrics]) {
    let uid = |one: &StoreMetrics| one.uid.map(|uid| uid.to_string()).unwrap_or_default();
    let groups = grouped(stores, |one| (short(&one.image), uid(one), one.retired));
    let mut each = |name, help, value: fn(&StoreMetrics) -> u64| {
        text.family(name, Kind::Gauge, help);
        for ((image, uid, retired), group) in &groups {
            let retired = if *retired { "true" } else { "false" };
            text.sample(&[("image", image), ("uid", uid), ("retired", retired)], sum(group, value));
        }
    };
    each(
        "coppice_page_server_store_filled_pages",
        "Pages of 4 KiB in the store. The store without a uid is that from which the server copies.",
        |one| one.filled_pages,
    );
    each("coppice_page_server_store_image_pages", "Pages of 4 KiB that the image has.", |one| one.image_pages);
    each("coppice_page_server_store_sessions", "Guests that use the store.", |one| one.sessions);
}

fn modes(text: &mut Text, sessions: &[SessionMetrics]) {
    let mut each = |name, help, value: fn(&SessionMetrics) -> u64| {
        text.family(name, Kind::Gauge, help);
        for mode in [Mode::Shared, Mode::Copy] {
            let count = sessions.iter().filter(|one| one.mode == mode).map(value).sum();
            text.sample(&[("mode", mode_name(mode))], count);
        }
    };
    each("coppice_page_server_active_sessions", "Guests that are being served, by how pages come to them.", |_| 1);
    each("coppice_page_server_waiting_faults", "Faults of all guests that wait for bytes.", |one| one.waiting);
}

fn sessions(text: &mut Text, sessions: &[SessionMetrics]) {
    let mut each = |name, kind, help: &str, value: fn(&SessionMetrics) -> u64| {
        text.family(name, kind, &format!("{help} Left out while there are more than {MAX_SESSIONS} guests."));
        for one in sessions {
            let (id, pid) = (one.id.to_string(), one.pid.to_string());
            let labels: [Label; 3] = [("session", &id), ("pid", &pid), ("mode", mode_name(one.mode))];
            text.sample(&labels, value(one));
        }
    };
    each("coppice_page_server_session_faults_total", Kind::Counter, "Faults of one guest.", |one| one.uffd_events);
    each(
        "coppice_page_server_session_filled_pages_total",
        Kind::Counter,
        "Pages filled in answer to a guest's faults, neighbours included.",
        |one| one.pages_filled,
    );
    each(
        "coppice_page_server_session_present_faults_total",
        Kind::Counter,
        "Faults of one guest whose page was in the store already.",
        |one| one.already_present,
    );
    each(
        "coppice_page_server_session_copied_pages_total",
        Kind::Counter,
        "Pages copied into a guest's memory, those that read as zeros included.",
        |one| one.pages_copied,
    );
    each(
        "coppice_page_server_session_waiting_faults",
        Kind::Gauge,
        "Faults of one guest that wait for bytes.",
        |one| one.waiting,
    );
}

/// What has the same labels, together.
fn grouped<'a, T, K: Ord>(all: &'a [T], labels: impl Fn(&'a T) -> K) -> BTreeMap<K, Vec<&'a T>> {
    let mut groups: BTreeMap<K, Vec<&T>> = BTreeMap::new();
    for one in all {
        groups.entry(labels(one)).or_default().push(one);
    }
    groups
}

fn sum<T>(group: &[&T], value: fn(&T) -> u64) -> u64 {
    group.iter().map(|one| value(one)).fold(0, u64::saturating_add)
}

/// The first digits of a digest.
pub fn short(image: &str) -> String {
    image.chars().take(IMAGE_DIGITS).collect()
}

/// As the protocol names it.
pub fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Shared => "shared",
        Mode::Copy => "copy",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use api_spec::page_server::{Bucket, FaultMetrics, Histogram};
    use openmetrics_parser::prometheus::parse_prometheus;
    use openmetrics_parser::{PrometheusType, PrometheusValue};
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// The value of a sample, by its family and labels, in order.
    fn get(text: &str, family: &str, labels: &[Label]) -> Option<PrometheusValue> {
        let exposition = parse_prometheus(text).unwrap();
        let family = exposition.families.get(family)?;
        let found = family.iter_samples().find(|sample| {
            let sample = sample.get_labelset().unwrap();
            labels.iter().all(|(name, value)| sample.get_label_value(name) == Some(value))
        });
        found.map(|sample| sample.value.clone())
    }

    fn number(text: &str, family: &str, labels: &[Label]) -> Option<f64> {
        match get(text, family, labels)? {
            PrometheusValue::Gauge(value) => Some(value.as_f64()),
            PrometheusValue::Counter(value) => Some(value.value.as_f64()),
            other => panic!("{family} is no number: {other:?}"),
        }
    }

    /// What no parser looks at: families have our names and units, help, a fitting type, and no sample comes twice.
    fn check(text: &str) {
        let mut seen = BTreeSet::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (series, _) = line.rsplit_once(' ').unwrap();
            assert!(seen.insert(series), "{series} comes twice");
        }
        for (name, family) in parse_prometheus(text).unwrap().families {
            assert!(name.starts_with("coppice_page_server_"), "{name}");
            assert!(!family.help.is_empty(), "{name}");
            assert_eq!(family.family_type == PrometheusType::Counter, name.ends_with("_total"), "{name}");
        }
    }

    fn session(id: u64, mode: Mode) -> SessionMetrics {
        SessionMetrics { id, pid: 40 + id as u32, mode, uffd_events: 10 * id, waiting: 1, ..Default::default() }
    }

    fn store(uid: Option<u32>, retired: bool, filled_pages: u64) -> StoreMetrics {
        StoreMetrics { image: "ab".repeat(32), uid, retired, filled_pages, image_pages: 100, sessions: 1 }
    }

    #[test]
    fn all_that_there_is_is_told() {
        let image = ImageMetrics {
            image: "ab".repeat(32),
            source: "remote".into(),
            bytes_read: 65536,
            cached_chunks: 12,
            cache_faults: 2,
            away: Some("timed out".into()),
            ..Default::default()
        };
        let buckets = vec![Bucket { le_us: 5, count: 1 }, Bucket { le_us: 1000, count: 2 }];
        let metrics = Metrics {
            stores: vec![
                store(Some(1000), true, 3),
                store(Some(1000), true, 4),
                store(Some(1000), false, 5),
                store(None, false, 6),
            ],
            images: vec![image],
            sessions: vec![session(1, Mode::Shared), session(2, Mode::Copy)],
            sessions_total: 9,
            faults: FaultMetrics { deferred: 8, ..Default::default() },
            fault_latency: Histogram { buckets, count: 4, sum_us: 2_000_000 },
            huge_pages: HugeMetrics { collapsed: 5, failed: 1 },
            ..Default::default()
        };
        let text = render(&metrics);
        check(&text);
        let image = ("image", "abababababab");
        for (family, labels, value) in [
            ("coppice_page_server_sessions_total", &[][..], 9.0),
            ("coppice_page_server_faults_total", &[("kind", "deferred")], 8.0),
            ("coppice_page_server_huge_blocks_total", &[("outcome", "collapsed")], 5.0),
            ("coppice_page_server_huge_blocks_total", &[("outcome", "failed")], 1.0),
            ("coppice_page_server_image_read_bytes_total", &[image, ("source", "remote")], 65536.0),
            ("coppice_page_server_image_cached_chunks_total", &[image, ("source", "remote")], 12.0),
            ("coppice_page_server_image_cache_faults_total", &[image, ("source", "remote")], 2.0),
            ("coppice_page_server_image_away", &[image], 1.0),
            ("coppice_page_server_image_damaged", &[image], 0.0),
            ("coppice_page_server_store_filled_pages", &[image, ("uid", "1000"), ("retired", "true")], 7.0),
            ("coppice_page_server_store_filled_pages", &[image, ("uid", "1000"), ("retired", "false")], 5.0),
            ("coppice_page_server_store_filled_pages", &[image, ("uid", "")], 6.0),
            ("coppice_page_server_active_sessions", &[("mode", "copy")], 1.0),
            ("coppice_page_server_session_faults_total", &[("session", "2"), ("pid", "42"), ("mode", "copy")], 20.0),
        ] {
            assert_eq!(number(&text, family, labels), Some(value), "{family} {labels:?}");
        }
        let Some(PrometheusValue::Histogram(latency)) = get(&text, "coppice_page_server_fault_latency_seconds", &[])
        else {
            panic!("no histogram");
        };
        let buckets: Vec<_> = latency.buckets.iter().map(|b| (b.upper_bound, b.count.as_f64())).collect();
        assert_eq!(buckets, [(0.000005, 1.0), (0.001, 3.0), (f64::INFINITY, 4.0)]);
        assert_eq!(latency.sum.map(|sum| sum.as_f64()), Some(2.0));
    }

    #[test]
    fn many_guests_have_no_series_of_their_own() {
        let sessions = |count| (1..=count as u64).map(|id| session(id, Mode::Shared)).collect();
        let few = render(&Metrics { sessions: sessions(MAX_SESSIONS), ..Default::default() });
        assert_eq!(number(&few, "coppice_page_server_session_waiting_faults", &[("session", "100")]), Some(1.0));
        let many = render(&Metrics { sessions: sessions(5000), ..Default::default() });
        assert!(many.len() < few.len() && !many.contains("session=") && !many.contains("pid="));
        assert_eq!(number(&many, "coppice_page_server_waiting_faults", &[("mode", "shared")]), Some(5000.0));
    }

    fn any_metrics() -> impl Strategy<Value = Metrics> {
        let image = prop_oneof!["[0-9a-f]{64}", "[ab]{1,13}", "\\PC{0,20}"];
        let stores = prop::collection::vec((image.clone(), any::<Option<u32>>(), any::<u64>(), any::<bool>()), 0..8);
        let images = prop::collection::vec((image, "file|remote", any::<u64>()), 0..8);
        let buckets = prop::collection::btree_map(any::<u64>(), any::<u64>(), 0..8);
        (stores, images, buckets, any::<u64>(), any::<u64>()).prop_map(|(stores, images, buckets, count, sum_us)| {
            let store = |(image, uid, filled_pages, retired)| StoreMetrics {
                image,
                uid,
                filled_pages,
                retired,
                ..Default::default()
            };
            let image = |(image, source, bytes_read)| ImageMetrics { image, source, bytes_read, ..Default::default() };
            let bucket = |(le_us, count)| Bucket { le_us, count };
            let buckets = buckets.into_iter().map(bucket).collect();
            Metrics {
                stores: stores.into_iter().map(store).collect(),
                images: images.into_iter().map(image).collect(),
                fault_latency: Histogram { buckets, count, sum_us },
                ..Default::default()
            }
        })
    }

    proptest! {
        #[test]
        fn whatever_is_counted_the_text_is_in_order(metrics in any_metrics()) {
            check(&render(&metrics));
        }
    }
}
