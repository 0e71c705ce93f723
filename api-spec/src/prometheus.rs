//! Writing what Prometheus reads: its text format, version 0.0.4. Pure.

use crate::page_server::Histogram;
use std::fmt::Write;

/// What kind of text it is, as HTTP names it.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A label: its name and what it says.
pub type Label<'a> = (&'a str, &'a str);

/// What a metric is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It only grows.
    Counter,
    /// It may be anything.
    Gauge,
    /// How many were no larger than what.
    Histogram,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        }
    }
}

/// The text as far as it is written, and the name of the family that is being written.
#[derive(Debug, Default)]
pub struct Text {
    text: String,
    name: &'static str,
}

impl Text {
    /// Begins a family of samples. `help` is one line without a backslash.
    pub fn family(&mut self, name: &'static str, kind: Kind, help: &str) {
        let kind = kind.name();
        self.name = name;
        self.put(format_args!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
    }

    /// A sample of the family.
    pub fn sample(&mut self, labels: &[Label], value: u64) {
        self.begin("", labels);
        self.put(format_args!("{value}\n"));
    }

    /// A sample that is a time, as seconds.
    pub fn seconds(&mut self, labels: &[Label], us: u64) {
        self.begin("", labels);
        self.put(format_args!("{}\n", Seconds(us)));
    }

    /// All samples of a histogram of times, as seconds. Prometheus counts in each class those of the smaller ones too.
    pub fn histogram(&mut self, histogram: &Histogram) {
        let mut sum = 0_u64;
        for bucket in &histogram.buckets {
            sum = sum.saturating_add(bucket.count);
            self.begin("_bucket", &[("le", &Seconds(bucket.le_us).to_string())]);
            self.put(format_args!("{sum}\n"));
        }
        // Never less than is in the classes, even if both were read while somebody counted.
        let count = histogram.count.max(sum);
        self.begin("_bucket", &[("le", "+Inf")]);
        self.put(format_args!("{count}\n"));
        self.begin("_sum", &[]);
        self.put(format_args!("{}\n", Seconds(histogram.sum_us)));
        self.begin("_count", &[]);
        self.put(format_args!("{count}\n"));
    }

    /// All that was written.
    pub fn into_string(self) -> String {
        self.text
    }

    fn begin(&mut self, suffix: &str, labels: &[Label]) {
        self.text.push_str(self.name);
        self.text.push_str(suffix);
        for (number, (name, value)) in labels.iter().enumerate() {
            let before = if number == 0 { '{' } else { ',' };
            self.put(format_args!("{before}{name}=\"{}\"", escaped(value)));
        }
        self.text.push_str(if labels.is_empty() { " " } else { "} " });
    }

    fn put(&mut self, part: std::fmt::Arguments<'_>) {
        // Writing to a string cannot fail.
        let _ = self.text.write_fmt(part);
    }
}

/// Microseconds, written as seconds.
struct Seconds(u64);

impl std::fmt::Display for Seconds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{:06}", self.0 / 1_000_000, self.0 % 1_000_000)
    }
}

/// What a label says, with what would end it escaped.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page_server::Bucket;

    #[test]
    fn a_histogram_counts_the_smaller_ones_too() {
        let buckets = vec![Bucket { le_us: 10, count: 2 }, Bucket { le_us: 2_000_000, count: 3 }];
        let mut text = Text::default();
        text.family("x_seconds", Kind::Histogram, "Times.");
        text.histogram(&Histogram { buckets, count: 6, sum_us: 1_500_000 });
        let expected = "# HELP x_seconds Times.\n# TYPE x_seconds histogram\n\
            x_seconds_bucket{le=\"0.000010\"} 2\nx_seconds_bucket{le=\"2.000000\"} 5\nx_seconds_bucket{le=\"+Inf\"} 6\n\
            x_seconds_sum 1.500000\nx_seconds_count 6\n";
        assert_eq!(text.into_string(), expected);
    }

    #[test]
    fn a_label_cannot_end_itself() {
        let mut text = Text::default();
        text.family("x", Kind::Gauge, "X.");
        text.sample(&[("a", "q\"\\\n"), ("b", "")], 7);
        assert!(text.into_string().ends_with("x{a=\"q\\\"\\\\\\n\",b=\"\"} 7\n"));
    }
}
