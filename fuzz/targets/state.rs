//! Fuzz target: see [`coppice_fuzz::state`].
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: coppice_fuzz::begin(coppice_fuzz::state::seeds),
    |data: &[u8]| coppice_fuzz::run(coppice_fuzz::state::check, data)
);
