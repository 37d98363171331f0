//! The commands, one module per group, and what they have in common.

pub mod analyze;
pub mod attach;
pub mod bench;
pub mod config;
pub mod deploy;
pub mod functions;
pub mod invoke;
pub mod logs;
pub mod policy;
pub mod ps;
pub mod replay;
pub mod report;
pub mod runtime;
pub mod simulate;
pub mod state;
pub mod trace;
pub mod version;

use std::path::PathBuf;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use medes_core::FunctionName;
use medes_policy::PolicyName;

use crate::client::{Client, DEFAULT_URL};
use crate::config::Config;
use crate::failure::Failure;

/// What every command is given.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// The platform's URL.
    #[arg(long, global = true, env = "MEDES_URL", default_value = DEFAULT_URL, value_name = "URL")]
    pub url: String,
    /// The configuration file [default: /etc/medes/medes.toml if it exists].
    #[arg(long, global = true, env = "MEDES_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Say on standard error what is called; with `serve`, log more, twice for even more.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

impl Global {
    /// A client for the platform.
    ///
    /// # Errors
    /// A usage failure if the URL is none.
    pub fn client(&self) -> Result<Client, Failure> {
        Ok(Client::new(&self.url)?.verbose(self.verbose > 0))
    }

    /// The configuration, and the file that it came from.
    ///
    /// # Errors
    /// A usage failure if the file can't be used.
    pub fn load_config(&self) -> Result<(Config, Option<PathBuf>), Failure> {
        Ok(Config::load(self.config.as_deref())?)
    }
}

/// For clap: a policy's name.
pub fn policy_names() -> impl TypedValueParser<Value = PolicyName> {
    PossibleValuesParser::new(PolicyName::ALL.map(PolicyName::as_str))
        .try_map(|name| name.parse::<PolicyName>())
}

/// For clap: a function's name.
pub fn function_name(s: &str) -> Result<FunctionName, String> {
    s.parse::<FunctionName>().map_err(|e| e.to_string())
}
