//! The log: a line a record, never guest data. Any thread may write to it.
//!
//! This is the subscriber of `tracing`, of which it has what two small programs need: events, and one kind of span,
//! which says what request of the API they belong to. What is not logged costs a load and a comparison.
//!
//! Records of crates that use `log` instead (virtio-queue does) are not received, on purpose: a guest can bring those about
//! without bound. Devices say themselves, in bounds, what is wrong with a queue.

mod record;
mod sink;

pub use record::timestamp;
use record::{Record, Said, one_line};
pub use sink::Sink;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt::{self, Debug, Display};
use std::io::{self, Write};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Mutex, PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id};
use tracing::subscriber::{Interest, Subscriber};
use tracing::{Dispatch, Event, Metadata, Span, callsite, dispatcher};

/// What is logged: records of a level, and graver ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Nothing.
    Off,
    /// What could not be done.
    Error,
    /// What somebody should look at.
    Warn,
    /// What was done.
    Info,
    /// What helps to find errors.
    Debug,
    /// Everything.
    Trace,
}

/// A word that is no level.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("a level is off, error, warn, info, debug or trace")]
pub struct NoLevel;

impl Level {
    const ALL: [Level; 6] = [Level::Off, Level::Error, Level::Warn, Level::Info, Level::Debug, Level::Trace];

    fn word(self) -> &'static str {
        match self {
            Level::Off => "off",
            Level::Error => "error",
            Level::Warn => "warn",
            Level::Info => "info",
            Level::Debug => "debug",
            Level::Trace => "trace",
        }
    }

    fn filter(self) -> LevelFilter {
        match self {
            Level::Off => LevelFilter::OFF,
            Level::Error => LevelFilter::ERROR,
            Level::Warn => LevelFilter::WARN,
            Level::Info => LevelFilter::INFO,
            Level::Debug => LevelFilter::DEBUG,
            Level::Trace => LevelFilter::TRACE,
        }
    }
}

impl FromStr for Level {
    type Err = NoLevel;

    /// Case does not matter, and `warning` means the same as `warn`.
    fn from_str(word: &str) -> Result<Self, NoLevel> {
        match word {
            _ if word.eq_ignore_ascii_case("warning") => Ok(Level::Warn),
            _ => Level::ALL.into_iter().find(|level| word.eq_ignore_ascii_case(level.word())).ok_or(NoLevel),
        }
    }
}

impl Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// How a line is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// For people: `2026-11-26T07:35:22.123456Z INFO  request=7 snapshot written pause_us=431`.
    Human,
    /// For programs: an object of JSON.
    Json,
}

/// A word that is no format.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("a format is human or json")]
pub struct NoFormat;

impl FromStr for Format {
    type Err = NoFormat;

    fn from_str(word: &str) -> Result<Self, NoFormat> {
        match word {
            "human" => Ok(Format::Human),
            "json" => Ok(Format::Json),
            _ => Err(NoFormat),
        }
    }
}

/// What is logged, how and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// What is logged.
    pub level: Level,
    /// How it is written.
    pub format: Format,
    /// A file, FIFO or terminal; standard error if there is none.
    pub path: Option<PathBuf>,
    /// Whether lines for people tell their level. Those for programs do.
    pub show_level: bool,
    /// Whether lines tell where in our source they come from.
    pub show_origin: bool,
    /// The module, such as `vmm::api`, that records have to come from, or from one within it. Empty is the same as none.
    pub module: Option<String>,
    /// What lines for programs call this process: the name of its VM.
    pub id: String,
}

impl Settings {
    /// Lines for people, with their level, on standard error.
    pub fn new(level: Level, id: impl Into<String>) -> Self {
        Settings {
            level,
            format: Format::Human,
            path: None,
            show_level: true,
            show_origin: false,
            module: None,
            id: id.into(),
        }
    }

    /// Whether what this place in the code says is to be logged. What the log has to say itself is, whatever the module.
    fn want(&self, place: &Metadata) -> bool {
        if *place.level() > self.level.filter() {
            return false;
        }
        let own = place.target() == module_path!();
        match place.is_span() {
            true => own && place.name() == REQUEST,
            false => own || self.module.as_deref().is_none_or(|module| is_within(place.target(), module)),
        }
    }
}

