//! Starting a sandbox, sending it a request, bringing it back from dedup.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use medes_core::{FunctionSpec, InvocationError, Layout, SandboxId};
use medes_keeper::KeeperError;
use medes_keeper::protocol::{Answer, Command, Ending, Reply, Returned, Start, Started};
use medes_runtime::contract::lambda_arn;
use medes_runtime::lambda::deadline_ms;
use medes_runtime::{PORT, Request};

use crate::api::{Invocation, Outcome, RestoreFailure, RestoreReport, StartFailure};
use crate::label::Label;
use crate::shared::{Shared, micros};
use crate::spec::sandbox_spec;
use crate::table::Entry;

impl Shared {
    pub(crate) async fn start(&self, function: &FunctionSpec) -> Result<SandboxId, StartFailure> {
        let runtime = self
            .runtimes
            .find(&function.runtime)
            .map_err(|e| StartFailure::NoRuntime(e.to_string()))?;
        let broken = |why: &dyn std::fmt::Display| StartFailure::Sandbox(why.to_string());
        let id = SandboxId::random();
        let host_uid = self
            .table
            .take_uid(self.config.uid_base)
            .ok_or_else(|| broken(&"all user ids are taken"))?;
        let spec = sandbox_spec(&self.config, function, &runtime, id, host_uid);
        let cgroup = match self.root.get(&spec.id) {
            Ok(cgroup) => cgroup,
            Err(error) => {
                self.table.give_uid_back(host_uid);
                return Err(broken(&error));
            }
        };
        let label = Label {
            function: function.id,
            name: function.name.clone(),
            domain: function.domain,
            host_uid,
        };
        let label_bytes = label.encode();
        self.table.insert(Arc::new(Entry::new(id, label, cgroup, None)));
        let log = self.log_directory(function);
        let start = Start {
            sandbox: id,
            spec,
            port: PORT,
            log,
            log_bytes: self.config.log_bytes,
            limit_ms: self.config.init_timeout_ms,
            label: label_bytes,
            working_set: match function.layout {
                Layout::Function | Layout::Shared => function.id.0,
                // Its addresses are like no other's.
                Layout::Random => id.0,
            },
        };
        let keeper = self.keeper();
        let mut call = std::pin::pin!(keeper.call(Command::Start(Box::new(start))));
        let limit = Duration::from_millis(self.config.init_timeout_ms);
        let (reply, timed_out) = match tokio::time::timeout(limit, &mut call).await {
            Ok(reply) => (reply, false),
            Err(_) => {
                let _ = keeper.order(Command::Kill { sandbox: id }).await;
                (call.await, true)
            }
        };
        let failure = match reply {
            Ok(Reply::Started(Started::Ready)) if !timed_out => return Ok(id),
            Ok(Reply::Started(_)) if timed_out => {
                StartFailure::Init { error: InvocationError::TimedOut, payload: Bytes::new() }
            }
            Ok(Reply::Started(Started::InitError(payload))) => {
                StartFailure::Init { error: InvocationError::Init, payload }
            }
            Ok(Reply::Started(Started::Ended(ending))) => {
                StartFailure::Init { error: ended(ending), payload: Bytes::new() }
            }
            Ok(Reply::Started(Started::Failed(why))) => StartFailure::Sandbox(why),
            Ok(Reply::Refused(why)) => StartFailure::Sandbox(why),
            Ok(_) => broken(&KeeperError::Protocol),
            Err(error) => broken(&error),
        };
        self.kill(id).await;
        Err(failure)
    }

