//! Figures as a page for people, in Markdown. Pure.

use super::figure::{Figure, number};
use super::gate::{Budget, Compared, Gate};
use super::sheet::Sheet;
use std::fmt::Write;

/// The page: a table for each benchmark, with what was asked of its figures if there is a gate, and what they are made of.
pub fn page(sheet: &Sheet, gate: Option<&Gate>) -> String {
    let mut text = format!(
        "# Benchmarks\n\nMeasured at {} by vmm {} on {}.\n{}.\n",
        plain(&sheet.taken),
        plain(&sheet.vmm_version),
        plain(&sheet.host.to_string()),
        plain(&sheet.conditions.to_string())
    );
    for why in &sheet.conditions.noisy {
        add(&mut text, format_args!("\n**The machine was not idle: {}.**\n", plain(why)));
    }
    for benchmark in sheet.benchmarks() {
        let of_it = || sheet.figures.iter().filter(|figure| figure.benchmark() == benchmark);
        add(&mut text, format_args!("\n## {}\n\n", plain(benchmark)));
        table(&mut text, of_it(), gate);
        for figure in of_it().filter(|figure| !figure.parts.is_empty()) {
            parts(&mut text, figure);
        }
        let notes = gate.into_iter().flat_map(|gate| {
            of_it().filter_map(move |figure| {
                gate.budget(&figure.name).and_then(|budget| Some((figure, budget.note.as_ref()?)))
            })
        });
        for (figure, note) in notes {
            add(&mut text, format_args!("\n*{}*: {}\n", plain(&figure.title), plain(note)));
        }
    }
    text
}

fn add(text: &mut String, part: std::fmt::Arguments<'_>) {
    let _ = text.write_fmt(part); // A String takes all.
}

fn table<'a>(text: &mut String, figures: impl Iterator<Item = &'a Figure>, gate: Option<&Gate>) {
    let (heading, line) = if gate.is_some() { (" asked (p50, p99) | |", "---:|---|") } else { ("", "") };
    add(
        text,
        format_args!("| | unit | n | min | p50 | p99 | max |{heading}\n|---|---|---:|---:|---:|---:|---:|{line}\n"),
    );
    for figure in figures {
        let Figure { title, unit, count, p50, interval, .. } = figure;
        let interval = interval.map(|(low, high)| format!(" (95 %: {} to {})", number(low), number(high)));
        add(text, format_args!("| {}{} | {unit} | {count} |", plain(title), interval.unwrap_or_default()));
        for (at, value) in [figure.min(), *p50, figure.p99(), figure.max()].into_iter().enumerate() {
            // A single value is no distribution.
            let value = if figure.quantiles.is_empty() && at != 1 { String::new() } else { number(value) };
            add(text, format_args!(" {value} |"));
        }
        if let Some(gate) = gate {
            let asked = gate.budget(&figure.name).map(|budget| asked(figure, budget)).unwrap_or_else(|| " | |".into());
            add(text, format_args!("{asked}"));
        }
        text.push('\n');
    }
}

fn asked(figure: &Figure, budget: &Budget) -> String {
    let told = |value: Option<f64>| value.map_or_else(|| "-".into(), number);
    let compared = budget.compare(figure);
    let verdict = match compared.iter().all(Compared::holds) {
        _ if compared.is_empty() => "-",
        true => "met",
        false => "**missed**",
    };
    format!(" {}, {} | {verdict} |", told(budget.p50), told(budget.p99))
}

fn parts(text: &mut String, figure: &Figure) {
    let parts: Vec<String> =
        figure.parts.iter().map(|part| format!("{} {}", plain(&part.name), number(part.p50))).collect();
    let sum: f64 = figure.parts.iter().map(|part| part.p50).sum();
    let (title, sum) = (plain(&figure.title), number(sum));
    add(
        text,
        format_args!(
            "\n{title}: p50 of each phase inside the vmm ({sum} {} in all): {}\n",
            figure.unit,
            parts.join(", ")
        ),
    );
}

/// Text that means nothing to Markdown.
fn plain(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    for c in text.chars() {
        if matches!(c, '|' | '*' | '`' | '<' | '>' | '[' | ']' | '\\' | '_' | '#') {
            plain.push('\\');
        }
        plain.push(if c.is_control() { ' ' } else { c });
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::super::figure::Unit;
    use super::super::sheet::tests::sheet;
    use super::*;

    #[test]
    fn a_page_has_each_figure_and_what_was_asked_of_it() {
        let mut sheet = sheet(&[("a.b", Unit::Us, 1234.5, 99_999.0), ("c.d", Unit::Times, 0.5, 0.75)]);
        sheet.conditions.noisy.push("somebody else".into());
        let budget = |figure: &str, p50, note: Option<&str>| Budget {
            figure: figure.into(),
            p50: Some(p50),
            p99: None,
            note: note.map(str::to_owned),
        };
        let budgets = vec![budget("a.b", 1000.0, Some("it is slow")), budget("c.d", 0.5, None)];
        let mut gate = Gate::default();
        gate.budgets = budgets;
        let page = page(&sheet, Some(&gate));
        for line in [
            "**The machine was not idle: somebody else.**",
            "## a",
            "| what a.b is | us | 200 | 617 | 1,235 | 99,999 | 99,999 | 1,000, - | **missed** |",
            "what a.b is: p50 of each phase inside the vmm (617 us in all): part 617",
            "*what a.b is*: it is slow",
            "| what c.d is | times | 200 | 0.25 | 0.50 | 0.75 | 0.75 | 0.50, - | met |",
        ] {
            assert!(page.lines().any(|one| one == line), "{line}\n{page}");
        }
        let alone = super::page(&sheet, None);
        assert!(alone.contains("| what a.b is | us | 200 | 617 | 1,235 | 99,999 | 99,999 |\n"), "{alone}");
    }

    #[test]
    fn text_means_nothing_to_markdown() {
        assert_eq!(plain("a|b*\n[x](y)"), "a\\|b\\* \\[x\\](y)");
    }
}
