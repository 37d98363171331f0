//! What is stored can be read back in another mapping, is stored once, and is all given back.

use std::os::fd::AsFd;
use std::sync::Arc;

use medes_core::{DomainId, FunctionId, NodeId};
use medes_pages::{PAGE_SIZE, Page};
use medes_store::{ReopenError, Snapshot, SnapshotRecord, Store, StoreError, StoreUse, View};
use proptest::prelude::*;

const DOMAIN: DomainId = DomainId(1);
const FUNCTION: FunctionId = FunctionId(7);

fn page(seed: u8) -> Page {
    let mut page = [0u8; PAGE_SIZE];
    for (i, b) in page.iter_mut().enumerate() {
        *b = (i as u8).wrapping_mul(31) ^ seed;
    }
    page
}

fn resident(store: &Store) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let fd = store.memory().descriptor().try_clone_to_owned().expect("a descriptor");
    let bytes = std::fs::File::from(fd).metadata().expect("metadata").blocks() * 512;
    // The catalogue's first page is there from the beginning.
    bytes - PAGE_SIZE as u64
}

fn snapshot_of_a_page(store: &Store) -> Arc<Snapshot> {
    let mut builder = store.begin_snapshot(DOMAIN, FUNCTION);
    builder.push(0, &page(1)).expect("room");
    builder.finish().expect("room")
}

#[test]
fn a_reader_sees_what_was_written() {
    let store = Store::create(NodeId(3), 4 << 20).expect("a store");
    let mut builder = store.begin_snapshot(DOMAIN, FUNCTION);
    for n in 0..10u8 {
        builder.push(0x1000 * u64::from(n + 1), &page(n)).expect("room");
    }
    builder.push(0x100_0000, &page(3)).expect("room");
    let snapshot = builder.finish().expect("room");
    assert_eq!(snapshot.page_at(0x3000), Some(2));
    assert_eq!(snapshot.page_at(0x3fff), Some(2));
    assert_eq!(snapshot.page_at(0xb000), None);
    assert_eq!(snapshot.page_at(0), None);
    assert_eq!(snapshot.page_at(0x100_0000), Some(10));
    assert_eq!(snapshot.slot(10), snapshot.slot(3), "equal content is stored once");
    assert_eq!(store.equal_page(DOMAIN, &page(5)).map(|p| p.page), Some(5));
    assert_eq!(store.equal_page(DomainId(2), &page(5)), None, "domains are apart");

    let image = store.put_image(&[b"head", b"tail"], &[snapshot.id()]).expect("room");
    let fd = store.memory().descriptor().as_fd().try_clone_to_owned().expect("a descriptor");
    let view = View::open(fd).expect("maps");
    assert_eq!(&view.bytes(image.extent())[..8], b"headtail");
    let record = SnapshotRecord::parse(view.bytes(snapshot.record())).expect("a record");
    assert_eq!((record.id(), record.pages()), (snapshot.id(), 11));
    for n in 0..10u8 {
        let slot = record.slot(u32::from(n)).expect("a slot");
        assert_eq!(view.page(slot), &page(n));
    }
    assert_eq!(record.slot(11), None);
    store.remove_image(image);
}

#[test]
fn a_retired_snapshot_goes_after_its_last_holder() {
    let store = Store::create(NodeId(0), 1 << 20).expect("a store");
    let snapshot = snapshot_of_a_page(&store);
    store.retire_snapshot(snapshot.id());
    store.free_retired();
    assert_eq!(store.page(&snapshot, 0), Some(&page(1)), "it is held");
    drop(snapshot);
    store.free_retired();
    assert_eq!(store.usage().snapshots, 0);
    assert_eq!(resident(&store), 0, "the host has its memory back");
}

#[test]
fn a_snapshot_stays_while_an_image_refers_to_it() {
    let store = Store::create(NodeId(0), 1 << 20).expect("a store");
    let snapshot = snapshot_of_a_page(&store);
    let id = snapshot.id();
    let image = store.put_image(&[b"x"], &[id]).expect("room");
    drop(snapshot);
    assert!(store.retire_snapshot(id));
    assert!(store.snapshot(id).is_none(), "a retired snapshot takes no new references");
    assert!(store.usage().snapshots > 0);
    store.remove_image(image);
    assert_eq!(store.usage().snapshots + store.usage().images, 0);
    assert_eq!(resident(&store), 0, "the host has its memory back");
    let missing = store.put_image(&[b"x"], &[id]);
    assert!(matches!(missing, Err(StoreError::NoSnapshot(gone)) if gone == id));
}

#[test]
fn a_full_store_refuses_and_leaks_nothing() {
    let store = Store::create(NodeId(0), 8 * PAGE_SIZE as u64).expect("a store");
    let mut builder = store.begin_snapshot(DOMAIN, FUNCTION);
    for n in 0..8u8 {
        builder.push(u64::from(n) << 12, &page(n)).expect("room");
    }
    assert!(matches!(builder.push(8 << 12, &page(9)), Err(StoreError::Full(_))));
    assert!(builder.push(9 << 12, &page(1)).is_ok(), "known content needs no room");
    assert!(matches!(builder.finish(), Err(StoreError::Full(_))), "no room for the table");
    assert_eq!(store.usage().snapshots, 0);
    assert_eq!(resident(&store), 0);
}

