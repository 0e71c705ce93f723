//! Which of a guest's faults are to be answered, and how: what was read from its userfaultfd, and what came of each
//! attempt, make the next action. No I/O.
//!
//! ```text
//!   fault --> asked --Give--> placed: woken by that, done
//!               ^       |---> there already, or not the server's business any more --Wake--> done
//!               |       |---> again: nothing is answered until all events were read
//!               |       +---> waits: for the bytes of its chunk
//!               +--chunk arrived, or page removed--+
//! ```
//!
//! A page that the guest has given back (a *remove* event) reads as zeros from then on. The kernel may deliver such an
//! event after that of a later fault, and refuses every copy while one is unread. So once a remove was seen, or a copy
//! was refused, nothing is answered before all events were read; and a page is looked up among the removed ones only
//! when it is answered, however long it has waited.

use crate::page_set::PageSet;
use crate::region::CHUNK_PAGES;
use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Instant;

/// Pages that one guest may wait for at once: more than it can have threads.
pub const MOST_ASKED: usize = 65536;

/// What to do next for a page of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Put the page's bytes where the guest finds them.
    Give(u64),
    /// Let it read as zeros.
    Zero(u64),
    /// Wake whoever waits for it.
    Wake(u64),
}

/// What came of an action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The page is there and who waited for it is woken.
    Placed,
    /// The page is there, put there just now; who waits for it has yet to be woken.
    Filled,
    /// The page was there before; that says nothing of who waits for it.
    Present,
    /// The guest has taken the page out of the server's hands.
    Gone,
    /// The kernel will not do it while events are unread.
    Again,
    /// The bytes are not at hand: [`Faults::arrived`] will say when they are.
    Waits,
    /// Who waited was woken: the end of an [`Action::Wake`].
    Woken,
}

/// How a fault was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The page had to be put into the store.
    Filled,
    /// It was there, or is the server's business no more.
    Present,
    /// It was copied into the guest's memory.
    Copied,
    /// It reads as zeros.
    Zeroed,
}

/// A page whose faults were answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// How.
    pub kind: Kind,
    /// Whether its bytes had to be waited for.
    pub waited: bool,
    /// How many faults there were.
    pub faults: u64,
    /// When the first of them was read.
    pub since: Instant,
}

/// A guest waits for more pages at once than it can have threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it waits for more than {MOST_ASKED} pages at once")]
pub struct TooMany;

/// The faults on one page.
#[derive(Clone, Copy, Debug)]
struct Asked {
    faults: u64,
    since: Instant,
    waited: bool,
    /// How it was answered, if only the wake-up is missing.
    to_wake: Option<Kind>,
}

/// The unanswered faults of one guest, by page of the image, and the pages that it has given back.
#[derive(Debug)]
pub struct Faults {
    pages: u64,
    asked: BTreeMap<u64, Asked>,
    waiting: BTreeMap<u64, Asked>,
    /// Made with the first page that is given back.
    removed: Option<PageSet>,
    must_read: bool,
}

impl Faults {
    /// None yet, of a guest with an image of so many pages.
    pub fn new(pages: u64) -> Self {
        Self { pages, asked: BTreeMap::new(), waiting: BTreeMap::new(), removed: None, must_read: false }
    }

    /// A fault was read.
    pub fn fault(&mut self, page: u64, now: Instant) -> Result<(), TooMany> {
        if let Some(asked) = self.asked.get_mut(&page).or_else(|| self.waiting.get_mut(&page)) {
            asked.faults += 1;
            return Ok(());
        }
        if self.asked.len() + self.waiting.len() >= MOST_ASKED {
            return Err(TooMany);
        }
        self.asked.insert(page, Asked { faults: 1, since: now, waited: false, to_wake: None });
        Ok(())
    }

    /// The guest gives pages back.
    pub fn remove(&mut self, pages: Range<u64>) {
        self.must_read = true;
        self.removed.get_or_insert_with(|| PageSet::new(self.pages)).insert(pages.clone());
        self.ask_again(pages);
    }

