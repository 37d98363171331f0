//! Choice of the patch that a page is kept as.

use zstd::zstd_safe::{CCtx, CompressionLevel};

use crate::delta::DeltaEncoder;
use crate::patch::{MAX_PATCH_SIZE, ZSTD_MAGIC, is_raw_content};
use crate::relocation::Relocation;
use crate::{Encoding, PAGE_SIZE, Page, is_zero, word_runs};

/// Levels below zero leave literals as they are, which is faster both ways: encoding the pages of real
/// sandboxes takes three quarters of the time that the first level above zero takes.
const LEVEL: CompressionLevel = -1;

/// A patch of this size can't be improved enough to be worth the time of another try.
const SMALL: usize = 96;

/// Compression without the base is tried only if the best patch with it costs more: a base that is
/// any good beats it.
const POOR: usize = 1024;

/// A patch like another may be larger than that by one part in so many: a page that is looked at
/// again and again without trying everything may not grow for ever.
const GROWTH: usize = 16;

/// Bytes that an encoding has to save over word runs for its decoding time, at `price` bytes a
/// microsecond. The times are measured in restores, which find nothing in the cache.
fn handicap(encoding: Encoding, price: usize, len: usize) -> usize {
    let nanoseconds = match encoding {
        Encoding::Zero | Encoding::Equal | Encoding::WordRuns | Encoding::Raw => return 0,
        Encoding::Delta => 500 + 2 * len,
        // Hardly smaller than without the base page means that the base page is of no use.
        Encoding::DictCompressed => 3000 + len,
        Encoding::Compressed => 2400 + len,
    };
    nanoseconds * price / 1000
}

/// Turns pages into patches. Owns what encoding needs, so that nothing is allocated per page; use
/// one per thread.
pub struct Encoder {
    zstd: CCtx<'static>,
    delta: DeltaEncoder,
    relocated: Box<Page>,
    /// The patch being tried.
    trial: Vec<u8>,
    /// The best patch yet.
    best: Vec<u8>,
    /// A zstd frame, which has room to be larger than the page.
    frame: Box<[u8; 2 * PAGE_SIZE]>,
    /// Bytes that a microsecond of decoding has to save.
    price: usize,
}

impl Encoder {
    /// An encoder that takes slower decoding if it saves 256 bytes a microsecond: with 32, 128 and
    /// 400 patches of real sandboxes decode at 2.3, 2.8 and 3.5 GB/s. With 256 ten dedup sandboxes
    /// take 6 % more memory than with 32.
    #[must_use]
    pub fn new() -> Self {
        Self::with_price(256)
    }

    /// An encoder that takes slower decoding if it saves this many bytes a microsecond: 0 for the
    /// smallest patches, more for a faster restore.
    #[must_use]
    pub fn with_price(bytes_per_microsecond: u16) -> Self {
        Self {
            price: bytes_per_microsecond.into(),
            zstd: CCtx::create(),
            delta: DeltaEncoder::new(),
            relocated: Box::new([0; PAGE_SIZE]),
            trial: Vec::with_capacity(2 * PAGE_SIZE),
            best: Vec::with_capacity(2 * PAGE_SIZE),
            frame: Box::new([0; 2 * PAGE_SIZE]),
        }
    }

    /// Appends to `out` the patch that turns `base` into `page`, at most [`MAX_PATCH_SIZE`] bytes,
    /// and tells how it is encoded.
    ///
    /// It is the smallest one found, but for what cheap decoding is worth. The expensive encodings
    /// are tried only if the cheap ones leave enough to gain.
    pub fn encode(&mut self, page: &Page, base: Option<&Page>, out: &mut Vec<u8>) -> Encoding {
        if is_zero(page) {
            out.push(Encoding::Zero.header(false));
            return Encoding::Zero;
        }
        let mut best = Best { encoding: Encoding::Raw, cost: MAX_PATCH_SIZE };
        if let Some(base) = base {
            if page == base {
                out.push(Encoding::Equal.header(false));
                return Encoding::Equal;
            }
            self.encode_with_base(page, base, &mut best);
        }
        if best.cost > POOR && self.try_alone(page) {
            self.consider(Encoding::Compressed, &mut best);
        }
        if best.encoding == Encoding::Raw {
            out.push(Encoding::Raw.header(false));
            out.extend_from_slice(page);
        } else {
            out.extend_from_slice(&self.best);
        }
        best.encoding
    }

