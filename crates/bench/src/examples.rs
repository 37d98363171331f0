//! The example functions: their manifest, the requests for them, and the answers that are right.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use medes_core::FunctionName;
use serde::Deserialize;
use serde_json::{Value, json};

/// Where the functions and what they run on are.
#[derive(Clone, Debug)]
pub struct Source {
    /// The directory with `functions.toml` and the functions' directories.
    pub examples: PathBuf,
    /// The directory with their layers, built for the interpreter's version.
    pub layers: PathBuf,
    /// The directory with installed runtimes.
    pub runtimes: PathBuf,
    /// The runtime's name, such as `python3.11`.
    pub runtime: String,
    /// The interpreter.
    pub python: PathBuf,
}

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
    /// What it does.
    #[serde(default)]
    pub description: String,
    /// Its handler, such as `app.handler`.
    pub handler: String,
    layers: Vec<String>,
    /// Memory limit of one sandbox, MiB.
    pub memory_mib: u32,
    /// How long one request may run, seconds.
    pub timeout_s: u64,
    /// Whether it is one of the few that are shown by default.
    #[serde(default)]
    small: bool,
    #[serde(default)]
    events: Vec<toml::Table>,
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

    /// Environment variables for every function.
    #[must_use]
    pub fn environment(&self) -> &BTreeMap<String, String> {
        &self.environment
    }
}

impl Example {
    /// The directory with its code.
    #[must_use]
    pub fn code(&self, source: &Source) -> PathBuf {
        source.examples.join(self.name.as_str())
    }

    /// The directories of its layers.
    ///
    /// # Errors
    /// If one of them has not been built.
    pub fn layers(&self, source: &Source) -> Result<Vec<PathBuf>> {
        let find = |name: &String| {
            let path = source.layers.join(name);
            path.canonicalize().with_context(|| {
                format!("no layer {}; scripts/build-layers builds it", path.display())
            })
        };
        self.layers.iter().map(find).collect()
    }

    /// Requests of the default size, each with another input.
    #[must_use]
    pub fn plain_events(&self, n: usize) -> Vec<Value> {
        (0..n).map(|seed| json!({ "seed": 1000 + seed })).collect()
    }

    /// Requests like the samples of the manifest, of several sizes, each with another input.
    #[must_use]
    pub fn mixed_events(&self, n: usize) -> Vec<Value> {
        (0..n).map(|n| self.mixed_event(n)).collect()
    }

    /// The `n`th of those.
    #[must_use]
    pub fn mixed_event(&self, n: usize) -> Value {
        let sample = self.events.get(n % self.events.len().max(1));
        let mut event = sample.map_or_else(|| json!({}), |t| json!(t));
        event["seed"] = json!(100_000 + n);
        event
    }

    /// Answers `events` outside of any platform: the function's handler in a Python process.
    ///
    /// # Errors
    /// If that process fails.
    pub fn cases(&self, source: &Source, events: &[Value]) -> Result<Vec<Case>> {
        let mut command = Command::new(&source.python);
        command.arg(source.examples.join("reference.py"));
        command.arg(self.code(source));
        for layer in self.layers(source)? {
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
        let nowhere = PathBuf::from("/nonexistent");
        let source = Source {
            examples: nowhere.clone(),
            layers: nowhere.clone(),
            runtimes: nowhere,
            python: "python3".into(),
            runtime: "python3.11".into(),
        };
        let m = manifest();
        let e = m.functions[1].layers(&source).unwrap_err();
        assert!(format!("{e:#}").contains("/nonexistent/numpy"), "{e:#}");
        assert!(m.functions[0].layers(&source).is_ok());
    }
}
