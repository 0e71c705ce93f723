//! What the subscriber lets through, and how it changes.

use super::*;
use serde_json::Value;
use std::fs;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::MutexGuard;
use tempfile::TempDir;
use tracing::subscriber::with_default;
use tracing::{debug, error, info, warn};

/// A logger that is this thread's alone, and its file.
struct Rig {
    logger: Arc<Logger>,
    dir: TempDir,
    /// `tracing` keeps the most verbose level of all loggers that there are: there is one at a time.
    _alone: MutexGuard<'static, ()>,
}

impl Rig {
    fn new(level: Level) -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings { path: Some(dir.path().join("log")), show_level: false, ..Settings::new(level, "vm") };
        let sink = Sink::open(settings.path.as_deref()).unwrap();
        Rig { logger: Arc::new(Logger::new(settings, sink)), dir, _alone: alone }
    }

    fn log(&self, what: impl FnOnce()) {
        with_default(self.logger.clone(), what);
    }

    fn change(&self, change: Change) {
        self.logger.change(change).unwrap();
    }

    /// The lines of a file without their times.
    fn lines_of(&self, path: &Path) -> Vec<String> {
        let text = fs::read_to_string(path).unwrap();
        text.lines().map(|line| line.split_once(' ').unwrap().1.to_owned()).collect()
    }

    fn lines(&self) -> Vec<String> {
        self.lines_of(&self.dir.path().join("log"))
    }
}

#[test]
fn words() {
    for level in Level::ALL {
        assert_eq!(level.to_string().parse(), Ok(level));
    }
    for (word, level) in [("Warning", Level::Warn), ("WARN", Level::Warn), ("Off", Level::Off), ("tRace", Level::Trace)]
    {
        assert_eq!(word.parse(), Ok(level));
    }
    for word in ["", "loud", "warn ", "warnings"] {
        assert_eq!(word.parse::<Level>(), Err(NoLevel));
    }
    assert_eq!(("human".parse(), "json".parse()), (Ok(Format::Human), Ok(Format::Json)));
    assert_eq!("xml".parse::<Format>(), Err(NoFormat));
}

#[test]
fn a_module_is_a_path_not_any_prefix() {
    for (target, module, within) in [
        ("vmm::api", "vmm::api", true),
        ("vmm::api::route", "vmm::api", true),
        ("vmm::apis", "vmm::api", false),
        ("vmm", "vmm::api", false),
        ("vmm::api", "api", false),
        ("vmm::api", "", true),
    ] {
        assert_eq!(is_within(target, module), within, "{target} within {module}");
    }
}

#[test]
fn the_level_decides_and_changes_at_once() {
    let rig = Rig::new(Level::Warn);
    let say = || {
        debug!("debug");
        info!("info");
        warn!("warn");
        error!("error");
    };
    rig.log(|| {
        for level in [None, Some(Level::Info), Some(Level::Off), Some(Level::Error)] {
            rig.change(Change { level, ..Change::default() });
            say();
        }
    });
    assert_eq!(rig.lines(), ["warn", "error", "info", "warn", "error", "error"]);
}

#[test]
fn fields_follow_the_message() {
    let rig = Rig::new(Level::Info);
    rig.log(|| {
        info!(pause_us = 5, share = 0.5, dirty = true, below = -1, name = "a b", path = ?Path::new("p"), "snapshot {}", 1);
        rig.change(Change { format: Some(Format::Json), show_origin: Some(true), ..Change::default() });
        info!(pause_us = 5, wide = u128::MAX, "written");
    });
    let text = fs::read_to_string(rig.dir.path().join("log")).unwrap();
    let (human, json) = text.trim_end().split_once('\n').unwrap();
    let expected = " snapshot 1 pause_us=5 share=0.5 dirty=true below=-1 name=a b path=\"p\"";
    assert!(human.ends_with(expected), "{human}");
    let value: Value = serde_json::from_str(json).unwrap();
    assert_eq!((&value["message"], &value["fields"]["pause_us"]), (&"written".into(), &5.into()));
    assert_eq!(
        (&value["level"], &value["id"], &value["target"]),
        (&"info".into(), &"vm".into(), &module_path!().into())
    );
    assert_eq!(value["fields"]["wide"], u128::MAX.to_string(), "what JSON has no number for");
    assert!(value["origin"].as_str().unwrap().contains("logging/tests.rs:"), "{json}");
}

