//! One request: from its arrival to its answer.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use medes_core::{
    FunctionName, InvocationError, InvocationResult, MemoryReturn, RequestId, SandboxId, StartKind,
    Timing,
};
use medes_node::{Invocation, NodeApi, Outcome, RestoreFailure, RestoreReport, StartFailure};
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::controller::{Controller, Inner};
use crate::document::{error_document, init_document};
use crate::error::InvokeError;
use crate::store::Deployed;
use crate::table::{Grant, Ticket};

/// What comes along with a request's payload.
#[derive(Clone, Debug)]
pub struct InvokeOptions {
    /// The request's identifier.
    pub request: RequestId,
    /// When the front door had received it.
    pub received: Instant,
    /// Lambda's client context (JSON), if the client sent one.
    pub client_context: Option<String>,
    /// The trace header, if the client sent one.
    pub trace: Option<String>,
}

impl InvokeOptions {
    fn invocation(&self, deployed: &Deployed, payload: Bytes) -> Invocation {
        Invocation {
            request: self.request,
            payload,
            timeout_ms: deployed.spec.timeout_ms,
            client_context: self.client_context.clone(),
            trace: self.trace.clone(),
        }
    }
}

impl Default for InvokeOptions {
    fn default() -> Self {
        Self {
            request: RequestId::random(),
            received: Instant::now(),
            client_context: None,
            trace: None,
        }
    }
}

/// The node ends a request that runs too long; if it does not, the controller does, this much
/// later.
const NODE_OVERDUE: Duration = Duration::from_secs(30);

type Answer = oneshot::Sender<Result<InvocationResult, InvokeError>>;

/// A sandbox that runs for one request.
struct Lease {
    sandbox: SandboxId,
    deployed: Arc<Deployed>,
    start: StartKind,
    /// The restore that made it ready, if there was one.
    restored: Option<RestoreReport>,
}

impl<N: NodeApi> Controller<N> {
    /// Has a function serve a request. An error in the function is a result; an [`InvokeError`]
    /// means that it never ran. If the returned future is dropped, a request that still waits is
    /// withdrawn and one that runs is run to its end.
    ///
    /// # Errors
    /// See [`InvokeError`].
    pub async fn invoke(
        &self,
        name: &FunctionName,
        payload: Bytes,
        options: InvokeOptions,
    ) -> Result<InvocationResult, InvokeError> {
        let limit = self.inner.config.max_payload;
        if payload.len() > limit {
            return Err(InvokeError::PayloadTooLarge { bytes: payload.len(), limit });
        }
        let (answer, answered) = oneshot::channel();
        let inner = self.inner.clone();
        let name = name.clone();
        // A task of its own, for a sandbox must be handed back whatever becomes of the caller.
        tokio::spawn(async move { inner.serve(&name, payload, options, answer).await });
        answered.await.unwrap_or_else(|_| Err(InvokeError::Internal("the request was lost".into())))
    }
}

impl<N: NodeApi> Inner<N> {
    async fn serve(
        self: Arc<Self>,
        name: &FunctionName,
        payload: Bytes,
        options: InvokeOptions,
        mut answer: Answer,
    ) {
        let mut timing = Timing::default();
        let lease = match self.lease(name, &payload, &options, &mut timing, &mut answer).await {
            Ok(Ok(lease)) => lease,
            Ok(Err(mut failed)) => {
                failed.timing.total_us = micros(options.received);
                let _ = answer.send(Ok(failed));
                return;
            }
            Err(e) => {
                self.with(|t, _| t.stats_mut(name).map(|s| s.errors += 1));
                let _ = answer.send(Err(e));
                return;
            }
        };
        let result = self.run(&lease, payload, &options, timing).await;
        let _ = answer.send(Ok(result));
        // After a cold start's first request, when it holds what it is going to hold.
        if lease.start == StartKind::Cold
            && let Some(memory) = self.node.memory_of(lease.sandbox)
        {
            self.with(|t, _| t.note_warm_memory(lease.sandbox, memory.total()));
        }
    }

