//! Memory images from an object store and from a web server: right bytes, or a reason, and never wrong ones.
#![allow(missing_docs)]

#[path = "../common/mod.rs"]
mod common;
mod servers;

use common::*;
use servers::*;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use uffd_handler::options::CacheSettings;
use uffd_handler::source::remote::{Opener, RemoteImage, Settings};
use uffd_handler::source::{Chunk, Source, SourceError};

/// Chunks of a block, which is fetched at once.
const BLOCK: u64 = 8;

fn no_settings() -> Settings {
    Settings::default()
}

fn settings(server: &S3, secret: &str) -> Settings {
    let pairs = [
        ("AWS_ACCESS_KEY_ID", KEY.to_owned()),
        ("AWS_SECRET_ACCESS_KEY", secret.to_owned()),
        ("AWS_ENDPOINT_URL", format!("http://{}", server.address)),
        ("AWS_ALLOW_HTTP", "true".to_owned()),
        ("AWS_REGION", "us-east-1".to_owned()),
    ];
    Settings::new(pairs.map(|(name, value)| (name.to_owned(), value)))
}

/// A bucket `images` with the sample as `base`, and its server.
fn in_s3(sample: &Sample) -> S3 {
    let base = sample.path("s3/images/base");
    std::fs::create_dir_all(&base).unwrap();
    for file in ["snap.json", "mem.bin", "mem.b3"] {
        std::fs::copy(sample.path("snap").join(file), base.join(file)).unwrap();
    }
    S3::start(&sample.path("s3"))
}

const URL: &str = "s3://images/base";

fn open_s3(server: &S3) -> RemoteImage {
    Opener::new(settings(server, SECRET), None).unwrap().open(URL).unwrap()
}

fn in_web(sample: &Sample) -> (Web, RemoteImage) {
    let web = Web::start(sample.root.path());
    let image = Opener::new(no_settings(), None).unwrap().open(&web.url("snap")).unwrap();
    (web, image)
}

fn cache(dir: &Path, mib: u64) -> CacheSettings {
    CacheSettings { dir: dir.to_owned(), max_bytes: mib << 20 }
}

fn with_cache(web: &Web, cache: &CacheSettings) -> RemoteImage {
    Opener::new(no_settings(), Some(cache)).unwrap().open(&web.url("snap")).unwrap()
}

fn buffer() -> Box<Chunk> {
    Box::new([0xa5; CHUNK])
}

/// What of the sample is in a chunk.
fn expected(image: &dyn Source, index: u64) -> Vec<u8> {
    let start = index as usize * CHUNK;
    let end = (start + CHUNK).min(image.size() as usize);
    (start / 8..end / 8).flat_map(|index| word(index).to_le_bytes()).collect()
}

fn check_chunk(image: &dyn Source, index: u64) {
    let mut chunk = buffer();
    let len = image.read_chunk(index, &mut chunk).unwrap();
    assert!(chunk[..len] == expected(image, index), "chunk {index}");
}

fn check_all(image: &dyn Source) {
    (0..image.size().div_ceil(CHUNK as u64)).for_each(|index| check_chunk(image, index));
}

fn away(image: &dyn Source, index: u64) -> String {
    match image.read_chunk(index, &mut buffer()) {
        Err(SourceError::Away(reason)) => reason,
        other => panic!("{other:?}"),
    }
}

fn damaged(image: &dyn Source, index: u64) -> String {
    match image.read_chunk(index, &mut buffer()) {
        Err(SourceError::Damaged(reason)) => reason,
        other => panic!("{other:?}"),
    }
}

fn refusal(opened: Result<RemoteImage, impl ToString>) -> String {
    opened.map(|_| ()).map_err(|error| error.to_string()).unwrap_err()
}

/// Bytes that the files in a directory take.
fn taken(dir: &Path) -> u64 {
    std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().metadata().unwrap().blocks() * 512).sum()
}

