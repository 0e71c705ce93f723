//! Which charts a document is drawn as.
//!
//! | chart | of |
//! |---|---|
//! | `BENCHMARK-times-WHAT` | how durations of a kind are spread |
//! | `BENCHMARK-phases-WHAT` | what they are made of |
//! | `NAME` of a series | how something grew |

use super::BenchError;
use super::figure::{Figure, Part, Series, Unit};
use super::sheet::Sheet;
use plots::{Bar, Chart, Curve};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Most of a kind in one chart: more cannot be told apart.
const MOST: usize = 8;
/// What nothing is drawn as where there is no zero: durations are told to a tenth of a microsecond.
const LEAST: f64 = 0.1;

/// Draws everything into this directory, each chart as SVG and as PNG.
pub fn write(sheet: &Sheet, dir: &Path) -> Result<(), BenchError> {
    let mut written = BTreeSet::new();
    for (name, chart) in charts(sheet)? {
        // Names are made of what a document says, and may be alike once they are short and plain.
        let others = (2..).map(|number| format!("{name}-{number}"));
        let name = std::iter::once(name.clone()).chain(others).find(|name| !written.contains(name)).unwrap_or(name);
        chart.write(dir, &name)?;
        written.insert(name);
    }
    Ok(())
}

fn charts(sheet: &Sheet) -> Result<Vec<(String, Chart)>, BenchError> {
    let mut charts = Vec::new();
    for benchmark in sheet.benchmarks() {
        let of_it = sheet.figures.iter().filter(|figure| figure.benchmark() == benchmark && figure.unit == Unit::Us);
        let mut by_what: BTreeMap<&str, Vec<(&str, &Figure)>> = BTreeMap::new();
        for figure in of_it {
            let (of, what) = figure.title.rsplit_once(": ").unwrap_or((&figure.title, ""));
            by_what.entry(what).or_default().push((of, figure));
        }
        for (what, figures) in by_what {
            let name = |kind: &str| format!("{benchmark}-{kind}-{what}").trim_end_matches('-').replace(' ', "-");
            let title = |text: &str| {
                if what.is_empty() { format!("{benchmark}: {text}") } else { format!("{benchmark}: {what}, {text}") }
            };
            let spread: Vec<_> = figures.iter().filter(|(_, figure)| figure.quantiles.len() > 3).collect();
            for (name, figures) in numbered(&name("times"), &spread) {
                let curve = |(of, figure): &&(&str, &Figure)| Curve {
                    name: (*of).to_owned(),
                    quantiles: figure.quantiles.iter().map(|us| us.max(LEAST)).collect(),
                };
                let curves: Vec<Curve> = figures.iter().map(curve).collect();
                charts.push((name, plots::distributions(&title("share of all within a time"), "us", &curves)?));
            }
            let has_parts = |figure: &Figure| figure.parts.iter().any(|part| part.p50 > 0.0);
            let made: Vec<_> = figures.iter().filter(|(_, figure)| has_parts(figure)).collect();
            for (name, figures) in numbered(&name("phases"), &made) {
                let part = |part: &Part| (part.name.clone(), part.p50.max(0.0));
                let bar = |(of, figure): &&(&str, &Figure)| Bar {
                    name: (*of).to_owned(),
                    parts: figure.parts.iter().map(part).collect(),
                };
                let bars: Vec<Bar> = figures.iter().map(bar).collect();
                charts.push((name, plots::stacked_bars(&title("what takes how long inside the vmm"), "us", &bars)?));
            }
        }
    }
    let mut series: BTreeMap<(&str, &str, &str), Vec<&Series>> = BTreeMap::new();
    for one in sheet.series.iter().filter(|series| !series.points.is_empty()) {
        let group = one.name.rsplit_once('.').map_or(one.name.as_str(), |(group, _)| group);
        series.entry((group, &one.x, &one.y)).or_default().push(one);
    }
    for ((group, x, y), members) in series {
        for (name, members) in numbered(&file_name(group), &members) {
            let line = |one: &&Series| plots::Series { name: one.title.clone(), points: one.points.clone() };
            let lines: Vec<plots::Series> = members.iter().map(line).collect();
            charts.push((name, plots::lines(&group.replace('.', ": "), x, y, &lines)?));
        }
    }
    Ok(charts)
}

/// So many at a time, under names of their own.
fn numbered<'a, T>(name: &str, all: &'a [T]) -> Vec<(String, &'a [T])> {
    let name = file_name(name);
    let one = |(number, part): (usize, &'a [T])| match all.len() > MOST {
        true => (format!("{name}-{}", number + 1), part),
        false => (name.clone(), part),
    };
    all.chunks(MOST).enumerate().map(one).collect()
}

/// What may be the name of a file, whatever a document says.
fn file_name(name: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '-' { c } else { '-' };
    name.chars().take(80).map(plain).collect()
}

#[cfg(test)]
mod tests {
    use super::super::sheet::tests::sheet;
    use super::*;

    #[test]
    fn every_kind_of_figure_has_its_chart() {
        let figures: Vec<_> = (0..MOST + 1).map(|n| format!("a.{n}")).collect();
        let figures: Vec<_> = figures.iter().map(|name| (name.as_str(), Unit::Us, 10.0, 90.0)).collect();
        let mut sheet = sheet(&figures);
        sheet.figures.iter_mut().for_each(|figure| figure.quantiles = vec![1.0, 2.0, 3.0, 10.0, 90.0]);
        sheet.series.push(Series {
            name: "../../etc.x".into(),
            title: "t".into(),
            x: "x".into(),
            y: "y".into(),
            points: vec![(1.0, 2.0), (2.0, 3.0)],
        });
        let dir = tempfile::tempdir().unwrap();
        write(&sheet, dir.path()).unwrap();
        let mut names: Vec<_> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        let wanted = ["------etc", "a-phases-1", "a-phases-2", "a-times-1", "a-times-2"]
            .iter()
            .flat_map(|name| ["png", "svg"].map(|kind| format!("{name}.{kind}")));
        assert_eq!(names, wanted.collect::<Vec<_>>());
    }
}
