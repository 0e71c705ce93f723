//! The command line of `vmm ctl`, made from the table of calls. Pure.

use super::fields::{self, Field, Kind, Reader, Source};
use super::rounds::Rounds;
use super::{CtlError, completions};
use crate::cli::UsageError;
use crate::doctor::wrap;
use crate::machine::config;
use api_spec::operations::{Command as Verb, OPERATIONS, Operation, When};
use api_spec::strict;
use clap::builder::PossibleValuesParser;
use clap::error::ErrorKind;
use clap::{Arg, ArgAction, ArgGroup, ArgMatches, Command, ValueHint, value_parser};
use serde_json::{Map, Value};
use std::ffi::OsString;
use std::fmt::Write;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// How long an answer may take, in seconds.
const PATIENCE: u32 = 60;
/// The same, where all of a guest's memory is written or checked.
const LONG_PATIENCE: u32 = 600;
/// The calls that may take that long.
const LONG: [&str; 5] = ["putAction", "putVmSave", "putVmStop", "putSnapshotCreate", "putSnapshotLoad"];
/// Longest line of a manual, in characters.
const LINE: usize = 100;

/// What a command line asks for.
#[derive(Clone, Debug, PartialEq)]
pub enum Ctl {
    /// Print this.
    Print(String),
    /// Make a call.
    Call(Call),
    /// Make some, again and again.
    Loop(Rounds),
}

/// A call, and how to make it.
#[derive(Clone, Debug)]
pub struct Call {
    /// The socket, if it is named.
    pub api_sock: Option<PathBuf>,
    /// Print JSON.
    pub json: bool,
    /// How long the answer may take.
    pub patience: Duration,
    /// Which call.
    pub operation: &'static Operation,
    /// The name at the end of its path.
    name: Option<String>,
    /// The whole document that it says.
    whole: Option<Source>,
    /// Fields that are put on that.
    fields: Vec<(String, Source)>,
}

impl PartialEq for Call {
    fn eq(&self, other: &Self) -> bool {
        let key = |call: &Self| (call.api_sock.clone(), call.json, call.patience, call.operation.id, call.name.clone());
        key(self) == key(other) && self.whole == other.whole && self.fields == other.fields
    }
}

/// Parses the arguments that follow `vmm ctl`.
pub fn parse(args: Vec<OsString>) -> Result<Ctl, UsageError> {
    // `help drive set` is what many type for `drive set --help`.
    let args = match args.split_first() {
        Some((first, rest)) if first == "help" => [rest, &["--help".into()]].concat(),
        _ => args,
    };
    let matches = match command().try_get_matches_from(args) {
        Ok(matches) => matches,
        Err(error) if error.kind() == ErrorKind::DisplayHelp => return Ok(Ctl::Print(error.to_string())),
        Err(error) => return Err(UsageError::Ctl(one_line(&error))),
    };
    let (mut words, mut leaf) = (Vec::new(), &matches);
    while let Some((word, under)) = leaf.subcommand() {
        words.push(word);
        leaf = under;
    }
    let words = words.join(" ");
    if words == "completions" {
        let shell = leaf.get_one::<String>("shell").map(String::as_str).unwrap_or_default();
        return Ok(Ctl::Print(completions::script(shell, command())));
    }
    if words == "loop" {
        return Ok(Ctl::Loop(Rounds {
            api_sock: leaf.get_one::<PathBuf>("api-sock").cloned(),
            json: leaf.get_flag("json"),
            patience: patience(leaf, PATIENCE),
            resets: leaf.get_flag("reset"),
            count: leaf.get_one::<u32>("count").copied().unwrap_or(1),
        }));
    }
    let found = verbs().find(|(_, verb)| verb.words == words);
    let (operation, verb) = found.ok_or_else(|| UsageError::Ctl("a command is missing".into()))?;
    Ok(Ctl::Call(call(operation, verb, leaf)))
}

/// How long an answer may take, if not as long as it may by default, in seconds.
fn patience(matches: &ArgMatches, default: u32) -> Duration {
    Duration::from_secs(matches.get_one::<u32>("timeout").copied().unwrap_or(default).into())
}

