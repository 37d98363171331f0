//! One sandbox in the table.

use medes_core::{FunctionId, SandboxId, SandboxState};
use medes_policy::{DEDUP_FREES_PERCENT, Dedupable, IdleSandbox};

/// What a sandbox is doing. Those that are being started have no entry yet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Phase {
    /// Serves a request.
    Running,
    /// Idle, all memory present.
    Warm,
    /// A dedup operation is under way.
    Deduping,
    /// Idle, deduplicated.
    Dedup,
    /// A restore is under way.
    Restoring,
    /// Being ended; nobody may use it.
    Leaving,
}

/// Why a sandbox is not deduplicated.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct StaysWarm {
    pub(crate) reason: String,
    /// False if another try may go better.
    pub(crate) lasting: bool,
    pub(crate) retry_at_ms: u64,
}

/// One sandbox. Moments are milliseconds on the controller's clock, sizes bytes.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) id: SandboxId,
    pub(crate) function: FunctionId,
    pub(crate) phase: Phase,
    /// Deduping: a waiting request asked for the sandbox.
    pub(crate) claimed: bool,
    /// Restoring: a request has it, as against an operator.
    pub(crate) for_request: bool,
    /// Running, inherited so: no request of this controller's has it.
    pub(crate) inherited: bool,
    /// It may not go back to the pool.
    pub(crate) doomed: bool,
    pub(crate) created_ms: u64,
    /// When it entered its phase.
    pub(crate) since_ms: u64,
    /// Deduping: when it had entered the phase before.
    pub(crate) before_ms: u64,
    /// Deduping: it was dedup already, and what stayed of its working set goes.
    pub(crate) again: bool,
    pub(crate) last_used_ms: u64,
    /// When the policy is to be asked about it.
    pub(crate) ask_at_ms: u64,
    pub(crate) requests: u64,
    pub(crate) dedups: u64,
    pub(crate) restores: u64,
    /// The last known total.
    pub(crate) memory: u64,
    /// Dedup, and Deduping again: what stays of its working set for restores to be fast.
    pub(crate) residents: u64,
    /// The last total while it was warm.
    pub(crate) warm_bytes: u64,
    /// What the page store keeps for it while it is dedup, and until a restore has put all of its
    /// pages back.
    pub(crate) image_bytes: u64,
    pub(crate) stays_warm: Option<StaysWarm>,
}

impl Entry {
    /// A sandbox that was just started, about to run.
    pub(crate) fn new(id: SandboxId, function: FunctionId, now_ms: u64) -> Self {
        Self {
            id,
            function,
            phase: Phase::Running,
            claimed: false,
            for_request: false,
            inherited: false,
            doomed: false,
            created_ms: now_ms,
            since_ms: now_ms,
            before_ms: now_ms,
            again: false,
            last_used_ms: now_ms,
            ask_at_ms: u64::MAX,
            requests: 0,
            dedups: 0,
            restores: 0,
            memory: 0,
            residents: 0,
            warm_bytes: 0,
            image_bytes: 0,
            stays_warm: None,
        }
    }

    pub(crate) fn enter(&mut self, phase: Phase, now_ms: u64) {
        self.phase = phase;
        self.since_ms = now_ms;
        self.claimed = false;
        self.again = false;
        self.for_request = false;
        self.inherited = false;
        self.ask_at_ms = u64::MAX;
    }

    /// What a dedup operation on it frees, bytes, going by what such operations do.
    pub(crate) fn dedup_frees(&self) -> u64 {
        let goes = match self.phase {
            Phase::Dedup => self.residents,
            Phase::Deduping if self.again => self.residents,
            _ => self.memory,
        };
        goes * DEDUP_FREES_PERCENT / 100
    }

    /// What a restore takes beyond what a dedup sandbox has already, bytes: all of its pages, while
    /// the page store still keeps what they are made of.
    pub(crate) fn restore_needs(&self) -> u64 {
        match self.phase {
            Phase::Dedup | Phase::Restoring => {
                (self.warm_bytes + self.image_bytes).saturating_sub(self.memory)
            }
            _ => 0,
        }
    }

    /// Whether it will be at the disposal of waiting requests soon.
    pub(crate) fn on_its_way(&self) -> bool {
        !self.doomed
            && match self.phase {
                Phase::Deduping => self.claimed,
                Phase::Restoring => !self.for_request,
                _ => false,
            }
    }

    /// As the policy sees it; `None` if it is not idle.
    pub(crate) fn idle(&self) -> Option<IdleSandbox> {
        let state = match self.phase {
            Phase::Warm => SandboxState::Warm,
            Phase::Deduping => SandboxState::Deduping,
            Phase::Dedup => SandboxState::Dedup,
            Phase::Running | Phase::Restoring | Phase::Leaving => return None,
        };
        let dedupable = match &self.stays_warm {
            None => Dedupable::Now,
            Some(s) if s.lasting => Dedupable::Never,
            Some(s) => Dedupable::From(s.retry_at_ms),
        };
        Some(IdleSandbox {
            id: self.id,
            function: self.function,
            state,
            since_ms: self.since_ms,
            last_used_ms: self.last_used_ms,
            dedupable,
            memory: self.memory,
        })
    }

    /// Its state as users know it; `None` while it is being ended.
    pub(crate) fn state(&self) -> Option<SandboxState> {
        Some(match self.phase {
            Phase::Running => SandboxState::Running,
            Phase::Warm => SandboxState::Warm,
            Phase::Deduping => SandboxState::Deduping,
            Phase::Dedup => SandboxState::Dedup,
            Phase::Restoring => SandboxState::Restoring,
            Phase::Leaving => return None,
        })
    }
}
