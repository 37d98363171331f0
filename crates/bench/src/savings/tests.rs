use medes_node::DedupReport;

use super::*;

fn measured(left: u64) -> Measured {
    let before = MemoryUse { private: 9_000_000, kernel: 1_000_000, ..MemoryUse::default() };
    let after =
        MemoryUse { private: 100_000, kernel: 400_000, store: left - 500_100, metadata: 100 };
    let report = DedupReport { pages: 2000, zero_pages: 10, before, after, ..Default::default() };
    Measured { base_bytes: 8_000_000, reports: vec![report; 2], answers_checked: 2 }
}

fn estimates(image: u64) -> Estimates {
    let of = |bytes| Estimated { image_bytes: vec![bytes; 2], foreign_pages: vec![0.5; 2] };
    Estimates {
        same: of(image),
        other: of(2 * image),
        any: of(image / 2),
        same_pages: Breakdown::default(),
        other_pages: Breakdown::default(),
    }
}

#[test]
fn the_base_is_shared_out() {
    let savings = layout_savings(&measured(1_000_000), estimates(499_900));
    assert_eq!((savings.warm_bytes, savings.dedup_bytes), (10_000_000, 1_000_000));
    assert!((savings.saved - 0.9).abs() < 1e-9);
    assert!((savings.saved_with_base[&1] - 0.1).abs() < 1e-9);
    assert!((savings.saved_with_base[&5] - 0.74).abs() < 1e-9);
    assert!((savings.saved_with_base[&40] - 0.88).abs() < 1e-9);
    // An image as large as the real one: the same figure.
    assert!((savings.same_function_estimated.saved - savings.saved).abs() < 1e-9);
    assert_eq!(savings.other_functions.dedup_bytes, 1_000_000 + 499_900);
}

#[test]
fn the_document_has_the_names_that_are_promised() {
    let savings = layout_savings(&measured(1_000_000), estimates(499_900));
    let layouts = LAYOUTS.map(|l| (layout_name(l), savings.clone())).into();
    let function = serde_json::to_value(function_savings("f", layouts)).expect("JSON");
    for name in ["name", "warm_bytes", "dedup_bytes", "saved", "base_bytes"] {
        assert!(!function[name].is_null(), "{name}");
    }
    for layout in ["function", "shared", "random"] {
        for name in ["other_functions", "any_function", "saved_with_base", "pages"] {
            assert!(function["layouts"][layout][name].is_object(), "{layout} {name}");
        }
    }
    assert!(function["layouts"]["random"]["saved_with_base"]["40"].is_number());
}
