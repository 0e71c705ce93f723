//! The thread on which virtio devices work, beside the event loop that answers the API: a device may have to wait for a page of guest
//! memory, or for a disk, and nobody else is to wait with it. [`Turns`] say when it works, and when the owner of the machine may
//! touch its devices.

use super::turns::{AtWork, Turns};
use crate::devices::lock;
use crate::notice::{Notice, Notifier};
use crate::sandbox::{self, Kind};
use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use std::io;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Anything that an event loop serves.
pub type Subscriber = Arc<Mutex<dyn MutEventSubscriber + Send>>;

/// The devices' thread, if there are devices.
#[derive(Debug)]
pub struct DeviceThread {
    turns: Arc<Turns>,
    /// Has it look whether there is something to do, or to end for; and the thread itself.
    thread: Option<(Arc<EventFd>, JoinHandle<()>)>,
}

impl DeviceThread {
    /// Starts the thread of devices of these names, if there are any. They stand still at first. `notifier` is told if it fails.
    pub fn start(names: Vec<String>, devices: &[Subscriber], notifier: Notifier) -> io::Result<Self> {
        let turns = Arc::new(Turns::new(names));
        if devices.is_empty() {
            return Ok(DeviceThread { turns, thread: None });
        }
        let bell = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let work = Work { turns: turns.clone(), bell: bell.clone(), devices: devices.to_vec() };
        let thread = sandbox::spawn("devices", Kind::Devices, move || {
            if let Err(e) = work.run() {
                notifier.send(Notice::DevicesFailed(e.to_string()));
            }
        })?;
        Ok(DeviceThread { turns, thread: Some((bell, thread)) })
    }

    /// When it works.
    pub fn turns(&self) -> &Arc<Turns> {
        &self.turns
    }

    /// Has the thread do something that may have to wait for a page of guest memory, and waits for it no longer than `patience`.
    pub fn ask<T: Send + 'static>(
        &self,
        patience: Duration,
        question: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, AtWork> {
        self.turns.ask(patience, || self.ring(), question)
    }

    /// Ends the thread. False if it does not end within `patience`; it will, once it is done with what it is in the midst of.
    pub fn end(&mut self, patience: Duration) -> bool {
        self.turns.end();
        self.ring();
        if self.turns.take(patience).is_err() {
            return false;
        }
        if let Some((_, thread)) = self.thread.take() {
            let _ = thread.join();
        }
        true
    }

    fn ring(&self) {
        if let Some((bell, _)) = &self.thread {
            let _ = bell.write(1); // It can only overflow when it rings already.
        }
    }
}

impl Drop for DeviceThread {
    /// Of a machine that was not completed, or whose thread does not end: that is not waited for.
    fn drop(&mut self) {
        self.turns.end();
        self.ring();
    }
}

/// What the thread does.
struct Work {
    turns: Arc<Turns>,
    bell: Arc<EventFd>,
    devices: Vec<Subscriber>,
}

impl Work {
    fn run(self) -> event_manager::Result<()> {
        let Work { turns, bell, devices } = self;
        let mut events = EventManager::<Subscriber>::new()?;
        events.add_subscriber(Arc::new(Mutex::new(Bell { turns: turns.clone(), bell })));
        for (number, device) in devices.into_iter().enumerate() {
            events.add_subscriber(Arc::new(Mutex::new(InTurn { turns: turns.clone(), number, device })));
        }
        while !turns.are_over() {
            events.run()?;
        }
        Ok(())
    }
}

/// Rings when there is something to do that is no event of a device.
struct Bell {
    turns: Arc<Turns>,
    bell: Arc<EventFd>,
}

impl MutEventSubscriber for Bell {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(e) = ops.add(Events::new(self.bell.as_ref(), EventSet::IN)) {
            tracing::error!("the thread of the devices cannot be called: {e}");
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        let _ = self.bell.read(); // Only to make it quiet.
        self.turns.done();
    }
}

/// A device that handles its events in its turn.
struct InTurn {
    turns: Arc<Turns>,
    number: usize,
    device: Subscriber,
}

impl MutEventSubscriber for InTurn {
    fn init(&mut self, ops: &mut EventOps) {
        lock(&*self.device).init(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if self.turns.begin(self.number) {
            lock(&*self.device).process(events, ops);
            self.turns.done();
        }
    }
}
