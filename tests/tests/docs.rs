//! Every block of shell commands in the documentation runs as it stands.
#![allow(missing_docs)]

use std::path::Path;
use tests::process::run_vmm;
use tests::{Place, Process, binaries, require};

/// The contents of the blocks marked `sh`.
fn shell_blocks(text: &str) -> Vec<String> {
    let mut blocks = Vec::new();
    let mut rest = text;
    while let Some(start) = rest.find("```sh\n") {
        let block = &rest[start + 6..];
        let end = block.find("```").expect("a block has an end");
        blocks.push(block[..end].to_owned());
        rest = &block[end + 3..];
    }
    blocks
}

/// Runs every block of a document in a directory of its own, with our programs on the path.
fn run_blocks(document: &str) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let blocks = shell_blocks(&std::fs::read_to_string(root.join(document)).unwrap());
    assert!(!blocks.is_empty(), "{document} has no commands");
    for (number, block) in blocks.iter().enumerate() {
        let place = Place::new();
        // Whatever a block has started ends with it.
        let script = format!(
            "trap 'kill $(jobs -p) 2>/dev/null || true; wait || true' EXIT\ncd {}\n{block}",
            place.path().display()
        );
        let ours = [binaries::vmm(), binaries::uffd_handler()].map(|program| program.parent().unwrap().display());
        let path = format!("{}:{}:{}", ours[0], ours[1], std::env::var("PATH").unwrap_or_default());
        let done = Process::start(&place, "block", Path::new("bash"), |bash| {
            bash.args(["-euo", "pipefail", "-c", &script]).env("PATH", path);
        })
        .finish();
        assert!(
            done.status.success(),
            "block {number} of {document} failed:\n{block}\n{}\n{}",
            done.stdout,
            done.stderr
        );
    }
}

fn has_curl() -> bool {
    std::process::Command::new("curl").arg("--version").output().is_ok_and(|output| output.status.success())
}

#[test]
fn the_readme_does_what_it_says() {
    require!(Kvm, Userfaultfd);
    match has_curl() {
        true => run_blocks("README.md"),
        false => test_skip::skip("the commands in README.md need curl"),
    }
}

#[test]
fn the_guide_to_operations_does_what_it_says() {
    require!(Kvm, Userfaultfd);
    match has_curl() {
        true => run_blocks("docs/operations.md"),
        false => test_skip::skip("the commands in docs/operations.md need curl"),
    }
}

#[test]
fn the_page_on_the_api_does_what_it_says() {
    require!(Kvm);
    run_blocks("docs/rest-api.md");
}

#[test]
fn the_page_on_forks_does_what_it_says() {
    require!(Kvm);
    run_blocks("docs/fork.md");
}

#[test]
fn the_page_of_benchmarks_is_made_of_the_figures_beside_it() {
    let place = Place::new();
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
    let path = |name: &str| docs.join(name).to_str().expect("the path is text").to_owned();
    let arguments = ["bench", "report", &path("benchmarks.json"), "--gate", &path("budgets.json")];
    let made = run_vmm(&place, "report", &arguments);
    // Some figures are worse than was asked, and the page says so.
    assert!([0, 1].contains(&made.code()), "{}", made.stderr);
    let page = std::fs::read_to_string(path("benchmarks.md")).expect("it is there");
    assert!(page == made.stdout, "make it anew: vmm bench report docs/benchmarks.json --gate docs/budgets.json");
    assert!(!made.stderr.contains("not compared"), "a budget is of no figure:\n{}", made.stderr);
}
