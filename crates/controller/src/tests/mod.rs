//! The controller over a fake node, in tokio's paused time.

mod functions;
mod lifecycle;
mod requests;
mod simulation;
