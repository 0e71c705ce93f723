//! Fuzz target: see [`coppice_fuzz::packed`].
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: coppice_fuzz::begin(coppice_fuzz::packed::seeds),
    |data: &[u8]| coppice_fuzz::run(coppice_fuzz::packed::check, data)
);
