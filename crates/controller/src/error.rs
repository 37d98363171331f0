//! What can go wrong, and what to do about it.

use medes_core::{FunctionName, SandboxId, SandboxState};
use medes_policy::BadSetting;

use crate::code::CodeError;

/// A request got no answer from its function.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum InvokeError {
    /// There is no such function.
    #[error("no function named {0}; `medes functions` lists them")]
    NoSuchFunction(FunctionName),
    /// The payload is longer than allowed.
    #[error("the payload has {bytes} bytes, {limit} are allowed")]
    PayloadTooLarge {
        /// The payload's length.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// Too many requests wait already.
    #[error(
        "{limit} requests to {function} wait for a sandbox already; try again later, or raise the \
         function's or the node's limit of sandboxes"
    )]
    QueueFull {
        /// The function.
        function: FunctionName,
        /// How many may wait.
        limit: usize,
    },
    /// The request waited too long for a sandbox.
    #[error(
        "no sandbox for {function} became free within {waited_ms} ms; try again later, or raise \
         the function's or the node's limit of sandboxes"
    )]
    QueueTimeout {
        /// The function.
        function: FunctionName,
        /// How long it waited, milliseconds.
        waited_ms: u64,
    },
    /// The platform is going down.
    #[error("the platform is shutting down")]
    ShuttingDown,
    /// The function's runtime is not installed.
    #[error("{0}")]
    NoRuntime(String),
    /// The node could not make a sandbox.
    #[error("the sandbox could not be made: {0}")]
    Sandbox(String),
    /// Something inside the platform failed.
    #[error("internal error: {0}")]
    Internal(String),
}

/// An operation on a sandbox that an operator asked for was not done.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum HandError {
    /// There is no such sandbox.
    #[error("no sandbox {0}; `medes ps` lists them")]
    NoSuchSandbox(SandboxId),
    /// There is no such function.
    #[error("no function named {0}; `medes functions` lists them")]
    NoSuchFunction(FunctionName),
    /// No sandbox could be started.
    #[error("no sandbox was started for {function}: {reason}")]
    NotStarted {
        /// The function.
        function: FunctionName,
        /// What stood in the way.
        reason: String,
    },
    /// The sandbox is in another state than the operation needs.
    #[error("sandbox {sandbox} is {state}; it has to be {wanted} for that")]
    WrongState {
        /// The sandbox.
        sandbox: SandboxId,
        /// The state it is in.
        state: SandboxState,
        /// The state it would have to be in.
        wanted: SandboxState,
    },
    /// The sandbox can't be deduplicated.
    #[error("sandbox {sandbox} stays warm: {reason}")]
    StaysWarm {
        /// The sandbox.
        sandbox: SandboxId,
        /// What stands in the way.
        reason: String,
    },
    /// A request came and took the sandbox.
    #[error("cancelled: a request took sandbox {0}")]
    Cancelled(SandboxId),
    /// The sandbox ended in the course of the operation.
    #[error("sandbox {sandbox} is gone: {reason}")]
    Lost {
        /// The sandbox.
        sandbox: SandboxId,
        /// What is known of it.
        reason: String,
    },
}

/// A function was not deployed, changed or removed.
#[derive(Debug, thiserror::Error)]
pub enum DeployError {
    /// There is no such function.
    #[error("no function named {0}; `medes functions` lists them")]
    NoSuchFunction(FunctionName),
    /// There is one of that name already.
    #[error("there is a function named {0} already")]
    Exists(FunctionName),
    /// The function was changed in the meantime.
    #[error("function {0} has another revision than the one named: it was changed meanwhile")]
    StaleRevision(FunctionName),
    /// A setting makes no sense.
    #[error("{setting}: {message}")]
    Invalid {
        /// Which setting.
        setting: &'static str,
        /// What is wrong with it.
        message: String,
    },
    /// No such runtime is installed.
    #[error("no runtime {wanted:?} is installed; installed are: {}", installed.join(", "))]
    NoRuntime {
        /// What the deployment asks for.
        wanted: String,
        /// What there is.
        installed: Vec<String>,
    },
    /// The code or a layer can't be used.
    #[error(transparent)]
    Code(#[from] CodeError),
    /// The state store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The platform is going down.
    #[error("the platform is shutting down")]
    ShuttingDown,
}

impl From<BadSetting> for DeployError {
    fn from(bad: BadSetting) -> Self {
        Self::Invalid { setting: bad.setting, message: bad.message.to_owned() }
    }
}

/// The state store failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The database can't be opened, read or written.
    #[error("the state store {path}: {source}")]
    Database {
        /// The file.
        path: String,
        /// What the database says.
        source: Box<redb::Error>,
    },
    /// A record can't be understood.
    #[error("the state store {path}: the record of {key:?} can't be read: {message}")]
    Record {
        /// The file.
        path: String,
        /// Which record.
        key: String,
        /// What is wrong with it.
        message: String,
    },
    /// The data directory can't be used.
    #[error("{path}: {source}")]
    Io {
        /// The file or directory.
        path: String,
        /// What the system says.
        source: std::io::Error,
    },
}
