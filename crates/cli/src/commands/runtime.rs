//! `medes runtime`: which runtimes there are, and installing one.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::json;

use super::Global;
use crate::failure::Outcome;
use crate::output::{Format, table};
use crate::runtime_install::{available, install, installed};

/// List or install runtimes.
#[derive(Debug, Args)]
pub struct RuntimeCommand {
    #[command(subcommand)]
    action: Action,
    /// The directory with the runtimes [default: `runtimes` in the data directory].
    #[arg(long, global = true, value_name = "DIR")]
    dir: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List the runtimes that are installed, and those that could be.
    List {
        #[command(flatten)]
        format: Format,
    },
    /// Install a runtime: the interpreter of that name on this host, and AWS's runtime interface
    /// client from the package index. What is there already is left alone.
    Install {
        /// The runtime, such as python3.11.
        name: String,
        /// The interpreter [default: the configuration's, else NAME in $PATH].
        #[arg(long, value_name = "PATH")]
        python: Option<PathBuf>,
        #[command(flatten)]
        format: Format,
    },
}

impl RuntimeCommand {
    /// Runs the command. It works on directories: no platform has to be running.
    ///
    /// # Errors
    /// If the configuration can't be read or the runtime not be installed.
    pub fn run(self, global: &Global) -> Outcome {
        let (config, _) = global.load_config()?;
        let dir = self.dir.unwrap_or_else(|| config.node.data_dir.join("runtimes"));
        match self.action {
            Action::List { format } => {
                let installed = installed(&dir);
                let mut others = available();
                others.retain(|(name, ..)| installed.iter().all(|r| r.name != *name));
                let value = json!({
                    "installed": installed,
                    "available": others
                        .iter()
                        .map(|(n, p, v)| json!({"name": n, "interpreter": p, "version": v}))
                        .collect::<Vec<_>>(),
                });
                format.print(&value, || {
                    let mut rows = Vec::new();
                    for r in &installed {
                        let path = r.interpreter.display().to_string();
                        rows.push(vec![r.name.clone(), r.version.clone(), "yes".into(), path]);
                    }
                    for (name, path, version) in &others {
                        let path = path.display().to_string();
                        rows.push(vec![name.clone(), version.clone(), "no".into(), path]);
                    }
                    table(&["RUNTIME", "VERSION", "INSTALLED", "INTERPRETER"], rows)
                });
            }
            Action::Install { name, python, format } => {
                let configured = config.runtimes.get(&name).map(|r| r.path.clone());
                let done = install(&name, python.or(configured).as_deref(), &dir)?;
                let value = json!({ "already": done.already, "runtime": done.record });
                format.print(&value, || {
                    let what = if done.already { "is already in" } else { "installed in" };
                    let r = &done.record;
                    format!(
                        "runtime {name} {what} {} (Python {}, {})\n",
                        dir.join(&name).display(),
                        r.version,
                        r.packages.first().map_or("", String::as_str)
                    )
                });
            }
        }
        Ok(())
    }
}