/// What a message of several lines says, up to where it tells about usage, in one.
fn one_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let said: Vec<&str> =
        text.lines().map(str::trim).take_while(|line| !line.starts_with("Usage:")).filter(|l| !l.is_empty()).collect();
    let said: Vec<&str> = said.into_iter().filter(|line| !line.starts_with("For more information")).collect();
    said.join(" ").trim_start_matches("error: ").to_owned()
}

/// All commands, each with the call that it makes.
fn verbs() -> impl Iterator<Item = (&'static Operation, &'static Verb)> {
    OPERATIONS.iter().flat_map(|operation| operation.commands.iter().map(move |verb| (operation, verb)))
}

/// When what a command says is taken.
fn when(operation: &Operation, verb: &Verb) -> When {
    verb.when.unwrap_or(operation.when)
}

fn summary(operation: &'static Operation, verb: &'static Verb) -> &'static str {
    if verb.summary.is_empty() { operation.summary } else { verb.summary }
}

/// The fields of a command, if it takes any, in three parts: the name in the path, the one without a name, the options.
fn parts(operation: &Operation, verb: &Verb) -> (Option<Field>, Option<Field>, Vec<Field>) {
    let shape = operation.body.or(operation.query).filter(|_| verb.body.is_none());
    let mut fields = shape.as_ref().map(fields::of).unwrap_or_default();
    let mut take = |name: Option<&str>| {
        let at = fields.iter().position(|field| Some(field.name.as_str()) == name)?;
        Some(fields.remove(at))
    };
    let name = take(operation.named().map(|(_, name)| name));
    let argument = take(verb.argument);
    (name, argument, fields)
}

/// The whole command line.
fn command() -> Command {
    let mut root = Command::new("ctl")
        .bin_name("vmm ctl")
        .no_binary_name(true)
        .disable_help_subcommand(true)
        .subcommand_required(true)
        .override_help(manual())
        .args([
            Arg::new("api-sock")
                .long("api-sock")
                .value_name("PATH")
                .value_parser(value_parser!(PathBuf))
                .value_hint(ValueHint::AnyPath)
                .help("The socket of the vmm's API [default: what COPPICE_API_SOCK says]"),
            Arg::new("timeout").long("timeout").value_name("SECONDS").value_parser(value_parser!(u32).range(1..)).help(
                format!("Longest that the answer may take [default: {PATIENCE}, or {LONG_PATIENCE} for snapshots]"),
            ),
            Arg::new("json").long("json").action(ArgAction::SetTrue).help("Print exactly one JSON document"),
        ])
        .mut_args(|arg| arg.global(true).help_heading("Options of every command"));
    for (operation, verb) in verbs() {
        let leaf = leaf(operation, verb);
        root = match verb.words.split_once(' ') {
            None => root.subcommand(leaf),
            Some((group, _)) => {
                if root.find_subcommand(group).is_none() {
                    root = root.subcommand(self::group(group));
                }
                root.mut_subcommand(group, |group| group.subcommand(leaf))
            }
        };
    }
    let rounds = Command::new("loop")
        .about("Ask the guest's agent for a sign of life, each time over a stream of its own, and tell how long that takes")
        .args([
            Arg::new("reset")
                .long("reset")
                .action(ArgAction::SetTrue)
                .help("Reset the guest after each answer: to its checkpoint, which must have been set"),
            Arg::new("count")
                .long("count")
                .value_name("N")
                .required(true)
                .value_parser(value_parser!(u32).range(1..))
                .help("How often"),
        ]);
    root.subcommand(rounds).subcommand(
        Command::new("completions")
            .about("Print a script that completes the commands and options of vmm, for a shell to source")
            .arg(
                Arg::new("shell")
                    .value_name("SHELL")
                    .required(true)
                    .value_parser(PossibleValuesParser::new(completions::SHELLS)),
            ),
    )
}

/// A word that others follow.
fn group(word: &'static str) -> Command {
    let under: Vec<&str> = verbs().filter_map(|(_, verb)| verb.words.strip_prefix(word)?.strip_prefix(' ')).collect();
    Command::new(word).about(under.join(", ")).subcommand_required(true).disable_help_subcommand(true)
}

