//! What a chart is made of: a few kinds of shapes, in units of which the chart is [`WIDTH`] wide.

use std::fmt::{self, Display};

/// How wide every chart is.
pub const WIDTH: f64 = 900.0;

/// A colour: red, green and blue, a byte each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Colour(pub u8, pub u8, pub u8);

/// The background.
pub const WHITE: Colour = Colour(0xff, 0xff, 0xff);
/// Titles, names and figures.
pub const INK: Colour = Colour(0x22, 0x26, 0x2b);
/// What explains: labels of axes and ticks.
pub const GREY: Colour = Colour(0x5b, 0x63, 0x6c);
/// Axes.
pub const AXIS: Colour = Colour(0x9a, 0xa1, 0xa9);
/// Lines of a grid.
pub const GRID: Colour = Colour(0xe4, 0xe7, 0xea);
/// Lines of a grid between those with a number.
pub const FAINT: Colour = Colour(0xf3, 0xf4, 0xf6);
/// What is gathered from small parts.
pub const REST: Colour = Colour(0xb4, 0xb9, 0xbf);

/// The palette of Okabe and Ito, which people tell apart however they see colours. Neighbours differ in lightness too. The
/// last one is too light for a line on white.
pub const PALETTE: [Colour; 8] = [
    Colour(0x00, 0x72, 0xb2), // blue
    Colour(0xe6, 0x9f, 0x00), // orange
    Colour(0x00, 0x9e, 0x73), // bluish green
    Colour(0xcc, 0x79, 0xa7), // reddish purple
    Colour(0x56, 0xb4, 0xe9), // sky blue
    Colour(0xd5, 0x5e, 0x00), // vermilion
    Colour(0x22, 0x26, 0x2b), // black, as that of text
    Colour(0xf0, 0xe4, 0x42), // yellow
];

impl Colour {
    /// The one of white and ink that can be read on this colour.
    pub fn text_on(self) -> Colour {
        let Colour(r, g, b) = self;
        let luma = 0.299 * f64::from(r) + 0.587 * f64::from(g) + 0.114 * f64::from(b);
        if luma < 128.0 { WHITE } else { INK }
    }
}

impl Display for Colour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{:02x}{:02x}{:02x}", self.0, self.1, self.2)
    }
}

/// How a line is drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Stroke {
    /// Its colour.
    pub colour: Colour,
    /// How wide it is.
    pub width: f64,
    /// How long each dash is and each gap; none for a whole line.
    pub dash: Option<[f64; 2]>,
}

/// A whole line.
pub fn whole(colour: Colour, width: f64) -> Stroke {
    Stroke { colour, width, dash: None }
}

/// Which end of a text is at its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Anchor {
    /// The left one.
    Start,
    /// The middle.
    Middle,
    /// The right one.
    End,
}

/// A text on one line.
#[derive(Debug, Clone, PartialEq)]
pub struct Text {
    /// Where its anchor is.
    pub x: f64,
    /// Where its base line is.
    pub y: f64,
    /// The size of the font.
    pub size: f64,
    /// Its colour.
    pub colour: Colour,
    /// What is at `x`.
    pub anchor: Anchor,
    /// What it says. It has been through [`crate::text::clean`].
    pub text: String,
}

/// Something drawn. What comes later lies above.
#[derive(Debug, Clone, PartialEq)]
pub enum Shape {
    /// A filled rectangle.
    Rect {
        /// Its left edge.
        x: f64,
        /// Its upper edge.
        y: f64,
        /// How wide it is.
        width: f64,
        /// How high it is.
        height: f64,
        /// Its colour.
        fill: Colour,
    },
    /// A line through points.
    Line {
        /// At least two points, `x` and `y`.
        points: Vec<(f64, f64)>,
        /// How it is drawn.
        stroke: Stroke,
    },
    /// A filled circle with an edge.
    Dot {
        /// Its centre.
        at: (f64, f64),
        /// Its radius.
        radius: f64,
        /// Its colour.
        fill: Colour,
        /// How its edge is drawn.
        edge: Stroke,
    },
    /// A text.
    Text(Text),
}

/// Shapes on white.
#[derive(Debug, Clone, PartialEq)]
pub struct Canvas {
    /// How high it is.
    pub height: f64,
    /// What it shows, in a few words.
    pub title: String,
    /// What it shows, in a sentence for who cannot see it.
    pub description: String,
    /// All shapes, from below to above.
    pub shapes: Vec<Shape>,
}

impl Canvas {
    /// Draws a filled rectangle.
    pub fn rect(&mut self, x: f64, y: f64, width: f64, height: f64, fill: Colour) {
        self.shapes.push(Shape::Rect { x, y, width, height, fill });
    }

    /// Draws a line through points; nothing through less than two.
    pub fn line(&mut self, points: Vec<(f64, f64)>, stroke: Stroke) {
        if points.len() > 1 {
            self.shapes.push(Shape::Line { points, stroke });
        }
    }

    /// Draws a dot.
    pub fn dot(&mut self, at: (f64, f64), radius: f64, fill: Colour, edge: Stroke) {
        self.shapes.push(Shape::Dot { at, radius, fill, edge });
    }

    /// Writes a text.
    pub fn text(&mut self, x: f64, y: f64, size: f64, colour: Colour, anchor: Anchor, text: impl Into<String>) {
        self.shapes.push(Shape::Text(Text { x, y, size, colour, anchor, text: text.into() }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_on_a_colour_is_light_on_dark_and_dark_on_light() {
        assert_eq!(PALETTE[0].text_on(), WHITE);
        assert_eq!(PALETTE[7].text_on(), INK);
        assert_eq!(INK.to_string(), "#22262b");
    }
}
