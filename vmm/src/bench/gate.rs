//! Whether figures are as good as they have to be: within budgets that somebody has set, and no worse than they once were. Pure, but for
//! reading the file.
//!
//! A gate is a file as `--json` prints it (a *baseline*), one that only sets budgets, or both in one:
//!
//! ```json
//! { "budgets": [ { "figure": "restore.warm.file.reply", "p50": 500, "p99": 1500, "note": "why, or why not" } ] }
//! ```

use super::figure::{Figure, Unit, benchmark_of, number};
use super::sheet::{Sheet, SheetError, read_file};
use serde::Deserialize;
use std::fmt;
use std::path::Path;

/// By what share of the baseline a figure may be worse: durations and ratios, which are noisy, in half of the cases and in 99 of 100;
/// and memory, which is not.
const SHARE: f64 = 0.25;
const SHARE_P99: f64 = 1.0;
const SHARE_MEMORY: f64 = 0.05;
/// By how many microseconds a duration may be worse besides, but by no more than the same share again unless it is a difference of others: less
/// cannot be told from nothing.
const SLACK_US: f64 = 20.0;
/// The same of hundredths of a processor, which are told in steps of a half.
const SLACK_PERCENT: f64 = 2.0;
/// From how many values on one in a hundred means anything.
const ENOUGH_FOR_P99: usize = 100;

/// The most that a figure may be.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Budget {
    /// The name of the figure.
    pub figure: String,
    /// Of its median, in its unit.
    #[serde(default)]
    pub p50: Option<f64>,
    /// Of 99 in 100.
    #[serde(default)]
    pub p99: Option<f64>,
    /// What is to be known of it, for people.
    #[serde(default)]
    pub note: Option<String>,
}

impl Budget {
    /// Whether there are too few values to tell one in a hundred, which is asked.
    fn is_of_too_many(&self, figure: &Figure) -> bool {
        self.p99.is_some() && figure.count < ENOUGH_FOR_P99
    }

    /// Holds it against a figure. One in a hundred is looked at where there are a hundred.
    pub fn compare(&self, figure: &Figure) -> Vec<Compared> {
        let p99 = self.p99.filter(|_| !self.is_of_too_many(figure));
        let of = [("p50", figure.p50, self.p50), ("p99", figure.p99(), p99)];
        let compared = |(value, measured, at_most): (&'static str, f64, Option<f64>)| {
            Some(Compared {
                figure: figure.name.clone(),
                value,
                unit: figure.unit,
                measured,
                at_most: at_most?,
                with: "budget",
            })
        };
        of.into_iter().filter_map(compared).collect()
    }
}

/// What figures are compared with.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Gate {
    /// How much figures may be at most.
    pub budgets: Vec<Budget>,
    baseline: Option<Sheet>,
}

#[derive(Deserialize)]
struct Budgets {
    #[serde(default)]
    budgets: Vec<Budget>,
    /// Looked at on its own, if it is there.
    #[serde(default)]
    figures: Option<serde::de::IgnoredAny>,
}

/// What was compared.
#[derive(Clone, Debug, PartialEq)]
pub struct Compared {
    /// The figure.
    pub figure: String,
    /// Which value of it.
    pub value: &'static str,
    /// What it counts.
    pub unit: Unit,
    /// What was measured.
    pub measured: f64,
    /// How much it may be.
    pub at_most: f64,
    /// With a budget, or with a baseline.
    pub with: &'static str,
}

impl Compared {
    /// Whether it is as good as it has to be.
    pub fn holds(&self) -> bool {
        self.measured <= self.at_most
    }
}

impl fmt::Display for Compared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Compared { figure, value, unit, measured, at_most, with } = self;
        let (verdict, measured, at_most) =
            (if self.holds() { "holds" } else { "FAILS" }, number(*measured), number(*at_most));
        write!(f, "{verdict}  {figure} {value}: {measured} {unit}, at most {at_most} ({with})")
    }
}

/// What a gate says of figures.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Verdict {
    /// What was compared.
    pub compared: Vec<Compared>,
    /// What the gate says of benchmarks that were run, and could not be compared; each with the reason.
    pub not_compared: Vec<(String, &'static str)>,
}

impl Verdict {
    /// How many values are worse than they may be.
    pub fn failed(&self) -> usize {
        self.compared.iter().filter(|compared| !compared.holds()).count()
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.compared.iter().try_for_each(|compared| writeln!(f, "{compared}"))?;
        self.not_compared.iter().try_for_each(|(figure, why)| writeln!(f, "not compared: {figure}: {why}"))
    }
}

