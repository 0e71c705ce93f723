//! Where lines go: those of the log, and those of others.

use super::LogError;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

/// Takes lines, each whole or not at all.
///
/// What was opened by its path never blocks: whoever reads a FIFO may be slow, or not there. A line that does not fit is
/// lost, and counted. A FIFO may take part of a line that is longer than `PIPE_BUF`, and a disk may get full in the
/// midst of one: the rest then goes ahead of the next line.
pub struct Sink {
    out: Box<dyn Write + Send>,
    /// What is still to be written of a line that was begun.
    rest: Vec<u8>,
    /// Lines lost since the last one that was not.
    lost: u64,
}

impl Sink {
    /// A file, FIFO or terminal; or standard error, which is shared with others and stays as it was made: it may block.
    pub fn open(path: Option<&Path>) -> Result<Self, LogError> {
        match path {
            Some(path) => Ok(Sink::new(Box::new(open(path)?))),
            None => Ok(Sink::stderr()),
        }
    }

    /// Standard error.
    pub fn stderr() -> Self {
        Sink::new(Box::new(io::stderr()))
    }

    fn new(out: Box<dyn Write + Send>) -> Self {
        Sink { out, rest: Vec::new(), lost: 0 }
    }

    /// Writes a line; before it, if lines were lost, the one that `note` makes of their number.
    pub fn put(&mut self, line: &str, note: impl Fn(u64) -> String) {
        if self.lost > 0 && self.put_whole(&note(self.lost)) {
            self.lost = 0;
        }
        if self.lost > 0 || !self.put_whole(line) {
            self.lost += 1;
        }
    }

    /// Writes a line as [`Sink::put`] does, of which the caller counts those that are lost. Whether it is written, or will be.
    pub fn put_whole(&mut self, line: &str) -> bool {
        let written = write_some(&mut *self.out, &self.rest);
        self.rest.drain(..written);
        if !self.rest.is_empty() {
            return false;
        }
        let written = write_some(&mut *self.out, line.as_bytes());
        if written > 0 {
            self.rest = line.as_bytes()[written..].to_vec();
        }
        written > 0
    }
}

/// Writes what can be written, and returns how much that is. There is nowhere to report why it is not more.
fn write_some(out: &mut dyn Write, bytes: &[u8]) -> usize {
    let mut written = 0;
    while written < bytes.len() {
        match out.write(&bytes[written..]) {
            Ok(0) => break,
            Ok(n) => written += n,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    written
}

fn open(path: &Path) -> Result<File, LogError> {
    // A FIFO is opened for reading too, or opening it would fail without a reader.
    let fifo = fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_fifo());
    let mut options = OpenOptions::new();
    options.read(fifo).append(true).create(true).mode(0o600).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    let fail = |source| LogError::Open { path: path.to_owned(), source };
    let file = options.open(path).map_err(fail)?;
    let kind = file.metadata().map_err(fail)?.file_type();
    // Of devices those that are meant for text, the one that swallows it, and the one that never has room.
    let [null, full] = [rustix::fs::makedev(1, 3), rustix::fs::makedev(1, 7)];
    let is_for_none = |metadata: fs::Metadata| [null, full].contains(&metadata.rdev());
    let is_for_text = || rustix::termios::isatty(&file) || file.metadata().is_ok_and(is_for_none);
    match kind.is_file() || kind.is_fifo() || kind.is_char_device() && is_for_text() {
        true => Ok(file),
        false => Err(LogError::NoPlace(path.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::fs::PermissionsExt;
    use std::sync::{Arc, Mutex};

    /// Takes bytes while there is room.
    #[derive(Clone, Default)]
    struct Narrow(Arc<Mutex<(Vec<u8>, usize)>>);

    impl Narrow {
        fn make_room(&self, room: usize) {
            self.0.lock().unwrap().1 += room;
        }

        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().0.clone()).unwrap()
        }
    }

    impl Write for Narrow {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            let (bytes, room) = &mut *self.0.lock().unwrap();
            let taken = data.len().min(*room);
            if taken == 0 {
                return Err(ErrorKind::WouldBlock.into());
            }
            bytes.extend_from_slice(&data[..taken]);
            *room -= taken;
            Ok(taken)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn note(lost: u64) -> String {
        format!("lost {lost}\n")
    }

    #[test]
    fn a_line_is_there_whole_or_is_counted() {
        let narrow = Narrow::default();
        let mut sink = Sink::new(Box::new(narrow.clone()));
        narrow.make_room(8);
        for line in ["one\n", "begun\n", "lost\n", "lost\n"] {
            sink.put(line, note);
        }
        assert_eq!(narrow.text(), "one\nbegu");
        narrow.make_room(2 + 7);
        sink.put("lost too\n", note);
        assert_eq!(narrow.text(), "one\nbegun\nlost 2\n", "the note fits, the line does not");
        narrow.make_room(100);
        sink.put("two\n", note);
        sink.put("three\n", note);
        assert_eq!(narrow.text(), "one\nbegun\nlost 2\nlost 1\ntwo\nthree\n");
    }

    #[test]
    fn a_fifo_that_nobody_reads_does_not_hold_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        let mut sink = Sink::open(Some(&path)).unwrap();
        let mut put = 0;
        while sink.lost < 3 {
            sink.put(&format!("line {put:04}\n"), note);
            put += 1;
        }
        let mut reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        let mut read = || {
            let mut text = Vec::new();
            assert_eq!(reader.read_to_end(&mut text).unwrap_err().kind(), ErrorKind::WouldBlock);
            String::from_utf8(text).unwrap()
        };
        let expected: String = (0..put - 3).map(|n| format!("line {n:04}\n")).collect();
        assert!(read() == expected, "lines that fit are whole and in order");
        sink.put("after\n", note);
        sink.put("wards\n", note);
        assert_eq!(read(), "lost 3\nafter\nwards\n");
    }

    #[test]
    fn a_file_is_appended_to_and_its_owners_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        for line in ["one\n", "two\n"] {
            Sink::open(Some(&path)).unwrap().put(line, note);
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "one\ntwo\n");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_full_disk_loses_lines_and_no_more() {
        let mut sink = Sink::open(Some(Path::new("/dev/full"))).unwrap();
        sink.put("one\n", note);
        sink.put("two\n", note);
        assert_eq!(sink.lost, 2);
    }

    #[test]
    fn a_place_that_cannot_be_is_named() {
        let dir = tempfile::tempdir().unwrap();
        for path in [dir.path().join("none/log"), dir.path().to_owned(), "/dev/zero".into()] {
            let error = Sink::open(Some(&path)).err().unwrap().to_string();
            assert!(error.contains(path.to_str().unwrap()), "{error}");
        }
    }
}
