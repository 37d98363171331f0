//! When a function gets one more base sandbox.

/// T in the paper's section 4.1.3: dedup sandboxes per base sandbox.
pub const DEFAULT_BASE_THRESHOLD: u32 = 40;

/// Whether the next dedup operation of a function should also make a base snapshot: D/B > T, with
/// D the function's dedup sandboxes (the coming one included) and B its base snapshots. A function
/// without one always gets its first.
#[must_use]
pub fn base_due(dedup: u64, bases: u64, threshold: u32) -> bool {
    bases == 0 || dedup > bases.saturating_mul(u64::from(threshold))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_dedup_makes_a_base_and_then_every_more_than_t() {
        assert!(base_due(1, 0, 40));
        assert!(!base_due(2, 1, 40));
        assert!(!base_due(40, 1, 40));
        assert!(base_due(41, 1, 40));
        assert!(!base_due(41, 2, 40));
        assert!(base_due(81, 2, 40));
    }
}
