//! The format of patches, and their decoder.
//!
//! A patch is one header byte and a body.
//!
//! | bits of the header | meaning |
//! | --- | --- |
//! | 7-4 | version of the format: 1 |
//! | 3 | the base page is relocated first; the body begins with the table (see `relocation`) |
//! | 2-0 | the encoding, by its number in [`Encoding`] |
//!
//! | encoding | body |
//! | --- | --- |
//! | `Zero`, `Equal` | none |
//! | `WordRuns` | see `word_runs` |
//! | `Delta` | see `delta` |
//! | `DictCompressed` | a zstd frame (RFC 8878) without its magic number, with the base page as dictionary of raw content |
//! | `Compressed` | the same without a dictionary |
//! | `Raw` | the page |

use zstd::zstd_safe::{self, DCtx};

use crate::bytes::Reader;
use crate::relocation::Relocation;
use crate::{PAGE_SIZE, Page, delta, word_runs};

/// Bytes in the largest patch: a whole page and its header.
pub const MAX_PATCH_SIZE: usize = 1 + PAGE_SIZE;

/// The first four bytes of every zstd frame, which patches leave out.
pub(crate) const ZSTD_MAGIC: [u8; 4] = 0xfd2f_b528_u32.to_le_bytes();

/// Whether zstd takes the page for a dictionary of raw content, and not for one with tables, which
/// it would parse. No patch uses a page that it doesn't.
pub(crate) fn is_raw_content(base: &Page) -> bool {
    !base.starts_with(&0xec30_a437_u32.to_le_bytes())
}

const VERSION: u8 = 1;
const RELOCATED: u8 = 1 << 3;

/// How a patch holds its page.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum Encoding {
    /// The page is all zeros.
    Zero = 0,
    /// The page equals its base page.
    Equal = 1,
    /// 8-byte words that replace those of the base page at the same offsets.
    WordRuns = 2,
    /// Copies from any offset of the base page, and literal bytes.
    Delta = 3,
    /// Compressed with the base page as dictionary.
    DictCompressed = 4,
    /// Compressed by itself.
    Compressed = 5,
    /// The page as it is.
    Raw = 6,
}

impl Encoding {
    /// Every encoding, in the order of their numbers in a patch.
    pub const ALL: [Self; 7] = [
        Self::Zero,
        Self::Equal,
        Self::WordRuns,
        Self::Delta,
        Self::DictCompressed,
        Self::Compressed,
        Self::Raw,
    ];

    /// Whether decoding takes the base page that the patch was made against.
    #[must_use]
    pub fn needs_base(self) -> bool {
        match self {
            Self::Equal | Self::WordRuns | Self::Delta | Self::DictCompressed => true,
            Self::Zero | Self::Compressed | Self::Raw => false,
        }
    }

    /// Whether the base page may be relocated. `Equal` has none, so that it always means the base
    /// page itself, which can be shared.
    fn may_relocate(self) -> bool {
        self.needs_base() && self != Self::Equal
    }

    /// The header of a patch.
    pub(crate) fn header(self, relocated: bool) -> u8 {
        debug_assert!(!relocated || self.may_relocate());
        VERSION << 4 | self as u8 | if relocated { RELOCATED } else { 0 }
    }
}

/// Why a patch can't be decoded. None of these happens with the bytes that an
/// [`Encoder`](crate::Encoder) made and the base page it was given.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DecodeError {
    /// The patch ends early.
    #[error("the patch is truncated")]
    Truncated,
    /// Bytes follow the end of the patch.
    #[error("the patch has bytes behind its end")]
    Trailing,
    /// The patch is larger than any patch has to be.
    #[error("the patch has {0} bytes, more than the {MAX_PATCH_SIZE} that any page takes")]
    TooLarge(usize),
    /// Another version of the format.
    #[error("the patch has format version {0}, but only version {VERSION} is known")]
    Version(u8),
    /// No such encoding, or not with a relocated base.
    #[error("the patch has the unknown header {0:#04x}")]
    Header(u8),
    /// The patch was made against a base page, and none was given.
    #[error("the patch needs its base page")]
    BaseMissing,
    /// A number takes more bytes than any number in a patch.
    #[error("the patch has a number that is too long")]
    Number,
    /// The relocation table is malformed.
    #[error("the patch has a malformed relocation table")]
    Relocation,
    /// A copy reaches outside a page.
    #[error("the patch reaches outside the page")]
    Overflow,
    /// The compressed data are malformed, or were compressed against another base page.
    #[error("the compressed data of the patch are corrupt, or belong to another base page")]
    Compression,
    /// The patch gives fewer bytes than a page.
    #[error("the patch gives {0} bytes, not a whole page")]
    ShortPage(usize),
}

/// Reads the header.
fn header(patch: &mut Reader<'_>) -> Result<(Encoding, bool), DecodeError> {
    let header = patch.byte()?;
    if header >> 4 != VERSION {
        return Err(DecodeError::Version(header >> 4));
    }
    let encoding =
        *Encoding::ALL.get(usize::from(header & 0b111)).ok_or(DecodeError::Header(header))?;
    let relocated = header & RELOCATED != 0;
    if relocated && !encoding.may_relocate() {
        return Err(DecodeError::Header(header));
    }
    Ok((encoding, relocated))
}