#[test]
fn a_whole_image_comes_right_from_s3() {
    // With an end in the middle of a chunk.
    let sample = Sample::of_bytes(2 * MIB + 5 * PAGE);
    let server = in_s3(&sample);
    let image = open_s3(&server);
    assert_eq!((image.root(), image.size()), (&*sample.manifest.memory.root, sample.size() as u64));
    assert_eq!(image.kind(), "remote");
    check_all(&image);
    let counters = image.counters();
    assert!(counters.bytes <= sample.size() as u64, "nothing came twice: {counters:?}");
    assert_eq!((counters.failures, counters.away_since), (0, None));
    assert!(damaged(&image, 33).contains("has 33 chunks"));
}

#[test]
fn names_of_objects_may_have_odd_characters() {
    let sample = Sample::of_bytes(MIB);
    let server = in_s3(&sample);
    let odd = "of the v~1% (old)+new=é";
    std::fs::rename(sample.path("s3/images/base"), sample.path("s3/images").join(odd)).unwrap();
    let image = Opener::new(settings(&server, SECRET), None).unwrap().open(&format!("s3://images/{odd}")).unwrap();
    check_all(&image);
}

#[test]
fn wrong_credentials_are_refused_with_what_to_set() {
    let sample = Sample::of_bytes(MIB);
    let server = in_s3(&sample);
    let error = refusal(Opener::new(settings(&server, "not-so-secret"), None).unwrap().open(URL));
    assert!(error.contains("s3://images/base/snap.json") && error.contains("AWS_SECRET_ACCESS_KEY"), "{error}");
    assert!(!error.contains("not-so-secret"), "{error}");
    // Nobody is asked for credentials at that address.
    let names = ["AWS_ENDPOINT_URL", "AWS_METADATA_ENDPOINT"];
    let none = names.map(|name| (name.to_owned(), format!("http://{}", server.address)));
    let none = Settings::new(none.into_iter().chain([("AWS_ALLOW_HTTP".to_owned(), "true".to_owned())]));
    let error = refusal(Opener::new(none, None).unwrap().open(URL));
    assert!(error.contains("there are no credentials") && error.contains("AWS_ACCESS_KEY_ID"), "{error}");
    let plain = Settings::new([("AWS_ENDPOINT_URL".to_owned(), format!("http://{}", server.address))]);
    let error = refusal(Opener::new(plain, None).unwrap().open(URL));
    assert!(error.contains("AWS_ALLOW_HTTP"), "{error}");
}

#[test]
fn what_is_no_snapshot_is_refused_by_name() {
    let sample = Sample::of_bytes(MIB);
    let server = in_s3(&sample);
    let open = |url: &str| refusal(Opener::new(settings(&server, SECRET), None).unwrap().open(url));
    let error = open("s3://images/other");
    assert!(error.contains("s3://images/other/snap.json is not there"), "{error}");
    assert!(open("ftp://images/base").contains("local paths"));

    let base = sample.path("s3/images/base");
    let broken = |file: &str, change: fn(&mut Vec<u8>), part: &str| {
        let good = std::fs::read(base.join(file)).unwrap();
        let mut bad = good.clone();
        change(&mut bad);
        std::fs::write(base.join(file), &bad).unwrap();
        let error = open(URL);
        assert!(error.contains(file) && error.contains(part), "{file}: {error}");
        std::fs::write(base.join(file), &good).unwrap();
    };
    broken("snap.json", |json| *json.iter_mut().rfind(|b| b.is_ascii_digit()).unwrap() ^= 1, "was changed");
    broken("snap.json", |json| json.truncate(100), "is not a manifest");
    broken("snap.json", |json| json.resize(2 << 20, b' '), "more than the 1048576");
    broken("mem.b3", |table| table[77] ^= 1, "does not match the manifest");
    broken("mem.b3", |table| table.truncate(64), "does not match the manifest");
    broken("mem.b3", |table| table.push(0), "more than the 512");
    broken("mem.bin", |memory| memory.truncate(MIB - 1), "should have 1048576");
    open_s3(&server);
}

