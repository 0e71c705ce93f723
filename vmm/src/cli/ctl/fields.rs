//! The fields of a document as options of a command, by its JSON schema. Pure.

use crate::doctor::wrap;
use api_spec::openapi;
use api_spec::operations::Shape;
use clap::builder::{PossibleValue, TypedValueParser};
use clap::error::ErrorKind;
use clap::{Arg, ArgAction, ValueHint};
use serde_json::Value;
use std::ffi::OsStr;
use std::path::PathBuf;

/// Longest line of what is said of an option, in characters.
const LINE: usize = 88;

/// A field of a document.
#[derive(Clone, Debug, PartialEq)]
pub struct Field {
    /// Its name.
    pub name: String,
    /// What it holds.
    pub kind: Kind,
    /// Whether it may be `null`.
    pub nullable: bool,
    /// Whether a document must have it.
    pub required: bool,
    /// What it means, with its default and its bounds.
    pub help: String,
}

/// What a field holds.
#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    /// A whole number.
    Integer,
    /// Yes or no.
    Boolean,
    /// Text.
    Text,
    /// One of these words, each with what it means.
    Words(Vec<(String, String)>),
    /// A document of its own, or a list.
    Json,
}

/// Where the value of a field is.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// On the command line.
    Here(Value),
    /// In a file, as JSON.
    File(PathBuf),
    /// At standard input, as JSON.
    Stdin,
}

impl Source {
    /// How messages call it.
    pub fn place(&self) -> String {
        match self {
            Source::Here(_) => "the command line".into(),
            Source::File(path) => path.display().to_string(),
            Source::Stdin => "standard input".into(),
        }
    }
}

/// The fields of a document of this shape. Those that can only be `null` are none: what they are about is not offered.
pub fn of(shape: &Shape) -> Vec<Field> {
    let schema = openapi::schema(shape);
    let required: Vec<&str> = list(&schema["schema"]["required"]).filter_map(Value::as_str).collect();
    let fields = schema["schema"]["properties"].as_object().into_iter().flatten();
    fields
        .filter_map(|(name, field)| {
            let (kind, nullable) = kind(field, &schema["components"]["schemas"])?;
            let required = required.contains(&name.as_str());
            Some(Field { name: name.clone(), kind, nullable, required, help: help(field) })
        })
        .collect()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// What a field of this schema holds besides `null`, and whether it may be `null`.
fn kind(schema: &Value, all: &Value) -> Option<(Kind, bool)> {
    if let Some(link) = schema["$ref"].as_str() {
        return kind(&all[link.rsplit('/').next()?], all);
    }
    if schema["anyOf"].is_array() {
        let mut kinds = list(&schema["anyOf"]).filter_map(|schema| kind(schema, all));
        let nullable = list(&schema["anyOf"]).any(|schema| schema["type"] == "null");
        return kinds.next().map(|(kind, _)| (kind, nullable));
    }
    if schema["oneOf"].is_array() || schema["enum"].is_array() {
        return Some((Kind::Words(words(schema)), false));
    }
    let types: Vec<&str> = match &schema["type"] {
        Value::String(one) => vec![one],
        several => list(several).filter_map(Value::as_str).collect(),
    };
    let kind = match *types.iter().find(|name| **name != "null")? {
        "integer" => Kind::Integer,
        "boolean" => Kind::Boolean,
        "string" => Kind::Text,
        _ => Kind::Json,
    };
    Some((kind, types.contains(&"null")))
}

/// The words that an enumeration has.
fn words(schema: &Value) -> Vec<(String, String)> {
    let word = |word: &Value, about: &Value| {
        Some((word.as_str()?.to_owned(), about["description"].as_str().unwrap_or_default().to_owned()))
    };
    list(&schema["enum"])
        .filter_map(|name| word(name, &Value::Null))
        .chain(list(&schema["oneOf"]).flat_map(|one| {
            let several = list(&one["enum"]).filter_map(|name| word(name, one));
            word(&one["const"], one).into_iter().chain(several).collect::<Vec<_>>()
        }))
        .collect()
}

/// What is said of a field.
fn help(schema: &Value) -> String {
    let mut notes = Vec::new();
    match &schema["default"] {
        Value::Null => {}
        Value::String(text) => notes.push(format!("default {text}")),
        other => notes.push(format!("default {other}")),
    }
    // Bounds that only say how numbers are kept are nobody's concern.
    let of_type = [u64::from(u16::MAX), u64::from(u32::MAX), u64::MAX].map(Some);
    let min = schema["minimum"].as_u64().filter(|min| *min > 0);
    let max = schema["maximum"].as_u64().filter(|max| !of_type.contains(&Some(*max)));
    match (min, max) {
        (Some(min), Some(max)) => notes.push(format!("{min} to {max}")),
        (Some(min), None) => notes.push(format!("at least {min}")),
        (None, Some(max)) => notes.push(format!("at most {max}")),
        (None, None) => {}
    }
    let text = schema["description"].as_str().unwrap_or_default();
    let notes = if notes.is_empty() { String::new() } else { format!(" [{}]", notes.join("; ")) };
    wrap(&format!("{text}{notes}"), LINE).join("\n")
}

impl Field {
    /// The option that gives it.
    pub fn option(&self) -> Arg {
        let option = self.arg().long(self.name.replace('_', "-"));
        match self.kind {
            Kind::Boolean => option.num_args(0..=1).require_equals(true).default_missing_value("true"),
            _ => option,
        }
    }

    /// The argument without a name that gives it.
    pub fn argument(&self) -> Arg {
        self.arg()
    }

    /// What stands for its value in a text.
    pub fn value_name(&self) -> &'static str {
        match self.kind {
            Kind::Integer => "N",
            Kind::Boolean => "true|false",
            Kind::Text if self.is_path() => "PATH",
            Kind::Text => "TEXT",
            Kind::Words(_) => "WORD",
            Kind::Json => "JSON",
        }
    }

    fn is_path(&self) -> bool {
        self.name.split('_').any(|word| word == "path")
    }

    fn arg(&self) -> Arg {
        let hint = if self.is_path() { ValueHint::AnyPath } else { ValueHint::Other };
        Arg::new(self.name.clone())
            .action(ArgAction::Set)
            .value_name(self.value_name())
            .value_hint(hint)
            .allow_hyphen_values(matches!(self.kind, Kind::Integer))
            .help(self.help.clone())
            .value_parser(Reader { kind: self.kind.clone(), nullable: self.nullable })
    }
}

