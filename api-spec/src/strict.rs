//! Documents as the published schemas have them.
//!
//! Types that are made by serde's derive take a list for an object, its members in their order. That is no part of any
//! schema, and a client that sends one has made a mistake.

use serde::de::value::{MapDeserializer, SeqDeserializer};
use serde::de::{DeserializeOwned, Deserializer, Error as _, IntoDeserializer, Unexpected, Visitor};
use serde::forward_to_deserialize_any;
use serde_json::{Error, Value};

/// Reads a document, in which an object is an object and nothing stands twice.
pub fn from_slice<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    // This one knows lines and columns, and members that stand twice.
    let document = serde_json::from_slice::<T>(bytes)?;
    T::deserialize(Strict(serde_json::from_slice(bytes)?))?;
    Ok(document)
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
        self.0.deserialize_enum(name, variants, visitor)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::operations::{Answer, OPERATIONS};
    use crate::snapshot::SnapshotLoad;
    use crate::vm::{MachineConfig, MachinePatch, VmConfig};

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
