//! General differences: copies from any offset of the base page, or from the part of the page that
//! is already there, and literal bytes between them.
//!
//! The patch is a sequence of steps until the page is full. A step is a token byte, literals, and
//! a copy:
//!
//! | bits of the token | meaning |
//! | --- | --- |
//! | 7-5 | number of literals; 7: at least 7, a number follows that is added |
//! | 4-3 | where the copy comes from: see [`Source`] |
//! | 2-0 | bytes to copy, less [`MIN_COPY`]; 7: at least that, a number follows that is added |
//!
//! In this order: token, number of literals if it did not fit, literals, and, unless the page is
//! full by then, the source's position (two bytes) if the source needs one, number of bytes to
//! copy if it did not fit. A last step without a copy has zeros in its place in the token.

use crate::bytes::{Reader, push_number};
use crate::{DecodeError, PAGE_SIZE, Page};

const MIN_COPY: usize = 3;
/// What a field of three bits can't hold.
const EXTENDED: usize = 7;

/// Where a copy comes from, by its number in the token.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    /// The base page, as far from the place copied to as in the last copy from the base (at first:
    /// at the same offset).
    SameShift = 0,
    /// The base page, at the offset that follows.
    Base = 1,
    /// The page itself, as many bytes back as follows. May reach into what is being copied, which
    /// then repeats.
    Own = 2,
}

const HASH_BITS: u32 = 12;
/// Bytes that are hashed to find a copy; a shorter one hardly pays for its position.
const HASHED: usize = 5;

/// The buffers of an encoder, reused from page to page.
pub(crate) struct DeltaEncoder {
    /// By hash: one more than the last position that had it, in the base (below [`PAGE_SIZE`]) or,
    /// that much further, in the page itself. 0: none.
    positions: Box<[u16; 1 << HASH_BITS]>,
}

impl DeltaEncoder {
    pub(crate) fn new() -> Self {
        Self { positions: Box::new([0; 1 << HASH_BITS]) }
    }

    /// Appends the steps that turn `base` into `page`, or gives up (`None`, and `out` holds a part
    /// of them) when they would take more than `limit` bytes.
    pub(crate) fn encode(
        &mut self,
        page: &Page,
        base: &Page,
        limit: usize,
        out: &mut Vec<u8>,
    ) -> Option<()> {
        let limit = out.len() + limit;
        self.positions.fill(0);
        for at in (0..=PAGE_SIZE - 8).step_by(2) {
            self.positions[hash(base, at)] = at as u16 + 1;
        }
        let mut literals = 0;
        let mut at = 0;
        let mut shift = 0isize;
        while at < PAGE_SIZE {
            let same = at
                .checked_add_signed(shift)
                .filter(|from| *from < PAGE_SIZE)
                .map_or(0, |from| common(base, from, page, at));
            let mut best = (same, Source::SameShift, 0);
            if same < 16 && at + 8 <= PAGE_SIZE {
                let slot = hash(page, at);
                let found = usize::from(self.positions[slot]);
                self.positions[slot] = (PAGE_SIZE + at + 1) as u16;
                let (len, source, position) = match found.checked_sub(1) {
                    None => (0, Source::Base, 0),
                    Some(from) if from < PAGE_SIZE => {
                        (common(base, from, page, at), Source::Base, from)
                    }
                    Some(from) => {
                        let from = from - PAGE_SIZE;
                        (common(page, from, page, at), Source::Own, at - from)
                    }
                };
                if len >= HASHED && len > same + 2 {
                    best = (len, source, position);
                }
            }
            let (len, source, position) = best;
            if len < MIN_COPY {
                at += 1;
                continue;
            }
            push_step(out, &page[literals..at], Some((source, len)));
            push_copy(out, source, position, len);
            if out.len() > limit {
                return None;
            }
            if source == Source::Base {
                shift = position.cast_signed() - at.cast_signed();
            }
            at += len;
            literals = at;
        }
        if literals < PAGE_SIZE {
            push_step(out, &page[literals..], None);
        }
        (out.len() <= limit).then_some(())
    }
}

fn push_step(out: &mut Vec<u8>, literals: &[u8], copy: Option<(Source, usize)>) {
    let (source, len) = copy.map_or((0, 0), |(source, len)| (source as u8, len - MIN_COPY));
    let count = literals.len();
    out.push((count.min(EXTENDED) as u8) << 5 | source << 3 | len.min(EXTENDED) as u8);
    if count >= EXTENDED {
        push_number(out, (count - EXTENDED) as u64);
    }
    out.extend_from_slice(literals);
}

