//! The daemon at the other end of a connection.

use std::os::fd::OwnedFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
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
    ended: AtomicBool,
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

    /// Fails once the daemon is gone. What changes a sandbox for a daemon asks this with the
    /// sandbox's lock held: [`Caller::end`] comes before the sandboxes are looked over, so nothing
    /// changes afterwards of what the next daemon is told.
    pub(crate) fn check(&self) -> Result<(), String> {
        match self.ended.load(Ordering::SeqCst) {
            false => Ok(()),
            true => Err("the daemon is gone".into()),
        }
    }

    /// Takes a descriptor out of the daemon.
    pub(crate) fn take_descriptor(&self, number: i32) -> Result<OwnedFd, String> {
        let process = self.process.get().ok_or("say hello first")?;
        process.take_descriptor(number).map_err(|e| format!("taking a descriptor: {e}"))
    }

    /// Its connection has ended. Returns when it holds and traces no process any more. Blocks.
    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        if let Some(process) = self.process.get()
            && !process.ends_within(END_LIMIT)
        {
            tracing::warn!("the daemon has closed its connection and goes on");
        }
    }
}
