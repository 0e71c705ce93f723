//! Fuzz target: see [`coppice_fuzz::working_set`].
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: coppice_fuzz::begin(coppice_fuzz::working_set::seeds),
    |data: &[u8]| coppice_fuzz::run(coppice_fuzz::working_set::check, data)
);
