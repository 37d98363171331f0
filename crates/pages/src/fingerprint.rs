//! Page fingerprints: a few sampled chunks that stand for the whole page.
//!
//! A window of `chunk_size` bytes is rolled over the page, one byte at a time. The windows whose
//! last two bytes match a fixed pattern are the page's samples, and the `cardinality` samples with
//! the smallest hashes are its fingerprint (a bottom-k sketch). So
//!
//! * a window is chosen by its content alone, wherever it lies: content that has moved inside the
//!   page gives the same samples, and the page's start has no advantage over its end;
//! * if a chunk lies in two pages and is among the smallest of one, it tends to be among the
//!   smallest of the other, so the overlap of two fingerprints estimates the overlap of the pages.
//!
//! Two departures from the paper's plain sampling earn their cost on the memory of real processes:
//!
//! **Pointers are reduced to their offset in a page** before anything is sampled. Address space
//! randomisation moves a mapping by whole pages, so the low 12 bits of a pointer are what two
//! instances of a program share. Python objects hold a pointer every 16 bytes or so; without
//! this hardly any 64-byte window survives randomisation (a base page was found for 45 % of the
//! pages of five Python and Node programs, with it for 77 %). The encoder finds the distance again
//! (see `relocation`).
//!
//! **The pattern has two strengths.** The strong one matches 1 in 64 random windows, and 18 (median)
//! of a page of a process: enough to choose from, few enough to hash. A page too uniform for it
//! (12 %) is sampled again, 1 in 16, and those samples rank behind all strong ones, so that both of
//! two similar pages prefer the same windows. Weaker patterns find base pages no better and take
//! longer. Neither matches a pair of zero bytes: the zeros that fill much of real memory are no
//! samples.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{PAGE_SIZE, Page};

/// The largest number of chunks in a fingerprint.
pub const MAX_CARDINALITY: usize = 20;

/// Hash of one sampled chunk. The ones in a fingerprint are the smallest of many, so their high
/// bits carry less information than their low ones.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct ChunkHash(pub u64);

impl fmt::Debug for ChunkHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// How pages are sampled. Fingerprints can be compared only if they were made with equal settings.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "UncheckedConfig", into = "UncheckedConfig")]
pub struct FingerprintConfig {
    /// Chunks in a fingerprint: 5, 10 or 20. More find better base pages and cost more lookups.
    pub cardinality: u8,
    /// Bytes in a chunk: 32, 64 or 128. Smaller ones collide, larger ones find less.
    pub chunk_size: u16,
}

/// The form of [`FingerprintConfig`] that is read from a file before it has been checked.
#[derive(Serialize, Deserialize)]
#[serde(rename = "FingerprintConfig")]
struct UncheckedConfig {
    cardinality: u8,
    chunk_size: u16,
}

/// The settings of a fingerprint are outside what is supported.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum InvalidFingerprintConfig {
    /// The cardinality is none of 5, 10 and 20.
    #[error("fingerprint cardinality {0} is not supported: use 5, 10 or 20")]
    Cardinality(u8),
    /// The chunk size is none of 32, 64 and 128.
    #[error("fingerprint chunk size {0} is not supported: use 32, 64 or 128")]
    ChunkSize(u16),
}

impl FingerprintConfig {
    /// Settings with the given cardinality (5, 10 or 20) and chunk size (32, 64 or 128 bytes).
    ///
    /// # Errors
    /// If either is another value.
    pub const fn new(cardinality: u8, chunk_size: u16) -> Result<Self, InvalidFingerprintConfig> {
        match (cardinality, chunk_size) {
            (5 | 10 | 20, 32 | 64 | 128) => Ok(Self { cardinality, chunk_size }),
            (5 | 10 | 20, _) => Err(InvalidFingerprintConfig::ChunkSize(chunk_size)),
            _ => Err(InvalidFingerprintConfig::Cardinality(cardinality)),
        }
    }
}

impl Default for FingerprintConfig {
    /// The paper's choice: 5 chunks of 64 bytes.
    fn default() -> Self {
        Self { cardinality: 5, chunk_size: 64 }
    }
}

