//! ACPI tables: how a kernel finds out about vCPUs, devices, and the ways to reset and power off. Pure.
//!
//! ```text
//!   RSDP -> XSDT -> FADT -> DSDT: vCPUs, COM1, pvpanic, virtio-mmio devices, generation id, events
//!                \> MADT: local APICs, IOAPIC
//! ```
//!
//! The platform is *hardware-reduced* (ACPI 6.5, section 4.1): it has none of the fixed hardware of a PC, so a kernel
//! leaves the interval timer, the old interrupt controllers and the real-time clock alone, and takes events from a Generic
//! Event Device. All tables lie in one run of bytes, each aligned to 16 of them, the RSDP first.

use super::{IO_APIC, LOCAL_APIC};
use crate::devices::{i8042, power, pvpanic, serial};
use crate::memory::layout::{EVENT_GSI, GENERATION_PAGE, MMIO_STRIDE};
use acpi_tables::aml::{
    Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, Package, Path, ResourceTemplate,
    Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};

const OEM: [u8; 6] = *b"COPPIC";
const OEM_TABLE: [u8; 8] = *b"COPPICE ";
const OEM_REVISION: u32 = 1;
/// Size of a table's header, in bytes.
const HEADER: u32 = 36;
/// Revision of a DSDT whose integers have 64 bits.
const DSDT_REVISION: u8 = 2;
const ALIGNMENT: usize = 16;

/// FADT, "IA-PC boot architecture": no VGA to probe for.
const BOOT_NO_VGA: u16 = 1 << 2;
/// FADT, "IA-PC boot architecture": no real-time clock. (That bit 1 is clear says: no keyboard controller to probe for.)
const BOOT_NO_RTC: u16 = 1 << 5;

/// `SLP_TYP` of the state "soft off".
pub const SOFT_OFF: u8 = 5;
/// Event 0x80 of the generation id's device: it has changed.
const GENERATION_CHANGED: u8 = 0x80;

/// A virtio-mmio device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioMmio {
    /// First guest-physical address.
    pub base: u64,
    /// Its interrupt.
    pub gsi: u32,
}

/// The tables of a machine, as bytes that belong at guest-physical address `base`, which is also the RSDP's.
pub fn tables(base: u64, vcpus: u8, devices: &[VirtioMmio]) -> Vec<u8> {
    let mut run = Run { base, bytes: vec![0; Rsdp::len()] };
    let dsdt = run.append(dsdt(vcpus, devices).as_slice());
    let fadt = run.append(&bytes(&fadt(dsdt)));
    let madt = run.append(&bytes(&madt(vcpus)));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = run.append(&bytes(&xsdt));
    let rsdp = bytes(&Rsdp::new(OEM, xsdt));
    run.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    run.bytes
}

/// Tables, one after the other.
struct Run {
    base: u64,
    bytes: Vec<u8>,
}

impl Run {
    /// Adds a table and returns its guest-physical address.
    fn append(&mut self, table: &[u8]) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
        let addr = self.base + self.bytes.len() as u64;
        self.bytes.extend_from_slice(table);
        addr
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// A register of one byte at an I/O port.
fn port(port: u64) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port)
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = (BOOT_NO_VGA | BOOT_NO_RTC).into();
    fadt.reset_reg = port(i8042::COMMAND_PORT);
    fadt.reset_value = i8042::RESET;
    fadt.sleep_control_reg = port(power::BASE + power::CONTROL);
    fadt.sleep_status_reg = port(power::BASE + power::STATUS);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"Coppice\0").into();
    fadt.finalize()
}

fn madt(vcpus: u8) -> MADT {
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, LocalInterruptController::Address(LOCAL_APIC));
    for vcpu in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(vcpu, vcpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IO_APIC, 0));
    madt
}

fn dsdt(vcpus: u8, devices: &[VirtioMmio]) -> Sdt {
    let mut code: Vec<u8> = (0..vcpus).flat_map(processor).collect();
    code.extend(serial_port());
    code.extend(pvpanic());
    code.extend(devices.iter().enumerate().flat_map(|(index, device)| virtio_mmio(index, *device)));
    code.extend(generation_id());
    code.extend(event_device());
    let mut all = Scope::raw("\\_SB_".into(), code);
    Name::new("\\_S5_".into(), &Package::new(vec![&SOFT_OFF, &aml::ZERO])).to_aml_bytes(&mut all);
    let mut dsdt = Sdt::new(*b"DSDT", HEADER, DSDT_REVISION, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&all);
    dsdt
}

