//! Clones of a page server that makes huge pages: they map them, and are what they would be without.

#![allow(missing_docs, reason = "tests are named for what they show")]

use api_spec::agent::Pages;
use api_spec::page_server::HugeMetrics;
use api_spec::stats::PageServerState;
use tests::procfs::guest_ram;
use tests::template::SEED;
use tests::{PageServer, Place, Restore, Template, TemplateOptions, require, until};

const COLLAPSE: [&str; 2] = ["--huge-pages", "collapse"];
/// Pages of 4 KiB in 2 MiB.
const BLOCK: u32 = 512;

fn large() -> Template {
    Template::make(TemplateOptions { memory_mib: 64, working_set_mib: 32, ..Default::default() })
}

/// Waits until the server has tried so many blocks; false, and a reason, if the kernel took none of them.
fn has_collapsed(server: &PageServer, blocks: u64) -> bool {
    let counts = || server.metrics().huge_pages;
    until("complete blocks are tried", || {
        let HugeMetrics { collapsed, failed } = counts();
        collapsed + failed >= blocks
    });
    if counts().collapsed == 0 {
        test_skip::skip(format!("the kernel makes no huge pages here: {}", server.process.log()));
    }
    println!("{:?}", counts());
    counts().collapsed > 0
}

/// All of it: clones that were there before and come later, writes, the server's death, and a snapshot of a clone.
#[test]
fn clones_that_map_huge_pages_are_right_whatever_happens() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (large(), Place::new());
    let facts = &template.facts;
    let server = PageServer::start_with(&place, &template.snapshot, &COLLAPSE);
    let (early, mut early_agent) = Restore::new(&place, &template.snapshot).uffd(&server).ready("early");
    assert_eq!(early_agent.mismatches(facts.working_set, SEED), 0);
    // Pages of its own, in blocks that are moved thereafter or meanwhile.
    let own = Pages { first: 7, count: 100, stride: 61 };
    early_agent.fill(own, 1);
    if !has_collapsed(&server, 14) {
        return;
    }

    let (mut later, mut later_agent) = Restore::new(&place, &template.snapshot).uffd(&server).ready("later");
    facts.check(&mut later_agent);
    let memory = guest_ram(later.pid());
    assert!(memory.huge_kib > 0, "{memory:?} {:?}", server.metrics().huge_pages);
    // A page that is written of each of some blocks, and one block of which all are.
    later_agent.fill(Pages { first: 4 * BLOCK + 3, count: 4, stride: BLOCK }, 2);
    later_agent.fill(Pages::run(2 * BLOCK, BLOCK), 3);
    let rest = Pages::run(8 * BLOCK + 4, facts.working_set.count - 8 * BLOCK - 4);
    let check_later = |agent: &mut tests::Agent| {
        assert_eq!(agent.mismatches(Pages::run(0, 2 * BLOCK), SEED), 0);
        assert_eq!(agent.mismatches(Pages { first: 4 * BLOCK + 3, count: 4, stride: BLOCK }, 2), 0);
        assert_eq!(agent.mismatches(Pages { first: 4 * BLOCK + 4, count: 4, stride: BLOCK }, SEED), 0);
        assert_eq!(agent.mismatches(Pages::run(2 * BLOCK, BLOCK), 3), 0);
        assert_eq!(agent.mismatches(rest, SEED), 0);
    };
    check_later(&mut later_agent);
    assert_eq!(early_agent.mismatches(own, 1), 0, "what a clone wrote before is its own still");
    assert_eq!(early_agent.mismatches(rest_of(own, facts.working_set), SEED), 0);
    assert_eq!(server.metrics().stores_retired_total, 0, "{}", server.process.log());

    // Without the server as with it.
    server.process.kill();
    later.until_served(PageServerState::Failover);
    check_later(&mut later_agent);
    assert_eq!(early_agent.mismatches(own, 1), 0);
    later.snapshot(&place.join("snap"));
    snapshot::verify::verify(&place.join("snap")).expect("the snapshot is whole");
    check_later(&mut later_agent);
    let (again, mut agent) = Restore::new(&place, &place.join("snap")).ready("again");
    check_later(&mut agent);
    assert_eq!(agent.nonce(), facts.nonce);
    for vm in [early, later, again] {
        vm.stop();
    }
}

/// Pages that lie right behind those of a stride, and so are none of them.
fn rest_of(own: Pages, all: Pages) -> Pages {
    let rest = Pages { first: own.first + 1, ..own };
    assert!(rest.fits(all.count));
    rest
}

/// A guest that was booted here has its memory where huge pages can be mapped as well.
#[test]
fn guest_memory_lies_where_huge_pages_can_be_mapped() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (Template::shared(), Place::new());
    let server = PageServer::start(&place, &template.snapshot);
    let (booted, _agent) = tests::Boot::new(&place).memory_mib(32).ready("booted");
    let (file, _agent) = Restore::new(&place, &template.snapshot).ready("file");
    let (shared, _agent) = Restore::new(&place, &template.snapshot).uffd(&server).ready("shared");
    for (vm, name) in [(booted, "/memfd:coppice-ram"), (file, "mem.bin"), (shared, "/memfd:coppice-store")] {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", vm.pid())).expect("the process is there");
        let mappings: Vec<_> = maps.lines().filter(|line| line.contains(name)).map(place_of).collect();
        assert!(!mappings.is_empty(), "{name}: {maps}");
        assert!(mappings.iter().all(|(address, offset)| address % (2 << 20) == offset % (2 << 20)), "{name}: {maps}");
        vm.stop();
    }
}

/// Where a mapping begins, and in its file, as a line of /proc/PID/maps has it.
fn place_of(line: &str) -> (u64, u64) {
    let number = |text: Option<&str>| u64::from_str_radix(text.expect("a number"), 16).expect("a number");
    (number(line.split('-').next()), number(line.split_whitespace().nth(2)))
}
