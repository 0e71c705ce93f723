//! Whether figures are as good as they have to be: within budgets that somebody has set, and no worse than they once were. Pure, but for
//! reading the file.
//!
//! A gate is a file as `--json` prints it (a *baseline*), one that only sets budgets, or both in one:
//!
//! ```json
//! { "budgets": [ { "figure": "restore.warm.file.reply", "p50": 500, "p99": 1500, "note": "why, or why not" } ] }
//! ```

use super::figure::{Figure, Unit};
use super::sheet::{Sheet, SheetError, read_file};
use crate::host::Host;
use serde::Deserialize;
use std::fmt;
use std::path::Path;

/// How many times as much as in the baseline is still well: durations and ratios, which are noisy, in half of the cases and in 99 of 100;
/// and memory, which is not.
const TIMES: f64 = 1.25;
const TIMES_P99: f64 = 2.0;
const TIMES_MEMORY: f64 = 1.05;
/// By how many microseconds a duration, and by how much anything else, may always be worse: less cannot be told from nothing.
const SLACK_US: f64 = 20.0;
const SLACK: f64 = 0.1;
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

/// What figures are compared with.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Gate {
    /// How much figures may be at most.
    pub budgets: Vec<Budget>,
    baseline: Option<(Host, Vec<Figure>)>,
}

#[derive(Deserialize)]
struct Budgets {
    #[serde(default)]
    budgets: Vec<Budget>,
    /// Looked at on its own, if it is there.
    #[serde(default)]
    figures: Option<serde_json::Value>,
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
        let verdict = if self.holds() { "holds" } else { "FAILS" };
        write!(f, "{verdict}  {figure} {value}: {measured:.1} {unit}, at most {at_most:.1} ({with})")
    }
}

impl Gate {
    /// Reads a gate.
    pub fn read(path: &Path) -> Result<Self, SheetError> {
        let bad = |problem: String| SheetError::Bad { path: path.into(), problem };
        let Budgets { budgets, figures } = serde_json::from_slice(&read_file(path)?).map_err(|e| bad(e.to_string()))?;
        let baseline = match figures {
            Some(_) => Some(Sheet::read(path)?),
            None if budgets.is_empty() => return Err(bad("it has neither `figures` nor `budgets`".into())),
            None => None,
        };
        for Budget { figure, p50, p99, .. } in &budgets {
            if p50.is_none() && p99.is_none() {
                return Err(bad(format!("the budget of {figure} has neither `p50` nor `p99`")));
            }
        }
        Ok(Gate { budgets, baseline: baseline.map(|sheet| (sheet.host, sheet.figures)) })
    }

    /// The budget of a figure.
    pub fn budget(&self, figure: &str) -> Option<&Budget> {
        self.budgets.iter().find(|budget| budget.figure == figure)
    }

    /// Compares every figure that there is something to compare with. A baseline of another kind of host says nothing of this one but
    /// for its memory and for ratios.
    pub fn compare(&self, sheet: &Sheet) -> Vec<Compared> {
        let mut compared = Vec::new();
        for figure in &sheet.figures {
            let mut add = |value, measured, at_most, with| {
                compared.push(Compared {
                    figure: figure.name.clone(),
                    value,
                    unit: figure.unit,
                    measured,
                    at_most,
                    with,
                });
            };
            if let Some(Budget { p50, p99, .. }) = self.budget(&figure.name) {
                p50.iter().for_each(|at_most| add("p50", figure.p50, *at_most, "budget"));
                p99.iter().for_each(|at_most| add("p99", figure.p99(), *at_most, "budget"));
            }
            let Some(before) = self.baseline(figure, &sheet.host) else { continue };
            let slack = if figure.unit == Unit::Us { SLACK_US } else { SLACK };
            let times = if figure.unit == Unit::Kib { TIMES_MEMORY } else { TIMES };
            add("p50", figure.p50, before.p50 * times + slack, "baseline");
            if figure.count.min(before.count) >= ENOUGH_FOR_P99 {
                add("p99", figure.p99(), before.p99() * TIMES_P99 + slack, "baseline");
            }
        }
        compared
    }

    fn baseline(&self, figure: &Figure, host: &Host) -> Option<&Figure> {
        let (theirs, figures) = self.baseline.as_ref()?;
        let is_alike = |host: &Host| (host.cpu.clone(), host.cpus, host.ring0_emulated);
        let travels = matches!(figure.unit, Unit::Kib | Unit::Times);
        let before = figures.iter().find(|before| before.name == figure.name && before.unit == figure.unit)?;
        (travels || is_alike(theirs) == is_alike(host)).then_some(before)
    }
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
        gate.compare(sheet).iter().map(|compared| (compared.with, compared.value, compared.holds())).collect()
    }

    #[test]
    fn budgets_hold_or_fail_in_the_median_and_in_one_of_a_hundred() {
        let gate =
            gate(r#"{"budgets": [{"figure": "a.b", "p50": 10, "p99": 100}, {"figure": "c.d", "p50": 1}]}"#).unwrap();
        let of = |p50, max| sheet(&[("a.b", Unit::Us, p50, max), ("other", Unit::Us, 1e9, 1e9)]);
        assert_eq!(verdicts(&gate, &of(10.0, 100.0)), [("budget", "p50", true), ("budget", "p99", true)]);
        assert_eq!(verdicts(&gate, &of(10.1, 100.0)), [("budget", "p50", false), ("budget", "p99", true)]);
        assert_eq!(verdicts(&gate, &of(10.0, 101.0)), [("budget", "p50", true), ("budget", "p99", false)]);
        let text = gate.compare(&of(10.1, 100.0))[0].to_string();
        assert_eq!(text, "FAILS  a.b p50: 10.1 us, at most 10.0 (budget)");
    }

    #[test]
    fn memory_may_be_five_hundredths_more_than_it_was_and_time_a_quarter() {
        let before =
            serde_json::to_string(&sheet(&[("k", Unit::Kib, 1000.0, 1000.0), ("t", Unit::Us, 1000.0, 2000.0)]));
        let gate = gate(&before.unwrap()).unwrap();
        let holds = |unit, p50, max| {
            let name = if unit == Unit::Kib { "k" } else { "t" };
            gate.compare(&sheet(&[(name, unit, p50, max)])).iter().map(Compared::holds).collect::<Vec<_>>()
        };
        assert_eq!(holds(Unit::Kib, 1050.0, 1050.0), [true, true]);
        assert_eq!(holds(Unit::Kib, 1051.0, 1051.0), [false, true]);
        assert_eq!(holds(Unit::Us, 1270.0, 4020.0), [true, true]);
        assert_eq!(holds(Unit::Us, 1271.0, 4021.0), [false, false]);
        assert!(holds(Unit::Seconds, 1.0, 1.0).is_empty(), "another unit is another figure");
    }

    #[test]
    fn times_of_another_host_mean_nothing() {
        let mut other = sheet(&[("t", Unit::Us, 1.0, 1.0), ("k", Unit::Kib, 1.0, 1.0)]);
        other.host.cpu = "D".into();
        let gate = gate(&serde_json::to_string(&other).unwrap()).unwrap();
        let compared = gate.compare(&sheet(&[("t", Unit::Us, 1e6, 1e6), ("k", Unit::Kib, 1.0, 1.0)]));
        assert!(compared.iter().all(|compared| compared.figure == "k" && compared.holds()), "{compared:?}");
        assert!(!compared.is_empty());
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
        ] {
            assert!(matches!(gate(text), Err(SheetError::Bad { .. })), "{text}");
        }
    }
}
