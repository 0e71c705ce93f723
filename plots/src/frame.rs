//! What is around the data: title, axes with their grid, and the legend, which has a column of its own at the right.

use crate::canvas::{AXIS, Anchor, Canvas, Colour, FAINT, GREY, GRID, INK, PALETTE, Stroke, WIDTH, whole};
use crate::text::{clean, shorten, width, wrapped};
use crate::ticks::{Tick, Ticks};

/// How high a chart is that has no reason to be higher.
pub const HEIGHT: f64 = 520.0;
/// Between everything and the edges.
pub const MARGIN: f64 = 28.0;
/// The upper edge of the data.
pub const TOP: f64 = 88.0;
/// Between the data and the lower edge of the chart: numbers and name of the axis.
pub const BELOW: f64 = 66.0;
/// The size of the small font: numbers, labels, figures.
pub const SMALL: f64 = 12.0;
/// The size of the font of names.
pub const NAME: f64 = 13.0;
/// How far a line of a name is from the one before.
pub const LINE: f64 = 16.0;
/// How much wider than measured a text may be: a viewer of the SVG has a font of its own.
pub const SLACK: f64 = 1.15;

/// Where the data is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Area {
    /// Its left edge.
    pub left: f64,
    /// Its right edge.
    pub right: f64,
    /// Its upper edge.
    pub top: f64,
    /// Its lower edge.
    pub bottom: f64,
}

/// An axis that has its place.
#[derive(Debug, Clone)]
pub struct Scale {
    /// Its range and ticks.
    pub ticks: Ticks,
    place: fn(f64) -> f64,
    from: f64,
    to: f64,
}

impl Scale {
    /// An even axis from one place to another.
    pub fn even(ticks: Ticks, from: f64, to: f64) -> Self {
        Self { ticks, place: |value| value, from, to }
    }

    /// A logarithmic one.
    pub fn logarithmic(ticks: Ticks, from: f64, to: f64) -> Self {
        Self { ticks, place: f64::log10, from, to }
    }

    /// The one with the most numbers that do not touch each other, of those that `scale` gives for at most so many.
    pub fn across(scale: impl Fn(usize) -> Self) -> Self {
        let apart = |scale: &Self| scale.ticks.major.windows(2).all(|two| scale.apart(&two[0], &two[1]));
        (5..=10).rev().map(&scale).find(apart).unwrap_or_else(|| scale(4))
    }

    /// Whether there is space between the numbers of two ticks on an axis from left to right.
    fn apart(&self, left: &Tick, right: &Tick) -> bool {
        let half = |tick: &Tick| width(&tick.label, SMALL) * SLACK / 2.0 + 5.0;
        self.at(left.value) + half(left) <= self.at(right.value) - half(right)
    }

    /// Where a value is; one beyond an end is at that end.
    pub fn at(&self, value: f64) -> f64 {
        let place = self.place;
        let (lo, hi) = (place(self.ticks.lo), place(self.ticks.hi));
        let share = ((place(value) - lo) / (hi - lo)).clamp(0.0, 1.0);
        self.from + share * (self.to - self.from)
    }
}

/// How wide the widest number of an axis is.
pub fn labels_width(ticks: &Ticks) -> f64 {
    ticks.major.iter().map(|tick| width(&tick.label, SMALL) * SLACK).fold(0.0, f64::max)
}

/// An empty chart with its title.
pub fn begin(title: &str, description: String, height: f64) -> Canvas {
    let title = clean(title);
    let mut canvas = Canvas { height, title: title.clone(), description, shapes: Vec::new() };
    canvas.text(MARGIN, 40.0, 19.0, INK, Anchor::Start, shorten(&title, 19.0, (WIDTH - 2.0 * MARGIN) / SLACK));
    canvas
}

/// Draws the axis below the data with its grid and its name.
pub fn axis_below(canvas: &mut Canvas, area: Area, scale: &Scale, name: &str) {
    let lines = |value: f64| vec![(scale.at(value), area.top), (scale.at(value), area.bottom)];
    for value in &scale.ticks.minor {
        canvas.line(lines(*value), whole(FAINT, 1.0));
    }
    let mut last: Option<&Tick> = None;
    for tick in &scale.ticks.major {
        canvas.line(lines(tick.value), whole(GRID, 1.0));
        // Even few numbers may be too long.
        if last.is_none_or(|last| scale.apart(last, tick)) {
            canvas.text(scale.at(tick.value), area.bottom + 20.0, SMALL, GREY, Anchor::Middle, &*tick.label);
            last = Some(tick);
        }
    }
    let (middle, room) = ((area.left + area.right) / 2.0, (area.right - area.left) / SLACK);
    canvas.text(middle, area.bottom + 44.0, NAME, GREY, Anchor::Middle, shorten(&clean(name), NAME, room));
}

/// Draws the axis left of the data with its grid, and its name above it, where it can be read without turning the head.
pub fn axis_left(canvas: &mut Canvas, area: Area, scale: &Scale, name: &str) {
    for tick in &scale.ticks.major {
        let y = scale.at(tick.value);
        canvas.line(vec![(area.left, y), (area.right, y)], whole(GRID, 1.0));
        canvas.text(area.left - 8.0, y + 4.0, SMALL, GREY, Anchor::End, &*tick.label);
    }
    let room = (area.right - MARGIN) / SLACK;
    canvas.text(MARGIN, area.top - 16.0, NAME, GREY, Anchor::Start, shorten(&clean(name), NAME, room));
}

/// Draws the line that values begin at, above the grid.
pub fn base_line(canvas: &mut Canvas, from: (f64, f64), to: (f64, f64)) {
    canvas.line(vec![from, to], whole(AXIS, 1.0));
}

