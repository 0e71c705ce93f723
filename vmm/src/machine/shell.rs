//! A shell: all of a machine that does not depend on a snapshot, ready to have one loaded into it.
//!
//! ```text
//!   before the request    VM, vCPUs and their threads, memory slots over reserved addresses, devices and their registrations
//!   at the request        disks behind the drives -> map memory over the addresses -> load vCPU, VM and device state -> run
//! ```
//!
//! Every load goes through a shell: one that was built ahead (`vmm --shell`), or, if there is none or the snapshot does not
//! fit it ([`Misfit`]), one that is built for the occasion.

use super::boot::{self, BootError};
use super::config::DevicePlan;
use super::phases::Phases;
use super::restore::{self, RestoreError};
use super::snapshot;
use super::wiring::{self, Outside, WireError};
use super::{Machine, start_threads};
use crate::devices::virtio::block::Disk;
use crate::host;
use crate::kvm::{self, KvmError};
use crate::memory::{GuestRam, MemoryError, layout};
use crate::vcpu::VcpuError;
use crate::vcpu::state::{StateShape, VcpuStateError};
use ::snapshot::state::VcpuState;
use ::snapshot::{compat, load};
use api_spec::devices::Drive;
use api_spec::snapshot::VsockOverride;
use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::OwnedFd;

/// Why a shell could not be built.
#[derive(Debug, thiserror::Error)]
pub enum ShellError {
    /// No descriptor.
    #[error("cannot create an event descriptor: {0}; the limit on open files may be reached (ulimit -n)")]
    Descriptor(io::Error),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Devices.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// What the host keeps for a vCPU.
    #[error(transparent)]
    Shape(VcpuStateError),
    /// Threads.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
}

/// Why a snapshot does not fit a shell.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Misfit {
    /// Another number of vCPUs.
    #[error("the shell has {shell} vCPUs and the snapshot {snapshot}")]
    Vcpus {
        /// Those of the shell.
        shell: u8,
        /// Those of the snapshot.
        snapshot: u8,
    },
    /// Another size of memory.
    #[error("the shell has {} MiB of memory and the snapshot {} MiB", .shell >> 20, .snapshot >> 20)]
    Memory {
        /// That of the shell, in bytes.
        shell: u64,
        /// That of the snapshot, in bytes.
        snapshot: u64,
    },
    /// A device that one of them lacks, or that is another one.
    #[error("the shell and the snapshot do not have the same {0}")]
    Device(&'static str),
    /// The request wants another host side of a device than the shell has.
    #[error("{0} wants another host side than the shell has")]
    HostSide(&'static str),
}

/// What a machine is built of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Guest memory, in bytes.
    pub memory_bytes: u64,
    /// Devices.
    pub devices: DevicePlan,
}

impl Shape {
    /// Whether what a request wants, which is of the shape `wanted` and may ask for other host sides, can be had in a shell of this
    /// one. Pure.
    pub fn fits(
        &self,
        wanted: &Shape,
        vsock_override: Option<&VsockOverride>,
        overrides_network: bool,
    ) -> Result<(), Misfit> {
        if self.vcpus != wanted.vcpus {
            return Err(Misfit::Vcpus { shell: self.vcpus, snapshot: wanted.vcpus });
        }
        if self.memory_bytes != wanted.memory_bytes {
            return Err(Misfit::Memory { shell: self.memory_bytes, snapshot: wanted.memory_bytes });
        }
        let DevicePlan { vsock, drives, network, entropy, balloon } = &wanted.devices;
        let own = &self.devices;
        let interfaces = |plan: &DevicePlan| -> Vec<_> {
            plan.network.iter().map(|interface| (interface.iface_id.clone(), interface.guest_mac)).collect()
        };
        let ids = |drives: &[Drive]| -> Vec<String> { drives.iter().map(|drive| drive.drive_id.clone()).collect() };
        let same = [
            ("drives", ids(&own.drives) == ids(drives)),
            ("vsock device", own.vsock.as_ref().map(|v| v.guest_cid) == vsock.as_ref().map(|v| v.guest_cid)),
            ("network interfaces", interfaces(own) == interfaces(&wanted.devices)),
            ("source of entropy", own.entropy.is_some() == entropy.is_some()),
            ("balloon", own.balloon == *balloon),
        ];
        if let Some((device, _)) = same.into_iter().find(|(_, same)| !same) {
            return Err(Misfit::Device(device));
        }
        let is_elsewhere =
            |wanted: &VsockOverride| own.vsock.as_ref().is_none_or(|own| own.uds_path != wanted.uds_path);
        if vsock_override.is_some_and(is_elsewhere) {
            return Err(Misfit::HostSide("vsock_override"));
        }
        let mut taps = own.network.iter().zip(network);
        let is_other = |(own, wanted): (&api_spec::devices::NetworkInterface, &api_spec::devices::NetworkInterface)| {
            own.host_dev_name != wanted.host_dev_name
        };
        if overrides_network && taps.any(is_other) {
            return Err(Misfit::HostSide("network_overrides"));
        }
        Ok(())
    }
}