#[test]
fn a_store_that_stops_is_away_until_it_is_back() {
    let sample = Sample::of_bytes(4 * MIB);
    let mut server = in_s3(&sample);
    let image = open_s3(&server);
    check_chunk(&image, 0);
    for (door, block) in [(Door::Shut, 1), (Door::Reset, 2), (Door::Hang, 3)] {
        server.set_door(door);
        let reason = away(&image, block * BLOCK);
        assert!(reason.contains("s3://images/base/mem.bin: "), "{door:?}: {reason}");
        assert_eq!(door == Door::Hang, reason.contains("no answer within 10 s"), "{door:?}: {reason}");
        assert!(image.counters().away_since.is_some());
        // What came with chunk 0 is served all the same, as are zeros.
        check_chunk(&image, 7);
        check_chunk(&image, 10);
        server.set_door(Door::Open);
        check_chunk(&image, block * BLOCK);
        assert_eq!(image.counters().away_since, None);
    }
    check_all(&image);
    assert_eq!(image.counters().failures, 3);
}

#[test]
fn a_replaced_object_is_damage_by_name() {
    let sample = Sample::of_bytes(2 * MIB);
    let server = in_s3(&sample);
    let image = open_s3(&server);
    check_chunk(&image, 0);
    std::fs::write(sample.path("s3/images/base/mem.bin"), vec![1; 2 * MIB]).unwrap();
    let reason = damaged(&image, BLOCK);
    assert!(reason.contains("s3://images/base/mem.bin was replaced"), "{reason}");
    check_chunk(&image, 1);
}

#[test]
fn a_replaced_file_of_a_web_server_is_damage_with_and_without_tags() {
    let sample = Sample::of_bytes(2 * MIB);
    let web = Web::start(sample.root.path());
    web.set_etag("\"1\"");
    let opener = Opener::new(no_settings(), None).unwrap();
    let image = opener.open(&web.url("snap/snap.json")).unwrap();
    check_chunk(&image, 0);
    web.set_etag("\"2\"");
    let reason = damaged(&image, BLOCK);
    assert!(reason.contains("snap/mem.bin was replaced"), "{reason}");

    let (_web, image) = in_web(&sample);
    check_chunk(&image, 0);
    sample.flip_byte(9 * CHUNK + 5);
    let reason = damaged(&image, 9);
    assert!(reason.contains("snap/mem.bin is damaged at offset 0x90000"), "{reason}");
    check_chunk(&image, 8);
}

#[test]
fn wrong_answers_are_never_given_out() {
    let sample = Sample::of_bytes(4 * MIB);
    let (web, image) = in_web(&sample);
    for (fault, block) in [(Fault::Truncated, 1), (Fault::OtherRange, 2), (Fault::Whole, 3), (Fault::Status503, 4)] {
        web.misbehave(fault, 10);
        let reason = away(&image, block * BLOCK + 1);
        assert!(reason.contains("snap/mem.bin") && !reason.contains("private"), "{fault:?}: {reason}");
        web.misbehave(fault, 0);
        check_chunk(&image, block * BLOCK + 1);
    }
    web.misbehave(Fault::Endless, 1);
    let reason = away(&image, 5 * BLOCK);
    assert!(reason.contains("access is refused") && reason.contains("403"), "only its beginning is read: {reason}");
    web.misbehave(Fault::Status503, 2);
    check_chunk(&image, 5 * BLOCK);
    web.misbehave(Fault::WrongBytes, 1);
    check_chunk(&image, 6 * BLOCK);
    web.misbehave(Fault::WrongBytes, 10);
    assert!(damaged(&image, 7 * BLOCK).contains("twice"));
    web.misbehave(Fault::WrongBytes, 0);
    check_all(&image);
}

#[test]
fn a_server_without_ranges_is_refused_when_it_is_opened() {
    let sample = Sample::of_bytes(MIB);
    let web = Web::start(sample.root.path());
    web.misbehave(Fault::Whole, 10);
    let error = refusal(Opener::new(no_settings(), None).unwrap().open(&web.url("snap")));
    assert!(error.contains("Range"), "{error}");
}

#[test]
fn threads_that_want_the_same_fetch_it_once() {
    let sample = Sample::of_bytes(4 * MIB);
    let (web, image) = in_web(&sample);
    let before = web.asked();
    std::thread::scope(|scope| {
        (0..8).for_each(|_| drop(scope.spawn(|| check_all(&image))));
    });
    assert_eq!(web.asked() - before, 4 * MIB / CHUNK / BLOCK as usize);
}

