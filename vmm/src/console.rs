//! The guest's console: what it writes to COM1 goes to our standard output, and our standard input goes to COM1.

use crate::devices::lock;
use crate::devices::output::Output;
use crate::devices::serial::Serial;
use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

/// The ends of the console.
pub struct Console;

/// How long to wait for the guest to read before offering input again: the port holds 64 bytes, which a guest takes at
/// one interrupt.
const RETRY: Duration = Duration::from_millis(1);

impl Console {
    /// Where the guest's output goes. A thread writes it, started with the first byte, so that no reader of ours can hold
    /// up the guest.
    pub fn output() -> Box<dyn Write + Send> {
        Box::new(Output::new(Box::new(io::stdout())))
    }

    /// Gives standard input to the serial port until it ends. No thread is started for `/dev/null`.
    pub fn feed(serial: &Arc<Mutex<Serial>>) {
        if is_null(&io::stdin()) {
            return;
        }
        let serial = Arc::downgrade(serial);
        if let Err(e) = std::thread::Builder::new().name("console".into()).spawn(move || feed(&serial)) {
            log::warn!("the guest's console gets no input: cannot start a thread: {e}");
        }
    }
}

fn is_null(stdin: &io::Stdin) -> bool {
    let null = rustix::fs::stat("/dev/null").map(|s| s.st_rdev);
    matches!((rustix::fs::fstat(stdin), null), (Ok(stat), Ok(null)) if stat.st_rdev == null)
}

fn feed(serial: &Weak<Mutex<Serial>>) {
    let mut chunk = [0; 64];
    while let Ok(n @ 1..) = io::stdin().lock().read(&mut chunk) {
        let mut rest = &chunk[..n];
        while !rest.is_empty() {
            let Some(serial) = serial.upgrade() else { return };
            let taken = lock(&serial).enqueue(rest);
            drop(serial);
            match taken {
                Ok(0) => std::thread::sleep(RETRY),
                Ok(taken) => rest = &rest[taken..],
                Err(e) => {
                    log::warn!("the guest's console gets no input any more: {e}");
                    return;
                }
            }
        }
    }
}
