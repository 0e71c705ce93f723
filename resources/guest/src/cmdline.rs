//! The kernel command line: the only place where the guest learns about its devices, as it reads no ACPI tables.

/// Most virtio-mmio devices that are remembered.
pub const MAX_DEVICES: usize = 16;

/// A `virtio_mmio.device=<size>@<base>:<irq>` word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MmioDevice {
    /// Guest-physical address of its registers.
    pub base: u64,
    /// Length of its registers, in bytes.
    pub size: u64,
    /// Its interrupt, as an input of the IOAPIC.
    pub irq: u32,
}

/// What the command line says. Unknown words and words that do not parse are ignored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CommandLine {
    devices: [MmioDevice; MAX_DEVICES],
    device_count: usize,
    /// `coppice.generation=`: where the vmm writes the 16 bytes of the generation id.
    pub generation: Option<u64>,
    /// `coppice.vcpus=`: how many vCPUs the machine has, 1 if it does not say.
    pub vcpus: Option<u32>,
    /// `coppice.tsc_khz=`: rate of the time-stamp counter.
    pub tsc_khz: Option<u64>,
}

impl CommandLine {
    /// Reads a command line.
    #[cold]
    pub fn parse(line: &[u8]) -> Self {
        let mut parsed = CommandLine::default();
        for word in line.split(|byte| byte.is_ascii_whitespace()) {
            parsed.word(word);
        }
        parsed
    }

    /// The virtio-mmio devices, in order.
    pub fn devices(&self) -> &[MmioDevice] {
        &self.devices[..self.device_count]
    }

    fn word(&mut self, word: &[u8]) {
        if let Some(value) = word.strip_prefix(b"virtio_mmio.device=") {
            if let (Some(device), Some(slot)) = (device(value), self.devices.get_mut(self.device_count)) {
                *slot = device;
                self.device_count += 1;
            }
        } else if let Some(value) = word.strip_prefix(b"coppice.generation=") {
            self.generation = number(value);
        } else if let Some(value) = word.strip_prefix(b"coppice.vcpus=") {
            self.vcpus = number(value).and_then(|n| u32::try_from(n).ok());
        } else if let Some(value) = word.strip_prefix(b"coppice.tsc_khz=") {
            self.tsc_khz = number(value);
        }
    }
}

/// `<size>@<base>:<irq>`, with an optional `:<id>` that Linux allows after it.
fn device(value: &[u8]) -> Option<MmioDevice> {
    let (size, rest) = split(value, b'@')?;
    let (base, irq) = split(rest, b':')?;
    let irq = split(irq, b':').map_or(irq, |(irq, _id)| irq);
    Some(MmioDevice { base: number(base)?, size: number(size)?, irq: u32::try_from(number(irq)?).ok()? })
}

fn split(value: &[u8], at: u8) -> Option<(&[u8], &[u8])> {
    let position = value.iter().position(|&byte| byte == at)?;
    Some((&value[..position], &value[position + 1..]))
}

/// A decimal or 0x number, with an optional K, M or G after it.
fn number(text: &[u8]) -> Option<u64> {
    let (text, unit) = match text.split_last()? {
        (b'K' | b'k', head) => (head, 1 << 10),
        (b'M' | b'm', head) => (head, 1 << 20),
        (b'G' | b'g', head) => (head, 1 << 30),
        _ => (text, 1),
    };
    let (digits, radix) = match text.strip_prefix(b"0x").or(text.strip_prefix(b"0X")) {
        Some(digits) => (digits, 16),
        None => (text, 10),
    };
    if digits.is_empty() {
        return None;
    }
    digits
        .iter()
        .try_fold(0u64, |sum, &digit| {
            let digit = (digit as char).to_digit(radix)?;
            sum.checked_mul(radix.into())?.checked_add(digit.into())
        })?
        .checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_understood_and_others_are_ignored() {
        let line = b"console=ttyS0 virtio_mmio.device=4K@0xd0000000:5 coppice.vcpus=4\tcoppice.generation=0x9f000 \
                     coppice.tsc_khz=2500000 virtio_mmio.device=0x1000@3489665024:6:0 quiet";
        let parsed = CommandLine::parse(line);
        assert_eq!(
            parsed.devices(),
            [
                MmioDevice { base: 0xd000_0000, size: 4096, irq: 5 },
                MmioDevice { base: 0xd000_1000, size: 4096, irq: 6 }
            ]
        );
        assert_eq!(parsed.generation, Some(0x9_f000));
        assert_eq!(parsed.vcpus, Some(4));
        assert_eq!(parsed.tsc_khz, Some(2_500_000));
        assert_eq!(CommandLine::parse(b""), CommandLine::default());
    }

    #[test]
    fn broken_words_are_ignored() {
        for word in
            ["=", "4K@", "4K@0x:5", "4K@0xd0000000", "@:", "1@2:99999999999", "zK@1:2", "99999999999999999999@1:2"]
        {
            let line = format!("virtio_mmio.device={word} coppice.vcpus=x coppice.generation=0x");
            assert_eq!(CommandLine::parse(line.as_bytes()), CommandLine::default(), "{word}");
        }
        let many = "virtio_mmio.device=4K@1:2 ".repeat(MAX_DEVICES + 3);
        assert_eq!(CommandLine::parse(many.as_bytes()).devices().len(), MAX_DEVICES);
    }
}
