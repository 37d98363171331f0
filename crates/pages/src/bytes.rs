//! Reading and writing the numbers of a patch.

use crate::{DecodeError, PAGE_SIZE, Page};

/// Words in a page.
pub(crate) const WORDS: usize = PAGE_SIZE / 8;

/// The page as little-endian words.
pub(crate) fn words(page: &Page) -> &[[u8; 8]; WORDS] {
    page.as_chunks().0.try_into().expect("a page is a whole number of words")
}

/// The page as little-endian words that can be written.
pub(crate) fn words_mut(page: &mut Page) -> &mut [[u8; 8]; WORDS] {
    page.as_chunks_mut().0.try_into().expect("a page is a whole number of words")
}

/// The part of a patch that has not been read yet.
#[derive(Clone, Copy)]
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn is_empty(self) -> bool {
        self.0.is_empty()
    }

    /// All that is left.
    pub(crate) fn rest(self) -> &'a [u8] {
        self.0
    }

    #[inline]
    pub(crate) fn byte(&mut self) -> Result<u8, DecodeError> {
        let (first, rest) = self.0.split_first().ok_or(DecodeError::Truncated)?;
        self.0 = rest;
        Ok(*first)
    }

    #[inline]
    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (first, rest) = self.0.split_first_chunk().ok_or(DecodeError::Truncated)?;
        self.0 = rest;
        Ok(*first)
    }

    #[inline]
    pub(crate) fn slice(&mut self, len: usize) -> Result<&'a [u8], DecodeError> {
        let (first, rest) = self.0.split_at_checked(len).ok_or(DecodeError::Truncated)?;
        self.0 = rest;
        Ok(first)
    }

    /// A number in LEB128, at most 9 bytes (63 bits), which is more than any patch has need of.
    #[inline]
    pub(crate) fn number(&mut self) -> Result<u64, DecodeError> {
        let mut number = 0;
        for shift in (0..63).step_by(7) {
            let byte = self.byte()?;
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(number);
            }
        }
        Err(DecodeError::Number)
    }
}

/// Appends a number below 2^63 in LEB128.
pub(crate) fn push_number(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}
