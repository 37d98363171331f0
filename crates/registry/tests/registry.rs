//! What callers of the registry rely on.

use std::collections::{BTreeMap, BTreeSet};

use medes_core::{DomainId, FunctionId, NodeId, PageRef, SnapshotId};
use medes_pages::{ChunkHash, Fingerprint};
use medes_registry::{
    Candidate, LocalRegistry, Near, Registry, RegistryConfig, RegistryError, Scope,
};
use proptest::collection::vec;
use proptest::prelude::*;

const DOMAIN: DomainId = DomainId(1);

fn chunk(number: u64) -> ChunkHash {
    ChunkHash(number.wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

fn fingerprint(numbers: &[u64]) -> Fingerprint {
    let chunks: Vec<_> = numbers.iter().copied().map(chunk).collect();
    Fingerprint::try_from(chunks).expect("few enough chunks")
}

fn snapshot(node: u32, number: u32) -> SnapshotId {
    SnapshotId { node: NodeId(node), number }
}

fn near(node: u32, function: u64) -> Near {
    Near { node: NodeId(node), function: FunctionId(function) }
}

fn registry() -> LocalRegistry {
    LocalRegistry::new(RegistryConfig { shards: 4, ..RegistryConfig::default() })
}

fn insert(
    registry: &LocalRegistry,
    function: u64,
    snapshot: SnapshotId,
    page: u32,
    chunks: &[u64],
) {
    registry
        .insert(DOMAIN, FunctionId(function), snapshot, &[(page, fingerprint(chunks))])
        .expect("there is room");
}

fn lookup(registry: &LocalRegistry, near: Near, scope: Scope, chunks: &[u64]) -> Option<Candidate> {
    let mut out = Vec::new();
    registry
        .lookup_within(DOMAIN, near, scope, &[fingerprint(chunks)], &mut out)
        .expect("a local lookup can't fail");
    assert_eq!(out.len(), 1);
    out[0]
}

#[test]
fn the_largest_overlap_wins_whatever_else() {
    let registry = registry();
    insert(&registry, 7, snapshot(0, 1), 3, &[1, 2]);
    insert(&registry, 8, snapshot(9, 2), 4, &[1, 2, 3]);
    let base = PageRef { snapshot: snapshot(9, 2), page: 4 };
    let found = lookup(&registry, near(0, 7), Scope::Any, &[1, 2, 3, 4, 5]);
    assert_eq!(found, Some(Candidate { base, overlap: 3 }));
    assert_eq!(lookup(&registry, near(0, 7), Scope::Any, &[6, 7]), None);
}

#[test]
fn ties_go_to_the_node_then_the_function_then_the_smallest_page() {
    let registry = registry();
    insert(&registry, 1, snapshot(2, 1), 0, &[1]);
    insert(&registry, 2, snapshot(1, 1), 9, &[1]);
    insert(&registry, 1, snapshot(1, 2), 5, &[1]);
    insert(&registry, 1, snapshot(1, 2), 4, &[1]);
    let found = |node, function| {
        let candidate = lookup(&registry, near(node, function), Scope::Any, &[1]).expect("found");
        (candidate.base.snapshot, candidate.base.page)
    };
    assert_eq!(found(2, 2), (snapshot(2, 1), 0), "the node comes before the function");
    assert_eq!(found(1, 2), (snapshot(1, 1), 9), "on the node, the function decides");
    assert_eq!(found(1, 1), (snapshot(1, 2), 4), "then the smaller page");
    assert_eq!(found(3, 3), (snapshot(1, 1), 9), "or the smaller snapshot");
}

#[test]
fn a_scope_hides_other_functions_or_the_own() {
    let registry = registry();
    insert(&registry, 1, snapshot(0, 1), 0, &[1, 2, 3]);
    insert(&registry, 2, snapshot(0, 2), 0, &[1, 2]);
    let found = |function, scope| {
        lookup(&registry, near(0, function), scope, &[1, 2, 3]).map(|found| found.base.snapshot)
    };
    assert_eq!(found(2, Scope::Any), Some(snapshot(0, 1)));
    assert_eq!(found(2, Scope::SameFunction), Some(snapshot(0, 2)));
    assert_eq!(found(1, Scope::OtherFunctions), Some(snapshot(0, 2)));
    assert_eq!(found(3, Scope::SameFunction), None);
}

#[test]
fn domains_see_nothing_of_each_other() {
    let registry = registry();
    insert(&registry, 1, snapshot(0, 1), 0, &[1, 2, 3]);
    let other = DomainId(2);
    let mut out = vec![None];
    registry.lookup(other, near(0, 1), &[fingerprint(&[1, 2, 3])], &mut out).expect("local");
    assert_eq!(out, [None, None], "an answer is appended for each fingerprint");

    let pages = [(5, fingerprint(&[1, 2, 3]))];
    assert_eq!(
        registry.insert(other, FunctionId(1), snapshot(0, 1), &pages),
        Err(RegistryError::Conflict {
            snapshot: snapshot(0, 1),
            domain: DOMAIN,
            function: FunctionId(1)
        })
    );
    registry.insert(other, FunctionId(1), snapshot(0, 2), &pages).expect("there is room");
    out.clear();
    registry.lookup(other, near(0, 1), &[fingerprint(&[1, 2, 3])], &mut out).expect("local");
    assert_eq!(out[0].map(|found| found.base.snapshot), Some(snapshot(0, 2)));
    registry.remove(snapshot(0, 2)).expect("local");
    assert!(lookup(&registry, near(0, 1), Scope::Any, &[1]).is_some());
}

#[test]
fn a_full_registry_takes_all_of_a_batch_or_nothing() {
    let registry = LocalRegistry::new(RegistryConfig { max_entries: 10, ..Default::default() });
    insert(&registry, 1, snapshot(0, 1), 0, &[1, 2, 3, 4]);
    let batch = [(0, fingerprint(&[5, 6, 7, 8])), (1, fingerprint(&[9, 10, 11]))];
    let full = RegistryError::Full { wanted: 7, max_entries: 10 };
    assert_eq!(registry.insert(DOMAIN, FunctionId(1), snapshot(0, 2), &batch), Err(full));
    assert_eq!(registry.stats().entries, 4);
    assert_eq!(registry.stats().snapshots, 1);
    assert_eq!(lookup(&registry, near(0, 1), Scope::Any, &[5, 6, 7, 8]), None);

    registry.remove(snapshot(0, 1)).expect("local");
    registry.insert(DOMAIN, FunctionId(1), snapshot(0, 2), &batch).expect("there is room now");
    assert_eq!(registry.stats().entries, 7);
}

#[test]
fn what_is_not_entered_takes_no_room() {
    let registry = LocalRegistry::new(RegistryConfig { max_entries: 10, ..Default::default() });
    for _ in 0..100 {
        insert(&registry, 1, snapshot(0, 1), 0, &[1, 2, 3, 4, 5]);
    }
    assert_eq!(registry.stats().entries, 5);
}

#[test]
fn a_chunk_keeps_a_bounded_number_of_pages_of_several_snapshots() {
    let registry =
        LocalRegistry::new(RegistryConfig { candidates_per_chunk: 8, ..Default::default() });
    for page in 0..100 {
        insert(&registry, 1, snapshot(0, 1), page, &[1]);
    }
    assert_eq!(registry.stats().entries, 4, "one snapshot takes half");
    for other in 2..100 {
        insert(&registry, 1, snapshot(0, other), 0, &[1]);
    }
    assert_eq!(registry.stats().entries, 8);
    registry.remove(snapshot(0, 1)).expect("local");
    assert_eq!(registry.stats().entries, 4);
    assert!(lookup(&registry, near(0, 1), Scope::Any, &[1]).is_some());
}

#[test]
fn memory_follows_what_is_registered() {
    let registry = registry();
    let pages: Vec<_> = (0..50_000u32)
        .map(|page| (page, fingerprint(&[0, 1, 2, 3, 4].map(|i| u64::from(page) * 5 + i))))
        .collect();
    for number in 0..4 {
        let part = &pages[number * 12_500..][..12_500];
        registry.insert(DOMAIN, FunctionId(1), snapshot(0, number as u32), part).expect("room");
    }
    let full = registry.stats();
    assert_eq!(full.entries, 250_000);
    let per_entry = full.bytes as f64 / full.entries as f64;
    assert!(per_entry < 16.0, "{per_entry} bytes an entry");
    for number in 0..3 {
        registry.remove(snapshot(0, number)).expect("local");
    }
    let quarter = registry.stats();
    assert_eq!((quarter.entries, quarter.snapshots), (62_500, 1));
    assert!(quarter.bytes < full.bytes / 2);
    registry.remove(snapshot(0, 3)).expect("local");
    let empty = registry.stats();
    assert_eq!((empty.entries, empty.snapshots), (0, 0));
    assert!(empty.bytes < 4096);
}

#[test]
fn concurrent_use_loses_nothing_and_shows_nothing_removed() {
    let registry = registry();
    insert(&registry, 1, snapshot(0, 0), 0, &[1, 2, 3, 4, 5]);
    let stable = PageRef { snapshot: snapshot(0, 0), page: 0 };
    std::thread::scope(|scope| {
        for thread in 1..=3u32 {
            let registry = &registry;
            scope.spawn(move || {
                for round in 0..30 {
                    let id = snapshot(thread, round);
                    let key = |page: u32| u64::from(page + thread * 10_000 + round * 100_000) * 8;
                    let pages: Vec<_> = (0..1000)
                        .map(|page| (page, fingerprint(&[key(page), key(page) + 1, key(page) + 2])))
                        .collect();
                    registry.insert(DOMAIN, FunctionId(1), id, &pages).expect("there is room");
                    let asked: Vec<_> = pages.iter().map(|page| page.1).collect();
                    let mut out = Vec::new();
                    registry.lookup(DOMAIN, near(thread, 1), &asked, &mut out).expect("local");
                    for (page, found) in (0..1000).zip(&out) {
                        let base = PageRef { snapshot: id, page };
                        assert_eq!(*found, Some(Candidate { base, overlap: 3 }));
                    }
                    registry.remove(id).expect("local");
                    out.clear();
                    registry.lookup(DOMAIN, near(thread, 1), &asked, &mut out).expect("local");
                    assert!(out.iter().all(Option::is_none));
                }
            });
        }
        let registry = &registry;
        scope.spawn(move || {
            for _ in 0..3000 {
                let found = lookup(registry, near(0, 1), Scope::Any, &[1, 2, 3, 4, 5]);
                assert_eq!(found, Some(Candidate { base: stable, overlap: 5 }));
            }
        });
    });
    assert_eq!(registry.stats().entries, 5);
}

/// The same as the registry, without its limits: chunk to pages, for each domain.
#[derive(Default)]
struct Model {
    owners: BTreeMap<SnapshotId, (DomainId, FunctionId)>,
    entries: BTreeSet<(DomainId, u64, PageRef)>,
}

impl Model {
    fn best(
        &self,
        domain: DomainId,
        near: Near,
        scope: Scope,
        chunks: &[u64],
    ) -> Option<Candidate> {
        let mut overlaps = BTreeMap::<PageRef, u8>::new();
        for (_, _, page) in
            self.entries.iter().filter(|entry| entry.0 == domain && chunks.contains(&entry.1))
        {
            *overlaps.entry(*page).or_default() += 1;
        }
        let function = |page: &PageRef| self.owners[&page.snapshot].1;
        overlaps
            .into_iter()
            .filter(|(page, _)| match scope {
                Scope::Any => true,
                Scope::SameFunction => function(page) == near.function,
                Scope::OtherFunctions => function(page) != near.function,
            })
            .max_by_key(|(page, overlap)| {
                let local = page.snapshot.node == near.node;
                (*overlap, local, function(page) == near.function, std::cmp::Reverse(*page))
            })
            .map(|(base, overlap)| Candidate { base, overlap })
    }
}

#[derive(Clone, Debug)]
enum Step {
    Insert { domain: u32, function: u64, snapshot: SnapshotId, pages: Vec<(u32, Vec<u64>)> },
    Remove(SnapshotId),
    Lookup { domain: u32, near: Near, scope: Scope, chunks: Vec<Vec<u64>> },
}

fn any_snapshot() -> impl Strategy<Value = SnapshotId> {
    (0..2u32, 0..4u32).prop_map(|(node, number)| snapshot(node, number))
}

fn chunks() -> impl Strategy<Value = Vec<u64>> {
    prop::collection::btree_set(0..40u64, 0..6).prop_map(|set| set.into_iter().collect())
}

fn any_step() -> impl Strategy<Value = Step> {
    let scopes = [Scope::Any, Scope::SameFunction, Scope::OtherFunctions];
    prop_oneof![
        3 => (0..2u32, 0..3u64, any_snapshot(), vec((0..20u32, chunks()), 0..10)).prop_map(
            |(domain, function, snapshot, pages)| Step::Insert { domain, function, snapshot, pages }
        ),
        1 => any_snapshot().prop_map(Step::Remove),
        2 => (0..2u32, (0..2u32, 0..3u64), prop::sample::select(scopes.to_vec()), vec(chunks(), 0..4))
            .prop_map(|(domain, (node, function), scope, chunks)| Step::Lookup {
                domain,
                near: near(node, function),
                scope,
                chunks,
            }),
    ]
}

proptest! {
    #[test]
    fn the_registry_does_what_a_map_would(
        steps in vec(any_step(), 1..60),
        shards in 1..5usize,
    ) {
        let registry = LocalRegistry::new(RegistryConfig {
            shards,
            candidates_per_chunk: 10_000,
            max_entries: u64::MAX,
        });
        let mut model = Model::default();
        for step in &steps {
            match step {
                Step::Insert { domain, function, snapshot, pages } => {
                    let owner = (DomainId(*domain), FunctionId(*function));
                    let fingerprints: Vec<_> =
                        pages.iter().map(|(page, chunks)| (*page, fingerprint(chunks))).collect();
                    let inserted = registry.insert(owner.0, owner.1, *snapshot, &fingerprints);
                    if *model.owners.entry(*snapshot).or_insert(owner) == owner {
                        prop_assert_eq!(inserted, Ok(()));
                        for (page, chunks) in pages {
                            let page = PageRef { snapshot: *snapshot, page: *page };
                            model.entries.extend(chunks.iter().map(|chunk| (owner.0, *chunk, page)));
                        }
                    } else {
                        let refused = matches!(inserted, Err(RegistryError::Conflict { .. }));
                        prop_assert!(refused);
                    }
                }
                Step::Remove(snapshot) => {
                    registry.remove(*snapshot).expect("local");
                    model.owners.remove(snapshot);
                    model.entries.retain(|entry| entry.2.snapshot != *snapshot);
                }
                Step::Lookup { domain, near, scope, chunks } => {
                    let asked: Vec<_> = chunks.iter().map(|chunks| fingerprint(chunks)).collect();
                    let mut out = Vec::new();
                    let domain = DomainId(*domain);
                    registry.lookup_within(domain, *near, *scope, &asked, &mut out).expect("local");
                    let expected: Vec<_> =
                        chunks.iter().map(|c| model.best(domain, *near, *scope, c)).collect();
                    prop_assert_eq!(out, expected);
                }
            }
            let stats = registry.stats();
            prop_assert_eq!(stats.entries, model.entries.len() as u64);
            prop_assert_eq!(stats.snapshots, model.owners.len() as u64);
        }
    }
}