/// What stands for something in the legend.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Mark {
    /// A line.
    Line(Stroke),
    /// An area.
    Block(Colour),
}

/// A line of the legend.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// What stands for it.
    pub mark: Mark,
    /// What it is.
    pub name: String,
    /// What there is to say of it, on a line of its own.
    pub figures: Option<String>,
}

/// Between the left edge of the legend and its texts.
const INDENT: f64 = 28.0;
/// Between the data and the legend.
const GAP: f64 = 32.0;

impl Entry {
    /// Its name, on as many lines as that takes.
    fn lines(&self, room: f64) -> Vec<String> {
        wrapped(&clean(&self.name), NAME, room)
    }

    /// How high it is.
    fn height(&self, room: f64) -> f64 {
        let figures = if self.figures.is_some() { LINE + 2.0 } else { 0.0 };
        24.0 + LINE * (self.lines(room).len() - 1) as f64 + figures
    }
}

/// How wide the legend is, with the space to its left.
pub fn legend_width(entries: &[Entry]) -> f64 {
    let texts = |entry: &Entry| {
        let figures = entry.figures.as_deref().unwrap_or_default();
        width(&clean(&entry.name), NAME).max(width(figures, SMALL)) * SLACK
    };
    (entries.iter().map(texts).fold(0.0, f64::max) + INDENT + GAP).clamp(120.0, 290.0)
}

/// How wide its texts may be.
fn room(entries: &[Entry]) -> f64 {
    (legend_width(entries) - GAP - INDENT) / SLACK
}

/// How high a chart has to be for a legend that begins at `top`.
pub fn legend_height(entries: &[Entry], top: f64) -> f64 {
    let room = room(entries);
    entries.iter().map(|entry| entry.height(room)).sum::<f64>() + top + MARGIN
}

/// Draws the legend right of everything else, from `top` on.
pub fn legend(canvas: &mut Canvas, entries: &[Entry], top: f64) {
    let left = WIDTH - MARGIN - legend_width(entries) + GAP;
    let room = room(entries);
    let mut y = top + 8.0;
    for entry in entries {
        match entry.mark {
            Mark::Line(stroke) => canvas.line(vec![(left, y), (left + 20.0, y)], stroke),
            Mark::Block(colour) => canvas.rect(left + 4.0, y - 7.0, 14.0, 14.0, colour),
        }
        let mut below = y + 4.5;
        for line in entry.lines(room) {
            canvas.text(left + INDENT, below, NAME, INK, Anchor::Start, line);
            below += LINE;
        }
        if let Some(figures) = &entry.figures {
            canvas.text(left + INDENT, below, SMALL, GREY, Anchor::Start, shorten(figures, SMALL, room));
        }
        y += entry.height(room);
    }
}

/// How many lines can be told apart.
pub const MOST_LINES: usize = 21;

/// Colours of lines, by their number in the palette: the darker ones first, and not the last one.
const LINE_COLOURS: [usize; 7] = [0, 5, 2, 3, 1, 4, 6];

/// The line of the so-manieth curve: colours first, then ways of dashing.
pub fn line_of(number: usize) -> Stroke {
    let dash = [None, Some([7.0, 3.0]), Some([2.0, 2.5])][number / LINE_COLOURS.len() % 3];
    Stroke { colour: PALETTE[LINE_COLOURS[number % LINE_COLOURS.len()]], width: 2.0, dash }
}

/// What can be seen of a line from left to right: of points that lie in one column of half a unit the first, the lowest,
/// the highest and the last.
pub fn thinned(points: impl Iterator<Item = (f64, f64)>) -> Vec<(f64, f64)> {
    let points: Vec<(f64, f64)> = points.collect();
    let mut kept = Vec::new();
    for column in points.chunk_by(|a, b| (a.0 * 2.0).floor() == (b.0 * 2.0).floor()) {
        let by_height = |a: &usize, b: &usize| column[*a].1.total_cmp(&column[*b].1);
        let highest = (0..column.len()).max_by(by_height).unwrap_or_default();
        let lowest = (0..column.len()).min_by(by_height).unwrap_or_default();
        let mut numbers = vec![0, lowest, highest, column.len() - 1];
        numbers.sort_unstable();
        numbers.dedup();
        kept.extend(numbers.into_iter().map(|number| column[number]));
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ticks;

    #[test]
    fn a_value_is_where_its_tick_is() {
        let scale = Scale::logarithmic(ticks::logarithmic(1.0, 100.0, 5), 0.0, 400.0);
        assert!((scale.at(10.0) - 200.0).abs() < 1e-6);
        assert_eq!((scale.at(1e-3), scale.at(1e9)), (0.0, 400.0));
    }

    #[test]
    fn numbers_do_not_touch() {
        let scale = Scale::across(|most| Scale::even(ticks::linear(0.0, 9e14, most), 0.0, 600.0));
        assert!((2..7).contains(&scale.ticks.major.len()), "{scale:?}");
    }

    #[test]
    fn a_line_of_very_many_points_keeps_its_peaks() {
        let points =
            (0..1_000_000).map(|n| (f64::from(n) / 2_000.0, if n == 123_456 { 9.0 } else { f64::from(n % 2) }));
        let thin = thinned(points);
        assert!(thin.len() <= 4_000 && thin.contains(&(61.728, 9.0)) && thin.last() == Some(&(499.9995, 1.0)));
    }

    #[test]
    fn no_two_lines_look_alike() {
        let mut seen: Vec<Stroke> = Vec::new();
        for number in 0..MOST_LINES {
            assert!(!seen.contains(&line_of(number)));
            seen.push(line_of(number));
        }
    }
}
