//! The whole platform, from deployment to removal, as its users meet it. Each test runs a platform
//! of its own; they need root, and what `make test` prepares.

mod client;
mod platform;
mod policy;
mod remains;
mod replay;

mod bad_input;
mod commands;
mod isolation;
mod lambda;
mod lifecycle;
mod measuring;
mod random_kills;
mod recovery;
mod shutdown;
mod start_up;
mod state;
mod takeover;
