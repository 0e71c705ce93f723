//! `vmm ctl loop`: asks a guest's agent something again and again, each time over a stream of its own, and has the guest reset after
//! each answer.

use super::{CtlError, failed};
use crate::machine::phases::us_since;
use api_spec::agent::Request;
use api_spec::client::{AgentClient, VmClient};
use api_spec::reset::VmReset;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What a command line says of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Rounds {
    /// The socket, if it is named.
    pub api_sock: Option<PathBuf>,
    /// Print JSON.
    pub json: bool,
    /// How long each answer of the vmm, and of the guest's agent, may take.
    pub patience: Duration,
    /// Reset the guest after each answer of its agent.
    pub resets: bool,
    /// How often.
    pub count: u32,
}

/// How long each step has taken, in microseconds.
#[derive(Debug, Default)]
struct Taken {
    request: Vec<u64>,
    reset: Vec<u64>,
    /// As the vmm has it.
    inside: Vec<u64>,
    dirty_pages: Vec<u64>,
}

impl Rounds {
    /// Does it, over the vmm's API at `socket`. The document that tells how it went.
    pub fn run(&self, socket: &Path) -> Result<Value, CtlError> {
        let failed = |call| failed(call, socket, self.patience);
        let mut vm = VmClient::connect(socket, self.patience).map_err(failed("GET /vm/config"))?;
        let vsock = vm.config().map_err(failed("GET /vm/config"))?.vsock.ok_or(CtlError::NoVsock)?.uds_path;
        let (mut taken, started) = (Taken::default(), Instant::now());
        for round in 0..self.count {
            let start = Instant::now();
            let asked = AgentClient::connect(&vsock, self.patience)
                .and_then(|mut agent| agent.call(Request::Ping { token: round.into() }).map(|_| agent));
            // It is kept until then, so that the guest has no time to hear of its end.
            let _agent = asked.map_err(|source| CtlError::Agent { path: vsock.clone(), source: Box::new(source) })?;
            taken.request.push(us_since(start));
            if self.resets {
                let start = Instant::now();
                let done = vm.reset(&VmReset::default()).map_err(failed("PUT /vm/reset"))?;
                taken.reset.push(us_since(start));
                taken.inside.push(done.trace.total_ns / 1000);
                taken.dirty_pages.push(done.dirty_pages);
            }
        }
        Ok(taken.tell(self.count, started.elapsed()))
    }
}

impl Taken {
    fn tell(self, rounds: u32, time: Duration) -> Value {
        let mut told = json!({
            "rounds": rounds,
            "seconds": (time.as_secs_f64() * 1000.0).round() / 1000.0,
            "rounds_per_second": (f64::from(rounds) / time.as_secs_f64()).round(),
        });
        let of = [
            ("request_us", self.request),
            ("reset_us", self.reset),
            ("reset_inside_us", self.inside),
            ("dirty_pages", self.dirty_pages),
        ];
        for (name, values) in of {
            if let Some(spread) = spread(values) {
                told[name] = spread;
            }
        }
        told
    }
}

/// The middle and the upper end of some values; `None` if there are none.
fn spread(mut values: Vec<u64>) -> Option<Value> {
    values.sort_unstable();
    let at = |hundredths: usize| values.get((values.len() * hundredths / 100).min(values.len().saturating_sub(1)));
    Some(json!({ "p50": at(50)?, "p99": at(99)?, "max": values.last()? }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_the_middle_and_the_end() {
        assert_eq!(spread(vec![]), None);
        assert_eq!(spread(vec![7]), Some(json!({ "p50": 7, "p99": 7, "max": 7 })));
        assert_eq!(spread((0..1000).rev().collect()), Some(json!({ "p50": 500, "p99": 990, "max": 999 })));
        let told = Taken { request: vec![5; 4], ..Taken::default() }.tell(4, Duration::from_millis(500));
        assert_eq!((&told["rounds_per_second"], &told["seconds"]), (&json!(8.0), &json!(0.5)));
        assert!(told["request_us"]["p50"] == 5 && told.get("reset_us").is_none(), "{told}");
    }
}
