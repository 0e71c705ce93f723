//! How ready the guest is, from what systemd says or how its start jobs end.

use api_spec::agent::Level;
use api_spec::agent::linux::Readiness;

/// Most names of failed units that are kept, and the longest one, so that an answer fits its frame.
const MAX_FAILED: usize = 64;
const MAX_NAME: usize = 256;

/// Readiness while services are starting.
pub fn starting() -> Readiness {
    Readiness { level: Level::Agent, failed: Vec::new() }
}

/// Readiness once everything has started that is going to.
pub fn started(failed: impl IntoIterator<Item = String>) -> Readiness {
    let mut failed: Vec<String> = failed.into_iter().take(MAX_FAILED).collect();
    for name in &mut failed {
        let end = (0..=MAX_NAME.min(name.len())).rev().find(|at| name.is_char_boundary(*at));
        name.truncate(end.unwrap_or(0));
    }
    Readiness { level: if failed.is_empty() { Level::Full } else { Level::Degraded }, failed }
}

/// The last line that `systemctl is-system-running` printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Systemd {
    /// Jobs are still queued.
    Starting,
    /// All is well.
    Running,
    /// All has started that will; units have failed.
    Degraded,
    /// The rescue or emergency target: nothing more will start.
    Maintenance,
    /// The machine is going down.
    Stopping,
    /// It cannot say, or is not there.
    Unknown,
}

impl Systemd {
    /// Reads what it printed.
    pub fn parse(output: &str) -> Self {
        match output.trim() {
            "initializing" | "starting" => Systemd::Starting,
            "running" => Systemd::Running,
            "degraded" => Systemd::Degraded,
            "maintenance" => Systemd::Maintenance,
            "stopping" => Systemd::Stopping,
            _ => Systemd::Unknown,
        }
    }

    /// The readiness that this means, given the units that failed. None as long as it may still change by itself.
    pub fn readiness(self, failed: Vec<String>) -> Option<Readiness> {
        match self {
            Systemd::Starting | Systemd::Unknown | Systemd::Stopping => None,
            Systemd::Running => Some(started([])),
            Systemd::Degraded if failed.is_empty() => Some(started(["a unit that systemd does not name".into()])),
            Systemd::Degraded => Some(started(failed)),
            Systemd::Maintenance => Some(started(["maintenance mode".to_owned()].into_iter().chain(failed))),
        }
    }
}

/// The units in the output of `systemctl list-units --state=failed --plain --no-legend`: the first word of each line.
pub fn failed_units(output: &str) -> Vec<String> {
    output
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| *word != "●" && *word != "*"))
        .map(Into::into)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_failed_makes_the_level() {
        assert_eq!(starting().level, Level::Agent);
        assert_eq!(started([]), Readiness { level: Level::Full, failed: vec![] });
        assert_eq!(started(["10-db".into()]), Readiness { level: Level::Degraded, failed: vec!["10-db".into()] });
    }

    #[test]
    fn many_or_long_names_still_fit_a_frame() {
        let readiness = started((0..1000).map(|_| "ü".repeat(1000)));
        assert!(readiness.failed.iter().map(String::len).sum::<usize>() <= MAX_FAILED * MAX_NAME);
    }

    #[test]
    fn systemd_is_taken_at_its_word() {
        let failed = || vec!["ssh.service".to_owned()];
        let ready = |output: &str| Systemd::parse(output).readiness(failed());
        assert_eq!(ready("running\n"), Some(started([])));
        assert_eq!(ready("degraded\n"), Some(started(failed())));
        assert_eq!(ready("starting\n"), None);
        assert_eq!(ready("initializing\n"), None);
        assert_eq!(ready("stopping\n"), None);
        assert_eq!(ready(""), None);
        assert_eq!(ready("maintenance\n").unwrap().failed, ["maintenance mode", "ssh.service"]);
        assert_eq!(Systemd::Degraded.readiness(vec![]).unwrap().level, Level::Degraded);
    }

    #[test]
    fn failed_units_are_first_words() {
        let output = "ssh.service loaded failed failed OpenBSD Secure Shell\n● db.service loaded failed failed A\n\n";
        assert_eq!(failed_units(output), ["ssh.service", "db.service"]);
    }
}
