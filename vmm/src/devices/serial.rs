//! The serial port COM1: a 16550 of `vm-superio` on our bus.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use api_spec::stats::ConsoleStats;
use snapshot::state::SerialState;
use vm_superio::Trigger;
use vm_superio::serial::{Error as UartError, SerialEvents, SerialState as UartState};
use vmm_sys_util::eventfd::EventFd;

use super::bus::BusDevice;

/// First port.
pub const BASE: u64 = 0x3f8;
/// Number of ports.
pub const LEN: u64 = 8;
/// Interrupt line.
pub const IRQ: u32 = 4;

type Uart = vm_superio::Serial<Irq, Arc<Counts>, Box<dyn Write + Send>>;

/// What goes wrong with the serial port.
#[derive(Debug, thiserror::Error)]
pub enum SerialError {
    /// More received bytes than a serial port can hold.
    #[error("saved serial port holds {0} received bytes, more than its FIFO has room for; the snapshot is damaged")]
    InBuffer(usize),
    /// The interrupt cannot be raised.
    #[error("the serial port cannot raise its interrupt: {0}")]
    Interrupt(std::io::Error),
}

#[derive(Clone)]
struct Irq(Arc<EventFd>);

impl Trigger for Irq {
    type E = std::io::Error;

    fn trigger(&self) -> std::io::Result<()> {
        self.0.write(1)
    }
}

/// Counts the bytes that the output has taken, and those that it would not take.
#[derive(Default)]
struct Counts {
    written: AtomicU64,
    lost: AtomicU64,
}

impl SerialEvents for Counts {
    fn buffer_read(&self) {}
    fn out_byte(&self) {
        self.written.fetch_add(1, Ordering::Relaxed);
    }
    fn tx_lost_byte(&self) {
        self.lost.fetch_add(1, Ordering::Relaxed);
    }
    fn in_buffer_empty(&self) {}
}

/// The serial port.
pub struct Serial {
    uart: Uart,
    counts: Arc<Counts>,
}

impl Serial {
    /// A serial port as it is after power-on. `irq` raises its interrupt.
    ///
    /// What the guest writes goes to `out` on the vCPU's thread, so `out` must not block: wrap what might in
    /// [`Output`](super::output::Output). Bytes that it refuses are counted and dropped.
    pub fn new(irq: EventFd, out: Box<dyn Write + Send>) -> Self {
        let (counts, irq) = (Arc::<Counts>::default(), Irq(Arc::new(irq)));
        Serial { uart: Uart::with_events(irq, counts.clone(), out), counts }
    }

    /// Has the port go on where `state` was saved. What the guest has written since stays written. The guest's interrupt
    /// controller must be restored before, as an interrupt that was pending is raised again here. If this fails, output goes
    /// nowhere any more.
    pub fn restore(&mut self, state: &SerialState) -> Result<(), SerialError> {
        if self.save() == *state {
            return Ok(());
        }
        let (irq, counts) = (self.uart.interrupt_evt().clone(), self.counts.clone());
        let blank = Uart::with_events(irq.clone(), counts.clone(), Box::new(std::io::sink()));
        let out = std::mem::replace(&mut self.uart, blank).into_writer();
        self.uart = restored(state, irq, counts, out)?;
        Ok(())
    }

    /// The state to save.
    pub fn save(&self) -> SerialState {
        let UartState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        } = self.uart.state();
        SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        }
    }

    /// Gives input to the guest and returns how many bytes of it were taken; the port holds 64 bytes that the guest
    /// has not read. Whoever calls keeps the rest and tries again later.
    pub fn enqueue(&mut self, input: &[u8]) -> Result<usize, SerialError> {
        match self.uart.enqueue_raw_bytes(input) {
            Ok(taken) => Ok(taken),
            Err(UartError::FullFifo) => Ok(0),
            Err(UartError::Trigger(error) | UartError::IOError(error)) => Err(SerialError::Interrupt(error)),
        }
    }

    /// How many bytes of output were taken, and how many were dropped.
    pub fn stats(&self) -> ConsoleStats {
        ConsoleStats {
            written_bytes: self.counts.written.load(Ordering::Relaxed),
            lost_bytes: self.counts.lost.load(Ordering::Relaxed),
        }
    }
}

