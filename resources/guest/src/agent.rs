//! The agent: a request in, an answer out. What needs the machine goes through [`Machine`].

use crate::rng::Rng;
use api_spec::agent::burn::Burn;
use api_spec::agent::pattern::{self, Checksum, WORDS};
use api_spec::agent::{Info, Pages, Refusal, Request, Response, Resumed};

/// The machine, as the agent needs it.
pub trait Machine {
    /// Facts that do not change.
    fn info(&self) -> Info;
    /// Work page `number`, which is less than [`Info::pages`].
    fn page(&mut self, number: u32) -> &mut [u64; WORDS];
    /// The generation id that stands in guest memory now; zeros if there is none.
    fn generation(&self) -> [u8; 16];
    /// The time-stamp counter.
    fn tsc(&self) -> u64;
    /// Runs a burn of so many steps here.
    fn burn(&mut self, steps: u64) -> Burn;
    /// Sets another vCPU to burn.
    fn burn_start(&mut self, vcpu: u8) -> Result<(), Refusal>;
    /// Stops that.
    fn burn_stop(&mut self, vcpu: u8) -> Result<Burn, Refusal>;
    /// Gives work pages back to the host, through a balloon.
    fn give_back(&mut self, pages: Pages) -> Result<(), Refusal>;
    /// Writes work pages to the first disk, or reads them from it.
    fn disk(&mut self, transfer: Transfer, pages: Pages) -> Result<(), Refusal>;
    /// Resets the machine.
    fn reset(&mut self);
}

/// Which way pages go between memory and a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// From the disk.
    Read,
    /// To the disk.
    Write,
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// An answer.
    Answer(Response),
    /// The answer is [`Response::Ticks`] once there have been so many timer interrupts.
    AtTick(u64),
    /// No answer.
    Nothing,
}

/// The agent's memory, and the machine it works on.
pub struct Agent<M> {
    machine: M,
    nonce: [u8; 16],
    rng: Rng,
    seen_generation: [u8; 16],
    tsc_khz: u64,
    clock: Option<Clock>,
    ticks: u64,
}

/// A moment at which wall clock and time-stamp counter were both known.
struct Clock {
    wall_ns: u64,
    tsc: u64,
}

impl<M: Machine> Agent<M> {
    /// An agent whose nonce and random state come from `seed`, the generation id and the time-stamp counter.
    /// A rate of 0 means unknown: the wall clock then stands where it was set.
    pub fn new(machine: M, seed: [u8; 32], tsc_khz: u64) -> Self {
        let mut rng = Rng::new();
        let seen_generation = machine.generation();
        rng.absorb(&seed);
        rng.absorb(&machine.tsc().to_le_bytes());
        rng.absorb(&seen_generation);
        let mut nonce = [0; 16];
        nonce.copy_from_slice(&rng.bytes()[..16]);
        Agent { machine, nonce, rng, seen_generation, tsc_khz, clock: None, ticks: 0 }
    }

    /// Timer interrupts since boot.
    pub fn ticks(&self) -> u64 {
        self.ticks
    }

    /// The answer to who has waited for ticks.
    pub fn ticks_so_far(&self) -> Response {
        Response::Ticks { count: self.ticks }
    }

    /// Counts a timer interrupt.
    pub fn tick(&mut self) {
        self.ticks += 1;
    }

