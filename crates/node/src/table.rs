//! The node's sandboxes, and what is known of each.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use medes_agent::dedup::Cancel;
use medes_core::{DomainId, FunctionId, FunctionName, RequestId, SandboxId};
use medes_memory::userfault::UserFault;
use medes_sandbox::Cgroup;
use medes_store::ImageHandle;
use parking_lot::Mutex;

use crate::label::Label;

/// What the node knows of a sandbox.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) id: SandboxId,
    pub(crate) function: FunctionId,
    pub(crate) name: FunctionName,
    pub(crate) domain: DomainId,
    pub(crate) cgroup: Cgroup,
    pub(crate) host_uid: u32,
    /// Makes the dedup operation that is under way, or the next one, give up. Another one takes its
    /// place with each answer.
    pub(crate) cancel: Mutex<Arc<Cancel>>,
    /// Held for as long as a dedup operation is under way.
    pub(crate) operating: Mutex<()>,
    /// Set when the sandbox is no more.
    pub(crate) gone: AtomicBool,
    /// Set before the sandbox is killed on purpose: its end is no news then.
    pub(crate) doomed: AtomicBool,
    /// The request that came along with the newest restore, until somebody waits for its answer.
    pub(crate) handed: Mutex<Option<RequestId>>,
    /// The most private memory that it was seen to have, bytes.
    pub(crate) most_private: AtomicU64,
    /// What a dedup sandbox has in the page store.
    pub(crate) dedup: Mutex<Option<Deduplicated>>,
}

impl Entry {
    pub(crate) fn new(
        id: SandboxId,
        label: Label,
        cgroup: Cgroup,
        dedup: Option<Deduplicated>,
    ) -> Self {
        let Label { function, name, domain, host_uid } = label;
        Self {
            id,
            function,
            name,
            domain,
            cgroup,
            host_uid,
            cancel: Mutex::default(),
            operating: Mutex::default(),
            gone: false.into(),
            doomed: false.into(),
            handed: Mutex::default(),
            most_private: 0.into(),
            dedup: Mutex::new(dedup),
        }
    }
}

/// What a dedup sandbox has outside its own process.
#[derive(Debug)]
pub(crate) struct Deduplicated {
    /// Its image.
    pub(crate) image: ImageHandle,
    /// A second holder of its userfaultfds: should the keeper die, missing pages block instead of
    /// reading as zeros until the sandbox is killed.
    pub(crate) userfaults: Vec<UserFault>,
    /// The number of the restore that is bringing its memory back, or has, if it runs again. The
    /// image stays then for as long as the memory is watched: the next dedup costs only what has
    /// been written.
    pub(crate) restore: Option<u64>,
}

/// All sandboxes of the node.
#[derive(Debug, Default)]
pub(crate) struct Table {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    sandboxes: HashMap<SandboxId, Arc<Entry>>,
    uids: BTreeSet<u32>,
}

/// How many user ids sandboxes of a node share among them.
const UIDS: u32 = 60_000;

impl Table {
    /// A user id that no other sandbox has.
    pub(crate) fn take_uid(&self, base: u32) -> Option<u32> {
        let mut inner = self.inner.lock();
        let free = (base..base.saturating_add(UIDS)).find(|uid| !inner.uids.contains(uid))?;
        inner.uids.insert(free);
        Some(free)
    }

    pub(crate) fn give_uid_back(&self, uid: u32) {
        self.inner.lock().uids.remove(&uid);
    }

    pub(crate) fn insert(&self, entry: Arc<Entry>) {
        self.inner.lock().sandboxes.insert(entry.id, entry);
    }

    /// Takes in a sandbox that has its user id already.
    pub(crate) fn adopt(&self, entry: Arc<Entry>) {
        self.inner.lock().uids.insert(entry.host_uid);
        self.insert(entry);
    }

    pub(crate) fn get(&self, id: SandboxId) -> Option<Arc<Entry>> {
        self.inner.lock().sandboxes.get(&id).cloned()
    }

    /// Forgets a sandbox; what it held is the caller's to give back.
    pub(crate) fn remove(&self, id: SandboxId) -> Option<Arc<Entry>> {
        let mut inner = self.inner.lock();
        let entry = inner.sandboxes.remove(&id)?;
        inner.uids.remove(&entry.host_uid);
        Some(entry)
    }

    pub(crate) fn all(&self) -> Vec<Arc<Entry>> {
        self.inner.lock().sandboxes.values().cloned().collect()
    }
}