/// The encoding of a patch, by its header.
///
/// # Errors
/// If the header is none of a patch. The rest of the patch is not looked at.
pub fn encoding(patch: &[u8]) -> Result<Encoding, DecodeError> {
    header(&mut Reader::new(patch)).map(|(encoding, _)| encoding)
}

/// Whether decoding a patch takes the base page that it was made against.
///
/// # Errors
/// If the header is none of a patch. The rest of the patch is not looked at.
pub fn needs_base(patch: &[u8]) -> Result<bool, DecodeError> {
    encoding(patch).map(Encoding::needs_base)
}

/// Turns patches into pages again. Owns what decoding needs, so that nothing is allocated per
/// page; use one per thread.
///
/// Any bytes may be given as a patch. Time and memory are bounded by the page size.
pub struct Decoder {
    zstd: DCtx<'static>,
    buffers: Box<Buffers>,
}

struct Buffers {
    relocated: Page,
    /// A whole zstd frame, beginning with its magic number.
    frame: [u8; ZSTD_MAGIC.len() + PAGE_SIZE],
}

impl Decoder {
    /// A decoder.
    #[must_use]
    pub fn new() -> Self {
        let mut frame = [0; ZSTD_MAGIC.len() + PAGE_SIZE];
        frame[..ZSTD_MAGIC.len()].copy_from_slice(&ZSTD_MAGIC);
        let buffers = Box::new(Buffers { relocated: [0; PAGE_SIZE], frame });
        Self { zstd: DCtx::create(), buffers }
    }

    /// Decodes `patch` to `out`, given the base page that it was made against, if there was one.
    /// Patches that need no base ignore it. (Another base page than the right one gives an error
    /// or a wrong page.)
    ///
    /// # Errors
    /// If the patch is malformed or needs a base page that is not given. What `out` holds then is
    /// unspecified.
    pub fn decode(
        &mut self,
        patch: &[u8],
        base: Option<&Page>,
        out: &mut Page,
    ) -> Result<(), DecodeError> {
        if patch.len() > MAX_PATCH_SIZE {
            return Err(DecodeError::TooLarge(patch.len()));
        }
        let mut body = Reader::new(patch);
        let (encoding, relocated) = header(&mut body)?;
        if !encoding.needs_base() {
            return self.decode_alone(encoding, body, out);
        }
        let base = base.ok_or(DecodeError::BaseMissing)?;
        let relocation = if relocated { Some(Relocation::read(&mut body)?) } else { None };
        // Word runs are applied to a copy of the base, so that is where it has to be relocated to.
        match (encoding, &relocation) {
            (Encoding::WordRuns, Some(relocation)) => relocation.apply(base, out),
            (Encoding::WordRuns | Encoding::Equal, _) => out.copy_from_slice(base),
            _ => {}
        }
        let base = match &relocation {
            Some(relocation) if encoding != Encoding::WordRuns => {
                relocation.apply(base, &mut self.buffers.relocated);
                &self.buffers.relocated
            }
            _ => base,
        };
        match encoding {
            Encoding::WordRuns => word_runs::decode(body, out),
            Encoding::Delta => delta::decode(body, base, out),
            Encoding::DictCompressed if !is_raw_content(base) => Err(DecodeError::Compression),
            Encoding::DictCompressed => {
                let frame = frame(&mut self.buffers.frame, body)?;
                let written = self.zstd.decompress_using_dict(&mut out[..], frame, base);
                whole_page(written)
            }
            _ => end(body),
        }
    }

    fn decode_alone(
        &mut self,
        encoding: Encoding,
        mut body: Reader<'_>,
        out: &mut Page,
    ) -> Result<(), DecodeError> {
        match encoding {
            Encoding::Compressed => {
                let frame = frame(&mut self.buffers.frame, body)?;
                whole_page(self.zstd.decompress(&mut out[..], frame))
            }
            Encoding::Raw => {
                *out = body.array()?;
                end(body)
            }
            _ => {
                out.fill(0);
                end(body)
            }
        }
    }
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder").finish_non_exhaustive()
    }
}

fn end(body: Reader<'_>) -> Result<(), DecodeError> {
    if body.is_empty() { Ok(()) } else { Err(DecodeError::Trailing) }
}

/// The body of a compressed patch as a zstd frame, exactly one.
fn frame<'a>(
    buffer: &'a mut [u8; ZSTD_MAGIC.len() + PAGE_SIZE],
    body: Reader<'_>,
) -> Result<&'a [u8], DecodeError> {
    let body = body.rest();
    let len = ZSTD_MAGIC.len() + body.len();
    let frame = buffer.get_mut(..len).ok_or(DecodeError::Compression)?;
    frame[ZSTD_MAGIC.len()..].copy_from_slice(body);
    // Decompression itself would go on with any frames that follow.
    match zstd_safe::find_frame_compressed_size(frame) {
        Ok(size) if size == len => Ok(frame),
        Ok(_) => Err(DecodeError::Trailing),
        Err(_) => Err(DecodeError::Compression),
    }
}

fn whole_page(written: zstd_safe::SafeResult) -> Result<(), DecodeError> {
    match written {
        Ok(PAGE_SIZE) => Ok(()),
        Ok(written) => Err(DecodeError::ShortPage(written)),
        Err(_) => Err(DecodeError::Compression),
    }
}
