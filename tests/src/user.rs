//! Programs as a user without privileges, to whom the devices of this host may be open or closed.
//!
//! Nothing of the host is changed for that: such a program has a mount namespace of its own, with nodes of its own in the place of
//! the devices.

use crate::place::Place;
use crate::process::Process;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::Command;

/// Who it is: nobody, on most systems.
pub const UID: u32 = 65534;

/// What the shell does as root before it becomes the program: `$1` is a directory, `$2` the mode of /dev/userfaultfd, `$3` are words
/// for setpriv, and what follows is the program.
const SCRIPT: &str = r#"
mount -t tmpfs -o mode=755,size=64k devices "$1"
cp -a /dev/kvm /dev/userfaultfd "$1"
chmod 666 "$1/kvm"
chmod "$2" "$1/userfaultfd"
for device in kvm userfaultfd; do mount --bind "$1/$device" "/dev/$device"; done
words=$3
shift 3
exec setpriv --reuid=65534 --regid=65534 --clear-groups $words "$@"
"#;

/// A user without privileges, apart from what is said here.
#[derive(Clone, Copy, Debug, Default)]
pub struct User {
    /// Whether /dev/userfaultfd is open to it.
    pub has_device: bool,
    /// Whether its programs have CAP_SYS_PTRACE.
    pub has_ptrace: bool,
}

impl User {
    /// Why this host, or who runs the tests on it, cannot run programs so; `None` if it can.
    pub fn missing() -> Option<String> {
        let devices = ["/dev/kvm", "/dev/userfaultfd"];
        if let Some(device) = devices.into_iter().find(|device| !Path::new(device).exists()) {
            return Some(format!("there is no {device} to be shown to another user"));
        }
        let place = Place::new();
        let user = User { has_device: true, has_ptrace: true };
        user.take(place.path());
        let done = user.start(&place, "probe", Path::new("true"), |_| {}).finish();
        (done.status.code() != Some(0)).then(|| {
            format!("programs cannot be run as another user (root, unshare and setpriv do that): {}", done.stderr)
        })
    }

    /// Gives a directory, and all files in it, to this user.
    pub fn take(&self, path: &Path) {
        chown(path, Some(UID), Some(UID)).expect("root can give files away");
        if path.is_dir() {
            let entries = std::fs::read_dir(path).expect("the directory can be read");
            entries.for_each(|entry| self.take(&entry.expect("it can be read on").path()));
        }
    }

    /// Starts a program.
    pub fn start(&self, place: &Place, name: &str, program: &Path, arguments: impl FnOnce(&mut Command)) -> Process {
        let devices = place.join("devices");
        std::fs::create_dir_all(&devices).expect("a directory can be made in the test's directory");
        let open = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(&devices, open).expect("it is ours");
        let mode = if self.has_device { "666" } else { "600" };
        let words =
            if self.has_ptrace { "--inh-caps=+sys_ptrace --ambient-caps=+sys_ptrace" } else { "--inh-caps=-all" };
        Process::start(place, name, Path::new("unshare"), |command| {
            command.args(["--mount", "--propagation=private", "sh", "-euc", SCRIPT, "sh"]).arg(&devices);
            command.args([mode, words]).arg(program);
            arguments(command);
        })
    }
}
