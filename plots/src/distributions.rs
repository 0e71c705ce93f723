//! How values are spread: which share of all is at most so large.

use crate::canvas::{Anchor, GREY, Stroke, WHITE, WIDTH, whole};
use crate::check;
use crate::frame::{self, Area, BELOW, Entry, HEIGHT, MARGIN, MOST_LINES, Mark, SMALL, Scale, TOP};
use crate::text::{clean, shorten};
use crate::ticks::{self, figure};
use crate::{Chart, PlotError};

/// A distribution.
#[derive(Debug, Clone, PartialEq)]
pub struct Curve {
    /// Of what.
    pub name: String,
    /// The values at evenly spaced quantiles, from the least to the greatest one: at least 2, ascending, above 0.
    pub quantiles: Vec<f64>,
}

impl Curve {
    /// The value that this share of all values, between 0 and 1, is at most. Between two quantiles it is on the straight line
    /// that is drawn, on a logarithmic axis.
    fn at(&self, share: f64) -> f64 {
        let place = share * (self.quantiles.len() - 1) as f64;
        let below = self.quantiles[place.floor() as usize];
        let above = self.quantiles[place.ceil() as usize];
        below * (above / below).powf(place.fract())
    }
}

/// Shares that are marked on every curve, and what they are called. The first mark is full, the second one hollow.
const MARKED: [(f64, &str); 2] = [(0.5, "p50"), (0.99, "p99")];

/// Draws for each of up to 21 curves which share of its values is at most how large, on a logarithmic axis of values in
/// `unit`. The medians and the 99th percentiles are marked, and printed in the legend.
///
/// Errors: no curve or too many; of a curve fewer than two quantiles, one that is less than the one before, or one that is
/// not from 1e-9 to 1e15.
pub fn distributions(title: &str, unit: &str, curves: &[Curve]) -> Result<Chart, PlotError> {
    check::list("curves", curves.len(), MOST_LINES)?;
    curves.iter().try_for_each(check)?;
    let unit = shorten(&clean(unit), SMALL, 90.0);
    let entries: Vec<Entry> = curves.iter().enumerate().map(|(number, curve)| entry(number, curve, &unit)).collect();
    let described: Vec<String> =
        entries.iter().filter_map(|e| Some(format!("{}: {}", clean(&e.name), e.figures.as_ref()?))).collect();
    let description = format!("Cumulative distributions on a logarithmic axis. {}.", described.join("; "));
    let height = HEIGHT.max(frame::legend_height(&entries, TOP));
    let mut canvas = frame::begin(title, description, height);

    let area = Area {
        left: MARGIN + 46.0,
        right: WIDTH - MARGIN - frame::legend_width(&entries) - 24.0,
        top: TOP,
        bottom: height - BELOW,
    };
    let values = || curves.iter().flat_map(|curve| curve.quantiles.iter().copied());
    let (lo, hi) = (values().fold(f64::INFINITY, f64::min), values().fold(0.0, f64::max));
    let x = Scale::across(|most| Scale::logarithmic(ticks::logarithmic(lo, hi, most), area.left, area.right));
    let y = Scale::even(ticks::linear(0.0, 100.0, 5), area.bottom, area.top);
    frame::axis_below(&mut canvas, area, &x, &format!("{unit}, logarithmic"));
    frame::axis_left(&mut canvas, area, &y, "% of all, at or below");
    for (share, name) in MARKED {
        let y = y.at(100.0 * share);
        canvas.line(vec![(area.left, y), (area.right, y)], Stroke { dash: Some([3.0, 3.0]), ..whole(GREY, 0.75) });
        canvas.text(area.right + 6.0, y + 4.0, SMALL, GREY, Anchor::Start, name);
    }
    frame::base_line(&mut canvas, (area.left, area.bottom), (area.right, area.bottom));

    for (number, curve) in curves.iter().enumerate() {
        let last = (curve.quantiles.len() - 1) as f64;
        let points = curve.quantiles.iter().enumerate();
        let points = points.map(|(rank, value)| (x.at(*value), y.at(100.0 * rank as f64 / last)));
        canvas.line(frame::thinned(points), frame::line_of(number));
    }
    // Above all curves.
    for (number, curve) in curves.iter().enumerate() {
        let colour = frame::line_of(number).colour;
        for ((share, _), (fill, edge)) in MARKED.into_iter().zip([(colour, WHITE), (WHITE, colour)]) {
            canvas.dot((x.at(curve.at(share)), y.at(100.0 * share)), 4.5, fill, whole(edge, 1.5));
        }
    }
    frame::legend(&mut canvas, &entries, TOP);
    Ok(Chart::of(canvas))
}

fn entry(number: usize, curve: &Curve, unit: &str) -> Entry {
    let figures: Vec<String> =
        MARKED.iter().map(|(share, name)| format!("{name} {}", figure(curve.at(*share)))).collect();
    let figures = Some(format!("{} {unit}", figures.join(" · ")));
    Entry { mark: Mark::Line(frame::line_of(number)), name: curve.name.clone(), figures }
}

fn check(curve: &Curve) -> Result<(), PlotError> {
    let place = |number| format!("quantile {number} of curve {}", check::quoted(&curve.name));
    if curve.quantiles.len() < 2 {
        return Err(PlotError::Empty(format!("curve {} with less than two quantiles", check::quoted(&curve.name))));
    }
    for (number, value) in curve.quantiles.iter().enumerate() {
        check::logarithmic(*value, || place(number))?;
        if number > 0 && *value < curve.quantiles[number - 1] {
            let why = "it is less than the one before";
            return Err(PlotError::Value { place: place(number), value: *value, why });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_lies_between_its_neighbours() {
        let curve = Curve { name: String::new(), quantiles: vec![10.0, 40.0, 90.0] };
        assert_eq!([0.0, 0.25, 0.5, 0.75, 1.0].map(|share| curve.at(share).round()), [10.0, 20.0, 40.0, 60.0, 90.0]);
    }
}
