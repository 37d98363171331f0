//! Every patch gives its page back, and no bytes harm the decoder.

use medes_pages::{
    DecodeError, Decoder, Encoder, Encoding, MAX_PATCH_SIZE, PAGE_SIZE, Page, encoding, needs_base,
};
use proptest::collection::vec;
use proptest::prelude::*;

/// Bytes that no compressor makes smaller.
fn noise(seed: u64) -> Page {
    let mut state = seed;
    std::array::from_fn(|_| {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (state >> 56) as u8
    })
}

/// Text of four letters: a quarter of its size once compressed, whatever the base page.
fn text(seed: u64) -> Page {
    noise(seed).map(|byte| b"acgt"[usize::from(byte >> 6)])
}

fn put_word(page: &mut Page, index: usize, word: u64) {
    page[index * 8..][..8].copy_from_slice(&word.to_le_bytes());
}

/// Encodes, decodes, compares, and gives the patch and its encoding.
fn round_trip(page: &Page, base: Option<&Page>) -> (Vec<u8>, Encoding) {
    let mut out = b"before".to_vec();
    let chosen = Encoder::new().encode(page, base, &mut out);
    let patch = out.strip_prefix(b"before").expect("what was there is untouched").to_vec();
    assert!(patch.len() <= MAX_PATCH_SIZE);
    assert_eq!(encoding(&patch), Ok(chosen));
    assert_eq!(needs_base(&patch), Ok(chosen.needs_base()));
    let mut decoded = [0xa5; PAGE_SIZE];
    let base_if_needed = base.filter(|_| chosen.needs_base());
    Decoder::new().decode(&patch, base_if_needed, &mut decoded).expect("decodes");
    assert!(decoded == *page, "{chosen:?} does not give the page back");
    (patch, chosen)
}

/// One page, base page and patch of each encoding.
fn one_of_each() -> Vec<(Encoding, Page, Page, Vec<u8>)> {
    let base = noise(1);
    let mut word_changed = base;
    put_word(&mut word_changed, 77, 0xdead_beef);
    let mut shifted = base;
    shifted.rotate_left(104);
    // Half of it is in the base, and the other half compresses.
    let mut mixed = text(3);
    for (i, chunk) in mixed.chunks_exact_mut(64).enumerate().filter(|(i, _)| i % 2 == 0) {
        chunk.copy_from_slice(&base[(i * 640) % 4032..][..64]);
    }
    let mut samples = Vec::new();
    for (expected, page) in [
        (Encoding::Zero, [0; PAGE_SIZE]),
        (Encoding::Equal, base),
        (Encoding::WordRuns, word_changed),
        (Encoding::Delta, shifted),
        (Encoding::DictCompressed, mixed),
        (Encoding::Compressed, text(5)),
        (Encoding::Raw, noise(2)),
    ] {
        let (patch, chosen) = round_trip(&page, Some(&base));
        assert_eq!(chosen, expected);
        samples.push((chosen, page, base, patch));
    }
    samples
}

#[test]
fn each_encoding_is_chosen_for_the_pages_it_is_best_for() {
    for (encoding, _, _, patch) in one_of_each() {
        let limit = match encoding {
            Encoding::Zero | Encoding::Equal => 1,
            Encoding::WordRuns | Encoding::Delta => 16,
            Encoding::DictCompressed | Encoding::Compressed => PAGE_SIZE / 2,
            Encoding::Raw => MAX_PATCH_SIZE,
        };
        assert!(patch.len() <= limit, "{encoding:?}: {} bytes", patch.len());
    }
}

#[test]
fn pointers_moved_by_address_randomisation_cost_next_to_nothing() {
    let mut base = text(1);
    let mut page = base;
    for i in 0..100 {
        let heap = 0x7f12_3456_7000 + i * 2456;
        let library = 0x5588_1234_5000 + i * 168;
        put_word(&mut base, i as usize * 4, heap);
        put_word(&mut page, i as usize * 4, heap - 0x11_2233_4000);
        put_word(&mut base, i as usize * 4 + 1, library);
        put_word(&mut page, i as usize * 4 + 1, library + 0x3_7654_3000);
    }
    let (patch, encoding) = round_trip(&page, Some(&base));
    assert_eq!(encoding, Encoding::WordRuns);
    assert!(patch.len() < 40, "{} bytes", patch.len());
}

