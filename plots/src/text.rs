//! Texts: what may stand in a chart, how wide it is, and what is left of it where there is little room.

use std::sync::LazyLock;
use ttf_parser::{Face, GlyphId, OutlineBuilder};

/// The font of a PNG, by which texts are measured for the SVG too.
static FACE: LazyLock<Face<'static>> = LazyLock::new(|| {
    // Not input: the same bytes in every build, which the tests read.
    Face::parse(notosans::REGULAR_TTF, 0).expect("the font that is built in can be read")
});

/// How many characters are kept at most. Some have no width at all, so that a width is no bound on them.
const MOST_CHARS: usize = 120;

/// A text for a chart: on one line, not empty, bounded, and without what XML cannot carry or what would turn the text
/// around it.
pub fn clean(text: &str) -> String {
    // One more than may stay says that some were left out.
    let mut chars: Vec<char> = text
        .chars()
        .map(|c| if c.is_whitespace() || c.is_control() { ' ' } else { c })
        .filter(|c| !matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}'))
        .map(|c| if matches!(c, '\u{fffe}' | '\u{ffff}') { char::REPLACEMENT_CHARACTER } else { c })
        .skip_while(|c| *c == ' ')
        .take(MOST_CHARS + 1)
        .collect();
    chars.dedup_by(|a, b| *a == ' ' && *b == ' ');
    while chars.last() == Some(&' ') {
        chars.pop();
    }
    if chars.is_empty() {
        return "(no name)".into();
    }
    if chars.len() > MOST_CHARS {
        chars.truncate(MOST_CHARS - 1);
        chars.push('…');
    }
    chars.into_iter().collect()
}

/// How wide a text is in a font of this size. A character that the font lacks counts as a square: that is what other fonts
/// make of most of these.
pub fn width(text: &str, size: f64) -> f64 {
    text.chars().map(|c| advance(c).unwrap_or(1.0)).sum::<f64>() * size
}

/// A text of [`clean`] that is no wider than `room`, with an ellipsis if something had to go.
pub fn shorten(text: &str, size: f64, room: f64) -> String {
    if width(text, size) <= room {
        return text.into();
    }
    let mut left = room - width("…", size);
    let fits = |c: &char| {
        left -= advance(*c).unwrap_or(1.0) * size;
        left >= 0.0
    };
    let kept: String = text.chars().take_while(fits).collect();
    format!("{}…", kept.trim_end())
}

/// A text of [`clean`] on one line or two, each no wider than `room`: broken between words where it can be, with an ellipsis if something
/// had to go.
pub fn wrapped(text: &str, size: f64, room: f64) -> Vec<String> {
    let fits = |at: &usize| width(&text[..*at], size) <= room;
    if fits(&text.len()) {
        return vec![text.into()];
    }
    match text.match_indices(' ').map(|(at, _)| at).take_while(fits).last() {
        Some(at) => vec![text[..at].into(), shorten(&text[at + 1..], size, room)],
        None => vec![shorten(text, size, room)],
    }
}

/// The glyphs of a text in a font of this size, and how far each is from the left end.
pub fn glyphs(text: &str, size: f64) -> impl Iterator<Item = (GlyphId, f64)> {
    text.chars().scan(0.0, move |next, c| {
        let x = *next;
        *next += advance(c).unwrap_or(1.0) * size;
        // Glyph 0 is the box for what the font lacks.
        Some((FACE.glyph_index(c).unwrap_or_default(), x))
    })
}

/// Draws a glyph from (0, 0) on with `y` going up, in units of the font.
pub fn outline(glyph: GlyphId, pen: &mut dyn OutlineBuilder) {
    // A space has none.
    let _ = FACE.outline_glyph(glyph, pen);
}

/// What a unit of the font is in a font of this size.
pub fn unit(size: f64) -> f64 {
    size / f64::from(FACE.units_per_em())
}

/// How far the next character is from this one, in sizes of the font.
fn advance(c: char) -> Option<f64> {
    let advance = FACE.glyph_hor_advance(FACE.glyph_index(c)?)?;
    Some(f64::from(advance) * unit(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_a_line_cannot_hold_becomes_a_space() {
        assert_eq!(clean("  a\n\tb\0c\u{1b}[1m  "), "a b c [1m");
        assert_eq!(clean("a\u{202e}b\u{ffff}"), "ab\u{fffd}");
        assert_eq!(clean("<&\"'"), "<&\"'");
        assert_eq!(clean(" \n"), "(no name)");
    }

    #[test]
    fn the_font_has_what_units_are_written_with() {
        for c in "µμ·…×²³°%‰–−ΩäéЖλ ".chars() {
            assert!(advance(c).is_some(), "{c}");
        }
    }

    #[test]
    fn a_long_text_ends_with_an_ellipsis() {
        let long = clean(&"ab ".repeat(5_000));
        assert_eq!(long.chars().count(), MOST_CHARS);
        assert!(shorten(&long, 12.0, 60.0).ends_with('…'));
        assert_eq!(shorten("ab", 12.0, 60.0), "ab");
        assert_eq!(shorten("ab", 12.0, 0.0), "…");
    }

    #[test]
    fn a_text_is_broken_between_words() {
        assert_eq!(wrapped("one two three", 12.0, 60.0), ["one two", "three"]);
        assert_eq!(wrapped("one", 12.0, 60.0), ["one"]);
        let long = wrapped(&"one two three four".repeat(3), 12.0, 60.0);
        assert!(long.len() == 2 && long[1].ends_with('…'), "{long:?}");
        assert_eq!(wrapped(&"x".repeat(100), 12.0, 60.0).len(), 1);
    }

    proptest! {
        #[test]
        fn a_clean_text_is_bounded_and_stays_as_it_is(text in any::<String>(), room in 20.0..300.0) {
            let once = clean(&text);
            prop_assert!(!once.is_empty() && once.chars().count() <= MOST_CHARS);
            prop_assert_eq!(clean(&once), once.clone());
            prop_assert!(width(&shorten(&once, 12.0, room), 12.0) <= room);
            let lines = wrapped(&once, 12.0, room);
            prop_assert!((1..=2).contains(&lines.len()) && lines.iter().all(|line| width(line, 12.0) <= room));
        }
    }
}
