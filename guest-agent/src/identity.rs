//! A clone becomes itself. Every step may be repeated: a host that gets no acknowledgement asks again.

use crate::hooks;
use crate::system::{System, hex};
use api_spec::agent::linux::{Failure, Identity, Part};
use std::io;
use std::path::Path;
use std::time::Duration;

/// The longest host name that Linux takes, in bytes.
const MAX_HOSTNAME: usize = 64;

/// Takes an identity, in an order in which nothing is made out of the parent's random state or clock: entropy, clock,
/// names, network, and then the user's hooks, which find everything in place.
pub fn take(system: &dyn System, identity: &Identity, hooks: &Path, deadline: Duration) -> Result<(), Failure> {
    let resumed = &identity.resumed;
    let machine_id = identity.machine_id.unwrap_or_else(|| machine_id_of(resumed.generation));
    check(identity)?;
    let step = |part, done: io::Result<()>| done.map_err(|e| Failure { part, detail: e.to_string() });
    step(Part::Entropy, system.add_entropy(&resumed.entropy))?;
    step(Part::Clock, system.set_clock(resumed.time_ns))?;
    step(Part::MachineId, system.set_machine_id(machine_id))?;
    if let Some(name) = &identity.hostname {
        step(Part::Hostname, system.set_hostname(name))?;
    }
    for interface in &identity.interfaces {
        system.configure(interface).map_err(|e| network(&interface.name, e))?;
    }
    let mut variables =
        vec![("COPPICE_GENERATION", hex(&resumed.generation)), ("COPPICE_MACHINE_ID", hex(&machine_id))];
    variables.extend(identity.hostname.iter().map(|name| ("COPPICE_HOSTNAME", name.clone())));
    run_hooks(&hooks.join("resumed"), &variables, deadline)
}

/// Runs hooks in their order, up to the first that fails.
pub fn run_hooks(dir: &Path, variables: &[(&'static str, String)], deadline: Duration) -> Result<(), Failure> {
    let failed = |detail: String| Failure { part: Part::Hook, detail };
    for outcome in hooks::run_all(dir, variables, deadline).map_err(|e| failed(format!("{}: {e}", dir.display())))? {
        outcome.map_err(|unsuccessful| failed(unsuccessful.to_string()))?;
    }
    Ok(())
}

/// The machine id of a clone that is given none: its generation id, with the marks of a random UUID.
fn machine_id_of(mut id: [u8; 16]) -> [u8; 16] {
    id[6] = id[6] & 0x0f | 0x40;
    id[8] = id[8] & 0x3f | 0x80;
    id
}

fn network(name: &str, error: impl std::fmt::Display) -> Failure {
    Failure { part: Part::Network, detail: format!("`{name}`: {error}") }
}

/// Refuses what could only fail half-way.
fn check(identity: &Identity) -> Result<(), Failure> {
    let is_name = |name: &str| {
        let fine = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'.';
        (1..=MAX_HOSTNAME).contains(&name.len()) && name.bytes().all(fine) && !name.starts_with(['-', '.'])
    };
    if let Some(name) = identity.hostname.as_ref().filter(|name| !is_name(name)) {
        return Err(Failure { part: Part::Hostname, detail: format!("`{}` is no host name", name.escape_debug()) });
    }
    for interface in &identity.interfaces {
        let fits = |a: &api_spec::agent::linux::Address| a.prefix <= if a.address.is_ipv4() { 32 } else { 128 };
        if let Some(a) = interface.addresses.iter().find(|a| !fits(a)) {
            return Err(network(&interface.name, format_args!("{}/{} is no address", a.address, a.prefix)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gate::Generation;
    use crate::system::Power;
    use api_spec::agent::Resumed;
    use api_spec::agent::linux::{Address, Interface};
    use std::sync::Mutex;

    /// Writes down what is done, and fails at one step.
    #[derive(Default)]
    struct Fake {
        done: Mutex<Vec<String>>,
        fails_at: Option<&'static str>,
    }

    impl Fake {
        fn step(&self, what: &str) -> io::Result<()> {
            self.done.lock().unwrap().push(what.to_owned());
            if self.fails_at == Some(what) { Err(io::Error::other("as planned")) } else { Ok(()) }
        }
    }

    impl System for Fake {
        fn generation(&self) -> Option<Generation> {
            None
        }
        fn add_entropy(&self, _: &[u8; 32]) -> io::Result<()> {
            self.step("entropy")
        }
        fn set_clock(&self, _: u64) -> io::Result<()> {
            self.step("clock")
        }
        fn set_hostname(&self, _: &str) -> io::Result<()> {
            self.step("hostname")
        }
        fn set_machine_id(&self, id: [u8; 16]) -> io::Result<()> {
            assert_eq!((id[6] >> 4, id[8] >> 6), (4, 2));
            self.step("machine-id")
        }
        fn configure(&self, interface: &Interface) -> io::Result<()> {
            self.step(&interface.name)
        }
        fn sync(&self) {}
        fn drop_caches(&self) -> io::Result<()> {
            Ok(())
        }
        fn power(&self, _: Power) -> io::Result<()> {
            Ok(())
        }
        fn reset(&self) -> io::Result<()> {
            Ok(())
        }
    }

    fn identity() -> Identity {
        let interface = |name: &str| Interface { name: name.into(), mac: None, addresses: vec![], gateways: vec![] };
        Identity {
            hostname: Some("clone-1".into()),
            interfaces: vec![interface("eth0"), interface("eth1")],
            ..Identity::new(Resumed { generation: [0xff; 16], time_ns: 1, entropy: [2; 32] })
        }
    }

    fn take_by(fake: &Fake, identity: &Identity) -> Result<(), Failure> {
        take(fake, identity, Path::new("/no/such/hooks"), Duration::from_secs(1))
    }

    #[test]
    fn entropy_and_clock_come_before_what_is_made_of_them() {
        let fake = Fake::default();
        take_by(&fake, &identity()).unwrap();
        assert_eq!(*fake.done.lock().unwrap(), ["entropy", "clock", "machine-id", "hostname", "eth0", "eth1"]);
    }

    #[test]
    fn the_step_that_fails_is_named_and_is_the_last() {
        for (step, message) in [
            ("entropy", "entropy: as planned"),
            ("clock", "clock: as planned"),
            ("machine-id", "machine id: as planned"),
            ("hostname", "host name: as planned"),
            ("eth1", "network: `eth1`: as planned"),
        ] {
            let fake = Fake { fails_at: Some(step), ..Fake::default() };
            assert_eq!(take_by(&fake, &identity()).unwrap_err().to_string(), message);
            assert_eq!(fake.done.lock().unwrap().last().unwrap(), step);
        }
    }

    #[test]
    fn what_can_only_fail_is_refused_before_anything_is_done() {
        let fake = Fake::default();
        for name in ["", "a b", "-a", "a\n", &"a".repeat(65), "a/b"] {
            let identity = Identity { hostname: Some(name.into()), ..identity() };
            assert_eq!(take_by(&fake, &identity).unwrap_err().part, Part::Hostname, "{name:?}");
        }
        let mut identity = identity();
        identity.interfaces[0].addresses = vec![Address { address: [10, 0, 0, 1].into(), prefix: 33 }];
        assert_eq!(take_by(&fake, &identity).unwrap_err().to_string(), "network: `eth0`: 10.0.0.1/33 is no address");
        assert!(fake.done.lock().unwrap().is_empty());
    }
}