#[test]
fn a_request_is_told_while_its_span_is_entered() {
    let rig = Rig::new(Level::Warn);
    rig.log(|| {
        let span = request_span(7);
        warn!("before");
        span.in_scope(|| {
            warn!("within");
            request_span(0).in_scope(|| warn!("inner"));
            span.in_scope(|| warn!("again"));
            tracing::error_span!("other", id = 9).in_scope(|| warn!("still"));
            warn!("yet");
        });
        warn!("after");
        let dispatch = dispatcher::get_default(Dispatch::clone);
        let other = move || dispatcher::with_default(&dispatch, || span.in_scope(|| warn!("elsewhere")));
        std::thread::spawn(other).join().unwrap();
    });
    let expected = [
        "before",
        "request=7 within",
        "request=0 inner",
        "request=7 again",
        "request=7 still",
        "request=7 yet",
        "after",
        "request=7 elsewhere",
    ];
    assert_eq!(rig.lines(), expected);
}

#[test]
fn a_module_filters_all_but_the_logs_own_lines() {
    let rig = Rig::new(Level::Info);
    rig.log(|| {
        let say = || {
            info!(target: "vmm::api::route", "api");
            info!(target: "vmm::machine", "machine");
        };
        rig.change(Change { module: Some("vmm::api".into()), ..Change::default() });
        request_span(3).in_scope(say);
        warn_once("a module filters", "once");
        warn_once("a module filters", "twice");
        rig.change(Change { module: Some(String::new()), ..Change::default() });
        say();
    });
    assert_eq!(rig.lines(), ["request=3 api", "once", "api", "machine"]);
}

#[test]
fn a_change_is_made_whole_or_not_at_all() {
    let rig = Rig::new(Level::Warn);
    let other = rig.dir.path().join("other");
    rig.log(|| {
        warn!("old");
        let before = rig.logger.in_force().settings.clone();
        let bad = Change {
            level: Some(Level::Off),
            path: Some(rig.dir.path().join("none/log")),
            show_level: Some(true),
            ..Change::default()
        };
        let error = rig.logger.change(bad).unwrap_err().to_string();
        assert!(error.contains("none/log to append lines to it: No such file"), "{error}");
        assert_eq!(rig.logger.in_force().settings, before);
        warn!("still");
        rig.change(Change { path: Some(other.clone()), show_level: Some(true), ..Change::default() });
        warn!("new");
    });
    assert_eq!(rig.lines(), ["old", "still"]);
    assert_eq!(rig.lines_of(&other), ["WARN  new"]);
}

#[test]
fn a_log_that_was_moved_is_begun_anew() {
    let rig = Rig::new(Level::Warn);
    let (path, moved) = (rig.dir.path().join("log"), rig.dir.path().join("moved"));
    rig.log(|| {
        warn!("one");
        fs::rename(&path, &moved).unwrap();
        warn!("two");
        rig.change(Change { path: Some(path), ..Change::default() });
        warn!("three");
    });
    assert_eq!(rig.lines_of(&moved), ["one", "two"]);
    assert_eq!(rig.lines(), ["three"]);
}

#[test]
fn lost_lines_are_a_line() {
    let rig = Rig::new(Level::Warn);
    let fifo = rig.dir.path().join("fifo");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    rig.log(|| {
        rig.change(Change { path: Some(fifo.clone()), format: Some(Format::Json), ..Change::default() });
        let line = "x".repeat(1000);
        // More than any pipe that nobody has made larger holds.
        (0..100).for_each(|_| warn!("{line}"));
        let mut reader = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&fifo).unwrap();
        let mut text = Vec::new();
        let _ = reader.read_to_end(&mut text);
        let kept = text.split(|byte| *byte == b'\n').count() - 1;
        warn!("after");
        text.clear();
        let _ = reader.read_to_end(&mut text);
        let text = String::from_utf8(text).unwrap();
        let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines[0]["fields"]["lines"], 100 - kept);
        assert_eq!((lines.len(), &lines[1]["message"]), (2, &"after".into()));
    });
}
