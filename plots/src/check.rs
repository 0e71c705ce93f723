//! What may be drawn at all.

use crate::PlotError;
use crate::text::{clean, shorten};

/// The largest number that is drawn. Far beyond what is measured, and far from where sums of numbers overflow.
const LARGEST: f64 = 1e15;
/// The smallest number on a logarithmic axis.
const SMALLEST: f64 = 1e-9;

/// A name as an error has it.
pub fn quoted(name: &str) -> String {
    format!("\"{}\"", shorten(&clean(name), 12.0, 300.0))
}

/// Refuses an empty list and one that is too long.
pub fn list(what: &'static str, count: usize, most: usize) -> Result<(), PlotError> {
    match count {
        0 => Err(PlotError::Empty(what.into())),
        _ if count > most => Err(PlotError::TooMany { what, count, most }),
        _ => Ok(()),
    }
}

/// Refuses what is not an ordinary number.
pub fn number(value: f64, place: impl Fn() -> String) -> Result<(), PlotError> {
    let refused = |why| Err(PlotError::Value { place: place(), value, why });
    match value {
        _ if !value.is_finite() => refused("it is not finite"),
        _ if value.abs() > LARGEST => refused("it is larger than 1e15"),
        _ => Ok(()),
    }
}

/// Refuses what has no length.
pub fn length(value: f64, place: impl Fn() -> String) -> Result<(), PlotError> {
    number(value, &place)?;
    if value < 0.0 { Err(PlotError::Value { place: place(), value, why: "it is below 0" }) } else { Ok(()) }
}

/// Refuses what has no place on a logarithmic axis.
pub fn logarithmic(value: f64, place: impl Fn() -> String) -> Result<(), PlotError> {
    number(value, &place)?;
    let why = "a logarithmic axis begins at 1e-9";
    if value < SMALLEST { Err(PlotError::Value { place: place(), value, why }) } else { Ok(()) }
}