/// A vCPU, as a device whose `_UID` is the one that the MADT gives its local APIC.
fn processor(number: u8) -> Vec<u8> {
    let name = format!("C{number:03}");
    let (hid, uid) = (Name::new("_HID".into(), &"ACPI0007"), Name::new("_UID".into(), &number));
    bytes(&Device::new(Path::new(&name), vec![&hid, &uid]))
}

/// An interrupt that comes as an edge, active high, for one device alone.
fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

fn serial_port() -> Vec<u8> {
    let (base, len) = (serial::BASE as u16, serial::LEN as u8);
    let (ports, interrupt) = (IO::new(base, base, 0, len), edge(serial::IRQ));
    let resources = ResourceTemplate::new(vec![&ports, &interrupt]);
    bytes(&Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new("_CRS".into(), &resources),
        ],
    ))
}

/// The device by which a kernel says that it has panicked.
fn pvpanic() -> Vec<u8> {
    let (base, len) = (pvpanic::BASE as u16, pvpanic::LEN as u8);
    let ports = IO::new(base, base, 0, len);
    bytes(&Device::new(
        "PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports])),
        ],
    ))
}

fn virtio_mmio(index: usize, VirtioMmio { base, gsi }: VirtioMmio) -> Vec<u8> {
    let memory = Memory32Fixed::new(true, base as u32, MMIO_STRIDE as u32);
    bytes(&Device::new(
        Path::new(&format!("VD{index:02X}")),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &index),
            // Transfers are coherent with the processors' caches.
            &Name::new("_CCA".into(), &aml::ONE),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&memory, &edge(gsi)])),
        ],
    ))
}

/// The generation id, as Microsoft's "Virtual Machine Generation ID" describes it. The second compatible id is the one
/// that Linux knows before 6.10, where the first is too long for it.
fn generation_id() -> Vec<u8> {
    let (low, high) = (GENERATION_PAGE as u32, (GENERATION_PAGE >> 32) as u32);
    bytes(&Device::new(
        "VGEN".into(),
        vec![
            &Name::new("_HID".into(), &"COPPVGEN"),
            &Name::new("_CID".into(), &Package::new(vec![&"VM_Gen_Counter", &"VMGENCTR"])),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("ADDR".into(), &Package::new(vec![&low, &high])),
        ],
    ))
}

