//! From one daemon to the next: what the one left in the middle, and what the other has to know.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use medes_agent::dedup::let_run;
use medes_memory::session::{Freezer, try_on_tracer_thread};
use medes_sandbox::Cgroup;

use super::{Held, Memory, Orphan};
use crate::protocol::{Holding, Listed, Whereabouts};

/// How long a sandbox that is being frozen may take for it.
const FREEZE_LIMIT: Duration = Duration::from_secs(2);
/// How long a process that was killed may take to die.
const DEATH_LIMIT: Duration = Duration::from_secs(2);

impl Held {
    /// The daemon is gone: whatever it left unfinished comes to a state that another daemon can go
    /// on from. Blocks.
    pub(crate) fn orphan(self: &Arc<Self>) {
        if self.has_died() {
            return;
        }
        let (suspended, held) = {
            let mut state = self.lock();
            if state.ended.is_some() {
                return;
            }
            let starting = state.starting.take().map(|_| Orphan::Start);
            let pending = state.pending.take().map(|_| Orphan::Request);
            if let Some(orphan) = starting.or(pending) {
                state.orphan = Some(orphan);
                if let Some(deadline) = state.deadline {
                    tokio::spawn(Arc::clone(self).end_at(deadline));
                }
            }
            (matches!(state.memory, Memory::Suspended(_)), matches!(state.memory, Memory::Held(..)))
        };
        let cgroup = self.running.cgroup();
        let is_to_be_frozen = cgroup.is_to_be_frozen().unwrap_or(false);
        if held && !is_to_be_frozen {
            // It would run without the memory that has gone.
            tracing::error!(sandbox = %self.id, "not frozen, without its memory: it is killed");
            self.kill();
        }
        if held {
            return;
        }
        if suspended && let Err(error) = self.resume() {
            tracing::error!(sandbox = %self.id, error, "it is killed");
            return;
        }
        let thaw = || try_on_tracer_thread(|| let_run(&mut Group(cgroup))).flatten();
        if is_to_be_frozen && let Err(error) = thaw() {
            tracing::error!(sandbox = %self.id, %error, "it can't be thawed and is killed");
            self.kill();
        }
    }

    /// Whether the sandbox has died with the daemon, which had it stopped. A process that was told
    /// to die takes a moment for it; what is to be taken over must not be about to.
    fn has_died(&self) -> bool {
        for _ in 0..DEATH_LIMIT.as_millis() {
            if self.is_dead() {
                return true;
            }
            if !is_dying(self.running.pid()) {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        false
    }

    fn is_dead(&self) -> bool {
        !matches!(self.running.wait_status(), Ok(None))
    }

    /// Kills the sandbox if it is still busy for nobody at its deadline.
    async fn end_at(self: Arc<Self>, deadline: tokio::time::Instant) {
        tokio::time::sleep_until(deadline).await;
        let overdue = {
            let state = self.lock();
            state.orphan.is_some() && state.deadline == Some(deadline)
        };
        if overdue {
            tracing::info!(sandbox = %self.id, "out of time; killed");
            self.kill();
        }
    }

    /// What another daemon has to know; `None` if it has ended or was told to. The descriptors named
    /// are put into `descriptors`, so that they stay what they are.
    pub(crate) fn list(&self, descriptors: &mut Vec<OwnedFd>) -> Option<Listed> {
        let state = self.lock();
        if state.ended.is_some() || self.ended_here.load(Ordering::Acquire) || self.is_dead() {
            return None;
        }
        let mut keep = |userfaults: Vec<OwnedFd>| {
            let numbers = userfaults.iter().map(AsRawFd::as_raw_fd).collect();
            descriptors.extend(userfaults);
            numbers
        };
        let memory = match &state.memory {
            Memory::Present => Whereabouts::Present,
            Memory::Held(image, _) => {
                let userfaults = image.userfaults().iter().map(OwnedFd::try_clone);
                let userfaults = keep(userfaults.collect::<Result<_, _>>().unwrap_or_default());
                Whereabouts::Away(Holding { image: image.image(), userfaults })
            }
            Memory::Returning(memory) | Memory::Suspended(memory) => match memory.image() {
                Some(image) => {
                    let userfaults = keep(memory.userfaults());
                    Whereabouts::Returning(memory.number(), Holding { image, userfaults })
                }
                // All of it has just come back.
                None => Whereabouts::Present,
            },
        };
        let busy = state.orphan.is_some() || state.starting.is_some() || state.pending.is_some();
        Some(Listed { sandbox: self.id, label: self.label.clone(), busy, memory })
    }
}

/// Whether a process has been killed and is on its way to its end: SIGKILL is pending, or its
/// memory is gone.
fn is_dying(pid: i32) -> bool {
    const SIGKILL: u64 = 1 << 8;
    let Ok(status) = std::fs::read_to_string(format!("/proc/{pid}/status")) else { return true };
    let is_pending = |field: &str| {
        let mask = status.lines().find_map(|line| line.strip_prefix(field));
        mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
            .is_some_and(|mask| mask & SIGKILL != 0)
    };
    is_pending("SigPnd:") || is_pending("ShdPnd:") || !status.contains("\nVmSize:")
}

/// A sandbox's processes as a group that can be frozen.
struct Group<'a>(&'a Cgroup);

impl Freezer for Group<'_> {
    fn freeze(&mut self) -> std::io::Result<()> {
        self.0.freeze(FREEZE_LIMIT).map_err(std::io::Error::other)
    }

    fn thaw(&mut self) -> std::io::Result<()> {
        self.0.thaw().map_err(std::io::Error::other)
    }

    fn processes(&mut self) -> std::io::Result<Vec<i32>> {
        self.0.processes().map_err(std::io::Error::other)
    }
}
