//! The example functions as sandboxes need them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result};
use medes_core::{DomainId, FunctionId, FunctionName, FunctionSpec, Layout};
use serde::Deserialize;
use serde_json::{Value, json};

/// Where the functions and what they run on are.
#[derive(Clone, Debug)]
pub struct Source {
    /// The directory with `functions.toml` and the functions' directories.
    pub examples: PathBuf,
    /// The directory with their layers, built.
    pub layers: PathBuf,
    /// The directory with installed runtimes.
    pub runtimes: PathBuf,
    /// The runtime's name, such as `python3.11`.
    pub runtime: String,
}

#[derive(Debug, Deserialize)]
struct Manifest {
    #[serde(default)]
    environment: BTreeMap<String, String>,
    #[serde(rename = "function")]
    functions: Vec<Entry>,
}

#[derive(Debug, Deserialize)]
struct Entry {
    name: FunctionName,
    handler: String,
    layers: Vec<String>,
    memory_mib: u32,
    timeout_s: u64,
    #[serde(default)]
    events: Vec<toml::Table>,
}

/// A function to measure with.
#[derive(Clone, Debug)]
pub struct Function {
    /// Its place in the manifest.
    pub number: u32,
    spec: FunctionSpec,
    events: Vec<Value>,
}

/// The functions of a manifest: those named, or all.
///
/// # Errors
/// If the manifest can't be used, a name is not in it, or a layer has not been built.
pub fn choose(source: &Source, named: &[String]) -> Result<Vec<Function>> {
    let path = source.examples.join("functions.toml");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let manifest: Manifest = toml::from_str(&text).with_context(|| path.display().to_string())?;
    for name in named {
        let known: Vec<_> = manifest.functions.iter().map(|f| f.name.as_str()).collect();
        anyhow::ensure!(
            known.contains(&name.as_str()),
            "no example function {name}; there are: {}",
            known.join(", ")
        );
    }
    let chosen = |f: &&Entry| named.is_empty() || named.iter().any(|n| n == f.name.as_str());
    let all = manifest.functions.iter().filter(chosen);
    all.zip(1..).map(|(f, n)| Function::new(f, n, source, &manifest.environment)).collect()
}

impl Function {
    fn new(
        entry: &Entry,
        number: u32,
        source: &Source,
        environment: &BTreeMap<String, String>,
    ) -> Result<Self> {
        let layer = |name: &String| {
            let path = source.layers.join(name);
            path.canonicalize().with_context(|| {
                format!("no layer {}; scripts/build-layers builds it", path.display())
            })
        };
        let spec = FunctionSpec {
            id: FunctionId(u64::from(number)),
            name: entry.name.clone(),
            tenant: medes_core::Tenant::default(),
            domain: DomainId(number),
            runtime: source.runtime.clone(),
            handler: entry.handler.clone(),
            code: source.examples.join(entry.name.as_str()),
            code_sha256: String::new(),
            code_size: 0,
            layers: entry.layers.iter().map(layer).collect::<Result<_>>()?,
            environment: environment.clone(),
            memory_mib: entry.memory_mib,
            timeout_ms: entry.timeout_s * 1000,
            max_sandboxes: 0,
            layout: Layout::Function,
            layout_seed: 0,
            description: String::new(),
            deployed_at_ms: 0,
        };
        let events = entry.events.iter().map(|t| json!(t)).collect();
        Ok(Self { number, spec, events })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.spec.name.as_str()
    }

    /// Its specification with a layout. Each pair of function and layout has an identity and a
    /// dedup domain of its own, so that no other one's base pages are in reach of a node.
    #[must_use]
    pub fn spec(&self, layout: Layout) -> FunctionSpec {
        // Any fixed numbers do: they only have to differ between functions, or not.
        let (variant, seed) = match layout {
            Layout::Function => (1, 0x5eed_0000 + u64::from(self.number)),
            Layout::Shared => (2, 0x5eed),
            Layout::Random => (3, 0),
        };
        let number = variant * 1000 + self.number;
        FunctionSpec {
            id: FunctionId(u64::from(number)),
            domain: DomainId(number),
            layout,
            layout_seed: seed,
            ..self.spec.clone()
        }
    }

    /// The `n`th request: like the samples of the manifest, of several sizes, no two with the same
    /// input.
    #[must_use]
    pub fn event(&self, n: u32) -> Value {
        let sample = self.events.get(n as usize % self.events.len().max(1));
        let mut event = sample.cloned().unwrap_or_else(|| json!({}));
        event["seed"] = json!(100_000 + n);
        event
    }
}
