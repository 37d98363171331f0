//! Sandboxes, functions and nodes, and the sums over them that results are made of.

use std::collections::{BTreeSet, VecDeque};

use medes_core::{FunctionId, SandboxId, SandboxState};
use medes_policy::{Dedupable, FunctionStats, IdleSandbox, Population};

use crate::node::Node;

/// What a sandbox is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Phase {
    /// The place is free.
    Gone,
    Starting,
    Running,
    Warm,
    Deduping,
    Dedup,
}

/// One sandbox, or the place for one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sandbox {
    pub(crate) phase: Phase,
    pub(crate) function: u32,
    pub(crate) node: u32,
    /// Sandboxes are numbered by age.
    pub(crate) number: u64,
    /// Counts changes of phase: events of an earlier one are out of date.
    pub(crate) epoch: u32,
    pub(crate) since_ms: u64,
    pub(crate) last_used_ms: u64,
    /// When the policy wants to be asked.
    pub(crate) ask_us: u64,
    /// When an event for that comes; `u64::MAX` if none is noted.
    pub(crate) timer_us: u64,
    /// What it is charged for, bytes.
    pub(crate) memory: u64,
    /// Its place in its node's list of idle ones.
    pub(crate) idle_at: u32,
    /// How long its start takes.
    pub(crate) startup_us: u64,
}

impl Sandbox {
    pub(crate) fn view(&self, slot: u32, dedupable: Dedupable) -> IdleSandbox {
        IdleSandbox {
            id: SandboxId(u64::from(slot)),
            function: FunctionId(u64::from(self.function)),
            state: match self.phase {
                Phase::Dedup => SandboxState::Dedup,
                Phase::Deduping => SandboxState::Deduping,
                _ => SandboxState::Warm,
            },
            since_ms: self.since_ms,
            last_used_ms: self.last_used_ms,
            dedupable,
            memory: self.memory,
        }
    }

    /// The key by which the last used of several is taken.
    pub(crate) fn key(&self, slot: u32) -> (u64, u64, u32) {
        (self.last_used_ms, self.number, slot)
    }
}

/// A request that waits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Waiting {
    pub(crate) request: u64,
    pub(crate) arrived_us: u64,
    pub(crate) execution_us: u64,
    pub(crate) bits: u64,
}

/// One function.
#[derive(Default)]
pub(crate) struct Function {
    pub(crate) stats: FunctionStats,
    pub(crate) warm: BTreeSet<(u64, u64, u32)>,
    pub(crate) deduping: BTreeSet<(u64, u64, u32)>,
    pub(crate) dedup: BTreeSet<(u64, u64, u32)>,
    pub(crate) running: u32,
    pub(crate) starting: u32,
    pub(crate) waiting: VecDeque<Waiting>,
    pub(crate) last_used_ms: u64,
    /// Counts arrivals, so that a sandbox is not made ahead of one that has come.
    pub(crate) arrivals: u32,
}

impl Function {
    pub(crate) fn sandboxes(&self) -> u32 {
        self.running
            + self.starting
            + (self.warm.len() + self.deduping.len() + self.dedup.len()) as u32
    }

    pub(crate) fn note_population(&mut self) {
        self.stats.population = Population {
            warm: self.running + self.starting + self.warm.len() as u32,
            dedup: (self.deduping.len() + self.dedup.len()) as u32,
        };
    }
}

/// Base snapshots of one function of the profile, which all functions made of its code share.
#[derive(Default)]
pub(crate) struct Family {
    /// Where they are.
    pub(crate) bases: Vec<u32>,
    /// Dedup sandboxes, and those on their way.
    pub(crate) dedup: u32,
}

/// Sums over all nodes.
#[derive(Clone, Copy, Default)]
pub(crate) struct Totals {
    pub(crate) warm_bytes: u64,
    pub(crate) dedup_bytes: u64,
    pub(crate) base_bytes: u64,
    pub(crate) running: u32,
    pub(crate) warm: u32,
    pub(crate) dedup: u32,
    pub(crate) waiting: u32,
}

impl Totals {
    pub(crate) fn used(&self) -> u64 {
        self.warm_bytes + self.dedup_bytes + self.base_bytes
    }
}

/// Means over time: what is added up is byte-seconds.
#[derive(Clone, Copy, Default)]
pub(crate) struct Areas {
    from_us: u64,
    at_us: u64,
    warm: f64,
    dedup: f64,
    base: f64,
    pub(crate) peak: u64,
}

impl Areas {
    /// Takes in that `totals` held until now.
    pub(crate) fn advance(&mut self, now_us: u64, totals: &Totals) {
        let seconds = now_us.saturating_sub(self.at_us) as f64 / 1e6;
        if seconds > 0.0 {
            self.warm += totals.warm_bytes as f64 * seconds;
            self.dedup += totals.dedup_bytes as f64 * seconds;
            self.base += totals.base_bytes as f64 * seconds;
            self.at_us = now_us;
        }
        self.peak = self.peak.max(totals.used());
    }

