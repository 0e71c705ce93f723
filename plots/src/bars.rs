//! What a whole is made of, one bar each.

use crate::canvas::{Anchor, Colour, INK, PALETTE, REST, WHITE, WIDTH, whole};
use crate::check;
use crate::frame::{self, Area, BELOW, Entry, LINE, MARGIN, Mark, NAME, SLACK, SMALL, Scale};
use crate::text::{clean, shorten, width, wrapped};
use crate::ticks::{self, figure};
use crate::{Chart, PlotError};
use std::collections::HashMap;

/// A whole and its parts.
#[derive(Debug, Clone, PartialEq)]
pub struct Bar {
    /// What it is.
    pub name: String,
    /// Each part and how large it is, 0 or more, in order.
    pub parts: Vec<(String, f64)>,
}

impl Bar {
    fn total(&self) -> f64 {
        self.parts.iter().map(|(_, size)| size).sum()
    }
}

/// The upper edge of the bars: there is no name of an axis above them.
const TOP: f64 = 66.0;
/// How wide the names are at most.
const MOST_NAME: f64 = 210.0;
/// How many bars there may be.
const MOST_BARS: usize = 40;
/// Parts of less than this share of the longest bar are gathered.
const LEAST_SHARE: f64 = 0.01;
/// What gathered parts are called.
const OTHER: &str = "other";

/// Draws up to 40 bars of parts that follow each other, from left to right, with the total of each at its end; sizes are in
/// `unit`. Parts with the same name have the same colour. Those of less than a hundredth of the longest bar, and those whose
/// names have less in all bars together than eight other names, are gathered at the end as `other`.
///
/// Errors: no bar or too many; a bar without parts; a part whose size is below 0, or parts of more than 1e15 in all.
pub fn stacked_bars(title: &str, unit: &str, bars: &[Bar]) -> Result<Chart, PlotError> {
    check::list("bars", bars.len(), MOST_BARS)?;
    bars.iter().try_for_each(check)?;
    let unit = shorten(&clean(unit), SMALL, 90.0);
    let longest = bars.iter().map(Bar::total).fold(0.0, f64::max);
    let names = coloured(bars, longest);
    let stacks: Vec<Vec<(Colour, f64)>> = bars.iter().map(|bar| stack(bar, longest, &names)).collect();
    let totals: Vec<String> = bars.iter().map(|bar| format!("{} {unit}", figure(bar.total()))).collect();

    let mut entries: Vec<Entry> = names.iter().map(|(name, colour)| block(name, *colour)).collect();
    if stacks.iter().flatten().any(|(colour, _)| *colour == REST) {
        entries.push(block(OTHER, REST));
    }
    let described: Vec<String> =
        bars.iter().zip(&totals).map(|(bar, total)| format!("{}: {total}", clean(&bar.name))).collect();
    let description = format!("Stacked bars. Totals: {}.", described.join("; "));
    let pitch = (360.0 / bars.len() as f64).clamp(36.0, 64.0);
    let height = (TOP + pitch * bars.len() as f64 + BELOW).max(frame::legend_height(&entries, TOP)).max(300.0);
    let mut canvas = frame::begin(title, description, height);

    let widest = |texts: &mut dyn Iterator<Item = f64>| texts.fold(0.0, f64::max) * SLACK;
    let names_width = widest(&mut bars.iter().map(|bar| width(&clean(&bar.name), NAME))).min(MOST_NAME);
    let totals_width = widest(&mut totals.iter().map(|total| width(total, NAME)));
    let area = Area {
        left: MARGIN + names_width + 12.0,
        right: WIDTH - MARGIN - frame::legend_width(&entries) - totals_width - 8.0,
        top: TOP,
        bottom: height - BELOW,
    };
    let x = Scale::across(|most| Scale::even(ticks::linear(0.0, longest, most), area.left, area.right));
    frame::axis_below(&mut canvas, area, &x, &unit);
    let pitch = (area.bottom - area.top) / bars.len() as f64;
    let thick = (pitch * 0.62).min(40.0);
    for (number, (bar, parts)) in bars.iter().zip(&stacks).enumerate() {
        let middle = area.top + pitch * (number as f64 + 0.5);
        let name = wrapped(&clean(&bar.name), NAME, names_width / SLACK);
        let first = middle + 4.5 - LINE / 2.0 * (name.len() - 1) as f64;
        for (line, y) in name.into_iter().zip([first, first + LINE]) {
            canvas.text(area.left - 10.0, y, NAME, INK, Anchor::End, line);
        }
        let mut end = 0.0;
        for (part, (colour, size)) in parts.iter().enumerate() {
            let (from, to) = (x.at(end), x.at(end + size));
            canvas.rect(from, middle - thick / 2.0, to - from, thick, *colour);
            if part > 0 {
                canvas.line(vec![(from, middle - thick / 2.0), (from, middle + thick / 2.0)], whole(WHITE, 1.0));
            }
            let label = figure(*size);
            if width(&label, SMALL) * SLACK + 8.0 <= to - from {
                canvas.text((from + to) / 2.0, middle + 4.0, SMALL, colour.text_on(), Anchor::Middle, label);
            }
            end += size;
        }
        canvas.text(x.at(end) + 8.0, middle + 4.5, NAME, INK, Anchor::Start, &*totals[number]);
    }
    frame::base_line(&mut canvas, (area.left, area.top), (area.left, area.bottom));
    frame::legend(&mut canvas, &entries, TOP);
    Ok(Chart::of(canvas))
}