impl Gate {
    /// Reads a gate.
    pub fn read(path: &Path) -> Result<Self, SheetError> {
        let bad = |problem: String| SheetError::Bad { path: path.into(), problem };
        let text = read_file(path)?;
        let Budgets { budgets, figures } = serde_json::from_slice(&text).map_err(|e| bad(e.to_string()))?;
        let baseline = figures.map(|_| Sheet::parse(&text)).transpose().map_err(bad)?;
        if baseline.is_none() && budgets.is_empty() {
            return Err(bad("it has neither `figures` nor `budgets`".into()));
        }
        for (number, Budget { figure, p50, p99, .. }) in budgets.iter().enumerate() {
            if p50.is_none() && p99.is_none() {
                return Err(bad(format!("the budget of {figure:?} has neither `p50` nor `p99`")));
            }
            if budgets[..number].iter().any(|before| before.figure == *figure) {
                return Err(bad(format!("there are two budgets of {figure:?}")));
            }
        }
        Ok(Gate { budgets, baseline })
    }

    /// The budget of a figure.
    pub fn budget(&self, figure: &str) -> Option<&Budget> {
        self.budgets.iter().find(|budget| budget.figure == figure)
    }

    /// Compares whatever the gate says of the benchmarks that were run. Times of another kind of host mean nothing here, nor does what was
    /// measured otherwise.
    pub fn compare(&self, sheet: &Sheet) -> Verdict {
        let mut verdict = Verdict::default();
        // One that was run and has no figure at all has none that was asked for.
        let was_run = |figure: &str| {
            let benchmark = benchmark_of(figure);
            sheet.settings.contains_key(benchmark) || sheet.benchmarks().contains(&benchmark)
        };
        let unknown = self.budgets.iter().filter(|budget| !super::NAMES.contains(&benchmark_of(&budget.figure)));
        verdict.not_compared.extend(unknown.map(|budget| (budget.figure.clone(), "there is no such benchmark")));
        for budget in self.budgets.iter().filter(|budget| was_run(&budget.figure)) {
            match sheet.figure(&budget.figure) {
                Some(figure) => {
                    verdict.compared.extend(budget.compare(figure));
                    if budget.is_of_too_many(figure) {
                        let name = format!("{} p99", budget.figure);
                        verdict.not_compared.push((name, "there are fewer than a hundred values"));
                    }
                }
                None => verdict.not_compared.push((budget.figure.clone(), "it was not measured")),
            }
        }
        let Some(baseline) = &self.baseline else { return verdict };
        let is_alike = baseline.host.is_like(&sheet.host);
        for before in baseline.figures.iter().filter(|before| was_run(&before.name)) {
            let setting = |sheet: &Sheet| sheet.settings.get(before.benchmark()).cloned();
            let travels = matches!(before.unit, Unit::Kib | Unit::Times);
            let why = match sheet.figure(&before.name).filter(|figure| figure.unit == before.unit) {
                _ if setting(baseline) != setting(sheet) => "it was measured with other options",
                None => "it was not measured",
                Some(_) if !travels && !is_alike => "it is a time of another host",
                Some(figure) => {
                    verdict.compared.extend(compare(before, figure));
                    continue;
                }
            };
            verdict.not_compared.push((before.name.clone(), why));
        }
        verdict
    }
}