fn push_copy(out: &mut Vec<u8>, source: Source, position: usize, len: usize) {
    if source != Source::SameShift {
        out.extend_from_slice(&(position as u16).to_le_bytes());
    }
    if len - MIN_COPY >= EXTENDED {
        push_number(out, (len - MIN_COPY - EXTENDED) as u64);
    }
}

/// Hash of the bytes at `at`, which is at least 8 bytes from the end.
#[inline]
fn hash(page: &Page, at: usize) -> usize {
    let word = page[at..].first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
    let hashed = (word << (64 - 8 * HASHED)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (hashed >> (64 - HASH_BITS)) as usize
}

/// Number of equal bytes in `a` from `i` and `b` from `j`.
#[inline]
fn common(a: &Page, i: usize, b: &Page, j: usize) -> usize {
    let (a, b) = (&a[i..], &b[j..]);
    let mut len = 0;
    for (a, b) in a.as_chunks::<8>().0.iter().zip(b.as_chunks::<8>().0) {
        let differ = u64::from_le_bytes(*a) ^ u64::from_le_bytes(*b);
        if differ != 0 {
            return len + differ.trailing_zeros() as usize / 8;
        }
        len += 8;
    }
    len + a[len..].iter().zip(&b[len..]).take_while(|(a, b)| a == b).count()
}

/// Applies the steps to `base`, giving `out`.
pub(crate) fn decode(
    mut patch: Reader<'_>,
    base: &Page,
    out: &mut Page,
) -> Result<(), DecodeError> {
    let mut at = 0;
    let mut shift = 0isize;
    while at < PAGE_SIZE {
        let token = usize::from(patch.byte()?);
        let literals = token >> 5;
        // Most steps have a few literals: a copy of fixed size is one instruction, and what it
        // writes too much is written over by the next.
        match (out.get_mut(at..at + 8), patch.rest().first_chunk::<8>()) {
            (Some(to), Some(from)) if literals < EXTENDED => {
                to.copy_from_slice(from);
                patch.slice(literals)?;
                at += literals;
            }
            _ => {
                let literals = extended(&mut patch, literals)?;
                let to = out.get_mut(at..at + literals).ok_or(DecodeError::Overflow)?;
                to.copy_from_slice(patch.slice(literals)?);
                at += literals;
            }
        }
        if at == PAGE_SIZE {
            break;
        }
        match token >> 3 & 3 {
            0 => {
                let len = extended(&mut patch, token & 7)? + MIN_COPY;
                let from = at.checked_add_signed(shift).ok_or(DecodeError::Overflow)?;
                copy(base, from, out, at, len)?;
                at += len;
            }
            1 => {
                let from = usize::from(u16::from_le_bytes(patch.array()?));
                let len = extended(&mut patch, token & 7)? + MIN_COPY;
                copy(base, from, out, at, len)?;
                shift = from.cast_signed() - at.cast_signed();
                at += len;
            }
            2 => {
                let back = usize::from(u16::from_le_bytes(patch.array()?));
                let len = extended(&mut patch, token & 7)? + MIN_COPY;
                repeat(out, back, at, len)?;
                at += len;
            }
            _ => return Err(DecodeError::Source),
        }
    }
    if patch.is_empty() { Ok(()) } else { Err(DecodeError::Trailing) }
}

/// A field of a token and the number that follows if it did not fit, at most a page.
#[inline]
fn extended(patch: &mut Reader<'_>, field: usize) -> Result<usize, DecodeError> {
    if field < EXTENDED {
        return Ok(field);
    }
    let more = patch.number()?;
    if more > PAGE_SIZE as u64 { Err(DecodeError::Overflow) } else { Ok(EXTENDED + more as usize) }
}

#[inline]
fn copy(
    base: &Page,
    from: usize,
    out: &mut Page,
    at: usize,
    len: usize,
) -> Result<(), DecodeError> {
    if len <= 16
        && let Some(source) = base.get(from..from + 16)
        && let Some(to) = out.get_mut(at..at + 16)
    {
        to.copy_from_slice(source);
        return Ok(());
    }
    let source = base.get(from..from + len).ok_or(DecodeError::Overflow)?;
    let to = out.get_mut(at..at + len).ok_or(DecodeError::Overflow)?;
    to.copy_from_slice(source);
    Ok(())
}

#[inline]
fn repeat(out: &mut Page, back: usize, at: usize, len: usize) -> Result<(), DecodeError> {
    let from = at.checked_sub(back).filter(|_| back > 0).ok_or(DecodeError::Overflow)?;
    if at + len > PAGE_SIZE {
        return Err(DecodeError::Overflow);
    }
    // Each round doubles what there is to repeat.
    let mut done = 0;
    while done < len {
        let step = (back + done).min(len - done);
        out.copy_within(from..from + step, at + done);
        done += step;
    }
    Ok(())
}
