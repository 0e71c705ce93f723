//! Fuzz target: see [`coppice_fuzz::manifest`].
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: coppice_fuzz::begin(coppice_fuzz::manifest::seeds),
    |data: &[u8]| coppice_fuzz::run(coppice_fuzz::manifest::check, data)
);
