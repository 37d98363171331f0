//! General differences: copies from any offset of the base page, or from the part of the page that
//! is already there, and literal bytes between them.
//!
//! The patch is a sequence of steps until the page is full. A step is literals and a copy:
//!
//! 1. a token byte: the number of literals in bits 7-5, whether the copy has a position in bit 4,
//!    and the copy's length in bits 3-0;
//! 2. if the number of literals is 7: a number that is added to it;
//! 3. the literals. If the page is full now, the step ends here, and its copy is left out;
//! 4. if the copy has a position: two bytes (little-endian). Bits 14-12 belong in front of the
//!    token's bits of the length. Bits 11-0 are an offset in the base page, or, if bit 15 is set,
//!    how many bytes back in the page itself, less 1. Such a copy may reach into what it copies,
//!    which then repeats. A copy without a position is from the base page, as far from the place
//!    copied to as the last one from there was (at first: from the same offset);
//! 5. if all bits of the length are set: a number that is added to it.
//!
//! The length is that of the copy less [`MIN_COPY`].

use crate::bytes::{Reader, push_number};
use crate::{DecodeError, PAGE_SIZE, Page};

const MIN_COPY: usize = 3;
/// A number of literals that needs a number of its own.
const MANY_LITERALS: usize = 7;
/// A length without a position that needs a number of its own.
const LONG: usize = 15;
/// The same with a position, whose bytes have room for more bits of the length.
const LONG_POSITIONED: usize = 127;

const POSITIONED: usize = 1 << 4;
const OWN: usize = 1 << 15;

/// Where a copy comes from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    /// The base page, with the shift of the last copy from there.
    SameShift,
    /// The base page, at this offset.
    Base(usize),
    /// The page itself, so many bytes back.
    Own(usize),
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
            let mut best = (same, Source::SameShift);
            if same < 16 && at + 8 <= PAGE_SIZE {
                let slot = hash(page, at);
                let found = usize::from(self.positions[slot]);
                self.positions[slot] = (PAGE_SIZE + at + 1) as u16;
                let (len, source) = match found.checked_sub(1) {
                    None => (0, Source::SameShift),
                    Some(from) if from < PAGE_SIZE => {
                        (common(base, from, page, at), Source::Base(from))
                    }
                    Some(from) => {
                        let from = from - PAGE_SIZE;
                        (common(page, from, page, at), Source::Own(at - from))
                    }
                };
                if len >= HASHED && len > same + 2 {
                    best = (len, source);
                }
            }
            let (len, source) = best;
            if len < MIN_COPY {
                at += 1;
                continue;
            }
            push_step(out, &page[literals..at], source, len);
            if out.len() > limit {
                return None;
            }
            if let Source::Base(position) = source {
                shift = position.cast_signed() - at.cast_signed();
            }
            at += len;
            literals = at;
        }
        if literals < PAGE_SIZE {
            push_literals(out, &page[literals..], 0);
        }
        (out.len() <= limit).then_some(())
    }
}

fn push_literals(out: &mut Vec<u8>, literals: &[u8], token: usize) {
    let count = literals.len();
    out.push((count.min(MANY_LITERALS) << 5 | token) as u8);
    if count >= MANY_LITERALS {
        push_number(out, (count - MANY_LITERALS) as u64);
    }
    out.extend_from_slice(literals);
}

