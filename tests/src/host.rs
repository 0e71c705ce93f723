//! What this host offers, in the product's own words.
//!
//! A test that needs what the host lacks is skipped; see [`test_skip`].

use crate::binaries;
use crate::place::Place;
use crate::process::Process;
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
    // Without userfaultfd VMs can run, so that its absence is no failure to the doctor.
    let lacking = |check: &serde_json::Value| {
        let warned = check["status"] == "warn" && text(&check["name"]).starts_with("userfaultfd");
        check["status"] == "fail" || warned
    };
    checks.iter().filter(|check| lacking(check)).map(|check| (text(&check["name"]), text(&check["found"]))).collect()
}

/// Returns from a test, and says so, unless this host has what the test needs: `require!(Kvm, Userfaultfd)`.
#[macro_export]
macro_rules! require {
    ($($need:ident),+) => {
        if let Some(reason) = $crate::host::missing(&[$($crate::host::Need::$need),+]) {
            fn here() {}
            let name = std::any::type_name_of_val(&here);
            $crate::skip_test(name.strip_suffix("::here").unwrap_or(name), &reason);
            return;
        }
    };
}
