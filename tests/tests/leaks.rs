//! A hundred restores in a row leave nothing behind.

#![allow(missing_docs, reason = "tests are named for what they show")]

use std::path::Path;
use tests::{PageServer, Place, Restore, Template, procfs, require, until};

const CYCLES: u32 = 100;

/// Restores and ends a clone again and again; checks that no process, socket or file is left.
fn cycle(template: &Template, place: &Place, restore: Restore<'_>) {
    let (place_before, snapshot_before) = (others(place), names(&template.snapshot));
    for _ in 0..CYCLES {
        let (clone, mut agent) = restore.clone().ready("clone");
        assert_eq!(agent.nonce(), template.facts.nonce);
        clone.stop();
    }
    assert_eq!(others(place), place_before, "files or sockets are left");
    assert_eq!(names(&template.snapshot), snapshot_before, "files are left in the snapshot");
    let sockets = place.join("clone");
    assert_eq!(procfs::processes_with(sockets.to_str().expect("the path is text")), [0; 0], "processes are left");
    // One more, which is as whole as the first.
    let (clone, mut agent) = restore.ready("clone");
    template.facts.check(&mut agent);
    clone.stop();
}

/// What is in the test's directory besides the output of clones.
fn others(place: &Place) -> Vec<String> {
    let mut names = place.names();
    names.retain(|name| !["clone.log", "clone.out"].contains(&name.as_str()));
    names
}

/// The files of a snapshot, without the note that its memory was checked, which any restore may write.
fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).expect("the directory can be read").filter_map(Result::ok);
    let mut names: Vec<_> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.retain(|name| !name.ends_with(".stamp"));
    names.sort();
    names
}

#[test]
fn a_hundred_restores_from_the_file_leave_nothing_behind() {
    require!(Kvm);
    let (template, place) = (Template::shared(), Place::new());
    cycle(&template, &place, Restore::new(&place, &template.snapshot));
}

#[test]
fn a_hundred_restores_from_a_page_server_leave_nothing_behind() {
    require!(Kvm, Userfaultfd);
    let (template, place) = (Template::shared(), Place::new());
    let server = PageServer::start(&place, &template.snapshot);
    let restore = Restore::new(&place, &template.snapshot).uffd(&server);
    // The first clone's store is kept warm.
    restore.clone().ready("clone").0.stop();
    until("the session has ended", || server.metrics().sessions.is_empty());
    let descriptors = || procfs::descriptors(server.process.pid()).len();
    let (before, threads) = (descriptors(), threads(server.process.pid()));
    cycle(&template, &place, restore);
    until("all sessions have ended", || server.metrics().sessions.is_empty());
    until("no descriptor is left in the page server", || descriptors() <= before);
    assert_eq!(self::threads(server.process.pid()), threads, "threads are left in the page server");
    let metrics = server.metrics();
    assert_eq!((metrics.sessions_total, metrics.refused_total, metrics.stores_retired_total), (102, 0, 0));
    let done = server.process.stop();
    assert_eq!(done.code(), 0, "{}", done.stderr);
    assert!(place.names().iter().all(|name| name.ends_with(".log") || name.ends_with(".out")), "{:?}", place.names());
}

fn threads(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/task")).expect("the process is there to be looked at").count()
}
