//! Guests of a few instructions of machine code, in ELF files of their own.

/// Where the code lies.
pub const CODE: u32 = 0x10_0000;
/// Where data for the code lies.
pub const DATA: u32 = 0x11_0000;
/// Page directory for the addresses from 3 GiB.
const DIRECTORY: u32 = 0x10_f000;
/// The slot for these addresses in the table that the vmm makes (`PAGE_TABLES` + 0x1000).
const SLOT: u32 = 0xa018;
/// The vsock device.
pub const DEVICE: u32 = 0xd000_0000;

/// Machine code in the making.
#[derive(Clone, Debug, Default)]
pub struct Code {
    /// The instructions so far.
    pub code: Vec<u8>,
    /// What lies at [`DATA`].
    pub data: Vec<u8>,
}

impl Code {
    /// Code that can reach devices.
    pub fn new() -> Self {
        let mut code = Code::default();
        code.raw(&[0xb8]).raw(&(DIRECTORY | 3).to_le_bytes()); // mov eax, DIRECTORY | 3
        code.raw(&[0x48, 0x89, 0x04, 0x25]).raw(&SLOT.to_le_bytes()); // mov [SLOT], rax
        code
    }

    /// These bytes.
    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.code.extend(bytes);
        self
    }

    /// Writes 1, 2 or 4 bytes to a port.
    pub fn out(&mut self, port: u16, value: u32, len: u8) -> &mut Self {
        self.raw(&[0x66, 0xba]).raw(&port.to_le_bytes()); // mov dx, port
        self.raw(&[0xb8]).raw(&value.to_le_bytes()); // mov eax, value
        self.raw(match len {
            1 => &[0xee],
            2 => &[0x66, 0xef],
            _ => &[0xef],
        })
    }

    /// Reads 1, 2 or 4 bytes from a port.
    pub fn input(&mut self, port: u16, len: u8) -> &mut Self {
        self.raw(&[0x66, 0xba]).raw(&port.to_le_bytes()); // mov dx, port
        self.raw(match len {
            1 => &[0xec],
            2 => &[0x66, 0xed],
            _ => &[0xed],
        })
    }

    /// Writes 1, 2, 4 or 8 bytes to memory.
    pub fn store(&mut self, addr: u32, value: u64, len: u8) -> &mut Self {
        self.raw(&[0xbb]).raw(&addr.to_le_bytes()); // mov ebx, addr
        self.raw(&[0x48, 0xb8]).raw(&value.to_le_bytes()); // mov rax, value
        self.raw(match len {
            1 => &[0x88, 0x03],
            2 => &[0x66, 0x89, 0x03],
            4 => &[0x89, 0x03],
            _ => &[0x48, 0x89, 0x03],
        })
    }

    /// Reads 1, 2, 4 or 8 bytes from memory.
    pub fn load(&mut self, addr: u32, len: u8) -> &mut Self {
        self.raw(&[0xbb]).raw(&addr.to_le_bytes()); // mov ebx, addr
        self.raw(match len {
            1 => &[0x8a, 0x03],
            2 => &[0x66, 0x8b, 0x03],
            4 => &[0x8b, 0x03],
            _ => &[0x48, 0x8b, 0x03],
        })
    }

    /// A register of the device.
    pub fn set(&mut self, register: u32, value: u32) -> &mut Self {
        self.store(DEVICE + register, value.into(), 4)
    }

    /// Resets the machine.
    pub fn reset(&mut self) -> &mut Self {
        self.out(0x64, 0xfe, 1).forever()
    }

    /// Does nothing more.
    pub fn forever(&mut self) -> &mut Self {
        self.raw(&[0xeb, 0xfe]) // jmp .
    }

    /// Stands still with interrupts off.
    pub fn halt(&mut self) -> &mut Self {
        self.raw(&[0xfa, 0xf4]).forever() // cli; hlt
    }

    /// Jumps back to `start` for ever.
    pub fn again(&mut self, start: usize) -> &mut Self {
        let back = start as i32 - (self.code.len() as i32 + 5);
        self.raw(&[0xe9]).raw(&back.to_le_bytes())
    }

    /// It as a kernel.
    pub fn elf(&self) -> Vec<u8> {
        assert!(self.code.len() < (DIRECTORY - CODE) as usize);
        let mut image = self.code.clone();
        image.resize((DIRECTORY - CODE) as usize, 0);
        for i in 0..512u64 {
            image.extend((((3 << 30) + (i << 21)) | 0x83).to_le_bytes());
        }
        assert_eq!(image.len(), (DATA - CODE) as usize);
        image.extend(&self.data);
        let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let header: [&[u8]; 12] = [
            &2u16.to_le_bytes(),
            &62u16.to_le_bytes(),
            &1u32.to_le_bytes(),
            &u64::from(CODE).to_le_bytes(),
            &64u64.to_le_bytes(),
            &0u64.to_le_bytes(),
            &0u32.to_le_bytes(),
            &64u16.to_le_bytes(),
            &56u16.to_le_bytes(),
            &1u16.to_le_bytes(),
            &[0; 4],
            &[0; 2],
        ];
        elf.extend(header.concat());
        let (addr, size) = (u64::from(CODE).to_le_bytes(), (image.len() as u64).to_le_bytes());
        let segment: [&[u8]; 8] =
            [&1u32.to_le_bytes(), &7u32.to_le_bytes(), &120u64.to_le_bytes(), &addr, &addr, &size, &size, &[0; 8]];
        elf.extend(segment.concat());
        elf.extend(image);
        elf
    }
}