/// A UART as it was saved.
fn restored(
    state: &SerialState,
    irq: Irq,
    counts: Arc<Counts>,
    out: Box<dyn Write + Send>,
) -> Result<Uart, SerialError> {
    let SerialState {
        baud_divisor_low,
        baud_divisor_high,
        interrupt_enable,
        interrupt_identification,
        line_control,
        line_status,
        modem_control,
        modem_status,
        scratch,
        in_buffer,
    } = state.clone();
    let waiting = in_buffer.len();
    let state = UartState {
        baud_divisor_low,
        baud_divisor_high,
        interrupt_enable,
        interrupt_identification,
        line_control,
        line_status,
        modem_control,
        modem_status,
        scratch,
        in_buffer,
    };
    Uart::from_state(&state, irq, counts, out).map_err(|error| match error {
        UartError::Trigger(error) | UartError::IOError(error) => SerialError::Interrupt(error),
        UartError::FullFifo => SerialError::InBuffer(waiting),
    })
}

impl BusDevice for Serial {
    /// Every byte comes from the same register, as a string instruction wants it.
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill_with(|| self.uart.read(offset as u8));
    }

    /// Every byte goes to the same register, as a string instruction wants it.
    fn write(&mut self, offset: u64, data: &[u8]) {
        for byte in data {
            // A refused byte has been counted; an interrupt that cannot be raised is found by the guest's polling.
            let _ = self.uart.write(offset as u8, *byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use std::sync::Mutex;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    const DATA: u64 = 0;
    const INTERRUPT_ENABLE: u64 = 1;
    const LINE_STATUS: u64 = 5;
    const SCRATCH: u64 = 7;

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(data);
            Ok(data.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Refusing;

    impl Write for Refusing {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::WouldBlock.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn event() -> EventFd {
        EventFd::new(EFD_NONBLOCK).unwrap()
    }

    fn read(serial: &mut Serial, offset: u64) -> u8 {
        let mut data = [0];
        serial.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn output_and_input_pass() {
        let (irq, out) = (event(), Shared::default());
        let mut serial = Serial::new(irq.try_clone().unwrap(), Box::new(out.clone()));
        serial.write(DATA, b"hello");
        assert_eq!(*out.0.lock().unwrap(), b"hello");
        assert_eq!(serial.stats(), ConsoleStats { written_bytes: 5, lost_bytes: 0 });

        serial.write(INTERRUPT_ENABLE, &[1]);
        let _ = irq.read();
        assert_eq!(serial.enqueue(b"ab").unwrap(), 2);
        assert!(irq.read().is_ok(), "input interrupts");
        assert_eq!([read(&mut serial, DATA), read(&mut serial, DATA)], *b"ab");
        assert_eq!(read(&mut serial, LINE_STATUS) & 1, 0);
    }

    #[test]
    fn input_beyond_the_fifo_stays_with_the_caller() {
        let mut serial = Serial::new(event(), Box::new(io::sink()));
        assert_eq!(serial.enqueue(&[7; 100]).unwrap(), 64);
        assert_eq!(serial.enqueue(&[7; 100]).unwrap(), 0);
        read(&mut serial, DATA);
        assert_eq!(serial.enqueue(&[7; 100]).unwrap(), 1);
    }

    #[test]
    fn refused_output_is_counted_and_never_blocks() {
        let mut serial = Serial::new(event(), Box::new(Refusing));
        serial.write(DATA, &[b'x'; 1000]);
        assert_eq!(serial.stats(), ConsoleStats { written_bytes: 0, lost_bytes: 1000 });
    }

    #[test]
    fn every_field_survives_save_and_restore() {
        let state = SerialState {
            baud_divisor_low: 1,
            baud_divisor_high: 2,
            interrupt_enable: 3,
            interrupt_identification: 4,
            line_control: 5,
            line_status: 6,
            modem_control: 7,
            modem_status: 8,
            scratch: 9,
            in_buffer: vec![10, 11],
        };
        let irq = event();
        let mut serial = Serial::new(irq.try_clone().unwrap(), Box::new(io::sink()));
        serial.restore(&state).unwrap();
        assert_eq!(serial.save(), state);
        assert!(irq.read().is_ok(), "the pending interrupt is raised again");
    }

    #[test]
    fn a_fresh_port_saves_what_it_was_told() {
        let mut serial = Serial::new(event(), Box::new(io::sink()));
        serial.write(SCRATCH, &[0x5a]);
        serial.enqueue(b"q").unwrap();
        let state = serial.save();
        assert_eq!((state.scratch, state.in_buffer.as_slice()), (0x5a, b"q".as_slice()));
    }

    #[test]
    fn too_much_saved_input_is_refused() {
        let state = SerialState { in_buffer: vec![0; 65], ..SerialState::default() };
        let refused = Serial::new(event(), Box::new(io::sink())).restore(&state).unwrap_err();
        assert!(matches!(refused, SerialError::InBuffer(65)), "{refused}");
    }
}
