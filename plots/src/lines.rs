//! How one thing goes with another.

use crate::canvas::{WHITE, WIDTH, whole};
use crate::check;
use crate::frame::{self, Area, BELOW, Entry, HEIGHT, MARGIN, MOST_LINES, Mark, Scale, TOP};
use crate::text::clean;
use crate::ticks::{self, Ticks};
use crate::{Chart, PlotError};

/// Points of one line.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    /// What it is.
    pub name: String,
    /// Where it is, `x` and `y`, in any order: at least one point.
    pub points: Vec<(f64, f64)>,
}

/// Up to how many points a line has dots at them.
const MOST_DOTS: usize = 40;

/// Draws up to 21 lines, each from left to right, on even axes that are called `x` and `y` and that begin at 0 unless all
/// values lie far from there.
///
/// Errors: no line or too many; a line without points; a coordinate that is not from -1e15 to 1e15.
pub fn lines(title: &str, x: &str, y: &str, series: &[Series]) -> Result<Chart, PlotError> {
    check::list("lines", series.len(), MOST_LINES)?;
    series.iter().try_for_each(check)?;
    let entry = |(number, one): (usize, &Series)| Entry {
        mark: Mark::Line(frame::line_of(number)),
        name: one.name.clone(),
        figures: None,
    };
    let entries: Vec<Entry> = series.iter().enumerate().map(entry).collect();
    let names: Vec<String> = series.iter().map(|one| clean(&one.name)).collect();
    let description = format!("Lines of {} by {}: {}.", clean(y), clean(x), names.join("; "));
    let height = HEIGHT.max(frame::legend_height(&entries, TOP));
    let mut canvas = frame::begin(title, description, height);

    let coordinates = |of: fn(&(f64, f64)) -> f64| series.iter().flat_map(|one| &one.points).map(of);
    let up = axis(coordinates(|point| point.1), 8);
    let area = Area {
        left: MARGIN + frame::labels_width(&up) + 10.0,
        right: WIDTH - MARGIN - frame::legend_width(&entries),
        top: TOP,
        bottom: height - BELOW,
    };
    let across = Scale::across(|most| Scale::even(axis(coordinates(|point| point.0), most), area.left, area.right));
    let up = Scale::even(up, area.bottom, area.top);
    frame::axis_below(&mut canvas, area, &across, x);
    frame::axis_left(&mut canvas, area, &up, y);
    let base = up.at(0.0);
    frame::base_line(&mut canvas, (area.left, base), (area.right, base));

    for (number, one) in series.iter().enumerate() {
        let stroke = frame::line_of(number);
        let mut points = one.points.clone();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        let points = frame::thinned(points.into_iter().map(|point| (across.at(point.0), up.at(point.1))));
        canvas.line(points.clone(), stroke);
        if one.points.len() <= MOST_DOTS {
            points.into_iter().for_each(|point| canvas.dot(point, 3.5, stroke.colour, whole(WHITE, 1.0)));
        }
    }
    frame::legend(&mut canvas, &entries, TOP);
    Ok(Chart::of(canvas))
}

/// An axis for values. It begins or ends at 0 unless they are further from there than four times from each other.
fn axis(values: impl Iterator<Item = f64>, most: usize) -> Ticks {
    let (lo, hi) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(lo, hi), value| (lo.min(value), hi.max(value)));
    let far = lo < hi && lo.max(-hi) > 4.0 * (hi - lo);
    if far { ticks::linear(lo, hi, most) } else { ticks::linear(lo.min(0.0), hi.max(0.0), most) }
}

fn check(series: &Series) -> Result<(), PlotError> {
    if series.points.is_empty() {
        return Err(PlotError::Empty(format!("line {}", check::quoted(&series.name))));
    }
    let place = |number| format!("point {number} of line {}", check::quoted(&series.name));
    series.points.iter().enumerate().try_for_each(|(number, (x, y))| {
        check::number(*x, || place(number))?;
        check::number(*y, || place(number))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(values: &[f64]) -> (f64, f64) {
        let ticks = axis(values.iter().copied(), 5);
        (ticks.lo, ticks.hi)
    }

    #[test]
    fn an_axis_begins_at_0_unless_all_values_are_far_from_it() {
        assert_eq!(range(&[3.0, 9.0]), (0.0, 10.0));
        assert_eq!(range(&[100.0, 104.0]), (100.0, 104.0));
        assert_eq!(range(&[-104.0, -100.0]), (-104.0, -100.0));
        assert_eq!(range(&[-3.0, -9.0]), (-10.0, 0.0));
        assert_eq!(range(&[-3.0, 3.0]), (-4.0, 4.0));
        assert_eq!(range(&[7.0, 7.0]), (0.0, 8.0));
        assert_eq!(range(&[0.0]), (0.0, 1.0));
    }
}