/// Reads values of a kind.
#[derive(Clone, Debug)]
pub struct Reader {
    /// The kind.
    pub kind: Kind,
    /// Whether `null` is a value.
    pub nullable: bool,
}

impl Reader {
    fn read(&self, text: &str) -> Result<Source, String> {
        if self.nullable && text == "null" {
            return Ok(Source::Here(Value::Null));
        }
        let value = match &self.kind {
            Kind::Integer => {
                let number = text.parse::<u64>().map(Value::from).or_else(|_| text.parse::<i64>().map(Value::from));
                number.map_err(|_| "must be a whole number".to_owned())?
            }
            Kind::Boolean => match text {
                "true" => true.into(),
                "false" => false.into(),
                _ => return Err("must be true or false".into()),
            },
            // Which words there are is the vmm's to say.
            Kind::Text | Kind::Words(_) => text.into(),
            Kind::Json => match text.strip_prefix('@') {
                Some(path) => return Ok(Source::File(path.into())),
                None if text == "-" => return Ok(Source::Stdin),
                None => serde_json::from_str(text)
                    .map_err(|e| format!("must be JSON, @FILE, or - for standard input; as JSON: {e}"))?,
            },
        };
        Ok(Source::Here(value))
    }
}

impl TypedValueParser for Reader {
    type Value = Source;

    fn parse_ref(&self, _: &clap::Command, arg: Option<&Arg>, value: &OsStr) -> Result<Source, clap::Error> {
        let read = value.to_str().ok_or_else(|| "must be text in UTF-8".to_owned()).and_then(|text| self.read(text));
        read.map_err(|why| {
            let name = match arg.and_then(Arg::get_long) {
                Some(long) => format!("--{long}"),
                None => arg.map(|arg| arg.get_id().to_string()).unwrap_or_default(),
            };
            clap::Error::raw(ErrorKind::ValueValidation, format!("{name} {}: {why}", value.to_string_lossy()))
        })
    }

