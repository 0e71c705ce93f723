//! What to do about a page server that dies, hangs, or cannot get its bytes. Pure: the keeper's thread asks here.
//!
//! ```text
//!            a fault          still there after GRACE        no answer within ANSWER
//!   Quiet -------------> Seen -----------------------> Asked ------------------------> Silent
//!     ^                   |                             |                                |
//!     +---- answered -----+------------ pong -----------+------------- pong -------------+
//!
//!   any of them -- its connection or process ends --> Gone -- attached to a server again --> Quiet
//! ```
//!
//! A fault that the server has read of at once, and not answered, is not seen as it is raised. So outstanding faults are looked for now and
//! then, often ([`CLOSE_LOOK`]) while the guest loads pages and seldom ([`DISTANT_LOOK`]) while it does not.
//!
//! A server of Firecracker's protocol says nothing, so it is not asked: it hangs if faults are outstanding and no page comes for
//! [`ANSWER`].
//!
//! While the server is silent, gone, or cannot get its bytes, faults are served here if the policy and the image allow it. Where
//! nobody serves them, the guest is paused after [`PATIENCE`]. One that is still being loaded is given up after [`LOAD_PATIENCE`].

use api_spec::snapshot::OnHandlerLoss;
use std::time::Duration;

/// How long a fault may be outstanding before anybody wonders.
pub const GRACE: Duration = Duration::from_millis(10);
/// How long the server has to say that it is alive, or to deliver a page if it says nothing.
pub const ANSWER: Duration = Duration::from_millis(50);
/// How often to look for faults that were not seen.
pub const CLOSE_LOOK: Duration = Duration::from_millis(50);
/// And where nothing has happened for some time.
pub const DISTANT_LOOK: Duration = Duration::from_millis(500);
/// How often a server that said that faults have to wait is asked again.
pub const ASK_AGAIN: Duration = Duration::from_millis(25);
/// And one that cannot get its bytes.
pub const ASK_AGAIN_AWAY: Duration = Duration::from_millis(100);
/// How long a silent server of Firecracker's protocol is stood in for before it is looked at anew.
pub const STAND_IN: Duration = Duration::from_secs(1);
/// How long nobody may serve a guest before it is paused.
pub const PATIENCE: Duration = Duration::from_secs(1);
/// How long a server may be silent before the guest ends with it, if it is to.
pub const DEADLY_SILENCE: Duration = Duration::from_secs(5);
/// How long nobody may serve a guest that is still being loaded.
pub const LOAD_PATIENCE: Duration = Duration::from_secs(5);
/// How long a load may take, whoever serves it: it needs a few pages.
pub const LONGEST_LOAD: Duration = Duration::from_secs(60);
/// The pauses between attempts to attach to a server again.
const FIRST_RETRY: Duration = Duration::from_millis(50);
const LAST_RETRY: Duration = Duration::from_secs(1);
/// How long a guest must have been served before the next attempt is made at once.
const LASTING: Duration = Duration::from_secs(10);
/// How long faults may wait for bytes, while no page comes at all, before they are taken not to come.
pub const SLOW: Duration = Duration::from_secs(2);
/// Looks at which faults are outstanding, and no page has come since the first of them, although the server says that it has answered
/// all: then they were lost.
const LOST_AFTER: u32 = 4;
/// Longest that a server which says nothing is stood in for before it is looked at anew.
const LONGEST_STAND_IN: Duration = Duration::from_secs(60);

/// What has happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A fault was raised. Told while [`Plan::waits_for_faults`].
    Fault,
    /// The answer to [`Step::Look`].
    Looked {
        /// Faults are outstanding.
        outstanding: bool,
        /// How much guest memory is resident: it grows if somebody delivers pages.
        resident: u64,
    },
    /// The server has answered.
    Pong {
        /// Which ping.
        ping: u64,
        /// So many faults wait for bytes.
        waiting: u64,
        /// Why those may be long in coming.
        away: Option<String>,
    },
    /// The server is gone.
    Gone,
    /// The server's last word: what it gave must not be used any more.
    Refused(String),
    /// An attempt to attach to a server has succeeded.
    Attached,
    /// It has failed.
    NotAttached(String),
    /// Faults cannot be served here.
    CannotServe(String),
    /// [`Plan::deadline`] has passed.
    Time,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Look at the faults that are outstanding, and tell.
    Look,
    /// Ask the server whether it is alive.
    Ping(u64),
    /// Wake all who wait, and serve faults here.
    TakeOver,
    /// Wake all who wait, so that their faults are raised again.
    Wake,
    /// Leave faults to the server again.
    StandDown,
    /// Try to attach to a server, and tell what comes of it.
    Attach,
    /// Bring the guest to a standstill, for this reason.
    Pause(String),
    /// Let it go on.
    Resume,
    /// End the guest, for this reason.
    End(String),
    /// If the guest is still being loaded, let that fail, for this reason. Told once, whether it is or not.
    GiveUpLoad(String),
}