/// A command that makes a call.
fn leaf(operation: &'static Operation, verb: &'static Verb) -> Command {
    let word = verb.words.rsplit(' ').next().unwrap_or(verb.words);
    let about = summary(operation, verb);
    let (name, argument, fields) = parts(operation, verb);
    let has_fields = argument.is_some() || !fields.is_empty();
    let mut told = format!("{about}.\n\n{} {}. {}", operation.method, operation.path, when(operation, verb).words());
    if let Some(body) = verb.body {
        let _ = write!(told, " It says {body}.");
    }
    let is_required = |field: &Field| field.required;
    let mut leaf = Command::new(word).about(about).long_about(told);
    if let Some(name) = name {
        leaf = leaf.arg(name.argument().value_name("NAME").required(true));
    }
    let without_body = |arg: Arg, required: bool| if required { arg.required_unless_present("body") } else { arg };
    if let Some(argument) = argument {
        leaf = leaf.arg(without_body(argument.argument(), is_required(&argument)));
    }
    for field in &fields {
        leaf = leaf.arg(without_body(field.option(), is_required(field)));
    }
    if let Some(field) = fields.iter().find(|field| Some(field.name.as_str()) == verb.flags) {
        leaf = with_flags(leaf, field);
    }
    if has_fields && operation.body.is_some() {
        let about =
            "The whole body, as JSON, in a FILE, or at standard input (-); what the other options say is put on it";
        let body = Arg::new("body").long("body").value_name("JSON|@FILE|-").help(wrap(about, 88).join("\n"));
        leaf = leaf.arg(body.value_parser(Reader { kind: Kind::Json, nullable: false }));
    }
    leaf
}

/// Adds a flag for each word of a field, of which one can be given, or the field by its name.
fn with_flags(leaf: Command, field: &Field) -> Command {
    let flag = |(word, about): &(String, String)| {
        let flag = Arg::new(word.clone()).long(word.replace('_', "-")).action(ArgAction::SetTrue);
        flag.help(wrap(&format!("As --{} {word}: {about}", field.name), 88).join("\n"))
    };
    let words = words(field);
    let one = ArgGroup::new("flags").args(words.iter().map(|(word, _)| word)).arg(&field.name).multiple(false);
    leaf.args(words.iter().map(flag)).group(one)
}

/// The words that a field can hold, each with what it means.
fn words(field: &Field) -> &[(String, String)] {
    if let Kind::Words(words) = &field.kind { words } else { &[] }
}

/// The call that a command makes with these arguments.
fn call(operation: &'static Operation, verb: &'static Verb, matches: &ArgMatches) -> Call {
    let given = |field: &str| matches.try_get_one::<Source>(field).ok().flatten().cloned();
    let flagged = |field: &Field| {
        let is_set = |word: &str| matches.try_get_one::<bool>(word).ok().flatten().copied().unwrap_or(false);
        let mut set = words(field).iter().filter(|_| Some(field.name.as_str()) == verb.flags);
        set.find(|(word, _)| is_set(word)).map(|(word, _)| Source::Here(word.clone().into()))
    };
    let (name, argument, options) = parts(operation, verb);
    let named = name.as_ref().and_then(|name| match given(&name.name) {
        Some(Source::Here(Value::String(name))) => Some(name),
        _ => None,
    });
    let all = name.into_iter().chain(argument).chain(options);
    let fields = all.filter_map(|field| Some((field.name.clone(), flagged(&field).or_else(|| given(&field.name))?)));
    let fields = fields.collect();
    let patience = if LONG.contains(&operation.id) { LONG_PATIENCE } else { PATIENCE };
    Call {
        api_sock: matches.get_one::<PathBuf>("api-sock").cloned(),
        json: matches.get_flag("json"),
        patience: self::patience(matches, patience),
        operation,
        name: named,
        whole: match verb.body {
            // A test reads them all.
            Some(body) => serde_json::from_str(body).ok().map(Source::Here),
            None => given("body"),
        },
        fields,
    }
}