fn push_step(out: &mut Vec<u8>, literals: &[u8], source: Source, len: usize) {
    let len = len - MIN_COPY;
    let position = match source {
        Source::SameShift => None,
        Source::Base(offset) => Some(offset),
        Source::Own(back) => Some(OWN | (back - 1)),
    };
    let long = if let Some(position) = position {
        let field = len.min(LONG_POSITIONED);
        push_literals(out, literals, POSITIONED | field & 15);
        out.extend_from_slice(&((position | field >> 4 << 12) as u16).to_le_bytes());
        LONG_POSITIONED
    } else {
        push_literals(out, literals, len.min(LONG));
        LONG
    };
    if len >= long {
        push_number(out, (len - long) as u64);
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

/// Copies of fixed size are one instruction, where those of any size are a call. What they write
/// too much is written again by what follows.
const WIDE: usize = 16;

/// Applies the steps to `base`, giving `out`.
pub(crate) fn decode(
    mut patch: Reader<'_>,
    base: &Page,
    out: &mut Page,
) -> Result<(), DecodeError> {
    // Most of the page mostly is the base's at the same offset: copied at once, it only has to be
    // skipped.
    out.copy_from_slice(base);
    let mut at = 0;
    let mut shift = 0isize;
    while at < PAGE_SIZE {
        let token = usize::from(patch.byte()?);
        at += put_literals(&mut patch, token >> 5, out, at)?;
        if at == PAGE_SIZE {
            break;
        }
        if token & POSITIONED == 0 {
            let len = extended(&mut patch, token & 15, LONG)? + MIN_COPY;
            if shift == 0 {
                restore(base, out, at);
            } else {
                let from = at.checked_add_signed(shift).ok_or(DecodeError::Overflow)?;
                copy(base, from, out, at, len)?;
            }
            at += len;
        } else {
            let position = usize::from(u16::from_le_bytes(patch.array()?));
            let field = token & 15 | (position >> 12 & 7) << 4;
            let len = extended(&mut patch, field, LONG_POSITIONED)? + MIN_COPY;
            let offset = position & (PAGE_SIZE - 1);
            if position & OWN == 0 {
                copy(base, offset, out, at, len)?;
                shift = offset.cast_signed() - at.cast_signed();
            } else {
                repeat(out, offset + 1, at, len)?;
            }
            at += len;
        }
    }
    if at > PAGE_SIZE {
        Err(DecodeError::Overflow)
    } else if patch.is_empty() {
        Ok(())
    } else {
        Err(DecodeError::Trailing)
    }
}

/// A field of a token, and the number that follows if it has its largest value.
#[inline]
fn extended(patch: &mut Reader<'_>, field: usize, largest: usize) -> Result<usize, DecodeError> {
    if field < largest {
        return Ok(field);
    }
    let more = patch.number()?;
    if more > PAGE_SIZE as u64 { Err(DecodeError::Overflow) } else { Ok(field + more as usize) }
}

/// Writes the literals of a step, and tells how many there are.
#[inline]
fn put_literals(
    patch: &mut Reader<'_>,
    count: usize,
    out: &mut Page,
    at: usize,
) -> Result<usize, DecodeError> {
    if count < MANY_LITERALS
        && let Some(from) = patch.rest().first_chunk::<8>()
        && let Some(to) = out[at..].first_chunk_mut::<8>()
    {
        *to = *from;
        patch.slice(count)?;
        return Ok(count);
    }
    let count = extended(patch, count, MANY_LITERALS)?;
    let to = out.get_mut(at..at + count).ok_or(DecodeError::Overflow)?;
    to.copy_from_slice(patch.slice(count)?);
    Ok(count)
}

/// Puts the base's bytes back where a copy may have written too much.
#[inline]
fn restore(base: &Page, out: &mut Page, at: usize) {
    match (out[at..].first_chunk_mut::<WIDE>(), base[at..].first_chunk()) {
        (Some(to), Some(from)) => *to = *from,
        _ => out[at..].copy_from_slice(&base[at..]),
    }
}

#[inline]
fn copy(
    base: &Page,
    from: usize,
    out: &mut Page,
    at: usize,
    len: usize,
) -> Result<(), DecodeError> {
    if len <= WIDE
        && let Some(source) = base.get(from..).and_then(|source| source.first_chunk::<WIDE>())
        && let Some(to) = out[at..].first_chunk_mut()
    {
        *to = *source;
        return Ok(());
    }
    let source = base.get(from..from + len).ok_or(DecodeError::Overflow)?;
    let to = out.get_mut(at..at + len).ok_or(DecodeError::Overflow)?;
    to.copy_from_slice(source);
    Ok(())
}

#[inline]
fn repeat(out: &mut Page, back: usize, at: usize, len: usize) -> Result<(), DecodeError> {
    let from = at.checked_sub(back).ok_or(DecodeError::Overflow)?;
    if len <= WIDE && back >= WIDE && at + WIDE <= PAGE_SIZE {
        out.copy_within(from..from + WIDE, at);
        return Ok(());
    }
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