    /// Finds a sandbox for a request and makes it ready. The inner error is a function that failed
    /// to initialise, which is a result for the client.
    async fn lease(
        self: &Arc<Self>,
        name: &FunctionName,
        payload: &Bytes,
        options: &InvokeOptions,
        timing: &mut Timing,
        answer: &mut Answer,
    ) -> Result<Result<Lease, InvocationResult>, InvokeError> {
        let mut again = false;
        loop {
            let began = Instant::now();
            let ticket = self.with(|t, now| t.enqueue(now, name, again))?;
            let grant = self.wait(name, ticket, answer).await?;
            let waited_us = micros(began);
            // A sandbox may have been on its way before this request came.
            let mut waited_for_start = |startup_us: u64| {
                let startup_us = startup_us.min(waited_us);
                timing.startup_us += startup_us;
                timing.queue_us += waited_us - startup_us;
            };
            match grant {
                Grant::Ready { sandbox, deployed, start, startup_us } => {
                    waited_for_start(startup_us);
                    return Ok(Ok(Lease { sandbox, deployed, start, restored: None }));
                }
                Grant::Restore { sandbox, deployed } => {
                    timing.queue_us += waited_us;
                    let began = Instant::now();
                    let first = options.invocation(&deployed, payload.clone());
                    let restored = self.restore(sandbox, first).await;
                    timing.startup_us += micros(began);
                    if restored.is_some() {
                        let start = StartKind::Dedup;
                        return Ok(Ok(Lease { sandbox, deployed, start, restored }));
                    }
                    again = true;
                }
                Grant::StartFailed { failure, deployed, startup_us } => {
                    waited_for_start(startup_us);
                    return match failure {
                        StartFailure::NoRuntime(why) => Err(InvokeError::NoRuntime(why)),
                        StartFailure::Sandbox(why) => Err(InvokeError::Sandbox(why)),
                        StartFailure::Init { error, payload } => {
                            self.with(|t, _| t.stats_mut(name).map(|s| s.errors += 1));
                            let request = options.request;
                            Ok(Err(self.init_failed(&deployed, request, error, payload, *timing)))
                        }
                    };
                }
                Grant::Refused(e) => return Err(e),
            }
        }
    }

    /// Waits until the request gets something, gives up, or is given up by its caller.
    async fn wait(
        self: &Arc<Self>,
        name: &FunctionName,
        ticket: Ticket,
        answer: &mut Answer,
    ) -> Result<Grant, InvokeError> {
        let Ticket { function, waiter, mut granted } = ticket;
        let lost = |_| InvokeError::Internal("the request was forgotten".into());
        let began = Instant::now();
        let patience = Duration::from_millis(self.config.queue_timeout_ms);
        loop {
            let withdrawal = tokio::select! {
                biased;
                grant = &mut granted => return grant.map_err(lost),
                () = answer.closed() => InvokeError::Internal("the caller went away".into()),
                () = tokio::time::sleep(patience) => {
                    if self.with(|t, _| t.is_covered(function, waiter)) {
                        continue;
                    }
                    let waited_ms = began.elapsed().as_millis() as u64;
                    InvokeError::QueueTimeout { function: name.clone(), waited_ms }
                }
            };
            if self.with(|t, _| t.leave_queue(function, waiter)) {
                return Err(withdrawal);
            }
            // It got something in the meantime.
            return granted.await.map_err(lost);
        }
    }

    /// Has the node restore a sandbox, whole or partly.
    pub(crate) async fn restore_now(
        self: &Arc<Self>,
        sandbox: SandboxId,
        first: Option<Invocation>,
    ) -> Result<RestoreReport, RestoreFailure> {
        let fill = self.with(|t, _| t.restores_all());
        self.node.restore(sandbox, fill, first).await
    }

    /// Restores a sandbox for its `first` request; `None` if that has certainly not begun in it, and
    /// needs another one.
    async fn restore(
        self: &Arc<Self>,
        sandbox: SandboxId,
        first: Invocation,
    ) -> Option<RestoreReport> {
        let result = self
            .guarded(move |inner| async move { inner.restore_now(sandbox, Some(first)).await })
            .await
            .unwrap_or_else(|| Err(RestoreFailure::unknown("the node failed")));
        match result {
            Ok(report) => {
                tracing::debug!(%sandbox, took_us = report.total_us, "restored");
                // If it is being purged, the request fails with it.
                self.with(|t, now| t.restored(now, sandbox));
                Some(report)
            }
            Err(failure) => {
                let again = !failure.may_have_run;
                tracing::warn!(%sandbox, error = %failure, again, "a restore for a request");
                self.change(|t, now| t.gone(now, sandbox));
                (!again).then(RestoreReport::default)
            }
        }
    }

