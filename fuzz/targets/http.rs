//! Fuzz target: see [`coppice_fuzz::http`].
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: coppice_fuzz::begin(coppice_fuzz::http::seeds),
    |data: &[u8]| coppice_fuzz::run(coppice_fuzz::http::check, data)
);
