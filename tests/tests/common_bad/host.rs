//! Hosts that cannot run microVMs.

use super::{HOST_CANNOT, is_root, refused_by, skip};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use tests::process::Finished;
use tests::{Boot, Place, Process, binaries, require};

/// Makes a /dev of its own and becomes a program, possibly as `nobody`.
const SCRIPT: &str = r#"
set -e
dev=$1 nodes=$2 user=$3; shift 3
mount -t tmpfs -o mode=755 none "$dev"
for name in null zero full urandom; do : >"$dev/$name"; mount --bind "/dev/$name" "$dev/$name"; done
case $nodes in *k*) mknod -m 666 "$dev/kvm" c $((0x$(stat -c %t /dev/kvm))) $((0x$(stat -c %T /dev/kvm)));; esac
case $nodes in *u*) mknod -m 666 "$dev/userfaultfd" c $((0x$(stat -c %t /dev/userfaultfd))) $((0x$(stat -c %T /dev/userfaultfd)));; esac
case $nodes in *f*) mknod -m 600 "$dev/kvm" c $((0x$(stat -c %t /dev/kvm))) $((0x$(stat -c %T /dev/kvm)));; esac
case $nodes in *r*) echo nothing >"$dev/kvm";; esac
mount --rbind "$dev" /dev
case $user in
  nobody) exec setpriv --reuid=65534 --regid=65534 --clear-groups --bounding-set=-all "$@" ;;
  *) exec "$@" ;;
esac
"#;

pub(super) fn within(place: &Place, nodes: &str, user: &str) -> impl Fn(&mut Command) {
    let dev = place.join("dev");
    let _ = std::fs::create_dir(&dev);
    let (nodes, user) = (nodes.to_owned(), user.to_owned());
    move |command| {
        command.args(["-m", "sh", "-c", SCRIPT, "sh"]).arg(&dev).args([&nodes, &user]).arg(binaries::vmm());
    }
}

/// A place that everybody may use.
pub(super) fn open_place() -> Place {
    let place = Place::new();
    std::fs::set_permissions(place.path(), PermissionsExt::from_mode(0o777)).expect("it is ours");
    place
}

pub(super) fn unshare() -> &'static Path {
    Path::new("unshare")
}

/// Why such hosts cannot be arranged here, if so.
pub(super) fn obstacle(place: &Place, nodes: &str, user: &str) -> Option<String> {
    if !is_root() {
        return Some("only root can give a process a /dev of its own".into());
    }
    let done = Process::start(place, "try", unshare(), |command| {
        within(place, nodes, user)(command);
        command.arg("--version");
    })
    .finish();
    (done.status.code() != Some(0))
        .then(|| format!("a /dev of its own cannot be arranged here: {}", done.stderr.trim()))
}

fn config(place: &Place) -> std::path::PathBuf {
    let path = place.join("vm.json");
    let text = format!(
        r#"{{"boot-source": {{"embedded_guest": true}}, "machine-config": {{"mem_size_mib": 16}},
            "vsock": {{"guest_cid": 3, "uds_path": "{}"}}}}"#,
        place.join("v").display()
    );
    std::fs::write(&path, text).expect("a file can be made in the test's directory");
    path
}

