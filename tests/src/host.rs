//! What this host offers, in the product's own words.
//!
//! A test that needs what the host lacks is skipped, which the test runner would count as passed. So it prints a line,
//! and appends `name: reason` to the file that the environment variable `COPPICE_SKIPS` names.

use crate::binaries;
use crate::place::Place;
use crate::process::Process;
use std::io::Write;
use std::sync::OnceLock;

/// What a test may need.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// A usable /dev/kvm.
    Kvm,
    /// userfaultfd that handles the kernel's own faults.
    Userfaultfd,
}

/// Why this host lacks what a test needs; `None` if it has all of it.
pub fn missing(needs: &[Need]) -> Option<String> {
    static FAILED: OnceLock<Vec<(String, String)>> = OnceLock::new();
    let failed = FAILED.get_or_init(examine);
    needs.iter().find_map(|need| {
        let family = match need {
            Need::Kvm => "kvm.",
            Need::Userfaultfd => "userfaultfd",
        };
        failed.iter().find(|(name, _)| name.starts_with(family)).map(|(name, found)| format!("{name}: {found}"))
    })
}

/// The checks of `vmm doctor` that came out as failures, with what was found.
fn examine() -> Vec<(String, String)> {
    let place = Place::new();
    let done = Process::start(&place, "doctor", binaries::vmm(), |vmm| {
        vmm.args(["doctor", "--json"]);
    })
    .finish();
    let report: serde_json::Value = serde_json::from_str(&done.stdout)
        .unwrap_or_else(|e| panic!("`vmm doctor --json` printed no JSON ({e}): {}", done.stdout));
    let checks = report["checks"].as_array().expect("the report has checks");
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    checks
        .iter()
        .filter(|check| check["status"] == "fail")
        .map(|check| (text(&check["name"]), text(&check["found"])))
        .collect()
}

/// Notes that a test was skipped. To be called by [`require!`](crate::require).
pub fn note_skip(test: &str, reason: &str) {
    let line = format!("{test}: {}", reason.replace('\n', " "));
    println!("skipped {line}");
    if let Some(path) = std::env::var_os("COPPICE_SKIPS") {
        let file = std::fs::OpenOptions::new().append(true).create(true).open(&path);
        file.and_then(|mut file| writeln!(file, "{line}"))
            .unwrap_or_else(|e| panic!("cannot note in {} that a test was skipped: {e}", path.display()));
    }
}

/// Returns from a test, and says so, unless this host has what the test needs: `require!(Kvm, Userfaultfd)`.
#[macro_export]
macro_rules! require {
    ($($need:ident),+) => {
        if let Some(reason) = $crate::host::missing(&[$($crate::host::Need::$need),+]) {
            fn here() {}
            let name = std::any::type_name_of_val(&here);
            $crate::host::note_skip(name.strip_suffix("::here").unwrap_or(name), &reason);
            return;
        }
    };
}
