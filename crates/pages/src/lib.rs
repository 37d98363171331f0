//! Pages, fingerprints and patches: the pure logic of memory deduplication.
//!
//! * [`Fingerprinter`] samples a page into a [`Fingerprint`]; the overlap of two fingerprints
//!   estimates how alike two pages are, which is how a base page is found.
//! * [`Encoder`] turns a page, given its base page if one was found, into the smallest patch worth
//!   its decoding time; [`Decoder`] turns the patch and the same base page into the page again.
//!
//! Nothing here touches the kernel, allocates per page in steady state, or trusts its input: a
//! patch is bytes from elsewhere, and each malformed one is a [`DecodeError`].
#![forbid(unsafe_code)]

mod bytes;
mod delta;
mod encoder;
mod fingerprint;
mod patch;
mod relocation;
mod word_runs;

pub use encoder::Encoder;
pub use fingerprint::{
    ChunkHash, Fingerprint, FingerprintConfig, Fingerprinter, InvalidFingerprint,
    InvalidFingerprintConfig, MAX_CARDINALITY,
};
pub use patch::{DecodeError, Decoder, Encoding, MAX_PATCH_SIZE, encoding, needs_base};

/// Bytes in a page, the unit of deduplication.
pub const PAGE_SIZE: usize = 4096;

/// The content of one page.
pub type Page = [u8; PAGE_SIZE];

/// Whether every byte of the page is zero.
#[must_use]
pub fn is_zero(page: &Page) -> bool {
    // The blocks keep the early exit (most pages differ from zero in their first bytes) and leave
    // the inside of a block to vector instructions.
    page.chunks_exact(256).all(|block| block.iter().fold(0, |any, byte| any | byte) == 0)
}

/// A hash of the page's content (XXH3, 128 bits), for finding equal pages.
///
/// It is not cryptographic: whoever chooses the content can make two pages collide, so equality
/// has to be confirmed by comparing.
#[must_use]
pub fn content_hash(page: &Page) -> u128 {
    xxhash_rust::xxh3::xxh3_128(page)
}