/// A machine without a guest.
#[derive(Debug)]
pub struct Shell {
    machine: Machine,
    /// What is known of its vCPUs, by number, if anything is.
    held: Vec<VcpuState>,
    /// Its number is lower than that of the VM, for the userfaultfd: see [`crate::memory::uffd::Service`].
    low: OwnedFd,
}

impl Shell {
    /// Builds one, with no disks behind its drives yet.
    pub fn build(shape: Shape, outside: Outside, phases: &mut Phases) -> Result<Self, ShellError> {
        let Shape { vcpus, memory_bytes, devices: plan } = shape;
        // That is told of guests that are booted.
        let outside = Outside { boot_timer: false, ..outside };
        let low = eventfd(0, EventfdFlags::CLOEXEC).map_err(|e| ShellError::Descriptor(e.into()))?;
        let kvm = kvm::open()?;
        phases.end("kvm");
        let ram = GuestRam::reserve(layout::ram_regions(memory_bytes))?;
        let vm = kvm::create(&kvm, &ram, vcpus)?;
        phases.end("vm");
        let notifier = outside.notifier.clone();
        let devices = wiring::wire(&vm.fd, &ram, &plan, outside)?;
        phases.end("devices");
        let shape = StateShape::of_host(&kvm, &vm.fd).map_err(ShellError::Shape)?;
        let threads = start_threads(vm.vcpus, &devices, &notifier)?;
        phases.end("threads");
        let machine = Machine::new(threads, devices, shape, vm.fd, ram, plan);
        Ok(Shell { machine, held: Vec::new(), low })
    }

    /// What it is built of.
    pub fn shape(&self) -> Shape {
        let Machine { vcpus, ram, plan, .. } = &self.machine;
        Shape { vcpus: vcpus.len() as u8, memory_bytes: ram.size(), devices: plan.clone() }
    }

    /// Gives the vCPUs the CPUID that most guests will have had, saves the machine as it is, and reads that, as a load will read its
    /// state: the code and the memory for that are there then, and a load knows what the vCPUs hold.
    pub fn rehearse(&mut self) {
        if let Err(e) = self.give_cpuid() {
            tracing::debug!("loads into this shell take longer: {e}");
        }
        let saved = match snapshot::save(&self.machine) {
            // What is not there is in no manifest.
            Ok(mut saved) => {
                saved.devices.drives.clear();
                saved
            }
            Err(e) => return tracing::debug!("loads into this shell take longer: {e}"),
        };
        let facts = snapshot::facts(&self.machine, None, None);
        let read = load::rehearse(facts, self.machine.ram.regions().to_vec(), &saved).map_err(RestoreError::from);
        let checked = read.and_then(|(manifest, state)| {
            // Nothing is restored, so what cannot be told of this host concerns nobody yet.
            compat::check(&manifest, &state, host::to_compare(), &[])?;
            restore::check_machine(&manifest)
        });
        if let Err(e) = checked {
            tracing::debug!("a snapshot of this shell could not be loaded here: {e}");
        }
        self.held = saved.vcpus;
    }

    fn give_cpuid(&self) -> Result<(), BootError> {
        let vcpus = &self.machine.vcpus;
        for (number, (vcpu, cpuid)) in (0..).zip(vcpus.iter().zip(boot::cpuids(&kvm::open()?, vcpus.len() as u8)?)) {
            vcpu.lock().set_cpuid2(&cpuid).map_err(|source| BootError::Cpuid { vcpu: number, source })?;
        }
        Ok(())
    }