    /// A chunk's bytes are at hand.
    pub fn arrived(&mut self, chunk: u64) {
        self.ask_again(chunk * CHUNK_PAGES..(chunk + 1) * CHUNK_PAGES);
    }

    fn ask_again(&mut self, pages: Range<u64>) {
        let pages: Vec<u64> = self.waiting.range(pages).map(|(&page, _)| page).collect();
        for page in pages {
            self.asked.extend(self.waiting.remove_entry(&page));
        }
    }

    /// No event is left unread.
    pub fn drained(&mut self) {
        self.must_read = false;
    }

    /// Whether events must be read before anything is answered.
    pub fn must_read(&self) -> bool {
        self.must_read
    }

    /// Whether everything that was read is answered, or waits for bytes.
    pub fn is_settled(&self) -> bool {
        self.asked.is_empty()
    }

    /// Faults that wait for bytes.
    pub fn waiting(&self) -> u64 {
        self.waiting.values().map(|asked| asked.faults).sum()
    }

    /// What to do next, if anything. [`Faults::done`] must hear what came of it before anything else happens.
    pub fn next_action(&self) -> Option<Action> {
        if self.must_read {
            return None;
        }
        let (&page, asked) = self.asked.first_key_value()?;
        Some(match asked.to_wake {
            Some(_) => Action::Wake(page),
            None if self.is_removed(page) => Action::Zero(page),
            None => Action::Give(page),
        })
    }

    /// Whether the guest has given a page back.
    pub fn is_removed(&self, page: u64) -> bool {
        self.removed.as_ref().is_some_and(|removed| removed.contains(page))
    }

    /// Takes what came of an action. Says how the page's faults were answered if that was all.
    pub fn done(&mut self, action: Action, outcome: Outcome) -> Option<Answer> {
        let (Action::Give(page) | Action::Zero(page) | Action::Wake(page)) = action;
        let placed = if matches!(action, Action::Zero(_)) { Kind::Zeroed } else { Kind::Copied };
        match outcome {
            Outcome::Placed => self.answered(page, placed),
            Outcome::Filled => self.wake_as(page, Kind::Filled),
            Outcome::Present | Outcome::Gone => self.wake_as(page, Kind::Present),
            Outcome::Woken => {
                let kind = self.asked.get(&page)?.to_wake?;
                self.answered(page, kind)
            }
            Outcome::Again => {
                self.must_read = true;
                None
            }
            Outcome::Waits => {
                let mut asked = self.asked.remove(&page)?;
                asked.waited = true;
                self.waiting.insert(page, asked);
                None
            }
        }
    }

    fn wake_as(&mut self, page: u64, kind: Kind) -> Option<Answer> {
        self.asked.get_mut(&page)?.to_wake = Some(kind);
        None
    }