impl TryFrom<UncheckedConfig> for FingerprintConfig {
    type Error = InvalidFingerprintConfig;

    fn try_from(unchecked: UncheckedConfig) -> Result<Self, Self::Error> {
        Self::new(unchecked.cardinality, unchecked.chunk_size)
    }
}

impl From<FingerprintConfig> for UncheckedConfig {
    fn from(config: FingerprintConfig) -> Self {
        Self { cardinality: config.cardinality, chunk_size: config.chunk_size }
    }
}

/// A page's fingerprint: a set of up to [`MAX_CARDINALITY`] chunk hashes, without order or
/// position. Empty for a page that has nothing to sample, such as a zero page.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(try_from = "Vec<ChunkHash>", into = "Vec<ChunkHash>")]
pub struct Fingerprint {
    chunks: [ChunkHash; MAX_CARDINALITY],
    len: u8,
}

/// More chunks than a fingerprint can hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a fingerprint holds at most {MAX_CARDINALITY} distinct chunks")]
pub struct InvalidFingerprint;

impl Fingerprint {
    /// The chunks' hashes, distinct and ascending.
    #[must_use]
    pub fn chunks(&self) -> &[ChunkHash] {
        &self.chunks[..usize::from(self.len)]
    }

    /// Whether nothing was sampled, so that no base page can be found.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The number of chunks that both fingerprints hold.
    #[must_use]
    pub fn overlap(&self, other: &Self) -> u8 {
        let mut rest = other.chunks();
        let mut common = 0;
        for chunk in self.chunks() {
            let smaller = rest.iter().take_while(|other| *other < chunk).count();
            rest = &rest[smaller..];
            common += u8::from(rest.first() == Some(chunk));
        }
        common
    }

    /// The first chunks of `smallest`, which is ascending, distinct and filled up with `u64::MAX`.
    fn from_smallest<const K: usize>(smallest: &[u64; K]) -> Self {
        let mut chunks = [ChunkHash::default(); MAX_CARDINALITY];
        let mut len = 0;
        for (chunk, hash) in chunks.iter_mut().zip(smallest).take_while(|(_, h)| **h != u64::MAX) {
            *chunk = ChunkHash(*hash);
            len += 1;
        }
        Self { chunks, len }
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.chunks()).finish()
    }
}

impl TryFrom<&[ChunkHash]> for Fingerprint {
    type Error = InvalidFingerprint;

    /// A fingerprint of these chunks, in any order, repeated or not.
    fn try_from(hashes: &[ChunkHash]) -> Result<Self, Self::Error> {
        let mut fingerprint = Self::default();
        for hash in hashes {
            if let Err(at) = fingerprint.chunks().binary_search(hash) {
                let len = usize::from(fingerprint.len);
                if len == MAX_CARDINALITY {
                    return Err(InvalidFingerprint);
                }
                fingerprint.chunks.copy_within(at..len, at + 1);
                fingerprint.chunks[at] = *hash;
                fingerprint.len += 1;
            }
        }
        Ok(fingerprint)
    }
}

impl TryFrom<Vec<ChunkHash>> for Fingerprint {
    type Error = InvalidFingerprint;

    fn try_from(hashes: Vec<ChunkHash>) -> Result<Self, Self::Error> {
        Self::try_from(hashes.as_slice())
    }
}

impl From<Fingerprint> for Vec<ChunkHash> {
    fn from(fingerprint: Fingerprint) -> Self {
        fingerprint.chunks().to_vec()
    }
}

/// Makes the fingerprints of pages.
#[derive(Clone, Copy, Debug)]
pub struct Fingerprinter {
    config: FingerprintConfig,
    sample: fn(&Page) -> Fingerprint,
}

