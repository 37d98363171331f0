//! What happens when.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

/// Something that happens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Happening {
    /// A sandbox has been started.
    Started,
    /// A request is done.
    Done,
    /// The policy wanted to be asked.
    Ask,
    /// A dedup operation is over.
    Deduped,
    /// A sandbox was to be started ahead of a request.
    Prewarm,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Event {
    pub(crate) at_us: u64,
    /// Events of one moment happen in the order in which they were noted.
    number: u64,
    pub(crate) what: Happening,
    /// The sandbox's place; the function for [`Happening::Prewarm`].
    pub(crate) slot: u32,
    /// What the sandbox's (or function's) counter stood at; another value: out of date.
    pub(crate) epoch: u32,
}

impl Ord for Event {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.at_us, self.number).cmp(&(other.at_us, other.number))
    }
}

impl PartialOrd for Event {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Events to come.
#[derive(Default)]
pub(crate) struct Calendar {
    heap: BinaryHeap<Reverse<Event>>,
    number: u64,
}

impl Calendar {
    pub(crate) fn add(&mut self, at_us: u64, what: Happening, slot: u32, epoch: u32) {
        self.number += 1;
        self.heap.push(Reverse(Event { at_us, number: self.number, what, slot, epoch }));
    }

    pub(crate) fn next_us(&self) -> Option<u64> {
        self.heap.peek().map(|e| e.0.at_us)
    }

    pub(crate) fn pop(&mut self) -> Option<Event> {
        self.heap.pop().map(|e| e.0)
    }
}
