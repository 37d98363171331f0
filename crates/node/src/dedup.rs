//! The dedup operation on a sandbox of this node.

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use medes_agent::dedup::{
    Cancel, DedupError, Handover, Hindrance, Holder, Operation, Options, Previous, Subject,
};
use medes_agent::view::SpaceView;
use medes_core::{MemoryUse, SandboxId};
use medes_keeper::protocol::{Command, Hold, Reply};
use medes_keeper::{Keeper, KeeperError};
use medes_memory::session::{Freezer, Thaw};
use medes_registry::{Near, Scope};
use medes_sandbox::Cgroup;
use medes_store::{ImageHandle, StoreError};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::oneshot;

use crate::api::{DedupFailure, DedupMode, DedupReport};
use crate::shared::{Shared, micros};
use crate::table::{Deduplicated, Entry};

/// How long a sandbox may take to freeze. It takes well below a millisecond unless a thread is in
/// an uninterruptible system call.
const FREEZE_LIMIT: Duration = Duration::from_millis(500);

/// At most one byte in so many is taken by what stays so that restores are fast: without that the dedup
/// state would be of little use.
const RESIDENT_SHARE: u64 = 6;

/// A restore may take one part in so many of what a request takes of the function: few would notice
/// less, and memory is better used.
const RESTORE_SHARE: u32 = 16;

type Answer = Result<DedupReport, DedupFailure>;

/// Runs the operation on a thread of its own, which ends with it: the kernel ties stopped
/// processes to the thread that stopped them.
pub(crate) async fn run(shared: Arc<Shared>, entry: Arc<Entry>, mode: DedupMode) -> Answer {
    let is_dedup = entry.dedup.lock().as_ref().is_some_and(|dedup| dedup.restore.is_none());
    if is_dedup {
        // What has stayed of it can go as after any other restore.
        let restored = shared.restore(entry.id, false, false, None).await;
        restored.map_err(|why| DedupFailure::Lost(why.to_string()))?;
    }
    let (done, wait) = oneshot::channel();
    let spawned = std::thread::Builder::new().name("dedup".into()).spawn(move || {
        let answer = Arc::new(Answering { entry: Arc::clone(&entry), done: Some(done).into() });
        let cancel = Arc::clone(&entry.cancel.lock());
        // Weak: an operation that panics takes the answer along, and whoever waits hears of it.
        let early = Arc::downgrade(&answer);
        cancel.when_back(move || {
            if let Some(early) = early.upgrade() {
                early.give(Err(DedupFailure::Cancelled));
            }
        });
        // It runs until it is frozen.
        cancel.arm(Box::new(|| Ok(())));
        answer.give(match my_turn(&entry, &cancel) {
            Some(_operating) => operate(&shared, &entry, mode, &cancel),
            None => Err(DedupFailure::Cancelled),
        });
        if entry.gone.load(Ordering::SeqCst) {
            shared.drop_image(&entry);
            shared.drop_unused_of(entry.function);
        }
    });
    if let Err(error) = spawned {
        let reason = format!("no thread for the operation: {error}");
        return Err(DedupFailure::StaysWarm { reason, lasting: false });
    }
    wait.await.unwrap_or_else(|_| Err(DedupFailure::Lost("the operation panicked".into())))
}

/// Who waits for an operation's answer.
struct Answering {
    entry: Arc<Entry>,
    done: Mutex<Option<oneshot::Sender<Answer>>>,
}

impl Answering {
    /// Answers, if nobody has yet.
    fn give(&self, answer: Answer) {
        if let Some(done) = self.done.lock().take() {
            *self.entry.cancel.lock() = Arc::default();
            let _ = done.send(answer);
        }
    }
}

/// Waits for the operation before, which may have been cancelled and still be putting its things
/// away; `None` if this one is cancelled too meanwhile.
fn my_turn<'a>(entry: &'a Entry, cancel: &Cancel) -> Option<MutexGuard<'a, ()>> {
    const LOOK_AGAIN: Duration = Duration::from_micros(500);
    loop {
        if let Some(turn) = entry.operating.try_lock_for(LOOK_AGAIN) {
            return Some(turn);
        }
        if cancel.is_requested() {
            return None;
        }
    }
}