/// The store's memory file as another process would get it, once the writer is dead.
fn take_over(store: Store) -> Store {
    let fd = store.memory().descriptor().try_clone_to_owned().expect("a descriptor");
    drop(store);
    Store::reopen(NodeId(0), fd).expect("it can be taken over")
}

#[test]
fn what_was_being_written_when_the_writer_died_is_free() {
    let store = Store::create(NodeId(0), 1 << 20).expect("a store");
    let mut builder = store.begin_snapshot(DOMAIN, FUNCTION);
    for n in 0..4u8 {
        builder.push(0x1000 * u64::from(n + 1), &page(n)).expect("room");
    }
    let base = builder.finish().expect("room");
    let id = base.id();
    let kept = store.put_image(&[b"kept"], &[id]).expect("room").extent();
    let before = store.usage();
    // Neither of these was told to anybody.
    let _lost = store.put_image(&[&[1; 9000]], &[id]).expect("room");
    let mut torn = store.begin_snapshot(DOMAIN, FUNCTION);
    torn.push(0, &page(9)).expect("room");
    torn.push(0x1000, &page(1)).expect("room");
    std::mem::forget(torn);
    drop(base);

    let store = take_over(store);
    let image = store.adopt_image(kept, &[id]).expect("it is there");
    let overlapping = store.adopt_image(kept, &[id]);
    assert!(matches!(overlapping, Err(StoreError::Overlap(extent)) if extent == kept));
    store.release_rest();
    assert_eq!(store.usage(), StoreUse { index: store.usage().index, ..before });
    assert_eq!(before.snapshots + before.images, resident(&store));
    assert_eq!(&store.memory().bytes(image.extent())[..4], b"kept");
    let base = store.snapshot(id).expect("it is there");
    assert_eq!((base.domain(), base.function(), base.pages()), (DOMAIN, FUNCTION, 4));
    assert_eq!(base.page_at(0x3000), Some(2));
    assert_eq!(store.page(&base, 3), Some(&page(3)));
    assert_eq!(store.equal_page(DOMAIN, &page(1)).map(|p| (p.snapshot, p.page)), Some((id, 1)));
    assert_eq!(store.equal_page(DOMAIN, &page(9)), None);
    let next = store.begin_snapshot(DOMAIN, FUNCTION).id();
    assert!(next.number > id.number + 1, "numbers are never used again");
}

#[test]
fn a_file_that_is_no_store_is_refused() {
    let memory = medes_store::SharedMemory::create(64).expect("a memory file");
    let fd = memory.descriptor().try_clone_to_owned().expect("a descriptor");
    assert!(matches!(Store::reopen(NodeId(0), fd), Err(ReopenError::NotAStore)));
}

proptest! {
    /// Snapshots and images come and go in any order: what is left at the end is nothing, and
    /// what is there has the content that was put in.
    #[test]
    fn everything_is_given_back(ops in proptest::collection::vec((0u8..5, any::<u8>(), 1usize..12), 1..60)) {
        let mut store = Store::create(NodeId(0), 1 << 20).expect("a store");
        let mut snapshots = Vec::new();
        let mut images = Vec::new();
        for (kind, seed, n) in ops {
            match kind {
                0 => {
                    let mut builder = store.begin_snapshot(DOMAIN, FUNCTION);
                    let mut contents = Vec::new();
                    for i in 0..n {
                        let content = page(seed.wrapping_add(i as u8) & 0x1f);
                        if builder.push((i as u64) << 12, &content).is_ok() {
                            contents.push(content);
                        }
                    }
                    if seed & 1 == 0 && let Ok(snapshot) = builder.finish() {
                        snapshots.push((snapshot.id(), contents));
                    }
                }
                1 => {
                    let refers: Vec<_> = snapshots.iter().take(n).map(|(id, _)| *id).collect();
                    let image = store.put_image(&[&vec![seed; n * 1000]], &refers);
                    images.extend(image.ok());
                }
                2 if n % 3 == 0 => {
                    let before = store.usage();
                    store = take_over(store);
                    for image in &mut images {
                        *image = store
                            .adopt_image(image.extent(), image.snapshots())
                            .expect("it is there");
                    }
                    store.release_rest();
                    let index = store.usage().index;
                    prop_assert_eq!(store.usage(), StoreUse { index, ..before });
                }
                3 if !images.is_empty() => {
                    store.remove_image(images.swap_remove(n % images.len()));
                }
                4 if !snapshots.is_empty() => {
                    let (id, _) = snapshots.swap_remove(n % snapshots.len());
                    store.retire_snapshot(id);
                }
                _ => {}
            }
            for (id, contents) in &snapshots {
                let snapshot = store.snapshot(*id).expect("it is not retired");
                for (i, content) in contents.iter().enumerate() {
                    prop_assert_eq!(store.page(&snapshot, i as u32), Some(content));
                }
            }
            let used = store.usage();
            prop_assert_eq!(used.snapshots + used.images, resident(&store));
        }
        for image in images {
            store.remove_image(image);
        }
        for (id, _) in snapshots {
            store.retire_snapshot(id);
        }
        prop_assert_eq!(store.usage().snapshots + store.usage().images, 0);
        prop_assert_eq!(resident(&store), 0);
    }
}
