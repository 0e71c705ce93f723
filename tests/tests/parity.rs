//! What one of the API, its command line, its documentation and its tests has, the others have.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::openapi;
use api_spec::operations::{Answer, BETWEEN_VMMS, OPERATIONS, Operation, When};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn offered() -> impl Iterator<Item = &'static Operation> {
    OPERATIONS.iter().filter(|operation| operation.when != When::Never)
}

/// What a text has in marks for code.
fn code(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// How the page says when a call is taken.
fn when(operation: &Operation) -> &'static str {
    match operation.when {
        When::Always => "always",
        When::BeforeStart => "before",
        When::Fresh => "fresh",
        When::AfterStart => "after",
        When::Never => "never",
    }
}

#[test]
fn the_page_on_the_api_has_every_call_and_no_other() {
    let page = read("docs/rest-api.md");
    let mut described = BTreeSet::new();
    for line in page.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let [_, call, at, commands, what, _] = cells[..] else { continue };
        let Some((method, path)) = code(call)[0].split_once(' ') else { continue };
        let operation = offered()
            .find(|operation| (operation.method, operation.path) == (method, path))
            .unwrap_or_else(|| panic!("the page has {call}, which does not exist"));
        assert!(described.insert(operation.id), "{call} stands twice");
        assert_eq!(at, when(operation), "{call}");
        let known: Vec<&str> = operation.commands.iter().map(|command| command.words).collect();
        assert_eq!(code(commands), known, "{call}");
        assert!(!what.is_empty(), "{call}");
    }
    for operation in offered() {
        assert!(described.contains(operation.id), "the page lacks {} {}", operation.method, operation.path);
    }
    let start = page.find("### Not offered").expect("the page has that part");
    let declined = &page[start..start + page[start..].find("\n## ").expect("others follow")];
    let declined: BTreeSet<&str> = code(declined).into_iter().collect();
    let known: Vec<String> = OPERATIONS
        .iter()
        .filter(|operation| operation.when == When::Never)
        .map(|operation| format!("{} {}", operation.method, operation.path))
        .collect();
    assert_eq!(declined, known.iter().map(String::as_str).collect());
}

#[test]
fn the_page_explains_every_word_that_commands_are_made_of() {
    let page = read("docs/rest-api.md");
    let glossary = &page[page.find("## Glossary").expect("the page has one")..];
    let rows = glossary.lines().filter(|line| line.starts_with("| `"));
    let explained: BTreeSet<&str> = rows.flat_map(|row| code(row.split('|').nth(1).unwrap_or_default())).collect();
    let used = OPERATIONS.iter().flat_map(|operation| operation.commands).flat_map(|command| command.words.split(' '));
    assert_eq!(explained, used.collect());
}

#[test]
fn every_call_has_a_command_and_a_test() {
    let mut texts = String::new();
    for entry in fs::read_dir(root().join("tests/tests")).expect("the tests are here").flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "rs") && path.file_stem() != Some("parity".as_ref()) {
            texts += &fs::read_to_string(path).expect("a test can be read");
        }
    }
    for operation in offered() {
        let has_command = !operation.commands.is_empty() || BETWEEN_VMMS.contains(&operation.id);
        assert!(has_command, "{} has no command", operation.id);
        for command in operation.commands {
            let words = [format!("\"{}\"", command.words), format!("\"{} ", command.words)];
            assert!(words.iter().any(|words| texts.contains(words)), "no test says `vmm ctl {}`", command.words);
        }
    }
}

/// Asserts that `sample` has each field of `schema` that is offered, and those of the objects in it.
fn has_all(at: &str, schema: &Value, all: &Value, sample: &Value, left_out: &[&str]) {
    if let Some(link) = schema["$ref"].as_str() {
        return has_all(at, &all[link.rsplit('/').next().unwrap_or_default()], all, sample, left_out);
    }
    if let Some(items) = schema.get("items") {
        return has_all(at, items, all, &sample[0], left_out);
    }
    if let Some(some) = schema["anyOf"].as_array() {
        return some.iter().for_each(|schema| has_all(at, schema, all, sample, left_out));
    }
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let at = format!("{at}.{name}");
        if field["type"] == "null" || field["deprecated"] == true || left_out.contains(&at.as_str()) {
            continue;
        }
        let value = sample.get(name).unwrap_or_else(|| panic!("resources/vm.json lacks {at}"));
        has_all(&at, field, all, value, left_out);
    }
}

#[test]
fn the_sample_configuration_has_every_key_that_is_offered() {
    let sample: Value = serde_json::from_str(&read("resources/vm.json")).expect("it is JSON");
    let operation = OPERATIONS.iter().find(|operation| operation.id == "getVmConfig").expect("there is one");
    let Answer::Document(shape) = operation.answer else { panic!("it answers with a document") };
    let schema = openapi::schema(&shape);
    // What excludes what is there, or means nothing to the embedded guest; each interface has a bound of one kind.
    let left_out = [
        ".boot-source.kernel_image_path",
        ".boot-source.initrd_path",
        ".drives.partuuid",
        ".drives.rate_limiter.ops.one_time_burst",
        ".network-interfaces.rx_rate_limiter.ops",
        ".network-interfaces.rx_rate_limiter.bandwidth.one_time_burst",
        ".network-interfaces.tx_rate_limiter.bandwidth",
        ".network-interfaces.tx_rate_limiter.ops.one_time_burst",
        ".entropy.rate_limiter.ops",
        ".entropy.rate_limiter.bandwidth.one_time_burst",
    ];
    has_all("", &schema["schema"], &schema["components"]["schemas"], &sample, &left_out);
}
