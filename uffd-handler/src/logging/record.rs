//! A record of the log as a line of text. Pure.

use super::{Format, Settings};
use serde::Serialize;
use serde_json::{Map, Value};
use std::fmt::{Debug, Write};
use std::time::Duration;
use tracing::field::{Field, Visit};

/// What is known of a record.
pub(super) struct Record<'a> {
    /// When, since the beginning of 1970.
    pub time: Duration,
    /// How grave it is.
    pub level: tracing::Level,
    /// The request that it belongs to.
    pub request: Option<u64>,
    /// The module that it comes from.
    pub target: &'a str,
    /// File and line of its source.
    pub origin: Option<(&'a str, u32)>,
    /// What it says.
    pub said: Said,
}

/// The message and the fields of an event, as they are visited.
#[derive(Default)]
pub(super) struct Said {
    pub message: String,
    pub fields: Vec<(&'static str, Value)>,
}

impl Said {
    fn add(&mut self, field: &Field, value: Value) {
        match (field.name(), value) {
            ("message", Value::String(message)) => self.message = message,
            (name, value) => self.fields.push((name, value)),
        }
    }
}

impl Visit for Said {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.add(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field, value.into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, value.into());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.add(field, format!("{value:?}").into());
    }
}

impl Record<'_> {
    /// The line, with its end.
    pub fn line(&self, settings: &Settings) -> String {
        match settings.format {
            Format::Human => one_line(&self.human(settings)),
            Format::Json => self.json(settings),
        }
    }

    fn human(&self, settings: &Settings) -> String {
        let mut text = timestamp(self.time);
        // Writing to a string does not fail.
        if settings.show_level {
            let _ = write!(text, " {:5}", self.level);
        }
        if let (true, Some((file, line))) = (settings.show_origin, self.origin) {
            let _ = write!(text, " [{file}:{line}]");
        }
        if let Some(request) = self.request {
            let _ = write!(text, " request={request}");
        }
        let _ = write!(text, " {}", self.said.message);
        for (name, value) in &self.said.fields {
            let _ = match value {
                Value::String(value) => write!(text, " {name}={value}"),
                value => write!(text, " {name}={value}"),
            };
        }
        text
    }

    fn json(&self, settings: &Settings) -> String {
        let origin = self.origin.filter(|_| settings.show_origin);
        let document = Document {
            time: timestamp(self.time),
            level: self.level.as_str().to_ascii_lowercase(),
            id: &settings.id,
            request: self.request,
            target: self.target,
            origin: origin.map(|(file, line)| format!("{file}:{line}")),
            message: &self.said.message,
            fields: self.said.fields.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect(),
        };
        // A document with string keys and no failing serializers.
        let text = serde_json::to_string(&document).unwrap_or_default();
        // JSON allows some control characters within its strings; they are nowhere else in this text.
        escaped(&text, |line, c| write!(line, "\\u{:04x}", u32::from(c)))
    }
}

/// A line of JSON.
#[derive(Serialize)]
struct Document<'a> {
    time: String,
    level: String,
    id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    request: Option<u64>,
    target: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    origin: Option<String>,
    message: &'a str,
    #[serde(skip_serializing_if = "Map::is_empty")]
    fields: Map<String, Value>,
}

/// A text as one line: control characters are escaped.
pub(super) fn one_line(text: &str) -> String {
    escaped(text, |line, c| write!(line, "{}", c.escape_default()))
}

fn escaped(text: &str, escape: impl Fn(&mut String, char) -> std::fmt::Result) -> String {
    let mut line = String::with_capacity(text.len() + 1);
    for c in text.chars() {
        if c.is_control() {
            let _ = escape(&mut line, c);
        } else {
            line.push(c);
        }
    }
    line.push('\n');
    line
}

