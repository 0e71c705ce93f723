//! `working-set.json`, as the page server and the vmm read it.
//!
//! An input is a document or edits of one, as for [`crate::manifest`]. It is read as it is, and with its digest set right.

use crate::manifest::document;
use serde_json::{Value, json};
use snapshot::page_runs::PageRuns;
use snapshot::working_set::{MAX_RUNS, Unusable, Used, VERSION, WorkingSet};
use std::path::Path;
use uffd_handler::ws::Report;

/// Reads a working set.
pub fn check(data: &[u8]) {
    let json = document(data, &whole());
    if let Ok(set) = read(&json) {
        return accepted(&set);
    }
    let Some(sealed) = resealed(&json) else { return };
    match read(&sealed) {
        Ok(set) => accepted(&set),
        Err(Unusable::Damaged { what, .. }) => assert_ne!(what, "its digest does not match"),
        Err(_) => {}
    }
}

fn read(json: &[u8]) -> Result<WorkingSet, Unusable> {
    WorkingSet::parse(json, || "working-set.json".into())
}

/// The document with its digest set right, if it is one of this kind.
fn resealed(json: &[u8]) -> Option<Vec<u8>> {
    let set: WorkingSet = serde_json::from_slice(json).ok()?;
    // In the order in which the fields are written, which is what the digest is over.
    let mut fields = serde_json::to_value(&set).expect("a working set is a JSON document");
    fields["digest"] = Value::from("");
    fields["digest"] = blake3::hash(fields.to_string().as_bytes()).to_hex().as_str().into();
    Some(fields.to_string().into_bytes())
}

/// What is accepted keeps to the bounds, comes back, can be shown, and can be added to.
fn accepted(set: &WorkingSet) {
    kept(set);
    let json = serde_json::to_vec(set).expect("a working set is a JSON document");
    assert_eq!(&read(&json).expect("what was accepted is accepted again"), set);
    let report = Report::new(Path::new("snap"), set);
    for (part, runs) in [(&report.read, set.read()), (&report.written, set.written())] {
        assert_eq!(part.pages_in_64ths.iter().sum::<u64>(), runs.pages(), "each page is in one part of the map");
    }
    assert!(!report.to_string().is_empty());
    let mut more = set.clone();
    // Of two clones: what one has read the other has written.
    let clones = [(set.read(), set.written()), (set.written(), set.read())]
        .map(|(read, written)| Used { read: read.clone(), written: written.clone() });
    more.merge_common(&clones, 1);
    kept(&more);
    let both = set.read().union(set.written());
    assert!(covers(more.read(), &both) && covers(more.written(), &both), "what is learnt stays");
}

fn kept(set: &WorkingSet) {
    for runs in [set.read(), set.written()] {
        assert!(runs.runs().len() <= MAX_RUNS && runs.end() <= set.image_pages());
        assert!(runs.runs().iter().all(|run| run.start < run.end));
        assert!(runs.runs().windows(2).all(|pair| pair[0].end < pair[1].start));
    }
}

/// Whether all pages of `part` are in `whole`.
fn covers(whole: &PageRuns, part: &PageRuns) -> bool {
    whole.union(part) == *whole
}

fn whole() -> Value {
    let unsealed = json!({
        "version": VERSION, "image": "ab".repeat(32), "image_pages": 1u64 << 28, "clones": 2, "created_unix_ms": 1,
        "updated_unix_ms": 2, "read": [[0, 5], [8, 1], [100, 1000]], "written": [[4, 2], [1 << 20, 1 << 10]], "digest": ""
    });
    let sealed = resealed(unsealed.to_string().as_bytes()).expect("these fields are those of a working set");
    serde_json::from_slice(&sealed).expect("it is a JSON document")
}

/// A working set, one of nothing, and a few edits.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut empty = whole();
    (empty["read"], empty["written"]) = (json!([]), json!([]));
    let empty = resealed(empty.to_string().as_bytes()).expect("these fields are those of a working set");
    vec![whole().to_string().into_bytes(), empty, vec![0], vec![9, 0, 0, 3], (0..64).collect()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_accepted_and_short() {
        for seed in &seeds()[..2] {
            read(seed).unwrap();
            assert!(seed.len() as u64 <= snapshot::working_set::MAX_BYTES);
        }
    }
}
