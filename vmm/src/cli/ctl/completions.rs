//! Scripts that complete command lines of `vmm` in a shell. Pure.
//!
//! `vmm ctl` is described by its table; the rest by the texts of `--help`.

use crate::bench;
use crate::cli::{USAGE, snapshots};
use crate::demo;
use clap::{Arg, ArgAction, Command, ValueHint};
use clap_complete::Shell;

/// The shells that there are scripts for.
pub const SHELLS: [&str; 3] = ["bash", "zsh", "fish"];

/// The script for a shell: one of [`SHELLS`].
pub fn script(shell: &str, ctl: Command) -> String {
    let shell = match shell {
        "zsh" => Shell::Zsh,
        "fish" => Shell::Fish,
        _ => Shell::Bash,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut vmm(ctl), "vmm", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// All of the program.
fn vmm(ctl: Command) -> Command {
    let mut vmm = Command::new("vmm").version(env!("CARGO_PKG_VERSION")).disable_help_subcommand(true);
    vmm = vmm.args(options(USAGE)).subcommand(ctl.no_binary_name(false).about("Command a vmm over its API"));
    for (words, json) in subcommands(USAGE) {
        let usage = match words[0] {
            "ctl" => continue,
            "bench" => bench::USAGE,
            "demo" => demo::USAGE,
            "snapshot" => snapshots::USAGE,
            "uffd-handler" => uffd_handler::USAGE,
            _ => "",
        };
        let mut command = Command::new(words[words.len() - 1].to_owned()).args(options(usage));
        if json && command.get_arguments().all(|arg| arg.get_long() != Some("json")) {
            command = command.arg(Arg::new("json").long("json").action(ArgAction::SetTrue));
        }
        vmm = match words[..] {
            [family, _, ..] => within(vmm, family, command),
            _ => vmm.subcommand(command),
        };
    }
    vmm
}

/// Puts a command into a family of them, which there may be already.
fn within(vmm: Command, family: &str, command: Command) -> Command {
    let vmm = match vmm.find_subcommand(family) {
        Some(_) => vmm,
        None => vmm.subcommand(Command::new(family.to_owned()).disable_help_subcommand(true)),
    };
    vmm.mut_subcommand(family, |family| family.subcommand(command))
}

/// The options that a text of `--help` lists, one a line, but those that every command has.
fn options(usage: &str) -> impl Iterator<Item = Arg> {
    let options = usage.lines().filter_map(|line| line.strip_prefix("  --"));
    options.filter(|line| !line.starts_with("help") && !line.starts_with("version")).map(|line| {
        let (head, about) = line.split_once("  ").unwrap_or((line, ""));
        let (name, value) = head.split_once(' ').unwrap_or((head, ""));
        let arg = Arg::new(name.to_owned()).long(name.to_owned()).help(about.trim().to_owned());
        if value.is_empty() {
            return arg.action(ArgAction::SetTrue);
        }
        let is_path = ["PATH", "FILE", "DIR", "SNAPSHOT", "PLACE"].contains(&value);
        let hint = if is_path { ValueHint::AnyPath } else { ValueHint::Other };
        arg.action(ArgAction::Append).value_name(value.to_owned()).value_hint(hint)
    })
}

/// The commands that a text of `--help` lists, word by word, and whether each takes `--json`.
fn subcommands(usage: &str) -> impl Iterator<Item = (Vec<&str>, bool)> {
    let is_word = |word: &&str| word.starts_with(|c: char| c.is_ascii_lowercase());
    usage.lines().filter_map(move |line| {
        let line = line.trim_start_matches("Usage:").trim_start().strip_prefix("vmm ")?;
        let words: Vec<&str> = line.split(' ').take_while(is_word).collect();
        (!words.is_empty()).then(|| (words, line.contains("[--json]")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_texts_of_help_say_which_commands_and_options_there_are() {
        let commands: Vec<_> = subcommands(USAGE).collect();
        for words in [vec!["ctl"], vec!["demo"], vec!["doctor"], vec!["snapshot", "verify"], vec!["uffd-handler"]] {
            assert!(commands.iter().any(|(known, _)| *known == words), "{words:?}: {commands:?}");
        }
        assert!(commands.contains(&(vec!["doctor"], true)) && commands.contains(&(vec!["guest", "export"], false)));
        let names: Vec<String> = options(USAGE).filter_map(|arg| arg.get_long().map(str::to_owned)).collect();
        for name in ["config", "restore", "uffd", "api-sock", "paused", "log-level"] {
            assert!(names.iter().any(|known| known == name), "{name}: {names:?}");
        }
        assert!(options(bench::USAGE).any(|arg| arg.get_long() == Some("calls")));
        assert!(options(demo::USAGE).any(|arg| arg.get_long() == Some("clones")));
        assert!(commands.contains(&(vec!["snapshot", "rm"], true)));
        assert!(options(snapshots::USAGE).any(|arg| arg.get_long() == Some("max-bytes")));
        let ctl = Command::new("ctl").subcommand(Command::new("drive"));
        let mut all = vmm(ctl);
        all.clone().debug_assert();
        let bench = all.find_subcommand_mut("bench").unwrap();
        assert!(bench.find_subcommand("api").is_some() && bench.find_subcommand("faults").is_some());
    }
}