    /// Appends to `out` a patch for a page that was kept as the patch `model` before, against the
    /// same `base`, and has changed a little since: encoded like that, if that is still about as
    /// small. Takes a fraction of the time of [`Encoder::encode`], which has to try everything.
    /// Returns whether there is such a patch.
    pub fn encode_like(
        &mut self,
        model: &[u8],
        page: &Page,
        base: Option<&Page>,
        out: &mut Vec<u8>,
    ) -> bool {
        let Ok(encoding) = crate::encoding(model) else { return false };
        let most = (model.len() + model.len() / GROWTH).max(SMALL);
        let encoded = match (encoding, base) {
            (Encoding::WordRuns | Encoding::Delta | Encoding::DictCompressed, Some(base)) => {
                let relocation = self.relocate(base, page);
                self.try_with_base(encoding, page, base, &relocation, most)
            }
            (Encoding::Compressed, _) => self.try_alone(page),
            _ => false,
        };
        let is_like = encoded && self.trial.len() <= most;
        if is_like {
            out.extend_from_slice(&self.trial);
        }
        is_like
    }

    fn encode_with_base(&mut self, page: &Page, base: &Page, best: &mut Best) {
        let relocation = self.relocate(base, page);
        for encoding in [Encoding::WordRuns, Encoding::Delta, Encoding::DictCompressed] {
            if best.cost <= SMALL + handicap(encoding, self.price, SMALL) {
                return;
            }
            if self.try_with_base(encoding, page, base, &relocation, best.cost) {
                self.consider(encoding, best);
            }
        }
    }

    /// How `base` would have to be relocated to be like `page`; it is, in `self.relocated`.
    fn relocate(&mut self, base: &Page, page: &Page) -> Relocation {
        let relocation = Relocation::between(base, page);
        if !relocation.is_identity() {
            relocation.apply(base, &mut self.relocated);
        }
        relocation
    }

    /// Makes the trial a patch of this encoding, if there is one of at most about `most` bytes.
    fn try_with_base(
        &mut self,
        encoding: Encoding,
        page: &Page,
        base: &Page,
        relocation: &Relocation,
        most: usize,
    ) -> bool {
        let relocated = !relocation.is_identity();
        let base = if relocated { &*self.relocated } else { base };
        self.trial.clear();
        self.trial.push(encoding.header(relocated));
        if relocated {
            relocation.write(&mut self.trial);
        }
        let Some(limit) = most.checked_sub(self.trial.len()) else { return false };
        match encoding {
            Encoding::WordRuns => word_runs::encode(page, base, limit, &mut self.trial).is_some(),
            Encoding::Delta => self.delta.encode(page, base, limit, &mut self.trial).is_some(),
            _ if !is_raw_content(base) => false,
            _ => {
                let compressed =
                    self.zstd.compress_using_dict(&mut self.frame[..], page, base, LEVEL);
                self.push_frame(compressed)
            }
        }
    }

    /// Makes the trial a patch that needs no base page.
    fn try_alone(&mut self, page: &Page) -> bool {
        self.trial.clear();
        self.trial.push(Encoding::Compressed.header(false));
        let compressed = self.zstd.compress(&mut self.frame[..], page, LEVEL);
        self.push_frame(compressed)
    }

    /// Appends the frame that zstd has written to the trial, unless it failed.
    fn push_frame(&mut self, compressed: zstd::zstd_safe::SafeResult) -> bool {
        let frame = compressed.ok().and_then(|len| self.frame.get(..len));
        match frame.and_then(|frame| frame.strip_prefix(&ZSTD_MAGIC)) {
            Some(frame) => {
                self.trial.extend_from_slice(frame);
                true
            }
            None => false,
        }
    }

    /// Makes the trial the best patch unless it is worse. Of equals the later one wins: the one that
    /// needs no base page comes last.
    fn consider(&mut self, encoding: Encoding, best: &mut Best) {
        let cost = self.trial.len() + handicap(encoding, self.price, self.trial.len());
        if cost <= best.cost {
            *best = Best { encoding, cost };
            std::mem::swap(&mut self.best, &mut self.trial);
        }
    }
}

/// The best patch found yet.
struct Best {
    encoding: Encoding,
    /// Its size and [`handicap`].
    cost: usize,
}

impl Default for Encoder {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoder").finish_non_exhaustive()
    }
}
