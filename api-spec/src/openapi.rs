//! The published document (OpenAPI 3.1), made from [`crate::operations`] and the types of the documents. `openapi.yaml` is
//! what [`document`] says; a test fails when the two differ.

use crate::error::ErrorBody;
use crate::operations::{Answer, MAY_SAY_NOTHING, OPERATIONS, Operation, Shape, When};
use schemars::generate::SchemaSettings;
use schemars::transform::{RecursiveTransform, Transform};
use schemars::{Schema, SchemaGenerator};
use serde_json::{Map, Value, json};

/// Where schemas are in the document.
const SCHEMAS: &str = "/components/schemas";
/// What names of devices look like.
const ID: &str = "^[A-Za-z0-9_-]{1,64}$";

const ABOUT: &str = "\
One microVM, driven over HTTP/1.1 on a Unix socket (`vmm --api-sock PATH`; mode 0600).

Paths, fields, defaults, statuses and errors are those of Firecracker, whose clients work unchanged for what both have;
docs/firecracker.md lists what differs. Success is 200 with a document, or 204. What is refused is answered with 400 and an
`ErrorBody`, which names the field, and changes nothing; 408, 413 and 431 are for requests that come too slowly or are too
large, 404 and 405 for what is no call. Unknown fields are refused, and so are fields that are known but not offered, unless
they are `null` or what would be done anyway. Paths are relative to where vmm was started.";

/// The document.
pub fn document() -> Value {
    let mut generator = generator();
    let mut paths = Map::new();
    for operation in OPERATIONS {
        let path = paths.entry(operation.path).or_insert_with(|| json!({}));
        path[operation.method.to_ascii_lowercase()] = describe(operation, &mut generator);
    }
    let error = generator.subschema_for::<ErrorBody>();
    let mut schemas: Vec<(String, Value)> = generator.take_definitions(true).into_iter().collect();
    schemas.sort_by(|a, b| a.0.cmp(&b.0));
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Coppice vmm",
            "version": env!("CARGO_PKG_VERSION"),
            "description": ABOUT,
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
        },
        "servers": [{ "url": "http://localhost", "description": "The Unix socket of --api-sock" }],
        "paths": paths,
        "components": {
            "schemas": Map::from_iter(schemas),
            "responses": {
                "Refused": {
                    "description": "Refused, and nothing was changed: what was wrong, where, and what to do",
                    "content": { "application/json": {
                        "schema": error,
                        "example": { "fault_message": "machine-config.vcpu_count is 9; it may be 1 to 8" },
                    } },
                },
            },
        },
    })
}

/// The schema of a shape with all that it refers to, for whoever needs one alone.
pub fn schema(shape: &Shape) -> Value {
    let mut generator = generator();
    let schema = (shape.schema)(&mut generator);
    let definitions = generator.take_definitions(true);
    let name = schema.get("$ref").and_then(Value::as_str).and_then(|link| link.rsplit('/').next());
    let own = name.and_then(|name| definitions.get(name)).cloned().unwrap_or_else(|| schema.into());
    json!({ "schema": own, "components": { "schemas": definitions } })
}

fn generator() -> SchemaGenerator {
    let mut settings = SchemaSettings::draft2020_12();
    settings.definitions_path = SCHEMAS.into();
    settings.meta_schema = None;
    settings.with_transform(RecursiveTransform(Plain)).into_generator()
}

/// Rewrites schemas as readers know them: integers by their bounds instead of Rust's types, descriptions as one line.
#[derive(Clone, Debug)]
struct Plain;

impl Transform for Plain {
    fn transform(&mut self, schema: &mut Schema) {
        if let Some(Value::String(text)) = schema.get_mut("description") {
            *text = text.replace("\n\n", "\0").replace('\n', " ").replace('\0', "\n\n");
        }
        let format = schema.get("format").and_then(Value::as_str).map(str::to_owned);
        let max = match format.as_deref() {
            Some("uint8") => u64::from(u8::MAX),
            Some("uint16") => u64::from(u16::MAX),
            Some("uint32") => u64::from(u32::MAX),
            Some("uint64") => u64::MAX,
            _ => return,
        };
        schema.remove("format");
        if schema.get("maximum").is_none() {
            schema.insert("maximum".into(), max.into());
        }
    }
}

fn describe(operation: &Operation, generator: &mut SchemaGenerator) -> Value {
    let mut description = operation.when.words().to_owned();
    for command in operation.commands {
        description += &format!(" `vmm ctl {}`.", command.words);
    }
    let mut described = json!({
        "operationId": operation.id,
        "summary": operation.summary,
        "description": description,
    });
    let parameters: Vec<Value> = path_parameter(operation).into_iter().chain(query_parameters(operation)).collect();
    if !parameters.is_empty() {
        described["parameters"] = parameters.into();
    }
    if let Some(body) = &operation.body {
        let required = !MAY_SAY_NOTHING.contains(&operation.id);
        described["requestBody"] = json!({ "required": required, "content": content(body, generator) });
    }
    let refused = || json!({ "$ref": "#/components/responses/Refused" });
    let mut responses = Map::new();
    if operation.when != When::Never {
        match &operation.answer {
            Answer::Done => responses.insert("204".into(), json!({ "description": "Done" })),
            Answer::Document(shape) => responses
                .insert("200".into(), json!({ "description": "The answer", "content": content(shape, generator) })),
            Answer::Text(example) => responses.insert(
                "200".into(),
                json!({ "description": "The answer", "content": { "text/plain": {
                    "schema": { "type": "string" }, "example": example,
                } } }),
            ),
        };
    }
    responses.insert("400".into(), refused());
    if operation.named().is_some() {
        responses.insert("404".into(), refused());
    }
    for status in ["408", "413", "431"] {
        responses.insert(status.into(), refused());
    }
    described["responses"] = responses.into();
    described
}

fn content(shape: &Shape, generator: &mut SchemaGenerator) -> Value {
    let schema = (shape.schema)(generator);
    // Examples are checked by a test.
    let example: Value = serde_json::from_str(shape.example).unwrap_or_default();
    json!({ "application/json": { "schema": schema, "example": example } })
}

fn path_parameter(operation: &Operation) -> Option<Value> {
    let (_, name) = operation.named()?;
    let body = operation.body.as_ref().and_then(|body| serde_json::from_str::<Value>(body.example).ok());
    let example = body.as_ref().and_then(|body| body[name].as_str()).unwrap_or("a");
    Some(json!({
        "name": name,
        "in": "path",
        "required": true,
        "description": "Name of the device, as in the body",
        "schema": { "type": "string", "pattern": ID },
        "example": example,
    }))
}

fn query_parameters(operation: &Operation) -> Vec<Value> {
    let Some(query) = &operation.query else { return Vec::new() };
    let schema = schema(query);
    let Some(properties) = schema["schema"]["properties"].as_object() else { return Vec::new() };
    let parameter = |(name, schema): (&String, &Value)| {
        let mut schema = schema.clone();
        let description = schema.as_object_mut().and_then(|schema| schema.remove("description"));
        json!({ "name": name, "in": "query", "required": false, "description": description, "schema": schema })
    };
    properties.iter().map(parameter).collect()
}
