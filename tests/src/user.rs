//! Programs as a user without privileges, to whom the devices of this host may be open or closed.
//!
//! Nothing of the host is changed for that: such a program has a mount namespace of its own, with a /dev of its own.

use crate::place::Place;
use crate::process::Process;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::Command;

/// Who it is: nobody, on most systems.
pub const UID: u32 = 65534;

/// What the shell does as root before it becomes the program: `$1` is a directory, which becomes /dev, `$2` the mode of userfaultfd
/// there, or nothing if it is not to be there, `$3` are words that lead the program's, and what follows is the program.
const SCRIPT: &str = r#"
dev=$1 mode=$2 words=$3
shift 3
mount -t tmpfs -o mode=755,size=64k devices "$dev"
for device in null zero random urandom kvm ${mode:+userfaultfd}; do cp -a "/dev/$device" "$dev"; done
chmod 666 "$dev/kvm"
[ -z "$mode" ] || chmod "$mode" "$dev/userfaultfd"
mount --bind "$dev" /dev
exec $words "$@"
"#;

/// What a user finds at /dev/userfaultfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// It may be opened.
    Open,
    /// It may not.
    Closed,
    /// There is none, as in many a container.
    Absent,
}

/// A user without privileges, apart from what is said here.
#[derive(Clone, Copy, Debug)]
pub struct User {
    /// What becomes of /dev/userfaultfd.
    pub device: Device,
    /// Whether its programs have CAP_SYS_PTRACE.
    pub has_ptrace: bool,
}

impl User {
    /// Why this host, or who runs the tests on it, cannot run programs so; `None` if it can.
    pub fn missing() -> Option<String> {
        if !rustix::process::geteuid().is_root() {
            return Some("only root can run programs as another user".to_owned());
        }
        let devices = ["/dev/kvm", "/dev/userfaultfd"];
        if let Some(device) = devices.into_iter().find(|device| !Path::new(device).exists()) {
            return Some(format!("there is no {device} to be shown to another user"));
        }
        let place = Place::new();
        let user = User { device: Device::Open, has_ptrace: true };
        user.take(place.path());
        let done = user.start(&place, "probe", Path::new("true"), |_| {}).finish();
        (done.status.code() != Some(0)).then(|| {
            format!("programs cannot be run as another user (unshare, mount and setpriv do that): {}", done.stderr)
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
        let capabilities =
            if self.has_ptrace { "--inh-caps=+sys_ptrace --ambient-caps=+sys_ptrace" } else { "--inh-caps=-all" };
        let words = format!("setpriv --reuid=65534 --regid=65534 --clear-groups {capabilities}");
        self.start_by(&words, place, name, program, arguments)
    }

    /// Starts a program as root, which is to become this user by itself.
    pub fn start_as_root(
        &self,
        place: &Place,
        name: &str,
        program: &Path,
        arguments: impl FnOnce(&mut Command),
    ) -> Process {
        self.start_by("", place, name, program, arguments)
    }

    fn start_by(
        &self,
        words: &str,
        place: &Place,
        name: &str,
        program: &Path,
        arguments: impl FnOnce(&mut Command),
    ) -> Process {
        let devices = place.join("devices");
        std::fs::create_dir_all(&devices).expect("a directory can be made in the test's directory");
        let open = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(&devices, open).expect("it is ours");
        let mode = match self.device {
            Device::Open => "666",
            Device::Closed => "600",
            Device::Absent => "",
        };
        Process::start(place, name, Path::new("unshare"), |command| {
            command.args(["--mount", "--propagation=private", "sh", "-euc", SCRIPT, "sh"]).arg(&devices);
            command.args([mode, words]).arg(program);
            arguments(command);
        })
    }
}