/// The Generic Event Device: its one interrupt says that the generation id has changed.
fn event_device() -> Vec<u8> {
    let interrupt = EVENT_GSI;
    let generation = Path::new("\\_SB_.VGEN");
    let is_ours = Equal::new(&aml::Arg(0), &interrupt);
    let notify = Notify::new(&generation, &GENERATION_CHANGED);
    let on_ours = If::new(&is_ours, vec![&notify]);
    bytes(&Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_UID".into(), &aml::ZERO),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&edge(interrupt)])),
            &Method::new("_EVT".into(), 1, true, vec![&on_ours]),
        ],
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0xe_0000;

    fn machine(vcpus: u8, devices: usize) -> Vec<u8> {
        let device = |i: u64| VirtioMmio { base: 0xd000_0000 + i * MMIO_STRIDE, gsi: 5 + i as u32 };
        tables(BASE, vcpus, &(0..devices as u64).map(device).collect::<Vec<_>>())
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// The table at a guest-physical address, whose checksum is right.
    fn table<'r>(run: &'r [u8], addr: u64, signature: &[u8; 4]) -> &'r [u8] {
        assert!(addr.is_multiple_of(ALIGNMENT as u64), "{addr:#x}");
        let table = &run[(addr - BASE) as usize..];
        let table = &table[..u32_at(table, 4) as usize];
        assert_eq!(&table[..4], signature);
        assert_eq!(sum(table), 0, "checksum of {}", String::from_utf8_lossy(signature));
        table
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
        bytes.windows(wanted.len()).any(|window| window == wanted)
    }

    #[test]
    fn every_table_is_reached_and_has_its_checksum() {
        let run = machine(4, 8);
        assert_eq!((&run[..8], sum(&run[..20]), sum(&run[..36])), (&b"RSD PTR "[..], 0, 0));
        let xsdt = table(&run, u64_at(&run, 24), b"XSDT");
        assert_eq!(xsdt.len(), 36 + 2 * 8);
        let fadt = table(&run, u64_at(xsdt, 36), b"FACP");
        table(&run, u64_at(xsdt, 44), b"APIC");
        table(&run, u64_at(fadt, 140), b"DSDT");
        assert_ne!(u32_at(fadt, 112) & (1 << 20), 0, "hardware-reduced");
        // Address space, width, offset, access size, address: registers of one byte at ports.
        assert_eq!((&fadt[116..120], u64_at(fadt, 120), fadt[128]), (&[1, 8, 0, 1][..], 0x64, 0xfe));
        assert_eq!((&fadt[244..248], u64_at(fadt, 248)), (&[1, 8, 0, 1][..], power::BASE));
        assert_eq!((&fadt[256..260], u64_at(fadt, 260)), (&[1, 8, 0, 1][..], power::BASE + 1));
    }

    #[test]
    fn each_vcpu_has_its_local_apic() {
        let run = machine(3, 0);
        let xsdt = table(&run, u64_at(&run, 24), b"XSDT");
        let madt = table(&run, u64_at(xsdt, 44), b"APIC");
        assert_eq!(u32_at(madt, 36), LOCAL_APIC);
        let (apics, io_apic) = madt[44..].split_at(3 * 8);
        for (number, apic) in apics.chunks(8).enumerate() {
            assert_eq!(apic, [0, 8, number as u8, number as u8, 1, 0, 0, 0]);
        }
        assert_eq!((io_apic[0], io_apic.len(), u32_at(io_apic, 4)), (1, 12, IO_APIC));
    }

    #[test]
    fn each_vcpu_is_a_processor_with_the_uid_of_its_local_apic() {
        let run = machine(8, 0);
        let xsdt = table(&run, u64_at(&run, 24), b"XSDT");
        let fadt = table(&run, u64_at(xsdt, 36), b"FACP");
        let dsdt = table(&run, u64_at(fadt, 140), b"DSDT");
        for number in 0..8u8 {
            let name = format!("C{number:03}");
            let at = dsdt.windows(4).position(|w| w == name.as_bytes()).unwrap();
            let device = &dsdt[at..at + 40];
            assert!(contains(device, b"ACPI0007"), "{name}");
            // `_UID` as the constant Zero, One, or a byte.
            let uid: &[u8] = match number {
                0 => &[0],
                1 => &[1],
                _ => &[0x0a, number],
            };
            assert!(contains(device, &[b"_UID", uid].concat()), "{name}: {device:x?}");
        }
        assert!(!contains(dsdt, b"C008"));
    }

    #[test]
    fn each_device_is_described() {
        let run = machine(1, 17);
        let xsdt = table(&run, u64_at(&run, 24), b"XSDT");
        let fadt = table(&run, u64_at(xsdt, 36), b"FACP");
        let dsdt = table(&run, u64_at(fadt, 140), b"DSDT");
        for name in [
            "COM1",
            "QEMU0001",
            "VD00",
            "VD10",
            "LNRO0005",
            "VGEN",
            "VM_Gen_Counter",
            "VMGENCTR",
            "GED_",
            "_EVT",
            "_S5_",
        ] {
            assert!(contains(dsdt, name.as_bytes()), "{name}");
        }
        // The last device's window (a descriptor of 32-bit memory, 9 bytes long, writable) and its interrupt (an extended
        // one, 6 bytes long, consumed, edge, active high).
        let window = [&[0x86, 9, 0, 1][..], &0xd001_0000u32.to_le_bytes(), &0x1000u32.to_le_bytes()].concat();
        assert!(contains(dsdt, &window));
        assert!(contains(dsdt, &[0x89, 6, 0, 0b0011, 1, 21, 0, 0, 0]));
    }
}
