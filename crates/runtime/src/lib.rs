//! Runtime protocols: how a function's process receives requests and answers them.
//!
//! A vendor's runtime either *polls* an API that the platform serves (AWS Lambda) or *listens* on
//! a port itself (Google's functions-framework, OpenWhisk, Azure's custom handlers). Both kinds are
//! brought to one shape here: a [`Request`] goes in, [`RuntimeEvent`]s come out. This crate knows
//! nothing of sandboxes, of states or of memory; it is handed a listening socket.

#![forbid(unsafe_code)]

pub mod contract;
pub mod lambda;

pub use contract::{LambdaProcess, PORT, lambda_process};
pub use lambda::{LambdaApi, Request, RuntimeEvent};
