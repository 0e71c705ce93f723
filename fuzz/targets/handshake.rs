//! Fuzz target: see [`coppice_fuzz::handshake`].
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: coppice_fuzz::begin(coppice_fuzz::handshake::seeds),
    |data: &[u8]| coppice_fuzz::run(coppice_fuzz::handshake::check, data)
);
