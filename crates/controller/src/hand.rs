//! The operator's hand on the state of sandboxes.

use medes_core::{FunctionName, SandboxId, SandboxState};
use medes_node::{DedupFailure, DedupReport, NodeApi, RestoreFailure, RestoreReport};
use tokio::sync::oneshot;

use crate::controller::Controller;
use crate::error::HandError;
use crate::table::DedupRefused;

/// What became of each sandbox of a function.
pub type HandResults<T> = Vec<(SandboxId, Result<T, HandError>)>;

impl<N: NodeApi> Controller<N> {
    /// Deduplicates a warm sandbox now, as soon as no more operations are under way than allowed.
    /// With `force_base` it also becomes a base snapshot.
    ///
    /// # Errors
    /// If there is no such sandbox, it is not warm, or it can't be deduplicated.
    pub async fn dedup(
        &self,
        sandbox: SandboxId,
        force_base: bool,
    ) -> Result<DedupReport, HandError> {
        loop {
            let changed = self.inner.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let (reply, answered) = oneshot::channel();
            let begun =
                self.inner.with(|t, now| t.begin_dedup(now, sandbox, force_base, Some(reply)));
            match begun {
                Ok(()) => {
                    let lost = DedupFailure::Lost("the operation was forgotten".into());
                    return answered.await.unwrap_or(Err(lost)).map_err(|failure| match failure {
                        DedupFailure::Cancelled => HandError::Cancelled(sandbox),
                        DedupFailure::StaysWarm { reason, .. } => {
                            HandError::StaysWarm { sandbox, reason }
                        }
                        DedupFailure::Lost(reason) => HandError::Lost { sandbox, reason },
                    });
                }
                Err(DedupRefused::Hand(e)) => return Err(e),
                Err(DedupRefused::Busy) => changed.await,
            }
        }
    }

    /// Starts one more sandbox of a function, ahead of any request; returns when it is warm. A
    /// request that waits may take it at once.
    ///
    /// # Errors
    /// If there is no such function, no room for another sandbox, or it does not start.
    pub async fn start(&self, name: &FunctionName) -> Result<SandboxId, HandError> {
        let inner = self.inner.clone();
        let (deployed, ticket) = inner.with(|t, now| t.begin_start(now, name))?;
        let failed = |reason: String| HandError::NotStarted { function: name.clone(), reason };
        // A task of its own, for its end has to be noted whatever becomes of the caller.
        match tokio::spawn(async move { inner.start(deployed, ticket).await }).await {
            Ok(Ok(sandbox)) => Ok(sandbox),
            Ok(Err(failure)) => Err(failed(failure.to_string())),
            Err(e) => Err(failed(e.to_string())),
        }
    }

    /// Brings a dedup sandbox back to warm.
    ///
    /// # Errors
    /// If there is no such sandbox, it is not in the dedup state, or it is lost.
    pub async fn restore(&self, sandbox: SandboxId) -> Result<RestoreReport, HandError> {
        let inner = self.inner.clone();
        inner.with(|t, now| t.begin_restore(now, sandbox))?;
        // A task of its own, for its end has to be noted whatever becomes of the caller.
        let task = tokio::spawn(async move {
            let result = inner
                .guarded(move |inner| async move { inner.restore_now(sandbox, None).await })
                .await
                .unwrap_or_else(|| Err(RestoreFailure::unknown("the node failed")));
            inner.change(|t, now| match &result {
                Ok(_) => t.restored_by_hand(now, sandbox),
                Err(_) => t.gone(now, sandbox),
            });
            result
        });
        match task.await {
            Ok(Ok(report)) => Ok(report),
            Ok(Err(failure)) => Err(HandError::Lost { sandbox, reason: failure.reason }),
            Err(e) => Err(HandError::Lost { sandbox, reason: e.to_string() }),
        }
    }

    /// Ends a sandbox, whatever it is doing; a request that it serves fails. Returns when it is
    /// gone.
    ///
    /// # Errors
    /// If there is no such sandbox.
    pub async fn purge(&self, sandbox: SandboxId) -> Result<(), HandError> {
        let known = self.inner.with(|t, _| {
            t.purge(sandbox);
            t.knows(sandbox)
        });
        if !known {
            return Err(HandError::NoSuchSandbox(sandbox));
        }
        self.inner.until(|t| !t.knows(sandbox)).await;
        Ok(())
    }

    /// Deduplicates all warm sandboxes of a function.
    ///
    /// # Errors
    /// If there is no such function.
    pub async fn dedup_function(
        &self,
        name: &FunctionName,
    ) -> Result<HandResults<DedupReport>, HandError> {
        let mut results = Vec::new();
        for sandbox in self.sandboxes_in(name, &[SandboxState::Warm])? {
            results.push((sandbox, self.dedup(sandbox, false).await));
        }
        Ok(results)
    }

    /// Restores all dedup sandboxes of a function.
    ///
    /// # Errors
    /// If there is no such function.
    pub async fn restore_function(
        &self,
        name: &FunctionName,
    ) -> Result<HandResults<RestoreReport>, HandError> {
        let mut results = Vec::new();
        for sandbox in self.sandboxes_in(name, &[SandboxState::Dedup])? {
            results.push((sandbox, self.restore(sandbox).await));
        }
        Ok(results)
    }

    /// Ends all idle sandboxes of a function.
    ///
    /// # Errors
    /// If there is no such function.
    pub async fn purge_function(&self, name: &FunctionName) -> Result<HandResults<()>, HandError> {
        let idle = [SandboxState::Warm, SandboxState::Deduping, SandboxState::Dedup];
        let mut results = Vec::new();
        for sandbox in self.sandboxes_in(name, &idle)? {
            results.push((sandbox, self.purge(sandbox).await));
        }
        Ok(results)
    }

    fn sandboxes_in(
        &self,
        name: &FunctionName,
        states: &[SandboxState],
    ) -> Result<Vec<SandboxId>, HandError> {
        let all = self.inner.with(|t, _| t.sandboxes_of(name));
        let all = all.ok_or_else(|| HandError::NoSuchFunction(name.clone()))?;
        Ok(all.into_iter().filter(|(_, s)| states.contains(s)).map(|(id, _)| id).collect())
    }
}
