//! Why the holder can't do what is asked.

use crate::target::{Target, TargetError};

/// Why it can't do what is asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error(transparent)]
    Target(#[from] TargetError),
    #[error("{0} is attached already, as {1}; `medes attach restore {1}` brings it back")]
    Attached(Target, String),
    #[error("{0} is not attached; `medes attach status` lists what is")]
    NotAttached(String),
    #[error("{0} is just being taken or brought back")]
    Busy(String),
    #[error("left as it was: {0}")]
    Stays(String),
    #[error("its processes had to be killed: {0}")]
    Lost(String),
    #[error(
        "this command and the running holder are of different versions: bring everything back with the other one first"
    )]
    Version,
    #[error("{0}")]
    Bad(serde_json::Error),
}

impl Refusal {
    /// A stable name for programs.
    pub(crate) fn code(&self) -> &'static str {
        match self {
            Self::Target(TargetError::Untouchable { .. } | TargetError::WholeHost(_)) => {
                "Untouchable"
            }
            Self::Target(TargetError::Paused(..)) => "Paused",
            Self::Target(_) => "NoSuchTarget",
            Self::Attached(..) => "Attached",
            Self::NotAttached(_) => "NotAttached",
            Self::Busy(_) => "Busy",
            Self::Stays(_) => "StaysWarm",
            Self::Lost(_) => "Lost",
            Self::Version => "Version",
            Self::Bad(_) => "BadRequest",
        }
    }
}