fn operate(shared: &Shared, entry: &Entry, mode: DedupMode, cancel: &Cancel) -> Answer {
    let begin = Instant::now();
    // It may have answered a moment ago, and is on its way to its next call. That is not the time
    // to stop it: what it says to the keeper has to be said.
    let idle = shared.keeper().order_blocking(Command::Idle { sandbox: entry.id });
    idle.map_err(|e| DedupFailure::StaysWarm { reason: e.to_string(), lasting: false })?;
    let mut previous = if mode.new_base { None } else { previous(shared, entry)? };
    if previous.is_none() {
        bring_all_back(shared, entry)?;
    }
    let before = shared.memory_use(entry);
    let base_before = shared.store.usage().snapshots;
    let residents = match mode.new_base {
        true => Vec::new(),
        false => residents(shared, entry, &before, mode)?,
    };
    let holder =
        KeeperHolds { keeper: shared.keeper(), sandbox: entry.id, restore: OnceLock::new() };
    let operation = Operation {
        store: &shared.store,
        registry: &shared.registry,
        subject: Subject {
            domain: entry.domain,
            function: entry.function,
            near: Near { node: shared.config.node, function: entry.function },
            scope: Scope::Any,
        },
        options: Options {
            fingerprints: shared.fingerprints,
            workers: shared.config.dedup.workers,
            new_base: mode.new_base,
        },
        residents: &residents,
        cancel,
    };
    let attempt =
        |previous: Option<&Previous>| operation.dedup(Group(&entry.cgroup), &holder, previous);
    let mut result = attempt(previous.as_ref());
    if let (Some(_), Err(DedupError::StaysWarm(why))) = (&previous, &result) {
        tracing::debug!(sandbox = %entry.id, %why, "all of it is read again");
        previous = None;
        bring_all_back(shared, entry)?;
        result = attempt(None);
    }
    if let Err(DedupError::StaysWarm(Hindrance::Store(StoreError::Full(_)))) = &result
        // What nobody uses gives way.
        && shared.make_room(entry.function) + release_watched(shared, entry) > 0
    {
        result = attempt(previous.as_ref());
    }
    let done = result.map_err(|error| match error {
        DedupError::Cancelled => DedupFailure::Cancelled,
        DedupError::StaysWarm(why) => {
            DedupFailure::StaysWarm { reason: why.to_string(), lasting: why.is_lasting() }
        }
        DedupError::Lost(why) => DedupFailure::Lost(why),
    })?;
    let counts = done.counts;
    tracing::debug!(sandbox = %entry.id, ?counts, "deduplicated");
    let restore = holder.restore.get().copied();
    let dedup = Deduplicated { image: done.image, userfaults: done.userfaults, restore };
    if let Some(before) = entry.dedup.lock().replace(dedup) {
        shared.store.remove_image(before.image);
    }
    if done.taken_back {
        return Err(DedupFailure::Cancelled);
    }
    Ok(DedupReport {
        pages: counts.pages,
        zero_pages: counts.zero,
        equal_pages: counts.equal,
        patched_pages: counts.patched,
        unique_pages: counts.unique,
        foreign_pages: counts.foreign,
        reused_pages: counts.reused,
        kept_pages: counts.kept,
        base_bytes: shared.store.usage().snapshots.saturating_sub(base_before),
        before,
        after: shared.memory_use(entry),
        total_us: micros(begin),
        encode_us: counts.encode_us,
        commit_us: counts.commit_us,
    })
}

/// What of a sandbox stays, that takes so much memory now, or less than it needs if some is away.
fn residents(
    shared: &Shared,
    entry: &Entry,
    now: &MemoryUse,
    mode: DedupMode,
) -> Result<Vec<Vec<Range<u64>>>, DedupFailure> {
    let target = match shared.config.dedup.restore_target {
        target if mode.residents && !target.is_zero() => {
            target.max(Duration::from_micros(mode.execution_us) / RESTORE_SHARE)
        }
        // Only what takes next to no memory.
        _ => Duration::ZERO,
    };
    let target_us = u64::try_from(target.as_micros()).unwrap_or(u64::MAX);
    let before = entry.most_private.fetch_max(now.private, Ordering::Relaxed);
    let most = before.max(now.private) / RESIDENT_SHARE;
    let command = Command::Residents { sandbox: entry.id, target_us, most };
    match shared.keeper().call_blocking(command) {
        Ok(Reply::Residents(residents)) => Ok(residents),
        Ok(Reply::Refused(why)) => Err(warm(why)),
        Ok(_) => Err(warm(KeeperError::Protocol.to_string())),
        Err(error) => Err(warm(error.to_string())),
    }
}