    /// The machine, with the disks and the bounds of a guest that it fits and nothing else loaded into it, what is known of its vCPUs,
    /// and a descriptor for its userfaultfd to take the number of.
    pub(super) fn open(mut self, guest: DevicePlan, disks: Vec<Disk>) -> (Machine, Vec<VcpuState>, OwnedFd) {
        self.machine.adopt(guest, disks);
        (self.machine, self.held, self.low)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use api_spec::devices::{Balloon, NetworkInterface};
    use api_spec::vm::Vsock;
    use proptest::prelude::*;

    fn interface(host_dev_name: &str, mac: Option<u8>) -> NetworkInterface {
        NetworkInterface {
            iface_id: "eth0".into(),
            host_dev_name: host_dev_name.into(),
            guest_mac: mac.map(|last| format!("02:00:00:00:00:{last:02x}").parse().unwrap()),
            rx_rate_limiter: None,
            tx_rate_limiter: None,
            mtu: None,
        }
    }

    fn drive(id: &str, is_read_only: bool) -> Drive {
        let drive = serde_json::json!({ "drive_id": id, "path_on_host": "/image", "is_read_only": is_read_only });
        serde_json::from_value(drive).unwrap()
    }

    fn shapes() -> impl Strategy<Value = Shape> {
        let vsock = prop::option::of((3..5u32, prop::sample::select(vec!["a", "b"])));
        let network = prop::option::of((prop::sample::select(vec!["tap0", "tap1"]), prop::option::of(1..3u8)));
        let drives = prop::collection::vec((prop::sample::select(vec!["a", "b"]), any::<bool>()), 0..3);
        (1..3u8, 1..3u64, vsock, network, prop::option::of(0..2u64), any::<bool>(), drives).prop_map(
            |(vcpus, mib, vsock, network, balloon, entropy, drives)| Shape {
                vcpus,
                memory_bytes: mib << 20,
                devices: DevicePlan {
                    vsock: vsock.map(|(guest_cid, path)| Vsock { guest_cid, uds_path: path.into(), vsock_id: None }),
                    network: network.map(|(tap, mac)| interface(tap, mac)).into_iter().collect(),
                    balloon: balloon.map(|amount_mib| Balloon {
                        amount_mib,
                        deflate_on_oom: false,
                        stats_polling_interval_s: 0,
                        free_page_reporting: false,
                        free_page_hinting: false,
                    }),
                    entropy: entropy.then(Default::default),
                    drives: drives.into_iter().map(|(id, is_read_only)| drive(id, is_read_only)).collect(),
                },
            },
        )
    }

    /// What the guest can see of a machine.
    fn seen(shape: &Shape) -> Shape {
        let mut seen = shape.clone();
        seen.devices.vsock.iter_mut().for_each(|vsock| vsock.uds_path = "".into());
        seen.devices.network.iter_mut().for_each(|interface| interface.host_dev_name = String::new());
        // What lies behind it is the snapshot's.
        seen.devices.drives.iter_mut().for_each(|drive| drive.is_read_only = false);
        seen
    }

    proptest! {
        #[test]
        fn a_snapshot_fits_a_shell_that_looks_the_same_from_inside(shell in shapes(), wanted in shapes()) {
            let fits = shell.fits(&wanted, None, false);
            prop_assert_eq!(fits.is_ok(), seen(&shell) == seen(&wanted), "{:?}", fits);
        }

        #[test]
        fn what_a_request_says_of_the_host_side_must_be_what_the_shell_has(shell in shapes(), path in prop::sample::select(vec!["a", "b"])) {
            let vsock_override = Some(VsockOverride { uds_path: path.into() });
            let fits = shell.fits(&shell, vsock_override.as_ref(), false);
            let same = shell.devices.vsock.as_ref().is_some_and(|vsock| vsock.uds_path == std::path::Path::new(path));
            prop_assert_eq!(fits, if same { Ok(()) } else { Err(Misfit::HostSide("vsock_override")) });
        }
    }

    #[test]
    fn another_tap_is_refused_only_if_it_was_asked_for() {
        let with = |tap| Shape {
            vcpus: 1,
            memory_bytes: 1 << 20,
            devices: DevicePlan { network: vec![interface(tap, Some(1))], ..Default::default() },
        };
        assert_eq!(with("tap0").fits(&with("tap1"), None, false), Ok(()));
        assert_eq!(with("tap0").fits(&with("tap1"), None, true), Err(Misfit::HostSide("network_overrides")));
        assert_eq!(with("tap1").fits(&with("tap1"), None, true), Ok(()));
    }
}