/// Whether a module is `module`, or within it.
fn is_within(target: &str, module: &str) -> bool {
    let rest = target.strip_prefix(module);
    module.is_empty() || rest.is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

/// A change of what is logged, how and where: what is `None` stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// See [`Settings::level`].
    pub level: Option<Level>,
    /// See [`Settings::format`].
    pub format: Option<Format>,
    /// See [`Settings::path`]. The path that there is already is opened again: somebody may have moved the file.
    pub path: Option<PathBuf>,
    /// See [`Settings::show_level`].
    pub show_level: Option<bool>,
    /// See [`Settings::show_origin`].
    pub show_origin: Option<bool>,
    /// See [`Settings::module`].
    pub module: Option<String>,
}

impl Change {
    fn of(self, now: &Settings) -> Settings {
        Settings {
            level: self.level.unwrap_or(now.level),
            format: self.format.unwrap_or(now.format),
            path: self.path.or_else(|| now.path.clone()),
            show_level: self.show_level.unwrap_or(now.show_level),
            show_origin: self.show_origin.unwrap_or(now.show_origin),
            module: self.module.or_else(|| now.module.clone()),
            id: now.id.clone(),
        }
    }
}

/// Why lines cannot go where they should.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// It cannot be opened.
    #[error("cannot open {path} to append lines to it: {source}")]
    Open {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is a disk, which lines would destroy, or another device.
    #[error("{0} is no place for lines: give a file, a FIFO or a terminal")]
    NoPlace(PathBuf),
}

/// The logger of this process.
static LOGGER: LazyLock<Arc<Logger>> = LazyLock::new(|| {
    let settings = Settings::new(Level::Off, "");
    Arc::new(Logger::new(settings, Sink::stderr()))
});

/// Starts logging. If it was started before, the settings are replaced.
pub fn start(settings: Settings) -> Result<(), LogError> {
    LOGGER.replace(settings)?;
    // Fails if it was started before, and is there then.
    let _ = dispatcher::set_global_default(Dispatch::new(LOGGER.clone()));
    Ok(())
}

/// Changes what is logged, how and where. After a failure all is as before.
pub fn change(change: Change) -> Result<(), LogError> {
    LOGGER.change(change)
}

/// What is in force.
pub fn settings() -> Settings {
    LOGGER.in_force().settings.clone()
}

/// The name of the span that [`request_span`] makes.
const REQUEST: &str = "request";

/// A span for the work on a request of the API: what is logged on a thread that has entered it tells the number. Another
/// thread that works on the request is to be given a clone of it.
pub fn request_span(id: u64) -> Span {
    // As grave as can be, so that it is there for whatever is logged.
    tracing::error_span!(REQUEST, id)
}

/// Logs a warning, but only the first one of its `key` in this process.
pub fn warn_once(key: &'static str, message: impl Display) {
    static SAID: Mutex<BTreeSet<&str>> = Mutex::new(BTreeSet::new());
    if SAID.lock().unwrap_or_else(PoisonError::into_inner).insert(key) {
        tracing::warn!("{message}");
    }
}

/// Says why this process, an instance of `program`, fails, in one line on standard error, whatever names and messages of
/// others are in it; and, if the log goes elsewhere, there too. Only the first call says anything: whichever thread comes
/// first, the reason is said once.
pub fn last_words(program: &str, reason: &dyn Display) {
    static SAID: AtomicBool = AtomicBool::new(false);
    if !SAID.swap(true, Ordering::SeqCst) {
        // There is nowhere to report that standard error is gone.
        let _ = io::stderr().lock().write_all(one_line(&format!("{program}: {reason}")).as_bytes());
        if LOGGER.in_force().settings.path.is_some() {
            tracing::error!("{reason}");
        }
    }
}

/// The subscriber.
struct Logger {
    /// Replaced as a whole: whoever logs takes hold of it, and neither waits for whoever changes it nor mixes old and new.
    in_force: RwLock<Arc<InForce>>,
    /// Held while it is changed.
    changing: Mutex<()>,
}

/// What is in force at a time.
struct InForce {
    settings: Settings,
    sink: Arc<Mutex<Sink>>,
}