    /// For help and completion.
    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        let Kind::Words(words) = &self.kind else { return None };
        Some(Box::new(words.iter().map(|(word, about)| PossibleValue::new(word.clone()).help(about.clone()))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use api_spec::operations::OPERATIONS;
    use serde_json::json;

    fn field(id: &str, name: &str) -> Field {
        let operation = OPERATIONS.iter().find(|operation| operation.id == id).unwrap();
        let fields = of(&operation.body.or(operation.query).unwrap());
        fields.into_iter().find(|field| field.name == name).unwrap_or_else(|| panic!("{id} has no {name}"))
    }

    #[test]
    fn fields_are_what_their_schema_says() {
        let vcpus = field("putMachineConfig", "vcpu_count");
        assert_eq!((vcpus.kind, vcpus.nullable, vcpus.required), (Kind::Integer, false, false));
        assert_eq!(vcpus.help, "Number of vCPUs, 1 to 8. [default 1; 1 to 8]");
        let limit = field("patchDrive", "max_overlay_mib");
        assert_eq!((limit.kind, limit.nullable), (Kind::Integer, true));
        assert!(limit.help.ends_with("[at least 1]"));
        assert!(field("putDrive", "path_on_host").required);
        assert_eq!(field("putDrive", "overlay").kind, Kind::Boolean);
        assert_eq!(field("putLogger", "show_level").kind, Kind::Boolean);
        for (id, name) in [
            ("putDrive", "rate_limiter"),
            ("putSnapshotLoad", "drive_overrides"),
            ("putSnapshotLoad", "mem_backend"),
            ("putMetrics", "properties"),
        ] {
            assert_eq!(field(id, name).kind, Kind::Json, "{id} {name}");
        }
        assert_eq!(field("putNetworkInterface", "guest_mac").kind, Kind::Text);
        let Kind::Words(words) = field("putLogger", "format").kind else { panic!() };
        assert_eq!(words[1], ("json".to_owned(), "A JSON object.".to_owned()));
        let Kind::Words(words) = field("putMachineConfig", "huge_pages").kind else { panic!() };
        assert_eq!(words.iter().map(|(word, _)| word.as_str()).collect::<Vec<_>>(), ["None", "Transparent", "2M"]);
        let Kind::Words(words) = field("putMachineConfig", "cpu_template").kind else { panic!() };
        assert_eq!(words.len(), 7);
        let drive = OPERATIONS.iter().find(|operation| operation.id == "putDrive").unwrap().body.unwrap();
        assert!(of(&drive).iter().all(|field| field.name != "socket"), "it is not offered");
    }

    #[test]
    fn values_are_read_by_kind() {
        let read = |kind: Kind, nullable, text: &str| Reader { kind, nullable }.read(text);
        let here = |value: Value| Ok(Source::Here(value));
        assert_eq!(read(Kind::Integer, false, "9"), here(json!(9)));
        assert_eq!(read(Kind::Integer, false, "-1"), here(json!(-1)), "the vmm says what is wrong with it");
        assert_eq!(read(Kind::Integer, false, "18446744073709551615"), here(json!(u64::MAX)));
        assert_eq!(read(Kind::Integer, true, "null"), here(Value::Null));
        assert_eq!(read(Kind::Text, false, "null"), here(json!("null")));
        assert_eq!(read(Kind::Text, true, "null"), here(Value::Null));
        assert_eq!(read(Kind::Boolean, false, "false"), here(json!(false)));
        assert_eq!(read(Kind::Json, false, r#"{"a": [1]}"#), here(json!({"a": [1]})));
        assert_eq!(read(Kind::Json, false, "@a/b"), Ok(Source::File("a/b".into())));
        assert_eq!(read(Kind::Json, false, "-"), Ok(Source::Stdin));
        assert_eq!(read(Kind::Words(vec![]), false, "anything"), here(json!("anything")));
        for (kind, text) in [
            (Kind::Integer, "1.5"),
            (Kind::Integer, "null"),
            (Kind::Integer, "18446744073709551616"),
            (Kind::Boolean, "yes"),
            (Kind::Json, "{"),
        ] {
            assert!(read(kind, false, text).is_err(), "{text}");
        }
    }
}