    /// Does what a request asks.
    pub fn serve(&mut self, request: &Request) -> Outcome {
        Outcome::Answer(match *request {
            Request::Ping { token } => Response::Pong { token },
            Request::Resumed(resumed) => self.resumed(&resumed),
            Request::Info => Response::Info(self.machine.info()),
            Request::Nonce => Response::Nonce(self.nonce),
            Request::Ticks { advance: 0 } => self.ticks_so_far(),
            Request::Ticks { advance } => return Outcome::AtTick(self.ticks + u64::from(advance)),
            Request::Random => self.random(),
            Request::Generation => Response::Generation(self.machine.generation()),
            Request::Time => self.time(),
            Request::Fill { pages, seed } => self.on_pages(
                pages,
                |number, page, ()| {
                    for (index, word) in page.iter_mut().enumerate() {
                        *word = pattern::word(seed, number, index);
                    }
                },
                |()| Response::Done,
            ),
            Request::Touch { pages } => {
                self.on_pages(pages, |_, page, sum: u64| sum.wrapping_add(page[0]), Response::Sum)
            }
            Request::Write { pages, value } => self.on_pages(pages, |_, page, ()| page[0] = value, |()| Response::Done),
            Request::Checksum { pages } => self.on_pages(
                pages,
                |_, page, sum: Checksum| page.iter().fold(sum, |sum, &word| sum.add(word)),
                |sum| Response::Sum(sum.value()),
            ),
            Request::Verify { pages, seed } => self.on_pages(
                pages,
                |number, page, wrong: u64| {
                    let differs = |&(index, &word): &(usize, &u64)| word != pattern::word(seed, number, index);
                    wrong + page.iter().enumerate().filter(differs).count() as u64
                },
                Response::Mismatches,
            ),
            Request::Burn { steps } => Response::Burned(self.machine.burn(steps)),
            Request::BurnStart { vcpu } => {
                self.machine.burn_start(vcpu).map_or_else(Response::Refused, |()| Response::Done)
            }
            Request::BurnStop { vcpu } => self.machine.burn_stop(vcpu).map_or_else(Response::Refused, Response::Burned),
            Request::GiveBack { pages } | Request::DiskWrite { pages } | Request::DiskRead { pages }
                if !pages.fits(self.machine.info().pages) =>
            {
                Response::Refused(Refusal::NoSuchPages)
            }
            Request::GiveBack { pages } => {
                self.machine.give_back(pages).map_or_else(Response::Refused, |()| Response::Done)
            }
            Request::DiskWrite { pages } => {
                self.machine.disk(Transfer::Write, pages).map_or_else(Response::Refused, |()| Response::Done)
            }
            Request::DiskRead { pages } => {
                self.machine.disk(Transfer::Read, pages).map_or_else(Response::Refused, |()| Response::Done)
            }
            Request::Reset => {
                self.machine.reset();
                return Outcome::Nothing;
            }
            Request::Linux => Response::Refused(Refusal::NotHere),
        })
    }

    /// Folds `work` over the chosen pages, if the guest has them all.
    fn on_pages<T: Default>(
        &mut self,
        pages: Pages,
        mut work: impl FnMut(u32, &mut [u64; WORDS], T) -> T,
        done: impl FnOnce(T) -> Response,
    ) -> Response {
        if !pages.fits(self.machine.info().pages) {
            return Response::Refused(Refusal::NoSuchPages);
        }
        done(pages.numbers().fold(T::default(), |state, number| work(number, self.machine.page(number), state)))
    }

    /// Takes a clone's identity: from here on nothing is as in its siblings.
    fn resumed(&mut self, resumed: &Resumed) -> Response {
        self.rng.absorb(&resumed.entropy);
        self.rng.absorb(&resumed.generation);
        self.clock = Some(Clock { wall_ns: resumed.time_ns, tsc: self.machine.tsc() });
        Response::Resumed { generation: resumed.generation }
    }

    /// Random bytes, after a look at the generation page: a changed id means that this is a clone, told or not.
    fn random(&mut self) -> Response {
        let generation = self.machine.generation();
        if generation != self.seen_generation {
            self.seen_generation = generation;
            self.rng.absorb(&generation);
        }
        Response::Random(self.rng.bytes())
    }

