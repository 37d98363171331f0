//! How a command fails, and the exit status that says so.

use std::process::ExitCode;

use crate::client::ClientError;
use crate::config::ConfigError;

/// The exit codes, as `--help` shows them.
pub const EXIT_CODES: &str = "Exit codes:
  0  success
  1  the function answered with an error (invoke), or an answer was wrong (demo, bench)
  2  wrong usage: arguments or the configuration file
  3  the platform, or this host, could not do it: unreachable, refused or failed";

/// Why a command did not succeed.
#[derive(Debug)]
pub enum Failure {
    /// A function answered with an error, or wrongly. What there is to say has been said.
    Function,
    /// The command was called wrongly.
    Usage(String),
    /// The platform or the host could not do it.
    Platform(String),
}

impl Failure {
    /// Says on standard error what happened, and gives the exit status for it.
    pub fn report(&self) -> ExitCode {
        let (code, message) = match self {
            Self::Function => (1, None),
            Self::Usage(m) => (2, Some(m)),
            Self::Platform(m) => (3, Some(m)),
        };
        if let Some(message) = message {
            eprintln!("medes: {message}");
        }
        ExitCode::from(code)
    }
}

impl From<ClientError> for Failure {
    fn from(e: ClientError) -> Self {
        match e {
            ClientError::BadUrl(_) => Self::Usage(e.to_string()),
            _ => Self::Platform(e.to_string()),
        }
    }
}

impl From<ConfigError> for Failure {
    fn from(e: ConfigError) -> Self {
        Self::Usage(e.to_string())
    }
}

impl From<anyhow::Error> for Failure {
    fn from(e: anyhow::Error) -> Self {
        Self::Platform(format!("{e:#}"))
    }
}

/// What a command comes back with.
pub type Outcome = Result<(), Failure>;
