//! How much of one memory is in another: the paper's redundancy study (section 2, figures 1a-1c).
//!
//! The reference's chunks of K bytes are indexed by hash, at multiples of K. Of the subject, K
//! bytes are sampled every 2K; a sample that the reference has is compared byte by byte, and the
//! match extended to both sides for as long as the bytes agree. What matches cover is redundant.
//!
//! Pages of zeros are left out on both sides and counted apart: they are in every memory, and any
//! memory manager finds them.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use serde::Serialize;
use xxhash_rust::xxh3::xxh3_64;

use crate::dump::Dump;

/// The chunk sizes of the study.
pub const CHUNK_SIZES: [usize; 7] = [64, 128, 256, 512, 1024, 2048, 4096];

/// The chunks of a memory, by hash.
pub struct Index<'a> {
    chunk: usize,
    segments: Vec<&'a [u8]>,
    /// Segment and offset of the first chunk with a hash.
    places: HashMap<u64, (u32, u32), BuildHasherDefault<Hashed>>,
}

/// How much of a memory is in another.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Redundancy {
    /// Bytes in pages that are not zero.
    pub bytes: u64,
    /// Of those, bytes that the other memory has too.
    pub redundant_bytes: u64,
}

impl Redundancy {
    /// The share that is redundant.
    #[must_use]
    pub fn share(self) -> f64 {
        crate::share(self.redundant_bytes as f64, self.bytes as f64)
    }
}

impl<'a> Index<'a> {
    /// Indexes the chunks of a memory.
    #[must_use]
    pub fn of(reference: &'a Dump, chunk: usize) -> Self {
        let segments: Vec<&[u8]> = reference.segments().collect();
        let mut places = HashMap::default();
        for (segment, number) in segments.iter().zip(0..) {
            for (content, n) in segment.chunks_exact(chunk).zip(0u32..) {
                let place = (number, n * chunk as u32);
                places.entry(xxh3_64(content)).or_insert(place);
            }
        }
        Self { chunk, segments, places }
    }

    /// How much of `subject` is in the indexed memory.
    #[must_use]
    pub fn redundancy(&self, subject: &Dump) -> Redundancy {
        let mut sum = Redundancy::default();
        for segment in subject.segments() {
            sum.bytes += segment.len() as u64;
            sum.redundant_bytes += self.covered(segment);
        }
        sum
    }

    /// How many bytes of a segment matches cover.
    fn covered(&self, segment: &[u8]) -> u64 {
        // Everything before `end` has been decided.
        let (mut covered, mut end) = (0, 0);
        for at in (0..segment.len()).step_by(2 * self.chunk) {
            let Some(sample) = segment.get(at..at + self.chunk) else { break };
            if at + self.chunk <= end {
                continue;
            }
            let Some(&(number, offset)) = self.places.get(&xxh3_64(sample)) else { continue };
            let reference = self.segments[number as usize];
            let (before, after) = reference.split_at(offset as usize);
            let right = common(segment[at..].iter(), after.iter());
            if right < self.chunk {
                continue;
            }
            let gap = &segment[end.min(at)..at];
            let left = common(gap.iter().rev(), before.iter().rev());
            let begin = (at - left).max(end);
            covered += (at + right - begin) as u64;
            end = at + right;
        }
        covered
    }
}

/// How many bytes two sequences agree in from their beginning.
fn common<'b>(a: impl Iterator<Item = &'b u8>, b: impl Iterator<Item = &'b u8>) -> usize {
    a.zip(b).take_while(|(a, b)| a == b).count()
}

/// Passes hashes through.
#[derive(Default)]
struct Hashed(u64);

impl Hasher for Hashed {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        self.0 = xxh3_64(bytes);
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use medes_pages::{PAGE_SIZE, Page};
    use proptest::prelude::*;

    /// Pages of bytes that occur nowhere else.
    fn unique(seeds: std::ops::Range<u64>) -> Vec<Page> {
        let page = |seed: u64| {
            let mut page = [0; PAGE_SIZE];
            for (word, n) in page.chunks_exact_mut(8).zip(seed * 512..) {
                word.copy_from_slice(&crate::registry::mix(n).to_le_bytes());
            }
            page
        };
        seeds.map(page).collect()
    }

    fn dump(pages: Vec<Page>) -> Dump {
        Dump::from_regions([(0x1000, pages)])
    }

    fn share(subject: &Dump, reference: &Dump, chunk: usize) -> f64 {
        Index::of(reference, chunk).redundancy(subject).share()
    }

    #[test]
    fn equal_memory_is_all_redundant_and_other_memory_is_not() {
        let (a, b) = (dump(unique(0..50)), dump(unique(50..100)));
        for chunk in CHUNK_SIZES {
            assert!((share(&a, &a, chunk) - 1.0).abs() < 1e-9, "{chunk}");
            assert!(share(&a, &b, chunk) < 1e-9, "{chunk}");
        }
    }

    #[test]
    fn half_of_it_is_half() {
        let a = dump(unique(0..64));
        let mut pages = unique(0..32);
        pages.extend(unique(100..132));
        assert!((share(&dump(pages), &a, 64) - 0.5).abs() < 0.001);
    }

    #[test]
    fn zero_pages_do_not_count() {
        let mut pages = unique(0..8);
        pages.insert(4, [0; PAGE_SIZE]);
        let reference = dump(pages);
        let found = Index::of(&reference, 64).redundancy(&dump(vec![[0; PAGE_SIZE]; 3]));
        assert_eq!(found, Redundancy::default());
        assert_eq!(Index::of(&reference, 64).redundancy(&reference).bytes, 8 * 4096);
    }

    #[test]
    fn small_changes_hurt_large_chunks_more() {
        let reference = dump(unique(0..64));
        let mut changed = unique(0..64);
        for page in &mut changed {
            // Eight bytes in each 512.
            page.chunks_exact_mut(512).for_each(|part| part[100..108].fill(0xee));
        }
        let changed = dump(changed);
        let shares: Vec<f64> =
            CHUNK_SIZES.iter().map(|chunk| share(&changed, &reference, *chunk)).collect();
        assert!(shares[0] > 0.9, "{shares:?}");
        assert!(shares.is_sorted_by(|a, b| a >= b), "{shares:?}");
        assert!(shares[6] < 1e-9, "{shares:?}");
    }

    #[test]
    fn pages_may_lie_elsewhere() {
        let reference = dump(unique(0..16));
        let mut moved = unique(0..16);
        moved.reverse();
        assert!(share(&dump(moved), &reference, 64) > 0.999);
    }

    proptest! {
        #[test]
        fn no_more_is_redundant_than_there_is(
            a in prop::collection::vec(0u8..4, 1..6),
            b in prop::collection::vec(0u8..4, 1..6),
            chunk in prop::sample::select(&CHUNK_SIZES[..]),
        ) {
            // Pages that begin and end alike, and some that are zero.
            let pages = |seeds: &[u8]| dump(seeds.iter().map(|s| {
                let mut page = [*s; PAGE_SIZE];
                page[1000..1010].fill(s.wrapping_mul(77));
                page
            }).collect());
            let (a, b) = (pages(&a), pages(&b));
            let found = Index::of(&b, chunk).redundancy(&a);
            prop_assert!(found.redundant_bytes <= found.bytes);
            prop_assert_eq!(found.bytes, a.bytes() - 4096 * a.zero_pages() as u64);
        }
    }
}
