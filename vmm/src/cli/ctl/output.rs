//! Answers as text: for people tables, for programs JSON. Pure.

use serde_json::{Map, Value, json};
use std::fmt::Write;

/// What is printed of an answer with this body.
pub fn answer(body: &[u8], is_text: bool, as_json: bool) -> Result<String, serde_json::Error> {
    let document: Value = match (body.is_empty(), is_text) {
        (true, _) if as_json => json!({ "done": true }),
        (true, _) => return Ok(String::new()),
        (false, true) if as_json => json!({ "text": String::from_utf8_lossy(body) }),
        (false, true) => return Ok(ended(String::from_utf8_lossy(body).into_owned())),
        (false, false) => serde_json::from_slice(body)?,
    };
    Ok(self::document(&document, as_json))
}

/// What is printed of a document.
pub fn document(document: &Value, as_json: bool) -> String {
    if as_json { ended(format!("{document:#}")) } else { table(document) }
}

fn ended(mut text: String) -> String {
    if !text.ends_with('\n') {
        text.push('\n');
    }
    text
}

/// A document for people: a line for each value, then a table for each list of objects.
fn table(document: &Value) -> String {
    let mut found = Flat::default();
    found.add("", document);
    let mut text = aligned(found.values.iter().map(|(name, value)| vec![name.clone(), value.clone()]).collect());
    for (name, rows) in found.lists {
        if !text.is_empty() {
            text.push('\n');
        }
        let _ = writeln!(text, "{name}");
        text += &rows_of(rows);
    }
    text
}

/// A document laid flat: names of values within others are joined by dots.
#[derive(Default)]
struct Flat<'a> {
    values: Vec<(String, String)>,
    lists: Vec<(String, &'a [Value])>,
}

impl<'a> Flat<'a> {
    fn add(&mut self, name: &str, value: &'a Value) {
        match value {
            Value::Object(members) if !members.is_empty() => {
                for (member, value) in members {
                    let name = if name.is_empty() { member.clone() } else { format!("{name}.{member}") };
                    self.add(&name, value);
                }
            }
            Value::Array(items) if items.iter().any(Value::is_object) => self.lists.push((name.to_owned(), items)),
            value => self.values.push((name.to_owned(), plain(name, value))),
        }
    }
}

/// A list of objects for people.
pub fn rows(list: &Value) -> String {
    rows_of(list.as_array().map_or(&[], Vec::as_slice))
}

/// A table of objects, with a column for each name that any of them has.
fn rows_of(items: &[Value]) -> String {
    let flat: Vec<Map<String, Value>> = items
        .iter()
        .map(|item| {
            let mut row = Flat::default();
            row.add("", item);
            let lists = row.lists.into_iter().map(|(name, list)| (name, in_a_cell(list)));
            row.values.into_iter().chain(lists).map(|(name, value)| (name, value.into())).collect()
        })
        .collect();
    let mut columns: Vec<&str> = Vec::new();
    for name in flat.iter().flat_map(Map::keys) {
        if !columns.contains(&name.as_str()) {
            columns.push(name);
        }
    }
    let cell = |row: &Map<String, Value>, name: &str| row.get(name).and_then(Value::as_str).unwrap_or("-").to_owned();
    let head = columns.iter().map(|name| (*name).to_owned()).collect();
    let rows = flat.iter().map(|row| columns.iter().map(|name| cell(row, name)).collect());
    let lines = aligned(std::iter::once(head).chain(rows).collect());
    lines.lines().map(|line| format!("  {line}\n")).collect()
}

/// A list of objects in one cell of a table: what each of them holds. Text says itself what it is; of all else, and of what lies deeper,
/// the name is told.
fn in_a_cell(items: &[Value]) -> String {
    let values = |item: &Value| {
        let mut flat = Flat::default();
        flat.add("", item);
        let lists = flat.lists.into_iter().map(|(name, list)| format!("{name} ({})", in_a_cell(list)));
        let value =
            |(name, value): (String, String)| if item[&name].is_string() { value } else { format!("{value} {name}") };
        flat.values.into_iter().map(value).chain(lists).collect::<Vec<_>>().join(" ")
    };
    items.iter().map(values).collect::<Vec<_>>().join(", ")
}

