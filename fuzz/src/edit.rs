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
const MOST_EDITS: usize = 16;
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
    let places = places(document);
    let place = bytes.choose(&places)?.clone();
    let new = match bytes.int_in_range(0..=9)? {
        0 => Value::from(*bytes.choose(&NUMBERS)?),
        1 => Value::from(bytes.arbitrary::<u64>()?),
        2 => Value::from(*bytes.choose(&TEXTS)?),
        3 => Value::from("x".repeat(bytes.arbitrary::<u16>()? as usize % 5000)),
        4 => Value::Null,
        5 => Value::from(bytes.arbitrary::<bool>()?),
        6 => document.pointer(bytes.choose(&places)?).cloned().unwrap_or_default(),
        7 => {
            remove(document, &place);
            return Ok(());
        }
        8 => {
            let times = 1 + bytes.arbitrary::<u8>()? as usize % 80;
            repeat(document, &place, times);
            return Ok(());
        }
        _ => nudged(document.pointer(&place), *bytes.choose(&[1, -1, 4096, -4096])?),
    };
    // Copies of the whole into parts of it would grow beyond all bounds.
    if weight(document) < MOST_WEIGHT
        && let Some(value) = document.pointer_mut(&place)
    {
        *value = new;
    }
    Ok(())
}

/// A number that is a little off.
fn nudged(value: Option<&Value>, by: i64) -> Value {
    let number = value.and_then(Value::as_u64).unwrap_or_default();
    Value::from(number.wrapping_add_signed(by))
}

/// JSON pointers of all values of a document, its own first.
fn places(document: &Value) -> Vec<String> {
    fn gather(value: &Value, place: String, places: &mut Vec<String>) {
        match value {
            Value::Array(list) => {
                list.iter().enumerate().for_each(|(at, value)| gather(value, format!("{place}/{at}"), places));
            }
            Value::Object(fields) => {
                fields.iter().for_each(|(name, value)| gather(value, format!("{place}/{name}"), places));
            }
            _ => {}
        }
        places.push(place);
    }
    let mut places = Vec::new();
    gather(document, String::new(), &mut places);
    places.reverse();
    places
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

fn remove(document: &mut Value, place: &str) {
    let Some((parent, name)) = place.rsplit_once('/') else { return };
    match (document.pointer_mut(parent), name.parse::<usize>()) {
        (Some(Value::Array(list)), Ok(at)) if at < list.len() => drop(list.remove(at)),
        (Some(Value::Object(fields)), _) => drop(fields.shift_remove(name)),
        _ => {}
    }
}

/// An entry of a list once more, so many times, after itself.
fn repeat(document: &mut Value, place: &str, times: usize) {
    let Some((parent, name)) = place.rsplit_once('/') else { return };
    if let (Some(Value::Array(list)), Ok(at)) = (document.pointer_mut(parent), name.parse::<usize>())
        && let Some(entry) = list.get(at).cloned()
        && weight(&entry) * times < MOST_WEIGHT
    {
        list.splice(at..at, std::iter::repeat_n(entry, times));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn parts_are_found_removed_and_repeated() {
        let mut document = json!({"a": [1, {"b": null}], "c": "d"});
        assert_eq!(places(&document), ["", "/c", "/a", "/a/1", "/a/1/b", "/a/0"]);
        repeat(&mut document, "/a/0", 2);
        remove(&mut document, "/a/3/b");
        remove(&mut document, "/c");
        assert_eq!(document, json!({"a": [1, 1, 1, {}]}));
        remove(&mut document, "");
        repeat(&mut document, "/none", 1);
        assert_eq!(document, json!({"a": [1, 1, 1, {}]}));
        assert_eq!(nudged(Some(&json!(0)), -1), json!(u64::MAX));
    }

    proptest! {
        #[test]
        fn whatever_the_bytes_are_the_document_stays_bounded(bytes: Vec<u8>) {
            let mut document = json!({"a": [1, {"b": [[2]]}], "c": "d"});
            edit(&mut document, &mut Unstructured::new(&bytes));
            prop_assert!(weight(&document) < 17 * MOST_WEIGHT);
        }
    }
}
