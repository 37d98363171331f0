//! The dedup operation on a sandbox of this node.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use medes_agent::dedup::{DedupError, Hindrance, Holder, Options, Subject, dedup};
use medes_core::SandboxId;
use medes_keeper::Keeper;
use medes_keeper::protocol::{Command, Reply};
use medes_memory::session::Freezer;
use medes_registry::{Near, Scope};
use medes_sandbox::Cgroup;
use medes_store::{ImageHandle, StoreError};
use tokio::sync::oneshot;

use crate::api::{DedupFailure, DedupReport};
use crate::shared::{Shared, micros};
use crate::table::{Deduplicated, Entry};

/// How long a sandbox may take to freeze. It takes well below a millisecond unless a thread is in
/// an uninterruptible system call.
const FREEZE_LIMIT: Duration = Duration::from_millis(500);

/// Runs the operation on a thread of its own, which ends with it: the kernel ties stopped
/// processes to the thread that stopped them.
pub(crate) async fn run(
    shared: Arc<Shared>,
    entry: Arc<Entry>,
    new_base: bool,
) -> Result<DedupReport, DedupFailure> {
    let (done, wait) = oneshot::channel();
    let spawned = std::thread::Builder::new().name("dedup".into()).spawn(move || {
        let result = operate(&shared, &entry, new_base);
        entry.cancel.store(false, Ordering::Release);
        let _ = done.send(result);
    });
    if let Err(error) = spawned {
        let reason = format!("no thread for the operation: {error}");
        return Err(DedupFailure::StaysWarm { reason, lasting: false });
    }
    wait.await.unwrap_or_else(|_| Err(DedupFailure::Lost("the operation panicked".into())))
}

fn operate(shared: &Shared, entry: &Entry, new_base: bool) -> Result<DedupReport, DedupFailure> {
    let begin = Instant::now();
    // It may have answered a moment ago, and is on its way to its next call. That is not the time
    // to stop it: what it says to the keeper has to be said.
    let idle = shared.keeper().order_blocking(Command::Idle { sandbox: entry.id });
    idle.map_err(|e| DedupFailure::StaysWarm { reason: e.to_string(), lasting: false })?;
    bring_all_back(shared, entry)?;
    let before = shared.memory_use(entry);
    let base_before = shared.store.usage().snapshots;
    let subject = Subject {
        domain: entry.domain,
        function: entry.function,
        near: Near { node: shared.config.node, function: entry.function },
        scope: Scope::Any,
    };
    let options = Options {
        fingerprints: shared.fingerprints,
        workers: shared.config.dedup.workers,
        new_base,
    };
    let holder = KeeperHolds { keeper: shared.keeper(), sandbox: entry.id };
    let attempt = || {
        let (store, registry) = (&shared.store, &shared.registry);
        let group = Group(&entry.cgroup);
        dedup(group, store, registry, subject, options, &holder, &entry.cancel)
    };
    let result = match attempt() {
        // What nobody uses gives way.
        Err(DedupError::StaysWarm(Hindrance::Store(StoreError::Full(_))))
            if shared.make_room(entry.function) > 0 =>
        {
            attempt()
        }
        result => result,
    };
    let done = result.map_err(|error| match error {
        DedupError::Cancelled => DedupFailure::Cancelled,
        DedupError::StaysWarm(why) => {
            DedupFailure::StaysWarm { reason: why.to_string(), lasting: why.is_lasting() }
        }
        DedupError::Lost(why) => DedupFailure::Lost(why),
    })?;
    let counts = done.counts;
    let dedup = Deduplicated { image: done.image, userfaults: done.userfaults, restore: None };
    *entry.dedup.lock() = Some(dedup);
    Ok(DedupReport {
        pages: counts.pages,
        zero_pages: counts.zero,
        equal_pages: counts.equal,
        patched_pages: counts.patched,
        unique_pages: counts.unique,
        foreign_pages: counts.foreign,
        kept_pages: counts.kept,
        base_bytes: shared.store.usage().snapshots.saturating_sub(base_before),
        before,
        after: shared.memory_use(entry),
        total_us: micros(begin),
        encode_us: counts.encode_us,
        commit_us: counts.commit_us,
    })
}

/// Memory that is still on its way back since the last restore comes back first.
pub(crate) fn bring_all_back(shared: &Shared, entry: &Entry) -> Result<(), DedupFailure> {
    let warm = |reason: String| DedupFailure::StaysWarm { reason, lasting: false };
    match &*entry.dedup.lock() {
        None => return Ok(()),
        Some(dedup) if dedup.restore.is_none() => {
            return Err(warm("the sandbox is in the dedup state already".into()));
        }
        Some(_) => {}
    }
    let complete = Command::Complete { sandbox: entry.id };
    shared.keeper().order_blocking(complete).map_err(|e| warm(e.to_string()))?;
    shared.drop_image(entry);
    Ok(())
}

/// A sandbox's processes as a group that can be frozen.
pub(crate) struct Group<'a>(pub(crate) &'a Cgroup);

impl Freezer for Group<'_> {
    fn freeze(&mut self) -> io::Result<()> {
        self.0.freeze(FREEZE_LIMIT).map_err(io::Error::other)
    }

    fn thaw(&mut self) -> io::Result<()> {
        self.0.thaw().map_err(io::Error::other)
    }

    fn processes(&mut self) -> io::Result<Vec<i32>> {
        self.0.processes().map_err(io::Error::other)
    }
}

/// The keeper takes hold.
struct KeeperHolds {
    keeper: Keeper,
    sandbox: SandboxId,
}

impl Holder for KeeperHolds {
    fn hold(&self, image: &ImageHandle, userfaults: &[BorrowedFd<'_>]) -> Result<(), String> {
        let command = Command::Hold {
            sandbox: self.sandbox,
            image: image.extent(),
            userfaults: userfaults.iter().map(AsRawFd::as_raw_fd).collect(),
        };
        self.keeper.order_blocking(command).map_err(|e| e.to_string())
    }

    fn release(&self) {
        let sandbox = self.sandbox;
        if let Err(error) = self.keeper.order_blocking(Command::Release { sandbox }) {
            tracing::warn!(%sandbox, %error, "the keeper did not let go");
        }
    }

    fn put_back(&self) -> Result<(), String> {
        match self.keeper.call_blocking(Command::Restore { sandbox: self.sandbox, fill: true }) {
            Ok(Reply::Restored(_)) => Ok(()),
            Ok(Reply::Refused(why)) => Err(why),
            Ok(_) => Err("the keeper speaks another version of the protocol".into()),
            Err(error) => Err(error.to_string()),
        }
    }
}
