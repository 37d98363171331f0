//! Address-space layouts: equal when they should be, different when they should be.

mod common;

use common::Instance;
use medes_sandbox::{Exit, Layout};

/// The addresses and names of a Python process's mappings.
fn maps(i: &Instance, layout: Layout) -> Vec<String> {
    let mut spec = i.python("print(open('/proc/self/maps').read())");
    spec.layout = layout;
    let (exit, out, err) = i.run(&spec);
    assert_eq!(exit, Exit::Code(0), "{out}{err}");
    out.lines()
        .filter(|l| !l.is_empty())
        .map(|l| {
            let mut fields = l.split_whitespace();
            format!("{} {}", fields.next().unwrap(), fields.nth(4).unwrap_or(""))
        })
        .collect()
}

#[test]
fn equal_seeds_give_equal_addresses() {
    let i = Instance::new();
    let first = maps(&i, Layout::fixed(1));
    assert!(first.iter().any(|m| m.contains("libc")), "{first:?}");
    assert_eq!(first, maps(&i, Layout::fixed(1)));
}

#[test]
fn other_seeds_give_other_addresses() {
    let i = Instance::new();
    let libc = |layout| {
        let all = maps(&i, layout);
        all.into_iter().find(|m| m.contains("libc")).unwrap()
    };
    let mut seen = std::collections::HashSet::new();
    for seed in 0..4 {
        assert!(seen.insert(libc(Layout::fixed(seed))));
    }
    for _ in 0..2 {
        assert!(seen.insert(libc(Layout::random())));
    }
}
