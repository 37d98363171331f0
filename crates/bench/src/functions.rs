//! The example functions as sandboxes need them.

use anyhow::Result;
use medes_core::{DomainId, FunctionId, FunctionSpec, Layout};
use serde_json::Value;

use crate::examples::{Example, Manifest, Source};

/// A function to measure with.
#[derive(Clone, Debug)]
pub struct Function {
    /// Its place among those chosen.
    pub number: u32,
    spec: FunctionSpec,
    example: Example,
}

/// The functions of a manifest: those named, or all.
///
/// # Errors
/// If the manifest can't be used, a name is not in it, or a layer has not been built.
pub fn choose(source: &Source, named: &[String]) -> Result<Vec<Function>> {
    let manifest = Manifest::read(&source.examples)?;
    let all = manifest.choose(named, true)?.into_iter();
    all.zip(1..).map(|(f, n)| Function::new(f, n, source, &manifest)).collect()
}

impl Function {
    fn new(example: Example, number: u32, source: &Source, manifest: &Manifest) -> Result<Self> {
        let spec = FunctionSpec {
            id: FunctionId(u64::from(number)),
            name: example.name.clone(),
            tenant: medes_core::Tenant::default(),
            domain: DomainId(number),
            runtime: source.runtime.clone(),
            handler: example.handler.clone(),
            code: example.code(source),
            code_sha256: String::new(),
            code_size: 0,
            layers: example.layers(source)?,
            environment: manifest.environment().clone(),
            memory_mib: example.memory_mib,
            timeout_ms: example.timeout_s * 1000,
            max_sandboxes: 0,
            layout: Layout::Function,
            layout_seed: 0,
            description: String::new(),
            deployed_at_ms: 0,
        };
        Ok(Self { number, spec, example })
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
        self.example.mixed_event(n as usize)
    }
}
