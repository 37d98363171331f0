//! The example functions: their manifest, the requests for them, and the answers that are right.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use medes_core::{FunctionName, Layout};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::commands::deploy::{Code, Deploy};

/// `functions.toml`, which lies beside the functions' directories.
#[derive(Debug, Deserialize)]
pub struct Manifest {
    /// Environment variables for every function.
    #[serde(default)]
    environment: BTreeMap<String, String>,
    #[serde(rename = "function")]
    functions: Vec<Example>,
}

/// One function of the manifest.
#[derive(Clone, Debug, Deserialize)]
pub struct Example {
    /// Its name and its directory's.
    pub name: FunctionName,
    #[serde(default)]
    description: String,
    handler: String,
    layers: Vec<String>,
    memory_mib: u32,
    timeout_s: u64,
    /// Whether it is one of the few that are shown by default.
    #[serde(default)]
    small: bool,
    events: Vec<toml::Table>,
}

/// Where things are.
pub struct Places {
    /// The directory with `functions.toml`.
    pub examples: PathBuf,
    /// The directory with the built layers for the interpreter's version.
    pub layers: PathBuf,
    /// The interpreter.
    pub python: PathBuf,
    /// The runtime's name.
    pub runtime: String,
}

/// A request and the answer to it that is right.
#[derive(Clone, Debug)]
pub struct Case {
    /// The payload.
    pub payload: Vec<u8>,
    /// What the function has to answer.
    pub expected: Value,
}

impl Manifest {
    /// Reads `functions.toml` in a directory.
    ///
    /// # Errors
    /// If it is not there or not understood.
    pub fn read(examples: &Path) -> Result<Self> {
        let path = examples.join("functions.toml");
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        toml::from_str(&text).with_context(|| path.display().to_string())
    }

    /// The functions that are asked for: those named, else all, else the small ones.
    ///
    /// # Errors
    /// If a name is not in the manifest.
    pub fn choose(&self, named: &[String], all: bool) -> Result<Vec<Example>> {
        if named.is_empty() {
            return Ok(self.functions.iter().filter(|f| all || f.small).cloned().collect());
        }
        named
            .iter()
            .map(|name| {
                let found = self.functions.iter().find(|f| f.name.as_str() == name);
                found.cloned().with_context(|| {
                    let known: Vec<_> = self.functions.iter().map(|f| f.name.as_str()).collect();
                    format!("no example function {name}; there are: {}", known.join(", "))
                })
            })
            .collect()
    }

    /// The deployment of a function.
    ///
    /// # Errors
    /// If one of its layers has not been built.
    pub fn deployment(&self, example: &Example, places: &Places) -> Result<Deploy> {
        Ok(Deploy {
            runtime: places.runtime.clone(),
            handler: example.handler.clone(),
            code: Code::Directory(places.examples.join(example.name.as_str())),
            layers: layers(example, places)?,
            environment: self.environment.clone(),
            memory_mib: example.memory_mib,
            timeout_ms: example.timeout_s * 1000,
            max_sandboxes: 0,
            layout: Layout::Function,
            tenant: medes_core::Tenant::default(),
            description: example.description.clone(),
        })
    }
}

impl Example {
    /// Requests of the default size, each with another input.
    pub fn plain_events(&self, n: usize) -> Vec<Value> {
        (0..n).map(|seed| json!({ "seed": 1000 + seed })).collect()
    }

    /// Requests like the samples of the manifest, of several sizes, each with another input.
    pub fn mixed_events(&self, n: usize) -> Vec<Value> {
        (0..n)
            .map(|seed| {
                let sample = &self.events[seed % self.events.len().max(1)..];
                let mut event = sample.first().map_or_else(|| json!({}), |t| json!(t));
                event["seed"] = json!(100_000 + seed);
                event
            })
            .collect()
    }

