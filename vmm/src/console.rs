//! The guest's console: what it writes to COM1 goes to one place of the host, and what is typed there goes to COM1.
//!
//! | console | output | input |
//! |---|---|---|
//! | standard input and output (default) | standard output | standard input, unless it is `/dev/null` |
//! | file | appended to a file, created with mode 0600, up to 64 MiB; or a FIFO, or a terminal | none |
//! | pty | a new pseudo-terminal, raw, whose name `GET /` tells | the same |
//!
//! Output passes through [`Output`], so that no reader of ours can hold up the guest.

use crate::devices::lock;
use crate::devices::output::Output;
use crate::devices::serial::Serial;
use crate::sandbox::{self, Kind};
use rustix::fs::{Mode, OFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::OptionalActions;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

/// Where a guest's console is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Place {
    /// Our standard input and output.
    #[default]
    Stdio,
    /// This file.
    File(PathBuf),
    /// A pseudo-terminal.
    Pty,
}

/// Why there is no console.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The file.
    #[error("serial.serial_out_path: cannot open {path} for the guest's console: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The pseudo-terminal.
    #[error("serial.pty: cannot get a pseudo-terminal for the guest's console: {0}; is devpts mounted at /dev/pts?")]
    Pty(io::Error),
}

/// The ends of an open console.
pub struct Console {
    output: Box<dyn Write + Send>,
    input: Option<Box<dyn Read + Send>>,
    pty: Option<Pty>,
}

/// A pseudo-terminal of ours.
#[derive(Debug)]
pub struct Pty {
    /// Its name, such as `/dev/pts/3`.
    pub path: PathBuf,
    /// The guest's console must not hang up when whoever used it goes away.
    _terminal: OwnedFd,
}

/// How long to wait for the guest to read before offering input again: the port holds 64 bytes, which a guest takes at
/// one interrupt; or not at all, while it stands still.
const RETRY: Duration = Duration::from_millis(1);
const LONGEST_RETRY: Duration = Duration::from_millis(50);
/// How large a regular file becomes, in bytes.
const MAX_FILE: u64 = 64 << 20;

impl Console {
    /// Opens the console. Nothing is started: a thread writes the output from its first byte on, and one reads the input
    /// from [`Input::feed`] on.
    pub fn open(place: &Place) -> Result<Self, ConsoleError> {
        let (output, input, pty): (Box<dyn Write + Send>, Option<Box<dyn Read + Send>>, _) = match place {
            Place::Stdio if is_null(&io::stdin()) => (Box::new(io::stdout()), None, None),
            Place::Stdio => (Box::new(io::stdout()), Some(Box::new(io::stdin())), None),
            Place::File(path) => (open_file(path)?, None, None),
            Place::Pty => {
                let (controller, pty) = open_pty().map_err(|e| ConsoleError::Pty(e.into()))?;
                let output = controller.try_clone().map_err(ConsoleError::Pty)?;
                (Box::new(output), Some(Box::new(controller)), Some(pty))
            }
        };
        Ok(Console { output: Box::new(Output::new(output)), input, pty })
    }

    /// Where the guest's output goes, what it is to be given, and the pseudo-terminal, if it is one.
    pub fn into_parts(self) -> (Box<dyn Write + Send>, Input, Option<Pty>) {
        (self.output, Input(self.input), self.pty)
    }
}

/// What is typed at a console.
pub struct Input(Option<Box<dyn Read + Send>>);

impl Input {
    /// Gives it to the serial port until it ends, on a thread.
    pub fn feed(self, serial: &Arc<Mutex<Serial>>) {
        let Some(input) = self.0 else { return };
        let serial = Arc::downgrade(serial);
        if let Err(e) = sandbox::spawn("console", Kind::Stream, move || feed(input, &serial)) {
            tracing::warn!("the guest's console gets no input: cannot start a thread: {e}");
        }
    }
}

fn is_null(stdin: &io::Stdin) -> bool {
    let null = rustix::fs::stat("/dev/null").map(|s| s.st_rdev);
    matches!((rustix::fs::fstat(stdin), null), (Ok(stat), Ok(null)) if stat.st_rdev == null)
}

fn open_file(path: &Path) -> Result<Box<dyn Write + Send>, ConsoleError> {
    // A FIFO is opened for reading too, or opening it would wait for a reader.
    let fifo = std::fs::metadata(path).is_ok_and(|m| std::os::unix::fs::FileTypeExt::is_fifo(&m.file_type()));
    let mut options = OpenOptions::new();
    options.read(fifo).append(true).create(true).mode(0o600).custom_flags(libc::O_NOCTTY);
    let fail = |source| ConsoleError::File { path: path.to_owned(), source };
    let file = options.open(path).map_err(fail)?;
    match file.metadata().map_err(fail)?.is_file() {
        true => Ok(Box::new(Bounded { file, path: path.to_owned(), max: MAX_FILE, is_full: false })),
        false => Ok(Box::new(file)),
    }
}