/// A time as RFC 3339 writes it, in UTC and to the microsecond.
pub fn timestamp(since_1970: Duration) -> String {
    const DAY: u64 = 24 * 60 * 60;
    /// The calendar repeats after 400 years, which have so many days.
    const CYCLE: u64 = 400 * 365 + 97;
    let (mut days, second) = (since_1970.as_secs() / DAY, since_1970.as_secs() % DAY);
    let mut year = 1970 + days / CYCLE * 400;
    days %= CYCLE;
    while days >= 365 + leap_days(year) {
        days -= 365 + leap_days(year);
        year += 1;
    }
    let mut month = 1;
    for length in [31, 28 + leap_days(year), 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let micros = since_1970.subsec_micros();
    format!("{year:04}-{month:02}-{:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z", days + 1)
}

fn leap_days(year: u64) -> u64 {
    (year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400)).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logging::Level;

    fn record() -> Record<'static> {
        Record {
            time: Duration::new(1_795_678_522, 123_456_789),
            level: tracing::Level::WARN,
            request: Some(7),
            target: "vmm::machine::driver",
            origin: Some(("vmm/src/machine/driver.rs", 123)),
            said: Said {
                message: "snapshot\nwritten\u{9b}".into(),
                fields: vec![("pause_us", 5.into()), ("path", "/a \u{1b}b".into())],
            },
        }
    }

    fn stopped() -> Said {
        Said { message: "stopped".into(), fields: Vec::new() }
    }

    fn settings(format: Format) -> Settings {
        Settings { format, ..Settings::new(Level::Info, "vm\u{7f}1") }
    }

    #[test]
    fn a_line_for_people() {
        let mut settings = settings(Format::Human);
        let line =
            "2026-11-26T07:35:22.123456Z WARN  request=7 snapshot\\nwritten\\u{9b} pause_us=5 path=/a \\u{1b}b\n";
        assert_eq!(record().line(&settings), line);
        (settings.show_level, settings.show_origin) = (false, true);
        let line = "2026-11-26T07:35:22.123456Z [vmm/src/machine/driver.rs:123] request=7 snapshot\\nwritten\\u{9b} \
            pause_us=5 path=/a \\u{1b}b\n";
        assert_eq!(record().line(&settings), line);
        let plain = Record { request: None, origin: None, said: stopped(), ..record() };
        assert_eq!(plain.line(&settings), "2026-11-26T07:35:22.123456Z stopped\n");
    }

    #[test]
    fn a_line_for_programs() {
        let mut settings = settings(Format::Json);
        let line = r#"{"time":"2026-11-26T07:35:22.123456Z","level":"warn","id":"vm\u007f1","request":7,"#.to_owned()
            + r#""target":"vmm::machine::driver","message":"snapshot\nwritten\u009b","fields":"#;
        // In which order the fields come is up to a feature of serde_json that any crate may turn on.
        let written = record().line(&settings);
        let fields = written.strip_prefix(&line).and_then(|rest| rest.strip_suffix("}\n")).unwrap();
        assert!(fields.contains(r#""path":"/a \u001bb""#) && fields.contains(r#""pause_us":5"#), "{fields}");
        settings.show_origin = true;
        let value: Value = serde_json::from_str(&record().line(&settings)).unwrap();
        assert_eq!(value["origin"], "vmm/src/machine/driver.rs:123");
        assert_eq!(value["message"], record().said.message, "what is escaped comes back");
        assert_eq!(value["fields"]["path"], "/a \u{1b}b");
        let plain = Record { request: None, origin: None, said: stopped(), ..record() };
        let value: Value = serde_json::from_str(&plain.line(&settings)).unwrap();
        let mut keys: Vec<_> = value.as_object().unwrap().keys().collect();
        keys.sort();
        assert_eq!(keys, ["id", "level", "message", "target", "time"]);
    }

    #[test]
    fn a_line_stays_one_line() {
        assert_eq!(one_line("a\nb\u{1b}[2J\u{9b}é"), "a\\nb\\u{1b}[2J\\u{9b}é\n");
    }

    #[test]
    fn times_follow_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000000Z"),
            (951_782_399, "2000-02-28T23:59:59.000000Z"),
            (951_782_400, "2000-02-29T00:00:00.000000Z"),
            (951_868_800, "2000-03-01T00:00:00.000000Z"),
            (1_735_689_599, "2024-12-31T23:59:59.000000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000000Z"),
            (12_622_780_800, "2370-01-01T00:00:00.000000Z"),
        ] {
            assert_eq!(timestamp(Duration::from_secs(seconds)), text);
        }
    }
}
