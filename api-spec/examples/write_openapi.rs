//! Prints the published document: `cargo run -p api-spec --example write_openapi > api-spec/openapi.yaml`.

fn main() -> Result<(), serde_yaml_ng::Error> {
    print!("{}", serde_yaml_ng::to_string(&api_spec::openapi::document())?);
    Ok(())
}