/// Where the server stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    Quiet {
        look_at: Duration,
        pause: Duration,
        resident: u64,
    },
    Seen {
        look_at: Duration,
    },
    Asked {
        overdue_at: Duration,
    },
    /// It says nothing, ever; and no page has come since then.
    Stuck {
        resident: u64,
        overdue_at: Duration,
        look_at: Duration,
    },
    Silent {
        since: Duration,
        resident: u64,
        look_at: Option<Duration>,
    },
    Gone {
        attach_at: Option<Duration>,
    },
}

/// What to do about one guest's page server. All times are since any one moment.
#[derive(Debug)]
pub struct Plan {
    policy: OnHandlerLoss,
    /// The server answers pings.
    speaks: bool,
    link: Link,
    /// The server cannot get its bytes.
    away: Option<String>,
    /// Faults are served here.
    here: bool,
    /// Why they cannot be.
    unable: Option<String>,
    /// Nobody serves since then.
    unserved_since: Option<Duration>,
    paused: bool,
    ended: bool,
    /// When a load is late, unless that was told.
    load_until: Option<Duration>,
    pings: u64,
    retry: Duration,
    attached_at: Duration,
    /// Faults wait for bytes since then, while no page has come.
    waiting_since: Option<Duration>,
    /// How much was resident at the last look, and at how many looks in a row with outstanding faults it was the same.
    stuck_at: (u64, u32),
    /// How long to stand in for a server that says nothing; and when it was last taken to have come to life.
    doubt: Duration,
    recovered_at: Option<Duration>,
    last_failure: Option<String>,
}

fn quiet(now: Duration) -> Link {
    Link::Quiet { look_at: now + CLOSE_LOOK, pause: CLOSE_LOOK, resident: 0 }
}

impl Plan {
    /// Of a guest that its server has just begun to serve, and that is being loaded.
    pub fn new(policy: OnHandlerLoss, speaks: bool) -> Self {
        Plan {
            policy,
            speaks,
            link: quiet(Duration::ZERO),
            away: None,
            here: false,
            unable: None,
            unserved_since: None,
            paused: false,
            ended: false,
            load_until: Some(LONGEST_LOAD),
            pings: 0,
            retry: FIRST_RETRY,
            attached_at: Duration::ZERO,
            waiting_since: None,
            stuck_at: (0, 0),
            doubt: STAND_IN,
            recovered_at: None,
            last_failure: None,
        }
    }

    /// Whether to tell of a fault. The others are not worth a word.
    pub fn waits_for_faults(&self) -> bool {
        matches!(self.link, Link::Quiet { .. }) && !self.here
    }

    /// Whether faults are served here.
    pub fn serves_here(&self) -> bool {
        self.here
    }

    /// Whether the guest was told to end.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Whether the server is gone.
    pub fn is_gone(&self) -> bool {
        matches!(self.link, Link::Gone { .. })
    }

    /// Why nobody serves the guest, if nobody does.
    pub fn unserved(&self) -> Option<String> {
        self.unserved_since.map(|_| self.reason())
    }

    /// When to tell that time has passed.
    pub fn deadline(&self) -> Option<Duration> {
        if self.ended {
            return None;
        }
        let link = match self.link {
            Link::Quiet { look_at, .. } | Link::Seen { look_at } | Link::Stuck { look_at, .. } => Some(look_at),
            Link::Asked { overdue_at, .. } => Some(overdue_at),
            Link::Silent { look_at, .. } => look_at,
            Link::Gone { attach_at } => attach_at,
        };
        let consequence = self.unserved_since.filter(|_| !self.paused).map(|since| since + self.patience());
        link.into_iter().chain(consequence).chain(self.load_deadline()).min()
    }

