//! Programs in a directory, run one after the other: hooks and start jobs.

use crate::spawn::{Process, command};
use crate::users::Account;
use api_spec::agent::linux::Exit;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// Which of the names in a directory are run, in which order: bytewise, without hidden files and an editor's or a
/// package manager's leftovers.
pub fn order(names: impl IntoIterator<Item = String>) -> Vec<String> {
    const LEFTOVERS: [&str; 6] = ["~", ".bak", ".dpkg-old", ".dpkg-new", ".dpkg-dist", ".swp"];
    let mut names: Vec<String> = names
        .into_iter()
        .filter(|name| !name.starts_with('.') && !LEFTOVERS.iter().any(|leftover| name.ends_with(leftover)))
        .collect();
    names.sort_unstable();
    names
}

/// A program that did not do its work.
#[derive(Debug)]
pub struct Unsuccessful {
    /// Its file name.
    pub name: String,
    /// What became of it.
    pub how: How,
}

/// What became of a program that did not do its work.
#[derive(Debug)]
pub enum How {
    /// It could not be started.
    NotStarted(io::Error),
    /// It ended otherwise than with code 0.
    Ended(Exit),
}

impl fmt::Display for Unsuccessful {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` ", self.name)?;
        match &self.how {
            How::NotStarted(e) => write!(f, "could not be started: {e}"),
            How::Ended(Exit::Code(code)) => write!(f, "ended with code {code}"),
            How::Ended(Exit::Signal(signal)) => write!(f, "was ended by signal {signal}"),
            How::Ended(Exit::Deadline) => write!(f, "did not end in time"),
        }
    }
}

/// Runs the executable files of a directory in their order, each with its own deadline. Their output goes where the
/// agent's goes. A directory that does not exist holds no programs.
pub fn run_all<'a>(
    dir: &'a Path,
    variables: &'a [(&'static str, String)],
    deadline: Duration,
) -> io::Result<impl Iterator<Item = Result<(), Unsuccessful>> + 'a> {
    let names = match fs::read_dir(dir) {
        Ok(entries) => entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(e) => return Err(e),
    };
    let is_program =
        |name: &String| fs::metadata(dir.join(name)).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
    Ok(order(names).into_iter().filter(is_program).map(move |name| match run(&dir.join(&name), variables, deadline) {
        Ok(Exit::Code(0)) => Ok(()),
        Ok(exit) => Err(Unsuccessful { name, how: How::Ended(exit) }),
        Err(e) => Err(Unsuccessful { name, how: How::NotStarted(e) }),
    }))
}

fn run(program: &Path, variables: &[(&'static str, String)], deadline: Duration) -> io::Result<Exit> {
    let mut command = command(program, &Account::of_agent(), true);
    command.envs(variables.iter().map(|(name, value)| (name, value))).stdout(Stdio::inherit()).stderr(Stdio::inherit());
    Ok(Process::start(&mut command)?.finish(Some(Instant::now() + deadline)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn script(dir: &Path, name: &str, body: &str, mode: u32) {
        fs::write(dir.join(name), format!("#!/bin/sh\n{body}\n")).unwrap();
        fs::set_permissions(dir.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn names_are_run_bytewise_without_leftovers() {
        let names = ["9", "10-b", "10-a", ".hidden", "10-a~", "10-a.dpkg-old", "20-x.bak"];
        assert_eq!(order(names.map(String::from)), ["10-a", "10-b", "9"]);
    }

    #[test]
    fn programs_run_in_order_and_tell_how_they_failed() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let append = format!("echo $(basename $0) $WHICH >>{}", log.display());
        script(dir.path(), "30-slow", &format!("{append}\nsleep 60"), 0o755);
        script(dir.path(), "10-good", &append, 0o755);
        script(dir.path(), "20-bad", &format!("{append}\nexit 3"), 0o755);
        script(dir.path(), "15-no-program", &append, 0o644);
        fs::write(dir.path().join("40-broken"), "#!/no/such/interpreter\n").unwrap();
        fs::set_permissions(dir.path().join("40-broken"), fs::Permissions::from_mode(0o755)).unwrap();
        let variables = [("WHICH", "this".to_owned())];
        let failed: Vec<String> = run_all(dir.path(), &variables, Duration::from_millis(700))
            .unwrap()
            .filter_map(Result::err)
            .map(|failed| failed.to_string())
            .collect();
        assert_eq!(failed[..2], ["`20-bad` ended with code 3", "`30-slow` did not end in time"]);
        assert!(failed[2].starts_with("`40-broken` could not be started"), "{failed:?}");
        assert_eq!(fs::read_to_string(log).unwrap(), "10-good this\n20-bad this\n30-slow this\n");
    }

    #[test]
    fn no_directory_is_no_programs() {
        assert_eq!(run_all(Path::new("/no/such/dir"), &[], Duration::from_secs(1)).unwrap().count(), 0);
    }
}