    pub(crate) async fn invoke(&self, sandbox: SandboxId, invocation: Invocation) -> Outcome {
        let begin = Instant::now();
        let Some(entry) = self.table.get(sandbox) else {
            let how = "the sandbox is gone".to_owned();
            return outcome(begin, Bytes::new(), Some(InvocationError::Exited { how }), false);
        };
        let limit = Duration::from_millis(invocation.timeout_ms);
        let handed = entry.handed.lock().take();
        let command = match handed {
            Some(request) if request == invocation.request => Command::Collect { sandbox },
            _ => Command::Invoke { sandbox, request: request_of(&entry, invocation) },
        };
        let keeper = self.keeper();
        let mut call = std::pin::pin!(keeper.call(command));
        let Ok(reply) = tokio::time::timeout(limit, &mut call).await else {
            self.kill(sandbox).await;
            return outcome(begin, Bytes::new(), Some(InvocationError::TimedOut), false);
        };
        let mut returned = Returned::default();
        let reply = reply.map(|reply| match reply {
            Reply::Answered { answer, returned: so_far } => {
                returned = so_far;
                Ok(answer)
            }
            other => Err(other),
        });
        let (payload, error) = match reply {
            Ok(Ok(Answer::Response(payload))) => (payload, None),
            Ok(Ok(Answer::Error(payload))) => (payload, Some(InvocationError::Function)),
            Ok(Ok(Answer::TooLarge(bytes))) => {
                (Bytes::new(), Some(InvocationError::ResponseTooLarge { bytes }))
            }
            Ok(Ok(Answer::Ended(ending))) => {
                tracing::info!(%sandbox, how = ending.how, "a sandbox ended during a request");
                self.forget(sandbox);
                return outcome(begin, Bytes::new(), Some(ended(ending)), false);
            }
            Ok(Err(Reply::Refused(how))) => {
                self.kill(sandbox).await;
                return outcome(begin, Bytes::new(), Some(InvocationError::Exited { how }), false);
            }
            Ok(_) | Err(_) => {
                self.kill(sandbox).await;
                let how = "the keeper ended".to_owned();
                return outcome(begin, Bytes::new(), Some(InvocationError::Exited { how }), false);
            }
        };
        let Returned { prefetched, faults, pages } = returned;
        Outcome { prefetched, faults, pages, ..outcome(begin, payload, error, true) }
    }

    pub(crate) async fn restore(
        &self,
        sandbox: SandboxId,
        fill: bool,
        prefetch: bool,
        first: Option<Invocation>,
    ) -> Result<RestoreReport, RestoreFailure> {
        let begin = Instant::now();
        let entry = self.table.get(sandbox);
        let entry = entry.ok_or_else(|| RestoreFailure::before("the sandbox is gone"))?;
        let handed = first.as_ref().map(|first| first.request);
        let request = first.map(|first| request_of(&entry, first));
        let command = Command::Restore { sandbox, fill, prefetch, request };
        let failure = match self.keeper().call(command).await {
            Ok(Reply::Restored(done)) => {
                *entry.handed.lock() = handed;
                if let Some(dedup) = entry.dedup.lock().as_mut() {
                    dedup.restore = Some(done.number);
                }
                return Ok(RestoreReport {
                    pages: done.pages,
                    pages_us: done.pages_us,
                    thaw_us: done.thaw_us,
                    total_us: micros(begin),
                });
            }
            Ok(Reply::Refused(why)) => RestoreFailure::before(why),
            Ok(_) => RestoreFailure::unknown(KeeperError::Protocol.to_string()),
            Err(error) => RestoreFailure::unknown(error.to_string()),
        };
        self.kill(sandbox).await;
        Err(failure)
    }
}

/// A request as the sandbox's runtime gets it.
fn request_of(entry: &Entry, invocation: Invocation) -> Request {
    Request {
        id: invocation.request,
        deadline_ms: deadline_ms(invocation.timeout_ms),
        arn: lambda_arn(entry.name.as_str()),
        payload: invocation.payload,
        client_context: invocation.client_context,
        trace: invocation.trace,
    }
}

fn ended(ending: Ending) -> InvocationError {
    if ending.out_of_memory {
        InvocationError::OutOfMemory
    } else {
        InvocationError::Exited { how: ending.how }
    }
}

fn outcome(begin: Instant, payload: Bytes, error: Option<InvocationError>, alive: bool) -> Outcome {
    Outcome {
        payload,
        error,
        execution_us: micros(begin),
        prefetched: 0,
        faults: 0,
        pages: 0,
        alive,
    }
}
