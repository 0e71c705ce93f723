//! Charts as SVG and as PNG. They know nothing of what is drawn: a name, a unit and numbers are all they get.
//!
//! ```text
//!  distributions   stacked_bars   lines      what is drawn of which numbers
//!         \             |           /
//!          frame (title, axes, legend)       where it is drawn; ticks and text say how axes and names come out
//!                       |
//!                    canvas                  rectangles, lines, dots and texts
//!                    /     \
//!                  svg    raster             the same shapes as text and as pixels
//! ```
//!
//! All that comes in is held to be untrusted. What makes no sense is refused by a [`PlotError`] that says where it is. A
//! chart has a bounded size whatever it is of: lines keep what can be told apart, and names are shortened.

#![forbid(unsafe_code)]

mod bars;
mod canvas;
mod chart;
mod check;
mod distributions;
mod frame;
mod lines;
mod raster;
mod svg;
mod text;
mod ticks;

pub use bars::{Bar, stacked_bars};
pub use chart::Chart;
pub use distributions::{Curve, distributions};
pub use lines::{Series, lines};

use std::io;
use std::path::PathBuf;

/// Why there is no chart.
#[derive(Debug, thiserror::Error)]
pub enum PlotError {
    /// An empty list.
    #[error("{0}: there is nothing to draw")]
    Empty(String),
    /// A number without a place in the chart.
    #[error("{place}: {value} cannot be drawn, {why}")]
    Value {
        /// Where it is.
        place: String,
        /// The number.
        value: f64,
        /// What it should be.
        why: &'static str,
    },
    /// More than can be told apart.
    #[error("{count} {what} are too many for one chart, which shows {most} at most")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// How many.
        count: usize,
        /// How many there may be.
        most: usize,
    },
    /// A name that would not be that of one file in the directory.
    #[error("{0:?} cannot be the name of a chart's files")]
    FileName(String),
    /// A file.
    #[error("cannot write {}: {source}", path.display())]
    Io {
        /// Which one.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The picture.
    #[error("cannot make the PNG: {0}")]
    Png(String),
}
