//! Why a node could not be set up.

use std::path::PathBuf;

use medes_keeper::KeeperError;
use medes_sandbox::CgroupError;

/// A node could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// Another instance uses the run directory.
    #[error(
        "another instance is running with {0}; stop it, or give this one another run_dir, \
         data_dir and cgroup"
    )]
    Running(PathBuf),
    /// A file or directory can't be used.
    #[error("{path}: {error}")]
    File {
        /// Which one.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// The page store can't be made.
    #[error("making the page store: {0}")]
    Store(std::io::Error),
    /// The machine's cgroups can't be used.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The keeper can't be used.
    #[error(transparent)]
    Keeper(#[from] KeeperError),
    /// The fingerprint settings make no sense.
    #[error("dedup settings: {0}")]
    Dedup(String),
}
