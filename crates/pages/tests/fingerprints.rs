//! What the choice of base pages relies on.

use medes_pages::{
    ChunkHash, Fingerprint, FingerprintConfig, Fingerprinter, InvalidFingerprintConfig, PAGE_SIZE,
    Page, content_hash, is_zero,
};
use proptest::collection::vec;
use proptest::prelude::*;

fn all_configs() -> impl Iterator<Item = FingerprintConfig> {
    [5, 10, 20].into_iter().flat_map(|cardinality| {
        [32, 64, 128].map(|size| FingerprintConfig::new(cardinality, size).expect("supported"))
    })
}

fn random_page() -> impl Strategy<Value = Page> {
    vec(any::<u8>(), PAGE_SIZE).prop_map(|bytes| bytes.try_into().expect("a page"))
}

#[test]
fn settings_are_checked() {
    assert_eq!(FingerprintConfig::new(6, 64), Err(InvalidFingerprintConfig::Cardinality(6)));
    assert_eq!(FingerprintConfig::new(5, 100), Err(InvalidFingerprintConfig::ChunkSize(100)));
    let default = FingerprintConfig::default();
    assert_eq!(FingerprintConfig::new(5, 64), Ok(default));
}

#[test]
fn zero_and_uniform_pages_have_no_more_than_one_chunk() {
    for config in all_configs() {
        let fingerprinter = Fingerprinter::new(config);
        assert!(fingerprinter.fingerprint(&[0; PAGE_SIZE]).is_empty());
        for byte in 1..=255 {
            let page = [byte; PAGE_SIZE];
            assert!(fingerprinter.fingerprint(&page).chunks().len() <= 1);
        }
    }
}

#[test]
fn a_page_is_zero_only_if_all_of_it_is() {
    assert!(is_zero(&[0; PAGE_SIZE]));
    for at in [0, 1, 255, 256, 2048, PAGE_SIZE - 1] {
        let mut page = [0; PAGE_SIZE];
        page[at] = 1;
        assert!(!is_zero(&page));
        assert_ne!(content_hash(&page), content_hash(&[0; PAGE_SIZE]));
    }
}

#[test]
fn fingerprints_are_sets() {
    let hashes = [9, 2, 7, 2, 9].map(ChunkHash);
    let fingerprint = Fingerprint::try_from(&hashes[..]).expect("few enough");
    assert_eq!(fingerprint.chunks(), [2, 7, 9].map(ChunkHash));
    let reversed = [7, 9, 2].map(ChunkHash);
    assert_eq!(Fingerprint::try_from(&reversed[..]), Ok(fingerprint));
    let other = Fingerprint::try_from(&[1, 7, 9, 12].map(ChunkHash)[..]).expect("few enough");
    assert_eq!(fingerprint.overlap(&other), 2);
    assert_eq!(other.overlap(&fingerprint), 2);
    let many: Vec<_> = (0..21).map(ChunkHash).collect();
    assert!(Fingerprint::try_from(many).is_err());
}

#[test]
fn moved_pointers_leave_the_fingerprint_alone() {
    let mut base: Page = std::array::from_fn(|i| (i * i / 7 + i / 3) as u8);
    let mut moved = base;
    for i in (0..PAGE_SIZE / 8).step_by(3) {
        let pointer = 0x7f00_1234_5000 + i as u64 * 1000;
        base[i * 8..][..8].copy_from_slice(&pointer.to_le_bytes());
        moved[i * 8..][..8].copy_from_slice(&(pointer + 0x12_3456_7000).to_le_bytes());
    }
    for config in all_configs() {
        let fingerprinter = Fingerprinter::new(config);
        let fingerprint = fingerprinter.fingerprint(&base);
        assert!(!fingerprint.is_empty());
        assert_eq!(fingerprint, fingerprinter.fingerprint(&moved));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn chunks_are_distinct_ascending_and_no_more_than_asked_for(page in random_page()) {
        for config in all_configs() {
            let fingerprint = Fingerprinter::new(config).fingerprint(&page);
            // Random bytes always have enough samples.
            prop_assert_eq!(fingerprint.chunks().len(), usize::from(config.cardinality));
            prop_assert!(fingerprint.chunks().is_sorted_by(|a, b| a < b));
            prop_assert_eq!(fingerprint.overlap(&fingerprint), config.cardinality);
        }
    }

    /// The same content elsewhere in a page: all samples that lie in it whole are still there.
    #[test]
    fn shifted_content_is_recognised(page in random_page(), words in 1..64usize) {
        let fingerprinter = Fingerprinter::default();
        let mut shifted = page;
        shifted.rotate_right(words * 8);
        let overlap = fingerprinter.fingerprint(&page).overlap(&fingerprinter.fingerprint(&shifted));
        // At most the samples over the seam differ: fewer than one of 30 on average.
        prop_assert!(overlap >= 3, "{overlap} of 5 for a shift by {words} words");
    }

    /// A short change spoils only samples near it.
    #[test]
    fn changed_content_is_recognised(
        page in random_page(),
        at in 0..PAGE_SIZE - 16,
        bytes in any::<[u8; 16]>(),
    ) {
        let fingerprinter = Fingerprinter::default();
        let mut changed = page;
        changed[at..at + 16].copy_from_slice(&bytes);
        let overlap = fingerprinter.fingerprint(&page).overlap(&fingerprinter.fingerprint(&changed));
        prop_assert!(overlap >= 2, "{overlap} of 5");
    }

    /// The page's end is sampled like its start: halves swapped, most samples stay.
    #[test]
    fn neither_half_is_preferred(page in random_page()) {
        let fingerprinter = Fingerprinter::new(FingerprintConfig::new(20, 64).expect("supported"));
        let mut swapped = page;
        swapped.rotate_left(PAGE_SIZE / 2);
        let overlap = fingerprinter.fingerprint(&page).overlap(&fingerprinter.fingerprint(&swapped));
        prop_assert!(overlap >= 14, "{overlap} of 20");
    }

    #[test]
    fn unrelated_pages_share_nothing(a in random_page(), b in random_page()) {
        let fingerprinter = Fingerprinter::default();
        prop_assert_eq!(fingerprinter.fingerprint(&a).overlap(&fingerprinter.fingerprint(&b)), 0);
    }
}
