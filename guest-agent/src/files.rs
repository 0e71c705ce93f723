//! Files to and from the host.

use crate::stream::{Broken, PATIENCE, Stream};
use api_spec::agent::linux::{CHUNK, Either, Failure, Part, Request, Response, Stream as From};
use api_spec::agent::{Refusal, Response as Common};
use rustix::fs::{Mode, OFlags, open};
use std::fs::{self, File, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

fn failed(path: &str, error: impl std::fmt::Display) -> Failure {
    Failure { part: Part::File, detail: format!("`{path}`: {error}") }
}

/// A file in the making, beside the one that it will replace. Dropped, it leaves nothing.
struct Draft {
    file: File,
    draft: PathBuf,
    target: PathBuf,
    left: u64,
}

impl Draft {
    fn new(path: &str, size: u64) -> io::Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let wrong = |what| io::Error::new(io::ErrorKind::InvalidInput, what);
        let target = PathBuf::from(path);
        if !target.is_absolute() {
            return Err(wrong("the path is not absolute"));
        }
        let (Some(dir), Some(_), false) = (target.parent(), target.file_name(), path.ends_with('/')) else {
            return Err(wrong("the path names no file"));
        };
        if target.is_dir() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        let name = format!(".coppice-put-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let draft = dir.join(name);
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = File::from(open(&draft, flags, Mode::RUSR | Mode::WUSR)?);
        Ok(Draft { file, draft, target, left: size })
    }

    fn add(&mut self, data: &[u8]) -> io::Result<()> {
        self.left =
            self.left.checked_sub(data.len() as u64).ok_or_else(|| io::Error::other("more came than was said"))?;
        self.file.write_all(data)
    }

    fn finish(self, mode: u32) -> io::Result<()> {
        if self.left > 0 {
            return Err(io::Error::other(format!("{} bytes are missing", self.left)));
        }
        self.file.set_permissions(Permissions::from_mode(mode & 0o7777))?;
        self.file.sync_all()?;
        fs::rename(&self.draft, &self.target)
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // After a rename there is nothing left under this name.
        let _ = fs::remove_file(&self.draft);
    }
}

/// Takes a file from the host: it is there whole, or as before.
pub fn put(stream: &mut Stream, id: u32, path: &str, mode: u32, size: u64) -> Result<(), Broken> {
    let mut draft = match Draft::new(path, size) {
        Ok(draft) => Ok(draft),
        Err(e) => return stream.send(id, &Either::Linux(Response::Failed(failed(path, e)))),
    };
    stream.send(id, &Either::Linux(Response::Done))?;
    loop {
        let request = stream.receive(Some(Instant::now() + PATIENCE))?;
        match request.body {
            Either::Linux(Request::Data(data)) if request.id == id => {
                if data.is_empty() {
                    break;
                }
                // After a failure the rest is taken and dropped, so that both sides know where they are.
                draft = draft.and_then(|mut draft| draft.add(&data).map(|()| draft));
            }
            _ => stream.send(request.id, &Either::Common(Common::Refused(Refusal::Busy)))?,
        }
    }
    let response = match draft.and_then(|draft| draft.finish(mode)) {
        Ok(()) => Response::Done,
        Err(e) => Response::Failed(failed(path, e)),
    };
    stream.send(id, &Either::Linux(response))
}

/// Sends a regular file to the host.
pub fn get(stream: &mut Stream, id: u32, path: &str) -> Result<(), Broken> {
    let sent = open_regular(Path::new(path)).map_err(|e| failed(path, e));
    let (mut file, mode, size) = match sent {
        Ok(opened) => opened,
        Err(failure) => return stream.send(id, &Either::Linux(Response::Failed(failure))),
    };
    stream.send(id, &Either::Linux(Response::File { mode, size }))?;
    loop {
        let mut data = vec![0; CHUNK];
        let response = match file.read(&mut data) {
            Ok(0) => Response::Done,
            Ok(len) => {
                data.truncate(len);
                Response::Output { stream: From::File, data }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => Response::Failed(failed(path, e)),
        };
        let more = matches!(response, Response::Output { .. });
        stream.send(id, &Either::Linux(response))?;
        if !more {
            return Ok(());
        }
    }
}

fn open_regular(path: &Path) -> io::Result<(File, u32, u64)> {
    if !path.is_absolute() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the path is not absolute"));
    }
    // A FIFO would otherwise wait for its other end.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = File::from(open(path, flags, Mode::empty())?);
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"));
    }
    Ok((file, metadata.permissions().mode() & 0o7777, metadata.len()))
}
