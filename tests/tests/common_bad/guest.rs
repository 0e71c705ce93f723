//! Guests that mean harm, as few instructions of machine code in an ELF file of their own.

use super::{FAILED, RESET, Random, no_panic, refusal};
use api_spec::vm::InstanceState;
use serde_json::json;
use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;
use tests::code::{CODE, Code, DATA, DEVICE};
use tests::process::Finished;
use tests::{Place, Process, Vm, binaries, require};

/// How guests of such code are run.
trait Guest {
    /// Boots it.
    fn start(&self, place: &Place) -> Vm;
    /// As [`Guest::start`], with its console at `stdout`.
    fn start_with(&self, place: &Place, stdout: Option<Stdio>) -> Vm;
    /// Runs it until it ends by itself.
    fn run(&self) -> Finished;
    /// Runs it for a while, in which the vmm answers, can be paused and snapshotted; then the vmm is ended.
    fn run_and_stop(&self) -> Finished;
}

impl Guest for Code {
    fn start(&self, place: &Place) -> Vm {
        self.start_with(place, None)
    }

    fn start_with(&self, place: &Place, stdout: Option<Stdio>) -> Vm {
        let (kernel, config) = (place.join("kernel"), place.join("vm.json"));
        fs::write(&kernel, self.elf()).expect("there is room");
        let (vsock, api): (PathBuf, PathBuf) = (place.join("g.v"), place.join("g.api"));
        let text = json!({
            "boot-source": { "kernel_image_path": kernel },
            "machine-config": { "mem_size_mib": 16 },
            "vsock": { "guest_cid": 3, "uds_path": vsock },
        });
        fs::write(&config, text.to_string()).expect("there is room");
        let process = Process::start(place, "guest", binaries::vmm(), |vmm| {
            vmm.arg("--config").arg(&config).arg("--api-sock").arg(&api);
            if let Some(stdout) = stdout {
                vmm.stdout(stdout);
            }
        });
        Vm { process, name: "guest".into(), vsock, api }
    }

    #[track_caller]
    fn run(&self) -> Finished {
        let place = Place::new();
        let done = self.start(&place).process.finish();
        no_panic(&done.stderr);
        assert_eq!(place.names(), ["guest.log", "guest.out", "kernel", "vm.json"], "something was left behind");
        done
    }

    #[track_caller]
    fn run_and_stop(&self) -> Finished {
        let place = Place::new();
        let mut vm = self.start(&place);
        assert_eq!(vm.state(), InstanceState::Running);
        std::thread::sleep(Duration::from_millis(20));
        vm.pause();
        vm.resume();
        vm.snapshot(&place.join("snapshot"));
        assert_eq!(vm.state(), InstanceState::Running);
        let done = vm.stop();
        no_panic(&done.stderr);
        fs::remove_dir_all(place.join("snapshot")).expect("it is there");
        assert_eq!(place.names(), ["guest.log", "guest.out", "kernel", "vm.json"], "something was left behind");
        done
    }
}

/// Whether this host's KVM emulates all of a guest's ring 0.
pub fn ring0_is_emulated() -> bool {
    std::path::Path::new("/sys/module/kvm_pvm").exists()
}

#[test]
fn a_reset_ends_the_vmm_in_good_order() {
    require!(Kvm);
    let done = Code::new().reset().run();
    assert_eq!((done.code(), done.stderr.as_str()), (RESET, ""));
}

#[test]
fn a_triple_fault_is_named() {
    require!(Kvm);
    // lidt [an empty table]; ud2
    let mut code = Code::new();
    code.raw(&[0x0f, 0x01, 0x1c, 0x25]).raw(&DATA.to_le_bytes()).raw(&[0x0f, 0x0b]).forever();
    code.data = vec![0; 16];
    refusal("ud2", &code.run(), FAILED, &["vCPU 0 of the guest triple-faulted"]);
    // A jump to nowhere.
    let mut code = Code::new();
    code.raw(&[0x48, 0xb8]).raw(&(1u64 << 40).to_le_bytes()).raw(&[0xff, 0xe0]);
    refusal("nowhere", &code.run(), FAILED, &["vCPU 0 of the guest triple-faulted"]);
}

