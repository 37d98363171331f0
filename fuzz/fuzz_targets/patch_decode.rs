//! The decoder against hostile patches: `cargo +nightly fuzz run patch_decode`.
#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use medes_pages::{Decoder, PAGE_SIZE, Page, needs_base};

thread_local! {
    // Reused, as in the agent: nothing may leak from one patch to the next.
    static DECODER: RefCell<Decoder> = RefCell::new(Decoder::new());
}

fuzz_target!(|patch: &[u8]| {
    let base: Page = std::array::from_fn(|i| (i * i / 31) as u8);
    DECODER.with_borrow_mut(|decoder| {
        let mut first = [0x55; PAGE_SIZE];
        let alone = decoder.decode(patch, None, &mut first);
        assert!(alone.is_err() || needs_base(patch) == Ok(false));
        let with_base = decoder.decode(patch, Some(&base), &mut first);
        let mut second = [0xaa; PAGE_SIZE];
        assert_eq!(with_base, Decoder::new().decode(patch, Some(&base), &mut second));
        assert!(with_base.is_err() || first == second, "bytes of the page were left as they were");
    });
});
