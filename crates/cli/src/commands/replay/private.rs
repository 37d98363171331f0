//! A platform of a replay's own, with the example functions.

use anyhow::Result;
use medes_bench::examples::Manifest;
use medes_core::FunctionName;
use serde_json::Value;

use crate::client::Client;
use crate::examples::{SourceArgs, deployment};
use crate::failure::Failure;
use crate::platform::{Platform, Settings};

/// A private platform; dropping it ends it.
pub(super) struct Private(Platform);

impl Private {
    /// Starts it and deploys the example functions that are named; all if none is.
    pub(super) fn start(source: &SourceArgs, names: &[FunctionName]) -> Result<Self, Failure> {
        if !nix::unistd::geteuid().is_root() {
            let message = "--private starts a platform, which needs root; run it with sudo";
            return Err(Failure::Platform(message.to_owned()));
        }
        Ok(Self::open(source, names)?)
    }

    fn open(source: &SourceArgs, names: &[FunctionName]) -> Result<Self> {
        let source = source.find(|what| eprintln!("medes: {what}"))?;
        let manifest = Manifest::read(&source.examples)?;
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let functions = manifest.choose(&names, names.is_empty())?;
        let platform = Platform::start(&Settings {
            parent: None,
            runtimes: &source.runtimes,
            name: "replay",
            change: &|_| {},
            keep: false,
        })?;
        for function in functions {
            let deployment = deployment(&manifest, &function, &source)?;
            platform
                .client()
                .put::<Value>(&format!("/v1/functions/{}", function.name), &deployment)?;
        }
        Ok(Self(platform))
    }

    pub(super) fn client(&self) -> &Client {
        self.0.client()
    }

    /// Ends it in order.
    pub(super) fn stop(self) -> Result<(), Failure> {
        Ok(self.0.stop()?)
    }
}