    /// Runs the request in its sandbox, and gives the sandbox back.
    async fn run(
        self: &Arc<Self>,
        lease: &Lease,
        payload: Bytes,
        options: &InvokeOptions,
        mut timing: Timing,
    ) -> InvocationResult {
        let Lease { sandbox, deployed, start, restored } = lease;
        let (sandbox, start) = (*sandbox, *start);
        let timeout_ms = deployed.spec.timeout_ms;
        let invocation = options.invocation(deployed, payload);
        let overdue = Duration::from_millis(timeout_ms) + NODE_OVERDUE;
        let lost = |error, execution_us| Outcome {
            payload: Bytes::new(),
            error: Some(error),
            execution_us,
            faults: 0,
            pages: 0,
            prefetched: 0,
            alive: false,
        };
        let operation = self.guarded(move |inner| async move {
            tokio::time::timeout(overdue, inner.node.invoke(sandbox, invocation)).await
        });
        let (mut outcome, ended) = match operation.await {
            Some(Ok(outcome)) => {
                let ended = !outcome.alive;
                (outcome, ended)
            }
            Some(Err(_)) => (lost(InvocationError::TimedOut, timeout_ms * 1000), false),
            None => (lost(InvocationError::Exited { how: String::new() }, 0), false),
        };
        // A runtime whose answer was refused at its door takes that for the platform's failure and
        // ends, sooner or later.
        let refused = matches!(outcome.error, Some(InvocationError::ResponseTooLarge { .. }));
        let reusable = outcome.alive && !refused;
        if outcome.payload.len() > self.config.max_response && outcome.error.is_none() {
            let bytes = outcome.payload.len() as u64;
            outcome.error = Some(InvocationError::ResponseTooLarge { bytes });
        }
        timing.execution_us = outcome.execution_us;
        let memory = restored.map(|report| MemoryReturn {
            pages_before: outcome.prefetched,
            prefetch_us: report.pages_us,
            thaw_us: report.thaw_us,
            faults: outcome.faults,
            pages_on_demand: outcome.pages,
        });

        // The sandbox is given back before the answer goes out, so that a client which asks again
        // at once finds it.
        let finish = |t: &mut crate::table::Table, now| {
            if let Some(stats) = t.stats_mut(&deployed.spec.name) {
                let error = outcome.error.is_some();
                stats.served(start, timing.startup_us, timing.execution_us, error);
            }
            if reusable {
                t.finished(now, sandbox);
            } else if ended {
                t.gone(now, sandbox);
            } else {
                t.purge(sandbox);
            }
        };
        if reusable {
            self.with(finish);
            self.changed.notify_waiters();
        } else {
            self.change(finish);
        }

        let document = outcome
            .error
            .as_ref()
            .and_then(|e| error_document(e, options.request, timeout_ms, self.config.max_response));
        timing.total_us = micros(options.received);
        InvocationResult {
            request: options.request,
            sandbox: Some(sandbox),
            start,
            timing,
            memory,
            payload: document.unwrap_or_else(|| outcome.payload.into()),
            error: outcome.error,
        }
    }

    fn init_failed(
        &self,
        deployed: &Deployed,
        request: RequestId,
        error: InvocationError,
        payload: Bytes,
        timing: Timing,
    ) -> InvocationResult {
        let document =
            error_document(&error, request, deployed.spec.timeout_ms, self.config.max_response)
                .unwrap_or_else(|| {
                    if payload.is_empty() { init_document(request) } else { payload.into() }
                });
        InvocationResult {
            request,
            sandbox: None,
            start: StartKind::Cold,
            timing,
            memory: None,
            payload: document,
            error: Some(error),
        }
    }
}

fn micros(since: Instant) -> u64 {
    since.elapsed().as_micros() as u64
}