#[test]
fn an_instruction_that_kvm_cannot_emulate_is_named() {
    require!(Kvm);
    let sentence = "; this host's KVM has no hardware virtualization and emulates the guest kernel's instructions, of \
                    which it lacks some, so a stock kernel cannot run here: use a host with AMD-V or VT-x, or the \
                    embedded guest (`vmm doctor` says more)";
    let at = CODE as usize + Code::new().code.len();
    let cases: [(&str, &str, &[u8]); 3] = [
        ("cmpxchg16b", "48 0f c7 0c 25 00 00 11 00", &[0x48, 0x0f, 0xc7, 0x0c, 0x25, 0, 0, 0x11, 0]),
        ("cmpxchg16b", "f0 48 0f c7 0c 25 00 00 11 00", &[0xf0, 0x48, 0x0f, 0xc7, 0x0c, 0x25, 0, 0, 0x11, 0]),
        ("int3", "cc", &[0xcc]),
    ];
    for (name, text, bytes) in cases {
        let mut code = Code::new();
        code.raw(bytes).reset();
        code.data = vec![0; 16];
        let done = code.run();
        if ring0_is_emulated() {
            let start = format!("vmm: KVM cannot emulate the guest's instruction `{name}` ({text}");
            let place = format!(" at {at:#x} on vCPU 0");
            let line = refusal(name, &done, FAILED, &[&place]);
            assert!(line.starts_with(&start) && line.ends_with(sentence), "{line}");
        } else if name == "int3" {
            refusal(name, &done, FAILED, &["vCPU 0 of the guest"]);
        } else {
            assert_eq!((done.code(), done.stderr.as_str()), (0, ""));
        }
    }
    // Code in a device.
    let mut code = Code::new();
    code.raw(&[0xb8]).raw(&DEVICE.to_le_bytes()).raw(&[0xff, 0xe0]);
    refusal("device", &code.run(), FAILED, &["vCPU 0"]);
}

#[test]
fn a_guest_that_does_nothing_or_everything_can_be_ended() {
    require!(Kvm);
    for code in [Code::new().halt(), Code::new().forever()] {
        let done = code.run_and_stop();
        assert_eq!((done.code(), done.stderr.as_str()), (0, ""));
    }
}

#[test]
fn a_guest_that_fills_a_console_that_nobody_reads_can_be_ended() {
    require!(Kvm);
    let place = Place::new();
    let (mut reader, writer) = std::io::pipe().expect("there are pipes");
    let mut code = Code::new();
    let start = code.code.len();
    code.out(0x3f8, b'x'.into(), 1).again(start);
    let mut vm = code.start_with(&place, Some(writer.into()));
    let mut first = [0; 16];
    reader.read_exact(&mut first).expect("it writes");
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(vm.state(), InstanceState::Running);
    vm.pause();
    vm.resume();
    let rss = super::rss_kib(vm.pid());
    assert!(rss < 64 * 1024, "{rss} KiB");
    let done = vm.stop();
    no_panic(&done.stderr);
    assert!(done.stderr.lines().count() <= 1, "{}", done.stderr);
    assert_eq!(place.names(), ["guest.log", "guest.out", "kernel", "vm.json"], "something was left behind");
}

#[test]
fn ports_and_addresses_without_device_are_harmless() {
    require!(Kvm);
    let mut random = Random::new(3);
    for _ in 0..10 {
        let mut code = Code::new();
        for _ in 0..200 {
            let port = match random.below(3) {
                0 => 0x3f8 + random.below(8) as u16,
                1 => 0x60 + random.below(8) as u16,
                _ => random.next() as u16,
            };
            let (len, value) = (1 << random.below(3), random.next() as u32);
            // Not the reset itself, however it is reached.
            let resets = (0x60..=0x64).contains(&port) || port == 0xcf9 || port == 0x92;
            if random.below(2) == 0 || resets {
                code.input(port, len);
            } else {
                code.out(port, value, len);
            }
            // The interrupt controllers' own addresses are KVM's.
            let addr = DEVICE + random.below(0x3000) as u32;
            let len = 1 << random.below(4);
            if addr >= DEVICE + 0x1000 || !addr.is_multiple_of(4) || len != 4 {
                code.store(addr, random.next(), len);
            }
            code.load(DEVICE + random.below(0x3000) as u32, 1 << random.below(4));
        }
        let done = code.reset().run();
        assert_eq!((done.code(), done.stderr.as_str()), (RESET, ""));
    }
}

