//! Figures: what is measured, in the form that tables, gates, charts and documents share. Of every figure less is better. Pure.

use super::phases;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Duration;

/// How many quantiles are kept of what was measured often: each hundredth, and both ends.
pub const QUANTILES: usize = 101;

/// What a figure counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unit {
    /// Microseconds.
    #[serde(rename = "us")]
    Us,
    /// Seconds.
    #[serde(rename = "s")]
    Seconds,
    /// KiB.
    #[serde(rename = "KiB")]
    Kib,
    /// How many times something is something else.
    #[serde(rename = "times")]
    Times,
    /// Hundredths.
    #[serde(rename = "%")]
    Percent,
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Unit::Us => "us",
            Unit::Seconds => "s",
            Unit::Kib => "KiB",
            Unit::Times => "times",
            Unit::Percent => "%",
        })
    }
}

/// To a thousandth.
pub fn rounded(number: f64) -> f64 {
    (number * 1000.0).round() / 1000.0
}

/// A number as it reads best.
pub fn number(value: f64) -> String {
    match value.abs() {
        1000.0.. => grouped(value.round()),
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        0.01.. | 0.0 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

/// With a comma after each three digits.
fn grouped(value: f64) -> String {
    let digits = format!("{:.0}", value.abs());
    let mut text = if value < 0.0 { "-".to_owned() } else { String::new() };
    for (number, digit) in digits.chars().enumerate() {
        if number > 0 && (digits.len() - number).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// How some durations are spread, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// The shortest.
    pub min_us: f64,
    /// Half of them are no longer.
    pub p50_us: f64,
    /// 99 of 100 are no longer.
    pub p99_us: f64,
    /// The longest.
    pub max_us: f64,
    #[serde(skip)]
    count: usize,
    #[serde(skip)]
    quantiles: [f64; QUANTILES],
}

impl Spread {
    /// The spread of these durations, of which there must be one at least.
    pub fn of(mut durations: Vec<Duration>) -> Self {
        durations.sort_unstable();
        let last = durations.len().saturating_sub(1);
        let at = |share: usize| durations.get((last * share).div_ceil(100)).copied().unwrap_or_default();
        let quantiles = std::array::from_fn(|share| (at(share).as_secs_f64() * 1e7).round() / 10.0);
        Spread {
            min_us: quantiles[0],
            p50_us: quantiles[50],
            p99_us: quantiles[99],
            max_us: quantiles[100],
            count: durations.len(),
            quantiles,
        }
    }

    /// Least, median, 99th of 100 and most, as columns of a table.
    pub fn columns(&self) -> String {
        let Spread { min_us, p50_us, p99_us, max_us, .. } = self;
        format!("{min_us:>9.1} {p50_us:>9.1} {p99_us:>9.1} {max_us:>9.1}")
    }

    /// What stands over these columns.
    pub fn heading() -> String {
        format!("{:>9} {:>9} {:>9} {:>9}  us", "min", "p50", "p99", "max")
    }
}

/// A part of a figure: a phase of what it is the time of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Its name.
    pub name: String,
    /// Its median.
    pub p50: f64,
}

/// Something that was measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Figure {
    /// What programs call it, beginning with the benchmark's name: `restore.warm.file.reply`.
    pub name: String,
    /// What people call it.
    pub title: String,
    /// What it counts.
    pub unit: Unit,
    /// How often it was measured.
    pub count: usize,
    /// The median, or the only value.
    pub p50: f64,
    /// The quantiles from the least to the most, at even distances, if it was measured more than once.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub quantiles: Vec<f64>,
    /// Between what the value lies with 95 % confidence, if that was asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval: Option<(f64, f64)>,
    /// What it is made of, in order, as far as that is known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<Part>,
}

impl Figure {
    /// A single value. One that is no number makes no figure in the end.
    pub fn value(name: impl Into<String>, title: impl Into<String>, unit: Unit, value: f64) -> Self {
        Figure {
            name: name.into(),
            title: title.into(),
            unit,
            count: 1,
            p50: rounded(value),
            quantiles: Vec::new(),
            interval: None,
            parts: Vec::new(),
        }
    }

    /// Durations.
    pub fn spread(name: impl Into<String>, title: impl Into<String>, spread: &Spread) -> Self {
        let quantiles = if spread.count > 1 { spread.quantiles.to_vec() } else { Vec::new() };
        Figure { count: spread.count, quantiles, ..Figure::value(name, title, Unit::Us, spread.p50_us) }
    }

    /// The same, made of these phases.
    pub fn of_phases(self, medians: &[phases::Median]) -> Self {
        let part = |(name, us): &phases::Median| Part { name: name.clone(), p50: *us };
        Figure { parts: medians.iter().map(part).collect(), ..self }
    }

    /// The least that was measured.
    pub fn min(&self) -> f64 {
        self.quantiles.first().copied().unwrap_or(self.p50)
    }

    /// 99 of 100 are no more.
    pub fn p99(&self) -> f64 {
        // The last but one hundredth, however many quantiles there are.
        let last = self.quantiles.len().saturating_sub(1);
        self.quantiles.get((last * 99).div_ceil(100)).copied().unwrap_or(self.p50)
    }

    /// The most that was measured.
    pub fn max(&self) -> f64 {
        self.quantiles.last().copied().unwrap_or(self.p50)
    }

    /// Whether it is the difference of others, and may be small where those are not.
    pub fn is_difference(&self) -> bool {
        self.name.ends_with("added") || self.name.ends_with("per-resident-gib")
    }

    /// The benchmark that it is of.
    pub fn benchmark(&self) -> &str {
        benchmark_of(&self.name)
    }
}

/// The benchmark that a figure of this name is of.
pub fn benchmark_of(figure: &str) -> &str {
    figure.split('.').next().unwrap_or_default()
}

/// How something grew.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Series {
    /// What programs call it, as of figures.
    pub name: String,
    /// What people call it.
    pub title: String,
    /// What is counted along it.
    pub x: String,
    /// What is measured.
    pub y: String,
    /// Both, in order.
    pub points: Vec<(f64, f64)>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_taken_from_the_right_places() {
        let spread = Spread::of((1..=201).rev().map(Duration::from_micros).collect());
        assert_eq!((spread.min_us, spread.p50_us, spread.p99_us, spread.max_us), (1.0, 101.0, 199.0, 201.0));
        let figure = Figure::spread("a.b", "A", &spread);
        assert_eq!((figure.min(), figure.p50, figure.p99(), figure.max()), (1.0, 101.0, 199.0, 201.0));
        assert_eq!((figure.count, figure.benchmark()), (201, "a"));
        let one = Spread::of(vec![Duration::from_nanos(1_250)]);
        assert_eq!((one.min_us, one.p50_us, one.p99_us, one.max_us), (1.3, 1.3, 1.3, 1.3));
        let figure = Figure::spread("a", "A", &one);
        assert_eq!((figure.min(), figure.p50, figure.p99(), figure.max()), (1.3, 1.3, 1.3, 1.3));
    }

    #[test]
    fn numbers_are_as_they_read_best() {
        let texts = [0.0, 0.004, 0.54, 1.254, 12.0, 999.4, -1234.0, 1e6].map(number);
        assert_eq!(texts, ["0.00", "0.0040", "0.54", "1.25", "12.0", "999", "-1,234", "1,000,000"]);
    }
}
