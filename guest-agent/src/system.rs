//! What the agent changes about the whole guest, behind a trait, so that tests on a host change nothing.

// UNSAFETY: two ioctls of the kernel's random generator, and the time-stamp counter.
#![allow(unsafe_code)]

use crate::gate::Generation;
use crate::network;
use crate::spawn::{Process, command};
use crate::users::Account;
use api_spec::agent::linux::{Exit, Interface};
use rustix::ioctl::{NoArg, Opcode, Setter, ioctl, opcode};
use rustix::mount::mount_bind;
use rustix::process::{Pid, Signal, kill_process};
use rustix::rand::{GetRandomFlags, getrandom};
use rustix::system::{RebootCommand, reboot, sethostname};
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What becomes of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Power {
    /// It is switched off.
    Off,
    /// It starts again.
    Reboot,
}

/// The guest as a whole.
pub trait System: Send + Sync {
    /// The generation id that stands in guest memory, if it can be read.
    fn generation(&self) -> Option<Generation>;
    /// Mixes entropy into the kernel's pool, counts it as such, and has every generator reseed from the pool.
    fn add_entropy(&self, entropy: &[u8; 32]) -> io::Result<()>;
    /// Sets the wall clock, nanoseconds since the Unix epoch.
    fn set_clock(&self, ns: u64) -> io::Result<()>;
    /// Sets the host name.
    fn set_hostname(&self, name: &str) -> io::Result<()>;
    /// Sets the machine id.
    fn set_machine_id(&self, id: [u8; 16]) -> io::Result<()>;
    /// Takes a network interface down, changes it and brings it up again.
    fn configure(&self, interface: &Interface) -> io::Result<()>;
    /// Writes back what is not on the guest's disks yet.
    fn sync(&self);
    /// Lets go of what is remembered of files, as far as the disks have it.
    fn drop_caches(&self) -> io::Result<()>;
    /// Stops everything in order.
    fn power(&self, power: Power) -> io::Result<()>;
    /// Starts the machine again, at once.
    fn reset(&self) -> io::Result<()>;