    fn time(&self) -> Response {
        let tsc = self.machine.tsc();
        let wall_ns = self.clock.as_ref().map_or(0, |clock| {
            let passed = u128::from(tsc.saturating_sub(clock.tsc)) * 1_000_000;
            clock.wall_ns.saturating_add(passed.checked_div(self.tsc_khz.into()).unwrap_or(0) as u64)
        });
        Response::Time { tsc, wall_ns }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use api_spec::agent::GuestKind;
    use std::cell::Cell;

    /// A machine of four work pages.
    pub(crate) struct Mock {
        pages: [[u64; WORDS]; 4],
        generation: [u8; 16],
        tsc: Cell<u64>,
    }

    impl Machine for Mock {
        fn info(&self) -> Info {
            Info { kind: GuestKind::Embedded, vcpus: 1, pages: 4, pages_base: 2 << 20 }
        }
        fn page(&mut self, number: u32) -> &mut [u64; WORDS] {
            &mut self.pages[number as usize]
        }
        fn generation(&self) -> [u8; 16] {
            self.generation
        }
        fn tsc(&self) -> u64 {
            self.tsc.get()
        }
        fn burn(&mut self, steps: u64) -> Burn {
            Burn::after(steps)
        }
        fn burn_start(&mut self, _: u8) -> Result<(), Refusal> {
            Err(Refusal::NoSuchVcpu)
        }
        fn burn_stop(&mut self, _: u8) -> Result<Burn, Refusal> {
            Err(Refusal::NoSuchVcpu)
        }
        fn give_back(&mut self, pages: Pages) -> Result<(), Refusal> {
            pages.numbers().for_each(|number| self.page(number).fill(0));
            Ok(())
        }
        fn disk(&mut self, _: Transfer, _: Pages) -> Result<(), Refusal> {
            Err(Refusal::NotHere)
        }
        fn reset(&mut self) {}
    }

    pub(crate) fn agent() -> Agent<Mock> {
        let machine = Mock { pages: [[0; WORDS]; 4], generation: [0; 16], tsc: Cell::new(1000) };
        Agent::new(machine, [1; 32], 2_000_000)
    }

    fn answer(agent: &mut Agent<Mock>, request: Request) -> Response {
        match agent.serve(&request) {
            Outcome::Answer(response) => response,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn pages_are_filled_verified_and_summed() {
        let mut agent = agent();
        let pages = Pages { first: 1, count: 2, stride: 2 };
        assert_eq!(answer(&mut agent, Request::Fill { pages, seed: 5 }), Response::Done);
        assert_eq!(answer(&mut agent, Request::Verify { pages, seed: 5 }), Response::Mismatches(0));
        let sum = Checksum::of_pattern(pages, 5).value();
        assert_eq!(answer(&mut agent, Request::Checksum { pages }), Response::Sum(sum));
        let words = pattern::word(5, 1, 0).wrapping_add(pattern::word(5, 3, 0));
        assert_eq!(answer(&mut agent, Request::Touch { pages }), Response::Sum(words));
        assert_eq!(answer(&mut agent, Request::Write { pages: Pages::run(3, 1), value: 0 }), Response::Done);
        assert_eq!(answer(&mut agent, Request::Verify { pages, seed: 5 }), Response::Mismatches(1));
        assert_eq!(answer(&mut agent, Request::GiveBack { pages }), Response::Done);
        assert_eq!(answer(&mut agent, Request::Touch { pages }), Response::Sum(0));
        assert_eq!(answer(&mut agent, Request::DiskRead { pages }), Response::Refused(Refusal::NotHere));
        let outside = Request::DiskWrite { pages: Pages::run(3, 2) };
        assert_eq!(answer(&mut agent, outside), Response::Refused(Refusal::NoSuchPages));
        let outside = Request::GiveBack { pages: Pages::run(3, 2) };
        assert_eq!(answer(&mut agent, outside), Response::Refused(Refusal::NoSuchPages));
        let outside = Request::Touch { pages: Pages::run(0, 5) };
        assert_eq!(answer(&mut agent, outside), Response::Refused(Refusal::NoSuchPages));
    }

    #[test]
    fn clones_agree_on_random_bytes_until_one_learns_what_it_is() {
        let (mut one, mut two, mut three) = (agent(), agent(), agent());
        let before = answer(&mut one, Request::Random);
        assert_eq!(before, answer(&mut two, Request::Random));
        assert_eq!(before, answer(&mut three, Request::Random));
        let resumed = Resumed { generation: [2; 16], time_ns: 7, entropy: [3; 32] };
        assert_eq!(answer(&mut one, Request::Resumed(resumed)), Response::Resumed { generation: [2; 16] });
        two.machine.generation = [9; 16];
        let (one, two, three) =
            (answer(&mut one, Request::Random), answer(&mut two, Request::Random), answer(&mut three, Request::Random));
        assert!(one != two && two != three && one != three);
    }

    #[test]
    fn the_wall_clock_runs_from_the_moment_it_was_told() {
        let mut agent = agent();
        assert_eq!(answer(&mut agent, Request::Time), Response::Time { tsc: 1000, wall_ns: 0 });
        let resumed = Resumed { generation: [0; 16], time_ns: 1_000_000, entropy: [0; 32] };
        answer(&mut agent, Request::Resumed(resumed));
        agent.machine.tsc.set(1000 + 2_000_000_000);
        assert_eq!(answer(&mut agent, Request::Time), Response::Time { tsc: 2_000_001_000, wall_ns: 1_001_000_000 });
    }

    #[test]
    fn ticks_are_waited_for() {
        let mut agent = agent();
        assert_eq!(agent.serve(&Request::Ticks { advance: 3 }), Outcome::AtTick(3));
        agent.tick();
        assert_eq!(answer(&mut agent, Request::Ticks { advance: 0 }), Response::Ticks { count: 1 });
    }
}
