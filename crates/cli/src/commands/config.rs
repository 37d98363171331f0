//! `medes config`: the effective configuration with every default.

use clap::Args;

use super::Global;
use crate::config::Config;
use crate::failure::Outcome;
use crate::output::Format;

/// Show the effective configuration: every key with its value and a comment.
#[derive(Debug, Args)]
pub struct ConfigCommand {
    /// Show the defaults, whatever the configuration file says.
    #[arg(long)]
    default: bool,
    #[command(flatten)]
    format: Format,
}

impl ConfigCommand {
    /// Runs the command.
    ///
    /// # Errors
    /// If the configuration file can't be used.
    pub fn run(self, global: &Global) -> Outcome {
        let (config, origin) =
            if self.default { (Config::default(), None) } else { global.load_config()? };
        let value = serde_json::to_value(&config).map_err(anyhow::Error::from)?;
        self.format.print(&value, || {
            let origin = match origin {
                Some(path) => format!("# From {}, and defaults.\n\n", path.display()),
                None => "# The defaults.\n\n".to_owned(),
            };
            origin + &config.render()
        });
        Ok(())
    }
}