    /// When a load that is not over by then is to fail.
    fn load_deadline(&self) -> Option<Duration> {
        let until = self.load_until?;
        Some(self.unserved_since.map_or(until, |since| until.min(since + LOAD_PATIENCE)))
    }

    /// Takes in what has happened, and says what to do, in this order.
    pub fn on(&mut self, now: Duration, event: Event) -> Vec<Step> {
        let mut steps = Vec::new();
        if self.ended {
            return steps;
        }
        match event {
            Event::Fault => {
                if let Link::Quiet { .. } = self.link {
                    self.link = Link::Seen { look_at: now + GRACE };
                }
            }
            Event::Looked { outstanding, resident } => self.on_looked(now, outstanding, resident, &mut steps),
            Event::Pong { ping, waiting, away } => self.on_pong(now, ping, waiting, away),
            Event::Gone if self.policy == OnHandlerLoss::Kill => self.end("is gone", &mut steps),
            Event::Gone if self.is_gone() => {}
            Event::Gone => {
                self.away = None;
                let attach_at = if now < self.attached_at + LASTING {
                    let at = now + self.retry;
                    self.retry = (self.retry * 2).min(LAST_RETRY);
                    at
                } else {
                    self.retry = FIRST_RETRY;
                    now
                };
                self.link = Link::Gone { attach_at: Some(attach_at) };
            }
            Event::Refused(reason) => self.end(&format!("has taken back what it gave: {reason}"), &mut steps),
            Event::Attached => {
                (self.link, self.away, self.last_failure, self.unable) = (quiet(now), None, None, None);
                (self.attached_at, self.waiting_since) = (now, None);
            }
            Event::NotAttached(reason) => {
                self.last_failure = Some(reason);
                self.link = Link::Gone { attach_at: Some(now + self.retry) };
                self.retry = (self.retry * 2).min(LAST_RETRY);
            }
            Event::CannotServe(reason) => (self.here, self.unable) = (false, Some(reason)),
            Event::Time => self.on_time(now, &mut steps),
        }
        self.settle(now, &mut steps);
        if !self.ended && self.load_deadline().is_some_and(|at| now >= at) {
            self.load_until = None;
            let late = || format!("they have not come within {} s", LONGEST_LOAD.as_secs());
            steps.push(Step::GiveUpLoad(self.unserved().unwrap_or_else(late)));
        }
        steps
    }

    fn on_looked(&mut self, now: Duration, outstanding: bool, resident: u64, steps: &mut Vec<Step>) {
        let (before, times) = self.stuck_at;
        self.stuck_at = match outstanding {
            true if resident == before => (resident, times + 1),
            _ => (resident, 0),
        };
        if resident != before {
            self.waiting_since = None;
        }
        if self.stuck_at.1 >= LOST_AFTER && self.waiting_since.is_none() && self.speaks && !self.here {
            self.stuck_at.1 = 0;
            steps.push(Step::Wake);
        }
        match self.link {
            Link::Quiet { .. } if outstanding => self.link = Link::Seen { look_at: now + GRACE },
            Link::Quiet { pause, resident: before, .. } => {
                let pause = if resident == before { (pause * 2).min(DISTANT_LOOK) } else { CLOSE_LOOK };
                self.link = Link::Quiet { look_at: now + pause, pause, resident };
            }
            Link::Seen { .. } if !outstanding && self.away.is_none() => self.link = quiet(now),
            Link::Seen { .. } if self.speaks => {
                self.pings += 1;
                steps.push(Step::Ping(self.pings));
                self.link = Link::Asked { overdue_at: now + ANSWER };
            }
            Link::Seen { .. } => {
                self.link = Link::Stuck { resident, overdue_at: now + ANSWER, look_at: now + GRACE };
            }
            Link::Stuck { resident: before, .. } if !outstanding || resident != before => self.link = quiet(now),
            Link::Stuck { resident, overdue_at, .. } if now >= overdue_at => self.fall_silent(now, resident),
            Link::Stuck { resident, overdue_at, .. } => {
                self.link = Link::Stuck { resident, overdue_at, look_at: now + GRACE };
            }
            // One who says nothing may have come to life again: the pages tell, or, if they come from here, the next fault.
            Link::Silent { resident: before, .. } if !outstanding || (!self.here && resident != before) => {
                self.recovered_at = Some(now);
                self.link = quiet(now);
            }
            Link::Silent { since, .. } => {
                let again = if self.here { self.doubt } else { ASK_AGAIN_AWAY };
                self.link = Link::Silent { since, resident, look_at: Some(now + again) };
            }
            Link::Asked { .. } | Link::Gone { .. } => {}
        }
    }

