//! The controller: functions, scheduler, lifecycle.
//!
//! It keeps what is deployed ([`Controller::deploy`]), finds a sandbox for each request
//! ([`Controller::invoke`]), and moves idle sandboxes through their lifecycle as the policy
//! decides. It drives a node through [`medes_node::NodeApi`] and knows nothing of processes, pages
//! or HTTP.

#![forbid(unsafe_code)]

mod code;
mod config;
mod controller;
mod document;
mod error;
#[cfg(any(test, feature = "fake-node"))]
pub mod fake;
mod functions;
mod hand;
mod invoke;
mod policy;
mod store;
mod table;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
mod view;

pub use code::{CodeError, CodeSource};
pub use config::{ControllerConfig, PartialRestore};
pub use controller::Controller;
pub use document::error_type;
pub use error::{DeployError, HandError, InvokeError, StoreError};
pub use functions::{Change, Deploy, DeployMode};
pub use invoke::InvokeOptions;
pub use policy::{FunctionPolicy, PolicyExplanation, PolicyOrigin, PolicyView};
pub use store::Deployed;
pub use view::{Counts, FunctionView, Info, SandboxView, TenantView};

/// A random number, for seeds and names that nobody may guess.
fn random() -> u64 {
    getrandom::u64().expect("the kernel gives random bytes")
}