    fn answered(&mut self, page: u64, kind: Kind) -> Option<Answer> {
        let Asked { faults, since, waited, .. } = self.asked.remove(&page)?;
        Some(Answer { kind, waited, faults, since })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{BTreeSet, VecDeque};

    const PAGES: u64 = 3 * CHUNK_PAGES;

    fn faults_at(pages: &[u64]) -> Faults {
        let mut faults = Faults::new(PAGES);
        pages.iter().for_each(|&page| faults.fault(page, Instant::now()).unwrap());
        faults
    }

    #[test]
    fn what_exists_is_woken() {
        let mut faults = faults_at(&[5, 5]);
        assert_eq!(faults.done(Action::Give(5), Outcome::Present), None);
        assert_eq!(faults.next_action(), Some(Action::Wake(5)));
        let answer = faults.done(Action::Wake(5), Outcome::Woken).unwrap();
        assert_eq!((answer.kind, answer.faults, faults.next_action()), (Kind::Present, 2, None));
    }

    #[test]
    fn after_again_nothing_is_answered_until_all_was_read() {
        let mut faults = faults_at(&[5, 6]);
        faults.done(Action::Give(5), Outcome::Again);
        assert_eq!((faults.next_action(), faults.must_read()), (None, true));
        faults.remove(5..6);
        faults.drained();
        assert_eq!(faults.next_action(), Some(Action::Zero(5)));
        assert_eq!(faults.done(Action::Zero(5), Outcome::Placed).unwrap().kind, Kind::Zeroed);
        assert_eq!(faults.next_action(), Some(Action::Give(6)));
    }

    #[test]
    fn a_page_that_waits_and_is_removed_waits_no_more() {
        let mut faults = faults_at(&[5, 20]);
        faults.done(Action::Give(5), Outcome::Waits);
        faults.done(Action::Give(20), Outcome::Waits);
        assert_eq!(faults.waiting(), 2);
        faults.remove(0..6);
        faults.drained();
        assert_eq!(faults.next_action(), Some(Action::Zero(5)));
        faults.done(Action::Zero(5), Outcome::Placed);
        faults.arrived(1);
        assert_eq!(faults.next_action(), Some(Action::Give(20)));
        let answer = faults.done(Action::Give(20), Outcome::Placed).unwrap();
        assert_eq!((answer.kind, answer.waited), (Kind::Copied, true));
    }

    #[test]
    fn nobody_waits_for_more_pages_than_threads_can() {
        let mut faults = Faults::new(2 * MOST_ASKED as u64);
        (0..MOST_ASKED as u64).for_each(|page| faults.fault(page, Instant::now()).unwrap());
        assert_eq!(faults.fault(MOST_ASKED as u64, Instant::now()), Err(TooMany));
        assert_eq!(faults.fault(0, Instant::now()), Ok(()));
    }

    // ---- against a model of the kernel and of the guest's threads ----

    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Content {
        Missing,
        Image,
        Zero,
    }

    #[derive(Clone, Debug)]
    enum Op {
        Read(u64),
        Remove(Range<u64>),
    }

    #[derive(Clone, Debug, PartialEq)]
    enum Thread {
        Running,
        Sleeping(u64),
        /// Its remove event was not read yet.
        Announcing,
        /// It was read; copies are refused until this thread has noticed.
        Noticing,
        Zapping,
    }

    /// One guest: its memory, threads and userfaultfd; and the server of it.
    struct World {
        memory: Vec<Content>,
        scripts: Vec<VecDeque<Op>>,
        threads: Vec<Thread>,
        unread_faults: VecDeque<(usize, u64)>,
        unread_removes: VecDeque<(usize, Range<u64>)>,
        changing: usize,
        begun: BTreeSet<u64>,
        zapped: BTreeSet<u64>,
        faults: Faults,
        at_hand: BTreeSet<u64>,
    }

    impl World {
        fn new(scripts: Vec<Vec<Op>>) -> Self {
            World {
                memory: vec![Content::Missing; PAGES as usize],
                threads: vec![Thread::Running; scripts.len()],
                scripts: scripts.into_iter().map(VecDeque::from).collect(),
                unread_faults: VecDeque::new(),
                unread_removes: VecDeque::new(),
                changing: 0,
                begun: BTreeSet::new(),
                zapped: BTreeSet::new(),
                faults: Faults::new(PAGES),
                at_hand: BTreeSet::new(),
            }
        }

        /// A thread of the guest goes on, if it can.
        fn run(&mut self, thread: usize) {
            let Some(op) = self.scripts[thread].front().cloned() else { return };
            match (self.threads[thread].clone(), op) {
                (Thread::Running, Op::Read(page)) => match self.memory[page as usize] {
                    Content::Missing => {
                        self.threads[thread] = Thread::Sleeping(page);
                        self.unread_faults.push_back((thread, page));
                    }
                    content => {
                        assert!(content == Content::Zero || !self.zapped.contains(&page), "old bytes in page {page}");
                        assert!(content == Content::Image || self.begun.contains(&page), "zeros in page {page}");
                        self.scripts[thread].pop_front();
                    }
                },
                (Thread::Running, Op::Remove(pages)) => {
                    self.begun.extend(pages.clone());
                    self.changing += 1;
                    self.threads[thread] = Thread::Announcing;
                    self.unread_removes.push_back((thread, pages));
                }
                (Thread::Noticing, _) => {
                    self.changing -= 1;
                    self.threads[thread] = Thread::Zapping;
                }
                (Thread::Zapping, Op::Remove(pages)) => {
                    pages.clone().for_each(|page| self.memory[page as usize] = Content::Missing);
                    self.zapped.extend(pages);
                    self.threads[thread] = Thread::Running;
                    self.scripts[thread].pop_front();
                }
                _ => {}
            }
        }

        /// Somebody else puts a page there, and wakes nobody.
        fn appear(&mut self, page: u64) {
            if !self.begun.contains(&page) && self.memory[page as usize] == Content::Missing {
                self.memory[page as usize] = Content::Image;
            }
        }

        /// The server reads up to so many events: as the kernel has it, faults before anything else.
        fn read(&mut self, batch: usize) {
            for _ in 0..batch {
                if let Some((_, page)) = self.unread_faults.pop_front() {
                    self.faults.fault(page, Instant::now()).unwrap();
                } else if let Some((thread, pages)) = self.unread_removes.pop_front() {
                    self.threads[thread] = Thread::Noticing;
                    self.faults.remove(pages);
                } else {
                    return self.faults.drained();
                }
            }
        }

        fn act(&mut self) {
            let Some(action) = self.faults.next_action() else { return };
            let outcome = match action {
                Action::Give(page) if !self.at_hand.contains(&(page / CHUNK_PAGES)) => Outcome::Waits,
                Action::Give(page) => self.place(page, Content::Image),
                Action::Zero(page) => self.place(page, Content::Zero),
                Action::Wake(page) => {
                    self.wake(page);
                    Outcome::Woken
                }
            };
            self.faults.done(action, outcome);
        }

        fn place(&mut self, page: u64, content: Content) -> Outcome {
            if self.changing > 0 {
                return Outcome::Again;
            }
            if self.memory[page as usize] != Content::Missing {
                return Outcome::Present;
            }
            self.memory[page as usize] = content;
            self.wake(page);
            Outcome::Placed
        }

        fn wake(&mut self, page: u64) {
            self.unread_faults.retain(|(_, other)| *other != page);
            for thread in self.threads.iter_mut().filter(|thread| **thread == Thread::Sleeping(page)) {
                *thread = Thread::Running;
            }
        }

        fn arrive(&mut self, chunk: u64) {
            self.at_hand.insert(chunk);
            self.faults.arrived(chunk);
        }

        fn step(&mut self, (what, number): (u8, u64)) {
            match what {
                0..=3 => self.run(number as usize % self.threads.len()),
                4 => self.read(1 + number as usize % 3),
                5..=7 => self.act(),
                8 => self.arrive(number % 3),
                _ => self.appear(number % PAGES),
            }
        }

        fn finish(&mut self) {
            (0..3).for_each(|chunk| self.arrive(chunk));
            for _ in 0..1000 {
                (0..self.threads.len()).for_each(|thread| self.run(thread));
                self.read(3);
                self.act();
            }
            assert!(self.scripts.iter().all(VecDeque::is_empty), "somebody sleeps: {:?}", self.threads);
            assert!(self.faults.is_settled() && self.faults.waiting() == 0, "a fault that nobody has");
        }
    }

    fn ops() -> impl Strategy<Value = Op> {
        // Few pages, so that threads meet.
        let pages = prop::sample::select(vec![0, 1, 2, 15, 16, 17, 40]);
        prop_oneof![
            3 => pages.clone().prop_map(Op::Read),
            1 => (pages, 1..4u64).prop_map(|(start, len)| Op::Remove(start..start + len)),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn nobody_sleeps_for_ever_and_every_byte_is_right(
            scripts in prop::collection::vec(prop::collection::vec(ops(), 0..8), 1..5),
            steps in prop::collection::vec((0..10u8, any::<u64>()), 0..200),
        ) {
            let mut world = World::new(scripts);
            steps.into_iter().for_each(|step| world.step(step));
            world.finish();
        }
    }
}
