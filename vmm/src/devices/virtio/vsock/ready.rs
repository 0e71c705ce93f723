//! The port of the host that the device itself answers: a guest announces there that it is ready.

use api_spec::agent::{self, GuestKind, HEADER_LEN, Level, Response};

/// Longest frame that an announcement can be, in bytes.
const MAX_FRAME: usize = 64;

/// Called on the devices' thread with each announcement, while the device is locked: it must neither wait nor call back.
pub type ReadySink = Box<dyn FnMut(Level, GuestKind) + Send>;

/// The guest said something that is no announcement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoAnnouncement;

/// Gathers the bytes of one connection into announcements.
#[derive(Debug, Default)]
pub struct Announcements {
    bytes: Vec<u8>,
}

impl Announcements {
    /// Takes in bytes of the guest and calls `sink` for each announcement that is complete.
    pub fn take(&mut self, data: &[u8], sink: &mut ReadySink) -> Result<(), NoAnnouncement> {
        for byte in data {
            self.bytes.push(*byte);
            if let Some((level, kind)) = self.complete()? {
                self.bytes.clear();
                sink(level, kind);
            }
        }
        Ok(())
    }

    fn complete(&self) -> Result<Option<(Level, GuestKind)>, NoAnnouncement> {
        let Some((header, body)) = self.bytes.split_first_chunk::<HEADER_LEN>() else { return Ok(None) };
        let len = agent::body_len(header).map_err(|_| NoAnnouncement)?;
        if HEADER_LEN + len > MAX_FRAME {
            return Err(NoAnnouncement);
        }
        if body.len() < len {
            return Ok(None);
        }
        match agent::decode::<Response>(body) {
            Ok(agent::Envelope { id: 0, body: Response::Ready { level, kind } }) => Ok(Some((level, kind))),
            _ => Err(NoAnnouncement),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use agent::Envelope;
    use std::sync::mpsc::channel;

    fn frame(id: u32, body: Response) -> Vec<u8> {
        agent::encode(&Envelope { id, body }, &mut [0; 64]).unwrap().to_vec()
    }

    fn ready(level: Level) -> Response {
        Response::Ready { level, kind: GuestKind::Embedded }
    }

    #[test]
    fn announcements_arrive_in_any_pieces() {
        let bytes = [frame(0, ready(Level::Agent)), frame(0, ready(Level::Full))].concat();
        for cut in 0..bytes.len() {
            let (send, heard) = channel();
            let mut sink: ReadySink = Box::new(move |level, _| send.send(level).unwrap());
            let mut announcements = Announcements::default();
            announcements.take(&bytes[..cut], &mut sink).unwrap();
            announcements.take(&bytes[cut..], &mut sink).unwrap();
            assert_eq!(heard.try_iter().collect::<Vec<_>>(), [Level::Agent, Level::Full]);
        }
    }

    #[test]
    fn everything_else_is_refused() {
        let mut sink: ReadySink = Box::new(|_, _| panic!("nothing was announced"));
        let long = [200, 0, 0, 0, agent::VERSION as u8, 0, 0, 0];
        for bytes in [frame(1, ready(Level::Full)), frame(0, Response::Done), b"GET / HTTP/1.1".to_vec(), long.to_vec()]
        {
            assert_eq!(Announcements::default().take(&bytes, &mut sink), Err(NoAnnouncement), "{bytes:?}");
        }
    }
}
