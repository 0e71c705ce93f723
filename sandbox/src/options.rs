//! The part of a command line that is about confinement. Pure.

use crate::confinement::{Confinement, Namespace};
use lexopt::{Parser, ValueExt};

/// What `--help` prints of it, as a literal.
#[macro_export]
macro_rules! confinement_usage {
    () => {
        "\
Confinement, from the start of the process on:
  --no-seccomp           let threads make any system call; otherwise one that is not foreseen ends the process with 148
  --uid N, --gid N       become this user and group, with no other groups and no capabilities, before anything is opened
  --isolate WHAT         leave namespaces of the host: `mount`, `net`, `ipc`, `uts`, or several with commas between them
  --cgroup DIR           move into this cgroup (version 2)
  --rlimit-nofile N      open at most N files
  --rlimit-fsize N       write no file beyond N bytes
"
    };
}

/// The options, without their dashes.
const NAMES: [&str; 7] = ["no-seccomp", "uid", "gid", "isolate", "cgroup", "rlimit-nofile", "rlimit-fsize"];

/// Why a command line asks for no confinement that there is.
#[derive(Debug, thiserror::Error)]
pub enum OptionError {
    /// No value, or one that is none.
    #[error("{0}")]
    Syntax(#[from] lexopt::Error),
    /// Something else than a number.
    #[error("{name} {value}: must be a number, {range}")]
    Number {
        /// The option.
        name: &'static str,
        /// What was given.
        value: String,
        /// What it may be.
        range: &'static str,
    },
    /// No kind of namespace.
    #[error("--isolate {0}: must be of `mount`, `net`, `ipc` and `uts`, with commas between them")]
    Namespace(String),
    /// A user would stay in the group of whoever started the process, or a group would have its user.
    #[error("--uid and --gid go together: give both")]
    HalfIdentity,
    /// What only the parent of a process can do.
    #[error(
        "--isolate pid: a process cannot leave its own; start it with `unshare --pid --fork`, or by a service manager"
    )]
    Pid,
}

impl Confinement {
    /// Whether an option is about confinement.
    pub fn knows(name: &str) -> bool {
        NAMES.contains(&name)
    }

    /// Takes such an option, and its value.
    pub fn take(&mut self, name: &str, parser: &mut Parser) -> Result<(), OptionError> {
        match name {
            "no-seccomp" => self.seccomp = false,
            "uid" => self.uid = Some(id("--uid", parser)?),
            "gid" => self.gid = Some(id("--gid", parser)?),
            "isolate" => self.namespaces.extend(namespaces(&parser.value()?.string()?)?),
            "cgroup" => self.cgroup = Some(parser.value()?.into()),
            "rlimit-nofile" => self.files = Some(number("--rlimit-nofile", parser, AT_LEAST_16, |n| n >= 16)?),
            "rlimit-fsize" => self.file_size = Some(number("--rlimit-fsize", parser, "0 or more", |_| true)?),
            other => return Err(lexopt::Error::UnexpectedOption(other.to_owned()).into()),
        }
        Ok(())
    }

    /// Whether what was taken makes sense together.
    pub fn check(&self) -> Result<(), OptionError> {
        if self.uid.is_some() != self.gid.is_some() { Err(OptionError::HalfIdentity) } else { Ok(()) }
    }
}

/// With fewer nothing would start.
const AT_LEAST_16: &str = "16 or more";
/// The last is no id: it means that there is none.
const ID: &str = "0 to 4294967294";

fn id(name: &'static str, parser: &mut Parser) -> Result<u32, OptionError> {
    number(name, parser, ID, |id: u32| id != u32::MAX)
}

fn number<T: std::str::FromStr + Copy>(
    name: &'static str,
    parser: &mut Parser,
    range: &'static str,
    is_fit: impl Fn(T) -> bool,
) -> Result<T, OptionError> {
    let value = parser.value()?.string()?;
    let number = value.parse().ok().filter(|&number| is_fit(number));
    number.ok_or(OptionError::Number { name, value, range })
}

fn namespaces(words: &str) -> Result<Vec<Namespace>, OptionError> {
    let of = |word| match word {
        "mount" => Ok(Namespace::Mount),
        "net" => Ok(Namespace::Net),
        "ipc" => Ok(Namespace::Ipc),
        "uts" => Ok(Namespace::Uts),
        "pid" => Err(OptionError::Pid),
        _ => Err(OptionError::Namespace(words.to_owned())),
    };
    words.split(',').map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Confinement, String> {
        let (mut confinement, mut parser) = (Confinement::default(), Parser::from_args(line.split_whitespace()));
        while let Some(lexopt::Arg::Long(name)) = parser.next().map_err(|e| e.to_string())? {
            let name = name.to_owned();
            assert!(Confinement::knows(&name), "{name}");
            confinement.take(&name, &mut parser).map_err(|e| e.to_string())?;
        }
        confinement.check().map_err(|e| e.to_string())?;
        Ok(confinement)
    }

    #[test]
    fn all_options() {
        let line = "--no-seccomp --uid 5 --gid 0 --isolate mount,net --isolate uts,ipc --cgroup c --rlimit-nofile 99 --rlimit-fsize 0";
        let expected = Confinement {
            seccomp: false,
            uid: Some(5),
            gid: Some(0),
            namespaces: vec![Namespace::Mount, Namespace::Net, Namespace::Uts, Namespace::Ipc],
            cgroup: Some("c".into()),
            files: Some(99),
            file_size: Some(0),
        };
        assert_eq!(parse(line), Ok(expected));
        assert!(parse("").unwrap().seccomp, "it is on unless it is switched off");
        for name in NAMES {
            assert!(confinement_usage!().contains(&format!("--{name} ")), "{name}");
        }
    }

    #[test]
    fn bad_values_are_named() {
        for (line, part) in [
            ("--uid nobody", "--uid nobody: must be a number, 0 to 4294967294"),
            ("--uid 4294967295", "--uid 4294967295: must be"),
            ("--gid -1", "--gid -1: must be"),
            ("--gid", "--gid"),
            ("--uid 5", "--uid and --gid go together"),
            ("--gid 5", "--uid and --gid go together"),
            ("--isolate user", "--isolate user: must be of `mount`"),
            ("--isolate mount,", "--isolate mount,: must be"),
            ("--isolate net,pid", "unshare --pid --fork"),
            ("--rlimit-nofile 3", "--rlimit-nofile 3: must be a number, 16 or more"),
            ("--rlimit-fsize much", "--rlimit-fsize much: must be"),
            ("--cgroup", "--cgroup"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(part), "{line}: {error}");
        }
    }
}
