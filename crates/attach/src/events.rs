//! What happened lately, for whoever watches.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::attached::now_ms;
use crate::protocol::Event;

/// Events that are remembered.
const REMEMBERED: usize = 256;

/// How often it is looked whether a reader has gone.
const LOOK: Duration = Duration::from_millis(250);

#[derive(Default)]
pub(crate) struct Events {
    list: Mutex<List>,
    happened: Condvar,
}

#[derive(Default)]
struct List {
    events: VecDeque<Event>,
    /// How many there ever were.
    count: u64,
}

impl List {
    /// The events after the first `seen` that there ever were.
    fn after(&self, seen: u64) -> Vec<Event> {
        let fresh = usize::try_from(self.count - seen).unwrap_or(usize::MAX);
        self.events.iter().skip(self.events.len().saturating_sub(fresh)).cloned().collect()
    }
}

impl Events {
    pub(crate) fn tell(&self, id: &str, what: &str, detail: String) {
        tracing::info!(id, what, detail);
        let event = Event { at_ms: now_ms(), id: id.into(), what: what.into(), detail };
        let mut list = self.list.lock();
        if list.events.len() == REMEMBERED {
            list.events.pop_front();
        }
        list.events.push_back(event);
        list.count += 1;
        self.happened.notify_all();
    }

    pub(crate) fn lately(&self) -> Vec<Event> {
        self.list.lock().after(0)
    }

    /// Writes what happened lately, and then events as they come, one a line, until the reader has
    /// gone or `stop` is set.
    pub(crate) fn write_to(&self, stream: &mut UnixStream, stop: &AtomicBool) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        let mut seen = 0;
        loop {
            let fresh = {
                let mut list = self.list.lock();
                while list.count == seen {
                    if stop.load(Ordering::Acquire) || matches!(stream.read(&mut [0]), Ok(0)) {
                        return Ok(());
                    }
                    self.happened.wait_for(&mut list, LOOK);
                }
                let fresh = list.after(seen);
                seen = list.count;
                fresh
            };
            for event in &fresh {
                // A reader that does not keep up is none.
                stream.write_all(format!("{}\n", serde_json::to_string(event)?).as_bytes())?;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_are_remembered() {
        let events = Events::default();
        (0..REMEMBERED + 10).for_each(|n| events.tell("a1", "runs", n.to_string()));
        let lately = events.lately();
        assert_eq!((lately.len(), lately[0].detail.as_str()), (REMEMBERED, "10"));
        let list = events.list.lock();
        assert_eq!(list.after(list.count - 2).len(), 2);
        assert!(list.after(list.count).is_empty());
    }
}