/// Boot and demonstration end with 77 and one line with these words.
#[track_caller]
fn cannot_boot(nodes: &str, user: &str, words: &[&str]) -> Option<String> {
    let place = open_place();
    let config = config(&place);
    if let Some(obstacle) = obstacle(&place, nodes, user) {
        return Some(obstacle);
    }
    refused_by(&place, "boot", unshare(), HOST_CANNOT, words, |vmm| {
        within(&place, nodes, user)(vmm);
        vmm.arg("--config").arg(&config).arg("--api-sock").arg(place.join("api"));
    });
    let temporary = place.join("tmp");
    std::fs::create_dir(&temporary).expect("it is new");
    std::fs::set_permissions(&temporary, PermissionsExt::from_mode(0o777)).expect("it is ours");
    refused_by(&place, "demo", unshare(), HOST_CANNOT, words, |vmm| {
        within(&place, nodes, user)(vmm);
        vmm.args(["demo", "--clones", "1", "--json"]).env("TMPDIR", &temporary);
    });
    assert_eq!(std::fs::read_dir(&temporary).expect("it is there").count(), 0, "the demonstration left something");
    let doctor: Finished = Process::start(&place, "doctor", unshare(), |vmm| {
        within(&place, nodes, user)(vmm);
        vmm.args(["doctor", "--json"]);
    })
    .finish();
    assert_eq!((doctor.code(), doctor.stderr.as_str()), (HOST_CANNOT, ""));
    serde_json::from_str::<serde_json::Value>(&doctor.stdout).expect("one JSON document");
    None
}

macro_rules! cannot_boot {
    ($($argument:expr),+) => {
        if let Some(obstacle) = cannot_boot($($argument),+) {
            skip!(&obstacle);
        }
    };
}

#[test]
fn without_kvm_the_reason_and_the_remedy_are_said() {
    cannot_boot!("u", "root", &["there is no /dev/kvm", "kvm_amd or kvm_intel"]);
}

#[test]
fn without_permission_for_kvm_the_reason_and_the_remedy_are_said() {
    require!(Kvm);
    cannot_boot!("fu", "nobody", &["no permission to open /dev/kvm", "join its group"]);
}

#[test]
fn something_else_in_the_place_of_kvm_is_no_kvm() {
    cannot_boot!("ru", "root", &["/dev/kvm"]);
}

#[test]
fn without_userfaultfd_clones_of_a_page_server_are_refused() {
    require!(Kvm, Userfaultfd);
    let sysctl = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").unwrap_or_default();
    if sysctl.trim() == "1" {
        skip!("vm.unprivileged_userfaultfd is 1: everybody may use userfaultfd here");
    }
    cannot_boot_clones();
}

fn cannot_boot_clones() {
    let place = open_place();
    if let Some(obstacle) = obstacle(&place, "k", "nobody") {
        skip!(&obstacle);
    }
    let words = ["userfaultfd"];
    let temporary = place.join("tmp");
    std::fs::create_dir(&temporary).expect("it is new");
    std::fs::set_permissions(&temporary, PermissionsExt::from_mode(0o777)).expect("it is ours");
    refused_by(&place, "demo", unshare(), HOST_CANNOT, &words, |vmm| {
        within(&place, "k", "nobody")(vmm);
        vmm.args(["demo", "--clones", "1", "--memory", "16", "--working-set", "1"]).env("TMPDIR", &temporary);
    });
    assert_eq!(std::fs::read_dir(&temporary).expect("it is there").count(), 0, "the demonstration left something");

    let (mut parent, _agent) = Boot::new(&place).memory_mib(16).ready("parent");
    parent.snapshot(&place.join("snapshot"));
    parent.stop();
    for path in [place.join("snapshot"), place.join("snapshot/snap.json"), place.join("snapshot/mem.bin")] {
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).expect("it is ours");
    }
    for name in ["state.bin", "mem.b3", "mem.stamp"] {
        std::fs::set_permissions(place.join("snapshot").join(name), PermissionsExt::from_mode(0o644)).expect("ours");
    }
    let server = tests::PageServer::start(&place, &place.join("snapshot"));
    std::fs::set_permissions(&server.socket, PermissionsExt::from_mode(0o666)).expect("it is ours");
    let words = ["userfaultfd", "/dev/userfaultfd", "unprivileged_userfaultfd=1"];
    refused_by(&place, "clone", unshare(), HOST_CANNOT, &words, |vmm| {
        within(&place, "k", "nobody")(vmm);
        vmm.arg("--restore").arg(place.join("snapshot")).arg("--uffd").arg(&server.socket);
        vmm.arg("--vsock").arg(place.join("clone.v")).arg("--api-sock").arg(place.join("clone.api"));
    });
}
