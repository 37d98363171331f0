//! `medes serve`: the platform in one process.

use crate::config::Config;

/// Runs the platform until it is told to stop.
///
/// # Errors
/// If it can't start.
pub fn run(_config: Config) -> anyhow::Result<()> {
    anyhow::bail!("this build has no platform in it")
}