    /// Answers `events` outside of any platform: the function's handler in a Python process.
    ///
    /// # Errors
    /// If that process fails.
    pub fn cases(&self, places: &Places, events: &[Value]) -> Result<Vec<Case>> {
        let mut command = Command::new(&places.python);
        command.arg(places.examples.join("reference.py"));
        command.arg(places.examples.join(self.name.as_str()));
        for layer in layers(self, places)? {
            command.arg("--layer").arg(layer);
        }
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("running the reference")?;
        let input: String = events.iter().map(|e| format!("{e}\n")).collect();
        let mut stdin = child.stdin.take().context("no pipe")?;
        // From threads of their own: the process answers, and may complain, before it has read
        // everything.
        let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()));
        let stderr = child.stderr.take().context("no pipe")?;
        let complaints = std::thread::spawn(move || std::io::read_to_string(stderr));
        let mut cases = Vec::with_capacity(events.len());
        let stdout = child.stdout.take().context("no pipe")?;
        for (event, line) in events.iter().zip(BufReader::new(stdout).lines()) {
            let expected = serde_json::from_str(&line?).context("the reference's answer")?;
            cases.push(Case { payload: event.to_string().into_bytes(), expected });
        }
        let status = child.wait()?;
        let _ = writer.join();
        let complaints = complaints.join().ok().and_then(Result::ok).unwrap_or_default();
        ensure!(
            status.success() && cases.len() == events.len(),
            "the reference for {} failed ({status}): {}",
            self.name,
            complaints.trim()
        );
        Ok(cases)
    }
}

fn layers(example: &Example, places: &Places) -> Result<Vec<PathBuf>> {
    example
        .layers
        .iter()
        .map(|name| {
            let path = places.layers.join(name);
            path.canonicalize().with_context(|| {
                format!("no layer {}; scripts/build-layers builds it", path.display())
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        toml::from_str(
            "[environment]\nOMP_NUM_THREADS = \"1\"\n\
             [[function]]\nname = \"a\"\nhandler = \"app.handler\"\nlayers = []\nmemory_mib = 256\n\
             timeout_s = 30\nsmall = true\nevents = [{ seed = 1 }, { seed = 2, size = 20 }]\n\
             [[function]]\nname = \"b\"\nhandler = \"app.handler\"\nlayers = [\"numpy\"]\n\
             memory_mib = 256\ntimeout_s = 30\nevents = []\n",
        )
        .unwrap()
    }

    #[test]
    fn functions_are_chosen_by_name_or_size() {
        let names = |named: &[&str], all| {
            let named: Vec<_> = named.iter().map(|&n| n.to_owned()).collect();
            manifest()
                .choose(&named, all)
                .map(|list| list.into_iter().map(|f| f.name.to_string()).collect::<Vec<_>>())
        };
        assert_eq!(names(&[], false).unwrap(), ["a"]);
        assert_eq!(names(&[], true).unwrap(), ["a", "b"]);
        assert_eq!(names(&["b"], false).unwrap(), ["b"]);
        assert!(names(&["c"], false).unwrap_err().to_string().contains("there are: a, b"));
    }

    #[test]
    fn no_two_requests_are_the_same() {
        for example in manifest().functions {
            let mut events = example.plain_events(30);
            events.extend(example.mixed_events(30));
            let mut texts: Vec<_> = events.iter().map(Value::to_string).collect();
            texts.sort();
            texts.dedup();
            assert_eq!(texts.len(), 60, "{}", example.name);
        }
        let mixed = manifest().functions[0].mixed_events(2);
        assert_eq!(mixed[1], json!({"seed": 100_001, "size": 20}));
    }

    #[test]
    fn a_layer_that_is_not_built_is_named() {
        let places = Places {
            examples: "/nonexistent".into(),
            layers: "/nonexistent".into(),
            python: "python3".into(),
            runtime: "python3.11".into(),
        };
        let m = manifest();
        let e = m.deployment(&m.functions[1], &places).unwrap_err();
        assert!(format!("{e:#}").contains("/nonexistent/numpy"), "{e:#}");
        assert!(m.deployment(&m.functions[0], &places).is_ok());
    }
}
