//! Writes the golden snapshots of the current format version into the source tree, for a test to load for ever after.
//! To be run when a format version is added: `cargo run -p snapshot --example write_golden`.

#[path = "../tests/common/mod.rs"]
mod common;

use common::{Changes, PAGE, create_at, create_over, job, memory, names, state};
use snapshot::create::Stored;
use snapshot::load;
use snapshot::page_runs::PageRuns;
use snapshot::tools::store::{Form, pack, write_diff};
use snapshot::working_set::{Used, WorkingSet};

fn main() {
    let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(format!("v{}", snapshot::FORMAT_VERSION));
    std::fs::create_dir_all(&golden).unwrap();
    let [base, packed, diff, packed_diff] = ["base", "packed", "diff", "packed-diff"].map(|name| golden.join(name));
    create_at(&base, &memory(), &state(1)).unwrap();
    let snapshot = load::open(&base).unwrap();
    let mut set = WorkingSet::of(&snapshot);
    set.merge(&Used { read: PageRuns::new([0..2, 32..34]), written: PageRuns::of_pages([1]) });
    set.save(&snapshot).unwrap();
    pack(&base, &packed, &job()).unwrap();
    let mut changed = memory();
    changed[PAGE..2 * PAGE].fill(7);
    changed[16 * PAGE..17 * PAGE].fill(0);
    changed[33 * PAGE..34 * PAGE].fill(3);
    create_over(&base, &diff, &Changes::new(changed, [1, 16, 33]), Stored::Changes).unwrap();
    write_diff(&packed, &diff, &packed_diff, Form::Packed, &job()).unwrap();
    for dir in [base, packed, diff, packed_diff] {
        for stamp in names(&dir).iter().filter(|name| name.ends_with(".stamp")) {
            std::fs::remove_file(dir.join(stamp)).unwrap();
        }
    }
    println!("{} is written", golden.display());
}
