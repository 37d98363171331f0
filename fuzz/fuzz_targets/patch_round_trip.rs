//! Every page comes back: `cargo +nightly fuzz run patch_round_trip`.
#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use medes_pages::{Decoder, Encoder, MAX_PATCH_SIZE, PAGE_SIZE, Page};

thread_local! {
    static CODEC: RefCell<(Encoder, Decoder)> = RefCell::new((Encoder::new(), Decoder::new()));
}

/// A page that begins with the bytes and goes on with them moved along.
fn page(bytes: &[u8]) -> Page {
    std::array::from_fn(|i| match bytes.len() {
        0 => 0,
        len => bytes[i % len].wrapping_add((i / len) as u8),
    })
}

fuzz_target!(|input: (bool, &[u8], &[u8])| {
    let (with_base, base, bytes) = input;
    let (base, page) = (page(base), page(bytes));
    let base = with_base.then_some(&base);
    CODEC.with_borrow_mut(|(encoder, decoder)| {
        let mut patch = Vec::new();
        let encoding = encoder.encode(&page, base, &mut patch);
        assert!(patch.len() <= MAX_PATCH_SIZE);
        let mut out = [0x55; PAGE_SIZE];
        let base = base.filter(|_| encoding.needs_base());
        decoder.decode(&patch, base, &mut out).expect("a patch decodes");
        assert!(out == page);
    });
});