/// Rows of as many cells, in columns.
fn aligned(rows: Vec<Vec<String>>) -> String {
    let mut widths: Vec<usize> = Vec::new();
    for row in &rows {
        widths.resize(widths.len().max(row.len()), 0);
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in rows {
        let line: String = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}  ")).collect();
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}

/// A value as one word or a few.
fn plain(name: &str, value: &Value) -> String {
    match value {
        // What a terminal would take for an order is shown as what it is.
        Value::String(text) => {
            text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
        }
        Value::Array(items) if !items.is_empty() => {
            items.iter().map(|item| plain(name, item)).collect::<Vec<_>>().join(", ")
        }
        Value::Number(number) if name.ends_with("_bytes") => match number.as_u64() {
            Some(bytes) if bytes >= 1 << 10 => format!("{bytes} ({})", size(bytes)),
            _ => number.to_string(),
        },
        other => other.to_string(),
    }
}

/// A number of bytes in MiB, or in KiB where that is less than one.
fn size(bytes: u64) -> String {
    let (unit, name) = if bytes < 1 << 20 { (1 << 10, "KiB") } else { (1 << 20, "MiB") };
    format!("{:.1} {name}", bytes as f64 / f64::from(unit))
}

#[cfg(test)]
mod tests {
    use super::*;
    use api_spec::operations::{Answer, OPERATIONS};

    #[test]
    fn people_read_lines_and_tables() {
        let stats =
            json!({"uptime_us": 5, "memory": {"size_bytes": 134217728, "private_bytes": 4096, "shared_bytes": 0}});
        assert_eq!(
            table(&stats),
            "uptime_us             5\n\
             memory.size_bytes     134217728 (128.0 MiB)\n\
             memory.private_bytes  4096 (4.0 KiB)\n\
             memory.shared_bytes   0\n"
        );
        let map = json!({"runs": [{"guest_addr": 0, "kind": "private"}, {"guest_addr": 4096, "more": {"a": [1, 2]}}],
            "next": 8192, "entropy": {}, "none": []});
        assert_eq!(
            table(&map),
            "next     8192\nentropy  {}\nnone     []\n\n\
             runs\n  guest_addr  kind     more.a\n  0           private  -\n  4096        -        1, 2\n"
        );
        let lists = json!({"traces": [{"of": "load", "phases": [{"name": "vm", "ns": 5}, {"name": "run", "ns": 6, "more": [{"a": 1}]}]}]});
        assert_eq!(table(&lists), "traces\n  of    phases\n  load  vm 5 ns, run 6 ns more (1 a)\n");
        assert_eq!(table(&json!({"reason": "a\u{1b}[2J\nb"})), "reason  a\\u{1b}[2J\\nb\n");
        assert_eq!(table(&json!({})), "{}\n".replace("{}\n", "  {}\n"));
    }

    #[test]
    fn every_answer_of_the_table_is_one_json_document_or_none_at_all() {
        for operation in OPERATIONS {
            let (body, is_text) = match operation.answer {
                Answer::Done => ("", false),
                Answer::Document(shape) => (shape.example, false),
                Answer::Text(example) => (example, true),
            };
            let as_json = answer(body.as_bytes(), is_text, true).unwrap();
            let document: Value = serde_json::from_str(&as_json).unwrap();
            match operation.answer {
                Answer::Done => assert_eq!(document, json!({"done": true})),
                Answer::Document(_) => assert_eq!(document, serde_json::from_str::<Value>(body).unwrap()),
                Answer::Text(_) => assert_eq!(document, json!({ "text": body })),
            }
            let for_people = answer(body.as_bytes(), is_text, false).unwrap();
            assert_eq!(for_people.is_empty(), body.is_empty(), "{}", operation.id);
            assert!(serde_json::from_str::<Value>(&for_people).is_err(), "{}: {for_people}", operation.id);
        }
        assert!(answer(b"<html>", false, false).is_err());
    }
}