impl Fingerprinter {
    /// A fingerprinter with these settings.
    ///
    /// # Panics
    /// If the settings are none that [`FingerprintConfig::new`] would give.
    #[must_use]
    pub fn new(config: FingerprintConfig) -> Self {
        // Both numbers are constants of the compiled loop: it is what fingerprinting spends its
        // time in.
        let sample = match (config.cardinality, config.chunk_size) {
            (5, 32) => sample::<5, 32>,
            (5, 64) => sample::<5, 64>,
            (5, 128) => sample::<5, 128>,
            (10, 32) => sample::<10, 32>,
            (10, 64) => sample::<10, 64>,
            (10, 128) => sample::<10, 128>,
            (20, 32) => sample::<20, 32>,
            (20, 64) => sample::<20, 64>,
            (20, 128) => sample::<20, 128>,
            _ => panic!("unchecked settings: {config:?}"),
        };
        Self { config, sample }
    }

    /// The settings.
    #[must_use]
    pub fn config(&self) -> FingerprintConfig {
        self.config
    }

    /// The page's fingerprint.
    #[must_use]
    pub fn fingerprint(&self, page: &Page) -> Fingerprint {
        (self.sample)(page)
    }
}

impl Default for Fingerprinter {
    fn default() -> Self {
        Self::new(FingerprintConfig::default())
    }
}

/// Bytes in one stripe of a page; a page has eight, one for each bit of a byte.
const STRIPE: usize = PAGE_SIZE / 8;

/// Which pairs of adjacent bytes match: bit `s` of byte `i` stands for the pair that starts at
/// `s * STRIPE + i`. (Stripes make this a loop over whole vectors, with no moving of bits.)
type Matches = [u8; STRIPE];

/// The pattern: of `first + 2 * second`, the bits in the mask must have these values. Of the
/// values tried, this one leaves the fewest pages of real processes short of samples.
const PATTERN: u8 = 0b01_0010;
const STRONG: u8 = 0b11_1111;
const WEAK: u8 = 0b00_1111;

fn matches<const MASK: u8>(page: &Padded) -> Matches {
    let mut matches = [0; STRIPE];
    // All stripes side by side: eight pairs for each byte written.
    let from = |at: usize| &page[at..at + STRIPE];
    let pairs: [(&[u8], &[u8]); 8] =
        std::array::from_fn(|stripe| (from(stripe * STRIPE), from(stripe * STRIPE + 1)));
    for (i, out) in matches.iter_mut().enumerate() {
        for (stripe, (first, second)) in pairs.iter().enumerate() {
            let sum = first[i].wrapping_add(second[i]).wrapping_add(second[i]);
            *out |= if sum & MASK == PATTERN & MASK { 1 << stripe } else { 0 };
        }
    }
    matches
}

/// A page and some bytes behind it, so that its last byte can be taken for the first of a pair.
type Padded = [u8; PAGE_SIZE + 8];

/// The page with its pointers reduced to their offset in a page. A pointer is an aligned word
/// between 2^40 and 2^47: user addresses of programs and libraries, of thread stacks and of most
/// heaps, and hardly ever a number or text.
fn without_pointers(page: &Page) -> Padded {
    let mut out = [0; PAGE_SIZE + 8];
    for (out, word) in out.as_chunks_mut::<8>().0.iter_mut().zip(page.as_chunks::<8>().0) {
        let word = u64::from_le_bytes(*word);
        // Without a comparison, which baseline x86-64 vectors lack for 64 bits: `excess` has 17
        // bits and is 0 just for pointers (and up to 2^40 above them), so that taking 1 away sets
        // all higher bits, of which 35 are moved to where a pointer has its page number.
        let excess = word.wrapping_sub(1 << 40) >> 47;
        let page_number = (excess.wrapping_sub(1) >> 17) & !0xfff;
        *out = (word & !page_number).to_le_bytes();
    }
    out
}

/// Keeps the `K` smallest distinct hashes, ascending.
struct Smallest<const K: usize>([u64; K]);

impl<const K: usize> Smallest<K> {
    #[inline(always)]
    fn offer(&mut self, mut hash: u64) {
        if hash >= self.0[K - 1] {
            return;
        }
        for kept in &mut self.0 {
            let low = hash.min(*kept);
            let high = hash.max(*kept);
            *kept = low;
            hash = if low == high { u64::MAX } else { high };
        }
    }

