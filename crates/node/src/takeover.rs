//! Going on from where an earlier node, now dead, had to stop: its keeper and its sandboxes are
//! there, its page store is in the keeper's hands.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::time::Duration;

use medes_agent::RestoreError;
use medes_agent::image::{ProcessTable, Table as ImageTable};
use medes_agent::index::ImageIndex;
use medes_core::{FunctionId, SandboxState};
use medes_keeper::protocol::Command;
use medes_keeper::{Inherited, InheritedMemory, Keeper, KeeperError, Unasked};
use medes_memory::userfault::{UserFault, UserFaultFeatures};
use medes_pages::{Fingerprint, Fingerprinter, PAGE_SIZE};
use medes_registry::Registry;
use medes_sandbox::{CgroupError, CgroupRoot};
use medes_store::{ReopenError, Store, StoreError, View};
use tokio::sync::mpsc;

use crate::api::{Inheritance, InheritedSandbox};
use crate::config::NodeConfig;
use crate::label::Label;
use crate::recovery;
use crate::shared::Shared;
use crate::table::{Deduplicated, Entry, Table};

/// How long what is left of a dead sandbox may take to go away.
const REMOVE_LIMIT: Duration = Duration::from_secs(10);

/// Why a node can't go on from where the one before had to stop.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TakeoverError {
    #[error(transparent)]
    Keeper(#[from] KeeperError),
    #[error("its sandboxes are in the cgroup {0:?}, and [node] cgroup names another")]
    OtherCgroup(String),
    #[error(transparent)]
    Store(#[from] ReopenError),
    #[error("mapping the page store: {0}")]
    View(std::io::Error),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

/// What could not be taken over of a sandbox.
#[derive(Debug, thiserror::Error)]
enum Unusable {
    #[error("{0}")]
    Label(String),
    #[error(transparent)]
    Image(#[from] RestoreError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

/// What a node begins with instead of nothing.
pub(crate) struct TakenOver {
    pub(crate) keeper: Keeper,
    pub(crate) news: mpsc::UnboundedReceiver<Unasked>,
    pub(crate) store: Store,
    pub(crate) view: Arc<View>,
    pub(crate) table: Table,
    pub(crate) inheritance: Inheritance,
}

/// Takes over what an earlier node left; `None` if there is no keeper that lives.
pub(crate) async fn take_over(
    config: &NodeConfig,
    root: &CgroupRoot,
) -> Result<Option<TakenOver>, TakeoverError> {
    if recovery::running_keeper(&config.run_dir).is_none() {
        return Ok(None);
    }
    let socket = recovery::keeper_socket(&config.run_dir);
    let log = recovery::keeper_log(&config.run_dir);
    let (tell, news) = mpsc::unbounded_channel();
    let (keeper, inherited) = Keeper::take_over(&socket, &log, tell).await?;
    if inherited.cgroup != config.cgroup {
        return Err(TakeoverError::OtherCgroup(inherited.cgroup));
    }
    let view = inherited.store.try_clone().and_then(View::open);
    let view = Arc::new(view.map_err(TakeoverError::View)?);
    let store = Store::reopen(config.node, inherited.store)?;
    let table = Table::default();
    let mut inheritance = Inheritance::default();
    for sandbox in inherited.sandboxes {
        let (id, busy) = (sandbox.sandbox, sandbox.busy);
        match adopt(root, &store, &view, sandbox) {
            Ok((entry, warm_bytes)) => {
                let state = state(&entry, busy);
                let kept_bytes = match state {
                    SandboxState::Dedup => entry.cgroup.memory().map_or(0, |m| m.anon),
                    _ => 0,
                };
                inheritance.sandboxes.push(InheritedSandbox {
                    sandbox: id,
                    function: entry.function,
                    domain: entry.domain,
                    state,
                    warm_bytes,
                    kept_bytes,
                });
                table.adopt(Arc::new(entry));
            }
            Err(why) => {
                tracing::error!(sandbox = %id, %why, "a sandbox can't be taken over; it is killed");
                keeper.order(Command::Kill { sandbox: id }).await?;
            }
        }
    }
    store.release_rest();
    inheritance.bases = bases(&store);
    remove_unknown(root, &table)?;
    Ok(Some(TakenOver { keeper, news, store, view, table, inheritance }))
}

fn state(entry: &Entry, busy: bool) -> SandboxState {
    let away = entry.dedup.lock().as_ref().is_some_and(|dedup| dedup.restore.is_none());
    match (away, busy) {
        (true, _) => SandboxState::Dedup,
        (false, true) => SandboxState::Running,
        (false, false) => SandboxState::Warm,
    }
}

/// A sandbox's entry as it was, and what it uses with all its memory there, bytes.
fn adopt(
    root: &CgroupRoot,
    store: &Store,
    view: &Arc<View>,
    sandbox: Inherited,
) -> Result<(Entry, u64), Unusable> {
    let Inherited { sandbox: id, label, memory, .. } = sandbox;
    let label = Label::decode(&label).map_err(Unusable::Label)?;
    let cgroup = root.get(&id.to_string())?;
    let mut bytes = cgroup.memory().map_or(0, |m| m.anon + m.shmem + m.kernel);
    let mut dedup = None;
    if let Some(InheritedMemory { image, userfaults, restore }) = memory {
        let index = ImageIndex::open(Arc::clone(view), image)?;
        let table = index.table();
        if restore.is_none() {
            let runs = table.processes.iter().flat_map(|process| &process.runs);
            bytes += runs.map(|run| u64::from(run.pages())).sum::<u64>() * PAGE_SIZE as u64;
        }
        let snapshots: Vec<_> = table.snapshots.iter().map(|used| used.id).collect();
        let userfaults = own(table, userfaults);
        dedup = Some(Deduplicated {
            image: store.adopt_image(image, &snapshots)?,
            userfaults,
            restore,
        });
    }
    Ok((Entry::new(id, label, cgroup, dedup), bytes))
}

/// The userfaultfds of an image's processes as this node's own.
fn own(table: &ImageTable, userfaults: Vec<OwnedFd>) -> Vec<UserFault> {
    let features = match table.tracks_writes {
        true => UserFaultFeatures::EVENTS.union(UserFaultFeatures::TRACK_WRITES),
        false => UserFaultFeatures::EVENTS,
    };
    if userfaults.len() != table.processes.len() {
        return Vec::new();
    }
    let pairs = userfaults.into_iter().zip(&table.processes);
    let one = |(descriptor, process): (_, &ProcessTable)| {
        let ranges = process.registered.iter().map(|(start, length)| *start..start + length);
        UserFault::from_parts(descriptor, features, ranges.collect(), None)
    };
    pairs.map(one).collect()
}

/// How many base snapshots each function has.
fn bases(store: &Store) -> HashMap<FunctionId, u64> {
    let mut bases = HashMap::new();
    for snapshot in store.snapshots() {
        *bases.entry(snapshot.function()).or_default() += 1;
    }
    bases
}

/// Removes what is left of sandboxes that the keeper does not know (any more).
fn remove_unknown(root: &CgroupRoot, table: &Table) -> Result<(), CgroupError> {
    for name in root.list()? {
        let known = name.parse().is_ok_and(|id| table.get(id).is_some());
        if !known {
            let cgroup = root.get(&name)?;
            if let Err(error) = cgroup.kill(REMOVE_LIMIT) {
                tracing::warn!(%error, "killing what is left of a sandbox");
            }
            if let Err(error) = cgroup.remove(REMOVE_LIMIT) {
                tracing::warn!(%error, "removing what is left of a sandbox");
            }
        }
    }
    Ok(())
}

/// Enters the pages of all base snapshots into the registry again, at low priority.
pub(crate) fn refill_registry(shared: &Arc<Shared>) -> std::io::Result<()> {
    let node = Arc::downgrade(shared);
    std::thread::Builder::new().name("refill".into()).spawn(move || {
        medes_memory::priority::lower_this_thread();
        refill(&node);
    })?;
    Ok(())
}

fn refill(node: &Weak<Shared>) {
    let Some(ids) = node.upgrade().map(|shared| {
        shared.store.snapshots().iter().map(|snapshot| snapshot.id()).collect::<Vec<_>>()
    }) else {
        return;
    };
    for id in ids {
        let Some(shared) = node.upgrade() else { return };
        let Some(snapshot) = shared.store.snapshot(id) else { continue };
        let fingerprinter = Fingerprinter::new(shared.fingerprints);
        let pages: Vec<(u32, Fingerprint)> = (0..snapshot.pages())
            .filter_map(|n| Some((n, fingerprinter.fingerprint(shared.store.page(&snapshot, n)?))))
            .collect();
        let (domain, function) = (snapshot.domain(), snapshot.function());
        if let Err(error) = shared.registry.insert(domain, function, id, &pages) {
            tracing::warn!(%error, snapshot = %id, "the registry took no fingerprints");
        }
        drop(snapshot);
        if shared.store.snapshot(id).is_none() {
            // Given up meanwhile, and kept only because it was being read.
            shared.drop_base(id);
        }
    }
}
