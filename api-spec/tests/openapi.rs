//! The published document is what the types say, and says enough.

use serde_json::Value;

#[test]
fn the_published_document_is_what_the_types_say() {
    let published: Value = serde_yaml_ng::from_str(include_str!("../openapi.yaml")).expect("openapi.yaml is YAML");
    assert!(
        published == api_spec::openapi::document(),
        "openapi.yaml is stale: cargo run -p api-spec --example write_openapi > api-spec/openapi.yaml"
    );
}

#[test]
fn every_field_is_described() {
    let document = api_spec::openapi::document();
    let mut fields = 0;
    for (name, schema) in document["components"]["schemas"].as_object().expect("an object") {
        for (field, schema) in schema["properties"].as_object().into_iter().flatten() {
            let description = schema["description"].as_str().unwrap_or_default();
            assert!(description.len() > 3, "{name}.{field} is not described: {schema}");
            fields += 1;
        }
    }
    assert!(fields > 100);
    for (path, item) in document["paths"].as_object().expect("an object") {
        for (method, operation) in item.as_object().expect("an object") {
            for part in ["operationId", "summary", "description"] {
                assert!(operation[part].as_str().is_some_and(|text| !text.is_empty()), "{method} {path}: {part}");
            }
        }
    }
}

#[test]
fn bodies_take_no_unknown_fields() {
    for operation in api_spec::operations::OPERATIONS {
        if let Some(body) = &operation.body {
            let schema = api_spec::openapi::schema(body);
            assert_eq!(schema["schema"]["additionalProperties"], false, "{}: {body:?}", operation.id);
        }
    }
}
