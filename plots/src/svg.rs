//! Shapes as SVG.

use crate::canvas::{Anchor, Canvas, Shape, Stroke, Text, WHITE, WIDTH};
use std::fmt::{self, Display};

/// The whole document. It has no scripts, no styles and no references.
pub fn document(canvas: &Canvas) -> String {
    let (width, height) = (Number(WIDTH), Number(canvas.height));
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" role=\"img\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\">\n\
         <title>{}</title>\n<desc>{}</desc>\n<rect width=\"{width}\" height=\"{height}\" fill=\"{WHITE}\"/>\n",
        Escaped(&canvas.title),
        Escaped(&canvas.description),
    );
    for shape in &canvas.shapes {
        svg += &element(shape);
        svg.push('\n');
    }
    svg + "</svg>\n"
}

fn element(shape: &Shape) -> String {
    match shape {
        Shape::Rect { x, y, width, height, fill } => format!(
            "<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" fill=\"{fill}\"/>",
            Number(*x),
            Number(*y),
            Number(*width),
            Number(*height)
        ),
        Shape::Line { points, stroke } => {
            let points: Vec<String> = points.iter().map(|(x, y)| format!("{},{}", Number(*x), Number(*y))).collect();
            format!("<polyline points=\"{}\" fill=\"none\" {}/>", points.join(" "), stroked(stroke))
        }
        Shape::Dot { at: (x, y), radius, fill, edge } => format!(
            "<circle cx=\"{}\" cy=\"{}\" r=\"{}\" fill=\"{fill}\" {}/>",
            Number(*x),
            Number(*y),
            Number(*radius),
            stroked(edge)
        ),
        Shape::Text(Text { x, y, size, colour, anchor, text }) => {
            let anchor = match anchor {
                Anchor::Start => "start",
                Anchor::Middle => "middle",
                Anchor::End => "end",
            };
            format!(
                "<text x=\"{}\" y=\"{}\" font-size=\"{}\" text-anchor=\"{anchor}\" fill=\"{colour}\">{}</text>",
                Number(*x),
                Number(*y),
                Number(*size),
                Escaped(text)
            )
        }
    }
}

fn stroked(stroke: &Stroke) -> String {
    let dash = stroke.dash.map(|[on, off]| format!(" stroke-dasharray=\"{} {}\"", Number(on), Number(off)));
    format!(
        "stroke=\"{}\" stroke-width=\"{}\" stroke-linejoin=\"round\"{}",
        stroke.colour,
        Number(stroke.width),
        dash.unwrap_or_default()
    )
}

/// A coordinate, to a hundredth.
struct Number(f64);

impl Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Adding 0 makes a negative zero positive.
        write!(f, "{}", (self.0 * 100.0).round() / 100.0 + 0.0)
    }
}

/// A text, which is free of what XML cannot carry, as it is written in XML.
struct Escaped<'a>(&'a str);

impl Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|c| match c {
            '<' => f.write_str("&lt;"),
            '>' => f.write_str("&gt;"),
            '&' => f.write_str("&amp;"),
            '"' => f.write_str("&quot;"),
            '\'' => f.write_str("&#39;"),
            _ => write!(f, "{c}"),
        })
    }
}
