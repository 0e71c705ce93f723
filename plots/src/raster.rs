//! Shapes as pixels.

use crate::PlotError;
use crate::canvas::{Anchor, Canvas, Colour, Shape, Stroke, Text, WHITE, WIDTH};
use crate::text;
use tiny_skia::{Color, FillRule, LineJoin, Paint, Path, PathBuilder, Pixmap, Point, Rect, StrokeDash, Transform};
use ttf_parser::OutlineBuilder;

/// How many pixels a unit is, both ways.
pub const SCALE: f32 = 2.0;

/// The picture as a PNG.
pub fn png(canvas: &Canvas) -> Result<Vec<u8>, PlotError> {
    let pixels = |units: f64| (units as f32 * SCALE).round() as u32;
    let mut picture = Pixmap::new(pixels(WIDTH), pixels(canvas.height))
        .ok_or_else(|| PlotError::Png("there is no picture of this size".into()))?;
    picture.fill(opaque(WHITE));
    for shape in &canvas.shapes {
        draw(shape, &mut picture);
    }
    picture.encode_png().map_err(|e| PlotError::Png(e.to_string()))
}

/// Draws a shape. One without an area has no path, and nothing is to be seen of it.
fn draw(shape: &Shape, picture: &mut Pixmap) {
    match shape {
        Shape::Rect { x, y, width, height, fill } => {
            let rect = Rect::from_xywh(*x as f32, *y as f32, *width as f32, *height as f32);
            fill_path(picture, rect.map(PathBuilder::from_rect), *fill);
        }
        Shape::Line { points, stroke } => {
            let mut path = PathBuilder::new();
            for (number, (x, y)) in points.iter().enumerate() {
                let (x, y) = (*x as f32, *y as f32);
                if number == 0 { path.move_to(x, y) } else { path.line_to(x, y) }
            }
            stroke_path(picture, path.finish(), stroke);
        }
        Shape::Dot { at, radius, fill, edge } => {
            let circle = PathBuilder::from_circle(at.0 as f32, at.1 as f32, *radius as f32);
            fill_path(picture, circle.clone(), *fill);
            stroke_path(picture, circle, edge);
        }
        Shape::Text(text) => fill_path(picture, letters(text), text.colour),
    }
}

fn opaque(Colour(r, g, b): Colour) -> Color {
    Color::from_rgba8(r, g, b, 0xff)
}

fn paint(colour: Colour) -> Paint<'static> {
    let mut paint = Paint::default();
    paint.set_color(opaque(colour));
    paint
}

fn fill_path(picture: &mut Pixmap, path: Option<Path>, colour: Colour) {
    if let Some(path) = path {
        let scale = Transform::from_scale(SCALE, SCALE);
        picture.fill_path(&path, &paint(colour), FillRule::Winding, scale, None);
    }
}

fn stroke_path(picture: &mut Pixmap, path: Option<Path>, stroke: &Stroke) {
    if let Some(path) = path {
        let dash = stroke.dash.and_then(|dash| StrokeDash::new(dash.map(|length| length as f32).to_vec(), 0.0));
        let width = stroke.width as f32;
        let how = tiny_skia::Stroke { width, dash, line_join: LineJoin::Round, ..Default::default() };
        picture.stroke_path(&path, &paint(stroke.colour), &how, Transform::from_scale(SCALE, SCALE), None);
    }
}

/// A text as one path.
fn letters(text: &Text) -> Option<Path> {
    let share = match text.anchor {
        Anchor::Start => 0.0,
        Anchor::Middle => 0.5,
        Anchor::End => 1.0,
    };
    let left = text.x - share * text::width(&text.text, text.size);
    let mut letters = Letters { at: (left, text.y), unit: text::unit(text.size), path: PathBuilder::new() };
    for (glyph, x) in text::glyphs(&text.text, text.size) {
        letters.at.0 = left + x;
        text::outline(glyph, &mut letters);
    }
    letters.path.finish()
}

/// A pen that collects what it draws.
struct Letters {
    /// Where the glyph begins on the base line.
    at: (f64, f64),
    /// What a unit of the font is.
    unit: f64,
    path: PathBuilder,
}

impl Letters {
    fn place(&self, x: f32, y: f32) -> Point {
        let (left, base) = self.at;
        Point::from_xy((left + f64::from(x) * self.unit) as f32, (base - f64::from(y) * self.unit) as f32)
    }
}

impl OutlineBuilder for Letters {
    fn move_to(&mut self, x: f32, y: f32) {
        let to = self.place(x, y);
        self.path.move_to(to.x, to.y);
    }

    fn line_to(&mut self, x: f32, y: f32) {
        let to = self.place(x, y);
        self.path.line_to(to.x, to.y);
    }

    fn quad_to(&mut self, x1: f32, y1: f32, x: f32, y: f32) {
        let (control, to) = (self.place(x1, y1), self.place(x, y));
        self.path.quad_to(control.x, control.y, to.x, to.y);
    }

    fn curve_to(&mut self, x1: f32, y1: f32, x2: f32, y2: f32, x: f32, y: f32) {
        let (first, second, to) = (self.place(x1, y1), self.place(x2, y2), self.place(x, y));
        self.path.cubic_to(first.x, first.y, second.x, second.y, to.x, to.y);
    }

    fn close(&mut self) {
        self.path.close();
    }
}