/// Registers of virtio-mmio that a driver writes.
const REGISTERS: [u32; 17] =
    [0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4, 0x100, 0xfc];

#[test]
fn absurd_values_in_the_registers_of_a_device_are_harmless() {
    require!(Kvm);
    let mut random = Random::new(11);
    for _ in 0..15 {
        let mut code = Code::new();
        code.set(0x70, 0).set(0x70, 1).set(0x70, 3).set(0x24, 1).set(0x20, 1).set(0x70, 0xb);
        for _ in 0..400 {
            let register = REGISTERS[random.below(REGISTERS.len() as u64) as usize];
            let value = match random.below(5) {
                0 => random.below(4) as u32,
                1 => [0, 1, 3, 0xb, 0xf, 0x4f, 0x80][random.below(7) as usize],
                2 => DATA + (random.below(64) * 16) as u32,
                3 => 1 << random.below(32),
                _ => random.next() as u32,
            };
            code.set(register, value);
        }
        let done = code.reset().run();
        assert_eq!(done.code(), RESET, "{done:?}");
        assert!(done.stderr.len() < 100_000, "it logs too much");
    }
}

/// Sets the device up, with the three queues at `DATA`, each 4 KiB long, with `size` entries.
fn set_up(code: &mut Code, size: u32) {
    code.set(0x70, 0).set(0x70, 1).set(0x70, 3).set(0x24, 1).set(0x20, 1).set(0x70, 0xb);
    for queue in 0..3 {
        let base = DATA + queue * 0x1000;
        code.set(0x30, queue).set(0x38, size);
        code.set(0x80, base).set(0x84, 0).set(0x90, base + 0x800).set(0x94, 0).set(0xa0, base + 0xc00).set(0xa4, 0);
        code.set(0x44, 1);
    }
    code.set(0x70, 0xf);
}

fn descriptor(addr: u64, len: u32, flags: u16, next: u16) -> Vec<u8> {
    [&addr.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat()
}

/// Three queues with these descriptors, and with these heads made available as number `index`.
fn queues(descriptors: &[Vec<u8>], index: u16, heads: &[u16]) -> Vec<u8> {
    let mut queue = descriptors.concat();
    queue.resize(0x800, 0);
    queue.extend(0u16.to_le_bytes());
    queue.extend(index.to_le_bytes());
    heads.iter().for_each(|head| queue.extend(head.to_le_bytes()));
    queue.resize(0x1000, 0);
    queue.repeat(3)
}

#[test]
fn queues_that_break_the_rules_stop_the_device_and_nothing_else() {
    require!(Kvm);
    let packet = u64::from(DATA) + 0x3000;
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("loop", queues(&[descriptor(packet, 44, 1, 1), descriptor(packet, 44, 1, 0)], 1, &[0])),
        ("self-loop", queues(&[descriptor(packet, 44, 1, 0)], 1, &[0])),
        ("next-outside", queues(&[descriptor(packet, 44, 1, 999)], 1, &[0])),
        ("head-outside", queues(&[descriptor(packet, 44, 0, 0)], 1, &[65535])),
        ("index-jump", queues(&[descriptor(packet, 44, 0, 0)], 40000, &[0])),
        ("nowhere", queues(&[descriptor(1 << 40, 44, 0, 0)], 1, &[0])),
        ("wraps", queues(&[descriptor(u64::MAX, 44, 0, 0)], 1, &[0])),
        ("huge", queues(&[descriptor(packet, u32::MAX, 0, 0)], 1, &[0])),
        ("device-memory", queues(&[descriptor(DEVICE.into(), 44, 0, 0)], 1, &[0])),
        ("empty", queues(&[descriptor(packet, 0, 0, 0)], 1, &[0])),
        ("short", queues(&[descriptor(packet, 43, 0, 0)], 1, &[0])),
        ("write-only", queues(&[descriptor(packet, 44, 2, 0)], 1, &[0])),
        ("indirect", queues(&[descriptor(packet, 4096, 4, 0)], 1, &[0])),
        ("own-queue", queues(&[descriptor(DATA.into(), 0x1000, 2, 0)], 8, &[0; 8])),
        ("many", queues(&vec![descriptor(packet, 44, 0, 0); 8], 8, &[0, 1, 2, 3, 4, 5, 6, 7])),
    ];
    for (name, data) in cases {
        let mut code = Code::new();
        code.data = data;
        // A packet: from 3 to 2, a stream, with a length that is not there.
        let mut header = vec![0u8; 0x1000];
        header[0] = 3;
        header[8] = 2;
        header[24..28].fill(0xff);
        header[28] = 1;
        header[30] = 5;
        code.data.extend(header);
        set_up(&mut code, 8);
        let start = code.code.len();
        for queue in [0, 1, 2, 3, u32::MAX] {
            code.set(0x50, queue);
        }
        code.load(DEVICE + 0x70, 4).load(DEVICE + 0x60, 4).again(start);
        let done = code.run_and_stop();
        assert!(done.stderr.lines().count() <= 3, "{name}: {}", done.stderr);
        assert_eq!(done.code(), 0, "{name}: {done:?}");
    }
}

