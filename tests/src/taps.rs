//! Tap devices for a test, in a network namespace of its own.

use std::process::Command;

/// By this a test that was started again knows that it is inside.
const INSIDE: &str = "COPPICE_TEST_INSIDE";

/// Runs the test of that name again in a network namespace with these tap devices, and takes over its outcome. True if
/// this is the inside.
pub fn is_inside(test: &str, taps: &[&str]) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let make: String = taps.iter().map(|tap| format!("ip tuntap add dev {tap} mode tap && ")).collect();
    let unshare = |script: String| {
        let mut unshare = Command::new("unshare");
        unshare.args(["-n", "sh", "-c", &script]);
        unshare
    };
    let tried = unshare(format!("{make} true")).output();
    if !tried.as_ref().is_ok_and(|output| output.status.success()) {
        let why = tried.map_or_else(|e| e.to_string(), |o| String::from_utf8_lossy(&o.stderr).trim().to_owned());
        test_skip::skip(format!("no tap devices in a network namespace here: {why}"));
        return false;
    }
    let this = std::env::current_exe().expect("this program has a path");
    let done = unshare(format!(r#"{make} exec "$0" "$@""#))
        .arg(this)
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "1")
        .output()
        .expect("just tried");
    let text = [done.stdout, done.stderr].concat();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&text));
    false
}