/// Holds a figure against what it was.
fn compare(before: &Figure, now: &Figure) -> Vec<Compared> {
    let share = if now.unit == Unit::Kib { SHARE_MEMORY } else { SHARE };
    let compared = |value, measured, before: f64, share: f64| {
        let more = before.abs() * share;
        let slack = match now.unit {
            Unit::Us if now.is_difference() => SLACK_US,
            Unit::Us => SLACK_US.min(more),
            Unit::Percent => SLACK_PERCENT,
            Unit::Seconds | Unit::Kib | Unit::Times => 0.0,
        };
        let at_most = before + more + slack;
        Compared { figure: now.name.clone(), value, unit: now.unit, measured, at_most, with: "baseline" }
    };
    let mut all = vec![compared("p50", now.p50, before.p50, share)];
    if now.count.min(before.count) >= ENOUGH_FOR_P99 && now.interval.is_none() {
        all.push(compared("p99", now.p99(), before.p99(), SHARE_P99));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::super::sheet::tests::sheet;
    use super::*;

    fn gate(text: &str) -> Result<Gate, SheetError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Gate::read(file.path())
    }

    fn verdicts(gate: &Gate, sheet: &Sheet) -> Vec<(&'static str, &'static str, bool)> {
        gate.compare(sheet).compared.iter().map(|compared| (compared.with, compared.value, compared.holds())).collect()
    }

    #[test]
    fn budgets_hold_or_fail_in_the_median_and_in_one_of_a_hundred() {
        let gate = gate(r#"{"budgets": [{"figure": "api.b", "p50": 10, "p99": 100}, {"figure": "fork.d", "p50": 1}]}"#)
            .unwrap();
        let of = |p50, max| sheet(&[("api.b", Unit::Us, p50, max), ("other", Unit::Us, 1e9, 1e9)]);
        assert_eq!(verdicts(&gate, &of(10.0, 100.0)), [("budget", "p50", true), ("budget", "p99", true)]);
        assert_eq!(verdicts(&gate, &of(10.1, 100.0)), [("budget", "p50", false), ("budget", "p99", true)]);
        assert_eq!(verdicts(&gate, &of(10.0, 101.0)), [("budget", "p50", true), ("budget", "p99", false)]);
        let verdict = gate.compare(&of(10.1, 100.0));
        assert_eq!(verdict.compared[0].to_string(), "FAILS  api.b p50: 10.1 us, at most 10.0 (budget)");
        assert_eq!(verdict.failed(), 1);
        // Another benchmark was not run; a figure of this one that is not there is told.
        assert!(verdict.not_compared.is_empty(), "{verdict}");
        let text = gate.compare(&sheet(&[("api.x", Unit::Us, 1.0, 1.0)])).to_string();
        assert_eq!(text, "not compared: api.b: it was not measured\n");
        let mut few = of(10.0, 101.0);
        few.figures[0].count = 99;
        assert_eq!(verdicts(&gate, &few), [("budget", "p50", true)]);
        let text = gate.compare(&few).not_compared.last().unwrap().0.clone();
        assert_eq!(text, "api.b p99");
    }

    #[test]
    fn memory_may_be_five_hundredths_more_than_it_was_and_time_a_quarter() {
        let figures = [
            ("reset.k", Unit::Kib, 1000.0, 1000.0),
            ("reset.t", Unit::Us, 1000.0, 2000.0),
            ("reset.n-added", Unit::Us, -200.0, 0.0),
            ("reset.s", Unit::Us, 2.0, 2.0),
        ];
        let gate = gate(&serde_json::to_string(&sheet(&figures)).unwrap()).unwrap();
        let holds = |name, unit, p50, max| {
            let compared = gate.compare(&sheet(&[(name, unit, p50, max)])).compared;
            compared.iter().map(Compared::holds).collect::<Vec<_>>()
        };
        assert_eq!(holds("reset.k", Unit::Kib, 1050.0, 1050.0), [true, true]);
        assert_eq!(holds("reset.k", Unit::Kib, 1051.0, 1051.0), [false, true]);
        assert_eq!(holds("reset.t", Unit::Us, 1270.0, 4020.0), [true, true]);
        assert_eq!(holds("reset.t", Unit::Us, 1271.0, 4021.0), [false, false]);
        assert_eq!(holds("reset.n-added", Unit::Us, -200.0, 0.0), [true, true]);
        assert_eq!(holds("reset.n-added", Unit::Us, -100.0, 0.0), [false, true]);
        assert_eq!(holds("reset.s", Unit::Us, 3.0, 3.0), [true, true]);
        assert_eq!(holds("reset.s", Unit::Us, 3.1, 3.1), [false, true], "what is small has little slack");
        assert!(holds("reset.t", Unit::Seconds, 1.0, 1.0).is_empty(), "another unit is another figure");
    }

    #[test]
    fn times_of_another_host_and_what_was_measured_otherwise_mean_nothing() {
        let mut other = sheet(&[
            ("reset.t", Unit::Us, 1.0, 1.0),
            ("reset.k", Unit::Kib, 1.0, 1.0),
            ("fork.t", Unit::Kib, 1.0, 1.0),
        ]);
        other.host.cpu = "D".into();
        other.settings.insert("fork".into(), "other".into());
        let gate = gate(&serde_json::to_string(&other).unwrap()).unwrap();
        let now = sheet(&[
            ("reset.t", Unit::Us, 1e6, 1e6),
            ("reset.k", Unit::Kib, 1.0, 1.0),
            ("fork.t", Unit::Kib, 1.0, 1.0),
        ]);
        let verdict = gate.compare(&now);
        assert!(verdict.compared.iter().all(|compared| compared.figure == "reset.k" && compared.holds()), "{verdict}");
        assert!(!verdict.compared.is_empty());
        let wanted = [
            ("reset.t".to_owned(), "it is a time of another host"),
            ("fork.t".into(), "it was measured with other options"),
        ];
        assert_eq!(verdict.not_compared, wanted);
    }

    #[test]
    fn a_gate_that_asks_for_nothing_is_refused() {
        for text in [
            "",
            "{}",
            r#"{"budgets": []}"#,
            r#"{"budgets": [{"figure": "a"}]}"#,
            r#"{"figures": 7}"#,
            r#"{"budgets": [{"figure": "a", "p50": "x"}]}"#,
            r#"{"budgets": [{"figure": "a", "p50": 1}, {"figure": "a", "p50": 2}]}"#,
        ] {
            assert!(matches!(gate(text), Err(SheetError::Bad { .. })), "{text}");
        }
    }
}