    /// Forgets what was before.
    pub(crate) fn restart(&mut self, now_us: u64) {
        *self = Self { from_us: now_us, at_us: now_us, ..Self::default() };
    }

    /// Means of warm, dedup and base memory.
    pub(crate) fn means(&self) -> [f64; 3] {
        let seconds = (self.at_us - self.from_us) as f64 / 1e6;
        [self.warm, self.dedup, self.base].map(|v| if seconds > 0.0 { v / seconds } else { 0.0 })
    }
}

/// All of it.
pub(crate) struct Cluster {
    pub(crate) sandboxes: Vec<Sandbox>,
    free: Vec<u32>,
    next_number: u64,
    pub(crate) functions: Vec<Function>,
    pub(crate) families: Vec<Family>,
    pub(crate) nodes: Vec<Node>,
    /// Nodes by memory in use.
    by_use: BTreeSet<(u64, u32)>,
    pub(crate) totals: Totals,
}

impl Cluster {
    pub(crate) fn new(nodes: u32, functions: usize, families: usize) -> Self {
        Self {
            sandboxes: Vec::new(),
            free: Vec::new(),
            next_number: 0,
            functions: (0..functions).map(|_| Function::default()).collect(),
            families: (0..families).map(|_| Family::default()).collect(),
            nodes: (0..nodes).map(|_| Node::default()).collect(),
            by_use: (0..nodes).map(|n| (0, n)).collect(),
            totals: Totals::default(),
        }
    }

    /// A place for a new sandbox.
    pub(crate) fn create(&mut self, function: u32, node: u32, now_us: u64) -> u32 {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.sandboxes.push(Sandbox {
                phase: Phase::Gone,
                function,
                node,
                number: 0,
                epoch: 0,
                since_ms: 0,
                last_used_ms: 0,
                ask_us: u64::MAX,
                timer_us: u64::MAX,
                memory: 0,
                idle_at: u32::MAX,
                startup_us: 0,
            });
            self.sandboxes.len() as u32 - 1
        });
        self.next_number += 1;
        let place = &mut self.sandboxes[slot as usize];
        *place = Sandbox {
            phase: Phase::Starting,
            function,
            node,
            number: self.next_number,
            epoch: place.epoch + 1,
            since_ms: now_us / 1_000,
            last_used_ms: now_us / 1_000,
            ask_us: u64::MAX,
            timer_us: u64::MAX,
            memory: 0,
            idle_at: u32::MAX,
            startup_us: 0,
        };
        self.nodes[node as usize].sandboxes += 1;
        slot
    }

    /// Gives the place of a sandbox back, its memory already taken from it.
    pub(crate) fn destroy(&mut self, slot: u32) {
        let s = &mut self.sandboxes[slot as usize];
        s.phase = Phase::Gone;
        s.epoch += 1;
        self.nodes[s.node as usize].sandboxes -= 1;
        self.free.push(slot);
    }

    /// Changes what a node has in use.
    pub(crate) fn charge(&mut self, node: u32, plus: u64, minus: u64) {
        let n = &mut self.nodes[node as usize];
        self.by_use.remove(&(n.used, node));
        n.used = (n.used + plus).saturating_sub(minus);
        self.by_use.insert((n.used, node));
    }

    /// The node with the least memory in use.
    pub(crate) fn emptiest(&self) -> u32 {
        self.by_use.first().map_or(0, |(_, node)| *node)
    }

    /// The node with the least memory in use that can't be taken from idle sandboxes.
    pub(crate) fn most_reclaimable(&self) -> u32 {
        let busy = |n: &Node| n.used.saturating_sub(n.idle_bytes);
        let least = self.nodes.iter().enumerate().min_by_key(|(i, n)| (busy(n), *i));
        least.map_or(0, |(i, _)| i as u32)
    }

    pub(crate) fn idle_add(&mut self, slot: u32) {
        let s = &mut self.sandboxes[slot as usize];
        let node = &mut self.nodes[s.node as usize];
        s.idle_at = node.idle.len() as u32;
        node.idle.push(slot);
        node.idle_bytes += s.memory;
    }

    pub(crate) fn idle_remove(&mut self, slot: u32) {
        let s = &mut self.sandboxes[slot as usize];
        let at = std::mem::replace(&mut s.idle_at, u32::MAX) as usize;
        let memory = s.memory;
        let node = &mut self.nodes[s.node as usize];
        node.idle_bytes -= memory;
        node.idle.swap_remove(at);
        if let Some(moved) = node.idle.get(at) {
            self.sandboxes[*moved as usize].idle_at = at as u32;
        }
    }
}