    /// A server that speaks is heard when it does so again. The others are looked at.
    fn fall_silent(&mut self, now: Duration, resident: u64) {
        // One that had not come to life after all is doubted for longer each time.
        self.doubt = match self.recovered_at {
            Some(at) if now < at + self.doubt * 2 => (self.doubt * 2).min(LONGEST_STAND_IN),
            _ => STAND_IN,
        };
        self.link = Link::Silent { since: now, resident, look_at: (!self.speaks).then_some(now + self.doubt) };
    }

    fn on_pong(&mut self, now: Duration, ping: u64, waiting: u64, away: Option<String>) {
        // The answer to another question says nothing of what came since, and one that nobody waits for nothing at all.
        let awaited = self.speaks && matches!(self.link, Link::Asked { .. } | Link::Silent { .. });
        if !awaited || ping != self.pings {
            return;
        }
        self.link = match (waiting, &away) {
            (0, None) => quiet(now),
            (_, None) => Link::Seen { look_at: now + ASK_AGAIN },
            (_, Some(_)) => Link::Seen { look_at: now + ASK_AGAIN_AWAY },
        };
        self.away = away;
        if waiting == 0 {
            self.waiting_since = None;
        } else if now >= *self.waiting_since.get_or_insert(now) + SLOW {
            self.away.get_or_insert_with(|| "its bytes do not come".to_owned());
        }
    }

    fn on_time(&mut self, now: Duration, steps: &mut Vec<Step>) {
        match self.link {
            Link::Quiet { look_at, .. } | Link::Seen { look_at } | Link::Stuck { look_at, .. } if now >= look_at => {
                steps.push(Step::Look);
            }
            Link::Silent { look_at: Some(at), .. } if now >= at => steps.push(Step::Look),
            Link::Asked { overdue_at } if now >= overdue_at => self.fall_silent(now, 0),
            // Whoever listens there in the place of one that says nothing may serve another image, and would not say so.
            Link::Gone { attach_at: Some(at) } if now >= at && self.here && !self.speaks => {
                self.link = Link::Gone { attach_at: Some(now + LAST_RETRY) };
            }
            Link::Gone { attach_at: Some(at) } if now >= at => {
                self.link = Link::Gone { attach_at: None };
                steps.push(Step::Attach);
            }
            _ => {}
        }
    }

    /// What follows from where all stands now: who serves, and whether the guest runs.
    fn settle(&mut self, now: Duration, steps: &mut Vec<Step>) {
        if self.ended {
            return;
        }
        let needs_help = self.away.is_some() || matches!(self.link, Link::Silent { .. } | Link::Gone { .. });
        if !needs_help {
            // Next time it may do.
            self.unable = None;
        }
        let helps = needs_help && self.policy == OnHandlerLoss::Failover && self.unable.is_none();
        if helps != self.here {
            self.here = helps;
            steps.insert(0, if helps { Step::TakeOver } else { Step::StandDown });
        }
        if !needs_help || self.here {
            self.unserved_since = None;
            if std::mem::take(&mut self.paused) {
                steps.push(Step::Resume);
            }
            return;
        }
        let since = *self.unserved_since.get_or_insert(now);
        if self.paused || now < since + self.patience() {
            return;
        }
        if self.policy == OnHandlerLoss::Kill {
            let what = if self.away.is_some() { "cannot get its pages" } else { "does not answer" };
            self.end(what, steps);
        } else {
            self.paused = true;
            steps.push(Step::Pause(self.reason()));
        }
    }

    fn patience(&self) -> Duration {
        match self.policy {
            OnHandlerLoss::Failover | OnHandlerLoss::Reattach => PATIENCE,
            OnHandlerLoss::Pause => Duration::ZERO,
            OnHandlerLoss::Kill => DEADLY_SILENCE,
        }
    }

    /// Why the server does not serve.
    pub fn reason(&self) -> String {
        let state = match (&self.away, self.link) {
            (Some(away), _) => format!("it cannot get pages: {away}"),
            (None, Link::Gone { .. }) => "it is gone".to_owned(),
            (None, _) => "it does not answer".to_owned(),
        };
        let unable = self.unable.iter().map(|why| format!("; the vmm cannot serve them itself: {why}"));
        let failure = self.last_failure.iter().map(|why| format!("; attaching to it again fails: {why}"));
        std::iter::once(state).chain(unable).chain(failure).collect()
    }

