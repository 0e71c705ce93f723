//! Fuzz target: see [`coppice_fuzz::agent`].
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: coppice_fuzz::begin(coppice_fuzz::agent::seeds),
    |data: &[u8]| coppice_fuzz::run(coppice_fuzz::agent::check, data)
);
