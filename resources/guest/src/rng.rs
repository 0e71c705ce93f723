//! Random bytes whose state lives in guest memory only.
//!
//! That is the point: two clones of one snapshot give the *same* bytes until each is told that it is a clone, as any
//! software generator would, so that a test can prove that reseeding happens. After seeding, the processor's own random
//! instructions and clocks are never consulted.
//!
//! ChaCha20 with fast key erasure: each block's first half replaces the key, its second half is the output.

/// A random generator.
pub struct Rng {
    key: [u32; 8],
}

impl Rng {
    /// A generator that has absorbed nothing yet.
    pub const fn new() -> Self {
        Rng { key: [0; 8] }
    }

    /// Mixes bytes in. What was known about the state before says nothing about it after, unless the bytes are known.
    pub fn absorb(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(32) {
            for (index, &byte) in chunk.iter().enumerate() {
                self.key[index / 4] ^= u32::from(byte) << (8 * (index % 4));
            }
            // The length tells a short chunk from one that ends in zeros.
            let block = chacha20_block(&self.key, [chunk.len() as u32, 1, 0, 0]);
            self.key.copy_from_slice(&block[..8]);
        }
    }

    /// The next 32 bytes.
    pub fn bytes(&mut self) -> [u8; 32] {
        let block = chacha20_block(&self.key, [0; 4]);
        self.key.copy_from_slice(&block[..8]);
        let mut out = [0; 32];
        for (bytes, word) in out.chunks_exact_mut(4).zip(&block[8..]) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        out
    }
}

impl Default for Rng {
    fn default() -> Self {
        Self::new()
    }
}

/// The ChaCha20 block function (RFC 8439, 2.3); `input` is the counter and the nonce.
fn chacha20_block(key: &[u32; 8], input: [u32; 4]) -> [u32; 16] {
    let mut start = [0u32; 16];
    start[..4].copy_from_slice(&[0x6170_7865, 0x3320_646e, 0x7962_2d32, 0x6b20_6574]);
    start[4..12].copy_from_slice(key);
    start[12..].copy_from_slice(&input);
    let mut state = start;
    for _ in 0..10 {
        for column in 0..4 {
            quarter(&mut state, column, column + 4, column + 8, column + 12);
        }
        for row in 0..4 {
            quarter(&mut state, row, 4 + (row + 1) % 4, 8 + (row + 2) % 4, 12 + (row + 3) % 4);
        }
    }
    for (word, first) in state.iter_mut().zip(start) {
        *word = word.wrapping_add(first);
    }
    state
}

fn quarter(s: &mut [u32; 16], a: usize, b: usize, c: usize, d: usize) {
    s[a] = s[a].wrapping_add(s[b]);
    s[d] = (s[d] ^ s[a]).rotate_left(16);
    s[c] = s[c].wrapping_add(s[d]);
    s[b] = (s[b] ^ s[c]).rotate_left(12);
    s[a] = s[a].wrapping_add(s[b]);
    s[d] = (s[d] ^ s[a]).rotate_left(8);
    s[c] = s[c].wrapping_add(s[d]);
    s[b] = (s[b] ^ s[c]).rotate_left(7);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of RFC 8439, section 2.3.2.
    #[test]
    fn the_block_function_is_chacha20() {
        let key = core::array::from_fn(|i| {
            let byte = 4 * i as u32;
            byte | (byte + 1) << 8 | (byte + 2) << 16 | (byte + 3) << 24
        });
        let block = chacha20_block(&key, [1, 0x0900_0000, 0x4a00_0000, 0]);
        assert_eq!(block[..4], [0xe4e7_f110, 0x1559_3bd1, 0x1fdd_0f50, 0xc471_20a3]);
        assert_eq!(block[12..], [0xd19c_12b5, 0xb94e_16de, 0xe883_d0cb, 0x4e3c_50a2]);
    }

    #[test]
    fn equal_states_agree_until_one_is_reseeded() {
        let mut rng = Rng::new();
        rng.absorb(&[7; 40]);
        let mut clone = Rng { key: rng.key };
        assert_eq!(rng.bytes(), clone.bytes());
        assert_ne!(rng.bytes(), rng.bytes());
        clone.bytes();
        clone.bytes();
        clone.absorb(&[0; 16]);
        assert_ne!(rng.bytes(), clone.bytes(), "even zeros change the state");
    }
}
