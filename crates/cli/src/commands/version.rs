//! `medes version`: this binary's version, and the platform's if it answers.

use clap::Args;
use serde_json::json;

use super::Global;
use crate::failure::Outcome;
use crate::output::Format;
use crate::wire::Info;

/// Show this program's version, and the platform's if one is running.
#[derive(Debug, Args)]
pub struct VersionCommand {
    #[command(flatten)]
    format: Format,
}

impl VersionCommand {
    /// Runs the command.
    ///
    /// # Errors
    /// If the URL is none. An unreachable platform is not an error.
    pub fn run(self, global: &Global) -> Outcome {
        let platform = global.client()?.get::<Info>("/v1/info");
        let own = env!("CARGO_PKG_VERSION");
        let value = json!({
            "version": own,
            "platform": platform.as_ref().ok().map(|i| &i.version),
            "runtimes": platform.as_ref().ok().map(|i| &i.node.runtimes),
        });
        self.format.print(&value, || match &platform {
            Ok(info) => {
                let runtimes = info.node.runtimes.join(", ");
                format!("medes {own}\nplatform {} at {} ({runtimes})\n", info.version, global.url)
            }
            Err(e) => format!("medes {own}\nplatform: {e}\n"),
        });
        Ok(())
    }
}