#[test]
fn what_need_not_be_waited_for_is_had_at_once() {
    let sample = Sample::of_bytes(2 * MIB);
    let (web, image) = in_web(&sample);
    let now = |index| image.read_chunk_now(index, &mut buffer());
    let before = web.asked();
    assert_eq!((now(0), now(10)), (Ok(None), Ok(Some(CHUNK))), "the eleventh is zero");
    assert_eq!(web.asked(), before);
    check_chunk(&image, 0);
    for index in 0..BLOCK {
        let mut chunk = buffer();
        assert_eq!(image.read_chunk_now(index, &mut chunk), Ok(Some(CHUNK)));
        assert!(chunk[..] == expected(&image, index));
    }
    assert_eq!(web.asked(), before + 1);
}

#[test]
fn what_was_fetched_once_is_kept_on_disk() {
    let sample = Sample::of_bytes(2 * MIB + PAGE);
    let web = Web::start(sample.root.path());
    let cache = cache(&sample.path("cache"), 100);
    check_all(&with_cache(&web, &cache));
    assert_eq!(std::fs::metadata(&cache.dir).unwrap().permissions().mode() & 0o777, 0o700);
    let name = format!("{}.mem", sample.manifest.memory.root);
    assert_eq!(std::fs::metadata(cache.dir.join(name)).unwrap().permissions().mode() & 0o777, 0o600);

    let image = with_cache(&web, &cache);
    let before = web.asked();
    // It was written just now, and is in the page cache; some file systems cannot tell.
    let mut chunk = buffer();
    let read = image.read_chunk_now(3, &mut chunk).unwrap();
    assert!(read.is_none_or(|_| chunk[..] == expected(&image, 3)));
    // Even if the server has nothing more to say.
    web.misbehave(Fault::Status503, 1000);
    check_all(&image);
    assert_eq!(web.asked(), before);
    assert_eq!((image.counters().chunks, image.counters().bytes), (0, 0));
}

/// A cache that has the whole sample, and one bit of it wrong.
fn cache_with_a_flipped_bit(sample: &Sample, web: &Web) -> CacheSettings {
    let cache = cache(&sample.path("cache"), 100);
    check_all(&with_cache(web, &cache));
    let file = cache.dir.join(format!("{}.mem", sample.manifest.memory.root));
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[5 * CHUNK + 17] ^= 1;
    std::fs::write(&file, &bytes).unwrap();
    cache
}

#[test]
fn a_flipped_bit_in_the_cache_is_put_right() {
    let sample = Sample::of_bytes(2 * MIB);
    let web = Web::start(sample.root.path());
    let cache = cache_with_a_flipped_bit(&sample, &web);

    let image = with_cache(&web, &cache);
    check_all(&image);
    assert_eq!(image.counters().cache_faults, 1);
    let image = with_cache(&web, &cache);
    let before = web.asked();
    check_all(&image);
    assert_eq!((image.counters().cache_faults, web.asked()), (0, before));
}

#[test]
fn a_cache_keeps_to_its_bound() {
    let (first, second) = (Sample::of_bytes(4 * MIB), Sample::of_bytes(3 * MIB));
    let (web, other) = (Web::start(first.root.path()), Web::start(second.root.path()));
    let cache = cache(&first.path("cache"), 2);
    let image = with_cache(&web, &cache);
    check_all(&image);
    assert!((1..=2 << 20).contains(&taken(&cache.dir)), "{}", taken(&cache.dir));
    let file = |sample: &Sample| cache.dir.join(format!("{}.mem", sample.manifest.memory.root));

    // One that is used stays, and the other has no room.
    check_all(&with_cache(&other, &cache));
    assert!(taken(&cache.dir) <= 2 << 20 && exists(&file(&first)));
    drop(image);
    let newer = with_cache(&other, &cache);
    check_all(&newer);
    assert!(!exists(&file(&first)) && taken(&cache.dir) > 1 << 20);
    assert!(taken(&cache.dir) <= 2 << 20);
    check_all(&with_cache(&web, &cache));
}

