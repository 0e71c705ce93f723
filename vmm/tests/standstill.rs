//! vCPUs are brought to a standstill, also if one of them does not come there at once.

use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use test_skip::skip;
use vm_memory::{Bytes, GuestAddress};
use vmm::devices::bus::{Bus, BusDevice};
use vmm::kvm;
use vmm::memory::GuestRam;
use vmm::notice;
use vmm::vcpu::{Buses, PAUSE_DEADLINE, Vcpu, end_all, pause_all};

const COUNTED: u8 = 0x80;
const BLOCKED: u8 = 0x90;
const CODE: [u64; 2] = [0x1000, 0x2000];

/// Counts writes.
#[derive(Default)]
struct Counter(Arc<AtomicU64>);

impl BusDevice for Counter {
    fn read(&mut self, _offset: u64, _data: &mut [u8]) {}
    fn write(&mut self, _offset: u64, _data: &[u8]) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// Says that it is written, and lets the writer wait until the test has let it go.
struct Blocker(Sender<()>, Receiver<()>);

impl BusDevice for Blocker {
    fn read(&mut self, _offset: u64, _data: &mut [u8]) {}
    fn write(&mut self, _offset: u64, _data: &[u8]) {
        let _ = self.0.send(());
        let _ = self.1.recv();
    }
}

#[test]
fn the_others_stand_while_one_is_stuck_and_it_follows() {
    let kvm = match kvm::open() {
        Ok(kvm) => kvm,
        Err(e) => return skip(e),
    };
    let ram = GuestRam::fresh(16 << 20).unwrap();
    let vm = kvm::create(&kvm, &ram, 2).unwrap();
    for ((fd, code), port) in vm.vcpus.iter().zip(CODE).zip([COUNTED, BLOCKED]) {
        // again: out port, al; jmp again
        ram.memory().write_slice(&[0xe6, port, 0xeb, 0xfc], GuestAddress(code)).unwrap();
        fd.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }).unwrap();
        let mut sregs = fd.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        fd.set_sregs(&sregs).unwrap();
        let mut regs = fd.get_regs().unwrap();
        (regs.rip, regs.rflags) = (code, 2);
        fd.set_regs(&regs).unwrap();
    }
    let counter = Counter::default();
    let count = counter.0.clone();
    let ((entered, enters), (let_go, lets_go)) = (channel(), channel());
    let mut pio = Bus::ports();
    pio.insert(COUNTED.into(), 1, Arc::new(Mutex::new(counter))).unwrap();
    pio.insert(BLOCKED.into(), 1, Arc::new(Mutex::new(Blocker(entered, lets_go)))).unwrap();
    let buses = Buses { pio: Arc::new(pio), mmio: Arc::new(Bus::memory()) };
    let (notifier, _notices) = notice::channel().unwrap();
    let start = |(number, fd)| Vcpu::start(number as u8, fd, buses.clone(), notifier.clone()).unwrap();
    let vcpus: Vec<Vcpu> = vm.vcpus.into_iter().enumerate().map(start).collect();
    let counts_on = || {
        let before = count.load(Ordering::SeqCst);
        while count.load(Ordering::SeqCst) == before {
            std::thread::yield_now();
        }
    };

    vcpus.iter().for_each(Vcpu::run);
    counts_on();
    enters.recv().unwrap();
    let stuck = pause_all(&vcpus, Duration::from_millis(10)).unwrap_err();
    assert!(stuck.to_string().contains("vCPU 1"), "{stuck}");
    // The first is out of KVM for good: its registers can be had.
    drop(vcpus[0].lock());
    let before = count.load(Ordering::SeqCst);
    pause_all(&vcpus, Duration::from_millis(10)).unwrap_err();
    assert_eq!(count.load(Ordering::SeqCst), before, "it stands as long as the other is stuck");
    let_go.send(()).unwrap();
    pause_all(&vcpus, PAUSE_DEADLINE).unwrap();

    // Brakes do the same without waiting, from any thread.
    vcpus.iter().for_each(Vcpu::run);
    counts_on();
    enters.recv().unwrap();
    let brakes: Vec<_> = vcpus.iter().map(Vcpu::brake).collect();
    std::thread::spawn(move || brakes.iter().for_each(|brake| brake.pull())).join().unwrap();
    drop(vcpus[0].lock());
    let before = count.load(Ordering::SeqCst);
    let_go.send(()).unwrap();
    drop(vcpus[1].lock());
    assert_eq!(count.load(Ordering::SeqCst), before);

    vcpus.iter().for_each(Vcpu::run);
    counts_on();
    drop(let_go);
    assert!(end_all(&vcpus));
}