#[test]
fn a_guest_that_breaks_its_device_again_and_again_does_not_fill_the_log() {
    require!(Kvm);
    let mut code = Code::new();
    code.data = queues(&[descriptor(1 << 40, 44, 0, 0)], 1, &[0]);
    let start = code.code.len();
    set_up(&mut code, 8);
    code.set(0x50, 1).set(0x44, 0).again(start);
    let place = Place::new();
    let mut vm = code.start(&place);
    assert_eq!(vm.state(), InstanceState::Running);
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(vm.state(), InstanceState::Running);
    let done = vm.stop();
    assert_eq!(done.code(), 0, "{}", done.stderr.len());
    assert!(done.stderr.lines().count() < 100, "{} lines", done.stderr.lines().count());
}

#[test]
fn packets_of_a_guest_that_make_no_sense_are_harmless() {
    require!(Kvm);
    let mut random = Random::new(17);
    for _ in 0..10 {
        let mut code = Code::new();
        let packet = u64::from(DATA) + 0x3000;
        let chain: Vec<_> = (0..8).map(|i| descriptor(packet + i * 64, 64, 0, 0)).collect();
        let mut data = queues(&chain, 8, &[0, 1, 2, 3, 4, 5, 6, 7]);
        // Buffers that packets to the guest go to; all of one place.
        let back: Vec<_> = (0..8).map(|_| descriptor(packet + 0x1000, 128, 2, 0)).collect();
        data[..128].copy_from_slice(&back.concat());
        for _ in 0..8 {
            let mut header = vec![0u8; 64];
            header[0] = if random.below(8) == 0 { random.next() as u8 } else { 3 };
            header[8] = if random.below(8) == 0 { random.next() as u8 } else { 2 };
            header[16..20].copy_from_slice(&(random.below(3) as u32).to_le_bytes());
            let to = [5001, 5000, 1, u32::MAX][random.below(4) as usize];
            header[20..24].copy_from_slice(&u32::to_le_bytes(to));
            header[24] = random.below(21) as u8;
            header[28] = if random.below(8) == 0 { random.next() as u8 } else { 1 };
            header[30] = random.below(10) as u8;
            header[32..44].fill_with(|| random.next() as u8);
            data.extend(header);
        }
        data.resize(0x6000, 0);
        code.data = data;
        set_up(&mut code, 8);
        let start = code.code.len();
        code.set(0x50, 1).set(0x50, 0);
        // The same packets once more, and more room.
        for queue in [0, 1] {
            let index = DATA + queue * 0x1000 + 0x802;
            code.raw(&[0xbb]).raw(&index.to_le_bytes()).raw(&[0x66, 0x83, 0x03, 0x08]); // add word [index], 8
            code.load(DEVICE + 0x60, 4);
        }
        code.again(start);
        let done = code.run_and_stop();
        assert_eq!(done.code(), 0, "{done:?}");
        assert!(done.stderr.lines().count() <= 3, "{}", done.stderr);
    }
}