    fn is_full(&self) -> bool {
        self.0[K - 1] != u64::MAX
    }
}

fn sample<const K: usize, const CHUNK: usize>(page: &Page) -> Fingerprint {
    // Asks for all cache lines at once: a tenth faster where the page is not in the cache.
    std::hint::black_box(page.iter().step_by(64).fold(0, |any, byte| any | byte));
    let page = &without_pointers(page);
    let mut smallest = Smallest([u64::MAX; K]);
    let strong = matches::<STRONG>(page);
    offer::<K, CHUNK>(page, &strong, 0, &mut smallest);
    if !smallest.is_full() {
        let mut weak = matches::<WEAK>(page);
        for (weak, strong) in weak.iter_mut().zip(&strong) {
            *weak &= !strong;
        }
        offer::<K, CHUNK>(page, &weak, 1 << 63, &mut smallest);
    }
    Fingerprint::from_smallest(&smallest.0)
}

/// Offers the windows that end with the matching pairs; `rank` goes in the hash's highest bit.
#[inline(always)]
fn offer<const K: usize, const CHUNK: usize>(
    page: &Padded,
    matches: &Matches,
    rank: u64,
    smallest: &mut Smallest<K>,
) {
    // Most words have no match, in no order that a branch predictor could learn: collect the
    // others first.
    let mut hits = [(0u64, 0u16); STRIPE / 8];
    let mut len = 0;
    for (index, word) in matches.as_chunks::<8>().0.iter().enumerate() {
        let word = u64::from_le_bytes(*word);
        hits[len] = (word, index as u16 * 8);
        len += usize::from(word != 0);
    }
    for &(mut word, first) in &hits[..len] {
        while word != 0 {
            let bit = word.trailing_zeros() as usize;
            word &= word - 1;
            let pair = usize::from(first) + bit / 8 + bit % 8 * STRIPE;
            // Too close to the start for a whole window, or half of the pair behind the end.
            let Some(start) = (pair + 2).checked_sub(CHUNK) else { continue };
            let window = page[..PAGE_SIZE].get(start..).and_then(<[u8]>::first_chunk);
            let Some(window) = window else { continue };
            smallest.offer(chunk_hash::<CHUNK>(window) >> 1 | rank);
        }
    }
}

/// A hash of a chunk: XXH3's inner step, 128-bit products of pairs of words, with the length fixed
/// so that it compiles to a few multiplications in line. Collisions only cost time.
#[inline(always)]
fn chunk_hash<const CHUNK: usize>(chunk: &[u8; CHUNK]) -> u64 {
    const KEYS: [u64; 16] = [
        0xbe4b_a423_396c_feb8,
        0x1cad_2172_1cad_2172,
        0xdb97_9083_e90d_cef3,
        0x1f67_b3b7_a4a4_4072,
        0x78e5_c0cc_4ee6_79cb,
        0x2172_ffcc_7dd0_5a82,
        0x8e24_43f7_7446_08b8,
        0x4c26_3a81_e690_35e0,
        0xcb00_c391_bb52_283c,
        0xa32e_531b_8b65_d088,
        0x4ef9_0da2_9748_6471,
        0xd8ac_dea9_46ef_1938,
        0x3f34_9ce3_3f76_faa8,
        0x1d4f_0bc7_c7bb_dcf9,
        0x3159_b4cd_4be0_518a,
        0x6473_78d9_c97e_9fc8,
    ];
    let mut sum = CHUNK as u64;
    for (pair, keys) in chunk.as_chunks::<16>().0.iter().zip(KEYS.as_chunks::<2>().0) {
        let pair = u128::from_le_bytes(*pair);
        sum = sum.wrapping_add(fold(pair as u64 ^ keys[0], (pair >> 64) as u64 ^ keys[1]));
    }
    fold(sum ^ 0x9e37_79b9_7f4a_7c15, 0xd6e8_feb8_6659_fd93)
}

#[inline(always)]
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    product as u64 ^ (product >> 64) as u64
}