impl Call {
    /// The path and the body of the call. `read` gives the text that is at a place.
    pub fn message(&self, read: impl Fn(&Source) -> io::Result<Vec<u8>>) -> Result<(String, Vec<u8>), CtlError> {
        let operation = self.operation;
        let mut path = operation.path.to_owned();
        if let (Some((start, _)), Some(name), Some(field)) = (operation.named(), &self.name, operation.name_field()) {
            path = format!("{start}{name}");
            // The vmm would say the same, but not of a name that makes it another path.
            let call = format!("{} {path}", operation.method);
            config::check_id(&field, name).map_err(|source| CtlError::Name { call, source })?;
        }
        let document = |source: &Source| -> Result<Value, CtlError> {
            let text = read(source).map_err(|e| CtlError::Read { place: source.place(), source: e })?;
            strict::value(&text).map_err(|e| CtlError::Document { place: source.place(), reason: e.to_string() })
        };
        let mut body = match &self.whole {
            None => Map::new(),
            Some(source) => match document(source)? {
                Value::Object(members) => members,
                _ => {
                    let reason = "a body is a JSON object".into();
                    return Err(CtlError::Document { place: source.place(), reason });
                }
            },
        };
        for (name, source) in &self.fields {
            body.insert(name.clone(), document(source)?);
        }
        if operation.query.is_some() && !body.is_empty() {
            let pairs: Vec<String> = body.iter().map(|(name, value)| format!("{name}={value}")).collect();
            path = format!("{path}?{}", pairs.join("&"));
        }
        let body = operation.body.map(|_| Value::Object(body).to_string().into_bytes());
        Ok((path, body.unwrap_or_default()))
    }
}

/// What `vmm ctl --help` prints.
fn manual() -> String {
    let mut text = String::from(ABOUT);
    for at in [When::Always, When::BeforeStart, When::Fresh, When::AfterStart] {
        let _ = writeln!(text, "\n{}:", at.words().trim_end_matches('.'));
        for (operation, verb) in verbs().filter(|(operation, verb)| when(operation, verb) == at) {
            let about = wrap(summary(operation, verb), LINE - WORDS - 4);
            for (number, line) in about.iter().enumerate() {
                let words = if number == 0 { usage(operation, verb) } else { String::new() };
                let _ = writeln!(text, "  {words:<WORDS$}  {line}");
            }
        }
    }
    let long = LONG.iter().filter_map(|id| OPERATIONS.iter().find(|operation| operation.id == *id));
    let long: Vec<&str> = long.flat_map(|operation| operation.commands.iter().map(|verb| verb.words)).collect();
    text + &REST
        .replace("{PATIENCE}", &PATIENCE.to_string())
        .replace("{LONG_PATIENCE}", &LONG_PATIENCE.to_string())
        .replace("{LONG}", &long.join(", "))
}

/// Room for a command and its arguments in the manual.
const WORDS: usize = 24;

/// A command with what it must be given, for the manual.
fn usage(operation: &Operation, verb: &Verb) -> String {
    let (name, argument, fields) = parts(operation, verb);
    let mut text = verb.words.to_owned();
    text += name.map_or("", |_| " NAME");
    text += &argument.map(|field| format!(" {}", field.value_name())).unwrap_or_default();
    text + if fields.is_empty() { "" } else { " ..." }
}

const ABOUT: &str = "\
Commands a vmm that runs with --api-sock PATH, over its REST API. Every call of the API has a command; whatever a
command says is sent as it is, and judged by the vmm.

Usage: vmm ctl [--api-sock PATH] COMMAND ... [options]
       vmm ctl COMMAND --help                 what a command takes, and what that means
       vmm ctl loop --reset --count N         ask the guest's agent, then reset the guest; tell the rate
       vmm ctl completions bash|zsh|fish      a script that completes commands and options of vmm

Commands, by when they are taken (`...`: they take options):
";

