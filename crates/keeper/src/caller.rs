//! The daemon at the other end of a connection.

use std::os::fd::OwnedFd;
use std::sync::{OnceLock, PoisonError, RwLock, RwLockReadGuard, TryLockError};
use std::time::Duration;

use medes_memory::descriptor::ProcessHandle;
use tokio::sync::mpsc;

use crate::protocol::Message;

/// How long a daemon whose connection has ended may take to end itself.
const END_LIMIT: Duration = Duration::from_secs(2);

/// A daemon, as long as its connection lasts.
pub(crate) struct Caller {
    messages: mpsc::UnboundedSender<Message>,
    process: OnceLock<ProcessHandle>,
    /// Whether it has ended. Held for reading while something is done for it.
    ended: RwLock<bool>,
}

/// Something is being done for a daemon: as long as this is there, nobody takes over from it.
pub(crate) struct Entered<'a> {
    caller: &'a Caller,
    _not_ended: RwLockReadGuard<'a, bool>,
}

impl Entered<'_> {
    /// Takes a descriptor out of the daemon.
    pub(crate) fn take_descriptor(&self, number: i32) -> Result<OwnedFd, String> {
        self.caller.take_descriptor(number)
    }
}

impl Caller {
    pub(crate) fn new(messages: mpsc::UnboundedSender<Message>) -> Self {
        Self { messages, process: OnceLock::new(), ended: false.into() }
    }

    /// Notes who it is.
    pub(crate) fn introduce(&self, pid: i32) -> Result<(), String> {
        let process = ProcessHandle::open(pid).map_err(|e| format!("looking at a daemon: {e}"))?;
        self.process.set(process).map_err(|_| "hello was said already".to_owned())
    }

    pub(crate) fn tell(&self, message: Message) {
        // If it is gone, the next one asks.
        let _ = self.messages.send(message);
    }

    /// Whatever is done for it is done with the answer in hand. Fails once the daemon is gone: what it
    /// ordered with its last breath is not done to sandboxes that are another's by then.
    pub(crate) fn enter(&self) -> Result<Entered<'_>, String> {
        let ended = match self.ended.try_read() {
            Ok(ended) => Some(ended),
            Err(TryLockError::Poisoned(ended)) => Some(ended.into_inner()),
            // Only an end asks for more than to read, and may have to wait for it.
            Err(TryLockError::WouldBlock) => None,
        };
        match ended.filter(|ended| !**ended) {
            Some(not_ended) => Ok(Entered { caller: self, _not_ended: not_ended }),
            None => Err("the daemon is gone".into()),
        }
    }

    /// Takes a descriptor out of the daemon.
    pub(crate) fn take_descriptor(&self, number: i32) -> Result<OwnedFd, String> {
        let process = self.process.get().ok_or("say hello first")?;
        process.take_descriptor(number).map_err(|e| format!("taking a descriptor: {e}"))
    }

    /// Its connection has ended. Returns when nothing is done for it any more, and it holds and traces
    /// no process. Blocks.
    pub(crate) fn end(&self) {
        *self.ended.write().unwrap_or_else(PoisonError::into_inner) = true;
        if let Some(process) = self.process.get()
            && !process.ends_within(END_LIMIT)
        {
            tracing::warn!("the daemon has closed its connection and goes on");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread::{scope, sleep};

    use super::*;

    #[test]
    fn what_was_begun_is_done_before_its_end_and_nothing_after() {
        let caller = Caller::new(mpsc::unbounded_channel().0);
        let by = caller.enter().expect("it is there");
        scope(|scope| {
            let ending = scope.spawn(|| caller.end());
            sleep(Duration::from_millis(20));
            assert!(!ending.is_finished(), "something is being done for it");
            assert!(caller.enter().is_err(), "nothing is begun any more");
            drop(by);
        });
        assert!(caller.enter().is_err());
    }
}
