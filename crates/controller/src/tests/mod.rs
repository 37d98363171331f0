//! The controller over a fake node, in tokio's paused time.

mod functions;
mod lifecycle;
mod policy;
mod requests;
mod simulation;
