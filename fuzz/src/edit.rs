//! Edits of a JSON document that keep it one: bytes of a fuzzer, which knows no JSON, become documents that a parser takes and a
//! check has to judge. Pure.

use arbitrary::Unstructured;
use serde_json::Value;

/// Numbers at which something begins, ends or overflows.
const NUMBERS: [u64; 22] = [
    0,
    1,
    2,
    3,
    32,
    64,
    65,
    255,
    256,
    4095,
    4096,
    4097,
    65_535,
    65_536,
    u32::MAX as u64 - 1,
    u32::MAX as u64,
    1 << 32,
    1 << 40,
    1 << 46,
    i64::MAX as u64,
    u64::MAX - 4095,
    u64::MAX,
];
/// Texts that are no names, or only just.
const TEXTS: [&str; 14] =
    ["", ".", "..", "/", "a/b", "a\0", "a\nb", "\u{1b}[2J", "ü", "x", "snap.json", "disk-root.img", "null", "[]"];
/// Most edits of one document.
const MOST_EDITS: usize = 8;
/// A document is not made larger once it weighs so much.
const MOST_WEIGHT: usize = 64 * 1024;

/// Edits a document as the bytes say, until they are used up.
pub fn edit(document: &mut Value, bytes: &mut Unstructured<'_>) {
    for _ in 0..MOST_EDITS {
        if bytes.is_empty() || edit_once(document, bytes).is_err() {
            return;
        }
    }
}

fn edit_once(document: &mut Value, bytes: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let last = count(document) - 1;
    // Copies of the whole into parts of it would grow beyond all bounds.
    if weight(document) > MOST_WEIGHT {
        return Err(arbitrary::Error::IncorrectFormat);
    }
    let other = bytes.int_in_range(0..=last)?;
    let other = nth(document, other).cloned().unwrap_or_default();
    let at = bytes.int_in_range(0..=last)?;
    let Some(place) = nth(document, at) else { return Ok(()) };
    match bytes.int_in_range(0..=9)? {
        0 => *place = Value::from(*bytes.choose(&NUMBERS)?),
        1 => *place = Value::from(bytes.arbitrary::<u64>()?),
        2 => *place = Value::from(*bytes.choose(&TEXTS)?),
        3 => *place = Value::from("x".repeat(bytes.arbitrary::<u16>()? as usize % 5000)),
        4 => *place = Value::Null,
        5 => *place = Value::from(bytes.arbitrary::<bool>()?),
        6 => *place = other,
        7 => remove(place, bytes.arbitrary::<u8>()?.into()),
        8 => repeat(place, bytes.arbitrary::<u8>()?.into(), 1 + bytes.arbitrary::<u8>()? as usize % 80),
        _ => nudge(place, *bytes.choose(&[1, -1, 4096, -4096])?),
    }
    Ok(())
}

/// Makes a number one that is a little off.
fn nudge(value: &mut Value, by: i64) {
    if let Some(number) = value.as_u64() {
        *value = Value::from(number.wrapping_add_signed(by));
    }
}

/// How many values there are in a value, itself included.
fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(list) => list.iter().map(count).sum(),
        Value::Object(fields) => fields.values().map(count).sum(),
        _ => 0,
    }
}

/// One of the values in a value, of which that itself is number 0.
fn nth(value: &mut Value, number: usize) -> Option<&mut Value> {
    fn find<'a>(value: &'a mut Value, left: &mut usize) -> Option<&'a mut Value> {
        if *left == 0 {
            return Some(value);
        }
        *left -= 1;
        match value {
            Value::Array(list) => list.iter_mut().find_map(|value| find(value, left)),
            Value::Object(fields) => fields.values_mut().find_map(|value| find(value, left)),
            _ => None,
        }
    }
    find(value, &mut { number })
}

/// About how many bytes a value takes.
fn weight(value: &Value) -> usize {
    match value {
        Value::Array(list) => 1 + list.iter().map(weight).sum::<usize>(),
        Value::Object(fields) => 1 + fields.iter().map(|(name, value)| name.len() + weight(value)).sum::<usize>(),
        Value::String(text) => 1 + text.len(),
        _ => 1,
    }
}

/// Removes an entry of a list, or a field.
fn remove(value: &mut Value, which: usize) {
    match value {
        Value::Array(list) if !list.is_empty() => drop(list.remove(which % list.len())),
        Value::Object(fields) => {
            let name = fields.keys().nth(which % fields.len().max(1)).cloned();
            name.and_then(|name| fields.shift_remove(&name));
        }
        _ => {}
    }
}

/// Has an entry of a list so many times more.
fn repeat(value: &mut Value, which: usize, times: usize) {
    if let Value::Array(list) = value
        && let Some(entry) = list.get(which % list.len().max(1)).cloned()
        && weight(&entry) * times < MOST_WEIGHT
    {
        let at = which % list.len();
        list.splice(at..at, std::iter::repeat_n(entry, times));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn parts_are_found_removed_repeated_and_nudged() {
        let mut document = json!({"a": [1, {"b": null}], "c": 0});
        let values =
            |document: &mut Value| (0..count(document)).map(|at| nth(document, at).cloned()).collect::<Vec<_>>();
        let parts = [json!([1, {"b": null}]), json!(1), json!({"b": null}), json!(null), json!(0)];
        assert_eq!(values(&mut document)[1..], parts.map(Some));
        assert_eq!(nth(&mut document, 6), None);
        nudge(&mut document["c"], -1);
        remove(&mut document["a"][1], 7);
        repeat(&mut document["a"], 4, 2);
        assert_eq!(document, json!({"a": [1, 1, 1, {}], "c": u64::MAX}));
        remove(&mut document, 2);
        remove(&mut document["c"], 0);
        repeat(&mut json!([]), 0, 1);
        assert_eq!(document, json!({"c": u64::MAX}));
    }

    proptest! {
        #[test]
        fn whatever_the_bytes_are_the_document_stays_bounded(bytes: Vec<u8>) {
            let mut document = json!({"a": [1, {"b": [[2]]}], "c": "d"});
            edit(&mut document, &mut Unstructured::new(&bytes));
            prop_assert!(weight(&document) < 9 * MOST_WEIGHT);
        }
    }
}