#[test]
fn a_base_that_looks_like_a_zstd_dictionary_is_only_a_page() {
    let mut base = text(1);
    base[..4].copy_from_slice(&[0x37, 0xa4, 0x30, 0xec]);
    let mut page = text(2);
    page[..1024].copy_from_slice(&base[3000..4024]);
    round_trip(&page, Some(&base));
}

#[test]
fn a_patch_without_the_base_it_needs_is_an_error() {
    let mut decoder = Decoder::new();
    for (encoding, page, _, patch) in one_of_each() {
        let mut out = [0; PAGE_SIZE];
        let decoded = decoder.decode(&patch, None, &mut out);
        if encoding.needs_base() {
            assert_eq!(decoded, Err(DecodeError::BaseMissing));
        } else {
            assert_eq!(decoded, Ok(()));
            assert!(out == page);
        }
    }
}

#[test]
fn a_patch_is_exactly_its_bytes() {
    let mut decoder = Decoder::new();
    let mut out = [0; PAGE_SIZE];
    for (encoding, page, base, patch) in one_of_each() {
        let longer = [&patch[..], &[0]].concat();
        let decoded = decoder.decode(&longer, Some(&base), &mut out);
        assert!(decoded.is_err(), "{encoding:?} with a byte too many");
        for len in 0..patch.len() {
            let decoded = decoder.decode(&patch[..len], Some(&base), &mut out);
            // Word runs end where the patch ends: a shorter one changes fewer words.
            if encoding == Encoding::WordRuns && decoded.is_ok() {
                assert!(out != page);
            } else {
                assert!(decoded.is_err(), "{encoding:?} cut to {len} bytes");
            }
        }
    }
}

#[test]
fn unknown_headers_are_errors() {
    let mut decoder = Decoder::new();
    let mut out = [0; PAGE_SIZE];
    let base = noise(1);
    let mut decode = |patch: &[u8]| decoder.decode(patch, Some(&base), &mut out);
    assert_eq!(decode(&[]), Err(DecodeError::Truncated));
    assert_eq!(decode(&[0x00]), Err(DecodeError::Version(0)));
    assert_eq!(decode(&[0x21]), Err(DecodeError::Version(2)));
    assert_eq!(decode(&[0x17]), Err(DecodeError::Header(0x17)));
    for no_relocation in [0x18, 0x19, 0x1d, 0x1e, 0x1f] {
        assert_eq!(decode(&[no_relocation]), Err(DecodeError::Header(no_relocation)));
        assert_eq!(needs_base(&[no_relocation]), Err(DecodeError::Header(no_relocation)));
    }
    let large = vec![0x16; MAX_PATCH_SIZE + 1];
    assert_eq!(decode(&large), Err(DecodeError::TooLarge(MAX_PATCH_SIZE + 1)));
}

/// What a page may hold, from random bytes to long runs.
fn any_page() -> impl Strategy<Value = Page> {
    let piece = prop_oneof![
        (any::<u8>(), 1..600usize).prop_map(|(byte, len)| vec![byte; len]),
        vec(any::<u8>(), 1..200),
        (any::<u64>(), any::<u16>(), 1..60u64).prop_map(|(first, step, count)| {
            (0..count).flat_map(|i| (first + i * u64::from(step)).to_le_bytes()).collect()
        }),
    ];
    vec(piece, 40..80).prop_map(|pieces| {
        let mut bytes = pieces.concat();
        bytes.resize(PAGE_SIZE, 0);
        bytes.try_into().expect("a page")
    })
}

/// What may have happened to a page since its base was taken.
#[derive(Clone, Debug)]
enum Change {
    Write(usize, Vec<u8>),
    Move(usize, usize, usize),
    Relocate(u64, u64),
}

fn any_change() -> impl Strategy<Value = Change> {
    prop_oneof![
        (0..PAGE_SIZE, vec(any::<u8>(), 1..100)).prop_map(|(at, bytes)| Change::Write(at, bytes)),
        (0..PAGE_SIZE, 0..PAGE_SIZE, 1..2000usize).prop_map(|(a, b, len)| Change::Move(a, b, len)),
        (1..1u64 << 35, 0..1u64 << 35).prop_map(|(a, b)| Change::Relocate(a << 12, b << 12)),
    ]
}

fn change(page: &mut Page, change: &Change) {
    match change {
        Change::Write(at, bytes) => {
            let len = bytes.len().min(PAGE_SIZE - at);
            page[*at..at + len].copy_from_slice(&bytes[..len]);
        }
        Change::Move(from, to, len) => {
            let len = *len.min(&(PAGE_SIZE - from.max(to)));
            page.copy_within(*from..from + len, *to);
        }
        Change::Relocate(old, new) => {
            for word in page.as_chunks_mut::<8>().0 {
                let value = u64::from_le_bytes(*word);
                if value >> 47 == 0 && value >> 32 != 0 {
                    *word = value.wrapping_sub(*old).wrapping_add(*new).to_le_bytes();
                }
            }
        }
    }
}

