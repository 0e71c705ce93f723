//! Writes the golden snapshot of the current format version into the source tree, for a test to load for ever after.
//! To be run when a format version is added: `cargo run -p snapshot --example write_golden`.

#[path = "../tests/common/mod.rs"]
mod common;

use common::{create_at, memory, state};

fn main() {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    std::fs::create_dir_all(&dir).unwrap();
    let golden = dir.join(format!("v{}", snapshot::FORMAT_VERSION));
    create_at(&golden, &memory(), &state(2)).unwrap();
    for stamp in ["mem.stamp", "disk-root.stamp"] {
        std::fs::remove_file(golden.join(stamp)).unwrap();
    }
    println!("{} is written", golden.display());
}
