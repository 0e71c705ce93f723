//! Documents as the published schemas have them.
//!
//! Types that are made by serde's derive take a list for an object, its members in their order. That is no part of any
//! schema, and a client that sends one has made a mistake.

use serde::de::value::{MapDeserializer, SeqDeserializer};
use serde::de::{Deserialize, DeserializeOwned, Deserializer, Error as _, IntoDeserializer, MapAccess, SeqAccess};
use serde::de::{Unexpected, Visitor};
use serde::forward_to_deserialize_any;
use serde_json::{Error, Map, Value};
use std::fmt;

/// A document that is not what it should be: where in it, and what is wrong there.
#[derive(Debug, thiserror::Error)]
#[error("{at}{source}")]
pub struct DocumentError {
    /// The field, such as `drives[0].rate_limiter: `; empty if it is the document itself.
    at: String,
    source: Error,
}

impl From<serde_path_to_error::Error<Error>> for DocumentError {
    fn from(error: serde_path_to_error::Error<Error>) -> Self {
        let path = error.path().to_string();
        let source = error.into_inner();
        // A field that is unknown, or missing, is named by the error itself.
        let names_it = source.to_string().contains("unknown field");
        // Of what ends too early there is no path.
        let at = if path == "." || path.contains('?') || names_it { String::new() } else { format!("{path}: ") };
        DocumentError { at, source }
    }
}

impl From<Error> for DocumentError {
    fn from(source: Error) -> Self {
        DocumentError { at: String::new(), source }
    }
}

/// Reads a document, in which an object is an object, a word is a word, and nothing stands twice.
pub fn from_slice<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DocumentError> {
    // This one knows lines and columns.
    let mut text = serde_json::Deserializer::from_slice(bytes);
    let document = serde_path_to_error::deserialize(&mut text)?;
    text.end()?;
    serde_path_to_error::deserialize::<_, T>(Strict(value(bytes)?))?;
    Ok(document)
}

/// Reads any JSON value in which no object has two members of the same name.
pub fn value(bytes: &[u8]) -> Result<Value, DocumentError> {
    let mut text = serde_json::Deserializer::from_slice(bytes);
    let Tree(value) = serde_path_to_error::deserialize(&mut text)?;
    text.end()?;
    Ok(value)
}

struct Tree(Value);

impl<'de> Deserialize<'de> for Tree {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(Tree(Value::Null))
    }
}

/// Every visit makes the tree that it is of; only members that stand twice are refused.
impl<'de> Visitor<'de> for Tree {
    type Value = Tree;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Tree, E> {
        Ok(Tree(Value::Null))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Tree, E> {
        Ok(Tree(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Tree, E> {
        Ok(Tree(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Tree, E> {
        Ok(Tree(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Tree, E> {
        Ok(Tree(value.into()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Tree, E> {
        Ok(Tree(value.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Tree, A::Error> {
        let mut list = Vec::new();
        while let Some(Tree(item)) = items.next_element()? {
            list.push(item);
        }
        Ok(Tree(list.into()))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Tree, A::Error> {
        let mut map = Map::new();
        while let Some((name, Tree(value))) = members.next_entry::<String, Tree>()? {
            if map.contains_key(&name) {
                return Err(A::Error::custom(format!("duplicate field `{name}`")));
            }
            map.insert(name, value);
        }
        Ok(Tree(map.into()))
    }
}

struct Strict(Value);

impl<'de> IntoDeserializer<'de, Error> for Strict {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

impl<'de> Deserializer<'de> for Strict {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            Value::Array(list) => visitor.visit_seq(SeqDeserializer::new(list.into_iter().map(Strict))),
            Value::Object(members) => {
                visitor.visit_map(MapDeserializer::new(members.into_iter().map(|(name, value)| (name, Strict(value)))))
            }
            plain => plain.deserialize_any(visitor),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.0.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        match self.0 {
            Value::Array(_) => Err(Error::invalid_type(Unexpected::Seq, &visitor)),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        // All of ours are words.
        match self.0 {
            Value::Object(_) => Err(Error::invalid_type(Unexpected::Map, &visitor)),
            word => word.deserialize_enum(name, variants, visitor),
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logger::{Logger, MetricsSink};
    use crate::operations::{Answer, OPERATIONS};
    use crate::snapshot::SnapshotLoad;
    use crate::vm::{Action, MachineConfig, MachinePatch, VmConfig};

    fn refused<T: DeserializeOwned + std::fmt::Debug>(text: &str) -> String {
        from_slice::<T>(text.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn a_list_is_no_object_at_any_depth() {
        assert!(refused::<MachineConfig>("[2,64]").contains("sequence"));
        let nested = r#"{"snapshot_path":"s","mem_backend":["p","File"]}"#;
        assert!(serde_json::from_str::<SnapshotLoad>(nested).is_ok(), "what this is about");
        assert!(refused::<SnapshotLoad>(nested).contains("sequence"));
        let deeper = r#"{"drives":[{"drive_id":"a","path_on_host":"d","rate_limiter":{"ops":[1,2,3]}}]}"#;
        assert!(refused::<VmConfig>(deeper).contains("sequence"));
        assert!(refused::<VmConfig>(r#"{"drives":[],"drives":[]}"#).contains("duplicate"));
        assert!(refused::<VmConfig>(r#"{"speed":9}"#).contains("unknown field"));
        assert!(
            refused::<Action>(r#"{"action_type":{"FlushMetrics":null}}"#).contains("action_type: invalid type: map")
        );
        let twice = r#"{"metrics_path":"m","properties":{"a":"1","a":"2"}}"#;
        assert!(
            refused::<MetricsSink>(twice).contains("properties: duplicate field `a`"),
            "{}",
            refused::<MetricsSink>(twice)
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        let is = |refused: String, start: &str| assert!(refused.starts_with(start), "{refused}");
        is(refused::<MachineConfig>(r#"{"vcpu_count":300}"#), "vcpu_count: invalid value: integer `300`");
        is(
            refused::<VmConfig>(r#"{"machine-config":{"vcpu_count":"two"}}"#),
            "machine-config.vcpu_count: invalid type",
        );
        let drives =
            r#"{"drives":[{"drive_id":"a","path_on_host":"d","rate_limiter":{"ops":{"size":"z","refill_time":1}}}]}"#;
        is(refused::<VmConfig>(drives), "drives[0].rate_limiter.ops.size: invalid type");
        is(refused::<VmConfig>(r#"{"drives":[{"speed":1}]}"#), "unknown field `speed`");
        is(refused::<VmConfig>(r#"{"vsock":{"guest_cid":3}}"#), "vsock: missing field `uds_path`");
        is(refused::<Logger>(r#"{"level":"loud"}"#), "level: \"loud\" is no log level");
        is(refused::<MachineConfig>("{"), "EOF while parsing");
        is(refused::<MachineConfig>("{} {}"), "trailing characters");
    }

    #[test]
    fn what_is_in_order_is_read_as_ever() {
        let patch: MachinePatch = from_slice(br#"{"max_private_mib":null}"#).unwrap();
        assert_eq!(patch, MachinePatch { max_private_mib: Some(None), ..Default::default() });
        let config = OPERATIONS.iter().find(|operation| operation.id == "getVmConfig").unwrap();
        let Answer::Document(shape) = config.answer else { panic!() };
        let config: VmConfig = from_slice(shape.example.as_bytes()).unwrap();
        assert_eq!(serde_json::to_value(&config).unwrap(), serde_json::from_str::<Value>(shape.example).unwrap());
    }
}
