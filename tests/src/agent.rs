//! Talking to the agent in a guest, in questions with one kind of answer each.

use crate::PATIENCE;
use api_spec::agent::burn::Burn;
use api_spec::agent::{Info, Pages, Request, Response, Resumed};
use api_spec::client::AgentClient;
use api_spec::client::agent::AgentError;
use std::path::Path;
use std::time::Duration;

/// A connection to the agent in a guest.
#[derive(Debug)]
pub struct Agent {
    client: AgentClient,
}

macro_rules! question {
    ($(#[$doc:meta])* $name:ident($($arg:ident: $kind:ty),*) = $request:expr, $answer:pat => $value:expr, $result:ty) => {
        $(#[$doc])*
        #[track_caller]
        pub fn $name(&mut self $(, $arg: $kind)*) -> $result {
            match self.ask($request) {
                $answer => $value,
                other => panic!("the agent answered {other:?}, which is no answer to {:?}", $request),
            }
        }
    };
}

impl Agent {
    /// Takes over a connection.
    pub fn new(client: AgentClient) -> Self {
        Agent { client }
    }

    /// Connects to a guest that is known to run.
    pub fn connect(vsock: &Path) -> Self {
        Agent::new(AgentClient::connect(vsock, PATIENCE).expect("the vsock socket takes connections"))
    }

    /// Asks anything.
    pub fn try_ask(&mut self, request: Request) -> Result<Response, AgentError> {
        self.client.call(request)
    }

    /// Asks anything, and waits no longer than `patience`.
    pub fn try_ask_within(&mut self, patience: Duration, request: Request) -> Result<Response, AgentError> {
        self.client.set_patience(patience);
        let answer = self.client.call(request);
        self.client.set_patience(PATIENCE);
        answer
    }

    /// Asks anything; panics if no answer comes.
    #[track_caller]
    pub fn ask(&mut self, request: Request) -> Response {
        self.try_ask(request).unwrap_or_else(|e| panic!("{request:?}: {e}"))
    }

    question!(
        /// Sends a token, which comes back.
        ping(token: u64) = Request::Ping { token }, Response::Pong { token } => token, u64
    );
    question!(
        /// Facts about the guest.
        info() = Request::Info, Response::Info(info) => info, Info
    );
    question!(
        /// The boot nonce.
        nonce() = Request::Nonce, Response::Nonce(nonce) => nonce, [u8; 16]
    );
    question!(
        /// Timer interrupts since boot, after so many more.
        ticks(advance: u32) = Request::Ticks { advance }, Response::Ticks { count } => count, u64
    );
    question!(
        /// Random bytes.
        random() = Request::Random, Response::Random(bytes) => bytes, [u8; 32]
    );
    question!(
        /// The generation id in guest memory.
        generation() = Request::Generation, Response::Generation(id) => id, [u8; 16]
    );
    question!(
        /// Gives the guest an identity; the generation that it took.
        resumed(resumed: Resumed) = Request::Resumed(resumed), Response::Resumed { generation } => generation, [u8; 16]
    );
    question!(
        /// Writes a pattern into pages.
        fill(pages: Pages, seed: u64) = Request::Fill { pages, seed }, Response::Done => (), ()
    );
    question!(
        /// How many words of pages are not as in a pattern.
        mismatches(pages: Pages, seed: u64) = Request::Verify { pages, seed }, Response::Mismatches(words) => words, u64
    );
    question!(
        /// Reads one word of each page; their sum.
        touch(pages: Pages) = Request::Touch { pages }, Response::Sum(sum) => sum, u64
    );
    question!(
        /// Writes the first word of each page.
        write(pages: Pages, value: u64) = Request::Write { pages, value }, Response::Done => (), ()
    );
    question!(
        /// Gives pages back to the host.
        give_back(pages: Pages) = Request::GiveBack { pages }, Response::Done => (), ()
    );
    question!(
        /// Writes pages to the guest's disk.
        disk_write(pages: Pages) = Request::DiskWrite { pages }, Response::Done => (), ()
    );
    question!(
        /// Reads pages from the guest's disk.
        disk_read(pages: Pages) = Request::DiskRead { pages }, Response::Done => (), ()
    );
    question!(
        /// Checksum over pages.
        checksum(pages: Pages) = Request::Checksum { pages }, Response::Sum(sum) => sum, u64
    );
    question!(
        /// Computes on the vCPU that answers.
        burn(steps: u64) = Request::Burn { steps }, Response::Burned(burn) => burn, Burn
    );
    question!(
        /// Sets another vCPU to compute.
        burn_start(vcpu: u8) = Request::BurnStart { vcpu }, Response::Done => (), ()
    );
    question!(
        /// Stops another vCPU's computation.
        burn_stop(vcpu: u8) = Request::BurnStop { vcpu }, Response::Burned(burn) => burn, Burn
    );

    /// Reads the first word of one page.
    #[track_caller]
    pub fn word(&mut self, page: u32) -> u64 {
        self.touch(Pages::run(page, 1))
    }

    /// Writes the first word of one page.
    #[track_caller]
    pub fn set_word(&mut self, page: u32, value: u64) {
        self.write(Pages::run(page, 1), value);
    }
}