impl Logger {
    fn new(settings: Settings, sink: Sink) -> Self {
        let in_force = InForce { settings, sink: Arc::new(Mutex::new(sink)) };
        Logger { in_force: RwLock::new(Arc::new(in_force)), changing: Mutex::new(()) }
    }

    fn in_force(&self) -> Arc<InForce> {
        self.in_force.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn replace(&self, settings: Settings) -> Result<(), LogError> {
        let sink = Sink::open(settings.path.as_deref())?;
        self.update(|_| InForce { settings, sink: Arc::new(Mutex::new(sink)) });
        Ok(())
    }

    fn change(&self, change: Change) -> Result<(), LogError> {
        let sink = change.path.as_deref().map(|path| Sink::open(Some(path))).transpose()?;
        self.update(|now| InForce {
            settings: change.of(&now.settings),
            sink: sink.map_or_else(|| now.sink.clone(), |sink| Arc::new(Mutex::new(sink))),
        });
        Ok(())
    }

    fn update(&self, next: impl FnOnce(&InForce) -> InForce) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let next = Arc::new(next(&self.in_force()));
        *self.in_force.write().unwrap_or_else(PoisonError::into_inner) = next;
        // Takes over the level that all places in the code compare theirs with.
        callsite::rebuild_interest_cache();
    }
}

impl InForce {
    fn write(&self, record: &Record) {
        let line = record.line(&self.settings);
        let note = |lost: u64| {
            let note = Record {
                time: record.time,
                level: tracing::Level::WARN,
                request: None,
                target: module_path!(),
                origin: Some((file!(), line!())),
                said: Said {
                    message: "lines were lost here, for want of a reader or of space".into(),
                    fields: vec![("lines", lost.into())],
                },
            };
            note.line(&self.settings)
        };
        self.sink.lock().unwrap_or_else(PoisonError::into_inner).put(&line, note);
    }
}

thread_local! {
    /// The spans that this thread is in, the innermost last.
    static ENTERED: RefCell<Vec<Id>> = const { RefCell::new(Vec::new()) };
}

/// Numbers of spans are not 0: that of a request's span is one more than the request's own. So nothing needs to be kept.
fn span_of(request: u64) -> Id {
    Id::from_u64(request.saturating_add(1))
}

fn request_of(span: &Id) -> u64 {
    span.into_u64() - 1
}

/// The number of a request, once visited.
#[derive(Default)]
struct Number(u64);

impl Visit for Number {
    fn record_u64(&mut self, _: &Field, value: u64) {
        self.0 = value;
    }

    fn record_debug(&mut self, _: &Field, _: &dyn Debug) {}
}

impl Subscriber for Logger {
    /// Asks [`Self::enabled`] each time, if the level that all places in the code compare theirs with lets it: an answer
    /// that was kept could outlive a change made at the same moment.
    fn register_callsite(&self, _: &'static Metadata<'static>) -> Interest {
        Interest::sometimes()
    }

    fn enabled(&self, place: &Metadata<'_>) -> bool {
        self.in_force().settings.want(place)
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.in_force().settings.level.filter())
    }

    fn event(&self, event: &Event<'_>) {
        let place = event.metadata();
        let mut said = Said::default();
        event.record(&mut said);
        self.in_force().write(&Record {
            time: SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default(),
            level: *place.level(),
            // A thread that is ending is in no span.
            request: ENTERED.try_with(|spans| spans.borrow().last().map(request_of)).ok().flatten(),
            target: place.target(),
            origin: place.file().zip(place.line()),
            said,
        });
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        let mut number = Number::default();
        span.record(&mut number);
        span_of(number.0)
    }

    fn enter(&self, span: &Id) {
        let _ = ENTERED.try_with(|spans| spans.borrow_mut().push(span.clone()));
    }

    fn exit(&self, span: &Id) {
        let _ = ENTERED.try_with(|spans| {
            let mut spans = spans.borrow_mut();
            if let Some(at) = spans.iter().rposition(|entered| entered == span) {
                spans.remove(at);
            }
        });
    }

    fn record(&self, _: &Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}
}

#[cfg(test)]
mod tests;
