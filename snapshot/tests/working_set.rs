//! The working set beside a snapshot.
#![allow(missing_docs)]

mod common;
use common::*;
use snapshot::load;
use snapshot::page_runs::PageRuns;
use snapshot::verify::verify;
use snapshot::working_set::{SaveError, Unusable, Used, WorkingSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;

fn used() -> Used {
    Used { read: PageRuns::new([0..3, 5..6]), written: PageRuns::of_pages([1]) }
}

#[test]
fn it_is_saved_and_loaded_and_the_snapshot_is_what_it_was() {
    let sample = Sample::new();
    let before = sample.bytes("snap.json");
    let snapshot = load::open(&sample.dir).unwrap();
    assert_eq!(WorkingSet::load(&snapshot).unwrap(), None);
    assert!(!WorkingSet::clear(&snapshot).unwrap());

    let mut set = WorkingSet::of(&snapshot);
    set.merge(&used());
    set.save(&snapshot).unwrap();
    let metadata = fs::metadata(sample.path("working-set.json")).unwrap();
    assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
    let mut loaded = WorkingSet::load(&snapshot).unwrap().unwrap();
    assert_eq!((loaded.read(), loaded.written(), loaded.clones), (set.read(), set.written(), 1));

    loaded.merge(&Used { read: PageRuns::new([3..5, 60..900]), ..used() });
    loaded.save(&snapshot).unwrap();
    let again = WorkingSet::load(&load::open(&sample.dir).unwrap()).unwrap().unwrap();
    // The image has 66 pages.
    assert_eq!((again.read().runs(), again.clones), (&[0..6, 60..66][..], 2));

    assert_eq!(sample.bytes("snap.json"), before);
    verify(&sample.dir).unwrap();
    let names: Vec<_> = fs::read_dir(&sample.dir).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(names.iter().all(|name| !name.to_string_lossy().starts_with('.')), "{names:?}");
    assert!(WorkingSet::clear(&snapshot).unwrap());
    assert_eq!(WorkingSet::load(&snapshot).unwrap(), None);
}

#[test]
fn one_of_other_memory_is_of_no_use_and_goes_nowhere() {
    let (sample, other) = (Sample::new(), Sample::of(&vec![7; 4 * CHUNK + 2 * PAGE], &state(1)));
    let (own, foreign) = (load::open(&sample.dir).unwrap(), load::open(&other.dir).unwrap());
    let mut set = WorkingSet::of(&foreign);
    set.merge(&used());
    assert!(matches!(set.save(&own), Err(SaveError::Foreign(_))));
    set.save(&foreign).unwrap();
    sample.put("working-set.json", &other.bytes("working-set.json"));
    assert!(matches!(WorkingSet::load(&own), Err(Unusable::Foreign { .. })));
    // It may be replaced, and removed.
    WorkingSet::of(&own).save(&own).unwrap();
    assert!(WorkingSet::load(&own).unwrap().is_some());
}

#[test]
fn what_is_no_file_or_too_long_is_of_no_use_either() {
    let sample = Sample::new();
    let snapshot = load::open(&sample.dir).unwrap();
    sample.put("working-set.json", &vec![b' '; (1 << 20) + 1]);
    assert!(matches!(WorkingSet::load(&snapshot), Err(Unusable::File(_))));
    fs::remove_file(sample.path("working-set.json")).unwrap();
    std::os::unix::fs::symlink("snap.json", sample.path("working-set.json")).unwrap();
    assert!(matches!(WorkingSet::load(&snapshot), Err(Unusable::File(_))));
    verify(&sample.dir).unwrap();
    assert!(WorkingSet::clear(&snapshot).unwrap());
    assert!(sample.path("snap.json").exists());
}