#[test]
fn a_page_that_changed_a_little_gets_a_patch_like_the_one_before() {
    for (kind, page, base, model) in one_of_each() {
        let mut changed = page;
        changed[2000] ^= 1;
        let mut out = Vec::new();
        let alike = Encoder::new().encode_like(&model, &changed, Some(&base), &mut out);
        // Nothing is gained by knowing that it was one of these.
        let never = [Encoding::Zero, Encoding::Equal, Encoding::Raw].contains(&kind);
        assert_eq!(alike, !never, "{kind:?}");
    }
}

proptest! {
    #[test]
    fn any_page_comes_back(
        base in any_page(),
        other in any_page(),
        changes in vec(any_change(), 0..20),
    ) {
        let mut page = base;
        for step in &changes {
            change(&mut page, step);
        }
        round_trip(&page, Some(&base));
        round_trip(&page, Some(&other));
        round_trip(&page, None);
    }

    #[test]
    fn encoders_and_decoders_carry_nothing_from_page_to_page(
        pages in vec((any_page(), any_page(), any::<bool>()), 1..6),
    ) {
        let (mut encoder, mut decoder) = (Encoder::new(), Decoder::new());
        let mut out = [0; PAGE_SIZE];
        for (page, base, with_base) in &pages {
            let base = with_base.then_some(base);
            let (mut reused, mut fresh) = (Vec::new(), Vec::new());
            encoder.encode(page, base, &mut reused);
            Encoder::new().encode(page, base, &mut fresh);
            prop_assert_eq!(&reused, &fresh);
            decoder.decode(&reused, base, &mut out).unwrap();
            prop_assert!(out == *page);
        }
    }

    #[test]
    fn a_patch_like_another_gives_its_page_back_and_is_hardly_larger(
        (page, base, later) in (any_page(), any_page(), any_page()),
        steps in vec(any_change(), 0..6),
        with_base in any::<bool>(),
        close in any::<bool>(),
    ) {
        let base = with_base.then_some(&base);
        let mut encoder = Encoder::new();
        let mut model = Vec::new();
        encoder.encode(&page, base, &mut model);
        let mut changed = if close { page } else { later };
        for step in &steps {
            change(&mut changed, step);
        }
        let mut out = b"before".to_vec();
        if encoder.encode_like(&model, &changed, base, &mut out) {
            let patch = out.strip_prefix(b"before").unwrap();
            prop_assert!(patch.len() <= (model.len() + model.len() / 16).max(96));
            prop_assert_eq!(encoding(patch), encoding(&model));
            let mut decoded = [0xa5; PAGE_SIZE];
            Decoder::new().decode(patch, base, &mut decoded).unwrap();
            prop_assert!(decoded == changed);
        } else {
            prop_assert_eq!(out, b"before");
        }
    }

    /// Must neither panic nor hang; what an accepted patch gives does not matter.
    #[test]
    fn arbitrary_bytes_do_no_harm(
        relocated in any::<bool>(),
        encoding in 0..8u8,
        body in vec(any::<u8>(), 0..300),
        base in any_page(),
    ) {
        let header = 0x10 | if relocated { 8 } else { 0 } | encoding;
        let patch = [&[header], &body[..]].concat();
        let _ = Decoder::new().decode(&patch, Some(&base), &mut [0; PAGE_SIZE]);
        let _ = Decoder::new().decode(&body, Some(&base), &mut [0; PAGE_SIZE]);
    }

    #[test]
    fn damaged_patches_do_no_harm(
        base in any_page(),
        changes in vec(any_change(), 1..20),
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..5),
        with_base in any::<bool>(),
    ) {
        let mut page = base;
        for step in &changes {
            change(&mut page, step);
        }
        let mut patch = Vec::new();
        Encoder::new().encode(&page, with_base.then_some(&base), &mut patch);
        for (at, byte) in damage {
            *at.get_mut(&mut patch) = byte;
        }
        let _ = Decoder::new().decode(&patch, Some(&base), &mut [0; PAGE_SIZE]);
        let _ = Decoder::new().decode(&patch, None, &mut [0; PAGE_SIZE]);
    }
}