/// What the operation before left, if the sandbox was restored since and its base snapshots are
/// still to be used.
fn previous(shared: &Shared, entry: &Entry) -> Result<Option<Previous>, DedupFailure> {
    let dedup = entry.dedup.lock();
    let Some(Deduplicated { image, userfaults, restore }) = &*dedup else { return Ok(None) };
    if restore.is_none() {
        return Err(warm("the sandbox is in the dedup state already".into()));
    }
    let previous = Previous::of(&shared.store, Arc::clone(&shared.view), image, userfaults);
    previous.map_err(|error| warm(error.to_string()))
}

/// Lets go of the images of other sandboxes that run with all their memory. Returns how many.
fn release_watched(shared: &Shared, except: &Entry) -> usize {
    let mut released = 0;
    for entry in shared.table.all().iter().filter(|entry| entry.id != except.id) {
        let Some(_operating) = entry.operating.try_lock() else { continue };
        let runs = entry.dedup.lock().as_ref().is_some_and(|dedup| dedup.restore.is_some());
        if runs && bring_all_back(shared, entry).is_ok() {
            released += 1;
        }
    }
    released
}

fn warm(reason: String) -> DedupFailure {
    DedupFailure::StaysWarm { reason, lasting: false }
}

/// Memory that is still on its way back since the last restore comes back first, and is watched no
/// longer.
pub(crate) fn bring_all_back(shared: &Shared, entry: &Entry) -> Result<(), DedupFailure> {
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

    fn thawer(&self) -> Option<Thaw> {
        let cgroup = self.0.clone();
        Some(Box::new(move || cgroup.thaw().map_err(io::Error::other)))
    }
}

/// The keeper takes hold.
struct KeeperHolds {
    keeper: Keeper,
    sandbox: SandboxId,
    /// The number of the restore that a request began before all was dropped.
    restore: OnceLock<u64>,
}

impl KeeperHolds {
    fn order(&self, command: Command) -> Result<(), String> {
        self.keeper.order_blocking(command).map_err(|e| e.to_string())
    }

    fn call(&self, command: Command) -> Result<Reply, String> {
        self.call_while(command, || {})
    }

    fn call_while(&self, command: Command, meanwhile: impl FnOnce()) -> Result<Reply, String> {
        match self.keeper.call_blocking_while(command, meanwhile) {
            Ok(Reply::Refused(why)) => Err(why),
            Ok(reply) => Ok(reply),
            Err(error) => Err(error.to_string()),
        }
    }
}

impl Holder for KeeperHolds {
    fn examine(&self, image: &ImageHandle) -> Result<(), String> {
        self.order(Command::Examine { sandbox: self.sandbox, image: image.extent() })
    }

    fn hold(&self, handover: &Handover<'_>) -> Result<(), String> {
        self.order(Command::Hold(Hold {
            sandbox: self.sandbox,
            image: handover.image.extent(),
            userfaults: handover.userfaults.iter().map(AsRawFd::as_raw_fd).collect(),
            written: handover.written.to_vec(),
            residents: handover.residents.to_vec(),
        }))
    }

    fn release(&self) {
        let sandbox = self.sandbox;
        if let Err(error) = self.order(Command::Release { sandbox }) {
            tracing::warn!(%sandbox, %error, "the keeper did not let go");
        }
    }

    fn left(&self, ranges: &[Vec<Range<u64>>]) -> Result<(), String> {
        self.order(Command::Left { sandbox: self.sandbox, ranges: ranges.to_vec() })
    }

    fn take_back(
        &self,
        left: &[Vec<Range<u64>>],
        meanwhile: &mut dyn FnMut(),
    ) -> Result<(), String> {
        let command = Command::TakeBack { sandbox: self.sandbox, left: left.to_vec() };
        match self.call_while(command, meanwhile)? {
            Reply::Restored(done) => {
                let _ = self.restore.set(done.number);
                Ok(())
            }
            _ => Err(KeeperError::Protocol.to_string()),
        }
    }

    fn put_back(&self) -> Result<(), String> {
        let sandbox = self.sandbox;
        match self.call(Command::Restore { sandbox, fill: false, prefetch: true, request: None })? {
            Reply::Restored(_) => self.order(Command::Complete { sandbox }),
            _ => Err(KeeperError::Protocol.to_string()),
        }
    }

    fn suspend(&self) -> Result<Vec<SpaceView>, String> {
        match self.call(Command::Suspend { sandbox: self.sandbox })? {
            Reply::Suspended(views) => Ok(views),
            _ => Err(KeeperError::Protocol.to_string()),
        }
    }

    fn resume(&self) -> Result<(), String> {
        self.order(Command::Resume { sandbox: self.sandbox })
    }
}
