//! What makes clones different from each other.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::agent::Resumed;
use tests::{PageServer, Place, Restore, Template, require};

type Identity = ([u8; 16], [u8; 32]);

/// Generation id and random bytes of three clones.
fn identities(same_generation: bool) -> Vec<Identity> {
    let template = Template::shared();
    let place = Place::new();
    let server = PageServer::start(&place, &template.snapshot);
    let mut seen = Vec::new();
    for number in 0..3 {
        let mut restore = Restore::new(&place, &template.snapshot);
        if number > 0 {
            restore = restore.uffd(&server);
        }
        if same_generation {
            restore = restore.same_generation();
        }
        let (clone, mut agent) = restore.ready(&format!("clone-{number}"));
        seen.push((agent.generation(), agent.random()));
        template.facts.check(&mut agent);
        clone.stop();
    }
    seen
}

#[test]
fn clones_differ_in_generation_and_random_bytes() {
    require!(Kvm, Userfaultfd);
    let [a, b, c] = identities(false).try_into().expect("three clones");
    for (one, other) in [(a, b), (b, c), (a, c)] {
        assert_ne!(one.0, other.0, "generation");
        assert_ne!(one.1, other.1, "random bytes");
    }
}

/// The check above can fail: without a new generation, and untold what it is, a clone is its sibling.
#[test]
fn clones_that_keep_the_generation_agree_in_both() {
    require!(Kvm, Userfaultfd);
    let [a, b, c] = identities(true).try_into().expect("three clones");
    assert_eq!(a, b);
    assert_eq!(b, c);
}

#[test]
fn a_clone_that_is_told_what_it_is_differs_in_random_bytes() {
    require!(Kvm);
    let template = Template::shared();
    let place = Place::new();
    let random = [1, 2].map(|number: u8| {
        let name = format!("clone-{number}");
        let (clone, mut agent) = Restore::new(&place, &template.snapshot).same_generation().ready(&name);
        let resumed = Resumed { generation: [number; 16], time_ns: 1, entropy: [number; 32] };
        assert_eq!(agent.resumed(resumed), resumed.generation);
        let random = agent.random();
        clone.stop();
        random
    });
    assert_ne!(random[0], random[1]);
}
