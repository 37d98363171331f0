//! One sandbox as the keeper holds it.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use medes_agent::restore::{HeldImage, RestoreBuffers};
use medes_core::SandboxId;
use medes_runtime::{LambdaApi, Request, RuntimeEvent};
use medes_sandbox::{Exit, Running};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader, Interest};
use tokio::sync::{mpsc, oneshot};

use crate::logs::{LogWriter, MAX_LINE};
use crate::protocol::{Answer, Ending, Restored, Started};
use crate::spawner::Spawned;

/// How long dead processes may take to go away.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// A sandbox: its process, its Runtime API, and who waits for it.
pub(crate) struct Held {
    id: SandboxId,
    api: Arc<LambdaApi>,
    running: Running,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    starting: Option<oneshot::Sender<Started>>,
    pending: Option<oneshot::Sender<Answer>>,
    image: Option<HeldImage>,
    ended: Option<Ending>,
}

impl Held {
    /// Takes charge of a sandbox that was just started. `starting` hears what becomes of the
    /// start, `ended` of an end that nobody waited for; `gone` runs when nothing is left of it.
    pub(crate) fn take(
        id: SandboxId,
        spawned: Spawned,
        log: PathBuf,
        log_bytes: u64,
        starting: oneshot::Sender<Started>,
        ended: impl FnOnce(Option<Ending>) + Send + 'static,
    ) -> std::io::Result<Arc<Self>> {
        let Spawned { running, listener, output } = spawned;
        let (events, received) = mpsc::unbounded_channel();
        let api = LambdaApi::new(events);
        let serving = tokio::spawn(
            Arc::clone(&api).serve(tokio::net::TcpListener::from_std(listener)?),
        );
        let pidfd: OwnedFd = running.pidfd().as_fd().try_clone_to_owned()?;
        // SAFETY: an OwnedFd is open and stays the same descriptor until it is dropped, and the
        // AsyncFd owns it.
        let exit = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }
            .map_err(std::io::Error::from)?;
        let pump = tokio::spawn(pump(id, output, LogWriter::new(log, log_bytes))?);
        let state = Mutex::new(State { starting: Some(starting), ..State::default() });
        let held = Arc::new(Self { id, api, running, state });
        let watched = Arc::clone(&held);
        tokio::spawn(async move {
            let unheard = watched.supervise(received, exit).await;
            serving.abort();
            // The pipe closes with the last process; what it still holds belongs in the log.
            let _ = tokio::time::timeout(Duration::from_secs(2), pump).await;
            ended(unheard);
        });
        Ok(held)
    }

    /// Passes the runtime's events on until the process has ended and everything is cleaned up.
    /// Gives the ending back if nobody waited for it.
    async fn supervise(
        &self,
        mut events: mpsc::UnboundedReceiver<RuntimeEvent>,
        exit: AsyncFd<OwnedFd>,
    ) -> Option<Ending> {
        loop {
            tokio::select! {
                // What was said before the end counts.
                biased;
                Some(event) = events.recv() => self.hear(event),
                _ = exit.readable() => break,
            }
        }
        while let Ok(event) = events.try_recv() {
            self.hear(event);
        }
        let ending = self.clean_up().await;
        let (starting, pending) = {
            let mut state = self.lock();
            state.ended = Some(ending.clone());
            state.image = None;
            (state.starting.take(), state.pending.take())
        };
        match (starting, pending) {
            (Some(starting), _) => {
                let _ = starting.send(Started::Ended(ending));
                None
            }
            (None, Some(pending)) => {
                let _ = pending.send(Answer::Ended(ending));
                None
            }
            (None, None) => Some(ending),
        }
    }

    fn hear(&self, event: RuntimeEvent) {
        let mut state = self.lock();
        let answer = match event {
            RuntimeEvent::Waiting => {
                if let Some(starting) = state.starting.take() {
                    let _ = starting.send(Started::Ready);
                }
                return;
            }
            RuntimeEvent::InitError { payload } => {
                if let Some(starting) = state.starting.take() {
                    let _ = starting.send(Started::InitError(payload));
                }
                drop(state);
                self.kill();
                return;
            }
            RuntimeEvent::Response { payload, .. } => Answer::Response(payload),
            RuntimeEvent::Error { payload, .. } => Answer::Error(payload),
            RuntimeEvent::TooLarge { bytes, .. } => Answer::TooLarge(bytes),
        };
        if let Some(pending) = state.pending.take() {
            let _ = pending.send(answer);
        }
    }

    /// Kills what is left of the process tree and removes the cgroup.
    async fn clean_up(&self) -> Ending {
        let cgroup = self.running.cgroup().clone();
        let out_of_memory = cgroup.memory().is_ok_and(|m| m.oom_kills > 0);
        let exit = self.running.wait_status().ok().flatten();
        let id = self.id;
        let removed = tokio::task::spawn_blocking(move || {
            cgroup.kill(KILL_LIMIT).and_then(|()| cgroup.remove(KILL_LIMIT))
        });
        match removed.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(sandbox = %id, %error, "removing a sandbox"),
            Err(error) => tracing::error!(sandbox = %id, %error, "removing a sandbox"),
        }
        let (how, killed) = match exit {
            Some(Exit::Code(code)) => (format!("exit status {code}"), false),
            Some(Exit::Signal(signal)) => (format!("signal: {}", name(signal)), signal == 9),
            None => ("unknown".to_owned(), false),
        };
        Ending { how, out_of_memory: out_of_memory && killed }
    }

    /// Hands a request to the runtime; the answer goes to `answer`.
    pub(crate) fn invoke(
        &self,
        request: Request,
        answer: oneshot::Sender<Answer>,
    ) -> Result<(), String> {
        let mut state = self.lock();
        if let Some(ending) = &state.ended {
            let _ = answer.send(Answer::Ended(ending.clone()));
            return Ok(());
        }
        if state.image.is_some() {
            return Err("the sandbox is in the dedup state: restore it first".into());
        }
        self.api.send(request).map_err(|busy| busy.to_string())?;
        state.pending = Some(answer);
        Ok(())
    }

    /// Kills the whole sandbox; [`Held::supervise`] sees it end and cleans up.
    pub(crate) fn kill(&self) {
        if let Err(error) = self.running.cgroup().order_kill() {
            tracing::warn!(sandbox = %self.id, %error, "killing a sandbox");
        }
    }

    /// Takes what brings the sandbox's memory back.
    pub(crate) fn hold(&self, image: HeldImage) -> Result<(), String> {
        let mut state = self.lock();
        if state.ended.is_some() {
            return Err("the sandbox has ended".into());
        }
        if state.image.is_some() {
            return Err("the sandbox is in the dedup state already".into());
        }
        if !self.api.is_idle() {
            return Err("the sandbox is not waiting for a request".into());
        }
        state.image = Some(image);
        Ok(())
    }

    /// Lets go of it again.
    pub(crate) fn release(&self) {
        self.lock().image = None;
    }

    /// Puts the memory back and lets the sandbox run. When that fails the sandbox is killed: it
    /// may not run with missing pages. Blocks.
    pub(crate) fn restore(&self, buffers: &mut RestoreBuffers) -> Result<Restored, String> {
        let Some(image) = self.lock().image.take() else {
            return Err("the sandbox is not in the dedup state".into());
        };
        let start = Instant::now();
        let restored = image.restore(buffers).map_err(|e| e.to_string()).and_then(|pages| {
            let pages_us = micros(start);
            self.running.cgroup().thaw().map_err(|e| e.to_string())?;
            Ok(Restored { pages, pages_us, thaw_us: micros(start) - pages_us })
        });
        if restored.is_err() {
            self.kill();
        }
        restored
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

/// A signal's name in the words of a shell.
fn name(signal: i32) -> String {
    match signal {
        9 => "killed".into(),
        11 => "segmentation fault".into(),
        6 => "aborted".into(),
        15 => "terminated".into(),
        31 => "bad system call".into(),
        other => other.to_string(),
    }
}

/// Copies a sandbox's output to its function's log, line by line, until the pipe closes.
fn pump(
    id: SandboxId,
    output: OwnedFd,
    mut log: LogWriter,
) -> std::io::Result<impl Future<Output = ()> + Send> {
    let output = tokio::net::unix::pipe::Receiver::from_owned_fd(output)?;
    let name = id.to_string();
    Ok(async move {
        let mut output = BufReader::with_capacity(4096, output);
        let mut line = Vec::new();
        loop {
            line.clear();
            // A line without an end is cut, so that nobody makes the keeper's memory grow.
            let mut piece = (&mut output).take(MAX_LINE as u64);
            match piece.read_until(b'\n', &mut line).await {
                Ok(0) | Err(_) => return,
                Ok(_) => log.line(&name, line.strip_suffix(b"\n").unwrap_or(&line)),
            }
        }
    })
}