/// A regular file that does not grow beyond a size: a guest shall not fill its host's disk. What does not fit is dropped;
/// there is room again once somebody has made the file smaller.
struct Bounded {
    file: File,
    path: PathBuf,
    max: u64,
    /// The log says that it is full.
    is_full: bool,
}

impl Write for Bounded {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let room = self.max.saturating_sub(self.file.metadata()?.len());
        let fits = data.len().min(usize::try_from(room).unwrap_or(usize::MAX));
        if fits > 0 || data.is_empty() {
            self.is_full = false;
            return self.file.write(&data[..fits]);
        }
        if !std::mem::replace(&mut self.is_full, true) {
            let (path, max) = (self.path.display(), self.max);
            tracing::warn!("what the guest writes to its console is lost: {path} has reached {max} bytes; truncate it");
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// A pseudo-terminal that passes bytes on as they are: its controlling side, and the terminal.
fn open_pty() -> rustix::io::Result<(File, Pty)> {
    let controller = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    rustix::pty::grantpt(&controller)?;
    rustix::pty::unlockpt(&controller)?;
    let name = rustix::pty::ptsname(&controller, Vec::new())?;
    let terminal = rustix::fs::open(&name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?;
    let mut mode = rustix::termios::tcgetattr(&terminal)?;
    mode.make_raw();
    rustix::termios::tcsetattr(&terminal, OptionalActions::Now, &mode)?;
    let path = PathBuf::from(name.to_string_lossy().into_owned());
    Ok((File::from(controller), Pty { path, _terminal: terminal }))
}

fn feed(mut input: Box<dyn Read + Send>, serial: &Weak<Mutex<Serial>>) {
    let mut chunk = [0; 64];
    while let Ok(n @ 1..) = input.read(&mut chunk) {
        let (mut rest, mut wait) = (&chunk[..n], RETRY);
        while !rest.is_empty() {
            let Some(serial) = serial.upgrade() else { return };
            let taken = lock(&serial).enqueue(rest);
            drop(serial);
            match taken {
                Ok(0) => {
                    std::thread::sleep(wait);
                    wait = (2 * wait).min(LONGEST_RETRY);
                }
                Ok(taken) => (rest, wait) = (&rest[taken..], RETRY),
                Err(e) => {
                    tracing::warn!("the guest's console gets no input any more: {e}");
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pty_passes_bytes_both_ways_as_they_are() {
        let (mut output, input, pty) = Console::open(&Place::Pty).unwrap().into_parts();
        let pty = pty.unwrap();
        let mut terminal = OpenOptions::new().read(true).write(true).open(&pty.path).unwrap();
        output.write_all(b"a\nb").unwrap();
        let mut seen = [0; 3];
        terminal.read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"a\nb");
        terminal.write_all(b"\x03x").unwrap();
        let mut typed = [0; 2];
        input.0.unwrap().read_exact(&mut typed).unwrap();
        assert_eq!(&typed, b"\x03x");
    }

    #[test]
    fn a_file_is_appended_to_and_a_bad_one_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        for text in ["one ", "two"] {
            let (mut output, _, _) = Console::open(&Place::File(path.clone())).unwrap().into_parts();
            output.write_all(text.as_bytes()).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "one two");
        let refused = Console::open(&Place::File(dir.path().join("none/console"))).err().unwrap().to_string();
        assert!(refused.contains("serial_out_path") && refused.contains("none/console"), "{refused}");
    }

    #[test]
    fn a_file_grows_up_to_its_bound_and_again_once_it_was_truncated() {
        let path = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        let file = OpenOptions::new().append(true).open(&path).unwrap();
        let mut bounded = Bounded { file, path: path.to_path_buf(), max: 10, is_full: false };
        for text in ["0123", "456789abc", "def"] {
            bounded.write_all(text.as_bytes()).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "0123456789");
        assert!(bounded.is_full);
        std::fs::write(&path, "").unwrap();
        bounded.write_all(b"more").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "more");
    }

    #[test]
    fn a_fifo_without_a_reader_does_not_hold_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, Mode::from(0o600), 0).unwrap();
        let (mut output, _, _) = Console::open(&Place::File(path)).unwrap().into_parts();
        output.write_all(b"x").unwrap();
    }
}
