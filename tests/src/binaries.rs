//! The programs under test.
//!
//! They are named by environment variables (as `./test` does), or lie where cargo puts them, beside the tests. A program
//! that is older than its sources proves nothing and is refused.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::SystemTime;

/// The `vmm` program; `COPPICE_VMM` names another one.
pub fn vmm() -> &'static Path {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    FOUND.get_or_init(|| {
        find("vmm", "COPPICE_VMM", &["api-spec", "sandbox", "snapshot", "uffd-handler", "vmm", "resources/guest"])
    })
}

/// The `uffd-handler` program; `COPPICE_UFFD_HANDLER` names another one.
pub fn uffd_handler() -> &'static Path {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    FOUND.get_or_init(|| {
        find("uffd-handler", "COPPICE_UFFD_HANDLER", &["api-spec", "sandbox", "snapshot", "uffd-handler"])
    })
}

fn find(name: &str, variable: &str, crates: &[&str]) -> PathBuf {
    let path = match std::env::var_os(variable) {
        Some(path) => PathBuf::from(path),
        None => beside_the_tests(name),
    };
    let built = match fs::metadata(&path).and_then(|metadata| metadata.modified()) {
        Ok(built) => built,
        Err(e) => panic!("cannot find the program `{name}` at {}: {e}; run ./test, which builds it", path.display()),
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("this crate is a folder of the workspace");
    for folder in crates {
        if let Some((newest, changed)) = newest_source(&root.join(folder).join("src"))
            && changed > built
        {
            panic!(
                "{} is older than {}: it is not the program to be tested; run ./test, which builds it",
                path.display(),
                newest.display()
            );
        }
    }
    path
}

/// `target/<profile>/name`, as seen from a test in `target/<profile>/deps`.
fn beside_the_tests(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a process can find its own program");
    let deps = test.parent().expect("a program lies in a directory");
    deps.parent().unwrap_or(deps).join(name)
}

/// The source file that was changed last; `None` where there are no sources, as on a machine that only runs tests.
fn newest_source(dir: &Path) -> Option<(PathBuf, SystemTime)> {
    let entries = fs::read_dir(dir).ok()?.filter_map(Result::ok);
    entries
        .filter_map(|entry| {
            let path = entry.path();
            if path.is_dir() {
                return newest_source(&path);
            }
            Some((path, entry.metadata().ok()?.modified().ok()?))
        })
        .max_by_key(|(_, changed)| *changed)
}
