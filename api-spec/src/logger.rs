//! REST documents of the log and of the counters that are written to a file.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Body of `PUT /logger`: where the log goes, and what is in it. What is absent stays as it is; at first that is what the
/// command line says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Logger {
    /// A file that lines are appended to, or a FIFO; standard error at first.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "crate::path::some")]
    #[schemars(length(min = 1))]
    pub log_path: Option<PathBuf>,
    /// Which lines there are: those of this level and of those above.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub level: Option<LogLevel>,
    /// Lines tell their level.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_level: Option<bool>,
    /// Lines tell the place in the source that they come from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_log_origin: Option<bool>,
    /// Only lines of the module of this path, and of those in it, such as `vmm::api`. Empty: of all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
    /// How lines look.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<LogFormat>,
}

/// How much is logged. Written in any case; `Warn` means `Warning`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String")]
pub enum LogLevel {
    /// Nothing.
    Off,
    /// What failed.
    Error,
    /// What may not be as it should.
    Warning,
    /// What happened.
    Info,
    /// What was done for it.
    Debug,
    /// All there is.
    Trace,
}

/// Not a level.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no log level; there are Off, Error, Warning, Info, Debug and Trace")]
pub struct LogLevelError(String);

impl TryFrom<String> for LogLevel {
    type Error = LogLevelError;

    fn try_from(text: String) -> Result<Self, LogLevelError> {
        match text.to_ascii_lowercase().as_str() {
            "off" => Ok(LogLevel::Off),
            "error" => Ok(LogLevel::Error),
            "warning" | "warn" => Ok(LogLevel::Warning),
            "info" => Ok(LogLevel::Info),
            "debug" => Ok(LogLevel::Debug),
            "trace" => Ok(LogLevel::Trace),
            _ => Err(LogLevelError(text)),
        }
    }
}

/// How a line of the log looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// Time, level and words.
    #[default]
    Human,
    /// A JSON object.
    Json,
}

/// Body of `PUT /metrics`: where counters are written, as a line of JSON, every minute, at `FlushMetrics`, and at the end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MetricsSink {
    /// A file that lines are appended to, or a FIFO.
    #[serde(deserialize_with = "crate::path::one")]
    #[schemars(length(min = 1))]
    pub metrics_path: PathBuf,
    /// Each line tells the id of the VM.
    #[serde(default)]
    pub emit_id: bool,
    /// Members of an object `properties` that each line has, if there are any.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub properties: BTreeMap<String, String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_read_in_any_case() {
        for (text, level) in
            [("\"warn\"", LogLevel::Warning), ("\"WARNING\"", LogLevel::Warning), ("\"off\"", LogLevel::Off)]
        {
            assert_eq!(serde_json::from_str::<LogLevel>(text).unwrap(), level);
        }
        assert!(serde_json::from_str::<LogLevel>("\"loud\"").unwrap_err().to_string().contains("loud"));
        for level in ["Off", "Error", "Warning", "Info", "Debug", "Trace"] {
            let quoted = format!("\"{level}\"");
            assert_eq!(serde_json::to_string(&serde_json::from_str::<LogLevel>(&quoted).unwrap()).unwrap(), quoted);
        }
    }
}