fn block(name: &str, colour: Colour) -> Entry {
    Entry { mark: Mark::Block(colour), name: name.into(), figures: None }
}

/// Whether a part is drawn by itself.
fn large((name, size): &(String, f64), longest: f64) -> bool {
    *size > 0.0 && *size >= LEAST_SHARE * longest && name != OTHER
}

/// The names that have a colour of their own, as they come first in any bar.
fn coloured(bars: &[Bar], longest: f64) -> Vec<(&str, Colour)> {
    let mut names: Vec<&str> = Vec::new();
    let mut sizes: HashMap<&str, f64> = HashMap::new();
    for part in bars.iter().flat_map(|bar| &bar.parts).filter(|part| large(part, longest)) {
        *sizes.entry(&part.0).or_insert_with(|| {
            names.push(&part.0);
            0.0
        }) += part.1;
    }
    let mut by_size = names.clone();
    by_size.sort_by(|a, b| sizes[b].total_cmp(&sizes[a]));
    by_size.truncate(PALETTE.len());
    names.retain(|name| by_size.contains(name));
    names.into_iter().zip(PALETTE).collect()
}

/// What is drawn of a bar, from left to right.
fn stack(bar: &Bar, longest: f64, names: &[(&str, Colour)]) -> Vec<(Colour, f64)> {
    let mut drawn = Vec::new();
    let mut rest = 0.0;
    for part in &bar.parts {
        match names.iter().find(|(name, _)| *name == part.0) {
            Some((_, colour)) if large(part, longest) => drawn.push((*colour, part.1)),
            _ => rest += part.1,
        }
    }
    if rest > 0.0 {
        drawn.push((REST, rest));
    }
    drawn
}

fn check(bar: &Bar) -> Result<(), PlotError> {
    if bar.parts.is_empty() {
        return Err(PlotError::Empty(format!("bar {}", check::quoted(&bar.name))));
    }
    let place = |name: &str| format!("part {} of bar {}", check::quoted(name), check::quoted(&bar.name));
    bar.parts.iter().try_for_each(|(name, size)| check::length(*size, || place(name)))?;
    check::number(bar.total(), || format!("the sum of bar {}", check::quoted(&bar.name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bar(parts: &[(&str, f64)]) -> Bar {
        Bar { name: "a bar".into(), parts: parts.iter().map(|(name, size)| ((*name).into(), *size)).collect() }
    }

    #[test]
    fn a_name_has_one_colour_in_all_bars() {
        let bars = [bar(&[("a", 50.0), ("b", 50.0)]), bar(&[("b", 20.0), ("a", 20.0)])];
        let names = coloured(&bars, 100.0);
        assert_eq!(names, [("a", PALETTE[0]), ("b", PALETTE[1])]);
        assert_eq!(stack(&bars[1], 100.0, &names), [(PALETTE[1], 20.0), (PALETTE[0], 20.0)]);
    }

    #[test]
    fn small_parts_are_gathered_at_the_end() {
        let one = bar(&[("tiny", 0.4), ("a", 99.0), ("small", 0.6), ("nothing", 0.0)]);
        let names = coloured(std::slice::from_ref(&one), 100.0);
        assert_eq!(stack(&one, 100.0, &names), [(PALETTE[0], 99.0), (REST, 1.0)]);
    }

    #[test]
    fn the_least_of_many_names_are_gathered() {
        let names: Vec<String> = (0..12).map(|n| format!("part {n}")).collect();
        let parts: Vec<(&str, f64)> = names.iter().zip(1..).map(|(name, n)| (name.as_str(), f64::from(n))).collect();
        let one = bar(&parts);
        let coloured = coloured(std::slice::from_ref(&one), one.total());
        assert_eq!(coloured.first().unwrap().0, "part 4");
        assert_eq!(stack(&one, one.total(), &coloured).last(), Some(&(REST, 1.0 + 2.0 + 3.0 + 4.0)));
    }
}