    fn end(&mut self, reason: &str, steps: &mut Vec<Step>) {
        self.ended = true;
        steps.push(Step::End(reason.to_owned()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn looked(outstanding: bool) -> Event {
        Event::Looked { outstanding, resident: 0 }
    }

    fn pong(ping: u64) -> Event {
        Event::Pong { ping, waiting: 0, away: None }
    }

    fn away(ping: u64) -> Event {
        Event::Pong { ping, waiting: 1, away: Some("no route".into()) }
    }

    #[test]
    fn a_server_that_answers_in_time_is_left_alone() {
        let mut plan = Plan::new(OnHandlerLoss::Failover, true);
        assert_eq!((plan.deadline(), plan.waits_for_faults()), (Some(CLOSE_LOOK), true));
        assert_eq!(plan.on(ms(0), Event::Fault), []);
        assert_eq!((plan.deadline(), plan.waits_for_faults()), (Some(GRACE), false));
        assert_eq!(plan.on(GRACE, Event::Time), [Step::Look]);
        assert_eq!(plan.on(GRACE, looked(true)), [Step::Ping(1)]);
        assert_eq!(plan.on(ms(30), pong(1)), []);
        assert_eq!((plan.deadline(), plan.waits_for_faults()), (Some(ms(30) + CLOSE_LOOK), true));
    }

    #[test]
    fn a_fault_that_the_server_has_read_of_at_once_is_found() {
        let mut plan = Plan::new(OnHandlerLoss::Failover, true);
        let mut looks = 0;
        while plan.deadline().unwrap() < ms(5000) {
            let now = plan.deadline().unwrap();
            assert_eq!(plan.on(now, Event::Time), [Step::Look]);
            assert_eq!(plan.on(now, looked(false)), []);
            looks += 1;
        }
        assert!((10..16).contains(&looks), "{looks} looks in five seconds in which nothing happens");
        let now = plan.deadline().unwrap();
        plan.on(now, Event::Time);
        plan.on(now, looked(true));
        assert_eq!(plan.on(now + GRACE, Event::Time), [Step::Look]);
        assert_eq!(plan.on(now + GRACE, looked(true)), [Step::Ping(1)]);
        plan.on(now + GRACE, pong(1));
        // While pages come it is looked at often.
        for (n, resident) in [1, 2, 3].into_iter().enumerate() {
            let now = plan.deadline().unwrap();
            plan.on(now, Event::Time);
            plan.on(now, Event::Looked { outstanding: false, resident });
            assert_eq!(plan.deadline(), Some(now + CLOSE_LOOK), "{n}");
        }
    }

    #[test]
    fn one_that_does_not_is_stood_in_for_until_it_does() {
        let mut plan = Plan::new(OnHandlerLoss::Failover, true);
        plan.on(ms(0), Event::Fault);
        plan.on(GRACE, Event::Time);
        plan.on(GRACE, looked(true));
        assert_eq!(plan.deadline(), Some(GRACE + ANSWER));
        assert_eq!(plan.on(GRACE + ANSWER, Event::Time), [Step::TakeOver]);
        assert!(plan.serves_here() && plan.unserved().is_none() && !plan.waits_for_faults());
        assert_eq!(plan.on(ms(900), pong(1)), [Step::StandDown]);
        assert!(plan.waits_for_faults());
    }

    #[test]
    fn a_guest_whose_server_is_gone_is_served_here_and_then_by_the_next() {
        let mut plan = Plan::new(OnHandlerLoss::Failover, true);
        assert_eq!(plan.on(ms(20_005), Event::Gone), [Step::TakeOver]);
        assert_eq!(plan.on(plan.deadline().unwrap(), Event::Time), [Step::Attach]);
        assert_eq!(plan.deadline(), Some(LONGEST_LOAD), "one attempt at a time");
        plan.on(ms(20_010), Event::NotAttached("refused".into()));
        assert_eq!(plan.deadline(), Some(ms(20_010) + FIRST_RETRY));
        assert_eq!(plan.on(ms(20_060), Event::Time), [Step::Attach]);
        assert_eq!(plan.on(ms(20_061), Event::Attached), [Step::StandDown]);
    }

    #[test]
    fn a_guest_that_nobody_can_serve_is_paused_with_the_reason_until_somebody_does() {
        let mut plan = Plan::new(OnHandlerLoss::Failover, true);
        plan.on(ms(0), Event::Gone);
        plan.on(ms(1), Event::CannotServe("mem.bin is damaged".into()));
        plan.on(ms(1), Event::Time);
        plan.on(ms(2), Event::NotAttached("nobody listens".into()));
        let [Step::Pause(reason)] = &plan.on(ms(1) + PATIENCE, Event::NotAttached("still".into()))[..] else {
            panic!()
        };
        assert!(["is gone", "mem.bin is damaged", "still"].iter().all(|part| reason.contains(part)), "{reason}");
        assert_eq!(plan.unserved().as_ref(), Some(reason));
        assert_eq!(plan.on(ms(9000), Event::Attached), [Step::Resume]);
        assert_eq!(plan.unserved(), None);
    }

    #[test]
    fn a_store_that_is_away_pauses_and_the_server_is_asked_until_it_is_back() {
        let mut plan = Plan::new(OnHandlerLoss::Reattach, true);
        plan.on(ms(0), Event::Fault);
        plan.on(ms(10), Event::Time);
        plan.on(ms(10), looked(true));
        assert_eq!(plan.on(ms(11), away(1)), []);
        let mut now = plan.deadline().unwrap();
        let mut paused = Vec::new();
        while now < ms(3000) {
            for step in plan.on(now, Event::Time) {
                match step {
                    // The vCPUs of a paused guest wait for nothing.
                    Step::Look => {
                        let [Step::Ping(ping)] = plan.on(now, looked(paused.is_empty()))[..] else { panic!() };
                        plan.on(now, away(ping));
                    }
                    Step::Pause(reason) => paused.push((now, reason)),
                    Step::Wake => {}
                    other => panic!("{other:?}"),
                }
            }
            now = plan.deadline().unwrap();
        }
        let [(at, reason)] = &paused[..] else { panic!("{paused:?}") };
        assert!(*at == ms(11) + PATIENCE && reason.contains("no route"), "{at:?} {reason}");
        plan.on(now, Event::Time);
        let [Step::Ping(ping)] = plan.on(now, looked(false))[..] else { panic!() };
        assert_eq!(plan.on(now, pong(ping)), [Step::Resume]);
    }

    #[test]
    fn a_server_that_says_nothing_is_judged_by_its_pages() {
        let mut plan = Plan::new(OnHandlerLoss::Failover, false);
        let stuck = |plan: &mut Plan, from: Duration| {
            plan.on(from, Event::Fault);
            let mut now = from + GRACE;
            while !plan.serves_here() {
                assert_eq!(plan.on(now, Event::Time), [Step::Look]);
                plan.on(now, looked(true));
                now = plan.deadline().unwrap();
            }
            now
        };
        plan.on(ms(0), Event::Fault);
        plan.on(GRACE, Event::Time);
        plan.on(GRACE, looked(true));
        plan.on(GRACE * 2, Event::Time);
        plan.on(GRACE * 2, Event::Looked { outstanding: true, resident: 4096 });
        assert!(plan.waits_for_faults(), "a page has come");
        let look = stuck(&mut plan, ms(100));
        assert!((ms(100) + STAND_IN..ms(200) + STAND_IN).contains(&look));
        assert_eq!(plan.on(look, Event::Time), [Step::Look]);
        assert_eq!(plan.on(look, looked(false)), [Step::StandDown]);
        // It had not come to life: so it is doubted for longer.
        let again = stuck(&mut plan, look + ms(10));
        assert!(again >= look + STAND_IN * 2, "{again:?}");
    }

    #[test]
    fn one_who_says_nothing_is_not_followed_by_whoever_listens_there_next_while_the_guest_is_served_here() {
        let mut plan = Plan::new(OnHandlerLoss::Failover, false);
        plan.on(ms(0), Event::Gone);
        for _ in 0..10 {
            let now = plan.deadline().unwrap();
            assert_eq!(plan.on(now, Event::Time), []);
        }
        plan.on(ms(20_000), Event::CannotServe("no image".into()));
        let steps = plan.on(plan.deadline().unwrap().max(ms(20_000)) + LAST_RETRY, Event::Time);
        assert!(steps.contains(&Step::Attach), "{steps:?}");
    }

    #[test]
    fn faults_that_the_server_has_lost_are_raised_again_and_bytes_that_do_not_come_are_away() {
        let mut plan = Plan::new(OnHandlerLoss::Reattach, true);
        let (mut now, mut wakes, mut waiting) = (ms(0), 0, 0);
        plan.on(now, Event::Fault);
        while now < ms(2000) || (waiting > 0 && now < ms(8000)) {
            now = plan.deadline().unwrap();
            for step in plan.on(now, Event::Time) {
                match step {
                    Step::Look => {
                        for step in plan.on(now, looked(true)) {
                            match step {
                                Step::Ping(ping) => {
                                    assert_eq!(plan.on(now, Event::Pong { ping, waiting, away: None }), []);
                                }
                                Step::Wake => wakes += 1,
                                other => panic!("{other:?}"),
                            }
                        }
                    }
                    Step::Pause(reason) => {
                        assert!(waiting > 0 && reason.contains("do not come"), "{reason}");
                        return;
                    }
                    other => panic!("{other:?}"),
                }
            }
            waiting = u64::from(now > ms(1500));
        }
        panic!("it is never paused; {wakes} wakes");
    }

    #[test]
    fn a_server_that_serves_for_moments_only_is_not_attached_to_without_a_pause() {
        let mut plan = Plan::new(OnHandlerLoss::Failover, true);
        let (mut now, mut attached) = (ms(20_000), 0);
        plan.on(now, Event::Gone);
        while now < ms(25_000) {
            now = plan.deadline().unwrap();
            if plan.on(now, Event::Time).contains(&Step::Attach) {
                plan.on(now, Event::Attached);
                plan.on(now, Event::Gone);
                attached += 1;
            }
        }
        assert!(attached < 12, "{attached} times in five seconds");
    }

    #[test]
    fn a_guest_that_is_to_end_with_its_server_does() {
        let mut plan = Plan::new(OnHandlerLoss::Kill, true);
        assert!(matches!(&plan.on(ms(0), Event::Gone)[..], [Step::End(_)]));
        let mut plan = Plan::new(OnHandlerLoss::Kill, true);
        plan.on(ms(0), Event::Fault);
        plan.on(ms(10), Event::Time);
        plan.on(ms(10), looked(true));
        assert_eq!(plan.on(ms(60), Event::Time), []);
        assert_eq!(plan.deadline(), Some(ms(60) + DEADLY_SILENCE));
        assert!(matches!(&plan.on(ms(60) + DEADLY_SILENCE, Event::Time)[..], [Step::End(_)]));
        // One that lives and cannot get its bytes is no better.
        let mut plan = Plan::new(OnHandlerLoss::Kill, true);
        plan.on(ms(0), Event::Fault);
        plan.on(ms(10), Event::Time);
        plan.on(ms(10), looked(true));
        plan.on(ms(11), away(1));
        assert!(matches!(&plan.on(ms(11) + DEADLY_SILENCE, Event::Time)[..], [.., Step::End(_)]));
    }

    #[test]
    fn a_load_that_nobody_serves_is_given_up_once_and_one_that_is_served_in_the_end_is_not() {
        for policy in [OnHandlerLoss::Failover, OnHandlerLoss::Reattach, OnHandlerLoss::Pause] {
            let gone = || {
                let mut plan = Plan::new(policy, true);
                plan.on(ms(100), Event::Gone);
                plan.on(ms(100), Event::CannotServe("chunk 7 is damaged".into()));
                plan
            };
            let given_up = |steps: Vec<Step>| {
                let reasons = steps.into_iter().filter_map(|step| match step {
                    Step::GiveUpLoad(reason) => Some(reason),
                    _ => None,
                });
                reasons.collect::<Vec<_>>()
            };
            let (mut plan, mut told) = (gone(), Vec::new());
            while plan.deadline().is_some_and(|at| at < ms(100_000)) {
                let now = plan.deadline().unwrap();
                let steps = plan.on(now, Event::Time);
                if steps.contains(&Step::Attach) {
                    plan.on(now, Event::NotAttached("the image is damaged".into()));
                }
                told.extend(given_up(steps).into_iter().map(|reason| (now, reason)));
            }
            let [(at, reason)] = &told[..] else { panic!("{told:?}") };
            assert_eq!(*at, ms(100) + LOAD_PATIENCE);
            assert!(
                ["is gone", "chunk 7", "the image is damaged"].iter().all(|part| reason.contains(part)),
                "{reason}"
            );

            let mut plan = gone();
            plan.on(ms(4000), Event::Attached);
            assert!(plan.deadline().unwrap() < LONGEST_LOAD);
            assert_eq!(given_up(plan.on(LONGEST_LOAD - ms(1), Event::Time)), [""; 0]);
            let [reason] = &given_up(plan.on(LONGEST_LOAD, Event::Time))[..] else { panic!() };
            assert!(reason.contains("60 s"), "{reason}");
        }
    }

    #[test]
    fn no_policy_outlives_a_store_that_is_not_to_be_trusted() {
        for policy in POLICIES {
            let steps = Plan::new(policy, true).on(ms(0), Event::Refused("wrong pages".into()));
            assert!(matches!(&steps[..], [Step::End(reason)] if reason.contains("wrong pages")));
        }
    }

    const POLICIES: [OnHandlerLoss; 4] =
        [OnHandlerLoss::Failover, OnHandlerLoss::Reattach, OnHandlerLoss::Pause, OnHandlerLoss::Kill];

    fn events() -> impl Strategy<Value = Event> {
        prop_oneof![
            3 => Just(Event::Fault),
            4 => (any::<bool>(), 0..3u64).prop_map(|(outstanding, resident)| Event::Looked { outstanding, resident }),
            4 => (0..6u64, 0..2u64, any::<bool>()).prop_map(|(ping, waiting, away)| Event::Pong {
                ping,
                waiting,
                away: away.then(|| "away".into())
            }),
            1 => Just(Event::Gone),
            2 => Just(Event::Attached),
            2 => Just(Event::NotAttached("x".into())),
            1 => Just(Event::CannotServe("x".into())),
            6 => Just(Event::Time),
        ]
    }

    proptest! {
        #[test]
        fn a_guest_is_served_or_paused_and_each_step_follows_its_opposite(
            policy in prop::sample::select(POLICIES.to_vec()),
            speaks in any::<bool>(),
            events in prop::collection::vec((0..200u64, events()), 0..80),
        ) {
            let mut plan = Plan::new(policy, speaks);
            let (mut now, mut here, mut paused, mut ended, mut able) = (Duration::ZERO, false, false, false, true);
            let mut given_up = false;
            for (wait, event) in events {
                now += ms(wait);
                // An attempt has an outcome only if there was one; a guest that is served here can stop to be.
                match &event {
                    Event::Attached | Event::NotAttached(_) if !plan.is_gone() => continue,
                    Event::CannotServe(_) if !here => continue,
                    Event::CannotServe(_) => (here, able) = (false, false),
                    _ => {}
                }
                for step in plan.on(now, event) {
                    prop_assert!(!ended);
                    match step {
                        Step::TakeOver => prop_assert!(!std::mem::replace(&mut here, true) && able),
                        Step::StandDown => prop_assert!(std::mem::replace(&mut here, false)),
                        Step::Pause(_) => prop_assert!(!std::mem::replace(&mut paused, true) && !here),
                        Step::Resume => prop_assert!(std::mem::replace(&mut paused, false)),
                        Step::End(_) => ended = true,
                        Step::GiveUpLoad(_) => prop_assert!(!std::mem::replace(&mut given_up, true)),
                        Step::Look | Step::Ping(_) | Step::Attach | Step::Wake => {}
                    }
                }
                prop_assert_eq!(plan.serves_here(), here);
                // Whoever could not serve here may be able to when that is needed again.
                able |= plan.unserved().is_none() && !here && !plan.is_gone();
                prop_assert!(!(here && paused));
                prop_assert_eq!(plan.unserved().is_none() && paused, false);
                if policy == OnHandlerLoss::Kill {
                    prop_assert!(!here && !paused);
                }
                if policy == OnHandlerLoss::Failover && able && plan.is_gone() {
                    prop_assert!(here, "a guest without a server is served here");
                }
                // Nobody is forgotten: whoever is not served is paused, ended, or has a time at which that is seen to.
                if plan.unserved().is_some() && !paused && !ended {
                    let at = plan.deadline();
                    prop_assert!(at.is_some_and(|at| at <= now.max(ms(0)) + PATIENCE + DEADLY_SILENCE));
                }
            }
        }
    }
}
