//! The example functions as commands use them: where they are, and their deployment.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use medes_bench::examples::{Example, Manifest, Source};
use medes_core::{Layout, Tenant};

use crate::commands::deploy::{Code, Deploy};
use crate::runtime_install::{identify, install};

/// Where the example functions and what they run on are.
#[derive(Clone, Debug, Args)]
pub struct SourceArgs {
    /// The Python interpreter that the functions run on.
    #[arg(long, value_name = "PATH", default_value = "python3")]
    python: PathBuf,
    /// The directory with the example functions.
    #[arg(long, value_name = "DIR", default_value = "examples/functions")]
    examples: PathBuf,
    /// The directory with their layers [default: .cache/layers/<Python version>].
    #[arg(long, value_name = "DIR")]
    layers: Option<PathBuf>,
    /// The directory with installed runtimes; the one that is needed is installed if missing.
    #[arg(long, value_name = "DIR", default_value = ".cache/runtimes")]
    runtimes: PathBuf,
}

impl SourceArgs {
    /// Finds everything, and installs the runtime if it is missing; `say` is told.
    ///
    /// # Errors
    /// If something is not there or the runtime can't be installed.
    pub fn find(&self, say: impl Fn(&str)) -> Result<Source> {
        let (runtime, python) = identify(&self.python)?;
        let version = runtime.trim_start_matches("python");
        let examples = self.examples.canonicalize().with_context(|| {
            format!("{}; run this from the repository, or use --examples", self.examples.display())
        })?;
        let layers = self.layers.clone();
        let layers = layers.unwrap_or_else(|| PathBuf::from(".cache/layers").join(version));
        let installed = install(&runtime, Some(&python), &self.runtimes)?;
        if !installed.already {
            say(&format!("installed runtime {}", installed.record.name));
        }
        let runtimes = self.runtimes.canonicalize()?;
        Ok(Source { examples, layers, runtimes, runtime, python })
    }
}

/// The deployment of an example function.
///
/// # Errors
/// If one of its layers has not been built.
pub fn deployment(manifest: &Manifest, example: &Example, source: &Source) -> Result<Deploy> {
    Ok(Deploy {
        runtime: source.runtime.clone(),
        handler: example.handler.clone(),
        code: Code::Directory(example.code(source)),
        layers: example.layers(source)?,
        environment: manifest.environment().clone(),
        memory_mib: example.memory_mib,
        timeout_ms: example.timeout_s * 1000,
        max_sandboxes: 0,
        layout: Layout::Function,
        tenant: Tenant::default(),
        description: example.description.clone(),
        policy: serde_json::Map::new(),
    })
}