const REST: &str = "
Options of every command, before or after it:
  --api-sock PATH    the socket of the vmm's API; without it, the environment's COPPICE_API_SOCK says
  --timeout SECONDS  longest that the answer may take: {PATIENCE} unless told otherwise, and {LONG_PATIENCE} for
                     {LONG}
  --json             print exactly one JSON document: the answer as the vmm gave it, {\"done\": true} where it has
                     nothing to tell, or {\"text\": ...} where the answer is text
  --help (-h)

Options of a command are the fields of its call, with `-` for `_`. A flag (`--overlay`) means true; `--overlay=false`
takes it back. A field that can be absent takes the word `null`. A field that holds a document takes JSON, `@FILE`, or
`-` for standard input, and so does `--body`, which gives the whole body; other options are put on it.

Examples:
  export COPPICE_API_SOCK=api.sock
  vmm --api-sock api.sock < /dev/null &
  vmm ctl machine set --vcpu-count 2 --mem-size-mib 256
  vmm ctl boot-source set --embedded-guest
  vmm ctl drive set root --path-on-host root.ext4 --is-root-device --overlay
  vmm ctl network set eth0 --host-dev-name tap0 --tx-rate-limiter '{\"ops\": {\"size\": 1000, \"refill_time\": 1000}}'
  vmm ctl balloon set --body @balloon.json
  vmm ctl start
  vmm ctl info --json
  vmm ctl pause
  vmm ctl snapshot create snap
  vmm --api-sock clone.sock < /dev/null &
  vmm ctl --api-sock clone.sock snapshot load snap --resume-vm

Ends with 0 when it is done, 1 when it failed or was refused, with one line on standard error that says why, and 2 on
bad usage. Only results go to standard output.
";

#[cfg(test)]
mod tests {
    use super::*;
    use api_spec::operations::Answer;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn words(line: &[&str]) -> Vec<OsString> {
        line.iter().map(OsString::from).collect()
    }

    #[track_caller]
    fn parsed(line: &[&str]) -> Call {
        match parse(words(line)) {
            Ok(Ctl::Call(call)) => call,
            other => panic!("{line:?}: {other:?}"),
        }
    }

    /// The method, path and body that a command line stands for, where files hold their own path as JSON.
    #[track_caller]
    fn message(line: &[&str]) -> (&'static str, String, Value) {
        let call = parsed(line);
        let read = |source: &Source| {
            Ok(match source {
                Source::Here(value) => value.to_string(),
                Source::File(path) => format!("{{\"file\":{:?}}}", path.display()),
                Source::Stdin => "{\"stdin\":1}".to_owned(),
            }
            .into_bytes())
        };
        let (path, body) = call.message(read).unwrap();
        let body = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).unwrap() };
        (call.operation.method, path, body)
    }

    fn usage_error(line: &[&str]) -> String {
        let error = parse(words(line)).expect_err("it is bad usage").to_string();
        assert!(!error.contains('\n') && !error.starts_with("error"), "{error}");
        error
    }

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn every_example_of_the_table_can_be_said_as_a_command() {
        for (operation, verb) in verbs() {
            let shape = operation.body.or(operation.query).filter(|_| verb.body.is_none());
            let example: Value = shape.map_or(Value::Null, |shape| serde_json::from_str(shape.example).unwrap());
            let mut line: Vec<String> = verb.words.split(' ').map(str::to_owned).collect();
            let (name, argument, _) = parts(operation, verb);
            let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let plain = [name, argument].into_iter().flatten().map(|field| field.name).collect::<Vec<_>>();
            line.extend(plain.iter().map(|field| text(&example[field])));
            for (field, value) in example.as_object().into_iter().flatten().filter(|(field, _)| !plain.contains(field))
            {
                line.push(format!("--{}={}", field.replace('_', "-"), text(value)));
            }
            let line: Vec<&str> = line.iter().map(String::as_str).collect();
            let (method, path, body) = message(&line);
            assert_eq!(method, operation.method, "{line:?}");
            let bare = path.split('?').next().unwrap();
            assert_eq!(api_spec::operations::find(method, bare).unwrap().0.id, operation.id, "{line:?}");
            match (operation.body, verb.body) {
                (_, Some(fixed)) => assert_eq!(body, serde_json::from_str::<Value>(fixed).unwrap()),
                (Some(_), None) => assert_eq!(body, example, "{line:?}"),
                (None, None) => assert_eq!(body, Value::Null, "{line:?}"),
            }
            if operation.query.is_some() {
                assert_eq!(path, "/vm/memory-map?start=0&max_runs=100");
            }
        }
    }

    #[test]
    fn a_body_can_come_from_elsewhere_and_options_are_put_on_it() {
        let drive = |line: &[&str]| message(&[&["drive", "set", "a"], line].concat()).2;
        assert_eq!(drive(&["--body", "@x"]), serde_json::json!({"file": "x", "drive_id": "a"}));
        assert_eq!(drive(&["--body", "-"]), serde_json::json!({"stdin": 1, "drive_id": "a"}));
        let body = r#"{"drive_id": "b", "path_on_host": "p", "overlay": true}"#;
        let put_on = serde_json::json!({"drive_id": "a", "path_on_host": "p", "overlay": false});
        assert_eq!(drive(&["--body", body, "--overlay=false"]), put_on);
        let limit = serde_json::json!({"file": "r"});
        assert_eq!(drive(&["--path-on-host", "p", "--rate-limiter", "@r"])["rate_limiter"], limit);
        let body = r#"{"amount_mib": 5}"#;
        assert_eq!(message(&["balloon", "update", "--body", body]).2, serde_json::json!({"amount_mib": 5}));
        for line in [&["stop", "--force"][..], &["stop", "--mode", "force"], &["stop", "--body", r#"{"mode":"force"}"#]]
        {
            assert_eq!(message(line).2, serde_json::json!({"mode": "force"}), "{line:?}");
        }
        assert_eq!(message(&["stop"]).2, serde_json::json!({}));
        assert_eq!(message(&["machine", "update", "--max-private-mib", "null"]).2["max_private_mib"], Value::Null);
        assert!(message(&["machine", "update", "--max-private-mib", "null"]).2.get("max_private_mib").is_some());
        let call = parsed(&["drive", "set", "a", "--body", "[1]"]);
        let refused = call.message(|_| Ok(b"[1]".to_vec())).unwrap_err();
        assert_eq!(refused.to_string(), "the command line is not what it should be: a body is a JSON object");
    }

    #[test]
    fn a_name_cannot_become_another_path() {
        for name in ["a/b", "..", "a b", "a\r\nb", "a?b", ""] {
            let refused = parsed(&["drive", "set", name, "--path-on-host", "p"]).message(|_| Ok(b"1".to_vec()));
            let refused = refused.expect_err(name).to_string();
            assert!(refused.contains("drives.drive_id is") && refused.contains("1 to 64 letters"), "{refused}");
        }
    }

    #[test]
    fn options_of_every_command_come_before_or_after_it() {
        let socket = Some(PathBuf::from("s"));
        for line in [["--api-sock", "s", "drive", "update", "a"], ["drive", "update", "a", "--api-sock", "s"]] {
            let call = parsed(&line);
            assert_eq!((call.api_sock, call.json, call.patience), (socket.clone(), false, Duration::from_secs(60)));
        }
        assert_eq!(parsed(&["snapshot", "create", "d"]).patience, Duration::from_secs(600));
        assert_eq!(parsed(&["--timeout", "5", "snapshot", "create", "d"]).patience, Duration::from_secs(5));
        assert!(parsed(&["info", "--json"]).json && parsed(&["--json", "info"]).json);
    }

    #[test]
    fn bad_usage_is_one_line() {
        assert!(usage_error(&["drive", "set", "a"]).contains("--path-on-host"));
        assert!(usage_error(&["machine", "set", "--mem-size-mib", "much"]).contains("--mem-size-mib much: must be"));
        assert!(usage_error(&["machine", "set", "--memory", "5"]).contains("--memory"));
        assert!(usage_error(&["drvie", "set"]).contains("drive"), "what is similar is suggested");
        assert!(usage_error(&["drive"]).contains("subcommand"));
        assert!(usage_error(&[]).contains("subcommand"));
        for line in [
            &["snapshot", "create"][..],
            &["pause", "now"],
            &["stop", "--save", "--force"],
            &["stop", "--save", "--shutdown"],
            &["stop", "--save", "--mode", "force"],
            &["stop", "--save=false"],
            &["info", "--timeout", "0"],
            &["info", "--timeout", "x"],
            &["info", "--api-sock"],
            &["completions", "csh"],
            &["completions"],
            &["loop"],
            &["loop", "--count", "0"],
            &["drive", "set", "a", "--path-on-host", "p", "--overlay", "maybe"],
            &["drive", "set", "a", "--path-on-host", "p", "--overlay=maybe"],
            &["drive", "set", "a", "--path-on-host", "p", "--path-on-host", "q"],
        ] {
            usage_error(line);
        }
    }

    #[test]
    fn rounds_are_asked_for_with_their_number() {
        let loops = |line: &[&str]| match parse(words(line)) {
            Ok(Ctl::Loop(rounds)) => rounds,
            other => panic!("{line:?}: {other:?}"),
        };
        let rounds = loops(&["loop", "--reset", "--count", "7", "--json", "--api-sock", "a"]);
        assert_eq!((rounds.resets, rounds.count, rounds.json), (true, 7, true));
        assert_eq!(rounds.api_sock.as_deref(), Some("a".as_ref()));
        assert!(!loops(&["loop", "--count", "1", "--timeout", "3"]).resets);
        assert_eq!(loops(&["loop", "--count", "1", "--timeout", "3"]).patience, Duration::from_secs(3));
    }

    #[test]
    fn help_is_a_manual() {
        let help = |line: &[&str]| match parse(words(line)) {
            Ok(Ctl::Print(text)) => text,
            other => panic!("{line:?}: {other:?}"),
        };
        let manual = help(&["--help"]);
        for (operation, verb) in verbs() {
            assert!(manual.contains(&format!("\n  {}", verb.words)), "{}", verb.words);
            let mut line: Vec<&str> = verb.words.split(' ').collect();
            line.push("--help");
            let text = help(&line);
            assert!(text.contains(when(operation, verb).words()) && text.contains(operation.path), "{text}");
            let (name, argument, options) = parts(operation, verb);
            for field in name.iter().chain(&argument).chain(&options) {
                assert!(text.contains(field.help.lines().next().unwrap()), "{}: {text}", field.name);
            }
            for field in options {
                assert!(text.contains(&format!("--{}", field.name.replace('_', "-"))), "{}: {text}", field.name);
            }
        }
        assert!(manual.lines().all(|line| line.chars().count() <= 120), "{manual}");
        assert_eq!(help(&["help"]), manual);
        assert_eq!(help(&["help", "drive", "set"]), help(&["drive", "set", "--help"]));
        assert_eq!(help(&["-h"]), manual);
        let start = manual.find("Before a VM was started:").unwrap();
        assert!(manual[start..].contains("\n  start "), "what boots is taken before the start only");
    }

    #[test]
    fn a_command_is_made_of_known_words_only() {
        // The glossary of docs/rest-api.md.
        const GLOSSARY: [&str; 35] = [
            "fork",
            "info",
            "version",
            "config",
            "machine",
            "boot-source",
            "drive",
            "network",
            "vsock",
            "entropy",
            "serial",
            "balloon",
            "saved-state",
            "statistics",
            "interval",
            "start",
            "pause",
            "resume",
            "save",
            "stop",
            "checkpoint",
            "reset",
            "stats",
            "memory-map",
            "snapshot",
            "create",
            "load",
            "status",
            "cancel",
            "logger",
            "metrics",
            "flush",
            "show",
            "set",
            "update",
        ];
        let used: BTreeSet<&str> = verbs().flat_map(|(_, verb)| verb.words.split(' ')).collect();
        assert_eq!(used, BTreeSet::from(GLOSSARY));
        for (operation, verb) in verbs() {
            // What only tells is never called what changes something, and the other way round.
            let word = verb.words.rsplit(' ').next().unwrap();
            let changes = matches!(operation.answer, Answer::Done);
            assert!(word != "set" || (operation.method == "PUT" && changes), "{}", verb.words);
            assert!(word != "update" || (operation.method == "PATCH" && changes), "{}", verb.words);
            assert!(word != "show" || operation.method == "GET", "{}", verb.words);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn no_arguments_make_parsing_panic(verb in 0..30_usize, args in prop::collection::vec("(--[a-z-]{0,12}=?)?\\PC{0,8}", 0..5)) {
            let verb = verbs().nth(verb).map_or("", |(_, verb)| verb.words);
            let args: Vec<&str> = verb.split(' ').chain(args.iter().map(String::as_str)).collect();
            if let Ok(Ctl::Call(call)) = parse(words(&args)) {
                let _ = call.message(|_| Ok(b"{}".to_vec()));
            }
        }
    }
}