#[test]
fn servers_share_a_cache() {
    let sample = Sample::of_bytes(4 * MIB);
    let web = Web::start(sample.root.path());
    let cache = cache(&sample.path("cache"), 100);
    let images: Vec<RemoteImage> = (0..4).map(|_| with_cache(&web, &cache)).collect();
    std::thread::scope(|scope| {
        images.iter().for_each(|image| drop(scope.spawn(|| check_all(image))));
    });
    let image = with_cache(&web, &cache);
    let before = web.asked();
    check_all(&image);
    assert_eq!(web.asked(), before, "all of it is there, and right");
}

#[test]
fn a_cache_that_others_could_write_is_refused() {
    let sample = Sample::of_bytes(MIB);
    let dir = sample.path("cache");
    let refused = |dir: &Path| Opener::new(no_settings(), Some(&cache(dir, 1))).err().unwrap().to_string();
    std::fs::create_dir(&dir).unwrap();
    std::fs::set_permissions(&dir, PermissionsExt::from_mode(0o777)).unwrap();
    assert!(refused(&dir).contains("nobody else may write"));
    std::fs::set_permissions(&dir, PermissionsExt::from_mode(0o700)).unwrap();
    std::os::unix::fs::symlink(&dir, sample.path("link")).unwrap();
    for bad in ["link", "snap/mem.bin", "absent/cache"] {
        let error = refused(&sample.path(bad));
        assert!(error.contains(bad) && error.contains("--cache-dir"), "{error}");
    }
    assert!(refused(Path::new("/proc/self")).contains("/proc/self"));

    let web = Web::start(sample.root.path());
    let victim = sample.path("victim");
    std::fs::write(&victim, b"precious").unwrap();
    let name = format!("{}.mem", sample.manifest.memory.root);
    std::os::unix::fs::symlink(&victim, dir.join(name)).unwrap();
    let error = refusal(Opener::new(no_settings(), Some(&cache(&dir, 1))).unwrap().open(&web.url("snap")));
    assert!(error.contains(".mem"), "{error}");
    assert_eq!(std::fs::read(&victim).unwrap(), b"precious");
}

#[test]
fn not_even_the_finest_log_has_secrets() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(MIB);
        let server = in_s3(&sample);
        for (secret, url) in [("wrong-secret", URL), (SECRET, "s3://images/absent")] {
            let mut command = server_command();
            command
                .env("AWS_ACCESS_KEY_ID", KEY)
                .env("AWS_SECRET_ACCESS_KEY", secret)
                .env("AWS_SESSION_TOKEN", "my-token");
            command.env("AWS_ENDPOINT_URL", format!("http://{}", server.address)).env("AWS_ALLOW_HTTP", "true");
            command.arg("--socket").arg(sample.socket()).args(["--snapshot", url, "--log-level", "trace"]);
            let output = command.output().unwrap();
            let log = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(1), "{log}");
            assert!(log.contains(&format!("{url}/snap.json")), "{log}");
            for hidden in [secret, "my-token", "Signature="] {
                assert!(!log.contains(hidden), "{hidden}: {log}");
            }
        }
    });
}

#[test]
fn the_counters_tell_what_the_cache_has_saved_and_what_it_had_wrong() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(2 * MIB);
        let web = Web::start(sample.root.path());
        let cache = cache_with_a_flipped_bit(&sample, &web);

        let url = web.url("snap");
        let server = Server::start_program(&sample, url.as_ref(), &["--cache-dir".as_ref(), cache.dir.as_ref()]);
        Client::connect(&sample).view.check_all();
        let image = server.metrics().images.remove(0);
        assert_eq!(image.source, "remote");
        assert_eq!(image.cache_faults, 1, "{image:?}");
        // What came along with the chunk that had to be fetched may count as well.
        assert!((20..=2 * (2 * MIB / CHUNK) as u64).contains(&image.cached_chunks), "{image:?}");
    });
}

#[test]
fn a_guest_gets_its_memory_from_a_url() {
    with_userfaultfd(|| {
        let sample = Sample::of_bytes(4 * MIB);
        let web = Web::start(sample.root.path());
        let mut server = Server::start_from(&sample, web.url("snap"));
        Client::connect(&sample).view.check_all();
        server.signal(libc::SIGTERM);
        assert_eq!(server.wait(), Some(0));
    });
}