    /// Random bytes of the kernel's generator.
    fn random(&self) -> io::Result<[u8; 32]> {
        let mut bytes = [0; 32];
        match getrandom(&mut bytes, GetRandomFlags::empty())? {
            32 => Ok(bytes),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// Time-stamp counter, and wall clock in nanoseconds since the Unix epoch.
    fn time(&self) -> (u64, u64) {
        let now = clock_gettime(ClockId::Realtime);
        // SAFETY: every processor that Linux runs on in 64-bit mode has the instruction; it touches no memory.
        let tsc = unsafe { core::arch::x86_64::_rdtsc() };
        (tsc, now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs())
    }

    /// The 16 bytes that the kernel made up when it booted.
    fn boot_id(&self) -> io::Result<[u8; 16]> {
        let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        parse_id(&text).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Memory that nothing uses, in KiB.
    fn free_kib(&self) -> io::Result<u64> {
        let text = fs::read_to_string("/proc/meminfo")?;
        free_kib(&text).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/meminfo has no MemFree"))
    }

    /// vCPUs that are up.
    fn vcpus(&self) -> u8 {
        fs::read_to_string("/sys/devices/system/cpu/online").map_or(1, |list| count_cpus(&list))
    }
}

/// The guest that the agent runs in.
#[derive(Debug)]
pub struct Linux {
    root: PathBuf,
    under_init: bool,
    /// The kernel's memory, and where the generation id is in it.
    generation: Option<(File, u64)>,
}

impl Linux {
    /// The guest, whose files are under `root`. `under_init`: the first process is this program.
    pub fn new(root: &Path, under_init: bool) -> Self {
        let address = fs::read_to_string("/proc/cmdline").ok().and_then(|line| generation_address(&line));
        let generation = address.and_then(|address| match File::open("/dev/mem") {
            Ok(memory) => Some((memory, address)),
            Err(e) => {
                crate::say(format_args!("cannot read the generation id: /dev/mem: {e}"));
                None
            }
        });
        Linux { root: root.into(), under_init, generation }
    }
}

impl System for Linux {
    fn generation(&self) -> Option<Generation> {
        let (memory, address) = self.generation.as_ref()?;
        let mut id = [0; 16];
        memory.read_exact_at(&mut id, *address).ok().map(|()| id)
    }

    fn add_entropy(&self, entropy: &[u8; 32]) -> io::Result<()> {
        /// `struct rand_pool_info` with its bytes.
        #[repr(C)]
        struct Entropy {
            bits: i32,
            len: i32,
            bytes: [u8; 32],
        }
        /// The kernel has the size of the structure's fixed half in the number.
        const ADD: Opcode = opcode::write::<[i32; 2]>(b'R', 0x03);
        const RESEED: Opcode = opcode::none(b'R', 0x07);
        let pool = File::options().write(true).open("/dev/random")?;
        let entropy = Entropy { bits: 256, len: 32, bytes: *entropy };
        // SAFETY: RNDADDENTROPY reads the two numbers and then `len` bytes behind them, all of which the structure has.
        unsafe { ioctl(&pool, Setter::<ADD, Entropy>::new(entropy))? };
        // SAFETY: RNDRESEEDCRNG takes no argument.
        unsafe { ioctl(&pool, NoArg::<RESEED>::new())? };
        Ok(())
    }

    fn set_clock(&self, ns: u64) -> io::Result<()> {
        let (seconds, rest) = (ns / 1_000_000_000, ns % 1_000_000_000);
        Ok(clock_settime(ClockId::Realtime, Timespec { tv_sec: seconds as i64, tv_nsec: rest as i64 })?)
    }

    fn set_hostname(&self, name: &str) -> io::Result<()> {
        sethostname(name.as_bytes())?;
        let file = self.root.join("etc/hostname");
        // The kernel has it now. The file matters to the next boot only; a root that is read-only keeps the old one.
        if file.exists() {
            let _ = replace(&file, format!("{name}\n").as_bytes());
        }
        Ok(())
    }

    fn set_machine_id(&self, id: [u8; 16]) -> io::Result<()> {
        let file = self.root.join("etc/machine-id");
        let text = format!("{}\n", hex(&id));
        // Where something is mounted on it, it cannot be replaced, but written.
        if replace(&file, text.as_bytes()).or_else(|_| fs::write(&file, &text)).is_ok() {
            return Ok(());
        }
        let own = self.root.join("run/coppice/machine-id");
        fs::create_dir_all(self.root.join("run/coppice"))?;
        replace(&own, text.as_bytes())?;
        Ok(mount_bind(&own, &file)?)
    }

    fn configure(&self, interface: &Interface) -> io::Result<()> {
        network::configure(interface)
    }

    fn sync(&self) {
        rustix::fs::sync();
    }

    fn drop_caches(&self) -> io::Result<()> {
        // Contents of files, and what is known of directories and files.
        fs::write("/proc/sys/vm/drop_caches", "3")
    }

    fn power(&self, power: Power) -> io::Result<()> {
        if self.under_init {
            let signal = match power {
                Power::Off => Signal::USR2,
                Power::Reboot => Signal::TERM,
            };
            return Ok(kill_process(Pid::INIT, signal)?);
        }
        let verb = match power {
            Power::Off => "poweroff",
            Power::Reboot => "reboot",
        };
        let mut systemctl = command("systemctl", &Account::of_agent(), true);
        let deadline = Instant::now() + Duration::from_secs(10);
        match Process::start(systemctl.args(["--no-block", verb]))?.finish(Some(deadline)) {
            Exit::Code(0) => Ok(()),
            other => Err(io::Error::other(format!("`systemctl {verb}` ended with {other:?}"))),
        }
    }

    fn reset(&self) -> io::Result<()> {
        Ok(reboot(RebootCommand::Restart)?)
    }
}

/// Writes a file whole, in the place of another.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let draft = path.with_extension("coppice-new");
    fs::write(&draft, bytes).and_then(|()| fs::rename(&draft, path)).inspect_err(|_| {
        let _ = fs::remove_file(&draft);
    })
}

/// Bytes in hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Sixteen bytes out of hexadecimal digits, with or without dashes.
pub fn parse_id(text: &str) -> Option<[u8; 16]> {
    let digits: String = text.trim().chars().filter(|c| *c != '-').collect();
    let is_id = digits.len() == 32 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    is_id.then(|| u128::from_str_radix(&digits, 16).ok().map(u128::to_be_bytes)).flatten()
}

/// What /proc/meminfo says of memory that nothing uses, in KiB.
fn free_kib(meminfo: &str) -> Option<u64> {
    let value = meminfo.lines().find_map(|line| line.strip_prefix("MemFree:"))?;
    value.trim().strip_suffix(" kB")?.parse().ok()
}

/// The address in the word `coppice.generation=` of a kernel command line.
fn generation_address(line: &str) -> Option<u64> {
    let value = line.split_whitespace().filter_map(|word| word.strip_prefix("coppice.generation=")).next_back()?;
    match value.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => value.parse().ok(),
    }
}

/// How many CPUs a list such as `0-2,5` has.
fn count_cpus(list: &str) -> u8 {
    let count = |range: &str| -> Option<u32> {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        (last.parse::<u32>().ok()? + 1).checked_sub(first.parse().ok()?)
    };
    list.trim().split(',').filter_map(count).sum::<u32>().clamp(1, 255) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_written_and_read() {
        let id = parse_id("00112233-4455-6677-8899-aabbccddeeff\n").unwrap();
        assert_eq!(hex(&id), "00112233445566778899aabbccddeeff");
        assert_eq!(parse_id(&hex(&id)), Some(id));
        for wrong in ["", "+0112233445566778899aabbccddeeff", "00", "g0112233445566778899aabbccddeeff"] {
            assert_eq!(parse_id(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn the_kernel_command_line_tells_where_the_generation_is() {
        assert_eq!(generation_address("quiet coppice.generation=0x9f000 ro\n"), Some(0x9f000));
        assert_eq!(generation_address("coppice.generation=4096"), Some(4096));
        assert_eq!(generation_address("quiet"), None);
        assert_eq!(generation_address("coppice.generation=x"), None);
    }

    #[test]
    fn free_memory_is_found() {
        assert_eq!(free_kib("MemTotal:  9 kB\nMemFree:        12345 kB\nMemAvailable: 7 kB\n"), Some(12345));
        for wrong in ["", "MemFree: x kB", "MemFree: 1 MB", "MemFreed: 1 kB"] {
            assert_eq!(free_kib(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn cpus_are_counted() {
        assert_eq!(count_cpus("0\n"), 1);
        assert_eq!(count_cpus("0-3\n"), 4);
        assert_eq!(count_cpus("0-2,5,7-8\n"), 6);
        assert_eq!(count_cpus("3-1"), 1);
        assert_eq!(count_cpus(""), 1);
        assert_eq!(count_cpus("0-4294967294"), 255);
    }

    #[test]
    fn a_machine_id_replaces_the_old_one() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("etc")).unwrap();
        let linux = Linux { root: root.path().into(), under_init: false, generation: None };
        linux.set_machine_id([0xab; 16]).unwrap();
        let file = root.path().join("etc/machine-id");
        assert_eq!(fs::read_to_string(&file).unwrap(), format!("{}\n", "ab".repeat(16)));
        assert_eq!(fs::read_dir(root.path().join("etc")).unwrap().count(), 1);
    }
}
